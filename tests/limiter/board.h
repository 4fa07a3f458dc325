/* What processes of a storm say of themselves to a test, in a file that all map. Row 0 is the auditor's.
 *
 * `held` says how much a process holds at the least, and changes with every step: version << 32 | MiB. It rises after an allocation
 * and falls before a free, so that the sum of one moment's values is never above what the limiter has let through. */
#ifndef BOARD_H
#define BOARD_H
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define ROWS 16
typedef struct {
    _Atomic uint64_t steps, held, still, standing, pid, unused[3];
} Row;
typedef struct {
    _Atomic uint64_t snapshots, overs, most_mib, unused[5];
} Audit;
_Static_assert(sizeof(Row) == sizeof(Audit), "one row each");

static inline Row *board_map(const char *path) {
    int fd = open(path, O_RDWR);
    Row *rows = mmap(NULL, ROWS * sizeof *rows, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd < 0 || rows == MAP_FAILED)
        exit(3);
    return rows;
}
#endif
