/* A libcuda.so.1 whose functions return at once: what is measured through it is the cost of whoever stands in between.
 *
 * Built by bench/limiter.py and by tests of the limiter that need no device. One device (NULL_DEVICES: more), no work is ever done.
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cuda_abi.h"

#define EXPORT __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
#define CHUNK 0x200000ull

static _Atomic uint64_t next_block = 1;
static __thread CUcontext current;
static _Atomic int retained[16];

static int devices(void) {
    const char *text = getenv("NULL_DEVICES");
    return text ? atoi(text) : 1;
}

EXPORT CUresult cuDriverGetVersion(int *version) { return *version = 13000, 0; }
EXPORT CUresult cuDeviceGetCount(int *count) { return *count = devices(), 0; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, 0; }
EXPORT CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, 0, 16);
    uuid->bytes[15] = (char)(device + 1);
    return 0;
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, UNUSED CUdevice device) { return *bytes = (size_t)80 << 30, 0; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    retained[device]++;
    return *context = (CUcontext)(uintptr_t)(0x1000 + device), 0;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    retained[device]--;
    return 0;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = retained[device] > 0;
    return 0;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return current = context, 0; }
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, 0; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    if (!current)
        return CUDA_ERROR_INVALID_CONTEXT;
    return *device = (CUdevice)((uintptr_t)current - 0x1000), 0;
}
EXPORT CUresult cuCtxSynchronize(void) { return 0; }
/* With NULL_LEDGER=<file of two words>: bytes that all its processes hold at this moment, and the most that they ever held. */
static struct {
    _Atomic uint64_t now, most;
} *ledger;
static CUresult ledger_alloc(CUdeviceptr *pointer, size_t size) {
    const uint64_t now = ledger->now += size;
    for (uint64_t most = ledger->most; now > most && !atomic_compare_exchange_weak(&ledger->most, &most, now);) {
    }
    return *pointer = next_block++ << 40 | size, 0;
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    return ledger ? ledger_alloc(pointer, size) : (*pointer = next_block++ * CHUNK, 0);
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
    if (ledger)
        ledger->now -= pointer & (((uint64_t)1 << 40) - 1);
    return 0;
}
EXPORT CUresult cuInit(UNUSED unsigned flags) {
    const char *path = getenv("NULL_LEDGER");
    const int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *words = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *ledger, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (path && words == MAP_FAILED)
        return CUDA_ERROR_NOT_FOUND;
    ledger = path ? words : NULL;
    return 0;
}
EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { return *free_bytes = *total = (size_t)80 << 30, 0; }
EXPORT CUresult cuLaunchKernel(UNUSED CUfunction f, UNUSED unsigned gx, UNUSED unsigned gy, UNUSED unsigned gz, UNUSED unsigned bx,
                               UNUSED unsigned by, UNUSED unsigned bz, UNUSED unsigned shared, UNUSED CUstream stream,
                               UNUSED void **parameters, UNUSED void **extra) {
    return 0;
}
EXPORT CUresult cuLaunchKernel_ptsz(UNUSED CUfunction f, UNUSED unsigned gx, UNUSED unsigned gy, UNUSED unsigned gz, UNUSED unsigned bx,
                                    UNUSED unsigned by, UNUSED unsigned bz, UNUSED unsigned shared, UNUSED CUstream stream,
                                    UNUSED void **parameters, UNUSED void **extra) {
    return 0;
}
EXPORT CUresult cuStreamSynchronize(UNUSED CUstream stream) { return 0; }
EXPORT CUresult cuStreamQuery(UNUSED CUstream stream) { return 0; }
EXPORT CUresult cuStreamIsCapturing(UNUSED CUstream stream, int *status) { return *status = 0, 0; }
EXPORT CUresult cuEventCreate(CUevent *event, UNUSED unsigned flags) { return *event = (CUevent)(uintptr_t)(next_block++ * 16), 0; }
EXPORT CUresult cuEventRecord(UNUSED CUevent event, UNUSED CUstream stream) { return 0; }
EXPORT CUresult cuEventQuery(UNUSED CUevent event) { return 0; }
EXPORT CUresult cuEventElapsedTime(float *ms, UNUSED CUevent start, UNUSED CUevent end) { return *ms = 0.005f, 0; }

EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status);
EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    static const struct {
        const char *name;
        void *plain, *ptsz;
    } all[] = {
        {"cuInit", cuInit, NULL},
        {"cuMemAlloc", cuMemAlloc_v2, NULL},
        {"cuMemFree", cuMemFree_v2, NULL},
        {"cuMemGetInfo", cuMemGetInfo_v2, NULL},
        {"cuLaunchKernel", cuLaunchKernel, cuLaunchKernel_ptsz},
        {"cuCtxSetCurrent", cuCtxSetCurrent, NULL},
        {"cuCtxSynchronize", cuCtxSynchronize, NULL},
        {"cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain, NULL},
        {"cuGetProcAddress", cuGetProcAddress_v2, NULL},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (strcmp(all[i].name, symbol) != 0)
            continue;
        *function = (flags & 2) && all[i].ptsz ? all[i].ptsz : all[i].plain;
        if (status)
            *status = 0;
        return version >= 2000 ? 0 : CUDA_ERROR_NOT_FOUND;
    }
    *function = NULL;
    if (status)
        *status = 1;
    return CUDA_ERROR_NOT_FOUND;
}
