/* Checkpoint and restore of a process's device memory, as the shared file holds it: one record per client, beside its books.
 *
 * There is no thread in the process that is checkpointed: who asks for an operation carries it out on the file, under the
 * record's robust lock `op`. The process itself only looks at `state` at each call, and sleeps on it while it is locked.
 * Whoever gets `op` from the dead brings the state to an end first (sim_op_try): an unfinished lock is no lock, an unfinished
 * checkpoint is finished, an unfinished restore has not begun. A client's place is given to another only with `op` held.
 */
#ifndef NBGPU_SIM_CHECKPOINT_H
#define NBGPU_SIM_CHECKPOINT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* The first four are CUprocessState; a process in one of the others is in the middle of an operation. */
enum sim_process_state { SIM_RUNNING, SIM_LOCKED, SIM_CHECKPOINTED, SIM_FAILED, SIM_LOCKING, SIM_CHECKPOINTING, SIM_RESTORING };

struct sim_checkpoint {
    _Alignas(64) pthread_mutex_t op;
    _Alignas(64) _Atomic uint32_t state; /* futex of the calls that wait */
    _Atomic uint32_t calls;              /* being carried out by its threads */
    _Atomic uint32_t lost;               /* can never be restored: NBGPU_SIM_RESTORE_OOM_FATAL */
    _Atomic uint64_t saved[16];          /* physical bytes that it held; 16 is SIM_DEVICES */
    _Atomic uint64_t managed[16];        /* bytes of managed memory among its mem */
};

struct sim;

void sim_checkpoint_reset(struct sim_checkpoint *record); /* of a client that begins or has gone */
bool sim_call_begin(struct sim *sim);                     /* waits while the process is locked; false: it has failed for good */
void sim_call_end(struct sim *sim);
bool sim_op_try(struct sim *sim, int client); /* false: somebody is at it */
void sim_op_end(struct sim *sim, int client);
bool sim_op_unfinished(struct sim *sim, int client); /* its state is one of an operation that may have died */
void sim_process_state_set(struct sim *sim, int client, uint32_t state);
bool sim_cannot_be_moved(struct sim *sim, int client); /* it holds memory that no checkpoint takes */
void sim_put_away(struct sim *sim, int client);        /* gives back all that it holds; what that was is in saved[] */
bool sim_take_back(struct sim *sim, int client);       /* all of saved[], or nothing */
int sim_process_state(struct sim *sim, int client);    /* as CUprocessState */
bool sim_client_alive(struct sim *sim, int client);

#endif
