/* Launches and occupancy. */
#define _GNU_SOURCE
#include "drv.h"

enum { MAX_THREADS = 1024, THREADS_PER_SM = 2048, BLOCKS_PER_SM = 32, SHARED_PER_SM = 228 << 10, SHARED_OPTIN = 227 << 10 };

static CUresult launch(CUfunction handle, const CUlaunchConfig *c, void **params, void **extra) {
    CUfunction f;
    CUstream s;
    TRY(drv_stream(c->hStream, &s));
    TRY(drv_function(handle, &f));
    uint64_t threads = (uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ;
    NEED(c->gridDimX && c->gridDimY && c->gridDimZ && threads && threads <= MAX_THREADS, CUDA_ERROR_INVALID_VALUE);
    NEED(c->gridDimX < 1u << 31 && c->gridDimY < 65536 && c->gridDimZ < 65536, CUDA_ERROR_INVALID_VALUE);
    NEED(c->sharedMemBytes <= SHARED_OPTIN, CUDA_ERROR_INVALID_VALUE);
    if (__builtin_expect(s->capture != NULL, 0))
        return capture_kernel(s, f, c, params, extra);
    struct submission what = {.kind = SIM_COMPUTE, .ns = launch_ns(f, c, params, extra)};
    return drv_submit(s, &what, NULL);
}

#define DIMS unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared
#define CONFIG {gx, gy, gz, bx, by, bz, shared, s, NULL, 0}

STREAM_API(cuLaunchKernel, _ptsz, (CUfunction f, DIMS, CUstream s, void **params, void **extra),
           (f, gx, gy, gz, bx, by, bz, shared, s, params, extra)) {
    CUlaunchConfig config = CONFIG;
    return launch(f, &config, params, extra);
}
STREAM_API(cuLaunchKernelEx, _ptsz, (const CUlaunchConfig *config, CUfunction f, void **params, void **extra), (config, f, params, extra)) {
    NEED(config, CUDA_ERROR_INVALID_VALUE);
    return launch(f, config, params, extra);
}
STREAM_API(cuLaunchCooperativeKernel, _ptsz, (CUfunction f, DIMS, CUstream s, void **params),
           (f, gx, gy, gz, bx, by, bz, shared, s, params)) {
    CUlaunchConfig config = CONFIG;
    return launch(f, &config, params, NULL);
}
API(cuLaunchCooperativeKernelMultiDevice, (const CUDA_LAUNCH_PARAMS *list, unsigned count, unsigned flags)) {
    (void)flags;
    NEED(list && count, CUDA_ERROR_INVALID_VALUE);
    for (unsigned i = 0; i < count; i++) {
        const CUDA_LAUNCH_PARAMS *l = &list[i];
        CUlaunchConfig config = {l->gridDimX,  l->gridDimY,       l->gridDimZ, l->blockDimX, l->blockDimY,
                                 l->blockDimZ, l->sharedMemBytes, l->hStream,  NULL,         0};
        TRY(launch(l->function, &config, l->kernelParams, NULL));
    }
    return CUDA_SUCCESS;
}

/* The calls of CUDA 3: block and parameters set before. */
static __thread unsigned old_block[3] = {1, 1, 1};
API(cuFuncSetBlockShape, (CUfunction f, int x, int y, int z)) {
    (void)f;
    old_block[0] = (unsigned)x, old_block[1] = (unsigned)y, old_block[2] = (unsigned)z;
    return drv_ready();
}
API(cuFuncSetSharedSize, (CUfunction f, unsigned bytes)) { return (void)f, (void)bytes, drv_ready(); }
API(cuParamSetSize, (CUfunction f, unsigned bytes)) { return (void)f, (void)bytes, drv_ready(); }
API(cuParamSeti, (CUfunction f, int offset, unsigned value)) { return (void)f, (void)offset, (void)value, drv_ready(); }
API(cuParamSetf, (CUfunction f, int offset, float value)) { return (void)f, (void)offset, (void)value, drv_ready(); }
API(cuParamSetv, (CUfunction f, int offset, void *p, unsigned n)) { return (void)f, (void)offset, (void)p, (void)n, drv_ready(); }
API(cuLaunchGridAsync, (CUfunction f, int width, int height, CUstream s)) {
    CUlaunchConfig config = {(unsigned)width, (unsigned)height, 1, old_block[0], old_block[1], old_block[2], 0, s, NULL, 0};
    return launch(f, &config, NULL, NULL);
}
API(cuLaunchGrid, (CUfunction f, int width, int height)) { return cuLaunchGridAsync(f, width, height, NULL); }
API(cuLaunch, (CUfunction f)) { return cuLaunchGridAsync(f, 1, 1, NULL); }

static int blocks_per_sm(int threads, size_t shared) {
    int by_threads = THREADS_PER_SM / ((threads + 31) / 32 * 32);
    int by_shared = shared ? (int)(SHARED_PER_SM / (shared + 1024)) : BLOCKS_PER_SM;
    int n = by_threads < by_shared ? by_threads : by_shared;
    return n < BLOCKS_PER_SM ? n : BLOCKS_PER_SM;
}

API(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, (int *out, CUfunction f, int threads, size_t shared, unsigned flags)) {
    CUfunction unused;
    (void)flags;
    NEED(out && threads > 0 && threads <= MAX_THREADS, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(f, &unused));
    *out = blocks_per_sm(threads, shared);
    return CUDA_SUCCESS;
}
API(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *out, CUfunction f, int threads, size_t shared)) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(out, f, threads, shared, 0);
}

API(cuOccupancyMaxPotentialBlockSizeWithFlags,
    (int *grid, int *block, CUfunction f, CUoccupancyB2DSize shared_of, size_t shared, int limit, unsigned flags)) {
    CUfunction unused;
    int best = 0;
    (void)flags;
    NEED(grid && block, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(f, &unused));
    for (int threads = limit > 0 && limit < MAX_THREADS ? limit : MAX_THREADS; threads >= 32; threads -= 32) {
        int n = blocks_per_sm(threads, shared_of ? shared_of(threads) : shared);
        if (n * threads <= best)
            continue;
        best = n * threads;
        *block = threads;
        *grid = n * 132;
    }
    return best ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API(cuOccupancyMaxPotentialBlockSize, (int *grid, int *block, CUfunction f, CUoccupancyB2DSize shared_of, size_t shared, int limit)) {
    return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, f, shared_of, shared, limit, 0);
}
API(cuOccupancyAvailableDynamicSMemPerBlock, (size_t *out, CUfunction f, int blocks, int threads)) {
    CUfunction unused;
    NEED(out && blocks > 0 && threads > 0, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(f, &unused));
    *out = (size_t)(SHARED_PER_SM / blocks) < SHARED_OPTIN ? (size_t)(SHARED_PER_SM / blocks) : SHARED_OPTIN;
    return CUDA_SUCCESS;
}
API(cuOccupancyMaxPotentialClusterSize, (int *out, CUfunction f, const CUlaunchConfig *config)) {
    CUfunction unused;
    NEED(out && config, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(f, &unused));
    *out = 8;
    return CUDA_SUCCESS;
}
API(cuOccupancyMaxActiveClusters, (int *out, CUfunction f, const CUlaunchConfig *config)) {
    CUfunction unused;
    NEED(out && config, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(f, &unused));
    *out = 16;
    return CUDA_SUCCESS;
}
