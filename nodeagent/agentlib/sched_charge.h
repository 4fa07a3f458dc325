/* What sched_policy.c (turns) and sched_charge.c (who pays what, and how long a period is) share. Pure, as sched_policy.h says. */
#ifndef NBGPU_SCHED_CHARGE_H
#define NBGPU_SCHED_CHARGE_H
#include "sched_policy.h"

#define MS 1000000ull
#define WHOLE 1000u

static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline bool is_active(const SchedSlice *s) { return s->joined && (s->seen.want || s->seen.busy || s->phase == PHASE_DRAIN); }

/* Work of its last turn still computes, beside others' turns. */
static inline bool runs_on(const SchedSlice *s) { return s->overran && s->seen.busy; }

/* A period in virtual time. */
static inline int64_t stride(const SchedDevice *d) { return (int64_t)(d->period_ns * WHOLE / d->active_milli); }

static inline int64_t nearest(int64_t vt, int64_t stride_ns) {
    int64_t steps = (vt + stride_ns / 2) / stride_ns;
    return steps * stride_ns;
}

static inline int64_t strict_share(const SchedDevice *d, const SchedSlice *s) { return (int64_t)(d->period_ns * s->weight_milli / WHOLE); }

/* What a strict slice's bucket is to hold when its turn begins: what the turn takes out beyond what flows in, and a reserve. */
static inline int64_t strict_level(const SchedDevice *d, const SchedSlice *s) {
    int64_t share = strict_share(d, s);
    return share * (WHOLE - s->weight_milli) / WHOLE + share / 4;
}

/* Its longest turn. */
static inline int64_t strict_most(const SchedDevice *d, const SchedSlice *s) { return strict_share(d, s) * 5 / 4; }

void sched_measure_period(SchedDevice *d);
/* Virtual time from 0 on again, before it runs over. */
void sched_rebase(SchedDevice *d);
int64_t sched_least_vt(const SchedDevice *d, int except);
void sched_cap_lag(SchedDevice *d, int index);
int64_t sched_is_behind(const SchedDevice *d, int index);

#endif
