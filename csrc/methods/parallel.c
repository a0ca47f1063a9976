#define _GNU_SOURCE /* for affinities */
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#include "lapack.h"

/* A job's state in one word, so that joining and closing cannot cross: its number, whether it is
 * open, and how many workers are in it. A worker that comes late finds the job closed and is not
 * waited for. */
enum { ACTIVE = 0xffff, OPEN = 1 << 16, NUMBER_SHIFT = 17 };

/* Before a thread sleeps: a few tenths of a millisecond, as waking it may take one, and calls come
 * in a row with a little other work between them. A caller yields meanwhile, as what it waits for
 * may not run; a worker that yielded to a thread which spins as well (BLAS's own) would be back
 * only after a time slice. */
enum { SPINS = 16384, SPINS_A_YIELD = 32 };

static struct pool {
    atomic_uint_fast64_t state;
    atomic_size_t next; /* the first item that nobody has taken */
    fp_task task;
    void *context;
    size_t items;
    int threads;          /* of the job, with the caller */
    int workers;          /* that exist */
    atomic_int processor; /* of the job's caller */
    atomic_int sleeping;
    pthread_mutex_t caller; /* held by the one call that has the pool */
    pthread_mutex_t lock;
    pthread_cond_t posted, finished;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .posted = PTHREAD_COND_INITIALIZER,
          .finished = PTHREAD_COND_INITIALIZER};

static inline void spin(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_items(int worker)
{
    for (;;) {
        size_t item = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (item >= pool.items)
            return;
        pool.task(pool.context, item, worker);
    }
}

/* The processor that the thread runs on, or -1. */
static int processor(void)
{
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Whether this worker is where the latest job's caller is: there it keeps the other from running.
 */
static int with_caller(void)
{
    int taken = atomic_load_explicit(&pool.processor, memory_order_relaxed);
    return taken >= 0 && taken == processor();
}

/* A worker may have been woken on the processor of the job's caller, and would stay there for as
 * long as calls come in a row while others are idle: it moves, and may then be anywhere again. */
static void leave_caller(void)
{
#if defined(__linux__)
    cpu_set_t all, others;
    if (!with_caller() || sched_getaffinity(0, sizeof all, &all))
        return;
    others = all;
    CPU_CLR(processor(), &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof all, &all);
#endif
}

static uint64_t await_other(uint64_t number)
{
    uint64_t state = atomic_load(&pool.state);
    for (int i = 0; i < SPINS && state >> NUMBER_SHIFT == number; i++) {
        if (i % SPINS_A_YIELD == SPINS_A_YIELD - 1 && with_caller())
            sched_yield();
        spin();
        state = atomic_load(&pool.state);
    }
    if (state >> NUMBER_SHIFT != number)
        return state;
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1);
    while ((state = atomic_load(&pool.state)) >> NUMBER_SHIFT == number)
        pthread_cond_wait(&pool.posted, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
    return state;
}

static void *serve(void *argument)
{
    int worker = (int)(intptr_t)argument;
    uint64_t seen = 0;
    for (;;) {
        uint_fast64_t state = await_other(seen);
        seen = state >> NUMBER_SHIFT;
        leave_caller();
        int joined = 0;
        while (!joined && state & OPEN && state >> NUMBER_SHIFT == seen)
            joined = atomic_compare_exchange_weak(&pool.state, &state, state + 1);
        if (!joined)
            continue;
        if (worker < pool.threads)
            take_items(worker);
        state = atomic_fetch_sub(&pool.state, 1) - 1;
        if (!(state & (OPEN | ACTIVE))) { /* the caller may be asleep */
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.finished);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

static _Atomic(fp_team) team;

/* A child process has this thread alone: its pool starts anew. */
static void after_fork(void)
{
    atomic_store(&team, NULL);
    static const struct pool fresh = {.caller = PTHREAD_MUTEX_INITIALIZER,
                                      .lock = PTHREAD_MUTEX_INITIALIZER,
                                      .posted = PTHREAD_COND_INITIALIZER,
                                      .finished = PTHREAD_COND_INITIALIZER};
    pool = fresh;
}

static void register_fork(void)
{
    pthread_atfork(NULL, NULL, after_fork);
}

static void watch_forks(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork);
}

static void start_workers(int count)
{
    watch_forks();
    pthread_attr_t attributes;
    if (pool.workers >= count || pthread_attr_init(&attributes))
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; pool.workers < count; pool.workers++)
        if (pthread_create(&thread, &attributes, serve, (void *)(intptr_t)(pool.workers + 1)))
            break; /* the others do its work */
    pthread_attr_destroy(&attributes);
}

/* With the pool's caller lock held. */
static void run_pooled(size_t items, int threads, fp_task task, void *context)
{
    start_workers(threads - 1);
    pool.task = task;
    pool.context = context;
    pool.items = items;
    pool.threads = threads;
    atomic_store_explicit(&pool.processor, processor(), memory_order_relaxed);
    atomic_store(&pool.next, 0);
    uint64_t number = (atomic_load(&pool.state) >> NUMBER_SHIFT) + 1;
    atomic_store(&pool.state, number << NUMBER_SHIFT | OPEN);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.posted);
        pthread_mutex_unlock(&pool.lock);
    }
    take_items(0);
    uint64_t state = atomic_fetch_and(&pool.state, ~(uint64_t)OPEN);
    for (int i = 0; i < SPINS && state & ACTIVE; i++) {
        if (i % SPINS_A_YIELD == SPINS_A_YIELD - 1)
            sched_yield();
        spin();
        state = atomic_load(&pool.state);
    }
    if (!(state & ACTIVE))
        return;
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.state) & ACTIVE)
        pthread_cond_wait(&pool.finished, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

/* ---- the host's team ---- */

typedef struct team_job {
    fp_task task;
    void *context;
    size_t items;
    atomic_size_t next;
    atomic_int workers; /* that have come */
} team_job;

static void join_team(void *data)
{
    team_job *job = data;
    int worker = atomic_fetch_add(&job->workers, 1);
    for (size_t item; (item = atomic_fetch_add(&job->next, 1)) < job->items;)
        job->task(job->context, item, worker);
}

void fp_parallel_use(fp_team lent)
{
    watch_forks();
    atomic_store(&team, lent);
}

/* ---- */

int fp_clamp_threads(int threads)
{
    return threads < 1 ? 1 : threads > FP_MAX_THREADS ? FP_MAX_THREADS : threads;
}

/* A team is the calling thread's own. The pool serves one call at a time; another one that comes
 * meanwhile, from another thread or from inside a task, does its work itself. */
void fp_parallel_for(size_t items, int threads, fp_task task, void *context)
{
    if (fp_blas_threads() !=
        1) /* as at import, but threadpoolctl may raise it, and tasks call it */
        fp_blas_set_threads(1);
    threads = fp_clamp_threads(threads);
    if ((size_t)threads > items)
        threads = items ? (int)items : 1;
    fp_team lent = threads > 1 ? atomic_load(&team) : NULL;
    if (lent) {
        team_job job = {.task = task, .context = context, .items = items};
        lent(join_team, &job, (unsigned)threads, 0);
        return;
    }
    if (threads > 1 && !pthread_mutex_trylock(&pool.caller)) {
        run_pooled(items, threads, task, context);
        pthread_mutex_unlock(&pool.caller);
        return;
    }
    for (size_t item = 0; item < items; item++)
        task(context, item, 0);
}
