/* The agent's reader of a slice's `use` file (use_reader.c): whatever a tenant writes there, what is returned is within its range. */
#include "edits.h"
#include "nbgpu_agent.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static NbgpuUse use;
    static NbgpuUseRow rows[NBGPU_SLOTS];
    static int fd = -1;
    NbgpuUseHead head;
    if (fd < 0)
        fd = memfd_create("use", MFD_CLOEXEC);
    fill(&use);
    const size_t whole = edit(&use, &data, &size);
    NEED(pwrite(fd, &use, sizeof use, 0) == (ssize_t)sizeof use && ftruncate(fd, (off_t)whole) == 0);
    const int rc = nbgpu_use_head(fd, &head), n = nbgpu_use_read(fd, rows, (int)NBGPU_SLOTS);
    NEED(rc <= 0 && n <= (int)NBGPU_SLOTS && (rc == 0 || n < 0));
    NEED(rc || head.high_water <= NBGPU_SLOTS);
    for (int i = 0; i < n; i++) {
        const NbgpuUseRow *row = &rows[i];
        NEED(row->slot < NBGPU_SLOTS && row->device < NBGPU_DEVICES && row->pid <= 0x7ffffffeu);
        NEED(strnlen(row->kernel_id, NBGPU_KERNEL_ID_BYTES) < NBGPU_KERNEL_ID_BYTES);
        NEED(row->used <= (1ull << 50) * (NBGPU_SHARES + 1) && row->context <= 1ull << 50 && row->peak <= 1ull << 50);
        NEED(row->busy_ns <= 1ull << 62 && row->launches <= 1ull << 62 && row->near <= 1);
        NEED(nbgpu_use_locked(fd, row->slot) >= 0);
    }
    uint32_t events[2] = {1, 1};
    nbgpu_use_events((int[]){fd, -1}, 2, events);
    NEED(events[1] == 0);
    return 0;
}
