#include "sched_kernels.h"

#include <string.h>

/* In units of the shortest turn of a slice (2 ms). */
#define TURN_UNITS 2           /* while others wait, */
#define REST_TURN_MOST 8u      /* times that for the rest together */
#define BUCKET_PERIOD_UNITS 10 /* a spent bucket opens again with its share of this, but not with less than one unit */
#define LAG_UNITS 5
#define UNUSED_UNITS 5 /* wanted, was let in and did not come for so long: dead, or stopped */
#define SPENT_UNITS 10u
#define DRAIN_UNITS 30
#define UNUSED_MOST 5u
#define WHOLE 1000
#define DEBT_PERIOD_NS 10000000000ll /* a longer debt is forgotten: so long a limited kernel waits after one endless GPU kernel */

static bool is_there(const KernelTurns *t, uint32_t i) { return i == KERNELS_REST || (i < t->high && t->member[i].cap_milli); }
static bool is_active(const KernelMember *m) { return m->seen.want || m->seen.busy || m->phase == PHASE_DRAIN; }

static int64_t worth(const KernelTurns *t, const KernelMember *m) {
    const int64_t ns = BUCKET_PERIOD_UNITS * t->unit_ns * m->cap_milli / WHOLE;
    return ns < t->unit_ns ? t->unit_ns : ns;
}

static int64_t turn_length(const KernelTurns *t, const KernelMember *m) {
    uint32_t kernels = m->seen.kernels < 1 ? 1 : m->seen.kernels > REST_TURN_MOST ? REST_TURN_MOST : m->seen.kernels;
    return TURN_UNITS * t->unit_ns * kernels;
}

static bool may_run(const KernelTurns *t, uint32_t i) {
    const KernelMember *m = &t->member[i];
    return is_there(t, i) && m->seen.want && !m->dry && t->now >= m->spent_until;
}

bool kernels_wants(const KernelTurns *t, uint32_t index) { return may_run(t, index); }

/* The members in use: the limited ones, then the rest. */
static uint32_t next_member(const KernelTurns *t, uint32_t i) {
    while (i < t->high && !t->member[i].cap_milli)
        i++;
    return i < t->high ? i : KERNELS_REST;
}
#define EACH(t, i)                                                                                                                         \
    for (uint32_t i = next_member(t, 0); i < KERNELS_MEMBERS; i = i == KERNELS_REST ? KERNELS_MEMBERS : next_member(t, i + 1))

static bool contested(const KernelTurns *t, uint32_t index) {
    EACH(t, i)
    if (i != index && t->member[i].phase != PHASE_OPEN && may_run(t, i))
        return true;
    return false;
}

/* ---- joining, seeing, charging --------------------------------------------------------------------------------------------- */

static uint64_t hash(const char id[NBGPU_KERNEL_ID_BYTES]) {
    uint64_t h = 1469598103934665603ull; /* FNV-1a */
    for (uint32_t i = 0; i < NBGPU_KERNEL_ID_BYTES && id[i]; i++)
        h = (h ^ (uint8_t)id[i]) * 1099511628211ull;
    return h;
}

void kernels_init(KernelTurns *t, const NbgpuSchedConfig *config, uint64_t now) {
    memset(t, 0, sizeof *t);
    t->unit_ns = (int64_t)config->min_turn_ns;
    t->grace_ns = config->idle_grace_ns;
    t->now = now;
    t->wake_at = SCHED_NEVER;
    t->owner = SCHED_NOBODY;
}

void kernels_set(KernelTurns *t, uint32_t index, const char id[NBGPU_KERNEL_ID_BYTES], uint32_t cap_milli, uint64_t now) {
    KernelMember *m = &t->member[index];
    const uint64_t name = cap_milli ? hash(id) : 0;
    if (name != m->id || !cap_milli) {
        if (t->owner == (int)index)
            t->owner = SCHED_NOBODY;
        *m = (KernelMember){.id = name, .vt = t->vt_floor, .quiet_since = now};
    }
    const bool fresh = !m->cap_milli;
    m->cap_milli = cap_milli < WHOLE ? cap_milli : WHOLE;
    if (cap_milli && (fresh || m->bucket_ns > worth(t, m)))
        m->bucket_ns = worth(t, m);
    if (cap_milli && index >= t->high)
        t->high = index + 1;
}

uint32_t kernels_find(const KernelTurns *t, const char id[NBGPU_KERNEL_ID_BYTES]) {
    if (!id[0])
        return KERNELS_REST;
    const uint64_t name = hash(id);
    for (uint32_t i = 0; i < t->high; i++)
        if (t->member[i].cap_milli && t->member[i].id == name)
            return i;
    return KERNELS_REST;
}

static void refill(const KernelTurns *t, KernelMember *m, uint64_t passed) {
    const int64_t full = 2 * worth(t, m) + (int64_t)t->period_ns / WHOLE * m->cap_milli, debt = DEBT_PERIOD_NS / WHOLE * m->cap_milli;
    if (passed > (uint64_t)DEBT_PERIOD_NS)
        passed = (uint64_t)DEBT_PERIOD_NS;
    m->bucket_ns += (int64_t)(passed * m->cap_milli / WHOLE);
    if (m->bucket_ns > full)
        m->bucket_ns = full;
    if (m->bucket_ns < -debt)
        m->bucket_ns = -debt;
    if (m->bucket_ns <= 0)
        m->dry = true;
    else if (m->bucket_ns >= worth(t, m))
        m->dry = false;
}

static void charge(KernelMember *m, uint64_t meter, uint64_t passed) {
    int64_t ran = (int64_t)(meter - m->seen.meter_ns);
    if (ran > (int64_t)passed) /* several processes at once, or a process that came */
        ran = (int64_t)passed;
    if (ran < 0) /* or went, or its words were written over */
        ran = 0;
    m->vt += ran / (m->seen.kernels ? m->seen.kernels : 1);
    m->left_ns -= ran;
    m->bucket_ns -= m->cap_milli ? ran : 0;
    m->charged_ns += (uint64_t)ran;
}

void kernels_observe(KernelTurns *t, const KernelSeen seen[KERNELS_MEMBERS], uint64_t now) {
    const uint64_t passed = now > t->now ? now - t->now : 0;
    t->now += passed;
    EACH(t, i) {
        KernelMember *m = &t->member[i];
        charge(m, seen[i].meter_ns, passed);
        m->seen = seen[i];
        if (m->cap_milli)
            refill(t, m, passed);
        if (m->seen.busy)
            m->quiet_since = 0, m->unused = 0;
        else if (!m->quiet_since)
            m->quiet_since = t->now;
    }
}

/* ---- turns ----------------------------------------------------------------------------------------------------------------- */

static void open_gate(KernelTurns *t, uint32_t i) {
    KernelMember *m = &t->member[i];
    m->phase = PHASE_OPEN;
    m->left_ns = turn_length(t, m);
    if (m->quiet_since)
        m->quiet_since = t->now;
    t->owner = (int)i;
}

static void close_gate(KernelTurns *t) {
    KernelMember *m = &t->member[t->owner];
    m->phase = m->seen.busy ? PHASE_DRAIN : PHASE_OUT;
    m->drain_until = t->now + (uint64_t)(DRAIN_UNITS * t->unit_ns);
    t->owner = SCHED_NOBODY;
}

/* When the owner counts as done with its turn if it stays as quiet as it is. */
static uint64_t quiet_until(const KernelTurns *t, bool others) {
    const KernelMember *m = &t->member[t->owner];
    if (!m->quiet_since || (!others && (m->seen.want || t->owner == (int)KERNELS_REST)))
        return SCHED_NEVER;
    return m->quiet_since + (m->seen.want ? (uint64_t)(UNUSED_UNITS * t->unit_ns) : others ? t->grace_ns : (uint64_t)t->unit_ns);
}

static void settle_owner(KernelTurns *t, bool slice_open) {
    if (t->owner == SCHED_NOBODY)
        return;
    KernelMember *m = &t->member[t->owner];
    const bool others = contested(t, (uint32_t)t->owner);
    if (!others)
        m->left_ns = turn_length(t, m);
    if (!slice_open && m->quiet_since && m->seen.want)
        m->quiet_since = t->now; /* it waits for the slice's turn */
    const bool quiet = t->now >= quiet_until(t, others);
    if (quiet && m->seen.want)
        m->spent_until = t->now + (SPENT_UNITS * (uint64_t)t->unit_ns << (m->unused < UNUSED_MOST ? m->unused++ : UNUSED_MOST));
    if (m->dry || quiet || (others && m->left_ns <= 0))
        close_gate(t);
}

static bool settle_drains(KernelTurns *t) {
    bool blocked = false;
    EACH(t, i) {
        KernelMember *m = &t->member[i];
        if (m->phase != PHASE_DRAIN)
            continue;
        if (!m->seen.busy || m->seen.near || t->now >= m->drain_until)
            m->phase = PHASE_OUT;
        else
            blocked = true;
    }
    return blocked;
}

static void admit(KernelTurns *t) {
    int best = SCHED_NOBODY;
    EACH(t, i)
    if (t->member[i].phase == PHASE_OUT && may_run(t, i) && (best == SCHED_NOBODY || t->member[i].vt < t->member[best].vt))
        best = (int)i;
    if (best == SCHED_NOBODY && t->member[KERNELS_REST].phase == PHASE_OUT && t->now >= t->member[KERNELS_REST].spent_until)
        best = (int)KERNELS_REST; /* nobody asks: those without a limit need not ask either */
    if (best != SCHED_NOBODY)
        open_gate(t, (uint32_t)best);
}

/* Nobody saves up more than the lag, whatever kept it away. */
static void raise_floor(KernelTurns *t) {
    int64_t least = INT64_MAX;
    EACH(t, i)
    if (is_active(&t->member[i]) && !t->member[i].dry && t->member[i].vt < least)
        least = t->member[i].vt;
    if (least != INT64_MAX && least > t->vt_floor)
        t->vt_floor = least;
    EACH(t, i)
    if (t->member[i].vt < t->vt_floor - LAG_UNITS * t->unit_ns)
        t->member[i].vt = t->vt_floor - LAG_UNITS * t->unit_ns;
}

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t after(uint64_t now, int64_t ns) { return now + (ns > 0 ? (uint64_t)ns : 0); }

static uint64_t owner_wake(const KernelTurns *t) {
    const KernelMember *m = &t->member[t->owner];
    const bool others = contested(t, (uint32_t)t->owner);
    uint64_t at = quiet_until(t, others);
    if (others)
        at = min_u64(at, after(t->now, m->left_ns));
    if (m->cap_milli && m->cap_milli < WHOLE)
        at = min_u64(at, after(t->now, m->bucket_ns * WHOLE / (WHOLE - m->cap_milli)));
    return at;
}

static uint64_t next_wake(const KernelTurns *t) {
    uint64_t at = t->owner == SCHED_NOBODY ? SCHED_NEVER : owner_wake(t);
    EACH(t, i) {
        const KernelMember *m = &t->member[i];
        if (m->phase == PHASE_DRAIN)
            at = min_u64(at, m->drain_until);
        if (m->phase != PHASE_OUT || !m->seen.want)
            continue;
        if (m->dry)
            at = min_u64(at, after(t->now + 1, (worth(t, m) - m->bucket_ns) * WHOLE / m->cap_milli));
        if (m->spent_until > t->now)
            at = min_u64(at, m->spent_until);
    }
    return at > t->now ? at : t->now + 1;
}

void kernels_step(KernelTurns *t, bool slice_open) {
    settle_owner(t, slice_open);
    const bool blocked = settle_drains(t);
    if (t->owner == SCHED_NOBODY && !blocked)
        admit(t);
    raise_floor(t);
    t->wake_at = next_wake(t);
}

bool kernels_watched(const KernelTurns *t) {
    EACH(t, i)
    if (t->member[i].phase == PHASE_DRAIN)
        return true;
    return t->owner != SCHED_NOBODY && contested(t, (uint32_t)t->owner);
}

uint32_t kernels_gate(const KernelTurns *t, uint32_t index) {
    if (!is_there(t, index))
        return NBGPU_GATE_NONE;
    return t->member[index].phase == PHASE_OPEN ? NBGPU_GATE_OPEN : NBGPU_GATE_CLOSED;
}
