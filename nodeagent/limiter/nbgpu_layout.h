/* Made by `python -m nbgpu_agent.layout` from nodeagent/nbgpu_agent/layout.py: change that file, not this one. */
#ifndef NBGPU_LAYOUT_H
#define NBGPU_LAYOUT_H
#include <stddef.h>
#include <stdint.h>

#define NBGPU_VERSION 3u
#define NBGPU_CTL_MAGIC 0x314c54435047424eull
#define NBGPU_USE_MAGIC 0x314553555047424eull
#define NBGPU_DEVICES 16u
#define NBGPU_KERNELS 64u
#define NBGPU_SLOTS 256u
#define NBGPU_SHARES 16u
#define NBGPU_UUID_BYTES 48u
#define NBGPU_KERNEL_ID_BYTES 40u
/* mode of a slice */
#define NBGPU_MODE_STRICT 0u
#define NBGPU_MODE_BURST 1u
/* gate words */
#define NBGPU_GATE_CLOSED 0u
#define NBGPU_GATE_OPEN 1u
#define NBGPU_GATE_SUSPENDED 2u
#define NBGPU_GATE_NONE 3u
/* whose limit refused */
#define NBGPU_REFUSED_NONE 0u
#define NBGPU_REFUSED_SLICE 1u
#define NBGPU_REFUSED_KERNEL 2u
#define NBGPU_REFUSED_DRIVER 3u

typedef struct {
    char uuid[48];
    uint64_t mem_limit;
    uint32_t compute_milli;
    uint32_t mode;
    uint64_t context_bytes;
    uint64_t overhead_cap;
    uint64_t turn_end_ns;
    uint32_t compute_used_milli;
    uint8_t reserved0[36];
    uint32_t gate;
    uint32_t gate_generation;
    uint32_t rest_gate;
    uint8_t reserved1[52];
} NbgpuCtlDevice;
_Static_assert(sizeof(NbgpuCtlDevice) == 192, "size of NbgpuCtlDevice");
_Static_assert(offsetof(NbgpuCtlDevice, uuid) == 0, "NbgpuCtlDevice.uuid");
_Static_assert(offsetof(NbgpuCtlDevice, mem_limit) == 48, "NbgpuCtlDevice.mem_limit");
_Static_assert(offsetof(NbgpuCtlDevice, compute_milli) == 56, "NbgpuCtlDevice.compute_milli");
_Static_assert(offsetof(NbgpuCtlDevice, mode) == 60, "NbgpuCtlDevice.mode");
_Static_assert(offsetof(NbgpuCtlDevice, context_bytes) == 64, "NbgpuCtlDevice.context_bytes");
_Static_assert(offsetof(NbgpuCtlDevice, overhead_cap) == 72, "NbgpuCtlDevice.overhead_cap");
_Static_assert(offsetof(NbgpuCtlDevice, turn_end_ns) == 80, "NbgpuCtlDevice.turn_end_ns");
_Static_assert(offsetof(NbgpuCtlDevice, compute_used_milli) == 88, "NbgpuCtlDevice.compute_used_milli");
_Static_assert(offsetof(NbgpuCtlDevice, reserved0) == 92, "NbgpuCtlDevice.reserved0");
_Static_assert(offsetof(NbgpuCtlDevice, gate) == 128, "NbgpuCtlDevice.gate");
_Static_assert(offsetof(NbgpuCtlDevice, gate_generation) == 132, "NbgpuCtlDevice.gate_generation");
_Static_assert(offsetof(NbgpuCtlDevice, rest_gate) == 136, "NbgpuCtlDevice.rest_gate");
_Static_assert(offsetof(NbgpuCtlDevice, reserved1) == 140, "NbgpuCtlDevice.reserved1");

typedef struct {
    char id[40];
    uint64_t mem_limit;
    uint32_t compute_milli;
    uint32_t reserved0;
    uint8_t reserved1[8];
    uint32_t gate[16];
} NbgpuCtlKernel;
_Static_assert(sizeof(NbgpuCtlKernel) == 128, "size of NbgpuCtlKernel");
_Static_assert(offsetof(NbgpuCtlKernel, id) == 0, "NbgpuCtlKernel.id");
_Static_assert(offsetof(NbgpuCtlKernel, mem_limit) == 40, "NbgpuCtlKernel.mem_limit");
_Static_assert(offsetof(NbgpuCtlKernel, compute_milli) == 48, "NbgpuCtlKernel.compute_milli");
_Static_assert(offsetof(NbgpuCtlKernel, reserved0) == 52, "NbgpuCtlKernel.reserved0");
_Static_assert(offsetof(NbgpuCtlKernel, reserved1) == 56, "NbgpuCtlKernel.reserved1");
_Static_assert(offsetof(NbgpuCtlKernel, gate) == 64, "NbgpuCtlKernel.gate");

typedef struct {
    uint64_t magic;
    uint32_t version;
    uint32_t size;
    uint64_t generation;
    uint64_t heartbeat_ns;
    uint32_t reserved1;
    uint32_t kernels_limited;
    uint32_t kernels_away;
    uint8_t reserved0[20];
    NbgpuCtlDevice device[16];
    NbgpuCtlKernel kernel[64];
    uint64_t overhead[256];
    uint64_t away[256];
} NbgpuCtl;
_Static_assert(sizeof(NbgpuCtl) == 15424, "size of NbgpuCtl");
_Static_assert(offsetof(NbgpuCtl, magic) == 0, "NbgpuCtl.magic");
_Static_assert(offsetof(NbgpuCtl, version) == 8, "NbgpuCtl.version");
_Static_assert(offsetof(NbgpuCtl, size) == 12, "NbgpuCtl.size");
_Static_assert(offsetof(NbgpuCtl, generation) == 16, "NbgpuCtl.generation");
_Static_assert(offsetof(NbgpuCtl, heartbeat_ns) == 24, "NbgpuCtl.heartbeat_ns");
_Static_assert(offsetof(NbgpuCtl, reserved1) == 32, "NbgpuCtl.reserved1");
_Static_assert(offsetof(NbgpuCtl, kernels_limited) == 36, "NbgpuCtl.kernels_limited");
_Static_assert(offsetof(NbgpuCtl, kernels_away) == 40, "NbgpuCtl.kernels_away");
_Static_assert(offsetof(NbgpuCtl, reserved0) == 44, "NbgpuCtl.reserved0");
_Static_assert(offsetof(NbgpuCtl, device) == 64, "NbgpuCtl.device");
_Static_assert(offsetof(NbgpuCtl, kernel) == 3136, "NbgpuCtl.kernel");
_Static_assert(offsetof(NbgpuCtl, overhead) == 11328, "NbgpuCtl.overhead");
_Static_assert(offsetof(NbgpuCtl, away) == 13376, "NbgpuCtl.away");

typedef struct {
    uint64_t owner;
    uint64_t start_time;
    uint32_t device;
    uint32_t ready;
    char kernel_id[40];
    uint64_t used;
    uint64_t context;
    uint64_t peak;
    uint64_t allocs;
    uint64_t frees;
    uint64_t refusals;
    uint64_t refused_bytes;
    uint32_t refused_by;
    uint32_t shares;
    uint32_t want;
    uint32_t near;
    uint64_t busy_since;
    uint64_t busy_ns;
    uint64_t launches;
    uint64_t last_launch_ns;
    uint64_t stall_ns;
    uint64_t copied_bytes;
    uint32_t wants_back;
    uint32_t reserved1;
    uint64_t launches_by_thread[8];
} NbgpuUseSlot;
_Static_assert(sizeof(NbgpuUseSlot) == 256, "size of NbgpuUseSlot");
_Static_assert(offsetof(NbgpuUseSlot, owner) == 0, "NbgpuUseSlot.owner");
_Static_assert(offsetof(NbgpuUseSlot, start_time) == 8, "NbgpuUseSlot.start_time");
_Static_assert(offsetof(NbgpuUseSlot, device) == 16, "NbgpuUseSlot.device");
_Static_assert(offsetof(NbgpuUseSlot, ready) == 20, "NbgpuUseSlot.ready");
_Static_assert(offsetof(NbgpuUseSlot, kernel_id) == 24, "NbgpuUseSlot.kernel_id");
_Static_assert(offsetof(NbgpuUseSlot, used) == 64, "NbgpuUseSlot.used");
_Static_assert(offsetof(NbgpuUseSlot, context) == 72, "NbgpuUseSlot.context");
_Static_assert(offsetof(NbgpuUseSlot, peak) == 80, "NbgpuUseSlot.peak");
_Static_assert(offsetof(NbgpuUseSlot, allocs) == 88, "NbgpuUseSlot.allocs");
_Static_assert(offsetof(NbgpuUseSlot, frees) == 96, "NbgpuUseSlot.frees");
_Static_assert(offsetof(NbgpuUseSlot, refusals) == 104, "NbgpuUseSlot.refusals");
_Static_assert(offsetof(NbgpuUseSlot, refused_bytes) == 112, "NbgpuUseSlot.refused_bytes");
_Static_assert(offsetof(NbgpuUseSlot, refused_by) == 120, "NbgpuUseSlot.refused_by");
_Static_assert(offsetof(NbgpuUseSlot, shares) == 124, "NbgpuUseSlot.shares");
_Static_assert(offsetof(NbgpuUseSlot, want) == 128, "NbgpuUseSlot.want");
_Static_assert(offsetof(NbgpuUseSlot, near) == 132, "NbgpuUseSlot.near");
_Static_assert(offsetof(NbgpuUseSlot, busy_since) == 136, "NbgpuUseSlot.busy_since");
_Static_assert(offsetof(NbgpuUseSlot, busy_ns) == 144, "NbgpuUseSlot.busy_ns");
_Static_assert(offsetof(NbgpuUseSlot, launches) == 152, "NbgpuUseSlot.launches");
_Static_assert(offsetof(NbgpuUseSlot, last_launch_ns) == 160, "NbgpuUseSlot.last_launch_ns");
_Static_assert(offsetof(NbgpuUseSlot, stall_ns) == 168, "NbgpuUseSlot.stall_ns");
_Static_assert(offsetof(NbgpuUseSlot, copied_bytes) == 176, "NbgpuUseSlot.copied_bytes");
_Static_assert(offsetof(NbgpuUseSlot, wants_back) == 184, "NbgpuUseSlot.wants_back");
_Static_assert(offsetof(NbgpuUseSlot, reserved1) == 188, "NbgpuUseSlot.reserved1");
_Static_assert(offsetof(NbgpuUseSlot, launches_by_thread) == 192, "NbgpuUseSlot.launches_by_thread");

typedef struct {
    uint64_t key;
    uint64_t held;
    uint64_t covered;
    uint64_t reserved0;
} NbgpuUseShare;
_Static_assert(sizeof(NbgpuUseShare) == 32, "size of NbgpuUseShare");
_Static_assert(offsetof(NbgpuUseShare, key) == 0, "NbgpuUseShare.key");
_Static_assert(offsetof(NbgpuUseShare, held) == 8, "NbgpuUseShare.held");
_Static_assert(offsetof(NbgpuUseShare, covered) == 16, "NbgpuUseShare.covered");
_Static_assert(offsetof(NbgpuUseShare, reserved0) == 24, "NbgpuUseShare.reserved0");

typedef struct {
    uint64_t magic;
    uint32_t version;
    uint32_t size;
    uint32_t high_water;
    uint32_t events;
    uint8_t reserved0[40];
    uint32_t bell;
    uint8_t reserved1[60];
    uint32_t want[16];
    uint32_t near[16];
    uint32_t idle[16];
    NbgpuUseSlot slot[256];
    NbgpuUseShare share[4096];
} NbgpuUse;
_Static_assert(sizeof(NbgpuUse) == 196928, "size of NbgpuUse");
_Static_assert(offsetof(NbgpuUse, magic) == 0, "NbgpuUse.magic");
_Static_assert(offsetof(NbgpuUse, version) == 8, "NbgpuUse.version");
_Static_assert(offsetof(NbgpuUse, size) == 12, "NbgpuUse.size");
_Static_assert(offsetof(NbgpuUse, high_water) == 16, "NbgpuUse.high_water");
_Static_assert(offsetof(NbgpuUse, events) == 20, "NbgpuUse.events");
_Static_assert(offsetof(NbgpuUse, reserved0) == 24, "NbgpuUse.reserved0");
_Static_assert(offsetof(NbgpuUse, bell) == 64, "NbgpuUse.bell");
_Static_assert(offsetof(NbgpuUse, reserved1) == 68, "NbgpuUse.reserved1");
_Static_assert(offsetof(NbgpuUse, want) == 128, "NbgpuUse.want");
_Static_assert(offsetof(NbgpuUse, near) == 192, "NbgpuUse.near");
_Static_assert(offsetof(NbgpuUse, idle) == 256, "NbgpuUse.idle");
_Static_assert(offsetof(NbgpuUse, slot) == 320, "NbgpuUse.slot");
_Static_assert(offsetof(NbgpuUse, share) == 65856, "NbgpuUse.share");

#endif
