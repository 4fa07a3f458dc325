/* audit BOARD LIMIT_MIB: looks, until it is killed, whether the living processes of a storm ever hold more than the limit together.
 *
 * A sum over words that change one by one is no snapshot, so the words are read twice: unchanged, they were all true in between. Who is
 * dead by then does not count: what it held may have been given to others. Neither can take a sum within the limit for one above it.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "board.h"

typedef struct {
    uint64_t pid, held;
} Seen;

static void look(Row *rows, Seen *seen) {
    for (int i = 1; i < ROWS; i++)
        seen[i] = (Seen){rows[i].pid, rows[i].held};
}

static int is_dead(uint64_t pid) {
    char path[40], text[512] = "";
    snprintf(path, sizeof path, "/proc/%u/stat", (unsigned)pid);
    FILE *file = fopen(path, "r");
    size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file)
        fclose(file);
    const char *state = size ? strrchr(text, ')') : NULL;
    return !state || strchr("ZX", state[2]) != NULL;
}

static uint64_t sum(const Seen *seen, int living_only) {
    uint64_t mib = 0;
    for (int i = 1; i < ROWS; i++)
        if (seen[i].pid && !(living_only && is_dead(seen[i].pid)))
            mib += (uint32_t)seen[i].held;
    return mib;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    Row *rows = board_map(argv[1]);
    Audit *out = (Audit *)rows;
    const uint64_t limit = strtoull(argv[2], NULL, 10);
    for (uint64_t round = 1;; round++) {
        Seen first[ROWS] = {0}, again[ROWS] = {0};
        look(rows, first);
        look(rows, again);
        if (memcmp(first, again, sizeof first) == 0) {
            uint64_t mib = sum(first, 0);
            if (mib > limit && (mib = sum(first, 1)) > limit)
                out->overs++;
            if (mib > out->most_mib)
                out->most_mib = mib;
            out->snapshots++;
        }
        if (round % 64 == 0)
            usleep(200);
    }
}
