/* One small thread pool of our own: no OpenMP runtime beside the one a host program may bring. */
#ifndef FOLDPRUNE_PARALLEL_H
#define FOLDPRUNE_PARALLEL_H

#include <stddef.h>

typedef void (*fp_task)(void *context, size_t item, int worker);

/* Calls task(context, i, worker) for every i in [0, items), on up to `threads` threads (the caller
 * is worker 0). Items are taken in order but end in any; the result must not depend on which worker
 * an item lands on. If a thread cannot be started, the others do its work. */
void fp_parallel_for(size_t items, int threads, fp_task task, void *context);

enum { FP_MAX_THREADS = 64 };

/* threads clamped to [1, FP_MAX_THREADS]. */
int fp_clamp_threads(int threads);

#endif
