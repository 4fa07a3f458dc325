/* What the scheduler's thread (sched_thread.c) and its API (sched_api.c) share. All of it under the scheduler's lock. */
#ifndef NBGPU_SCHED_INTERNAL_H
#define NBGPU_SCHED_INTERNAL_H
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sched_kernels.h"

#define WAITERS 128u  /* most that futex_waitv takes */
#define ENTRIES 1024u /* (slice, device) pairs of a node */
#define PAGE 4096u    /* the bell is in the first one */

typedef struct {
    uint64_t val, uaddr;
    uint32_t flags, reserved;
} FutexWait;

typedef struct {
    uint32_t physical;
    uint32_t users;
    bool due;          /* something of it was seen anew */
    uint32_t watched;  /* somebody's work is waited for: look again at so many common moments from now */
    uint64_t check_at; /* when to look whether who has a turn, or is waited for, still lives */
    SchedDevice policy;
} Device;

/* The kernels of a slice that has limited ones, on one device. */
typedef struct {
    KernelTurns turns;
    uint32_t gate[KERNELS_MEMBERS]; /* as last written */
} Kernels;

typedef struct {
    bool used;
    bool broken;     /* its `use` file cannot be read: no bell, no turns */
    uint32_t first;  /* the first entry of the same `use` file */
    uint32_t next;   /* the next one, ENTRIES: none */
    uint64_t waited; /* when `first`: the wake-up before which the file's bell was last listened to, */
    uint32_t wait;   /* as which */
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
    uint64_t spent;    /* when `first`: on looks at the file since then */
    uint64_t look_at;  /* not before this, while it is muted */
    uint64_t ask_from; /* before this, who is busy counts as alive */
    uint64_t looked_at;
    Kernels *kernels; /* NULL: no kernel of the slice has a limit of compute */
} Entry;

struct NbgpuSched {
    NbgpuSchedConfig config;
    pthread_mutex_t lock;
    pthread_t thread;
    _Atomic uint32_t poke; /* futex: an API call changed something */
    bool stop, no_waitv;
    uint64_t wakeups, bells, looks, next_heartbeat, woken_at;
    uint32_t high;
    Entry entry[ENTRIES];
    uint32_t devices;
    Device *device[ENTRIES];
    FutexWait waits[WAITERS];
    uint16_t heard[WAITERS]; /* whose bell each of them is */
};

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void futex_wake(const void *word) { syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0); }

/* Look at a slice's words now. */
void sched_look(NbgpuSched *s, Entry *e, uint64_t now);
/* The address of a member's gate word. */
uint32_t *sched_kernel_gate(Entry *e, uint32_t member);
/* No futex_waitv here, or more slices than it takes. */
bool sched_polls(const NbgpuSched *s);
/* The thread; returns when told to stop. */
void *sched_run(void *self);

#endif
