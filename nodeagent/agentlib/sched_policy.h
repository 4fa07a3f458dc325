/* The GPU-time policy of one device: who may submit, until when. Pure: no clock, no I/O, no threads; a step is a function of this
 * state and of `now`, so that tests drive it in virtual time (tests/model/test_sched_policy.py).
 *
 * Slices take turns. A slice pays virtual time for as long as its gate is open and its work drains: vt += time * 1000 / weight. What tenants
 * say (`SchedSeen`) only ever ends a turn sooner or asks for one; no charge is computed from it.
 *
 * Periods. Time is cut into periods P in which every active slice has one turn; a turn ends when its slice's vt reaches the end of the period,
 * so what one turn took too much or too little is made up for in the next. The order stays the same from period to period. P divides the
 * second (`whole_ns`) in which shares are to hold: any second then holds as many turns of each, wherever it begins, however long they are.
 * P is as short as the loss allows: each change of hands costs the driver's switch (`handover_ns`: the policy can't see it, so this is the
 * most that is to be expected) and the time for which the GPU has nothing to do until the next slice has submitted (`gap_ns`, measured
 * in one turn of sixteen: somebody must look while the work runs),
 * together less than 1 % of P.
 *
 * A turn's end. The slice knows when it is (`turn_end`), submits nothing after it, although its gate is open still, and rings once its work is
 * done: then the gate is closed and the next one opens. Where nobody rings, and for a strict slice, the step is due at the end (`sched_wake_at`).
 *
 * Changing hands. The next gate opens when the work of the last turn is done, not sooner: next to each other the driver would switch to and fro
 * between the two, which costs more than the pause. Work that outlasts its turn by `patience_ns` (a GPU kernel can't be stopped) goes on
 * beside the next turn, and both pay half. Its slice has no other turn before that work is done, or four seconds have passed.
 *
 * Reconciled. Whose words end its turn while its work still runs on is charged nothing for that work here; somebody who sees the GPU compute
 * (the agent, by NVML) compares with `held_ns` and has it pay the difference later (`sched_owe`).
 *
 * Parts on several devices. A slice's turn on one device begins on all its devices where it is active (`sched_pull`), and a turn that others
 * wait for ends on all of them (`sched_close`): GPU kernels of a collective wait for each other on their devices, and one whose peers have no
 * turn spins through its own. Each device charges for itself, so that a turn taken early there is a turn less later. Idle in its turn, a part
 * is not done with it while another one computes in its own (`SchedSeen.peer`): ranks wait for each other at the end of each step.
 *
 * Guests. A slice that begins to want out of idleness, and is behind where it would be if all shared the device at every moment, is let
 * in at once; the owner's gate is closed until it is done. After `overlap_ns` it takes the turn, or leaves when it is no longer behind.
 *
 * Strict slices also pay from a bucket that fills at their weight. They have their turn once a period too, as long as brings the bucket back
 * to the same level at the next one's beginning.
 */
#ifndef NBGPU_SCHED_POLICY_H
#define NBGPU_SCHED_POLICY_H
#include <stdbool.h>
#include <stdint.h>

#include "nbgpu_agent.h"

#define SCHED_SLICES 128u
#define SCHED_NEVER UINT64_MAX
#define SCHED_NOBODY (-1)

typedef enum {
    PHASE_OUT,   /* gate closed */
    PHASE_OPEN,  /* gate open: the owner, or the guest beside it */
    PHASE_DRAIN, /* gate closed, what it submitted still runs and the next one waits for that */
    PHASE_PAUSE, /* gate closed for a guest; the turn goes on when the guest is done */
} SchedPhase;

/* What the slice's own words say of it on this device, as last read. */
typedef struct {
    bool want;           /* somebody waits at the gate */
    bool busy;           /* work is outstanding */
    bool near;           /* ...but nearly done; no decision goes by it */
    uint32_t edges;      /* the slice's bell: it changed = something happened in between */
    uint64_t busy_since; /* since when work is outstanding, 0 = not said */
    bool peer;           /* its part on another device is in its turn and computes: it may wait for that */
} SchedSeen;

typedef struct {
    bool joined;
    bool strict;
    bool suspended;
    uint32_t weight_milli;
    SchedSeen seen;
    SchedPhase phase;
    int64_t vt;           /* ns of device time per unit of weight */
    int64_t bucket_ns;    /* strict: time it may still take; below 0 = debt */
    uint64_t spilled_ns;  /* strict: time that its bucket could not hold */
    bool dry;             /* strict: spent its bucket, waits for a turn's worth */
    bool overran;         /* its work outlasted its turn by `patience_ns` and still runs, beside the next one */
    bool was_idle;        /* nothing was outstanding when its turn began, or since: its word that something is can be believed */
    bool woke;            /* it began to want out of idleness and has had no turn since */
    uint64_t woke_at;     /* that was then */
    uint64_t open_since;  /* of the present turn */
    uint64_t turn_end;    /* 0 = nobody else wants the device: no end */
    uint64_t drain_until; /* after this the next one is let in beside it */
    uint64_t quiet_since; /* open, and nothing outstanding since then; 0 = busy */
    uint32_t unused;      /* turns in a row that it did not use */
    uint64_t spent_until; /* did not use its last turn: no other before this or before it rings again */
    uint64_t last_active;
    uint64_t charged_ns, turns, overruns;
    uint64_t held_ns;    /* time that it could compute in: its gate was open, or it said that work of it still ran */
    int64_t goal;        /* its turn ends when its vt is there */
    uint64_t turn_most;  /* ...or at this time, wherever it is */
    uint64_t strict_end; /* strict: its turn ends then, whoever else waits */
    uint64_t dry_until;  /* strict: dry for so long */
    uint64_t closed_at;  /* its last turn ended */
    uint64_t gap_ns;     /* mean time that the GPU idled before it submitted in its turn, as its words tell */
    uint32_t gaps;       /* of so many turns */
    bool fresh;          /* has submitted nothing yet in this turn */
} SchedSlice;

typedef struct {
    NbgpuSchedConfig config; /* defaults filled in */
    uint64_t now;            /* charged up to here */
    uint64_t wake_at;        /* the next step is due then, if nothing is seen before */
    int64_t vt_floor;        /* newcomers start here; never falls */
    int owner;               /* whose turn it is (OPEN), or SCHED_NOBODY */
    int guest;               /* let in beside the owner because it woke behind it, or SCHED_NOBODY */
    uint32_t high;           /* slices at and above were never joined */
    uint64_t period_ns;      /* P, of the slices that are active now */
    uint64_t patience_ns;    /* how long after a turn's end others wait for what still runs */
    uint32_t active_milli;   /* weights of the slices that are active now */
    uint64_t guest_since;    /* the guest has the device to itself since then */
    uint64_t gap_held_ns;    /* time that the GPU idles while a turn changes hands, as P takes it: the median of what slices say */
    uint64_t idle_since;     /* nobody has work outstanding since then; 0 = somebody has */
    SchedSlice slice[SCHED_SLICES];
} SchedDevice;

/* Fill in the defaults of the fields that are 0. */
NbgpuSchedConfig sched_config(const NbgpuSchedConfig *asked);
void sched_init(SchedDevice *device, const NbgpuSchedConfig *config, uint64_t now);
/* Returns the slice's index, or -1 when the device has SCHED_SLICES already. */
int sched_join(SchedDevice *device, uint32_t weight_milli, bool strict, uint64_t now);
void sched_leave(SchedDevice *device, int index, uint64_t now);
void sched_set(SchedDevice *device, int index, uint32_t weight_milli, bool strict, uint64_t now);
void sched_suspend(SchedDevice *device, int index, bool suspended, uint64_t now);
/* Take in what a slice's words say. The caller steps afterwards. */
void sched_observe(SchedDevice *device, int index, SchedSeen seen, uint64_t now);
/* Charge everybody up to now, by what was last seen and decided. */
void sched_charge(SchedDevice *device, uint64_t now);
/* It computed so much longer than it was charged for, as somebody saw who need not believe it: it pays for that now. */
void sched_owe(SchedDevice *device, int index, uint64_t ns, uint64_t now);
/* Device time that it took beyond its share and has not yet waited for; a slice that comes after it for the same user brings it along, or
 * whoever ends in time would never wait. */
uint64_t sched_ahead(const SchedDevice *device, int index);
void sched_bring(SchedDevice *device, int index, uint64_t ns, uint64_t now);
/* Charge up to now, then decide; sets phases, turn ends and wake_at. */
void sched_step(SchedDevice *device, uint64_t now);
/* When to step if nothing is rung before: wake_at, or later where it is a turn's end that its slice rings. */
uint64_t sched_wake_at(const SchedDevice *device);
/* A burst slice that took more than its turn and comes after strict ones until the time for it has passed. */
bool sched_owes_strict(const SchedDevice *device, const SchedSlice *slice);
/* The slice has its turn on another of its devices: it has it here too, now, if it waits for it. Returns whether its gate was opened. */
bool sched_pull(SchedDevice *device, int index, uint64_t now);
/* The slice's turn on another of its devices is over: here too, if others wait. Returns whether its gate was closed. */
bool sched_close(SchedDevice *device, int index, uint64_t now);
/* GATE_* for the slice's gate word. */
uint32_t sched_gate(const SchedSlice *slice);

#endif
