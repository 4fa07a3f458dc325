/* Virtual memory management: addresses, physical memory and the mapping between them, each on its own.
 * A handle's contents live at hidden addresses of the arena, so that it can be mapped twice and outlives its mappings. */
#define _GNU_SOURCE
#include "drv.h"

#define ALIGNED(n) ((n) && (n) % SIM_PAGE == 0)

static bool on_device(const CUmemAllocationProp *prop, int *device) {
    return prop && prop->type == CU_MEM_ALLOCATION_TYPE_PINNED && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
           drv_device(prop->location.id, device) == CUDA_SUCCESS;
}

API(cuMemGetAllocationGranularity, (size_t *out, const CUmemAllocationProp *prop, int option)) {
    int device;
    TRY(drv_ready());
    NEED(out && option >= 0 && option <= 1 && on_device(prop, &device), CUDA_ERROR_INVALID_VALUE);
    *out = SIM_PAGE;
    return CUDA_SUCCESS;
}

API(cuMemCreate, (CUmemGenericAllocationHandle * out, size_t size, const CUmemAllocationProp *prop, unsigned long long flags)) {
    int device;
    TRY(drv_ready());
    NEED(out && ALIGNED(size) && !flags && on_device(prop, &device), CUDA_ERROR_INVALID_VALUE);
    NEED(prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE || prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
         CUDA_ERROR_NOT_SUPPORTED);
    pthread_mutex_lock(&drv.lock);
    CUresult result = drv_attach();
    pthread_mutex_unlock(&drv.lock);
    TRY(result);
    NEED(!heap_oom_injected(), CUDA_ERROR_OUT_OF_MEMORY);
    struct vmm_handle *handle = calloc(1, sizeof *handle);
    NEED(handle, CUDA_ERROR_OUT_OF_MEMORY);
    pthread_mutex_lock(&heap_lock);
    bool exportable = prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE;
    struct block *storage = block_take_locked(size, BLOCK_HIDDEN, !exportable, device);
    if (storage && exportable && !(storage->shared = shared_make(device, size, true))) {
        block_release_locked(storage, false);
        storage = NULL;
    }
    if (storage && exportable)
        storage->host = storage->shared->host;
    pthread_mutex_unlock(&heap_lock);
    if (!storage) {
        free(handle);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = (struct vmm_handle){.size = size, .prop = *prop, .device = device, .references = 1, .storage = storage};
    storage->handle = handle;
    *out = (CUmemGenericAllocationHandle)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

void vmm_unreference_locked(struct vmm_handle *handle) {
    if (--handle->references)
        return;
    if (handle->multicast_devices)
        multicast_end_locked(handle);
    else
        block_release_locked(handle->storage, true);
    free(handle);
}

API(cuMemRelease, (CUmemGenericAllocationHandle value)) {
    struct vmm_handle *handle = (struct vmm_handle *)(uintptr_t)value;
    TRY(drv_ready());
    NEED(handle, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&heap_lock);
    vmm_unreference_locked(handle);
    pthread_mutex_unlock(&heap_lock);
    return CUDA_SUCCESS;
}

API(cuMemAddressReserve, (CUdeviceptr * out, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags)) {
    (void)wish;
    TRY(drv_ready());
    NEED(out && ALIGNED(size) && !flags && (alignment & (alignment - 1)) == 0, CUDA_ERROR_INVALID_VALUE);
    NEED(alignment <= SIM_PAGE, CUDA_ERROR_NOT_SUPPORTED);
    pthread_mutex_lock(&heap_lock);
    struct block *block = block_take_locked(size, BLOCK_RESERVED, false, drv.visible[0]);
    pthread_mutex_unlock(&heap_lock);
    NEED(block, CUDA_ERROR_OUT_OF_MEMORY);
    *out = block->base;
    return CUDA_SUCCESS;
}

API(cuMemAddressFree, (CUdeviceptr base, size_t size)) {
    TRY(drv_ready());
    pthread_mutex_lock(&heap_lock);
    struct block *block = block_at_locked(base);
    bool whole = block && block->kind == BLOCK_RESERVED && block->base == base && block->span == size;
    for (size_t at = 0; whole && at < size; at += SIM_PAGE)
        whole = block_at_locked(base + at) == block; /* nothing mapped in it */
    if (whole)
        block_release_locked(block, false);
    pthread_mutex_unlock(&heap_lock);
    return whole ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API(cuMemMap, (CUdeviceptr p, size_t size, size_t offset, CUmemGenericAllocationHandle value, unsigned long long flags)) {
    struct vmm_handle *handle = (struct vmm_handle *)(uintptr_t)value;
    TRY(drv_ready());
    NEED(handle && ALIGNED(size) && p % SIM_PAGE == 0 && !offset && !flags && size <= handle->size, CUDA_ERROR_INVALID_VALUE);
    struct block *map = calloc(1, sizeof *map);
    NEED(map, CUDA_ERROR_OUT_OF_MEMORY);
    pthread_mutex_lock(&heap_lock);
    struct block *reserved = block_at_locked(p);
    bool free_range = reserved && reserved->kind == BLOCK_RESERVED;
    for (size_t at = 0; free_range && at < size; at += SIM_PAGE) {
        struct block *here = block_at_locked(p + at);
        free_range = here && here->kind == BLOCK_RESERVED;
    }
    if (free_range) {
        *map = (struct block){.base = p,
                              .size = size,
                              .span = size,
                              .host = handle->storage ? handle->storage->host : NULL,
                              .device = handle->storage ? handle->device : drv.visible[0],
                              .kind = BLOCK_MAPPED,
                              .handle = handle,
                              .id = arena_next_id()};
        handle->references++;
        page_map_locked(p, size, map);
        map->reserved = reserved; /* what the addresses return to */
    }
    pthread_mutex_unlock(&heap_lock);
    if (!free_range)
        free(map);
    return free_range ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API(cuMemUnmap, (CUdeviceptr p, size_t size)) {
    TRY(drv_ready());
    NEED(ALIGNED(size), CUDA_ERROR_INVALID_VALUE);
    drv_each_ctx(drv_wait_all);
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&heap_lock);
    for (CUdeviceptr at = p; at < p + size && result == CUDA_SUCCESS;) {
        struct block *map = block_at_locked(at);
        if (!map || map->kind != BLOCK_MAPPED || map->base != at || at + map->span > p + size) {
            result = CUDA_ERROR_INVALID_VALUE;
            break;
        }
        at += map->span;
        page_map_locked(map->base, map->span, map->reserved);
        vmm_unreference_locked(map->handle);
        free(map);
    }
    pthread_mutex_unlock(&heap_lock);
    return result;
}

API(cuMemSetAccess, (CUdeviceptr p, size_t size, const CUmemAccessDesc *map, size_t count)) {
    TRY(drv_ready());
    NEED(ALIGNED(size) && map && count, CUDA_ERROR_INVALID_VALUE);
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&heap_lock);
    for (CUdeviceptr at = p; at < p + size; at += SIM_PAGE) {
        struct block *block = block_at_locked(at);
        if (!block || block->kind != BLOCK_MAPPED) {
            result = CUDA_ERROR_INVALID_VALUE;
            break;
        }
        block->access = map[0].flags;
    }
    pthread_mutex_unlock(&heap_lock);
    return result;
}

API(cuMemGetAccess, (unsigned long long *flags, const CUmemLocation *where, CUdeviceptr p)) {
    struct block block;
    TRY(drv_ready());
    NEED(flags && where && heap_find(p, &block), CUDA_ERROR_INVALID_VALUE);
    *flags = (unsigned long long)block.access;
    return CUDA_SUCCESS;
}

API(cuMemRetainAllocationHandle, (CUmemGenericAllocationHandle * out, void *p)) {
    TRY(drv_ready());
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&heap_lock);
    struct block *block = block_at_locked((CUdeviceptr)(uintptr_t)p);
    struct vmm_handle *handle = block && block->kind == BLOCK_MAPPED ? block->handle : NULL;
    if (handle)
        handle->references++;
    pthread_mutex_unlock(&heap_lock);
    NEED(handle, CUDA_ERROR_INVALID_VALUE);
    *out = (CUmemGenericAllocationHandle)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

API(cuMemGetAllocationPropertiesFromHandle, (CUmemAllocationProp * out, CUmemGenericAllocationHandle value)) {
    struct vmm_handle *handle = (struct vmm_handle *)(uintptr_t)value;
    TRY(drv_ready());
    NEED(out && handle && handle->storage, CUDA_ERROR_INVALID_VALUE);
    *out = handle->prop;
    return CUDA_SUCCESS;
}
