/* Memory pools and graph memory: counted by what they hold of the device (their reserved bytes), not by what is handed out.
 *
 * Before a pool may grow the growth is reserved; afterwards the pool is asked what it holds and the count corrected. A pool shrinks
 * when the driver likes (at synchronisation), so it is asked again then, and before anything is refused.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "limiter.h"

#define POOLS 256
#define DEEPEST_GRAPH 8              /* graphs in graphs */
#define MOST_NODES ((size_t)1 << 24) /* of one graph */

typedef struct {
    CUmemoryPool pool;
    int device;
    uint64_t counted;
    bool own; /* made by cuMemPoolCreate, not a device's default */
} Pool;

static pthread_mutex_t lock; /* recursive: a refused charge comes back here to look for memory */
static pthread_once_t lock_once = PTHREAD_ONCE_INIT;
static Pool pools[POOLS];
static _Atomic int pool_count; /* looked at without the lock; so is the next one */
static uint64_t graph_counted[NBGPU_DEVICES];
static _Atomic int dirty, graphs_with_memory;

static void make_lock(void) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static void forget_parent(void) {
    make_lock();
    pool_count = 0;
    memset(graph_counted, 0, sizeof graph_counted);
    dirty = graphs_with_memory = 0;
}

static void first_use(void) {
    make_lock();
    nbgpu_fork_hook(forget_parent);
}

static void enter(void) {
    pthread_once(&lock_once, first_use);
    pthread_mutex_lock(&lock);
}

static uint64_t attribute(CUmemoryPool pool, int which) {
    uint64_t value = 0;
    return HAVE(cuMemPoolGetAttribute) && REAL(cuMemPoolGetAttribute)(pool, which, &value) == CUDA_SUCCESS ? value : 0;
}

static Pool *pool_entry(CUmemoryPool pool, int device) {
    for (int i = 0; i < pool_count; i++)
        if (pools[i].pool == pool)
            return &pools[i];
    if (pool_count == POOLS)
        return NULL;
    pools[pool_count] = (Pool){pool, device, 0, false};
    return &pools[pool_count++];
}

static void settle_word(int device, uint64_t *counted, uint64_t real) {
    if (real < *counted)
        nbgpu_uncharge(device, CHARGE_USED, *counted - real);
    if (real > *counted)
        nbgpu_charge_forced(device, real - *counted);
    STORE(*counted, real);
}

static void settle(Pool *pool) { settle_word(pool->device, &pool->counted, attribute(pool->pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)); }

static uint64_t graph_attribute(int device, int which) {
    uint64_t value = 0;
    if (!HAVE(cuDeviceGetGraphMemAttribute))
        return 0;
    return REAL(cuDeviceGetGraphMemAttribute)(nbgpu_device[device].cuda, which, &value) == CUDA_SUCCESS ? value : 0;
}

void nbgpu_graph_settle(int device) {
    if (!graphs_with_memory && !LOAD(graph_counted[device]))
        return;
    enter();
    settle_word(device, &graph_counted[device], graph_attribute(device, CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT));
    pthread_mutex_unlock(&lock);
}

void nbgpu_pools_refresh(int device, bool trim) {
    if (!pool_count && !graphs_with_memory && !LOAD(graph_counted[device]))
        return;
    enter();
    for (int i = 0; i < pool_count; i++) {
        if (pools[i].device != device)
            continue;
        if (trim)
            REAL(cuMemPoolTrimTo)(pools[i].pool, 0);
        settle(&pools[i]);
    }
    if (graph_counted[device] && trim && HAVE(cuDeviceGraphMemTrim))
        REAL(cuDeviceGraphMemTrim)(nbgpu_device[device].cuda);
    nbgpu_graph_settle(device);
    pthread_mutex_unlock(&lock);
}

void nbgpu_pools_after_sync(void) {
    if (likely(!dirty))
        return;
    dirty = 0;
    for (int d = 0; d < nbgpu_devices; d++)
        nbgpu_pools_refresh(d, false);
}

void nbgpu_pools_forget(int device) {
    if (!pool_count && !LOAD(graph_counted[device]))
        return;
    enter();
    for (int i = 0; i < pool_count;) {
        if (pools[i].device != device || pools[i].own) {
            i++;
            continue;
        }
        nbgpu_uncharge(device, CHARGE_USED, pools[i].counted);
        pools[i] = pools[--pool_count];
    }
    nbgpu_graph_settle(device);
    pthread_mutex_unlock(&lock);
}

/* ---- allocation from a pool ---- */

typedef struct {
    CUdeviceptr *pointer;
    size_t size;
    CUmemoryPool pool; /* NULL: the device's current one */
    CUstream stream;
    bool ptsz;
} Request;

static CUresult real_allocate(const Request *r) {
    if (r->pool && r->ptsz)
        return REAL(cuMemAllocFromPoolAsync_ptsz)(r->pointer, r->size, r->pool, r->stream);
    if (r->pool)
        return REAL(cuMemAllocFromPoolAsync)(r->pointer, r->size, r->pool, r->stream);
    return r->ptsz ? REAL(cuMemAllocAsync_ptsz)(r->pointer, r->size, r->stream) : REAL(cuMemAllocAsync)(r->pointer, r->size, r->stream);
}

static void real_free(const Request *r) {
    if (r->ptsz)
        REAL(cuMemFreeAsync_ptsz)(*r->pointer, r->stream);
    else
        REAL(cuMemFreeAsync)(*r->pointer, r->stream);
    dirty = 1;
}

static bool capturing(const Request *r) {
    int status = 0;
    if (r->ptsz && HAVE(cuStreamIsCapturing_ptsz))
        return REAL(cuStreamIsCapturing_ptsz)(r->stream, &status) == CUDA_SUCCESS && status;
    return HAVE(cuStreamIsCapturing) && REAL(cuStreamIsCapturing)(r->stream, &status) == CUDA_SUCCESS && status;
}

/* What the pool must grow by for this request, in the driver's 2 MiB. */
static uint64_t growth(const Pool *pool, uint64_t size) {
    const uint64_t reserved = attribute(pool->pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    const uint64_t used = attribute(pool->pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    const uint64_t spare = reserved > used ? reserved - used : 0;
    const uint64_t held = reserved > pool->counted ? reserved - pool->counted : 0; /* not yet counted */
    return held + (size > spare ? (size - spare + 2 * MIB - 1) / (2 * MIB) * (2 * MIB) : 0);
}

static bool reserve_growth(Pool *pool, uint64_t size) {
    uint64_t need, have = 0;
    while ((need = growth(pool, size)) > have) { /* a refused charge trims pools, this one too: look again */
        if (!nbgpu_charge(pool->device, CHARGE_USED, need - have)) {
            nbgpu_uncharge(pool->device, CHARGE_USED, have);
            return false;
        }
        have = need;
    }
    pool->counted += have;
    return true;
}

/* The pool grew by more than was thought: that must fit too, or the allocation is undone. */
static CUresult settle_growth(Pool *pool, const Request *r) {
    const uint64_t real = attribute(pool->pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    if (real <= pool->counted || nbgpu_charge_quietly(pool->device, CHARGE_USED, real - pool->counted)) {
        if (real < pool->counted)
            nbgpu_uncharge(pool->device, CHARGE_USED, pool->counted - real);
        pool->counted = real;
        return CUDA_SUCCESS;
    }
    real_free(r);
    nbgpu_pools_refresh(pool->device, true);
    nbgpu_refuse(pool->device, r->size, NBGPU_REFUSED_SLICE);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult allocate(Request *r) {
    const int device = nbgpu_stream_device(r->stream);
    CUmemoryPool name = r->pool;
    if (device < 0 || !r->pointer || r->size == 0 || capturing(r))
        return real_allocate(r);
    if (!name && (!HAVE(cuDeviceGetMemPool) || REAL(cuDeviceGetMemPool)(&name, nbgpu_device[device].cuda) != CUDA_SUCCESS))
        return real_allocate(r);
    if (r->size >= (uint64_t)1 << 47)
        return CUDA_ERROR_OUT_OF_MEMORY;
    enter();
    Pool *pool = pool_entry(name, device);
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    if (pool && reserve_growth(pool, r->size)) {
        MARK("pool-reserved");
        result = real_allocate(r);
        for (int i = 0; result == CUDA_ERROR_OUT_OF_MEMORY && nbgpu_driver_refused(pool->device, r->size, i); i++)
            result = real_allocate(r);
        if (result == CUDA_SUCCESS)
            result = settle_growth(pool, r);
        else
            settle(pool);
        if (result == CUDA_SUCCESS && nbgpu_slot(pool->device))
            __atomic_fetch_add(&nbgpu_slot(pool->device)->allocs, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemAllocAsync(CUdeviceptr *pointer, size_t size, CUstream stream) {
    ENTER_CUDA(cuMemAllocAsync, pointer, size, stream);
    return allocate(&(Request){pointer, size, NULL, stream, false});
}

CUresult cuMemAllocAsync_ptsz(CUdeviceptr *pointer, size_t size, CUstream stream) {
    ENTER_CUDA(cuMemAllocAsync_ptsz, pointer, size, stream);
    return allocate(&(Request){pointer, size, NULL, stream, true});
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr *pointer, size_t size, CUmemoryPool pool, CUstream stream) {
    ENTER_CUDA(cuMemAllocFromPoolAsync, pointer, size, pool, stream);
    return pool ? allocate(&(Request){pointer, size, pool, stream, false}) : REAL(cuMemAllocFromPoolAsync)(pointer, size, pool, stream);
}

CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr *pointer, size_t size, CUmemoryPool pool, CUstream stream) {
    ENTER_CUDA(cuMemAllocFromPoolAsync_ptsz, pointer, size, pool, stream);
    return pool ? allocate(&(Request){pointer, size, pool, stream, true}) : REAL(cuMemAllocFromPoolAsync_ptsz)(pointer, size, pool, stream);
}

void nbgpu_pools_dirty(void) {
    if (pool_count)
        dirty = 1;
}

/* ---- pools that the program makes ---- */

CUresult cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *properties) {
    ENTER_CUDA(cuMemPoolCreate, pool, properties);
    const bool on_device = properties && properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE;
    const int device = on_device ? nbgpu_device_of(properties->location.id) : -1;
    if (on_device && device < 0)
        return CUDA_ERROR_INVALID_DEVICE;
    const CUresult result = REAL(cuMemPoolCreate)(pool, properties);
    if (result != CUDA_SUCCESS || device < 0)
        return result;
    enter();
    Pool *entry = pool_entry(*pool, device);
    if (entry)
        entry->own = true;
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemPoolDestroy(CUmemoryPool pool) {
    ENTER_CUDA(cuMemPoolDestroy, pool);
    enter();
    const uint64_t used = attribute(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    const CUresult result = REAL(cuMemPoolDestroy)(pool);
    for (int i = 0; result == CUDA_SUCCESS && i < pool_count; i++) {
        if (pools[i].pool != pool)
            continue;
        /* blocks still in use outlive the pool's name; nobody can be asked about them any more: they stay counted */
        if (used < pools[i].counted)
            nbgpu_uncharge(pools[i].device, CHARGE_USED, pools[i].counted - used);
        pools[i] = pools[--pool_count];
        break;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t keep) {
    ENTER_CUDA(cuMemPoolTrimTo, pool, keep);
    const CUresult result = REAL(cuMemPoolTrimTo)(pool, keep);
    enter();
    for (int i = 0; i < pool_count; i++)
        if (pools[i].pool == pool)
            settle(&pools[i]);
    pthread_mutex_unlock(&lock);
    return result;
}

/* ---- graphs that allocate ---- */

/* What a graph's nodes allocate, those of the graphs inside it included. */
static uint64_t graph_bytes(CUgraph graph, int depth) {
    size_t count = 0;
    uint64_t bytes = 0;
    if (!HAVE(cuGraphGetNodes) || !HAVE(cuGraphNodeGetType) || !HAVE(cuGraphMemAllocNodeGetParams) || depth > DEEPEST_GRAPH)
        return 0;
    if (REAL(cuGraphGetNodes)(graph, NULL, &count) != CUDA_SUCCESS || !count || count > MOST_NODES)
        return 0;
    const size_t size = count * sizeof(CUgraphNode);
    CUgraphNode *nodes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (nodes == MAP_FAILED)
        return 0;
    if (REAL(cuGraphGetNodes)(graph, nodes, &count) != CUDA_SUCCESS)
        count = 0;
    for (size_t i = 0; i < count; i++) {
        int type;
        CUgraph inner;
        CUDA_MEM_ALLOC_NODE_PARAMS parameters;
        if (REAL(cuGraphNodeGetType)(nodes[i], &type) != CUDA_SUCCESS)
            continue;
        if (type == CU_GRAPH_NODE_TYPE_MEM_ALLOC && REAL(cuGraphMemAllocNodeGetParams)(nodes[i], &parameters) == CUDA_SUCCESS)
            bytes += nbgpu_round(parameters.bytesize);
        if (type == CU_GRAPH_NODE_TYPE_GRAPH && HAVE(cuGraphChildGraphNodeGetGraph) &&
            REAL(cuGraphChildGraphNodeGetGraph)(nodes[i], &inner) == CUDA_SUCCESS)
            bytes += graph_bytes(inner, depth + 1);
    }
    munmap(nodes, size);
    return bytes;
}

static CUresult instantiated(CUresult result, const CUgraphExec *exec, CUgraph graph) {
    if (result != CUDA_SUCCESS || !exec)
        return result;
    enter();
    const Block block = {.key = (uintptr_t)*exec, .bytes = graph_bytes(graph, 0), .kind = BLOCK_EXEC};
    if (block.bytes && nbgpu_map_put(&block))
        graphs_with_memory++;
    pthread_mutex_unlock(&lock);
    return result;
}

/* What a graph's allocations make the device's graph memory grow by. */
static uint64_t graph_growth(int device, uint64_t bytes) {
    const uint64_t reserved = graph_attribute(device, CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT);
    const uint64_t used = graph_attribute(device, CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT);
    const uint64_t spare = reserved > used ? reserved - used : 0;
    const uint64_t held = reserved > graph_counted[device] ? reserved - graph_counted[device] : 0;
    return held + (bytes > spare ? (bytes - spare + 2 * MIB - 1) / (2 * MIB) * (2 * MIB) : 0);
}

CUresult nbgpu_graph_charge(CUgraphExec exec, int device) {
    Block block;
    if (likely(!graphs_with_memory) || device < 0 || !nbgpu_map_get((uintptr_t)exec, BLOCK_EXEC, &block))
        return CUDA_SUCCESS;
    uint64_t need, have = 0;
    CUresult result = CUDA_SUCCESS;
    enter();
    while (result == CUDA_SUCCESS && (need = graph_growth(device, block.bytes)) > have) { /* a refused charge trims: look again */
        if (nbgpu_charge(device, CHARGE_USED, need - have))
            have = need;
        else
            result = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (result == CUDA_SUCCESS)
        STORE(graph_counted[device], graph_counted[device] + have);
    else
        nbgpu_uncharge(device, CHARGE_USED, have);
    pthread_mutex_unlock(&lock);
    return result;
}

#define INSTANTIATE(name, ...)                                                                                                             \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    return instantiated(REAL(name)(__VA_ARGS__), exec, graph)

CUresult cuGraphInstantiate(CUgraphExec *exec, CUgraph graph, CUgraphNode *error, char *log, size_t size) {
    INSTANTIATE(cuGraphInstantiate, exec, graph, error, log, size);
}
CUresult cuGraphInstantiate_v2(CUgraphExec *exec, CUgraph graph, CUgraphNode *error, char *log, size_t size) {
    INSTANTIATE(cuGraphInstantiate_v2, exec, graph, error, log, size);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    INSTANTIATE(cuGraphInstantiateWithFlags, exec, graph, flags);
}
CUresult cuGraphInstantiateWithParams(CUgraphExec *exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *parameters) {
    INSTANTIATE(cuGraphInstantiateWithParams, exec, graph, parameters);
}
CUresult cuGraphInstantiateWithParams_ptsz(CUgraphExec *exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *parameters) {
    INSTANTIATE(cuGraphInstantiateWithParams_ptsz, exec, graph, parameters);
}

/* The memory of a graph's own allocations may be taken when it is uploaded already. */
#define UPLOAD(name)                                                                                                                       \
    ENTER_CUDA(name, exec, stream);                                                                                                        \
    const int d = nbgpu_stream_device(stream);                                                                                             \
    if (nbgpu_graph_charge(exec, d) != CUDA_SUCCESS)                                                                                       \
        return CUDA_ERROR_OUT_OF_MEMORY;                                                                                                   \
    const CUresult result = REAL(name)(exec, stream);                                                                                      \
    if (d >= 0)                                                                                                                            \
        nbgpu_graph_settle(d);                                                                                                             \
    return result

CUresult cuGraphUpload(CUgraphExec exec, CUstream stream) { UPLOAD(cuGraphUpload); }
CUresult cuGraphUpload_ptsz(CUgraphExec exec, CUstream stream) { UPLOAD(cuGraphUpload_ptsz); }

CUresult cuGraphExecDestroy(CUgraphExec exec) {
    ENTER_CUDA(cuGraphExecDestroy, exec);
    Block block;
    if (nbgpu_map_take((uintptr_t)exec, BLOCK_EXEC, &block))
        graphs_with_memory--;
    nbgpu_gate_forget_graph(exec);
    return REAL(cuGraphExecDestroy)(exec);
}

CUresult cuDeviceGraphMemTrim(CUdevice device) {
    ENTER_CUDA(cuDeviceGraphMemTrim, device);
    const CUresult result = REAL(cuDeviceGraphMemTrim)(device);
    const int d = nbgpu_device_of(device);
    if (d >= 0)
        nbgpu_graph_settle(d);
    return result;
}
