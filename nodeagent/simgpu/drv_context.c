/* Contexts: primary ones, made ones, and each thread's stack of them. */
#define _GNU_SOURCE
#include "drv.h"

enum { DEPTH = 64, CONTEXTS = 256 };

__thread bool drv_own_stream;
static __thread CUcontext stack[DEPTH];
static __thread int depth;
static const uint64_t threads_at_once = 132 * 2048;
static CUcontext contexts[CONTEXTS]; /* under drv.lock; a dead one's struct stays, so that its handle can be told */
static uint64_t next_id = 1;

bool drv_ctx_alive(CUcontext ctx) { return ctx && ctx->magic == CTX_MAGIC; }

CUresult drv_current(CUcontext *ctx) {
    TRY(drv_ready());
    NEED(depth > 0 && stack[depth - 1], CUDA_ERROR_INVALID_CONTEXT);
    *ctx = stack[depth - 1];
    NEED(drv_ctx_alive(*ctx), CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return CUDA_SUCCESS;
}

CUresult drv_each_ctx(CUresult (*visit)(CUcontext ctx)) {
    for (int i = 0; i < CONTEXTS; i++) {
        CUcontext ctx = __atomic_load_n(&contexts[i], __ATOMIC_ACQUIRE);
        if (drv_ctx_alive(ctx))
            TRY(visit(ctx));
    }
    return CUDA_SUCCESS;
}

CUresult drv_attach(void) {
    if (drv.sim.client >= 0)
        return CUDA_SUCCESS;
    NEED(sim_attach(&drv.sim) == 0, CUDA_ERROR_SYSTEM_NOT_READY);
    drv_gate_attached();
    return CUDA_SUCCESS;
}

static void fill_context(CUcontext ctx, int device, unsigned flags, unsigned api_version, bool primary) {
    struct sim_machine *m = drv.sim.m;
    ctx->device = device;
    ctx->flags = flags;
    ctx->api_version = api_version;
    ctx->primary = primary;
    ctx->queue = &m->channel[ctx->channel];
    ctx->entries = m->queue[ctx->channel];
    ctx->generation = atomic_load(&ctx->queue->generation);
    ctx->id = next_id++;
    pthread_mutex_init(&ctx->lock, NULL);
    ctx->heap = (struct heap){.device = device, .ctx = ctx};
    ctx->limits[CU_LIMIT_STACK_SIZE] = 1024;
    ctx->limits[CU_LIMIT_PRINTF_FIFO_SIZE] = 7 << 20;
    ctx->limits[CU_LIMIT_MALLOC_HEAP_SIZE] = 8 << 20;
    ctx->limits[3] = 2;    /* device runtime sync depth */
    ctx->limits[4] = 2048; /* device runtime pending launches */
    ctx->limits[5] = 128;  /* L2 fetch granularity */
}

/* With drv.lock held. */
static CUresult make_context(int device, unsigned flags, unsigned api_version, bool primary, CUcontext *out) {
    uint64_t overhead = (uint64_t)drv.sim.m->context_mib << 20;
    int place = 0;
    TRY(drv_attach());
    while (place < CONTEXTS && drv_ctx_alive(contexts[place]))
        place++;
    NEED(place < CONTEXTS && arena_ready(), CUDA_ERROR_OUT_OF_MEMORY);
    CUcontext ctx = calloc(1, sizeof *ctx);
    struct slot *slots = calloc(SIM_QUEUE, sizeof *slots);
    if (!ctx || !slots || !sim_mem_take(&drv.sim, (unsigned)device, overhead)) {
        free(ctx);
        free(slots);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    ctx->channel = sim_channel_open(&drv.sim, (unsigned)device);
    if (ctx->channel < 0) {
        sim_mem_give(&drv.sim, (unsigned)device, overhead);
        free(ctx);
        free(slots);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    fill_context(ctx, device, flags, api_version, primary);
    ctx->slots = slots;
    ctx->legacy = drv_stream_make(ctx, CU_STREAM_DEFAULT, 0);
    ctx->legacy->entry_flags = SIM_LEGACY;
    ctx->magic = CTX_MAGIC;
    __atomic_store_n(&contexts[place], ctx, __ATOMIC_RELEASE);
    *out = ctx;
    return CUDA_SUCCESS;
}

/* With drv.lock held. */
static void end_context(CUcontext ctx) {
    drv_wait_all(ctx);
    ctx->magic = 0;
    modules_drop_ctx(ctx);
    heap_drop_ctx(ctx);
    sim_channel_close(&drv.sim, ctx->channel);
    sim_mem_give(&drv.sim, (unsigned)ctx->device, ((uint64_t)drv.sim.m->context_mib << 20) + ctx->limits_taken);
    if (ctx->primary)
        pools_forget(ctx->device);
}

CUresult drv_primary(int device, CUcontext *out) {
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&drv.lock);
    if (!drv_ctx_alive(drv.primary[device]))
        result = make_context(device, drv.primary_flags[device], 3020, true, &drv.primary[device]);
    if (result == CUDA_SUCCESS) {
        drv.primary_refs[device]++;
        *out = drv.primary[device];
    }
    pthread_mutex_unlock(&drv.lock);
    return result;
}

API(cuDevicePrimaryCtxRetain, (CUcontext * out, CUdevice ordinal)) {
    int device;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    return drv_primary(device, out);
}

static CUresult end_primary_of(int device, bool reset) {
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&drv.lock);
    bool alive = drv_ctx_alive(drv.primary[device]);
    if (!reset && (!alive || drv.primary_refs[device] == 0)) {
        result = CUDA_ERROR_INVALID_CONTEXT;
    } else if (alive) {
        if (!reset)
            drv.primary_refs[device]--;
        if (reset || drv.primary_refs[device] == 0) {
            end_context(drv.primary[device]);
            drv.primary[device] = NULL;
            drv.primary_refs[device] = 0;
        }
    }
    pthread_mutex_unlock(&drv.lock);
    return result;
}

static CUresult end_primary(CUdevice ordinal, bool reset) {
    int device;
    TRY(drv_device(ordinal, &device));
    return end_primary_of(device, reset);
}

CUresult drv_primary_release(int device) { return end_primary_of(device, false); }

API(cuDevicePrimaryCtxRelease_v2, (CUdevice ordinal)) { return end_primary(ordinal, false); }
API(cuDevicePrimaryCtxRelease, (CUdevice ordinal)) { return end_primary(ordinal, false); }
API(cuDevicePrimaryCtxReset_v2, (CUdevice ordinal)) { return end_primary(ordinal, true); }
API(cuDevicePrimaryCtxReset, (CUdevice ordinal)) { return end_primary(ordinal, true); }

API(cuDevicePrimaryCtxSetFlags_v2, (CUdevice ordinal, unsigned flags)) {
    int device;
    NEED(!(flags & ~(unsigned)CU_CTX_FLAGS_MASK), CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    drv.primary_flags[device] = flags;
    if (drv_ctx_alive(drv.primary[device]))
        drv.primary[device]->flags = flags;
    return CUDA_SUCCESS;
}
API(cuDevicePrimaryCtxSetFlags, (CUdevice ordinal, unsigned flags)) { return cuDevicePrimaryCtxSetFlags_v2(ordinal, flags); }

API(cuDevicePrimaryCtxGetState, (CUdevice ordinal, unsigned *flags, int *active)) {
    int device;
    NEED(flags && active, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *flags = drv.primary_flags[device];
    *active = drv_ctx_alive(drv.primary[device]);
    return CUDA_SUCCESS;
}

static CUresult push(CUcontext ctx) {
    NEED(depth < DEPTH, CUDA_ERROR_INVALID_VALUE);
    stack[depth++] = ctx;
    return CUDA_SUCCESS;
}

static CUresult create(CUcontext *out, unsigned flags, unsigned api_version, CUdevice ordinal) {
    int device;
    NEED(out && !(flags & ~(unsigned)CU_CTX_FLAGS_MASK), CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    pthread_mutex_lock(&drv.lock);
    CUresult result = make_context(device, flags, api_version, false, out);
    pthread_mutex_unlock(&drv.lock);
    TRY(result);
    return push(*out);
}

API(cuCtxCreate, (CUcontext * out, unsigned flags, CUdevice ordinal)) { return create(out, flags, 3010, ordinal); }
API(cuCtxCreate_v2, (CUcontext * out, unsigned flags, CUdevice ordinal)) { return create(out, flags, 3020, ordinal); }
API(cuCtxCreate_v3, (CUcontext * out, const void *affinity, int count, unsigned flags, CUdevice ordinal)) {
    NEED(count == 0 || !affinity, CUDA_ERROR_NOT_SUPPORTED);
    return create(out, flags, 3020, ordinal);
}
API(cuCtxCreate_v4, (CUcontext * out, const CUctxCreateParams *params, unsigned flags, CUdevice ordinal)) {
    NEED(!params || (!params->numExecAffinityParams && !params->cigParams), CUDA_ERROR_NOT_SUPPORTED);
    return create(out, flags, 3020, ordinal);
}

API(cuCtxDestroy_v2, (CUcontext ctx)) {
    TRY(drv_ready());
    NEED(drv_ctx_alive(ctx), CUDA_ERROR_INVALID_CONTEXT);
    NEED(!ctx->primary, CUDA_ERROR_INVALID_CONTEXT);
    pthread_mutex_lock(&drv.lock);
    if (drv_ctx_alive(ctx))
        end_context(ctx);
    pthread_mutex_unlock(&drv.lock);
    if (depth && stack[depth - 1] == ctx)
        depth--;
    return CUDA_SUCCESS;
}
API(cuCtxDestroy, (CUcontext ctx)) { return cuCtxDestroy_v2(ctx); }
API(cuCtxDetach, (CUcontext ctx)) { return cuCtxDestroy_v2(ctx); }
API(cuCtxAttach, (CUcontext * out, unsigned flags)) {
    NEED(out && !flags, CUDA_ERROR_INVALID_VALUE);
    return drv_current(out);
}

API(cuCtxPushCurrent_v2, (CUcontext ctx)) {
    TRY(drv_ready());
    NEED(drv_ctx_alive(ctx), CUDA_ERROR_INVALID_CONTEXT);
    return push(ctx);
}
API(cuCtxPushCurrent, (CUcontext ctx)) { return cuCtxPushCurrent_v2(ctx); }

API(cuCtxPopCurrent_v2, (CUcontext * out)) {
    TRY(drv_ready());
    NEED(depth > 0, CUDA_ERROR_INVALID_CONTEXT);
    CUcontext ctx = stack[--depth];
    if (out)
        *out = ctx;
    return CUDA_SUCCESS;
}
API(cuCtxPopCurrent, (CUcontext * out)) { return cuCtxPopCurrent_v2(out); }

API(cuCtxSetCurrent, (CUcontext ctx)) {
    TRY(drv_ready());
    NEED(!ctx || drv_ctx_alive(ctx), CUDA_ERROR_INVALID_CONTEXT);
    if (depth) {
        if (ctx) {
            stack[depth - 1] = ctx;
        } else {
            depth--;
        }
        return CUDA_SUCCESS;
    }
    return ctx ? push(ctx) : CUDA_SUCCESS;
}

API(cuCtxGetCurrent, (CUcontext * out)) {
    TRY(drv_ready());
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    *out = depth ? stack[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

static CUresult current_or(CUcontext wish, CUcontext *ctx) {
    if (!wish)
        return drv_current(ctx);
    NEED(drv_ctx_alive(wish), CUDA_ERROR_INVALID_CONTEXT);
    *ctx = wish;
    return CUDA_SUCCESS;
}

API(cuCtxGetDevice_v2, (CUdevice * out, CUcontext wish)) {
    CUcontext ctx;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(current_or(wish, &ctx));
    *out = drv_ordinal(ctx->device);
    return CUDA_SUCCESS;
}
API(cuCtxGetDevice, (CUdevice * out)) { return cuCtxGetDevice_v2(out, NULL); }

API(cuCtxSynchronize_v2, (CUcontext wish)) {
    CUcontext ctx;
    TRY(current_or(wish, &ctx));
    TRY(drv_wait_all(ctx));
    pools_trim();
    return CUDA_SUCCESS;
}
API(cuCtxSynchronize, (void)) { return cuCtxSynchronize_v2(NULL); }

API(cuCtxGetFlags, (unsigned *flags)) {
    CUcontext ctx;
    NEED(flags, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    *flags = ctx->flags;
    return CUDA_SUCCESS;
}
API(cuCtxSetFlags, (unsigned flags)) {
    CUcontext ctx;
    TRY(drv_current(&ctx));
    ctx->flags = flags;
    return CUDA_SUCCESS;
}
API(cuCtxGetId, (CUcontext wish, unsigned long long *id)) {
    CUcontext ctx;
    NEED(id, CUDA_ERROR_INVALID_VALUE);
    TRY(current_or(wish, &ctx));
    *id = ctx->id;
    return CUDA_SUCCESS;
}
API(cuCtxGetApiVersion, (CUcontext wish, unsigned *version)) {
    CUcontext ctx;
    NEED(version, CUDA_ERROR_INVALID_VALUE);
    TRY(current_or(wish, &ctx));
    *version = ctx->api_version;
    return CUDA_SUCCESS;
}
/* What stacks and heaps take beyond what a context has from the start. */
static uint64_t limits_bytes(CUcontext ctx) {
    const struct {
        int limit;
        uint64_t first, times;
    } rows[] = {
        {CU_LIMIT_STACK_SIZE, 1024, threads_at_once}, {CU_LIMIT_PRINTF_FIFO_SIZE, 7 << 20, 1}, {CU_LIMIT_MALLOC_HEAP_SIZE, 8 << 20, 1}};
    uint64_t bytes = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (ctx->limits[rows[i].limit] > rows[i].first)
            bytes += (ctx->limits[rows[i].limit] - rows[i].first) * rows[i].times;
    return (bytes + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE;
}

API(cuCtxSetLimit, (int limit, size_t value)) {
    CUcontext ctx;
    NEED(limit >= 0 && limit < LIMITS, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    NEED(value < 1ull << 40, CUDA_ERROR_OUT_OF_MEMORY);
    pthread_mutex_lock(&drv.lock);
    size_t before = ctx->limits[limit];
    ctx->limits[limit] = value;
    uint64_t wants = limits_bytes(ctx);
    bool fits = wants <= ctx->limits_taken || sim_mem_take(&drv.sim, (unsigned)ctx->device, wants - ctx->limits_taken);
    if (fits && wants > ctx->limits_taken)
        ctx->limits_taken = wants; /* a heap that became smaller gives nothing back */
    if (!fits)
        ctx->limits[limit] = before;
    pthread_mutex_unlock(&drv.lock);
    return fits ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API(cuCtxGetLimit, (size_t *value, int limit)) {
    CUcontext ctx;
    NEED(value && limit >= 0 && limit < LIMITS, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    *value = ctx->limits[limit];
    return CUDA_SUCCESS;
}
API(cuCtxGetStreamPriorityRange, (int *least, int *greatest)) {
    CUcontext ctx;
    TRY(drv_current(&ctx));
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return CUDA_SUCCESS;
}

static CUresult accepted(void) {
    CUcontext ctx;
    return drv_current(&ctx);
}
API(cuCtxSetCacheConfig, (int config)) { return (void)config, accepted(); }
API(cuCtxSetSharedMemConfig, (int config)) { return (void)config, accepted(); }
API(cuCtxResetPersistingL2Cache, (void)) { return accepted(); }
API(cuCtxGetCacheConfig, (int *config)) {
    NEED(config, CUDA_ERROR_INVALID_VALUE);
    *config = 0;
    return accepted();
}
API(cuCtxGetSharedMemConfig, (int *config)) {
    NEED(config, CUDA_ERROR_INVALID_VALUE);
    *config = 1; /* banks of 4 bytes */
    return accepted();
}

API(cuCtxEnablePeerAccess, (CUcontext peer, unsigned flags)) {
    CUcontext ctx;
    TRY(drv_current(&ctx));
    NEED(!flags, CUDA_ERROR_INVALID_VALUE);
    NEED(drv_ctx_alive(peer) && peer != ctx, CUDA_ERROR_INVALID_CONTEXT);
    NEED(peer->device != ctx->device, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
    NEED(!(ctx->peers >> peer->device & 1), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    ctx->peers |= 1u << peer->device;
    return CUDA_SUCCESS;
}
API(cuCtxDisablePeerAccess, (CUcontext peer)) {
    CUcontext ctx;
    TRY(drv_current(&ctx));
    NEED(drv_ctx_alive(peer), CUDA_ERROR_INVALID_CONTEXT);
    NEED(ctx->peers >> peer->device & 1, CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
    ctx->peers &= ~(1u << peer->device);
    return CUDA_SUCCESS;
}
