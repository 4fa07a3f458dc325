/* The driver's functions that the limiter stands in for (HOOK) or only calls (CALL).
 *
 * HOOK(library, result, exported name, arguments, name asked of cuGetProcAddress, CUDA version from which that name means this
 * function, 1 = the variant for per-thread default streams). Included several times with other meanings of HOOK and CALL.
 */
#define STREAM_PAIR(name, arguments, since, since_ptsz)                                                                                    \
    HOOK(CUDA, CUresult, name, arguments, #name, since, 0)                                                                                 \
    HOOK(CUDA, CUresult, name##_ptsz, arguments, #name, since_ptsz, 1)

/* resolution and enumeration */
HOOK(CUDA, CUresult, cuInit, (unsigned flags), "cuInit", 2000, 0)
HOOK(CUDA, CUresult, cuGetProcAddress, (const char *symbol, void **function, int version, uint64_t flags), "cuGetProcAddress", 11030, 0)
HOOK(CUDA, CUresult, cuGetProcAddress_v2, (const char *symbol, void **function, int version, uint64_t flags, int *status),
     "cuGetProcAddress", 12000, 0)

/* what the program may see */
HOOK(CUDA, CUresult, cuDeviceTotalMem, (unsigned *bytes, CUdevice device), "cuDeviceTotalMem", 2000, 0)
HOOK(CUDA, CUresult, cuDeviceTotalMem_v2, (size_t *bytes, CUdevice device), "cuDeviceTotalMem", 3020, 0)
HOOK(CUDA, CUresult, cuMemGetInfo, (unsigned *free_bytes, unsigned *total), "cuMemGetInfo", 2000, 0)
HOOK(CUDA, CUresult, cuMemGetInfo_v2, (size_t *free_bytes, size_t *total), "cuMemGetInfo", 3020, 0)

/* memory */
HOOK(CUDA, CUresult, cuMemAlloc, (unsigned *pointer, unsigned size), "cuMemAlloc", 2000, 0)
HOOK(CUDA, CUresult, cuMemAlloc_v2, (CUdeviceptr * pointer, size_t size), "cuMemAlloc", 3020, 0)
HOOK(CUDA, CUresult, cuMemAllocPitch, (unsigned *pointer, unsigned *pitch, unsigned width, unsigned height, unsigned element),
     "cuMemAllocPitch", 2000, 0)
HOOK(CUDA, CUresult, cuMemAllocPitch_v2, (CUdeviceptr * pointer, size_t *pitch, size_t width, size_t height, unsigned element),
     "cuMemAllocPitch", 3020, 0)
HOOK(CUDA, CUresult, cuMemAllocManaged, (CUdeviceptr * pointer, size_t size, unsigned flags), "cuMemAllocManaged", 6000, 0)
HOOK(CUDA, CUresult, cuMemFree, (unsigned pointer), "cuMemFree", 2000, 0)
HOOK(CUDA, CUresult, cuMemFree_v2, (CUdeviceptr pointer), "cuMemFree", 3020, 0)
STREAM_PAIR(cuMemAllocAsync, (CUdeviceptr * pointer, size_t size, CUstream stream), 11020, 11020)
STREAM_PAIR(cuMemAllocFromPoolAsync, (CUdeviceptr * pointer, size_t size, CUmemoryPool pool, CUstream stream), 11020, 11020)
STREAM_PAIR(cuMemFreeAsync, (CUdeviceptr pointer, CUstream stream), 11020, 11020)
HOOK(CUDA, CUresult, cuMemPoolCreate, (CUmemoryPool * pool, const CUmemPoolProps *properties), "cuMemPoolCreate", 11020, 0)
HOOK(CUDA, CUresult, cuMemPoolDestroy, (CUmemoryPool pool), "cuMemPoolDestroy", 11020, 0)
HOOK(CUDA, CUresult, cuMemPoolTrimTo, (CUmemoryPool pool, size_t keep), "cuMemPoolTrimTo", 11020, 0)
HOOK(CUDA, CUresult, cuMemCreate,
     (CUmemGenericAllocationHandle * handle, size_t size, const CUmemAllocationProp *properties, unsigned long long flags), "cuMemCreate",
     10020, 0)
HOOK(CUDA, CUresult, cuMemRelease, (CUmemGenericAllocationHandle handle), "cuMemRelease", 10020, 0)
HOOK(CUDA, CUresult, cuMemRetainAllocationHandle, (CUmemGenericAllocationHandle * handle, void *address), "cuMemRetainAllocationHandle",
     11000, 0)
HOOK(CUDA, CUresult, cuMemMap,
     (CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags), "cuMemMap", 10020, 0)
HOOK(CUDA, CUresult, cuMemUnmap, (CUdeviceptr pointer, size_t size), "cuMemUnmap", 10020, 0)
HOOK(CUDA, CUresult, cuArrayCreate, (CUarray * array, const CUDA_ARRAY_DESCRIPTOR_v1 *descriptor), "cuArrayCreate", 2000, 0)
HOOK(CUDA, CUresult, cuArrayCreate_v2, (CUarray * array, const CUDA_ARRAY_DESCRIPTOR *descriptor), "cuArrayCreate", 3020, 0)
HOOK(CUDA, CUresult, cuArray3DCreate, (CUarray * array, const CUDA_ARRAY3D_DESCRIPTOR_v1 *descriptor), "cuArray3DCreate", 2000, 0)
HOOK(CUDA, CUresult, cuArray3DCreate_v2, (CUarray * array, const CUDA_ARRAY3D_DESCRIPTOR *descriptor), "cuArray3DCreate", 3020, 0)
HOOK(CUDA, CUresult, cuArrayDestroy, (CUarray array), "cuArrayDestroy", 2000, 0)
HOOK(CUDA, CUresult, cuMipmappedArrayCreate, (CUmipmappedArray * array, const CUDA_ARRAY3D_DESCRIPTOR *descriptor, unsigned levels),
     "cuMipmappedArrayCreate", 5000, 0)
HOOK(CUDA, CUresult, cuMipmappedArrayDestroy, (CUmipmappedArray array), "cuMipmappedArrayDestroy", 5000, 0)

/* memory that processes share */
HOOK(CUDA, CUresult, cuIpcGetMemHandle, (CUipcHandle * handle, CUdeviceptr pointer), "cuIpcGetMemHandle", 4010, 0)
HOOK(CUDA, CUresult, cuIpcOpenMemHandle, (CUdeviceptr * pointer, CUipcHandle handle, unsigned flags), "cuIpcOpenMemHandle", 4010, 0)
HOOK(CUDA, CUresult, cuIpcOpenMemHandle_v2, (CUdeviceptr * pointer, CUipcHandle handle, unsigned flags), "cuIpcOpenMemHandle", 11000, 0)
HOOK(CUDA, CUresult, cuIpcCloseMemHandle, (CUdeviceptr pointer), "cuIpcCloseMemHandle", 4010, 0)
HOOK(CUDA, CUresult, cuMemExportToShareableHandle,
     (void *shareable, CUmemGenericAllocationHandle handle, int type, unsigned long long flags), "cuMemExportToShareableHandle", 10020, 0)
HOOK(CUDA, CUresult, cuMemImportFromShareableHandle, (CUmemGenericAllocationHandle * handle, void *shareable, int type),
     "cuMemImportFromShareableHandle", 10020, 0)
HOOK(CUDA, CUresult, cuMemPoolExportPointer, (CUipcHandle * data, CUdeviceptr pointer), "cuMemPoolExportPointer", 11020, 0)
HOOK(CUDA, CUresult, cuMemPoolImportPointer, (CUdeviceptr * pointer, CUmemoryPool pool, CUipcHandle *data), "cuMemPoolImportPointer", 11020,
     0)
HOOK(CUDA, CUresult, cuImportExternalMemory, (CUexternalMemory * memory, const CUDA_EXTERNAL_MEMORY_HANDLE_DESC *description),
     "cuImportExternalMemory", 10000, 0)
HOOK(CUDA, CUresult, cuDestroyExternalMemory, (CUexternalMemory memory), "cuDestroyExternalMemory", 10000, 0)
HOOK(CUDA, CUresult, cuExternalMemoryGetMappedBuffer, (CUdeviceptr * pointer, CUexternalMemory memory, const void *description),
     "cuExternalMemoryGetMappedBuffer", 10000, 0)
HOOK(CUDA, CUresult, cuExternalMemoryGetMappedMipmappedArray, (CUmipmappedArray * array, CUexternalMemory memory, const void *description),
     "cuExternalMemoryGetMappedMipmappedArray", 10000, 0)
HOOK(CUDA, CUresult, cuMulticastCreate, (CUmemGenericAllocationHandle * handle, const void *properties), "cuMulticastCreate", 12010, 0)
HOOK(CUDA, CUresult, cuMulticastBindMem,
     (CUmemGenericAllocationHandle object, size_t at, CUmemGenericAllocationHandle memory, size_t offset, size_t size,
      unsigned long long flags),
     "cuMulticastBindMem", 12010, 0)
HOOK(CUDA, CUresult, cuMulticastBindMem_v2,
     (CUmemGenericAllocationHandle object, CUdevice device, size_t at, CUmemGenericAllocationHandle memory, size_t offset, size_t size,
      unsigned long long flags),
     "cuMulticastBindMem", 13010, 0)
HOOK(CUDA, CUresult, cuMulticastBindAddr,
     (CUmemGenericAllocationHandle object, size_t at, CUdeviceptr pointer, size_t size, unsigned long long flags), "cuMulticastBindAddr",
     12010, 0)
HOOK(CUDA, CUresult, cuMulticastBindAddr_v2,
     (CUmemGenericAllocationHandle object, CUdevice device, size_t at, CUdeviceptr pointer, size_t size, unsigned long long flags),
     "cuMulticastBindAddr", 13010, 0)
HOOK(CUDA, CUresult, cuMulticastUnbind, (CUmemGenericAllocationHandle handle, CUdevice device, size_t at, size_t size), "cuMulticastUnbind",
     12010, 0)

/* contexts */
HOOK(CUDA, CUresult, cuCtxCreate, (CUcontext * context, unsigned flags, CUdevice device), "cuCtxCreate", 2000, 0)
HOOK(CUDA, CUresult, cuCtxCreate_v2, (CUcontext * context, unsigned flags, CUdevice device), "cuCtxCreate", 3020, 0)
HOOK(CUDA, CUresult, cuCtxCreate_v3, (CUcontext * context, void *affinity, int count, unsigned flags, CUdevice device), "cuCtxCreate",
     11040, 0)
HOOK(CUDA, CUresult, cuCtxCreate_v4, (CUcontext * context, void *parameters, unsigned flags, CUdevice device), "cuCtxCreate", 12050, 0)
HOOK(CUDA, CUresult, cuCtxDestroy, (CUcontext context), "cuCtxDestroy", 2000, 0)
HOOK(CUDA, CUresult, cuCtxDestroy_v2, (CUcontext context), "cuCtxDestroy", 4000, 0)
HOOK(CUDA, CUresult, cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device), "cuDevicePrimaryCtxRetain", 7000, 0)
HOOK(CUDA, CUresult, cuDevicePrimaryCtxRelease, (CUdevice device), "cuDevicePrimaryCtxRelease", 7000, 0)
HOOK(CUDA, CUresult, cuDevicePrimaryCtxRelease_v2, (CUdevice device), "cuDevicePrimaryCtxRelease", 11000, 0)
HOOK(CUDA, CUresult, cuDevicePrimaryCtxReset, (CUdevice device), "cuDevicePrimaryCtxReset", 7000, 0)
HOOK(CUDA, CUresult, cuDevicePrimaryCtxReset_v2, (CUdevice device), "cuDevicePrimaryCtxReset", 11000, 0)
HOOK(CUDA, CUresult, cuGreenCtxCreate, (CUgreenCtx * context, void *description, CUdevice device, unsigned flags), "cuGreenCtxCreate",
     12040, 0)
HOOK(CUDA, CUresult, cuGreenCtxDestroy, (CUgreenCtx context), "cuGreenCtxDestroy", 12040, 0)
HOOK(CUDA, CUresult, cuCtxSetLimit, (int limit, size_t value), "cuCtxSetLimit", 3010, 0)

/* GPU time */
#define LAUNCH_ARGUMENTS                                                                                                                   \
    (CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,  \
     void **parameters, void **extra)
#define COOPERATIVE_ARGUMENTS                                                                                                              \
    (CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,  \
     void **parameters)
STREAM_PAIR(cuLaunchKernel, LAUNCH_ARGUMENTS, 4000, 7000)
STREAM_PAIR(cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra), 11060, 11060)
STREAM_PAIR(cuLaunchCooperativeKernel, COOPERATIVE_ARGUMENTS, 9000, 9000)
STREAM_PAIR(cuGraphLaunch, (CUgraphExec exec, CUstream stream), 10000, 10000)
HOOK(CUDA, CUresult, cuLaunchCooperativeKernelMultiDevice, (CUDA_LAUNCH_PARAMS * list, unsigned count, unsigned flags),
     "cuLaunchCooperativeKernelMultiDevice", 9000, 0)
HOOK(CUDA, CUresult, cuLaunch, (CUfunction function), "cuLaunch", 2000, 0)
HOOK(CUDA, CUresult, cuLaunchGrid, (CUfunction function, int width, int height), "cuLaunchGrid", 2000, 0)
HOOK(CUDA, CUresult, cuLaunchGridAsync, (CUfunction function, int width, int height, CUstream stream), "cuLaunchGridAsync", 2000, 0)
HOOK(CUDA, CUresult, cuGraphInstantiate, (CUgraphExec * exec, CUgraph graph, CUgraphNode *error, char *log, size_t size),
     "cuGraphInstantiate", 10000, 0)
HOOK(CUDA, CUresult, cuGraphInstantiate_v2, (CUgraphExec * exec, CUgraph graph, CUgraphNode *error, char *log, size_t size),
     "cuGraphInstantiate", 11000, 0)
HOOK(CUDA, CUresult, cuGraphInstantiateWithFlags, (CUgraphExec * exec, CUgraph graph, unsigned long long flags),
     "cuGraphInstantiateWithFlags", 11040, 0)
STREAM_PAIR(cuGraphInstantiateWithParams, (CUgraphExec * exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *parameters), 12000, 12000)
STREAM_PAIR(cuGraphUpload, (CUgraphExec exec, CUstream stream), 11010, 11010)
HOOK(CUDA, CUresult, cuGraphExecDestroy, (CUgraphExec exec), "cuGraphExecDestroy", 10000, 0)
HOOK(CUDA, CUresult, cuDeviceGraphMemTrim, (CUdevice device), "cuDeviceGraphMemTrim", 11040, 0)

/* observed: idle edges, streams that end or capture */
HOOK(CUDA, CUresult, cuCtxSynchronize, (void), "cuCtxSynchronize", 2000, 0)
HOOK(CUDA, CUresult, cuCtxSynchronize_v2, (CUcontext context), "cuCtxSynchronize", 13000, 0)
STREAM_PAIR(cuStreamSynchronize, (CUstream stream), 2000, 7000)
HOOK(CUDA, CUresult, cuStreamDestroy, (CUstream stream), "cuStreamDestroy", 2000, 0)
HOOK(CUDA, CUresult, cuStreamDestroy_v2, (CUstream stream), "cuStreamDestroy", 4000, 0)
STREAM_PAIR(cuStreamBeginCapture, (CUstream stream), 10000, 10000)
HOOK(CUDA, CUresult, cuStreamBeginCapture_v2, (CUstream stream, int mode), "cuStreamBeginCapture", 10010, 0)
HOOK(CUDA, CUresult, cuStreamBeginCapture_v2_ptsz, (CUstream stream, int mode), "cuStreamBeginCapture", 10010, 1)
#define CAPTURE_TO_GRAPH_ARGUMENTS                                                                                                         \
    (CUstream stream, CUgraph graph, const CUgraphNode *nodes, const CUgraphEdgeData *edges, size_t count, int mode)
STREAM_PAIR(cuStreamBeginCaptureToGraph, CAPTURE_TO_GRAPH_ARGUMENTS, 12030, 12030)
#define RECAPTURE_ARGUMENTS (CUstream stream, int mode, CUgraph graph, void *callback, void *data)
STREAM_PAIR(cuStreamBeginRecaptureToGraph, RECAPTURE_ARGUMENTS, 13010, 13010)
STREAM_PAIR(cuStreamEndCapture, (CUstream stream, CUgraph *graph), 10000, 10000)

/* copies and memsets (name, ending of the variant for per-thread default streams, arguments, name asked for, versions of both) */
#define COPY(name, own, arguments, base, since, since_own)                                                                                 \
    HOOK(CUDA, CUresult, name, arguments, base, since, 0)                                                                                  \
    HOOK(CUDA, CUresult, name##own, arguments, base, since_own, 1)
COPY(cuMemcpy, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t size), "cuMemcpy", 4000, 7000)
COPY(cuMemcpyAsync, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream), "cuMemcpyAsync", 4000, 7000)
COPY(cuMemcpyHtoD_v2, _ptds, (CUdeviceptr to, const void *from, size_t size), "cuMemcpyHtoD", 3020, 7000)
COPY(cuMemcpyDtoH_v2, _ptds, (void *to, CUdeviceptr from, size_t size), "cuMemcpyDtoH", 3020, 7000)
COPY(cuMemcpyDtoD_v2, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t size), "cuMemcpyDtoD", 3020, 7000)
COPY(cuMemcpyHtoDAsync_v2, _ptsz, (CUdeviceptr to, const void *from, size_t size, CUstream stream), "cuMemcpyHtoDAsync", 3020, 7000)
COPY(cuMemcpyDtoHAsync_v2, _ptsz, (void *to, CUdeviceptr from, size_t size, CUstream stream), "cuMemcpyDtoHAsync", 3020, 7000)
COPY(cuMemcpyDtoDAsync_v2, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream), "cuMemcpyDtoDAsync", 3020, 7000)
COPY(cuMemcpyPeer, _ptds, (CUdeviceptr to, CUcontext there, CUdeviceptr from, CUcontext here, size_t size), "cuMemcpyPeer", 4000, 7000)
COPY(cuMemcpyPeerAsync, _ptsz, (CUdeviceptr to, CUcontext there, CUdeviceptr from, CUcontext here, size_t size, CUstream stream),
     "cuMemcpyPeerAsync", 4000, 7000)
COPY(cuMemcpyDtoA_v2, _ptds, (CUarray to, size_t at, CUdeviceptr from, size_t size), "cuMemcpyDtoA", 3020, 7000)
COPY(cuMemcpyAtoD_v2, _ptds, (CUdeviceptr to, CUarray from, size_t at, size_t size), "cuMemcpyAtoD", 3020, 7000)
COPY(cuMemcpyAtoA_v2, _ptds, (CUarray to, size_t at, CUarray from, size_t here, size_t size), "cuMemcpyAtoA", 3020, 7000)
COPY(cuMemcpyHtoA_v2, _ptds, (CUarray to, size_t at, const void *from, size_t size), "cuMemcpyHtoA", 3020, 7000)
COPY(cuMemcpyAtoH_v2, _ptds, (void *to, CUarray from, size_t at, size_t size), "cuMemcpyAtoH", 3020, 7000)
COPY(cuMemcpyHtoAAsync_v2, _ptsz, (CUarray to, size_t at, const void *from, size_t size, CUstream stream), "cuMemcpyHtoAAsync", 3020, 7000)
COPY(cuMemcpyAtoHAsync_v2, _ptsz, (void *to, CUarray from, size_t at, size_t size, CUstream stream), "cuMemcpyAtoHAsync", 3020, 7000)
COPY(cuMemcpy2D_v2, _ptds, (const CUDA_MEMCPY2D *copy), "cuMemcpy2D", 3020, 7000)
COPY(cuMemcpy2DUnaligned_v2, _ptds, (const CUDA_MEMCPY2D *copy), "cuMemcpy2DUnaligned", 3020, 7000)
COPY(cuMemcpy2DAsync_v2, _ptsz, (const CUDA_MEMCPY2D *copy, CUstream stream), "cuMemcpy2DAsync", 3020, 7000)
COPY(cuMemcpy3D_v2, _ptds, (const CUDA_MEMCPY3D *copy), "cuMemcpy3D", 3020, 7000)
COPY(cuMemcpy3DAsync_v2, _ptsz, (const CUDA_MEMCPY3D *copy, CUstream stream), "cuMemcpy3DAsync", 3020, 7000)
COPY(cuMemcpy3DPeer, _ptds, (const CUDA_MEMCPY3D *copy), "cuMemcpy3DPeer", 4000, 7000)
COPY(cuMemcpy3DPeerAsync, _ptsz, (const CUDA_MEMCPY3D *copy, CUstream stream), "cuMemcpy3DPeerAsync", 4000, 7000)
COPY(cuMemcpyBatchAsync, _ptsz,
     (CUdeviceptr * to, CUdeviceptr *from, size_t *sizes, size_t count, void *attributes, size_t *of, size_t kinds, size_t *failed,
      CUstream stream),
     "cuMemcpyBatchAsync", 12080, 12080)
COPY(cuMemcpyBatchAsync_v2, _ptsz,
     (CUdeviceptr * to, CUdeviceptr *from, size_t *sizes, size_t count, void *attributes, size_t *of, size_t kinds, CUstream stream),
     "cuMemcpyBatchAsync", 13000, 13000)
HOOK(CUDA, CUresult, cuMemcpyWithAttributesAsync, (CUdeviceptr to, CUdeviceptr from, size_t size, void *attributes, CUstream stream),
     "cuMemcpyWithAttributesAsync", 13010, 0)
#define MEMSETS(bits, type)                                                                                                                \
    COPY(cuMemsetD##bits##_v2, _ptds, (CUdeviceptr to, type value, size_t count), "cuMemsetD" #bits, 3020, 7000)                           \
    COPY(cuMemsetD##bits##Async, _ptsz, (CUdeviceptr to, type value, size_t count, CUstream stream), "cuMemsetD" #bits "Async", 3020,      \
         7000)                                                                                                                             \
    COPY(cuMemsetD2D##bits##_v2, _ptds, (CUdeviceptr to, size_t pitch, type value, size_t width, size_t height), "cuMemsetD2D" #bits,      \
         3020, 7000)                                                                                                                       \
    COPY(cuMemsetD2D##bits##Async, _ptsz, (CUdeviceptr to, size_t pitch, type value, size_t width, size_t height, CUstream stream),        \
         "cuMemsetD2D" #bits "Async", 3020, 7000)
MEMSETS(8, unsigned char)
MEMSETS(16, unsigned short)
MEMSETS(32, unsigned)

/* only called */
CALL(CUDA, CUresult, cuDeviceGetCount, (int *count))
CALL(CUDA, CUresult, cuDeviceGet, (CUdevice * device, int ordinal))
CALL(CUDA, CUresult, cuDeviceGetUuid, (CUuuid * uuid, CUdevice device))
CALL(CUDA, CUresult, cuDeviceGetUuid_v2, (CUuuid * uuid, CUdevice device))
CALL(CUDA, CUresult, cuDevicePrimaryCtxGetState, (CUdevice device, unsigned *flags, int *active))
CALL(CUDA, CUresult, cuCtxGetLimit, (size_t *value, int limit))
CALL(CUDA, CUresult, cuCtxGetCurrent, (CUcontext * context))
CALL(CUDA, CUresult, cuCtxSetCurrent, (CUcontext context))
CALL(CUDA, CUresult, cuCtxPushCurrent_v2, (CUcontext context))
CALL(CUDA, CUresult, cuCtxPopCurrent_v2, (CUcontext * context))
CALL(CUDA, CUresult, cuCtxGetDevice, (CUdevice * device))
CALL(CUDA, CUresult, cuStreamGetCtx, (CUstream stream, CUcontext *context))
CALL(CUDA, CUresult, cuStreamIsCapturing, (CUstream stream, int *status))
CALL(CUDA, CUresult, cuStreamIsCapturing_ptsz, (CUstream stream, int *status))
CALL(CUDA, CUresult, cuStreamQuery, (CUstream stream))
CALL(CUDA, CUresult, cuThreadExchangeStreamCaptureMode, (int *mode))
CALL(CUDA, CUresult, cuEventCreate, (CUevent * event, unsigned flags))
CALL(CUDA, CUresult, cuEventDestroy_v2, (CUevent event))
CALL(CUDA, CUresult, cuEventRecord, (CUevent event, CUstream stream))
CALL(CUDA, CUresult, cuEventRecord_ptsz, (CUevent event, CUstream stream))
CALL(CUDA, CUresult, cuEventQuery, (CUevent event))
CALL(CUDA, CUresult, cuEventElapsedTime, (float *milliseconds, CUevent start, CUevent end))
CALL(CUDA, CUresult, cuMemGetAddressRange_v2, (CUdeviceptr * base, size_t *size, CUdeviceptr pointer))
CALL(CUDA, CUresult, cuPointerGetAttribute, (void *data, int attribute, CUdeviceptr pointer))
CALL(CUDA, CUresult, cuMemGetAllocationPropertiesFromHandle, (CUmemAllocationProp * properties, CUmemGenericAllocationHandle handle))
CALL(CUDA, CUresult, cuDeviceGetMemPool, (CUmemoryPool * pool, CUdevice device))
CALL(CUDA, CUresult, cuMemPoolGetAttribute, (CUmemoryPool pool, int attribute, void *value))
CALL(CUDA, CUresult, cuDeviceGetGraphMemAttribute, (CUdevice device, int attribute, void *value))
CALL(CUDA, CUresult, cuGraphGetNodes, (CUgraph graph, CUgraphNode *nodes, size_t *count))
CALL(CUDA, CUresult, cuGraphNodeGetType, (CUgraphNode node, int *type))
CALL(CUDA, CUresult, cuGraphMemAllocNodeGetParams, (CUgraphNode node, CUDA_MEM_ALLOC_NODE_PARAMS *parameters))
CALL(CUDA, CUresult, cuGraphChildGraphNodeGetGraph, (CUgraphNode node, CUgraph *graph))
CALL(CUDA, CUresult, cuArrayGetMemoryRequirements, (CUDA_ARRAY_MEMORY_REQUIREMENTS * requirements, CUarray array, CUdevice device))
CALL(CUDA, CUresult, cuMipmappedArrayGetMemoryRequirements,
     (CUDA_ARRAY_MEMORY_REQUIREMENTS * requirements, CUmipmappedArray array, CUdevice device))

/* NVML */
HOOK(NVML, int, nvmlDeviceGetCount, (unsigned *count), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetCount_v2, (unsigned *count), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleByIndex, (unsigned index, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleByIndex_v2, (unsigned index, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleByUUID, (const char *uuid, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleByUUIDV, (const void *uuid, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleBySerial, (const char *serial, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleByPciBusId, (const char *bus_id, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetHandleByPciBusId_v2, (const char *bus_id, nvmlDevice_t *device), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetIndex, (nvmlDevice_t device, unsigned *index), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetMemoryInfo, (nvmlDevice_t device, nvmlMemory_t *memory), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetMemoryInfo_v2, (nvmlDevice_t device, nvmlMemory_v2_t *memory), 0, 0, 0)
#define PROCESS_LISTS(kind)                                                                                                                \
    HOOK(NVML, int, nvmlDeviceGet##kind##RunningProcesses, (nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v1_t *processes), 0, 0,  \
         0)                                                                                                                                \
    HOOK(NVML, int, nvmlDeviceGet##kind##RunningProcesses_v2, (nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *processes), 0,  \
         0, 0)                                                                                                                             \
    HOOK(NVML, int, nvmlDeviceGet##kind##RunningProcesses_v3, (nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *processes), 0,  \
         0, 0)
PROCESS_LISTS(Compute)
PROCESS_LISTS(Graphics)
PROCESS_LISTS(MPSCompute)
HOOK(NVML, int, nvmlDeviceGetRunningProcessDetailList, (nvmlDevice_t device, nvmlProcessDetailList_v1_t *list), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetUtilizationRates, (nvmlDevice_t device, nvmlUtilization_t *utilization), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetProcessUtilization,
     (nvmlDevice_t device, nvmlProcessUtilizationSample_t *samples, unsigned *count, unsigned long long since), 0, 0, 0)
HOOK(NVML, int, nvmlDeviceGetProcessesUtilizationInfo, (nvmlDevice_t device, nvmlProcessesUtilizationInfo_v1_t *info), 0, 0, 0)
CALL(NVML, int, nvmlDeviceGetUUID, (nvmlDevice_t device, char *uuid, unsigned length))

#undef STREAM_PAIR
#undef PROCESS_LISTS
#undef LAUNCH_ARGUMENTS
#undef COOPERATIVE_ARGUMENTS
#undef CAPTURE_TO_GRAPH_ARGUMENTS
#undef RECAPTURE_ARGUMENTS
#undef COPY
#undef MEMSETS
#undef HOOK
#undef CALL
