/* Threads: a small pool of our own, or the host program's OpenMP team where it lends one, as two
 * pools on the same processors wait for each other. */
#ifndef FOLDPRUNE_PARALLEL_H
#define FOLDPRUNE_PARALLEL_H

#include <stddef.h>

typedef void (*fp_task)(void *context, size_t item, int worker);

/* Calls task(context, i, worker) for every i in [0, items), on up to `threads` threads, each of
 * them another worker in [0, threads). Items are taken in order but end in any; the result must not
 * depend on which worker an item lands on. If a thread cannot be started, the others do its work.
 */
void fp_parallel_for(size_t items, int threads, fp_task task, void *context);

/* libgomp's GOMP_parallel, which other OpenMP runtimes have too: calls body(data) on up to
 * `threads` threads, the caller among them. */
typedef void (*fp_team)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

/* From now on all calls of this process use this team; NULL: the pool. A child process forgets it,
 * as OpenMP's threads do not survive a fork. */
void fp_parallel_use(fp_team team);

enum { FP_MAX_THREADS = 64 };

/* threads clamped to [1, FP_MAX_THREADS]. */
int fp_clamp_threads(int threads);

#endif
