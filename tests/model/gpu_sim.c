#include "gpu_sim.h"

#include <stdlib.h>
#include <string.h>

#define MS 1000000ull
#define WINDOW_NS (2 * MS) /* the limiter's: gate.h */
#define NEAR_NS (MS / 2)
#define IDLE_GRACE_NS (MS / 10)
#define OVER_NS (10 * MS) /* a turn that ended longer ago is none */
#define SETTLE_ROUNDS 4   /* the scheduler's, and the next two: sched_thread.c */
#define TURN_CHECK_NS (50 * MS)
#define DRAIN_CHECK_NS (5 * MS)

uint64_t sim_random(Sim *m) { /* splitmix64 */
    uint64_t z = m->random += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static uint64_t up_to(Sim *m, uint64_t most) { return most ? sim_random(m) % (most + 1) : 0; }
static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

Sim *sim_new(const SimDriver *driver, const NbgpuSchedConfig *config) {
    Sim *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->driver = *driver;
    m->random = driver->seed;
    m->now = 1000000 * MS;
    m->running = m->last = -1;
    m->wake_at = SCHED_NEVER;
    sched_init(&m->policy, config, m->now);
    return m;
}

void sim_free(Sim *m) { free(m); }

/* ---- processes ---- */

static bool is_open(const Sim *m, const SimSlice *s) {
    return s->joined && (!m->driver.limited || sched_gate(&m->policy.slice[s->id]) == NBGPU_GATE_OPEN);
}

static uint64_t turn_end(const Sim *m, const SimSlice *s) { return m->driver.limited ? m->policy.slice[s->id].turn_end : 0; }

/* The limiter knows when its turn ends, and takes what began before for over although the gate is open still. */
static bool is_over(const Sim *m, const SimProcess *p) {
    const SimSlice *s = &m->slice[p->slice];
    uint64_t end = turn_end(m, s);
    return m->driver.rings && s->load.liar != SIM_RUNS_ON && end && m->now >= end + p->late_ns && m->now < end + OVER_NS;
}

static bool is_contended(const Sim *m, const SimSlice *s) { return !is_open(m, s) || turn_end(m, s); }

static void begin_visit(Sim *m, SimProcess *p, const SimLoad *load) {
    p->visit_left = load->work_ns;
    p->visit_at = SCHED_NEVER;
    p->began = m->now;
    p->ready_at = m->now;
}

/* Something about the process changed: has its host the next submission to make, and when? */
static void host_goes_on(Sim *m, SimProcess *p, bool woken) {
    const SimLoad *load = &m->slice[p->slice].load;
    bool more = !load->work_ns || p->visit_left;
    if (!p->alive || (p->ready_at != SCHED_NEVER && !woken) || !more)
        return;
    if (p->count >= 2 && (p->outstanding > WINDOW_NS || p->count >= SIM_QUEUE))
        return;
    p->ready_at = m->now + up_to(m, m->driver.jitter_ns);
}

static void put(Sim *m, SimProcess *p) {
    const SimLoad *load = &m->slice[p->slice].load;
    uint64_t ns = load->kernel_ns - load->kernel_ns / 10 + up_to(m, load->kernel_ns / 5);
    if (load->work_ns) {
        ns = min_u64(ns, p->visit_left);
        p->visit_left -= ns;
    }
    p->queue[(p->head + p->count++) % SIM_QUEUE] = ns;
    p->outstanding += ns;
    if (!p->told_busy) {
        p->busy_since = m->now + (load->liar == SIM_LATE ? MS : 0);
        p->late_ns = up_to(m, m->driver.late_ns + 1000ull * load->late_us);
    }
    p->told_busy = load->liar != SIM_NEVER_BUSY;
    p->told_near = false;
    p->tell_idle_at = p->tell_near_at = SCHED_NEVER;
    p->want = p->granted = false;
    p->ready_at = SCHED_NEVER;
}

static void note(uint64_t *list, uint32_t *count, uint64_t value) {
    if (*count < SIM_WAITS)
        list[(*count)++] = value;
}

/* The host has a submission ready: it goes to the GPU, or the process waits: for its turn, or until this turn is over. */
static void try_submit(Sim *m, SimProcess *p) {
    SimSlice *s = &m->slice[p->slice];
    if (!p->alive || p->ready_at > m->now)
        return;
    uint64_t end = turn_end(m, s);
    if (!is_open(m, s) || is_over(m, p)) {
        if (!p->want) {
            p->asked = m->now;
            s->bell += !p->told_busy; /* else the end of that rings, and is read with this */
        }
        p->want = true;
        p->granted = false;
        return;
    }
    if (p->want && !p->granted) { /* woken */
        note(s->waits, &s->wait_count, m->now - p->asked);
        p->granted = true;
        host_goes_on(m, p, true);
        if (p->ready_at > m->now)
            return;
    }
    if (p->count && end && m->now + p->outstanding >= end && s->load.liar != SIM_RUNS_ON)
        return;
    if (!p->want)
        note(s->waits, &s->wait_count, 0);
    put(m, p);
    host_goes_on(m, p, false);
}

/* What the process says of itself follows the truth with a delay. */
static void notice(Sim *m, SimProcess *p) {
    SimSlice *s = &m->slice[p->slice];
    uint64_t late = m->now + m->driver.notice_ns + p->late_ns;
    if (s->load.liar == SIM_ALWAYS_BUSY || s->load.liar == SIM_NEVER_BUSY)
        return;
    if (!p->count && p->told_busy && p->tell_idle_at == SCHED_NEVER)
        p->tell_idle_at = late + (p->want ? 0 : IDLE_GRACE_NS);
    if (!p->count && p->want && p->tell_idle_at != SCHED_NEVER)
        p->tell_idle_at = min_u64(p->tell_idle_at, late);
    uint64_t end = turn_end(m, s);
    bool over = !is_open(m, s) || (end && m->now >= end);
    if (p->count && over && p->outstanding < NEAR_NS && !p->told_near && p->tell_near_at == SCHED_NEVER)
        p->tell_near_at = late;
    if (m->now >= p->tell_near_at)
        p->told_near = true, p->tell_near_at = SCHED_NEVER;
    if (m->now < p->tell_idle_at)
        return;
    p->told_busy = p->told_near = false, p->tell_idle_at = SCHED_NEVER;
    s->bell += is_contended(m, s);
}

/* ---- the scheduler's thread ---- */

static void read_words(const Sim *m, SchedSeen *seen) {
    for (uint32_t i = 0; i < m->slices; i++)
        seen[i] = (SchedSeen){.near = true, .edges = m->slice[i].told.edges};
    for (uint32_t i = 0; i < m->processes; i++) {
        const SimProcess *p = &m->process[i];
        SchedSeen *of = &seen[p->slice];
        if (!p->alive)
            continue;
        of->want |= p->want;
        of->busy |= p->told_busy;
        of->near &= !p->told_busy || p->told_near;
        if (p->told_busy && (!of->busy_since || p->busy_since < of->busy_since))
            of->busy_since = p->busy_since;
    }
}

/* Tell the policy what is new, or everything when it is due anyway. */
static bool observe(Sim *m, bool due) {
    SchedSeen seen[SIM_SLICES];
    read_words(m, seen);
    for (uint32_t i = 0; i < m->slices; i++) {
        SimSlice *s = &m->slice[i];
        seen[i].near &= seen[i].busy;
        bool news = seen[i].want != s->told.want || seen[i].busy != s->told.busy || seen[i].near != s->told.near;
        if (!s->joined || !(news || due))
            continue;
        seen[i].edges += news;
        s->told = seen[i];
        sched_observe(&m->policy, s->id, seen[i], m->now);
        due |= news;
    }
    return due;
}

static void see_everything(Sim *m) {
    for (int round = 0; round < SETTLE_ROUNDS; round++) {
        if (!observe(m, m->due || m->now >= m->wake_at))
            return;
        sched_step(&m->policy, m->now);
        m->steps++;
        m->wake_at = m->policy.wake_at;
        m->due = false;
        for (uint32_t i = 0; i < m->processes; i++)
            try_submit(m, &m->process[i]);
    }
}

/* ---- as its thread has it: sched_thread.c ---- */

static bool rings_for_all(const Sim *m, const SimSlice *s) { return m->policy.slice[s->id].phase == PHASE_OUT; }

static bool is_unheard(const Sim *m, const SimSlice *s) {
    return rings_for_all(m, s) && s->told.want && !s->told.busy && !m->policy.slice[s->id].spent_until && s->gate == NBGPU_GATE_CLOSED;
}

static bool has_rung(const Sim *m, const SimSlice *s) { return s->bell != s->told.edges && !is_unheard(m, s); }

static void look(Sim *m, uint32_t slice) {
    SchedSeen seen[SIM_SLICES];
    SimSlice *s = &m->slice[slice];
    read_words(m, seen);
    seen[slice].near &= seen[slice].busy;
    seen[slice].edges = s->bell;
    s->told = seen[slice];
    sched_observe(&m->policy, s->id, s->told, m->now);
}

/* Returns whether a slice about to get a turn does not want it any more. */
static bool ask_next(Sim *m) {
    bool asked = false;
    for (uint32_t i = 0; i < m->slices; i++) {
        const SimSlice *s = &m->slice[i];
        if (!s->joined || s->gate == NBGPU_GATE_OPEN || m->policy.slice[s->id].phase != PHASE_OPEN)
            continue;
        look(m, i);
        asked |= !s->told.want;
    }
    return asked;
}

static void decide(Sim *m) {
    int owner, guest;
    sched_step(&m->policy, m->now);
    do {
        owner = m->policy.owner;
        guest = m->policy.guest;
        if (!ask_next(m))
            return;
        sched_step(&m->policy, m->now);
    } while (m->policy.owner != owner || m->policy.guest != guest);
}

/* Returns whether a gate was closed or got an end: its slice has been looked at again. */
static bool write_gates(Sim *m) {
    bool again = false;
    for (uint32_t i = 0; i < m->slices; i++) {
        SimSlice *s = &m->slice[i];
        const SchedSlice *p = &m->policy.slice[s->id];
        if (!s->joined)
            continue;
        uint32_t gate = sched_gate(p);
        uint64_t end = gate == NBGPU_GATE_OPEN ? p->turn_end : s->end_was;
        bool had_no_end = s->gate == NBGPU_GATE_OPEN && !s->end_was, changed = gate != s->gate || end != s->end_was;
        s->gate = gate;
        s->end_was = end;
        if (changed && (had_no_end || gate != NBGPU_GATE_OPEN)) {
            look(m, i);
            again = true;
        }
    }
    return again;
}

/* When to look whether who has a turn, or is waited for, still lives. */
static uint64_t next_check(const Sim *m) {
    bool busy = false;
    for (uint32_t i = 0; i < m->policy.high; i++) {
        const SchedSlice *p = &m->policy.slice[i];
        if (p->phase == PHASE_DRAIN)
            return (m->now / DRAIN_CHECK_NS + 2) * DRAIN_CHECK_NS;
        busy |= p->phase == PHASE_OPEN && p->turn_end;
    }
    return busy && m->now + TURN_CHECK_NS * 3 / 2 < m->policy.wake_at ? m->now + TURN_CHECK_NS : SCHED_NEVER;
}

/* Returns whether anybody's words are others than they were. */
static bool look_at_those_heard(Sim *m, bool beat) {
    bool news = false;
    for (uint32_t i = 0; i < m->slices; i++) {
        SimSlice *s = &m->slice[i];
        if (!s->joined || !(has_rung(m, s) || !rings_for_all(m, s) || (beat && !is_unheard(m, s))))
            continue;
        SchedSeen was = s->told;
        look(m, i);
        news |= was.want != s->told.want || was.busy != s->told.busy || was.edges != s->told.edges;
    }
    return news;
}

static bool anybody_rang(const Sim *m) {
    for (uint32_t i = 0; i < m->slices; i++)
        if (m->slice[i].joined && has_rung(m, &m->slice[i]))
            return true;
    return false;
}

static void hear_rings(Sim *m) {
    if (!m->due && m->now < m->wake_at && !anybody_rang(m))
        return;
    m->wakes++;
    bool beat = m->now + m->policy.config.heartbeat_ns / 4 >= m->beat_at;
    if (beat)
        m->beat_at = m->now + m->policy.config.heartbeat_ns;
    m->due |= look_at_those_heard(m, beat);
    for (int round = 0; round < SETTLE_ROUNDS && (m->due || m->now >= m->policy.wake_at); round++) {
        decide(m);
        m->steps++;
        m->due = write_gates(m);
    }
    m->due = false;
    m->wake_at = min_u64(min_u64(sched_wake_at(&m->policy), next_check(m)), m->beat_at);
    for (uint32_t i = 0; i < m->processes; i++)
        try_submit(m, &m->process[i]);
}

static void schedule(Sim *m) {
    if (m->driver.limited && m->driver.rings)
        hear_rings(m);
    else if (m->driver.limited)
        see_everything(m);
}

/* ---- the driver ---- */

static void choose(Sim *m) {
    bool expired = m->now >= m->slice_end;
    if (m->running >= 0 && m->process[m->running].count && !expired)
        return;
    int next = -1;
    for (uint32_t i = 1; i <= m->processes && next < 0; i++) {
        int candidate = (int)((uint32_t)(m->last + (int)i + (int)m->processes) % m->processes);
        if (m->process[candidate].count)
            next = candidate;
    }
    if (next >= 0 && next != m->last) {
        m->switch_left = m->last < 0 ? 0 : m->driver.switch_ns;
        m->last = next;
    }
    m->running = next;
    m->slice_end = m->now + m->switch_left + m->driver.slice_ns;
}

static void gpu_passes(Sim *m, uint64_t ns) {
    if (m->running < 0)
        return;
    uint64_t lost = min_u64(ns, m->switch_left);
    m->switch_left -= lost;
    m->lost_ns += lost;
    ns -= lost;
    SimProcess *p = &m->process[m->running];
    SimSlice *s = &m->slice[p->slice];
    if (!p->count || !ns)
        return;
    p->queue[p->head] -= ns;
    p->outstanding -= ns;
    p->busy_ns += ns;
    s->busy_ns += ns;
    m->busy_ns += ns;
    if (p->queue[p->head])
        return;
    p->head = (p->head + 1) % SIM_QUEUE;
    p->count--;
    host_goes_on(m, p, false);
    if (!p->count && s->load.work_ns && !p->visit_left) {
        note(s->visits, &s->visit_count, m->now - p->began);
        p->visit_at = m->now + s->load.gap_ns * 4 / 5 + up_to(m, s->load.gap_ns * 2 / 5);
        p->ready_at = SCHED_NEVER;
    }
}

/* ---- time ---- */

static uint64_t next_event(const Sim *m) {
    uint64_t at = m->driver.limited ? m->wake_at : SCHED_NEVER;
    if (m->running >= 0) {
        const SimProcess *p = &m->process[m->running];
        uint64_t done = m->now + m->switch_left + (p->count ? p->queue[p->head] : 0);
        at = min_u64(at, min_u64(done, m->slice_end > m->now ? m->slice_end : m->now + 1));
        if (p->outstanding > NEAR_NS)
            at = min_u64(at, m->now + m->switch_left + p->outstanding - NEAR_NS + 1);
    }
    for (uint32_t i = 0; i < m->processes; i++) {
        const SimProcess *p = &m->process[i];
        if (!p->alive)
            continue;
        if (p->ready_at > m->now)
            at = min_u64(at, p->ready_at);
        at = min_u64(at, min_u64(p->visit_at, min_u64(p->tell_idle_at, p->tell_near_at)));
        uint64_t end = turn_end(m, &m->slice[p->slice]);
        if (end > m->now)
            at = min_u64(at, end);
        if (end && end + p->late_ns > m->now)
            at = min_u64(at, end + p->late_ns);
    }
    return at > m->now ? at : m->now + 1;
}

static void everybody_reacts(Sim *m) {
    for (uint32_t i = 0; i < m->processes; i++) {
        SimProcess *p = &m->process[i];
        if (!p->alive)
            continue;
        if (m->now >= p->visit_at)
            begin_visit(m, p, &m->slice[p->slice].load);
        try_submit(m, p);
        notice(m, p);
    }
    schedule(m);
    for (uint32_t i = 0; i < m->processes; i++)
        if (m->process[i].alive)
            notice(m, &m->process[i]);
    choose(m);
}

bool sim_event(Sim *m, uint64_t until) {
    everybody_reacts(m);
    uint64_t at = next_event(m);
    bool before = at <= until;
    if (!before)
        at = until;
    uint64_t passed = at - m->now;
    m->now = at;
    gpu_passes(m, passed);
    return before;
}

void sim_run(Sim *m, uint64_t ns) {
    uint64_t until = m->now + ns;
    while (m->now < until && sim_event(m, until))
        ;
}

/* ---- slices come, change and go ---- */

void sim_start(Sim *m, int process, int slice) {
    SimProcess *p = &m->process[process];
    const SimLoad *load = &m->slice[slice].load;
    if ((uint32_t)process >= m->processes)
        m->processes = (uint32_t)process + 1;
    *p = (SimProcess){.slice = slice, .alive = true, .ready_at = m->now, .visit_at = SCHED_NEVER};
    p->tell_idle_at = p->tell_near_at = SCHED_NEVER;
    p->told_busy = load->liar == SIM_ALWAYS_BUSY;
    if (load->work_ns) {
        p->ready_at = SCHED_NEVER;
        p->visit_at = m->now + up_to(m, load->gap_ns);
    }
}

int sim_add(Sim *m, const SimLoad *load) {
    uint32_t free_slice = 0;
    while (free_slice < m->slices && m->slice[free_slice].joined)
        free_slice++;
    if (free_slice >= SIM_SLICES)
        return -1;
    SimSlice *s = &m->slice[free_slice];
    memset(s, 0, sizeof *s);
    s->load = *load;
    s->joined = true;
    s->id = sched_join(&m->policy, load->milli, load->strict, m->now);
    if (free_slice == m->slices)
        m->slices++;
    for (uint32_t n = 0, i = 0; n < load->processes && i < SIM_PROCESSES; i++) {
        if (i < m->processes && m->process[i].alive)
            continue;
        sim_start(m, (int)i, (int)free_slice);
        n++;
    }
    m->due = true;
    return (int)free_slice;
}

void sim_kill(Sim *m, int process) {
    SimProcess *p = &m->process[process];
    if (m->running == process)
        m->running = -1;
    int slice = p->slice;
    *p = (SimProcess){.slice = slice, .ready_at = SCHED_NEVER, .visit_at = SCHED_NEVER};
    p->tell_idle_at = p->tell_near_at = SCHED_NEVER;
    m->due = true;
}

void sim_remove(Sim *m, int slice) {
    for (uint32_t i = 0; i < m->processes; i++)
        if (m->process[i].alive && m->process[i].slice == slice)
            sim_kill(m, (int)i);
    sched_leave(&m->policy, m->slice[slice].id, m->now);
    m->slice[slice].joined = false;
    m->due = true;
}

void sim_suspend(Sim *m, int slice, bool suspended) {
    m->slice[slice].suspended = suspended;
    sched_suspend(&m->policy, m->slice[slice].id, suspended, m->now);
    m->due = true;
}

void sim_resize(Sim *m, int slice, uint32_t milli, bool strict) {
    m->slice[slice].load.milli = milli;
    m->slice[slice].load.strict = strict;
    sched_set(&m->policy, m->slice[slice].id, milli, strict, m->now);
    m->due = true;
}

void sim_load(Sim *m, int slice, const SimLoad *load) {
    m->slice[slice].load = *load;
    for (uint32_t i = 0; i < m->processes; i++) {
        SimProcess *p = &m->process[i];
        if (!p->alive || p->slice != slice)
            continue;
        p->visit_left = 0;
        p->want = p->granted = false;
        if (load->work_ns)
            p->ready_at = SCHED_NEVER;
        p->visit_at = load->work_ns && !p->count ? m->now : SCHED_NEVER;
        if (!load->work_ns && p->ready_at == SCHED_NEVER)
            p->ready_at = m->now;
    }
}

/* ---- for ctypes ---- */

uint64_t sim_now(const Sim *m) { return m->now; }
uint64_t sim_steps(const Sim *m) { return m->steps; }
uint64_t sim_wakes(const Sim *m) { return m->wakes; }
uint64_t sim_turns(const Sim *m) {
    uint64_t turns = 0;
    for (uint32_t i = 0; i < m->slices; i++)
        turns += m->slice[i].joined ? m->policy.slice[m->slice[i].id].turns : 0;
    return turns;
}
uint64_t sim_busy(const Sim *m, int slice) { return slice < 0 ? m->busy_ns : m->slice[slice].busy_ns; }
uint64_t sim_held(Sim *m, int slice) {
    sched_charge(&m->policy, m->now);
    return m->policy.slice[m->slice[slice].id].held_ns;
}
void sim_owe(Sim *m, int slice, uint64_t ns) {
    sched_owe(&m->policy, m->slice[slice].id, ns, m->now);
    m->due = true;
}
uint64_t sim_period(const Sim *m) { return m->policy.period_ns; }
/* Forget the waits and visits so far. */
void sim_mark(Sim *m) {
    for (uint32_t i = 0; i < m->slices; i++)
        m->slice[i].wait_count = m->slice[i].visit_count = 0;
}
uint32_t sim_waits(const Sim *m, int slice, uint64_t *out) {
    memcpy(out, m->slice[slice].waits, sizeof m->slice[slice].waits);
    return m->slice[slice].wait_count;
}
uint32_t sim_visits(const Sim *m, int slice, uint64_t *out) {
    memcpy(out, m->slice[slice].visits, sizeof m->slice[slice].visits);
    return m->slice[slice].visit_count;
}
