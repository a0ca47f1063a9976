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

/* Activations as they come, and transposed. */
typedef struct NAME(side) {
    const REAL *rows;   /* of tokens */
    const float *scale; /* of features, or NULL */
    size_t features;
    REAL *t;
} NAME(side);

typedef struct NAME(call) NAME(call);

/* Makes tiles [first, end) of the result's features for a tile of tokens, from its panel of
 * transposed activations. */
typedef void NAME(maker)(const NAME(call) * c, const token_tile *tokens, const REAL *panel,
                         size_t first, size_t end, NAME(buffer) * b);

struct NAME(call) {
    const fp_kernels *kernels;
    const fp_packed *p;
    const REAL *bias;
    NAME(side) x, dy;
    const NAME(side) * from; /* what is transposed or has been: x or dy */
    NAME(maker) * make;
    size_t results; /* tiles of the result's features */
    REAL *y;        /* what is computed: y, dx or dvalues */
    size_t tokens;  /* of the chunk */
    size_t token_tiles;
    size_t group;           /* tiles of results that a task makes */
    NAME(buffer) * buffers; /* one for every worker */
};

/* Where a tile of tokens begins in transposed activations; its tiles of features follow. */
static REAL *NAME(panel)(const NAME(side) * side, const token_tile *tokens)
{
    return side->t + tokens->first * fp_tiles_in(side->features) * FP_TILE;
}

/* Rows are features, of which those past the last are zero, as are tokens up to the width. */
static void NAME(transpose_tile)(const NAME(call) * c, size_t feature, const token_tile *tokens,
                                 REAL *panel)
{
    const float *scale = c->from->scale;
    size_t features = c->from->features;
    size_t cols = fp_tile_size(features, feature), size = FP_TILE * tokens->width;
    size_t next = feature + 1 < fp_tiles_in(features) ? fp_tile_size(features, feature + 1) : 0;
    REAL *t = panel + feature * size;
    const REAL *x = c->from->rows + tokens->first * features + feature * FP_TILE;
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

/* Rows of tiles [first, end). */
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
            NAME(forward)(c->kernels, tile.mask, tile.rows, values, tile.kept, x, tokens->width,
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

/* Columns of tiles [first, end). */
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

static void NAME(make_tiles)(const NAME(call) * c, const token_tile *tokens, const REAL *panel,
                             size_t first, int worker)
{
    size_t end = c->results - first < c->group ? c->results : first + c->group;
    c->make(c, tokens, panel, first, end, c->buffers + worker);
}

/* A tile of tokens, whose activations a worker transposes for itself. */
static void NAME(own_task)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    size_t tiles = fp_tiles_in(c->from->features);
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item);
    REAL *panel = c->from->t + (size_t)worker * FP_WIDTH_MAX * tiles * FP_TILE;
    for (size_t feature = 0; feature < tiles; feature++)
        NAME(transpose_tile)(c, feature, &tokens, panel);
    for (size_t first = 0; first < c->results; first += c->group)
        NAME(make_tiles)(c, &tokens, panel, first, worker);
}

/* ---- tasks for a chunk ---- */

static void NAME(transpose_task)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    (void)worker;
    size_t tiles = fp_tiles_in(c->from->features);
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item / tiles);
    NAME(transpose_tile)(c, item % tiles, &tokens, NAME(panel)(c->from, &tokens));
}

static void NAME(make_task)(void *context, size_t item, int worker)
{
    NAME(call) *c = context;
    token_tile tokens = token_tile_of(c->tokens, c->token_tiles, item % c->token_tiles);
    NAME(make_tiles)(c, &tokens, NAME(panel)(c->from, &tokens), item / c->token_tiles * c->group,
                     worker);
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
        const REAL *xt = NAME(panel)(&c->x, &tokens);
        const REAL *dyt = NAME(panel)(&c->dy, &tokens);
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
    size_t most = tokens < CHUNK ? tokens : CHUNK;
    size_t shared = (most + FP_WIDTH_STEP - 1) / FP_WIDTH_STEP * FP_WIDTH_STEP;
    size_t own = tokens < workers * LEAST_OWN ? 0 : workers * FP_WIDTH_MAX; /* if any */
    size_t width = (own > shared ? own : shared) * FP_TILE;
    c->x.t = fp_take(base, &used, fp_tiles_in(c->p->cols) * width, sizeof(REAL));
    c->dy.t = fp_take(base, &used, fp_tiles_in(c->p->rows) * width, sizeof(REAL));
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

static void NAME(transpose_chunk)(NAME(call) * c, const NAME(side) * side, int threads)
{
    c->from = side;
    fp_parallel_for(c->token_tiles * fp_tiles_in(side->features), threads, NAME(transpose_task), c);
}

static void NAME(run)(NAME(call) c, fp_product product, const REAL *x, const REAL *dy,
                      size_t tokens, int threads, void *work)
{
    size_t rows = c.p->rows, cols = c.p->cols, features = product == FP_BACKWARD ? cols : rows;
    c.x = (NAME(side)){.rows = x, .features = cols};
    c.dy = (NAME(side)){.rows = dy, .scale = c.p->scale, .features = rows};
    c.from = product == FP_FORWARD ? &c.x : &c.dy;
    c.make = product == FP_FORWARD ? NAME(forward_tiles) : NAME(backward_tiles);
    c.results = fp_tiles_in(features);
    NAME(plan)(&c, tokens, threads, work);
    size_t width = fp_best_width(c.kernels->matmul);
    size_t own = product == FP_GRADIENT ? 0 : own_tiles(tokens, width, threads);
    if (own) {
        c.tokens = tokens;
        c.token_tiles = own;
        c.group = GROUP;
        fp_parallel_for(own, threads, NAME(own_task), &c);
        return;
    }
    for (size_t begin = 0; begin < tokens; begin += c.tokens) {
        c.tokens = tokens - begin < CHUNK ? tokens - begin : CHUNK;
        c.token_tiles = (c.tokens + width - 1) / width;
        if (product != FP_BACKWARD)
            NAME(transpose_chunk)(&c, &c.x, threads);
        if (product != FP_FORWARD)
            NAME(transpose_chunk)(&c, &c.dy, threads);
        /* a task of `gradient` has all tokens, others one tile of them */
        size_t times = product == FP_GRADIENT ? 1 : c.token_tiles;
        c.group = NAME(group)(c.results, times, threads);
        fp_parallel_for((c.results + c.group - 1) / c.group * times, threads,
                        product == FP_GRADIENT ? NAME(gradient_task) : NAME(make_task), &c);
        if (product != FP_BACKWARD)
            c.x.rows += c.tokens * cols;
        if (product != FP_FORWARD)
            c.dy.rows += c.tokens * rows;
        if (product != FP_GRADIENT)
            c.y += c.tokens * features;
    }
}
