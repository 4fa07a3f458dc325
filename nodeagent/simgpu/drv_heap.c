/* The address arena: who owns each 2 MiB of it, blocks large and small, and the physical memory behind them.
 *
 * A page's owner is a block, or (lowest bit set) a chunk, which holds small blocks of one size. Every address is found with
 * one look at the page map, so alloc and free cost the same with no and with 10,000 live blocks.
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "drv.h"

enum { PAGES = 1 << 19, PAGE_SHIFT = 21, BINS = 64, SMALL_MAX = 1 << 20, MAX_SLOTS = 4096 };
#define SLOT_FREE 0x80000000u

struct chunk {
    struct heap *heap;
    CUdeviceptr base;
    uint64_t id;
    uint32_t class, slots, live, fresh; /* fresh: slots from here on were never used */
    uint32_t free_slot;                 /* first of the freed ones + 1 */
    struct shared_memory *shared;
    struct chunk *next, *previous;
    uint32_t size[]; /* as asked; SLOT_FREE | next free one + 1 */
};

struct bin {
    uint32_t *pages;
    size_t count, room;
};

pthread_mutex_t heap_lock = PTHREAD_MUTEX_INITIALIZER;
static void *page_owner[PAGES];
static struct bin bins[BINS + 1]; /* free runs of exactly so many pages */
static uint32_t bump, high_water;
static bool scanning; /* the arena was once used up: runs are found by looking */
static struct chunk *spare[SMALL_CLASSES];
static _Atomic uint64_t ids = 1;
static _Atomic long oom_at = -1;
static pthread_once_t oom_once = PTHREAD_ONCE_INIT;

CUdeviceptr arena_start(void);
uint64_t arena_next_id(void) { return atomic_fetch_add(&ids, 1); }

static void read_oom_wish(void) {
    const char *at = getenv("NBGPU_SIM_OOM_AT");
    atomic_store(&oom_at, at && *at ? atol(at) : 0);
}

bool heap_oom_injected(void) {
    pthread_once(&oom_once, read_oom_wish);
    return atomic_load_explicit(&oom_at, memory_order_relaxed) > 0 && atomic_fetch_sub(&oom_at, 1) == 1;
}

static size_t class_bytes(unsigned class) { return (class % 2 ? 768u : 512u) << (class / 2); }

static unsigned class_of(size_t bytes) {
    if (bytes <= 512)
        return 0;
    unsigned log = 63u - (unsigned)__builtin_clzll(bytes - 1); /* 2^log < bytes <= 2^(log + 1) */
    return bytes <= (3ull << (log - 1)) ? 2 * (log - 9) + 1 : 2 * (log - 8);
}

size_t small_rounded(size_t bytes) {
    return bytes <= SMALL_MAX ? class_bytes(class_of(bytes)) : (bytes + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE;
}

static uint32_t page_of(CUdeviceptr p) { return (uint32_t)((p - arena_start()) >> PAGE_SHIFT); }

static CUdeviceptr find_run(size_t pages) {
    size_t run = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        run = page_owner[page] ? 0 : run + 1;
        if (run == pages)
            return arena_start() + ((CUdeviceptr)(page + 1 - pages) << PAGE_SHIFT);
    }
    return 0;
}

CUdeviceptr addresses_take_locked(size_t pages) {
    if (!arena_ready() || pages > PAGES)
        return 0;
    struct bin *bin = pages <= BINS ? &bins[pages] : NULL;
    if (!scanning && bin && bin->count)
        return arena_start() + ((CUdeviceptr)bin->pages[--bin->count] << PAGE_SHIFT);
    if (!scanning && bump + pages <= PAGES) {
        CUdeviceptr at = arena_start() + ((CUdeviceptr)bump << PAGE_SHIFT);
        bump += (uint32_t)pages;
        if (bump > high_water)
            high_water = bump;
        return at;
    }
    scanning = true;
    high_water = PAGES;
    return find_run(pages);
}

static void addresses_give_locked(CUdeviceptr base, size_t pages) {
    page_map_locked(base, pages << PAGE_SHIFT, NULL);
    if (scanning)
        return;
    if (page_of(base) + pages == bump) {
        bump -= (uint32_t)pages;
        return;
    }
    struct bin *bin = pages <= BINS ? &bins[pages] : NULL;
    if (!bin)
        return; /* found again by scanning */
    if (bin->count == bin->room) {
        size_t room = bin->room ? 2 * bin->room : 64;
        uint32_t *bigger = realloc(bin->pages, room * sizeof *bigger);
        if (!bigger)
            return;
        bin->pages = bigger;
        bin->room = room;
    }
    bin->pages[bin->count++] = page_of(base);
}

void page_map_locked(CUdeviceptr base, size_t bytes, void *entry) {
    size_t pages = (bytes + SIM_PAGE - 1) >> PAGE_SHIFT;
    for (uint32_t page = page_of(base), end = page + (uint32_t)pages; page < end; page++)
        page_owner[page] = entry;
}

static struct chunk *as_chunk(void *owner) { return (uintptr_t)owner & 1 ? (struct chunk *)((uintptr_t)owner - 1) : NULL; }

/* Addresses and, when charged, physical memory for `span` bytes, a multiple of 2 MiB. */
struct block *block_take_locked(size_t span, int kind, bool charge, int device) {
    struct block *block = calloc(1, sizeof *block);
    if (!block)
        return NULL;
    bool managed = kind == BLOCK_MANAGED;
    if (charge && !sim_mem_take_for(&drv.sim, drv.sim.client, (unsigned)device, span, managed)) {
        free(block);
        return NULL;
    }
    CUdeviceptr base = addresses_take_locked(span >> PAGE_SHIFT);
    if (!base) {
        if (charge)
            sim_mem_give_for(&drv.sim, drv.sim.client, (unsigned)device, span, managed);
        free(block);
        return NULL;
    }
    *block = (struct block){.base = base, .size = span, .span = span, .device = device, .kind = kind, .access = 3, .id = arena_next_id()};
    block->host = kind == BLOCK_RESERVED ? NULL : shadow_of(base);
    page_map_locked(base, span, block);
    return block;
}

void block_release_locked(struct block *block, bool charged) {
    if (block->kind == BLOCK_MANAGED) {
        madvise((void *)block->base, block->span, MADV_DONTNEED);
        mprotect((void *)block->base, block->span, PROT_NONE);
    }
    if (block->host == shadow_of(block->base))
        backing_drop(block->host, block->span);
    addresses_give_locked(block->base, block->span >> PAGE_SHIFT);
    if (block->shared)
        shared_end(block->shared);
    else if (charged)
        sim_mem_give_for(&drv.sim, drv.sim.client, (unsigned)block->device, block->span, block->kind == BLOCK_MANAGED);
    free(block);
}

struct block *block_at_locked(CUdeviceptr p) {
    if (!is_device_address(p))
        return NULL;
    void *owner = page_owner[page_of(p)];
    return as_chunk(owner) ? NULL : owner;
}

static void unlink_chunk(struct chunk *chunk) {
    if (chunk->next)
        chunk->next->previous = chunk->previous;
    if (chunk->previous) {
        chunk->previous->next = chunk->next;
    } else {
        chunk->heap->partial[chunk->class] = chunk->next;
    }
    chunk->next = chunk->previous = NULL;
}

static void link_chunk(struct chunk *chunk) {
    struct chunk **first = &chunk->heap->partial[chunk->class];
    chunk->previous = NULL;
    chunk->next = *first;
    if (*first)
        (*first)->previous = chunk;
    *first = chunk;
}

static struct chunk *make_chunk(struct heap *heap, unsigned class) {
    struct chunk *chunk = spare[class];
    uint32_t slots = (uint32_t)(SIM_PAGE / class_bytes(class));
    if (chunk) {
        spare[class] = chunk->next;
    } else if (!(chunk = malloc(sizeof *chunk + slots * sizeof *chunk->size))) {
        return NULL;
    }
    bool charge = heap->pool == NULL;
    CUdeviceptr base = !charge || sim_mem_take(&drv.sim, (unsigned)heap->device, SIM_PAGE) ? addresses_take_locked(1) : 0;
    if (!base) {
        chunk->next = spare[class];
        spare[class] = chunk;
        return NULL;
    }
    *chunk = (struct chunk){.heap = heap, .base = base, .id = arena_next_id(), .class = class, .slots = slots};
    page_map_locked(base, SIM_PAGE, (void *)((uintptr_t)chunk | 1));
    link_chunk(chunk);
    return chunk;
}

static void drop_chunk(struct chunk *chunk) {
    if (chunk->live < chunk->slots)
        unlink_chunk(chunk);
    if (chunk->shared) /* back to contents of this process alone */
        mmap(shadow_of(chunk->base), SIM_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    backing_drop(shadow_of(chunk->base), SIM_PAGE);
    addresses_give_locked(chunk->base, 1);
    if (chunk->shared)
        shared_end(chunk->shared);
    else if (!chunk->heap->pool)
        sim_mem_give(&drv.sim, (unsigned)chunk->heap->device, SIM_PAGE);
    chunk->next = spare[chunk->class];
    spare[chunk->class] = chunk;
}

static CUdeviceptr small_alloc(struct heap *heap, size_t bytes) {
    unsigned class = class_of(bytes);
    struct chunk *chunk = heap->partial[class];
    if (!chunk && !(chunk = make_chunk(heap, class)))
        return 0;
    uint32_t slot = chunk->free_slot ? chunk->free_slot - 1 : chunk->fresh++;
    if (chunk->free_slot)
        chunk->free_slot = chunk->size[slot] & ~SLOT_FREE;
    chunk->size[slot] = (uint32_t)bytes;
    if (++chunk->live == chunk->slots)
        unlink_chunk(chunk);
    return chunk->base + slot * class_bytes(class);
}

static bool small_find(const struct chunk *chunk, CUdeviceptr p, uint32_t *slot, struct block *out) {
    size_t bytes = class_bytes(chunk->class);
    *slot = (uint32_t)((p - chunk->base) / bytes);
    if (*slot >= chunk->fresh || chunk->size[*slot] & SLOT_FREE)
        return false;
    CUdeviceptr base = chunk->base + *slot * bytes;
    *out = (struct block){.base = base,
                          .size = chunk->size[*slot],
                          .span = bytes,
                          .host = shadow_of(base),
                          .device = chunk->heap->device,
                          .access = 3,
                          .ctx = chunk->heap->ctx,
                          .pool = chunk->heap->pool,
                          .id = chunk->id * MAX_SLOTS + *slot};
    return true;
}

CUresult heap_alloc(struct heap *heap, size_t bytes, CUdeviceptr *out) {
    NEED(bytes, CUDA_ERROR_INVALID_VALUE);
    NEED(bytes <= (size_t)PAGES << PAGE_SHIFT && !heap_oom_injected(), CUDA_ERROR_OUT_OF_MEMORY);
    NBGPU_POINT("sim.alloc");
    pthread_mutex_lock(&heap_lock);
    CUdeviceptr base = 0;
    if (bytes <= SMALL_MAX) {
        base = small_alloc(heap, bytes);
    } else {
        struct block *block = block_take_locked((bytes + SIM_PAGE - 1) & ~(SIM_PAGE - 1), BLOCK_DEVICE, heap->pool == NULL, heap->device);
        if (block) {
            base = block->base;
            block->size = bytes;
            block->ctx = heap->ctx;
            block->pool = heap->pool;
        }
    }
    pthread_mutex_unlock(&heap_lock);
    NEED(base, CUDA_ERROR_OUT_OF_MEMORY);
    *out = base;
    return CUDA_SUCCESS;
}

static bool find_locked(CUdeviceptr p, struct block *out) {
    if (!is_device_address(p))
        return false;
    void *owner = page_owner[page_of(p)];
    uint32_t slot;
    if (!owner)
        return false;
    if (as_chunk(owner))
        return small_find(as_chunk(owner), p, &slot, out);
    *out = *(struct block *)owner;
    return true;
}

bool heap_find(CUdeviceptr p, struct block *out) {
    pthread_mutex_lock(&heap_lock);
    bool found = find_locked(p, out);
    pthread_mutex_unlock(&heap_lock);
    return found;
}

/* A chunk's contents stay where its blocks look for them: the file is mapped over the shadow, all of it counted as having contents. */
static bool share_chunk(struct chunk *chunk) {
    if (!chunk->shared && !chunk->heap->pool && (chunk->shared = shared_make(chunk->heap->device, SIM_PAGE, false))) {
        uint8_t *shadow = shadow_of(chunk->base);
        backing_move(shadow, SIM_PAGE, chunk->shared->host);
        backing_touch(shadow, SIM_PAGE);
        munmap(chunk->shared->host, SIM_PAGE);
        chunk->shared->host = NULL;
        mmap(shadow, SIM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, chunk->shared->fd, 0);
    }
    return chunk->shared != NULL;
}

static bool share_block(struct block *block) {
    if (!block->shared && (block->shared = shared_make(block->device, block->span, false))) {
        backing_move(block->host, block->span, block->shared->host);
        backing_drop(block->host, block->span);
        block->host = block->shared->host;
    }
    return block->shared != NULL;
}

CUresult heap_share(CUdeviceptr p, struct block *out, struct shared_memory **shared) {
    struct block inner;
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&heap_lock);
    if (find_locked(p, &inner) && inner.kind == BLOCK_DEVICE) {
        struct chunk *chunk = as_chunk(page_owner[page_of(p)]);
        struct block *block = chunk ? NULL : page_owner[page_of(p)];
        *out = chunk ? (struct block){.base = chunk->base, .span = SIM_PAGE, .device = inner.device, .pool = inner.pool} : *block;
        result = (chunk ? share_chunk(chunk) : share_block(block)) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
        *shared = chunk ? chunk->shared : block->shared;
    }
    pthread_mutex_unlock(&heap_lock);
    return result;
}

static void small_free(struct chunk *chunk, uint32_t slot) {
    chunk->size[slot] = SLOT_FREE | chunk->free_slot;
    chunk->free_slot = slot + 1;
    if (chunk->live-- == chunk->slots)
        link_chunk(chunk);
    if (chunk->live == 0)
        drop_chunk(chunk);
}

CUresult heap_free(CUdeviceptr base, struct block *was) {
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    NBGPU_POINT("sim.free");
    pthread_mutex_lock(&heap_lock);
    if (find_locked(base, was) && was->base == base && (was->kind == BLOCK_DEVICE || was->kind == BLOCK_MANAGED)) {
        struct chunk *chunk = as_chunk(page_owner[page_of(base)]);
        if (chunk) {
            small_free(chunk, (uint32_t)((base - chunk->base) / class_bytes(chunk->class)));
        } else {
            block_release_locked(page_owner[page_of(base)], was->pool == NULL);
        }
        result = CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&heap_lock);
    return result;
}

/* All that a context holds goes with it. */
void heap_drop_ctx(CUcontext ctx) {
    pthread_mutex_lock(&heap_lock);
    share_context_ends(ctx);
    for (uint32_t page = 0; page < high_water; page++) {
        void *owner = page_owner[page];
        struct chunk *chunk = as_chunk(owner);
        struct block *block = chunk ? NULL : owner;
        if (chunk && chunk->heap == &ctx->heap)
            drop_chunk(chunk);
        if (block && block->ctx == ctx && !block->pool &&
            (block->kind == BLOCK_DEVICE || block->kind == BLOCK_MANAGED || block->kind == BLOCK_OPENED))
            block_release_locked(block, true);
    }
    memset(ctx->heap.partial, 0, sizeof ctx->heap.partial);
    pthread_mutex_unlock(&heap_lock);
}
