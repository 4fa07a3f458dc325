/* What busy.c (fences, and the thread that looks at them) and pass.c (launches that go unlooked at) share: the books of one device. */
#ifndef NBGPU_BUSY_H
#define NBGPU_BUSY_H

#include "gate.h"

#define FENCES 128
#define STREAMS 32
#define GRAPHS 64
#define LEARNT_AFTER 8

typedef struct {
    CUevent event;
    CUstream stream;
    CUgraphExec exec; /* of the only launch that it covers, NULL: kernels */
    double work_ns;
    uint32_t launches;
    uint64_t at_ns;
    bool queued; /* the one before it was not done when this one was recorded: the time between the two is its work alone */
} Fence;

typedef struct {
    CUstream stream;
    bool ptsz;
    double work_ns; /* since its last fence */
    uint32_t launches;
    uint64_t fenced_at, last_ns;
} Stream;

typedef struct {
    pthread_mutex_t lock;
    _Atomic(CUcontext) context;
    _Atomic bool busy;
    uint64_t began_ns, drained_ns; /* drained 0: work is outstanding */
    uint64_t front_ns;             /* since when the oldest fence's work runs, at the earliest */
    _Atomic uint64_t launches;
    Fence fence[FENCES]; /* outstanding, in the order of recording */
    int fences;
    Stream stream[STREAMS];
    int streams;
    CUevent start, last, spare[FENCES];
    int spares;
    bool have_start;
    double done_ns; /* of this interval: work that is done, measured where it can be */
    double mean_ns;
    uint32_t learnt;
    struct {
        CUgraphExec exec;
        double mean_ns;
    } graph[GRAPHS];
    int graphs;
} Busy;

extern Busy nbgpu_busy[NBGPU_DEVICES];

/* All of these with the device's lock held. */
Stream *nbgpu_stream_entry(Busy *b, CUstream stream, bool ptsz);
double nbgpu_outstanding_ns(const Busy *b, uint64_t now, uint32_t *launches);
bool nbgpu_overdue(const Busy *b, uint64_t now);
uint32_t nbgpu_pass_fold(Busy *b, uint64_t now);
void nbgpu_pass_grant(Busy *b, const Launch *launch, uint64_t now);
void nbgpu_pass_stop(Busy *b, const Pass *only, uint64_t now);
void nbgpu_pass_stop_stream(Busy *b, CUstream stream, uint64_t now);

#endif
