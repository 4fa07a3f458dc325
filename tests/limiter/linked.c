/* A program linked against libcuda.so.1, as nvcc's are: prints what two allocations of 4 MiB answer. */
#include <stdio.h>

#include "cuda_abi.h"

CUresult cuInit(unsigned);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **);

int main(void) {
    CUcontext context;
    CUdeviceptr pointer;
    if (cuInit(0) || cuDevicePrimaryCtxRetain(&context, 0) || cuCtxSetCurrent(context))
        return 1;
    int a = cuMemAlloc_v2(&pointer, 4 << 20), b = cuMemAlloc_v2(&pointer, 4 << 20);
    if (cuLaunchKernel(0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0))
        return 1;
    printf("%d %d\n", a, b);
    return 0;
}
