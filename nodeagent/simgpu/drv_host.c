/* One thread per process runs what a stream must do on the host: host functions, and copies queued behind one. It is
 * started by the first of them and sleeps on the device's bell until the next one's turn. */
#define _GNU_SOURCE
#include <signal.h>

#include "drv.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static bool started;

struct search {
    CUcontext ctx; /* where something is pending */
    uint64_t eta_ns;
    bool ran;
    int devices;
};
static struct search search; /* of the one thread */

static void run_entry(CUcontext ctx, uint64_t seq) {
    struct sim_entry *entry = &ctx->entries[seq % SIM_QUEUE];
    struct host_work *work = ctx->slots[seq % SIM_QUEUE].work;
    ctx->slots[seq % SIM_QUEUE].work = NULL;
    work->run(work->argument);
    if (work->owns_argument)
        free(work->argument);
    free(work);
    atomic_store_explicit(&entry->state, SIM_HOST_DONE, memory_order_release);
    atomic_fetch_sub(&drv.host_work, 1);
    sim_advance(&drv.sim, (unsigned)ctx->device);
    sim_ring(&drv.sim.m->device[ctx->device]);
}

/* The first entry of a context that is the host's: run it when it is its turn, else note when it may be. */
static CUresult look(CUcontext ctx) {
    unsigned d = (unsigned)ctx->device;
    if (drv_idle(ctx))
        return CUDA_SUCCESS;
    sim_lock(&drv.sim, d);
    sim_advance_locked(&drv.sim, d);
    uint64_t seq = atomic_load(&ctx->queue->head), tail = atomic_load(&ctx->queue->tail), first = SIM_NEVER;
    bool turn = false;
    for (; seq < tail && !turn; seq++) {
        struct sim_entry *entry = &ctx->entries[seq % SIM_QUEUE];
        turn = atomic_load(&entry->state) == SIM_HOST_TURN;
        if (entry->flags & SIM_NEEDS_HOST && first == SIM_NEVER && atomic_load(&entry->state) == SIM_PENDING)
            first = seq;
    }
    uint64_t eta = !turn && first != SIM_NEVER ? sim_eta_ns(&drv.sim, ctx->channel, first) : SIM_NEVER;
    sim_unlock(&drv.sim, d);
    if (turn) {
        run_entry(ctx, seq - 1);
        search.ran = true;
    } else if (first != SIM_NEVER) {
        search.devices++;
        if (!search.ctx || eta < search.eta_ns) {
            search.ctx = ctx;
            search.eta_ns = eta;
        }
    }
    return CUDA_SUCCESS;
}

static void *serve(void *unused) {
    enum { POLL_NS = 200000, LONGEST_NS = 50000000 };
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (atomic_load(&drv.host_work) == 0)
            pthread_cond_wait(&more, &lock);
        pthread_mutex_unlock(&lock);
        uint32_t bells[SIM_DEVICES];
        for (unsigned d = 0; d < drv.sim.m->devices; d++)
            bells[d] = atomic_load(&drv.sim.m->device[d].bell);
        search = (struct search){.ctx = NULL};
        drv_each_ctx(look);
        if (search.ran)
            continue;
        uint64_t sleep = search.eta_ns && search.ctx && search.devices == 1 ? (search.eta_ns + 1) * drv.sim.m->time_scale : POLL_NS;
        int d = search.ctx ? search.ctx->device : 0;
        sim_sleep(&drv.sim.m->device[d], bells[d], sim_wall_ns() + (sleep < LONGEST_NS ? sleep : LONGEST_NS));
    }
    return NULL;
}

static void start(void) {
    sigset_t all, before;
    pthread_t thread;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the program's signals are not for this thread */
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    started = pthread_create(&thread, &attributes, serve, NULL) == 0;
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

CUresult drv_host_work_make(void (*run)(void *), void *argument, bool owns, struct host_work **work) {
    pthread_once(&once, start);
    NEED(started, CUDA_ERROR_OPERATING_SYSTEM);
    *work = malloc(sizeof **work);
    NEED(*work, CUDA_ERROR_OUT_OF_MEMORY);
    **work = (struct host_work){.run = run, .argument = argument, .owns_argument = owns};
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&drv.host_work, 1);
    pthread_cond_signal(&more);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

STREAM_API(cuLaunchHostFunc, _ptsz, (CUstream handle, CUhostFn fn, void *user), (handle, fn, user)) {
    CUstream s;
    struct host_work *work;
    NEED(fn, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    if (s->capture)
        return capture_host(s, fn, user);
    TRY(drv_host_work_make(fn, user, false, &work));
    return drv_submit(s, &(struct submission){.kind = SIM_MARK, .work = work}, NULL);
}

struct callback {
    CUstreamCallback fn;
    CUstream stream;
    void *user;
};

static void run_callback(void *argument) {
    struct callback *callback = argument;
    callback->fn(callback->stream, CUDA_SUCCESS, callback->user);
}

STREAM_API(cuStreamAddCallback, _ptsz, (CUstream handle, CUstreamCallback fn, void *user, unsigned flags), (handle, fn, user, flags)) {
    CUstream s;
    struct host_work *work;
    NEED(fn && !flags, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    NEED(!s->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    struct callback *callback = malloc(sizeof *callback);
    NEED(callback, CUDA_ERROR_OUT_OF_MEMORY);
    *callback = (struct callback){fn, handle, user};
    TRY(drv_host_work_make(run_callback, callback, true, &work));
    return drv_submit(s, &(struct submission){.kind = SIM_MARK, .work = work}, NULL);
}
