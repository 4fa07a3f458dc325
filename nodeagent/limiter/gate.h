/* What gate.c (who may submit now) and busy.c (what is outstanding on the GPU) share. */
#ifndef NBGPU_GATE_H
#define NBGPU_GATE_H

#include "limiter.h"

#define WINDOW_NS (2 * MS)      /* outstanding work beyond which a thread waits */
#define FENCE_EVERY_NS (MS / 2) /* estimated work between two fences */
#define FENCE_AGE_NS (MS / 5)   /* a launch so long after the last fence gets one: it may be the last for long */
#define NEAR_NS (MS / 2)
#define IDLE_GRACE_NS (MS / 10) /* a queue empty for so long is idle */
#define GATE_WAIT_NS (20 * (long)MS)
#define TURN_LATE_NS (10 * MS)      /* a turn that ended longer ago has no scheduler behind it */
#define TURN_OVER_NS ((long)MS / 2) /* how often to look whether a turn that is over has been made longer */
#ifdef NBGPU_CONTROL_NO_FALLBACK    /* for the test that shows what it is for */
#define HEARTBEAT_NS (3600000 * MS)
#else
#define HEARTBEAT_NS (500 * MS)
#endif

typedef struct {
    CUstream stream;
    bool ptsz;
    CUgraphExec exec; /* NULL: a kernel */
    int device;
    bool gated;
    double estimate_ns;
} Launch;

#define PASSES 8 /* as many as there are words in UseSlot.launches_by_thread */
typedef struct {
    uint64_t *word;         /* where the thread counts its launches */
    _Atomic uint64_t until; /* a launch that makes the count smaller than this needs no look at the books */
    CUstream stream;        /* on which */
    bool given;             /* the rest only with the device's lock */
    uint64_t folded;        /* launches up to this count are in the books */
} Pass;
extern Pass nbgpu_pass[PASSES];
Pass *nbgpu_own_pass(void); /* the calling thread's, NULL: it has none */
void nbgpu_pass_thread_ends(Pass *pass);

/* busy.c; all take the device's own lock */
bool nbgpu_busy_begin(Launch *launch);                      /* before the real call: the slot is busy from here. False: nbgpu_away */
void nbgpu_busy_submitted(const Launch *launch, bool done); /* after it; done: the driver took it */
bool nbgpu_busy_wait_window(int device);                    /* true: waited */
void nbgpu_busy_synced(int device, bool all, CUstream stream, bool ptsz, uint64_t launches_before);
uint64_t nbgpu_busy_launches(int device);
void nbgpu_busy_stream_gone(CUstream stream);
void nbgpu_busy_forget_graph(CUgraphExec exec);
double nbgpu_busy_estimate(int device, CUgraphExec exec);

/* gate.c */
void nbgpu_publish(int device); /* the slice's want, near and idle, from its slots */
void nbgpu_ring(void);
bool nbgpu_contended(int device);    /* the gate is not open, or its turn has an end, or its kernels have turns of their own */
bool nbgpu_kernel_gated(int device); /* its kernels have turns of their own */
bool nbgpu_gate_closed(int device);  /* the slice's or the kernel's */
bool nbgpu_turn_over(int device, uint64_t now);
bool nbgpu_turn_just_over(int device);
bool nbgpu_scheduler_dead(uint64_t now);
bool nbgpu_capturing(CUstream stream, bool ptsz);
bool nbgpu_any_capture(void);
CUresult nbgpu_work_begin(Launch *work, CUstream stream, bool ptsz, CUgraphExec kind);
CUresult nbgpu_work_end(const Launch *work, CUresult result);

#endif
