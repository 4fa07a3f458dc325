/* Simulated libnvidia-ml.so.1: init, system, device handles and names. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "nvml_sim.h"

struct sim nvml_sim = {.fd = -1, .client = -1};
static pthread_mutex_t init_lock = PTHREAD_MUTEX_INITIALIZER;
static int init_count;
static struct nvml_device handles[SIM_DEVICES];

nvmlReturn_t nvml_enter(void) { return __atomic_load_n(&init_count, __ATOMIC_ACQUIRE) > 0 ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED; }

nvmlReturn_t nvml_device(nvmlDevice_t handle, const void *output, unsigned *index) {
    NVML_ENTER();
    if (!output || handle < handles || handle >= handles + nvml_sim.m->devices)
        return NVML_ERROR_INVALID_ARGUMENT;
    *index = handle->index;
    return nvml_sim.m->device[handle->index].lost ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
}

static nvmlReturn_t give_handle(unsigned index, nvmlDevice_t *device) {
    if (nvml_sim.m->device[index].lost)
        return NVML_ERROR_GPU_IS_LOST;
    *device = &handles[index];
    return NVML_SUCCESS;
}

/* A fault for tests, of the whole machine: a GPU falls off the bus, or comes back. No NVML has this. */
NVML_API nvmlReturn_t nbgpuSimSetLost(unsigned index, unsigned lost) {
    NVML_ENTER();
    if (index >= nvml_sim.m->devices)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvml_sim.m->device[index].lost = lost;
    return NVML_SUCCESS;
}

nvmlReturn_t nvml_text(char *out, unsigned length, const char *text) {
    if (!out)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(text) >= length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

unsigned long long nvml_stamp_us(uint64_t monotonic_ns) {
    struct timespec real;
    clock_gettime(CLOCK_REALTIME, &real);
    uint64_t real_ns = (uint64_t)real.tv_sec * 1000000000u + (uint64_t)real.tv_nsec;
    return (real_ns - (sim_wall_ns() - monotonic_ns)) / 1000;
}

/* ---- init ------------------------------------------------------------------------------------------------------------------ */

NVML_API nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags; /* NO_GPUS, NO_ATTACH: nothing to do differently */
    nvmlReturn_t result = NVML_SUCCESS;
    pthread_mutex_lock(&init_lock);
    if (nvml_sim.fd < 0) {
        int failed = sim_open(&nvml_sim);
        if (failed)
            result = failed == -EPROTO ? NVML_ERROR_LIB_RM_VERSION_MISMATCH : NVML_ERROR_DRIVER_NOT_LOADED;
        for (unsigned i = 0; i < SIM_DEVICES; i++)
            handles[i].index = i;
    }
    if (result == NVML_SUCCESS)
        __atomic_add_fetch(&init_count, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&init_lock);
    return result;
}

NVML_API nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }
NVML_API nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

NVML_API nvmlReturn_t nvmlShutdown(void) {
    nvmlReturn_t result = NVML_SUCCESS;
    pthread_mutex_lock(&init_lock);
    if (init_count > 0)
        __atomic_sub_fetch(&init_count, 1, __ATOMIC_RELEASE);
    else
        result = NVML_ERROR_UNINITIALIZED;
    pthread_mutex_unlock(&init_lock);
    return result;
}

NVML_API const char *nvmlErrorString(nvmlReturn_t result) {
    static const char *const text[] = {
        "Success",
        "Uninitialized",
        "Invalid Argument",
        "Not Supported",
        "Insufficient Permissions",
        "Already Initialized",
        "Not Found",
        "Insufficient Size",
        "Insufficient External Power",
        "Driver Not Loaded",
        "Timeout",
        "Interrupt Request Issue",
        "NVML Shared Library Not Found",
        "Function Not Found",
        "Corrupted infoROM",
        "GPU is lost",
        "GPU requires reset",
        "The operating system has blocked the request.",
        "RM has detected an NVML/RM version mismatch.",
        "GPU is in use",
        "Insufficient Memory",
        "No data",
        "ECC is not supported with vGPU",
        "Insufficient resources",
        "Frequency not supported",
        "Argument version mismatch",
        "Deprecated",
        "Not ready",
        "No GPUs found",
        "Invalid state",
        "Reset type not supported",
    };
    return (unsigned)result < sizeof text / sizeof *text ? text[result] : "Unknown Error";
}

/* ---- system ---------------------------------------------------------------------------------------------------------------- */

/* The driver's branch that came with a version of CUDA. */
static unsigned branch(unsigned cuda) {
    static const unsigned first[][2] = {{13050, 620}, {13040, 615}, {13030, 610}, {13020, 595}, {13010, 590}, {13000, 580}, {12080, 570}};
    for (unsigned i = 0; i < sizeof first / sizeof *first; i++)
        if (cuda >= first[i][0])
            return first[i][1];
    return 550;
}

NVML_API nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
    char text[16];
    NVML_ENTER();
    snprintf(text, sizeof text, "%u.00", branch(nvml_sim.m->driver_version));
    return nvml_text(version, length, text);
}

NVML_API nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length) {
    char text[24]; /* needs no init: then of the usual version */
    unsigned cuda = nvml_sim.m ? nvml_sim.m->driver_version : 13000;
    snprintf(text, sizeof text, "%u.%u.00", cuda / 1000, branch(cuda));
    return nvml_text(version, length, text);
}

NVML_API nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    if (!version)
        return NVML_ERROR_INVALID_ARGUMENT;
    NVML_ENTER();
    *version = (int)nvml_sim.m->driver_version;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

/* A process that uses a GPU, else any process as /proc names it. */
static bool read_process_name(unsigned pid, char *out, unsigned length) {
    struct sim_process process[SIM_CLIENTS];
    for (unsigned d = 0; d < nvml_sim.m->devices; d++) {
        int n = sim_processes(&nvml_sim, d, process, SIM_CLIENTS);
        for (int i = 0; i < n && i < SIM_CLIENTS; i++) {
            if (process[i].pid != (int)pid)
                continue;
            snprintf(out, length, "%s", process[i].name);
            return true;
        }
    }
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return false;
    size_t n = fread(line, 1, sizeof line - 1, file);
    fclose(file);
    line[n] = 0;
    snprintf(out, length, "%s", line);
    return n > 0;
}

NVML_API nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
    NVML_ENTER();
    if (!name || !length)
        return NVML_ERROR_INVALID_ARGUMENT;
    return read_process_name(pid, name, length) ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlReturn_t nvmlSystemGetDriverBranch(void *info, unsigned length) {
    (void)info, (void)length;
    NVML_ENTER();
    return NVML_ERROR_NOT_SUPPORTED;
}

/* ---- handles --------------------------------------------------------------------------------------------------------------- */

NVML_API nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    NVML_ENTER();
    if (!count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = nvml_sim.m->devices;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

NVML_API nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    NVML_ENTER();
    if (!device || index >= nvml_sim.m->devices)
        return NVML_ERROR_INVALID_ARGUMENT;
    return give_handle(index, device);
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    NVML_ENTER();
    if (!uuid || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned i = 0; i < nvml_sim.m->devices; i++) {
        if (strcasecmp(uuid, nvml_sim.m->device[i].uuid))
            continue;
        return give_handle(i, device);
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByUUIDV(const nvmlUUID_v1_t *uuid, nvmlDevice_t *device) {
    NVML_ENTER();
    if (!uuid || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (uuid->version != NVML_STRUCT_VERSION(nvmlUUID_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (uuid->type != 1)
        return NVML_ERROR_NOT_SUPPORTED; /* 1 = ASCII */
    char text[sizeof uuid->value.str + 1] = "";
    memcpy(text, uuid->value.str, sizeof uuid->value.str);
    return nvmlDeviceGetHandleByUUID(text, device);
}

static void serial_of(unsigned index, char out[30]) { snprintf(out, 30, "16%011u", index + 1); }

NVML_API nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device) {
    NVML_ENTER();
    if (!serial || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned i = 0; i < nvml_sim.m->devices; i++) {
        char own[30];
        serial_of(i, own);
        if (strcmp(serial, own))
            continue;
        return give_handle(i, device);
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device) {
    unsigned domain = 0, bus, slot, function = 0;
    NVML_ENTER();
    if (!bus_id || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (sscanf(bus_id, "%x:%x:%x.%x", &domain, &bus, &slot, &function) < 3) {
        domain = 0;
        if (sscanf(bus_id, "%x:%x.%x", &bus, &slot, &function) < 2)
            return NVML_ERROR_INVALID_ARGUMENT;
    }
    if (domain || slot || function || bus < 1 || bus > nvml_sim.m->devices)
        return NVML_ERROR_NOT_FOUND;
    return give_handle(bus - 1, device);
}

NVML_API nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *bus_id, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(bus_id, device);
}

NVML_API nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *out) {
    NVML_DEVICE(device, out);
    *out = index;
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *out) { return nvmlDeviceGetIndex(device, out); }

NVML_API nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    NVML_DEVICE(device, name);
    return nvml_text(name, length, nvml_sim.m->device[index].name);
}

NVML_API nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    NVML_DEVICE(device, uuid);
    return nvml_text(uuid, length, nvml_sim.m->device[index].uuid);
}

NVML_API nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char *serial, unsigned length) {
    char own[30];
    NVML_DEVICE(device, serial);
    serial_of(index, own);
    return nvml_text(serial, length, own);
}

/* ---- PCI: device i is on bus i + 1, as libcuda says too ---------------------------------------------------------------------- */

#define PCI_DEVICE_ID 0x000010deu /* NVIDIA's vendor id, no model's device id */

NVML_API nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    NVML_DEVICE(device, pci);
    *pci = (nvmlPciInfo_t){.bus = index + 1, .pciDeviceId = PCI_DEVICE_ID, .pciSubSystemId = PCI_DEVICE_ID};
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "0000:%02X:00.0", pci->bus & 0xff);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus);
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_v2_t *pci) {
    NVML_DEVICE(device, pci);
    *pci = (nvmlPciInfo_v2_t){.bus = index + 1, .pciDeviceId = PCI_DEVICE_ID, .pciSubSystemId = PCI_DEVICE_ID};
    snprintf(pci->busId, sizeof pci->busId, "0000:%02X:00.0", pci->bus & 0xff);
    return NVML_SUCCESS;
}

NVML_API nvmlReturn_t nvmlDeviceGetPciInfo(nvmlDevice_t device, nvmlPciInfo_v2_t *pci) { return nvmlDeviceGetPciInfo_v2(device, pci); }

NVML_API nvmlReturn_t nvmlDeviceGetPciInfoExt(nvmlDevice_t device, nvmlPciInfoExt_v1_t *pci) {
    NVML_DEVICE(device, pci);
    if (pci->version != NVML_STRUCT_VERSION(nvmlPciInfoExt_v1_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    unsigned version = pci->version;
    *pci = (nvmlPciInfoExt_v1_t){.version = version, .bus = index + 1, .pciDeviceId = PCI_DEVICE_ID, .pciSubSystemId = PCI_DEVICE_ID};
    pci->baseClass = 3; /* display controller */
    pci->subClass = 2;  /* 3D */
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus);
    return NVML_SUCCESS;
}
