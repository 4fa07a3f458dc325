/* What is outstanding on the GPU: fences (events recorded every half millisecond of estimated work), and a thread that looks at them.
 *
 * A busy interval begins with the first launch and ends when all that was submitted is done. Its slot says so (`busy_since`), so that
 * the scheduler gives the turn to somebody else early. The estimates come from the fences themselves: mean GPU time per launch, and
 * per graph. Nothing here is trusted for charging: it can only shorten this slice's own turns.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "busy.h"

#define UNKNOWN_NS (0.1 * (double)MS) /* a launch of which nothing is known yet */
#define RELAXED_CAPTURE 2

Busy nbgpu_busy[NBGPU_DEVICES] = {[0 ... NBGPU_DEVICES - 1] = {.lock = PTHREAD_MUTEX_INITIALIZER}};
static _Atomic uint32_t awake; /* the helper's futex: 1 while it has something to look at */
static _Atomic int helper_started, stopping;

static void forget_parent(void) {
    memset((void *)nbgpu_busy, 0, sizeof nbgpu_busy);
    memset((void *)nbgpu_pass, 0, sizeof nbgpu_pass);
    for (int d = 0; d < (int)NBGPU_DEVICES; d++)
        pthread_mutex_init(&nbgpu_busy[d].lock, NULL);
    awake = 0;
    helper_started = 0;
}

/* ---- events ---- */

static CUevent event_get(Busy *b) {
    CUevent event = NULL;
    if (b->spares)
        return b->spare[--b->spares];
    return HAVE(cuEventCreate) && REAL(cuEventCreate)(&event, CU_EVENT_DEFAULT) == CUDA_SUCCESS ? event : NULL;
}

static void event_put(Busy *b, CUevent event) {
    if (event && b->spares < FENCES)
        b->spare[b->spares++] = event;
}

static bool record(CUevent event, CUstream stream, bool ptsz) {
    if (!event)
        return false;
    if (ptsz && HAVE(cuEventRecord_ptsz))
        return REAL(cuEventRecord_ptsz)(event, stream) == CUDA_SUCCESS;
    return HAVE(cuEventRecord) && REAL(cuEventRecord)(event, stream) == CUDA_SUCCESS;
}

static int capture_mode(int mode) {
    if (HAVE(cuThreadExchangeStreamCaptureMode))
        REAL(cuThreadExchangeStreamCaptureMode)(&mode);
    return mode;
}

/* ---- estimates ---- */

static double graph_mean(const Busy *b, CUgraphExec exec) {
    for (int i = 0; i < b->graphs; i++)
        if (b->graph[i].exec == exec)
            return b->graph[i].mean_ns;
    return 0;
}

double nbgpu_busy_estimate(int device, CUgraphExec exec) {
    Busy *b = &nbgpu_busy[device];
    pthread_mutex_lock(&b->lock);
    const double mean = exec ? graph_mean(b, exec) : b->mean_ns;
    pthread_mutex_unlock(&b->lock);
    return mean > 0 ? mean : UNKNOWN_NS;
}

static void learn_graph(Busy *b, CUgraphExec exec, double ns) {
    for (int i = 0; i < b->graphs; i++) {
        if (b->graph[i].exec != exec)
            continue;
        b->graph[i].mean_ns += (ns - b->graph[i].mean_ns) / 4;
        return;
    }
    if (b->graphs == GRAPHS)
        b->graphs = 0;
    b->graph[b->graphs].exec = exec;
    b->graph[b->graphs++].mean_ns = ns;
}

void nbgpu_busy_forget_graph(CUgraphExec exec) {
    for (int d = 0; d < nbgpu_devices; d++) {
        pthread_mutex_lock(&nbgpu_busy[d].lock);
        for (int i = 0; i < nbgpu_busy[d].graphs; i++)
            if (nbgpu_busy[d].graph[i].exec == exec)
                nbgpu_busy[d].graph[i] = nbgpu_busy[d].graph[--nbgpu_busy[d].graphs];
        pthread_mutex_unlock(&nbgpu_busy[d].lock);
    }
}

/* How fast the estimate follows one more observation. With work in between all the time it is exact; else there may have been a pause,
 * and it is at most that: a lower one is news, a higher one hardly. */
static double gain(const Busy *b, bool exact, double each) {
    if (!b->learnt)
        return 1;
    if (exact)
        return b->learnt < 4 ? 1.0 / (b->learnt + 1) : 1.0 / 8;
    return each < b->mean_ns ? 1.0 / 4 : 1.0 / 64;
}

/* A fence is done: what did its launches take? */
static void learn(Busy *b, const Fence *fence) {
    float ms = 0;
    CUevent from = b->last ? b->last : b->have_start ? b->start : NULL;
    if (!fence->launches)
        return;
    if (!from || !HAVE(cuEventElapsedTime) || REAL(cuEventElapsedTime)(&ms, from, fence->event) != CUDA_SUCCESS || !(ms > 0)) {
        b->done_ns += fence->work_ns;
        return;
    }
    const double passed = (double)ms * 1e6, each = passed / fence->launches;
    if (fence->exec && fence->launches == 1) {
        learn_graph(b, fence->exec, each);
        b->done_ns += passed;
        return;
    }
    b->mean_ns += (each - b->mean_ns) * gain(b, fence->queued, each);
    b->learnt++;
    const double most = fence->launches * b->mean_ns;
    b->done_ns += fence->queued || passed < most ? passed : most;
}

/* ---- fences ---- */

Stream *nbgpu_stream_entry(Busy *b, CUstream stream, bool ptsz) {
    for (int i = 0; i < b->streams; i++)
        if (b->stream[i].stream == stream && b->stream[i].ptsz == ptsz)
            return &b->stream[i];
    for (int i = 0; i < b->streams; i++) {
        if (b->stream[i].launches)
            continue;
        b->stream[i] = (Stream){.stream = stream, .ptsz = ptsz};
        return &b->stream[i];
    }
    if (b->streams == STREAMS)
        return NULL;
    b->stream[b->streams] = (Stream){.stream = stream, .ptsz = ptsz};
    return &b->stream[b->streams++];
}

static bool add_fence(Busy *b, Stream *s, CUgraphExec exec, uint64_t now) {
    CUevent event = b->fences < FENCES ? event_get(b) : NULL;
    if (!event)
        return false;
    if (!record(event, s->stream, s->ptsz)) {
        event_put(b, event);
        return false;
    }
    if (!b->fences)
        b->front_ns = now;
    const bool queued = b->fences && !nbgpu_any_capture() && REAL(cuEventQuery)(b->fence[b->fences - 1].event) == CUDA_ERROR_NOT_READY;
    b->fence[b->fences++] = (Fence){event, s->stream, s->launches == 1 ? exec : NULL, s->work_ns, s->launches, now, queued};
    s->work_ns = 0, s->launches = 0, s->fenced_at = now;
    return true;
}

double nbgpu_outstanding_ns(const Busy *b, uint64_t now, uint32_t *launches) {
    double work = 0;
    uint32_t count = 0;
    for (int i = 0; i < b->fences; i++)
        work += b->fence[i].work_ns, count += b->fence[i].launches;
    for (int i = 0; i < b->streams; i++)
        work += b->stream[i].work_ns, count += b->stream[i].launches;
    const double ran = b->fences && now > b->front_ns ? (double)(now - b->front_ns) : 0;
    const double first = b->fences ? b->fence[0].work_ns : 0;
    if (launches)
        *launches = count;
    return work - (ran < first ? ran : first); /* the oldest has been running for a while, and isn't done */
}

/* Where any thread may use a stream: that can't disturb a capture or mean another thread's stream. */
static bool reachable(const Stream *s) { return !nbgpu_any_capture() && !s->ptsz && s->stream != CU_STREAM_PER_THREAD; }

static void settled(Busy *b, Stream *s) {
    b->done_ns += s->work_ns;
    s->work_ns = 0, s->launches = 0;
}

/* Launches after the last fence of a stream: ask the stream, or guess. */
static void settle_stream(Busy *b, Stream *s, uint64_t now) {
    if (!s->launches)
        return;
    const bool asked = reachable(s) && HAVE(cuStreamQuery);
    const bool done =
        asked ? REAL(cuStreamQuery)(s->stream) == CUDA_SUCCESS : now - s->last_ns > (uint64_t)(2 * s->work_ns) + IDLE_GRACE_NS;
    if (done)
        settled(b, s);
}

/* What passes let through has no fence behind it when the thread stops there: it gets one here. */
static void fence_the_rest(Busy *b, uint64_t now) {
    for (int i = 0; i < b->streams; i++)
        if (b->stream[i].launches && now - b->stream[i].fenced_at > FENCE_AGE_NS && reachable(&b->stream[i]))
            add_fence(b, &b->stream[i], NULL, now);
}

/* Which fences are done by now? Needs a current context. */
static void poll(Busy *b) {
    const int mode = capture_mode(RELAXED_CAPTURE);
    int kept = 0;
    uint64_t now = nbgpu_now();
    for (int i = 0; i < b->fences; i++) {
        const Fence fence = b->fence[i];
        if (REAL(cuEventQuery)(fence.event) == CUDA_ERROR_NOT_READY) {
            b->fence[kept++] = fence;
            continue;
        }
        learn(b, &fence);
        event_put(b, b->last);
        b->last = fence.event;
        b->front_ns = now;
    }
    b->fences = kept;
    if (!kept)
        for (int i = 0; i < b->streams; i++)
            settle_stream(b, &b->stream[i], now);
    capture_mode(mode);
}

static bool drained(const Busy *b) {
    if (b->fences)
        return false;
    for (int i = 0; i < b->streams; i++)
        if (b->stream[i].launches)
            return false;
    return true;
}

/* GPU time of the interval that ends. */
static uint64_t interval_ns(const Busy *b) {
    const uint64_t seen = b->drained_ns > b->began_ns ? b->drained_ns - b->began_ns : 0;
    return b->done_ns > 0 && b->done_ns < (double)seen ? (uint64_t)b->done_ns : seen;
}

static void end_interval(int d, Busy *b) {
    NbgpuUseSlot *slot = nbgpu_device[d].slot;
    __atomic_fetch_add(&slot->busy_ns, interval_ns(b), __ATOMIC_RELAXED);
    MARK("idle-half");
    __atomic_store_n(&slot->busy_since, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&slot->near, 0, __ATOMIC_SEQ_CST);
    b->busy = false;
    event_put(b, b->last);
    b->last = NULL;
    b->have_start = false;
    b->done_ns = 0;
    nbgpu_publish(d);
    if (nbgpu_contended(d))
        nbgpu_ring();
}

/* Tell the slot what changed. Returns in how many nanoseconds to look again, 0: nothing to look at. */
static uint64_t advance(int d, Busy *b) {
    NbgpuUseSlot *slot = nbgpu_device[d].slot;
    if (!b->busy || !slot)
        return 0;
    nbgpu_pass_fold(b, nbgpu_now());
    fence_the_rest(b, nbgpu_now());
    poll(b);
    const uint64_t now = nbgpu_now();
    if (nbgpu_overdue(b, now))
        nbgpu_pass_stop(b, NULL, now);
    if (drained(b)) {
        if (!b->drained_ns)
            b->drained_ns = now;
        const bool waits = __atomic_load_n(&slot->want, __ATOMIC_SEQ_CST) != 0;
        if (!waits && now - b->drained_ns < IDLE_GRACE_NS)
            return IDLE_GRACE_NS / 2;
        nbgpu_pass_stop(b, NULL, now);
        if (!drained(b))
            return IDLE_GRACE_NS / 2;
        end_interval(d, b);
        return 0;
    }
    const double remaining = nbgpu_outstanding_ns(b, now, NULL);
    const bool over = nbgpu_turn_over(d, now);
    if (over && remaining < (double)NEAR_NS && !LOAD(slot->near)) {
        __atomic_store_n(&slot->near, 1, __ATOMIC_SEQ_CST);
        nbgpu_publish(d);
        if (nbgpu_kernel_gated(d)) /* turns of slices change hands when all is done: that will be rung */
            nbgpu_ring();
    }
    /* Each look takes the driver's lock from whoever launches: where nobody waits, seldom. */
    const bool close_watch = nbgpu_contended(d) || LOAD(slot->want);
    double next = close_watch ? remaining / 4 : remaining / 2;
    const double least = close_watch ? 0.05 * (double)MS : 0.5 * (double)MS, most = close_watch ? 0.25 * (double)MS : 1.0 * (double)MS;
    return (uint64_t)(next < least ? least : next > most ? most : next);
}

/* The events go with their context; the next launch begins afresh. */
void nbgpu_busy_context_ends(int device, CUcontext context) {
    Busy *b = &nbgpu_busy[device];
    pthread_mutex_lock(&b->lock);
    if (b->context && (!context || b->context == context)) {
        nbgpu_pass_stop(b, NULL, nbgpu_now());
        if (b->busy) {
            b->drained_ns = nbgpu_now();
            end_interval(device, b);
        }
        for (int i = 0; i < b->fences; i++)
            event_put(b, b->fence[i].event);
        event_put(b, b->start);
        while (b->spares && HAVE(cuEventDestroy_v2))
            REAL(cuEventDestroy_v2)(b->spare[--b->spares]);
        b->start = NULL;
        b->context = NULL;
        b->fences = b->streams = b->spares = 0;
    }
    pthread_mutex_unlock(&b->lock);
}

/* ---- the helper thread ---- */

/* The program ends: the driver is about to be taken down, nobody may be inside it. */
static void program_ends(void) {
    stopping = 1;
    for (int d = 0; d < nbgpu_devices; d++) { /* whoever is polling has finished once its lock was ours */
        pthread_mutex_lock(&nbgpu_busy[d].lock);
        pthread_mutex_unlock(&nbgpu_busy[d].lock);
    }
}

static void *helper(void *unused) {
    (void)unused;
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0); /* this thread's own */
    prctl(PR_SET_NAME, "nbgpu-fences", 0, 0, 0);
    for (;;) {
        uint64_t next = 0;
        for (int d = 0; d < nbgpu_devices; d++) {
            Busy *b = &nbgpu_busy[d];
            pthread_mutex_lock(&b->lock);
            if (b->busy && b->context && !stopping) {
                REAL(cuCtxSetCurrent)(b->context);
                const uint64_t in = advance(d, b);
                if (in && (!next || in < next))
                    next = in;
            }
            pthread_mutex_unlock(&b->lock);
        }
        if (next) {
            const struct timespec pause = {0, (long)next};
            nanosleep(&pause, NULL);
            continue;
        }
        awake = 0;
        bool any = false;
        for (int d = 0; d < nbgpu_devices && !stopping; d++)
            any |= nbgpu_busy[d].busy && nbgpu_busy[d].context;
        if (any)
            awake = 1;
        else
            syscall(SYS_futex, &awake, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
    return NULL;
}

static void start_helper(void) {
    sigset_t all, before;
    pthread_t thread;
    pthread_attr_t attributes;
    if (atomic_exchange(&helper_started, 1))
        return;
    static bool fork_hook;
    if (!fork_hook) {
        nbgpu_fork_hook(forget_parent);
        atexit(program_ends);
    }
    fork_hook = true;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* it inherits: no signal of the program ever runs there */
    if (pthread_create(&thread, &attributes, helper, NULL) != 0)
        helper_started = 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void wake_helper(void) {
    if (awake)
        return;
    awake = 1;
    syscall(SYS_futex, &awake, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* ---- what the launches do ---- */

bool nbgpu_busy_begin(Launch *launch) {
    Busy *b = &nbgpu_busy[launch->device];
    NbgpuUseSlot *slot = nbgpu_device[launch->device].slot;
    pthread_mutex_lock(&b->lock);
    const uint64_t now = nbgpu_now();
    const bool first = !b->busy;
    nbgpu_pass_fold(b, now);
    if (nbgpu_own_pass())
        nbgpu_pass_stop(b, nbgpu_own_pass(), now); /* its next launches are counted one by one */
    if (first) {
        b->began_ns = now;
        b->busy = true;
        __atomic_store_n(&slot->busy_since, now, __ATOMIC_SEQ_CST);
        MARK("busy-half");
        /* Said first, looked second. The agent puts `away` first and looks second: it doesn't move what it sees busy. */
        if (unlikely(nbgpu_away(launch->device))) {
            b->busy = false;
            __atomic_store_n(&slot->busy_since, 0, __ATOMIC_SEQ_CST);
            nbgpu_publish(launch->device);
            pthread_mutex_unlock(&b->lock);
            return false;
        }
    }
    b->drained_ns = 0;
    if (LOAD(slot->near))
        __atomic_store_n(&slot->near, 0, __ATOMIC_SEQ_CST);
    if (first || LOAD(nbgpu_use->near[launch->device]))
        nbgpu_publish(launch->device);
    CUcontext current = NULL;
    if (!b->context && HAVE(cuCtxGetCurrent) && REAL(cuCtxGetCurrent)(&current) == CUDA_SUCCESS)
        b->context = current;
    if (first) {
        if (!b->start)
            b->start = event_get(b);
        b->have_start = record(b->start, launch->stream, launch->ptsz);
    }
    Stream *s = nbgpu_stream_entry(b, launch->stream, launch->ptsz);
    if (s) { /* outstanding from here on, so that nobody takes the slot for idle while the driver takes the launch */
        s->launches++;
        s->work_ns += launch->estimate_ns;
        s->last_ns = now;
    }
    b->launches++;
    pthread_mutex_unlock(&b->lock);
    return true;
}

void nbgpu_busy_submitted(const Launch *launch, bool done) {
    Busy *b = &nbgpu_busy[launch->device];
    pthread_mutex_lock(&b->lock);
    Stream *s = nbgpu_stream_entry(b, launch->stream, launch->ptsz);
    const uint64_t now = nbgpu_now();
    if (s && s->launches) {
        const bool blind = launch->ptsz || launch->stream == CU_STREAM_PER_THREAD || launch->exec != NULL || b->learnt < LEARNT_AFTER;
        if (!done) {
            s->launches--;
            s->work_ns = s->launches ? s->work_ns - launch->estimate_ns : 0;
        } else if (blind || s->work_ns >= (double)FENCE_EVERY_NS || now - s->fenced_at > FENCE_AGE_NS) {
            add_fence(b, s, launch->exec, now);
        }
        if (done)
            nbgpu_pass_grant(b, launch, now);
    }
    pthread_mutex_unlock(&b->lock);
    start_helper();
    wake_helper();
}

/* The oldest work outstanding takes far longer than launches took so far. */
bool nbgpu_overdue(const Busy *b, uint64_t now) {
    return b->fences && now > b->front_ns && (double)(now - b->front_ns) > 2 * b->fence[0].work_ns + (double)WINDOW_NS;
}

/* By how long too much is outstanding for one launch more; 0: submit. One that would start after the turn's end only makes the turn longer,
 * and after it, as behind a closed gate, the thread says that it wants at once: the scheduler must not take the slice for one that is content. */
static double too_much_ns(int device, const Busy *b, uint64_t now) {
    const NbgpuCtlDevice *ctl = &nbgpu_ctl->device[device];
    uint32_t launches;
    const double work = nbgpu_outstanding_ns(b, now, &launches);
    if (!b->fences || !launches || nbgpu_gate_closed(device) || nbgpu_turn_just_over(device))
        return 0;
    const uint64_t end = __atomic_load_n(&ctl->turn_end_ns, __ATOMIC_ACQUIRE);
    if (end && now < end && (double)now + work >= (double)end)
        return work;
    if (launches < 2)
        return 0;
    /* Nothing learnt yet, or the oldest takes far longer than launches took so far: two at a time, or a first loop fills the queue for seconds. */
    if (!b->learnt || nbgpu_overdue(b, now))
        return (double)FENCE_EVERY_NS;
    return work > (double)WINDOW_NS ? work - (double)WINDOW_NS : 0;
}

bool nbgpu_busy_wait_window(int device) {
    Busy *b = &nbgpu_busy[device];
    bool waited = false;
    pthread_mutex_lock(&b->lock);
    nbgpu_pass_fold(b, nbgpu_now());
    for (int i = 0; i < 100000 && b->busy; i++) {
        if (too_much_ns(device, b, nbgpu_now()) == 0)
            break;
        poll(b);
        const double over = too_much_ns(device, b, nbgpu_now());
        if (over == 0)
            break;
        const double least = 0.05 * (double)MS, most = 0.5 * (double)MS;
        const struct timespec pause = {0, (long)(over < least ? least : over > most ? most : over)};
        pthread_mutex_unlock(&b->lock);
        waited = true;
        MARK("fence-wait");
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&b->lock);
    }
    pthread_mutex_unlock(&b->lock);
    return waited;
}

uint64_t nbgpu_busy_launches(int device) {
    Busy *b = &nbgpu_busy[device];
    if (!b->busy)
        return b->launches;
    pthread_mutex_lock(&b->lock);
    nbgpu_pass_fold(b, nbgpu_now());
    const uint64_t launches = b->launches;
    pthread_mutex_unlock(&b->lock);
    return launches;
}

/* The program has waited for the GPU: if nothing was launched meanwhile, what it waited for is done. */
void nbgpu_busy_synced(int device, bool all, CUstream stream, bool ptsz, uint64_t before) {
    Busy *b = &nbgpu_busy[device];
    if (!b->busy)
        return;
    pthread_mutex_lock(&b->lock);
    nbgpu_pass_fold(b, nbgpu_now());
    if (b->launches == before && b->busy) {
        for (int i = 0; i < b->streams; i++) {
            if (!all && (b->stream[i].stream != stream || b->stream[i].ptsz != ptsz))
                continue;
            settled(b, &b->stream[i]);
        }
        poll(b);
        if (drained(b) && !b->drained_ns)
            b->drained_ns = nbgpu_now();
    }
    pthread_mutex_unlock(&b->lock);
}

/* A stream ends, or begins to be captured: what it still has outstanding gets a fence while that is allowed. */
void nbgpu_busy_stream_gone(CUstream stream) {
    for (int d = 0; d < nbgpu_devices; d++) {
        Busy *b = &nbgpu_busy[d];
        pthread_mutex_lock(&b->lock);
        nbgpu_pass_stop_stream(b, stream, nbgpu_now());
        for (int i = 0; i < b->streams; i++) {
            Stream *s = &b->stream[i];
            if (s->stream != stream)
                continue;
            if (s->launches)
                add_fence(b, s, NULL, nbgpu_now());
            *s = b->stream[--b->streams];
            break;
        }
        pthread_mutex_unlock(&b->lock);
    }
}
