/* The limiter's reading of what other processes of its slice wrote into `use`: sums, shares of memory, who is dead, the words of a device.
 *
 * A real slice directory, in whose mapped file words are written over; numbers must stay within what the slice can have. */
#include "edits.h"
#include "gate.h"

static NbgpuUse base;

static void attach(void) {
    static char folder[] = "/tmp/nbgpu-fuzz-XXXXXX";
    static NbgpuCtl ctl;
    char path[80];
    NEED(mkdtemp(folder) != NULL);
    ctl.magic = NBGPU_CTL_MAGIC, ctl.version = NBGPU_VERSION, ctl.size = sizeof ctl;
    for (int d = 0; d < 2; d++) {
        snprintf(ctl.device[d].uuid, sizeof ctl.device[d].uuid, "GPU-%d", d);
        ctl.device[d].mem_limit = 64 * MIB, ctl.device[d].gate = NBGPU_GATE_OPEN, ctl.device[d].overhead_cap = MIB;
    }
    snprintf(ctl.kernel[3].id, sizeof ctl.kernel[3].id, "k1");
    ctl.kernel[3].mem_limit = 32 * MIB;
    for (uint32_t i = 0; i < NBGPU_SLOTS; i++)
        ctl.overhead[i] = ~0ull;
    fill(&base);
    snprintf(path, sizeof path, "%s/ctl", folder);
    FILE *file = fopen(path, "w");
    NEED(file && fwrite(&ctl, sizeof ctl, 1, file) == 1 && fclose(file) == 0);
    snprintf(path, sizeof path, "%s/use", folder);
    file = fopen(path, "w");
    NEED(file && fwrite(&base, sizeof base, 1, file) == 1 && fclose(file) == 0);
    setenv("NBGPU_SLICE_DIR", folder, 1);
    setenv("NBGPU_KERNEL_ID", "k1", 1);
    NEED(nbgpu_attach() == SLICE_ACTIVE);
    unlink(path);
    NEED(nbgpu_slot(0) && nbgpu_slot(1));
    base = *nbgpu_use;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!nbgpu_use)
        attach();
    *nbgpu_use = base;
    edit(nbgpu_use, &data, &size);
    for (int d = 0; d < 2; d++) {
        NEED(nbgpu_room(d) <= 64 * MIB && nbgpu_limit(d) <= 64 * MIB);
        nbgpu_total(d, NULL);
        NEED(nbgpu_total(d, "k1") <= nbgpu_total(d, NULL) || nbgpu_total(d, NULL) < 1ull << 63);
        nbgpu_publish(d);
        for (uint32_t i = 0; i < NBGPU_SLOTS; i += 5)
            NEED(nbgpu_held(i, d) <= (uint64_t)NBGPU_SHARES << 48);
        nbgpu_covered_bytes(1, d);
        if (nbgpu_charge_quietly(d, CHARGE_USED, MIB))
            nbgpu_uncharge(d, CHARGE_USED, MIB);
    }
    nbgpu_alone();
    nbgpu_reap();
    return 0;
}
