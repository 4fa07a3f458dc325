/* sanitized THREADS ROUNDS: the whole limiter compiled into one program with a sanitizer, and threads that use all of it at once.
 *
 * The limiter's functions are called by their names, as a program linked against the driver calls them. It prints what is left counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "limiter.h"

#define NEED(call)                                                                                                                         \
    do {                                                                                                                                   \
        const CUresult result_ = (call);                                                                                                   \
        if (result_ != CUDA_SUCCESS && result_ != CUDA_ERROR_OUT_OF_MEMORY)                                                                \
            fprintf(stderr, "%s:%d: %s answered %d\n", __FILE__, __LINE__, #call, result_), exit(3);                                       \
    } while (0)

static CUresult (*stream_create)(CUstream *, unsigned);
static CUresult (*reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
static CUresult (*unreserve)(CUdeviceptr, size_t);
static CUresult (*graph_destroy)(CUgraph);
static CUresult (*add_device)(CUmemGenericAllocationHandle, CUdevice);
static CUresult (*set_current)(CUcontext);
static CUcontext context;
static CUfunction function;
static unsigned rounds;

typedef struct {
    uint64_t seed;
    CUstream stream;
    CUdeviceptr held[32];
    unsigned count;
    uint64_t ns;
    void *parameters[1];
} Self;

static uint64_t dice(Self *self, uint64_t sides) {
    self->seed ^= self->seed << 13, self->seed ^= self->seed >> 7, self->seed ^= self->seed << 17;
    return self->seed % sides;
}

static void launch(Self *self) {
    NEED(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, self->stream, self->parameters, NULL));
    if (dice(self, 4) == 0)
        NEED(cuStreamSynchronize(self->stream));
}

static void linear(Self *self) {
    size_t pitch;
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    if (self->count == 32 || dice(self, 2)) {
        if (self->count)
            NEED(cuMemFree_v2(self->held[--self->count]));
        return;
    }
    CUdeviceptr *at = &self->held[self->count];
    switch (dice(self, 3)) {
    case 0:
        result = cuMemAlloc_v2(at, 1 + dice(self, 4 * MIB));
        break;
    case 1:
        result = cuMemAllocManaged(at, 1 + dice(self, MIB), 1);
        break;
    case 2:
        result = cuMemAllocPitch_v2(at, &pitch, 1 + dice(self, 5000), 1 + dice(self, 100), 4);
    }
    self->count += result == CUDA_SUCCESS;
}

static void pooled(Self *self) {
    CUdeviceptr pointer;
    const CUresult result = cuMemAllocAsync(&pointer, 1 + dice(self, 4 * MIB), self->stream);
    NEED(result);
    if (result == CUDA_SUCCESS)
        NEED(cuMemFreeAsync(pointer, self->stream));
}

static void mapped(Self *self) {
    const CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED, .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    const size_t size = 2 * MIB * (1 + dice(self, 3));
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at;
    const CUresult result = cuMemCreate(&handle, size, &properties, 0);
    NEED(result);
    if (result != CUDA_SUCCESS)
        return;
    NEED(reserve(&at, size, 0, 0, 0));
    NEED(cuMemMap(at, size, 0, handle, 0));
    NEED(cuMemRelease(handle));
    NEED(cuMemUnmap(at, size));
    NEED(unreserve(at, size));
}

/* Handed out, opened again by the same process, bound to a multicast object: counted once. */
static void shared(Self *self) {
    const CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                            .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    const size_t size = 2 * MIB * (1 + dice(self, 2));
    const uint64_t object_properties[4] = {1, size};
    CUmemGenericAllocationHandle made, opened, object;
    int fd;
    const CUresult result = cuMemCreate(&made, size, &properties, 0);
    NEED(result);
    if (result != CUDA_SUCCESS)
        return;
    NEED(cuMemExportToShareableHandle(&fd, made, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    const CUresult imported = cuMemImportFromShareableHandle(&opened, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    NEED(imported);
    close(fd);
    NEED(cuMemRelease(made));
    if (imported != CUDA_SUCCESS)
        return;
    NEED(cuMulticastCreate(&object, object_properties));
    NEED(add_device(object, 0));
    NEED(cuMulticastBindMem(object, 0, opened, 0, size, 0));
    NEED(cuMemRelease(opened));
    NEED(cuMemRelease(object));
}

static void handed_out(Self *self) {
    CUipcHandle handle;
    if (self->count)
        cuIpcGetMemHandle(&handle, self->held[self->count - 1]); /* managed memory cannot be */
}

static void cleared(Self *self) {
    CUdeviceptr at;
    const CUresult result = cuMemAlloc_v2(&at, 2 * MIB);
    NEED(result);
    if (result != CUDA_SUCCESS)
        return;
    NEED(cuMemsetD8Async(at, 0, dice(self, 2 * MIB), self->stream));
    NEED(cuMemcpyDtoDAsync_v2(at, at + MIB, MIB, self->stream));
    NEED(cuMemFree_v2(at));
}

static void arrays(Self *self) {
    const CUDA_ARRAY_DESCRIPTOR flat = {.Width = 1 + dice(self, 1000), .Height = 1 + dice(self, 500), .Format = 0x20, .NumChannels = 1};
    CUarray array;
    const CUresult result = cuArrayCreate_v2(&array, &flat);
    NEED(result);
    if (result == CUDA_SUCCESS)
        NEED(cuArrayDestroy(array));
}

static void captured(Self *self) {
    CUgraph graph;
    CUgraphExec exec;
    CUdeviceptr pointer;
    NEED(cuStreamBeginCapture_v2(self->stream, 2));
    NEED(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, self->stream, self->parameters, NULL));
    NEED(cuMemAllocAsync(&pointer, MIB, self->stream));
    NEED(cuMemFreeAsync(pointer, self->stream));
    NEED(cuStreamEndCapture(self->stream, &graph));
    NEED(cuGraphInstantiateWithFlags(&exec, graph, 0));
    NEED(cuGraphLaunch(exec, self->stream));
    NEED(cuStreamSynchronize(self->stream));
    NEED(cuGraphExecDestroy(exec));
    NEED(graph_destroy(graph));
}

static void ask(Self *self) {
    size_t free_bytes, total;
    nvmlDevice_t device;
    nvmlMemory_t memory;
    nvmlProcessInfo_v2_t processes[8];
    unsigned count = 8;
    (void)self;
    NEED(cuMemGetInfo_v2(&free_bytes, &total));
    if (free_bytes > total || nvmlDeviceGetHandleByIndex_v2(0, &device) || nvmlDeviceGetMemoryInfo(device, &memory) ||
        memory.used > memory.total || nvmlDeviceGetComputeRunningProcesses_v3(device, &count, processes))
        fprintf(stderr, "a question was answered wrong\n"), exit(3);
}

static void new_stream(Self *self) {
    if (self->stream)
        NEED(cuStreamDestroy_v2(self->stream));
    NEED(stream_create(&self->stream, 1));
}

static void *work(void *argument) {
    static void (*const steps[])(Self *) = {launch, launch, launch,   launch, linear,     linear, linear,     pooled,
                                            mapped, arrays, captured, ask,    new_stream, shared, handed_out, cleared};
    Self *self = argument;
    self->ns = 20000;
    self->parameters[0] = &self->ns;
    NEED(set_current(context));
    new_stream(self);
    for (unsigned i = 0; i < rounds; i++)
        steps[dice(self, sizeof steps / sizeof *steps)](self);
    while (self->count)
        NEED(cuMemFree_v2(self->held[--self->count]));
    NEED(cuStreamDestroy_v2(self->stream));
    return NULL;
}

/* The map of blocks against a list of what must be in it. */
static void check_map(void) {
    enum { KEYS = 20000 };
    static unsigned char in[KEYS];
    Self self = {.seed = 88172645463325252ull};
    Block block;
    for (unsigned i = 0; i < 40 * KEYS; i++) {
        const uint64_t n = dice(&self, KEYS), key = (n + 1) << 9 | (uint64_t)1 << 55;
        const bool found = nbgpu_map_get(key, BLOCK_MEMORY, &block);
        if (found != in[n] || (found && (block.bytes != n || block.context != n % 3)))
            fprintf(stderr, "the map lost a block\n"), exit(3);
        if (found ? !nbgpu_map_take(key, BLOCK_MEMORY, &block)
                  : !nbgpu_map_put(&(Block){.key = key, .bytes = n, .context = n % 3, .kind = BLOCK_MEMORY}))
            fprintf(stderr, "the map refused\n"), exit(3);
        in[n] = !found;
    }
    nbgpu_map_forget();
}

static void *need(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        fprintf(stderr, "no %s\n", name), exit(3);
    return found;
}

static void connect_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!driver || !nvml)
        fprintf(stderr, "no driver\n"), exit(3);
    stream_create = need(driver, "cuStreamCreate");
    reserve = need(driver, "cuMemAddressReserve");
    unreserve = need(driver, "cuMemAddressFree");
    graph_destroy = need(driver, "cuGraphDestroy");
    add_device = need(driver, "cuMulticastAddDevice");
    set_current = need(driver, "cuCtxSetCurrent");
    CUresult (*load)(void **, const void *) = need(driver, "cuModuleLoadData");
    CUresult (*get)(CUfunction *, void *, const char *) = need(driver, "cuModuleGetFunction");
    int (*nvml_init)(void) = need(nvml, "nvmlInit_v2");
    void *module;
    NEED(cuInit(0));
    NEED(cuDevicePrimaryCtxRetain(&context, 0));
    NEED(set_current(context));
    NEED(load(&module, ".visible .entry work_arg_ns(.param .u64 ns)\n"));
    NEED(get(&function, module, "work_arg_ns"));
    if (nvml_init() != 0)
        exit(3);
}

/* A child takes a slot of its own and leaves nothing. */
static void fork_one(void) {
    CUdeviceptr pointer;
    int status;
    const pid_t child = fork();
    if (child == 0)
        _exit(cuMemAlloc_v2(&pointer, MIB) == CUDA_SUCCESS || nbgpu_attach() != SLICE_ACTIVE); /* a forked child has no driver */
    if (waitpid(child, &status, 0) != child || status != 0)
        fprintf(stderr, "the child ended with %#x\n", (unsigned)status), exit(3);
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    const unsigned threads = (unsigned)atoi(argv[1]);
    pthread_t thread[16];
    Self self[16] = {0};
    rounds = (unsigned)atoi(argv[2]);
    check_map();
    connect_driver();
    for (unsigned round = 0; round < 3; round++) { /* threads end and others begin */
        for (unsigned i = 0; i < threads && i < 16; i++) {
            self[i] = (Self){.seed = 1000 * round + i + 1};
            if (pthread_create(&thread[i], NULL, work, &self[i]) != 0)
                return 3;
        }
        for (unsigned i = 0; i < threads && i < 16; i++)
            pthread_join(thread[i], NULL);
    }
    fork_one();
    NEED(cuCtxSynchronize());
    NEED(cuDeviceGraphMemTrim(0));
    nbgpu_pools_refresh(0, true);
    const NbgpuUseSlot *slot = nbgpu_slot(0);
    printf("%llu %llu %llu\n", (unsigned long long)(slot->used + nbgpu_held(0, 0) + (uint64_t)nbgpu_shares),
           (unsigned long long)(slot->allocs > 0 && slot->frees > 0), (unsigned long long)slot->refusals);
    NEED(cuDevicePrimaryCtxRelease_v2(0));
    return 0;
}
