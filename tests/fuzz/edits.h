/* How the fuzzer's bytes become a `use` file: a file as a tenant's limiter leaves it, in which words are written over.
 *
 * The first byte says how much of the file is there; then each six bytes are an offset, in words of four bytes, and a value. Values that are
 * one apart from a limit, or enormous, are what goes wrong: the small ones among them stand for those. */
#ifndef EDITS_H
#define EDITS_H
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nbgpu_layout.h"

#define NEED(condition)                                                                                                                    \
    do {                                                                                                                                   \
        if (!(condition))                                                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition), abort();                                               \
    } while (0)
#define SLOTS_IN_USE 12u

static void fill(NbgpuUse *use) {
    memset(use, 0, sizeof *use);
    use->magic = NBGPU_USE_MAGIC, use->version = NBGPU_VERSION, use->size = sizeof *use;
    use->high_water = SLOTS_IN_USE;
    for (uint32_t i = 0; i < SLOTS_IN_USE; i++) {
        NbgpuUseSlot *slot = &use->slot[i];
        slot->owner = (uint64_t)(1000 + i) << 32 | 1;
        slot->ready = 1;
        slot->device = i % 2;
        slot->used = (uint64_t)i << 20;
        slot->shares = i % 3;
        snprintf(slot->kernel_id, sizeof slot->kernel_id, "k%u", i % 4);
        for (uint32_t r = 0; r < slot->shares; r++)
            use->share[i * NBGPU_SHARES + r] = (NbgpuUseShare){.key = 1 + r, .held = 1u << 20, .covered = i % 2};
    }
}

static uint64_t special(uint32_t value) {
    static const uint64_t values[] = {0,   1,          2,   3,          15,         16,         255,        256,
                                      257, 1ull << 31, ~0u, 1ull << 47, 1ull << 48, 1ull << 50, 1ull << 62, ~0ull};
    return value < 16 ? values[value] : value;
}

/* Returns what is left of the file's size. */
static size_t edit(NbgpuUse *use, const uint8_t **data, size_t *size) {
    uint8_t cut = 0;
    if (*size)
        cut = *(*data)++, --*size;
    for (; *size >= 6; *data += 6, *size -= 6) {
        uint16_t word;
        uint32_t value;
        memcpy(&word, *data, sizeof word);
        memcpy(&value, *data + 2, sizeof value);
        /* most of what matters is in the head, the first slots and their shares */
        const size_t slots = offsetof(NbgpuUse, slot[SLOTS_IN_USE]) / 4, shares = SLOTS_IN_USE * NBGPU_SHARES * sizeof(NbgpuUseShare) / 4;
        size_t at = word % (slots + shares);
        at = 4 * (at < slots ? at : offsetof(NbgpuUse, share) / 4 + at - slots);
        const uint64_t wide = special(value);
        memcpy((char *)use + at, &wide, at % 8 ? 4 : 8);
    }
    return cut < 224 ? sizeof *use : (size_t)(cut - 224) * sizeof *use / 32;
}
#endif
