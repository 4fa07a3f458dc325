/* A process that allocates, frees and launches for ever, to be killed at a marked point or to be watched as a witness.
 *
 * storm SEED [WITNESS]: WITNESS is a file of four words that the test shares: steps made, bytes held, "stand still", "standing still".
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

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
    uint64_t nobody[4] = {0};
    volatile uint64_t *witness = nobody;
    if (argc > 2) {
        int fd = open(argv[2], O_RDWR);
        witness = mmap(NULL, sizeof nobody, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (witness == MAP_FAILED)
            return 3;
    }
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
    for (;; witness[0]++) {
        while (witness[2]) {
            witness[3] = 1;
            usleep(100);
        }
        witness[3] = 0;
        if (count < HELD && dice(2)) {
            size[count] = 2 * MIB * (1 + dice(4));
            if (alloc(&held[count], size[count]) == 0)
                witness[1] += size[count++];
        } else if (count) {
            const size_t i = dice(count);
            if (give_back(held[i]) != 0)
                return 5;
            witness[1] -= size[i];
            held[i] = held[--count], size[i] = size[count];
        }
        if (dice(4) == 0 && launch(NULL, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL) != 0)
            return 6;
        if (dice(16) == 0)
            usleep(400); /* long enough to be idle */
    }
}
