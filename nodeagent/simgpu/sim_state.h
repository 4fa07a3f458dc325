/* The simulated machine: one file in shared memory that every process maps, and the calls that read and change it.
 *
 * There is no daemon. Whoever needs to know something of a device takes its lock, advances it to "now" and reads the result.
 *
 *   clients   one per process that uses libcuda, alive as long as it holds a record lock on its byte of the file
 *   channels  one per CUDA context: a queue of at most SIM_QUEUE entries, written by its process alone without any lock
 *   devices   memory books, the engines' state, utilisation history; changed under a robust lock
 *
 * SIGKILL safety: the robust lock passes to the next one, who rebuilds what is derived (sim_repair). Truth are a client's
 * `mem[]`, the holders of shared memory and a channel's `state`; every other word may be lost between any two instructions and costs at most some ns of
 * device time.
 *
 * Times are device nanoseconds since the file was made: wall clock (CLOCK_MONOTONIC) divided by the time scale.
 */
#ifndef NBGPU_SIM_STATE_H
#define NBGPU_SIM_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "sim_checkpoint.h"
#include "sim_group.h"

enum {
    SIM_VERSION = 2,
    SIM_DEVICES = 16,
    SIM_CLIENTS = 512,
    SIM_CHANNELS = 1024,
    SIM_SHARED = 512, /* pieces of memory that processes share */
    SIM_QUEUE = 1024,
    SIM_BUCKETS = 64,    /* utilisation samples kept */
    SIM_SAMPLE_MS = 167, /* wall time of one sample, as NVML's 1/6 s */
    SIM_REAP_MS = 10,    /* how often, at most, the dead are looked for */
    SIM_UUID_BYTES = 48,
    SIM_NAME_BYTES = 96,
};
#define SIM_MAGIC 0x314d49535550474eull /* "NGPUSIM1" */
#define SIM_PAGE (2ull << 20)           /* granularity of physical memory */
#define SIM_NEVER UINT64_MAX

enum sim_kind { SIM_COMPUTE, SIM_COPY_IN, SIM_COPY_OUT, SIM_MARK, SIM_WAIT };
enum sim_entry_state { SIM_PENDING, SIM_HOST_TURN, SIM_HOST_DONE, SIM_DONE };
enum sim_entry_flag { SIM_LEGACY = 1, SIM_BLOCKING = 2, SIM_NEEDS_HOST = 4 };
enum sim_client_state { SIM_CLIENT_FREE, SIM_CLIENT_LIVE, SIM_CLIENT_DYING };
enum sim_channel_state { SIM_CHANNEL_FREE, SIM_CHANNEL_LIVE };

struct sim_entry {
    _Atomic uint32_t state;
    uint8_t kind, flags;
    uint16_t stream;
    uint64_t seq, submit_ns, left_ns, done_ns;
    uint32_t dep_channel, dep_generation; /* SIM_WAIT: done when that entry is */
    uint64_t dep_seq;
    int32_t priority;
    uint32_t reserved;
};

struct sim_channel {
    _Atomic uint32_t state, generation;
    uint32_t client, device;
    _Alignas(64) _Atomic uint64_t tail; /* written by its process: entries submitted */
    _Atomic uint64_t multi_seq;         /* last entry whose stream differs from the one before it */
    _Alignas(64) _Atomic uint64_t head; /* written under the device's lock: entries below are done */
};

struct sim_bucket {
    uint64_t index; /* device time / sample length */
    uint64_t busy_ns;
};

struct sim_client {
    _Atomic uint32_t state;
    uint32_t pid, uid, reserved; /* pid as the process itself sees it; for others' view ask sim_client_pid */
    uint64_t dead_wall_ns;       /* CLOCK_MONOTONIC at which its death was seen */
    char name[SIM_NAME_BYTES];
    _Alignas(64) _Atomic uint64_t mem[SIM_DEVICES]; /* physical bytes held, contexts included; under the device's lock */
    _Atomic uint32_t contexts[SIM_DEVICES];         /* live contexts */
    _Atomic uint64_t busy_ns[SIM_DEVICES];          /* device time that its GPU kernels ran, switches left out; under the lock */
};

struct sim_shared {
    _Atomic uint32_t state;
    uint32_t device, maker, reserved;
    uint64_t bytes, id;
    _Atomic uint64_t holders[SIM_CLIENTS / 64];
};

struct sim_device {
    _Alignas(64) pthread_mutex_t lock;
    char uuid[SIM_UUID_BYTES]; /* "GPU-…" */
    char name[SIM_NAME_BYTES];
    uint64_t mem_total;
    _Atomic uint64_t mem_used;                /* sum of the clients' mem and of what is shared */
    _Atomic uint64_t now_ns;                  /* simulated up to here */
    uint32_t channels, current, copy_turn[2]; /* current: channel + 1 whose slice runs */
    uint64_t slice_left_ns, switch_left_ns;
    _Atomic uint32_t bell;    /* futex: rung when something may end sooner than predicted */
    _Atomic uint32_t repairs; /* locks inherited from the dead */
    _Atomic uint64_t lost;    /* NVML says so of it: nbgpuSimSetLost */
    uint64_t reserved[7];
    struct sim_bucket history[SIM_BUCKETS];
    uint16_t channel[SIM_CHANNELS];
};

struct sim_machine {
    uint64_t magic;
    uint32_t version, devices;
    uint64_t size, base_ns; /* CLOCK_MONOTONIC at device time 0 */
    uint32_t time_scale, slice_us, switch_us, context_mib, teardown_ms, driver_version;
    _Atomic uint64_t reaped_ns, shared_ids;
    uint64_t reserved[31];
    _Alignas(64) pthread_mutex_t table; /* who becomes which client or channel; taken before a device's lock */
    struct sim_device device[SIM_DEVICES];
    struct sim_checkpoint checkpoint[SIM_CLIENTS];
    uint32_t restore_oom_fatal;
    _Atomic uint32_t groups; /* entries of group[] that were ever used */
    char cgroup_root[SIM_PATH_BYTES];
    struct sim_member member[SIM_CLIENTS];
    struct sim_group group[SIM_GROUPS];
    struct sim_client client[SIM_CLIENTS];
    struct sim_channel channel[SIM_CHANNELS];
    struct sim_shared shared[SIM_SHARED];
    /* Last, because they are large: pages of the file that nobody touches take no memory. */
    struct sim_bucket client_history[SIM_CLIENTS][SIM_DEVICES][SIM_BUCKETS];
    struct sim_entry queue[SIM_CHANNELS][SIM_QUEUE];
};

/* The calling library's view. The descriptor is never closed: closing any descriptor of the file would drop the record lock. */
struct sim {
    struct sim_machine *m;
    int fd;
    int client; /* -1 until sim_attach */
};

/* sim_state.c: opening, locks, clients, memory */
const char *sim_path(void);
int sim_open(struct sim *sim);   /* 0 or -errno; makes the file when it is missing */
int sim_attach(struct sim *sim); /* become a client: 0 or -errno (-EAGAIN: no slot) */
uint64_t sim_wall_ns(void);
void sim_lock(struct sim *sim, unsigned device);
void sim_unlock(struct sim *sim, unsigned device);
void sim_lock_table(struct sim_machine *m);
void sim_unlock_table(struct sim_machine *m);
/* Of any client; managed memory is held by no cgroup's limit, and no checkpoint takes it. */
bool sim_mem_take_for(struct sim *sim, int client, unsigned device, uint64_t bytes, bool managed);
void sim_mem_give_for(struct sim *sim, int client, unsigned device, uint64_t bytes, bool managed);
bool sim_mem_take(struct sim *sim, unsigned device, uint64_t bytes); /* false: the device has not that much */
void sim_mem_give(struct sim *sim, unsigned device, uint64_t bytes);
void sim_mem_keep(struct sim *sim, unsigned device, uint64_t bytes); /* takes what is there already: never refused */
void sim_reap(struct sim *sim, bool now);                            /* find the dead, free what they held after the teardown lag */
int sim_channel_open(struct sim *sim, unsigned device);              /* a channel's index, -1 when there is none left */
void sim_channel_close(struct sim *sim, int channel);                /* drops its queue */

/* sim_shared.c: memory that processes share */
int sim_shared_make(struct sim *sim, unsigned device, uint64_t bytes,
                    bool fresh);                               /* not fresh: from what the caller holds; -1: none left */
bool sim_shared_join(struct sim *sim, int index, uint64_t id); /* false: it is no more */
void sim_shared_leave(struct sim *sim, int index);
void sim_shared_drop_client(struct sim_machine *m, int client, unsigned device); /* with the device's lock */
bool sim_client_shares(struct sim_machine *m, int client);                       /* it holds memory that others may hold too */
uint64_t sim_shared_bytes(struct sim_machine *m, unsigned device);
uint64_t sim_client_bytes(struct sim_machine *m, int client, unsigned device); /* as NVML tells it */

/* sim_device.c: time */
static inline uint64_t sim_device_ns(const struct sim_machine *m, uint64_t wall_ns) {
    return wall_ns <= m->base_ns ? 0 : (wall_ns - m->base_ns) / m->time_scale;
}
void sim_advance(struct sim *sim, unsigned device);        /* takes the lock, brings the device to now */
void sim_advance_locked(struct sim *sim, unsigned device); /* the same for one who holds the lock */
bool sim_entry_done(struct sim_machine *m, uint32_t channel, uint32_t generation, uint64_t seq);
uint64_t sim_eta_ns(struct sim *sim, int channel, uint64_t seq); /* device ns before which it cannot be done; lock held */
void sim_ring(struct sim_device *device);
void sim_sleep(struct sim_device *device, uint32_t bell_seen, uint64_t wall_deadline_ns);

/* sim_query.c: what NVML needs */
struct sim_process {
    int pid; /* as the caller's pid namespace names it; 0: not visible there */
    int client;
    uint32_t uid, contexts;
    uint64_t mem_bytes;
    char name[SIM_NAME_BYTES];
};
struct sim_sample {
    uint64_t end_wall_ns; /* CLOCK_MONOTONIC at which the sample ended */
    uint32_t busy_percent;
};
int sim_client_pid(struct sim *sim, int client);                                       /* -1: dead or dying */
int sim_processes(struct sim *sim, unsigned device, struct sim_process *out, int max); /* how many there are, even above max */
uint64_t sim_mem_used(struct sim *sim, unsigned device);
/* Device time that a client's GPU kernels have run since it attached, up to now; *now_ns is that moment in device time. */
uint64_t sim_busy_ns(struct sim *sim, unsigned device, int client, uint64_t *now_ns);
/* Finished samples, newest first, of a device (client -1) or of one client on it; how many were written. Never the running one. */
int sim_samples(struct sim *sim, unsigned device, int client, struct sim_sample *out, int max);

#endif
