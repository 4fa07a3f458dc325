/* Opening the machine's file, its locks, its clients and their memory. */
#define _GNU_SOURCE
#include "sim_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NBGPU_FAULT_MAIN
#include "nbgpu_fault.h"

#ifndef F_OFD_GETLK
#define F_OFD_GETLK 36
#endif
#define CONTAINER_STATE "/run/nbgpu/sim/state" /* where a container finds the machine, whatever a program does to its environment */
#define LOCK_BYTES_AT ((off_t)1 << 40)         /* far behind the data */

uint64_t sim_wall_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

const char *sim_path(void) {
    static char fallback[64];
    const char *path = getenv("NBGPU_SIM_STATE");
    if (path && *path)
        return path;
    if (access(CONTAINER_STATE, F_OK) == 0)
        return CONTAINER_STATE;
    snprintf(fallback, sizeof fallback, "/dev/shm/nbgpu-sim-%u", (unsigned)geteuid());
    return fallback;
}

static uint64_t setting(const char *name, uint64_t fallback, uint64_t low, uint64_t high) {
    const char *text = getenv(name);
    if (!text || !*text)
        return fallback;
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (*end || value < low || value > high)
        return fallback;
    return value;
}

static uint64_t hash(const char *text, uint64_t seed) {
    uint64_t h = 0xcbf29ce484222325u ^ (seed * 0x9e3779b97f4a7c15u);
    for (; *text; text++)
        h = (h ^ (uint8_t)*text) * 0x100000001b3u;
    h ^= h >> 31;
    h *= 0xbf58476d1ce4e5b9u;
    return h ^ (h >> 29);
}

static void make_uuid(char *out, unsigned device) {
    uint64_t a = hash(sim_path(), 2 * device + 1), b = hash(sim_path(), 2 * device + 2);
    snprintf(out, SIM_UUID_BYTES, "GPU-%08x-%04x-%04x-%04x-%012llx", (unsigned)(a >> 32), (unsigned)(a >> 16) & 0xffff,
             (unsigned)a & 0xffff, (unsigned)(b >> 48), (unsigned long long)(b & 0xffffffffffffu));
}

static void make_mutex(pthread_mutex_t *mutex) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static void make_machine(struct sim_machine *m) {
    const char *model = getenv("NBGPU_SIM_MODEL");
    uint64_t memory = setting("NBGPU_SIM_MEMORY_MIB", 81920, 16, 1u << 20) << 20;
    m->version = SIM_VERSION;
    m->size = sizeof *m;
    m->devices = (uint32_t)setting("NBGPU_SIM_DEVICES", 2, 1, SIM_DEVICES);
    m->time_scale = (uint32_t)setting("NBGPU_SIM_TIME_SCALE", 1, 1, 100000);
    m->slice_us = (uint32_t)setting("NBGPU_SIM_SLICE_US", 2000, 1, 10000000);
    m->switch_us = (uint32_t)setting("NBGPU_SIM_SWITCH_US", 100, 0, 1000000);
    m->context_mib = (uint32_t)setting("NBGPU_SIM_CONTEXT_MIB", 300, 0, 1u << 20);
    m->teardown_ms = (uint32_t)setting("NBGPU_SIM_TEARDOWN_MS", 50, 0, 60000);
    m->driver_version = (uint32_t)setting("NBGPU_SIM_DRIVER_VERSION", 13000, 11040, 99990);
    m->base_ns = sim_wall_ns();
    m->restore_oom_fatal = (uint32_t)setting("NBGPU_SIM_RESTORE_OOM_FATAL", 0, 0, 1);
    const char *root = getenv("NBGPU_SIM_CGROUP_ROOT");
    snprintf(m->cgroup_root, sizeof m->cgroup_root, "%s", root && *root ? root : SIM_CGROUP_ROOT);
    make_mutex(&m->table);
    for (unsigned c = 0; c < SIM_CLIENTS; c++)
        make_mutex(&m->checkpoint[c].op);
    for (unsigned d = 0; d < m->devices; d++) {
        struct sim_device *device = &m->device[d];
        make_mutex(&device->lock);
        make_uuid(device->uuid, d);
        snprintf(device->name, sizeof device->name, "%s", model && *model ? model : "Simulated H100 80GB");
        device->mem_total = memory / SIM_PAGE * SIM_PAGE;
    }
    atomic_thread_fence(memory_order_seq_cst);
    m->magic = SIM_MAGIC;
}

/* Make the file under a name of our own, complete, then give it its name; the first to do so wins. */
static int create_file(const char *path) {
    char own[4096];
    if (snprintf(own, sizeof own, "%s.%d.%llx", path, (int)getpid(), (unsigned long long)sim_wall_ns()) >= (int)sizeof own)
        return -ENAMETOOLONG;
    int fd = open(own, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    int failed = 0;
    struct sim_machine *m = MAP_FAILED;
    if (fchmod(fd, 0666) || ftruncate(fd, sizeof *m))
        failed = -errno;
    if (!failed && (m = mmap(NULL, sizeof *m, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED)
        failed = -errno;
    if (m != MAP_FAILED) {
        make_machine(m);
        munmap(m, sizeof *m);
    }
    if (!failed && link(own, path) && errno != EEXIST)
        failed = -errno;
    unlink(own);
    close(fd); /* before any lock is held */
    return failed;
}

int sim_open(struct sim *sim) {
    const char *path = sim_path();
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) {
        int failed = create_file(path);
        if (failed)
            return failed;
        fd = open(path, O_RDWR | O_CLOEXEC);
    }
    if (fd < 0)
        return -errno;
    struct stat status;
    struct sim_machine *m = MAP_FAILED;
    if (!fstat(fd, &status) && status.st_size == (off_t)sizeof *m)
        m = mmap(NULL, sizeof *m, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (m == MAP_FAILED || m->magic != SIM_MAGIC || m->version != SIM_VERSION || m->size != sizeof *m) {
        if (m != MAP_FAILED)
            munmap(m, sizeof *m);
        return -EPROTO; /* another version's file; the descriptor stays open, see struct sim */
    }
    nbgpu_fault_arm();
    *sim = (struct sim){.m = m, .fd = fd, .client = -1};
    return 0;
}

/* Who holds a client's byte: 0 nobody, else its pid in our namespace, -1 when that has no name here. */
static int lock_holder(struct sim *sim, int client) {
    struct flock ask = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_BYTES_AT + client, .l_len = 1};
    if (fcntl(sim->fd, F_OFD_GETLK, &ask))
        return -1; /* not known: count as alive */
    if (ask.l_type == F_UNLCK)
        return 0;
    return ask.l_pid > 0 ? (int)ask.l_pid : -1;
}

int sim_client_pid(struct sim *sim, int client) {
    if (atomic_load(&sim->m->client[client].state) != SIM_CLIENT_LIVE)
        return -1;
    int holder = lock_holder(sim, client);
    return holder == 0 ? -1 : holder < 0 ? 0 : holder;
}

bool sim_client_alive(struct sim *sim, int client) {
    return atomic_load(&sim->m->client[client].state) == SIM_CLIENT_LIVE && lock_holder(sim, client) != 0;
}

static void repair(struct sim *sim, unsigned d) {
    struct sim_machine *m = sim->m;
    struct sim_device *device = &m->device[d];
    uint64_t used = 0;
    uint32_t channels = 0;
    for (int c = 0; c < SIM_CLIENTS; c++)
        if (atomic_load(&m->client[c].state) != SIM_CLIENT_FREE)
            used += atomic_load(&m->client[c].mem[d]);
    used += sim_shared_bytes(m, d);
    for (int c = 0; c < SIM_CHANNELS; c++)
        if (atomic_load(&m->channel[c].state) == SIM_CHANNEL_LIVE && m->channel[c].device == d)
            device->channel[channels++] = (uint16_t)c;
    atomic_store(&device->mem_used, used);
    device->channels = channels;
    atomic_fetch_add(&device->repairs, 1);
}

void sim_lock(struct sim *sim, unsigned d) {
    pthread_mutex_t *lock = &sim->m->device[d].lock;
    if (__builtin_expect(pthread_mutex_lock(lock) == EOWNERDEAD, 0)) {
        repair(sim, d);
        pthread_mutex_consistent(lock);
    }
}

void sim_unlock(struct sim *sim, unsigned d) { pthread_mutex_unlock(&sim->m->device[d].lock); }

void sim_lock_table(struct sim_machine *m) {
    if (pthread_mutex_lock(&m->table) == EOWNERDEAD)
        pthread_mutex_consistent(&m->table); /* it guards single words only */
}

void sim_unlock_table(struct sim_machine *m) { pthread_mutex_unlock(&m->table); }

static void read_name(char *out) {
    char line[512] = "";
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, line, sizeof line - 1);
    if (fd >= 0)
        close(fd);
    line[n > 0 ? n : 0] = 0;
    snprintf(out, SIM_NAME_BYTES, "%.*s", SIM_NAME_BYTES - 1, line);
}

int sim_attach(struct sim *sim) {
    struct sim_machine *m = sim->m;
    int found = -1;
    sim_reap(sim, true);
    sim_lock_table(m);
    for (int c = 0; c < SIM_CLIENTS && found < 0; c++) {
        struct sim_client *client = &m->client[c];
        if (atomic_load(&client->state) != SIM_CLIENT_FREE)
            continue;
        struct flock take = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_BYTES_AT + c, .l_len = 1};
        if (fcntl(sim->fd, F_SETLK, &take))
            continue;
        client->pid = (uint32_t)getpid();
        client->uid = (uint32_t)getuid();
        read_name(client->name);
        memset(m->client_history[c], 0, m->devices * sizeof m->client_history[c][0]);
        for (int d = 0; d < SIM_DEVICES; d++) {
            atomic_store(&client->mem[d], 0);
            atomic_store(&client->contexts[d], 0);
            atomic_store(&client->busy_ns[d], 0);
        }
        sim_checkpoint_reset(&m->checkpoint[c]);
        atomic_store(&m->checkpoint[c].calls, 1); /* the one that attaches */
        sim_member_update(sim, c, true);
        NBGPU_POINT("sim.attach");
        atomic_store(&client->state, SIM_CLIENT_LIVE);
        found = c;
    }
    sim_unlock_table(m);
    sim->client = found;
    return found < 0 ? -EAGAIN : 0;
}

bool sim_mem_take(struct sim *sim, unsigned d, uint64_t bytes) { return sim_mem_take_for(sim, sim->client, d, bytes, false); }
void sim_mem_give(struct sim *sim, unsigned d, uint64_t bytes) { sim_mem_give_for(sim, sim->client, d, bytes, false); }

bool sim_mem_take_for(struct sim *sim, int c, unsigned d, uint64_t bytes, bool managed) {
    struct sim_device *device = &sim->m->device[d];
    struct sim_client *client = &sim->m->client[c];
    if (c == sim->client)
        sim_member_update(sim, c, false);
    for (int attempt = 0;; attempt++) {
        sim_lock(sim, d);
        uint64_t used = atomic_load_explicit(&device->mem_used, memory_order_relaxed);
        bool fits = bytes <= device->mem_total && used <= device->mem_total - bytes && (managed || sim_group_fits(sim->m, c, d, bytes));
        if (fits) {
            if (managed)
                atomic_fetch_add(&sim->m->checkpoint[c].managed[d], bytes);
            atomic_fetch_add_explicit(&client->mem[d], bytes, memory_order_relaxed);
            NBGPU_POINT("sim.mem_take");
            atomic_store_explicit(&device->mem_used, used + bytes, memory_order_relaxed);
        }
        sim_unlock(sim, d);
        if (fits || attempt)
            return fits;
        sim_reap(sim, true);
    }
}

void sim_mem_give_for(struct sim *sim, int c, unsigned d, uint64_t bytes, bool managed) {
    sim_lock(sim, d);
    atomic_fetch_sub_explicit(&sim->m->client[c].mem[d], bytes, memory_order_relaxed);
    NBGPU_POINT("sim.mem_give");
    if (managed)
        atomic_fetch_sub(&sim->m->checkpoint[c].managed[d], bytes);
    atomic_fetch_sub_explicit(&sim->m->device[d].mem_used, bytes, memory_order_relaxed);
    sim_unlock(sim, d);
}

void sim_mem_keep(struct sim *sim, unsigned d, uint64_t bytes) {
    sim_lock(sim, d);
    atomic_fetch_add_explicit(&sim->m->client[sim->client].mem[d], bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&sim->m->device[d].mem_used, bytes, memory_order_relaxed);
    sim_unlock(sim, d);
}

static void unlist(struct sim_device *device, unsigned channel) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < device->channels; i++)
        if (device->channel[i] != channel)
            device->channel[kept++] = device->channel[i];
    device->channels = kept;
}

int sim_channel_open(struct sim *sim, unsigned d) {
    struct sim_machine *m = sim->m;
    int found = -1;
    sim_lock_table(m);
    for (int c = 0; c < SIM_CHANNELS && found < 0; c++)
        if (atomic_load(&m->channel[c].state) == SIM_CHANNEL_FREE)
            found = c;
    if (found >= 0) {
        struct sim_channel *channel = &m->channel[found];
        sim_lock(sim, d);
        channel->client = (uint32_t)sim->client;
        channel->device = d;
        atomic_store(&channel->head, 0);
        atomic_store(&channel->tail, 0);
        atomic_store(&channel->multi_seq, 0);
        atomic_store(&channel->state, SIM_CHANNEL_LIVE);
        NBGPU_POINT("sim.channel_open");
        m->device[d].channel[m->device[d].channels++] = (uint16_t)found;
        atomic_fetch_add(&m->client[sim->client].contexts[d], 1);
        sim_unlock(sim, d);
    }
    sim_unlock_table(m);
    return found;
}

/* With the device's lock held. */
static void drop_channel(struct sim_machine *m, unsigned c) {
    struct sim_channel *channel = &m->channel[c];
    struct sim_device *device = &m->device[channel->device];
    atomic_fetch_add(&channel->generation, 1); /* whoever waits for an entry of it sees it done */
    unlist(device, c);
    NBGPU_POINT("sim.channel_drop");
    atomic_store(&channel->state, SIM_CHANNEL_FREE);
}

void sim_channel_close(struct sim *sim, int c) {
    unsigned d = sim->m->channel[c].device;
    sim_advance(sim, d);
    sim_lock(sim, d);
    drop_channel(sim->m, (unsigned)c);
    atomic_fetch_sub(&sim->m->client[sim->client].contexts[d], 1);
    sim_unlock(sim, d);
    sim_ring(&sim->m->device[d]);
}

/* The dead one's queues go at once, so that the others run. */
static void drop_channels_of(struct sim *sim, int client) {
    struct sim_machine *m = sim->m;
    for (unsigned c = 0; c < SIM_CHANNELS; c++) {
        if (atomic_load(&m->channel[c].state) != SIM_CHANNEL_LIVE || m->channel[c].client != (uint32_t)client)
            continue;
        unsigned d = m->channel[c].device;
        sim_lock(sim, d);
        sim_advance_locked(sim, d);
        drop_channel(m, c);
        sim_unlock(sim, d);
        sim_ring(&m->device[d]);
    }
}

static void free_memory_of(struct sim *sim, int client) {
    for (unsigned d = 0; d < sim->m->devices; d++) {
        sim_lock(sim, d);
        atomic_store(&sim->m->client[client].contexts[d], 0);
        atomic_store(&sim->m->client[client].mem[d], 0);
        sim_shared_drop_client(sim->m, client, d);
        NBGPU_POINT("sim.reap");
        repair(sim, d);
        atomic_fetch_sub(&sim->m->device[d].repairs, 1); /* this one was no accident */
        sim_unlock(sim, d);
    }
}

void sim_reap(struct sim *sim, bool now) {
    struct sim_machine *m = sim->m;
    uint64_t wall = sim_wall_ns(), last = atomic_load_explicit(&m->reaped_ns, memory_order_relaxed);
    if (!now && wall < last + SIM_REAP_MS * 1000000ull)
        return;
    if (!now && !atomic_compare_exchange_strong(&m->reaped_ns, &last, wall))
        return;
    sim_lock_table(m);
    for (int c = 0; c < SIM_CLIENTS; c++) {
        struct sim_client *client = &m->client[c];
        uint32_t state = atomic_load_explicit(&client->state, memory_order_relaxed);
        if (state == SIM_CLIENT_LIVE && c != sim->client && lock_holder(sim, c) == 0) {
            client->dead_wall_ns = wall;
            atomic_store(&client->state, state = SIM_CLIENT_DYING);
        }
        if (state == SIM_CLIENT_LIVE && sim_op_unfinished(sim, c) && sim_op_try(sim, c))
            sim_op_end(sim, c); /* who was at it is dead */
        if (state != SIM_CLIENT_DYING)
            continue;
        drop_channels_of(sim, c);
        if (wall < client->dead_wall_ns + m->teardown_ms * 1000000ull)
            continue;
        if (!sim_op_try(sim, c))
            continue; /* who is at it will see that the process is dead */
        free_memory_of(sim, c);
        sim_checkpoint_reset(&m->checkpoint[c]);
        atomic_store(&client->state, SIM_CLIENT_FREE);
        sim_op_end(sim, c);
    }
    sim_unlock_table(m);
}
