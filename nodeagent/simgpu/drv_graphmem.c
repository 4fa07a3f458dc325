/* Memory of graphs: a device's own pool, which grows at launch and shrinks when it is trimmed. */
#define _GNU_SOURCE
#include "drv_graph.h"

static struct {
    struct CUmemPoolHandle_st pool; /* gives addresses; its counters are the attributes */
    bool made;
} books[SIM_DEVICES];
static struct graph_allocation *allocations;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct CUmemPoolHandle_st *book(int device) {
    struct CUmemPoolHandle_st *pool = &books[device].pool;
    if (!books[device].made) {
        books[device].made = true;
        pool->device = device;
        pool->heap = (struct heap){.device = device, .pool = pool};
    }
    return pool;
}

struct graph_allocation *graph_allocation_at(CUdeviceptr p) {
    pthread_mutex_lock(&lock);
    struct graph_allocation *a = allocations;
    while (a && a->base != p)
        a = a->next;
    pthread_mutex_unlock(&lock);
    return a;
}

CUresult graph_allocate(int device, size_t bytes, struct graph_allocation **out) {
    struct graph_allocation *a = calloc(1, sizeof *a);
    NEED(a, CUDA_ERROR_OUT_OF_MEMORY);
    *a = (struct graph_allocation){.size = bytes, .device = device, .references = 1};
    pthread_mutex_lock(&lock);
    CUresult result = heap_alloc(&book(device)->heap, bytes, &a->base);
    if (result == CUDA_SUCCESS) {
        a->next = allocations;
        allocations = a;
    } else {
        free(a);
    }
    pthread_mutex_unlock(&lock);
    *out = a;
    return result;
}

void graph_allocation_release(struct graph_allocation *a) {
    struct block was;
    if (--a->references)
        return;
    graph_let_go(a);
    pthread_mutex_lock(&lock);
    for (struct graph_allocation **at = &allocations; *at; at = &(*at)->next)
        if (*at == a) {
            *at = a->next;
            break;
        }
    heap_free(a->base, &was);
    pthread_mutex_unlock(&lock);
    free(a);
}

static size_t rounded(size_t bytes) { return (bytes + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE; }

/* At launch: physical memory for an allocation that is not held already. */
CUresult graph_hold(struct graph_allocation *a) {
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    struct CUmemPoolHandle_st *pool = book(a->device);
    if (!a->held) {
        size_t used = pool->used + ((a->size + 511) & ~(size_t)511), reserved = rounded(used);
        if (reserved > pool->reserved && !sim_mem_take(&drv.sim, (unsigned)a->device, reserved - pool->reserved)) {
            result = CUDA_ERROR_OUT_OF_MEMORY;
        } else {
            if (reserved > pool->reserved)
                pool->reserved = reserved;
            if (pool->reserved > pool->reserved_high)
                pool->reserved_high = pool->reserved;
            pool->used = used;
            if (used > pool->used_high)
                pool->used_high = used;
            a->held = true;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

void graph_let_go(struct graph_allocation *a) {
    pthread_mutex_lock(&lock);
    if (a->held)
        book(a->device)->used -= (a->size + 511) & ~(size_t)511;
    a->held = false;
    pthread_mutex_unlock(&lock);
}

bool graph_memory_freed(CUdeviceptr base) {
    struct graph_allocation *a = graph_allocation_at(base);
    if (a)
        graph_let_go(a);
    return a != NULL;
}

API(cuDeviceGraphMemTrim, (CUdevice ordinal)) {
    int device;
    TRY(drv_device(ordinal, &device));
    pthread_mutex_lock(&lock);
    struct CUmemPoolHandle_st *pool = book(device);
    size_t keep = rounded(pool->used);
    if (keep < pool->reserved) {
        sim_mem_give(&drv.sim, (unsigned)device, pool->reserved - keep);
        pool->reserved = keep;
    }
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

API(cuDeviceGetGraphMemAttribute, (CUdevice ordinal, int attribute, void *value)) {
    int device;
    NEED(value && attribute >= 0 && attribute <= CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    pthread_mutex_lock(&lock);
    struct CUmemPoolHandle_st *pool = book(device);
    uint64_t values[] = {pool->used, pool->used_high, pool->reserved, pool->reserved_high};
    pthread_mutex_unlock(&lock);
    memcpy(value, &values[attribute], sizeof *values);
    return CUDA_SUCCESS;
}

API(cuDeviceSetGraphMemAttribute, (CUdevice ordinal, int attribute, void *value)) {
    int device;
    NEED(value, CUDA_ERROR_INVALID_VALUE);
    NEED(attribute == CU_GRAPH_MEM_ATTR_USED_MEM_HIGH || attribute == CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(ordinal, &device));
    pthread_mutex_lock(&lock);
    struct CUmemPoolHandle_st *pool = book(device);
    if (attribute == CU_GRAPH_MEM_ATTR_USED_MEM_HIGH) {
        pool->used_high = pool->used;
    } else {
        pool->reserved_high = pool->reserved;
    }
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}
