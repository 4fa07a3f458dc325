/* How long a launch takes. Nothing is executed: the duration is a property of the GPU kernel's name and launch parameters.
 * The rules are in README.md; the limiter and the agent never see them. */
#define _GNU_SOURCE
#include <fnmatch.h>

#include "drv.h"

enum { BY_GRID, FIXED, FIRST_PARAMETER };
enum { BASE_NS = 2000, WAVE_NS = 2000, THREADS_AT_ONCE = 132 * 2048 };

/* "250us" and the like; 0 ns when it is no duration. */
static uint64_t duration(const char *text, size_t *length) {
    char *end;
    if (*text < '0' || *text > '9')
        return 0;
    unsigned long long value = strtoull(text, &end, 10);
    static const struct {
        const char *name;
        uint64_t ns;
    } units[] = {{"ns", 1}, {"us", 1000}, {"ms", 1000000}, {"s", 1000000000}};
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        size_t n = strlen(units[i].name);
        if (strncmp(end, units[i].name, n) != 0)
            continue;
        *length = (size_t)(end - text) + n;
        return value * units[i].ns;
    }
    return 0;
}

/* NBGPU_SIM_KERNELS="gemm*=2ms;relu=40us": the first pattern that fits. */
static bool from_table(CUfunction f) {
    const char *at = getenv("NBGPU_SIM_KERNELS");
    while (at && *at) {
        size_t item = strcspn(at, ";"), length;
        const char *equals = memchr(at, '=', item);
        char pattern[128];
        if (equals && (size_t)(equals - at) < sizeof pattern) {
            memcpy(pattern, at, (size_t)(equals - at));
            pattern[equals - at] = 0;
            uint64_t ns = duration(equals + 1, &length);
            if (ns && fnmatch(pattern, f->name, 0) == 0) {
                f->timing = FIXED;
                f->unit_ns = ns;
                return true;
            }
        }
        at += item + (at[item] == ';');
    }
    return false;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

void timing_of(CUfunction f) {
    static const struct {
        const char *end;
        uint64_t ns;
    } units[] = {{"_arg_ns", 1}, {"_arg_us", 1000}, {"_arg_ms", 1000000}};
    if (from_table(f))
        return;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (ends_with(f->name, units[i].end)) {
            f->timing = FIRST_PARAMETER;
            f->unit_ns = units[i].ns;
            return;
        }
    for (const char *part = strchr(f->name, '_'); part; part = strchr(part + 1, '_')) {
        size_t length;
        uint64_t ns = duration(part + 1, &length);
        if (ns && (part[1 + length] == 0 || part[1 + length] == '_')) {
            f->timing = FIXED;
            f->unit_ns = ns;
            return;
        }
    }
    f->timing = BY_GRID;
}

/* The first parameter as an unsigned 64-bit number (32 bits where the image says that it is so small). */
static uint64_t first_parameter(const struct CUfunc_st *f, void **params, void **extra) {
    const void *at = params ? params[0] : NULL;
    uint64_t value = 0;
    for (; !at && extra && *extra; extra += 2)
        if (*extra == (void *)1)
            at = extra[1]; /* CU_LAUNCH_PARAM_BUFFER_POINTER */
    if (at)
        memcpy(&value, at, f->parameters > 0 && f->parameter_size[0] < 8 ? f->parameter_size[0] : 8);
    return value;
}

uint64_t launch_ns(CUfunction f, const CUlaunchConfig *c, void **params, void **extra) {
    if (f->timing == FIXED)
        return f->unit_ns;
    if (f->timing == FIRST_PARAMETER)
        return first_parameter(f, params, extra) * f->unit_ns;
    uint64_t threads = (uint64_t)c->gridDimX * c->gridDimY * c->gridDimZ * c->blockDimX * c->blockDimY * c->blockDimZ;
    return BASE_NS + (threads + THREADS_AT_ONCE - 1) / THREADS_AT_ONCE * WAVE_NS;
}
