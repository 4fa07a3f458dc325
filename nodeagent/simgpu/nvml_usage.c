/* Simulated libnvidia-ml.so.1: memory, processes and utilisation, the numbers that change. */
#include <stdlib.h>

#include "nvml_sim.h"

#define NO_INSTANCE 0xffffffffu /* "not in a MIG instance" */

static void read_memory(unsigned index, uint64_t *total, uint64_t *used) {
    *total = nvml_sim.m->device[index].mem_total;
    *used = sim_mem_used(&nvml_sim, index);
    if (*used > *total)
        *used = *total;
}

NVML_API nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    uint64_t total, used;
    NVML_DEVICE(device, memory);
    read_memory(index, &total, &used);
    *memory = (nvmlMemory_t){.total = total, .free = total - used, .used = used};
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    uint64_t total, used;
    NVML_DEVICE(device, memory);
    if (memory->version != NVML_STRUCT_VERSION(nvmlMemory_v2_t, 2))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    read_memory(index, &total, &used);
    uint64_t free_bytes = total - used;
    struct sim_limits limits; /* of the caller's cgroup: this call alone tells of them */
    if (sim_group_here(&nvml_sim, index, &limits)) {
        uint64_t room = limits.used < limits.hard ? limits.hard - limits.used : 0;
        total = limits.hard < total ? limits.hard : total;
        used = limits.used;
        free_bytes = room < free_bytes ? room : free_bytes;
    }
    *memory = (nvmlMemory_v2_t){.version = memory->version, .total = total, .reserved = 0, .free = free_bytes, .used = used};
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t *bar1) {
    NVML_DEVICE(device, bar1);
    uint64_t total = nvml_sim.m->device[index].mem_total;
    *bar1 = (nvmlBAR1Memory_t){.bar1Total = total, .bar1Free = total};
    return NVML_SUCCESS;
}

/* ---- processes ------------------------------------------------------------------------------------------------------------- */

/* The processes with a context or memory on the device that have a name here; the caller frees. NULL: out of memory. */
static struct sim_process *read_processes(unsigned index, unsigned *count) {
    struct sim_process *process = malloc(SIM_CLIENTS * sizeof *process);
    *count = 0;
    if (!process)
        return NULL;
    int n = sim_processes(&nvml_sim, index, process, SIM_CLIENTS);
    for (int i = 0; i < n && i < SIM_CLIENTS; i++)
        if (process[i].pid > 0)
            process[(*count)++] = process[i];
    return process;
}

/* `size` bytes each, laid out as v1 or, with room for it, v2 and v3. */
static nvmlReturn_t list_processes(nvmlDevice_t device, unsigned *count, void *out, size_t size) {
    NVML_DEVICE(device, count);
    unsigned n, room = out ? *count : 0;
    struct sim_process *process = read_processes(index, &n);
    if (!process)
        return NVML_ERROR_UNKNOWN;
    for (unsigned i = 0; i < n && i < room; i++) {
        char *entry = (char *)out + i * size;
        if (size == sizeof(nvmlProcessInfo_v2_t))
            *(nvmlProcessInfo_v2_t *)entry =
                (nvmlProcessInfo_v2_t){(unsigned)process[i].pid, process[i].mem_bytes, NO_INSTANCE, NO_INSTANCE};
        else
            *(nvmlProcessInfo_v1_t *)entry = (nvmlProcessInfo_v1_t){(unsigned)process[i].pid, process[i].mem_bytes};
    }
    free(process);
    *count = n;
    return n > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

static nvmlReturn_t list_nobody(nvmlDevice_t device, unsigned *count) {
    NVML_DEVICE(device, count);
    (void)index;
    *count = 0;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v1_t *out) {
    return list_processes(device, count, out, sizeof *out);
}
NVML_API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *out) {
    return list_processes(device, count, out, sizeof *out);
}
NVML_API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *out) {
    return list_processes(device, count, out, sizeof *out);
}

/* The simulated machine draws no pictures and runs no MPS server. */
#define LIST_NOBODY(name)                                                                                                                  \
    NVML_API nvmlReturn_t name(nvmlDevice_t device, unsigned *count, void *out) {                                                          \
        (void)out;                                                                                                                         \
        return list_nobody(device, count);                                                                                                 \
    }
LIST_NOBODY(nvmlDeviceGetGraphicsRunningProcesses)
LIST_NOBODY(nvmlDeviceGetGraphicsRunningProcesses_v2)
LIST_NOBODY(nvmlDeviceGetGraphicsRunningProcesses_v3)
LIST_NOBODY(nvmlDeviceGetMPSComputeRunningProcesses)
LIST_NOBODY(nvmlDeviceGetMPSComputeRunningProcesses_v2)
LIST_NOBODY(nvmlDeviceGetMPSComputeRunningProcesses_v3)

NVML_API nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, nvmlProcessDetailList_v1_t *list) {
    NVML_DEVICE(device, list);
    if (list->version != NVML_STRUCT_VERSION(nvmlProcessDetailList_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (list->mode > NVML_PROCESS_MODE_ALL)
        return NVML_ERROR_INVALID_ARGUMENT;
    unsigned n = 0, room = list->procArray ? list->numProcArrayEntries : 0;
    struct sim_process *process = NULL;
    if (list->mode == NVML_PROCESS_MODE_COMPUTE || list->mode == NVML_PROCESS_MODE_ALL) {
        process = read_processes(index, &n);
        if (!process)
            return NVML_ERROR_UNKNOWN;
    }
    for (unsigned i = 0; i < n && i < room; i++)
        list->procArray[i] = (nvmlProcessDetail_v1_t){(unsigned)process[i].pid, process[i].mem_bytes, NO_INSTANCE, NO_INSTANCE, 0};
    free(process);
    list->numProcArrayEntries = n;
    return n > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

/* ---- utilisation: sampled, and a sample late, as hardware's is ----------------------------------------------------------------- */

static unsigned busy_percent(unsigned index) {
    struct sim_sample sample;
    return sim_samples(&nvml_sim, index, -1, &sample, 1) == 1 ? sample.busy_percent : 0;
}

NVML_API nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates) {
    NVML_DEVICE(device, rates);
    *rates = (nvmlUtilization_t){.gpu = busy_percent(index), .memory = 0}; /* memory traffic is not simulated */
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    NVML_DEVICE(device, milliwatts);
    *milliwatts = 70000 + 6300 * busy_percent(index);
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius) {
    NVML_DEVICE(device, celsius);
    if (sensor)
        return NVML_ERROR_INVALID_ARGUMENT;
    *celsius = 30 + busy_percent(index) * 35 / 100;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_v1_t *temperature) {
    unsigned celsius;
    NVML_DEVICE(device, temperature);
    (void)index;
    if (temperature->version != NVML_STRUCT_VERSION(nvmlTemperature_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    nvmlReturn_t result = nvmlDeviceGetTemperature(device, temperature->sensorType, &celsius);
    if (!result)
        temperature->temperature = (int)celsius;
    return result;
}

NVML_API nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t device, unsigned kind, unsigned long long last_seen_us, unsigned *value_type,
                                           unsigned *count, nvmlSample_t *out) {
    struct sim_sample sample[SIM_BUCKETS];
    NVML_DEVICE(device, count);
    if (!value_type)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (kind != 1)
        return NVML_ERROR_NOT_SUPPORTED; /* 1 = GPU utilisation */
    *value_type = 1;                     /* unsigned int */
    unsigned n = (unsigned)sim_samples(&nvml_sim, index, -1, sample, SIM_BUCKETS), fresh = 0;
    while (fresh < n && nvml_stamp_us(sample[fresh].end_wall_ns) > last_seen_us)
        fresh++;
    if (!fresh)
        return NVML_ERROR_NOT_FOUND;
    if (!out) {
        *count = fresh;
        return NVML_SUCCESS;
    }
    if (*count > fresh)
        *count = fresh;
    for (unsigned i = 0; i < *count; i++) /* oldest first; the newest when there is not room for all */
        out[*count - 1 - i] = (nvmlSample_t){nvml_stamp_us(sample[i].end_wall_ns), {.uiVal = sample[i].busy_percent}};
    return NVML_SUCCESS;
}

/* Each process's mean over its samples later than last_seen_us, those that have any; the caller frees. */
static nvmlProcessUtilizationSample_t *read_process_use(unsigned index, unsigned long long last_seen_us, unsigned *count) {
    unsigned processes;
    struct sim_process *process = read_processes(index, &processes);
    nvmlProcessUtilizationSample_t *out = process ? calloc(processes + 1, sizeof *out) : NULL;
    *count = 0;
    for (unsigned i = 0; out && i < processes; i++) {
        struct sim_sample sample[SIM_BUCKETS];
        unsigned n = (unsigned)sim_samples(&nvml_sim, index, process[i].client, sample, SIM_BUCKETS), fresh = 0, sum = 0;
        while (fresh < n && nvml_stamp_us(sample[fresh].end_wall_ns) > last_seen_us)
            sum += sample[fresh++].busy_percent;
        if (!fresh)
            continue;
        out[(*count)++] = (nvmlProcessUtilizationSample_t){
            .pid = (unsigned)process[i].pid, .timeStamp = nvml_stamp_us(sample[0].end_wall_ns), .smUtil = sum / fresh};
    }
    free(process);
    return out;
}

NVML_API nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *out, unsigned *count,
                                                      unsigned long long last_seen_us) {
    NVML_DEVICE(device, count);
    unsigned n, room = out ? *count : 0;
    nvmlProcessUtilizationSample_t *use = read_process_use(index, last_seen_us, &n);
    if (!use)
        return NVML_ERROR_UNKNOWN;
    for (unsigned i = 0; i < n && i < room; i++)
        out[i] = use[i];
    free(use);
    if (out && n == 0)
        return NVML_ERROR_NOT_FOUND;
    *count = out || n ? n : 1; /* a caller that asks for the size allocates at least one */
    return n > room || !out ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, nvmlProcessesUtilizationInfo_v1_t *info) {
    NVML_DEVICE(device, info);
    if (info->version != NVML_STRUCT_VERSION(nvmlProcessesUtilizationInfo_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    unsigned n, room = info->procUtilArray ? info->processSamplesCount : 0;
    nvmlProcessUtilizationSample_t *use = read_process_use(index, info->lastSeenTimeStamp, &n);
    if (!use)
        return NVML_ERROR_UNKNOWN;
    for (unsigned i = 0; i < n && i < room; i++)
        info->procUtilArray[i] =
            (nvmlProcessUtilizationInfo_v1_t){.timeStamp = use[i].timeStamp, .pid = use[i].pid, .smUtil = use[i].smUtil};
    free(use);
    if (info->procUtilArray && n == 0)
        return NVML_ERROR_NOT_FOUND;
    info->processSamplesCount = info->procUtilArray || n ? n : 1;
    return n > room || !info->procUtilArray ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

/* Not NVML: the simulated machine's own truth, for benchmarks. Device time that the GPU kernels of a process ran, and when that was. */
NVML_API nvmlReturn_t nbgpuSimProcessBusy(nvmlDevice_t device, unsigned pid, unsigned long long *busy_ns, unsigned long long *now_ns) {
    NVML_DEVICE(device, busy_ns);
    if (!now_ns)
        return NVML_ERROR_INVALID_ARGUMENT;
    unsigned n;
    struct sim_process *process = read_processes(index, &n);
    nvmlReturn_t result = NVML_ERROR_NOT_FOUND;
    for (unsigned i = 0; process && i < n && result; i++) {
        if (process[i].pid != (int)pid)
            continue;
        uint64_t now;
        *busy_ns = sim_busy_ns(&nvml_sim, index, process[i].client, &now);
        *now_ns = now;
        result = NVML_SUCCESS;
    }
    free(process);
    return result;
}

/* Fields are answered one by one; none of them is simulated. */
NVML_API nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values) {
    NVML_DEVICE(device, values);
    (void)index;
    if (count < 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (int i = 0; i < count; i++)
        values[i].nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
}
