/* Fault injection shared by the limiter and the simulated driver: marked points at which a process kills itself.
 *
 * NBGPU_FAULT=<point>:<n> makes the n-th pass (from 1) through NBGPU_POINT("<point>") a SIGKILL, which no handler sees.
 * Compiled in only with -DNBGPU_FAULTS; a disarmed point costs one load and a branch that is never taken.
 * Exactly one source of each library defines NBGPU_FAULT_MAIN before it includes this file and calls nbgpu_fault_arm() once.
 */
#ifndef NBGPU_FAULT_H
#define NBGPU_FAULT_H

#ifdef NBGPU_FAULTS
extern __attribute__((visibility("hidden"))) int nbgpu_fault_armed;
__attribute__((visibility("hidden"))) void nbgpu_fault_pass(const char *point);
__attribute__((visibility("hidden"))) void nbgpu_fault_arm(void);
#define NBGPU_POINT(name)                                                                                                                  \
    do {                                                                                                                                   \
        if (__builtin_expect(nbgpu_fault_armed, 0))                                                                                        \
            nbgpu_fault_pass(name);                                                                                                        \
    } while (0)
#else
#define NBGPU_POINT(name) ((void)0)
#define nbgpu_fault_arm() ((void)0)
#endif

#if defined(NBGPU_FAULTS) && defined(NBGPU_FAULT_MAIN)
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int nbgpu_fault_armed;
static const char *fault_point;
static size_t fault_length;
static long fault_left;

void nbgpu_fault_arm(void) {
    const char *wish = getenv("NBGPU_FAULT");
    const char *colon = wish ? strrchr(wish, ':') : NULL;
    if (!colon)
        return;
    fault_point = wish;
    fault_length = (size_t)(colon - wish);
    fault_left = atol(colon + 1);
    nbgpu_fault_armed = fault_left > 0;
}

void nbgpu_fault_pass(const char *point) {
    if (strncmp(point, fault_point, fault_length) != 0 || point[fault_length] != 0)
        return;
    if (__atomic_sub_fetch(&fault_left, 1, __ATOMIC_RELAXED) == 0)
        kill(getpid(), SIGKILL);
}
#endif
#endif
