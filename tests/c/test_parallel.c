/* Threads: every item once, by a worker in range, in the pool and in a team that the host lends. */
#include <pthread.h>
#include <stdatomic.h>

#include "parallel.h"
#include "testing.h"

enum { ITEMS = 1000 };

typedef struct tally {
    atomic_int done[ITEMS];
    atomic_int strangers; /* workers out of range */
    int threads;
    struct tally *inner; /* of calls from inside a task */
} tally;

static void count(void *context, size_t item, int worker)
{
    tally *t = context;
    atomic_fetch_add(&t->done[item], 1);
    if (worker < 0 || worker >= t->threads)
        atomic_fetch_add(&t->strangers, 1);
    if (t->inner && item % 100 == 0)
        fp_parallel_for(2, 2, count, t->inner);
}

typedef struct member {
    void (*body)(void *);
    void *data;
} member;

static void *run_member(void *argument)
{
    member *m = argument;
    m->body(m->data);
    return NULL;
}

static atomic_int not_started; /* CHECK counts in the main thread alone */

static void whole_team(void (*body)(void *), void *data, unsigned threads, unsigned flags)
{
    pthread_t others[FP_MAX_THREADS];
    member m = {body, data};
    (void)flags;
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(&others[i], NULL, run_member, &m)) {
            atomic_fetch_add(&not_started, 1);
            threads = i;
        }
    body(data);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
}

/* As OpenMP gives where a limit is reached or calls are nested. */
static void caller_alone(void (*body)(void *), void *data, unsigned threads, unsigned flags)
{
    (void)threads;
    (void)flags;
    body(data);
}

static void test_items(const char *name, size_t items, int threads)
{
    static tally inner, t;
    inner = (tally){.threads = 2};
    t = (tally){.threads = threads, .inner = &inner};
    fp_parallel_for(items, threads, count, &t);
    for (size_t i = 0; i < ITEMS; i++)
        CHECK(t.done[i] == (i < items), "%s: item %zu of %zu was done %d times", name, i, items,
              t.done[i]);
    CHECK(!t.strangers && !inner.strangers, "%s, %d threads: a worker out of range", name, threads);
    for (size_t i = 0; i < 2; i++)
        CHECK((size_t)inner.done[i] == (items + 99) / 100, "%s: calls from inside tasks", name);
}

int main(void)
{
    const struct {
        const char *name;
        fp_team team;
    } ways[] = {
        {"pool", NULL}, {"team", whole_team}, {"caller alone", caller_alone}, {"pool again", NULL}};
    const size_t items[] = {0, 1, 2, 3, 100, ITEMS};
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
        fp_parallel_use(ways[w].team);
        for (size_t i = 0; i < sizeof items / sizeof items[0]; i++)
            for (int threads = 1; threads <= 5; threads++)
                test_items(ways[w].name, items[i], threads);
    }
    CHECK(!not_started, "%d threads of the team were not started", not_started);
    return finish();
}
