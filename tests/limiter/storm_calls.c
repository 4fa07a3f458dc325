/* storm_calls SEED BOARD ROW HANDLES: a process that for ever hands memory out and opens others', binds it to multicast objects, imports it
 * from files, copies, makes green contexts and fills its queue; to be killed at a marked point or watched as a witness (board.h).
 *
 * HANDLES is a file in which all of them leave the names of memory that they hand out, which may be gone by the time that it is opened. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "board.h"
#include "cuda_abi.h"

#define MIB ((size_t)1 << 20)
#define NAMES 16

static uint64_t seed;
static uint64_t dice(uint64_t sides) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed % sides;
}

static void *need(void *driver, const char *name) {
    void *function = dlsym(driver, name);
    if (!function)
        fprintf(stderr, "no %s\n", name), exit(3);
    return function;
}

static struct {
    CUresult (*alloc)(CUdeviceptr *, size_t), (*alloc_async)(CUdeviceptr *, size_t, CUstream);
    CUresult (*give_back)(CUdeviceptr), (*give_back_async)(CUdeviceptr, CUstream);
    CUresult (*get)(CUipcHandle *, CUdeviceptr), (*open)(CUdeviceptr *, CUipcHandle, unsigned), (*close)(CUdeviceptr);
    CUresult (*create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long);
    CUresult (*release)(CUmemGenericAllocationHandle);
    CUresult (*put)(void *, CUmemGenericAllocationHandle, int, unsigned long long), (*take)(CUmemGenericAllocationHandle *, void *, int);
    CUresult (*object)(CUmemGenericAllocationHandle *, const void *), (*member)(CUmemGenericAllocationHandle, CUdevice);
    CUresult (*bind)(CUmemGenericAllocationHandle, size_t, CUmemGenericAllocationHandle, size_t, size_t, unsigned long long);
    CUresult (*unbind)(CUmemGenericAllocationHandle, CUdevice, size_t, size_t);
    CUresult (*import)(CUexternalMemory *, const CUDA_EXTERNAL_MEMORY_HANDLE_DESC *), (*let_go)(CUexternalMemory);
    CUresult (*mapped)(CUdeviceptr *, CUexternalMemory, const void *);
    CUresult (*set)(CUdeviceptr, unsigned char, size_t, CUstream), (*copy)(CUdeviceptr, CUdeviceptr, size_t, CUstream);
    CUresult (*sync)(void);
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **);
    CUresult (*resource)(CUdevice, void *, int), (*describe)(void **, void *, unsigned);
    CUresult (*green)(CUgreenCtx *, void *, CUdevice, unsigned), (*green_ends)(CUgreenCtx);
} call;
static Row *row;
static uint64_t version, held_mib;

/* Above 0 after memory was had, below 0 before it is let go. */
static void hold(int mib) { row->held = ++version << 32 | (held_mib += (uint64_t)mib); }

static CUipcHandle *names;
static CUfunction function;
static const CUmemAllocationProp shareable = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                              .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                              .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};

static void hand_out(void) {
    CUdeviceptr pointer, other;
    const int mib = 2 * (1 + (int)dice(8));
    if (call.alloc(&pointer, MIB * (size_t)mib) != 0)
        return;
    hold(mib);
    CUipcHandle name, theirs = names[dice(NAMES)];
    if (call.get(&name, pointer) == 0)
        names[dice(NAMES)] = name; /* torn when two do so at once: the driver refuses it */
    if (call.open(&other, theirs, 1) == 0)
        call.close(other);
    hold(-mib);
    if (call.give_back(pointer) != 0)
        exit(5);
}

static void share(void) {
    const size_t size = 2 * MIB;
    const uint64_t object_properties[4] = {1, size};
    CUmemGenericAllocationHandle made, opened, object;
    int fd;
    if (call.create(&made, size, &shareable, 0) != 0)
        return;
    hold(2);
    if (call.put(&fd, made, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0) != 0)
        exit(6);
    const CUresult taken = call.take(&opened, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    close(fd);
    if (taken != 0)
        hold(-2);
    call.release(made);
    if (taken != 0)
        return;
    if (call.object(&object, object_properties) == 0) {
        if (call.member(object, 0) == 0 && call.bind(object, 0, opened, 0, size, 0) == 0 && dice(2))
            call.unbind(object, 0, 0, size);
        call.release(object);
    }
    hold(-2);
    call.release(opened);
}

/* The simulated driver imports what another interface would have made from its own files only. */
static void outside(void) {
    CUexternalMemory memory;
    CUdeviceptr pointer;
    CUmemGenericAllocationHandle made;
    CUDA_EXTERNAL_MEMORY_HANDLE_DESC description = {.type = 1, .size = 2 * MIB};
    const CUDA_EXTERNAL_MEMORY_BUFFER_DESC buffer = {.size = MIB};
    if (call.create(&made, 2 * MIB, &shareable, 0) != 0)
        return;
    if (call.put(&description.handle.fd, made, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0) != 0)
        exit(7);
    const int fd = description.handle.fd; /* the driver closes it when it takes it */
    const CUresult imported = call.import(&memory, &description);
    call.release(made);
    if (imported != 0) {
        close(fd);
        return;
    }
    hold(2);
    if (call.mapped(&pointer, memory, &buffer) == 0)
        call.give_back(pointer);
    hold(-2);
    call.let_go(memory);
}

static void pool(void) {
    CUdeviceptr pointer;
    if (call.alloc_async(&pointer, MIB * (1 + dice(4)), NULL) == 0)
        call.give_back_async(pointer, NULL);
}

static void copy(void) {
    CUdeviceptr pointer;
    if (call.alloc(&pointer, 4 * MIB) != 0)
        return;
    hold(4);
    call.set(pointer, 1, 2 * MIB, NULL);
    call.copy(pointer, pointer + 2 * MIB, 2 * MIB, NULL);
    hold(-4);
    call.give_back(pointer);
}

static void queue(void) {
    uint64_t ns = 600000;
    void *parameters[] = {&ns};
    for (int i = 0; i < 4; i++)
        if (call.launch(function, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL) != 0)
            exit(8);
    call.sync();
}

static void green(void) {
    char resource[256] = {0};
    void *description;
    CUgreenCtx context;
    if (call.resource(0, resource, 1) == 0 && call.describe(&description, resource, 1) == 0 && call.green(&context, description, 0, 1) == 0)
        call.green_ends(context);
}

static void bind_calls(void *driver) {
    const struct {
        void *at;
        const char *name;
    } all[] = {{&call.alloc, "cuMemAlloc_v2"},
               {&call.alloc_async, "cuMemAllocAsync"},
               {&call.give_back, "cuMemFree_v2"},
               {&call.give_back_async, "cuMemFreeAsync"},
               {&call.get, "cuIpcGetMemHandle"},
               {&call.open, "cuIpcOpenMemHandle_v2"},
               {&call.close, "cuIpcCloseMemHandle"},
               {&call.create, "cuMemCreate"},
               {&call.release, "cuMemRelease"},
               {&call.put, "cuMemExportToShareableHandle"},
               {&call.take, "cuMemImportFromShareableHandle"},
               {&call.object, "cuMulticastCreate"},
               {&call.member, "cuMulticastAddDevice"},
               {&call.bind, "cuMulticastBindMem"},
               {&call.unbind, "cuMulticastUnbind"},
               {&call.import, "cuImportExternalMemory"},
               {&call.let_go, "cuDestroyExternalMemory"},
               {&call.mapped, "cuExternalMemoryGetMappedBuffer"},
               {&call.set, "cuMemsetD8Async"},
               {&call.copy, "cuMemcpyDtoDAsync_v2"},
               {&call.sync, "cuCtxSynchronize"},
               {&call.launch, "cuLaunchKernel"},
               {&call.resource, "cuDeviceGetDevResource"},
               {&call.describe, "cuDevResourceGenerateDesc"},
               {&call.green, "cuGreenCtxCreate"},
               {&call.green_ends, "cuGreenCtxDestroy"}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        void *found = need(driver, all[i].name);
        memcpy(all[i].at, &found, sizeof found);
    }
}

static void (*const steps[])(void) = {hand_out, share, outside, pool, copy, queue, green};
#define STEPS (sizeof steps / sizeof *steps)

/* Who is to die at a marked point mostly does what comes by it; STEPS: any. */
static size_t preferred(void) {
    static const struct {
        const char *mark;
        size_t step;
    } all[] = {{"handed-", 0}, {"opened", 0}, {"share-", 0}, {"multicast-", 1}, {"external-", 2},
               {"pool-", 3},   {"copy-", 4},  {"fence-", 5}, {"context-", 6},   {"green-", 6}};
    const char *mark = getenv("NBGPU_MARK");
    for (size_t i = 0; mark && i < sizeof all / sizeof *all; i++)
        if (strncmp(mark, all[i].mark, strlen(all[i].mark)) == 0)
            return all[i].step;
    return STEPS;
}

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    seed = strtoull(argv[1], NULL, 10) * 2654435761u + 88172645463325252ull;
    row = &board_map(argv[2])[atoi(argv[3])];
    names = mmap(NULL, NAMES * sizeof *names, PROT_READ | PROT_WRITE, MAP_SHARED, open(argv[4], O_RDWR), 0);
    row->held = 0;
    row->pid = (uint64_t)getpid();
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *module;
    if (!driver || names == MAP_FAILED)
        return 3;
    CUresult (*init)(unsigned) = need(driver, "cuInit");
    CUresult (*retain)(CUcontext *, CUdevice) = need(driver, "cuDevicePrimaryCtxRetain");
    CUresult (*set)(CUcontext) = need(driver, "cuCtxSetCurrent");
    CUresult (*load)(void **, const void *) = need(driver, "cuModuleLoadData");
    CUresult (*get)(CUfunction *, void *, const char *) = need(driver, "cuModuleGetFunction");
    CUcontext context;
    const size_t often = preferred();
    bind_calls(driver);
    if (init(0) != 0)
        return 4;
    green(); /* before the primary context: it makes it */
    while (retain(&context, 0) != 0)
        usleep(200); /* the slice may be full for a moment */
    set(context);
    while (load(&module, ".visible .entry work_arg_ns(.param .u64 ns)\n") != 0)
        usleep(200);
    if (get(&function, module, "work_arg_ns") != 0)
        return 4;
    for (;; row->steps++) {
        for (row->standing = row->still; row->still; usleep(100))
            row->standing = 1;
        steps[often < STEPS && dice(4) ? often : dice(STEPS)]();
    }
}
