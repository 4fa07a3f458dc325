/* cuCheckpointProcess*: any process may ask them of another one of the same user, root of all, and a process of itself.
 * The contents of device memory are in the process's host memory already; what moves are the books (sim_checkpoint.c) and time. */
#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>

#include "drv.h"

enum { NAP_NS = 500000, LONG_NAP_NS = 10000000, BYTES_PER_US = 25000 /* 25 GB/s, as copies */ };

static bool is_zero(const void *data, size_t bytes) {
    const char *at = data;
    while (bytes && *at == 0)
        at++, bytes--;
    return bytes == 0;
}

static void nap(uint64_t ns) {
    struct timespec time = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    nanosleep(&time, NULL);
}

static bool is_process(int client, int pid) {
    if (atomic_load(&drv.sim.m->client[client].state) != SIM_CLIENT_LIVE)
        return false;
    return client == drv.sim.client ? pid == getpid() : sim_client_pid(&drv.sim, client) == pid;
}

static CUresult find(int pid, int *client) {
    NEED(pid > 0, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_open());
    for (int c = 0; c < SIM_CLIENTS; c++) {
        if (!is_process(c, pid))
            continue;
        NEED(geteuid() == 0 || geteuid() == drv.sim.m->client[c].uid, CUDA_ERROR_NOT_PERMITTED);
        *client = c;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_INITIALIZED; /* uses no CUDA */
}

/* Be the one who works on a process. `until`: clock at which to give up, or SIM_NEVER. */
static CUresult begin(int pid, int *client, uint64_t until) {
    TRY(find(pid, client));
    while (!sim_op_try(&drv.sim, *client)) {
        NEED(sim_wall_ns() < until, CUDA_ERROR_NOT_READY);
        NEED(is_process(*client, pid), CUDA_ERROR_NOT_INITIALIZED);
        nap(NAP_NS);
    }
    if (is_process(*client, pid))
        return CUDA_SUCCESS;
    sim_op_end(&drv.sim, *client); /* it died meanwhile: the place is another's, or nobody's */
    return CUDA_ERROR_NOT_INITIALIZED;
}

static CUresult end(int client, CUresult result) {
    sim_op_end(&drv.sim, client);
    return result;
}

static uint32_t state_of(int client) { return atomic_load(&drv.sim.m->checkpoint[client].state); }

/* Whether all that the process has submitted is done, its host functions too. */
static bool is_done(int client) {
    struct sim_machine *m = drv.sim.m;
    bool done = true;
    for (unsigned c = 0; c < SIM_CHANNELS; c++) {
        struct sim_channel *channel = &m->channel[c];
        if (atomic_load(&channel->state) != SIM_CHANNEL_LIVE || channel->client != (uint32_t)client)
            continue;
        sim_advance(&drv.sim, channel->device);
        done &= atomic_load(&channel->head) == atomic_load(&channel->tail);
    }
    return done;
}

OPEN_API(cuCheckpointProcessLock, (int pid, CUcheckpointLockArgs *args)) {
    int c;
    NEED(!args || (!args->reserved0 && is_zero(args->reserved1, sizeof args->reserved1)), CUDA_ERROR_INVALID_VALUE);
    uint64_t until = args && args->timeoutMs ? sim_wall_ns() + args->timeoutMs * 1000000ull : SIM_NEVER;
    TRY(begin(pid, &c, until));
    if (state_of(c) != SIM_RUNNING)
        return end(c, CUDA_ERROR_ILLEGAL_STATE);
    struct sim_checkpoint *record = &drv.sim.m->checkpoint[c];
    sim_process_state_set(&drv.sim, c, SIM_LOCKING); /* from here on no call begins */
    while (atomic_load(&record->calls) || !is_done(c)) {
        NBGPU_POINT("sim.checkpoint_wait");
        if (!sim_client_alive(&drv.sim, c))
            return end(c, CUDA_ERROR_NOT_INITIALIZED);
        if (sim_wall_ns() >= until) {
            sim_process_state_set(&drv.sim, c, SIM_RUNNING);
            return end(c, CUDA_ERROR_NOT_READY);
        }
        nap(NAP_NS);
    }
    sim_process_state_set(&drv.sim, c, SIM_LOCKED);
    return end(c, CUDA_SUCCESS);
}

OPEN_API(cuCheckpointProcessUnlock, (int pid, CUcheckpointUnlockArgs *args)) {
    int c;
    NEED(!args || is_zero(args, sizeof *args), CUDA_ERROR_INVALID_VALUE);
    TRY(begin(pid, &c, SIM_NEVER));
    if (state_of(c) != SIM_LOCKED)
        return end(c, CUDA_ERROR_ILLEGAL_STATE);
    sim_process_state_set(&drv.sim, c, SIM_RUNNING);
    return end(c, CUDA_SUCCESS);
}

/* As long as copying what was allocated takes, or until the process dies. */
static void copy(int client) {
    struct sim_machine *m = drv.sim.m;
    uint64_t bytes = 0;
    for (unsigned d = 0; d < m->devices; d++) {
        uint64_t contexts = (uint64_t)atomic_load(&m->client[client].contexts[d]) * m->context_mib << 20;
        uint64_t saved = atomic_load(&m->checkpoint[client].saved[d]);
        bytes += saved > contexts ? saved - contexts : 0;
    }
    uint64_t until = sim_wall_ns() + bytes * 1000 / BYTES_PER_US * m->time_scale;
    for (uint64_t now; (now = sim_wall_ns()) < until && sim_client_alive(&drv.sim, client);)
        nap(until - now < LONG_NAP_NS ? until - now : LONG_NAP_NS);
}

/* A fault for tests: the operation named in the caller's environment fails, and with it the process for good. */
static bool fault(const char *operation) {
    const char *wish = getenv("NBGPU_SIM_CHECKPOINT_FAULT");
    return wish && strcmp(wish, operation) == 0;
}

OPEN_API(cuCheckpointProcessCheckpoint, (int pid, CUcheckpointCheckpointArgs *args)) {
    int c;
    NEED(!args || is_zero(args->reserved, sizeof args->reserved), CUDA_ERROR_INVALID_VALUE);
    NEED(!args || !args->customStorageInfo_out, CUDA_ERROR_NOT_SUPPORTED);
    TRY(begin(pid, &c, SIM_NEVER));
    struct sim_checkpoint *record = &drv.sim.m->checkpoint[c];
    if (state_of(c) != SIM_LOCKED)
        return end(c, CUDA_ERROR_ILLEGAL_STATE);
    if (sim_cannot_be_moved(&drv.sim, c))
        return end(c, CUDA_ERROR_NOT_SUPPORTED); /* still locked, and may be unlocked */
    if (fault("checkpoint")) {
        sim_process_state_set(&drv.sim, c, SIM_FAILED);
        return end(c, CUDA_ERROR_UNKNOWN);
    }
    for (unsigned d = 0; d < drv.sim.m->devices; d++)
        atomic_store(&record->saved[d], atomic_load(&drv.sim.m->client[c].mem[d]));
    NBGPU_POINT("sim.checkpoint_saved");
    sim_process_state_set(&drv.sim, c, SIM_CHECKPOINTING);
    copy(c);
    sim_put_away(&drv.sim, c);
    sim_process_state_set(&drv.sim, c, SIM_CHECKPOINTED);
    return end(c, CUDA_SUCCESS);
}

/* Every GPU on which the process holds something must be named, and nothing moves to another one here. */
static CUresult check_pairs(int client, const CUcheckpointRestoreArgs *args) {
    if (!args || !args->gpuPairsCount)
        return CUDA_SUCCESS;
    NEED(args->gpuPairs, CUDA_ERROR_INVALID_VALUE);
    for (unsigned d = 0; d < drv.sim.m->devices; d++) {
        const CUcheckpointGpuPair *pair = NULL;
        CUuuid uuid;
        drv_uuid((int)d, &uuid);
        for (unsigned i = 0; i < args->gpuPairsCount; i++)
            if (memcmp(&args->gpuPairs[i].oldUuid, &uuid, sizeof uuid) == 0)
                pair = &args->gpuPairs[i];
        if (!atomic_load(&drv.sim.m->checkpoint[client].saved[d]))
            continue;
        NEED(pair, CUDA_ERROR_INVALID_VALUE);
        NEED(memcmp(&pair->newUuid, &uuid, sizeof uuid) == 0, CUDA_ERROR_NOT_SUPPORTED);
    }
    return CUDA_SUCCESS;
}

OPEN_API(cuCheckpointProcessRestore, (int pid, CUcheckpointRestoreArgs *args)) {
    int c;
    NEED(!args || is_zero(args->reserved, sizeof args->reserved), CUDA_ERROR_INVALID_VALUE);
    NEED(!args || !args->customStorageInfo_out, CUDA_ERROR_NOT_SUPPORTED);
    TRY(begin(pid, &c, SIM_NEVER));
    struct sim_checkpoint *record = &drv.sim.m->checkpoint[c];
    if (state_of(c) != SIM_CHECKPOINTED)
        return end(c, CUDA_ERROR_ILLEGAL_STATE);
    CUresult result = check_pairs(c, args);
    if (result == CUDA_SUCCESS && atomic_load(&record->lost))
        result = CUDA_ERROR_OPERATING_SYSTEM;
    if (result != CUDA_SUCCESS)
        return end(c, result);
    if (fault("restore")) {
        sim_process_state_set(&drv.sim, c, SIM_FAILED);
        return end(c, CUDA_ERROR_UNKNOWN);
    }
    sim_process_state_set(&drv.sim, c, SIM_RESTORING);
    if (!sim_take_back(&drv.sim, c)) {
        atomic_store(&record->lost, drv.sim.m->restore_oom_fatal);
        sim_process_state_set(&drv.sim, c, SIM_CHECKPOINTED);
        return end(c, CUDA_ERROR_OUT_OF_MEMORY);
    }
    copy(c);
    sim_process_state_set(&drv.sim, c, SIM_LOCKED);
    return end(c, CUDA_SUCCESS);
}

OPEN_API(cuCheckpointProcessGetState, (int pid, int *state)) {
    int c;
    NEED(state, CUDA_ERROR_INVALID_VALUE);
    TRY(find(pid, &c));
    *state = sim_process_state(&drv.sim, c);
    return CUDA_SUCCESS;
}

/* The work is done by who asks; the process's first thread stands for the driver's own, which a real one has. */
OPEN_API(cuCheckpointProcessGetRestoreThreadId, (int pid, int *tid)) {
    int c;
    NEED(tid, CUDA_ERROR_INVALID_VALUE);
    TRY(find(pid, &c));
    *tid = pid;
    return CUDA_SUCCESS;
}

/* Of checkpoints to storage of one's own, which are not there. */
OPEN_API(cuCheckpointOperationComplete, (void *handle)) {
    NEED(handle, CUDA_ERROR_INVALID_VALUE);
    return CUDA_ERROR_NOT_SUPPORTED;
}
