/* A process that allocates, frees and launches for ever, to be killed at a marked point or to be watched as a witness.
 *
 * storm SEED [BOARD ROW]: what it does and holds is told in that row (board.h). STORM_HOT: it never pauses.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

#include "board.h"
#include "cuda_abi.h"

#define HELD 64
#define MIB ((size_t)1 << 20)

static uint64_t seed;
static uint64_t dice(uint64_t sides) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed % sides;
}

static void *need(void *driver, const char *name) {
    void *function = dlsym(driver, name);
    if (!function)
        exit(3);
    return function;
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    seed = strtoull(argv[1], NULL, 10) * 2654435761u + 88172645463325252ull;
    Row nobody = {0}, *row = argc > 3 ? &board_map(argv[2])[atoi(argv[3])] : &nobody;
    const int hot = getenv("STORM_HOT") != NULL;
    uint64_t version = 0, held_mib = 0;
    row->held = 0;
    row->pid = (uint64_t)getpid();
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver)
        return 3;
    CUresult (*init)(unsigned) = need(driver, "cuInit");
    CUresult (*retain)(CUcontext *, CUdevice) = need(driver, "cuDevicePrimaryCtxRetain");
    CUresult (*set)(CUcontext) = need(driver, "cuCtxSetCurrent");
    CUresult (*alloc)(CUdeviceptr *, size_t) = need(driver, "cuMemAlloc_v2");
    CUresult (*give_back)(CUdeviceptr) = need(driver, "cuMemFree_v2");
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **) =
        need(driver, "cuLaunchKernel");
    CUcontext context;
    if (init(0) != 0)
        return 4;
    while (retain(&context, 0) != 0)
        usleep(200); /* the slice may be full for a moment */
    set(context);
    CUdeviceptr held[HELD];
    size_t size[HELD], count = 0;
    for (;; row->steps++) {
        while (row->still) {
            row->standing = 1;
            usleep(100);
        }
        row->standing = 0;
        if (count < HELD && dice(2)) {
            size[count] = 1 + dice(4);
            if (alloc(&held[count], 2 * MIB * size[count]) == 0)
                row->held = ++version << 32 | (held_mib += 2 * size[count++]);
        } else if (count) {
            const size_t i = dice(count);
            row->held = ++version << 32 | (held_mib -= 2 * size[i]);
            if (give_back(held[i]) != 0)
                return 5;
            held[i] = held[--count], size[i] = size[count];
        }
        if (dice(4) == 0 && launch(NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL) != 0)
            return 6;
        if (!hot && dice(16) == 0)
            usleep(400); /* long enough to be idle */
    }
}
