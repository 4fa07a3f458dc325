/* Multicast objects: what is bound is kept; nothing can be copied to or from a mapping of one, nothing is executed there. */
#include "drv.h"

struct multicast_prop {
    unsigned devices;
    size_t size;
    unsigned long long handle_types, flags;
};

#define ALIGNED(n) ((n) % SIM_PAGE == 0)
#define HANDLE(value) ((struct vmm_handle *)(uintptr_t)(value))

API(cuMulticastGetGranularity, (size_t *out, const struct multicast_prop *prop, int option)) {
    TRY(drv_ready());
    NEED(out && prop && option >= 0 && option <= 1, CUDA_ERROR_INVALID_VALUE);
    *out = SIM_PAGE;
    return CUDA_SUCCESS;
}

API(cuMulticastCreate, (CUmemGenericAllocationHandle * out, const struct multicast_prop *prop)) {
    TRY(drv_ready());
    NEED(out && prop && prop->devices && prop->size && ALIGNED(prop->size) && !prop->flags, CUDA_ERROR_INVALID_VALUE);
    NEED(prop->handle_types == CU_MEM_HANDLE_TYPE_NONE, CUDA_ERROR_NOT_SUPPORTED);
    struct vmm_handle *handle = calloc(1, sizeof *handle);
    NEED(handle, CUDA_ERROR_OUT_OF_MEMORY);
    *handle = (struct vmm_handle){.size = prop->size, .device = -1, .references = 1, .multicast_devices = prop->devices};
    *out = (CUmemGenericAllocationHandle)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

API(cuMulticastAddDevice, (CUmemGenericAllocationHandle value, CUdevice ordinal)) {
    struct vmm_handle *handle = HANDLE(value);
    int device;
    TRY(drv_device(ordinal, &device));
    NEED(handle && handle->multicast_devices, CUDA_ERROR_INVALID_VALUE);
    NEED(!(handle->members >> device & 1) && (unsigned)__builtin_popcount(handle->members) < handle->multicast_devices,
         CUDA_ERROR_INVALID_VALUE);
    handle->members |= 1u << device;
    return CUDA_SUCCESS;
}

static CUresult bind(struct vmm_handle *object, size_t at, struct vmm_handle *memory, size_t offset, size_t size) {
    TRY(drv_ready());
    NEED(object && object->multicast_devices && memory && !memory->multicast_devices && size, CUDA_ERROR_INVALID_VALUE);
    NEED((unsigned)__builtin_popcount(object->members) == object->multicast_devices, CUDA_ERROR_INVALID_VALUE); /* all devices first */
    NEED(object->members >> memory->device & 1, CUDA_ERROR_INVALID_DEVICE);
    NEED(ALIGNED(at) && ALIGNED(offset) && ALIGNED(size) && at + size <= object->size && offset + size <= memory->size,
         CUDA_ERROR_INVALID_VALUE);
    struct binding *binding = calloc(1, sizeof *binding);
    NEED(binding, CUDA_ERROR_OUT_OF_MEMORY);
    pthread_mutex_lock(&heap_lock);
    memory->references++;
    *binding = (struct binding){.memory = memory, .at = at, .size = size, .next = object->bindings};
    object->bindings = binding;
    pthread_mutex_unlock(&heap_lock);
    return CUDA_SUCCESS;
}

API(cuMulticastBindMem, (CUmemGenericAllocationHandle object, size_t at, CUmemGenericAllocationHandle memory, size_t offset, size_t size,
                         unsigned long long flags)) {
    NEED(!flags, CUDA_ERROR_INVALID_VALUE);
    return bind(HANDLE(object), at, HANDLE(memory), offset, size);
}
API(cuMulticastBindMem_v2, (CUmemGenericAllocationHandle object, CUdevice device, size_t at, CUmemGenericAllocationHandle memory,
                            size_t offset, size_t size, unsigned long long flags)) {
    (void)device;
    return cuMulticastBindMem(object, at, memory, offset, size, flags);
}

API(cuMulticastBindAddr, (CUmemGenericAllocationHandle object, size_t at, CUdeviceptr p, size_t size, unsigned long long flags)) {
    struct block block;
    TRY(drv_ready());
    NEED(!flags && heap_find(p, &block) && block.kind == BLOCK_MAPPED, CUDA_ERROR_INVALID_VALUE);
    return bind(HANDLE(object), at, block.handle, p - block.base, size);
}
API(cuMulticastBindAddr_v2,
    (CUmemGenericAllocationHandle object, CUdevice device, size_t at, CUdeviceptr p, size_t size, unsigned long long flags)) {
    (void)device;
    return cuMulticastBindAddr(object, at, p, size, flags);
}

static void let_go_locked(struct binding **where) {
    struct binding *binding = *where;
    *where = binding->next;
    vmm_unreference_locked(binding->memory);
    free(binding);
}

void multicast_end_locked(struct vmm_handle *object) {
    while (object->bindings)
        let_go_locked(&object->bindings);
}

API(cuMulticastUnbind, (CUmemGenericAllocationHandle value, CUdevice ordinal, size_t at, size_t size)) {
    struct vmm_handle *object = HANDLE(value);
    int device;
    TRY(drv_device(ordinal, &device));
    NEED(object && object->multicast_devices, CUDA_ERROR_INVALID_VALUE);
    drv_each_ctx(drv_wait_all);
    pthread_mutex_lock(&heap_lock);
    for (struct binding **where = &object->bindings; *where;) {
        const struct binding *binding = *where;
        if (binding->memory->device == device && binding->at >= at && binding->at + binding->size <= at + size)
            let_go_locked(where);
        else
            where = &(*where)->next;
    }
    pthread_mutex_unlock(&heap_lock);
    return CUDA_SUCCESS;
}
