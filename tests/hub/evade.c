/* Programs that get past the limiter, each in its way: takes BYTES of the first GPU, says "ok" or what failed, holds them until it is ended.
 *
 *   evade cuda BYTES           links the driver: compiled statically with it, no preload is ever asked
 *   evade dlsym|dlopen|dlmopen BYTES PATH   opens the driver by its path and asks dlsym, or reads its symbols itself, in this or a new namespace
 *   evade direct BYTES         speaks to the simulated machine as only a driver does (an ioctl, on hardware)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda_abi.h"

#ifdef DIRECT
#include "../../nodeagent/simgpu/sim_state.h"
static int take(char **arguments, size_t bytes) {
    struct sim sim;
    (void)arguments;
    if (sim_open(&sim) || sim_attach(&sim) || sim_channel_open(&sim, 0) < 0)
        return 1;
    return sim_mem_take(&sim, 0, bytes) ? 0 : 2;
}
#else
typedef CUresult (*Init)(unsigned), (*Retain)(CUcontext *, CUdevice), (*Current)(CUcontext), (*Alloc)(CUdeviceptr *, size_t);

static int use(Init init, Retain retain, Current current, Alloc alloc, size_t bytes) {
    CUcontext context;
    CUdeviceptr pointer;
    if (!init || !retain || !current || !alloc)
        return 1000;
    int failed = init(0);
    failed = failed ? failed : (int)retain(&context, 0);
    failed = failed ? failed : (int)current(context);
    return failed ? failed : (int)alloc(&pointer, bytes);
}

#ifdef STATIC
CUresult cuInit(unsigned);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
static int take(char **arguments, size_t bytes) {
    (void)arguments;
    return use(cuInit, cuDevicePrimaryCtxRetain, cuCtxSetCurrent, cuMemAlloc_v2, bytes);
}
#else
/* As a loader of one's own finds it: no library function is asked. */
static void *symbol(void *handle, const char *name) {
    const struct link_map *map = handle;
    const Elf64_Sym *symbols = NULL;
    const char *names = NULL;
    for (const Elf64_Dyn *d = map->l_ld; d->d_tag; d++) {
        if (d->d_tag == DT_SYMTAB)
            symbols = (const void *)d->d_un.d_ptr;
        if (d->d_tag == DT_STRTAB)
            names = (const void *)d->d_un.d_ptr;
    }
    for (const Elf64_Sym *s = symbols; (const char *)s < names; s++)
        if (s->st_value && !strcmp(names + s->st_name, name))
            return (char *)map->l_addr + s->st_value;
    return NULL;
}

static int take(char **arguments, size_t bytes) {
    const int fresh = !strcmp(arguments[1], "dlmopen");
    void *handle = fresh ? dlmopen(LM_ID_NEWLM, arguments[3], RTLD_NOW) : dlopen(arguments[3], RTLD_NOW);
    void *(*find)(void *, const char *) = strcmp(arguments[1], "dlsym") ? symbol : dlsym;
    if (!handle)
        return 1001;
    return use((Init)find(handle, "cuInit"), (Retain)find(handle, "cuDevicePrimaryCtxRetain"), (Current)find(handle, "cuCtxSetCurrent"),
               (Alloc)find(handle, "cuMemAlloc_v2"), bytes);
}
#endif
#endif

int main(int count, char **arguments) {
    if (count < 3)
        return 1;
    if (geteuid() == 0 && setresuid(0, 0, 0)) /* where it is set-user-id: root for good, as sudo makes one */
        return 1;
    const int failed = take(arguments, strtoull(arguments[2], NULL, 10));
    printf(failed ? "failed %d\n" : "ok\n", failed);
    fflush(stdout);
    while (!failed)
        pause();
    return 0;
}
