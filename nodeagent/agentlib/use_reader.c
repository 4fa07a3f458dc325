/* Reads a slice's `use` file as hostile input: pread with bounds into our own memory, then every number against its range. The file
 * is never mapped here: a tenant that truncates it would give the reader SIGBUS. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nbgpu_agent.h"

#define MEMORY_MAX (1ull << 50) /* bytes: more than any node's GPUs hold together */
#define COUNT_MAX (1ull << 62)  /* of anything that only rises */
#define WORDS_MAX 65536u        /* threads that wait */
#define FIRST 4u                /* slots read with the head */
#define BATCH 16u               /* slots read at once: 4 KiB of stack */

#ifdef NBGPU_CONTROL_BELIEVE /* for the test that shows that a fuzzer finds what is not checked */
#define SHARES_READ UINT32_MAX
#else
#define SHARES_READ NBGPU_SHARES
#endif

uint32_t nbgpu_agent_abi(void) { return NBGPU_AGENT_ABI; }

static int read_at(int fd, void *out, size_t size, off_t at) {
    ssize_t got;
    do {
        got = pread(fd, out, size, at);
    } while (got < 0 && errno == EINTR);
    if (got < 0)
        return -errno;
    return (size_t)got == size ? 0 : -EBADMSG;
}

/* The file's first bytes: its head, and the slots that most slices never go beyond. */
typedef struct {
    _Alignas(8) unsigned char head[offsetof(NbgpuUse, slot)];
    NbgpuUseSlot slot[FIRST];
} Start;

static int parse_head(const unsigned char *start, NbgpuUseHead *out) {
    struct {
        uint64_t magic;
        uint32_t version, size, high_water, events;
    } head;
    _Static_assert(offsetof(NbgpuUse, events) + sizeof(uint32_t) == sizeof head, "head of use");
    memcpy(&head, start, sizeof head);
    if (head.magic != NBGPU_USE_MAGIC || head.version < NBGPU_VERSION)
        return -EBADMSG;
    *out = (NbgpuUseHead){
        .high_water = head.high_water < NBGPU_SLOTS ? head.high_water : NBGPU_SLOTS,
        .events = head.events,
    };
    memcpy(&out->bell, start + offsetof(NbgpuUse, bell), sizeof out->bell);
    return 0;
}

int nbgpu_use_head(int fd, NbgpuUseHead *out) {
    unsigned char start[offsetof(NbgpuUse, bell) + sizeof out->bell];
    int rc = read_at(fd, start, sizeof start, 0);
    return rc ? rc : parse_head(start, out);
}

void nbgpu_use_events(const int *fds, int count, uint32_t *events) {
    for (int i = 0; i < count; i++)
        if (read_at(fds[i], &events[i], sizeof events[i], offsetof(NbgpuUse, events)))
            events[i] = 0;
}

static bool is_id_char(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
}

static void copy_kernel_id(const NbgpuUseSlot *slot, NbgpuUseRow *row) {
    size_t length = strnlen(slot->kernel_id, NBGPU_KERNEL_ID_BYTES);
    bool good = length < NBGPU_KERNEL_ID_BYTES;
    for (size_t i = 0; good && i < length; i++)
        good = is_id_char(slot->kernel_id[i]);
    if (good)
        memcpy(row->kernel_id, slot->kernel_id, length);
    else
        row->junk |= NBGPU_JUNK_KERNEL_ID;
}

static void copy_memory(const NbgpuUseSlot *slot, NbgpuUseRow *row) {
    const uint64_t bytes[] = {slot->used, slot->context, slot->peak};
    const uint64_t counts[] = {slot->allocs, slot->frees, slot->refusals};
    bool good = slot->refused_by <= NBGPU_REFUSED_DRIVER;
    for (int i = 0; i < 3; i++)
        good = good && bytes[i] <= MEMORY_MAX && counts[i] <= COUNT_MAX;
    if (!good) {
        row->junk |= NBGPU_JUNK_MEMORY;
        return;
    }
    row->used = slot->used;
    row->context = slot->context;
    row->peak = slot->peak;
    row->allocs = slot->allocs;
    row->frees = slot->frees;
    row->refusals = slot->refusals;
    row->refused_bytes = slot->refused_bytes; /* any size may have been asked for */
    row->refused_by = slot->refused_by;
}

static void copy_compute(const NbgpuUseSlot *slot, NbgpuUseRow *row) {
    uint64_t launches = slot->launches;
    bool good = slot->want <= WORDS_MAX && slot->wants_back <= WORDS_MAX && slot->near <= 1 && launches <= COUNT_MAX;
    for (size_t i = 0; good && i < sizeof slot->launches_by_thread / sizeof(uint64_t); i++) {
        good = slot->launches_by_thread[i] <= COUNT_MAX;
        launches += slot->launches_by_thread[i]; /* 2^63 at most, checked before the next is added */
        good = good && launches <= COUNT_MAX;
    }
    const uint64_t counts[] = {slot->busy_since, slot->busy_ns, launches, slot->last_launch_ns, slot->stall_ns, slot->copied_bytes};
    for (int i = 0; i < 6; i++)
        good = good && counts[i] <= COUNT_MAX;
    if (!good) {
        row->junk |= NBGPU_JUNK_COMPUTE;
        return;
    }
    row->want = slot->want;
    row->near = slot->near;
    row->wants_back = slot->wants_back;
    row->busy_since = slot->busy_since;
    row->busy_ns = slot->busy_ns;
    row->launches = launches;
    row->last_launch_ns = slot->last_launch_ns;
    row->stall_ns = slot->stall_ns;
    row->copied_bytes = slot->copied_bytes;
}

static void copy_row(uint32_t index, const NbgpuUseSlot *slot, NbgpuUseRow *row) {
    *row = (NbgpuUseRow){.slot = index, .owner = slot->owner, .start_time = slot->start_time};
    row->pid = (uint32_t)(slot->owner >> 32);
    if (row->pid == 0 || row->pid > 0x7ffffffeu) {
        row->pid = 0;
        row->junk |= NBGPU_JUNK_OWNER;
    }
    if (slot->device < NBGPU_DEVICES)
        row->device = slot->device;
    else
        row->junk |= NBGPU_JUNK_DEVICE;
    copy_kernel_id(slot, row);
    copy_memory(slot, row);
    copy_compute(slot, row);
}

/* One entry of `share` that says something. */
typedef struct {
    uint32_t device, row, order; /* order: rows, and their entries, from the first to the last */
    NbgpuUseShare share;
} Share;

static int by_key(const void *a, const void *b) {
    const Share *x = a, *y = b;
    if (x->device != y->device)
        return x->device < y->device ? -1 : 1;
    if (x->share.key != y->share.key)
        return x->share.key < y->share.key ? -1 : 1;
    return x->order < y->order ? -1 : 1;
}

static void add_to_row(NbgpuUseRow *rows, const Share *one) {
    if (one->share.held > MEMORY_MAX)
        rows[one->row].junk |= NBGPU_JUNK_MEMORY;
    else
        rows[one->row].used += one->share.held;
}

/* Entries `from` to `to` - 1 are of the same memory: who holds it first pays, unless somebody covers it. */
static void add_group(NbgpuUseRow *rows, const Share *all, int from, int to) {
    int pays = -1;
    bool covered = false;
    for (int i = from; i < to; i++) {
        covered |= all[i].share.covered != 0;
        if (all[i].share.held > MEMORY_MAX)
            rows[all[i].row].junk |= NBGPU_JUNK_MEMORY;
        if (all[i].share.held && pays < 0)
            pays = i;
    }
    if (pays >= 0 && !covered)
        add_to_row(rows, &all[pays]);
}

/* What a process holds of others and nobody of the slice pays for counts as its own: the rule is in layout.py. Sorted, so that a file
 * that is full of it takes little longer than one with a few. */
static int add_held(int fd, NbgpuUseRow *rows, const uint32_t *counts, int n_rows, int sharing) {
    NbgpuUseShare read[NBGPU_SHARES];
    Share *all = calloc((size_t)sharing * NBGPU_SHARES, sizeof *all);
    int n = 0, rc = all ? 0 : -ENOMEM;
    for (int row = 0; row < n_rows && !rc; row++) {
        if (!counts[row])
            continue;
        rc = read_at(fd, read, counts[row] * sizeof *read, (off_t)(offsetof(NbgpuUse, share) + (size_t)rows[row].slot * sizeof read));
        for (uint32_t r = 0; r < counts[row] && !rc; r++) {
            const Share one = {.device = rows[row].device, .row = (uint32_t)row, .order = (uint32_t)n, .share = read[r]};
            if (!read[r].key && read[r].held) /* nobody knows what it is */
                add_to_row(rows, &one);
            else if (read[r].held || read[r].covered)
                all[n++] = one;
        }
    }
    if (!rc && n)
        qsort(all, (size_t)n, sizeof *all, by_key);
    for (int from = 0, to = 0; from < n && !rc; from = to) {
        while (to < n && all[to].device == all[from].device && all[to].share.key == all[from].share.key)
            to++;
        add_group(rows, all, from, to);
    }
    free(all);
    return rc;
}

int nbgpu_use_read(int fd, NbgpuUseRow *out, int max) {
    NbgpuUseHead head;
    Start start; /* one call: a system call costs more than all the rest */
    NbgpuUseSlot batch[BATCH];
    uint32_t shares[NBGPU_SLOTS];
    int count = 0, sharing = 0;
    int rc = read_at(fd, &start, sizeof start, 0);
    if (!rc)
        rc = parse_head(start.head, &head);
    if (rc)
        return rc;
    for (uint32_t first = 0, n = FIRST; first < head.high_water; first += n, n = BATCH) {
        const NbgpuUseSlot *slot = first ? batch : start.slot;
        n = head.high_water - first < n ? head.high_water - first : n;
        if (first)
            rc = read_at(fd, batch, n * sizeof *batch, (off_t)(offsetof(NbgpuUse, slot) + first * sizeof *batch));
        if (rc)
            return rc;
        for (uint32_t i = 0; i < n && count < max; i++)
            if (slot[i].owner && slot[i].ready) {
                shares[count] = slot[i].shares < SHARES_READ ? slot[i].shares : SHARES_READ;
                sharing += shares[count] != 0;
                copy_row(first + i, &slot[i], &out[count++]);
            }
    }
    rc = sharing ? add_held(fd, out, shares, count, sharing) : 0;
    return rc ? rc : count;
}

int nbgpu_use_locked(int fd, uint32_t slot) {
    if (slot >= NBGPU_SLOTS)
        return -EINVAL;
    struct flock lock = {
        .l_type = F_WRLCK,
        .l_whence = SEEK_SET,
        .l_start = (off_t)(offsetof(NbgpuUse, slot) + slot * sizeof(NbgpuUseSlot)),
        .l_len = 1,
    };
    if (fcntl(fd, F_GETLK, &lock))
        return -errno;
    /* -1: an open-file-description lock. The limiter takes none, and one outlives every process, in a descriptor passed on. */
    if (lock.l_type == F_UNLCK)
        return 0;
    if (lock.l_pid < 0)
        return NBGPU_LOCKED_BY_NONE;
    return lock.l_pid > 0 ? lock.l_pid : NBGPU_LOCKED_ELSEWHERE;
}
