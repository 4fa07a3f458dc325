/* What the program is told about its device's memory: the slice's (or its kernel's), as a small GPU of its own. */
#include "limiter.h"

#define REAP_EVERY (200 * MS)

/* The dead are not part of the answer; looking for them costs system calls, so now and then. */
static void reap_sometimes(void) {
    static _Atomic uint64_t last;
    if (likely(nbgpu_alone()))
        return;
    const uint64_t now = nbgpu_now_coarse();
    if (likely(now - last < REAP_EVERY))
        return;
    last = now;
    nbgpu_reap();
}

static uint64_t free_bytes_of(int device, uint64_t really_free) {
    nbgpu_pools_after_sync();
    reap_sometimes();
    uint64_t room = nbgpu_room(device);
    if (room > really_free)
        room = really_free;
    return room / (2 * MIB) * (2 * MIB); /* so that what is said to be free can be had in one block */
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER_CUDA(cuMemGetInfo_v2, free_bytes, total);
    const CUresult result = REAL(cuMemGetInfo_v2)(free_bytes, total);
    const int device = result == CUDA_SUCCESS ? nbgpu_current(NULL) : -1;
    if (device < 0)
        return result;
    if (free_bytes)
        *free_bytes = free_bytes_of(device, *free_bytes);
    if (total)
        *total = nbgpu_limit(device);
    return result;
}

static unsigned clamp32(uint64_t bytes) { return bytes > 0xffffffffu ? 0xffffffffu : (unsigned)bytes; }

CUresult cuMemGetInfo(unsigned *free_bytes, unsigned *total) {
    ENTER_CUDA(cuMemGetInfo, free_bytes, total);
    const CUresult result = REAL(cuMemGetInfo)(free_bytes, total);
    const int device = result == CUDA_SUCCESS ? nbgpu_current(NULL) : -1;
    if (device < 0)
        return result;
    if (free_bytes)
        *free_bytes = clamp32(free_bytes_of(device, *free_bytes));
    if (total)
        *total = clamp32(nbgpu_limit(device));
    return result;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER_CUDA(cuDeviceTotalMem_v2, bytes, device);
    const CUresult result = REAL(cuDeviceTotalMem_v2)(bytes, device);
    const int d = nbgpu_device_of(device);
    if (result == CUDA_SUCCESS && d >= 0)
        *bytes = nbgpu_limit(d);
    return result;
}

CUresult cuDeviceTotalMem(unsigned *bytes, CUdevice device) {
    ENTER_CUDA(cuDeviceTotalMem, bytes, device);
    const CUresult result = REAL(cuDeviceTotalMem)(bytes, device);
    const int d = nbgpu_device_of(device);
    if (result == CUDA_SUCCESS && d >= 0)
        *bytes = clamp32(nbgpu_limit(d));
    return result;
}
