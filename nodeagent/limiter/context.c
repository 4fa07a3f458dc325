/* Devices and contexts: which of the slice's devices a call is about, what contexts cost, and that only the slice's devices exist. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "limiter.h"

#define CUDA_DEVICES 64
#define LIMIT_PRINTF_FIFO_SIZE 1
#define LIMIT_MALLOC_HEAP_SIZE 2
#define HEAP_KEY ((uint64_t)0xffff << 48) /* no address of memory */
static int device_of[CUDA_DEVICES];       /* driver's number -> the slice's, -1: not in the slice */
static _Atomic int learned;
static pthread_mutex_t context_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    CUcontext context; /* NULL: free */
    int device;
    bool counted;
} contexts[CONTEXTS + 1];          /* by number, from 1 */
static uint32_t context_count;     /* numbers ever used */
static _Atomic uint32_t epoch = 1; /* rises when a context ends: an address may come again */
PER_THREAD struct {
    CUcontext context;
    uint32_t id, epoch;
    int device;
} last;

static void forget_parent(void) {
    pthread_mutex_init(&context_lock, NULL);
    context_count = 0;
    learned = 0;
    epoch++;
    nbgpu_map_forget();
}

/* ---- only the slice's devices ---- */

/* The driver itself hides what CUDA_VISIBLE_DEVICES does not name; it reads it once, in cuInit. The program's own value, if
 * any, picks among the slice's devices. */
static void visible_devices(const char *own, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "CUDA_VISIBLE_DEVICES=");
    uint32_t taken = 0;
    for (int n = 0; n < nbgpu_devices; n++) {
        int pick = own ? -1 : n;
        if (own) {
            while (*own == ' ')
                own++;
            const size_t length = strcspn(own, ", ");
            char *end = NULL;
            const long number = strtol(own, &end, 10);
            if (length && end == own + length && number >= 0 && number < nbgpu_devices)
                pick = (int)number;
            for (int d = 0; pick < 0 && length > 4 && d < nbgpu_devices; d++)
                if (strncmp(nbgpu_ctl->device[d].uuid, own, length) == 0)
                    pick = d;
            own += length;
            while (*own == ' ')
                own++;
            if (*own == ',')
                own++;
        }
        if (pick < 0 || taken & 1u << pick)
            break; /* as the driver does: what follows a wrong entry is not visible either */
        taken |= 1u << pick;
        used += (size_t)snprintf(text + used, size - used, "%s%s", taken & (taken - 1) ? "," : "", nbgpu_ctl->device[pick].uuid);
    }
    if (!taken)
        snprintf(text + used, size - used, "-1");
}

/* The environment is exchanged as a whole for the time of cuInit: setenv could free what another thread is reading. */
CUresult nbgpu_init_visible(unsigned flags) {
    static char entry[32 + NBGPU_DEVICES * (NBGPU_UUID_BYTES + 1)];
    static const char name[] = "CUDA_VISIBLE_DEVICES=";
    char **before = environ, *old = NULL;
    size_t count = 0, kept = 0;
    while (before && before[count])
        count++;
    char **with = malloc((count + 2) * sizeof *with); /* never freed: another thread may still walk it */
    if (!with)
        return CUDA_ERROR_OUT_OF_MEMORY;
    for (size_t i = 0; i < count; i++) {
        if (strncmp(before[i], name, sizeof name - 1) == 0)
            old = before[i];
        else
            with[kept++] = before[i];
    }
    visible_devices(old ? old + sizeof name - 1 : NULL, entry, sizeof entry);
    with[kept] = entry;
    with[kept + 1] = NULL;
    environ = with;
    const CUresult result = REAL(cuInit)(flags);
    if (environ == with) {
        environ = before;
    } else { /* another thread set a variable meanwhile: put ours right in the new array */
        for (char **e = environ; e && *e; e++)
            if (*e == entry)
                *e = old ? old : (char[]){"NBGPU_INITIALISED=1"};
    }
    return result;
}

static bool uuid_matches(const char *named, const unsigned char *b) {
    char text[NBGPU_UUID_BYTES];
    const char *bare = strchr(named, '-');
    snprintf(text, sizeof text, "-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2], b[3], b[4], b[5],
             b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
    return bare && strcasecmp(bare, text) == 0;
}

CUresult nbgpu_learn_devices(void) {
    pthread_mutex_lock(&context_lock);
    if (!learned) {
        int count = 0;
        CUresult result = HAVE(cuDeviceGetCount) ? REAL(cuDeviceGetCount)(&count) : CUDA_ERROR_NOT_FOUND;
        if (result != CUDA_SUCCESS) {
            pthread_mutex_unlock(&context_lock);
            return result;
        }
        for (int i = 0; i < CUDA_DEVICES; i++)
            device_of[i] = -1;
        for (int i = 0; i < count; i++) {
            CUdevice device;
            CUuuid uuid;
            if (REAL(cuDeviceGet)(&device, i) != CUDA_SUCCESS || device < 0 || device >= CUDA_DEVICES)
                continue;
            bool known = HAVE(cuDeviceGetUuid_v2) && REAL(cuDeviceGetUuid_v2)(&uuid, device) == CUDA_SUCCESS;
            if (!known)
                known = HAVE(cuDeviceGetUuid) && REAL(cuDeviceGetUuid)(&uuid, device) == CUDA_SUCCESS;
            for (int d = 0; known && d < nbgpu_devices; d++) {
                if (!uuid_matches(nbgpu_ctl->device[d].uuid, (const unsigned char *)uuid.bytes))
                    continue;
                device_of[device] = d;
                nbgpu_device[d].cuda = device;
            }
        }
        static bool fork_hook;
        if (!fork_hook)
            nbgpu_fork_hook(forget_parent);
        fork_hook = true;
        learned = 1;
    }
    pthread_mutex_unlock(&context_lock);
    return CUDA_SUCCESS;
}

int nbgpu_device_of(CUdevice device) {
    if (unlikely(!learned) && nbgpu_learn_devices() != CUDA_SUCCESS)
        return -1;
    return device >= 0 && device < CUDA_DEVICES ? device_of[device] : -1;
}

CUresult cuInit(unsigned flags) {
    if (!nbgpu_prepare(F_cuInit))
        return CUDA_ERROR_NOT_FOUND;
    const int state = nbgpu_attach();
    if (state == SLICE_NONE)
        return REAL(cuInit)(flags);
    if (state == SLICE_BROKEN)
        return CUDA_ERROR_SYSTEM_DRIVER_MISMATCH; /* limits we cannot read are no licence */
    const CUresult result = learned ? REAL(cuInit)(flags) : nbgpu_init_visible(flags);
    return result == CUDA_SUCCESS ? nbgpu_learn_devices() : result;
}

/* ---- contexts ---- */

/* With the lock held: the number of a context, 0: none. */
static uint32_t find_context(CUcontext context) {
    for (uint32_t i = 1; i <= context_count; i++)
        if (contexts[i].context == context)
            return i;
    return 0;
}

static uint32_t context_id(CUcontext context, int device) {
    pthread_mutex_lock(&context_lock);
    uint32_t id = find_context(context);
    if (!id) {
        id = find_context(NULL);
        if (!id && context_count < CONTEXTS)
            id = ++context_count;
        contexts[id].context = id ? context : NULL;
        contexts[id].device = device;
        contexts[id].counted = false;
    }
    pthread_mutex_unlock(&context_lock);
    return id;
}

static int device_of_context(CUcontext context) {
    pthread_mutex_lock(&context_lock);
    const uint32_t id = find_context(context);
    const int device = id ? contexts[id].device : -1;
    pthread_mutex_unlock(&context_lock);
    return device;
}

/* Before the driver is asked anything: it would not answer while the memory is away. A slice is parked on all its devices. */
static void be_here(void) {
    if (unlikely(LOAD(nbgpu_ctl->device[0].mem_limit) == 0) || unlikely(LOAD(nbgpu_ctl->kernels_away) != 0))
        nbgpu_wait_in_parked();
}

int nbgpu_current(uint32_t *id) {
    CUcontext context = NULL;
    CUdevice device;
    be_here();
    if (unlikely(!HAVE(cuCtxGetCurrent)) || REAL(cuCtxGetCurrent)(&context) != CUDA_SUCCESS || !context)
        return -1;
    if (unlikely(context != last.context || last.epoch != epoch)) {
        const uint32_t now = epoch;
        if (REAL(cuCtxGetDevice)(&device) != CUDA_SUCCESS)
            return -1;
        last.device = nbgpu_device_of(device);
        last.id = context_id(context, last.device);
        last.context = context;
        last.epoch = now;
    }
    if (id)
        *id = last.id;
    return last.device;
}

int nbgpu_stream_device(CUstream stream) {
    CUcontext context = NULL;
    be_here();
    if ((uintptr_t)stream > 2 && HAVE(cuStreamGetCtx) && nbgpu_devices > 1 && REAL(cuStreamGetCtx)(stream, &context) == CUDA_SUCCESS) {
        const int device = device_of_context(context);
        if (device >= 0)
            return device;
    }
    return nbgpu_current(NULL);
}

static void dropped(const Block *block) {
    nbgpu_share_end(block->key);
    if (block->kind == BLOCK_MEMORY || block->kind == BLOCK_ARRAY)
        nbgpu_uncharge(block->device, CHARGE_USED, block->bytes);
}

/* The driver frees what was allocated in a context that ends. */
static void context_ended(CUcontext context, int device, bool give_back) {
    pthread_mutex_lock(&context_lock);
    uint32_t id = context ? find_context(context) : 0;
    for (uint32_t i = 1; !context && !id && i <= context_count; i++) /* the primary one: not made by cuCtxCreate */
        if (contexts[i].context && contexts[i].device == device && !contexts[i].counted)
            id = i;
    const bool counted = id && contexts[id].counted;
    epoch++;
    pthread_mutex_unlock(&context_lock);
    if (!id)
        return;
    nbgpu_map_drop_context(id, dropped);
    nbgpu_shares_context_ended(id);
    pthread_mutex_lock(&context_lock);
    contexts[id].context = NULL; /* its number is used again only now that no block carries it */
    pthread_mutex_unlock(&context_lock);
    if (device >= 0 && give_back && counted)
        nbgpu_uncharge(device, CHARGE_CONTEXT, nbgpu_device[device].contexts);
}

/* Everything that makes a context: reserve what one costs on this node, make it, give back on failure. */
static bool context_reserve(int device) {
    nbgpu_device[device].contexts = nbgpu_ctl->device[device].context_bytes;
    return nbgpu_charge(device, CHARGE_CONTEXT, nbgpu_device[device].contexts);
}

static CUresult context_made(CUresult result, CUcontext *context, int device) {
    if (result != CUDA_SUCCESS) {
        nbgpu_uncharge(device, CHARGE_CONTEXT, nbgpu_device[device].contexts);
        return result;
    }
    const uint32_t id = context_id(*context, device);
    pthread_mutex_lock(&context_lock);
    contexts[id].counted = true;
    pthread_mutex_unlock(&context_lock);
    return result;
}

#define CREATE(name, ...)                                                                                                                  \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    const int d = nbgpu_device_of(device);                                                                                                 \
    if (d < 0)                                                                                                                             \
        return CUDA_ERROR_INVALID_DEVICE;                                                                                                  \
    if (!context_reserve(d))                                                                                                               \
        return CUDA_ERROR_OUT_OF_MEMORY;                                                                                                   \
    return context_made(REAL(name)(__VA_ARGS__), context, d)

CUresult cuCtxCreate(CUcontext *context, unsigned flags, CUdevice device) { CREATE(cuCtxCreate, context, flags, device); }
CUresult cuCtxCreate_v2(CUcontext *context, unsigned flags, CUdevice device) { CREATE(cuCtxCreate_v2, context, flags, device); }
CUresult cuCtxCreate_v3(CUcontext *context, void *affinity, int count, unsigned flags, CUdevice device) {
    CREATE(cuCtxCreate_v3, context, affinity, count, flags, device);
}
CUresult cuCtxCreate_v4(CUcontext *context, void *parameters, unsigned flags, CUdevice device) {
    CREATE(cuCtxCreate_v4, context, parameters, flags, device);
}

#define DESTROY(name)                                                                                                                      \
    ENTER_CUDA(name, context);                                                                                                             \
    const int d = device_of_context(context);                                                                                              \
    if (d >= 0)                                                                                                                            \
        nbgpu_busy_context_ends(d, context);                                                                                               \
    const CUresult result = REAL(name)(context);                                                                                           \
    if (result == CUDA_SUCCESS)                                                                                                            \
        context_ended(context, d, true);                                                                                                   \
    return result

CUresult cuCtxDestroy(CUcontext context) { DESTROY(cuCtxDestroy); }
CUresult cuCtxDestroy_v2(CUcontext context) { DESTROY(cuCtxDestroy_v2); }

/* Whatever makes or keeps the primary context: the first of them pays for it. `call` is evaluated once. */
#define RETAIN(name, ...)                                                                                                                  \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    const int d = nbgpu_device_of(device);                                                                                                 \
    if (d < 0)                                                                                                                             \
        return CUDA_ERROR_INVALID_DEVICE;                                                                                                  \
    pthread_mutex_lock(&primary_lock);                                                                                                     \
    const bool first = !nbgpu_device[d].primary_counted;                                                                                   \
    if (first && !context_reserve(d)) {                                                                                                    \
        pthread_mutex_unlock(&primary_lock);                                                                                               \
        return CUDA_ERROR_OUT_OF_MEMORY;                                                                                                   \
    }                                                                                                                                      \
    MARK("context-reserved");                                                                                                              \
    const CUresult result = REAL(name)(__VA_ARGS__);                                                                                       \
    MARK("context-made");                                                                                                                  \
    if (result != CUDA_SUCCESS && first)                                                                                                   \
        nbgpu_uncharge(d, CHARGE_CONTEXT, nbgpu_device[d].contexts);                                                                       \
    if (result == CUDA_SUCCESS)                                                                                                            \
        nbgpu_device[d].primary_counted = true;                                                                                            \
    pthread_mutex_unlock(&primary_lock);                                                                                                   \
    return result

static pthread_mutex_t primary_lock = PTHREAD_MUTEX_INITIALIZER;

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { RETAIN(cuDevicePrimaryCtxRetain, context, device); }

/* A green context is a part of the primary one, which it keeps; what it takes beyond that the agent measures. */
CUresult cuGreenCtxCreate(CUgreenCtx *context, void *description, CUdevice device, unsigned flags) {
    RETAIN(cuGreenCtxCreate, context, description, device, flags);
}

/* After a release or a reset: is the primary context gone? */
static CUresult primary_left(CUresult result, CUdevice device) {
    const int d = nbgpu_device_of(device);
    unsigned flags;
    int active = 0;
    if (result != CUDA_SUCCESS || d < 0 || !nbgpu_device[d].primary_counted)
        return result;
    if (REAL(cuDevicePrimaryCtxGetState)(device, &flags, &active) != CUDA_SUCCESS || active)
        return result;
    nbgpu_device[d].primary_counted = false;
    nbgpu_uncharge(d, CHARGE_CONTEXT, nbgpu_device[d].contexts);
    context_ended(NULL, d, false);
    nbgpu_pools_forget(d);
    return result;
}

#define PRIMARY_LEFT(name)                                                                                                                 \
    ENTER_CUDA(name, device);                                                                                                              \
    if (nbgpu_device_of(device) >= 0)                                                                                                      \
        nbgpu_busy_context_ends(nbgpu_device_of(device), NULL);                                                                            \
    return primary_left(REAL(name)(device), device)

CUresult cuDevicePrimaryCtxRelease(CUdevice device) { PRIMARY_LEFT(cuDevicePrimaryCtxRelease); }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { PRIMARY_LEFT(cuDevicePrimaryCtxRelease_v2); }
CUresult cuDevicePrimaryCtxReset(CUdevice device) { PRIMARY_LEFT(cuDevicePrimaryCtxReset); }
CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) { PRIMARY_LEFT(cuDevicePrimaryCtxReset_v2); }

CUresult cuGreenCtxDestroy(CUgreenCtx context) {
    ENTER_CUDA(cuGreenCtxDestroy, context);
    CUresult result = REAL(cuGreenCtxDestroy)(context);
    MARK("green-ended");
    for (int d = 0; d < nbgpu_devices && result == CUDA_SUCCESS; d++)
        result = primary_left(result, nbgpu_device[d].cuda);
    return result;
}

/* ---- heaps ---- */

/* A heap of the device grows at once and does not shrink: what it has beyond a new context's is memory like any other. Stacks are the
 * driver's secret; the agent measures them. */
CUresult cuCtxSetLimit(int limit, size_t value) {
    ENTER_CUDA(cuCtxSetLimit, limit, value);
    uint32_t context = 0;
    size_t before = 0;
    const int d = nbgpu_current(&context);
    const bool heap = limit == LIMIT_PRINTF_FIFO_SIZE || limit == LIMIT_MALLOC_HEAP_SIZE;
    if (!heap || d < 0 || !HAVE(cuCtxGetLimit) || REAL(cuCtxGetLimit)(&before, limit) != CUDA_SUCCESS)
        return REAL(cuCtxSetLimit)(limit, value);
    Block block = {.key = HEAP_KEY | (uint64_t)context << 8 | (uint64_t)limit,
                   .kind = BLOCK_MEMORY,
                   .context = context & 511,
                   .device = (unsigned)d & 15};
    nbgpu_map_get(block.key, BLOCK_MEMORY, &block);
    const uint64_t more = value > before ? value - before : 0;
    if (more && !nbgpu_charge(d, CHARGE_USED, more))
        return CUDA_ERROR_OUT_OF_MEMORY;
    const CUresult result = REAL(cuCtxSetLimit)(limit, value);
    if (result != CUDA_SUCCESS) {
        nbgpu_uncharge(d, CHARGE_USED, more);
        return result;
    }
    block.bytes += more;
    if (more)
        nbgpu_map_put(&block); /* goes with its context */
    return result;
}
