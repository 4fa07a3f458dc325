/* Memory that several processes hold: it counts once in a slice, as long as one process of the slice keeps it alive.
 *
 * Who handed memory out says so beside its slot (`covered`: its `used` pays), who opened it says so beside its own (`held`).
 * What is held counts unless somebody in this slice covers it, or an earlier slot holds it too. Another slice's cover is not seen
 * here: memory of a neighbour counts in full for who opened it, and so stays counted when the neighbour frees it or dies.
 * More than NBGPU_SHARES of them: the opener pays like for memory of its own, whoever else pays too.
 */
#include <string.h>

#include "limiter.h"

_Atomic int nbgpu_shares;

typedef struct {
    uint64_t local; /* pointer or object of this process; 0: free */
    uint32_t context, opened;
} Local;
static Local locals[NBGPU_DEVICES][NBGPU_SHARES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of this process only */

static NbgpuUseShare *share_of(const NbgpuUseSlot *slot, uint32_t r) {
    return &nbgpu_use->share[(slot - nbgpu_use->slot) * NBGPU_SHARES + r];
}

static uint32_t shares_of(const NbgpuUseSlot *slot) {
    const uint32_t count = __atomic_load_n(&slot->shares, __ATOMIC_ACQUIRE);
    return count < NBGPU_SHARES ? count : NBGPU_SHARES;
}

static bool counts_on(const NbgpuUseSlot *slot, int device) {
    const uint64_t owner = __atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST);
    return shares_of(slot) && LOAD(slot->device) == (uint32_t)device && owner != 0 &&
           !nbgpu_on_host((uint32_t)(slot - nbgpu_use->slot), owner);
}

static uint32_t high_water(void) {
    const uint32_t high = __atomic_load_n(&nbgpu_use->high_water, __ATOMIC_SEQ_CST);
    return high < NBGPU_SLOTS ? high : NBGPU_SLOTS;
}

/* Does another entry pay for what entry r of slot i holds? */
static bool paid_elsewhere(uint64_t key, uint32_t i, uint32_t r, int device) {
    const uint32_t high = key ? high_water() : 0;
    for (uint32_t j = 0; j < high; j++) {
        const NbgpuUseSlot *slot = &nbgpu_use->slot[j];
        const uint32_t count = counts_on(slot, device) ? shares_of(slot) : 0;
        for (uint32_t s = 0; s < count; s++) {
            const NbgpuUseShare *share = share_of(slot, s);
            if (LOAD(share->key) != key)
                continue;
            if (__atomic_load_n(&share->covered, __ATOMIC_SEQ_CST))
                return true;
            if ((j < i || (j == i && s < r)) && __atomic_load_n(&share->held, __ATOMIC_SEQ_CST))
                return true;
        }
    }
    return false;
}

uint64_t nbgpu_held(uint32_t i, int device) {
    const NbgpuUseSlot *slot = &nbgpu_use->slot[i];
    const uint32_t count = counts_on(slot, device) ? shares_of(slot) : 0;
    uint64_t bytes = 0;
    for (uint32_t r = 0; r < count; r++) {
        const uint64_t held = __atomic_load_n(&share_of(slot, r)->held, __ATOMIC_SEQ_CST);
        if (held && !paid_elsewhere(LOAD(share_of(slot, r)->key), i, r, device))
            bytes += held < (uint64_t)1 << 48 ? held : (uint64_t)1 << 48;
    }
    return bytes;
}

uint64_t nbgpu_share_key(const void *name, size_t size) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++)
        h = (h ^ ((const uint8_t *)name)[i]) * 0x100000001b3u;
    return (h ^ h >> 29) | 1; /* never 0 */
}

uint64_t nbgpu_covered_bytes(uint64_t key, int device) {
    const uint32_t high = key ? high_water() : 0;
    for (uint32_t j = 0; j < high; j++) {
        const NbgpuUseSlot *slot = &nbgpu_use->slot[j];
        const uint32_t count = counts_on(slot, device) ? shares_of(slot) : 0;
        for (uint32_t s = 0; s < count; s++)
            if (LOAD(share_of(slot, s)->key) == key && LOAD(share_of(slot, s)->covered))
                return LOAD(share_of(slot, s)->covered);
    }
    return 0;
}

/* ---- this process's own entries ---- */

static void forget_parent(void) {
    pthread_mutex_init(&lock, NULL);
    memset(locals, 0, sizeof locals);
    nbgpu_shares = 0;
}

/* With the lock held: an entry for `local`, named, not yet counting. -1: none is free. */
static int new_entry(NbgpuUseSlot *slot, int device, uint64_t local, uint64_t key) {
    static bool fork_hook;
    if (!fork_hook)
        nbgpu_fork_hook(forget_parent);
    fork_hook = true;
    for (uint32_t r = 0; r < NBGPU_SHARES; r++) {
        if (locals[device][r].local)
            continue;
        NbgpuUseShare *share = share_of(slot, r);
        STORE(share->held, 0);
        STORE(share->covered, 0);
        STORE(share->key, key);
        if (shares_of(slot) <= r)
            __atomic_store_n(&slot->shares, r + 1, __ATOMIC_SEQ_CST);
        MARK("share-listed");
        locals[device][r] = (Local){.local = local, .opened = 1};
        nbgpu_shares++;
        return (int)r;
    }
    return -1;
}

static int find_entry(int device, uint64_t local) {
    for (uint32_t r = 0; r < NBGPU_SHARES; r++)
        if (locals[device][r].local == local)
            return (int)r;
    return -1;
}

void nbgpu_cover(uint64_t local, int device, uint32_t context, uint64_t key, uint64_t bytes) {
    NbgpuUseSlot *slot = nbgpu_slot(device);
    if (!slot || !key || !local || !bytes)
        return;
    pthread_mutex_lock(&lock);
    bool known = false;
    for (uint32_t r = 0; r < NBGPU_SHARES; r++)
        known |= locals[device][r].local == local && LOAD(share_of(slot, r)->key) == key;
    const int r = known ? -1 : new_entry(slot, device, local, key);
    if (r >= 0) {
        locals[device][r].context = context;
        __atomic_store_n(&share_of(slot, (uint32_t)r)->covered, bytes, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&lock);
}

/* With the lock held. */
static void end_entry(int device, uint32_t r) {
    NbgpuUseShare *share = share_of(nbgpu_device[device].slot, r);
    __atomic_store_n(&share->covered, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&share->held, 0, __ATOMIC_SEQ_CST);
    STORE(share->key, 0);
    locals[device][r].local = 0;
    nbgpu_shares--;
    MARK("share-ended");
}

enum hold nbgpu_hold(uint64_t local, int device, uint32_t context, uint64_t key, uint64_t bytes) {
    NbgpuUseSlot *slot = nbgpu_slot(device);
    if (!slot)
        return HOLD_REFUSED;
    pthread_mutex_lock(&lock);
    int r = find_entry(device, local);
    if (r >= 0) { /* the same memory opened again: the same address */
        locals[device][r].opened++;
        pthread_mutex_unlock(&lock);
        return HOLD_COUNTED;
    }
    r = new_entry(slot, device, local, key);
    if (r >= 0)
        locals[device][r].context = context;
    pthread_mutex_unlock(&lock);
    if (r < 0)
        return nbgpu_charge(device, CHARGE_USED, bytes) ? HOLD_CHARGED : HOLD_REFUSED;
    if (nbgpu_charge_word(device, &share_of(slot, (uint32_t)r)->held, bytes))
        return HOLD_COUNTED;
    nbgpu_share_end(local);
    return HOLD_REFUSED;
}

bool nbgpu_hold_more(uint64_t local, int device, uint64_t bytes) {
    pthread_mutex_lock(&lock);
    const int r = find_entry(device, local);
    pthread_mutex_unlock(&lock);
    return r >= 0 && nbgpu_charge_word(device, &share_of(nbgpu_device[device].slot, (uint32_t)r)->held, bytes);
}

bool nbgpu_hold_of(uint64_t local, int *device, uint64_t *key, uint64_t *bytes) {
    bool found = false;
    pthread_mutex_lock(&lock);
    for (int d = 0; d < nbgpu_devices && !found; d++) {
        const int r = find_entry(d, local);
        if (r < 0)
            continue;
        const NbgpuUseShare *share = share_of(nbgpu_device[d].slot, (uint32_t)r);
        *device = d, *key = LOAD(share->key), *bytes = LOAD(share->held);
        found = true;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

void nbgpu_hold_also(uint64_t local, int device, uint64_t bytes) {
    pthread_mutex_lock(&lock);
    const int r = find_entry(device, local);
    if (r >= 0)
        __atomic_store_n(&share_of(nbgpu_device[device].slot, (uint32_t)r)->held, bytes, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&lock);
}

/* `local` is freed, released or closed. True: it was an entry that counts no more. */
bool nbgpu_share_end(uint64_t local) {
    bool ended = false;
    if (likely(!nbgpu_shares))
        return false;
    pthread_mutex_lock(&lock);
    for (int d = 0; d < nbgpu_devices; d++)
        for (uint32_t r = 0; r < NBGPU_SHARES; r++)
            if (locals[d][r].local == local && --locals[d][r].opened == 0) {
                end_entry(d, r);
                ended = true;
            }
    pthread_mutex_unlock(&lock);
    return ended;
}

void nbgpu_shares_context_ended(uint32_t context) {
    if (likely(!nbgpu_shares) || !context)
        return;
    pthread_mutex_lock(&lock);
    for (int d = 0; d < nbgpu_devices; d++)
        for (uint32_t r = 0; r < NBGPU_SHARES; r++)
            if (locals[d][r].local && locals[d][r].context == context)
                end_entry(d, r);
    pthread_mutex_unlock(&lock);
}
