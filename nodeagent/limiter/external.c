/* Memory of graphics interfaces (Vulkan, OpenGL by descriptor …): nobody here counted it when it was made, so who imports it pays. The
 * object and each buffer mapped from it are entries of one key in share.c: it counts once, until the last of them is gone. */
#include <sys/stat.h>

#include "limiter.h"

#define TYPE_OPAQUE_FD 1

/* Two processes with one file have one memory; of anything else each import is its own. */
static uint64_t key_of(const CUDA_EXTERNAL_MEMORY_HANDLE_DESC *description) {
    static _Atomic uint64_t imports;
    struct stat status;
    uint64_t name[3] = {(uint64_t)(uintptr_t)&imports, nbgpu_now(), ++imports};
    if (description->type == TYPE_OPAQUE_FD && fstat(description->handle.fd, &status) == 0 && S_ISREG(status.st_mode))
        name[0] = status.st_dev, name[1] = status.st_ino, name[2] = 0;
    return nbgpu_share_key(name, name[2] ? sizeof name : 2 * sizeof *name);
}

static bool pays(uint64_t local, int device, uint32_t context, uint64_t key, uint64_t bytes) {
    const enum hold hold = nbgpu_hold(local, device, context, key, bytes);
    const Block block = {.key = local, .bytes = bytes, .context = context & 511, .device = (unsigned)device & 15, .kind = BLOCK_MEMORY};
    if (hold == HOLD_CHARGED)
        nbgpu_map_put(&block);
    return hold != HOLD_REFUSED;
}

CUresult cuImportExternalMemory(CUexternalMemory *memory, const CUDA_EXTERNAL_MEMORY_HANDLE_DESC *description) {
    ENTER_CUDA(cuImportExternalMemory, memory, description);
    uint32_t context = 0;
    const int device = nbgpu_current(&context);
    if (device < 0 || !memory || !description)
        return REAL(cuImportExternalMemory)(memory, description);
    const uint64_t key = key_of(description), bytes = nbgpu_round(description->size); /* the driver takes the descriptor: ask before */
    const CUresult result = REAL(cuImportExternalMemory)(memory, description);
    MARK("external-imported");
    if (result != CUDA_SUCCESS || pays((uintptr_t)*memory, device, context, key, bytes))
        return result;
    REAL(cuDestroyExternalMemory)(*memory);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuDestroyExternalMemory(CUexternalMemory memory) {
    ENTER_CUDA(cuDestroyExternalMemory, memory);
    Block block;
    const CUresult result = REAL(cuDestroyExternalMemory)(memory);
    if (result == CUDA_SUCCESS && !nbgpu_share_end((uintptr_t)memory) && nbgpu_map_take((uintptr_t)memory, BLOCK_MEMORY, &block))
        nbgpu_uncharge(block.device, CHARGE_USED, block.bytes);
    return result;
}

/* What is mapped keeps the memory, also when the object goes first: freed by cuMemFree and cuMipmappedArrayDestroy. */
static void mapped(CUexternalMemory memory, uint64_t local) {
    uint64_t key, bytes;
    int device;
    uint32_t context = 0;
    nbgpu_current(&context);
    if (nbgpu_hold_of((uintptr_t)memory, &device, &key, &bytes) && nbgpu_hold(local, device, context, key, 0) == HOLD_COUNTED)
        nbgpu_hold_also(local, device, bytes);
}

CUresult cuExternalMemoryGetMappedBuffer(CUdeviceptr *pointer, CUexternalMemory memory, const void *description) {
    ENTER_CUDA(cuExternalMemoryGetMappedBuffer, pointer, memory, description);
    const CUresult result = REAL(cuExternalMemoryGetMappedBuffer)(pointer, memory, description);
    MARK("external-mapped");
    if (result == CUDA_SUCCESS)
        mapped(memory, *pointer);
    return result;
}

CUresult cuExternalMemoryGetMappedMipmappedArray(CUmipmappedArray *array, CUexternalMemory memory, const void *description) {
    ENTER_CUDA(cuExternalMemoryGetMappedMipmappedArray, array, memory, description);
    const CUresult result = REAL(cuExternalMemoryGetMappedMipmappedArray)(array, memory, description);
    if (result == CUDA_SUCCESS)
        mapped(memory, (uintptr_t)*array);
    return result;
}
