/* How calls reach the limiter: dlsym, dlvsym, cuGetProcAddress and the exported functions themselves.
 *
 * The rule: ask the real resolver with the caller's own arguments; if what it returns is a function we stand in for, return ours.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <string.h>

#include "limiter.h"

#define KNOWN_CUDA_VERSION 13029 /* beyond it a name may mean a function with other arguments */

typedef struct {
    const char *name, *base;
    int since, library, ptsz;
    void *hook;
} Function;

static const Function functions[FUNCTIONS] = {
#define HOOK(library, result, name, arguments, base, since, ptsz) [F_##name] = {#name, base, since, library, ptsz, (void *)name},
#define CALL(library, result, name, arguments) [F_##name] = {#name, NULL, 0, library, 0, NULL},
#include "functions.h"
};
static const char *const sonames[LIBRARIES] = {"libcuda.so.1", "libnvidia-ml.so.1"};
void *nbgpu_real[FUNCTIONS];

/* libc's own, found without dlsym, which is ours. The assembly below jumps to them. */
__attribute__((visibility("hidden"))) void *nbgpu_libc_dlsym, *nbgpu_libc_dlvsym;
static void *libc_dlopen, *libc_dladdr;
static pthread_mutex_t bind_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int bound[LIBRARIES];

typedef struct {
    const ElfW(Sym) * symbols;
    const char *strings;
    const uint32_t *gnu_hash;
} Dynamic;

static void *elf_find(ElfW(Addr) base, const Dynamic *dynamic, const char *name) {
    uint32_t hash = 5381;
    for (const unsigned char *c = (const unsigned char *)name; *c; c++)
        hash = hash * 33 + *c;
    const uint32_t buckets = dynamic->gnu_hash[0], first = dynamic->gnu_hash[1], words = dynamic->gnu_hash[2];
    const uint32_t *bucket = dynamic->gnu_hash + 4 + words * (sizeof(ElfW(Addr)) / 4);
    const uint32_t *chain = bucket + buckets;
    uint32_t i = bucket[hash % buckets];
    if (i < first)
        return NULL;
    for (;; i++) {
        uint32_t other = chain[i - first];
        if ((other | 1) == (hash | 1) && strcmp(dynamic->strings + dynamic->symbols[i].st_name, name) == 0 &&
            dynamic->symbols[i].st_shndx != SHN_UNDEF)
            return (void *)(base + dynamic->symbols[i].st_value);
        if (other & 1)
            return NULL;
    }
}

static int look_into(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    const char *file = strrchr(info->dlpi_name, '/');
    file = file ? file + 1 : info->dlpi_name;
    if (strncmp(file, "libc.so.6", 9) != 0 && strncmp(file, "libdl.so.2", 10) != 0 && strncmp(file, "libc-2.", 7) != 0 &&
        strncmp(file, "libdl-2.", 8) != 0)
        return 0;
    Dynamic dynamic = {0};
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_DYNAMIC)
            continue;
        for (const ElfW(Dyn) *d = (const void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr); d->d_tag != DT_NULL; d++) {
            if (d->d_tag == DT_SYMTAB)
                dynamic.symbols = (const void *)d->d_un.d_ptr;
            if (d->d_tag == DT_STRTAB)
                dynamic.strings = (const void *)d->d_un.d_ptr;
            if (d->d_tag == DT_GNU_HASH)
                dynamic.gnu_hash = (const void *)d->d_un.d_ptr;
        }
    }
    if (!dynamic.symbols || !dynamic.strings || !dynamic.gnu_hash)
        return 0;
    void *found = elf_find(info->dlpi_addr, &dynamic, "dlsym");
    if (!found)
        return 0;
    nbgpu_libc_dlvsym = elf_find(info->dlpi_addr, &dynamic, "dlvsym");
    libc_dlopen = elf_find(info->dlpi_addr, &dynamic, "dlopen");
    libc_dladdr = elf_find(info->dlpi_addr, &dynamic, "dladdr");
    __atomic_store_n(&nbgpu_libc_dlsym, found, __ATOMIC_RELEASE);
    return 1;
}

static bool find_libc(void) {
    if (likely(__atomic_load_n(&nbgpu_libc_dlsym, __ATOMIC_ACQUIRE) != NULL))
        return true;
    dl_iterate_phdr(look_into, NULL);
    return nbgpu_libc_dlsym != NULL;
}

static void *libc_lookup(void *handle, const char *name) { return ((void *(*)(void *, const char *))nbgpu_libc_dlsym)(handle, name); }

bool nbgpu_bind(int library) {
    if (likely(bound[library]))
        return true;
    if (!find_libc() || !libc_dlopen)
        return false;
    void *handle = ((void *(*)(const char *, int))libc_dlopen)(sonames[library], RTLD_LAZY | RTLD_NOLOAD);
    if (!handle)
        return false;
    pthread_mutex_lock(&bind_lock);
    for (int i = 0; i < FUNCTIONS && !bound[library]; i++)
        if (functions[i].library == library)
            nbgpu_real[i] = libc_lookup(handle, functions[i].name);
    bound[library] = 1; /* the handle is kept: what was bound must stay loaded */
    pthread_mutex_unlock(&bind_lock);
    return true;
}

bool nbgpu_prepare(int function) {
    const int library = functions[function].library;
    if (!nbgpu_bind(library) || !nbgpu_real[function])
        return false;
    if (library == CUDA && nbgpu_attach() == SLICE_ACTIVE)
        nbgpu_ready = 1;
    return true;
}

/* Ours for the driver's function number i, or the driver's where this process is in no slice. */
static void *stand_in(int i) {
    if (nbgpu_attach() == SLICE_NONE)
        return nbgpu_real[i];
    return functions[i].hook;
}

static int find_function(const char *name) {
    for (int i = 0; i < FUNCTIONS; i++)
        if (functions[i].hook && functions[i].name[2] == name[2] && strcmp(functions[i].name, name) == 0)
            return i;
    return -1;
}

typedef struct {
    void *value;
    long decided; /* 0: ask libc, as if the caller had */
} Lookup;

EXPORT void *dlsym(void *handle, const char *name);
EXPORT void *dlvsym(void *handle, const char *name, const char *version);

static Lookup lookup_resolver(void *handle, const char *name) {
    void *ours = name[2] == 's' ? (void *)dlsym : (void *)dlvsym;
    void *libc = name[2] == 's' ? nbgpu_libc_dlsym : nbgpu_libc_dlvsym;
    if (handle == RTLD_NEXT || handle == RTLD_DEFAULT)
        return (Lookup){ours, 1};
    void *found = libc_lookup(handle, name);
    return (Lookup){found == libc ? ours : found, 1};
}

__attribute__((visibility("hidden"))) Lookup nbgpu_lookup(void *handle, const char *name, const char *version, long versioned) {
    const Lookup ask_libc = {NULL, 0};
    if (!find_libc())
        return (Lookup){NULL, 1};
    if (!name || (name[0] != 'c' && name[0] != 'n' && name[0] != 'd'))
        return ask_libc;
    if (name[0] == 'd')
        return strcmp(name, "dlsym") == 0 || strcmp(name, "dlvsym") == 0 ? lookup_resolver(handle, name) : ask_libc;
    if (strncmp(name, "cu", 2) != 0 && strncmp(name, "nvml", 4) != 0)
        return ask_libc;
    const int i = find_function(name);
    if (i < 0)
        return ask_libc;
    const bool loaded = nbgpu_bind(functions[i].library);
    if (handle == RTLD_DEFAULT || handle == RTLD_NEXT) {
        if (loaded && nbgpu_real[i])
            return (Lookup){stand_in(i), 1};
        return (Lookup){libc_lookup(RTLD_NEXT, name), 1}; /* whoever else has it; not our export, which has nothing behind it */
    }
    void *found =
        versioned ? ((void *(*)(void *, const char *, const char *))nbgpu_libc_dlvsym)(handle, name, version) : libc_lookup(handle, name);
    if (found == functions[i].hook && !(loaded && nbgpu_real[i]))
        found = libc_lookup(RTLD_NEXT, name);
    if (found && (found == nbgpu_real[i] || found == functions[i].hook))
        found = stand_in(i);
    return (Lookup){found, 1};
}

/* The two resolvers end in a jump, so that libc sees the caller's return address: RTLD_NEXT and $ORIGIN mean the caller's. */
#if defined(__x86_64__)
__asm__(".text\n"
        ".globl dlsym\n.type dlsym, @function\n"
        "dlsym:\n"
        "  endbr64\n"
        "  pushq %rdi\n  pushq %rsi\n  subq $8, %rsp\n"
        "  xorl %edx, %edx\n  xorl %ecx, %ecx\n"
        "  call nbgpu_lookup\n"
        "  addq $8, %rsp\n  popq %rsi\n  popq %rdi\n"
        "  testq %rdx, %rdx\n  jz 1f\n  ret\n"
        "1: jmpq *nbgpu_libc_dlsym(%rip)\n"
        ".size dlsym, .-dlsym\n"
        ".globl dlvsym\n.type dlvsym, @function\n"
        "dlvsym:\n"
        "  endbr64\n"
        "  pushq %rdi\n  pushq %rsi\n  pushq %rdx\n"
        "  movl $1, %ecx\n"
        "  call nbgpu_lookup\n"
        "  movq %rdx, %rcx\n"
        "  popq %rdx\n  popq %rsi\n  popq %rdi\n"
        "  testq %rcx, %rcx\n  jz 1f\n  ret\n"
        "1: jmpq *nbgpu_libc_dlvsym(%rip)\n"
        ".size dlvsym, .-dlvsym\n");
#elif defined(__aarch64__)
#define RESOLVER(name, versioned)                                                                                                          \
    __asm__(".text\n.globl " name "\n.type " name ", %function\n" name ":\n"                                                               \
            "  hint #34\n"                                                                                                                 \
            "  stp x29, x30, [sp, #-48]!\n  stp x0, x1, [sp, #16]\n  str x2, [sp, #32]\n"                                                  \
            "  mov x3, #" versioned "\n  bl nbgpu_lookup\n  mov x9, x0\n  mov x10, x1\n"                                                   \
            "  ldp x0, x1, [sp, #16]\n  ldr x2, [sp, #32]\n  ldp x29, x30, [sp], #48\n"                                                    \
            "  cbz x10, 1f\n  mov x0, x9\n  ret\n"                                                                                         \
            "1: adrp x16, nbgpu_libc_" name "\n  ldr x16, [x16, :lo12:nbgpu_libc_" name "]\n  br x16\n.size " name ", .-" name "\n")
RESOLVER("dlsym", "0");
RESOLVER("dlvsym", "1");
#else
#error "the resolvers are written for x86-64 and arm64"
#endif

/* ---- cuGetProcAddress ---- */

/* A driver may let many names lead to one function, as "not supported" does: the address alone says nothing. */
static bool goes_by(int i, const char *symbol) {
    if (i == F_cuGraphInstantiateWithFlags && strcmp(symbol, "cuGraphInstantiate") == 0)
        return true; /* the name moved on in CUDA 12 */
    return strcmp(functions[i].base, symbol) == 0 || strcmp(functions[i].name, symbol) == 0;
}

/* Ours for what the driver returned. By address; where a driver returns an address that it does not export, by name and version. */
static void *replace(void *found, const char *symbol, int version, uint64_t flags) {
    if (!found || !symbol)
        return found;
    const int ptsz = (flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM) != 0;
    int named = -1;
    for (int i = 0; i < FUNCTIONS; i++) {
        if (!functions[i].hook || functions[i].library != CUDA)
            continue;
        if (nbgpu_real[i] == found && goes_by(i, symbol))
            return functions[i].hook;
        if (strcmp(functions[i].base, symbol) != 0 || functions[i].since > version || !nbgpu_real[i])
            continue;
        if (functions[i].ptsz > ptsz)
            continue;
        if (named < 0 || functions[i].ptsz > functions[named].ptsz ||
            (functions[i].ptsz == functions[named].ptsz && functions[i].since > functions[named].since))
            named = i;
    }
    if (strcmp(symbol, "cuGraphInstantiate") == 0 && version >= 12000)
        named = F_cuGraphInstantiateWithFlags; /* the name moved on */
    if (named < 0 || version > KNOWN_CUDA_VERSION)
        return found;
    Dl_info info; /* an exported function that is not in our table is one we don't know: leave it */
    if (!libc_dladdr || !((int (*)(const void *, Dl_info *))libc_dladdr)(found, &info))
        return found;
    if (info.dli_saddr == found && info.dli_sname)
        return found;
    return functions[named].hook;
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    if (!nbgpu_prepare(F_cuGetProcAddress))
        return CUDA_ERROR_NOT_FOUND;
    CUresult result = REAL(cuGetProcAddress)(symbol, function, version, flags);
    if (result == CUDA_SUCCESS && function && nbgpu_attach() != SLICE_NONE)
        *function = replace(*function, symbol, version, flags);
    return result;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    if (!nbgpu_prepare(F_cuGetProcAddress_v2))
        return CUDA_ERROR_NOT_FOUND;
    CUresult result = REAL(cuGetProcAddress_v2)(symbol, function, version, flags, status);
    if (result == CUDA_SUCCESS && function && nbgpu_attach() != SLICE_NONE)
        *function = replace(*function, symbol, version, flags);
    return result;
}
