/* nvidia-smi of the simulated driver: what its files share. Every number comes from libnvidia-ml.so.1, opened at run time, so that inside
 * a slice the limiter's answers are shown. */
#ifndef NBGPU_SMI_H
#define NBGPU_SMI_H

#include <stdbool.h>
#include <stdio.h>

#include "nvml_abi.h"

#define SMI_PROCESSES 512
#define SMI_DEVICES 64

/* name in this program, NVML's symbol, its arguments */
#define SMI_FUNCTIONS(X)                                                                                                                   \
    X(init, "nvmlInit_v2", (void))                                                                                                         \
    X(shutdown, "nvmlShutdown", (void))                                                                                                    \
    X(driver_version, "nvmlSystemGetDriverVersion", (char *, unsigned))                                                                    \
    X(cuda_version, "nvmlSystemGetCudaDriverVersion_v2", (int *))                                                                          \
    X(process_name, "nvmlSystemGetProcessName", (unsigned, char *, unsigned))                                                              \
    X(count, "nvmlDeviceGetCount_v2", (unsigned *))                                                                                        \
    X(handle, "nvmlDeviceGetHandleByIndex_v2", (unsigned, nvmlDevice_t *))                                                                 \
    X(name, "nvmlDeviceGetName", (nvmlDevice_t, char *, unsigned))                                                                         \
    X(uuid, "nvmlDeviceGetUUID", (nvmlDevice_t, char *, unsigned))                                                                         \
    X(serial, "nvmlDeviceGetSerial", (nvmlDevice_t, char *, unsigned))                                                                     \
    X(vbios, "nvmlDeviceGetVbiosVersion", (nvmlDevice_t, char *, unsigned))                                                                \
    X(pci, "nvmlDeviceGetPciInfo_v3", (nvmlDevice_t, nvmlPciInfo_t *))                                                                     \
    X(memory, "nvmlDeviceGetMemoryInfo", (nvmlDevice_t, nvmlMemory_t *))                                                                   \
    X(utilization, "nvmlDeviceGetUtilizationRates", (nvmlDevice_t, nvmlUtilization_t *))                                                   \
    X(temperature, "nvmlDeviceGetTemperature", (nvmlDevice_t, unsigned, unsigned *))                                                       \
    X(fan, "nvmlDeviceGetFanSpeed", (nvmlDevice_t, unsigned *))                                                                            \
    X(power, "nvmlDeviceGetPowerUsage", (nvmlDevice_t, unsigned *))                                                                        \
    X(power_limit, "nvmlDeviceGetEnforcedPowerLimit", (nvmlDevice_t, unsigned *))                                                          \
    X(clock, "nvmlDeviceGetClockInfo", (nvmlDevice_t, unsigned, unsigned *))                                                               \
    X(max_clock, "nvmlDeviceGetMaxClockInfo", (nvmlDevice_t, unsigned, unsigned *))                                                        \
    X(pstate, "nvmlDeviceGetPerformanceState", (nvmlDevice_t, unsigned *))                                                                 \
    X(persistence, "nvmlDeviceGetPersistenceMode", (nvmlDevice_t, unsigned *))                                                             \
    X(compute_mode, "nvmlDeviceGetComputeMode", (nvmlDevice_t, unsigned *))                                                                \
    X(display, "nvmlDeviceGetDisplayActive", (nvmlDevice_t, unsigned *))                                                                   \
    X(mig, "nvmlDeviceGetMigMode", (nvmlDevice_t, unsigned *, unsigned *))                                                                 \
    X(ecc, "nvmlDeviceGetTotalEccErrors", (nvmlDevice_t, unsigned, unsigned, unsigned long long *))                                        \
    X(capability, "nvmlDeviceGetCudaComputeCapability", (nvmlDevice_t, int *, int *))                                                      \
    X(processes, "nvmlDeviceGetComputeRunningProcesses_v3", (nvmlDevice_t, unsigned *, nvmlProcessInfo_v2_t *))

struct smi {
#define X(name, symbol, arguments) nvmlReturn_t(*name) arguments;
    SMI_FUNCTIONS(X)
#undef X
    const char *(*error)(nvmlReturn_t);
    unsigned devices;
    nvmlDevice_t device[SMI_DEVICES];
    bool selected[SMI_DEVICES]; /* by --id */
};

extern struct smi smi;

struct smi_format {
    bool header, units;
};

/* smi_query.c; 0, or 2 after saying which field is unknown */
int smi_query_gpu(const char *fields, struct smi_format format);
int smi_query_apps(const char *fields, struct smi_format format);
void smi_query_help(void);
/* smi_table.c */
void smi_table(void);
void smi_list(void);
void smi_details(void);

/* The compute processes of a device; how many. */
unsigned smi_processes(unsigned device, nvmlProcessInfo_v2_t out[SMI_PROCESSES]);
/* Its name for people; "[Not Found]" when it is gone. */
void smi_process_name(unsigned pid, char *out, unsigned length);

#endif
