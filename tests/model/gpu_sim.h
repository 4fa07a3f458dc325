/* A GPU, its driver's round robin and slices' processes in virtual time, event by event: what the scheduling policy is played against over
 * whole sweeps (test_sched_sweep.py) and in random histories (gpu_histories.c). gpu_model.py is the small one, in ticks, for single stories.
 *
 * The driver runs one process at a time, for at most a time slice while others have work, and loses the switch cost at each change. A
 * process behaves as the limiter makes it: nothing new while the gate is closed, nothing that would begin after its turn's end, at most
 * two GPU kernels or 2 ms outstanding. Before each submission its host takes a random time up to the jitter, the first after the gate has
 * opened included. What it says of itself (near, idle) arrives late, as from a thread that looks at fences.
 *
 * The scheduler sees every word that changes and wakes at every turn's end; or (`rings`) it is as its thread is: it hears what the limiter
 * rings, and a process stops at its turn's end by itself, while its gate is still open, and rings once its work is done. Both may be late.
 * The scheduler closes the gate then, or 5 ms after the end where nobody has rung.
 */
#ifndef NBGPU_GPU_SIM_H
#define NBGPU_GPU_SIM_H
#include "sched_policy.h"

#define SIM_SLICES 12
#define SIM_PROCESSES 24
#define SIM_QUEUE 64
#define SIM_WAITS 4096

enum { SIM_HONEST, SIM_ALWAYS_BUSY, SIM_NEVER_BUSY, SIM_LATE, SIM_RUNS_ON };

typedef struct {
    uint64_t slice_ns;  /* of the driver's round robin */
    uint64_t switch_ns; /* lost at each change of process */
    uint64_t jitter_ns; /* most that a host takes for one submission; uniform */
    uint64_t notice_ns; /* until a process sees that its work is done, or nearly */
    uint64_t late_ns;   /* most by which a process is late with stopping at its turn's end, and with its ring; uniform */
    uint64_t seed;
    int32_t limited; /* 0: the driver alone, every gate open */
    int32_t rings;   /* 1: the scheduler wakes for rings, and slices stop by themselves */
} SimDriver;

typedef struct {
    uint32_t milli, strict, processes;
    uint32_t late_us;   /* by so much more its processes may be late (SimDriver.late_ns) */
    uint64_t kernel_ns; /* each a tenth longer or shorter at random */
    uint64_t work_ns;   /* of one visit; 0: without end */
    uint64_t gap_ns;    /* between the end of a visit and the next, a fifth longer or shorter at random */
    uint64_t liar;      /* SIM_ALWAYS_BUSY: never says that it is near or idle; SIM_NEVER_BUSY: never says that it has work outstanding;
                         * SIM_LATE: says that its work began 1 ms later than it did; SIM_RUNS_ON: stops when its gate is closed, not before */
} SimLoad;

typedef struct {
    int slice;
    bool alive, want, granted, nears, told_near, told_busy;
    uint64_t ready_at; /* the host has its next submission ready; SCHED_NEVER: it has none or waits for room */
    uint64_t queue[SIM_QUEUE];
    uint32_t head, count;
    uint64_t outstanding;  /* work, ns */
    uint64_t visit_left;   /* work not yet submitted */
    uint64_t visit_at;     /* the next visit begins */
    uint64_t began, asked; /* this visit; waiting at the gate since */
    uint64_t busy_since, tell_idle_at, tell_near_at;
    uint64_t late_ns; /* of this busy interval */
    uint64_t busy_ns;
} SimProcess;

typedef struct {
    SimLoad load;
    bool joined, suspended;
    int id;
    SchedSeen told;
    uint32_t bell;    /* rings so far; told.edges: those that were heard */
    uint32_t gate;    /* as last written, */
    uint64_t end_was; /* and the turn's end */
    uint64_t busy_ns;
    uint64_t waits[SIM_WAITS], visits[SIM_WAITS];
    uint32_t wait_count, visit_count;
    uint64_t hungry_since; /* histories: waits and may have a turn since then; 0 = not */
} SimSlice;

typedef struct {
    SimDriver driver;
    SchedDevice policy;
    uint64_t now, wake_at, beat_at, random;
    uint32_t slices, processes;
    SimSlice slice[SIM_SLICES];
    SimProcess process[SIM_PROCESSES];
    int running, last;
    uint64_t slice_end, switch_left;
    uint64_t busy_ns, lost_ns, steps, wakes;
    bool due;
} Sim;

Sim *sim_new(const SimDriver *driver, const NbgpuSchedConfig *config);
void sim_free(Sim *sim);
int sim_add(Sim *sim, const SimLoad *load);
void sim_remove(Sim *sim, int slice);
void sim_suspend(Sim *sim, int slice, bool suspended);
void sim_resize(Sim *sim, int slice, uint32_t milli, bool strict);
void sim_load(Sim *sim, int slice, const SimLoad *load);
void sim_start(Sim *sim, int process, int slice);
void sim_kill(Sim *sim, int process); /* its work on the GPU ends with it */
/* One event; returns false when it would be after `until` (now is then `until`). */
bool sim_event(Sim *sim, uint64_t until);
void sim_run(Sim *sim, uint64_t ns);
uint64_t sim_random(Sim *sim);

#endif
