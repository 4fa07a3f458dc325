/* cuInit, devices, errors. */
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

#include "drv.h"

struct drv drv = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static CUresult init_result = CUDA_ERROR_NOT_INITIALIZED;

static void in_child(void) {
    if (drv.ready)
        atomic_store(&drv.forked, true); /* a driver does not survive fork */
}

/* One item of CUDA_VISIBLE_DEVICES: an ordinal, a UUID or the beginning of one. -1: names nothing. */
static int device_named(const char *item, size_t length) {
    struct sim_machine *m = drv.sim.m;
    char *end;
    long ordinal = strtol(item, &end, 10);
    if (end == item + length && length)
        return ordinal >= 0 && ordinal < (long)m->devices ? (int)ordinal : -1;
    for (unsigned d = 0; length > 4 && d < m->devices; d++)
        if (strncmp(m->device[d].uuid, item, length) == 0)
            return (int)d;
    return -1;
}

static void choose_visible(void) {
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    drv.count = 0;
    if (!list) {
        for (unsigned d = 0; d < drv.sim.m->devices; d++)
            drv.visible[drv.count++] = (int)d;
        return;
    }
    while (*list && drv.count < SIM_DEVICES) {
        size_t length = strcspn(list, ",");
        int device = device_named(list, length);
        for (int i = 0; i < drv.count; i++)
            if (drv.visible[i] == device)
                device = -1;
        if (device < 0)
            return; /* as CUDA does: what comes behind a wrong item is not visible */
        drv.visible[drv.count++] = device;
        list += length + (list[length] == ',');
    }
}

static pthread_once_t open_once = PTHREAD_ONCE_INIT;
static CUresult open_result;

static void open_machine(void) { open_result = sim_open(&drv.sim) ? CUDA_ERROR_SYSTEM_NOT_READY : CUDA_SUCCESS; }

CUresult drv_open(void) {
    NEED(!atomic_load(&drv.forked), CUDA_ERROR_NOT_INITIALIZED);
    pthread_once(&open_once, open_machine);
    return open_result;
}

static void initialize(void) {
    init_result = drv_open();
    if (init_result != CUDA_SUCCESS)
        return;
    choose_visible();
    pthread_atfork(NULL, NULL, in_child);
    init_result = drv.count ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
    drv.ready = init_result == CUDA_SUCCESS;
}

CUresult drv_ready(void) {
    if (__builtin_expect(drv.ready && !atomic_load_explicit(&drv.forked, memory_order_relaxed), 1))
        return CUDA_SUCCESS;
    return CUDA_ERROR_NOT_INITIALIZED;
}

API(cuInit, (unsigned flags)) {
    NEED(flags == 0, CUDA_ERROR_INVALID_VALUE);
    NEED(!atomic_load(&drv.forked), CUDA_ERROR_NOT_INITIALIZED);
    pthread_once(&once, initialize);
    return init_result;
}

int drv_driver_version(void) {
    const char *wish = getenv("NBGPU_SIM_DRIVER_VERSION"); /* answered before cuInit too */
    return drv.sim.m ? (int)drv.sim.m->driver_version : wish && atoi(wish) > 0 ? atoi(wish) : 13000;
}

OPEN_API(cuDriverGetVersion, (int *version)) {
    NEED(version, CUDA_ERROR_INVALID_VALUE);
    *version = drv_driver_version();
    return CUDA_SUCCESS;
}

OPEN_API(cuGetProcAddress_v2, (const char *name, void **out, int version, uint64_t flags, int *status)) {
    int unused;
    return drv_resolve(name, out, version, flags, status ? status : &unused);
}

OPEN_API(cuGetProcAddress, (const char *name, void **out, int version, uint64_t flags)) {
    int unused;
    return drv_resolve(name, out, version, flags, &unused);
}

/* Undocumented tables of functions: there are none here. */
OPEN_API(cuGetExportTable, (const void **table, const CUuuid *id)) {
    NEED(table && id, CUDA_ERROR_INVALID_VALUE);
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

CUresult drv_device(CUdevice ordinal, int *device) {
    TRY(drv_ready());
    NEED(ordinal >= 0 && ordinal < drv.count, CUDA_ERROR_INVALID_DEVICE);
    *device = drv.visible[ordinal];
    return CUDA_SUCCESS;
}

int drv_ordinal(int device) {
    for (int i = 0; i < drv.count; i++)
        if (drv.visible[i] == device)
            return i;
    return 0;
}

API(cuDeviceGetCount, (int *count)) {
    TRY(drv_ready());
    NEED(count, CUDA_ERROR_INVALID_VALUE);
    *count = drv.count;
    return CUDA_SUCCESS;
}

API(cuDeviceGet, (CUdevice * out, int ordinal)) {
    int device;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *out = ordinal;
    return CUDA_SUCCESS;
}

API(cuDeviceGetName, (char *name, int length, CUdevice ordinal)) {
    int device;
    NEED(name && length > 0, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    snprintf(name, (size_t)length, "%s", drv.sim.m->device[device].name);
    return CUDA_SUCCESS;
}

void drv_uuid(int device, CUuuid *out) {
    int digits = 0;
    memset(out, 0, sizeof *out);
    for (const char *c = drv.sim.m->device[device].uuid + 4; *c && digits < 32; c++) {
        if (*c == '-')
            continue;
        int value = *c <= '9' ? *c - '0' : *c - 'a' + 10;
        out->bytes[digits / 2] = (char)(out->bytes[digits / 2] | (digits % 2 ? value : value << 4));
        digits++;
    }
}

API(cuDeviceGetUuid_v2, (CUuuid * out, CUdevice ordinal)) {
    int device;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    drv_uuid(device, out);
    return CUDA_SUCCESS;
}
API(cuDeviceGetUuid, (CUuuid * out, CUdevice ordinal)) { return cuDeviceGetUuid_v2(out, ordinal); }

API(cuDeviceTotalMem_v2, (size_t *bytes, CUdevice ordinal)) {
    int device;
    NEED(bytes, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *bytes = drv.sim.m->device[device].mem_total;
    return CUDA_SUCCESS;
}

API(cuDeviceTotalMem, (unsigned *bytes, CUdevice ordinal)) {
    size_t total = 0;
    NEED(bytes, CUDA_ERROR_INVALID_VALUE);
    TRY(cuDeviceTotalMem_v2(&total, ordinal));
    *bytes = total > UINT32_MAX ? UINT32_MAX : (unsigned)total;
    return CUDA_SUCCESS;
}

API(cuDeviceComputeCapability, (int *major, int *minor, CUdevice ordinal)) {
    int device;
    NEED(major && minor, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *major = 9;
    *minor = 0;
    return CUDA_SUCCESS;
}

API(cuDeviceGetPCIBusId, (char *out, int length, CUdevice ordinal)) {
    int device;
    NEED(out && length > 0, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    snprintf(out, (size_t)length, "0000:%02X:00.0", 1 + device);
    return CUDA_SUCCESS;
}

API(cuDeviceGetByPCIBusId, (CUdevice * out, const char *bus)) {
    unsigned domain = 0, number = 0;
    TRY(drv_ready());
    NEED(out && bus, CUDA_ERROR_INVALID_VALUE);
    NEED(sscanf(bus, "%x:%x", &domain, &number) == 2, CUDA_ERROR_INVALID_VALUE);
    for (int i = 0; i < drv.count; i++)
        if (number == 1u + (unsigned)drv.visible[i]) {
            *out = i;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_DEVICE;
}

API(cuDeviceCanAccessPeer, (int *can, CUdevice one, CUdevice other)) {
    int a, b;
    NEED(can, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(one, &a));
    TRY(drv_device(other, &b));
    *can = a != b;
    return CUDA_SUCCESS;
}

API(cuDeviceGetP2PAttribute, (int *value, int attribute, CUdevice one, CUdevice other)) {
    int a, b;
    NEED(value && attribute >= 1, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(one, &a));
    TRY(drv_device(other, &b));
    NEED(a != b, CUDA_ERROR_INVALID_DEVICE);
    *value = attribute != 1; /* performance rank 0, everything supported */
    return CUDA_SUCCESS;
}

API(cuDeviceGetTexture1DLinearMaxWidth, (size_t *width, int format, unsigned channels, CUdevice ordinal)) {
    int device;
    (void)format;
    NEED(width && channels, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *width = (size_t)1 << 28;
    return CUDA_SUCCESS;
}

API(cuDeviceGetExecAffinitySupport, (int *supported, int type, CUdevice ordinal)) {
    int device;
    (void)type;
    NEED(supported, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    *supported = 0;
    return CUDA_SUCCESS;
}

API(cuFlushGPUDirectRDMAWrites, (int target, int scope)) {
    (void)target, (void)scope;
    return drv_ready();
}
API(cuProfilerStart, (void)) { return drv_ready(); }
API(cuProfilerStop, (void)) { return drv_ready(); }
