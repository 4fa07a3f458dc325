/* Multicast objects take no memory of their own; what is bound to one stays, and stays counted, until it is unbound or the object is gone. */
#include "limiter.h"

#define BINDINGS 512 /* of one process; memory of further ones stays counted until the process ends */

static struct {
    Memory *object, *memory; /* object NULL: free */
    size_t at;
} bindings[BINDINGS]; /* under the lock of vmm.c */

/* With the lock held: where several bindings begin at one place, one of each device does. */
static void bound(CUmemGenericAllocationHandle handle, size_t at, Memory *memory) {
    Memory *object = nbgpu_memory_of(handle);
    if (!object || !memory)
        return;
    nbgpu_memory_keep(memory);
    MARK("multicast-bound");
    for (int i = 0; i < BINDINGS; i++) {
        if (bindings[i].object)
            continue;
        bindings[i].object = object;
        bindings[i].memory = memory;
        bindings[i].at = at;
        return;
    }
}

static void let_go(int i) {
    Memory *memory = bindings[i].memory;
    bindings[i].object = NULL;
    MARK("multicast-unbound");
    nbgpu_memory_let_go(memory);
}

void nbgpu_multicast_ended(const Memory *object) {
    for (int i = 0; i < BINDINGS; i++)
        if (bindings[i].object == object)
            let_go(i);
}

CUresult cuMulticastCreate(CUmemGenericAllocationHandle *handle, const void *properties) {
    ENTER_CUDA(cuMulticastCreate, handle, properties);
    nbgpu_memory_lock();
    const CUresult result = REAL(cuMulticastCreate)(handle, properties);
    if (result == CUDA_SUCCESS)
        nbgpu_memory_of_nothing(*handle);
    nbgpu_memory_unlock();
    return result;
}

#define BIND(name, the_memory, ...)                                                                                                        \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    nbgpu_memory_lock();                                                                                                                   \
    const CUresult result = REAL(name)(__VA_ARGS__);                                                                                       \
    if (result == CUDA_SUCCESS)                                                                                                            \
        bound(object, at, the_memory);                                                                                                     \
    nbgpu_memory_unlock();                                                                                                                 \
    return result

CUresult cuMulticastBindMem(CUmemGenericAllocationHandle object, size_t at, CUmemGenericAllocationHandle memory, size_t offset, size_t size,
                            unsigned long long flags) {
    BIND(cuMulticastBindMem, nbgpu_memory_of(memory), object, at, memory, offset, size, flags);
}
CUresult cuMulticastBindMem_v2(CUmemGenericAllocationHandle object, CUdevice device, size_t at, CUmemGenericAllocationHandle memory,
                               size_t offset, size_t size, unsigned long long flags) {
    BIND(cuMulticastBindMem_v2, nbgpu_memory_of(memory), object, device, at, memory, offset, size, flags);
}
CUresult cuMulticastBindAddr(CUmemGenericAllocationHandle object, size_t at, CUdeviceptr pointer, size_t size, unsigned long long flags) {
    BIND(cuMulticastBindAddr, nbgpu_memory_at(pointer), object, at, pointer, size, flags);
}
CUresult cuMulticastBindAddr_v2(CUmemGenericAllocationHandle object, CUdevice device, size_t at, CUdeviceptr pointer, size_t size,
                                unsigned long long flags) {
    BIND(cuMulticastBindAddr_v2, nbgpu_memory_at(pointer), object, device, at, pointer, size, flags);
}

CUresult cuMulticastUnbind(CUmemGenericAllocationHandle handle, CUdevice device, size_t at, size_t size) {
    ENTER_CUDA(cuMulticastUnbind, handle, device, at, size);
    nbgpu_memory_lock();
    const CUresult result = REAL(cuMulticastUnbind)(handle, device, at, size);
    const Memory *object = result == CUDA_SUCCESS ? nbgpu_memory_of(handle) : NULL;
    for (int i = 0; object && i < BINDINGS; i++)
        if (bindings[i].object == object && bindings[i].at >= at && bindings[i].at < at + size &&
            nbgpu_memory_device(bindings[i].memory) == nbgpu_device_of(device))
            let_go(i);
    nbgpu_memory_unlock();
    return result;
}
