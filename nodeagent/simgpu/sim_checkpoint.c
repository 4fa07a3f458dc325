/* What a process's calls, and those who checkpoint it, do on its record: sim_checkpoint.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "nbgpu_fault.h"
#include "sim_state.h"

enum { LOOK_AGAIN_NS = 100000000 }; /* how late a blocked call notices that who locked the process died over it */
_Static_assert(SIM_DEVICES == 16, "sim_checkpoint.h says 16");

static struct sim_checkpoint *record_of(struct sim *sim, int client) { return &sim->m->checkpoint[client]; }

void sim_checkpoint_reset(struct sim_checkpoint *record) {
    atomic_store(&record->calls, 0);
    atomic_store(&record->lost, 0);
    for (unsigned d = 0; d < SIM_DEVICES; d++) {
        atomic_store(&record->saved[d], 0);
        atomic_store(&record->managed[d], 0);
    }
    atomic_store(&record->state, SIM_RUNNING);
}

/* ---- the process's calls ----------------------------------------------------------------------------------------------- */

static bool wait_while_locked(struct sim *sim) {
    struct sim_checkpoint *record = record_of(sim, sim->client);
    for (;;) {
        uint32_t state = atomic_load(&record->state);
        if (state == SIM_RUNNING || state == SIM_FAILED)
            return state == SIM_RUNNING;
        NBGPU_POINT("sim.call_blocked");
        struct timespec most = {.tv_nsec = LOOK_AGAIN_NS};
        syscall(SYS_futex, &record->state, FUTEX_WAIT, state, &most, NULL, 0);
        if (sim_op_unfinished(sim, sim->client) && sim_op_try(sim, sim->client))
            sim_op_end(sim, sim->client);
    }
}

/* Counted first, looked second; who locks sets the state first and looks at the count second: one of the two sees the other. */
bool sim_call_begin(struct sim *sim) {
    struct sim_checkpoint *record = record_of(sim, sim->client);
    for (;;) {
        atomic_fetch_add(&record->calls, 1);
        if (__builtin_expect(atomic_load(&record->state) == SIM_RUNNING, 1)) {
            NBGPU_POINT("sim.call");
            return true;
        }
        sim_call_end(sim);
        if (!wait_while_locked(sim))
            return false;
    }
}

void sim_call_end(struct sim *sim) { atomic_fetch_sub(&record_of(sim, sim->client)->calls, 1); }

/* ---- operations -------------------------------------------------------------------------------------------------------- */

void sim_process_state_set(struct sim *sim, int client, uint32_t state) {
    struct sim_checkpoint *record = record_of(sim, client);
    atomic_store(&record->state, state);
    NBGPU_POINT("sim.checkpoint_state");
    syscall(SYS_futex, &record->state, FUTEX_WAKE, 1 << 20, NULL, NULL, 0);
}

bool sim_cannot_be_moved(struct sim *sim, int client) {
    for (unsigned d = 0; d < sim->m->devices; d++)
        if (atomic_load(&record_of(sim, client)->managed[d]))
            return true;
    return sim_client_shares(sim->m, client);
}

void sim_put_away(struct sim *sim, int client) {
    for (unsigned d = 0; d < sim->m->devices; d++) {
        sim_lock(sim, d);
        uint64_t held = atomic_exchange(&sim->m->client[client].mem[d], 0);
        NBGPU_POINT("sim.checkpoint_give");
        atomic_fetch_sub(&sim->m->device[d].mem_used, held);
        sim_unlock(sim, d);
    }
}

bool sim_take_back(struct sim *sim, int client) {
    struct sim_checkpoint *record = record_of(sim, client);
    for (unsigned d = 0; d < sim->m->devices; d++) {
        uint64_t bytes = atomic_load(&record->saved[d]);
        if (bytes && !sim_mem_take_for(sim, client, d, bytes, false)) {
            sim_put_away(sim, client);
            return false;
        }
        NBGPU_POINT("sim.restore_take");
    }
    return true;
}

/* With `op` held: what somebody who died began. */
static void settle(struct sim *sim, int client) {
#ifdef NBGPU_CONTROL_UNFINISHED /* what its tests are to notice */
    return;
#endif
    switch (atomic_load(&record_of(sim, client)->state)) {
    case SIM_LOCKING:
        sim_process_state_set(sim, client, SIM_RUNNING);
        break;
    case SIM_CHECKPOINTING:
    case SIM_RESTORING:
        sim_put_away(sim, client);
        sim_process_state_set(sim, client, SIM_CHECKPOINTED);
        break;
    default:
        break;
    }
}

bool sim_op_try(struct sim *sim, int client) {
    pthread_mutex_t *op = &record_of(sim, client)->op;
    int result = pthread_mutex_trylock(op);
    if (result == EOWNERDEAD)
        pthread_mutex_consistent(op);
    if (result && result != EOWNERDEAD)
        return false;
    settle(sim, client);
    return true;
}

void sim_op_end(struct sim *sim, int client) { pthread_mutex_unlock(&record_of(sim, client)->op); }

bool sim_op_unfinished(struct sim *sim, int client) { return atomic_load(&record_of(sim, client)->state) >= SIM_LOCKING; }

int sim_process_state(struct sim *sim, int client) {
    if (sim_op_unfinished(sim, client) && sim_op_try(sim, client))
        sim_op_end(sim, client);
    uint32_t state = atomic_load(&record_of(sim, client)->state);
    switch (state) { /* in an operation it is still what it was */
    case SIM_LOCKING:
        return SIM_RUNNING;
    case SIM_CHECKPOINTING:
        return SIM_LOCKED;
    case SIM_RESTORING:
        return SIM_CHECKPOINTED;
    default:
        return (int)state;
    }
}
