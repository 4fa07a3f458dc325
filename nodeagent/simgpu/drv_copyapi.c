/* The copy and memset calls, each one turned into a box or a fill. */
#define _GNU_SOURCE
#include "drv.h"

static struct box_side at(CUdeviceptr p) {
    return (struct box_side){.device = is_device_address(p), .address = p, .host = (uint8_t *)(uintptr_t)p};
}

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle, bool synchronous) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    NEED((to && from) || !bytes, CUDA_ERROR_INVALID_VALUE);
    struct box box = {.from = at(from), .to = at(to), .width = bytes, .height = 1, .depth = 1};
    return drv_copy(&box, s, synchronous);
}

static CUresult to_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle, bool synchronous) {
    TRY(drv_ready());
    NEED(!bytes || is_device_address(to), CUDA_ERROR_INVALID_VALUE);
    return copy(to, from, bytes, handle, synchronous);
}

static CUresult from_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle, bool synchronous) {
    TRY(drv_ready());
    NEED(!bytes || is_device_address(from), CUDA_ERROR_INVALID_VALUE);
    return copy(to, from, bytes, handle, synchronous);
}

#define HOST(p) ((CUdeviceptr)(uintptr_t)(p))

STREAM_API(cuMemcpy, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t n), (to, from, n)) { return copy(to, from, n, NULL, true); }
STREAM_API(cuMemcpyAsync, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s), (to, from, n, s)) {
    return copy(to, from, n, s, false);
}
STREAM_API(cuMemcpyHtoD_v2, _ptds, (CUdeviceptr to, const void *from, size_t n), (to, from, n)) {
    return to_device(to, HOST(from), n, NULL, true);
}
STREAM_API(cuMemcpyDtoH_v2, _ptds, (void *to, CUdeviceptr from, size_t n), (to, from, n)) {
    return from_device(HOST(to), from, n, NULL, true);
}
STREAM_API(cuMemcpyDtoD_v2, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t n), (to, from, n)) {
    return to_device(to, from, n, NULL, true);
}
STREAM_API(cuMemcpyHtoDAsync_v2, _ptsz, (CUdeviceptr to, const void *from, size_t n, CUstream s), (to, from, n, s)) {
    return to_device(to, HOST(from), n, s, false);
}
STREAM_API(cuMemcpyDtoHAsync_v2, _ptsz, (void *to, CUdeviceptr from, size_t n, CUstream s), (to, from, n, s)) {
    return from_device(HOST(to), from, n, s, false);
}
STREAM_API(cuMemcpyDtoDAsync_v2, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s), (to, from, n, s)) {
    return to_device(to, from, n, s, false);
}
STREAM_API(cuMemcpyPeer, _ptds, (CUdeviceptr to, CUcontext a, CUdeviceptr from, CUcontext b, size_t n), (to, a, from, b, n)) {
    (void)a, (void)b;
    return to_device(to, from, n, NULL, true);
}
STREAM_API(cuMemcpyPeerAsync, _ptsz, (CUdeviceptr to, CUcontext a, CUdeviceptr from, CUcontext b, size_t n, CUstream s),
           (to, a, from, b, n, s)) {
    (void)a, (void)b;
    return to_device(to, from, n, s, false);
}

API(cuMemcpyHtoD, (unsigned to, const void *from, unsigned n)) { return cuMemcpyHtoD_v2(to, from, n); }
API(cuMemcpyDtoH, (void *to, unsigned from, unsigned n)) { return cuMemcpyDtoH_v2(to, from, n); }
API(cuMemcpyDtoD, (unsigned to, unsigned from, unsigned n)) { return cuMemcpyDtoD_v2(to, from, n); }

static CUresult copy3d(const CUDA_MEMCPY3D *c, CUstream handle, bool synchronous) {
    CUstream s;
    struct box box;
    NEED(c, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    TRY(box_of_copy3d(c, &box));
    return drv_copy(&box, s, synchronous);
}

static CUresult copy2d(const CUDA_MEMCPY2D *c, CUstream handle, bool synchronous) {
    NEED(c, CUDA_ERROR_INVALID_VALUE);
    CUDA_MEMCPY3D wide = {
        .srcXInBytes = c->srcXInBytes,
        .srcY = c->srcY,
        .srcMemoryType = c->srcMemoryType,
        .srcHost = c->srcHost,
        .srcDevice = c->srcDevice,
        .srcArray = c->srcArray,
        .srcPitch = c->srcPitch,
        .dstXInBytes = c->dstXInBytes,
        .dstY = c->dstY,
        .dstMemoryType = c->dstMemoryType,
        .dstHost = c->dstHost,
        .dstDevice = c->dstDevice,
        .dstArray = c->dstArray,
        .dstPitch = c->dstPitch,
        .WidthInBytes = c->WidthInBytes,
        .Height = c->Height,
        .Depth = 1,
    };
    return copy3d(&wide, handle, synchronous);
}

STREAM_API(cuMemcpy2D_v2, _ptds, (const CUDA_MEMCPY2D *c), (c)) { return copy2d(c, NULL, true); }
STREAM_API(cuMemcpy2DUnaligned_v2, _ptds, (const CUDA_MEMCPY2D *c), (c)) { return copy2d(c, NULL, true); }
STREAM_API(cuMemcpy2DAsync_v2, _ptsz, (const CUDA_MEMCPY2D *c, CUstream s), (c, s)) { return copy2d(c, s, false); }
STREAM_API(cuMemcpy3D_v2, _ptds, (const CUDA_MEMCPY3D *c), (c)) { return copy3d(c, NULL, true); }
STREAM_API(cuMemcpy3DAsync_v2, _ptsz, (const CUDA_MEMCPY3D *c, CUstream s), (c, s)) { return copy3d(c, s, false); }
STREAM_API(cuMemcpy3DPeer, _ptds, (const CUDA_MEMCPY3D *c), (c)) { return copy3d(c, NULL, true); }
STREAM_API(cuMemcpy3DPeerAsync, _ptsz, (const CUDA_MEMCPY3D *c, CUstream s), (c, s)) { return copy3d(c, s, false); }

/* Attributes are hints here. */
static CUresult copy_batch(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count, CUstream handle) {
    CUstream s;
    NEED(to && from && bytes && count, CUDA_ERROR_INVALID_VALUE);
    NEED(handle, CUDA_ERROR_INVALID_VALUE); /* not allowed on the default stream */
    TRY(drv_stream(handle, &s));
    for (size_t i = 0; i < count; i++)
        TRY(copy(to[i], from[i], bytes[i], handle, false));
    return CUDA_SUCCESS;
}
STREAM_API(cuMemcpyBatchAsync, _ptsz,
           (CUdeviceptr * to, CUdeviceptr *from, size_t *bytes, size_t n, void *attrs, size_t *at_, size_t n_attrs, size_t *failed,
            CUstream s),
           (to, from, bytes, n, attrs, at_, n_attrs, failed, s)) {
    (void)attrs, (void)at_, (void)n_attrs;
    if (failed)
        *failed = SIZE_MAX;
    return copy_batch(to, from, bytes, n, s);
}
STREAM_API(cuMemcpyBatchAsync_v2, _ptsz,
           (CUdeviceptr * to, CUdeviceptr *from, size_t *bytes, size_t n, void *attrs, size_t *at_, size_t n_attrs, CUstream s),
           (to, from, bytes, n, attrs, at_, n_attrs, s)) {
    (void)attrs, (void)at_, (void)n_attrs;
    return copy_batch(to, from, bytes, n, s);
}

API(cuMemcpyWithAttributesAsync, (CUdeviceptr to, CUdeviceptr from, size_t n, void *attributes, CUstream s)) {
    (void)attributes;
    return copy(to, from, n, s, false);
}

/* Arrays: one row of them at an offset in bytes. */
static CUresult array_at(CUarray array, size_t offset, CUdeviceptr *p) {
    NEED(array && array->magic == ARRAY_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(offset < array->pitch, CUDA_ERROR_INVALID_VALUE);
    *p = array->data + offset;
    return CUDA_SUCCESS;
}
static CUresult array_copy(CUarray to, size_t to_at, CUarray from, size_t from_at, CUdeviceptr other, size_t n, CUstream s,
                           bool synchronous) {
    CUdeviceptr target = other, source = other;
    if (to)
        TRY(array_at(to, to_at, &target));
    if (from)
        TRY(array_at(from, from_at, &source));
    return copy(target, source, n, s, synchronous);
}
STREAM_API(cuMemcpyHtoA_v2, _ptds, (CUarray to, size_t o, const void *from, size_t n), (to, o, from, n)) {
    return array_copy(to, o, NULL, 0, HOST(from), n, NULL, true);
}
STREAM_API(cuMemcpyAtoH_v2, _ptds, (void *to, CUarray from, size_t o, size_t n), (to, from, o, n)) {
    return array_copy(NULL, 0, from, o, HOST(to), n, NULL, true);
}
STREAM_API(cuMemcpyDtoA_v2, _ptds, (CUarray to, size_t o, CUdeviceptr from, size_t n), (to, o, from, n)) {
    return array_copy(to, o, NULL, 0, from, n, NULL, true);
}
STREAM_API(cuMemcpyAtoD_v2, _ptds, (CUdeviceptr to, CUarray from, size_t o, size_t n), (to, from, o, n)) {
    return array_copy(NULL, 0, from, o, to, n, NULL, true);
}
STREAM_API(cuMemcpyAtoA_v2, _ptds, (CUarray to, size_t o, CUarray from, size_t p, size_t n), (to, o, from, p, n)) {
    return array_copy(to, o, from, p, 0, n, NULL, true);
}
STREAM_API(cuMemcpyHtoAAsync_v2, _ptsz, (CUarray to, size_t o, const void *from, size_t n, CUstream s), (to, o, from, n, s)) {
    return array_copy(to, o, NULL, 0, HOST(from), n, s, false);
}
STREAM_API(cuMemcpyAtoHAsync_v2, _ptsz, (void *to, CUarray from, size_t o, size_t n, CUstream s), (to, from, o, n, s)) {
    return array_copy(NULL, 0, from, o, HOST(to), n, s, false);
}

static CUresult fill(CUdeviceptr to, size_t pitch, unsigned value, unsigned element, size_t width, size_t height, CUstream handle,
                     bool sync) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    struct fill what = {.to = to, .pitch = pitch, .width = width, .height = height, .element = element, .value = value};
    return drv_fill(&what, s, sync);
}

#define FILLS(bits, type)                                                                                                                  \
    STREAM_API(cuMemsetD##bits##_v2, _ptds, (CUdeviceptr p, type v, size_t n), (p, v, n)) {                                                \
        return fill(p, 0, v, bits / 8, n, 1, NULL, true);                                                                                  \
    }                                                                                                                                      \
    STREAM_API(cuMemsetD##bits##Async, _ptsz, (CUdeviceptr p, type v, size_t n, CUstream s), (p, v, n, s)) {                               \
        return fill(p, 0, v, bits / 8, n, 1, s, false);                                                                                    \
    }                                                                                                                                      \
    STREAM_API(cuMemsetD2D##bits##_v2, _ptds, (CUdeviceptr p, size_t pitch, type v, size_t w, size_t h), (p, pitch, v, w, h)) {            \
        return fill(p, pitch, v, bits / 8, w, h, NULL, true);                                                                              \
    }                                                                                                                                      \
    STREAM_API(cuMemsetD2D##bits##Async, _ptsz, (CUdeviceptr p, size_t pitch, type v, size_t w, size_t h, CUstream s),                     \
               (p, pitch, v, w, h, s)) {                                                                                                   \
        return fill(p, pitch, v, bits / 8, w, h, s, false);                                                                                \
    }                                                                                                                                      \
    API(cuMemsetD##bits, (unsigned p, type v, unsigned n)) { return cuMemsetD##bits##_v2(p, v, n); }
FILLS(8, unsigned char)
FILLS(16, unsigned short)
FILLS(32, unsigned)
