/* cuGetProcAddress in its two forms. */
#include "drv.h"

#define DECLARE(symbol) EXPORT CUresult symbol(void);
#define E(name, version, symbol) DECLARE(symbol)
#define P(name, version, symbol, own) DECLARE(symbol) DECLARE(own)
#define R(name, version, symbol)
#define S(symbol)
#include "drv_entry_points.inc"
#undef E
#undef P
#undef R
#undef S

struct row {
    const char *name;
    int version;
    void *symbol, *own;
};

#define E(name, version, symbol) {#name, version, (void *)symbol, NULL},
#define P(name, version, symbol, own) {#name, version, (void *)symbol, (void *)own},
#define R(name, version, symbol) {#name, version, (void *)symbol, NULL},
#define S(symbol)
static const struct row rows[] = {
#include "drv_entry_points.inc"
};

enum { ROWS = sizeof rows / sizeof *rows, BUCKETS = 1024 };
static uint16_t bucket_of[BUCKETS], next_of[ROWS]; /* row + 1 */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static unsigned hash(const char *name) {
    unsigned h = 5381;
    for (; *name; name++)
        h = h * 33 + (unsigned char)*name;
    return h % BUCKETS;
}

static void index_rows(void) {
    for (unsigned i = 0; i < ROWS; i++) {
        unsigned h = hash(rows[i].name);
        next_of[i] = bucket_of[h];
        bucket_of[h] = (uint16_t)(i + 1);
    }
}

CUresult drv_resolve(const char *name, void **out, int asked, uint64_t flags, int *status) {
    const struct row *best = NULL;
    bool known = false;
    NEED(name && out && flags <= 2, CUDA_ERROR_INVALID_VALUE);
    pthread_once(&once, index_rows);
    int ours = drv_driver_version();
    for (unsigned i = bucket_of[hash(name)]; i; i = next_of[i - 1]) {
        const struct row *row = &rows[i - 1];
        if (strcmp(row->name, name) != 0)
            continue;
        known = true;
        if (row->version <= asked && row->version <= ours && (!best || row->version > best->version))
            best = row;
    }
    *out = best ? (flags == CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM && best->own ? best->own : best->symbol) : NULL;
    *status = best    ? CU_GET_PROC_ADDRESS_SUCCESS
              : known ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                      : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return best ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
