/* Asks for functions in every way that programs use, and checks that the answers are the limiter's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int failures;

static const char *home(void *address) {
    Dl_info info;
    const char *name = address && dladdr(address, &info) && info.dli_fname ? strrchr(info.dli_fname, '/') : NULL;
    return name ? name + 1 : "nothing";
}

static void expect(const char *how, void *address, const char *library) {
    if (strcmp(home(address), library) == 0)
        return;
    printf("%s: from %s, not %s\n", how, home(address), library);
    failures++;
}

int main(void) {
    const char *ours = "libnbgpu.so";
    if (dlsym(RTLD_DEFAULT, "cuInit"))
        printf("cuInit before the driver is loaded\n"), failures++;
    if (dlsym(RTLD_NEXT, "cuMemAlloc_v2"))
        printf("cuMemAlloc_v2 before the driver is loaded\n"), failures++;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    expect("dlsym", dlsym(driver, "cuMemAlloc_v2"), ours);
    expect("dlsym of what isn't ours", dlsym(driver, "cuDriverGetVersion"), "libcuda.so.1");
    expect("dlsym through RTLD_DEFAULT", dlsym(RTLD_DEFAULT, "cuMemFree_v2"), ours);
    for (int i = 0; i < 3; i++)
        expect("dlsym through RTLD_NEXT, again and again", dlsym(RTLD_NEXT, "cuMemFree_v2"), ours);
    expect("dlopen without loading", dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), "cuLaunchKernel"), ours);
    expect("dlopen of the program", dlsym(dlopen(NULL, RTLD_NOW), "cuLaunchKernel"), ours);
    void *(*next)(void *, const char *) = (void *(*)(void *, const char *))dlsym(RTLD_NEXT, "dlsym");
    expect("dlsym of dlsym", (void *)next, ours);
    if (next)
        expect("through that", next(driver, "cuMemAlloc_v2"), ours);
    void *versioned = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    expect("dlvsym of dlsym", versioned, ours);
    void *libc = dlopen("libc.so.6", RTLD_NOW);
    expect("libc's malloc", dlsym(libc, "malloc"), "libc.so.6");
    expect("libc's dlsym by handle", dlsym(libc, "dlsym"), ours);
    expect("RTLD_NEXT of an ordinary function", dlsym(RTLD_NEXT, "memfrob"), "libc.so.6");
    if (dlsym(driver, "cuNothingAtAll") || !dlerror())
        printf("a missing function gives no dlerror\n"), failures++;
    int (*get)(const char *, void **, int, uint64_t, int *) =
        (int (*)(const char *, void **, int, uint64_t, int *))dlsym(driver, "cuGetProcAddress_v2");
    void *function = NULL;
    if (get)
        get("cuMemAlloc", &function, 12000, 0, NULL);
    expect("cuGetProcAddress", function, ours);
    function = NULL;
    if (get)
        get("cuGetProcAddress", &function, 12000, 0, NULL);
    expect("cuGetProcAddress of itself", function, ours);
    return failures != 0;
}
