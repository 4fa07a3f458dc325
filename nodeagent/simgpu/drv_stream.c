/* Streams and what is queued on them. A submission takes this context's lock and no system call while the queue has room. */
#define _GNU_SOURCE
#include "drv.h"

enum { OWN_STREAMS = 8, POLL_NS = 200000, LONGEST_SLEEP_NS = 100000000 };

static __thread struct {
    uint64_t ctx;
    CUstream stream;
} own_streams[OWN_STREAMS];

CUstream drv_stream_make(CUcontext ctx, unsigned flags, int priority) {
    CUstream s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    *s = (struct CUstream_st){.magic = STREAM_MAGIC, .ctx = ctx, .flags = flags};
    s->priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    s->entry_flags = flags & CU_STREAM_NON_BLOCKING ? 0 : SIM_BLOCKING;
    pthread_mutex_lock(&ctx->lock);
    s->id = ctx->next_stream_id++;
    if (ctx->next_stream_id == 0)
        ctx->next_stream_id = 1; /* 0 is the legacy stream's */
    s->next = ctx->streams;
    ctx->streams = s;
    pthread_mutex_unlock(&ctx->lock);
    return s;
}

static CUresult own_stream(CUcontext ctx, CUstream *out) {
    unsigned place = ctx->id % OWN_STREAMS;
    if (own_streams[place].ctx != ctx->id) {
        CUstream s = drv_stream_make(ctx, CU_STREAM_DEFAULT, 0);
        NEED(s, CUDA_ERROR_OUT_OF_MEMORY);
        own_streams[place].ctx = ctx->id;
        own_streams[place].stream = s;
    }
    *out = own_streams[place].stream;
    return CUDA_SUCCESS;
}

CUresult drv_stream(CUstream handle, CUstream *stream) {
    if ((uintptr_t)handle <= 2) {
        CUcontext ctx;
        TRY(drv_current(&ctx));
        if (handle == CU_STREAM_PER_THREAD || (!handle && drv_own_stream))
            return own_stream(ctx, stream);
        *stream = ctx->legacy;
        return CUDA_SUCCESS;
    }
    TRY(drv_ready());
    NEED(handle->magic == STREAM_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(drv_ctx_alive(handle->ctx), CUDA_ERROR_CONTEXT_IS_DESTROYED);
    *stream = handle;
    return CUDA_SUCCESS;
}

/* The ring's slot is taken again: what its last entry left behind is kept. Context's lock held. */
static void harvest(struct slot *slot, const struct sim_entry *entry) {
    CUevent e = slot->event;
    if (e && e->recorded && e->seq == entry->seq) {
        e->done_ns = entry->done_ns;
        __atomic_store_n(&e->resolved, true, __ATOMIC_RELEASE);
    }
    slot->event = NULL;
}

static void write_entry(CUstream s, const struct submission *what, uint64_t seq) {
    CUcontext ctx = s->ctx;
    struct sim_entry *e = &ctx->entries[seq % SIM_QUEUE];
    struct slot *slot = &ctx->slots[seq % SIM_QUEUE];
    if (__builtin_expect(slot->event != NULL, 0))
        harvest(slot, e);
    e->kind = (uint8_t)what->kind;
    e->flags = (uint8_t)(s->entry_flags | (what->work ? SIM_NEEDS_HOST : 0));
    e->stream = s->id;
    e->seq = seq;
    e->submit_ns = sim_device_ns(drv.sim.m, sim_wall_ns());
    e->left_ns = what->ns;
    e->done_ns = 0;
    e->priority = s->priority;
    if (what->wait_for) {
        e->dep_channel = what->wait_for->channel;
        e->dep_generation = what->wait_for->generation;
        e->dep_seq = what->wait_for->seq;
    }
    slot->work = what->work;
    slot->event = what->event;
    if (what->event) {
        CUevent event = what->event;
        event->recorded_in = ctx;
        event->channel = (uint32_t)ctx->channel;
        event->generation = ctx->generation;
        event->seq = seq;
        event->recorded = true;
        __atomic_store_n(&event->resolved, false, __ATOMIC_RELEASE);
    }
    atomic_store_explicit(&e->state, SIM_PENDING, memory_order_relaxed);
}

CUresult drv_submit(CUstream s, const struct submission *what, uint64_t *seq_out) {
    CUcontext ctx = s->ctx;
    struct sim_channel *queue = ctx->queue;
    pthread_mutex_lock(&ctx->lock);
    uint64_t seq = atomic_load_explicit(&queue->tail, memory_order_relaxed);
    while (__builtin_expect(seq - atomic_load_explicit(&queue->head, memory_order_acquire) >= SIM_QUEUE, 0)) {
        pthread_mutex_unlock(&ctx->lock); /* full: sleep until the oldest is done, as a driver blocks */
        CUresult result = drv_wait(ctx, seq - SIM_QUEUE);
        if (result != CUDA_SUCCESS)
            return result;
        sim_advance(&drv.sim, (unsigned)ctx->device);
        pthread_mutex_lock(&ctx->lock);
        seq = atomic_load_explicit(&queue->tail, memory_order_relaxed);
    }
    write_entry(s, what, seq);
    if (ctx->last_stream != s) {
        atomic_store_explicit(&queue->multi_seq, seq, memory_order_relaxed);
        ctx->last_stream = s;
    }
    atomic_store_explicit(&s->last, seq + 1, memory_order_relaxed);
    NBGPU_POINT("sim.submit");
    atomic_store_explicit(&queue->tail, seq + 1, memory_order_release);
    pthread_mutex_unlock(&ctx->lock);
    if (seq_out)
        *seq_out = seq;
    return CUDA_SUCCESS;
}

static bool done(CUcontext ctx, uint64_t seq) { return sim_entry_done(drv.sim.m, (uint32_t)ctx->channel, ctx->generation, seq); }

static CUresult advance_ctx(CUcontext ctx) {
    sim_advance(&drv.sim, (unsigned)ctx->device);
    return CUDA_SUCCESS;
}

/* Sleeps until the entry is done, or fails when its context went away. */
CUresult drv_wait(CUcontext ctx, uint64_t seq) {
    struct sim_machine *m = drv.sim.m;
    struct sim_device *device = &m->device[ctx->device];
    unsigned d = (unsigned)ctx->device;
    while (!done(ctx, seq)) {
        uint32_t bell = atomic_load(&device->bell);
        sim_reap(&drv.sim, false);
        sim_lock(&drv.sim, d);
        sim_advance_locked(&drv.sim, d);
        bool over = done(ctx, seq);
        uint64_t eta = over ? 0 : sim_eta_ns(&drv.sim, ctx->channel, seq);
        sim_unlock(&drv.sim, d);
        if (over)
            break;
        if (eta == 0)
            drv_each_ctx(advance_ctx); /* it waits for the host or for another device */
        uint64_t wall = sim_wall_ns(), sleep = eta ? (eta + 1) * m->time_scale : POLL_NS;
        sim_sleep(device, bell, wall + (sleep < LONGEST_SLEEP_NS ? sleep : LONGEST_SLEEP_NS));
    }
    return drv_ctx_alive(ctx) ? CUDA_SUCCESS : CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

bool drv_idle(CUcontext ctx) {
    return atomic_load_explicit(&ctx->queue->head, memory_order_acquire) == atomic_load_explicit(&ctx->queue->tail, memory_order_acquire);
}

CUresult drv_wait_all(CUcontext ctx) {
    uint64_t target = atomic_load(&ctx->queue->tail);
    if (target && !drv_idle(ctx))
        TRY(drv_wait(ctx, target - 1)); /* most of it in one sleep */
    for (uint64_t head; (head = atomic_load(&ctx->queue->head)) < target;) {
        TRY(drv_wait(ctx, head));
        if (atomic_load(&ctx->queue->head) == head)
            sim_advance(&drv.sim, (unsigned)ctx->device);
    }
    return CUDA_SUCCESS;
}

CUresult drv_stream_wait(CUstream s) {
    uint64_t last = atomic_load(&s->last);
    if (s->entry_flags & SIM_LEGACY && !drv_idle(s->ctx)) {
        TRY(drv_submit(s, &(struct submission){.kind = SIM_MARK}, &last)); /* behind all blocking streams */
        last++;
    }
    if (last)
        TRY(drv_wait(s->ctx, last - 1));
    return CUDA_SUCCESS;
}

static CUresult make(CUstream *out, unsigned flags, int priority) {
    CUcontext ctx;
    NEED(out && flags <= CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    *out = drv_stream_make(ctx, flags, priority);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API(cuStreamCreate, (CUstream * out, unsigned flags)) { return make(out, flags, 0); }
API(cuStreamCreateWithPriority, (CUstream * out, unsigned flags, int priority)) { return make(out, flags, priority); }

API(cuStreamDestroy_v2, (CUstream s)) {
    TRY(drv_ready());
    NEED((uintptr_t)s > 2 && s->magic == STREAM_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    CUcontext ctx = s->ctx;
    pthread_mutex_lock(&ctx->lock); /* what is queued runs on; nothing of the queue points here but last_stream */
    for (CUstream *at = &ctx->streams; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    if (ctx->last_stream == s)
        ctx->last_stream = NULL;
    s->magic = 0;
    pthread_mutex_unlock(&ctx->lock);
    free(s->tips);
    free(s);
    return CUDA_SUCCESS;
}
API(cuStreamDestroy, (CUstream s)) { return cuStreamDestroy_v2(s); }

STREAM_API(cuStreamSynchronize, _ptsz, (CUstream handle), (handle)) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    NEED(!s->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    TRY(drv_stream_wait(s));
    pools_trim();
    return CUDA_SUCCESS;
}

STREAM_API(cuStreamQuery, _ptsz, (CUstream handle), (handle)) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    NEED(!s->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    uint64_t last = atomic_load(&s->last);
    if (s->entry_flags & SIM_LEGACY)
        last = atomic_load(&s->ctx->queue->tail);
    if (last && !done(s->ctx, last - 1))
        sim_advance(&drv.sim, (unsigned)s->ctx->device);
    if (s->entry_flags & SIM_LEGACY)
        return drv_idle(s->ctx) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    return !last || done(s->ctx, last - 1) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

STREAM_API(cuStreamWaitEvent, _ptsz, (CUstream handle, CUevent event, unsigned flags), (handle, event, flags)) {
    CUstream s;
    (void)flags;
    TRY(drv_stream(handle, &s));
    NEED(event && event->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    return drv_event_wait(s, event);
}

STREAM_API(cuStreamGetFlags, _ptsz, (CUstream handle, unsigned *flags), (handle, flags)) {
    CUstream s;
    NEED(flags, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *flags = s->flags;
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamGetPriority, _ptsz, (CUstream handle, int *priority), (handle, priority)) {
    CUstream s;
    NEED(priority, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *priority = s->priority;
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamGetId, _ptsz, (CUstream handle, unsigned long long *id), (handle, id)) {
    CUstream s;
    NEED(id, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *id = s->ctx->id << 32 | (s->id + 1u);
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamGetCtx, _ptsz, (CUstream handle, CUcontext *ctx), (handle, ctx)) {
    CUstream s;
    NEED(ctx, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *ctx = s->ctx;
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamGetCtx_v2, _ptsz, (CUstream handle, CUcontext *ctx, CUgreenCtx *green), (handle, ctx, green)) {
    CUstream s;
    NEED(ctx, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *ctx = s->ctx;
    if (green)
        *green = s->green;
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamGetDevice, _ptsz, (CUstream handle, CUdevice *device), (handle, device)) {
    CUstream s;
    NEED(device, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *device = drv_ordinal(s->ctx->device);
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamAttachMemAsync, _ptsz, (CUstream handle, CUdeviceptr p, size_t bytes, unsigned flags), (handle, p, bytes, flags)) {
    CUstream s;
    (void)p, (void)bytes, (void)flags;
    return drv_stream(handle, &s);
}
