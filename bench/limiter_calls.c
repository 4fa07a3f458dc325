/* One timed loop over the driver, run by bench/limiter.py with and without the limiter; prints nanoseconds per operation.
 *
 * limiter_calls WHAT COUNT LIVE: WHAT is launch, alloc, meminfo; LIVE blocks are held meanwhile. The functions are those that
 * cuGetProcAddress hands out. The median of 201 batches is printed, and how many operations were made in all.
 * For a real driver BENCH_PTX names a file with a GPU kernel `nothing`; it is launched, and waited for outside the measured time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda_abi.h"

#define BATCHES 201 /* each well below a scheduler's time slice: on a busy machine most run undisturbed */

static int cpu_time; /* count the time on a core only: BENCH_CPU_TIME */

static CUresult (*get)(const char *, void **, int, uint64_t, int *);
static CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **);
static CUresult (*alloc)(CUdeviceptr *, size_t);
static CUresult (*give_back)(CUdeviceptr);
static CUresult (*meminfo)(size_t *, size_t *);
static CUresult (*wait_for_all)(void);
static CUfunction nothing;

static void *ask(const char *name) {
    void *function = NULL;
    if (get(name, &function, 12000, 0, NULL) != 0 || !function) {
        fprintf(stderr, "limiter_calls: the driver has no %s\n", name);
        exit(1);
    }
    return function;
}

static double now_ns(void) {
    struct timespec t;
    clock_gettime(cpu_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void check(CUresult result) {
    if (result == 0)
        return;
    fprintf(stderr, "limiter_calls: CUDA error %d\n", result);
    exit(1);
}

static void one(char what) {
    CUdeviceptr pointer;
    size_t a, b;
    if (what == 'l') {
        check(launch(nothing, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL));
    } else if (what == 'a') {
        check(alloc(&pointer, 4096));
        check(give_back(pointer));
    } else {
        check(meminfo(&a, &b));
    }
}

static void load_kernel(const char *path) {
    static char text[1 << 16];
    FILE *file = fopen(path, "r");
    if (!file || fread(text, 1, sizeof text - 1, file) == 0)
        exit((fprintf(stderr, "limiter_calls: cannot read %s\n", path), 1));
    fclose(file);
    CUmodule module;
    check(((CUresult(*)(CUmodule *, const void *))ask("cuModuleLoadData"))(&module, text));
    check(((CUresult(*)(CUfunction *, CUmodule, const char *))ask("cuModuleGetFunction"))(&nothing, module, "nothing"));
    wait_for_all = ask("cuCtxSynchronize");
}

static int by_value(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver)
        return fprintf(stderr, "limiter_calls: %s\n", dlerror()), 1;
    get = (CUresult (*)(const char *, void **, int, uint64_t, int *))dlsym(driver, "cuGetProcAddress_v2");
    CUresult (*init)(unsigned) = ask("cuInit");
    CUresult (*retain)(CUcontext *, CUdevice) = ask("cuDevicePrimaryCtxRetain");
    CUresult (*set)(CUcontext) = ask("cuCtxSetCurrent");
    launch = ask("cuLaunchKernel"), alloc = ask("cuMemAlloc"), give_back = ask("cuMemFree"), meminfo = ask("cuMemGetInfo");
    CUcontext context;
    check(init(0));
    check(retain(&context, 0));
    check(set(context));
    if (getenv("BENCH_PTX"))
        load_kernel(getenv("BENCH_PTX"));
    const long count = atol(argv[2]), live = atol(argv[3]);
    for (long i = 0; i < live; i++) {
        CUdeviceptr pointer;
        check(alloc(&pointer, 4096));
    }
    double batch[BATCHES];
    cpu_time = getenv("BENCH_CPU_TIME") != NULL;
    const long warm = count / 10 + 1;
    for (long i = 0; i < warm; i++)
        one(argv[1][0]);
    for (int b = 0; b < BATCHES; b++) {
        const double start = now_ns();
        for (long i = 0; i < count; i++)
            one(argv[1][0]);
        batch[b] = (now_ns() - start) / (double)count;
        if (wait_for_all)
            check(wait_for_all());
    }
    qsort(batch, BATCHES, sizeof *batch, by_value);
    printf("%.3f %ld\n", batch[BATCHES / 2], warm + count * BATCHES);
    fflush(stdout);
    if (getenv("BENCH_HOLD"))
        getchar(); /* the caller reads the counters while this process lives */
    return 0;
}
