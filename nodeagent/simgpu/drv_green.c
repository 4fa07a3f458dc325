/* Green contexts: a part of a device's multiprocessors. Here they order nothing: their streams are streams of the primary context. */
#include "drv.h"

enum { GREEN_MAGIC = 0x47524331, RESOURCE_SM = 1, SMS = 132, SM_COUNT_AT = 96, SM_STEP = 8 };

struct CUgreenCtx_st {
    uint32_t magic;
    int device;
    CUcontext primary;
    unsigned sms;
    unsigned long long id;
};

struct desc {
    unsigned sms;
};

/* CUdevResource: a type, and behind it at a fixed place what that type holds. */
static void put_sms(void *resource, unsigned sms) {
    int type = RESOURCE_SM;
    memcpy(resource, &type, sizeof type);
    memcpy((char *)resource + SM_COUNT_AT, &sms, sizeof sms);
}

static unsigned sms_of(const void *resource) {
    unsigned sms;
    memcpy(&sms, (const char *)resource + SM_COUNT_AT, sizeof sms);
    return sms;
}

API(cuDeviceGetDevResource, (CUdevice ordinal, void *resource, int type)) {
    int device;
    TRY(drv_device(ordinal, &device));
    NEED(resource && type == RESOURCE_SM, CUDA_ERROR_INVALID_VALUE);
    put_sms(resource, SMS);
    return CUDA_SUCCESS;
}

API(cuDevResourceGenerateDesc, (void **out, void *resources, unsigned count)) {
    struct desc *desc = calloc(1, sizeof *desc);
    NEED(out && resources && count == 1 && desc, CUDA_ERROR_INVALID_VALUE);
    desc->sms = sms_of(resources);
    *out = desc;
    return CUDA_SUCCESS;
}

API(cuGreenCtxCreate, (CUgreenCtx * out, void *desc, CUdevice ordinal, unsigned flags)) {
    int device;
    static _Atomic unsigned long long ids;
    NEED(out && desc && flags == 1, CUDA_ERROR_INVALID_VALUE); /* CU_GREEN_CTX_DEFAULT_STREAM, which is required */
    TRY(drv_device(ordinal, &device));
    CUgreenCtx green = calloc(1, sizeof *green);
    NEED(green, CUDA_ERROR_OUT_OF_MEMORY);
    CUresult result = drv_primary(device, &green->primary);
    if (result != CUDA_SUCCESS) {
        free(green);
        return result;
    }
    green->magic = GREEN_MAGIC;
    green->device = device;
    green->sms = ((struct desc *)desc)->sms;
    green->id = ++ids;
    *out = green;
    return CUDA_SUCCESS;
}

#define GREEN(green) NEED(green && green->magic == GREEN_MAGIC, CUDA_ERROR_INVALID_CONTEXT)

API(cuGreenCtxDestroy, (CUgreenCtx green)) {
    TRY(drv_ready());
    GREEN(green);
    green->magic = 0; /* the struct stays, so that its handle can be told */
    return drv_primary_release(green->device);
}

API(cuCtxFromGreenCtx, (CUcontext * out, CUgreenCtx green)) {
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    GREEN(green);
    *out = green->primary;
    return CUDA_SUCCESS;
}

API(cuGreenCtxGetDevResource, (CUgreenCtx green, void *resource, int type)) {
    GREEN(green);
    NEED(resource && type == RESOURCE_SM, CUDA_ERROR_INVALID_VALUE);
    put_sms(resource, green->sms);
    return CUDA_SUCCESS;
}

API(cuGreenCtxGetId, (CUgreenCtx green, unsigned long long *id)) {
    GREEN(green);
    NEED(id, CUDA_ERROR_INVALID_VALUE);
    *id = green->id;
    return CUDA_SUCCESS;
}

API(cuGreenCtxStreamCreate, (CUstream * out, CUgreenCtx green, unsigned flags, int priority)) {
    GREEN(green);
    NEED(out && flags == CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    *out = drv_stream_make(green->primary, flags, priority);
    NEED(*out, CUDA_ERROR_OUT_OF_MEMORY);
    (*out)->green = green;
    return CUDA_SUCCESS;
}

API(cuStreamGetGreenCtx, (CUstream handle, CUgreenCtx *out)) {
    CUstream s;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *out = s->green;
    return CUDA_SUCCESS;
}
