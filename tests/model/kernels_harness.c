/* The turns of a slice's kernels behind plain functions, for tests that play time. */
#include <stdlib.h>

#include "sched_kernels.h"

typedef struct {
    KernelTurns turns;
    KernelSeen seen[KERNELS_MEMBERS];
} Harness;

Harness *kernels_new(uint64_t now) {
    const NbgpuSchedConfig config = {.min_turn_ns = 2000000, .idle_grace_ns = 300000};
    Harness *h = calloc(1, sizeof *h);
    if (h)
        kernels_init(&h->turns, &config, now);
    return h;
}
void kernels_free(Harness *h) { free(h); }
void kernels_limit(Harness *h, uint32_t index, const char *id, uint32_t cap_milli, uint64_t now) {
    char padded[NBGPU_KERNEL_ID_BYTES] = {0};
    for (uint32_t i = 0; id[i] && i + 1 < sizeof padded; i++)
        padded[i] = id[i];
    kernels_set(&h->turns, index, padded, cap_milli, now);
}
void kernels_say(Harness *h, uint32_t index, int want, int busy, int near, uint32_t kernels, uint64_t meter_ns) {
    h->seen[index] = (KernelSeen){.want = want != 0, .busy = busy != 0, .near = near != 0, .kernels = kernels, .meter_ns = meter_ns};
}
uint64_t kernels_decide(Harness *h, int slice_open, uint64_t now) {
    kernels_observe(&h->turns, h->seen, now);
    kernels_step(&h->turns, slice_open != 0);
    return h->turns.wake_at;
}
uint32_t kernels_gate_of(const Harness *h, uint32_t index) { return kernels_gate(&h->turns, index); }
int kernels_asks(const Harness *h, uint32_t index) { return kernels_wants(&h->turns, index); }
