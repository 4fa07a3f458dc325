/* The little that is read of PTX: which entries it has, their parameters' sizes, its global variables' sizes. */
#define _GNU_SOURCE
#include <ctype.h>

#include "drv.h"

static bool name_char(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }

static const char *skip_space(const char *at) {
    while (isspace((unsigned char)*at))
        at++;
    return at;
}

static size_t type_bytes(const char *type, size_t length) {
    if (length == 4 && strncmp(type, "pred", 4) == 0)
        return 1;
    const char *digits = type;
    while (digits < type + length && !isdigit((unsigned char)*digits))
        digits++;
    long bits = digits < type + length ? strtol(digits, NULL, 10) : 0;
    return bits > 0 ? (size_t)bits / 8 : 0;
}

/* A declaration from behind its state space: ".align 8 .b8 name[16]" or ".u64 .ptr .global .align 4 name". Bytes and name. */
static size_t declaration(const char *at, const char **name, size_t *name_length) {
    size_t bytes = 0, count = 1;
    for (at = skip_space(at); *at == '.' || isdigit((unsigned char)*at); at = skip_space(at)) {
        const char *word = at + (*at == '.');
        size_t length = 0;
        while (name_char(word[length]))
            length++;
        if (*at == '.' && strchr("usbf", *word) && length >= 2 && isdigit((unsigned char)word[1]))
            bytes = type_bytes(word, length);
        at = word + length;
        if (!length)
            return 0;
    }
    *name = at;
    for (*name_length = 0; name_char(at[*name_length]); (*name_length)++)
        continue;
    at = skip_space(at + *name_length);
    while (*at == '[') {
        count *= strtoul(at + 1, NULL, 10);
        at = skip_space(at + 1 + strcspn(at + 1, "]") + 1);
    }
    return bytes * count;
}

bool ptx_next_entry(const char **at, char *name, size_t room) {
    const char *entry = strstr(*at, ".entry");
    if (!entry)
        return false;
    entry = skip_space(entry + 6);
    size_t length = 0;
    for (; name_char(entry[length]) && length + 1 < room; length++)
        name[length] = entry[length];
    name[length] = 0;
    *at = entry + length;
    return true;
}

bool ptx_has_entry(const char *text, const char *name, const char **parameters) {
    char found[1024];
    for (const char *at = text; ptx_next_entry(&at, found, sizeof found);)
        if (strcmp(found, name) == 0) {
            *parameters = skip_space(at);
            return true;
        }
    return false;
}

void ptx_parameters(CUfunction f, const char *at) {
    uint32_t offset = 0;
    f->parameters = 0;
    if (*at != '(')
        return;
    const char *end = strchr(at, ')');
    while (f->parameters < 64 && (at = strstr(at, ".param")) && at < end) {
        const char *name;
        size_t length;
        uint32_t bytes = (uint32_t)declaration(at + 6, &name, &length), align = bytes > 8 || bytes & (bytes - 1) ? 8 : bytes ? bytes : 1;
        offset = (offset + align - 1) / align * align;
        f->parameter_offset[f->parameters] = offset;
        f->parameter_size[f->parameters++] = bytes;
        offset += bytes;
        at += 6;
    }
}

bool ptx_next_global(const char **at, char *out, size_t room) {
    for (; (*at = strpbrk(*at, ".")); ++*at) {
        size_t skip = strncmp(*at, ".global", 7) == 0 ? 7 : strncmp(*at, ".const", 6) == 0 ? 6 : 0, length = 0;
        const char *name;
        if (!skip || !isspace((unsigned char)(*at)[skip]) || !declaration(*at + skip, &name, &length) || length >= room)
            continue;
        memcpy(out, name, length);
        out[length] = 0;
        *at += skip;
        return true;
    }
    return false;
}

size_t ptx_global(const char *text, const char *wanted) {
    for (const char *at = text; (at = strpbrk(at, ".")); at++) {
        size_t skip = strncmp(at, ".global", 7) == 0 ? 7 : strncmp(at, ".const", 6) == 0 ? 6 : 0;
        const char *name;
        size_t length = 0;
        if (!skip || !isspace((unsigned char)at[skip]))
            continue;
        size_t bytes = declaration(at + skip, &name, &length);
        if (bytes && length == strlen(wanted) && strncmp(name, wanted, length) == 0)
            return bytes;
    }
    return 0;
}
