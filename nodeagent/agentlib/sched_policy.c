#include <string.h>

#include "sched_charge.h"

#define SPENT_NS (20 * MS) /* waiters ring again after this long anyway */
#define UNUSED_MOST 5u     /* 20 ms doubled so often */
#define COMES_TURNS 40u    /* shortest turns: most turns are not longer */
#define GAP_MOST (MS)      /* a longer one is no hand-over but a pause */
#define GAP_MEMORY 256u    /* turns that the mean is of */
#define GAP_LEAST 8u       /* before so many it is nothing yet, */
#define GAP_TURNS 16u      /* ...and then looked for in one turn of so many only */
#define GAP_STEP 50000u    /* P follows the mean in steps, or it would never be the same twice */
#define LATE_NS (5 * MS)   /* after a turn's end its slice's ring is waited for so long, less than the limiter's 10 ms (gate.h) */
#define SOON_NS 100000u    /* no look again before that */
#define SAME_NS 10000u     /* turn ends closer than this are one */

static bool may_run(const SchedDevice *d, const SchedSlice *s) {
    return s->joined && s->seen.want && !s->suspended && !s->dry && d->now >= s->spent_until;
}

/* Another slice has, or could take, a turn now, or gave its own up for this one. */
static bool contested(const SchedDevice *d, int index) {
    for (uint32_t i = 0; i < d->high; i++)
        if ((int)i != index && (d->slice[i].phase == PHASE_OPEN || d->slice[i].phase == PHASE_DRAIN || may_run(d, &d->slice[i])))
            return true;
    return false;
}

/* ---- joining, seeing ------------------------------------------------------------------------------------------------------ */

void sched_init(SchedDevice *d, const NbgpuSchedConfig *config, uint64_t now) {
    memset(d, 0, sizeof *d);
    d->config = sched_config(config);
    d->now = now;
    d->wake_at = SCHED_NEVER;
    d->owner = d->guest = SCHED_NOBODY;
    d->idle_since = now;
    sched_measure_period(d);
}

int sched_join(SchedDevice *d, uint32_t weight_milli, bool strict, uint64_t now) {
    for (uint32_t i = 0; i < SCHED_SLICES; i++) {
        if (d->slice[i].joined)
            continue;
        if (i >= d->high)
            d->high = i + 1;
        sched_charge(d, now);
        d->slice[i] = (SchedSlice){.joined = true, .vt = d->vt_floor, .goal = d->vt_floor, .closed_at = now, .weight_milli = 1};
        sched_set(d, (int)i, weight_milli, strict, now);
        sched_cap_lag(d, (int)i);
        return (int)i;
    }
    return -1;
}

void sched_leave(SchedDevice *d, int index, uint64_t now) {
    sched_charge(d, now);
    if (d->owner == index)
        d->owner = SCHED_NOBODY;
    if (d->guest == index)
        d->guest = SCHED_NOBODY;
    d->slice[index] = (SchedSlice){0};
}

void sched_set(SchedDevice *d, int index, uint32_t weight_milli, bool strict, uint64_t now) {
    SchedSlice *s = &d->slice[index];
    sched_charge(d, now);
    s->weight_milli = weight_milli < 1 ? 1 : weight_milli > WHOLE ? WHOLE : weight_milli;
    bool was = s->strict;
    s->strict = strict && s->weight_milli < WHOLE; /* strict with the whole device has nothing to be stopped from */
    if (s->strict && !was) {
        s->bucket_ns = strict_level(d, s);
        s->strict_end = now + (uint64_t)strict_share(d, s);
    }
    if (!s->strict)
        s->dry = false;
    if (s->strict != was)
        sched_cap_lag(d, index);
}

void sched_suspend(SchedDevice *d, int index, bool suspended, uint64_t now) {
    sched_charge(d, now);
    d->slice[index].suspended = suspended;
    sched_cap_lag(d, index);
}

static bool has_gap(const SchedSlice *s) { return s->joined && s->gaps >= GAP_LEAST; }

/* The median of what slices say, of two the lower: no word of one makes P longer than another's does. */
static uint64_t middle_gap(const SchedDevice *d) {
    uint64_t middle = GAP_MOST;
    uint32_t known = 0;
    for (uint32_t i = 0; i < d->high; i++)
        known += has_gap(&d->slice[i]);
    for (uint32_t i = 0; i < d->high; i++) {
        uint32_t below = 0;
        for (uint32_t j = 0; j < d->high; j++)
            below += has_gap(&d->slice[j]) && d->slice[j].gap_ns <= d->slice[i].gap_ns;
        if (has_gap(&d->slice[i]) && 2 * below >= known)
            middle = min_u64(middle, d->slice[i].gap_ns);
    }
    return middle;
}

/* The GPU went from one slice's work to another's: how long had it nothing to do? */
static void learn_gap(SchedDevice *d, SchedSlice *s, uint64_t busy_since) {
    if (!s->fresh)
        return;
    s->fresh = false;
    if (!busy_since || !s->turn_end)
        return;
    uint64_t from = max_u64(d->idle_since, s->open_since);
    uint64_t gap = d->idle_since && busy_since > from ? busy_since - from : 0;
    if (gap > 2 * d->config.min_turn_ns) /* what it submitted first may be done already */
        return;
    s->gaps += s->gaps < GAP_MEMORY;
    s->gap_ns = (s->gap_ns * (s->gaps - 1) + min_u64(gap, GAP_MOST)) / s->gaps;
    if (s->gaps < GAP_LEAST)
        return;
    /* Of a few it may be a little more, and P should not change again: that shifts shares once. */
    uint64_t gap_ns = middle_gap(d), held = (gap_ns * 5 / 4 / GAP_STEP + 1) * GAP_STEP, apart = 3 * GAP_STEP;
    if (s->gaps == GAP_LEAST || gap_ns > d->gap_held_ns + apart || held + apart < d->gap_held_ns)
        d->gap_held_ns = held;
}

static void note_idle(SchedDevice *d) {
    for (uint32_t i = 0; i < d->high; i++)
        if (d->slice[i].joined && d->slice[i].seen.busy) {
            d->idle_since = 0;
            return;
        }
    if (!d->idle_since)
        d->idle_since = d->now;
}

void sched_observe(SchedDevice *d, int index, SchedSeen seen, uint64_t now) {
    SchedSlice *s = &d->slice[index];
    sched_charge(d, now);
    if (seen.want && !is_active(s) && s->phase == PHASE_OUT) {
        sched_cap_lag(d, index);
        s->woke = true;
        s->woke_at = now;
    }
    if (seen.edges != s->seen.edges) {
        s->spent_until = 0;
        if (s->quiet_since)
            s->quiet_since = now;
    }
    if (seen.busy) {
        s->unused = 0;
        learn_gap(d, s, seen.busy_since);
    } else {
        s->overran = false;
        s->was_idle = true;
    }
    if (index == d->owner && d->guest != SCHED_NOBODY && s->seen.busy && !seen.busy && now < d->slice[d->guest].open_since + d->patience_ns)
        d->guest_since = now; /* all of it was done only now, and no step between */
    if (seen.busy || seen.peer)
        s->quiet_since = 0;
    else if (!s->quiet_since)
        s->quiet_since = now;
    s->seen = seen;
    note_idle(d);
}

/* ---- turns ---------------------------------------------------------------------------------------------------------------- */

/* To the end of the period that its virtual time is in, so that what was taken too much or too little is made up for in the next turn; on
 * past periods that it lags behind everybody. */
static int64_t goal_of(const SchedDevice *d, int index) {
    int64_t step = stride(d), own = nearest(d->slice[index].vt, step) + step, least = INT64_MAX;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if ((int)i == index || !may_run(d, s))
            continue;
        if (s->strict)
            return own;
        if (s->vt < least)
            least = s->vt;
    }
    if (least == INT64_MAX)
        return own;
    int64_t theirs = nearest(least, step);
    return theirs > own ? theirs : own;
}

/* Beside what outlasted its turn a slice pays half, and would have its turn for twice as long: what it gets too little of it gets in the next.
 * One that catches up with somebody far ahead keeps nobody waiting. */
static uint64_t latest_end(const SchedDevice *d, const SchedSlice *s) {
    if (s->goal - s->vt > 2 * stride(d))
        return SCHED_NEVER;
    return d->now + max_u64(d->config.min_turn_ns, d->period_ns * s->weight_milli / d->active_milli * 4 / 3);
}

static void open_gate(SchedDevice *d, int index) {
    SchedSlice *s = &d->slice[index];
    s->phase = PHASE_OPEN;
    s->open_since = d->now;
    s->quiet_since = d->now;
    s->woke = s->overran = false;
    s->was_idle = !s->seen.busy;
    s->fresh = true;
    s->turns++;
    s->goal = goal_of(d, index);
    s->turn_most = latest_end(d, s);
    if (s->strict) {
        int64_t turn = s->bucket_ns + strict_share(d, s) - strict_level(d, s), most = strict_most(d, s);
        s->strict_end = d->now + max_u64(d->config.min_turn_ns, turn < 0 ? 0 : (uint64_t)(turn < most ? turn : most));
    }
}

static uint64_t bucket_lasts(const SchedSlice *s) {
    return s->bucket_ns <= 0 ? 0 : (uint64_t)s->bucket_ns * WHOLE / (WHOLE - s->weight_milli);
}

static uint64_t turn_left(const SchedDevice *d, const SchedSlice *s) {
    int64_t left = s->goal - s->vt;
    uint64_t ns = left > 0 ? (uint64_t)left / WHOLE * s->weight_milli : 0;
    uint64_t used = d->now - s->open_since;
    return used < d->config.min_turn_ns ? max_u64(ns, d->config.min_turn_ns - used) : ns;
}

/* A strict slice that had its whole turn waits, and its next period has begun. */
static bool strict_is_due(const SchedDevice *d) {
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (s->strict && s->phase == PHASE_OUT && may_run(d, s) && s->dry_until > s->closed_at)
            return true;
    }
    return false;
}

/* When the owner's turn is to end; 0 = no end. */
static uint64_t plan_end(SchedDevice *d, int index) {
    SchedSlice *s = &d->slice[index];
    if (s->strict) { /* P may be shorter by now: it was alone, and has company */
        uint64_t most = max_u64(d->config.min_turn_ns, (uint64_t)strict_most(d, s));
        return min_u64(min_u64(s->strict_end, s->open_since + most), d->now + bucket_lasts(s));
    }
    if (!contested(d, index))
        return 0;
    if (!s->turn_end && s->open_since < d->now) { /* it had the device to itself until now */
        bool ahead = strict_is_due(d) || sched_least_vt(d, index) <= s->vt;
        s->goal = ahead ? s->vt : goal_of(d, index);
        s->turn_most = latest_end(d, s);
        if (ahead)
            return d->now;
    }
    if (s->goal > s->vt + stride(d)) { /* somebody may have come to wait since */
        s->goal = goal_of(d, index);
        if (s->turn_most == SCHED_NEVER)
            s->turn_most = latest_end(d, s);
    }
    uint64_t end = max_u64(d->now, min_u64(s->turn_most, d->now + turn_left(d, s)));
    bool same = s->turn_end && end + SAME_NS > s->turn_end && end < s->turn_end + SAME_NS;
    return same ? s->turn_end : end;
}

/* It had its turn: no other before the period after that for which it had it, or the one by when its bucket has enough again. Periods
 * begin at the same time for everybody, so that any window of whole periods holds as much of it. */
static void run_dry(const SchedDevice *d, SchedSlice *s) {
    uint64_t p = d->period_ns, next = (s->dry_until / p + 1) * p;
    if (next + p < d->now)
        next = d->now / p * p;
    /* Where that period has long begun, somebody's long GPU kernels cost it that time: what the bucket holds now counts. */
    const uint64_t from = d->now > next + p / 4 ? d->now : next;
    int64_t then = s->bucket_ns + ((int64_t)from - (int64_t)d->now) * s->weight_milli / WHOLE, missing = strict_level(d, s) / 4 - then;
    if (missing > 0)
        next = ((from + (uint64_t)missing * WHOLE / s->weight_milli) / p + 1) * p;
    s->dry_until = next;
    s->dry = d->now < next;
}

static void close_gate(SchedDevice *d, int index) {
    SchedSlice *s = &d->slice[index];
    if (d->owner == index)
        d->owner = SCHED_NOBODY;
    if (d->guest == index)
        d->guest = SCHED_NOBODY;
    if (s->strict && (s->bucket_ns <= 0 || d->now >= s->strict_end))
        run_dry(d, s);
    s->turn_end = 0;
    s->closed_at = d->now;
    s->phase = s->seen.busy ? PHASE_DRAIN : PHASE_OUT;
    s->drain_until = d->now + d->patience_ns;
}

/* How long it may take to come for its turn. Who came for its last one is believed for as long as most turns last, so that nobody need wake
 * to see it come; time that it lets pass is its own. */
static uint64_t comes_within(const SchedDevice *d, const SchedSlice *s) {
    const bool believed = !s->unused && d->owner != SCHED_NOBODY && s == &d->slice[d->owner];
    return (believed ? COMES_TURNS : 2) * d->config.min_turn_ns;
}

/* When an open slice counts as done with its turn, if it stays as quiet as it is; SCHED_NEVER = it is busy. */
static uint64_t quiet_until(const SchedDevice *d, const SchedSlice *s) {
    if (s->seen.busy || s->seen.peer || !s->quiet_since)
        return SCHED_NEVER;
    return s->quiet_since + (s->seen.want ? comes_within(d, s) : d->config.idle_grace_ns);
}

/* How long it is believed that work which outlasted its turn still computes: two GPU kernels of a second, with half of the GPU. */
static uint64_t believed_until(const SchedDevice *d, const SchedSlice *s) { return s->closed_at + 4 * d->config.whole_ns; }

static void settle_owner(SchedDevice *d) {
    if (d->owner == SCHED_NOBODY)
        return;
    SchedSlice *s = &d->slice[d->owner];
    if (s->phase == PHASE_PAUSE) {
        if (s->suspended)
            close_gate(d, d->owner);
        return;
    }
    s->turn_end = plan_end(d, d->owner);
    bool quiet = s->turn_end && d->now >= quiet_until(d, s);
    if (quiet && s->seen.want) /* never came for its turn: dead, or stopped */
        s->spent_until = d->now + (SPENT_NS << (s->unused < UNUSED_MOST ? s->unused++ : UNUSED_MOST));
    if (s->suspended || quiet || (s->turn_end && d->now >= s->turn_end))
        close_gate(d, d->owner);
}

/* The guest goes when it is idle again; when it turns out to have more to do it takes the turn, if it is still behind. */
static void settle_guest(SchedDevice *d) {
    if (d->guest == SCHED_NOBODY)
        return;
    int guest = d->guest;
    SchedSlice *s = &d->slice[guest];
    /* Its time counts from when what the owner had submitted is done. */
    if (d->owner != SCHED_NOBODY && d->slice[d->owner].seen.busy && d->now < s->open_since + d->patience_ns)
        d->guest_since = d->now;
    if (s->suspended || d->now >= quiet_until(d, s)) {
        close_gate(d, guest);
    } else if (d->owner == SCHED_NOBODY) {
        d->guest = SCHED_NOBODY;
        d->owner = guest;
    } else if (d->now >= d->guest_since + d->config.overlap_ns) {
        if (sched_is_behind(d, guest) > 0) {
            close_gate(d, d->owner);
            d->guest = SCHED_NOBODY;
            d->owner = guest;
        } else {
            close_gate(d, guest);
        }
    }
}

/* The owner submits nothing while its guest has work to do. */
static void settle_pause(SchedDevice *d, bool blocked) {
    if (d->owner == SCHED_NOBODY)
        return;
    SchedSlice *s = &d->slice[d->owner];
    const SchedSeen *guest = d->guest != SCHED_NOBODY ? &d->slice[d->guest].seen : NULL;
    bool wait = guest ? guest->want || guest->busy : blocked && s->phase == PHASE_PAUSE;
    if (wait) {
        s->phase = PHASE_PAUSE;
    } else if (s->phase == PHASE_PAUSE) {
        s->phase = PHASE_OPEN;
        s->quiet_since = s->seen.busy ? 0 : d->now;
    }
}

/* Who says for ever that it is busy, as a process that is stopped does, is not believed a second time before it has said that it is idle:
 * beside it others pay for all of their time, or it would lend them its own, and a strict slice had more than its share. */
static bool settle_drains(SchedDevice *d) {
    bool blocked = false;
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (s->overran && d->now >= believed_until(d, s))
            s->overran = false;
        if (s->phase != PHASE_DRAIN)
            continue;
        if (!s->seen.busy) {
            s->phase = PHASE_OUT;
        } else if (d->now >= s->drain_until) {
            s->phase = PHASE_OUT;
            s->overran = s->was_idle;
            s->overruns++;
        } else {
            blocked = true;
        }
    }
    return blocked;
}

/* ...or sooner, when its bucket holds more than a turn takes: weights and periods change. */
static uint64_t dry_ends(const SchedDevice *d, const SchedSlice *s) {
    int64_t missing = strict_level(d, s) + strict_share(d, s) / 4 - s->bucket_ns;
    return missing <= 0 ? d->now : min_u64(s->dry_until, d->now + (uint64_t)missing * WHOLE / s->weight_milli + 1);
}

static void settle_buckets(SchedDevice *d) {
    for (uint32_t i = 0; i < d->high; i++) {
        SchedSlice *s = &d->slice[i];
        if (!s->joined || !s->strict)
            continue;
        if (s->dry && d->now >= dry_ends(d, s))
            s->dry = false;
        if (!s->dry && s->bucket_ns <= 0 && s->phase == PHASE_OUT)
            run_dry(d, s);
    }
}

/* Not since when it was idle: who waits would have to wait for everybody who comes. */
static uint64_t waits_since(const SchedSlice *s) { return max_u64(s->closed_at, s->woke_at); }

/* Of two alike, who had fewer periods comes first; of two with as many, who waits longer: so the order stays the same, and with it what falls
 * into any window of time. A strict slice that is not dry is due. */
static bool comes_before(const SchedDevice *d, const SchedSlice *a, const SchedSlice *b) {
    int64_t step = stride(d), x = a->strict ? 0 : nearest(a->vt, step), y = b->strict ? 0 : nearest(b->vt, step);
    return x != y ? x < y : waits_since(a) != waits_since(b) ? waits_since(a) < waits_since(b) : a->vt < b->vt;
}

/* Who comes next: a burst slice or a strict one, whose turn is longer ago. Not whose last turn's work still computes: it would never be seen
 * to end. */
static int least_waiting(const SchedDevice *d) {
    enum { BURST, STRICT, OWING, KINDS };
    int best[KINDS] = {SCHED_NOBODY, SCHED_NOBODY, SCHED_NOBODY};
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        int *of = &best[s->strict ? STRICT : sched_owes_strict(d, s) ? OWING : BURST];
        if (s->phase == PHASE_OUT && may_run(d, s) && !runs_on(s) && (*of == SCHED_NOBODY || comes_before(d, s, &d->slice[*of])))
            *of = (int)i;
    }
    int burst = best[BURST], owing = best[OWING], strict = best[STRICT];
    if (strict == SCHED_NOBODY && burst != SCHED_NOBODY && owing != SCHED_NOBODY)
        return comes_before(d, &d->slice[owing], &d->slice[burst]) ? owing : burst;
    if (strict == SCHED_NOBODY)
        return burst != SCHED_NOBODY ? burst : owing;
    return burst == SCHED_NOBODY || d->slice[strict].closed_at < d->slice[burst].closed_at ? strict : burst;
}

/* Who woke and is furthest behind. */
static int most_behind(const SchedDevice *d) {
    int best = SCHED_NOBODY;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (s->phase != PHASE_OUT || !may_run(d, s) || !s->woke || s->strict || sched_is_behind(d, (int)i) <= 0)
            continue;
        if (best == SCHED_NOBODY || s->vt < d->slice[best].vt)
            best = (int)i;
    }
    return best;
}

static void admit(SchedDevice *d, bool blocked) {
    int next = blocked || d->owner != SCHED_NOBODY ? SCHED_NOBODY : least_waiting(d);
    if (next == SCHED_NOBODY && d->guest == SCHED_NOBODY)
        next = most_behind(d);
    if (next == SCHED_NOBODY)
        return;
    open_gate(d, next);
    if (d->owner == SCHED_NOBODY) {
        d->owner = next;
        d->slice[next].turn_end = plan_end(d, next);
    } else {
        d->guest = next;
        d->guest_since = d->now;
    }
}

/* When to look how long the GPU had nothing to do before this turn's first work: at the turn's end that can be seen no more. */
static uint64_t gap_seen_at(const SchedDevice *d, const SchedSlice *s) {
    const bool asked = s->fresh && (s->gaps < GAP_LEAST || s->turns % GAP_TURNS == 0);
    const uint64_t at = s->open_since + d->config.min_turn_ns;
    return asked && at > d->now ? at : SCHED_NEVER;
}

static uint64_t next_wake(const SchedDevice *d) {
    uint64_t at = d->guest == SCHED_NOBODY ? SCHED_NEVER : d->guest_since + d->config.overlap_ns;
    for (uint32_t i = 0; i < d->high; i++) {
        const SchedSlice *s = &d->slice[i];
        if (!s->joined)
            continue;
        if (s->phase == PHASE_OPEN && s->turn_end)
            at = min_u64(at, min_u64(s->turn_end, min_u64(quiet_until(d, s), gap_seen_at(d, s))));
        if (s->phase == PHASE_DRAIN)
            at = min_u64(at, s->drain_until);
        if (s->phase != PHASE_OUT || !s->seen.want || s->suspended)
            continue;
        if (runs_on(s))
            at = min_u64(at, believed_until(d, s));
        if (s->dry)
            at = min_u64(at, dry_ends(d, s));
        else if (s->woke && !s->strict && d->guest == SCHED_NOBODY) {
            int64_t missing = -sched_is_behind(d, (int)i);
            if (missing >= 0)
                at = min_u64(at, d->now + max_u64((uint64_t)missing * d->active_milli / WHOLE, SOON_NS));
        }
        if (s->spent_until > d->now)
            at = min_u64(at, s->spent_until);
    }
    return at > d->now ? at : d->now + 1;
}

/* A slice knows when its turn ends, stops by itself and rings when its work is done: that one wake is for both, unless it does not come.
 * Who has rung in its turn that nothing is outstanding has nothing left to ring. A strict slice's turn ends on time, for by its bucket then is decided in
 * which period it has the next. */
uint64_t sched_wake_at(const SchedDevice *d) {
    const SchedSlice *owner = d->owner != SCHED_NOBODY && d->guest == SCHED_NOBODY ? &d->slice[d->owner] : NULL;
    const bool rings = owner && !owner->strict && owner->quiet_since <= owner->open_since + SOON_NS; /* it is looked at as it begins */
    return rings && d->wake_at == owner->turn_end ? d->wake_at + LATE_NS : d->wake_at;
}

void sched_step(SchedDevice *d, uint64_t now) {
    sched_charge(d, now);
    sched_measure_period(d);
    settle_buckets(d);
    settle_owner(d);
    settle_guest(d);
    bool blocked = settle_drains(d);
    settle_buckets(d);
    admit(d, blocked);
    settle_pause(d, blocked);
    if (d->guest != SCHED_NOBODY)
        d->slice[d->guest].turn_end = d->guest_since + d->config.overlap_ns;
    if (d->owner != SCHED_NOBODY && d->slice[d->owner].phase == PHASE_OPEN)
        d->slice[d->owner].turn_end = plan_end(d, d->owner);
    int64_t least = sched_least_vt(d, SCHED_NOBODY);
    if (least != INT64_MAX && least > d->vt_floor)
        d->vt_floor = least;
    sched_rebase(d);
    d->wake_at = next_wake(d);
}

/* A strict slice has its turn, or waits for it longer than this burst one: pulls that went before it could take all of its time, for its vt
 * says nothing beside a burst slice's, whoever's that is. */
static bool strict_comes_first(const SchedDevice *d, int index) {
    const SchedSlice *s = &d->slice[index];
    for (uint32_t i = 0; i < d->high && !s->strict; i++) {
        const SchedSlice *other = &d->slice[i];
        if ((int)i == index || !other->joined || !other->strict)
            continue;
        if (other->phase == PHASE_OPEN || other->phase == PHASE_PAUSE ||
            (other->phase == PHASE_OUT && may_run(d, other) && other->closed_at < s->closed_at))
            return true;
    }
    return false;
}

bool sched_pull(SchedDevice *d, int index, uint64_t now) {
    SchedSlice *s = &d->slice[index];
    sched_charge(d, now);
    if (s->phase == PHASE_OPEN || s->phase == PHASE_PAUSE || !may_run(d, s) || strict_comes_first(d, index))
        return false;
    int64_t least = sched_least_vt(d, index);
    if (least < s->vt - stride(d)) /* its part here is smaller than there: others have their share first */
        return false;
    if (d->guest != SCHED_NOBODY)
        close_gate(d, d->guest);
    if (d->owner != SCHED_NOBODY)
        close_gate(d, d->owner);
    open_gate(d, index);
    d->owner = index;
    s->turn_end = plan_end(d, index);
    d->wake_at = next_wake(d);
    return true;
}

bool sched_close(SchedDevice *d, int index, uint64_t now) {
    SchedSlice *s = &d->slice[index];
    sched_charge(d, now);
    if (s->phase != PHASE_OPEN || !contested(d, index))
        return false;
    close_gate(d, index);
    d->wake_at = now; /* somebody is next */
    return true;
}

uint32_t sched_gate(const SchedSlice *s) {
    if (s->suspended)
        return NBGPU_GATE_SUSPENDED;
    return s->phase == PHASE_OPEN ? NBGPU_GATE_OPEN : NBGPU_GATE_CLOSED;
}
