/* Simulated libnvidia-ml.so.1: what never changes. An H100 that is in good order, with MIG off and nobody's display on it. */
#include "nvml_sim.h"

/* One output, always the same value. */
#define FACT(name, type, value)                                                                                                            \
    NVML_API nvmlReturn_t name(nvmlDevice_t device, type *out) {                                                                           \
        NVML_DEVICE(device, out);                                                                                                          \
        (void)index;                                                                                                                       \
        *out = (value);                                                                                                                    \
        return NVML_SUCCESS;                                                                                                               \
    }

/* Two outputs: such as current and pending mode. */
#define FACTS(name, type, first, second)                                                                                                   \
    NVML_API nvmlReturn_t name(nvmlDevice_t device, type *one, type *other) {                                                              \
        NVML_DEVICE(device, one && other ? one : 0);                                                                                       \
        (void)index;                                                                                                                       \
        *one = (first);                                                                                                                    \
        *other = (second);                                                                                                                 \
        return NVML_SUCCESS;                                                                                                               \
    }

/* One output, which the caller picks by a number. */
#define FACT_BY(name, type, value)                                                                                                         \
    NVML_API nvmlReturn_t name(nvmlDevice_t device, unsigned which, type *out) {                                                           \
        NVML_DEVICE(device, out);                                                                                                          \
        (void)index;                                                                                                                       \
        *out = (value);                                                                                                                    \
        return NVML_SUCCESS;                                                                                                               \
    }

FACT(nvmlDeviceGetBrand, unsigned, 14)       /* NVIDIA */
FACT(nvmlDeviceGetArchitecture, unsigned, 9) /* Hopper */
FACT(nvmlDeviceGetBusType, unsigned, 2)      /* PCIe */
FACT(nvmlDeviceGetBoardId, unsigned, (index + 1) << 8)
FACT(nvmlDeviceGetMultiGpuBoard, unsigned, 0)
FACT(nvmlDeviceGetNumGpuCores, unsigned, 132 * 128)
FACT(nvmlDeviceGetMemoryBusWidth, unsigned, 5120)
FACT(nvmlDeviceGetNumFans, unsigned, 0)
FACT(nvmlDeviceGetComputeMode, unsigned, 0) /* default: shared */
FACT(nvmlDeviceGetPersistenceMode, unsigned, 1)
FACT(nvmlDeviceGetDisplayMode, unsigned, 0)
FACT(nvmlDeviceGetDisplayActive, unsigned, 0)
FACT(nvmlDeviceGetAccountingMode, unsigned, 0)
FACT(nvmlDeviceGetPerformanceState, unsigned, 0)
FACT(nvmlDeviceGetPowerState, unsigned, 0)
FACT(nvmlDeviceGetPowerManagementMode, unsigned, 1)
FACT(nvmlDeviceGetPowerManagementLimit, unsigned, 700000)
FACT(nvmlDeviceGetPowerManagementDefaultLimit, unsigned, 700000)
FACT(nvmlDeviceGetEnforcedPowerLimit, unsigned, 700000)
FACT(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, 5)
FACT(nvmlDeviceGetMaxPcieLinkGeneration, unsigned, 5)
FACT(nvmlDeviceGetCurrPcieLinkWidth, unsigned, 16)
FACT(nvmlDeviceGetMaxPcieLinkWidth, unsigned, 16)
FACT(nvmlDeviceGetPcieReplayCounter, unsigned, 0)
FACT(nvmlDeviceGetVirtualizationMode, unsigned, 0)
FACT(nvmlDeviceIsMigDeviceHandle, unsigned, 0)
FACT(nvmlDeviceGetMaxMigDeviceCount, unsigned, 0)
FACT(nvmlDeviceGetDefaultEccMode, unsigned, 1)
FACT(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, 1) /* idle */
FACT(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, 1)
FACT(nvmlDeviceGetSupportedEventTypes, unsigned long long, 0)
FACT(nvmlDeviceGetRetiredPagesPendingStatus, unsigned, 0)
FACTS(nvmlDeviceGetCudaComputeCapability, int, 9, 0)
FACTS(nvmlDeviceGetEccMode, unsigned, 1, 1)
FACTS(nvmlDeviceGetMigMode, unsigned, 0, 0)
FACTS(nvmlDeviceGetPowerManagementLimitConstraints, unsigned, 200000, 700000)
FACTS(nvmlDeviceGetEncoderUtilization, unsigned, 0, 167000)
FACTS(nvmlDeviceGetDecoderUtilization, unsigned, 0, 167000)
FACTS(nvmlDeviceGetJpgUtilization, unsigned, 0, 167000)
FACTS(nvmlDeviceGetOfaUtilization, unsigned, 0, 167000)
FACT_BY(nvmlDeviceGetClockInfo, unsigned, which == 2 ? 2619 : which == 3 ? 1545 : 1980) /* MHz: memory, video, graphics and SM */
FACT_BY(nvmlDeviceGetMaxClockInfo, unsigned, which == 2 ? 2619 : which == 3 ? 1545 : 1980)
FACT_BY(nvmlDeviceGetApplicationsClock, unsigned, which == 2 ? 2619 : 1980)
FACT_BY(nvmlDeviceGetDefaultApplicationsClock, unsigned, which == 2 ? 2619 : 1980)
FACT_BY(nvmlDeviceGetTemperatureThreshold, unsigned, which == 0 ? 95 : 87)
FACT_BY(nvmlDeviceGetPcieThroughput, unsigned, which * 0)

NVML_API nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, unsigned which, unsigned id, unsigned *mhz) {
    (void)id;
    return nvmlDeviceGetClockInfo(device, which, mhz);
}

NVML_API nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned error, unsigned counter, unsigned long long *count) {
    NVML_DEVICE(device, count);
    (void)index, (void)error, (void)counter;
    *count = 0;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, unsigned error, unsigned counter, unsigned location,
                                                      unsigned long long *count) {
    (void)location;
    return nvmlDeviceGetTotalEccErrors(device, error, counter, count);
}

NVML_API nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char *version, unsigned length) {
    NVML_DEVICE(device, version);
    (void)index;
    return nvml_text(version, length, "00.00.00.00.01");
}

NVML_API nvmlReturn_t nvmlDeviceGetBoardPartNumber(nvmlDevice_t device, char *part, unsigned length) {
    NVML_DEVICE(device, part);
    (void)index;
    return nvml_text(part, length, "SIMULATED");
}

NVML_API nvmlReturn_t nvmlDeviceOnSameBoard(nvmlDevice_t one, nvmlDevice_t other, int *same) {
    NVML_DEVICE(one, same);
    *same = one == other;
    return nvml_device(other, same, &index);
}

NVML_API nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned *level) {
    NVML_DEVICE(one, level);
    *level = one == other ? 0 : 40; /* internal, or two of one NUMA node */
    return nvml_device(other, level, &index);
}
