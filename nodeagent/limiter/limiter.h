/* What the files of the limiter share. The rules they keep are in README.md beside this file. */
#ifndef NBGPU_LIMITER_H
#define NBGPU_LIMITER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "cuda_abi.h"
#include "nbgpu_layout.h"
#include "nvml_abi.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define EXPORT __attribute__((visibility("default")))
#define PER_THREAD static __thread __attribute__((tls_model("initial-exec")))
/* Words that other threads change meanwhile: whole, in whatever order. */
#define LOAD(word) __atomic_load_n(&(word), __ATOMIC_RELAXED)
#define STORE(word, value) __atomic_store_n(&(word), value, __ATOMIC_RELAXED)
#define MIB ((uint64_t)1 << 20)
#define MS ((uint64_t)1000000)

enum { CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803 };

/* ---- functions of the driver: `F_name` indexes the tables, REAL(name) is the driver's own, typed ---- */
#define HOOK(library, result, name, arguments, base, since, ptsz)                                                                          \
    EXPORT result name arguments;                                                                                                          \
    typedef __typeof__(name) name##_function;
#define CALL(library, result, name, arguments) typedef result name##_function arguments;
#include "functions.h"

enum {
#define HOOK(library, result, name, arguments, base, since, ptsz) F_##name,
#define CALL(library, result, name, arguments) F_##name,
#include "functions.h"
    FUNCTIONS
};
enum { CUDA, NVML, LIBRARIES };

extern void *nbgpu_real[FUNCTIONS];
#define REAL(name) ((name##_function *)nbgpu_real[F_##name])
#define HAVE(name) (nbgpu_real[F_##name] != NULL)

bool nbgpu_bind(int library); /* find the driver's functions; false while it is not loaded */

/* ---- resolve.c and slice.c: whether this process is limited ---- */
enum slice_state { SLICE_UNKNOWN, SLICE_NONE, SLICE_ACTIVE, SLICE_BROKEN };
extern _Atomic int nbgpu_ready; /* the slice is attached and the CUDA driver bound: hooks do their work */
extern const NbgpuCtl *nbgpu_ctl;
extern NbgpuUse *nbgpu_use;

int nbgpu_attach(void);           /* the slice's state, attaching at the first call */
bool nbgpu_prepare(int function); /* false: the driver has no such function */
#define ENTER(name, missing, ...)                                                                                                          \
    do {                                                                                                                                   \
        if (unlikely(!nbgpu_ready)) {                                                                                                      \
            if (!nbgpu_prepare(F_##name))                                                                                                  \
                return missing;                                                                                                            \
            if (nbgpu_attach() != SLICE_ACTIVE)                                                                                            \
                return REAL(name)(__VA_ARGS__);                                                                                            \
        }                                                                                                                                  \
    } while (0)
#define ENTER_CUDA(name, ...) ENTER(name, CUDA_ERROR_NOT_FOUND, __VA_ARGS__)

/* ---- slice.c: slots ---- */
typedef struct {
    NbgpuUseSlot *_Atomic slot; /* this process's, NULL until taken */
    CUdevice cuda;              /* the driver's number */
    uint64_t contexts;          /* bytes reserved for one context */
    bool primary_counted;
} Device;
extern Device nbgpu_device[NBGPU_DEVICES];
extern int nbgpu_devices; /* of the slice */

NbgpuUseSlot *nbgpu_slot(int device);           /* takes one if needed; NULL: all 256 are in use */
bool nbgpu_hold_slots(void);                    /* take their locks again, where the program dropped them; true: it had */
int nbgpu_reap(void);                           /* slots of dead processes freed */
const NbgpuCtlKernel *nbgpu_kernel_limit(void); /* of this process's kernel, NULL: none */
int nbgpu_fork_hook(void (*child)(void));
uint64_t nbgpu_now(void);
uint64_t nbgpu_now_coarse(void);

/* ---- account.c ---- */
enum charge_kind { CHARGE_USED, CHARGE_CONTEXT };
bool nbgpu_charge(int device, enum charge_kind kind, uint64_t bytes); /* false: refused, and said so in the slot */
bool nbgpu_charge_quietly(int device, enum charge_kind kind, uint64_t bytes);
bool nbgpu_charge_word(int device, uint64_t *word, uint64_t bytes); /* the same for any word that the sum contains */
bool nbgpu_on_host(uint32_t slot, uint64_t owner);                  /* the memory of a slot's process: it counts nothing */
bool nbgpu_away(int device);                                        /* this process's memory is on the host, or on its way there or back */
void nbgpu_wait_until_back(int device);                             /* while that is so, or the slice is parked; else returns at once */
void nbgpu_wait_in_parked(void);
void nbgpu_charge_forced(int device, uint64_t bytes); /* what is there already and can't be undone */
void nbgpu_uncharge(int device, enum charge_kind kind, uint64_t bytes);
void nbgpu_refuse(int device, uint64_t bytes, uint32_t by);
bool nbgpu_driver_refused(int device, uint64_t bytes, int attempt); /* driver said out of memory: true = try again */
uint64_t nbgpu_total(int device, const char *kernel_id);            /* bytes in use: of the slice, or of one kernel in it */
bool nbgpu_alone(void);                                             /* no other process has a slot */
uint64_t nbgpu_limit(int device);                                   /* that this process sees as the device's memory */
uint64_t nbgpu_room(int device);
uint64_t nbgpu_round(uint64_t bytes); /* as the driver takes it from the device */

/* ---- ptrmap.c: what this process allocated ---- */
enum block_kind { BLOCK_MEMORY, BLOCK_ARRAY, BLOCK_MAPPING, BLOCK_MAPPING_SIZE, BLOCK_HANDLE, BLOCK_EXEC };
typedef struct { /* 16 bytes: four to a cache line */
    uint64_t key;
    uint64_t bytes : 48; /* or whatever the kind needs */
    uint64_t context : 9, device : 4, kind : 3;
} Block;
_Static_assert(sizeof(Block) == 16, "size of a block");
#define CONTEXTS 511 /* their numbers fit in a block; 0: a context that is not followed */
bool nbgpu_map_put(const Block *block);
bool nbgpu_map_take(uint64_t key, enum block_kind kind, Block *block);
bool nbgpu_map_get(uint64_t key, enum block_kind kind, Block *block);
void nbgpu_map_drop_context(uint32_t context, void (*dropped)(const Block *));
void nbgpu_map_forget(void); /* after fork */

/* ---- share.c: memory that several processes hold; `local` is the pointer or object that this process knows it by ---- */
enum hold { HOLD_REFUSED, HOLD_COUNTED, HOLD_CHARGED }; /* the last: as memory of its own, to be given back by who called */
extern _Atomic int nbgpu_shares;                        /* entries of this process */
uint64_t nbgpu_share_key(const void *name, size_t size);
void nbgpu_cover(uint64_t local, int device, uint32_t context, uint64_t key, uint64_t bytes); /* handed out; key 0: unnamed */
enum hold nbgpu_hold(uint64_t local, int device, uint32_t context, uint64_t key, uint64_t bytes);
bool nbgpu_hold_more(uint64_t local, int device, uint64_t bytes);
bool nbgpu_hold_of(uint64_t local, int *device, uint64_t *key, uint64_t *bytes); /* what is held under that name; false: nothing */
void nbgpu_hold_also(uint64_t local, int device, uint64_t bytes);                /* of a key that is paid for already */
bool nbgpu_share_end(uint64_t local);
void nbgpu_shares_context_ended(uint32_t context);
uint64_t nbgpu_held(uint32_t slot, int device); /* what a slot holds of others and nobody of the slice pays for */
uint64_t nbgpu_covered_bytes(uint64_t key, int device);

/* ---- vmm.c: memory made by cuMemCreate, for multicast.c; all but the first with the lock ---- */
typedef struct Memory Memory;
void nbgpu_memory_lock(void);
void nbgpu_memory_unlock(void);
Memory *nbgpu_memory_of(CUmemGenericAllocationHandle handle);
Memory *nbgpu_memory_at(CUdeviceptr pointer);                      /* of a mapping */
void nbgpu_memory_of_nothing(CUmemGenericAllocationHandle handle); /* a handle of something that takes no memory itself */
void nbgpu_memory_keep(Memory *memory);
void nbgpu_memory_let_go(Memory *memory);
int nbgpu_memory_device(const Memory *memory);
void nbgpu_multicast_ended(const Memory *object);

/* ---- context.c ---- */
int nbgpu_current(uint32_t *context); /* device of the thread's current context, -1: none of the slice's */
int nbgpu_stream_device(CUstream stream);
int nbgpu_device_of(CUdevice device);
CUresult nbgpu_learn_devices(void);
CUresult nbgpu_init_visible(unsigned flags); /* cuInit seeing only the slice's devices */

/* ---- pool.c ---- */
void nbgpu_pools_refresh(int device, bool trim); /* count what pools really hold */
void nbgpu_pools_after_sync(void);
void nbgpu_pools_dirty(void);        /* something was given back to a pool */
void nbgpu_pools_forget(int device); /* its primary context is gone */
CUresult nbgpu_graph_charge(CUgraphExec exec, int device);
void nbgpu_graph_settle(int device);

/* ---- gate.c ---- */
void nbgpu_gate_forget_graph(CUgraphExec exec);
void nbgpu_busy_context_ends(int device, CUcontext context); /* before the real call; NULL: whichever */

/* ---- marked points for the kill tests ---- */
#ifdef NBGPU_MARKS
void nbgpu_mark(const char *name);
#define MARK(name) nbgpu_mark(name)
#else
#define MARK(name) ((void)0)
#endif

#endif
