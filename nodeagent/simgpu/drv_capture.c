/* Stream capture. */
#include "drv.h"

CUresult capture_kernel(CUstream s, CUfunction f, const CUlaunchConfig *config, void **params, void **extra) {
    return (void)s, (void)f, (void)config, (void)params, (void)extra, CUDA_ERROR_NOT_SUPPORTED;
}
CUresult capture_copy(CUstream s, const struct box *box) { return (void)s, (void)box, CUDA_ERROR_NOT_SUPPORTED; }
CUresult capture_fill(CUstream s, const struct fill *fill) { return (void)s, (void)fill, CUDA_ERROR_NOT_SUPPORTED; }
CUresult capture_host(CUstream s, CUhostFn fn, void *user) { return (void)s, (void)fn, (void)user, CUDA_ERROR_NOT_SUPPORTED; }
CUresult capture_alloc(CUstream s, size_t bytes, CUdeviceptr *out) { return (void)s, (void)bytes, (void)out, CUDA_ERROR_NOT_SUPPORTED; }
CUresult capture_free(CUstream s, CUdeviceptr p) { return (void)s, (void)p, CUDA_ERROR_NOT_SUPPORTED; }
CUresult capture_event_record(CUstream s, CUevent e) { return (void)s, (void)e, CUDA_ERROR_NOT_SUPPORTED; }
CUresult capture_event_wait(CUstream s, CUevent e) { return (void)s, (void)e, CUDA_ERROR_NOT_SUPPORTED; }
void capture_forget_event(CUevent e) { (void)e; }
