#include "sched_charge.h"

#define VT_REBASE (INT64_C(1) << 55)
#define LOSS 112u /* one part in so many of a turn may be lost when it changes hands */
#define BROUGHT_MOST (600000 * MS)
#define STRICT_CHANGES 8u /* a strict slice alone has turns as long as if so many shared the device */

static uint64_t or_default(uint64_t value, uint64_t otherwise) { return value ? value : otherwise; }

NbgpuSchedConfig sched_config(const NbgpuSchedConfig *asked) {
    NbgpuSchedConfig c = asked ? *asked : (NbgpuSchedConfig){0};
    return (NbgpuSchedConfig){
        .min_turn_ns = or_default(c.min_turn_ns, 2 * MS),
        .period_ns = or_default(c.period_ns, 30 * MS),
        .period_per_slice_ns = or_default(c.period_per_slice_ns, 7500000),
        .lag_ns = or_default(c.lag_ns, 30 * MS),
        .idle_grace_ns = or_default(c.idle_grace_ns, 300000),
        .overlap_behind_ns = or_default(c.overlap_behind_ns, 1 * MS),
        .overlap_ns = or_default(c.overlap_ns, 10 * MS),
        .heartbeat_ns = or_default(c.heartbeat_ns, 200 * MS),
        .handover_ns = or_default(c.handover_ns, MS / 2),
        .whole_ns = or_default(c.whole_ns, 1000 * MS),
    };
}

/* P: the time in which every active slice gets one turn. Long enough that changing hands costs no more than its part of a turn, and a
 * whole part of the time in which shares are to hold: any such window then holds as many turns of each. */
void sched_measure_period(SchedDevice *d) {
    uint64_t active = 0, milli = 0, strict = 0, whole = d->config.whole_ns;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (!s->joined || !(is_active(s) || (s->last_active && d->now - s->last_active < whole / 4)))
            continue;
        active++;
        strict += s->strict;
        milli += s->weight_milli;
    }
    uint64_t least = max_u64(d->config.period_ns, active * d->config.period_per_slice_ns);
    /* Alone, a strict slice loses what it can't use of an open gate at each turn's ends: few turns. */
    uint64_t lost = active > 1 ? active * (d->config.handover_ns + d->gap_held_ns) : STRICT_CHANGES * strict * d->config.handover_ns;
    uint64_t parts = whole / max_u64(least, lost * LOSS);
    d->period_ns = whole / max_u64(parts, 1);
    d->patience_ns = 2 * least;
    d->active_milli = milli ? (uint32_t)milli : WHOLE;
}

static bool pays_share(const SchedSlice *s) {
    if (s->phase == PHASE_OUT)
        return runs_on(s);
    if (s->phase == PHASE_PAUSE)
        return s->seen.busy;
    return s->phase == PHASE_DRAIN || s->turn_end || s->strict;
}

/* It may compute: nobody says that it has nothing to do and is kept from submitting. */
static bool is_let_in(const SchedSlice *s) { return s->phase == PHASE_OPEN || s->phase == PHASE_DRAIN || s->seen.busy; }

/* Nobody waits for its turn to end: it owes nobody anything, and whoever works beside it has but a part of the GPU. */
static bool has_for_free(const SchedSlice *s) { return s->phase == PHASE_OPEN && s->seen.busy && !pays_share(s); }

static void pay(SchedSlice *s, uint64_t ns) {
    s->vt += (int64_t)(ns * WHOLE / s->weight_milli);
    s->charged_ns += ns;
    if (s->strict)
        s->bucket_ns -= (int64_t)ns;
}

/* Time that nobody else wanted or used: those who are idle meanwhile fall behind as if they had waited, so that who comes to work a little, and
 * less than its share, is let in at once each time. It costs its slice nothing: where others wait for theirs it begins from there. */
static void pass_free(SchedSlice *s, uint64_t ns) {
    const int64_t vt = (int64_t)(ns * WHOLE / s->weight_milli);
    s->vt += vt;
    s->goal += vt;
}

/* Nobody saves up more than two turns. */
static void cap_bucket(const SchedDevice *d, SchedSlice *s) {
    int64_t full = strict_level(d, s) + strict_share(d, s);
    if (s->bucket_ns <= full)
        return;
    s->spilled_ns += (uint64_t)(s->bucket_ns - full);
    s->bucket_ns = full;
}

void sched_rebase(SchedDevice *d) {
    if (d->vt_floor < VT_REBASE)
        return;
    for (uint32_t i = 0; i < d->high; i++) {
        d->slice[i].vt -= d->vt_floor;
        d->slice[i].goal -= d->vt_floor;
    }
    d->vt_floor = 0;
}

/* Slices let in together share the time between them, and each pays its part, a strict one from its bucket too: if it paid for all of it, it
 * would get less than its share beside GPU kernels that outlast their turns. Work behind a closed gate that nobody waits for is paid in full by
 * whose it is, and makes nobody else's time cheaper. Time that nobody else wanted is free to a burst slice (`pass_free`). */
void sched_charge(SchedDevice *d, uint64_t now) {
    if (now <= d->now)
        return;
    uint64_t passed = now - d->now, sharing = 0, busy = 0;
    for (uint32_t i = 0; i < d->high; i++) {
        sharing += d->slice[i].joined && (pays_share(&d->slice[i]) || has_for_free(&d->slice[i]));
        busy += d->slice[i].joined && d->slice[i].seen.busy;
    }
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (!s->joined)
            continue;
        if (s->strict)
            s->bucket_ns += (int64_t)(passed * s->weight_milli / WHOLE);
        if (pays_share(s))
            pay(s, passed / sharing);
        else if (s->phase == PHASE_OUT && s->seen.busy)
            pay(s, passed);
        else if (busy == 1 && has_for_free(s))
            pass_free(s, passed);
        if (s->strict)
            cap_bucket(d, s);
        if (is_active(s))
            s->last_active = now;
        if (is_let_in(s))
            s->held_ns += passed;
    }
    d->now = now;
}

void sched_owe(SchedDevice *d, int index, uint64_t ns, uint64_t now) {
    sched_charge(d, now);
    ns = min_u64(ns, d->config.whole_ns); /* what nobody can have taken at once is a mistake */
    SchedSlice *debtor = &d->slice[index];
    pay(debtor, ns);
    uint64_t milli = 0;
    for (uint32_t i = 0; i < d->high; i++)
        milli += is_active(&d->slice[i]) && (int)i != index ? d->slice[i].weight_milli : 0;
    if (!milli)
        return;
    /* Others computed so much less than they paid for, each by its weight: they are given it back, burst ones by its being further ahead. */
    debtor->vt += (int64_t)(ns * WHOLE / milli);
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (!s->strict || !is_active(s) || (int)i == index)
            continue;
        s->bucket_ns += (int64_t)(ns * s->weight_milli / milli);
        cap_bucket(d, s);
    }
}

/* INT64_MAX when nobody is active. Strict slices count only among themselves: held back by their buckets they fall behind the burst
 * ones for good, and who starts from there would own the device until it had caught up. */
int64_t sched_least_vt(const SchedDevice *d, int except) {
    int64_t burst = INT64_MAX, strict = INT64_MAX;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        int64_t *least = s->strict ? &strict : &burst;
        if ((int)i != except && is_active(s) && s->vt < *least)
            *least = s->vt;
    }
    return burst != INT64_MAX ? burst : strict;
}

/* Where everybody would be if they shared the device at every moment: the mean of the others, by weight. */
static int64_t fair_vt(const SchedDevice *d, int except) {
    double sum = 0, milli = 0;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if ((int)i == except || !is_active(s) || s->strict)
            continue;
        sum += (double)(s->vt - d->vt_floor) * s->weight_milli;
        milli += s->weight_milli;
    }
    return milli > 0 ? d->vt_floor + (int64_t)(sum / milli) : d->vt_floor;
}

uint64_t sched_ahead(const SchedDevice *d, int index) {
    const SchedSlice *s = &d->slice[index];
    const int64_t ahead = s->strict ? -s->bucket_ns : (s->vt - fair_vt(d, index)) / WHOLE * s->weight_milli;
    return ahead > 0 ? (uint64_t)ahead : 0;
}

void sched_bring(SchedDevice *d, int index, uint64_t ns, uint64_t now) {
    sched_charge(d, now);
    ns = min_u64(ns, BROUGHT_MOST);
    pay(&d->slice[index], ns);
}

/* Nobody saves up more than the lag. */
void sched_cap_lag(SchedDevice *d, int index) {
    int64_t floor = fair_vt(d, index) - (int64_t)d->config.lag_ns;
    SchedSlice *s = &d->slice[index];
    if (s->vt >= floor)
        return;
    s->goal += floor - s->vt; /* what it owes or is owed beyond its last turn stays the same */
    s->vt = floor;
}

/* How far a slice is behind, beyond what lets it in beside the owner; 0 or less: it waits. */
int64_t sched_is_behind(const SchedDevice *d, int index) {
    return fair_vt(d, index) - d->slice[index].vt - (int64_t)d->config.overlap_behind_ns;
}

/* A burst slice whose work outlasts its turns comes back after the whole periods that its goal then skips, and the one of its next turn:
 * strict slices can't make up for it in any other way when all time is theirs. No sooner, for part of those periods has passed while its
 * work drained, and strict turns may be a quarter longer than usual. Where strict slices have had theirs it need not wait. */
bool sched_owes_strict(const SchedDevice *d, const SchedSlice *s) {
    int64_t skipped = nearest(s->vt - s->goal, stride(d)) / stride(d);
    return skipped > 0 && d->now - s->closed_at < d->period_ns * (uint64_t)(skipped + 1);
}
