/* Memory limits of cgroups, as drivers from r615 (CUDA 13.4) on have them: set through NVML, kept by the driver, which refuses
 * an allocation that would exceed one. A process counts for the nearest cgroup above it that has a limit on the device; limits
 * do not nest (the driver's own accounting, which it uses where the kernel has no dmem controller). Managed memory does not count.
 *
 * A cgroup is told by its directory's inode, which is its id: so a process is found too whose cgroup namespace gives it other paths.
 */
#ifndef NBGPU_SIM_GROUP_H
#define NBGPU_SIM_GROUP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { SIM_GROUPS = 256, SIM_GROUP_DEPTH = 16, SIM_PATH_BYTES = 256, SIM_LIMITS_SINCE = 13040 };
#define SIM_CGROUP_ROOT "/sys/fs/cgroup"
#define SIM_NO_LIMIT UINT64_MAX

struct sim_group {
    _Atomic uint64_t id; /* 0: not in use; written last */
    char path[SIM_PATH_BYTES];
    _Atomic uint64_t soft[16], hard[16]; /* hard: SIM_NO_LIMIT when none; 16 is SIM_DEVICES */
};

struct sim_member {
    _Atomic uint64_t id[SIM_GROUP_DEPTH]; /* its cgroup, the one above, and so on; ends with 0 */
};

struct sim;
struct sim_machine;

struct sim_limits {
    uint64_t soft, hard, used;
};

bool sim_limits_supported(const struct sim_machine *m);
void sim_member_update(struct sim *sim, int client, bool begins); /* of the calling process: it may have been moved */
bool sim_group_fits(struct sim_machine *m, int client, unsigned device, uint64_t bytes); /* device's lock held */
/* 0 or -errno: -ENOENT no such cgroup, -EINVAL no path of one, -ENOTSUP no cgroup v2 here, -ENOSPC too many with limits */
int sim_group_set(struct sim *sim, const char *path, unsigned device, uint64_t soft, uint64_t hard);
int sim_group_get(struct sim *sim, const char *path, unsigned device, struct sim_limits *limits);
/* What the limit over the calling process is, and what counts for it; false: there is none. */
bool sim_group_here(struct sim *sim, unsigned device, struct sim_limits *limits);

#endif
