#include "sched_policy.h"

#include <string.h>

#define MS 1000000ull
#define WHOLE 1000u
#define SPENT_NS (20 * MS) /* waiters ring again after this long anyway */
#define UNUSED_MOST 5u     /* 20 ms doubled so often */
#define VT_REBASE (INT64_C(1) << 55)

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
        .overlap_ns = or_default(c.overlap_ns, 3 * MS),
        .heartbeat_ns = or_default(c.heartbeat_ns, 200 * MS),
    };
}

static uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static bool is_active(const SchedSlice *s) { return s->joined && (s->seen.want || s->seen.busy || s->phase == PHASE_DRAIN); }

/* P: the time in which every active slice gets one turn. */
static uint64_t period(const SchedDevice *d) {
    uint64_t active = 0;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (s->joined && (is_active(s) || (s->last_active && d->now - s->last_active < d->config.period_ns)))
            active++;
    }
    return max_u64(d->config.period_ns, active * d->config.period_per_slice_ns);
}

static uint64_t turn_length(const SchedDevice *d, const SchedSlice *s) {
    return max_u64(d->config.min_turn_ns, period(d) * s->weight_milli / WHOLE);
}

static bool may_run(const SchedDevice *d, const SchedSlice *s) {
    return s->joined && s->seen.want && !s->suspended && !s->dry && d->now >= s->spent_until;
}

/* Another slice has, or could take, a turn now. */
static bool contested(const SchedDevice *d, int index) {
    for (uint32_t i = 0; i < d->high; i++)
        if ((int)i != index && (d->slice[i].phase == PHASE_OPEN || may_run(d, &d->slice[i])))
            return true;
    return false;
}

/* ---- charging ------------------------------------------------------------------------------------------------------------ */

static bool pays_share(const SchedSlice *s) {
    if (s->phase == PHASE_OUT)
        return s->overran && s->seen.busy;
    return s->phase == PHASE_DRAIN || s->turn_end || s->strict;
}

static void pay(SchedSlice *s, uint64_t vt_ns, uint64_t bucket_ns) {
    s->vt += (int64_t)(vt_ns * WHOLE / s->weight_milli);
    s->charged_ns += vt_ns;
    if (s->strict)
        s->bucket_ns -= (int64_t)bucket_ns;
}

static void refill(const SchedDevice *d, SchedSlice *s, uint64_t ns) {
    int64_t full = (int64_t)(2 * turn_length(d, s));
    s->bucket_ns += (int64_t)(ns * s->weight_milli / WHOLE);
    if (s->bucket_ns > full)
        s->bucket_ns = full;
}

static void rebase(SchedDevice *d) {
    if (d->vt_floor < VT_REBASE)
        return;
    for (uint32_t i = 0; i < d->high; i++)
        d->slice[i].vt -= d->vt_floor;
    d->vt_floor = 0;
}

/* Slices let in together share the time between them: in what they owe each other, not in what a strict one may take, or somebody who never
 * says that it is done would lend it time. What still runs after a device was handed on early (`near`) is paid in full by whose work it is.
 * Time that nobody else wanted is free to a burst slice. */
static void charge(SchedDevice *d, uint64_t now) {
    if (now <= d->now)
        return;
    uint64_t passed = now - d->now, sharing = 0;
    for (uint32_t i = 0; i < d->high; i++)
        sharing += d->slice[i].joined && pays_share(&d->slice[i]);
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (!s->joined)
            continue;
        if (s->strict)
            refill(d, s, passed);
        if (pays_share(s))
            pay(s, passed / sharing, passed);
        else if (s->phase == PHASE_OUT && s->seen.busy)
            pay(s, passed, passed);
        if (is_active(s))
            s->last_active = now;
    }
    d->now = now;
}

/* INT64_MAX when nobody is active. Strict slices count only among themselves: held back by their buckets they fall behind the burst
 * ones for good, and who starts from there would own the device until it had caught up. */
static int64_t least_active_vt(const SchedDevice *d, int except) {
    int64_t burst = INT64_MAX, strict = INT64_MAX;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        int64_t *least = s->strict ? &strict : &burst;
        if ((int)i != except && is_active(s) && s->vt < *least)
            *least = s->vt;
    }
    return burst != INT64_MAX ? burst : strict;
}

/* Nobody saves up more than the lag: at most that far behind the least of the others. */
static void cap_lag(SchedDevice *d, int index) {
    int64_t least = least_active_vt(d, index);
    int64_t floor = (least == INT64_MAX ? d->vt_floor : least) - (int64_t)d->config.lag_ns;
    if (d->slice[index].vt < floor)
        d->slice[index].vt = floor;
}

/* ---- joining, seeing ------------------------------------------------------------------------------------------------------ */

void sched_init(SchedDevice *d, const NbgpuSchedConfig *config, uint64_t now) {
    memset(d, 0, sizeof *d);
    d->config = sched_config(config);
    d->now = now;
    d->wake_at = SCHED_NEVER;
    d->owner = d->guest = SCHED_NOBODY;
}

int sched_join(SchedDevice *d, uint32_t weight_milli, bool strict, uint64_t now) {
    for (uint32_t i = 0; i < SCHED_SLICES; i++) {
        if (d->slice[i].joined)
            continue;
        if (i >= d->high)
            d->high = i + 1;
        charge(d, now);
        d->slice[i] = (SchedSlice){.joined = true, .vt = d->vt_floor, .weight_milli = 1};
        sched_set(d, (int)i, weight_milli, strict, now);
        return (int)i;
    }
    return -1;
}

void sched_leave(SchedDevice *d, int index, uint64_t now) {
    charge(d, now);
    if (d->owner == index)
        d->owner = SCHED_NOBODY;
    if (d->guest == index)
        d->guest = SCHED_NOBODY;
    d->slice[index] = (SchedSlice){0};
}

void sched_set(SchedDevice *d, int index, uint32_t weight_milli, bool strict, uint64_t now) {
    SchedSlice *s = &d->slice[index];
    charge(d, now);
    s->weight_milli = weight_milli < 1 ? 1 : weight_milli > WHOLE ? WHOLE : weight_milli;
    bool was = s->strict;
    s->strict = strict && s->weight_milli < WHOLE; /* strict with the whole device has nothing to be stopped from */
    if (s->strict && !was)
        s->bucket_ns = (int64_t)turn_length(d, s);
    if (!s->strict)
        s->dry = false;
    cap_lag(d, index);
}

void sched_suspend(SchedDevice *d, int index, bool suspended, uint64_t now) {
    charge(d, now);
    d->slice[index].suspended = suspended;
    cap_lag(d, index);
}

void sched_observe(SchedDevice *d, int index, SchedSeen seen, uint64_t now) {
    SchedSlice *s = &d->slice[index];
    charge(d, now);
    if (seen.want && !is_active(s) && s->phase == PHASE_OUT) {
        cap_lag(d, index);
        s->woke = true;
    }
    if (seen.edges != s->seen.edges) {
        s->spent_until = 0;
        if (s->quiet_since)
            s->quiet_since = now;
    }
    if (seen.busy)
        s->unused = 0;
    else
        s->overran = false;
    if (seen.busy)
        s->quiet_since = 0;
    else if (!s->quiet_since)
        s->quiet_since = now;
    s->seen = seen;
}

/* ---- turns ---------------------------------------------------------------------------------------------------------------- */

static void open_gate(SchedDevice *d, int index) {
    SchedSlice *s = &d->slice[index];
    s->phase = PHASE_OPEN;
    s->open_since = d->now;
    s->quiet_since = d->now;
    s->woke = false;
    s->turns++;
}

static uint64_t bucket_lasts(const SchedSlice *s) {
    return s->bucket_ns <= 0 ? 0 : (uint64_t)s->bucket_ns * WHOLE / (WHOLE - s->weight_milli);
}

/* When the owner's turn is to end; 0 = no end. */
static uint64_t plan_end(const SchedDevice *d, int index) {
    const SchedSlice *s = &d->slice[index];
    bool others = contested(d, index);
    if (!s->strict && !others)
        return 0;
    uint64_t end = SCHED_NEVER;
    if (others) {
        end = s->open_since + turn_length(d, s);
        if (!s->turn_end && !s->strict && s->open_since < d->now) { /* it had the device to itself until now */
            int64_t least = least_active_vt(d, index);
            end = least <= s->vt ? d->now : d->now + turn_length(d, s);
        } else if (s->turn_end && !s->strict) {
            end = s->turn_end;
        }
    }
    return s->strict ? min_u64(end, d->now + bucket_lasts(s)) : end;
}

static void close_gate(SchedDevice *d, int index) {
    SchedSlice *s = &d->slice[index];
    if (d->owner == index)
        d->owner = SCHED_NOBODY;
    if (d->guest == index)
        d->guest = SCHED_NOBODY;
    if (s->strict && s->bucket_ns <= 0)
        s->dry = true;
    s->turn_end = 0;
    s->phase = s->seen.busy ? PHASE_DRAIN : PHASE_OUT;
    s->drain_until = d->now + 2 * period(d);
}

/* When an open slice counts as done with its turn, if it stays as quiet as it is; SCHED_NEVER = it is busy. */
static uint64_t quiet_until(const SchedDevice *d, const SchedSlice *s) {
    if (s->seen.busy || !s->quiet_since)
        return SCHED_NEVER;
    return s->quiet_since + (s->seen.want ? 2 * d->config.min_turn_ns : d->config.idle_grace_ns);
}

static void settle_owner(SchedDevice *d) {
    if (d->owner == SCHED_NOBODY)
        return;
    SchedSlice *s = &d->slice[d->owner];
    s->turn_end = plan_end(d, d->owner);
    bool quiet = s->turn_end && d->now >= quiet_until(d, s);
    if (quiet && s->seen.want) /* never came for its turn: dead, or stopped */
        s->spent_until = d->now + (SPENT_NS << (s->unused < UNUSED_MOST ? s->unused++ : UNUSED_MOST));
    if (s->suspended || quiet || (s->turn_end && d->now >= s->turn_end))
        close_gate(d, d->owner);
}

/* The guest goes when it is idle again, and takes the turn when it turns out to have more to do. */
static void settle_guest(SchedDevice *d) {
    if (d->guest == SCHED_NOBODY)
        return;
    int guest = d->guest;
    SchedSlice *s = &d->slice[guest];
    if (s->suspended || d->now >= quiet_until(d, s)) {
        close_gate(d, guest);
    } else if (d->owner == SCHED_NOBODY || d->now >= s->open_since + d->config.overlap_ns) {
        if (d->owner != SCHED_NOBODY)
            close_gate(d, d->owner);
        d->guest = SCHED_NOBODY;
        d->owner = guest;
        s->turn_end = d->now + turn_length(d, s);
    }
}

static bool settle_drains(SchedDevice *d) {
    bool blocked = false;
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (s->phase != PHASE_DRAIN)
            continue;
        if (!s->seen.busy || s->seen.near) {
            s->phase = PHASE_OUT;
        } else if (d->now >= s->drain_until) {
            s->phase = PHASE_OUT;
            s->overran = true;
            s->overruns++;
        } else {
            blocked = true;
        }
    }
    return blocked;
}

static void settle_buckets(SchedDevice *d) {
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (!s->joined || !s->strict)
            continue;
        if (s->dry && s->bucket_ns >= (int64_t)turn_length(d, s))
            s->dry = false;
        if (!s->dry && s->bucket_ns <= 0 && s->phase == PHASE_OUT)
            s->dry = true;
    }
}

static int least_waiting(const SchedDevice *d) {
    int best = SCHED_NOBODY;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (s->phase != PHASE_OUT || !may_run(d, s))
            continue;
        if (best == SCHED_NOBODY || s->vt < d->slice[best].vt)
            best = (int)i;
    }
    return best;
}

static void admit(SchedDevice *d, bool blocked) {
    int next = least_waiting(d);
    if (next == SCHED_NOBODY)
        return;
    SchedSlice *s = &d->slice[next];
    if (d->owner == SCHED_NOBODY && !blocked) {
        open_gate(d, next);
        d->owner = next;
        s->turn_end = plan_end(d, next);
    } else if (d->owner != SCHED_NOBODY && d->guest == SCHED_NOBODY && s->woke && !s->strict &&
               s->vt + (int64_t)d->config.overlap_behind_ns < d->slice[d->owner].vt) {
        open_gate(d, next);
        d->guest = next;
        s->turn_end = d->now + d->config.overlap_ns;
    }
}

static uint64_t next_wake(const SchedDevice *d) {
    uint64_t at = SCHED_NEVER;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (!s->joined)
            continue;
        if (s->phase == PHASE_OPEN && s->turn_end)
            at = min_u64(at, min_u64(s->turn_end, quiet_until(d, s)));
        if (s->phase == PHASE_DRAIN)
            at = min_u64(at, s->drain_until);
        if (s->phase != PHASE_OUT || !s->seen.want || s->suspended)
            continue;
        if (s->dry) {
            int64_t missing = (int64_t)turn_length(d, s) - s->bucket_ns;
            at = min_u64(at, d->now + (missing > 0 ? (uint64_t)missing * WHOLE / s->weight_milli + 1 : 1));
        }
        if (s->spent_until > d->now)
            at = min_u64(at, s->spent_until);
    }
    return at > d->now ? at : d->now + 1;
}

void sched_step(SchedDevice *d, uint64_t now) {
    charge(d, now);
    settle_buckets(d);
    settle_owner(d);
    settle_guest(d);
    bool blocked = settle_drains(d);
    settle_buckets(d);
    admit(d, blocked);
    if (d->owner != SCHED_NOBODY)
        d->slice[d->owner].turn_end = plan_end(d, d->owner);
    int64_t least = least_active_vt(d, SCHED_NOBODY);
    if (least != INT64_MAX && least > d->vt_floor)
        d->vt_floor = least;
    rebase(d);
    d->wake_at = next_wake(d);
}

uint32_t sched_gate(const SchedSlice *s) {
    if (s->suspended)
        return NBGPU_GATE_SUSPENDED;
    return s->phase == PHASE_OPEN ? NBGPU_GATE_OPEN : NBGPU_GATE_CLOSED;
}
