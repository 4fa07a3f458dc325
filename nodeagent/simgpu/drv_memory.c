/* Device memory as programs ask for it: linear, pitched, managed; what is free; what a pointer is. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "drv.h"

API(cuMemAlloc_v2, (CUdeviceptr * out, size_t bytes)) {
    CUcontext ctx;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    return heap_alloc(&ctx->heap, bytes, out);
}

API(cuMemAlloc, (unsigned *out, unsigned bytes)) {
    (void)out, (void)bytes;
    return CUDA_ERROR_NOT_SUPPORTED; /* 32-bit addresses: CUDA 2 */
}

API(cuMemFree_v2, (CUdeviceptr p)) {
    struct block was;
    TRY(drv_ready());
    if (!p)
        return CUDA_SUCCESS;
    NEED(heap_find(p, &was) && was.base == p, CUDA_ERROR_INVALID_VALUE);
    if (was.kind == BLOCK_OPENED) /* of another process's pool */
        return share_close(p);
    if (was.pool) { /* allowed: frees at once what was allocated in stream order */
        drv_each_ctx(drv_wait_all);
        return pool_free(was.pool, p);
    }
    if (drv_ctx_alive(was.ctx) && !drv_idle(was.ctx))
        TRY(drv_wait_all(was.ctx)); /* cuMemFree waits for the work that may use it */
    return heap_free(p, &was);
}
API(cuMemFree, (unsigned p)) { return cuMemFree_v2(p); }

API(cuMemAllocPitch_v2, (CUdeviceptr * out, size_t *pitch, size_t width, size_t height, unsigned element)) {
    NEED(out && pitch && width && height, CUDA_ERROR_INVALID_VALUE);
    NEED(element == 4 || element == 8 || element == 16, CUDA_ERROR_INVALID_VALUE);
    *pitch = (width + 511) & ~(size_t)511;
    NEED(*pitch >= width && height <= SIZE_MAX / *pitch, CUDA_ERROR_OUT_OF_MEMORY);
    return cuMemAlloc_v2(out, *pitch * height);
}

API(cuMemAllocManaged, (CUdeviceptr * out, size_t bytes, unsigned flags)) {
    CUcontext ctx;
    NEED(out && bytes && (flags == CU_MEM_ATTACH_GLOBAL || flags == CU_MEM_ATTACH_HOST), CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    NEED(bytes < 1ull << 40 && !heap_oom_injected(), CUDA_ERROR_OUT_OF_MEMORY);
    size_t span = (bytes + SIM_PAGE - 1) & ~(SIM_PAGE - 1);
    pthread_mutex_lock(&heap_lock);
    struct block *block = block_take_locked(span, BLOCK_MANAGED, true, ctx->device);
    if (block) {
        block->size = bytes;
        block->ctx = ctx;
        block->host = (uint8_t *)(uintptr_t)block->base; /* both sides use one address */
        if (mprotect(block->host, span, PROT_READ | PROT_WRITE)) {
            block_release_locked(block, true);
            block = NULL;
        }
    }
    pthread_mutex_unlock(&heap_lock);
    NEED(block, CUDA_ERROR_OUT_OF_MEMORY);
    *out = block->base;
    return CUDA_SUCCESS;
}

API(cuMemGetInfo_v2, (size_t *free_bytes, size_t *total)) {
    CUcontext ctx;
    NEED(free_bytes && total, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    struct sim_device *device = &drv.sim.m->device[ctx->device];
    uint64_t used = sim_mem_used(&drv.sim, (unsigned)ctx->device);
    *total = device->mem_total;
    *free_bytes = used < device->mem_total ? device->mem_total - used : 0;
    struct sim_limits limits; /* of the process's cgroup */
    if (!sim_group_here(&drv.sim, (unsigned)ctx->device, &limits))
        return CUDA_SUCCESS;
    uint64_t room = limits.used < limits.hard ? limits.hard - limits.used : 0;
    *total = limits.hard < *total ? limits.hard : *total;
    *free_bytes = room < *free_bytes ? room : *free_bytes;
    return CUDA_SUCCESS;
}
API(cuMemGetInfo, (unsigned *free_bytes, unsigned *total)) {
    size_t f, t;
    NEED(free_bytes && total, CUDA_ERROR_INVALID_VALUE);
    TRY(cuMemGetInfo_v2(&f, &t));
    *free_bytes = f > UINT32_MAX ? UINT32_MAX : (unsigned)f;
    *total = t > UINT32_MAX ? UINT32_MAX : (unsigned)t;
    return CUDA_SUCCESS;
}

API(cuMemGetAddressRange_v2, (CUdeviceptr * base, size_t *size, CUdeviceptr p)) {
    struct block block;
    TRY(drv_ready());
    NEED(heap_find(p, &block) && p - block.base < block.size, CUDA_ERROR_NOT_FOUND);
    if (base)
        *base = block.base;
    if (size)
        *size = block.size;
    return CUDA_SUCCESS;
}

/* Managed memory: advice is heard, moving pages costs nothing. */
static CUresult advise(CUdeviceptr p, size_t bytes) {
    struct block block;
    TRY(drv_ready());
    NEED(bytes && heap_find(p, &block) && block.kind == BLOCK_MANAGED, CUDA_ERROR_INVALID_VALUE);
    return CUDA_SUCCESS;
}
API(cuMemAdvise, (CUdeviceptr p, size_t bytes, int advice, CUdevice device)) { return (void)advice, (void)device, advise(p, bytes); }
API(cuMemAdvise_v2, (CUdeviceptr p, size_t bytes, int advice, CUmemLocation where)) { return (void)advice, (void)where, advise(p, bytes); }
STREAM_API(cuMemPrefetchAsync, _ptsz, (CUdeviceptr p, size_t n, CUdevice device, CUstream handle), (p, n, device, handle)) {
    CUstream s;
    (void)device;
    TRY(drv_stream(handle, &s));
    return advise(p, n);
}
STREAM_API(cuMemPrefetchAsync_v2, _ptsz, (CUdeviceptr p, size_t n, CUmemLocation where, unsigned flags, CUstream handle),
           (p, n, where, flags, handle)) {
    CUstream s;
    (void)where, (void)flags;
    TRY(drv_stream(handle, &s));
    return advise(p, n);
}

static void put(void *data, size_t size, uint64_t value) { memcpy(data, &value, size); } /* little-endian */

static CUresult device_attribute(void *data, int attribute, CUdeviceptr p, const struct block *block) {
    bool managed = block->kind == BLOCK_MANAGED;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: {
        CUcontext ctx = block->ctx ? block->ctx : drv.primary[block->device];
        memcpy(data, &ctx, sizeof ctx);
        break;
    }
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        put(data, 4, CU_MEMORYTYPE_DEVICE);
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        put(data, 8, p);
        break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        put(data, 8, managed ? p : 0);
        return managed ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
        put(data, 4, 0);
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
        put(data, 8, block->id);
        break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        put(data, 4, managed);
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        put(data, 4, (uint64_t)drv_ordinal(block->device));
        break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        put(data, 4, 0);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        put(data, 8, block->base);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        put(data, 8, block->size);
        break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
        put(data, 4, block->host != NULL);
        break;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        put(data, 8, 0);
        break;
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
        put(data, 4, (uint64_t)block->access);
        break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
        put(data, 8, (uint64_t)(uintptr_t)block->pool);
        break;
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
        put(data, 8, block->span);
        break;
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
        put(data, 8, block->base);
        break;
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
        put(data, 8, block->id);
        break;
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

bool host_range(uint64_t p, uint64_t *base, size_t *size);

static CUresult host_attribute(void *data, int attribute, CUdeviceptr p) {
    uint64_t base;
    size_t size;
    NEED(host_range(p, &base, &size), CUDA_ERROR_INVALID_VALUE);
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        put(data, 8, (uint64_t)(uintptr_t)drv.primary[drv.visible[0]]);
        break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        put(data, 4, CU_MEMORYTYPE_HOST);
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        put(data, 8, p);
        break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        put(data, 4, 0);
        break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
        put(data, 4, 1);
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        put(data, 8, base);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        put(data, 8, size);
        break;
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

API(cuPointerGetAttribute, (void *data, int attribute, CUdeviceptr p)) {
    struct block block;
    TRY(drv_ready());
    NEED(data, CUDA_ERROR_INVALID_VALUE);
    return heap_find(p, &block) ? device_attribute(data, attribute, p, &block) : host_attribute(data, attribute, p);
}

API(cuPointerGetAttributes, (unsigned count, const int *attributes, void **data, CUdeviceptr p)) {
    TRY(drv_ready());
    NEED(attributes && data, CUDA_ERROR_INVALID_VALUE);
    for (unsigned i = 0; i < count; i++) {
        uint64_t value = 0;
        bool small = attributes[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE || attributes[i] == CU_POINTER_ATTRIBUTE_IS_MANAGED ||
                     attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL || attributes[i] == CU_POINTER_ATTRIBUTE_MAPPED ||
                     attributes[i] == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS ||
                     attributes[i] == CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE || attributes[i] == CU_POINTER_ATTRIBUTE_ACCESS_FLAGS;
        if (cuPointerGetAttribute(&value, attributes[i], p) != CUDA_SUCCESS)
            value = attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL ? (uint64_t)-2 : 0; /* "unknown" of a pointer that is not ours */
        if (data[i])
            put(data[i], small ? 4 : 8, value);
    }
    return CUDA_SUCCESS;
}

API(cuPointerSetAttribute, (const void *value, int attribute, CUdeviceptr p)) {
    struct block block;
    TRY(drv_ready());
    NEED(value && heap_find(p, &block), CUDA_ERROR_INVALID_VALUE);
    return attribute == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
