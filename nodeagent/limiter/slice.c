/* The slice of this process: its two files, the process's slots in them, and who else is alive there. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "limiter.h"

#define CONTAINER_DIR "/run/nbgpu/slice"
#define FORK_HOOKS 8
#define DESCRIPTOR_FROM 700 /* out of the way of programs that expect their next descriptor to be 3 */

_Atomic int nbgpu_ready;
const NbgpuCtl *nbgpu_ctl;
NbgpuUse *nbgpu_use;
Device nbgpu_device[NBGPU_DEVICES];
int nbgpu_devices;

static _Atomic int state;
static pthread_mutex_t attach_lock = PTHREAD_MUTEX_INITIALIZER, slots_lock = PTHREAD_MUTEX_INITIALIZER;
static char directory[256];
static int use_fd = -1;
static dev_t use_dev;
static ino_t use_ino;
static uint64_t own_word, own_start;
static char kernel_id[NBGPU_KERNEL_ID_BYTES];
static void (*fork_hooks[FORK_HOOKS])(void);
static _Atomic int fork_hook_count;

uint64_t nbgpu_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t nbgpu_now_coarse(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static ssize_t read_all(const char *path, char *buffer, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t have = 0, n;
    while ((size_t)have < size - 1 && (n = read(fd, buffer + have, size - 1 - (size_t)have)) != 0) {
        if (n < 0 && errno != EINTR)
            break;
        if (n > 0)
            have += n;
    }
    close(fd);
    buffer[have] = 0;
    return have;
}

/* Start time of a process in clock ticks, 0 = no such process, or dead and only not yet waited for by its parent. */
static uint64_t start_time(uint32_t pid) {
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    if (read_all(path, text, sizeof text) <= 0)
        return 0;
    char *field = strrchr(text, ')'), state = field ? field[2] : 0; /* the name may hold anything */
    unsigned long threads = 2;
    for (int i = 2; field && i < 22; i++) {
        field = strchr(field + 1, ' ');
        if (field && i == 19)
            threads = strtoul(field + 1, NULL, 10);
    }
    if (state == 'X' || (state == 'Z' && threads < 2)) /* with more, only the first thread has ended */
        return 0;
    return field ? strtoull(field + 1, NULL, 10) : 0;
}

/* The owner word names one process, not a number that will be used again. */
static uint64_t owner_word(uint32_t pid, uint64_t start) { return (uint64_t)pid << 32 | ((uint32_t)start << 1 | 1); }

static void find_kernel_id(void) {
    memset(kernel_id, 0, sizeof kernel_id);
    const char *named = getenv("NBGPU_KERNEL_ID");
    if (named) {
        strncpy(kernel_id, named, sizeof kernel_id - 1);
        return;
    }
    char line[8192];
    ssize_t size = read_all("/proc/self/cmdline", line, sizeof line);
    for (char *word = line; size > 0 && word < line + size; word += strlen(word) + 1) {
        const char *base = strrchr(word, '/');
        base = base ? base + 1 : word;
        const char *end = strstr(base, ".json");
        if (strncmp(base, "kernel-", 7) != 0 || !end || end[5] || end - base - 7 >= (long)sizeof kernel_id)
            continue;
        memcpy(kernel_id, base + 7, (size_t)(end - base - 7));
        return;
    }
}

static void *map_file(const char *name, size_t size, int flags, int protection, int *keep) {
    char path[300];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, flags | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return NULL;
    struct stat status;
    void *map = MAP_FAILED;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && (uint64_t)status.st_size >= size)
        map = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    if (map != MAP_FAILED && keep) {
        *keep = fcntl(fd, F_DUPFD_CLOEXEC, DESCRIPTOR_FROM);
        if (*keep < 0)
            *keep = fcntl(fd, F_DUPFD_CLOEXEC, 64);
        if (*keep < 0)
            *keep = dup(fd);
        use_dev = status.st_dev, use_ino = status.st_ino;
    }
    close(fd); /* before any record lock is taken: closing drops them */
    return map == MAP_FAILED ? NULL : map;
}

static int attach_files(void) {
    nbgpu_ctl = map_file("ctl", sizeof(NbgpuCtl), O_RDONLY, PROT_READ, NULL);
    if (!nbgpu_ctl)
        return SLICE_BROKEN;
    if (nbgpu_ctl->magic != NBGPU_CTL_MAGIC || nbgpu_ctl->version < NBGPU_VERSION)
        return SLICE_BROKEN;
    nbgpu_use = map_file("use", sizeof(NbgpuUse), O_RDWR, PROT_READ | PROT_WRITE, &use_fd);
    if (!nbgpu_use || use_fd < 0 || nbgpu_use->magic != NBGPU_USE_MAGIC)
        return SLICE_BROKEN;
    for (nbgpu_devices = 0; nbgpu_devices < (int)NBGPU_DEVICES && nbgpu_ctl->device[nbgpu_devices].uuid[0];)
        nbgpu_devices++;
    const uint32_t pid = (uint32_t)getpid();
    own_start = start_time(pid);
    own_word = owner_word(pid, own_start);
    find_kernel_id();
    return SLICE_ACTIVE;
}

/* The child of a fork owns nothing of its parent's: it begins as if it had just started. */
static void after_fork(void) {
    pthread_mutex_init(&attach_lock, NULL);
    pthread_mutex_init(&slots_lock, NULL);
    nbgpu_ready = 0;
    if (state == SLICE_NONE)
        return;
    if (nbgpu_use)
        munmap(nbgpu_use, sizeof *nbgpu_use);
    if (nbgpu_ctl)
        munmap((void *)nbgpu_ctl, sizeof *nbgpu_ctl);
    if (use_fd >= 0)
        close(use_fd);
    nbgpu_use = NULL, nbgpu_ctl = NULL, use_fd = -1;
    for (int d = 0; d < (int)NBGPU_DEVICES; d++) {
        nbgpu_device[d].slot = NULL;
        nbgpu_device[d].primary_counted = false;
        nbgpu_device[d].contexts = 0;
    }
    for (int i = 0; i < fork_hook_count; i++)
        fork_hooks[i]();
    state = SLICE_UNKNOWN;
}

int nbgpu_fork_hook(void (*child)(void)) {
    if (fork_hook_count == FORK_HOOKS)
        return -1;
    fork_hooks[fork_hook_count] = child;
    return fork_hook_count++;
}

int nbgpu_attach(void) {
    if (likely(state != SLICE_UNKNOWN))
        return state;
    pthread_mutex_lock(&attach_lock);
    if (state == SLICE_UNKNOWN) {
        static bool fork_seen;
        const char *named = NULL;
        int now = SLICE_NONE;
        if (!getauxval(AT_SECURE)) {
            if (access(CONTAINER_DIR, F_OK) == 0)
                named = CONTAINER_DIR; /* where a container's slice is fixed, the environment does not name another */
            else
                named = getenv("NBGPU_SLICE_DIR");
        }
        if (named && *named) {
            snprintf(directory, sizeof directory, "%s", named);
            now = strlen(named) < sizeof directory ? attach_files() : SLICE_BROKEN;
            if (!fork_seen)
                pthread_atfork(NULL, NULL, after_fork);
            fork_seen = true;
        }
        state = now;
    }
    pthread_mutex_unlock(&attach_lock);
    return state;
}

/* ---- slots ---- */

static bool use_fd_is_ours(void) {
    struct stat status;
    return use_fd >= 0 && fstat(use_fd, &status) == 0 && status.st_dev == use_dev && status.st_ino == use_ino;
}

static bool byte_lock(uint32_t slot, short type, int command, struct flock *answer) {
    struct flock lock = {
        .l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)(offsetof(NbgpuUse, slot) + slot * sizeof(NbgpuUseSlot)), .l_len = 1};
    int result;
    while ((result = fcntl(use_fd, command, &lock)) < 0 && errno == EINTR) {
    }
    if (answer)
        *answer = lock;
    return result == 0;
}

/* A program may have closed every descriptor (and so our locks, and our way to ask): open again and take the locks anew. */
static bool restore_descriptor(void) {
    if (use_fd_is_ours())
        return true;
    char path[300];
    snprintf(path, sizeof path, "%s/use", directory);
    int low = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (low < 0)
        return false;
    use_fd = fcntl(low, F_DUPFD_CLOEXEC, DESCRIPTOR_FROM);
    if (use_fd < 0)
        use_fd = low;
    else
        close(low);
    if (!use_fd_is_ours())
        return false;
    for (uint32_t i = 0; i < NBGPU_SLOTS; i++)
        if (nbgpu_use->slot[i].owner == own_word)
            byte_lock(i, F_WRLCK, F_SETLK, NULL);
    return true;
}

/* Locked, or the very process that took it still exists: a free lock alone is not death. */
static bool slot_alive(uint32_t i, uint64_t owner) {
    struct flock lock;
    if (owner == own_word)
        return true;
    if (byte_lock(i, F_WRLCK, F_GETLK, &lock) && lock.l_type != F_UNLCK)
        return true;
    const uint32_t pid = (uint32_t)(owner >> 32);
    const uint64_t start = start_time(pid);
    return start != 0 && owner_word(pid, start) == owner;
}

/* Whether this process has the lock. One's own is seen only by asking as an open file description, which is somebody else; where there are
 * none of those nobody can tell, and it counts as lost. */
static bool holds_lock(uint32_t slot) {
    struct flock lock;
    return byte_lock(slot, F_WRLCK, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK && lock.l_pid == getpid();
}

/* The locks of this process' slots, if the program lost them (by closing a descriptor of the file): who has none is dead to the scheduler.
 * Returns whether any was lost. */
bool nbgpu_hold_slots(void) {
    bool lost = false;
    pthread_mutex_lock(&slots_lock);
    if (!use_fd_is_ours())
        lost = true;
    if (restore_descriptor())
        for (int d = 0; d < nbgpu_devices; d++) {
            if (!nbgpu_device[d].slot)
                continue;
            const uint32_t slot = (uint32_t)(nbgpu_device[d].slot - nbgpu_use->slot);
            if (holds_lock(slot))
                continue;
            lost = true;
            byte_lock(slot, F_WRLCK, F_SETLK, NULL);
        }
    pthread_mutex_unlock(&slots_lock);
    return lost;
}

/* With the byte's lock held by us: nobody else reaps or claims it. Numbers first, owner last: dying here leaves a dead slot. */
static void clear_slot(NbgpuUseSlot *slot) {
    __atomic_store_n(&slot->shares, 0, __ATOMIC_SEQ_CST); /* what it covered counts for who holds it, before its `used` is gone */
    __atomic_store_n(&slot->used, 0, __ATOMIC_SEQ_CST);
    MARK("reap-half");
    __atomic_store_n(&slot->context, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&slot->want, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&slot->wants_back, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&slot->busy_since, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&slot->ready, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&slot->owner, 0, __ATOMIC_SEQ_CST);
}

static int reap_locked(void) {
    int reaped = 0;
    if (!restore_descriptor())
        return 0;
    const uint32_t high = nbgpu_use->high_water < NBGPU_SLOTS ? nbgpu_use->high_water : NBGPU_SLOTS;
    for (uint32_t i = 0; i < high; i++) {
        NbgpuUseSlot *slot = &nbgpu_use->slot[i];
        const uint64_t owner = __atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST);
        if (owner == 0 || owner == own_word || slot_alive(i, owner))
            continue;
        if (!byte_lock(i, F_WRLCK, F_SETLK, NULL))
            continue; /* somebody else is at it */
        MARK("reap-locked");
        if (__atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST) == owner) {
            clear_slot(slot);
            reaped++;
        }
        byte_lock(i, F_UNLCK, F_SETLK, NULL);
    }
    return reaped;
}

int nbgpu_reap(void) {
    pthread_mutex_lock(&slots_lock);
    int reaped = reap_locked();
    pthread_mutex_unlock(&slots_lock);
    return reaped;
}

static void raise_high_water(uint32_t to) {
    uint32_t high = __atomic_load_n(&nbgpu_use->high_water, __ATOMIC_SEQ_CST);
    while (high < to && !__atomic_compare_exchange_n(&nbgpu_use->high_water, &high, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
}

/* The lock first, the owner after it: an owned slot whose lock is free belongs to the dead. */
static NbgpuUseSlot *claim(uint32_t i, int device) {
    NbgpuUseSlot *slot = &nbgpu_use->slot[i];
    uint64_t none = 0;
    if (__atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST) != 0 || !byte_lock(i, F_WRLCK, F_SETLK, NULL))
        return NULL;
    MARK("claim-locked");
    if (__atomic_load_n(&slot->owner, __ATOMIC_SEQ_CST) != 0) {
        byte_lock(i, F_UNLCK, F_SETLK, NULL);
        return NULL;
    }
    memset((char *)slot + offsetof(NbgpuUseSlot, start_time), 0, sizeof *slot - offsetof(NbgpuUseSlot, start_time));
    slot->start_time = own_start;
    slot->device = (uint32_t)device;
    memcpy(slot->kernel_id, kernel_id, sizeof slot->kernel_id);
    raise_high_water(i + 1);
    MARK("claim-filled");
    if (!__atomic_compare_exchange_n(&slot->owner, &none, own_word, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return NULL;
    MARK("claim-owned");
    __atomic_store_n(&slot->ready, 1, __ATOMIC_SEQ_CST);
    return slot;
}

NbgpuUseSlot *nbgpu_slot(int device) {
    NbgpuUseSlot *slot = nbgpu_device[device].slot;
    if (likely(slot != NULL))
        return slot;
    pthread_mutex_lock(&slots_lock);
    slot = nbgpu_device[device].slot;
    if (!slot && restore_descriptor()) {
        reap_locked(); /* a new process tidies up: every look at the sum is shorter for it */
        for (uint32_t i = 0; i < NBGPU_SLOTS && !slot; i++)
            slot = claim(i, device);
    }
    nbgpu_device[device].slot = slot;
    pthread_mutex_unlock(&slots_lock);
    return slot;
}

/* ---- this kernel's own limits ---- */

const NbgpuCtlKernel *nbgpu_kernel_limit(void) {
    static _Atomic uint64_t seen = ~(uint64_t)0;
    static _Atomic int index = -1;
    if (!kernel_id[0])
        return NULL;
    const uint64_t generation = __atomic_load_n(&nbgpu_ctl->generation, __ATOMIC_ACQUIRE);
    if (unlikely(seen != generation)) {
        int found = -1;
        for (int i = 0; i < (int)NBGPU_KERNELS && found < 0; i++)
            if (strncmp(nbgpu_ctl->kernel[i].id, kernel_id, sizeof kernel_id) == 0)
                found = i;
        index = found;
        seen = generation;
    }
    return index < 0 ? NULL : &nbgpu_ctl->kernel[index];
}

#ifdef NBGPU_MARKS
#include <signal.h>
#include <sys/syscall.h>

/* NBGPU_MARK=name:n ends this process by SIGKILL when it passes the marked point for the n-th time. */
void nbgpu_mark(const char *name) {
    static char wanted[64];
    static _Atomic int left = -1;
    if (left < 0) {
        const char *text = getenv("NBGPU_MARK");
        const char *colon = text ? strrchr(text, ':') : NULL;
        if (colon && colon - text < (long)sizeof wanted)
            memcpy(wanted, text, (size_t)(colon - text));
        left = colon ? atoi(colon + 1) : 0;
    }
    if (left > 0 && strcmp(name, wanted) == 0 && --left == 0)
        kill((pid_t)syscall(SYS_getpid), SIGKILL);
}
#endif
