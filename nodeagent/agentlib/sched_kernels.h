/* Turns of the kernels inside one slice on one device, once one of them has a limit of compute. Pure, like sched_policy.h.
 *
 * While the slice's gate is open its kernels go one at a time: each limited one by itself, all others together (KERNELS_REST). The least
 * vt among the waiting goes next, so that they share alike; a limited one also pays from a bucket that fills at its limit, of the whole
 * device's time. Payment is by what the kernels' own words say: they are of one user, who can lift this limit and nothing else, for
 * the slice's gate stands before all of them and is paid for by sched_policy.c whatever they say.
 */
#ifndef NBGPU_SCHED_KERNELS_H
#define NBGPU_SCHED_KERNELS_H
#include "sched_policy.h"

#define KERNELS_REST NBGPU_KERNELS
#define KERNELS_MEMBERS (NBGPU_KERNELS + 1u)

/* What the slots of one member say, as last read. */
typedef struct {
    bool want, busy, near;
    uint32_t kernels;  /* that are active: 1, or more for the rest */
    uint64_t meter_ns; /* of busy time so far; only differences mean something */
} KernelSeen;

typedef struct {
    uint64_t id; /* kernels_hash of the kernel's id */
    uint32_t cap_milli;
    KernelSeen seen;
    SchedPhase phase;
    int64_t vt, bucket_ns, left_ns; /* left: of this turn */
    bool dry;
    uint64_t quiet_since; /* nothing outstanding since then; 0 = busy */
    uint64_t drain_until, spent_until;
    uint32_t unused;
    uint64_t charged_ns;
} KernelMember;

typedef struct {
    uint64_t now, wake_at, grace_ns;
    int64_t unit_ns;    /* of all lengths here: the shortest turn of a slice */
    uint64_t period_ns; /* in which the slice has one turn, or 0: what flows into buckets meanwhile is not lost */
    int64_t vt_floor;
    int owner;     /* a member's index, or SCHED_NOBODY */
    uint32_t high; /* limited members at and above were never there */
    KernelMember member[KERNELS_MEMBERS];
} KernelTurns;

/* `config` with its defaults filled in (sched_config). */
void kernels_init(KernelTurns *turns, const NbgpuSchedConfig *config, uint64_t now);
/* Limit the kernel of a ctl entry; 0: it has no limit (any more). */
void kernels_set(KernelTurns *turns, uint32_t index, const char id[NBGPU_KERNEL_ID_BYTES], uint32_t cap_milli, uint64_t now);
/* Which member a slot with this kernel id belongs to. */
uint32_t kernels_find(const KernelTurns *turns, const char id[NBGPU_KERNEL_ID_BYTES]);
/* Take in what all members say now, and charge for the time since. */
void kernels_observe(KernelTurns *turns, const KernelSeen seen[KERNELS_MEMBERS], uint64_t now);
/* It waits and could go: for one that spent its limit the slice asks for no turn. */
bool kernels_wants(const KernelTurns *turns, uint32_t index);
/* Decide by what was last seen; sets phases and wake_at. */
void kernels_step(KernelTurns *turns, bool slice_open);
/* Somebody has a turn that another waits for, or drains: the dead do not ring, look again soon. */
bool kernels_watched(const KernelTurns *turns);
uint32_t kernels_gate(const KernelTurns *turns, uint32_t index);

#endif
