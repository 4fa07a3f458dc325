/* The scheduling policy behind plain functions, for tests that play time. */
#include <stdlib.h>

#include "sched_policy.h"

SchedDevice *harness_new(uint64_t now) {
    SchedDevice *device = malloc(sizeof *device);
    if (device)
        sched_init(device, NULL, now);
    return device;
}
void harness_free(SchedDevice *device) { free(device); }
int harness_join(SchedDevice *device, uint32_t weight_milli, int strict, uint64_t now) {
    return sched_join(device, weight_milli, strict != 0, now);
}
void harness_leave(SchedDevice *device, int index, uint64_t now) { sched_leave(device, index, now); }
void harness_set(SchedDevice *device, int index, uint32_t weight_milli, int strict, uint64_t now) {
    sched_set(device, index, weight_milli, strict != 0, now);
}
void harness_suspend(SchedDevice *device, int index, int suspended, uint64_t now) { sched_suspend(device, index, suspended != 0, now); }
void harness_observe(SchedDevice *device, int index, int want, int busy, int near, uint32_t edges, uint64_t now) {
    sched_observe(device, index, (SchedSeen){.want = want != 0, .busy = busy != 0, .near = near != 0, .edges = edges}, now);
}
uint64_t harness_step(SchedDevice *device, uint64_t now) {
    sched_step(device, now);
    return device->wake_at;
}
uint32_t harness_gate(const SchedDevice *device, int index) { return sched_gate(&device->slice[index]); }
uint64_t harness_turn_end(const SchedDevice *device, int index) { return device->slice[index].turn_end; }
uint64_t harness_charged(const SchedDevice *device, int index) { return device->slice[index].charged_ns; }
uint64_t harness_overruns(const SchedDevice *device, int index) { return device->slice[index].overruns; }
uint64_t harness_ahead(const SchedDevice *device, int index) { return sched_ahead(device, index); }
void harness_bring(SchedDevice *device, int index, uint64_t ns, uint64_t now) { sched_bring(device, index, ns, now); }
int harness_pull(SchedDevice *device, int index, uint64_t now) { return sched_pull(device, index, now); }
int harness_close(SchedDevice *device, int index, uint64_t now) { return sched_close(device, index, now); }
