/* What the files of the simulated libnvidia-ml.so.1 share. */
#ifndef NBGPU_NVML_SIM_H
#define NBGPU_NVML_SIM_H

#include "nvml_abi.h"
#include "sim_state.h"

struct nvml_device {
    unsigned index;
};

extern struct sim nvml_sim; /* open from nvmlInit on, for good */

/* SUCCESS and the device's index, or why not. Either pointer of the caller's outputs may be checked with it. */
nvmlReturn_t nvml_enter(void);
nvmlReturn_t nvml_device(nvmlDevice_t handle, const void *output, unsigned *index);
nvmlReturn_t nvml_text(char *out, unsigned length, const char *text);
/* Microseconds since the epoch of a moment of CLOCK_MONOTONIC: NVML stamps its samples so. */
unsigned long long nvml_stamp_us(uint64_t monotonic_ns);

#define NVML_ENTER()                                                                                                                       \
    do {                                                                                                                                   \
        nvmlReturn_t entered_ = nvml_enter();                                                                                              \
        if (entered_)                                                                                                                      \
            return entered_;                                                                                                               \
    } while (0)

/* Declares `unsigned index` of the handle, or returns. */
#define NVML_DEVICE(handle, output)                                                                                                        \
    unsigned index;                                                                                                                        \
    do {                                                                                                                                   \
        nvmlReturn_t found_ = nvml_device((handle), (output), &index);                                                                     \
        if (found_)                                                                                                                        \
            return found_;                                                                                                                 \
    } while (0)

#endif
