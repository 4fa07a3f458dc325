/* What device memory contains: host memory at a fixed distance from the device address, taken from the system page by page
 * as a program writes, up to NBGPU_SIM_BACKING_MIB for the process. What was never written reads as zeroes. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "drv.h"

enum { GRAIN_SHIFT = 16 }; /* budget and bitmap count in 64 KiB */
#define ARENA_BYTES (1ull << 40)
#define GRAIN (1ull << GRAIN_SHIFT)

static CUdeviceptr arena_base;
static uint8_t *shadow_base;
static uint64_t *touched; /* one bit per grain */
static uint64_t budget_grains, used_grains;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint8_t *reserve(size_t bytes, int protection) {
    void *at = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return NULL;
    madvise(at, bytes, MADV_DONTDUMP);
    return at;
}

static void make_arena(void) {
    const char *mib = getenv("NBGPU_SIM_BACKING_MIB");
    uint64_t budget = mib && *mib ? strtoull(mib, NULL, 10) : 1024;
    budget_grains = budget << (20 - GRAIN_SHIFT);
    uint8_t *addresses = reserve(ARENA_BYTES + SIM_PAGE, PROT_NONE);
    shadow_base = reserve(ARENA_BYTES, PROT_READ | PROT_WRITE);
    touched = (uint64_t *)(void *)reserve(ARENA_BYTES >> GRAIN_SHIFT >> 3, PROT_READ | PROT_WRITE);
    if (addresses && shadow_base && touched)
        arena_base = ((CUdeviceptr)addresses + SIM_PAGE - 1) & ~(SIM_PAGE - 1);
}

bool arena_ready(void) {
    pthread_once(&once, make_arena);
    return arena_base != 0;
}

CUdeviceptr arena_start(void) { return arena_base; }

bool is_device_address(CUdeviceptr p) { return arena_base && p - arena_base < ARENA_BYTES; }

uint8_t *shadow_of(CUdeviceptr p) { return shadow_base + (p - arena_base); }

static bool in_shadow(const uint8_t *host) { return (uint64_t)(host - shadow_base) < ARENA_BYTES; }

/* Counts the grains of a range that is about to be written; all or nothing. */
CUresult backing_touch(uint8_t *host, size_t bytes) {
    if (!bytes || !in_shadow(host))
        return CUDA_SUCCESS;
    uint64_t first = (uint64_t)(host - shadow_base) >> GRAIN_SHIFT, last = (uint64_t)(host + bytes - 1 - shadow_base) >> GRAIN_SHIFT;
    uint64_t fresh = 0;
    for (uint64_t g = first; g <= last; g++)
        fresh += !(__atomic_load_n(&touched[g / 64], __ATOMIC_RELAXED) >> (g % 64) & 1);
    if (!fresh)
        return CUDA_SUCCESS;
    if (__atomic_add_fetch(&used_grains, fresh, __ATOMIC_RELAXED) > budget_grains) {
        __atomic_sub_fetch(&used_grains, fresh, __ATOMIC_RELAXED);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    uint64_t marked = 0;
    for (uint64_t g = first; g <= last; g++)
        marked += !(__atomic_fetch_or(&touched[g / 64], 1ull << (g % 64), __ATOMIC_RELAXED) >> (g % 64) & 1);
    __atomic_sub_fetch(&used_grains, fresh - marked, __ATOMIC_RELAXED); /* another thread marked some meanwhile */
    return CUDA_SUCCESS;
}

bool backing_touched(const uint8_t *host, size_t *run) {
    if (!in_shadow(host)) {
        *run = SIZE_MAX;
        return true;
    }
    uint64_t offset = (uint64_t)(host - shadow_base), grain = offset >> GRAIN_SHIFT;
    *run = GRAIN - (offset & (GRAIN - 1));
    return __atomic_load_n(&touched[grain / 64], __ATOMIC_RELAXED) >> (grain % 64) & 1;
}

size_t backing_untouched(const uint8_t *host, size_t most) {
    if (!in_shadow(host))
        return 0;
    const uint64_t offset = (uint64_t)(host - shadow_base);
    uint64_t grain = offset >> GRAIN_SHIFT;
    while ((grain << GRAIN_SHIFT) < offset + most) {
        const uint64_t word = __atomic_load_n(&touched[grain / 64], __ATOMIC_RELAXED) >> (grain % 64);
        if (word & 1)
            break;
        grain += word ? (uint64_t)__builtin_ctzll(word) : 64 - grain % 64;
    }
    const uint64_t end = grain << GRAIN_SHIFT;
    return end <= offset ? 0 : end - offset < most ? end - offset : most;
}

void backing_move(uint8_t *from, size_t bytes, uint8_t *to) {
    size_t run;
    for (size_t at = 0; at < bytes; at += run) {
        const bool has = backing_touched(from + at, &run);
        if (run > bytes - at)
            run = bytes - at;
        if (has)
            memcpy(to + at, from + at, run);
    }
}

/* Gives the contents of whole grains back to the system. */
void backing_drop(uint8_t *host, size_t bytes) {
    if (!in_shadow(host))
        return;
    uint64_t first = (uint64_t)(host - shadow_base) >> GRAIN_SHIFT, end = (uint64_t)(host + bytes - shadow_base) >> GRAIN_SHIFT;
    for (uint64_t g = first; g < end;) {
        uint64_t from = g % 64, many = end - g < 64 - from ? end - g : 64 - from; /* of one word of the bitmap */
        uint64_t mask = (many == 64 ? UINT64_MAX : (1ull << many) - 1) << from;
        if (__atomic_load_n(&touched[g / 64], __ATOMIC_RELAXED) & mask) {
            uint64_t had = __atomic_fetch_and(&touched[g / 64], ~mask, __ATOMIC_RELAXED) & mask;
            madvise(shadow_base + (g << GRAIN_SHIFT), many << GRAIN_SHIFT, MADV_DONTNEED);
            __atomic_sub_fetch(&used_grains, (uint64_t)__builtin_popcountll(had), __ATOMIC_RELAXED);
        }
        g += many;
    }
}
