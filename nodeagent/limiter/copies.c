/* Copies and memsets. Inside the device they take its time like GPU kernels: those of 1 MiB or more wait for the slice's turn. Copies from
 * and to the host run on engines of their own: their bytes are counted and they never wait.
 *
 * Smaller ones add up, by thread, and the one that makes it 1 MiB waits; each counts as 64 KiB at least, for starting it takes time too.
 */
#include "gate.h"

#define WAITS (MIB)
#define LEAST ((uint64_t)64 << 10)
#define POINTER_ATTRIBUTE_MEMORY_TYPE 2

enum kind { KIND_COPY, KIND_SET };

PER_THREAD uint64_t small_bytes;

/* Bytes that wait now, 0: this one goes on. */
static uint64_t due(uint64_t bytes) {
    if (bytes >= WAITS)
        return bytes;
    small_bytes += bytes > LEAST ? bytes : LEAST;
    if (small_bytes < WAITS)
        return 0;
    bytes = small_bytes;
    small_bytes = 0;
    return bytes;
}

/* How long work takes is learnt by kind and by power of two of its size. No graph has an address as low as these. */
static CUgraphExec key(enum kind kind, uint64_t bytes) {
    return (CUgraphExec)(uintptr_t)(64u * (kind + 1u) + 63u - __builtin_clzll(bytes | 1));
}

static bool on_device(CUdeviceptr pointer) {
    int type = 0;
    return HAVE(cuPointerGetAttribute) && REAL(cuPointerGetAttribute)(&type, POINTER_ATTRIBUTE_MEMORY_TYPE, pointer) == CUDA_SUCCESS &&
           type == CU_MEMORYTYPE_DEVICE;
}

static bool side_on_device(int type, CUdeviceptr pointer) {
    return type == CU_MEMORYTYPE_DEVICE || type == CU_MEMORYTYPE_ARRAY || (type == CU_MEMORYTYPE_UNIFIED && on_device(pointer));
}

static void count(uint64_t bytes) {
    const int d = nbgpu_current(NULL);
    NbgpuUseSlot *slot = d >= 0 ? nbgpu_device[d].slot : NULL;
    if (slot)
        __atomic_fetch_add(&slot->copied_bytes, bytes, __ATOMIC_RELAXED);
}

/* With the host: never waits. */
#define HOST(name, bytes, ...)                                                                                                             \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    const CUresult result = REAL(name)(__VA_ARGS__);                                                                                       \
    if (result == CUDA_SUCCESS)                                                                                                            \
        count(bytes);                                                                                                                      \
    return result

/* Inside the device. */
#define WAIT(name, kind, bytes, stream, ptsz, ...)                                                                                         \
    const uint64_t waiting = due(bytes);                                                                                                   \
    if (!waiting)                                                                                                                          \
        return REAL(name)(__VA_ARGS__);                                                                                                    \
    Launch work;                                                                                                                           \
    const CUresult admitted = nbgpu_work_begin(&work, stream, ptsz, key(kind, waiting));                                                   \
    MARK("copy-admitted");                                                                                                                 \
    return admitted == CUDA_SUCCESS ? nbgpu_work_end(&work, REAL(name)(__VA_ARGS__)) : admitted
#define DEVICE(name, kind, bytes, stream, ptsz, ...)                                                                                       \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    WAIT(name, kind, bytes, stream, ptsz, __VA_ARGS__)

/* Either, as its ends are. */
#define EITHER(name, inside, bytes, stream, ptsz, ...)                                                                                     \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    if (!(inside)) {                                                                                                                       \
        HOST(name, bytes, __VA_ARGS__);                                                                                                    \
    }                                                                                                                                      \
    WAIT(name, KIND_COPY, bytes, stream, ptsz, __VA_ARGS__)

/* Both variants: `own` is the ending of the one for per-thread default streams. */
#define HOST_COPY(name, own, arguments, ...)                                                                                               \
    CUresult name arguments { HOST(name, size, __VA_ARGS__); }                                                                             \
    CUresult name##own arguments { HOST(name##own, size, __VA_ARGS__); }
#define DEVICE_COPY(name, own, arguments, stream, ...)                                                                                     \
    CUresult name arguments { DEVICE(name, KIND_COPY, size, stream, false, __VA_ARGS__); }                                                 \
    CUresult name##own arguments { DEVICE(name##own, KIND_COPY, size, stream, true, __VA_ARGS__); }
#define ANY_COPY(name, own, arguments, inside, bytes, stream, ...)                                                                         \
    CUresult name arguments { EITHER(name, inside, bytes, stream, false, __VA_ARGS__); }                                                   \
    CUresult name##own arguments { EITHER(name##own, inside, bytes, stream, true, __VA_ARGS__); }

HOST_COPY(cuMemcpyHtoD_v2, _ptds, (CUdeviceptr to, const void *from, size_t size), to, from, size)
HOST_COPY(cuMemcpyDtoH_v2, _ptds, (void *to, CUdeviceptr from, size_t size), to, from, size)
HOST_COPY(cuMemcpyHtoDAsync_v2, _ptsz, (CUdeviceptr to, const void *from, size_t size, CUstream stream), to, from, size, stream)
HOST_COPY(cuMemcpyDtoHAsync_v2, _ptsz, (void *to, CUdeviceptr from, size_t size, CUstream stream), to, from, size, stream)
HOST_COPY(cuMemcpyHtoA_v2, _ptds, (CUarray to, size_t at, const void *from, size_t size), to, at, from, size)
HOST_COPY(cuMemcpyAtoH_v2, _ptds, (void *to, CUarray from, size_t at, size_t size), to, from, at, size)
HOST_COPY(cuMemcpyHtoAAsync_v2, _ptsz, (CUarray to, size_t at, const void *from, size_t size, CUstream stream), to, at, from, size, stream)
HOST_COPY(cuMemcpyAtoHAsync_v2, _ptsz, (void *to, CUarray from, size_t at, size_t size, CUstream stream), to, from, at, size, stream)

DEVICE_COPY(cuMemcpyDtoD_v2, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t size), NULL, to, from, size)
DEVICE_COPY(cuMemcpyDtoDAsync_v2, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream), stream, to, from, size, stream)
DEVICE_COPY(cuMemcpyPeer, _ptds, (CUdeviceptr to, CUcontext there, CUdeviceptr from, CUcontext here, size_t size), NULL, to, there, from,
            here, size)
DEVICE_COPY(cuMemcpyPeerAsync, _ptsz, (CUdeviceptr to, CUcontext there, CUdeviceptr from, CUcontext here, size_t size, CUstream stream),
            stream, to, there, from, here, size, stream)
DEVICE_COPY(cuMemcpyDtoA_v2, _ptds, (CUarray to, size_t at, CUdeviceptr from, size_t size), NULL, to, at, from, size)
DEVICE_COPY(cuMemcpyAtoD_v2, _ptds, (CUdeviceptr to, CUarray from, size_t at, size_t size), NULL, to, from, at, size)
DEVICE_COPY(cuMemcpyAtoA_v2, _ptds, (CUarray to, size_t at, CUarray from, size_t here, size_t size), NULL, to, at, from, here, size)

#define BOTH (on_device(to) && on_device(from))
ANY_COPY(cuMemcpy, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t size), BOTH, size, NULL, to, from, size)
ANY_COPY(cuMemcpyAsync, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream), BOTH, size, stream, to, from, size, stream)

CUresult cuMemcpyWithAttributesAsync(CUdeviceptr to, CUdeviceptr from, size_t size, void *attributes, CUstream stream) {
    EITHER(cuMemcpyWithAttributesAsync, BOTH, size, stream, false, to, from, size, attributes, stream);
}

#define INSIDE (copy && side_on_device(copy->srcMemoryType, copy->srcDevice) && side_on_device(copy->dstMemoryType, copy->dstDevice))
#define FLAT (copy ? copy->WidthInBytes * copy->Height : 0)
#define DEEP (copy ? copy->WidthInBytes * copy->Height * copy->Depth : 0)
ANY_COPY(cuMemcpy2D_v2, _ptds, (const CUDA_MEMCPY2D *copy), INSIDE, FLAT, NULL, copy)
ANY_COPY(cuMemcpy2DUnaligned_v2, _ptds, (const CUDA_MEMCPY2D *copy), INSIDE, FLAT, NULL, copy)
ANY_COPY(cuMemcpy2DAsync_v2, _ptsz, (const CUDA_MEMCPY2D *copy, CUstream stream), INSIDE, FLAT, stream, copy, stream)
ANY_COPY(cuMemcpy3D_v2, _ptds, (const CUDA_MEMCPY3D *copy), INSIDE, DEEP, NULL, copy)
ANY_COPY(cuMemcpy3DAsync_v2, _ptsz, (const CUDA_MEMCPY3D *copy, CUstream stream), INSIDE, DEEP, stream, copy, stream)
ANY_COPY(cuMemcpy3DPeer, _ptds, (const CUDA_MEMCPY3D *copy), INSIDE, DEEP, NULL, copy)
ANY_COPY(cuMemcpy3DPeerAsync, _ptsz, (const CUDA_MEMCPY3D *copy, CUstream stream), INSIDE, DEEP, stream, copy, stream)

/* One call, many copies: those inside the device wait together. */
static uint64_t batch_bytes(const CUdeviceptr *to, const CUdeviceptr *from, const size_t *sizes, size_t n, bool inside) {
    uint64_t bytes = 0;
    for (size_t i = 0; to && from && sizes && i < n; i++)
        if ((on_device(to[i]) && on_device(from[i])) == inside)
            bytes += sizes[i];
    return bytes;
}

#define BATCH(name, ...)                                                                                                                   \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    const uint64_t bytes = batch_bytes(to, from, sizes, n, true);                                                                          \
    count(batch_bytes(to, from, sizes, n, false));                                                                                         \
    if (!bytes)                                                                                                                            \
        return REAL(name)(__VA_ARGS__);                                                                                                    \
    WAIT(name, KIND_COPY, bytes, stream, false, __VA_ARGS__)
#define BATCHES(own)                                                                                                                       \
    CUresult cuMemcpyBatchAsync##own(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t n, void *attributes, size_t *of,            \
                                     size_t kinds, size_t *failed, CUstream stream) {                                                      \
        BATCH(cuMemcpyBatchAsync##own, to, from, sizes, n, attributes, of, kinds, failed, stream);                                         \
    }                                                                                                                                      \
    CUresult cuMemcpyBatchAsync_v2##own(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t n, void *attributes, size_t *of,         \
                                        size_t kinds, CUstream stream) {                                                                   \
        BATCH(cuMemcpyBatchAsync_v2##own, to, from, sizes, n, attributes, of, kinds, stream);                                              \
    }
BATCHES()
BATCHES(_ptsz)

#define SET(name, own, arguments, bytes, stream, ...)                                                                                      \
    CUresult name arguments { DEVICE(name, KIND_SET, bytes, stream, false, __VA_ARGS__); }                                                 \
    CUresult name##own arguments { DEVICE(name##own, KIND_SET, bytes, stream, true, __VA_ARGS__); }
#define SETS(bits, type)                                                                                                                   \
    SET(cuMemsetD##bits##_v2, _ptds, (CUdeviceptr to, type value, size_t n), n *(bits / 8), NULL, to, value, n)                            \
    SET(cuMemsetD##bits##Async, _ptsz, (CUdeviceptr to, type value, size_t n, CUstream stream), n *(bits / 8), stream, to, value, n,       \
        stream)                                                                                                                            \
    SET(cuMemsetD2D##bits##_v2, _ptds, (CUdeviceptr to, size_t pitch, type value, size_t width, size_t height),                            \
        width * height * (bits / 8), NULL, to, pitch, value, width, height)                                                                \
    SET(cuMemsetD2D##bits##Async, _ptsz, (CUdeviceptr to, size_t pitch, type value, size_t width, size_t height, CUstream stream),         \
        width * height * (bits / 8), stream, to, pitch, value, width, height, stream)
SETS(8, unsigned char)
SETS(16, unsigned short)
SETS(32, unsigned)
