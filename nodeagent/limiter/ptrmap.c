/* What this process allocated: a hash table by address or handle, in 64 parts with a lock each.
 *
 * The locks are of this process only and held for a few instructions: one exchange to take, one plain store to give back.
 *
 * Open addressing with linear probing; taking an entry out moves the following ones back, so there are no tombstones and a
 * look-up costs the same after any history. The tables come from mmap: a hook never calls the program's malloc.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/mman.h>

#include "limiter.h"

#define PARTS 64
#define FIRST_SIZE 64 /* entries of a part */

typedef struct {
    _Alignas(64) _Atomic uint32_t locked;
    Block *table;
    uint32_t size, count; /* size is a power of two */
} Part;

static Part parts[PARTS];

static inline void part_lock(Part *part) {
    for (int spins = 0; unlikely(atomic_exchange_explicit(&part->locked, 1, memory_order_acquire)); spins++) {
        if (spins < 100)
            atomic_signal_fence(memory_order_seq_cst);
        else
            sched_yield();
    }
}

static inline void part_unlock(Part *part) { atomic_store_explicit(&part->locked, 0, memory_order_release); }

static uint64_t hash(uint64_t key, uint8_t kind) {
    uint64_t h = (key ^ (uint64_t)kind << 60) * 0x9e3779b97f4a7c15ull;
    return h ^ h >> 29;
}

static Part *part_of(uint64_t h) { return &parts[h >> 58]; }

static bool grow(Part *part) {
    const uint32_t size = part->size ? part->size * 2 : FIRST_SIZE;
    Block *table = mmap(NULL, size * sizeof *table, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table == MAP_FAILED)
        return false;
    for (uint32_t i = 0; i < part->size; i++) {
        if (!part->table[i].key)
            continue;
        uint64_t at = hash(part->table[i].key, part->table[i].kind) & (size - 1);
        while (table[at].key)
            at = (at + 1) & (size - 1);
        table[at] = part->table[i];
    }
    if (part->table)
        munmap(part->table, part->size * sizeof *table);
    part->table = table;
    part->size = size;
    return true;
}

/* Index of the entry, or of the empty place where it would be. */
static uint32_t find(const Part *part, uint64_t h, uint64_t key, uint8_t kind) {
    uint32_t at = (uint32_t)h & (part->size - 1);
    while (part->table[at].key && (part->table[at].key != key || part->table[at].kind != kind))
        at = (at + 1) & (part->size - 1);
    return at;
}

static void take_out(Part *part, uint32_t at) {
    const uint32_t mask = part->size - 1;
    for (uint32_t next = (at + 1) & mask; part->table[next].key; next = (next + 1) & mask) {
        const uint32_t home = (uint32_t)hash(part->table[next].key, part->table[next].kind) & mask;
        if (((next - home) & mask) < ((next - at) & mask))
            continue; /* it may not move before its home */
        part->table[at] = part->table[next];
        at = next;
    }
    part->table[at].key = 0;
    part->count--;
}

bool nbgpu_map_put(const Block *block) {
    const uint64_t h = hash(block->key, block->kind);
    Part *part = part_of(h);
    if (!block->key)
        return false;
    part_lock(part);
    bool room = part->count * 4 < part->size * 3 || grow(part);
    if (room) {
        const uint32_t at = find(part, h, block->key, block->kind);
        if (!part->table[at].key)
            part->count++;
        part->table[at] = *block;
    }
    part_unlock(part);
    return room;
}

static bool look(uint64_t key, enum block_kind kind, Block *block, bool take) {
    const uint64_t h = hash(key, (uint8_t)kind);
    Part *part = part_of(h);
    bool found = false;
    if (!key)
        return false;
    part_lock(part);
    if (part->size) {
        const uint32_t at = find(part, h, key, (uint8_t)kind);
        found = part->table[at].key != 0;
        if (found) {
            *block = part->table[at];
            if (take)
                take_out(part, at);
        }
    }
    part_unlock(part);
    return found;
}

bool nbgpu_map_take(uint64_t key, enum block_kind kind, Block *block) { return look(key, kind, block, true); }

bool nbgpu_map_get(uint64_t key, enum block_kind kind, Block *block) { return look(key, kind, block, false); }

void nbgpu_map_drop_context(uint32_t context, void (*dropped)(const Block *)) {
    for (int p = 0; p < PARTS && context; p++) {
        part_lock(&parts[p]);
        for (uint32_t i = 0; i < parts[p].size;) {
            const Block block = parts[p].table[i];
            if (!block.key || block.context != context) {
                i++;
                continue;
            }
            take_out(&parts[p], i); /* another entry may have moved to i: look at it again */
            dropped(&block);
        }
        part_unlock(&parts[p]);
    }
}

void nbgpu_map_forget(void) {
    for (int p = 0; p < PARTS; p++) {
        part_unlock(&parts[p]);
        if (parts[p].table)
            munmap(parts[p].table, parts[p].size * sizeof(Block));
        parts[p].table = NULL;
        parts[p].size = parts[p].count = 0;
    }
}
