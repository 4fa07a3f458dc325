/* NVML as a small GPU of its own would answer: the slice's devices, its memory, its processes, its utilisation over its share. */
#include <string.h>

#include "limiter.h"

static nvmlDevice_t handles[NBGPU_DEVICES];

#define ENTER_NVML(name, ...)                                                                                                              \
    do {                                                                                                                                   \
        if (!nbgpu_prepare(F_##name))                                                                                                      \
            return NVML_ERROR_FUNCTION_NOT_FOUND;                                                                                          \
        const int state = nbgpu_attach();                                                                                                  \
        if (state == SLICE_NONE)                                                                                                           \
            return REAL(name)(__VA_ARGS__);                                                                                                \
        if (state == SLICE_BROKEN)                                                                                                         \
            return NVML_ERROR_UNKNOWN; /* better nothing than everybody's */                                                               \
    } while (0)

static int handle_of(int device, nvmlDevice_t *handle) {
    char uuid[NBGPU_UUID_BYTES];
    memcpy(uuid, nbgpu_ctl->device[device].uuid, sizeof uuid);
    uuid[sizeof uuid - 1] = 0;
    const int result = REAL(nvmlDeviceGetHandleByUUID)(uuid, handle);
    if (result == NVML_SUCCESS)
        STORE(handles[device], *handle);
    return result;
}

/* The slice's device, -1: not one of them. */
static int device_of(nvmlDevice_t handle) {
    nvmlDevice_t found;
    for (int d = 0; d < nbgpu_devices; d++)
        if (LOAD(handles[d]) == handle && handle)
            return d;
    for (int d = 0; d < nbgpu_devices; d++)
        if (handle_of(d, &found) == NVML_SUCCESS && found == handle)
            return d;
    return -1;
}

static int counted(unsigned *count) {
    if (!count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = (unsigned)nbgpu_devices;
    return NVML_SUCCESS;
}

/* The real call first: before nvmlInit everything is NVML_ERROR_UNINITIALIZED. */
#define COUNT(name)                                                                                                                        \
    ENTER_NVML(name, count);                                                                                                               \
    const int result = REAL(name)(count);                                                                                                  \
    return result == NVML_SUCCESS ? counted(count) : result

int nvmlDeviceGetCount(unsigned *count) { COUNT(nvmlDeviceGetCount); }
int nvmlDeviceGetCount_v2(unsigned *count) { COUNT(nvmlDeviceGetCount_v2); }

static int by_index(unsigned index, nvmlDevice_t *device) {
    if (!device || index >= (unsigned)nbgpu_devices)
        return NVML_ERROR_INVALID_ARGUMENT;
    return handle_of((int)index, device);
}

int nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device) {
    ENTER_NVML(nvmlDeviceGetHandleByIndex, index, device);
    return by_index(index, device);
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    ENTER_NVML(nvmlDeviceGetHandleByIndex_v2, index, device);
    return by_index(index, device);
}

#define ONLY_OURS(name, key)                                                                                                               \
    ENTER_NVML(name, key, device);                                                                                                         \
    const int result = REAL(name)(key, device);                                                                                            \
    return result == NVML_SUCCESS && device_of(*device) < 0 ? NVML_ERROR_NOT_FOUND : result

int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) { ONLY_OURS(nvmlDeviceGetHandleByUUID, uuid); }
int nvmlDeviceGetHandleByUUIDV(const void *uuid, nvmlDevice_t *device) { ONLY_OURS(nvmlDeviceGetHandleByUUIDV, uuid); }
int nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device) { ONLY_OURS(nvmlDeviceGetHandleBySerial, serial); }
int nvmlDeviceGetHandleByPciBusId(const char *bus_id, nvmlDevice_t *device) { ONLY_OURS(nvmlDeviceGetHandleByPciBusId, bus_id); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device) { ONLY_OURS(nvmlDeviceGetHandleByPciBusId_v2, bus_id); }

int nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    ENTER_NVML(nvmlDeviceGetIndex, device, index);
    const int d = device_of(device);
    if (d < 0 || !index)
        return REAL(nvmlDeviceGetIndex)(device, index);
    *index = (unsigned)d;
    return NVML_SUCCESS;
}

/* ---- memory ---- */

static uint64_t used_bytes(int device) {
    nbgpu_reap();
    const uint64_t limit = nbgpu_limit(device), room = nbgpu_room(device);
    return limit > room ? limit - room : 0;
}

int nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    ENTER_NVML(nvmlDeviceGetMemoryInfo, device, memory);
    const int result = REAL(nvmlDeviceGetMemoryInfo)(device, memory), d = device_of(device);
    if (result != NVML_SUCCESS || d < 0)
        return result;
    memory->total = nbgpu_limit(d);
    memory->used = used_bytes(d);
    memory->free = memory->total - memory->used;
    return result;
}

int nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    ENTER_NVML(nvmlDeviceGetMemoryInfo_v2, device, memory);
    const int result = REAL(nvmlDeviceGetMemoryInfo_v2)(device, memory), d = device_of(device);
    if (result != NVML_SUCCESS || d < 0)
        return result;
    memory->total = nbgpu_limit(d);
    memory->reserved = 0;
    memory->used = used_bytes(d);
    memory->free = memory->total - memory->used;
    return result;
}

/* ---- processes: those of the slice, by the number that they have inside it ---- */

static unsigned live_processes(int device, nvmlProcessDetail_v1_t *out, unsigned room) {
    unsigned count = 0;
    nbgpu_reap();
    const uint32_t high = nbgpu_use->high_water < NBGPU_SLOTS ? nbgpu_use->high_water : NBGPU_SLOTS;
    for (uint32_t i = 0; i < high; i++) {
        const NbgpuUseSlot *slot = &nbgpu_use->slot[i];
        const uint64_t owner = LOAD(slot->owner), bytes = LOAD(slot->used) + LOAD(slot->context);
        if (!owner || LOAD(slot->device) != (uint32_t)device || !bytes || nbgpu_on_host(i, owner))
            continue;
        if (count < room)
            out[count] =
                (nvmlProcessDetail_v1_t){(unsigned)(owner >> 32), bytes + nbgpu_ctl->overhead[i], NVML_NO_INSTANCE, NVML_NO_INSTANCE, 0};
        count++;
    }
    return count;
}

/* Copies what fits: `stride` bytes apart, the instances only where the version has them. */
static int list_processes(nvmlDevice_t device, unsigned *count, void *out, size_t stride, bool compute) {
    nvmlProcessDetail_v1_t found[NBGPU_SLOTS];
    const int d = device_of(device);
    if (!count || d < 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    const unsigned have = compute ? live_processes(d, found, NBGPU_SLOTS) : 0, room = *count;
    *count = have;
    if (have > room || (have && !out))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < have; i++)
        memcpy((char *)out + i * stride, &found[i], stride); /* each version is a prefix of the next */
    return NVML_SUCCESS;
}

#define PROCESSES(name, compute)                                                                                                           \
    ENTER_NVML(name, device, count, processes);                                                                                            \
    return list_processes(device, count, processes, sizeof *processes, compute)
#define PROCESS_LISTS(kind, compute)                                                                                                       \
    int nvmlDeviceGet##kind##RunningProcesses(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v1_t *processes) {                     \
        PROCESSES(nvmlDeviceGet##kind##RunningProcesses, compute);                                                                         \
    }                                                                                                                                      \
    int nvmlDeviceGet##kind##RunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *processes) {                  \
        PROCESSES(nvmlDeviceGet##kind##RunningProcesses_v2, compute);                                                                      \
    }                                                                                                                                      \
    int nvmlDeviceGet##kind##RunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_v2_t *processes) {                  \
        PROCESSES(nvmlDeviceGet##kind##RunningProcesses_v3, compute);                                                                      \
    }
PROCESS_LISTS(Compute, true)
PROCESS_LISTS(Graphics, false)
PROCESS_LISTS(MPSCompute, false)

int nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, nvmlProcessDetailList_v1_t *list) {
    ENTER_NVML(nvmlDeviceGetRunningProcessDetailList, device, list);
    if (!list)
        return NVML_ERROR_INVALID_ARGUMENT;
    return list_processes(device, &list->numProcArrayEntries, list->procArray, sizeof *list->procArray, list->mode == 0);
}

/* ---- utilisation: of the slice's share, 100 % = all of it ---- */

static unsigned percent_of_share(int device) {
    const uint32_t share = nbgpu_ctl->device[device].compute_milli, used = nbgpu_ctl->device[device].compute_used_milli;
    const uint64_t percent = share ? (uint64_t)used * 100 / share : 0;
    return percent > 100 ? 100 : (unsigned)percent;
}

int nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization) {
    ENTER_NVML(nvmlDeviceGetUtilizationRates, device, utilization);
    const int result = REAL(nvmlDeviceGetUtilizationRates)(device, utilization), d = device_of(device);
    if (result != NVML_SUCCESS || d < 0)
        return result;
    utilization->gpu = percent_of_share(d);
    if (utilization->memory > utilization->gpu)
        utilization->memory = utilization->gpu; /* others' traffic is not ours to show */
    return result;
}

static bool ours(int device, unsigned pid) {
    for (uint32_t i = 0; i < nbgpu_use->high_water && i < NBGPU_SLOTS; i++)
        if (LOAD(nbgpu_use->slot[i].device) == (uint32_t)device && (unsigned)(LOAD(nbgpu_use->slot[i].owner) >> 32) == pid)
            return true;
    return false;
}

static unsigned over_share(int device, unsigned percent) {
    const uint32_t share = nbgpu_ctl->device[device].compute_milli;
    const uint64_t scaled = share ? (uint64_t)percent * 1000 / share : percent;
    return scaled > 100 ? 100 : (unsigned)scaled;
}

int nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *samples, unsigned *count,
                                    unsigned long long since) {
    ENTER_NVML(nvmlDeviceGetProcessUtilization, device, samples, count, since);
    const int result = REAL(nvmlDeviceGetProcessUtilization)(device, samples, count, since), d = device_of(device);
    if (result != NVML_SUCCESS || d < 0 || !samples || !count)
        return result;
    unsigned kept = 0;
    for (unsigned i = 0; i < *count; i++) {
        if (!ours(d, samples[i].pid))
            continue;
        samples[kept] = samples[i];
        samples[kept++].smUtil = over_share(d, samples[i].smUtil);
    }
    *count = kept;
    return kept ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

int nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, nvmlProcessesUtilizationInfo_v1_t *info) {
    ENTER_NVML(nvmlDeviceGetProcessesUtilizationInfo, device, info);
    const int result = REAL(nvmlDeviceGetProcessesUtilizationInfo)(device, info), d = device_of(device);
    if (result != NVML_SUCCESS || d < 0 || !info || !info->procUtilArray)
        return result;
    unsigned kept = 0;
    for (unsigned i = 0; i < info->processSamplesCount; i++) {
        if (!ours(d, info->procUtilArray[i].pid))
            continue;
        info->procUtilArray[kept] = info->procUtilArray[i];
        info->procUtilArray[kept++].smUtil = over_share(d, info->procUtilArray[i].smUtil);
    }
    info->processSamplesCount = kept;
    return result;
}
