/* sanitized_agent FOLDER ROUNDS: the agent's library compiled with a sanitizer: slices that come and go, tenants that ask for turns, tenants
 * that spoil their file, and readers of all of it, at once. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "nbgpu_agent.h"

#define SLICES 6

typedef struct {
    int ctl_fd, use_fd, id;
    NbgpuCtl *ctl;
    NbgpuUse *use;
    uint64_t turns;
} Slice;

static NbgpuSched *scheduler;
static Slice slices[SLICES];
static unsigned rounds;
static _Atomic int stop;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(3);
}

static void pause_us(unsigned us) {
    const struct timespec t = {0, us * 1000l};
    nanosleep(&t, NULL);
}

static void *map(const char *folder, const char *kind, unsigned i, size_t size, int *fd) {
    char path[400];
    snprintf(path, sizeof path, "%s/%s%u", folder, kind, i);
    *fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (*fd < 0 || ftruncate(*fd, (off_t)size) != 0)
        fail(path);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (at == MAP_FAILED)
        fail(path);
    return at;
}

static void make(const char *folder, unsigned i) {
    Slice *s = &slices[i];
    s->ctl = map(folder, "ctl", i, sizeof *s->ctl, &s->ctl_fd);
    s->use = map(folder, "use", i, sizeof *s->use, &s->use_fd);
    s->ctl->magic = NBGPU_CTL_MAGIC, s->ctl->version = NBGPU_VERSION, s->ctl->size = sizeof *s->ctl;
    s->use->magic = NBGPU_USE_MAGIC, s->use->version = NBGPU_VERSION, s->use->size = sizeof *s->use;
    s->use->high_water = 1;
    s->use->slot[0].owner = (uint64_t)getpid() << 32 | 1;
    s->use->slot[0].ready = 1;
    snprintf(s->use->slot[0].kernel_id, sizeof s->use->slot[0].kernel_id, "k%u", i % 2 ? i : 0);
    struct flock lock = {.l_type = F_WRLCK, .l_start = offsetof(NbgpuUse, slot), .l_len = 1};
    if (fcntl(s->use_fd, F_OFD_SETLK, &lock) != 0)
        fail("no lock");
    s->id = nbgpu_sched_add(scheduler, s->ctl_fd, s->use_fd, 0, i % 2, 100 + 50 * i, i % 3 ? NBGPU_MODE_BURST : NBGPU_MODE_STRICT);
    if (s->id < 0)
        fail("not added");
}

static void ring(Slice *s) { __atomic_fetch_add(&s->use->bell, 1, __ATOMIC_SEQ_CST); }

/* Wants, works and is idle again; what it never writes through the mapping is what would be SIGBUS after a truncation. */
static void *tenant(void *argument) {
    Slice *s = argument;
    NbgpuUseSlot *slot = &s->use->slot[0];
    while (!stop) {
        __atomic_store_n(&slot->want, 1, __ATOMIC_SEQ_CST);
        ring(s);
        for (int i = 0; i < 50 && __atomic_load_n(&s->ctl->device[0].gate, __ATOMIC_SEQ_CST) != NBGPU_GATE_OPEN; i++)
            pause_us(200);
        __atomic_store_n(&slot->busy_since, 1, __ATOMIC_SEQ_CST);
        __atomic_store_n(&slot->want, 0, __ATOMIC_SEQ_CST);
        ring(s);
        pause_us(300);
        __atomic_store_n(&slot->busy_since, 0, __ATOMIC_SEQ_CST);
        ring(s);
        s->turns++;
        pause_us(100);
    }
    return NULL;
}

/* Junk in every word, files that shrink and grow: written to the descriptor, as a hostile tenant would not mind its own SIGBUS. */
static void *vandal(void *argument) {
    Slice *s = argument;
    unsigned seed = 7;
    unsigned char junk[512];
    while (!stop) {
        for (size_t i = 0; i < sizeof junk; i++)
            junk[i] = (unsigned char)rand_r(&seed);
        const off_t at = (off_t)(rand_r(&seed) % sizeof(NbgpuUse));
        if (pwrite(s->use_fd, junk, sizeof junk, at) < 0)
            fail("cannot write");
        if (rand_r(&seed) % 4 == 0 &&
            ftruncate(s->use_fd, rand_r(&seed) % 2 ? (off_t)(rand_r(&seed) % sizeof(NbgpuUse)) : (off_t)sizeof(NbgpuUse)) != 0)
            fail("cannot truncate");
        const uint32_t high = (uint32_t)rand_r(&seed);
        if (pwrite(s->use_fd, &high, sizeof high, offsetof(NbgpuUse, high_water)) < 0)
            fail("cannot write");
        pause_us(200);
    }
    return NULL;
}

static void *reader(void *argument) {
    NbgpuUseHead head;
    NbgpuUseRow *rows = calloc(NBGPU_SLOTS, sizeof *rows);
    NbgpuSchedStats stats;
    NbgpuSchedTotals totals;
    (void)argument;
    while (!stop) {
        for (unsigned i = 0; i < SLICES; i++) {
            nbgpu_use_head(slices[i].use_fd, &head);
            const int n = nbgpu_use_read(slices[i].use_fd, rows, NBGPU_SLOTS);
            for (int k = 0; k < n; k++)
                if (strnlen(rows[k].kernel_id, NBGPU_KERNEL_ID_BYTES) == NBGPU_KERNEL_ID_BYTES || rows[k].slot >= NBGPU_SLOTS)
                    fail("a row that was not checked");
            nbgpu_use_events(&slices[i].use_fd, 1, &(uint32_t){0});
            nbgpu_use_locked(slices[i].use_fd, (uint32_t)n % NBGPU_SLOTS);
            nbgpu_sched_stats(scheduler, (int)i, &stats);
        }
        nbgpu_sched_totals(scheduler, &totals);
        pause_us(300);
    }
    free(rows);
    return NULL;
}

/* Kernels that are limited, limited otherwise, and not any more. */
static void limit_kernels(Slice *s, unsigned round) {
    NbgpuCtlKernel *k = &s->ctl->kernel[round % 3 ? 0 : NBGPU_KERNELS - 1];
    snprintf(k->id, sizeof k->id, "k%u", round % 4);
    k->compute_milli = round % 5 * 300;
    nbgpu_sched_kernels(scheduler, s->id);
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    rounds = (unsigned)atoi(argv[2]);
    scheduler = nbgpu_sched_open(NULL);
    if (!scheduler)
        return 3;
    for (unsigned i = 0; i < SLICES; i++)
        make(argv[1], i);
    pthread_t threads[SLICES + 1];
    for (unsigned i = 0; i < SLICES; i++) /* the last one is hostile */
        pthread_create(&threads[i], NULL, i == SLICES - 1 ? vandal : tenant, &slices[i]);
    pthread_create(&threads[SLICES], NULL, reader, NULL);
    for (unsigned i = 0; i < rounds; i++) {
        Slice extra = slices[i % SLICES];
        const int id = nbgpu_sched_add(scheduler, extra.ctl_fd, extra.use_fd, 1, 5, 10, NBGPU_MODE_BURST);
        nbgpu_sched_set(scheduler, slices[i % SLICES].id, 1 + i % 1000, i % 2 ? NBGPU_MODE_STRICT : NBGPU_MODE_BURST);
        nbgpu_sched_suspend(scheduler, slices[i % SLICES].id, i % 5 == 0);
        limit_kernels(&slices[i % SLICES], i);
        pause_us(1000);
        nbgpu_sched_suspend(scheduler, slices[i % SLICES].id, 0);
        if (id >= 0 && nbgpu_sched_remove(scheduler, id) != 0)
            fail("not removed");
    }
    stop = 1;
    for (unsigned i = 0; i <= SLICES; i++)
        pthread_join(threads[i], NULL);
    uint64_t turns = 0;
    for (unsigned i = 0; i < SLICES; i++)
        turns += slices[i].turns;
    nbgpu_sched_close(scheduler);
    printf("%llu\n", (unsigned long long)turns);
    return 0;
}
