/* Counting bytes against the slice's limit and the kernel's.
 *
 * Add first, then look at the sum, take it back when it is too much: however many processes do so at once, and wherever one of
 * them dies, the sum of what was let through never exceeds the limit. No process ever waits for another.
 */
#include <sched.h>
#include <string.h>

#include "limiter.h"

#define NEVER_FITS ((uint64_t)1 << 48)
#define TRIES 6

static uint64_t bounded(uint64_t bytes) { return bytes < NEVER_FITS ? bytes : NEVER_FITS; }

bool nbgpu_on_host(uint32_t i, uint64_t owner) { return owner && __atomic_load_n(&nbgpu_ctl->away[i], __ATOMIC_SEQ_CST) == owner; }

static uint64_t slot_total(uint32_t i, int device) {
    const NbgpuUseSlot *slot = &nbgpu_use->slot[i];
    const uint64_t owner = __atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST);
    if (LOAD(slot->device) != (uint32_t)device || owner == 0 || nbgpu_on_host(i, owner))
        return 0;
    uint64_t overhead = LOAD(nbgpu_ctl->overhead[i]);
    if (overhead > nbgpu_ctl->device[device].overhead_cap)
        overhead = nbgpu_ctl->device[device].overhead_cap;
    return bounded(__atomic_load_n(&slot->used, __ATOMIC_SEQ_CST)) + bounded(__atomic_load_n(&slot->context, __ATOMIC_SEQ_CST)) + overhead;
}

bool nbgpu_alone(void) {
    const uint32_t high = __atomic_load_n(&nbgpu_use->high_water, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < high && i < NBGPU_SLOTS; i++) {
        const NbgpuUseSlot *slot = &nbgpu_use->slot[i];
        const uint32_t device = LOAD(slot->device);
        if (LOAD(slot->owner) && device < NBGPU_DEVICES && slot != nbgpu_device[device].slot)
            return false;
    }
    return true;
}

uint64_t nbgpu_total(int device, const char *kernel_id) {
    uint64_t total = 0;
    bool shared = false;
    uint32_t high = __atomic_load_n(&nbgpu_use->high_water, __ATOMIC_SEQ_CST);
    if (high > NBGPU_SLOTS)
        high = NBGPU_SLOTS;
    for (uint32_t i = 0; i < high; i++)
        if (!kernel_id || strncmp(nbgpu_use->slot[i].kernel_id, kernel_id, NBGPU_KERNEL_ID_BYTES) == 0) {
            total += slot_total(i, device);
            shared |= LOAD(nbgpu_use->slot[i].shares) != 0;
        }
    /* After all that is used: who lets go of what it covers says so before its `used` sinks. */
    for (uint32_t i = 0; unlikely(shared) && i < high; i++)
        if (!kernel_id || strncmp(nbgpu_use->slot[i].kernel_id, kernel_id, NBGPU_KERNEL_ID_BYTES) == 0)
            total += nbgpu_held(i, device);
    return total;
}

static uint64_t kernel_bytes(const NbgpuCtlKernel *kernel) { return kernel && kernel->mem_limit ? kernel->mem_limit : NEVER_FITS; }

uint64_t nbgpu_limit(int device) {
    const uint64_t slice = nbgpu_ctl->device[device].mem_limit, kernel = kernel_bytes(nbgpu_kernel_limit());
    return kernel < slice ? kernel : slice;
}

static uint64_t left(uint64_t limit, uint64_t total) { return limit > total ? limit - total : 0; }

uint64_t nbgpu_room(int device) {
    const NbgpuCtlKernel *kernel = nbgpu_kernel_limit();
    const uint64_t slice = left(nbgpu_ctl->device[device].mem_limit, nbgpu_total(device, NULL));
    if (!kernel || !kernel->mem_limit)
        return slice;
    const uint64_t own = left(kernel->mem_limit, nbgpu_total(device, kernel->id));
    return own < slice ? own : slice;
}

uint64_t nbgpu_round(uint64_t bytes) {
    if (bytes >= NEVER_FITS)
        return NEVER_FITS;
    const uint64_t unit = bytes <= MIB ? 512 : 2 * MIB; /* small blocks share the driver's 2 MiB chunks */
    return (bytes + unit - 1) / unit * unit;
}

/* Whose limit the sum is over. Also where the driver holds the slice: it knows no kernels, lets managed memory pass, and holds nobody who
 * is outside the slice's cgroup. */
static uint32_t over(int device) {
    if (nbgpu_total(device, NULL) > nbgpu_ctl->device[device].mem_limit)
        return NBGPU_REFUSED_SLICE;
    const NbgpuCtlKernel *kernel = nbgpu_kernel_limit();
    if (kernel && kernel->mem_limit && nbgpu_total(device, kernel->id) > kernel->mem_limit)
        return NBGPU_REFUSED_KERNEL;
    return NBGPU_REFUSED_NONE;
}

static uint64_t *word_of(NbgpuUseSlot *slot, enum charge_kind kind) { return kind == CHARGE_USED ? &slot->used : &slot->context; }

static void note_peak(NbgpuUseSlot *slot) {
    const uint64_t now = LOAD(slot->used) + LOAD(slot->context);
    uint64_t peak = LOAD(slot->peak);
    while (unlikely(now > peak) && !__atomic_compare_exchange_n(&slot->peak, &peak, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

#ifdef NBGPU_CONTROL_LOCK
/* The control for the kill test: what every library that takes a lock across processes does. It must hang there. */
static void control_lock(void) {
    uint32_t free_word = 0;
    while (!__atomic_compare_exchange_n((uint32_t *)nbgpu_use->reserved0, &free_word, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        free_word = 0;
        sched_yield();
    }
}
static void control_unlock(void) { __atomic_store_n((uint32_t *)nbgpu_use->reserved0, 0, __ATOMIC_SEQ_CST); }
#else
#define control_lock() ((void)0)
#define control_unlock() ((void)0)
#endif

/* One add-then-check. */
static uint32_t try_add(int device, uint64_t *word, uint64_t bytes) {
    control_lock();
    __atomic_fetch_add(word, bytes, __ATOMIC_SEQ_CST);
    MARK("charge-added");
    const uint32_t by = over(device);
    if (unlikely(by != NBGPU_REFUSED_NONE)) {
        __atomic_fetch_sub(word, bytes, __ATOMIC_SEQ_CST);
        MARK("charge-taken-back");
    }
    control_unlock();
    return by;
}

/* Somebody else's reservation may be in the sum for a moment and be taken back too: try again while ours would fit without it. */
static uint32_t add_with_patience(int device, uint64_t *word, uint64_t bytes) {
    uint32_t by = NBGPU_REFUSED_NONE, seed = (uint32_t)(uintptr_t)&by ^ (uint32_t)nbgpu_now();
    for (int i = 0; i < TRIES; i++) {
        if ((by = try_add(device, word, bytes)) == NBGPU_REFUSED_NONE)
            return by;
        seed = seed * 1103515245u + 12345u;
        const struct timespec pause = {0, 1000 * (long)(1 + (seed >> 16) % (4u << i))};
        if (i)
            nanosleep(&pause, NULL);
    }
    return by;
}

static uint32_t charge_word(int device, NbgpuUseSlot *slot, uint64_t *word, uint64_t bytes) {
    uint32_t by = try_add(device, word, bytes);
    if (unlikely(by != NBGPU_REFUSED_NONE)) {
        nbgpu_wait_until_back(device);
        nbgpu_pools_refresh(device, true);
        nbgpu_reap();
        by = add_with_patience(device, word, bytes);
    }
    if (likely(by == NBGPU_REFUSED_NONE))
        note_peak(slot);
    return by;
}

static uint32_t charge(int device, enum charge_kind kind, uint64_t bytes) {
    NbgpuUseSlot *slot = nbgpu_slot(device);
    if (!slot || bytes >= NEVER_FITS)
        return NBGPU_REFUSED_SLICE;
    return charge_word(device, slot, word_of(slot, kind), bytes);
}

bool nbgpu_charge_word(int device, uint64_t *word, uint64_t bytes) {
    NbgpuUseSlot *slot = nbgpu_device[device].slot;
    const uint32_t by = !slot || bytes >= NEVER_FITS ? NBGPU_REFUSED_SLICE : charge_word(device, slot, word, bytes);
    if (by != NBGPU_REFUSED_NONE)
        nbgpu_refuse(device, bytes, by);
    return by == NBGPU_REFUSED_NONE;
}

bool nbgpu_charge_quietly(int device, enum charge_kind kind, uint64_t bytes) { return charge(device, kind, bytes) == NBGPU_REFUSED_NONE; }

bool nbgpu_charge(int device, enum charge_kind kind, uint64_t bytes) {
    const uint32_t by = charge(device, kind, bytes);
    if (likely(by == NBGPU_REFUSED_NONE))
        return true;
    nbgpu_refuse(device, bytes, by);
    return false;
}

void nbgpu_charge_forced(int device, uint64_t bytes) {
    NbgpuUseSlot *slot = nbgpu_slot(device);
    if (!slot)
        return;
    __atomic_fetch_add(&slot->used, bytes, __ATOMIC_SEQ_CST);
    note_peak(slot);
}

void nbgpu_uncharge(int device, enum charge_kind kind, uint64_t bytes) {
    NbgpuUseSlot *slot = nbgpu_device[device].slot;
    if (!slot)
        return;
    uint64_t *word = word_of(slot, kind);
    const uint64_t before = __atomic_fetch_sub(word, bytes, __ATOMIC_SEQ_CST);
    if (unlikely(before < bytes))
        __atomic_fetch_add(word, bytes - before, __ATOMIC_SEQ_CST); /* never below zero */
    MARK("uncharged");
}

void nbgpu_refuse(int device, uint64_t bytes, uint32_t by) {
    NbgpuUseSlot *slot = nbgpu_device[device].slot;
    if (slot) {
        STORE(slot->refused_bytes, bytes);
        STORE(slot->refused_by, by);
        __atomic_fetch_add(&slot->refusals, 1, __ATOMIC_SEQ_CST);
    }
    __atomic_fetch_add(&nbgpu_use->events, 1, __ATOMIC_SEQ_CST);
}

/* The slice has room and the driver has not: what a process that died held is given back by the driver only after a while. */
bool nbgpu_driver_refused(int device, uint64_t bytes, int attempt) {
    static _Atomic uint64_t last_death;
    if (nbgpu_reap() > 0)
        last_death = nbgpu_now();
    const bool lag = last_death && nbgpu_now() - last_death < 1000 * MS;
    if (attempt < (lag ? 50 : 5)) {
        if (attempt == 0)
            nbgpu_pools_refresh(device, true);
        const struct timespec pause = {0, 10 * (long)MS};
        nanosleep(&pause, NULL);
        return true;
    }
    nbgpu_refuse(device, bytes, NBGPU_REFUSED_DRIVER);
    return false;
}
