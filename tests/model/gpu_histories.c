/* Random histories in virtual time: slices come, go, are resized, suspended, killed in mid-turn, run GPU kernels of any length; and after
 * each a calm in which everybody computes. What must hold: nobody who is due waits longer than two periods, the GPU does not idle while
 * somebody waits, and in the calm every share comes out. A history is a function of its seed. */
#include "gpu_sim.h"

#define MS 1000000ull
#define WHOLE_MILLI 1000u
#define STORM_EVENTS 30
/* To pay back what long GPU kernels took in the storm, at most. */
#define CALM_SETTLE_NS (40000 * MS)
#define CALM_NS (10000 * MS)
/* The hundredth of the time that changing hands may cost falls on anybody; and a turn at the edge of the calm may fall in or out. */
#define CALM_POINTS 1.0
/* The GPU idle, and somebody waits: twice the shortest turn, after which one who does not come for its turn loses it, and the reports of it. */
#define LOST_NS (5 * MS)
/* Of the longest P since the slice began to wait: others' turns, half as long again at most, and between them what outlasts them. */
#define STARVED_PERIODS 2
/* Who does not stop by itself at its turn's end has 5 ms more, and two GPU kernels, or one and 2 ms, outstanding then. */
#define RUNS_ON_NS (5 * MS)
#define OUTSTANDING_NS (2 * MS)
/* One has had its turn of the period and another has not, when somebody looks. */
#define SETTLED_PERIODS 1.1

enum { FOUND_NOTHING, FOUND_STARVED, FOUND_LOST, FOUND_SHARE, FOUND_DEBT };

typedef struct {
    int32_t found; /* FOUND_* */
    int32_t slice;
    double value;     /* what was found: ms waited, points off */
    double longest;   /* wait of anybody who may have had a turn, in periods */
    double share_off; /* most, in points */
    uint64_t steps;
} HistoryResult;

typedef struct {
    Sim *sim;
    HistoryResult *out;
    uint64_t idle_since, worked_ns;
    uint64_t longest_period[SIM_SLICES]; /* since the slice began to wait */
} History;

/* A slice when the time in which shares are looked at begins. */
typedef struct {
    uint64_t busy_ns;
    int64_t filled_ns;
} Before;

static uint64_t pick(Sim *m, uint64_t n) { return sim_random(m) % n; }

static uint64_t one_of(Sim *m, const uint64_t *list, uint64_t n) { return list[pick(m, n)]; }

static SimLoad some_load(Sim *m, uint32_t milli) {
    static const uint64_t short_us[] = {300, 1000, 1000, 3000, 5000}, long_us[] = {20000, 60000, 150000};
    SimLoad load = {.milli = milli, .strict = pick(m, 5) == 0, .processes = 1 + (pick(m, 4) == 0)};
    load.kernel_ns = 1000 * (pick(m, 8) ? one_of(m, short_us, 5) : one_of(m, long_us, 3));
    uint64_t kind = pick(m, 4);
    if (kind == 0) /* interactive */
        load.work_ns = (1 + pick(m, 40)) * MS, load.gap_ns = (5 + pick(m, 80)) * MS;
    if (kind == 1) /* launches and synchronizes */
        load.work_ns = load.kernel_ns, load.gap_ns = 50000 + pick(m, 5 * MS);
    if (m->driver.rings && pick(m, 8) == 0)
        load.liar = SIM_RUNS_ON;
    return load;
}

static uint32_t milli_free(const Sim *m) {
    uint32_t taken = 0;
    for (uint32_t i = 0; i < m->slices; i++)
        taken += m->slice[i].joined ? m->slice[i].load.milli : 0;
    return taken < WHOLE_MILLI ? WHOLE_MILLI - taken : 0;
}

static void add_one(Sim *m) {
    static const uint64_t millis[] = {50, 100, 125, 200, 250, 300, 500};
    uint32_t milli = (uint32_t)one_of(m, millis, 7), free_milli = milli_free(m);
    if (free_milli < 50 || m->processes + 2 > SIM_PROCESSES)
        return;
    SimLoad load = some_load(m, milli < free_milli ? milli : free_milli);
    sim_add(m, &load);
}

static int some_slice(Sim *m) {
    for (int tries = 0; tries < 8; tries++) {
        int i = (int)pick(m, m->slices);
        if (m->slice[i].joined)
            return i;
    }
    return -1;
}

static void something_happens(Sim *m) {
    int slice = some_slice(m);
    uint64_t what = pick(m, 7);
    if (slice < 0 || what == 0) {
        add_one(m);
    } else if (what == 1) {
        sim_remove(m, slice);
    } else if (what == 2) {
        SimSlice *s = &m->slice[slice];
        uint32_t most = milli_free(m) + s->load.milli;
        sim_resize(m, slice, 50 + (uint32_t)pick(m, most - 49), pick(m, 5) == 0);
    } else if (what == 3) {
        sim_suspend(m, slice, !m->slice[slice].suspended);
    } else if (what == 4) {
        SimLoad load = some_load(m, m->slice[slice].load.milli);
        load.strict = m->slice[slice].load.strict;
        sim_load(m, slice, &load);
    } else { /* a kernel is restarted: its process dies, in mid-turn or at the gate, and another comes */
        for (uint32_t i = 0; i < m->processes; i++)
            if (m->process[i].alive && m->process[i].slice == slice) {
                sim_kill(m, (int)i);
                if (what == 5)
                    sim_start(m, (int)i, slice);
                break;
            }
    }
}

/* ---- what must hold ---- */

/* May it have a turn, as far as the rules go? Not whose last turn's work still computes beside the others', who had more periods than somebody,
 * or owes strict slices for a GPU kernel longer than its turn, nor a strict slice whose bucket is empty. */
static bool is_due(const Sim *m, const SimSlice *s, int64_t least, int64_t step, bool strict) {
    const SchedSlice *p = &m->policy.slice[s->id];
    if (!s->joined || s->suspended || !s->told.want || p->overran || sched_gate(p) == NBGPU_GATE_OPEN)
        return false;
    return p->strict ? !p->dry : p->vt <= least + step / 2 && !(strict && sched_owes_strict(&m->policy, p));
}

static bool found(History *h, int what, int slice, double value) {
    if (h->out->found == FOUND_NOTHING)
        *h->out = (HistoryResult){what, slice, value, h->out->longest, h->out->share_off, h->out->steps};
    return true;
}

static void check(History *h) {
    Sim *m = h->sim;
    int64_t least = INT64_MAX;
    bool waits = false, strict = false;
    for (uint32_t i = 0; i < m->slices; i++) {
        const SimSlice *s = &m->slice[i];
        const SchedSlice *p = &m->policy.slice[s->id];
        if (s->joined && !p->strict && (s->told.want || s->told.busy) && p->vt < least)
            least = p->vt;
        strict |= s->joined && p->strict && (s->told.want || s->told.busy);
    }
    uint64_t period = m->policy.period_ns;
    int64_t step = (int64_t)(period * WHOLE_MILLI / m->policy.active_milli);
    for (uint32_t i = 0; i < m->slices; i++) {
        SimSlice *s = &m->slice[i];
        if (!is_due(m, s, least, step, strict)) {
            s->hungry_since = 0;
            continue;
        }
        waits = true;
        if (!s->hungry_since)
            s->hungry_since = m->now, h->longest_period[i] = 0;
        if (period > h->longest_period[i])
            h->longest_period[i] = period;
        double periods = (double)(m->now - s->hungry_since) / (double)h->longest_period[i];
        if (periods > h->out->longest)
            h->out->longest = periods;
        if (periods > STARVED_PERIODS)
            found(h, FOUND_STARVED, (int)i, (double)(m->now - s->hungry_since) / (double)MS);
    }
    if (m->busy_ns + m->lost_ns != h->worked_ns || !waits)
        h->idle_since = m->now;
    h->worked_ns = m->busy_ns + m->lost_ns;
    if (m->now - h->idle_since > LOST_NS)
        found(h, FOUND_LOST, -1, (double)(m->now - h->idle_since) / (double)MS);
}

static void play(History *h, uint64_t ns) {
    uint64_t until = h->sim->now + ns;
    while (h->sim->now < until && h->out->found == FOUND_NOTHING) {
        sim_event(h->sim, until);
        check(h);
    }
}

/* ---- the calm ---- */

static void calm_down(Sim *m) {
    static const uint64_t kernels_us[] = {1000, 2000, 3000, 5000, 15000}; /* shorter ones can't keep a GPU busy from a slow host */
    for (uint32_t i = 0; i < m->slices; i++) {
        SimSlice *s = &m->slice[i];
        if (!s->joined)
            continue;
        if (s->suspended)
            sim_suspend(m, (int)i, false);
        SimLoad load = s->load;
        load.kernel_ns = 1000 * one_of(m, kernels_us, 5);
        load.work_ns = load.gap_ns = 0;
        sim_load(m, (int)i, &load);
        bool alive = false;
        for (uint32_t j = 0; j < m->processes; j++) { /* one each: two pay for the driver's switches between them, out of their own share */
            if (!m->process[j].alive || m->process[j].slice != (int)i)
                continue;
            if (alive)
                sim_kill(m, (int)j);
            alive = true;
        }
        for (uint32_t j = 0; j < SIM_PROCESSES && !alive; j++)
            if (j >= m->processes || !m->process[j].alive) {
                sim_start(m, (int)j, (int)i);
                alive = true;
            }
    }
}

/* GPU kernels of the storm are still outstanding. */
static bool storm_runs(const Sim *m) {
    for (uint32_t i = 0; i < m->processes; i++) {
        const SimProcess *p = &m->process[i];
        const SimSlice *of = &m->slice[p->slice];
        if (p->alive && (p->outstanding > 3 * of->load.kernel_ns + 2 * MS || m->policy.slice[of->id].overran))
            return true;
    }
    return false;
}

/* How far apart the burst slices are, in periods, beyond what one GPU kernel, or not stopping by itself, may have made of it; a strict slice in debt is far. */
static double apart(const Sim *m) {
    int64_t least = INT64_MAX, most = INT64_MIN, kernel = 0;
    for (uint32_t i = 0; i < m->slices; i++) {
        const SimSlice *s = &m->slice[i];
        const SchedSlice *p = &m->policy.slice[s->id];
        const uint64_t kernel_ns = s->load.kernel_ns, more_ns = kernel_ns > OUTSTANDING_NS ? kernel_ns : OUTSTANDING_NS;
        uint64_t beyond = kernel_ns + (s->load.liar == SIM_RUNS_ON ? RUNS_ON_NS + more_ns : 0);
        int64_t one = (int64_t)(beyond * WHOLE_MILLI / (s->load.milli ? s->load.milli : 1));
        if (!s->joined)
            continue;
        if (p->strict) {
            if (p->bucket_ns < -(int64_t)s->load.kernel_ns)
                return 1e9;
            continue;
        }
        kernel = one > kernel ? one : kernel;
        least = p->vt < least ? p->vt : least;
        most = p->vt > most ? p->vt : most;
    }
    return most < least ? 0 : (double)(most - least - kernel) * m->policy.active_milli / WHOLE_MILLI / (double)m->policy.period_ns;
}

/* What its bucket holds, or could not hold (less, once P is shorter): it falls only by what the slice spends. */
static int64_t filled(const SchedSlice *p) { return p->bucket_ns + (int64_t)p->spilled_ns; }

/* Shares of the time; of a burst slice those of what strict ones leave: what they spend of their buckets' savings, or save, is theirs too. What
 * a bucket could not hold they do not get: it is the burst ones', or the dues were less than all of the time. */
static void check_shares(History *h, const Before *before, uint64_t ns, uint64_t period_ns) {
    Sim *m = h->sim;
    double strict = 0, burst = 0, saved_ns = 0;
    for (uint32_t i = 0; i < m->slices; i++) {
        const SchedSlice *p = &m->policy.slice[m->slice[i].id];
        if (!m->slice[i].joined)
            continue;
        *(p->strict ? &strict : &burst) += m->slice[i].load.milli;
        saved_ns += p->strict ? (double)(filled(p) - before[i].filled_ns) : 0;
    }
    double left = (WHOLE_MILLI - strict) / 10.0 + 100 * saved_ns / (double)ns;
    for (uint32_t i = 0; i < m->slices; i++) {
        const SimSlice *s = &m->slice[i];
        if (!s->joined)
            continue;
        bool is_strict = m->policy.slice[s->id].strict;
        double due = is_strict ? s->load.milli / 10.0 : left * s->load.milli / burst;
        double off = (double)(s->busy_ns - before[i].busy_ns) * 100 / (double)ns - due;
        off = off < 0 ? -off : off;
        if (off > h->out->share_off)
            h->out->share_off = off;
        if (off > CALM_POINTS + due * (double)period_ns / (double)ns)
            found(h, FOUND_SHARE, (int)i, off);
    }
}

static void calm(History *h) {
    Sim *m = h->sim;
    Before before[SIM_SLICES];
    calm_down(m);
    uint64_t until = m->now + CALM_SETTLE_NS;
    do {
        play(h, 4 * m->policy.period_ns);
        sched_charge(&m->policy, m->now); /* by itself it charges when something happens: buckets would be as they were a turn ago */
    } while (h->out->found == FOUND_NOTHING && (storm_runs(m) || apart(m) > SETTLED_PERIODS) && m->now < until);
    if (h->out->found == FOUND_NOTHING && m->now >= until)
        found(h, FOUND_DEBT, -1, apart(m));
    for (uint32_t i = 0; i < m->slices; i++)
        before[i] = (Before){m->slice[i].busy_ns, filled(&m->policy.slice[m->slice[i].id])};
    uint64_t period_ns = m->policy.period_ns; /* the longest: what is known of hosts changes it, and a turn at the edge of that too */
    for (uint64_t played = 0; played < CALM_NS; played += CALM_NS / 10) {
        play(h, CALM_NS / 10);
        period_ns = m->policy.period_ns > period_ns ? m->policy.period_ns : period_ns;
    }
    sched_charge(&m->policy, m->now);
    if (h->out->found == FOUND_NOTHING)
        check_shares(h, before, CALM_NS, period_ns);
}

/* ---- for ctypes ---- */

void history_play(uint64_t seed, int32_t rings, HistoryResult *out) {
    static const uint64_t slices_us[] = {500, 1000, 2000, 6000}, switches_us[] = {50, 100, 500}, jitters_us[] = {0, 100, 500};
    static const uint64_t late_us[] = {0, 100, 250, 500};
    *out = (HistoryResult){0};
    SimDriver driver = {.seed = seed, .limited = 1, .rings = rings};
    Sim *m = sim_new(&driver, NULL);
    if (!m)
        return;
    m->driver.slice_ns = 1000 * one_of(m, slices_us, 4);
    m->driver.switch_ns = 1000 * one_of(m, switches_us, 3);
    m->driver.jitter_ns = 1000 * one_of(m, jitters_us, 3);
    m->driver.notice_ns = 20000 + pick(m, 150000);
    if (rings)
        m->driver.late_ns = 1000 * one_of(m, late_us, 4);
    History h = {.sim = m, .out = out, .idle_since = m->now};
    for (uint64_t n = 2 + pick(m, 5); n; n--)
        add_one(m);
    for (int i = 0; i < STORM_EVENTS && out->found == FOUND_NOTHING; i++) {
        play(&h, pick(m, 80 * MS));
        something_happens(m);
    }
    if (out->found == FOUND_NOTHING)
        calm(&h);
    out->steps = m->steps;
    sim_free(m);
}

/* Seeds from `first` on; returns how many were played: all, or up to and with the first in which something was found. */
uint64_t history_play_many(uint64_t first, uint64_t count, int32_t rings, HistoryResult *worst) {
    *worst = (HistoryResult){0};
    for (uint64_t n = 0; n < count; n++) {
        HistoryResult one;
        history_play(first + n, rings, &one);
        worst->steps += one.steps;
        worst->longest = one.longest > worst->longest ? one.longest : worst->longest;
        worst->share_off = one.share_off > worst->share_off ? one.share_off : worst->share_off;
        if (one.found == FOUND_NOTHING)
            continue;
        worst->found = one.found;
        worst->slice = one.slice;
        worst->value = one.value;
        return n + 1;
    }
    return count;
}
