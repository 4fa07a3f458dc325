/* Allocations: reserve, make the real call, remember the block; free: forget it, make the real call, give back. */
#include "limiter.h"

static void count(uint64_t *word) { __atomic_fetch_add(word, 1, __ATOMIC_RELAXED); }

/* Remember what the driver gave. When even that fails, the block stays counted: never the other way round. */
static void remember(uint64_t key, enum block_kind kind, int device, uint32_t context, uint64_t bytes) {
    const Block block = {.key = key, .bytes = bytes, .context = context & 511, .device = (unsigned)device & 15, .kind = kind};
    nbgpu_map_put(&block);
    count(&nbgpu_device[device].slot->allocs);
}

/* `call` is evaluated until the driver has an answer that stands; it may set `key`. */
#define ALLOCATE(size, call, the_key)                                                                                                      \
    do {                                                                                                                                   \
        uint32_t context = 0;                                                                                                              \
        const int device = nbgpu_current(&context);                                                                                        \
        if (unlikely(device < 0))                                                                                                          \
            return call; /* no context: the driver says so */                                                                              \
        const uint64_t bytes = nbgpu_round(size);                                                                                          \
        if (unlikely(!nbgpu_charge(device, CHARGE_USED, bytes)))                                                                           \
            return CUDA_ERROR_OUT_OF_MEMORY;                                                                                               \
        MARK("alloc-reserved");                                                                                                            \
        CUresult result = call;                                                                                                            \
        for (int i = 0; unlikely(result == CUDA_ERROR_OUT_OF_MEMORY) && nbgpu_driver_refused(device, bytes, i); i++)                       \
            result = call;                                                                                                                 \
        MARK("alloc-real");                                                                                                                \
        if (unlikely(result != CUDA_SUCCESS)) {                                                                                            \
            nbgpu_uncharge(device, CHARGE_USED, bytes);                                                                                    \
            return result;                                                                                                                 \
        }                                                                                                                                  \
        remember(the_key, BLOCK_MEMORY, device, context, bytes);                                                                           \
        MARK("alloc-done");                                                                                                                \
        return CUDA_SUCCESS;                                                                                                               \
    } while (0)

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    ENTER_CUDA(cuMemAlloc_v2, pointer, size);
    if (unlikely(!pointer))
        return REAL(cuMemAlloc_v2)(pointer, size);
    ALLOCATE(size, REAL(cuMemAlloc_v2)(pointer, size), *pointer);
}

CUresult cuMemAlloc(unsigned *pointer, unsigned size) {
    ENTER_CUDA(cuMemAlloc, pointer, size);
    if (!pointer)
        return REAL(cuMemAlloc)(pointer, size);
    ALLOCATE(size, REAL(cuMemAlloc)(pointer, size), *pointer);
}

CUresult cuMemAllocManaged(CUdeviceptr *pointer, size_t size, unsigned flags) {
    ENTER_CUDA(cuMemAllocManaged, pointer, size, flags);
    if (!pointer)
        return REAL(cuMemAllocManaged)(pointer, size, flags);
    ALLOCATE(size, REAL(cuMemAllocManaged)(pointer, size, flags), *pointer);
}

/* The pitch is the driver's choice: reserve for the widest it is known to take, correct afterwards. */
static CUresult settle(uint64_t key, enum block_kind kind, uint64_t bytes) {
    Block block;
    if (!nbgpu_map_take(key, kind, &block))
        return CUDA_SUCCESS;
    const uint64_t now = nbgpu_round(bytes);
    if (now < block.bytes)
        nbgpu_uncharge(block.device, CHARGE_USED, block.bytes - now);
    if (now > block.bytes)
        nbgpu_charge_forced(block.device, now - block.bytes);
    block.bytes = now;
    nbgpu_map_put(&block);
    return CUDA_SUCCESS;
}

static CUresult allocate_pitch(CUdeviceptr *pointer, size_t *pitch, size_t width, size_t height, unsigned element) {
    const size_t widest = (width + 511) / 512 * 512;
    if (height && widest > ((size_t)1 << 48) / height)
        return CUDA_ERROR_OUT_OF_MEMORY;
    ALLOCATE(widest * height, REAL(cuMemAllocPitch_v2)(pointer, pitch, width, height, element), *pointer);
}

CUresult cuMemAllocPitch_v2(CUdeviceptr *pointer, size_t *pitch, size_t width, size_t height, unsigned element) {
    ENTER_CUDA(cuMemAllocPitch_v2, pointer, pitch, width, height, element);
    if (!pointer || !pitch)
        return REAL(cuMemAllocPitch_v2)(pointer, pitch, width, height, element);
    const CUresult result = allocate_pitch(pointer, pitch, width, height, element);
    return result == CUDA_SUCCESS ? settle(*pointer, BLOCK_MEMORY, *pitch * height) : result;
}

CUresult cuMemAllocPitch(unsigned *pointer, unsigned *pitch, unsigned width, unsigned height, unsigned element) {
    ENTER_CUDA(cuMemAllocPitch, pointer, pitch, width, height, element);
    if (!pointer)
        return REAL(cuMemAllocPitch)(pointer, pitch, width, height, element);
    ALLOCATE(((uint64_t)width + 511) / 512 * 512 * height, REAL(cuMemAllocPitch)(pointer, pitch, width, height, element), *pointer);
}

/* A pointer that is not ours goes to the driver, always. */
#define FREE(pointer, block_kind, call)                                                                                                    \
    do {                                                                                                                                   \
        Block block;                                                                                                                       \
        const bool ours = nbgpu_map_take((uint64_t)(pointer), block_kind, &block);                                                         \
        MARK("free-taken");                                                                                                                \
        const CUresult result = call;                                                                                                      \
        MARK("free-real");                                                                                                                 \
        if (unlikely(nbgpu_shares) && result == CUDA_SUCCESS)                                                                              \
            nbgpu_share_end((uint64_t)(pointer));                                                                                          \
        if (unlikely(!ours)) {                                                                                                             \
            nbgpu_pools_dirty();                                                                                                           \
            return result;                                                                                                                 \
        }                                                                                                                                  \
        if (unlikely(result != CUDA_SUCCESS)) {                                                                                            \
            nbgpu_map_put(&block);                                                                                                         \
            return result;                                                                                                                 \
        }                                                                                                                                  \
        nbgpu_uncharge(block.device, CHARGE_USED, block.bytes);                                                                            \
        count(&nbgpu_device[block.device].slot->frees);                                                                                    \
        return result;                                                                                                                     \
    } while (0)

CUresult cuMemFree_v2(CUdeviceptr pointer) {
    ENTER_CUDA(cuMemFree_v2, pointer);
    FREE(pointer, BLOCK_MEMORY, REAL(cuMemFree_v2)(pointer));
}

CUresult cuMemFree(unsigned pointer) {
    ENTER_CUDA(cuMemFree, pointer);
    FREE(pointer, BLOCK_MEMORY, REAL(cuMemFree)(pointer));
}

CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream stream) {
    ENTER_CUDA(cuMemFreeAsync, pointer, stream);
    FREE(pointer, BLOCK_MEMORY, REAL(cuMemFreeAsync)(pointer, stream));
}

CUresult cuMemFreeAsync_ptsz(CUdeviceptr pointer, CUstream stream) {
    ENTER_CUDA(cuMemFreeAsync_ptsz, pointer, stream);
    FREE(pointer, BLOCK_MEMORY, REAL(cuMemFreeAsync_ptsz)(pointer, stream));
}

/* ---- arrays: what they take is the driver's business until they exist ---- */

static uint64_t array_bytes(size_t width, size_t height, size_t depth, int format, unsigned channels, unsigned levels) {
    const int code = format & 0xff; /* CU_AD_FORMAT_*: 8 bit 01 08, 16 bit 02 09 10, 32 bit 03 0a 20 */
    const uint64_t element = code == 0x01 || code == 0x08 ? 1 : code == 0x02 || code == 0x09 || code == 0x10 ? 2 : 4;
    const double bytes = (double)(width ? width : 1) * (double)(height ? height : 1) * (double)(depth ? depth : 1) * (double)element *
                         (channels ? channels : 1);
    const double all = levels > 1 ? bytes * (height ? 4.0 / 3.0 : 2.0) : bytes;
    return all >= (double)((uint64_t)1 << 48) ? (uint64_t)1 << 48 : (uint64_t)all;
}

static CUresult array_settle(uint64_t key, CUarray array, CUmipmappedArray mipmapped) {
    Block block;
    CUDA_ARRAY_MEMORY_REQUIREMENTS needs = {0};
    if (!nbgpu_map_take(key, BLOCK_MEMORY, &block))
        return CUDA_SUCCESS;
    block.kind = BLOCK_ARRAY;
    nbgpu_map_put(&block);
    CUresult asked = CUDA_ERROR_NOT_FOUND;
    if (array && HAVE(cuArrayGetMemoryRequirements))
        asked = REAL(cuArrayGetMemoryRequirements)(&needs, array, nbgpu_device[block.device].cuda);
    if (mipmapped && HAVE(cuMipmappedArrayGetMemoryRequirements))
        asked = REAL(cuMipmappedArrayGetMemoryRequirements)(&needs, mipmapped, nbgpu_device[block.device].cuda);
    return asked == CUDA_SUCCESS && needs.size ? settle(key, BLOCK_ARRAY, needs.size) : CUDA_SUCCESS;
}

#define ARRAY_CREATE(name, description, depth)                                                                                             \
    static CUresult counted_##name(CUarray *array, const description *a) {                                                                 \
        ALLOCATE(array_bytes(a->Width, a->Height, depth, a->Format, a->NumChannels, 1), REAL(name)(array, a), (uintptr_t)*array);          \
    }                                                                                                                                      \
    CUresult name(CUarray *array, const description *descriptor) {                                                                         \
        ENTER_CUDA(name, array, descriptor);                                                                                               \
        if (!array || !descriptor)                                                                                                         \
            return REAL(name)(array, descriptor);                                                                                          \
        const CUresult result = counted_##name(array, descriptor);                                                                         \
        return result == CUDA_SUCCESS ? array_settle((uintptr_t)*array, *array, NULL) : result;                                            \
    }
ARRAY_CREATE(cuArrayCreate, CUDA_ARRAY_DESCRIPTOR_v1, 1)
ARRAY_CREATE(cuArrayCreate_v2, CUDA_ARRAY_DESCRIPTOR, 1)
ARRAY_CREATE(cuArray3DCreate, CUDA_ARRAY3D_DESCRIPTOR_v1, a->Depth)
ARRAY_CREATE(cuArray3DCreate_v2, CUDA_ARRAY3D_DESCRIPTOR, a->Depth)

static CUresult mipmapped_create(CUmipmappedArray *array, const CUDA_ARRAY3D_DESCRIPTOR *a, unsigned levels) {
    ALLOCATE(array_bytes(a->Width, a->Height, a->Depth, a->Format, a->NumChannels, levels), REAL(cuMipmappedArrayCreate)(array, a, levels),
             (uintptr_t)*array);
}

CUresult cuMipmappedArrayCreate(CUmipmappedArray *array, const CUDA_ARRAY3D_DESCRIPTOR *descriptor, unsigned levels) {
    ENTER_CUDA(cuMipmappedArrayCreate, array, descriptor, levels);
    if (!array || !descriptor)
        return REAL(cuMipmappedArrayCreate)(array, descriptor, levels);
    const CUresult result = mipmapped_create(array, descriptor, levels);
    return result == CUDA_SUCCESS ? array_settle((uintptr_t)*array, NULL, *array) : result;
}

CUresult cuArrayDestroy(CUarray array) {
    ENTER_CUDA(cuArrayDestroy, array);
    FREE((uintptr_t)array, BLOCK_ARRAY, REAL(cuArrayDestroy)(array));
}

CUresult cuMipmappedArrayDestroy(CUmipmappedArray array) {
    ENTER_CUDA(cuMipmappedArrayDestroy, array);
    FREE((uintptr_t)array, BLOCK_ARRAY, REAL(cuMipmappedArrayDestroy)(array));
}
