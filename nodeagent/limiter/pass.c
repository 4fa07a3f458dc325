/* Passes: while a slice's gate is open and its GPU is busy, a thread launches a few times on one stream without a look at the books.
 *
 * A pass is given after a launch that went the long way, for about as many launches as there may be until the next fence. It is a value
 * that the thread's own count of launches must stay below: the launch compares, counts and goes to the driver. Whoever holds the device's lock reads
 * from the count what was launched since, or ends the pass by writing 0. A launch that has been counted and not yet reached the
 * driver may be taken for done; that is one launch of a thread, once, and only this slice's turn is shorter for it.
 */
#include "busy.h"

/* Launches: an estimate may be wrong by much, of few observations by more. The long way costs a few us on a real driver (an event, and a lock that
 * it shares with the launches). */
#define PASS_MOST 128.0
#define PASS_FIRST 32.0
#define WELL_LEARNT 64

Pass nbgpu_pass[PASSES];

/* Into the books what was launched by passes since they were last looked at. Returns how many launches. */
uint32_t nbgpu_pass_fold(Busy *b, uint64_t now) {
    uint32_t all = 0;
    for (int i = 0; b == &nbgpu_busy[0] && i < PASSES; i++) {
        Pass *p = &nbgpu_pass[i];
        if (!p->given)
            continue;
        const uint64_t count = __atomic_load_n(p->word, __ATOMIC_ACQUIRE);
        const uint32_t made = (uint32_t)(count - p->folded);
        if (!made)
            continue;
        p->folded = count;
        all += made;
        Stream *s = nbgpu_stream_entry(b, p->stream, false);
        if (!s)
            continue;
        s->launches += made;
        s->work_ns += made * b->mean_ns;
        s->last_ns = now;
    }
    if (all) {
        b->launches += all;
        b->drained_ns = 0;
    }
    return all;
}

static void stop(Pass *p) {
    atomic_store(&p->until, 0);
    p->given = false;
}

/* End one pass, or all. */
void nbgpu_pass_stop(Busy *b, const Pass *only, uint64_t now) {
    if (b != &nbgpu_busy[0])
        return;
    for (int i = 0; i < PASSES; i++)
        if (!only || only == &nbgpu_pass[i])
            atomic_store(&nbgpu_pass[i].until, 0);
    nbgpu_pass_fold(b, now);
    for (int i = 0; i < PASSES; i++)
        if (!only || only == &nbgpu_pass[i])
            stop(&nbgpu_pass[i]);
}

void nbgpu_pass_stop_stream(Busy *b, CUstream stream, uint64_t now) {
    for (int i = 0; i < PASSES; i++)
        if (nbgpu_pass[i].given && nbgpu_pass[i].stream == stream)
            nbgpu_pass_stop(b, &nbgpu_pass[i], now);
}

/* The thread that has just launched may go on like this until the next fence is due, unless that is too much for the window or the turn. */
void nbgpu_pass_grant(Busy *b, const Launch *launch, uint64_t now) {
    const NbgpuCtlDevice *ctl = &nbgpu_ctl->device[launch->device];
    Pass *p = nbgpu_own_pass();
    if (!p || b != &nbgpu_busy[0] || launch->exec || launch->ptsz || launch->stream == CU_STREAM_PER_THREAD || b->learnt < LEARNT_AFTER ||
        b->mean_ns < 1 || nbgpu_any_capture() || nbgpu_overdue(b, now) || nbgpu_scheduler_dead(now))
        return;
    const double work = nbgpu_outstanding_ns(b, now, NULL);
    const uint64_t end = __atomic_load_n(&ctl->turn_end_ns, __ATOMIC_ACQUIRE);
    const Stream *s = nbgpu_stream_entry(b, launch->stream, false);
    double room = (double)FENCE_EVERY_NS - (s ? s->work_ns : (double)FENCE_EVERY_NS);
    if (room > (double)WINDOW_NS - work)
        room = (double)WINDOW_NS - work;
    if (end && room > (double)(int64_t)(end - now) - work)
        room = (double)(int64_t)(end - now) - work;
    int others = 0;
    for (int i = 0; i < PASSES; i++)
        others += nbgpu_pass[i].given && &nbgpu_pass[i] != p;
    double launches = room / b->mean_ns / (1 + others);
    if (launches < 1)
        return;
    const double most = b->learnt < WELL_LEARNT ? PASS_FIRST : PASS_MOST;
    if (launches > most)
        launches = most;
    p->stream = launch->stream;
    p->folded = __atomic_load_n(p->word, __ATOMIC_RELAXED);
    p->given = true;
    atomic_store_explicit(&p->until, p->folded + (uint64_t)launches + 1, memory_order_release);
}

/* The thread ends: its count will be another's. */
void nbgpu_pass_thread_ends(Pass *p) {
    pthread_mutex_lock(&nbgpu_busy[0].lock);
    nbgpu_pass_stop(&nbgpu_busy[0], p, nbgpu_now());
    pthread_mutex_unlock(&nbgpu_busy[0].lock);
}
