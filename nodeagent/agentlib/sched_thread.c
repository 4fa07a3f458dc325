/* The scheduler's one thread: waits for all bells and for the next turn end, reads what rang, lets the policy decide, writes gates.
 *
 * `ctl` is ours and mapped. `use` is the tenant's: its words are read with pread, and one page of it is mapped for the sole purpose of
 * naming the futex to the kernel (which answers EFAULT, not SIGBUS, when the tenant has truncated the file). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sched_policy.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#define WAITERS 128u    /* most that futex_waitv takes */
#define ENTRIES 1024u   /* (slice, device) pairs of a node */
#define PAGE 4096u      /* the bell is in the first one */
#define SETTLE_ROUNDS 4 /* a decision may uncover news; at most this often in a row */
#define RINGS_MOST 600u /* in one heartbeat; who rings more often is looked at regularly instead of waking us */
#define MUTED_CHECK_NS 2000000ull
#define DRAIN_CHECK_NS 5000000ull /* the dead do not ring: look this often while somebody is waited for */
#define POLL_BUSY_NS 1500000ull
#define POLL_IDLE_NS 20000000ull
#define ASK_NS 500000ull   /* asking who holds a lock takes as long as the tenant took locks: at most about this long at once, */
#define ASK_AGAIN 100u     /* and a hundredth of the time */
#define FUTEX_32_SHARED 2u /* FUTEX2_SIZE_U32, no FUTEX2_PRIVATE */

typedef struct {
    uint64_t val, uaddr;
    uint32_t flags, reserved;
} FutexWait;

typedef struct {
    uint32_t physical;
    uint32_t users;
    bool due; /* something of it was seen anew */
    SchedDevice policy;
} Device;

typedef struct {
    bool used;
    bool broken;     /* its `use` file cannot be read: no bell, no turns */
    bool first_bell; /* waits on behalf of all entries of that file */
    int use_fd;
    ino_t inode;
    dev_t inode_dev;
    NbgpuCtl *ctl;
    const uint8_t *page; /* address of the futex, never read */
    uint32_t device;     /* in ctl */
    Device *gpu;
    int index; /* in gpu->policy */
    uint32_t bell;
    uint32_t gate;
    uint64_t turn_end;
    uint64_t junk;
    uint32_t rings;    /* seen since the last heartbeat */
    uint64_t ask_from; /* before this, who is busy counts as alive */
} Entry;

struct NbgpuSched {
    NbgpuSchedConfig config;
    pthread_mutex_t lock;
    pthread_t thread;
    _Atomic uint32_t poke; /* futex: an API call changed something */
    bool stop, no_waitv;
    uint64_t wakeups, next_heartbeat;
    uint32_t high;
    Entry entry[ENTRIES];
    uint32_t devices;
    Device *device[ENTRIES];
    FutexWait waits[WAITERS];
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static struct timespec as_timespec(uint64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000ull), .tv_nsec = (long)(ns % 1000000000ull)};
}

static void futex_wake(const void *word) { syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0); }

/* ---- reading the tenant --------------------------------------------------------------------------------------------------- */

/* What the scheduler needs of the head of `use`, as it lies in the file. */
typedef struct {
    uint8_t before_bell[offsetof(NbgpuUse, bell)];
    uint32_t bell;
} Head;

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

/* The state of the slice on its device, from the slots. */
static bool read_slots(Entry *e, uint32_t high, SchedSeen *seen) {
    uint64_t spent = 0;
    NbgpuUseSlot slot[8];
    uint32_t busy = 0, near = 0;
    for (uint32_t first = 0; first < high; first += 8) {
        uint32_t n = high - first < 8 ? high - first : 8;
        if (!read_all(e->use_fd, slot, n * sizeof *slot, (off_t)(offsetof(NbgpuUse, slot) + first * sizeof *slot)))
            return false;
        for (uint32_t i = 0; i < n; i++) {
            if (!slot[i].owner || !slot[i].ready || slot[i].device != e->device)
                continue;
            if (!(slot[i].want || slot[i].busy_since) || is_dead(e, first + i, &spent))
                continue;
            seen->want |= slot[i].want != 0;
            if (!slot[i].busy_since)
                continue;
            busy++;
            near += slot[i].near == 1;
        }
    }
    seen->busy = busy > 0;
    seen->near = busy == near;
    return true;
}

static void observe(Entry *e, uint64_t now) {
    Head head;
    SchedSeen seen = {0};
    uint32_t high;
    bool good = read_all(e->use_fd, &head, sizeof head, 0);
    if (good) {
        memcpy(&high, head.before_bell + offsetof(NbgpuUse, high_water), sizeof high);
        e->bell = head.bell;
        seen.edges = head.bell;
        good = read_slots(e, high < NBGPU_SLOTS ? high : NBGPU_SLOTS, &seen);
    }
    if (!good) {
        seen = (SchedSeen){0};
        if (!e->broken)
            e->junk++;
    }
    e->broken = !good;
    sched_observe(&e->gpu->policy, e->index, seen, now);
    e->gpu->due = true;
}

static void observe_device(NbgpuSched *s, Device *gpu, uint64_t now) {
    for (uint32_t i = 0; i < s->high; i++)
        if (s->entry[i].used && s->entry[i].gpu == gpu)
            observe(&s->entry[i], now);
}

static bool is_muted(const Entry *e) { return e->rings > RINGS_MOST; }

/* Look at every entry whose bell is not what it was. */
static void observe_rung(NbgpuSched *s, uint64_t now) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        uint32_t bell;
        if (!e->used || is_muted(e))
            continue;
        bool rang = !read_all(e->use_fd, &bell, sizeof bell, offsetof(NbgpuUse, bell)) || bell != e->bell;
        if (rang || e->broken)
            observe(e, now);
        e->rings += rang;
    }
}

/* Returns whether there is anybody whom nobody hears. */
static bool observe_muted(NbgpuSched *s, uint64_t now) {
    bool any = false;
    for (uint32_t i = 0; i < s->high; i++) {
        if (!s->entry[i].used || !is_muted(&s->entry[i]))
            continue;
        observe(&s->entry[i], now);
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

/* Step a device until nothing changes. After a gate was closed or got an end the slice is read again: it need not have rung for what it
 * did just before. */
static void settle(NbgpuSched *s, Device *gpu) {
    for (int round = 0; round < SETTLE_ROUNDS; round++) {
        bool again = false;
        sched_step(&gpu->policy, now_ns());
        for (uint32_t i = 0; i < s->high; i++) {
            Entry *e = &s->entry[i];
            if (!e->used || e->gpu != gpu)
                continue;
            bool had_no_end = e->gate == NBGPU_GATE_OPEN && !e->turn_end;
            if (write_gate(e) && (had_no_end || e->gate != NBGPU_GATE_OPEN)) {
                observe(e, now_ns());
                again = true;
            }
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

static void heartbeat(NbgpuSched *s, uint64_t now) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        if (!e->used)
            continue;
        __atomic_store_n(&e->ctl->heartbeat_ns, now, __ATOMIC_RELEASE);
        if (e->broken)
            observe(e, now);
        if (is_muted(e))
            e->junk++;
        e->rings = 0;
    }
    s->next_heartbeat = now + s->config.heartbeat_ns;
}

/* Everything that is due; returns when to come back at the latest. */
static uint64_t work(NbgpuSched *s) {
    uint64_t now = now_ns();
    if (now >= s->next_heartbeat)
        heartbeat(s, now);
    uint64_t at = s->next_heartbeat;
    if (observe_muted(s, now) && now + MUTED_CHECK_NS < at)
        at = now + MUTED_CHECK_NS;
    for (uint32_t i = 0; i < s->devices; i++) {
        Device *gpu = s->device[i];
        bool timed = now >= gpu->policy.wake_at;
        if (!gpu->due && !timed && !is_busy(&gpu->policy))
            continue;
        if (gpu->due || timed) {
            /* An owner without an end does not ring: ask everybody before deciding. */
            observe_device(s, gpu, now);
            settle(s, gpu);
        }
        uint64_t check = is_busy(&gpu->policy) ? now_ns() + DRAIN_CHECK_NS : SCHED_NEVER;
        if (check < gpu->policy.wake_at)
            gpu->policy.wake_at = check;
        if (gpu->policy.wake_at < at)
            at = gpu->policy.wake_at;
    }
    return at;
}

/* ---- waiting ---------------------------------------------------------------------------------------------------------------- */

static uint32_t prepare_waits(NbgpuSched *s) {
    uint32_t n = 1;
    s->waits[0] = (FutexWait){.val = s->poke, .uaddr = (uintptr_t)&s->poke, .flags = FUTEX_32_SHARED};
    for (uint32_t i = 0; i < s->high && n < WAITERS; i++) {
        const Entry *e = &s->entry[i];
        if (!e->used || e->broken || is_muted(e) || !e->first_bell)
            continue;
        s->waits[n] = (FutexWait){.val = e->bell, .uaddr = (uintptr_t)(e->page + offsetof(NbgpuUse, bell)), .flags = FUTEX_32_SHARED};
        n++;
    }
    return n;
}

static bool too_many(const NbgpuSched *s) {
    uint32_t n = 1;
    for (uint32_t i = 0; i < s->high; i++)
        n += s->entry[i].used && s->entry[i].first_bell;
    return n > WAITERS;
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
    observe_rung(s, now_ns());
}

static void wait_bells(NbgpuSched *s, uint64_t until) {
    if (s->no_waitv || too_many(s)) {
        poll_bells(s, until);
        return;
    }
    uint32_t n = prepare_waits(s);
    struct timespec t = as_timespec(until);
    pthread_mutex_unlock(&s->lock);
    long rc = syscall(SYS_futex_waitv, s->waits, n, 0, &t, CLOCK_MONOTONIC);
    int error = rc < 0 ? errno : 0;
    pthread_mutex_lock(&s->lock);
    if (rc < 0 && (error == ENOSYS || error == EPERM))
        s->no_waitv = true;
    else if (error != ETIMEDOUT && error != EINTR)
        observe_rung(s, now_ns()); /* somebody rang, or before we slept (EAGAIN), or a file shrank (EFAULT) */
}

static void *run(void *self) {
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

/* ---- the API ------------------------------------------------------------------------------------------------------------------ */

static void poke(NbgpuSched *s) {
    atomic_fetch_add(&s->poke, 1);
    futex_wake((const void *)&s->poke);
}

NbgpuSched *nbgpu_sched_open(const NbgpuSchedConfig *config) {
    NbgpuSched *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->config = sched_config(config);
    pthread_mutex_init(&s->lock, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the agent's own threads */
    int rc = pthread_create(&s->thread, NULL, run, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!rc)
        return s;
    free(s);
    errno = rc;
    return NULL;
}

static void drop_device(NbgpuSched *s, Device *gpu) {
    if (--gpu->users)
        return;
    for (uint32_t i = 0; i < s->devices; i++)
        if (s->device[i] == gpu)
            s->device[i] = s->device[--s->devices];
    free(gpu);
}

static Device *take_device(NbgpuSched *s, uint32_t physical) {
    for (uint32_t i = 0; i < s->devices; i++) {
        if (s->device[i]->physical != physical)
            continue;
        s->device[i]->users++;
        return s->device[i];
    }
    Device *gpu = calloc(1, sizeof *gpu);
    if (!gpu)
        return NULL;
    gpu->physical = physical;
    gpu->users = 1;
    sched_init(&gpu->policy, &s->config, now_ns());
    s->device[s->devices++] = gpu;
    return gpu;
}

/* One entry of each `use` file waits for its bell. */
static void choose_bells(NbgpuSched *s) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        e->first_bell = e->used;
        for (uint32_t j = 0; j < i && e->first_bell; j++)
            e->first_bell = !s->entry[j].used || s->entry[j].inode != e->inode || s->entry[j].inode_dev != e->inode_dev;
    }
}

static void release(NbgpuSched *s, Entry *e) {
    if (e->gpu && e->index >= 0)
        sched_leave(&e->gpu->policy, e->index, now_ns());
    if (e->gpu) {
        e->gpu->due = true;
        drop_device(s, e->gpu);
    }
    if (e->ctl)
        munmap(e->ctl, sizeof *e->ctl);
    if (e->page)
        munmap((void *)e->page, PAGE);
    if (e->use_fd >= 0)
        close(e->use_fd);
    *e = (Entry){0};
}

static int map_files(Entry *e, int ctl_fd, int use_fd) {
    struct stat ctl_stat, use_stat;
    if (fstat(ctl_fd, &ctl_stat) || fstat(use_fd, &use_stat))
        return -errno;
    if ((size_t)ctl_stat.st_size < sizeof(NbgpuCtl) || (size_t)use_stat.st_size < sizeof(NbgpuUse))
        return -EBADMSG;
    e->inode = use_stat.st_ino;
    e->inode_dev = use_stat.st_dev;
    if ((e->use_fd = fcntl(use_fd, F_DUPFD_CLOEXEC, 3)) < 0)
        return -errno;
    void *ctl = mmap(NULL, sizeof(NbgpuCtl), PROT_READ | PROT_WRITE, MAP_SHARED, ctl_fd, 0);
    if (ctl == MAP_FAILED)
        return -errno;
    e->ctl = ctl;
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, use_fd, 0);
    if (page == MAP_FAILED)
        return -errno;
    e->page = page;
    return e->ctl->magic == NBGPU_CTL_MAGIC ? 0 : -EBADMSG;
}

static int add_locked(NbgpuSched *s, Entry *e, int ctl_fd, int use_fd, uint32_t physical, uint32_t compute_milli, uint32_t mode) {
    e->index = -1;
    e->use_fd = -1;
    int rc = map_files(e, ctl_fd, use_fd);
    if (rc)
        return rc;
    e->gpu = take_device(s, physical);
    if (!e->gpu)
        return -ENOMEM;
    e->index = sched_join(&e->gpu->policy, compute_milli, mode == NBGPU_MODE_STRICT, now_ns());
    if (e->index < 0)
        return -ENOSPC;
    e->used = true;
    e->gate = UINT32_MAX; /* unlike any: the first step writes it */
    e->ctl->heartbeat_ns = now_ns();
    choose_bells(s);
    observe(e, now_ns());
    return 0;
}

int nbgpu_sched_add(NbgpuSched *s, int ctl_fd, int use_fd, uint32_t device, uint32_t physical, uint32_t compute_milli, uint32_t mode) {
    if (!s || device >= NBGPU_DEVICES || compute_milli < 1 || compute_milli > 1000 || mode > NBGPU_MODE_BURST)
        return -EINVAL;
    pthread_mutex_lock(&s->lock);
    uint32_t id = 0;
    while (id < ENTRIES && s->entry[id].used)
        id++;
    int rc = id < ENTRIES ? 0 : -ENOSPC;
    if (!rc) {
        Entry *e = &s->entry[id];
        e->device = device;
        if (id >= s->high)
            s->high = id + 1;
        rc = add_locked(s, e, ctl_fd, use_fd, physical, compute_milli, mode);
        if (rc)
            release(s, e);
    }
    poke(s);
    pthread_mutex_unlock(&s->lock);
    return rc ? rc : (int)id;
}

/* The entry, with the lock held; NULL (and the lock free) when there is none. */
static Entry *hold(NbgpuSched *s, int id) {
    if (!s || id < 0 || id >= (int)ENTRIES)
        return NULL;
    pthread_mutex_lock(&s->lock);
    if (s->entry[id].used)
        return &s->entry[id];
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static void let_go(NbgpuSched *s) {
    poke(s);
    pthread_mutex_unlock(&s->lock);
}

int nbgpu_sched_set(NbgpuSched *s, int id, uint32_t compute_milli, uint32_t mode) {
    if (compute_milli < 1 || compute_milli > 1000 || mode > NBGPU_MODE_BURST)
        return -EINVAL;
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    sched_set(&e->gpu->policy, e->index, compute_milli, mode == NBGPU_MODE_STRICT, now_ns());
    e->gpu->due = true;
    let_go(s);
    return 0;
}

int nbgpu_sched_suspend(NbgpuSched *s, int id, int suspended) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    sched_suspend(&e->gpu->policy, e->index, suspended != 0, now_ns());
    e->gpu->due = true;
    let_go(s);
    return 0;
}

int nbgpu_sched_remove(NbgpuSched *s, int id) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    NbgpuCtlDevice *out = &e->ctl->device[e->device];
    __atomic_store_n(&out->gate, NBGPU_GATE_NONE, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&out->gate_generation, 1, __ATOMIC_SEQ_CST);
    futex_wake(&out->gate);
    release(s, e);
    choose_bells(s);
    let_go(s);
    return 0;
}

int nbgpu_sched_stats(NbgpuSched *s, int id, NbgpuSchedStats *out) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    const SchedSlice *slice = &e->gpu->policy.slice[e->index];
    *out = (NbgpuSchedStats){
        .charged_ns = slice->charged_ns,
        .turns = slice->turns,
        .overruns = slice->overruns,
        .junk = e->junk,
        .gate = e->gate,
        .active = slice->seen.want || slice->seen.busy,
    };
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int nbgpu_sched_totals(NbgpuSched *s, NbgpuSchedTotals *out) {
    if (!s)
        return -EINVAL;
    clockid_t clock;
    struct timespec cpu = {0};
    pthread_mutex_lock(&s->lock);
    *out = (NbgpuSchedTotals){.wakeups = s->wakeups, .polling = s->no_waitv || too_many(s)};
    for (uint32_t i = 0; i < s->high; i++)
        out->entries += s->entry[i].used;
    pthread_mutex_unlock(&s->lock);
    if (!pthread_getcpuclockid(s->thread, &clock))
        clock_gettime(clock, &cpu);
    out->cpu_ns = (uint64_t)cpu.tv_sec * 1000000000ull + (uint64_t)cpu.tv_nsec;
    return 0;
}

void nbgpu_sched_close(NbgpuSched *s) {
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    s->stop = true;
    poke(s);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        if (!e->used)
            continue;
        __atomic_store_n(&e->ctl->heartbeat_ns, 0, __ATOMIC_RELEASE);
        futex_wake(&e->ctl->device[e->device].gate);
        release(s, e);
    }
    pthread_mutex_destroy(&s->lock);
    free(s);
}
