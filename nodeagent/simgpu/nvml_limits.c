/* Simulated libnvidia-ml.so.1: memory limits of cgroups, from driver r615 on. */
#include <errno.h>
#include <unistd.h>

#include "nvml_sim.h"

static nvmlReturn_t as_nvml(int failed) {
    switch (failed) {
    case 0:
        return NVML_SUCCESS;
    case -ENOENT:
        return NVML_ERROR_NOT_FOUND;
    case -ENOTSUP:
        return NVML_ERROR_NOT_SUPPORTED;
    case -ENOSPC:
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    default:
        return NVML_ERROR_INVALID_ARGUMENT;
    }
}

NVML_API nvmlReturn_t nvmlDeviceSetMemoryLimits_v1(nvmlDevice_t device, const nvmlSetMemoryLimits_v1_t *limits) {
    NVML_DEVICE(device, limits);
    if (!sim_limits_supported(nvml_sim.m))
        return NVML_ERROR_NOT_SUPPORTED;
    if (geteuid() != 0)
        return NVML_ERROR_NO_PERMISSION;
    if (!limits->nameSpace || limits->softLimit > limits->hardLimit)
        return NVML_ERROR_INVALID_ARGUMENT;
    return as_nvml(sim_group_set(&nvml_sim, limits->nameSpace, index, limits->softLimit, limits->hardLimit));
}

/* Anybody may ask. A cgroup without limits has those of the nearest one above it. */
NVML_API nvmlReturn_t nvmlDeviceGetMemoryLimits_v1(nvmlDevice_t device, nvmlGetMemoryLimits_v1_t *limits) {
    struct sim_limits found;
    NVML_DEVICE(device, limits);
    if (!sim_limits_supported(nvml_sim.m))
        return NVML_ERROR_NOT_SUPPORTED;
    if (!limits->nameSpace)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = as_nvml(sim_group_get(&nvml_sim, limits->nameSpace, index, &found));
    if (result)
        return result;
    limits->softLimit = found.soft;
    limits->hardLimit = found.hard;
    limits->currentUsed = found.used;
    return NVML_SUCCESS;
}
