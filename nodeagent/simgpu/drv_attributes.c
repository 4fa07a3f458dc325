/* What a device says of itself: an H100's values, but nothing that this driver does not do. */
#include "drv.h"

static const struct {
    int attribute, value;
} values[] = {
    {1, 1024},                                                                          /* threads per block */
    {2, 1024},        {3, 1024},    {4, 64},                                            /* block */
    {5, 2147483647},  {6, 65535},   {7, 65535},                                         /* grid */
    {8, 49152},                                                                         /* shared memory per block */
    {9, 65536},                                                                         /* constant memory */
    {10, 32},                                                                           /* warp */
    {11, 2147483647},                                                                   /* pitch */
    {12, 65536},                                                                        /* registers per block */
    {13, 1980000},                                                                      /* clock in kHz */
    {14, 512},                                                                          /* texture alignment */
    {15, 1},                                                                            /* overlaps copies with work */
    {16, 132},                                                                          /* multiprocessors */
    {19, 1},                                                                            /* can map host memory */
    {21, 131072},     {22, 131072}, {23, 65536}, {24, 16384}, {25, 16384}, {26, 16384}, /* textures */
    {27, 32768},      {28, 32768},  {29, 2048},                                         /* layered textures */
    {30, 512},                                                                          /* surface alignment */
    {31, 1},                                                                            /* concurrent kernels */
    {32, 1},                                                                            /* ECC */
    {36, 2619000},                                                                      /* memory clock in kHz */
    {37, 5120},                                                                         /* bus width */
    {38, 52428800},                                                                     /* L2 */
    {39, 2048},                                                                         /* threads per multiprocessor */
    {40, 2},                                                                            /* copy engines */
    {41, 1},                                                                            /* unified addressing */
    {51, 32},                                                                           /* texture pitch alignment */
    {75, 9},          {76, 0},                                                          /* compute capability */
    {78, 1},                                                                            /* stream priorities */
    {79, 1},          {80, 1},                                                          /* L1 caches */
    {81, 233472},                                                                       /* shared memory per multiprocessor */
    {82, 65536},                                                                        /* registers per multiprocessor */
    {83, 1},                                                                            /* managed memory */
    {87, 2},                                                                            /* single to double performance */
    {89, 1},                                                                            /* concurrent managed access */
    {90, 1},                                                                            /* compute preemption */
    {91, 1},                                                                            /* host pointers of registered memory */
    {95, 1},          {96, 1},                                                          /* cooperative launches */
    {97, 232448},                                                                       /* shared memory per block, opt-in */
    {99, 1},                                                                            /* host registration */
    {102, 1},                                                                           /* virtual memory management */
    {106, 32},                                                                          /* blocks per multiprocessor */
    {108, 32768000},                                                                    /* persisting L2 */
    {109, 134213632},                                                                   /* access policy window */
    {111, 1024},                                                                        /* reserved shared memory per block */
    {115, 1},                                                                           /* memory pools */
    {120, 1},                                                                           /* clusters */
    {125, 4},                                                                           /* memory sync domains */
    {126, 1},                                                                           /* tensor maps */
    {128, 1},                                                                           /* unified function pointers */
    {130, -1},        {134, -1},                                                        /* no NUMA node */
};
enum { PCI_BUS = 33, LAST_ATTRIBUTE = 160 };

API(cuDeviceGetAttribute, (int *out, int attribute, CUdevice ordinal)) {
    int device;
    NEED(out && attribute > 0 && attribute < LAST_ATTRIBUTE, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *out = attribute == PCI_BUS ? 1 + device : 0;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (values[i].attribute == attribute)
            *out = values[i].value;
    return CUDA_SUCCESS;
}

struct properties {
    int threads_per_block, block[3], grid[3], shared_per_block, constants, warp, pitch, registers, clock, texture_alignment;
};

API(cuDeviceGetProperties, (struct properties * out, CUdevice ordinal)) {
    static const struct properties h100 = {1024, {1024, 1024, 64}, {2147483647, 65535, 65535}, 49152, 65536, 32, 2147483647, 65536, 1980000,
                                           512};
    int device;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *out = h100;
    return CUDA_SUCCESS;
}
