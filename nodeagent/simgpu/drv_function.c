/* What a function (or a CUkernel) says of itself, and what may be set. */
#include "drv.h"

CUresult drv_function(CUfunction maybe, CUfunction *function) {
    NEED(maybe && maybe->magic == FUNCTION_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    *function = maybe;
    return CUDA_SUCCESS;
}

enum { ATTRIBUTES = 16, MAX_DYNAMIC_SHARED = 8, CARVEOUT = 9 };

API(cuFuncGetAttribute, (int *value, int attribute, CUfunction handle)) {
    static const int fixed[ATTRIBUTES] = {[0] = 1024, [4] = 32, [5] = 90, [6] = 90};
    CUfunction f;
    TRY(drv_ready());
    NEED(value && attribute >= 0 && attribute < ATTRIBUTES, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(handle, &f));
    *value = attribute == MAX_DYNAMIC_SHARED ? f->max_dynamic_shared : attribute == CARVEOUT ? f->carveout : fixed[attribute];
    return CUDA_SUCCESS;
}

API(cuFuncSetAttribute, (CUfunction handle, int attribute, int value)) {
    CUfunction f;
    TRY(drv_ready());
    NEED(attribute >= MAX_DYNAMIC_SHARED && attribute < ATTRIBUTES, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(handle, &f));
    NEED(attribute != MAX_DYNAMIC_SHARED || (value >= 0 && value <= 227 << 10), CUDA_ERROR_INVALID_VALUE);
    if (attribute == MAX_DYNAMIC_SHARED)
        f->max_dynamic_shared = value;
    if (attribute == CARVEOUT)
        f->carveout = value;
    return CUDA_SUCCESS;
}

static CUresult known(CUfunction handle) {
    CUfunction f;
    TRY(drv_ready());
    return drv_function(handle, &f);
}

API(cuFuncSetCacheConfig, (CUfunction f, int config)) { return (void)config, known(f); }
API(cuFuncSetSharedMemConfig, (CUfunction f, int config)) { return (void)config, known(f); }
API(cuFuncLoad, (CUfunction f)) { return known(f); }
API(cuFuncIsLoaded, (int *state, CUfunction f)) {
    NEED(state, CUDA_ERROR_INVALID_VALUE);
    TRY(known(f));
    *state = 1;
    return CUDA_SUCCESS;
}
API(cuFuncGetModule, (CUmodule * out, CUfunction f)) {
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(known(f));
    *out = f->module;
    return CUDA_SUCCESS;
}
API(cuFuncGetName, (const char **out, CUfunction f)) {
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(known(f));
    *out = f->name;
    return CUDA_SUCCESS;
}
API(cuFuncGetParamInfo, (CUfunction f, size_t index, size_t *offset, size_t *size)) {
    NEED(offset, CUDA_ERROR_INVALID_VALUE);
    TRY(known(f));
    NEED(f->parameters >= 0, CUDA_ERROR_NOT_SUPPORTED); /* the image was not PTX */
    NEED(index < (size_t)f->parameters, CUDA_ERROR_INVALID_VALUE);
    *offset = f->parameter_offset[index];
    if (size)
        *size = f->parameter_size[index];
    return CUDA_SUCCESS;
}

#define AS_FUNCTION(kernel) ((CUfunction)(kernel))
API(cuKernelGetFunction, (CUfunction * out, CUkernel kernel)) {
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(known(AS_FUNCTION(kernel)));
    *out = AS_FUNCTION(kernel);
    return CUDA_SUCCESS;
}
API(cuKernelGetLibrary, (CUlibrary * out, CUkernel kernel)) {
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(known(AS_FUNCTION(kernel)));
    *out = (CUlibrary)AS_FUNCTION(kernel)->module;
    return CUDA_SUCCESS;
}
API(cuKernelGetAttribute, (int *value, int attribute, CUkernel kernel, CUdevice device)) {
    (void)device;
    return cuFuncGetAttribute(value, attribute, AS_FUNCTION(kernel));
}
API(cuKernelSetAttribute, (int attribute, int value, CUkernel kernel, CUdevice device)) {
    (void)device;
    return cuFuncSetAttribute(AS_FUNCTION(kernel), attribute, value);
}
API(cuKernelSetCacheConfig, (CUkernel kernel, int config, CUdevice device)) {
    return (void)device, cuFuncSetCacheConfig(AS_FUNCTION(kernel), config);
}
API(cuKernelGetName, (const char **out, CUkernel kernel)) { return cuFuncGetName(out, AS_FUNCTION(kernel)); }
API(cuKernelGetParamInfo, (CUkernel kernel, size_t index, size_t *offset, size_t *size)) {
    return cuFuncGetParamInfo(AS_FUNCTION(kernel), index, offset, size);
}
