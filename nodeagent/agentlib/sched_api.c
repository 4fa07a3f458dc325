/* What the agent asks of the scheduler: start and stop, slices that come, change and go, and what it has counted. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sched_internal.h"

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
    int rc = pthread_create(&s->thread, NULL, sched_run, s);
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

/* Entries of one `use` file share its bell, and are the parts of one slice. */
static void find_parts(NbgpuSched *s) {
    for (uint32_t i = 0; i < s->high; i++) {
        Entry *e = &s->entry[i];
        uint32_t last = ENTRIES;
        e->first = i;
        for (uint32_t j = 0; j < i && e->used; j++)
            if (s->entry[j].used && s->entry[j].inode == e->inode && s->entry[j].inode_dev == e->inode_dev)
                last = j;
        e->next = ENTRIES;
        if (last == ENTRIES)
            continue;
        e->first = s->entry[last].first;
        s->entry[last].next = i;
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
    free(e->kernels);
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

/* All gates of kernels, as where none has a limit. */
static void no_kernel_gates(Entry *e) {
    for (uint32_t i = 0; i < KERNELS_MEMBERS; i++) {
        uint32_t *word = sched_kernel_gate(e, i);
        if (__atomic_exchange_n(word, NBGPU_GATE_NONE, __ATOMIC_SEQ_CST) != NBGPU_GATE_NONE)
            futex_wake(word);
    }
}

/* Take over the kernels' limits of compute from ctl. */
static int read_kernels(Entry *e) {
    bool any = false;
    for (uint32_t i = 0; i < NBGPU_KERNELS; i++)
        any |= e->ctl->kernel[i].id[0] && e->ctl->kernel[i].compute_milli;
    if (any && !e->kernels) {
        no_kernel_gates(e);
        e->kernels = calloc(1, sizeof *e->kernels);
        if (!e->kernels)
            return -ENOMEM;
        kernels_init(&e->kernels->turns, &e->gpu->policy.config, now_ns());
        for (uint32_t i = 0; i < KERNELS_MEMBERS; i++)
            e->kernels->gate[i] = NBGPU_GATE_NONE;
    }
    if (!any) {
        no_kernel_gates(e);
        free(e->kernels);
        e->kernels = NULL;
        return 0;
    }
    for (uint32_t i = 0; i < NBGPU_KERNELS; i++) {
        const NbgpuCtlKernel *k = &e->ctl->kernel[i];
        kernels_set(&e->kernels->turns, i, k->id, k->id[0] ? k->compute_milli : 0, now_ns());
    }
    return 0;
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
    find_parts(s);
    e->gpu->due = true;
    rc = read_kernels(e);
    sched_look(s, e, now_ns());
    return rc;
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
        if (rc) {
            release(s, e);
            find_parts(s);
        }
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

int nbgpu_sched_kernels(NbgpuSched *s, int id) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    int rc = read_kernels(e);
    sched_look(s, e, now_ns());
    e->gpu->due = true;
    let_go(s);
    return rc;
}

typedef void Change(SchedDevice *device, int index, uint64_t value, uint64_t now);

static int change(NbgpuSched *s, int id, Change *policy, uint64_t value) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    policy(&e->gpu->policy, e->index, value, now_ns());
    e->gpu->due = true;
    let_go(s);
    return 0;
}

static void suspend(SchedDevice *device, int index, uint64_t suspended, uint64_t now) { sched_suspend(device, index, suspended != 0, now); }

int nbgpu_sched_suspend(NbgpuSched *s, int id, int suspended) { return change(s, id, suspend, suspended != 0); }

int nbgpu_sched_owe(NbgpuSched *s, int id, uint64_t ns) { return change(s, id, sched_owe, ns); }

int nbgpu_sched_bring(NbgpuSched *s, int id, uint64_t ns) { return change(s, id, sched_bring, ns); }

int nbgpu_sched_remove(NbgpuSched *s, int id) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    NbgpuCtlDevice *out = &e->ctl->device[e->device];
    __atomic_store_n(&out->gate, NBGPU_GATE_NONE, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&out->gate_generation, 1, __ATOMIC_SEQ_CST);
    futex_wake(&out->gate);
    no_kernel_gates(e);
    release(s, e);
    find_parts(s);
    let_go(s);
    return 0;
}

int nbgpu_sched_stats(NbgpuSched *s, int id, NbgpuSchedStats *out) {
    Entry *e = hold(s, id);
    if (!e)
        return -ENOENT;
    const SchedSlice *slice = &e->gpu->policy.slice[e->index];
    sched_charge(&e->gpu->policy, now_ns());
    *out = (NbgpuSchedStats){
        .charged_ns = slice->charged_ns,
        .turns = slice->turns,
        .overruns = slice->overruns,
        .junk = e->junk,
        .gate = e->gate,
        .active = slice->seen.want || slice->seen.busy,
        .held_ns = slice->held_ns,
        .ahead_ns = sched_ahead(&e->gpu->policy, e->index),
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
    *out = (NbgpuSchedTotals){.wakeups = s->wakeups, .bells = s->bells, .looks = s->looks, .polling = sched_polls(s)};
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
