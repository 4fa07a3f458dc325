/* Memory pools and allocation in stream order. A pool reserves physical memory in steps and keeps what is freed until the
 * next synchronisation, then gives back what is above its release threshold: reserved is not used. */
#define _GNU_SOURCE
#include "drv.h"

enum { STEP = 32 << 20 };

static CUmemoryPool all_pools;
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER; /* before heap_lock */

static CUmemoryPool make_pool(int device, bool is_default, size_t max_size) {
    CUmemoryPool pool = calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    *pool =
        (struct CUmemPoolHandle_st){.magic = POOL_MAGIC, .device = device, .is_default = is_default, .max_size = max_size, .step = STEP};
    pool->reuse[0] = pool->reuse[1] = pool->reuse[2] = 1;
    pool->heap = (struct heap){.device = device, .pool = pool};
    pool->next = all_pools;
    all_pools = pool;
    return pool;
}

CUmemoryPool pool_default(int device) {
    pthread_mutex_lock(&pools_lock);
    if (!drv.default_pool[device])
        drv.default_pool[device] = make_pool(device, true, 0);
    if (!drv.current_pool[device])
        drv.current_pool[device] = drv.default_pool[device];
    CUmemoryPool pool = drv.default_pool[device];
    pthread_mutex_unlock(&pools_lock);
    return pool;
}

/* Physical memory for `used` bytes; pools_lock held. */
static bool grow(CUmemoryPool pool, size_t used) {
    if (used <= pool->reserved)
        return true;
    size_t want = (used + pool->step - 1) / pool->step * pool->step, tight = (used + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE;
    if (pool->max_size && tight > pool->max_size)
        return false;
    if (pool->max_size && want > pool->max_size)
        want = tight;
    if (!sim_mem_take(&drv.sim, (unsigned)pool->device, want - pool->reserved)) {
        if (tight == want || !sim_mem_take(&drv.sim, (unsigned)pool->device, tight - pool->reserved))
            return false;
        want = tight;
    }
    pool->reserved = want;
    if (want > pool->reserved_high)
        pool->reserved_high = want;
    return true;
}

CUresult pool_alloc(CUmemoryPool pool, size_t bytes, CUdeviceptr *out) {
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    NEED(bytes, CUDA_ERROR_INVALID_VALUE);
    NEED(bytes < 1ull << 40, CUDA_ERROR_OUT_OF_MEMORY);
    size_t takes = (bytes + 511) & ~(size_t)511;
    pthread_mutex_lock(&pools_lock);
    if (grow(pool, pool->used + takes))
        result = heap_alloc(&pool->heap, bytes, out);
    if (result == CUDA_SUCCESS) {
        pool->used += takes;
        if (pool->used > pool->used_high)
            pool->used_high = pool->used;
    }
    pthread_mutex_unlock(&pools_lock);
    return result;
}

/* What was handed out to other processes is not kept for the next allocation: the pool holds so much less. */
static void gone_with_others(CUmemoryPool pool, size_t span) {
    size_t needed = (pool->used + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE, left = pool->reserved > span ? pool->reserved - span : 0;
    if (left < needed) {
        sim_mem_keep(&drv.sim, (unsigned)pool->device, needed - left);
        left = needed;
    }
    pool->reserved = left;
}

CUresult pool_free(CUmemoryPool pool, CUdeviceptr base) {
    struct block was;
    if (graph_memory_freed(base))
        return CUDA_SUCCESS;
    pthread_mutex_lock(&pools_lock);
    CUresult result = heap_free(base, &was);
    if (result == CUDA_SUCCESS) {
        size_t took = (was.size + 511) & ~(size_t)511;
        pool->used -= took < pool->used ? took : pool->used;
        if (was.shared)
            gone_with_others(pool, was.span);
        atomic_store(&drv.pools_dirty, true);
    }
    pthread_mutex_unlock(&pools_lock);
    return result;
}

static void trim(CUmemoryPool pool, size_t keep) {
    size_t needed = (pool->used + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE;
    keep = keep > needed ? keep : needed;
    if (keep >= pool->reserved)
        return; /* a threshold of "all", which rounding up would wrap */
    keep = (keep + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE;
    if (keep >= pool->reserved)
        return;
    sim_mem_give(&drv.sim, (unsigned)pool->device, pool->reserved - keep);
    pool->reserved = keep;
}

void pools_trim(void) {
    if (!atomic_load_explicit(&drv.pools_dirty, memory_order_relaxed))
        return;
    pthread_mutex_lock(&pools_lock);
    atomic_store(&drv.pools_dirty, false);
    for (CUmemoryPool pool = all_pools; pool; pool = pool->next)
        trim(pool, pool->threshold);
    pthread_mutex_unlock(&pools_lock);
}

/* The primary context is gone: pools hold what is still used and no more. */
void pools_forget(int device) {
    pthread_mutex_lock(&pools_lock);
    for (CUmemoryPool pool = all_pools; pool; pool = pool->next)
        if (pool->device == device)
            trim(pool, 0);
    pthread_mutex_unlock(&pools_lock);
}

static bool valid(CUmemoryPool pool) { return pool && pool->magic == POOL_MAGIC; }

static CUresult alloc_in(CUstream s, CUmemoryPool pool, size_t bytes, CUdeviceptr *out) {
    if (s->capture)
        return capture_alloc(s, bytes, out);
    return pool_alloc(pool, bytes, out);
}

STREAM_API(cuMemAllocAsync, _ptsz, (CUdeviceptr * out, size_t bytes, CUstream handle), (out, bytes, handle)) {
    CUstream s;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    pool_default(s->ctx->device);
    return alloc_in(s, drv.current_pool[s->ctx->device], bytes, out);
}
STREAM_API(cuMemAllocFromPoolAsync, _ptsz, (CUdeviceptr * out, size_t bytes, CUmemoryPool pool, CUstream handle),
           (out, bytes, pool, handle)) {
    CUstream s;
    NEED(out && valid(pool) && !pool->imported, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    return alloc_in(s, pool, bytes, out);
}
STREAM_API(cuMemFreeAsync, _ptsz, (CUdeviceptr p, CUstream handle), (p, handle)) {
    CUstream s;
    struct block block;
    TRY(drv_stream(handle, &s));
    if (!p)
        return CUDA_SUCCESS;
    if (s->capture)
        return capture_free(s, p);
    NEED(heap_find(p, &block) && block.base == p, CUDA_ERROR_INVALID_VALUE);
    if (block.kind == BLOCK_OPENED)
        return share_close(p);
    return block.pool ? pool_free(block.pool, p) : heap_free(p, &block);
}

API(cuMemPoolCreate, (CUmemoryPool * out, const CUmemPoolProps *props)) {
    int device;
    NEED(out && props && props->allocType == CU_MEM_ALLOCATION_TYPE_PINNED, CUDA_ERROR_INVALID_VALUE);
    NEED(props->location.type == CU_MEM_LOCATION_TYPE_DEVICE, CUDA_ERROR_NOT_SUPPORTED);
    NEED(props->handleTypes == CU_MEM_HANDLE_TYPE_NONE || props->handleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
         CUDA_ERROR_NOT_SUPPORTED);
    TRY(drv_device(props->location.id, &device));
    pthread_mutex_lock(&pools_lock);
    *out = make_pool(device, false, props->maxSize);
    if (*out)
        (*out)->handle_types = props->handleTypes;
    pthread_mutex_unlock(&pools_lock);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult pool_of_other(int device, CUmemoryPool *out) {
    pthread_mutex_lock(&pools_lock);
    *out = make_pool(device, false, 0);
    if (*out)
        (*out)->imported = true;
    pthread_mutex_unlock(&pools_lock);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API(cuMemPoolDestroy, (CUmemoryPool pool)) {
    TRY(drv_ready());
    NEED(valid(pool) && !pool->is_default, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&pools_lock);
    if (drv.current_pool[pool->device] == pool)
        drv.current_pool[pool->device] = drv.default_pool[pool->device];
    trim(pool, 0); /* what is still allocated keeps it alive, as the documentation has it */
    pool->threshold = 0;
    pthread_mutex_unlock(&pools_lock);
    return CUDA_SUCCESS;
}

API(cuMemPoolTrimTo, (CUmemoryPool pool, size_t keep)) {
    TRY(drv_ready());
    NEED(valid(pool), CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&pools_lock);
    trim(pool, keep);
    pthread_mutex_unlock(&pools_lock);
    return CUDA_SUCCESS;
}

static CUresult attribute(CUmemoryPool pool, int name, size_t **place, int **flag) {
    *place = NULL;
    *flag = NULL;
    switch (name) {
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
        *flag = &pool->reuse[name - 1];
        break;
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        *place = &pool->threshold;
        break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
        *place = &pool->reserved;
        break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        *place = &pool->reserved_high;
        break;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
        *place = &pool->used;
        break;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
        *place = &pool->used_high;
        break;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

API(cuMemPoolGetAttribute, (CUmemoryPool pool, int name, void *value)) {
    size_t *place;
    int *flag;
    TRY(drv_ready());
    NEED(valid(pool) && value, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&pools_lock);
    CUresult result = attribute(pool, name, &place, &flag);
    if (place)
        memcpy(value, place, sizeof *place);
    if (flag)
        memcpy(value, flag, sizeof *flag);
    pthread_mutex_unlock(&pools_lock);
    return result;
}

API(cuMemPoolSetAttribute, (CUmemoryPool pool, int name, void *value)) {
    size_t *place;
    int *flag;
    TRY(drv_ready());
    NEED(valid(pool) && value, CUDA_ERROR_INVALID_VALUE);
    NEED(name != CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT && name != CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&pools_lock);
    CUresult result = attribute(pool, name, &place, &flag);
    if (flag)
        memcpy(flag, value, sizeof *flag);
    if (place && name == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD)
        memcpy(place, value, sizeof *place);
    if (name == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)
        pool->reserved_high = pool->reserved; /* only 0 may be set: start again */
    if (name == CU_MEMPOOL_ATTR_USED_MEM_HIGH)
        pool->used_high = pool->used;
    pthread_mutex_unlock(&pools_lock);
    return result;
}

API(cuMemPoolSetAccess, (CUmemoryPool pool, const CUmemAccessDesc *map, size_t count)) {
    TRY(drv_ready());
    NEED(valid(pool) && (map || !count), CUDA_ERROR_INVALID_VALUE);
    return CUDA_SUCCESS; /* every simulated device reaches every other */
}
API(cuMemPoolGetAccess, (int *flags, CUmemoryPool pool, const CUmemLocation *where)) {
    TRY(drv_ready());
    NEED(flags && where && valid(pool), CUDA_ERROR_INVALID_VALUE);
    *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return CUDA_SUCCESS;
}

API(cuDeviceGetDefaultMemPool, (CUmemoryPool * out, CUdevice ordinal)) {
    int device;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *out = pool_default(device);
    return CUDA_SUCCESS;
}
API(cuDeviceGetMemPool, (CUmemoryPool * out, CUdevice ordinal)) {
    int device;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    pool_default(device);
    *out = drv.current_pool[device];
    return CUDA_SUCCESS;
}
API(cuDeviceSetMemPool, (CUdevice ordinal, CUmemoryPool pool)) {
    int device;
    TRY(drv_device(ordinal, &device));
    NEED(valid(pool) && pool->device == device, CUDA_ERROR_INVALID_VALUE);
    drv.current_pool[device] = pool;
    return CUDA_SUCCESS;
}
