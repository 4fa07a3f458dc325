/* Memory of other processes: IPC handles and pointers of shared pools. Shareable handles of cuMemCreate are in vmm.c. */
#include "limiter.h"

#define POINTER_ATTRIBUTE_DEVICE_ORDINAL 9

/* The block that a pointer lies in. */
static bool block_of(CUdeviceptr pointer, CUdeviceptr *base, size_t *size) {
    return HAVE(cuMemGetAddressRange_v2) && REAL(cuMemGetAddressRange_v2)(base, size, pointer) == CUDA_SUCCESS && *size;
}

/* Where memory is, whatever context is current. */
static int device_holding(CUdeviceptr pointer) {
    int ordinal = -1;
    if (HAVE(cuPointerGetAttribute) && REAL(cuPointerGetAttribute)(&ordinal, POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer) == CUDA_SUCCESS &&
        nbgpu_device_of(ordinal) >= 0)
        return nbgpu_device_of(ordinal);
    return nbgpu_current(NULL);
}

static void handed_out(CUdeviceptr pointer, const void *name, size_t size) {
    CUdeviceptr base;
    size_t bytes;
    uint32_t context = 0;
    nbgpu_current(&context);
    const int device = device_holding(pointer);
    if (device >= 0 && block_of(pointer, &base, &bytes))
        nbgpu_cover(base, device, context, nbgpu_share_key(name, size), nbgpu_round(bytes));
    MARK("handed-out");
}

/* Opening takes no memory of the device, so it is counted afterwards and undone where it is too much, or its size not known. */
static bool opened(CUdeviceptr pointer, const void *name, size_t size) {
    uint32_t context = 0;
    CUdeviceptr base;
    size_t bytes;
    nbgpu_current(&context);
    const int device = device_holding(pointer);
    if (device < 0 || !block_of(pointer, &base, &bytes))
        return false;
    MARK("opened");
    const enum hold hold = nbgpu_hold(pointer, device, context, nbgpu_share_key(name, size), nbgpu_round(bytes));
    if (hold == HOLD_CHARGED) {
        const Block block = {
            .key = pointer, .bytes = nbgpu_round(bytes), .context = context & 511, .device = (unsigned)device & 15, .kind = BLOCK_MEMORY};
        nbgpu_map_put(&block);
    }
    return hold != HOLD_REFUSED;
}

CUresult cuIpcGetMemHandle(CUipcHandle *handle, CUdeviceptr pointer) {
    ENTER_CUDA(cuIpcGetMemHandle, handle, pointer);
    const CUresult result = REAL(cuIpcGetMemHandle)(handle, pointer);
    if (result == CUDA_SUCCESS)
        handed_out(pointer, handle, sizeof *handle);
    return result;
}

#define OPEN(name)                                                                                                                         \
    ENTER_CUDA(name, pointer, handle, flags);                                                                                              \
    const CUresult result = REAL(name)(pointer, handle, flags);                                                                            \
    if (result != CUDA_SUCCESS || opened(*pointer, &handle, sizeof handle))                                                                \
        return result;                                                                                                                     \
    REAL(cuIpcCloseMemHandle)(*pointer);                                                                                                   \
    return CUDA_ERROR_OUT_OF_MEMORY
CUresult cuIpcOpenMemHandle(CUdeviceptr *pointer, CUipcHandle handle, unsigned flags) { OPEN(cuIpcOpenMemHandle); }
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *pointer, CUipcHandle handle, unsigned flags) { OPEN(cuIpcOpenMemHandle_v2); }

CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    ENTER_CUDA(cuIpcCloseMemHandle, pointer);
    Block block;
    const CUresult result = REAL(cuIpcCloseMemHandle)(pointer);
    if (result != CUDA_SUCCESS || nbgpu_share_end(pointer) || !nbgpu_map_take(pointer, BLOCK_MEMORY, &block))
        return result;
    nbgpu_uncharge(block.device, CHARGE_USED, block.bytes);
    return result;
}

/* The pool pays for what it handed out; what is opened from it is closed by an ordinary free (memory.c). */
CUresult cuMemPoolExportPointer(CUipcHandle *data, CUdeviceptr pointer) {
    ENTER_CUDA(cuMemPoolExportPointer, data, pointer);
    const CUresult result = REAL(cuMemPoolExportPointer)(data, pointer);
    if (result == CUDA_SUCCESS)
        handed_out(pointer, data, sizeof *data);
    return result;
}

CUresult cuMemPoolImportPointer(CUdeviceptr *pointer, CUmemoryPool pool, CUipcHandle *data) {
    ENTER_CUDA(cuMemPoolImportPointer, pointer, pool, data);
    const CUresult result = REAL(cuMemPoolImportPointer)(pointer, pool, data);
    if (result != CUDA_SUCCESS || opened(*pointer, data, sizeof *data))
        return result;
    REAL(cuMemFree_v2)(*pointer);
    return CUDA_ERROR_OUT_OF_MEMORY;
}
