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

static unsigned clamp32(uint64_t bytes) { return bytes > 0xffffffffu ? 0xffffffffu : (unsigned)bytes; }
static size_t whole(uint64_t bytes) { return bytes; }

/* Each question came with 32-bit numbers first: the same answer, as wide as it was asked for. */
#define MEMORY_INFO(name, number, fit)                                                                                                     \
    CUresult name(number *free_bytes, number *total) {                                                                                     \
        ENTER_CUDA(name, free_bytes, total);                                                                                               \
        nbgpu_wait_in_parked();                                                                                                            \
        const CUresult result = REAL(name)(free_bytes, total);                                                                             \
        const int device = result == CUDA_SUCCESS ? nbgpu_current(NULL) : -1;                                                              \
        if (device < 0)                                                                                                                    \
            return result;                                                                                                                 \
        if (free_bytes)                                                                                                                    \
            *free_bytes = fit(free_bytes_of(device, *free_bytes));                                                                         \
        if (total)                                                                                                                         \
            *total = fit(nbgpu_limit(device));                                                                                             \
        return result;                                                                                                                     \
    }
MEMORY_INFO(cuMemGetInfo_v2, size_t, whole)
MEMORY_INFO(cuMemGetInfo, unsigned, clamp32)

#define TOTAL_MEMORY(name, number, fit)                                                                                                    \
    CUresult name(number *bytes, CUdevice device) {                                                                                        \
        ENTER_CUDA(name, bytes, device);                                                                                                   \
        const CUresult result = REAL(name)(bytes, device);                                                                                 \
        const int d = nbgpu_device_of(device);                                                                                             \
        if (result == CUDA_SUCCESS && d >= 0)                                                                                              \
            *bytes = fit(nbgpu_limit(d));                                                                                                  \
        return result;                                                                                                                     \
    }
TOTAL_MEMORY(cuDeviceTotalMem_v2, size_t, whole)
TOTAL_MEMORY(cuDeviceTotalMem, unsigned, clamp32)
