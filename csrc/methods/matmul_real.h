/* The products of matmul.c for one type: REAL, and NAME(x) that makes its names. The file that
 * includes this has the kernels by those names.
 *
 * Activations are first transposed to tiles, and then tiles of the result are made from them. Where
 * there are tokens enough, a task does both for a tile of tokens, so that what is transposed stays
 * in the second cache of its processor. Else, and for the gradient, which adds up over tokens,
 * these go through in chunks, so that what is transposed has a bounded size: all of a chunk is
 * transposed, then tasks make tiles of the result. */

typedef struct NAME(buffer) {
    REAL sums[GROUP * FP_TILE * FP_WIDTH_MAX];
    REAL values[FP_TILE * FP_TILE];
} NAME(buffer);

typedef struct NAME(call) {
    const fp_kernels *kernels;
    const fp_packed *p;
    const REAL *x, *dy, *bias;
    REAL *y;       /* what is computed: y, dx or dvalues */
    size_t tokens; /* of the chunk */
    size_t token_tiles;
    size_t group; /* rows (columns) of tiles that a task makes */
    REAL *xt, *dyt;
    NAME(buffer) * buffers; /* one for every worker */
} NAME(call);

/* Where a tile of tokens begins in transposed activations; its tiles of features follow. */
static REAL *NAME(panel)(REAL *t, size_t features, const token_tile *tokens)
{
    return t + tokens->first * fp_tiles_in(features) * FP_TILE;
}

/* Rows are features, of which those past the last are zero, as are tokens up to the width. */
static void NAME(transpose_tile)(const NAME(call) * c, const REAL *x, const float *scale,
                                 size_t features, size_t feature, const token_tile *tokens,
                                 REAL *panel)
{
    (void)c; /* float64 has but one kernel */
    size_t cols = fp_tile_size(features, feature), size = FP_TILE * tokens->width;
    size_t next = feature + 1 < fp_tiles_in(features) ? fp_tile_size(features, feature + 1) : 0;
    REAL *t = panel + feature * size;
    x += tokens->first * features + feature * FP_TILE;
    for (size_t i = 0; i < tokens->count; i += FP_WIDTH_STEP) {
        size_t rows = tokens->count - i < FP_WIDTH_STEP ? tokens->count - i : FP_WIDTH_STEP;
        for (size_t row = i; row < i + rows; row++)
            prefetch(x + row * features + FP_TILE, next * sizeof(REAL));
        if (next)
            prefetch_part(t + size, size * sizeof(REAL), i, tokens->width);
        NAME(transpose)(c->kernels, x + i * features, features, rows, cols, t + i, tokens->width);
    }
    for (size_t j = 0; j < FP_TILE; j++, t += tokens->width) {
        size_t used = j < cols ? tokens->count : 0;
        for (size_t i = 0; i < used && scale; i++)
            t[i] *= (REAL)scale[feature * FP_TILE + j];
        for (size_t i = used; i < tokens->width; i++)
            t[i] = 0;
    }
}

/* Sums of tiles [first, end) of features back to rows of tokens. */
static void NAME(store)(const NAME(call) * c, const REAL *sums, size_t features, size_t first,
                        size_t end, const token_tile *tokens)
{
    size_t begin = first * FP_TILE, last = end * FP_TILE < features ? end * FP_TILE : features;
    NAME(transpose)(c->kernels, sums, tokens->width, last - begin, tokens->count,
                    c->y + tokens->first * features + begin, features);
}

/* Rows of tiles [first, end) of the result for a tile of tokens, from xt, its activations. */
static void NAME(forward_tiles)(const NAME(call) * c, const token_tile *tokens, const REAL *xt,
                                size_t first, size_t end, NAME(buffer) * b)
{
    const fp_packed *p = c->p;
    size_t size = FP_TILE * tokens->width;
    memset(b->sums, 0, (end - first) * size * sizeof(REAL));
    for (size_t col = 0; col < fp_tiles_in(p->cols); col++) {
        const REAL *x = xt + col * size;
        for (size_t row = first; row < end; row++) {
            fp_tile tile = fp_packed_tile(p, row, col);
            const REAL *values = NAME(values)(c->kernels, p, tile.offset, tile.kept, b->values);
            if (col + 1 < fp_tiles_in(p->cols))
                prefetch_part(x + size, size * sizeof(REAL), row - first, end - first);
            NAME(forward)(c->kernels, tile.mask, tile.rows, values, x, tokens->width,
                          b->sums + (row - first) * size);
        }
    }
    REAL *y = b->sums;
    for (size_t r = first * FP_TILE; r < end * FP_TILE && r < p->rows; r++, y += tokens->width) {
        REAL scale = p->scale ? (REAL)p->scale[r] : 1, bias = c->bias ? c->bias[r] : 0;
        for (size_t t = 0; t < tokens->width && (p->scale || c->bias); t++)
            y[t] = y[t] * scale + bias;
    }
    NAME(store)(c, b->sums, p->rows, first, end, tokens);
}

/* Columns of tiles [first, end), from dyt. */
static void NAME(backward_tiles)(const NAME(call) * c, const token_tile *tokens, const REAL *dyt,
                                 size_t first, size_t end, NAME(buffer) * b)
{
    const fp_packed *p = c->p;
    size_t size = FP_TILE * tokens->width;
    memset(b->sums, 0, (end - first) * size * sizeof(REAL));
    for (size_t row = 0; row < fp_tiles_in(p->rows); row++) {
        const REAL *dy = dyt + row * size;
        for (size_t col = first; col < end; col++) {
            fp_tile tile = fp_packed_tile(p, row, col);
            const REAL *values = NAME(values)(c->kernels, p, tile.offset, tile.kept, b->values);
            if (col + 1 < end)
                prefetch_tile(p, row, col + 1);
            else
                prefetch_tile(p, row + 1, first);
            if (row + 1 < fp_tiles_in(p->rows))
                prefetch_part(dy + size, size * sizeof(REAL), col - first, end - first);
            NAME(backward)(c->kernels, tile.mask, tile.rows, values, dy, tokens->width,
                           b->sums + (col - first) * size);
        }
    }
    NAME(store)(c, b->sums, p->cols, first, end, tokens);
}

/* ---- tasks for a tile of tokens, whose activations a worker transposes for itself ---- */

static REAL *NAME(own_panel)(REAL *t, size_t features, int worker)
{
    return t + (size_t)worker * FP_WIDTH_MAX * fp_tiles_in(features) * FP_TILE;
}

static void NAME(forward_own)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    size_t down = fp_tiles_in(c->p->rows);
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item);
    REAL *xt = NAME(own_panel)(c->xt, c->p->cols, worker);
    for (size_t col = 0; col < fp_tiles_in(c->p->cols); col++)
        NAME(transpose_tile)(c, c->x, NULL, c->p->cols, col, &tokens, xt);
    for (size_t first = 0; first < down; first += GROUP)
        NAME(forward_tiles)(c, &tokens, xt, first, down - first < GROUP ? down : first + GROUP,
                            c->buffers + worker);
}

static void NAME(backward_own)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    size_t across = fp_tiles_in(c->p->cols);
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item);
    REAL *dyt = NAME(own_panel)(c->dyt, c->p->rows, worker);
    for (size_t row = 0; row < fp_tiles_in(c->p->rows); row++)
        NAME(transpose_tile)(c, c->dy, c->p->scale, c->p->rows, row, &tokens, dyt);
    for (size_t first = 0; first < across; first += GROUP)
        NAME(backward_tiles)(c, &tokens, dyt, first,
                             across - first < GROUP ? across : first + GROUP, c->buffers + worker);
}

/* ---- tasks for a chunk ---- */

static void NAME(transpose_x)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    (void)worker;
    size_t tiles = fp_tiles_in(c->p->cols);
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item / tiles);
    NAME(transpose_tile)(c, c->x, NULL, c->p->cols, item % tiles, &tokens,
                         NAME(panel)(c->xt, c->p->cols, &tokens));
}

static void NAME(transpose_dy)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    (void)worker;
    size_t tiles = fp_tiles_in(c->p->rows);
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item / tiles);
    NAME(transpose_tile)(c, c->dy, c->p->scale, c->p->rows, item % tiles, &tokens,
                         NAME(panel)(c->dyt, c->p->rows, &tokens));
}

static void NAME(forward_task)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item % c->token_tiles);
    size_t first = item / c->token_tiles * c->group, down = fp_tiles_in(c->p->rows);
    NAME(forward_tiles)(c, &tokens, NAME(panel)(c->xt, c->p->cols, &tokens), first,
                        down - first < c->group ? down : first + c->group, c->buffers + worker);
}

static void NAME(backward_task)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item % c->token_tiles);
    size_t first = item / c->token_tiles * c->group, across = fp_tiles_in(c->p->cols);
    NAME(backward_tiles)(c, &tokens, NAME(panel)(c->dyt, c->p->rows, &tokens), first,
                         across - first < c->group ? across : first + c->group,
                         c->buffers + worker);
}

/* Rows of tiles, each with all tokens of the chunk in order. */
static void NAME(gradient_task)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    const fp_packed *p = c->p;
    size_t first = item * c->group, down = fp_tiles_in(p->rows);
    size_t end = down - first < c->group ? down : first + c->group;
    (void)worker;
    for (size_t i = 0; i < c->token_tiles; i++) {
        token_tile tokens = token_tile_of(c->tokens, c->token_tiles, i);
        size_t size = FP_TILE * tokens.width;
        const REAL *xt = NAME(panel)(c->xt, p->cols, &tokens);
        const REAL *dyt = NAME(panel)(c->dyt, p->rows, &tokens);
        for (size_t col = 0; col < fp_tiles_in(p->cols); col++) {
            const REAL *x = xt + col * size;
            for (size_t row = first; row < end; row++) {
                fp_tile tile = fp_packed_tile(p, row, col);
                if (col + 1 < fp_tiles_in(p->cols))
                    prefetch_part(x + size, size * sizeof(REAL), row - first, end - first);
                NAME(gradient)(c->kernels, tile.mask, tile.rows, dyt + row * size, x, tokens.width,
                               c->y + tile.offset);
            }
        }
    }
}

/* Workspace: transposed activations of a chunk or of every worker's tile of tokens, then buffers.
 * With base NULL only their size. */
static size_t NAME(plan)(NAME(call) * c, size_t tokens, int threads, char *base)
{
    size_t used = 0, workers = (size_t)fp_clamp_threads(threads);
    size_t most = tokens < CHUNK ? tokens : CHUNK, tiles = own_tiles(tokens, threads);
    most = (most + FP_WIDTH_STEP - 1) / FP_WIDTH_STEP * FP_WIDTH_STEP;
    size_t own = tiles < workers ? tiles * FP_WIDTH_MAX : workers * FP_WIDTH_MAX;
    size_t width = (own > most ? own : most) * FP_TILE;
    c->xt = fp_take(base, &used, fp_tiles_in(c->p->cols) * width, sizeof(REAL));
    c->dyt = fp_take(base, &used, fp_tiles_in(c->p->rows) * width, sizeof(REAL));
    c->buffers = fp_take(base, &used, workers, sizeof(NAME(buffer)));
    return used;
}

/* The largest group of tiles that gives every thread a few tasks. */
static size_t NAME(group)(size_t tiles, size_t token_tiles, int threads)
{
    size_t group = GROUP;
    while (group > 1 && (tiles + group - 1) / group * token_tiles < 4 * (size_t)threads)
        group--;
    return threads > 1 ? group : GROUP;
}

typedef enum NAME(kind) { NAME(FORWARD), NAME(BACKWARD), NAME(GRADIENT) } NAME(kind);

static const fp_task NAME(tasks)[] = {NAME(forward_task), NAME(backward_task), NAME(gradient_task)};

static void NAME(run)(NAME(call) call, NAME(kind) kind, size_t tokens, int threads, void *work)
{
    const fp_packed *p = call.p;
    size_t down = fp_tiles_in(p->rows), across = fp_tiles_in(p->cols);
    NAME(plan)(&call, tokens, threads, work);
    size_t own = kind == NAME(GRADIENT) ? 0 : own_tiles(tokens, threads);
    if (own) {
        call.tokens = tokens;
        call.token_tiles = own;
        fp_parallel_for(own, threads,
                        kind == NAME(FORWARD) ? NAME(forward_own) : NAME(backward_own), &call);
        return;
    }
    for (size_t begin = 0; begin < tokens; begin += CHUNK) {
        NAME(call) c = call;
        c.tokens = tokens - begin < CHUNK ? tokens - begin : CHUNK;
        c.token_tiles = (c.tokens + FP_WIDTH_MAX - 1) / FP_WIDTH_MAX;
        if (kind != NAME(BACKWARD)) {
            c.x += begin * p->cols;
            fp_parallel_for(c.token_tiles * across, threads, NAME(transpose_x), &c);
        }
        if (kind != NAME(FORWARD)) {
            c.dy += begin * p->rows;
            fp_parallel_for(c.token_tiles * down, threads, NAME(transpose_dy), &c);
        }
        size_t tiles = kind == NAME(BACKWARD) ? across : down;
        /* a task of `gradient` has all tokens, others one tile of them */
        size_t times = kind == NAME(GRADIENT) ? 1 : c.token_tiles;
        if (kind != NAME(GRADIENT))
            c.y += begin * (kind == NAME(FORWARD) ? p->rows : p->cols);
        c.group = NAME(group)(tiles, times, threads);
        fp_parallel_for((tiles + c.group - 1) / c.group * times, threads, NAME(tasks)[kind], &c);
    }
}
