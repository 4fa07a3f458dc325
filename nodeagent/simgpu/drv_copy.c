/* Copying and filling. Contents change when a call is made, in the order of the calls, which every legal order of the streams
 * contains; only behind a host function that has not run yet does a copy wait for its turn on the host thread. */
#define _GNU_SOURCE
#include "drv.h"

/* What a simulated H100 moves in a second, and what starting a transfer costs. */
enum { LATENCY_NS = 2000, HOST_BYTES_PER_US = 25000, DEVICE_BYTES_PER_US = 1500000, FILL_BYTES_PER_US = 2500000 };

/* NBGPU_SIM_MEMORY_SLOWER=n: transfers take n times as long, as on a slower GPU. */
static uint64_t slower = 1;
static pthread_once_t slower_once = PTHREAD_ONCE_INIT;

static void read_slower(void) {
    const char *text = getenv("NBGPU_SIM_MEMORY_SLOWER");
    uint64_t n = text ? strtoull(text, NULL, 10) : 1;
    slower = n >= 1 && n <= 100000 ? n : 1;
}

static uint64_t transfer_ns(uint64_t bytes, uint64_t bytes_per_us) {
    pthread_once(&slower_once, read_slower);
    return (LATENCY_NS + bytes * 1000 / bytes_per_us) * slower;
}

/* Bytes from p on that lie together on the host; 0: p is no device address that may be used. */
static size_t device_run(CUdeviceptr p, bool write, uint8_t **host) {
    struct block block;
    if (!heap_find(p, &block) || !block.host)
        return 0;
    if ((block.access & (write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ)) == 0)
        return 0;
    size_t offset = p - block.base;
    if (offset >= block.span)
        return 0;
    *host = block.host + offset;
    return block.span - offset;
}

static uint8_t *row_of(const struct box_side *side, size_t y, size_t z) {
    size_t offset = z * side->slice + y * side->pitch;
    return side->device ? (uint8_t *)(uintptr_t)(side->address + offset) : side->host + offset;
}

/* A side's next bytes on the host, at most *n of them. */
static CUresult side_run(const struct box_side *side, uint8_t *at, size_t *n, bool write, uint8_t **host) {
    if (!side->device) {
        *host = at;
        return CUDA_SUCCESS;
    }
    size_t run = device_run((CUdeviceptr)(uintptr_t)at, write, host);
    NEED(run, CUDA_ERROR_INVALID_VALUE);
    if (run < *n)
        *n = run;
    return CUDA_SUCCESS;
}

/* Device to device leaves alone what neither side has ever had contents in. */
static CUresult move_sparse(uint8_t *to, const uint8_t *from, size_t n) {
    while (n) {
        size_t run_from = backing_untouched(from, n), run_to = backing_untouched(to, n);
        if (run_from && run_to) {
            size_t none = run_from < run_to ? run_from : run_to;
            to += none;
            from += none;
            n -= none;
            continue;
        }
        bool has_from = backing_touched(from, &run_from), has_to = backing_touched(to, &run_to);
        size_t run = run_from < run_to ? run_from : run_to;
        if (run > n)
            run = n;
        if (has_from || has_to) {
            TRY(backing_touch(to, run));
            memmove(to, from, run);
        }
        to += run;
        from += run;
        n -= run;
    }
    return CUDA_SUCCESS;
}

static CUresult copy_row(const struct box *box, size_t y, size_t z) {
    uint8_t *from = row_of(&box->from, y, z), *to = row_of(&box->to, y, z);
    for (size_t left = box->width; left;) {
        size_t n = left;
        uint8_t *source, *target;
        TRY(side_run(&box->from, from, &n, false, &source));
        TRY(side_run(&box->to, to, &n, true, &target));
        if (box->from.device && box->to.device) {
            TRY(move_sparse(target, source, n));
        } else {
            TRY(backing_touch(target, n));
            memmove(target, source, n);
        }
        from += n;
        to += n;
        left -= n;
    }
    return CUDA_SUCCESS;
}

CUresult box_run(const struct box *box) {
    for (size_t z = 0; z < box->depth; z++)
        for (size_t y = 0; y < box->height; y++)
            TRY(copy_row(box, y, z));
    return CUDA_SUCCESS;
}

int box_kind(const struct box *box) {
    if (box->from.device && box->to.device)
        return SIM_COMPUTE;
    return box->to.device ? SIM_COPY_IN : box->from.device ? SIM_COPY_OUT : SIM_MARK;
}

uint64_t box_ns(const struct box *box) {
    uint64_t bytes = (uint64_t)box->width * box->height * box->depth;
    int kind = box_kind(box);
    if (kind == SIM_MARK)
        return 0;
    return transfer_ns(bytes, kind == SIM_COMPUTE ? DEVICE_BYTES_PER_US : HOST_BYTES_PER_US);
}

static void run_box_later(void *argument) { box_run(argument); }

/* A range from one block, or from mappings side by side: refused by the call, not found wrong later on another thread. */
static CUresult check_range(CUdeviceptr first, CUdeviceptr last, bool write) {
    uint8_t *host;
    struct block block;
    NEED(device_run(first, write, &host) && heap_find(first, &block), CUDA_ERROR_INVALID_VALUE);
    if (block.kind != BLOCK_MAPPED)
        return last - block.base < block.size ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    return device_run(last, write, &host) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult check_side(const struct box_side *side, const struct box *box, bool write) {
    if (!side->device || !box->width || !box->height || !box->depth)
        return CUDA_SUCCESS;
    CUdeviceptr first = (CUdeviceptr)(uintptr_t)row_of(side, 0, 0);
    return check_range(first, (CUdeviceptr)(uintptr_t)row_of(side, box->height - 1, box->depth - 1) + box->width - 1, write);
}

CUresult drv_copy(const struct box *box, CUstream s, bool synchronous) {
    TRY(check_side(&box->from, box, false));
    TRY(check_side(&box->to, box, true));
    if (s->capture)
        return synchronous ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : capture_copy(s, box);
    if (!box->width || !box->height || !box->depth)
        return CUDA_SUCCESS;
    struct submission what = {.kind = box_kind(box), .ns = box_ns(box)};
    if (atomic_load_explicit(&drv.host_work, memory_order_acquire) == 0) {
        TRY(box_run(box));
    } else {
        struct box *later = malloc(sizeof *later);
        NEED(later, CUDA_ERROR_OUT_OF_MEMORY);
        *later = *box;
        TRY(drv_host_work_make(run_box_later, later, true, &what.work));
    }
    uint64_t seq;
    TRY(drv_submit(s, &what, &seq));
    return synchronous ? drv_wait(s->ctx, seq) : CUDA_SUCCESS;
}

static void set_row(uint8_t *at, const struct fill *fill, size_t bytes) {
    if (fill->element == 1) {
        memset(at, (int)fill->value, bytes);
        return;
    }
    uint16_t half = (uint16_t)fill->value;
    for (size_t i = 0; i < bytes; i += fill->element)
        memcpy(at + i, fill->element == 2 ? (void *)&half : (void *)&fill->value, fill->element);
}

CUresult fill_run(const struct fill *fill) {
    for (size_t y = 0; y < fill->height; y++) {
        CUdeviceptr p = fill->to + y * fill->pitch;
        for (size_t left = fill->width * fill->element; left;) {
            uint8_t *host;
            size_t n = device_run(p, true, &host), grain;
            NEED(n, CUDA_ERROR_INVALID_VALUE);
            if (n > left)
                n = left;
            size_t untouched = fill->value ? 0 : backing_untouched(host, n); /* zeroes already */
            if (untouched) {
                p += untouched;
                left -= untouched;
                continue;
            }
            bool has = backing_touched(host, &grain);
            if (n > grain)
                n = grain; /* 64 KiB at a time: a multiple of any element but at odd starts, which are not allowed */
            if (has || fill->value) {
                TRY(backing_touch(host, n));
                set_row(host, fill, n);
            }
            p += n;
            left -= n;
        }
    }
    return CUDA_SUCCESS;
}

uint64_t fill_ns(const struct fill *fill) { return transfer_ns((uint64_t)fill->width * fill->element * fill->height, FILL_BYTES_PER_US); }

static void run_fill_later(void *argument) { fill_run(argument); }

CUresult drv_fill(const struct fill *fill, CUstream s, bool synchronous) {
    if (!fill->width || !fill->height)
        return CUDA_SUCCESS;
    NEED(fill->to % fill->element == 0 && fill->pitch % fill->element == 0, CUDA_ERROR_INVALID_VALUE);
    TRY(check_range(fill->to, fill->to + (fill->height - 1) * fill->pitch + fill->width * fill->element - 1, true));
    if (s->capture)
        return synchronous ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : capture_fill(s, fill);
    struct submission what = {.kind = SIM_COMPUTE, .ns = fill_ns(fill)};
    if (atomic_load_explicit(&drv.host_work, memory_order_acquire) == 0) {
        TRY(fill_run(fill));
    } else {
        struct fill *later = malloc(sizeof *later);
        NEED(later, CUDA_ERROR_OUT_OF_MEMORY);
        *later = *fill;
        TRY(drv_host_work_make(run_fill_later, later, true, &what.work));
    }
    uint64_t seq;
    TRY(drv_submit(s, &what, &seq));
    return synchronous ? drv_wait(s->ctx, seq) : CUDA_SUCCESS;
}

static struct box_side linear_side(const void *host, CUdeviceptr address, int type, size_t pitch, size_t rows, CUresult *error) {
    struct box_side side = {.pitch = pitch, .slice = pitch * (rows ? rows : 1)};
    CUdeviceptr p = type == CU_MEMORYTYPE_HOST ? (CUdeviceptr)(uintptr_t)host : address;
    side.device = is_device_address(p);
    side.address = p;
    side.host = (uint8_t *)(uintptr_t)p;
    if (type == CU_MEMORYTYPE_DEVICE && !side.device && !p)
        *error = CUDA_ERROR_INVALID_VALUE;
    return side;
}

static struct box_side array_side(CUarray array, CUresult *error) {
    if (!array || array->magic != ARRAY_MAGIC) {
        *error = CUDA_ERROR_INVALID_HANDLE;
        return (struct box_side){.device = false};
    }
    return (struct box_side){.device = true, .address = array->data, .pitch = array->pitch, .slice = array->pitch * array->rows};
}

static void step_into(struct box_side *side, size_t x, size_t y, size_t z) {
    size_t offset = x + y * side->pitch + z * side->slice;
    side->address += offset;
    side->host += offset;
}

CUresult box_of_copy3d(const CUDA_MEMCPY3D *c, struct box *box) {
    CUresult error = CUDA_SUCCESS;
    NEED(c->srcMemoryType >= 1 && c->srcMemoryType <= 4 && c->dstMemoryType >= 1 && c->dstMemoryType <= 4, CUDA_ERROR_INVALID_VALUE);
    *box = (struct box){.width = c->WidthInBytes, .height = c->Height, .depth = c->Depth};
    box->from = c->srcMemoryType == CU_MEMORYTYPE_ARRAY ? array_side(c->srcArray, &error)
                                                        : linear_side(c->srcHost, c->srcDevice, c->srcMemoryType,
                                                                      c->srcPitch ? c->srcPitch : c->WidthInBytes, c->srcHeight, &error);
    box->to = c->dstMemoryType == CU_MEMORYTYPE_ARRAY ? array_side(c->dstArray, &error)
                                                      : linear_side(c->dstHost, c->dstDevice, c->dstMemoryType,
                                                                    c->dstPitch ? c->dstPitch : c->WidthInBytes, c->dstHeight, &error);
    step_into(&box->from, c->srcXInBytes, c->srcY, c->srcZ);
    step_into(&box->to, c->dstXInBytes, c->dstY, c->dstZ);
    return error;
}
