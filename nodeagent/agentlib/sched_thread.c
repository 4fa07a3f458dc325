/* The scheduler's one thread: waits for all bells and for what is due without one, reads what rang, lets the policy decide, writes gates.
 *
 * `ctl` is ours and mapped. `use` is the tenant's: its words are read with pread, and one page of it is mapped for the sole purpose of
 * naming the futex to the kernel (which answers EFAULT, not SIGBUS, when the tenant has truncated the file). */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "sched_internal.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#define SETTLE_ROUNDS 4 /* a decision may uncover news; at most this often in a row */
#define RINGS_MOST 600u /* in one heartbeat; who rings more often is looked at regularly instead of waking us */
#define SPENT_PART 16u  /* ...as is whose file takes more than this part of our time to look at: all its slots may be full, */
#define MUTED_CHECK_NS 2000000ull
#define MUTED_AGAIN 100u          /* and who is muted takes a hundredth of it at most for each of its devices */
#define DRAIN_CHECK_NS 5000000ull /* the dead do not ring: look this often while somebody is waited for, */
#define TURN_CHECK_NS 50000000ull /* and this often while somebody has a turn that others wait for */
#define POLL_BUSY_NS 1500000ull
#define POLL_IDLE_NS 20000000ull
#define ASK_NS 500000ull   /* asking who holds a lock takes as long as the tenant took locks: at most about this long at once, */
#define ASK_AGAIN 100u     /* and a hundredth of the time */
#define FUTEX_32_SHARED 2u /* FUTEX2_SIZE_U32, no FUTEX2_PRIVATE */

static struct timespec as_timespec(uint64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000ull), .tv_nsec = (long)(ns % 1000000000ull)};
}

/* ---- reading the tenant --------------------------------------------------------------------------------------------------- */

#define BATCH 8u /* slots read at once */

/* The beginning of `use` as it lies in the file: with few processes one read is all. */
typedef struct {
    uint8_t head[offsetof(NbgpuUse, slot)];
    NbgpuUseSlot slot[BATCH];
} Beginning;
_Static_assert(sizeof(Beginning) == offsetof(NbgpuUse, slot) + BATCH * sizeof(NbgpuUseSlot), "beginning of use");

static uint32_t word_at(const Beginning *b, size_t offset) {
    uint32_t word;
    memcpy(&word, b->head + offset, sizeof word);
    return word;
}

static bool read_all(int fd, void *out, size_t size, off_t at) { return pread(fd, out, size, at) == (ssize_t)size; }

/* A process that died has no lock: it wants nothing and has nothing outstanding. Where asking takes too long it is left to the agent's reaping. */
static bool is_dead(Entry *e, uint32_t slot, uint64_t *spent) {
    uint64_t begun = now_ns();
    if (begun < e->ask_from)
        return false;
    bool dead = nbgpu_use_locked(e->use_fd, slot) == 0;
    uint64_t ended = now_ns();
    *spent += ended - begun;
    if (*spent > ASK_NS)
        e->ask_from = ended + ASK_AGAIN * *spent;
    return dead;
}

static uint64_t meter(const NbgpuUseSlot *slot, bool busy, uint64_t now) {
    return slot->busy_ns + (busy && slot->busy_since < now ? now - slot->busy_since : 0);
}

/* What one slot says, into what its kernel says. */
static void add_to_kernel(const Entry *e, const NbgpuUseSlot *slot, bool alive, uint64_t now, KernelSeen *seen) {
    const uint32_t index = kernels_find(&e->kernels->turns, slot->kernel_id);
    KernelSeen *k = &seen[index];
    const bool busy = alive && slot->busy_since, want = alive && slot->want;
    k->meter_ns += meter(slot, busy, now);
    if (busy)
        k->near = (!k->busy || k->near) && slot->near == 1;
    k->busy |= busy;
    k->want |= want;
    k->kernels += busy || want; /* processes, of which a kernel has one as a rule */
    if (index != KERNELS_REST)
        k->kernels = 1;
}

/* The state of the slice on its device, from the slots, and that of its kernels where they have turns of their own. */
static bool read_slots(Entry *e, NbgpuUseSlot slot[BATCH], uint32_t high, SchedSeen *seen, KernelSeen *kernels, uint64_t now) {
    uint64_t spent = 0;
    uint32_t busy = 0, near = 0;
    for (uint32_t first = 0; first < high; first += BATCH) {
        uint32_t n = high - first < BATCH ? high - first : BATCH;
        if (first && !read_all(e->use_fd, slot, n * sizeof *slot, (off_t)(offsetof(NbgpuUse, slot) + first * sizeof *slot)))
            return false;
        for (uint32_t i = 0; i < n; i++) {
            if (!slot[i].owner || !slot[i].ready || slot[i].device != e->device)
                continue;
            const bool active = slot[i].want || slot[i].busy_since;
            const bool alive = active && !is_dead(e, first + i, &spent);
            if (kernels)
                add_to_kernel(e, &slot[i], alive, now, kernels);
            if (!alive)
                continue;
            seen->want |= slot[i].want != 0;
            if (!slot[i].busy_since)
                continue;
            busy++;
            near += slot[i].near == 1;
            if (!seen->busy_since || slot[i].busy_since < seen->busy_since)
                seen->busy_since = slot[i].busy_since;
        }
    }
    seen->busy = busy > 0;
    seen->near = busy == near;
    return true;
}

static const SchedSlice *slice_of(const Entry *e) { return &e->gpu->policy.slice[e->index]; }

/* A slice whose waiting kernels have all spent their limits wants no turn. */
static void look_at_kernels(Entry *e, const KernelSeen *kernels, uint64_t now, SchedSeen *seen) {
    KernelTurns *turns = &e->kernels->turns;
    turns->period_ns = e->gpu->policy.period_ns;
    kernels_observe(turns, kernels, now);
    seen->want = false;
    for (uint32_t i = 0; i < KERNELS_MEMBERS; i++)
        seen->want |= kernels_wants(turns, i);
}

/* Of this thread: it is nobody's fault when others have the processor. */
static uint64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void note_spent(NbgpuSched *s, Entry *e, uint64_t begun, uint64_t now) {
    const uint64_t took = cpu_ns() - begun, pause = MUTED_AGAIN * took;
    s->entry[e->first].spent += took;
    e->look_at = now + (pause > MUTED_CHECK_NS ? pause : MUTED_CHECK_NS);
}

void sched_look(NbgpuSched *s, Entry *e, uint64_t now) {
    const uint64_t begun = cpu_ns();
    s->looks++;
    e->looked_at = now;
    Beginning begin;
    SchedSeen seen = {0};
    KernelSeen kernels[KERNELS_MEMBERS];
    if (e->kernels)
        memset(kernels, 0, sizeof kernels);
    bool good = read_all(e->use_fd, &begin, sizeof begin, 0);
    if (good) {
        const uint32_t high = word_at(&begin, offsetof(NbgpuUse, high_water));
        e->bell = seen.edges = word_at(&begin, offsetof(NbgpuUse, bell)); /* not after the slots: a ring in between is heard */
        good = read_slots(e, begin.slot, high < NBGPU_SLOTS ? high : NBGPU_SLOTS, &seen, e->kernels ? kernels : NULL, now);
    }
    if (good && e->kernels)
        look_at_kernels(e, kernels, now, &seen);
    if (!good) {
        seen = (SchedSeen){0};
        if (!e->broken)
            e->junk++;
    }
    e->broken = !good;
    const SchedSeen was = slice_of(e)->seen;
    seen.peer = was.peer;
    sched_observe(&e->gpu->policy, e->index, seen, now);
    e->gpu->due |= e->kernels || was.want != seen.want || was.busy != seen.busy || was.edges != seen.edges;
    note_spent(s, e, begun, now);
}

/* Behind a closed gate a process rings whenever it begins to want or stops to be busy: there is nothing to see of who does not ring. */
static bool rings_for_all(const Entry *e) { return slice_of(e)->phase == PHASE_OUT && !e->kernels; }

/* It wants, and that is all that there is to know of it before it gets its turn: what it rings meanwhile changes nothing. */
static bool is_unheard(const Entry *e) {
    const SchedSlice *slice = slice_of(e);
    return rings_for_all(e) && slice->seen.want && !slice->seen.busy && !slice->spent_until && e->gate == NBGPU_GATE_CLOSED;
}

/* What may have changed without a ring, or without our having seen it since we woke. */
static void observe_device(NbgpuSched *s, Device *gpu, uint64_t now) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        if (e->used && e->gpu == gpu && e->looked_at < s->woken_at && !rings_for_all(e))
            sched_look(s, e, now);
    }
}

static bool is_muted(const NbgpuSched *s, const Entry *e) {
    return e->rings > RINGS_MOST || s->entry[e->first].spent > s->config.heartbeat_ns / SPENT_PART;
}

/* Look at every entry whose bell is not what it was; `only`: those of this entry's file. */
static void observe_rung(NbgpuSched *s, const Entry *only, uint64_t now) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        uint32_t bell;
        if (!e->used || (only && e->first != only->first) || is_muted(s, e) || (is_unheard(e) && !e->broken))
            continue;
        bool rang = !read_all(e->use_fd, &bell, sizeof bell, offsetof(NbgpuUse, bell)) || bell != e->bell;
        if (rang || e->broken)
            sched_look(s, e, now);
        e->rings += rang;
    }
}

/* Returns whether there is anybody whom nobody hears. */
static bool observe_muted(NbgpuSched *s, uint64_t now) {
    bool any = false;
    for (uint32_t i = 0; i < s->high; i++) {
        if (!s->entry[i].used || !is_muted(s, &s->entry[i]))
            continue;
        if (now >= s->entry[i].look_at)
            sched_look(s, &s->entry[i], now);
        any = true;
    }
    return any;
}

/* ---- deciding and writing -------------------------------------------------------------------------------------------------- */

/* Returns whether anything was written. */
static bool write_gate(Entry *e) {
    const SchedSlice *slice = &e->gpu->policy.slice[e->index];
    NbgpuCtlDevice *out = &e->ctl->device[e->device];
    uint32_t gate = sched_gate(slice);
    uint64_t turn_end = slice->turn_end;
    if (gate != NBGPU_GATE_OPEN)
        turn_end = e->turn_end ? e->turn_end : now_ns(); /* 0 would say that nobody need ring */
    if (gate == e->gate && turn_end == e->turn_end)
        return false;
    __atomic_store_n(&out->turn_end_ns, turn_end, __ATOMIC_SEQ_CST);
    if (gate != e->gate) {
        __atomic_store_n(&out->gate, gate, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&out->gate_generation, 1, __ATOMIC_SEQ_CST);
        if (gate == NBGPU_GATE_OPEN)
            futex_wake(&out->gate);
    }
    e->gate = gate;
    e->turn_end = turn_end;
    return true;
}

uint32_t *sched_kernel_gate(Entry *e, uint32_t member) {
    return member == KERNELS_REST ? &e->ctl->device[e->device].rest_gate : &e->ctl->kernel[member].gate[e->device];
}

/* Decide whose turn it is inside the slice. Returns whether a gate was closed, or came into force: its kernel need not have rung before. */
static bool settle_kernels(Entry *e) {
    bool closed = false;
    kernels_step(&e->kernels->turns, e->gate == NBGPU_GATE_OPEN);
    for (uint32_t i = 0; i < KERNELS_MEMBERS; i++) {
        const uint32_t gate = kernels_gate(&e->kernels->turns, i), was = e->kernels->gate[i];
        if (gate == was)
            continue;
        uint32_t *word = sched_kernel_gate(e, i);
        __atomic_store_n(word, gate, __ATOMIC_SEQ_CST);
        if (gate != NBGPU_GATE_CLOSED)
            futex_wake(word);
        closed |= gate == NBGPU_GATE_CLOSED || was == NBGPU_GATE_NONE;
        e->kernels->gate[i] = gate;
    }
    return closed;
}

/* Whoever is about to get a turn is asked again whether it wants it: the dead do not ring. */
static bool ask_next(NbgpuSched *s, Device *gpu) {
    bool asked = false;
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        if (!e->used || e->gpu != gpu || e->gate == NBGPU_GATE_OPEN || slice_of(e)->phase != PHASE_OPEN)
            continue;
        sched_look(s, e, now_ns());
        asked |= !slice_of(e)->seen.want;
    }
    return asked;
}

/* ...and so is whoever gets the turn in its place, or is let in beside it. */
static void decide(NbgpuSched *s, Device *gpu) {
    const SchedDevice *policy = &gpu->policy;
    int owner, guest;
    sched_step(&gpu->policy, now_ns());
    do {
        owner = policy->owner;
        guest = policy->guest;
        if (!ask_next(s, gpu))
            return;
        sched_step(&gpu->policy, now_ns());
    } while (policy->owner != owner || policy->guest != guest);
}

static bool has_parts(const Entry *e, uint32_t index) { return e->first != index || e->next != ENTRIES; }

/* The gate of a slice's part was another before: a turn that began, or ended, does so on the slice's other devices. */
static void turn_together(NbgpuSched *s, const Entry *e, uint32_t was) {
    const bool is_open = e->gate == NBGPU_GATE_OPEN;
    if (is_open == (was == NBGPU_GATE_OPEN))
        return;
    for (uint32_t i = e->first; i < ENTRIES; i = s->entry[i].next) {
        Entry *part = &s->entry[i];
        if (part->gpu == e->gpu)
            continue;
        SchedDevice *policy = &part->gpu->policy;
        if (is_open ? sched_pull(policy, part->index, now_ns()) : sched_close(policy, part->index, now_ns()))
            part->gpu->due = true;
    }
}

/* While a part of the slice is in its turn on another device and computes, this part is not done with its own: its program may wait for that,
 * as the ranks of a training do at the end of each step. It counts only where others wait for the device: else nothing rings when it is done. */
static void heed_peers(NbgpuSched *s, Entry *e, uint64_t now) {
    SchedSeen seen = slice_of(e)->seen;
    bool peer = false;
    for (uint32_t i = e->first; i < ENTRIES; i = s->entry[i].next) {
        Entry *part = &s->entry[i];
        if (part->gpu == e->gpu || slice_of(part)->phase != PHASE_OPEN)
            continue;
        if (part->looked_at < s->woken_at)
            sched_look(s, part, now);
        peer |= slice_of(part)->seen.busy && slice_of(part)->turn_end;
    }
    if (peer == seen.peer)
        return;
    seen.peer = peer;
    sched_observe(&e->gpu->policy, e->index, seen, now);
    e->gpu->due = true;
}

/* Step a device until nothing changes. After a gate was closed or got an end the slice is read again: it need not have rung for what it
 * did just before. */
static void settle(NbgpuSched *s, Device *gpu) {
    for (int round = 0; round < SETTLE_ROUNDS; round++) {
        bool again = false;
        decide(s, gpu);
        for (uint32_t i = 0; i < s->high; i++) {
            Entry *e = &s->entry[i];
            if (!e->used || e->gpu != gpu)
                continue;
            const uint32_t was = e->gate;
            bool had_no_end = e->gate == NBGPU_GATE_OPEN && !e->turn_end;
            if (write_gate(e) && (had_no_end || e->gate != NBGPU_GATE_OPEN)) {
                sched_look(s, e, now_ns());
                again = true;
            }
            if (e->kernels && settle_kernels(e)) {
                sched_look(s, e, now_ns());
                again = true;
            }
            turn_together(s, e, was);
        }
        if (!again)
            break;
    }
    gpu->due = false;
}

static bool is_busy(const SchedDevice *d) {
    for (uint32_t i = 0; i < d->high; i++)
        if (d->slice[i].phase == PHASE_DRAIN || (d->slice[i].phase == PHASE_OPEN && d->slice[i].turn_end))
            return true;
    return false;
}

static bool is_draining(const SchedDevice *d) {
    for (uint32_t i = 0; i < d->high; i++)
        if (d->slice[i].phase == PHASE_DRAIN)
            return true;
    return false;
}

/* When the slices' kernels need the next decision. */
static uint64_t kernels_wake(const NbgpuSched *s, const Device *gpu, bool *watched) {
    uint64_t at = SCHED_NEVER;
    for (uint32_t i = 0; i < s->high; i++) {
        const Entry *e = &s->entry[i];
        if (!e->used || e->gpu != gpu || !e->kernels)
            continue;
        at = e->kernels->turns.wake_at < at ? e->kernels->turns.wake_at : at;
        *watched |= kernels_watched(&e->kernels->turns);
    }
    return at;
}

static void heartbeat(NbgpuSched *s, uint64_t now) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        if (!e->used)
            continue;
        __atomic_store_n(&e->ctl->heartbeat_ns, now, __ATOMIC_RELEASE);
        if (e->broken || ((slice_of(e)->seen.want || slice_of(e)->seen.busy) && !is_unheard(e)))
            sched_look(s, e, now); /* a ring that was lost is made up for */
        if (is_muted(s, e))
            e->junk++;
        e->rings = 0;
    }
    for (uint32_t i = 0; i < s->high; i++)
        s->entry[i].spent = 0;
    s->next_heartbeat = now + s->config.heartbeat_ns;
}

/* When to look again at who has a turn, or is waited for. Drains: at the same moments for all devices, so that one look is for all of them.
 * Turns: not shortly before their end, which is a look too. */
static uint64_t next_check(const Device *gpu, uint64_t now) {
    if (gpu->watched)
        return (now / DRAIN_CHECK_NS + gpu->watched) * DRAIN_CHECK_NS;
    const uint64_t at = now + TURN_CHECK_NS;
    return is_busy(&gpu->policy) && at + TURN_CHECK_NS / 2 < gpu->policy.wake_at ? at : SCHED_NEVER;
}

/* What is due on one device; returns when to come back to it at the latest. */
static uint64_t work_on(NbgpuSched *s, Device *gpu, uint64_t now) {
    SchedDevice *policy = &gpu->policy;
    if (gpu->due || now >= policy->wake_at || now >= gpu->check_at) {
        observe_device(s, gpu, now);
        if (gpu->due || now >= policy->wake_at) {
            settle(s, gpu);
            bool kernels_watched = false;
            const uint64_t kernels = kernels_wake(s, gpu, &kernels_watched);
            gpu->watched = kernels_watched ? 1 : is_draining(policy) ? 2 : 0; /* a drain rings as a rule */
            if (kernels < policy->wake_at)
                policy->wake_at = kernels;
        }
        gpu->check_at = next_check(gpu, now);
    }
    const uint64_t at = sched_wake_at(policy);
    return at < gpu->check_at ? at : gpu->check_at;
}

/* Everything that is due; returns when to come back at the latest. */
static uint64_t work(NbgpuSched *s) {
    uint64_t now = now_ns();
    if (now + s->config.heartbeat_ns / 4 >= s->next_heartbeat) /* awake anyway: rather a little too early */
        heartbeat(s, now);
    for (uint32_t i = 0; i < s->high; i++)
        if (s->entry[i].used && has_parts(&s->entry[i], i))
            heed_peers(s, &s->entry[i], now);
    uint64_t at = s->next_heartbeat;
    if (observe_muted(s, now) && now + MUTED_CHECK_NS < at)
        at = now + MUTED_CHECK_NS;
    for (uint32_t i = 0; i < s->devices; i++) {
        const uint64_t again = work_on(s, s->device[i], now);
        at = again < at ? again : at;
    }
    for (uint32_t i = 0; i < s->devices; i++)
        at = s->device[i]->due ? now : at; /* a turn on a later device began or ended on this one */
    return at;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------------------- */

/* The bells to listen to, one for each file. Returns how many, 0: one of them has rung since not all of its entries were looked at. */
static uint32_t prepare_waits(NbgpuSched *s) {
    uint32_t n = 1;
    s->waits[0] = (FutexWait){.val = s->poke, .uaddr = (uintptr_t)&s->poke, .flags = FUTEX_32_SHARED};
    for (uint32_t i = 0; i < s->high && n < WAITERS; i++) {
        const Entry *e = &s->entry[i];
        if (!e->used || e->broken || is_muted(s, e) || is_unheard(e))
            continue;
        Entry *first = &s->entry[e->first];
        if (first->waited == s->wakeups) {
            if (s->waits[first->wait].val != e->bell)
                return 0;
            continue;
        }
        first->waited = s->wakeups;
        first->wait = n;
        s->heard[n] = (uint16_t)i;
        s->waits[n] = (FutexWait){.val = e->bell, .uaddr = (uintptr_t)(e->page + offsetof(NbgpuUse, bell)), .flags = FUTEX_32_SHARED};
        n++;
    }
    return n;
}

bool sched_polls(const NbgpuSched *s) {
    uint32_t n = 1;
    for (uint32_t i = 0; i < s->high; i++)
        n += s->entry[i].used && s->entry[i].first == i;
    return s->no_waitv || n > WAITERS;
}

/* Without futex_waitv (kernel < 5.16), or with more slices than it takes: look regularly, often only while somebody is active. */
static void poll_bells(NbgpuSched *s, uint64_t until) {
    bool busy = false;
    for (uint32_t i = 0; i < s->devices && !busy; i++)
        busy = is_busy(&s->device[i]->policy);
    uint64_t at = now_ns() + (busy ? POLL_BUSY_NS : POLL_IDLE_NS);
    struct timespec t = as_timespec(at < until ? at : until);
    uint32_t poke = s->poke;
    pthread_mutex_unlock(&s->lock);
    syscall(SYS_futex, &s->poke, FUTEX_WAIT_BITSET, poke, &t, NULL, FUTEX_BITSET_MATCH_ANY);
    pthread_mutex_lock(&s->lock);
    s->woken_at = now_ns();
    observe_rung(s, NULL, s->woken_at);
}

static void wait_bells(NbgpuSched *s, uint64_t until) {
    if (sched_polls(s)) {
        poll_bells(s, until);
        return;
    }
    uint32_t n = prepare_waits(s);
    if (!n) {
        s->woken_at = now_ns();
        observe_rung(s, NULL, s->woken_at);
        return;
    }
    struct timespec t = as_timespec(until);
    pthread_mutex_unlock(&s->lock);
    long rc = syscall(SYS_futex_waitv, s->waits, n, 0, &t, CLOCK_MONOTONIC);
    int error = rc < 0 ? errno : 0;
    pthread_mutex_lock(&s->lock);
    s->woken_at = now_ns();
    if (rc < 0 && (error == ENOSYS || error == EPERM))
        s->no_waitv = true;
    else if (rc > 0 && (uint32_t)rc < n)
        s->bells++, observe_rung(s, &s->entry[s->heard[rc]], s->woken_at);
    else if (error == EAGAIN || error == EFAULT) /* rang before we slept, or a file shrank: it does not say which */
        s->bells++, observe_rung(s, NULL, s->woken_at);
}

void *sched_run(void *self) {
    NbgpuSched *s = self;
    prctl(PR_SET_NAME, "nbgpu-turns", 0, 0, 0);
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), -10); /* a GPU waits for it; where it may not, it goes on as it is */
    pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        s->wakeups++;
        uint64_t until = work(s);
        wait_bells(s, until);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}
