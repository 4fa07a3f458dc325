/* Memory limits of cgroups: sim_group.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "nbgpu_fault.h"
#include "sim_state.h"

#define CGROUP2_MAGIC 0x63677270

_Static_assert(SIM_DEVICES == 16, "sim_group.h says 16");

bool sim_limits_supported(const struct sim_machine *m) { return m->driver_version >= SIM_LIMITS_SINCE; }

static bool own_root(const struct sim_machine *m) { return strcmp(m->cgroup_root, SIM_CGROUP_ROOT) != 0; }

/* ---- where a process is ------------------------------------------------------------------------------------------------ */

/* The calling process's cgroup v2 as /proc has it: "/user.slice/…". On a machine with a root of its own, a process may say. */
static bool read_path(const struct sim_machine *m, char *out, size_t room) {
    const char *said = own_root(m) ? getenv("NBGPU_SIM_CGROUP") : NULL;
    if (said) {
        snprintf(out, room, "%s", said);
        return true;
    }
    char text[4096];
    int fd = open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return false;
    text[n] = 0;
    const char *at = strncmp(text, "0::", 3) == 0 ? text : strstr(text, "\n0::");
    if (!at)
        return false;
    at = strchr(at, '/');
    snprintf(out, room, "%.*s", (int)strcspn(at ? at : "", "\n"), at ? at : "");
    return true;
}

static uint64_t id_of(const char *directory) {
    struct stat status;
    return stat(directory, &status) == 0 && S_ISDIR(status.st_mode) ? (uint64_t)status.st_ino : 0;
}

/* The ids of a directory below the root and of those above it, the root's last; how many. */
static unsigned chain_of(const struct sim_machine *m, const char *path, uint64_t ids[SIM_GROUP_DEPTH]) {
    char directory[2 * SIM_PATH_BYTES];
    size_t root = strlen(m->cgroup_root);
    unsigned n = 0;
    if (snprintf(directory, sizeof directory, "%s%s", m->cgroup_root, path) >= (int)sizeof directory)
        return 0;
    for (;;) {
        uint64_t id = id_of(directory);
        if (id && n < SIM_GROUP_DEPTH)
            ids[n++] = id;
        char *last = strrchr(directory, '/');
        if (strlen(directory) <= root || !last || last < directory + root)
            return n;
        *last = 0;
    }
}

void sim_member_update(struct sim *sim, int client, bool begins) {
    static char seen[SIM_PATH_BYTES];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char path[SIM_PATH_BYTES];
    uint64_t ids[SIM_GROUP_DEPTH] = {0};
    if (!sim_limits_supported(sim->m) || !read_path(sim->m, path, sizeof path))
        return;
    pthread_mutex_lock(&lock);
    if (begins || strcmp(path, seen) != 0) {
        chain_of(sim->m, path, ids);
        for (unsigned i = 0; i < SIM_GROUP_DEPTH; i++)
            atomic_store_explicit(&sim->m->member[client].id[i], ids[i], memory_order_relaxed);
        memcpy(seen, path, sizeof seen);
    }
    pthread_mutex_unlock(&lock);
}

/* ---- limits ------------------------------------------------------------------------------------------------------------ */

static int group_at(struct sim_machine *m, uint64_t id) {
    for (unsigned g = 0; g < atomic_load(&m->groups); g++)
        if (atomic_load(&m->group[g].id) == id)
            return (int)g;
    return -1;
}

static bool limited(struct sim_machine *m, int g, unsigned d) {
    return g >= 0 && (atomic_load(&m->group[g].hard[d]) != SIM_NO_LIMIT || atomic_load(&m->group[g].soft[d]));
}

/* The nearest of them with a limit on the device, or -1. */
static int governing(struct sim_machine *m, const uint64_t ids[SIM_GROUP_DEPTH], unsigned d) {
    for (unsigned i = 0; i < SIM_GROUP_DEPTH && ids[i]; i++) {
        int g = group_at(m, ids[i]);
        if (limited(m, g, d))
            return g;
    }
    return -1;
}

static void ids_of(struct sim_machine *m, int client, uint64_t ids[SIM_GROUP_DEPTH]) {
    for (unsigned i = 0; i < SIM_GROUP_DEPTH; i++)
        ids[i] = atomic_load_explicit(&m->member[client].id[i], memory_order_relaxed);
}

/* What counts for a group, or, where it has no limit, what the processes in it and below hold. */
static uint64_t used_by(struct sim_machine *m, int g, uint64_t id, unsigned d) {
    uint64_t used = 0, ids[SIM_GROUP_DEPTH];
    for (int c = 0; c < SIM_CLIENTS; c++) {
        uint64_t held = sim_client_bytes(m, c, d), managed = atomic_load(&m->checkpoint[c].managed[d]);
        if (atomic_load(&m->client[c].state) == SIM_CLIENT_FREE || held <= managed)
            continue;
        ids_of(m, c, ids);
        bool in = g >= 0 && governing(m, ids, d) == g;
        for (unsigned i = 0; g < 0 && i < SIM_GROUP_DEPTH && ids[i]; i++)
            in |= ids[i] == id;
        if (in)
            used += held - managed;
    }
    return used;
}

bool sim_group_fits(struct sim_machine *m, int client, unsigned d, uint64_t bytes) {
    uint64_t ids[SIM_GROUP_DEPTH];
    if (!sim_limits_supported(m) || atomic_load(&m->groups) == 0)
        return true;
    ids_of(m, client, ids);
    int g = governing(m, ids, d);
    uint64_t hard = g < 0 ? SIM_NO_LIMIT : atomic_load(&m->group[g].hard[d]);
    if (hard == SIM_NO_LIMIT)
        return true;
    uint64_t used = used_by(m, g, 0, d);
    return bytes <= hard && used <= hard - bytes;
}

static void read_limits(struct sim_machine *m, int g, uint64_t id, unsigned d, struct sim_limits *out) {
    *out = (struct sim_limits){.hard = SIM_NO_LIMIT, .used = used_by(m, g, id, d)};
    if (g >= 0) {
        out->soft = atomic_load(&m->group[g].soft[d]);
        out->hard = atomic_load(&m->group[g].hard[d]);
    }
}

bool sim_group_here(struct sim *sim, unsigned d, struct sim_limits *limits) {
    char path[SIM_PATH_BYTES];
    uint64_t ids[SIM_GROUP_DEPTH] = {0};
    if (!sim_limits_supported(sim->m) || atomic_load(&sim->m->groups) == 0 || !read_path(sim->m, path, sizeof path))
        return false;
    chain_of(sim->m, path, ids);
    int g = governing(sim->m, ids, d);
    if (g < 0)
        return false;
    sim_lock(sim, d);
    read_limits(sim->m, g, 0, d, limits);
    sim_unlock(sim, d);
    return limits->hard != SIM_NO_LIMIT;
}

/* ---- NVML's questions -------------------------------------------------------------------------------------------------- */

/* The part of a full path behind the root, of a directory that is there. */
static int below_root(const struct sim_machine *m, const char *path, const char **below) {
    struct statfs fs;
    size_t root = strlen(m->cgroup_root);
    if (!own_root(m) && (statfs(m->cgroup_root, &fs) || fs.f_type != CGROUP2_MAGIC))
        return -ENOTSUP;
    if (strncmp(path, m->cgroup_root, root) != 0 || (path[root] && path[root] != '/') || strlen(path) >= SIM_PATH_BYTES ||
        strstr(path, "/.."))
        return -EINVAL;
    *below = path + root;
    size_t rest = strspn(*below, "/");
    return !(*below)[rest] || !id_of(path) ? -ENOENT : 0; /* the root itself has no limits */
}

/* An entry for the directory; one whose cgroup has gone is used again. With the machine's table locked. */
static int entry_for(struct sim_machine *m, const char *path, uint64_t id) {
    unsigned used = atomic_load(&m->groups);
    int g = group_at(m, id);
    for (unsigned i = 0; i < used && g < 0; i++)
        if (id_of(m->group[i].path) != atomic_load(&m->group[i].id)) {
            g = (int)i;
            atomic_store(&m->group[g].id, 0);
        }
    if (g < 0 && used == SIM_GROUPS)
        return -ENOSPC;
    if (g < 0)
        g = (int)used;
    struct sim_group *group = &m->group[g];
    if (atomic_load(&group->id) != id) {
        snprintf(group->path, sizeof group->path, "%s", path);
        for (unsigned d = 0; d < SIM_DEVICES; d++) {
            atomic_store(&group->soft[d], 0);
            atomic_store(&group->hard[d], SIM_NO_LIMIT);
        }
        NBGPU_POINT("sim.limit_entry");
        atomic_store(&group->id, id);
    }
    if ((unsigned)g == used)
        atomic_store(&m->groups, used + 1);
    return g;
}

int sim_group_set(struct sim *sim, const char *path, unsigned d, uint64_t soft, uint64_t hard) {
    const char *below;
    int failed = below_root(sim->m, path, &below);
    if (failed)
        return failed;
    sim_lock_table(sim->m);
    int g = entry_for(sim->m, path, id_of(path));
    if (g >= 0) {
        sim_lock(sim, d);
        atomic_store(&sim->m->group[g].hard[d], hard);
        NBGPU_POINT("sim.limit_set");
        atomic_store(&sim->m->group[g].soft[d], soft);
        sim_unlock(sim, d);
    }
    sim_unlock_table(sim->m);
    return g < 0 ? g : 0;
}

int sim_group_get(struct sim *sim, const char *path, unsigned d, struct sim_limits *limits) {
    const char *below;
    uint64_t ids[SIM_GROUP_DEPTH] = {0};
    int failed = below_root(sim->m, path, &below);
    if (failed)
        return failed;
    chain_of(sim->m, below, ids);
    sim_reap(sim, false);
    sim_lock(sim, d);
    read_limits(sim->m, governing(sim->m, ids, d), ids[0], d, limits);
    sim_unlock(sim, d);
    return 0;
}
