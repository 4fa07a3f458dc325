/* Memory of other processes: IPC handles, shareable handles of cuMemCreate, pointers of shared pools.
 *
 * The contents are a file without a name, mapped by everybody who holds the memory; one page behind them says what it is. An IPC
 * handle names it by the maker's process and descriptor, so it can be opened while that lives, and stays open after it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "drv.h"

enum { LABEL_BYTES = 4096, DESCRIPTOR_FROM = 600 };
#define LABEL_MAGIC 0x31524853474e5347ull

struct label {
    uint64_t magic, id;
    int32_t object, device; /* object -1: a pool, which holds nothing by itself */
    uint64_t span;
};

struct ipc_handle {
    struct label label;
    uint64_t offset;
    int32_t pid, fd;
};
_Static_assert(sizeof(struct ipc_handle) <= sizeof(CUipcHandle), "size of an IPC handle");

static int file_make(const struct label *label) {
    int low = (int)syscall(SYS_memfd_create, "nbgpu-simulated-memory", 1u /* closed at exec */);
    if (low < 0)
        return -1;
    int fd = fcntl(low, F_DUPFD_CLOEXEC, DESCRIPTOR_FROM);
    close(low);
    if (fd >= 0 && (ftruncate(fd, (off_t)(label->span + LABEL_BYTES)) ||
                    pwrite(fd, label, sizeof *label, (off_t)label->span) != (ssize_t)sizeof *label)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static bool file_read(int fd, struct label *label) {
    struct stat status;
    return !fstat(fd, &status) && S_ISREG(status.st_mode) && status.st_size >= LABEL_BYTES &&
           pread(fd, label, sizeof *label, status.st_size - LABEL_BYTES) == (ssize_t)sizeof *label && label->magic == LABEL_MAGIC &&
           label->span == (uint64_t)status.st_size - LABEL_BYTES && label->device >= 0 && label->device < (int)drv.sim.m->devices;
}

static uint8_t *file_map(int fd, size_t span) {
    void *host = mmap(NULL, span, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return host == MAP_FAILED ? NULL : host;
}

/* This process is one holder, however many times it holds a piece. */
static int held[SIM_SHARED];

static void let_go(int object) {
    if (--held[object] == 0)
        sim_shared_leave(&drv.sim, object);
}

struct shared_memory *shared_make(int device, size_t span, bool fresh) {
    struct shared_memory *shared = calloc(1, sizeof *shared);
    int object = shared ? sim_shared_make(&drv.sim, (unsigned)device, span, fresh) : -1;
    if (object < 0) {
        free(shared);
        return NULL;
    }
    held[object] = 1;
    uint64_t id = drv.sim.m->shared[object].id;
    *shared = (struct shared_memory){.object = object, .id = id, .span = span};
    shared->fd = file_make(&(struct label){LABEL_MAGIC, id, object, device, span});
    shared->host = shared->fd < 0 ? NULL : file_map(shared->fd, span);
    if (shared->host)
        return shared;
    if (!fresh)
        sim_mem_keep(&drv.sim, (unsigned)device, span);
    shared_end(shared);
    return NULL;
}

struct shared_memory *shared_open(int fd, int *device) {
    struct label label;
    struct shared_memory *shared = calloc(1, sizeof *shared);
    bool joined = shared && file_read(fd, &label) && label.object >= 0 && sim_shared_join(&drv.sim, label.object, label.id);
    if (!joined) {
        free(shared);
        close(fd);
        return NULL;
    }
    held[label.object]++;
    *shared = (struct shared_memory){.object = label.object, .id = label.id, .span = label.span, .fd = fd, .opened = 1};
    *device = label.device;
    shared->host = file_map(fd, label.span);
    if (shared->host)
        return shared;
    shared_end(shared);
    return NULL;
}

void shared_end(struct shared_memory *shared) {
    if (shared->host)
        munmap(shared->host, shared->span);
    if (shared->fd >= 0)
        close(shared->fd);
    let_go(shared->object);
    free(shared);
}

static CUresult attached(void) {
    TRY(drv_ready());
    pthread_mutex_lock(&drv.lock);
    CUresult result = drv_attach();
    pthread_mutex_unlock(&drv.lock);
    return result;
}

static bool visible(int device) {
    for (int i = 0; i < drv.count; i++)
        if (drv.visible[i] == device)
            return true;
    return false;
}

/* ---- by address ---- */

static CUresult name_memory(CUipcHandle *out, CUdeviceptr p, bool of_pool) {
    struct block block, inner;
    struct shared_memory *shared;
    TRY(drv_ready());
    NEED(out && heap_find(p, &inner) && (inner.pool != NULL) == of_pool, CUDA_ERROR_INVALID_VALUE);
    NEED(!of_pool || (inner.pool->handle_types && inner.span >= SIM_PAGE), CUDA_ERROR_NOT_SUPPORTED);
    TRY(heap_share(p, &block, &shared));
    struct ipc_handle handle = {.label = {LABEL_MAGIC, shared->id, shared->object, block.device, shared->span},
                                .offset = (of_pool ? p : inner.base) - block.base,
                                .pid = (int32_t)getpid(),
                                .fd = shared->fd};
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    return CUDA_SUCCESS;
}

static struct block *openings; /* chained by `reserved`; under heap_lock */

static struct block *opened_already(uint64_t id, CUcontext ctx) {
    for (struct block *block = openings; block; block = block->reserved)
        if (block->shared->id == id && block->ctx == ctx)
            return block;
    return NULL;
}

static void unlist(struct block *block) {
    for (struct block **at = &openings; *at; at = &(*at)->reserved)
        if (*at == block) {
            *at = block->reserved;
            break;
        }
}

void share_context_ends(CUcontext ctx) { /* heap_drop_ctx releases the blocks themselves */
    for (struct block *block = openings, *next; block; block = next) {
        next = block->reserved;
        if (block->ctx == ctx)
            unlist(block);
    }
}

static CUresult open_named(CUdeviceptr *out, const CUipcHandle *in) {
    struct ipc_handle handle;
    struct label label;
    CUcontext ctx;
    char path[64];
    int device = 0;
    memcpy(&handle, in, sizeof handle);
    TRY(drv_current(&ctx));
    NEED(out && handle.label.magic == LABEL_MAGIC, CUDA_ERROR_INVALID_VALUE);
    NEED(handle.pid != (int32_t)getpid(), CUDA_ERROR_INVALID_CONTEXT); /* its maker has it already */
    pthread_mutex_lock(&heap_lock);
    struct block *block = opened_already(handle.label.id, ctx);
    if (block)
        block->shared->opened++;
    pthread_mutex_unlock(&heap_lock);
    if (block) {
        *out = block->base + handle.offset;
        return CUDA_SUCCESS;
    }
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    NEED(fd >= 0, CUDA_ERROR_INVALID_VALUE); /* its maker is gone */
    if (!file_read(fd, &label) || label.id != handle.label.id || !visible(label.device) || handle.offset >= label.span) {
        close(fd);
        return CUDA_ERROR_INVALID_VALUE;
    }
    pthread_mutex_lock(&heap_lock);
    struct shared_memory *shared = shared_open(fd, &device);
    block = shared ? block_take_locked(shared->span, BLOCK_OPENED, false, device) : NULL;
    if (block) {
        block->shared = shared;
        block->host = shared->host;
        block->ctx = ctx;
        block->reserved = openings;
        openings = block;
        *out = block->base + handle.offset;
    } else if (shared) {
        shared_end(shared);
    }
    pthread_mutex_unlock(&heap_lock);
    return block ? CUDA_SUCCESS : shared ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
}

CUresult share_close(CUdeviceptr p) {
    struct block found;
    TRY(drv_ready());
    NEED(heap_find(p, &found) && found.kind == BLOCK_OPENED, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_wait_all(found.ctx));
    pthread_mutex_lock(&heap_lock);
    struct block *block = block_at_locked(p);
    if (block && block->kind == BLOCK_OPENED && --block->shared->opened == 0) {
        unlist(block);
        block_release_locked(block, false);
    }
    pthread_mutex_unlock(&heap_lock);
    return CUDA_SUCCESS;
}

API(cuIpcGetMemHandle, (CUipcHandle * out, CUdeviceptr p)) { return name_memory(out, p, false); }
API(cuIpcOpenMemHandle_v2, (CUdeviceptr * out, CUipcHandle handle, unsigned flags)) {
    NEED(flags <= 1, CUDA_ERROR_INVALID_VALUE);
    return open_named(out, &handle);
}
API(cuIpcOpenMemHandle, (CUdeviceptr * out, CUipcHandle handle, unsigned flags)) { return cuIpcOpenMemHandle_v2(out, handle, flags); }
API(cuIpcCloseMemHandle, (CUdeviceptr p)) { return share_close(p); }

/* ---- cuMemCreate's handles ---- */

API(cuMemExportToShareableHandle, (void *out, CUmemGenericAllocationHandle value, int type, unsigned long long flags)) {
    struct vmm_handle *handle = (struct vmm_handle *)(uintptr_t)value;
    TRY(drv_ready());
    NEED(out && handle && !flags && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_INVALID_VALUE);
    NEED(handle->storage && handle->storage->shared, CUDA_ERROR_INVALID_VALUE); /* not asked for when it was made */
    int fd = fcntl(handle->storage->shared->fd, F_DUPFD_CLOEXEC, 3);
    NEED(fd >= 0, CUDA_ERROR_OPERATING_SYSTEM);
    memcpy(out, &fd, sizeof fd);
    return CUDA_SUCCESS;
}

API(cuMemImportFromShareableHandle, (CUmemGenericAllocationHandle * out, void *shareable, int type)) {
    struct label label;
    int device = 0, given = (int)(intptr_t)shareable;
    TRY(attached());
    NEED(out && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_INVALID_VALUE);
    NEED(file_read(given, &label) && label.object >= 0, CUDA_ERROR_INVALID_VALUE);
    NEED(visible(label.device), CUDA_ERROR_INVALID_DEVICE);
    int fd = fcntl(given, F_DUPFD_CLOEXEC, DESCRIPTOR_FROM);
    struct vmm_handle *handle = calloc(1, sizeof *handle);
    NEED(fd >= 0 && handle, CUDA_ERROR_OPERATING_SYSTEM);
    pthread_mutex_lock(&heap_lock);
    struct shared_memory *shared = shared_open(fd, &device);
    struct block *storage = shared ? block_take_locked(shared->span, BLOCK_HIDDEN, false, device) : NULL;
    if (storage) {
        storage->shared = shared;
        storage->host = shared->host;
        storage->handle = handle;
    } else if (shared) {
        shared_end(shared);
    }
    pthread_mutex_unlock(&heap_lock);
    if (!storage) {
        free(handle);
        return CUDA_ERROR_INVALID_VALUE;
    }
    *handle = (struct vmm_handle){.size = storage->span, .device = device, .references = 1, .storage = storage};
    handle->prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    handle->prop.requestedHandleTypes = type;
    handle->prop.location = (CUmemLocation){CU_MEM_LOCATION_TYPE_DEVICE, drv_ordinal(device)};
    *out = (CUmemGenericAllocationHandle)(uintptr_t)handle;
    return CUDA_SUCCESS;
}

/* ---- pools ---- */

API(cuMemPoolExportToShareableHandle, (void *out, CUmemoryPool pool, int type, unsigned long long flags)) {
    TRY(drv_ready());
    NEED(out && pool && pool->magic == POOL_MAGIC && !flags && pool->handle_types & type, CUDA_ERROR_INVALID_VALUE);
    int fd = file_make(&(struct label){LABEL_MAGIC, 0, -1, pool->device, 0});
    NEED(fd >= 0, CUDA_ERROR_OPERATING_SYSTEM);
    memcpy(out, &fd, sizeof fd);
    return CUDA_SUCCESS;
}

API(cuMemPoolImportFromShareableHandle, (CUmemoryPool * out, void *shareable, int type, unsigned long long flags)) {
    struct label label;
    TRY(attached());
    NEED(out && !flags && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_INVALID_VALUE);
    NEED(file_read((int)(intptr_t)shareable, &label) && label.object == -1 && visible(label.device), CUDA_ERROR_INVALID_VALUE);
    return pool_of_other(label.device, out);
}

API(cuMemPoolExportPointer, (CUipcHandle * out, CUdeviceptr p)) { return name_memory(out, p, true); }

API(cuMemPoolImportPointer, (CUdeviceptr * out, CUmemoryPool pool, CUipcHandle *data)) {
    NEED(pool && pool->magic == POOL_MAGIC && pool->imported && data, CUDA_ERROR_INVALID_VALUE);
    return open_named(out, data);
}

/* ---- memory of graphics interfaces: by the descriptors of cuMemExportToShareableHandle, for want of a graphics driver here ---- */

struct CUextMemory_st {
    uint32_t magic;
    struct label label;
    int fd;
};
enum { EXTERNAL_MAGIC = 0x45585431, TYPE_OPAQUE_FD = 1 };

API(cuImportExternalMemory, (CUexternalMemory * out, const CUDA_EXTERNAL_MEMORY_HANDLE_DESC *desc)) {
    struct label label;
    TRY(attached());
    NEED(out && desc && desc->size, CUDA_ERROR_INVALID_VALUE);
    NEED(desc->type == TYPE_OPAQUE_FD, CUDA_ERROR_NOT_SUPPORTED);
    NEED(file_read(desc->handle.fd, &label) && label.object >= 0 && desc->size <= label.span, CUDA_ERROR_INVALID_VALUE);
    NEED(visible(label.device), CUDA_ERROR_INVALID_DEVICE);
    CUexternalMemory memory = calloc(1, sizeof *memory);
    NEED(memory, CUDA_ERROR_OUT_OF_MEMORY);
    pthread_mutex_lock(&heap_lock);
    bool there = sim_shared_join(&drv.sim, label.object, label.id);
    if (there)
        held[label.object]++;
    pthread_mutex_unlock(&heap_lock);
    if (!there) {
        free(memory);
        return CUDA_ERROR_INVALID_VALUE;
    }
    *memory =
        (struct CUextMemory_st){.magic = EXTERNAL_MAGIC, .label = label, .fd = fcntl(desc->handle.fd, F_DUPFD_CLOEXEC, DESCRIPTOR_FROM)};
    close(desc->handle.fd); /* it is the driver's from here on */
    *out = memory;
    return CUDA_SUCCESS;
}

API(cuExternalMemoryGetMappedBuffer, (CUdeviceptr * out, CUexternalMemory memory, const CUDA_EXTERNAL_MEMORY_BUFFER_DESC *desc)) {
    CUcontext ctx;
    int device = 0, fd;
    TRY(drv_current(&ctx));
    NEED(out && memory && memory->magic == EXTERNAL_MAGIC && desc && desc->size, CUDA_ERROR_INVALID_VALUE);
    NEED(desc->offset + desc->size <= memory->label.span && (fd = dup(memory->fd)) >= 0, CUDA_ERROR_INVALID_VALUE);
    pthread_mutex_lock(&heap_lock);
    struct shared_memory *shared = shared_open(fd, &device);
    struct block *block = shared ? block_take_locked(shared->span, BLOCK_OPENED, false, device) : NULL;
    if (block) {
        block->shared = shared;
        block->host = shared->host;
        block->ctx = ctx;
        *out = block->base + desc->offset;
    } else if (shared) {
        shared_end(shared);
    }
    pthread_mutex_unlock(&heap_lock);
    return block ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API(cuDestroyExternalMemory, (CUexternalMemory memory)) {
    TRY(drv_ready());
    NEED(memory && memory->magic == EXTERNAL_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    memory->magic = 0; /* the struct stays, so that its handle can be told */
    close(memory->fd);
    pthread_mutex_lock(&heap_lock);
    let_go(memory->label.object);
    pthread_mutex_unlock(&heap_lock);
    return CUDA_SUCCESS;
}
