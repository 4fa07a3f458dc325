/* secure DRIVER: what a program may find of the limiter in itself, to be run with and without the set-user-id bit.
 *
 * Prints: is it run with more rights than its caller's; is the limiter loaded; are a slice's files mapped; descriptors beyond the first
 * three; what two allocations of 4 MiB answer. */
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>

#include "cuda_abi.h"

static int mapped(const char *end) {
    char line[1024];
    int found = 0;
    FILE *file = fopen("/proc/self/maps", "r");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        const size_t length = strlen(line), wanted = strlen(end);
        found |= length >= wanted && strcmp(line + length - wanted, end) == 0;
    }
    if (file)
        fclose(file);
    return found;
}

static int descriptors(void) {
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        count += entry->d_name[0] != '.' && strtol(entry->d_name, NULL, 10) > 2;
    if (directory)
        closedir(directory);
    return count - 1; /* the directory's own */
}

int main(int argc, char **argv) {
    void *driver = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!driver)
        return 3;
    CUresult (*init)(unsigned) = (CUresult (*)(unsigned))dlsym(driver, "cuInit");
    CUresult (*retain)(CUcontext *, CUdevice) = (CUresult (*)(CUcontext *, CUdevice))dlsym(driver, "cuDevicePrimaryCtxRetain");
    CUresult (*set)(CUcontext) = (CUresult (*)(CUcontext))dlsym(driver, "cuCtxSetCurrent");
    CUresult (*alloc)(CUdeviceptr *, size_t) = (CUresult (*)(CUdeviceptr *, size_t))dlsym(driver, "cuMemAlloc_v2");
    CUcontext context;
    CUdeviceptr pointer;
    if (!init || !retain || !set || !alloc || init(0) || retain(&context, 0) || set(context))
        return 4;
    const int a = alloc(&pointer, 4 << 20), b = alloc(&pointer, 4 << 20);
    printf("%lu %d %d %d %d %d\n", getauxval(AT_SECURE), mapped("/libnbgpu.so"), mapped("/ctl") || mapped("/use"), descriptors(), a, b);
    return 0;
}
