/* Memory made by cuMemCreate, here or in another process: it lives until its last handle is released and its last mapping is gone. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/stat.h>

#include "limiter.h"

#define PAGE 4096
#define FABRIC_HANDLE_BYTES 64

struct Memory {
    uint64_t bytes;
    uint32_t handles, mappings;
    int device;
    bool opened, shared; /* another process's; counted by share.c */
    bool multicast;      /* an object that other memory is bound to */
    struct Memory *next_free;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* held over the real calls: handles are numbers that come again */
static Memory *free_list;
static bool fork_hook;

static void forget_parent(void) { pthread_mutex_init(&lock, NULL); }

static Memory *new_memory(void) {
    if (!fork_hook)
        nbgpu_fork_hook(forget_parent);
    fork_hook = true;
    if (!free_list) {
        Memory *chunk = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (chunk == MAP_FAILED)
            return NULL;
        for (size_t i = 0; i < 64 * PAGE / sizeof *chunk; i++)
            chunk[i].next_free = free_list, free_list = &chunk[i];
    }
    Memory *memory = free_list;
    free_list = memory->next_free;
    return memory;
}

static void let_go(Memory *memory) {
    if (memory->handles || memory->mappings)
        return;
    nbgpu_share_end((uintptr_t)memory);
    if (memory->multicast)
        nbgpu_multicast_ended(memory);
    else if (!memory->shared)
        nbgpu_uncharge(memory->device, CHARGE_USED, memory->bytes);
    if (!memory->multicast)
        __atomic_fetch_add(&nbgpu_slot(memory->device)->frees, 1, __ATOMIC_RELAXED);
    memory->next_free = free_list;
    free_list = memory;
}

static void remember(uint64_t key, enum block_kind kind, Memory *memory, size_t size) {
    const Block block = {.key = key, .bytes = (uintptr_t)memory & (((uint64_t)1 << 48) - 1), .kind = kind};
    nbgpu_map_put(&block);
    if (kind != BLOCK_MAPPING)
        return;
    const Block length = {.key = key, .bytes = size & (((uint64_t)1 << 48) - 1), .kind = BLOCK_MAPPING_SIZE};
    nbgpu_map_put(&length);
}

static Memory *memory_of(const Block *block) { return (Memory *)(uintptr_t)block->bytes; }

/* ---- for multicast.c ---- */

void nbgpu_memory_lock(void) { pthread_mutex_lock(&lock); }
void nbgpu_memory_unlock(void) { pthread_mutex_unlock(&lock); }

Memory *nbgpu_memory_of(CUmemGenericAllocationHandle handle) {
    Block block;
    return nbgpu_map_get(handle, BLOCK_HANDLE, &block) ? memory_of(&block) : NULL;
}

Memory *nbgpu_memory_at(CUdeviceptr pointer) {
    Block block;
    CUdeviceptr base = pointer;
    size_t size;
    if (!nbgpu_map_get(pointer, BLOCK_MAPPING, &block) && HAVE(cuMemGetAddressRange_v2))
        REAL(cuMemGetAddressRange_v2)(&base, &size, pointer);
    return nbgpu_map_get(base, BLOCK_MAPPING, &block) ? memory_of(&block) : NULL;
}

void nbgpu_memory_of_nothing(CUmemGenericAllocationHandle handle) {
    Memory *memory = new_memory();
    if (!memory)
        return;
    *memory = (Memory){.handles = 1, .device = -1, .multicast = true};
    remember(handle, BLOCK_HANDLE, memory, 0);
}

void nbgpu_memory_keep(Memory *memory) { memory->mappings++; }

void nbgpu_memory_let_go(Memory *memory) {
    memory->mappings--;
    let_go(memory);
}

int nbgpu_memory_device(const Memory *memory) { return memory->device; }

/* ---- the calls ---- */

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties, unsigned long long flags) {
    ENTER_CUDA(cuMemCreate, handle, size, properties, flags);
    if (!handle || !properties || properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return REAL(cuMemCreate)(handle, size, properties, flags);
    const int device = nbgpu_device_of(properties->location.id); /* where the memory is, whatever context is current */
    if (device < 0)
        return CUDA_ERROR_INVALID_DEVICE;
    if (!nbgpu_charge(device, CHARGE_USED, size))
        return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    Memory *memory = new_memory();
    CUresult result = memory ? REAL(cuMemCreate)(handle, size, properties, flags) : CUDA_ERROR_OUT_OF_MEMORY;
    for (int i = 0; memory && result == CUDA_ERROR_OUT_OF_MEMORY && nbgpu_driver_refused(device, size, i); i++)
        result = REAL(cuMemCreate)(handle, size, properties, flags);
    if (result == CUDA_SUCCESS) {
        *memory = (Memory){.bytes = size, .handles = 1, .device = device};
        remember(*handle, BLOCK_HANDLE, memory, 0);
        __atomic_fetch_add(&nbgpu_slot(device)->allocs, 1, __ATOMIC_RELAXED);
    } else {
        nbgpu_uncharge(device, CHARGE_USED, size);
        if (memory)
            memory->next_free = free_list, free_list = memory;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    ENTER_CUDA(cuMemRelease, handle);
    Block block;
    pthread_mutex_lock(&lock);
    const CUresult result = REAL(cuMemRelease)(handle);
    if (result == CUDA_SUCCESS && nbgpu_map_get(handle, BLOCK_HANDLE, &block)) {
        Memory *memory = memory_of(&block);
        if (--memory->handles == 0) {
            nbgpu_map_take(handle, BLOCK_HANDLE, &block);
            let_go(memory);
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address) {
    ENTER_CUDA(cuMemRetainAllocationHandle, handle, address);
    Block block;
    pthread_mutex_lock(&lock);
    const CUresult result = REAL(cuMemRetainAllocationHandle)(handle, address);
    if (result == CUDA_SUCCESS) {
        if (nbgpu_map_get(*handle, BLOCK_HANDLE, &block) || nbgpu_map_get((uintptr_t)address, BLOCK_MAPPING, &block)) {
            memory_of(&block)->handles++;
            remember(*handle, BLOCK_HANDLE, memory_of(&block), 0);
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

/* No call says how large opened memory is; a process of this slice that made it does, else the first mapping. */
static bool grown(Memory *memory, uint64_t bytes) {
    if (!memory->opened || bytes <= memory->bytes)
        return true;
    const uint64_t more = bytes - memory->bytes;
    if (!(memory->shared ? nbgpu_hold_more((uintptr_t)memory, memory->device, more) : nbgpu_charge(memory->device, CHARGE_USED, more)))
        return false;
    memory->bytes = bytes;
    return true;
}

/* What names the memory for every process that has the handle. A character device names nothing: NVIDIA's are all one file. */
static uint64_t key_of(const void *shareable, int type) {
    struct stat status;
    if (type == CU_MEM_HANDLE_TYPE_FABRIC)
        return nbgpu_share_key(shareable, FABRIC_HANDLE_BYTES);
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || fstat((int)(intptr_t)shareable, &status) != 0 || !S_ISREG(status.st_mode))
        return 0;
    const uint64_t name[] = {status.st_dev, status.st_ino};
    return nbgpu_share_key(name, sizeof name);
}

CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle, int type, unsigned long long flags) {
    ENTER_CUDA(cuMemExportToShareableHandle, shareable, handle, type, flags);
    Block block;
    pthread_mutex_lock(&lock);
    const CUresult result = REAL(cuMemExportToShareableHandle)(shareable, handle, type, flags);
    if (result == CUDA_SUCCESS && nbgpu_map_get(handle, BLOCK_HANDLE, &block) && !memory_of(&block)->opened &&
        !memory_of(&block)->multicast) {
        const Memory *memory = memory_of(&block);
        if (type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
            shareable = (void *)(intptr_t)*(int *)shareable; /* as it is given when it is opened */
        nbgpu_cover((uintptr_t)memory, memory->device, 0, key_of(shareable, type), memory->bytes);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

/* With the lock held. */
static CUresult opened(CUmemGenericAllocationHandle handle, uint64_t key) {
    Block block;
    CUmemAllocationProp properties;
    if (nbgpu_map_get(handle, BLOCK_HANDLE, &block)) {
        memory_of(&block)->handles++;
        return CUDA_SUCCESS;
    }
    if (!HAVE(cuMemGetAllocationPropertiesFromHandle))
        return CUDA_ERROR_NOT_SUPPORTED;
    if (REAL(cuMemGetAllocationPropertiesFromHandle)(&properties, handle) != CUDA_SUCCESS) {
        nbgpu_memory_of_nothing(handle); /* a multicast object of another process */
        return CUDA_SUCCESS;
    }
    if (properties.location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return CUDA_SUCCESS;
    MARK("opened");
    const int device = nbgpu_device_of(properties.location.id);
    Memory *memory = device >= 0 ? new_memory() : NULL;
    if (!memory)
        return device < 0 ? CUDA_ERROR_INVALID_DEVICE : CUDA_ERROR_OUT_OF_MEMORY;
    *memory = (Memory){.bytes = nbgpu_covered_bytes(key, device), .handles = 1, .device = device, .opened = true};
    const enum hold hold = nbgpu_hold((uintptr_t)memory, device, 0, key, memory->bytes);
    memory->shared = hold == HOLD_COUNTED;
    if (hold != HOLD_REFUSED) {
        remember(handle, BLOCK_HANDLE, memory, 0);
        return CUDA_SUCCESS;
    }
    memory->next_free = free_list, free_list = memory;
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable, int type) {
    ENTER_CUDA(cuMemImportFromShareableHandle, handle, shareable, type);
    pthread_mutex_lock(&lock);
    CUresult result = REAL(cuMemImportFromShareableHandle)(handle, shareable, type);
    if (result == CUDA_SUCCESS && (result = opened(*handle, key_of(shareable, type))) != CUDA_SUCCESS)
        REAL(cuMemRelease)(*handle);
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    ENTER_CUDA(cuMemMap, pointer, size, offset, handle, flags);
    Block block;
    pthread_mutex_lock(&lock);
    const bool known = nbgpu_map_get(handle, BLOCK_HANDLE, &block);
    if (known && !grown(memory_of(&block), offset + size)) {
        pthread_mutex_unlock(&lock);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    const CUresult result = REAL(cuMemMap)(pointer, size, offset, handle, flags);
    if (result == CUDA_SUCCESS && known) {
        memory_of(&block)->mappings++;
        remember(pointer, BLOCK_MAPPING, memory_of(&block), size);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    ENTER_CUDA(cuMemUnmap, pointer, size);
    Block block;
    pthread_mutex_lock(&lock);
    const CUresult result = REAL(cuMemUnmap)(pointer, size);
    for (CUdeviceptr at = pointer; result == CUDA_SUCCESS && at < pointer + size;) { /* one call may take several mappings */
        if (!nbgpu_map_take(at, BLOCK_MAPPING, &block)) {
            at += 2 * MIB;
            continue;
        }
        memory_of(&block)->mappings--;
        let_go(memory_of(&block));
        at += nbgpu_map_take(at, BLOCK_MAPPING_SIZE, &block) && block.bytes ? block.bytes : 2 * MIB;
    }
    pthread_mutex_unlock(&lock);
    return result;
}
