/* Modules, libraries, functions, globals, and linking, which here is putting texts together. */
#define _GNU_SOURCE
#include <stdio.h>

#include "drv.h"

struct global {
    char *name;
    CUdeviceptr base;
    size_t bytes;
    struct global *next;
};

static struct CUmod_st *modules; /* under modules_lock */
static pthread_mutex_t modules_lock = PTHREAD_MUTEX_INITIALIZER;

/* Binary images begin with the bytes of an ELF file or of a fat binary or its wrapper. */
static bool is_binary(const void *image) {
    uint32_t first;
    memcpy(&first, image, sizeof first);
    return first == 0x464c457fu || first == 0xba55ed50u || first == 0x466243b1u;
}

enum { SMALL_CODE = 64 << 10 }; /* what is smaller lies in memory that a context has anyway */

static CUresult global(struct CUmod_st *module, const char *name, CUdeviceptr *base, size_t *bytes);
static void unload(struct CUmod_st *module, bool with_memory);

static int device_of(const struct CUmod_st *module) { return module->ctx ? module->ctx->device : drv.visible[0]; }

static CUresult load(struct CUmod_st **out, CUcontext ctx, const void *image) {
    NEED(out && image, CUDA_ERROR_INVALID_VALUE);
    struct CUmod_st *module = calloc(1, sizeof *module);
    NEED(module, CUDA_ERROR_OUT_OF_MEMORY);
    module->magic = MODULE_MAGIC;
    module->ctx = ctx;
    if (!is_binary(image) && strstr(image, ".entry"))
        module->text = strdup(image);
    size_t length = module->text ? strlen(module->text) : 0;
    if (length > SMALL_CODE && drv.sim.client >= 0) {
        module->code = (length + SIM_PAGE - 1) / SIM_PAGE * SIM_PAGE;
        if (!sim_mem_take(&drv.sim, (unsigned)device_of(module), module->code)) {
            free(module->text);
            free(module);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
    }
    pthread_mutex_lock(&modules_lock);
    module->next = modules;
    modules = module;
    pthread_mutex_unlock(&modules_lock);
    *out = module;
    return CUDA_SUCCESS;
}

/* A module's variables are there when it is loaded; a library's when they are asked for. */
static CUresult load_globals(struct CUmod_st *module) {
    char name[256];
    const char *at = module->text;
    while (at && ptx_next_global(&at, name, sizeof name)) {
        CUresult result = global(module, name, NULL, NULL);
        if (result == CUDA_SUCCESS)
            continue;
        pthread_mutex_lock(&modules_lock);
        unload(module, true);
        pthread_mutex_unlock(&modules_lock);
        return result;
    }
    return CUDA_SUCCESS;
}

static void unload(struct CUmod_st *module, bool with_memory) { /* modules_lock held */
    struct block was;
    module->magic = 0;
    for (CUfunction f = module->functions; f; f = f->next)
        f->magic = 0;
    while (module->globals) {
        struct global *global = module->globals;
        module->globals = global->next;
        if (with_memory)
            heap_free(global->base, &was);
        free(global->name);
        free(global);
    }
    free(module->text);
    module->text = NULL;
    if (module->code)
        sim_mem_give(&drv.sim, (unsigned)device_of(module), module->code);
    module->code = 0;
    for (struct CUmod_st **at = &modules; *at; at = &(*at)->next)
        if (*at == module) {
            *at = module->next;
            break;
        }
}

void modules_drop_ctx(CUcontext ctx) {
    pthread_mutex_lock(&modules_lock);
    for (struct CUmod_st *module = modules, *next; module; module = next) {
        next = module->next;
        if (module->ctx == ctx)
            unload(module, false); /* their memory goes with the context's heap */
    }
    pthread_mutex_unlock(&modules_lock);
}

static CUresult make_function(struct CUmod_st *module, const char *name, CUfunction *out) {
    const char *parameters = NULL;
    if (module->text && !ptx_has_entry(module->text, name, &parameters))
        return CUDA_ERROR_NOT_FOUND;
    CUfunction f = calloc(1, sizeof *f);
    NEED(f, CUDA_ERROR_OUT_OF_MEMORY);
    *f = (struct CUfunc_st){.magic = FUNCTION_MAGIC,
                            .name = strdup(name),
                            .module = module,
                            .max_dynamic_shared = 49152,
                            .carveout = -1,
                            .parameters = -1,
                            .next = module->functions};
    if (parameters)
        ptx_parameters(f, parameters);
    timing_of(f);
    module->functions = f;
    *out = f;
    return CUDA_SUCCESS;
}

static CUresult function(struct CUmod_st *module, const char *name, CUfunction *out) {
    TRY(drv_ready());
    NEED(out && name, CUDA_ERROR_INVALID_VALUE);
    NEED(module && module->magic == MODULE_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    pthread_mutex_lock(&modules_lock);
    CUfunction f = module->functions;
    while (f && strcmp(f->name, name) != 0)
        f = f->next;
    CUresult result = f ? CUDA_SUCCESS : make_function(module, name, &f);
    pthread_mutex_unlock(&modules_lock);
    *out = f;
    return result;
}

static CUresult global(struct CUmod_st *module, const char *name, CUdeviceptr *base, size_t *bytes) {
    CUcontext ctx;
    TRY(drv_current(&ctx));
    NEED(name, CUDA_ERROR_INVALID_VALUE);
    NEED(module && module->magic == MODULE_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&modules_lock);
    struct global *g = module->globals;
    while (g && strcmp(g->name, name) != 0)
        g = g->next;
    size_t size = g ? g->bytes : module->text ? ptx_global(module->text, name) : 0;
    if (!size) {
        result = CUDA_ERROR_NOT_FOUND;
    } else if (!g) {
        CUdeviceptr at = 0;
        g = calloc(1, sizeof *g);
        result = g ? heap_alloc(&ctx->heap, size, &at) : CUDA_ERROR_OUT_OF_MEMORY;
        if (result == CUDA_SUCCESS) {
            *g = (struct global){strdup(name), at, size, module->globals};
            module->globals = g;
        } else {
            free(g);
        }
    }
    pthread_mutex_unlock(&modules_lock);
    TRY(result);
    if (base)
        *base = g->base;
    if (bytes)
        *bytes = g->bytes;
    return CUDA_SUCCESS;
}

static CUresult read_file(const char *path, char **out) {
    NEED(path, CUDA_ERROR_INVALID_VALUE);
    FILE *file = fopen(path, "rbe");
    NEED(file, CUDA_ERROR_FILE_NOT_FOUND);
    size_t room = 4096, n = 0;
    char *text = malloc(room);
    while (text) {
        n += fread(text + n, 1, room - n - 1, file);
        if (n < room - 1)
            break;
        char *more = realloc(text, room *= 2);
        if (!more)
            free(text);
        text = more;
    }
    fclose(file);
    NEED(text, CUDA_ERROR_OUT_OF_MEMORY);
    memset(text + n, 0, room - n < 8 ? room - n : 8);
    *out = text;
    return CUDA_SUCCESS;
}

API(cuModuleLoadData, (CUmodule * out, const void *image)) {
    CUcontext ctx;
    TRY(drv_current(&ctx));
    TRY(load(out, ctx, image));
    return load_globals(*out);
}
API(cuModuleLoadDataEx, (CUmodule * out, const void *image, unsigned n, int *options, void **values)) {
    (void)n, (void)options, (void)values;
    return cuModuleLoadData(out, image);
}
API(cuModuleLoadFatBinary, (CUmodule * out, const void *image)) { return cuModuleLoadData(out, image); }
API(cuModuleLoad, (CUmodule * out, const char *path)) {
    char *text;
    TRY(read_file(path, &text));
    CUresult result = cuModuleLoadData(out, text);
    free(text);
    return result;
}
API(cuModuleUnload, (CUmodule module)) {
    TRY(drv_ready());
    NEED(module && module->magic == MODULE_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    pthread_mutex_lock(&modules_lock);
    unload(module, true);
    pthread_mutex_unlock(&modules_lock);
    return CUDA_SUCCESS;
}
API(cuModuleGetFunction, (CUfunction * out, CUmodule module, const char *name)) { return function(module, name, out); }
API(cuModuleGetGlobal_v2, (CUdeviceptr * base, size_t *bytes, CUmodule module, const char *name)) {
    return global(module, name, base, bytes);
}
API(cuModuleGetLoadingMode, (int *mode)) {
    NEED(mode, CUDA_ERROR_INVALID_VALUE);
    *mode = 2; /* lazy */
    return drv_ready();
}

static unsigned count_entries(struct CUmod_st *module, CUfunction *list, unsigned room) {
    char name[1024];
    unsigned n = 0;
    for (const char *at = module->text; at && ptx_next_entry(&at, name, sizeof name); n++)
        if (list && n < room && function(module, name, &list[n]) != CUDA_SUCCESS)
            break;
    return n;
}
API(cuModuleGetFunctionCount, (unsigned *count, CUmodule module)) {
    NEED(count && module && module->magic == MODULE_MAGIC, CUDA_ERROR_INVALID_VALUE);
    *count = count_entries(module, NULL, 0);
    return CUDA_SUCCESS;
}
API(cuModuleEnumerateFunctions, (CUfunction * list, unsigned room, CUmodule module)) {
    NEED(list && module && module->magic == MODULE_MAGIC, CUDA_ERROR_INVALID_VALUE);
    count_entries(module, list, room);
    return CUDA_SUCCESS;
}

/* Libraries: loaded once for all contexts. */
#define AS_MODULE(library) ((struct CUmod_st *)(library))
API(cuLibraryLoadData, (CUlibrary * out, const void *image, int *a, void **b, unsigned c, int *d, void **e, unsigned f)) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    TRY(drv_ready());
    return load((struct CUmod_st **)out, NULL, image);
}
API(cuLibraryLoadFromFile, (CUlibrary * out, const char *path, int *a, void **b, unsigned c, int *d, void **e, unsigned f)) {
    char *text;
    TRY(drv_ready());
    TRY(read_file(path, &text));
    CUresult result = cuLibraryLoadData(out, text, a, b, c, d, e, f);
    free(text);
    return result;
}
API(cuLibraryUnload, (CUlibrary library)) { return cuModuleUnload(AS_MODULE(library)); }
API(cuLibraryGetModule, (CUmodule * out, CUlibrary library)) {
    NEED(out && library && AS_MODULE(library)->magic == MODULE_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    *out = AS_MODULE(library);
    return CUDA_SUCCESS;
}
API(cuLibraryGetKernel, (CUkernel * out, CUlibrary library, const char *name)) {
    return function(AS_MODULE(library), name, (CUfunction *)out);
}
API(cuLibraryGetKernelCount, (unsigned *count, CUlibrary library)) { return cuModuleGetFunctionCount(count, AS_MODULE(library)); }
API(cuLibraryEnumerateKernels, (CUkernel * list, unsigned room, CUlibrary library)) {
    return cuModuleEnumerateFunctions((CUfunction *)list, room, AS_MODULE(library));
}
API(cuLibraryGetGlobal, (CUdeviceptr * base, size_t *bytes, CUlibrary library, const char *name)) {
    return global(AS_MODULE(library), name, base, bytes);
}
API(cuLibraryGetManaged, (CUdeviceptr * base, size_t *bytes, CUlibrary library, const char *name)) {
    return global(AS_MODULE(library), name, base, bytes);
}

struct CUlinkState_st {
    char *text;
    size_t length;
};
API(cuLinkCreate_v2, (unsigned n, int *options, void **values, CUlinkState *out)) {
    (void)n, (void)options, (void)values;
    TRY(drv_ready());
    NEED(out && (*out = calloc(1, sizeof **out)), CUDA_ERROR_INVALID_VALUE);
    return CUDA_SUCCESS;
}
API(cuLinkAddData_v2, (CUlinkState link, int type, void *data, size_t bytes, const char *name, unsigned n, int *options, void **values)) {
    (void)type, (void)name, (void)n, (void)options, (void)values;
    NEED(link && data, CUDA_ERROR_INVALID_VALUE);
    char *more = realloc(link->text, link->length + bytes + 8);
    NEED(more, CUDA_ERROR_OUT_OF_MEMORY);
    link->text = more;
    memcpy(more + link->length, data, bytes);
    while (bytes && more[link->length + bytes - 1] == 0)
        bytes--; /* the text's own end */
    link->length += bytes;
    memset(more + link->length, 0, 8);
    return CUDA_SUCCESS;
}
API(cuLinkAddFile_v2, (CUlinkState link, int type, const char *path, unsigned n, int *options, void **values)) {
    char *text;
    TRY(read_file(path, &text));
    CUresult result = cuLinkAddData_v2(link, type, text, strlen(text), path, n, options, values);
    free(text);
    return result;
}
API(cuLinkComplete, (CUlinkState link, void **image, size_t *bytes)) {
    NEED(link && link->text && image, CUDA_ERROR_INVALID_VALUE);
    *image = link->text;
    if (bytes)
        *bytes = link->length + 1;
    return CUDA_SUCCESS;
}
API(cuLinkDestroy, (CUlinkState link)) {
    NEED(link, CUDA_ERROR_INVALID_VALUE);
    free(link->text);
    free(link);
    return CUDA_SUCCESS;
}
