/* Arrays and mipmapped arrays: rows of elements in linear memory; their layout is nobody's business, as on hardware. */
#define _GNU_SOURCE
#include "drv.h"

enum { LEVELS = 16 };

struct CUmipmappedArray_st {
    uint32_t magic;
    CUDA_ARRAY3D_DESCRIPTOR desc;
    unsigned count;
    CUarray level[LEVELS];
};

static size_t format_bytes(int format) {
    switch (format) {
    case 0x01:
    case 0x08:
        return 1; /* (un)signed 8 */
    case 0x02:
    case 0x09:
    case 0x10:
        return 2; /* 16, half */
    case 0x03:
    case 0x0a:
    case 0x20:
        return 4; /* 32, float */
    default:
        return 0;
    }
}

static CUresult shape(const CUDA_ARRAY3D_DESCRIPTOR *desc, CUarray array) {
    size_t element = format_bytes(desc->Format) * desc->NumChannels;
    NEED(desc->NumChannels == 1 || desc->NumChannels == 2 || desc->NumChannels == 4, CUDA_ERROR_INVALID_VALUE);
    NEED(element && desc->Width && desc->Width < 1u << 28 && desc->Height < 1u << 20 && desc->Depth < 1u << 16, CUDA_ERROR_INVALID_VALUE);
    NEED(!(desc->Flags & CUDA_ARRAY3D_CUBEMAP) || desc->Depth % 6 == 0, CUDA_ERROR_INVALID_VALUE);
    *array = (struct CUarray_st){.magic = ARRAY_MAGIC, .desc = *desc, .element = element};
    array->pitch = (desc->Width * element + 511) & ~(size_t)511;
    array->rows = desc->Height ? desc->Height : 1;
    array->slices = desc->Depth ? desc->Depth : 1;
    return CUDA_SUCCESS;
}

static CUresult create(CUarray *out, const CUDA_ARRAY3D_DESCRIPTOR *desc) {
    CUcontext ctx;
    struct CUarray_st made;
    NEED(out && desc, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_current(&ctx));
    TRY(shape(desc, &made));
    CUarray array = malloc(sizeof *array);
    NEED(array, CUDA_ERROR_OUT_OF_MEMORY);
    CUresult result = heap_alloc(&ctx->heap, made.pitch * made.rows * made.slices, &made.data);
    if (result != CUDA_SUCCESS) {
        free(array);
        return result;
    }
    made.device = ctx->device;
    made.owns = true;
    *array = made;
    *out = array;
    return CUDA_SUCCESS;
}

#define FLAT {.Width = desc->Width, .Height = desc->Height, .Format = desc->Format, .NumChannels = desc->NumChannels}
API(cuArrayCreate_v2, (CUarray * out, const CUDA_ARRAY_DESCRIPTOR *desc)) {
    NEED(desc, CUDA_ERROR_INVALID_VALUE);
    CUDA_ARRAY3D_DESCRIPTOR wide = FLAT;
    return create(out, &wide);
}
API(cuArrayCreate, (CUarray * out, const CUDA_ARRAY_DESCRIPTOR_v1 *desc)) {
    NEED(desc, CUDA_ERROR_INVALID_VALUE);
    CUDA_ARRAY3D_DESCRIPTOR wide = FLAT;
    return create(out, &wide);
}
API(cuArray3DCreate_v2, (CUarray * out, const CUDA_ARRAY3D_DESCRIPTOR *desc)) { return create(out, desc); }
API(cuArray3DCreate, (CUarray * out, const CUDA_ARRAY3D_DESCRIPTOR_v1 *desc)) {
    NEED(desc, CUDA_ERROR_INVALID_VALUE);
    CUDA_ARRAY3D_DESCRIPTOR wide = FLAT;
    wide.Depth = desc->Depth, wide.Flags = desc->Flags;
    return create(out, &wide);
}

static void destroy(CUarray array) {
    struct block was;
    if (array->owns)
        heap_free(array->data, &was);
    array->magic = 0;
    free(array);
}

API(cuArrayDestroy, (CUarray array)) {
    TRY(drv_ready());
    NEED(array && array->magic == ARRAY_MAGIC && array->owns, CUDA_ERROR_INVALID_HANDLE);
    drv_each_ctx(drv_wait_all);
    destroy(array);
    return CUDA_SUCCESS;
}

API(cuArray3DGetDescriptor_v2, (CUDA_ARRAY3D_DESCRIPTOR * out, CUarray array)) {
    TRY(drv_ready());
    NEED(out && array && array->magic == ARRAY_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    *out = array->desc;
    return CUDA_SUCCESS;
}
API(cuArrayGetDescriptor_v2, (CUDA_ARRAY_DESCRIPTOR * out, CUarray array)) {
    TRY(drv_ready());
    NEED(out && array && array->magic == ARRAY_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    *out = (CUDA_ARRAY_DESCRIPTOR){array->desc.Width, array->desc.Height, array->desc.Format, array->desc.NumChannels};
    return CUDA_SUCCESS;
}

static size_t array_bytes(const struct CUarray_st *array) { return array->pitch * array->rows * array->slices; }

API(cuArrayGetMemoryRequirements, (CUDA_ARRAY_MEMORY_REQUIREMENTS * out, CUarray array, CUdevice ordinal)) {
    int device;
    TRY(drv_device(ordinal, &device));
    NEED(out && array && array->magic == ARRAY_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    *out = (CUDA_ARRAY_MEMORY_REQUIREMENTS){.size = small_rounded(array_bytes(array)), .alignment = 512};
    return CUDA_SUCCESS;
}

static size_t halved(size_t n) { return n > 1 ? n / 2 : n; }

API(cuMipmappedArrayCreate, (CUmipmappedArray * out, const CUDA_ARRAY3D_DESCRIPTOR *desc, unsigned levels)) {
    NEED(out && desc && levels >= 1 && levels <= LEVELS, CUDA_ERROR_INVALID_VALUE);
    CUmipmappedArray mip = calloc(1, sizeof *mip);
    NEED(mip, CUDA_ERROR_OUT_OF_MEMORY);
    CUDA_ARRAY3D_DESCRIPTOR size = *desc;
    *mip = (struct CUmipmappedArray_st){.magic = ARRAY_MAGIC + 1, .desc = *desc};
    for (; mip->count < levels; mip->count++) {
        CUresult result = create(&mip->level[mip->count], &size);
        if (result != CUDA_SUCCESS) {
            for (unsigned i = 0; i < mip->count; i++)
                destroy(mip->level[i]);
            free(mip);
            return result;
        }
        size.Width = halved(size.Width);
        size.Height = halved(size.Height);
        if (!(desc->Flags & CUDA_ARRAY3D_LAYERED))
            size.Depth = halved(size.Depth);
    }
    *out = mip;
    return CUDA_SUCCESS;
}

static bool valid(CUmipmappedArray mip) { return mip && mip->magic == ARRAY_MAGIC + 1; }

API(cuMipmappedArrayGetLevel, (CUarray * out, CUmipmappedArray mip, unsigned level)) {
    TRY(drv_ready());
    NEED(out && valid(mip), CUDA_ERROR_INVALID_HANDLE);
    NEED(level < mip->count, CUDA_ERROR_INVALID_VALUE);
    *out = mip->level[level];
    return CUDA_SUCCESS;
}

API(cuMipmappedArrayGetMemoryRequirements, (CUDA_ARRAY_MEMORY_REQUIREMENTS * out, CUmipmappedArray mip, CUdevice ordinal)) {
    int device;
    TRY(drv_device(ordinal, &device));
    NEED(out && valid(mip), CUDA_ERROR_INVALID_HANDLE);
    *out = (CUDA_ARRAY_MEMORY_REQUIREMENTS){.alignment = 512};
    for (unsigned i = 0; i < mip->count; i++)
        out->size += small_rounded(array_bytes(mip->level[i]));
    return CUDA_SUCCESS;
}

API(cuMipmappedArrayDestroy, (CUmipmappedArray mip)) {
    TRY(drv_ready());
    NEED(valid(mip), CUDA_ERROR_INVALID_HANDLE);
    drv_each_ctx(drv_wait_all);
    for (unsigned i = 0; i < mip->count; i++)
        destroy(mip->level[i]);
    mip->magic = 0;
    free(mip);
    return CUDA_SUCCESS;
}
