/* Inside the simulated libcuda: what its sources share. The machine itself is sim_state.h. */
#ifndef NBGPU_DRV_H
#define NBGPU_DRV_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_abi.h"
#include "nbgpu_fault.h"
#include "sim_state.h"

#define EXPORT __attribute__((visibility("default")))
/* A call of the driver: exported as `name` by drv_gate.c, which lets no call through while the process is locked for a checkpoint. */
#define API(name, params)                                                                                                                  \
    EXPORT CUresult name params;                                                                                                           \
    CUresult name##_call params;                                                                                                           \
    CUresult name##_call params

/* One that such a lock does not hold up: it is exported as it is. */
#define OPEN_API(name, params) EXPORT CUresult name params

/* A call whose default stream may be the legacy or the thread's own one: exported as `name` and as `name<suffix>`. */
#define STREAM_API(name, suffix, params, args)                                                                                             \
    static CUresult name##_body params;                                                                                                    \
    API(name, params) { return name##_body args; }                                                                                         \
    API(name##suffix, params) {                                                                                                            \
        drv_own_stream = true;                                                                                                             \
        CUresult result = name##_body args;                                                                                                \
        drv_own_stream = false;                                                                                                            \
        return result;                                                                                                                     \
    }                                                                                                                                      \
    static CUresult name##_body params

#define TRY(call)                                                                                                                          \
    do {                                                                                                                                   \
        CUresult try_result = (call);                                                                                                      \
        if (__builtin_expect(try_result != CUDA_SUCCESS, 0))                                                                               \
            return try_result;                                                                                                             \
    } while (0)
#define NEED(condition, error)                                                                                                             \
    do {                                                                                                                                   \
        if (__builtin_expect(!(condition), 0))                                                                                             \
            return error;                                                                                                                  \
    } while (0)

enum {
    CTX_MAGIC = 0x43545831,
    STREAM_MAGIC = 0x53545231,
    EVENT_MAGIC = 0x45564e31,
    POOL_MAGIC = 0x504f4f31,
    GRAPH_MAGIC = 0x47524831,
    EXEC_MAGIC = 0x47455831,
    ARRAY_MAGIC = 0x41525231,
    MODULE_MAGIC = 0x4d4f4431,
    FUNCTION_MAGIC = 0x46554e31
};
enum { LIMITS = 16, SMALL_CLASSES = 23 };

struct chunk;
struct block;

/* Small blocks come from chunks of 2 MiB; a pool or a context has one heap per device. */
struct heap {
    int device;
    CUcontext ctx;
    CUmemoryPool pool;
    struct chunk *partial[SMALL_CLASSES];
};

/* What a stream's entry still has to do in this process when its engine part is over. */
struct host_work {
    void (*run)(void *argument);
    void *argument;
    bool owns_argument;
};

struct slot {
    CUevent event; /* recorded by this entry, not resolved yet */
    struct host_work *work;
};

struct CUctx_st {
    uint32_t magic;
    int device; /* of the machine */
    unsigned flags, api_version;
    bool primary;
    int channel;
    uint32_t generation;
    struct sim_channel *queue;
    struct sim_entry *entries;
    pthread_mutex_t lock; /* submissions */
    struct slot *slots;
    CUstream legacy, last_stream, streams;
    uint16_t next_stream_id;
    uint64_t id;
    size_t limits[LIMITS];
    uint64_t limits_taken; /* bytes of stacks and heaps beyond the first ones */
    uint32_t peers;        /* bit per device */
    struct heap heap;
};

struct capture;

struct CUstream_st {
    uint32_t magic;
    uint16_t id;
    uint8_t entry_flags; /* SIM_LEGACY, SIM_BLOCKING */
    unsigned flags;
    int priority;
    CUcontext ctx;
    _Atomic uint64_t last; /* entries submitted up to and with seq last - 1; 0: none */
    CUstream next;
    struct capture *capture; /* being captured */
    CUgraphNode *tips;       /* what the next captured node depends on */
    size_t tip_count;
    CUgreenCtx green;
};

struct CUevent_st {
    uint32_t magic;
    unsigned flags;
    CUcontext ctx;
    CUcontext recorded_in;
    uint32_t channel, generation;
    uint64_t seq, done_ns;
    bool recorded, resolved;
    struct capture *capture; /* recorded while capturing: these nodes */
    CUgraphNode *tips;
    size_t tip_count;
};

enum block_kind { BLOCK_DEVICE, BLOCK_MANAGED, BLOCK_RESERVED, BLOCK_MAPPED, BLOCK_HIDDEN, BLOCK_OPENED };

/* Memory that other processes may hold too: its contents in a file without a name, its physical memory in the machine's books. */
struct shared_memory {
    int object, fd;
    uint64_t id;
    size_t span;
    uint8_t *host; /* where the contents are mapped; a chunk's stay in the shadow */
    int opened;    /* of memory of another process: how many times */
};

/* A range of the address arena; small ones are described by their chunk, and this is made on the fly. */
struct block {
    CUdeviceptr base;
    size_t size;   /* as asked */
    size_t span;   /* as taken */
    uint8_t *host; /* where its contents are; NULL: nowhere (reserved addresses) */
    int device;
    int kind;
    int access; /* CU_MEM_ACCESS_FLAGS_*: 0 until cuMemSetAccess for a mapping */
    CUcontext ctx;
    CUmemoryPool pool;
    struct vmm_handle *handle;
    struct shared_memory *shared;
    struct block *reserved; /* of a mapping: the reservation that it lies in */
    uint64_t id;
};

struct CUmemPoolHandle_st {
    uint32_t magic;
    int device;
    bool is_default, imported; /* imported: another process's, nothing is allocated from it here */
    struct heap heap;
    size_t used, used_high, reserved, reserved_high, threshold, max_size, step;
    int handle_types;
    int reuse[3];
    CUmemoryPool next;
};

struct binding { /* of memory to a multicast object */
    struct vmm_handle *memory;
    size_t at, size;
    struct binding *next;
};

struct vmm_handle {
    unsigned multicast_devices, members; /* of a multicast object: how many devices, which */
    struct binding *bindings;
    size_t size;
    CUmemAllocationProp prop;
    int device, references;
    struct block *storage;
};

struct CUarray_st {
    uint32_t magic;
    CUDA_ARRAY3D_DESCRIPTOR desc;
    size_t element, pitch, rows, slices;
    CUdeviceptr data;
    bool owns; /* false: a level of a mipmapped array */
    int device;
};

/* A module, or a library, which is one that belongs to no context. */
struct CUmod_st {
    uint32_t magic;
    CUcontext ctx;
    char *text;    /* of PTX, else NULL: then every name is one of its GPU kernels */
    uint64_t code; /* physical bytes that it takes */
    CUfunction functions;
    struct global *globals;
    struct CUmod_st *next;
};

/* A function, or a CUkernel, which is one of a library. Structs stay after unloading, so that an old handle can be told. */
struct CUfunc_st {
    uint32_t magic;
    char *name;
    struct CUmod_st *module;
    CUfunction next;
    int timing;       /* how long it takes: drv_timing.c */
    uint64_t unit_ns; /* the duration, or what one unit of the first parameter means */
    int max_dynamic_shared, carveout;
    int parameters; /* -1: not known */
    uint32_t parameter_offset[64], parameter_size[64];
};

struct drv {
    bool ready;
    _Atomic bool forked;
    struct sim sim;
    int count, visible[SIM_DEVICES]; /* ordinals to the machine's devices */
    pthread_mutex_t lock;            /* contexts, modules, pools: what is rarely made */
    CUcontext primary[SIM_DEVICES];
    int primary_refs[SIM_DEVICES];
    unsigned primary_flags[SIM_DEVICES];
    CUmemoryPool default_pool[SIM_DEVICES], current_pool[SIM_DEVICES];
    _Atomic int host_work; /* pieces not run yet */
    _Atomic bool pools_dirty;
};
extern struct drv drv;
extern __thread bool drv_own_stream;

/* drv_init.c */
CUresult drv_open(void); /* the machine's file, which needs no cuInit */
CUresult drv_ready(void);
CUresult drv_device(CUdevice ordinal, int *device);
int drv_ordinal(int device);
int drv_driver_version(void);
void drv_uuid(int device, CUuuid *out);

/* drv_gate.c: calls that a checkpoint holds up */
CUresult drv_gate_enter(void);
void drv_gate_leave(void);
void drv_gate_attached(void); /* the process became a client in this call */

/* drv_resolve.c */
CUresult drv_resolve(const char *name, void **out, int asked, uint64_t flags, int *status);

/* drv_context.c */
CUresult drv_attach(void); /* be a client of the machine; with drv.lock held */
CUresult drv_primary(int device, CUcontext *out);
CUresult drv_primary_release(int device);
CUresult drv_current(CUcontext *ctx); /* the calling thread's, or an error */
bool drv_ctx_alive(CUcontext ctx);
CUresult drv_each_ctx(CUresult (*visit)(CUcontext ctx));
void drv_host_scan(void);

/* drv_stream.c */
struct submission {
    int kind;
    uint64_t ns;
    CUevent event;
    struct host_work *work;
    const struct CUevent_st *wait_for;
};
CUresult drv_stream(CUstream handle, CUstream *stream); /* what a handle means to this thread */
CUstream drv_stream_make(CUcontext ctx, unsigned flags, int priority);
CUresult drv_submit(CUstream stream, const struct submission *what, uint64_t *seq);
CUresult drv_wait(CUcontext ctx, uint64_t seq);
CUresult drv_wait_all(CUcontext ctx);
CUresult drv_stream_wait(CUstream stream);
bool drv_idle(CUcontext ctx);
CUresult drv_event_record(CUevent event, CUstream stream);
CUresult drv_event_wait(CUstream stream, CUevent event);

/* drv_host.c: the thread that runs host functions */
CUresult drv_host_work_make(void (*run)(void *), void *argument, bool owns, struct host_work **work);

/* drv_heap.c: addresses and physical memory. Functions named _locked want heap_lock. */
extern pthread_mutex_t heap_lock;
CUresult heap_alloc(struct heap *heap, size_t bytes, CUdeviceptr *out);
CUresult heap_free(CUdeviceptr base, struct block *was); /* INVALID_VALUE when it is no block's base */
bool heap_find(CUdeviceptr p, struct block *out);
void heap_drop_ctx(CUcontext ctx);
struct block *block_take_locked(size_t span, int kind, bool charge, int device); /* NULL: no memory or no addresses */
void block_release_locked(struct block *block, bool charged);
struct block *block_at_locked(CUdeviceptr p);
CUdeviceptr addresses_take_locked(size_t pages);
void page_map_locked(CUdeviceptr base, size_t bytes, void *entry);
bool heap_oom_injected(void);
bool is_device_address(CUdeviceptr p);
bool arena_ready(void);
uint64_t arena_next_id(void);
size_t small_rounded(size_t bytes); /* what a block really takes */

/* drv_backing.c: contents of device memory */
uint8_t *shadow_of(CUdeviceptr p);
CUresult backing_touch(uint8_t *host, size_t bytes);
bool backing_touched(const uint8_t *host, size_t *run); /* run: bytes from here on of which that holds, at least */
void backing_drop(uint8_t *host, size_t bytes);

void vmm_unreference_locked(struct vmm_handle *handle); /* drv_vmm.c */
void multicast_end_locked(struct vmm_handle *object);   /* drv_multicast.c */

/* drv_share.c: memory of several processes; with heap_lock held */
struct shared_memory *shared_make(int device, size_t span, bool fresh);
struct shared_memory *shared_open(int fd, int *device); /* takes the descriptor; NULL: it is no such file, or the memory is no more */
void shared_end(struct shared_memory *shared);
CUresult share_close(CUdeviceptr p); /* not with heap_lock held */
void share_context_ends(CUcontext ctx);
CUresult heap_share(CUdeviceptr p, struct block *block, struct shared_memory **out); /* drv_heap.c; block: what p lies in, whole pages */
size_t backing_untouched(const uint8_t *host, size_t most);  /* bytes from here on that never had contents, in coarse steps */
void backing_move(uint8_t *from, size_t bytes, uint8_t *to); /* what has contents */

/* drv_copy.c */
struct box_side {
    bool device;
    uint8_t *host;
    CUdeviceptr address;
    size_t pitch, slice; /* bytes between rows and between slices */
};
struct box {
    struct box_side from, to;
    size_t width, height, depth;
};
struct fill {
    CUdeviceptr to;
    size_t pitch, width, height; /* width in elements */
    unsigned element, value;
};
CUresult box_of_copy3d(const CUDA_MEMCPY3D *copy, struct box *box);
CUresult drv_copy(const struct box *box, CUstream stream, bool synchronous);
CUresult drv_fill(const struct fill *fill, CUstream stream, bool synchronous);
int box_kind(const struct box *box);
uint64_t box_ns(const struct box *box);
uint64_t fill_ns(const struct fill *fill);
CUresult box_run(const struct box *box);
CUresult fill_run(const struct fill *fill);

/* drv_pool.c */
CUresult pool_alloc(CUmemoryPool pool, size_t bytes, CUdeviceptr *out);
CUresult pool_free(CUmemoryPool pool, CUdeviceptr base);
CUmemoryPool pool_default(int device);
CUresult pool_of_other(int device, CUmemoryPool *out);
void pools_trim(void); /* at synchronisation: give back what is above the thresholds */
void pools_forget(int device);

/* drv_module.c, drv_timing.c */
void timing_of(CUfunction function);
void ptx_parameters(CUfunction function, const char *text);
bool ptx_has_entry(const char *text, const char *name, const char **parameters);
bool ptx_next_entry(const char **at, char *name, size_t room);
size_t ptx_global(const char *text, const char *name);
bool ptx_next_global(const char **at, char *name, size_t room);
uint64_t launch_ns(CUfunction function, const CUlaunchConfig *config, void **params, void **extra);
CUresult drv_function(CUfunction maybe_kernel, CUfunction *function);
void modules_drop_ctx(CUcontext ctx);

/* drv_capture.c, drv_graph.c */
struct node_payload;
CUresult capture_kernel(CUstream s, CUfunction f, const CUlaunchConfig *config, void **params, void **extra);
CUresult capture_copy(CUstream s, const struct box *box);
CUresult capture_fill(CUstream s, const struct fill *fill);
CUresult capture_host(CUstream s, CUhostFn fn, void *user);
CUresult capture_alloc(CUstream s, size_t bytes, CUdeviceptr *out);
CUresult capture_free(CUstream s, CUdeviceptr p);
CUresult capture_event_record(CUstream s, CUevent e);
CUresult capture_event_wait(CUstream s, CUevent e);
void capture_forget_event(CUevent e);
bool graph_memory_freed(CUdeviceptr base); /* true when it is a graph's allocation: it is let go of */

#endif
