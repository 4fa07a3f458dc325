/* nvidia-smi --query-gpu and --query-compute-apps: CSV. */
#include <string.h>
#include <time.h>

#include "smi.h"

#define CELL 160

struct cell {
    char text[CELL];
    const char *unit; /* "" = none */
};

static void put_text(struct cell *cell, nvmlReturn_t failed, const char *text) {
    snprintf(cell->text, CELL, "%s", failed ? "[N/A]" : text);
    if (failed)
        cell->unit = "";
}

static void put_number(struct cell *cell, nvmlReturn_t failed, double value, int decimals) {
    char text[CELL];
    snprintf(text, sizeof text, "%.*f", decimals, value);
    put_text(cell, failed, text);
}

static unsigned long long mib(unsigned long long bytes) { return bytes >> 20; }

static void put_now(struct cell *cell) {
    char text[CELL];
    struct timespec now;
    struct tm local;
    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &local);
    size_t n = strftime(text, sizeof text, "%Y/%m/%d %H:%M:%S", &local);
    snprintf(text + n, sizeof text - n, ".%03ld", now.tv_nsec / 1000000);
    put_text(cell, NVML_SUCCESS, text);
}

/* ---- fields of a GPU --------------------------------------------------------------------------------------------------------- */

#define FIELD(function) static void function(unsigned i, struct cell *cell)
#define DEVICE smi.device[i]

FIELD(get_index) { put_number(cell, NVML_SUCCESS, i, 0); }
FIELD(get_count) { (void)i, put_number(cell, NVML_SUCCESS, smi.devices, 0); }
FIELD(get_timestamp) { (void)i, put_now(cell); }

#define TEXT_FIELD(function, call)                                                                                                         \
    FIELD(function) {                                                                                                                      \
        char text[96] = "";                                                                                                                \
        put_text(cell, call, text);                                                                                                        \
    }
TEXT_FIELD(get_name, smi.name(DEVICE, text, sizeof text))
TEXT_FIELD(get_uuid, smi.uuid(DEVICE, text, sizeof text))
TEXT_FIELD(get_serial, smi.serial(DEVICE, text, sizeof text))
TEXT_FIELD(get_vbios, smi.vbios(DEVICE, text, sizeof text))
TEXT_FIELD(get_driver, ((void)i, smi.driver_version(text, sizeof text)))

#define NUMBER_FIELD(function, type, call, value, decimals)                                                                                \
    FIELD(function) {                                                                                                                      \
        type n = {0};                                                                                                                      \
        nvmlReturn_t failed = call;                                                                                                        \
        put_number(cell, failed, value, decimals);                                                                                         \
    }
NUMBER_FIELD(get_memory_total, nvmlMemory_t, smi.memory(DEVICE, &n), (double)mib(n.total), 0)
NUMBER_FIELD(get_memory_used, nvmlMemory_t, smi.memory(DEVICE, &n), (double)mib(n.used), 0)
NUMBER_FIELD(get_memory_free, nvmlMemory_t, smi.memory(DEVICE, &n), (double)mib(n.free), 0)
NUMBER_FIELD(get_use_gpu, nvmlUtilization_t, smi.utilization(DEVICE, &n), n.gpu, 0)
NUMBER_FIELD(get_use_memory, nvmlUtilization_t, smi.utilization(DEVICE, &n), n.memory, 0)
NUMBER_FIELD(get_temperature, unsigned, smi.temperature(DEVICE, 0, &n), n, 0)
NUMBER_FIELD(get_fan, unsigned, smi.fan(DEVICE, &n), n, 0)
NUMBER_FIELD(get_power, unsigned, smi.power(DEVICE, &n), n / 1000.0, 2)
NUMBER_FIELD(get_power_limit, unsigned, smi.power_limit(DEVICE, &n), n / 1000.0, 2)
NUMBER_FIELD(get_clock_graphics, unsigned, smi.clock(DEVICE, 0, &n), n, 0)
NUMBER_FIELD(get_clock_sm, unsigned, smi.clock(DEVICE, 1, &n), n, 0)
NUMBER_FIELD(get_clock_memory, unsigned, smi.clock(DEVICE, 2, &n), n, 0)

FIELD(get_bus_id) {
    nvmlPciInfo_t pci = {0};
    put_text(cell, smi.pci(DEVICE, &pci), pci.busId);
}

FIELD(get_pstate) {
    unsigned state = 0;
    char text[8];
    nvmlReturn_t failed = smi.pstate(DEVICE, &state);
    snprintf(text, sizeof text, "P%u", state);
    put_text(cell, failed, text);
}

FIELD(get_persistence) {
    unsigned on = 0;
    put_text(cell, smi.persistence(DEVICE, &on), on ? "Enabled" : "Disabled");
}

FIELD(get_compute_mode) {
    unsigned mode = 0;
    put_text(cell, smi.compute_mode(DEVICE, &mode), mode ? "Exclusive_Process" : "Default");
}

FIELD(get_mig) {
    unsigned current = 0, pending = 0;
    put_text(cell, smi.mig(DEVICE, &current, &pending), current ? "Enabled" : "Disabled");
}

FIELD(get_capability) {
    int major = 0, minor = 0;
    char text[24];
    nvmlReturn_t failed = smi.capability(DEVICE, &major, &minor);
    snprintf(text, sizeof text, "%d.%d", major, minor);
    put_text(cell, failed, text);
}

static const struct gpu_field {
    const char *name, *title, *unit;
    void (*get)(unsigned device, struct cell *cell);
} gpu_fields[] = {
    {"timestamp", NULL, "", get_timestamp},
    {"driver_version", NULL, "", get_driver},
    {"count", NULL, "", get_count},
    {"index", NULL, "", get_index},
    {"name", NULL, "", get_name},
    {"gpu_name", "name", "", get_name},
    {"uuid", NULL, "", get_uuid},
    {"gpu_uuid", "uuid", "", get_uuid},
    {"serial", NULL, "", get_serial},
    {"gpu_serial", "serial", "", get_serial},
    {"pci.bus_id", NULL, "", get_bus_id},
    {"gpu_bus_id", "pci.bus_id", "", get_bus_id},
    {"vbios_version", NULL, "", get_vbios},
    {"pstate", NULL, "", get_pstate},
    {"persistence_mode", NULL, "", get_persistence},
    {"compute_mode", NULL, "", get_compute_mode},
    {"compute_cap", NULL, "", get_capability},
    {"mig.mode.current", NULL, "", get_mig},
    {"memory.total", NULL, "MiB", get_memory_total},
    {"memory.used", NULL, "MiB", get_memory_used},
    {"memory.free", NULL, "MiB", get_memory_free},
    {"utilization.gpu", NULL, "%", get_use_gpu},
    {"utilization.memory", NULL, "%", get_use_memory},
    {"temperature.gpu", NULL, "", get_temperature},
    {"fan.speed", NULL, "%", get_fan},
    {"power.draw", NULL, "W", get_power},
    {"power.limit", NULL, "W", get_power_limit},
    {"clocks.gr", "clocks.current.graphics", "MHz", get_clock_graphics},
    {"clocks.sm", "clocks.current.sm", "MHz", get_clock_sm},
    {"clocks.mem", "clocks.current.memory", "MHz", get_clock_memory},
};
#define GPU_FIELDS (sizeof gpu_fields / sizeof *gpu_fields)

static const struct gpu_field *find_gpu_field(const char *name) {
    for (unsigned i = 0; i < GPU_FIELDS; i++)
        if (!strcmp(name, gpu_fields[i].name))
            return &gpu_fields[i];
    return NULL;
}

/* ---- fields of a process ------------------------------------------------------------------------------------------------------ */

enum app_what { APP_PID, APP_NAME, APP_MEMORY, APP_UUID, APP_GPU_NAME, APP_BUS_ID, APP_TIMESTAMP };
static const struct app_field {
    const char *name, *unit;
    enum app_what what;
} app_fields[] = {
    {"pid", "", APP_PID},
    {"process_name", "", APP_NAME},
    {"name", "", APP_NAME},
    {"used_gpu_memory", "MiB", APP_MEMORY},
    {"used_memory", "MiB", APP_MEMORY},
    {"gpu_uuid", "", APP_UUID},
    {"gpu_name", "", APP_GPU_NAME},
    {"gpu_bus_id", "", APP_BUS_ID},
    {"timestamp", "", APP_TIMESTAMP},
};

static const struct app_field *find_app_field(const char *name) {
    for (unsigned i = 0; i < sizeof app_fields / sizeof *app_fields; i++)
        if (!strcmp(name, app_fields[i].name))
            return &app_fields[i];
    return NULL;
}

static void get_app(const struct app_field *field, unsigned device, const nvmlProcessInfo_v2_t *process, struct cell *cell) {
    char name[CELL];
    switch (field->what) {
    case APP_PID:
        put_number(cell, NVML_SUCCESS, process->pid, 0);
        break;
    case APP_NAME:
        smi_process_name(process->pid, name, sizeof name);
        put_text(cell, NVML_SUCCESS, name);
        break;
    case APP_MEMORY:
        put_number(cell, NVML_SUCCESS, (double)mib(process->usedGpuMemory), 0);
        break;
    case APP_UUID:
        get_uuid(device, cell);
        break;
    case APP_GPU_NAME:
        get_name(device, cell);
        break;
    case APP_BUS_ID:
        get_bus_id(device, cell);
        break;
    case APP_TIMESTAMP:
        put_now(cell);
        break;
    }
}

/* ---- lines ------------------------------------------------------------------------------------------------------------------------ */

#define FIELDS_MOST 64

/* Split at commas, spaces around dropped; how many, or -1 for too many. */
static int split(const char *text, char copy[1024], const char *out[FIELDS_MOST]) {
    int n = 0;
    char *rest = copy;
    snprintf(copy, 1024, "%s", text);
    for (char *word = strtok_r(copy, ", ", &rest); word; word = strtok_r(NULL, ", ", &rest)) {
        if (n == FIELDS_MOST)
            return -1;
        out[n++] = word;
    }
    return n;
}

static int unknown(const char *name) {
    fprintf(stderr, "Field \"%s\" is not a valid field to query.\n\n", name);
    return 2;
}

static void print_title(bool first, const char *title, const char *unit, struct smi_format format) {
    printf("%s%s", first ? "" : ", ", title);
    if (*unit && format.units)
        printf(" [%s]", unit);
}

static void print_cell(bool first, const struct cell *cell, struct smi_format format) {
    printf("%s%s", first ? "" : ", ", cell->text);
    if (*cell->unit && format.units)
        printf(" %s", cell->unit);
}

int smi_query_gpu(const char *fields, struct smi_format format) {
    char copy[1024];
    const char *name[FIELDS_MOST];
    const struct gpu_field *field[FIELDS_MOST];
    int n = split(fields, copy, name);
    for (int f = 0; f < n; f++)
        if (!(field[f] = find_gpu_field(name[f])))
            return unknown(name[f]);
    if (n <= 0)
        return unknown(fields);
    for (int f = 0; f < n && format.header; f++)
        print_title(f == 0, field[f]->title ? field[f]->title : field[f]->name, field[f]->unit, format);
    if (format.header)
        putchar('\n');
    for (unsigned i = 0; i < smi.devices; i++) {
        for (int f = 0; f < n && smi.selected[i]; f++) {
            struct cell cell = {.unit = field[f]->unit};
            field[f]->get(i, &cell);
            print_cell(f == 0, &cell, format);
        }
        if (smi.selected[i])
            putchar('\n');
    }
    return 0;
}

int smi_query_apps(const char *fields, struct smi_format format) {
    char copy[1024];
    const char *name[FIELDS_MOST];
    const struct app_field *field[FIELDS_MOST];
    static nvmlProcessInfo_v2_t process[SMI_PROCESSES];
    int n = split(fields, copy, name);
    for (int f = 0; f < n; f++)
        if (!(field[f] = find_app_field(name[f])))
            return unknown(name[f]);
    if (n <= 0)
        return unknown(fields);
    for (int f = 0; f < n && format.header; f++)
        print_title(f == 0, name[f], field[f]->unit, format);
    if (format.header)
        putchar('\n');
    for (unsigned i = 0; i < smi.devices; i++) {
        unsigned count = smi.selected[i] ? smi_processes(i, process) : 0;
        for (unsigned p = 0; p < count; p++) {
            for (int f = 0; f < n; f++) {
                struct cell cell = {.unit = field[f]->unit};
                get_app(field[f], i, &process[p], &cell);
                print_cell(f == 0, &cell, format);
            }
            putchar('\n');
        }
    }
    return 0;
}

void smi_query_help(void) {
    printf("Fields of --query-gpu (simulated driver):\n");
    for (unsigned i = 0; i < GPU_FIELDS; i++)
        printf("  %s\n", gpu_fields[i].name);
}
