#include "parallel.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct job {
    fp_task task;
    void *context;
    size_t items;
    atomic_size_t next;
} job;

typedef struct worker {
    job *job;
    int index;
} worker;

static void work(job *j, int index)
{
    for (;;) {
        size_t item = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (item >= j->items)
            return;
        j->task(j->context, item, index);
    }
}

static void *start(void *argument)
{
    worker *w = argument;
    work(w->job, w->index);
    return NULL;
}

int fp_clamp_threads(int threads)
{
    return threads < 1 ? 1 : threads > FP_MAX_THREADS ? FP_MAX_THREADS : threads;
}

/* Threads live for one call: starting them costs tens of microseconds against calls of
 * milliseconds, and leaves nothing behind for fork() or interpreter shutdown to trip over. */
void fp_parallel_for(size_t items, int threads, fp_task task, void *context)
{
    job j = {.task = task, .context = context, .items = items};
    atomic_init(&j.next, 0);
    threads = fp_clamp_threads(threads);
    if ((size_t)threads > items)
        threads = items ? (int)items : 1;

    pthread_t handles[FP_MAX_THREADS];
    worker workers[FP_MAX_THREADS];
    int started = 0;
    for (int i = 1; i < threads; i++) {
        workers[started] = (worker){&j, i};
        if (pthread_create(&handles[started], NULL, start, &workers[started]))
            break;
        started++;
    }
    work(&j, 0);
    for (int i = 0; i < started; i++)
        pthread_join(handles[i], NULL);
}
