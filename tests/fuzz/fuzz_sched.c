/* The scheduler's reading of slots (sched_thread.c), and what its policies make of it: two slices on a device, one of them hostile, at
 * moments that the input chooses. The good one must not starve, nothing may overflow. */
#include "edits.h"
#include "sched_internal.h"

#define STEPS 12

typedef struct {
    NbgpuUse use;
    NbgpuCtl ctl;
    Entry entry;
} Slice;

static NbgpuSched sched;
static Device gpu;

static void join(Slice *s, uint64_t now, bool strict) {
    if (s->entry.use_fd == 0)
        s->entry.use_fd = memfd_create("use", MFD_CLOEXEC);
    const int fd = s->entry.use_fd;
    Kernels *kernels = s->entry.kernels;
    s->entry = (Entry){.used = true, .use_fd = fd, .ctl = &s->ctl, .gpu = &gpu, .gate = UINT32_MAX, .kernels = kernels};
    s->entry.index = sched_join(&gpu.policy, 500, strict, now);
}

static void with_kernels(Entry *e, bool wanted, uint64_t now) {
    static Kernels kernels;
    e->kernels = wanted ? &kernels : NULL;
    if (!wanted)
        return;
    memset(&kernels, 0, sizeof kernels);
    kernels_init(&kernels.turns, &gpu.policy.config, now);
    kernels_set(&kernels.turns, 0, "k1", 200, now);
    kernels_set(&kernels.turns, NBGPU_KERNELS - 1, "k2", 1000, now);
}

static void put(Slice *s, size_t size) {
    NEED(pwrite(s->entry.use_fd, &s->use, sizeof s->use, 0) == (ssize_t)sizeof s->use && ftruncate(s->entry.use_fd, (off_t)size) == 0);
}

/* Locks say who lives: an open file description's, as a process has none of its own here. */
static void live(int fd) {
    static bool done[1024];
    if (fd < 1024 && !done[fd]) {
        struct flock lock = {.l_type = F_WRLCK, .l_start = offsetof(NbgpuUse, slot), .l_len = 8 * sizeof(NbgpuUseSlot)};
        char path[40];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        const int other = open(path, O_RDWR | O_CLOEXEC);
        NEED(other >= 0 && fcntl(other, F_OFD_SETLK, &lock) == 0);
        done[fd] = true;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Slice bad, good;
    uint64_t now = 1000000000000ull, opened = 0;
    if (size < 2)
        return 0;
    const uint8_t flags = *data++, pace = *data++;
    size -= 2;
    memset(&gpu, 0, sizeof gpu);
    sched_init(&gpu.policy, NULL, now);
    join(&bad, now, flags & 1);
    join(&good, now, flags & 2);
    live(bad.entry.use_fd), live(good.entry.use_fd);
    with_kernels(&bad.entry, flags & 4, now);
    good.entry.kernels = NULL;
    fill(&good.use);
    good.use.high_water = 1;
    good.use.slot[0].device = 0;
    good.use.slot[0].want = 1;
    put(&good, sizeof good.use);
    const size_t each = size / STEPS / 6 * 6 + 1;
    for (int step = 0; step < 100; step++) {
        if (size >= each && each > 1 && step < STEPS) {
            size_t part = each;
            const uint8_t *at = data;
            fill(&bad.use);
            put(&bad, edit(&bad.use, &at, &part));
            data += each, size -= each;
        }
        now += step < STEPS ? (uint64_t)pace << (flags >> 4) : 20000000;
        sched_look(&sched, &bad.entry, now);
        sched_look(&sched, &good.entry, now);
        sched_step(&gpu.policy, now);
        if (bad.entry.kernels)
            kernels_step(&bad.entry.kernels->turns, sched_gate(&gpu.policy.slice[bad.entry.index]) == NBGPU_GATE_OPEN);
        opened += sched_gate(&gpu.policy.slice[good.entry.index]) == NBGPU_GATE_OPEN;
        NEED(gpu.policy.wake_at > now);
    }
    NEED(opened > 0); /* two seconds: whatever the neighbour says, it had a turn */
    return 0;
}
