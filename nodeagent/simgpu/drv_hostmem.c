/* Page-locked host memory: ordinary memory that is remembered. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "drv.h"

struct range {
    uint64_t base;
    size_t size, mapped; /* mapped: ours to unmap; 0 for registered memory */
    unsigned flags;
    struct range *next;
};
static struct range *ranges;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct range **find_locked(uint64_t p) {
    for (struct range **at = &ranges; *at; at = &(*at)->next)
        if (p - (*at)->base < (*at)->size)
            return at;
    return NULL;
}

bool host_range(uint64_t p, uint64_t *base, size_t *size) {
    pthread_mutex_lock(&lock);
    struct range **at = find_locked(p);
    if (at) {
        *base = (*at)->base;
        *size = (*at)->size;
    }
    pthread_mutex_unlock(&lock);
    return at != NULL;
}

static CUresult remember(uint64_t base, size_t size, size_t mapped, unsigned flags) {
    struct range *range = malloc(sizeof *range);
    NEED(range, CUDA_ERROR_OUT_OF_MEMORY);
    pthread_mutex_lock(&lock);
    CUresult result = find_locked(base) ? CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED : CUDA_SUCCESS;
    if (result == CUDA_SUCCESS) {
        *range = (struct range){base, size, mapped, flags, ranges};
        ranges = range;
    } else {
        free(range);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static CUresult forget(uint64_t base, bool mapped) {
    pthread_mutex_lock(&lock);
    struct range **at = find_locked(base), *range = at ? *at : NULL;
    if (range && range->base == base && (range->mapped != 0) == mapped) {
        *at = range->next;
        if (mapped)
            munmap((void *)(uintptr_t)base, range->mapped);
        free(range);
    } else {
        range = NULL;
    }
    pthread_mutex_unlock(&lock);
    NEED(range, mapped ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    return CUDA_SUCCESS;
}

API(cuMemHostAlloc, (void **out, size_t bytes, unsigned flags)) {
    CUcontext ctx;
    NEED(out && bytes && flags <= 7, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    size_t mapped = (bytes + 4095) & ~(size_t)4095;
    NEED(mapped >= bytes, CUDA_ERROR_OUT_OF_MEMORY);
    void *at = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    NEED(at != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
    *out = at;
    return remember((uint64_t)(uintptr_t)at, bytes, mapped, flags);
}
API(cuMemAllocHost_v2, (void **out, size_t bytes)) { return cuMemHostAlloc(out, bytes, 0); }
API(cuMemAllocHost, (void **out, unsigned bytes)) { return cuMemHostAlloc(out, bytes, 0); }

API(cuMemFreeHost, (void *p)) {
    TRY(drv_ready());
    if (!p)
        return CUDA_SUCCESS;
    drv_each_ctx(drv_wait_all);
    return forget((uint64_t)(uintptr_t)p, true);
}

API(cuMemHostRegister_v2, (void *p, size_t bytes, unsigned flags)) {
    CUcontext ctx;
    NEED(p && bytes, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    return remember((uint64_t)(uintptr_t)p, bytes, 0, flags);
}
API(cuMemHostRegister, (void *p, size_t bytes, unsigned flags)) { return cuMemHostRegister_v2(p, bytes, flags); }

API(cuMemHostUnregister, (void *p)) {
    TRY(drv_ready());
    return forget((uint64_t)(uintptr_t)p, false);
}

API(cuMemHostGetDevicePointer_v2, (CUdeviceptr * out, void *p, unsigned flags)) {
    uint64_t base;
    size_t size;
    TRY(drv_ready());
    NEED(out && !flags && host_range((uint64_t)(uintptr_t)p, &base, &size), CUDA_ERROR_INVALID_VALUE);
    *out = (CUdeviceptr)(uintptr_t)p;
    return CUDA_SUCCESS;
}

API(cuMemHostGetFlags, (unsigned *flags, void *p)) {
    TRY(drv_ready());
    NEED(flags, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&lock);
    struct range **at = find_locked((uint64_t)(uintptr_t)p);
    if (at)
        *flags = (*at)->flags;
    pthread_mutex_unlock(&lock);
    return at ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
