/* Time: bringing a device's engines to "now".
 *
 * One compute engine, shared by the channels in preemptive round-robin slices with a switch cost, and one copy engine per
 * direction, which runs a copy to its end. The GPU kernels of one channel run one at a time, in the order in which their
 * streams allow them. Entries carry the time of their submission, so it does not matter how late somebody looks.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "nbgpu_fault.h"
#include "sim_state.h"

enum { WINDOW = 128, LANES = 256 }; /* entries looked at behind the head; streams told apart (the rest share) */

struct ready {
    struct sim_entry *engine[3]; /* by enum sim_kind, the first one that may run */
    uint64_t next_submit_ns;     /* the earliest entry still in the future */
};

struct lanes {
    uint64_t busy[LANES / 64];
    bool legacy, blocking;
};

static bool lane_blocked(const struct lanes *lanes, const struct sim_entry *e) {
    if (lanes->busy[e->stream % LANES / 64] >> (e->stream % 64) & 1)
        return true;
    return (e->flags & SIM_LEGACY && lanes->blocking) || (e->flags & SIM_BLOCKING && lanes->legacy);
}

static void lane_block(struct lanes *lanes, const struct sim_entry *e) {
    lanes->busy[e->stream % LANES / 64] |= 1ull << (e->stream % 64);
    if (e->flags & SIM_LEGACY)
        lanes->legacy = true;
    if (e->flags & SIM_BLOCKING)
        lanes->blocking = true;
}

static struct sim_entry *entry_at(struct sim_machine *m, uint32_t channel, uint64_t seq) { return &m->queue[channel][seq % SIM_QUEUE]; }

static uint32_t entry_state(const struct sim_entry *e) { return atomic_load_explicit(&e->state, memory_order_acquire); }

bool sim_entry_done(struct sim_machine *m, uint32_t channel, uint32_t generation, uint64_t seq) {
    struct sim_channel *c = &m->channel[channel];
    if (atomic_load_explicit(&c->generation, memory_order_acquire) != generation)
        return true;
    if (seq < atomic_load_explicit(&c->head, memory_order_acquire))
        return true;
    struct sim_entry *e = entry_at(m, channel, seq);
    return entry_state(e) == SIM_DONE && e->seq == seq;
}

static void finish(struct sim_entry *e, uint64_t t) {
    e->done_ns = t;
    atomic_store_explicit(&e->state, SIM_DONE, memory_order_release);
}

/* An entry whose engine part is over: done, or its process' turn. True when it is done. */
static bool settle(struct sim_machine *m, struct sim_entry *e, uint64_t t, struct sim_device *device) {
    uint32_t state = entry_state(e);
    if (e->kind == SIM_WAIT && !sim_entry_done(m, e->dep_channel, e->dep_generation, e->dep_seq))
        return false;
    if (e->flags & SIM_NEEDS_HOST && state != SIM_HOST_DONE) {
        if (state == SIM_PENDING) {
            atomic_store_explicit(&e->state, SIM_HOST_TURN, memory_order_release);
            sim_ring(device);
        }
        return false;
    }
    finish(e, t);
    return true;
}

static bool instant(const struct sim_entry *e) { return e->kind >= SIM_MARK || e->left_ns == 0; }

/* One pass over a channel: ends what ends now, finds what may run. */
static void scan(struct sim_machine *m, uint32_t index, uint64_t t, struct sim_device *device, struct ready *ready) {
    struct sim_channel *channel = &m->channel[index];
    uint64_t tail = atomic_load_explicit(&channel->tail, memory_order_acquire);
    uint64_t head = atomic_load_explicit(&channel->head, memory_order_relaxed);
    bool one_stream = head >= atomic_load_explicit(&channel->multi_seq, memory_order_relaxed);
    struct lanes lanes = {.legacy = false};
    *ready = (struct ready){.next_submit_ns = SIM_NEVER};
    for (uint64_t seq = head, seen = 0; seq < tail && seen < WINDOW; seq++) {
        struct sim_entry *e = entry_at(m, index, seq);
        bool done = entry_state(e) == SIM_DONE;
        if (!done && e->submit_ns > t) {
            ready->next_submit_ns = e->submit_ns;
            break;
        }
        if (!done && !lane_blocked(&lanes, e)) {
            if (instant(e)) {
                done = settle(m, e, t, device);
            } else if (!ready->engine[e->kind] || ready->engine[e->kind]->priority > e->priority) {
                ready->engine[e->kind] = e;
            }
        }
        if (done && seq == head) {
            atomic_store_explicit(&channel->head, ++head, memory_order_release);
            continue;
        }
        if (done)
            continue;
        if (one_stream)
            break;
        lane_block(&lanes, e);
        seen++;
    }
}

static void count_busy(struct sim_bucket *history, uint64_t from, uint64_t to, uint64_t sample_ns) {
    while (from < to) {
        uint64_t index = from / sample_ns, end = (index + 1) * sample_ns;
        if (end > to)
            end = to;
        struct sim_bucket *bucket = &history[index % SIM_BUCKETS];
        if (bucket->index != index)
            *bucket = (struct sim_bucket){.index = index};
        bucket->busy_ns += end - from;
        from = end;
    }
}

struct turn {
    struct sim_machine *m;
    struct sim_device *device;
    unsigned d;
    uint64_t t, now, sample_ns;
    struct sim_entry *compute;
    uint32_t runner; /* channel of compute */
    bool contended;  /* another channel has compute work too */
    struct sim_entry *copy[2];
    uint32_t copier[2];
    uint64_t next_submit_ns;
};

/* Who runs on each engine at turn->t. */
static void choose(struct turn *turn) {
    struct sim_device *device = turn->device;
    struct sim_entry *mine = NULL, *next = NULL;
    uint32_t next_channel = 0, n = device->channels, start = 0;
    turn->copy[0] = turn->copy[1] = NULL;
    turn->next_submit_ns = SIM_NEVER;
    turn->contended = false;
    for (uint32_t i = 0; i < n; i++)
        if (device->channel[i] + 1u == device->current)
            start = i;
    for (uint32_t k = 0; k < n; k++) { /* from the current one on, in turn */
        uint32_t c = device->channel[(start + k) % n];
        struct ready ready;
        scan(turn->m, c, turn->t, device, &ready);
        if (ready.next_submit_ns < turn->next_submit_ns)
            turn->next_submit_ns = ready.next_submit_ns;
        for (int way = 0; way < 2; way++) {
            struct sim_entry *copy = ready.engine[SIM_COPY_IN + way];
            if (!copy || (turn->copy[way] && c + 1 != device->copy_turn[way]))
                continue;
            turn->copy[way] = copy;
            turn->copier[way] = c;
        }
        struct sim_entry *compute = ready.engine[SIM_COMPUTE];
        if (!compute)
            continue;
        if (c + 1 == device->current) {
            mine = compute;
        } else if (!next) {
            next = compute;
            next_channel = c;
        }
    }
    turn->compute = mine;
    turn->runner = device->current - 1;
    turn->contended = next != NULL;
    if (!next || (mine && device->slice_left_ns > 0)) {
        if (mine && device->slice_left_ns == 0)
            device->slice_left_ns = turn->m->slice_us * 1000ull;
        return;
    }
    turn->contended = mine != NULL;
    turn->compute = next;
    turn->runner = next_channel;
    device->switch_left_ns = device->current ? turn->m->switch_us * 1000ull : 0;
    device->slice_left_ns = turn->m->slice_us * 1000ull;
    device->current = next_channel + 1;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t step_length(const struct turn *turn) {
    uint64_t step = turn->now - turn->t;
    const struct sim_device *device = turn->device;
    if (turn->compute) {
        step = least(step, device->switch_left_ns ? device->switch_left_ns : turn->compute->left_ns);
        if (turn->contended && !device->switch_left_ns)
            step = least(step, device->slice_left_ns);
    }
    for (int way = 0; way < 2; way++)
        if (turn->copy[way])
            step = least(step, turn->copy[way]->left_ns);
    if (turn->next_submit_ns != SIM_NEVER)
        step = least(step, turn->next_submit_ns - turn->t);
    return step;
}

static void run_compute(struct turn *turn, uint64_t step) {
    struct sim_device *device = turn->device;
    count_busy(device->history, turn->t, turn->t + step, turn->sample_ns);
    if (device->switch_left_ns) {
        device->switch_left_ns -= step;
        return;
    }
    uint32_t client = turn->m->channel[turn->runner].client;
    count_busy(turn->m->client_history[client][turn->d], turn->t, turn->t + step, turn->sample_ns);
    atomic_fetch_add_explicit(&turn->m->client[client].busy_ns[turn->d], step, memory_order_relaxed);
    turn->compute->left_ns -= step;
    device->slice_left_ns -= least(step, device->slice_left_ns);
}

static void run(struct turn *turn, uint64_t step) {
    struct sim_device *device = turn->device;
    if (turn->compute)
        run_compute(turn, step);
    for (int way = 0; way < 2; way++) {
        if (!turn->copy[way])
            continue;
        turn->copy[way]->left_ns -= step;
        device->copy_turn[way] = turn->copy[way]->left_ns ? turn->copier[way] + 1 : 0;
    }
    NBGPU_POINT("sim.advance");
    turn->t += step;
    atomic_store_explicit(&device->now_ns, turn->t, memory_order_release);
}

void sim_advance_locked(struct sim *sim, unsigned d) {
    struct sim_machine *m = sim->m;
    struct sim_device *device = &m->device[d];
    struct turn turn = {
        .m = m,
        .device = device,
        .d = d,
        .t = atomic_load_explicit(&device->now_ns, memory_order_relaxed),
        .now = sim_device_ns(m, sim_wall_ns()),
        .sample_ns = SIM_SAMPLE_MS * 1000000ull / m->time_scale,
    };
    for (;;) {
        choose(&turn);
        if (turn.t >= turn.now)
            return;
        run(&turn, step_length(&turn));
    }
}

void sim_advance(struct sim *sim, unsigned d) {
    sim_reap(sim, false);
    sim_lock(sim, d);
    sim_advance_locked(sim, d);
    sim_unlock(sim, d);
}

/* What must run before an entry can be done, at least: the rest of its own stream, and of all compute it comes behind. */
uint64_t sim_eta_ns(struct sim *sim, int index, uint64_t seq) {
    struct sim_machine *m = sim->m;
    struct sim_channel *channel = &m->channel[index];
    struct sim_device *device = &m->device[channel->device];
    const struct sim_entry *target = entry_at(m, (uint32_t)index, seq);
    uint64_t own = 0, compute = 0;
    for (uint64_t s = atomic_load(&channel->head); s <= seq; s++) {
        const struct sim_entry *e = entry_at(m, (uint32_t)index, s);
        if (entry_state(e) == SIM_DONE)
            continue;
        bool same = e->stream == target->stream;
        bool before =
            same || (e->flags & SIM_LEGACY && target->flags & SIM_BLOCKING) || (e->flags & SIM_BLOCKING && target->flags & SIM_LEGACY);
        if (same)
            own += e->left_ns;
        if (before && e->kind == SIM_COMPUTE)
            compute += e->left_ns;
    }
    if (compute && device->current == (uint32_t)index + 1)
        compute += device->switch_left_ns;
    return own > compute ? own : compute;
}

static long futex(_Atomic uint32_t *word, int what, uint32_t value, const struct timespec *until, uint32_t mask) {
    return syscall(SYS_futex, word, what, value, until, NULL, mask);
}

void sim_ring(struct sim_device *device) {
    atomic_fetch_add(&device->bell, 1);
    futex(&device->bell, FUTEX_WAKE, 1 << 20, NULL, 0);
}

void sim_sleep(struct sim_device *device, uint32_t bell_seen, uint64_t wall_deadline_ns) {
    struct timespec until = {.tv_sec = (time_t)(wall_deadline_ns / 1000000000u), .tv_nsec = (long)(wall_deadline_ns % 1000000000u)};
    futex(&device->bell, FUTEX_WAIT_BITSET, bell_seen, &until, FUTEX_BITSET_MATCH_ANY);
}
