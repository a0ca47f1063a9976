/* Exact thresholds by radix selection on the bits of the scores: as unsigned integers, the bits of
 * non-negative floats stand in the order of their values. Two passes of 15 and 16 bits for float32
 * scores, four of 16 where a float64 matrix takes part. */
#include <math.h>
#include <string.h>

#include "parallel.h"
#include "scores.h"

enum { DIGITS = 1 << 16 };

/* Per-worker counts. The kernel counts in 32 bits; they are moved to 64 before they could wrap. */
typedef struct counts {
    uint64_t wide[DIGITS];
    uint32_t narrow[DIGITS];
    uint64_t pending;
} counts;

typedef struct pass {
    const fp_kernels *kernels;
    const fp_scored *t;
    counts *workers;
    uint64_t prefix; /* only scores whose bits above `shift + 16` equal this take part */
    unsigned shift;
} pass;

static void flush(counts *c)
{
    for (size_t i = 0; i < DIGITS; i++) {
        c->wide[i] += c->narrow[i];
        c->narrow[i] = 0;
    }
    c->pending = 0;
}

static void reserve(counts *c, size_t n)
{
    if (c->pending + n > UINT32_MAX)
        flush(c);
    c->pending += n;
}

static size_t chunk_end(const fp_scored *t, size_t item)
{
    size_t n = fp_scored_size(t), end = (item + 1) * FP_CHUNK;
    return end < n ? end : n;
}

/* Of float32 scores, bits 30..16 (shift 16), or bits 15..0 of those with the prefix (shift 0). */
static void count_single(void *context, size_t item, int worker)
{
    pass *p = context;
    counts *c = &p->workers[worker];
    size_t end = chunk_end(p->t, item);
    float buffer[FP_PIECE];
    for (size_t i = item * FP_CHUNK; i < end; i += FP_PIECE) {
        size_t n = end - i < FP_PIECE ? end - i : FP_PIECE;
        const float *s = fp_scores_load(p->kernels, p->t, i, n, buffer);
        reserve(c, n);
        if (!p->shift) {
            p->kernels->histogram_low(s, n, (uint32_t)p->prefix, c->narrow);
            continue;
        }
        for (size_t j = 0; j < n; j++) {
            uint32_t bits;
            memcpy(&bits, &s[j], sizeof bits);
            c->narrow[(bits >> 16) & 0x7fffu]++;
        }
    }
}

/* Sixteen bits of float64 scores. */
static void count_double(void *context, size_t item, int worker)
{
    pass *p = context;
    counts *c = &p->workers[worker];
    size_t end = chunk_end(p->t, item);
    double buffer[FP_PIECE / 2];
    for (size_t i = item * FP_CHUNK; i < end; i += FP_PIECE / 2) {
        size_t n = end - i < FP_PIECE / 2 ? end - i : FP_PIECE / 2;
        fp_scores_load_double(p->t, i, n, buffer);
        reserve(c, n);
        for (size_t j = 0; j < n; j++) {
            uint64_t bits;
            memcpy(&bits, &buffer[j], sizeof bits);
            if (p->shift == 48 || bits >> (p->shift + 16) == p->prefix)
                c->narrow[(bits >> p->shift) & 0xffffu]++;
        }
    }
}

/* One pass over all matrices; the sum over workers ends in workers[0].wide. */
static const uint64_t *run_pass(pass *p, const fp_scored *t, size_t count, int threads,
                                fp_task task)
{
    memset(p->workers, 0, (size_t)threads * sizeof *p->workers);
    for (size_t i = 0; i < count; i++) {
        p->t = &t[i];
        fp_parallel_for(fp_chunks(fp_scored_size(&t[i])), threads, task, p);
    }
    for (int w = 0; w < threads; w++) {
        flush(&p->workers[w]);
        for (size_t i = 0; w && i < DIGITS; i++)
            p->workers[0].wide[i] += p->workers[w].wide[i];
    }
    return p->workers[0].wide;
}

static fp_status check_all(const fp_scored *t, size_t count, uint64_t *total, int *any_double)
{
    if (count && !t)
        return FP_ERR_ARGUMENT;
    *total = 0;
    *any_double = 0;
    for (size_t i = 0; i < count; i++) {
        fp_status status = fp_scored_check(&t[i]);
        if (status)
            return status;
        *total += fp_scored_size(&t[i]);
        *any_double |= t[i].dtype == FP_F64;
    }
    return FP_OK;
}

size_t fp_select_work(int threads)
{
    return (size_t)fp_clamp_threads(threads) * sizeof(counts);
}

fp_status fp_histogram(const fp_kernels *kernels, const fp_scored *t, size_t count,
                       uint64_t histogram[FP_HISTOGRAM_BINS], int threads, void *work,
                       size_t work_bytes)
{
    uint64_t total;
    int any_double;
    fp_status status = check_all(t, count, &total, &any_double);
    if (status)
        return status;
    threads = fp_clamp_threads(threads);
    if (!kernels || !histogram || !work || work_bytes < fp_select_work(threads))
        return FP_ERR_ARGUMENT;
    pass p = {.kernels = kernels, .workers = work, .shift = 16};
    memcpy(histogram, run_pass(&p, t, count, threads, count_single),
           FP_HISTOGRAM_BINS * sizeof *histogram);
    return FP_OK;
}

/* The digit in which the rank-th smallest (from 0) lies; *rank becomes its rank in that digit. */
static uint64_t locate(const uint64_t *histogram, uint64_t *rank)
{
    uint64_t digit = 0;
    while (digit < DIGITS - 1 && *rank >= histogram[digit])
        *rank -= histogram[digit++];
    return digit;
}

fp_status fp_select(const fp_kernels *kernels, const fp_scored *t, size_t count, uint64_t k,
                    fp_threshold *out, int threads, void *work, size_t work_bytes)
{
    uint64_t total;
    int any_double;
    fp_status status = check_all(t, count, &total, &any_double);
    if (status)
        return status;
    threads = fp_clamp_threads(threads);
    if (!kernels || !out || !work || work_bytes < fp_select_work(threads))
        return FP_ERR_ARGUMENT;
    if (k > total)
        return FP_ERR_RANGE;
    if (k == 0 || k == total) {
        *out = (fp_threshold){k ? INFINITY : 0.0, 0};
        return FP_OK;
    }

    pass p = {.kernels = kernels, .workers = work};
    uint64_t rank = k - 1;
    if (any_double) {
        uint64_t bits = 0;
        for (int shift = 48; shift >= 0; shift -= 16) {
            p.shift = (unsigned)shift;
            p.prefix = bits;
            bits = bits << 16 | locate(run_pass(&p, t, count, threads, count_double), &rank);
        }
        memcpy(&out->score, &bits, sizeof bits);
    } else {
        p.shift = 16;
        p.prefix = locate(run_pass(&p, t, count, threads, count_single), &rank);
        p.shift = 0;
        uint64_t low = locate(run_pass(&p, t, count, threads, count_single), &rank);
        uint32_t bits = (uint32_t)(p.prefix << 16 | low);
        float score;
        memcpy(&score, &bits, sizeof bits);
        out->score = score;
    }
    out->ties = rank + 1; /* of the equal ones, those of rank 0 .. rank */
    return FP_OK;
}

double fp_kth_smallest(double *x, size_t n, size_t k)
{
    size_t low = 0, high = n - 1;
    uint32_t random = 2463534242u;
    while (low < high) {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        double pivot = x[low + random % (high - low + 1)];
        size_t i = low, j = high;
        for (;;) { /* Hoare's partition: stops on equal elements, so all-equal rows stay balanced */
            while (x[i] < pivot)
                i++;
            while (x[j] > pivot)
                j--;
            if (i >= j)
                break;
            double swap = x[i];
            x[i++] = x[j];
            x[j--] = swap;
        }
        /* now x[low .. i) <= pivot <= x(j .. high], and i is j (there stands the pivot) or j + 1 */
        if (i == j && k == i)
            return pivot;
        if (k < i)
            high = i - 1;
        else
            low = j + 1;
    }
    return x[k];
}
