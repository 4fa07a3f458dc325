/* The part of NVML's ABI that the limiter answers for. */
#ifndef NBGPU_NVML_ABI_H
#define NBGPU_NVML_ABI_H

typedef struct nvmlDevice_st *NvmlDevice;

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_FUNCTION_NOT_FOUND = 13,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999,
};
#define NVML_NO_INSTANCE 0xffffffffu

typedef struct {
    unsigned long long total, free, used;
} NvmlMemory;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} NvmlMemoryV2;

typedef struct {
    unsigned pid;
    unsigned long long used_gpu_memory;
} NvmlProcessV1;

typedef struct {
    unsigned pid;
    unsigned long long used_gpu_memory;
    unsigned gpu_instance, compute_instance;
} NvmlProcess;

typedef struct {
    unsigned pid;
    unsigned long long used_gpu_memory;
    unsigned gpu_instance, compute_instance;
    unsigned long long used_protected_memory;
} NvmlProcessDetail;

typedef struct {
    unsigned version, mode, count;
    NvmlProcessDetail *processes;
} NvmlProcessDetailList;

typedef struct {
    unsigned gpu, memory;
} NvmlUtilization;

typedef struct {
    unsigned pid;
    unsigned long long time_us;
    unsigned sm, memory, encoder, decoder;
} NvmlProcessUtilization;

typedef struct {
    unsigned long long time_us;
    unsigned pid, sm, memory, encoder, decoder, jpeg, ofa;
} NvmlProcessUtilizationInfo;

typedef struct {
    unsigned version, count;
    unsigned long long last_seen_us;
    NvmlProcessUtilizationInfo *samples;
} NvmlProcessesUtilization;

#endif
