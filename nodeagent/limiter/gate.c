/* The gate: which launches go to the driver at once, and which wait for the slice's turn.
 *
 * The common case, no turns on this device (GATE_NONE), costs a few loads and one plain increment of a word in the `use` file that
 * no other thread writes.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gate.h"

static const uint32_t never = NBGPU_GATE_CLOSED;
static const uint64_t no_generation = 0;

/* What the fast path looks at; `gate` says "closed" until there is one device, one slot and no gate of a kernel. */
static struct {
    _Alignas(64) const uint32_t *_Atomic gate;
    const uint64_t *_Atomic generation;
    _Atomic uint64_t seen;
    _Atomic int captures; /* streams being captured */
} hot = {.gate = &never, .generation = &no_generation};

PER_THREAD struct {
    uint64_t *word; /* where this thread counts its launches */
    Pass *pass;
    bool asked;
} self;

static _Atomic uint32_t words_taken[NBGPU_DEVICES];
static pthread_key_t word_key;
static pthread_once_t word_once = PTHREAD_ONCE_INIT;

static long futex(const uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

/* ---- the fast path ---- */

static void touch(NbgpuUseSlot *slot, uint64_t now) { __atomic_store_n(&slot->last_launch_ns, now, __ATOMIC_RELAXED); }

static inline __attribute__((always_inline)) bool fast(void) {
    uint64_t *word = self.word;
    if (unlikely(!word))
        return false;
    if (unlikely(__atomic_load_n(atomic_load_explicit(&hot.gate, memory_order_relaxed), __ATOMIC_RELAXED) != NBGPU_GATE_NONE))
        return false;
    if (unlikely(__atomic_load_n(atomic_load_explicit(&hot.generation, memory_order_relaxed), __ATOMIC_RELAXED) !=
                 atomic_load_explicit(&hot.seen, memory_order_relaxed)))
        return false;
    const uint64_t count = __atomic_load_n(word, __ATOMIC_RELAXED) + 1;
    if (unlikely(atomic_load_explicit(&hot.captures, memory_order_relaxed) != 0 || (count & 63) == 0))
        return false;
    __atomic_store_n(word, count, __ATOMIC_RELAXED); /* ours alone: no locked instruction */
    return true;
}

/* The gate is open and the thread has leave to launch on this stream (pass.c). */
static inline __attribute__((always_inline)) bool by_pass(CUstream stream) {
    Pass *pass = self.pass;
    if (unlikely(!pass) || unlikely(pass->stream != stream))
        return false;
    if (unlikely(__atomic_load_n(atomic_load_explicit(&hot.gate, memory_order_relaxed), __ATOMIC_RELAXED) != NBGPU_GATE_OPEN))
        return false;
    if (unlikely(__atomic_load_n(atomic_load_explicit(&hot.generation, memory_order_relaxed), __ATOMIC_RELAXED) !=
                 atomic_load_explicit(&hot.seen, memory_order_relaxed)))
        return false;
    const uint64_t count = __atomic_load_n(pass->word, __ATOMIC_RELAXED) + 1;
    if (unlikely(count >= atomic_load_explicit(&pass->until, memory_order_relaxed)))
        return false;
    if (unlikely(atomic_load_explicit(&hot.captures, memory_order_relaxed) != 0))
        return false;
    __atomic_store_n(pass->word, count, __ATOMIC_RELEASE);
    return true;
}

Pass *nbgpu_own_pass(void) { return self.pass; }

/* A thread's word goes back when it ends; its count stays in the sum. */
static void give_word_back(void *mark) {
    nbgpu_pass_thread_ends(&nbgpu_pass[(uintptr_t)mark - 1]);
    self.pass = NULL;
    atomic_fetch_and(&words_taken[0], ~(1u << ((uintptr_t)mark - 1)));
    self.word = NULL;
}

static void forget_parent(void) {
    hot.gate = &never;
    hot.captures = 0;
    memset((void *)words_taken, 0, sizeof words_taken);
    self.word = NULL, self.pass = NULL, self.asked = false;
}

static void make_key(void) {
    pthread_key_create(&word_key, give_word_back);
    nbgpu_fork_hook(forget_parent);
}

static void take_word(NbgpuUseSlot *slot) {
    self.asked = true;
    pthread_once(&word_once, make_key);
    for (int i = 0; i < PASSES; i++) {
        if (atomic_fetch_or(&words_taken[0], 1u << i) & 1u << i)
            continue;
        pthread_setspecific(word_key, (void *)(uintptr_t)(i + 1));
        self.word = nbgpu_pass[i].word = &slot->launches_by_thread[i];
        self.pass = &nbgpu_pass[i];
        return;
    }
}

/* The gate of this process's kernel, or the one of all kernels without a limit of compute; NULL: none is in force. */
static const uint32_t *kernel_gate(int device) {
    const NbgpuCtlKernel *kernel = nbgpu_kernel_limit();
    const uint32_t *gate = NULL;
    if (kernel && (LOAD(kernel->compute_milli) || LOAD(kernel->gate[device]) == NBGPU_GATE_SUSPENDED))
        gate = &kernel->gate[device];
    else if (LOAD(nbgpu_ctl->kernels_limited))
        gate = &nbgpu_ctl->device[device].rest_gate;
    return gate && __atomic_load_n(gate, __ATOMIC_ACQUIRE) != NBGPU_GATE_NONE ? gate : NULL;
}

static bool kernel_gate_closed(int device) {
    const uint32_t *gate = kernel_gate(device);
    return gate && __atomic_load_n(gate, __ATOMIC_ACQUIRE) == NBGPU_GATE_CLOSED;
}

/* Let the fast path look at this device, if it is the only one and no gate of a kernel is in the way. */
static void arm(int device, NbgpuUseSlot *slot) {
    if (nbgpu_devices != 1)
        return;
    const uint64_t generation = __atomic_load_n(&nbgpu_ctl->generation, __ATOMIC_ACQUIRE);
    const bool plain = nbgpu_kernel_limit() == NULL && !LOAD(nbgpu_ctl->kernels_limited);
    hot.gate = plain ? &nbgpu_ctl->device[device].gate : &never;
    hot.generation = &nbgpu_ctl->generation;
    hot.seen = generation;
    if (!self.word && !self.asked)
        take_word(slot);
}

static void count_launch(NbgpuUseSlot *slot) {
    uint64_t now;
    if (self.word && nbgpu_devices == 1) {
        now = *self.word + 1;
        __atomic_store_n(self.word, now, __ATOMIC_RELAXED);
    } else {
        now = __atomic_add_fetch(&slot->launches, 1, __ATOMIC_RELAXED);
    }
    if ((now & 63) == 0 || now == 1)
        touch(slot, nbgpu_now_coarse());
}

/* ---- the three words of a device, from the slots of the slice ---- */

void nbgpu_ring(void) {
    __atomic_fetch_add(&nbgpu_use->bell, 1, __ATOMIC_SEQ_CST);
    futex(&nbgpu_use->bell, FUTEX_WAKE, 1 << 20, NULL);
}

void nbgpu_publish(int device) {
    uint32_t want, near, idle;
    for (int pass = 0; pass < 8; pass++) {
        want = 0, near = 1, idle = 1;
        const uint32_t high = nbgpu_use->high_water < NBGPU_SLOTS ? nbgpu_use->high_water : NBGPU_SLOTS;
        for (uint32_t i = 0; i < high; i++) {
            const NbgpuUseSlot *slot = &nbgpu_use->slot[i];
            if (LOAD(slot->device) != (uint32_t)device || !__atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST))
                continue;
            const bool busy = __atomic_load_n(&slot->busy_since, __ATOMIC_SEQ_CST) != 0,
                       wants = __atomic_load_n(&slot->want, __ATOMIC_SEQ_CST) != 0;
            want |= wants;
            if (busy && !__atomic_load_n(&slot->near, __ATOMIC_SEQ_CST))
                near = 0;
            if (busy || wants)
                idle = 0;
        }
        if (pass && LOAD(nbgpu_use->want[device]) == want && LOAD(nbgpu_use->near[device]) == near && LOAD(nbgpu_use->idle[device]) == idle)
            return;
        __atomic_store_n(&nbgpu_use->want[device], want, __ATOMIC_SEQ_CST);
        MARK("publish-half");
        __atomic_store_n(&nbgpu_use->near[device], near, __ATOMIC_SEQ_CST);
        __atomic_store_n(&nbgpu_use->idle[device], idle, __ATOMIC_SEQ_CST);
    }
}

static uint32_t gate_word(int device) { return __atomic_load_n(&nbgpu_ctl->device[device].gate, __ATOMIC_ACQUIRE); }

bool nbgpu_contended(int device) {
    return gate_word(device) != NBGPU_GATE_OPEN || __atomic_load_n(&nbgpu_ctl->device[device].turn_end_ns, __ATOMIC_ACQUIRE) != 0 ||
           kernel_gate(device) != NULL;
}

bool nbgpu_gate_closed(int device) { return gate_word(device) == NBGPU_GATE_CLOSED || kernel_gate_closed(device); }

bool nbgpu_turn_over(int device, uint64_t now) {
    const uint64_t end = __atomic_load_n(&nbgpu_ctl->device[device].turn_end_ns, __ATOMIC_ACQUIRE);
    return nbgpu_gate_closed(device) || (end != 0 && now >= end);
}

/* ---- waiting ---- */

bool nbgpu_scheduler_dead(uint64_t now) {
    const uint64_t beat = __atomic_load_n(&nbgpu_ctl->heartbeat_ns, __ATOMIC_ACQUIRE);
    return now > beat && now - beat > HEARTBEAT_NS;
}

static uint32_t gate_generation(int device) { return __atomic_load_n(&nbgpu_ctl->device[device].gate_generation, __ATOMIC_ACQUIRE); }

bool nbgpu_kernel_gated(int device) { return kernel_gate(device) != NULL; }

/* The turn is over and the gate not closed yet: the scheduler need not wake for that, it hears when the slice is done. */
bool nbgpu_turn_just_over(int device) {
    const uint64_t end = __atomic_load_n(&nbgpu_ctl->device[device].turn_end_ns, __ATOMIC_ACQUIRE);
    const uint64_t now = end ? nbgpu_now() : 0;
    return end && now >= end && now < end + TURN_LATE_NS;
}

/* The closed gate that stands in the way, NULL: none. */
static const uint32_t *in_the_way(int device, uint32_t *value) {
    *value = gate_word(device);
    if (*value == NBGPU_GATE_CLOSED || *value == NBGPU_GATE_SUSPENDED || (*value == NBGPU_GATE_OPEN && nbgpu_turn_just_over(device)))
        return &nbgpu_ctl->device[device].gate;
    const uint32_t *kernel = kernel_gate(device);
    if (!kernel)
        return NULL;
    *value = __atomic_load_n(kernel, __ATOMIC_ACQUIRE);
    return *value == NBGPU_GATE_CLOSED || *value == NBGPU_GATE_SUSPENDED ? kernel : NULL;
}

static uint32_t sharers_of(int device, const char *kernel_id) {
    uint32_t sharers = 0;
    for (uint32_t i = 0; i < nbgpu_use->high_water && i < NBGPU_SLOTS; i++) {
        const NbgpuUseSlot *slot = &nbgpu_use->slot[i];
        if (kernel_id && strncmp(slot->kernel_id, kernel_id, NBGPU_KERNEL_ID_BYTES) != 0)
            continue;
        sharers +=
            LOAD(slot->owner) && LOAD(slot->device) == (uint32_t)device && (LOAD(slot->busy_since) || slot == nbgpu_device[device].slot);
    }
    return sharers ? sharers : 1;
}

/* What this process may take of the device with no scheduler: its part of a strict slice, and of its kernel's limit. 1: it runs free. */
static double local_rate(int device) {
    const NbgpuCtlDevice *ctl = &nbgpu_ctl->device[device];
    const NbgpuCtlKernel *kernel = nbgpu_kernel_limit();
    const uint32_t limit = kernel ? LOAD(kernel->compute_milli) : 0;
    double rate = 1;
    if (ctl->mode == NBGPU_MODE_STRICT)
        rate = (double)ctl->compute_milli / 1000.0 / sharers_of(device, NULL);
    const double own = limit ? (double)limit / 1000.0 / sharers_of(device, kernel->id) : 1;
    return own < rate ? own : rate;
}

/* With no scheduler a strict slice and a limited kernel keep to their shares by themselves: time that their launches are estimated to
 * take, refilled at that rate. */
static void local_bucket(const Launch *launch) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static double tokens[NBGPU_DEVICES];
    static uint64_t filled[NBGPU_DEVICES];
    const int d = launch->device;
    const double most = 30.0 * (double)MS, rate = local_rate(d);
    if (rate >= 1)
        return;
    pthread_mutex_lock(&lock);
    const uint64_t now = nbgpu_now();
    if (filled[d])
        tokens[d] += (double)(now - filled[d]) * rate;
    if (tokens[d] > most)
        tokens[d] = most;
    filled[d] = now;
    tokens[d] -= launch->estimate_ns;
    double debt = rate > 0 && tokens[d] < 0 ? -tokens[d] / rate : 0;
    pthread_mutex_unlock(&lock);
    if (debt > 1e9)
        debt = 1e9; /* nothing waits for ever */
    const struct timespec pause = {(time_t)(debt / 1e9), (long)debt % 1000000000};
    if (debt >= 1)
        nanosleep(&pause, NULL);
}

/* False: its memory has been moved to the host meanwhile. */
static bool wait_turn(Launch *launch, NbgpuUseSlot *slot) {
    const int d = launch->device;
    const uint64_t start = nbgpu_now();
    const struct timespec limit = {0, GATE_WAIT_NS}, over = {0, TURN_OVER_NS};
    uint32_t value;
    const uint32_t *word;
    const bool was_dead = nbgpu_hold_slots();
    uint32_t asked = gate_generation(d);
    __atomic_fetch_add(&slot->want, 1, __ATOMIC_SEQ_CST);
    MARK("wanting");
    nbgpu_publish(d);
    if (was_dead || !__atomic_load_n(&slot->busy_since, __ATOMIC_SEQ_CST)) /* else the end of that rings, and is read with this */
        nbgpu_ring();
    bool dead = false;
    do { /* a gate that opens often is no leave to queue ever more: the window holds behind it too */
        while (!dead && (word = in_the_way(d, &value)) != NULL) {
            dead = nbgpu_scheduler_dead(nbgpu_now());
            if (dead) {
                local_bucket(launch);
            } else if (value == NBGPU_GATE_OPEN) {
                futex(word, FUTEX_WAIT, value, &over);
                asked = gate_generation(d);
            } else if (futex(word, FUTEX_WAIT, value, &limit) != 0 && in_the_way(d, &value)) {
                /* 20 ms: is there a scheduler? It need not hear again what it knows: unless it had to take us for dead, or gave us a turn
                 * for which we came too late. */
                const uint32_t was = asked;
                asked = gate_generation(d);
                if (nbgpu_hold_slots() || asked != was)
                    nbgpu_ring();
            }
        }
    } while (!dead && nbgpu_busy_wait_window(d) && in_the_way(d, &value));
    const bool begun = nbgpu_busy_begin(launch); /* busy before it stops wanting: the slice is never seen idle in between */
    MARK("granted");
    __atomic_fetch_sub(&slot->want, 1, __ATOMIC_SEQ_CST);
    nbgpu_publish(d);
    __atomic_fetch_add(&slot->stall_ns, nbgpu_now() - start, __ATOMIC_RELAXED);
    return begun;
}

static bool parked(int device) { return __atomic_load_n(&nbgpu_ctl->device[device].mem_limit, __ATOMIC_ACQUIRE) == 0; }

bool nbgpu_away(int device) {
    const NbgpuUseSlot *slot = nbgpu_device[device].slot;
    if (likely(LOAD(nbgpu_ctl->kernels_away) == 0) || !slot)
        return false;
    const uint64_t owner = LOAD(slot->owner), word = __atomic_load_n(&nbgpu_ctl->away[slot - nbgpu_use->slot], __ATOMIC_SEQ_CST);
    return word == owner || word == ~owner;
}

/* The kernel's memory was moved to the host (docs/idle.md). Not `want`: the slice's others need no turn for it. */
static void wait_for_memory(int device, NbgpuUseSlot *slot) {
    const struct timespec pause = {0, GATE_WAIT_NS};
    nbgpu_hold_slots();
    __atomic_fetch_add(&slot->wants_back, 1, __ATOMIC_SEQ_CST);
    MARK("wants-back");
    while (nbgpu_away(device))
        nanosleep(&pause, NULL);
    __atomic_fetch_sub(&slot->wants_back, 1, __ATOMIC_SEQ_CST);
}

/* A parked slice has a limit of 0 (docs/idle.md): who wants memory in it says so, and waits until the agent has brought it back. */
void nbgpu_wait_until_back(int device) {
    NbgpuUseSlot *slot = nbgpu_device[device].slot;
    const struct timespec pause = {0, GATE_WAIT_NS};
    if (unlikely(nbgpu_away(device)))
        wait_for_memory(device, slot);
    if (likely(!parked(device)) || !slot)
        return;
    nbgpu_hold_slots();
    __atomic_fetch_add(&slot->want, 1, __ATOMIC_SEQ_CST);
    nbgpu_publish(device);
    nbgpu_ring();
    while (parked(device))
        nanosleep(&pause, NULL);
    __atomic_fetch_sub(&slot->want, 1, __ATOMIC_SEQ_CST);
    nbgpu_publish(device);
}

/* Before a call into the driver, which would not return: nobody could see there that the slice is wanted. */
void nbgpu_wait_in_parked(void) {
    for (int d = 0; d < nbgpu_devices; d++)
        nbgpu_wait_until_back(d);
}

bool nbgpu_capturing(CUstream stream, bool ptsz) {
    int status = 0;
    if (likely(hot.captures == 0))
        return false;
    if (ptsz && HAVE(cuStreamIsCapturing_ptsz))
        return REAL(cuStreamIsCapturing_ptsz)(stream, &status) == CUDA_SUCCESS && status;
    return HAVE(cuStreamIsCapturing) && REAL(cuStreamIsCapturing)(stream, &status) == CUDA_SUCCESS && status;
}

/* The slot is busy for this launch from here on. False: its memory was moved to the host while it came here. */
static bool admit(Launch *launch, NbgpuUseSlot *slot) {
    uint32_t value;
    nbgpu_busy_wait_window(launch->device);
    const uint64_t now = nbgpu_now();
    touch(slot, now);
    if (in_the_way(launch->device, &value))
        return wait_turn(launch, slot);
    if (nbgpu_scheduler_dead(now))
        local_bucket(launch);
    return nbgpu_busy_begin(launch);
}

static CUresult begin(Launch *launch, CUstream stream, bool ptsz, CUgraphExec exec) {
    *launch = (Launch){.stream = stream, .ptsz = ptsz, .exec = exec, .device = -1};
    if (nbgpu_capturing(stream, ptsz))
        return CUDA_SUCCESS;
    const int d = nbgpu_stream_device(stream);
    NbgpuUseSlot *slot = d >= 0 ? nbgpu_slot(d) : NULL;
    if (!slot)
        return CUDA_SUCCESS;
    launch->device = d;
    arm(d, slot);
    if (exec && nbgpu_graph_charge(exec, d) != CUDA_SUCCESS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (gate_word(d) == NBGPU_GATE_NONE && !kernel_gate(d))
        return CUDA_SUCCESS;
    launch->gated = true;
    launch->estimate_ns = nbgpu_busy_estimate(d, exec);
    while (unlikely(!admit(launch, slot)))
        nbgpu_wait_until_back(d);
    MARK("launch-admitted");
    return CUDA_SUCCESS;
}

static CUresult end(const Launch *launch, CUresult result) {
    if (launch->device < 0)
        return result;
    if (result == CUDA_SUCCESS)
        count_launch(nbgpu_device[launch->device].slot);
    if (launch->gated)
        nbgpu_busy_submitted(launch, result == CUDA_SUCCESS);
    MARK("launch-submitted");
    if (launch->exec)
        nbgpu_graph_settle(launch->device);
    return result;
}

/* Other work than launches (copies.c): `kind` is what its duration is learnt by, as a graph's is. */
CUresult nbgpu_work_begin(Launch *work, CUstream stream, bool ptsz, CUgraphExec kind) { return begin(work, stream, ptsz, kind); }

CUresult nbgpu_work_end(const Launch *work, CUresult result) {
    if (work->gated)
        nbgpu_busy_submitted(work, result == CUDA_SUCCESS);
    return result;
}

/* The fast way and the slower ones are functions of their own, so that the fastest jumps to the driver and moves no argument. */
#define SLOW(name, arguments, stream, ptsz, exec, ...)                                                                                     \
    static __attribute__((noinline, used)) CUresult slow_##name arguments {                                                                \
        ENTER_CUDA(name, __VA_ARGS__);                                                                                                     \
        Launch launch;                                                                                                                     \
        const CUresult admitted = begin(&launch, stream, ptsz, exec);                                                                      \
        return admitted == CUDA_SUCCESS ? end(&launch, REAL(name)(__VA_ARGS__)) : admitted;                                                \
    }                                                                                                                                      \
    static __attribute__((noinline, used)) CUresult gated_##name arguments {                                                               \
        if (likely(!(exec) && !(ptsz) && by_pass(stream)))                                                                                 \
            return REAL(name)(__VA_ARGS__);                                                                                                \
        return slow_##name(__VA_ARGS__);                                                                                                   \
    }
#define LAUNCH(name, arguments, stream, ptsz, exec, ...)                                                                                   \
    SLOW(name, arguments, stream, ptsz, exec, __VA_ARGS__)                                                                                 \
    CUresult name arguments {                                                                                                              \
        if (likely(!(exec) && fast()))                                                                                                     \
            return REAL(name)(__VA_ARGS__);                                                                                                \
        return gated_##name(__VA_ARGS__);                                                                                                  \
    }

/* Many arguments: compilers copy those on the stack before a jump. Named with the six in registers only, the function leaves the
 * others where the caller put them, and the jump finds them there. Holds only while the compiler makes a jump of the return: clang
 * promises that, gcc does so whenever it optimises. */
#if defined(__clang__)
#define JUMP __attribute__((musttail)) return
#define NO_PROTECTOR __attribute__((no_stack_protector))
#else
#define JUMP return
#define NO_PROTECTOR __attribute__((optimize("no-stack-protector")))
#endif
#if defined(__x86_64__) && defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
typedef CUresult (*Registers)(void *, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
#define LAUNCH_MANY(name, arguments, stream, ptsz, exec, ...)                                                                              \
    SLOW(name, arguments, stream, ptsz, exec, __VA_ARGS__)                                                                                 \
    EXPORT CUresult jump_##name(void *a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) __asm__(#name);                       \
    NO_PROTECTOR CUresult jump_##name(void *a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {                               \
        const Registers to = likely(fast()) ? (Registers)nbgpu_real[F_##name] : (Registers)(void *)gated_##name;                           \
        JUMP to(a, b, c, d, e, f);                                                                                                         \
    }
#else
#define LAUNCH_MANY LAUNCH
#endif

#define DIMENSIONS unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream
#define LAUNCHES(suffix, ptsz)                                                                                                             \
    LAUNCH_MANY(cuLaunchKernel##suffix, (CUfunction function, DIMENSIONS, void **parameters, void **extra), stream, ptsz, NULL, function,  \
                gx, gy, gz, bx, by, bz, shared, stream, parameters, extra)                                                                 \
    LAUNCH(cuLaunchKernelEx##suffix, (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra),                 \
           config ? config->hStream : NULL, ptsz, NULL, config, function, parameters, extra)                                               \
    LAUNCH_MANY(cuLaunchCooperativeKernel##suffix, (CUfunction function, DIMENSIONS, void **parameters), stream, ptsz, NULL, function, gx, \
                gy, gz, bx, by, bz, shared, stream, parameters)                                                                            \
    LAUNCH(cuGraphLaunch##suffix, (CUgraphExec exec, CUstream stream), stream, ptsz, exec, exec, stream)
LAUNCHES(, false)
LAUNCHES(_ptsz, true)
LAUNCH(cuLaunchCooperativeKernelMultiDevice, (CUDA_LAUNCH_PARAMS * list, unsigned count, unsigned flags),
       list &&count ? list->hStream : NULL, false, NULL, list, count, flags) /* by the first of its devices */
LAUNCH(cuLaunch, (CUfunction function), NULL, false, NULL, function)
LAUNCH(cuLaunchGrid, (CUfunction function, int width, int height), NULL, false, NULL, function, width, height)
LAUNCH(cuLaunchGridAsync, (CUfunction function, int width, int height, CUstream stream), stream, false, NULL, function, width, height,
       stream)

void nbgpu_gate_forget_graph(CUgraphExec exec) { nbgpu_busy_forget_graph(exec); }

/* ---- calls that show an idle edge for free ---- */

static void synced(int device, bool all, CUstream stream, bool ptsz, uint64_t before) {
    nbgpu_pools_after_sync();
    if (device < 0)
        return;
    NbgpuUseSlot *slot = nbgpu_device[device].slot;
    if (!slot)
        return;
    if (gate_word(device) == NBGPU_GATE_NONE)
        touch(slot, nbgpu_now_coarse());
    nbgpu_busy_synced(device, all, stream, ptsz, before);
}

#define SYNC(name, all, stream, ptsz, ...)                                                                                                 \
    ENTER_CUDA(name, ##__VA_ARGS__);                                                                                                       \
    const int d = nbgpu_stream_device(stream);                                                                                             \
    const uint64_t before = d >= 0 ? nbgpu_busy_launches(d) : 0;                                                                           \
    const CUresult result = REAL(name)(__VA_ARGS__);                                                                                       \
    if (result == CUDA_SUCCESS)                                                                                                            \
        synced(d, all, stream, ptsz, before);                                                                                              \
    return result

CUresult cuCtxSynchronize(void) { SYNC(cuCtxSynchronize, true, NULL, false); }
CUresult cuCtxSynchronize_v2(CUcontext context) {
    ENTER_CUDA(cuCtxSynchronize_v2, context);
    const CUresult result = REAL(cuCtxSynchronize_v2)(context); /* not the current one, perhaps: the fences will tell */
    if (result == CUDA_SUCCESS)
        nbgpu_pools_after_sync();
    return result;
}
CUresult cuStreamSynchronize(CUstream stream) { SYNC(cuStreamSynchronize, false, stream, false, stream); }
CUresult cuStreamSynchronize_ptsz(CUstream stream) { SYNC(cuStreamSynchronize_ptsz, false, stream, true, stream); }

/* ---- streams that end or are captured ---- */

#define GONE(name)                                                                                                                         \
    ENTER_CUDA(name, stream);                                                                                                              \
    nbgpu_busy_stream_gone(stream);                                                                                                        \
    return REAL(name)(stream)
CUresult cuStreamDestroy(CUstream stream) { GONE(cuStreamDestroy); }
CUresult cuStreamDestroy_v2(CUstream stream) { GONE(cuStreamDestroy_v2); }

/* Counted before the call: a launch of another thread must not slip between. */
#define BEGIN_CAPTURE(name, ...)                                                                                                           \
    ENTER_CUDA(name, __VA_ARGS__);                                                                                                         \
    hot.captures++;                                                                                                                        \
    nbgpu_busy_stream_gone(stream);                                                                                                        \
    const CUresult result = REAL(name)(__VA_ARGS__);                                                                                       \
    if (result != CUDA_SUCCESS)                                                                                                            \
        hot.captures--;                                                                                                                    \
    return result

CUresult cuStreamBeginCapture(CUstream stream) { BEGIN_CAPTURE(cuStreamBeginCapture, stream); }
CUresult cuStreamBeginCapture_ptsz(CUstream stream) { BEGIN_CAPTURE(cuStreamBeginCapture_ptsz, stream); }
CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) { BEGIN_CAPTURE(cuStreamBeginCapture_v2, stream, mode); }
CUresult cuStreamBeginCapture_v2_ptsz(CUstream stream, int mode) { BEGIN_CAPTURE(cuStreamBeginCapture_v2_ptsz, stream, mode); }
CUresult cuStreamBeginCaptureToGraph(CUstream stream, CUgraph graph, const CUgraphNode *nodes, const CUgraphEdgeData *edges, size_t count,
                                     int mode) {
    BEGIN_CAPTURE(cuStreamBeginCaptureToGraph, stream, graph, nodes, edges, count, mode);
}
CUresult cuStreamBeginCaptureToGraph_ptsz(CUstream stream, CUgraph graph, const CUgraphNode *nodes, const CUgraphEdgeData *edges,
                                          size_t count, int mode) {
    BEGIN_CAPTURE(cuStreamBeginCaptureToGraph_ptsz, stream, graph, nodes, edges, count, mode);
}
CUresult cuStreamBeginRecaptureToGraph(CUstream stream, int mode, CUgraph graph, void *callback, void *data) {
    BEGIN_CAPTURE(cuStreamBeginRecaptureToGraph, stream, mode, graph, callback, data);
}
CUresult cuStreamBeginRecaptureToGraph_ptsz(CUstream stream, int mode, CUgraph graph, void *callback, void *data) {
    BEGIN_CAPTURE(cuStreamBeginRecaptureToGraph_ptsz, stream, mode, graph, callback, data);
}

bool nbgpu_any_capture(void) { return hot.captures != 0; }

/* Over only when this stream was being captured and is no longer: an end in the wrong place ends nothing. */
#define END_CAPTURE(name, is_capturing)                                                                                                    \
    ENTER_CUDA(name, stream, graph);                                                                                                       \
    int was = 1, is = 0;                                                                                                                   \
    if (HAVE(is_capturing))                                                                                                                \
        REAL(is_capturing)(stream, &was);                                                                                                  \
    const CUresult result = REAL(name)(stream, graph);                                                                                     \
    if (HAVE(is_capturing))                                                                                                                \
        REAL(is_capturing)(stream, &is);                                                                                                   \
    if (was && !is && hot.captures > 0)                                                                                                    \
        hot.captures--;                                                                                                                    \
    return result

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) { END_CAPTURE(cuStreamEndCapture, cuStreamIsCapturing); }
CUresult cuStreamEndCapture_ptsz(CUstream stream, CUgraph *graph) { END_CAPTURE(cuStreamEndCapture_ptsz, cuStreamIsCapturing_ptsz); }
