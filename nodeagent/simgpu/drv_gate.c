/* Every exported call: it is counted while it runs, and waits while the process is locked for a checkpoint; then it goes on to
 * the function of the same name that API() defines. What no source defines answers CUDA_ERROR_NOT_SUPPORTED.
 *
 * One wrapper fits all: a call's parameters are handed on as they came, as words. That covers the registers that pass integers
 * and pointers and the words on the stack behind them, which is what the calling conventions of x86-64 and arm64 use for every
 * function of the driver; floats, which only the old cuParamSetf and texture calls have, may be lost on the way.
 */
#define _GNU_SOURCE
#include "drv.h"

typedef uintptr_t word;
#define WORDS                                                                                                                              \
    word a0, word a1, word a2, word a3, word a4, word a5, word a6, word a7, word a8, word a9, word a10, word a11, word a12, word a13
#define PASSED a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13

static __thread unsigned depth; /* calls within calls count once */
static __thread bool counted;

static bool is_client(void) {
    return drv.ready && !atomic_load_explicit(&drv.forked, memory_order_relaxed) && __atomic_load_n(&drv.sim.client, __ATOMIC_ACQUIRE) >= 0;
}

CUresult drv_gate_enter(void) {
    if (depth == 0 && is_client()) {
        NEED(sim_call_begin(&drv.sim), CUDA_ERROR_UNKNOWN);
        counted = true;
    }
    depth++;
    return CUDA_SUCCESS;
}

void drv_gate_leave(void) {
    if (--depth || !counted)
        return;
    counted = false;
    sim_call_end(&drv.sim);
}

void drv_gate_attached(void) { counted = true; /* sim_attach has counted it */ }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
static CUresult not_supported(WORDS) { return CUDA_ERROR_NOT_SUPPORTED; }
#pragma GCC diagnostic pop

/* Weak, both: API()'s function wins over "not supported", OPEN_API()'s over the wrapper. */
#define GATED(symbol)                                                                                                                      \
    __attribute__((weak, alias("not_supported"))) CUresult symbol##_call(WORDS);                                                           \
    EXPORT __attribute__((weak)) CUresult symbol(WORDS) {                                                                                  \
        TRY(drv_gate_enter());                                                                                                             \
        CUresult result = symbol##_call(PASSED);                                                                                           \
        drv_gate_leave();                                                                                                                  \
        return result;                                                                                                                     \
    }
#define E(name, version, symbol) GATED(symbol)
#define P(name, version, symbol, own) GATED(symbol) GATED(own)
#define R(name, version, symbol)
#define S(symbol) GATED(symbol)
#include "drv_entry_points.inc"
