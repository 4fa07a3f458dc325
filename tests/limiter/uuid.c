/* Prints the first device's UUID as NVML writes it. */
#include <stdio.h>

#include "cuda_abi.h"

CUresult cuInit(unsigned);
CUresult cuDeviceGetUuid_v2(CUuuid *, CUdevice);

int main(void) {
    CUuuid uuid;
    if (cuInit(0) || cuDeviceGetUuid_v2(&uuid, 0))
        return 1;
    printf("GPU-");
    for (int i = 0; i < 16; i++)
        printf("%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", (unsigned char)uuid.bytes[i]);
    puts("");
    return 0;
}
