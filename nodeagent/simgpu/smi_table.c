/* nvidia-smi: the table everybody knows, -L and -q. */
#include <string.h>
#include <time.h>

#include "smi.h"

static unsigned long long mib(unsigned long long bytes) { return bytes >> 20; }

static void print_date(void) {
    char text[64];
    time_t now = time(NULL);
    struct tm local;
    localtime_r(&now, &local);
    strftime(text, sizeof text, "%a %b %e %H:%M:%S %Y", &local);
    puts(text);
}

static void read_versions(char driver[80], char cuda[24]) {
    int version = 0;
    if (smi.driver_version(driver, 80))
        strcpy(driver, "N/A");
    if (smi.cuda_version(&version))
        version = 0;
    snprintf(cuda, 24, "%d.%d", version / 1000, version % 1000 / 10);
}

static void print_head(void) {
    char driver[80], cuda[24], line[160];
    read_versions(driver, cuda);
    puts("+-----------------------------------------------------------------------------------------+");
    snprintf(line, sizeof line, "NVIDIA-SMI %-14.14s Simulated driver: %-14.14s CUDA Version: %s", driver, driver, cuda);
    printf("| %-87s |\n", line);
    puts("|-----------------------------------------+------------------------+----------------------+");
    puts("| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |");
    puts("| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |");
    puts("|                                         |                        |               MIG M. |");
    puts("|=========================================+========================+======================|");
}

/* "N/A" when the call failed. */
static void number(char *out, size_t size, nvmlReturn_t failed, const char *format, unsigned value) {
    if (failed)
        snprintf(out, size, "N/A");
    else
        snprintf(out, size, format, value);
}

static void print_gpu(unsigned i) {
    nvmlDevice_t d = smi.device[i];
    char name[96] = "", fan[16], temperature[16], perf[16], power[40], use[16], memory[40], ecc[24];
    unsigned value = 0, persistence = 0, display = 0, limit = 0, mode = 0, mig = 0, pending = 0;
    unsigned long long errors = 0;
    nvmlPciInfo_t pci = {0};
    nvmlMemory_t m = {0};
    nvmlUtilization_t u = {0};
    smi.name(d, name, sizeof name);
    smi.persistence(d, &persistence);
    smi.display(d, &display);
    smi.pci(d, &pci);
    smi.compute_mode(d, &mode);
    number(ecc, sizeof ecc, smi.ecc(d, 1, 0, &errors), "%u", (unsigned)errors);
    number(fan, sizeof fan, smi.fan(d, &value), "%u%%", value);
    nvmlReturn_t failed = smi.temperature(d, 0, &value);
    number(temperature, sizeof temperature, failed, "%uC", value);
    failed = smi.pstate(d, &value);
    number(perf, sizeof perf, failed, "P%u", value);
    failed = smi.utilization(d, &u);
    number(use, sizeof use, failed, "%u%%", u.gpu);
    if (smi.power(d, &value) || smi.power_limit(d, &limit))
        snprintf(power, sizeof power, "N/A");
    else
        snprintf(power, sizeof power, "%4uW / %4uW", value / 1000, limit / 1000);
    if (smi.memory(d, &m))
        snprintf(memory, sizeof memory, "N/A");
    else
        snprintf(memory, sizeof memory, "%6lluMiB / %6lluMiB", mib(m.used), mib(m.total));
    const char *mig_text = smi.mig(d, &mig, &pending) ? "N/A" : mig ? "Enabled" : "Disabled";
    printf("| %3u  %-26.26s %7s | %16s %5s | %20s |\n", i, name, persistence ? "On" : "Off", pci.busId, display ? "On" : "Off", ecc);
    printf("| %3s  %5s  %4s  %21s | %22s | %7s %12s |\n", fan, temperature, perf, power, memory, use, mode ? "E. Process" : "Default");
    printf("| %39s | %22s | %20s |\n", "", "", mig_text);
    puts("+-----------------------------------------+------------------------+----------------------+");
}

static void print_process(unsigned device, const nvmlProcessInfo_v2_t *process) {
    char name[160], memory[24];
    smi_process_name(process->pid, name, sizeof name);
    snprintf(memory, sizeof memory, "%lluMiB", mib(process->usedGpuMemory));
    size_t length = strlen(name);
    bool cut = length > 40;
    printf("| %4u   N/A  N/A %10u      C   %s%-*.*s %10s |\n", device, process->pid, cut ? "..." : "", cut ? 37 : 40, cut ? 37 : 40,
           cut ? name + length - 37 : name, memory);
}

static void print_processes(void) {
    static nvmlProcessInfo_v2_t process[SMI_PROCESSES];
    unsigned shown = 0;
    puts("");
    puts("+-----------------------------------------------------------------------------------------+");
    puts("| Processes:                                                                              |");
    puts("|  GPU   GI   CI        PID   Type   Process name                              GPU Memory |");
    puts("|        ID   ID                                                               Usage      |");
    puts("|=========================================================================================|");
    for (unsigned i = 0; i < smi.devices; i++) {
        unsigned count = smi.selected[i] ? smi_processes(i, process) : 0;
        for (unsigned p = 0; p < count; p++)
            print_process(i, &process[p]);
        shown += count;
    }
    if (!shown)
        puts("|  No running processes found                                                             |");
    puts("+-----------------------------------------------------------------------------------------+");
}

void smi_table(void) {
    print_date();
    print_head();
    for (unsigned i = 0; i < smi.devices; i++)
        if (smi.selected[i])
            print_gpu(i);
    print_processes();
}

void smi_list(void) {
    for (unsigned i = 0; i < smi.devices; i++) {
        char name[96] = "", uuid[96] = "";
        if (!smi.selected[i])
            continue;
        smi.name(smi.device[i], name, sizeof name);
        smi.uuid(smi.device[i], uuid, sizeof uuid);
        printf("GPU %u: %s (UUID: %s)\n", i, name, uuid);
    }
}

static void print_details(unsigned i) {
    nvmlDevice_t d = smi.device[i];
    static nvmlProcessInfo_v2_t process[SMI_PROCESSES];
    char name[160] = "", uuid[96] = "";
    nvmlPciInfo_t pci = {0};
    nvmlMemory_t m = {0};
    nvmlUtilization_t u = {0};
    unsigned celsius = 0;
    smi.name(d, name, sizeof name);
    smi.uuid(d, uuid, sizeof uuid);
    smi.pci(d, &pci);
    smi.memory(d, &m);
    smi.utilization(d, &u);
    smi.temperature(d, 0, &celsius);
    printf("GPU %s\n", pci.busId);
    printf("    %-37s : %s\n    %-37s : %s\n", "Product Name", name, "GPU UUID", uuid);
    printf("    FB Memory Usage\n        %-33s : %llu MiB\n        %-33s : %llu MiB\n        %-33s : %llu MiB\n", "Total", mib(m.total),
           "Used", mib(m.used), "Free", mib(m.free));
    printf("    Utilization\n        %-33s : %u %%\n        %-33s : %u %%\n", "GPU", u.gpu, "Memory", u.memory);
    printf("    Temperature\n        %-33s : %u C\n", "GPU Current Temp", celsius);
    unsigned count = smi_processes(i, process);
    printf("    %-37s%s\n", "Processes", count ? "" : " : None");
    for (unsigned p = 0; p < count; p++) {
        smi_process_name(process[p].pid, name, sizeof name);
        printf("        %-33s : %u\n            %-29s : %s\n            %-29s : %llu MiB\n", "Process ID", process[p].pid, "Name", name,
               "Used GPU Memory", mib(process[p].usedGpuMemory));
    }
}

void smi_details(void) {
    char driver[80], cuda[24];
    unsigned attached = 0;
    read_versions(driver, cuda);
    for (unsigned i = 0; i < smi.devices; i++)
        attached += smi.selected[i];
    printf("\n==============NVSMI LOG (simulated driver)==============\n\n");
    print_date();
    printf("%-41s : %s\n%-41s : %s\n\n%-41s : %u\n", "Driver Version", driver, "CUDA Version", cuda, "Attached GPUs", attached);
    for (unsigned i = 0; i < smi.devices; i++)
        if (smi.selected[i])
            print_details(i);
}
