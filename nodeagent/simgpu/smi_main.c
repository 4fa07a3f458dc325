/* nvidia-smi of the simulated driver: options, and the way to NVML. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "smi.h"

struct smi smi;

static const char help[] = "NVIDIA System Management Interface of nbgpu's SIMULATED driver: there is no GPU in this machine.\n"
                           "\n"
                           "nvidia-smi [OPTION...]\n"
                           "  (no option)                  a table of the GPUs and their processes\n"
                           "  -L, --list-gpus              one line a GPU\n"
                           "  -q, --query                  details\n"
                           "  -i, --id=ID                  only this GPU: index, UUID or PCI bus id; several with commas\n"
                           "  -l, --loop=SECONDS           again and again\n"
                           "  --query-gpu=FIELDS           the fields, one line a GPU\n"
                           "  --query-compute-apps=FIELDS  the fields, one line a process\n"
                           "  --format=csv[,noheader][,nounits]\n"
                           "  --help-query-gpu             which fields there are\n"
                           "  -h, --help                   this\n";

static int load_nvml(void) {
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "NVIDIA-SMI couldn't find libnvidia-ml.so.1 in your system (%s)\n", dlerror());
        return 12;
    }
#define X(name, symbol, arguments) *(void **)&smi.name = dlsym(library, symbol);
    SMI_FUNCTIONS(X)
#undef X
    *(void **)&smi.error = dlsym(library, "nvmlErrorString");
    nvmlReturn_t failed = smi.init();
    if (failed) {
        fprintf(stderr, "NVIDIA-SMI has failed because it couldn't communicate with the simulated driver: %s\n", smi.error(failed));
        return (int)failed;
    }
    if (smi.count(&smi.devices) || smi.devices > SMI_DEVICES)
        smi.devices = 0;
    for (unsigned i = 0; i < smi.devices; i++) {
        smi.selected[i] = true;
        nvmlReturn_t lost = smi.handle(i, &smi.device[i]);
        if (!lost)
            continue;
        smi.selected[i] = false;
        fprintf(stderr, "Unable to determine the device handle for GPU %u: %s\n", i, smi.error(lost));
    }
    return 0;
}

unsigned smi_processes(unsigned device, nvmlProcessInfo_v2_t out[SMI_PROCESSES]) {
    unsigned count = SMI_PROCESSES;
    return smi.processes(smi.device[device], &count, out) ? 0 : count;
}

void smi_process_name(unsigned pid, char *out, unsigned length) {
    if (smi.process_name(pid, out, length))
        snprintf(out, length, "[Not Found]");
}

static bool is_named(unsigned device, const char *id) {
    char uuid[96], *end;
    nvmlPciInfo_t pci;
    unsigned long index = strtoul(id, &end, 10);
    if (*id && !*end)
        return index == device;
    if (!smi.uuid(smi.device[device], uuid, sizeof uuid) && !strcmp(id, uuid))
        return true;
    return !smi.pci(smi.device[device], &pci) && (!strcmp(id, pci.busId) || !strcmp(id, pci.busIdLegacy));
}

static int select_devices(char *ids) {
    char *rest = ids;
    memset(smi.selected, 0, sizeof smi.selected);
    for (char *id = strtok_r(ids, ",", &rest); id; id = strtok_r(NULL, ",", &rest)) {
        bool found = false;
        for (unsigned i = 0; i < smi.devices; i++)
            if (is_named(i, id))
                smi.selected[i] = found = true;
        if (found)
            continue;
        fprintf(stderr, "No devices were found: this machine has no GPU %s\n", id);
        return 6;
    }
    return 0;
}

static int read_format(char *text, struct smi_format *format) {
    char *rest = text;
    bool csv = false;
    for (char *word = strtok_r(text, ",", &rest); word; word = strtok_r(NULL, ",", &rest)) {
        if (!strcmp(word, "csv"))
            csv = true;
        else if (!strcmp(word, "noheader"))
            format->header = false;
        else if (!strcmp(word, "nounits"))
            format->units = false;
        else
            csv = false;
    }
    if (!csv)
        fprintf(stderr, "Option --format takes csv[,noheader][,nounits]\n");
    return csv ? 0 : 2;
}

struct options {
    enum { TABLE, LIST, DETAILS, QUERY_GPU, QUERY_APPS } what;
    char *fields, *ids, *format;
    unsigned loop;
};

/* The value of --name=value, --name value or -n value; NULL when this argument is another option. */
static char *value_of(int argc, char **argv, int *at, const char *brief, const char *full) {
    const char *argument = argv[*at];
    size_t length = strlen(full);
    if (!strncmp(argument, full, length) && argument[length] == '=')
        return argv[*at] + length + 1;
    if ((strcmp(argument, full) && (!brief || strcmp(argument, brief))) || *at + 1 >= argc)
        return NULL;
    return argv[++*at];
}

/* -1: go on; else the exit status. */
static int read_options(int argc, char **argv, struct options *o) {
    for (int i = 1; i < argc; i++) {
        char *value;
        const char *a = argv[i];
        if (!strcmp(a, "-h") || !strcmp(a, "--help")) {
            fputs(help, stdout);
            return 0;
        } else if (!strcmp(a, "--help-query-gpu")) {
            smi_query_help();
            return 0;
        } else if (!strcmp(a, "-L") || !strcmp(a, "--list-gpus")) {
            o->what = LIST;
        } else if (!strcmp(a, "-q") || !strcmp(a, "--query")) {
            o->what = DETAILS;
        } else if ((value = value_of(argc, argv, &i, NULL, "--query-gpu"))) {
            o->what = QUERY_GPU;
            o->fields = value;
        } else if ((value = value_of(argc, argv, &i, NULL, "--query-compute-apps"))) {
            o->what = QUERY_APPS;
            o->fields = value;
        } else if ((value = value_of(argc, argv, &i, NULL, "--format"))) {
            o->format = value;
        } else if ((value = value_of(argc, argv, &i, "-i", "--id"))) {
            o->ids = value;
        } else if ((value = value_of(argc, argv, &i, "-l", "--loop"))) {
            o->loop = (unsigned)strtoul(value, NULL, 10);
        } else {
            fprintf(stderr, "Invalid combination of input arguments: %s\nnvidia-smi -h says what there is.\n", a);
            return 2;
        }
    }
    return -1;
}

static int show(const struct options *o, struct smi_format format) {
    switch (o->what) {
    case LIST:
        smi_list();
        return 0;
    case DETAILS:
        smi_details();
        return 0;
    case QUERY_GPU:
        return smi_query_gpu(o->fields, format);
    case QUERY_APPS:
        return smi_query_apps(o->fields, format);
    default:
        smi_table();
        return 0;
    }
}

int main(int argc, char **argv) {
    struct options o = {.what = TABLE};
    struct smi_format format = {.header = true, .units = true};
    int status = read_options(argc, argv, &o);
    if (status >= 0)
        return status;
    bool query = o.what == QUERY_GPU || o.what == QUERY_APPS;
    if (query && !o.format) {
        fprintf(stderr, "\"--format=\" switch is missing. It is a required switch when using --query-<sub-tool>=\n");
        return 2;
    }
    if (o.format && (status = read_format(o.format, &format)))
        return status;
    if ((status = load_nvml()))
        return status;
    if (o.ids && (status = select_devices(o.ids)))
        return status;
    do {
        status = show(&o, format);
        fflush(stdout);
        if (o.loop)
            sleep(o.loop);
    } while (o.loop && !status);
    smi.shutdown();
    return status;
}
