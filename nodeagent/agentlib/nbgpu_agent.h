/* libnbgpu_agent.so: what the agent needs in C. The GPU-time scheduler and the reader of tenants' `use` files.
 *
 * Called by ctypes (nbgpu_agent/native.py). Every function returns 0 or a count, or a negative errno. All are thread safe.
 * The scheduler owns one thread, started by nbgpu_sched_open; it never takes the GIL and runs no Python.
 */
#ifndef NBGPU_AGENT_H
#define NBGPU_AGENT_H
#include <stdint.h>

#include "../limiter/nbgpu_layout.h"

#define NBGPU_AGENT_ABI 6u
#define NBGPU_EXPORT __attribute__((visibility("default")))

NBGPU_EXPORT uint32_t nbgpu_agent_abi(void);

/* ---- GPU-time scheduler ------------------------------------------------------------------------------------------------- */

/* Constants of the policy, nanoseconds of CLOCK_MONOTONIC. 0 in a field = its default. */
typedef struct {
    uint64_t min_turn_ns;         /* 2 ms: no turn is shorter */
    uint64_t period_ns;           /* 30 ms: P, in which every active slice gets one turn, is at least this */
    uint64_t period_per_slice_ns; /* 7.5 ms: and at least this for each active slice */
    uint64_t lag_ns;              /* 30 ms: most virtual time that a slice may be behind when it wakes */
    uint64_t idle_grace_ns;       /* 0.3 ms: a turn ends when its slice has had nothing outstanding for this long */
    uint64_t overlap_behind_ns;   /* 1 ms: a waking slice that is this far behind is let in beside the owner */
    uint64_t overlap_ns;          /* 10 ms: and takes the turn when it is busy for longer */
    uint64_t heartbeat_ns;        /* 200 ms between two heartbeats in each ctl */
    uint64_t handover_ns;         /* 0.5 ms: most that the driver loses when it goes from one process to another */
    uint64_t whole_ns;            /* 1 s: shares hold in windows this long; P divides it */
} NbgpuSchedConfig;

typedef struct {
    uint64_t charged_ns; /* gate-open time charged, halved while two slices were let in */
    uint64_t turns;      /* times that the gate was opened */
    uint64_t overruns;   /* turns that had to be given up on: the work outstanding did not end within two periods */
    uint64_t junk;       /* times that its `use` file was unreadable, or its bell never stopped */
    uint32_t gate;       /* GATE_* as the scheduler last wrote it */
    uint32_t active;     /* 1: it waits or has work outstanding */
    uint64_t held_ns;    /* time that it could compute in: its gate was open, or it said that work of it still ran */
    uint64_t ahead_ns;   /* device time that it took beyond its share and has not yet waited for */
} NbgpuSchedStats;

typedef struct {
    uint64_t wakeups; /* of the thread, heartbeats included */
    uint64_t bells;   /* of these, because a slice rang */
    uint64_t looks;   /* times that a slice's slots were read */
    uint64_t cpu_ns;  /* CPU time of the thread */
    uint32_t entries; /* (slice, device) pairs */
    uint32_t polling; /* 1: this kernel has no futex_waitv, bells are polled */
} NbgpuSchedTotals;

typedef struct NbgpuSched NbgpuSched;

/* Start a scheduler with these constants (NULL = defaults). NULL on failure, errno set. */
NBGPU_EXPORT NbgpuSched *nbgpu_sched_open(const NbgpuSchedConfig *config);
/* Stop the thread and free everything. Heartbeats become 0, so that processes fall back at once; gates stay as they are. */
NBGPU_EXPORT void nbgpu_sched_close(NbgpuSched *sched);

/* Schedule a slice on one of its devices. ctl_fd (read and write) and use_fd (read) are duplicated; `device` is the index into
 * ctl.device, `physical` any number that is the same for all slices on one GPU. Returns an id >= 0. */
NBGPU_EXPORT int nbgpu_sched_add(NbgpuSched *sched, int ctl_fd, int use_fd, uint32_t device, uint32_t physical, uint32_t compute_milli,
                                 uint32_t mode);
/* New share (1..1000 milli-GPU) and mode (NBGPU_MODE_*), from the next turn on. */
NBGPU_EXPORT int nbgpu_sched_set(NbgpuSched *sched, int id, uint32_t compute_milli, uint32_t mode);
/* Read the limits of compute of the slice's kernels in ctl (`kernel[].compute_milli`) again: somebody changed them. */
NBGPU_EXPORT int nbgpu_sched_kernels(NbgpuSched *sched, int id);
/* 1: the gate becomes SUSPENDED and the slice gets no turns; 0: it waits for its turn again. */
NBGPU_EXPORT int nbgpu_sched_suspend(NbgpuSched *sched, int id, int suspended);
/* It computed so many ns longer than it said (NVML saw it): it pays for them from its next turns. At most `whole_ns` at once. */
NBGPU_EXPORT int nbgpu_sched_owe(NbgpuSched *sched, int id, uint64_t ns);
/* Its user had taken so much beyond a share before (`ahead_ns` of a slice that has ended): it waits for that first. */
NBGPU_EXPORT int nbgpu_sched_bring(NbgpuSched *sched, int id, uint64_t ns);
/* Forget it; its gate becomes GATE_NONE. */
NBGPU_EXPORT int nbgpu_sched_remove(NbgpuSched *sched, int id);
NBGPU_EXPORT int nbgpu_sched_stats(NbgpuSched *sched, int id, NbgpuSchedStats *out);
NBGPU_EXPORT int nbgpu_sched_totals(NbgpuSched *sched, NbgpuSchedTotals *out);

/* ---- reader of `use` ---------------------------------------------------------------------------------------------------- */

/* Why a row is junk (bits). The numbers concerned are 0 in the row. */
#define NBGPU_JUNK_DEVICE 1u
#define NBGPU_JUNK_KERNEL_ID 2u
#define NBGPU_JUNK_MEMORY 4u
#define NBGPU_JUNK_COMPUTE 8u
#define NBGPU_JUNK_OWNER 16u

/* The file as a whole: only what passed the checks. */
typedef struct {
    uint32_t high_water; /* <= NBGPU_SLOTS */
    uint32_t events;
    uint32_t bell;
    uint32_t reserved;
} NbgpuUseHead;

/* One slot in use. pid is the owner's as it sees itself (its own pid namespace): nbgpu_use_locked says it as the agent sees it. */
typedef struct {
    uint32_t slot;
    uint32_t junk; /* NBGPU_JUNK_* */
    uint32_t pid;
    uint32_t device;
    uint64_t owner;
    uint64_t start_time;
    char kernel_id[NBGPU_KERNEL_ID_BYTES]; /* always ends in NUL; letters, digits, - _ . only */
    uint64_t used;
    uint64_t context;
    uint64_t peak;
    uint64_t allocs;
    uint64_t frees;
    uint64_t refusals;
    uint64_t refused_bytes;
    uint32_t refused_by;
    uint32_t want;
    uint32_t near;
    uint32_t wants_back;
    uint64_t busy_since;
    uint64_t busy_ns;
    uint64_t launches;
    uint64_t last_launch_ns;
    uint64_t stall_ns;
    uint64_t copied_bytes;
} NbgpuUseRow;

/* Read the head. -EBADMSG: shorter than its head, or no `use` file of a version this library knows. */
NBGPU_EXPORT int nbgpu_use_head(int fd, NbgpuUseHead *out);
/* Read the slots that are taken and ready, in order, at most `max`. Returns how many. -EBADMSG as above. */
NBGPU_EXPORT int nbgpu_use_read(int fd, NbgpuUseRow *out, int max);
/* The words that rise with each refusal, of many files at once, each one cheap read; 0 where a file cannot be read. */
NBGPU_EXPORT void nbgpu_use_events(const int *fds, int count, uint32_t *events);
/* Who holds the record lock of a slot: 0 nobody, a pid in the caller's pid namespace, or this when the holder has none here. */
#define NBGPU_LOCKED_ELSEWHERE 0x7fffffff
/* ... or this when no process holds it but an open file description, wherever its descriptors are. No pid is as high. */
#define NBGPU_LOCKED_BY_NONE 0x7ffffffe
NBGPU_EXPORT int nbgpu_use_locked(int fd, uint32_t slot);

#endif
