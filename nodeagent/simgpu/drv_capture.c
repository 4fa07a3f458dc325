/* Stream capture: calls on a capturing stream become nodes of a graph. Streams join by waiting for an event that was
 * recorded in the capture, and must be joined back before it ends. */
#define _GNU_SOURCE
#include "drv_graph.h"

struct capture {
    CUgraph graph;
    CUstream origin;
    uint64_t id;
    bool own_graph; /* else the caller's: cuStreamBeginCaptureToGraph */
    bool over;
};
static _Atomic uint64_t next_id = 1;
static __thread int thread_mode;

static CUresult set_tips(CUgraphNode **tips, size_t *count, const CUgraphNode *from, size_t n) {
    CUgraphNode *copy = n ? malloc(n * sizeof *copy) : NULL;
    NEED(copy || !n, CUDA_ERROR_OUT_OF_MEMORY);
    if (n)
        memcpy(copy, from, n * sizeof *copy);
    free(*tips);
    *tips = copy;
    *count = n;
    return CUDA_SUCCESS;
}

static CUresult add(CUstream s, const struct work *work) {
    CUgraphNode node;
    TRY(graph_add(&node, s->capture->graph, s->tips, s->tip_count, work));
    return set_tips(&s->tips, &s->tip_count, &node, 1);
}

CUresult capture_kernel(CUstream s, CUfunction f, const CUlaunchConfig *c, void **params, void **extra) {
    CUDA_KERNEL_NODE_PARAMS p = {f,      c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
                                 params, extra,       NULL,        NULL};
    struct work work = work_of(CU_GRAPH_NODE_TYPE_KERNEL);
    TRY(work_of_kernel(&work, &p, true));
    return add(s, &work);
}

static void describe(const struct box_side *side, int *type, const void **host, CUdeviceptr *device) {
    *type = side->device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    *host = side->device ? NULL : side->host;
    *device = side->device ? side->address : 0;
}

CUresult capture_copy(CUstream s, const struct box *box) {
    struct work work = work_of(CU_GRAPH_NODE_TYPE_MEMCPY);
    const void *to;
    work.box = *box;
    describe(&box->from, &work.copy.srcMemoryType, &work.copy.srcHost, &work.copy.srcDevice);
    describe(&box->to, &work.copy.dstMemoryType, &to, &work.copy.dstDevice);
    work.copy.dstHost = (void *)(uintptr_t)to;
    work.copy.srcPitch = box->from.pitch;
    work.copy.dstPitch = box->to.pitch;
    work.copy.WidthInBytes = box->width;
    work.copy.Height = box->height;
    work.copy.Depth = box->depth;
    return add(s, &work);
}

CUresult capture_fill(CUstream s, const struct fill *fill) {
    CUDA_MEMSET_NODE_PARAMS p = {fill->to, fill->pitch, fill->value, fill->element, fill->width, fill->height, NULL};
    struct work work = work_of(CU_GRAPH_NODE_TYPE_MEMSET);
    TRY(work_of_memset(&work, &p));
    return add(s, &work);
}

CUresult capture_host(CUstream s, CUhostFn fn, void *user) {
    struct work work = work_of(CU_GRAPH_NODE_TYPE_HOST);
    work.host = (CUDA_HOST_NODE_PARAMS){fn, user};
    return add(s, &work);
}

CUresult capture_alloc(CUstream s, size_t bytes, CUdeviceptr *out) {
    struct work work = work_of(CU_GRAPH_NODE_TYPE_MEM_ALLOC);
    NEED(bytes, CUDA_ERROR_INVALID_VALUE);
    TRY(graph_allocate(s->ctx->device, bytes, &work.allocation));
    *out = work.allocation->base;
    return add(s, &work);
}

CUresult capture_free(CUstream s, CUdeviceptr p) {
    struct work work = work_of(CU_GRAPH_NODE_TYPE_MEM_FREE);
    NEED(graph_allocation_at(p), CUDA_ERROR_INVALID_VALUE);
    work.freed = p;
    return add(s, &work);
}

void capture_forget_event(CUevent e) {
    e->capture = NULL;
    free(e->tips);
    e->tips = NULL;
    e->tip_count = 0;
}

CUresult capture_event_record(CUstream s, CUevent e) {
    e->capture = s->capture;
    return set_tips(&e->tips, &e->tip_count, s->tips, s->tip_count);
}

/* Waiting for an event of a capture: the stream's next node depends on its nodes too; a stream outside joins the capture. */
CUresult capture_event_wait(CUstream s, CUevent e) {
    NEED(e->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED); /* work from outside: a capture cannot wait for it */
    NEED(!e->capture->over, CUDA_ERROR_CAPTURED_EVENT);
    NEED(!s->capture || s->capture == e->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    NEED(!(s->entry_flags & SIM_LEGACY), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    size_t n = s->capture ? s->tip_count : 0;
    CUgraphNode *both = malloc((n + e->tip_count + 1) * sizeof *both);
    NEED(both, CUDA_ERROR_OUT_OF_MEMORY);
    if (n)
        memcpy(both, s->tips, n * sizeof *both);
    for (size_t i = 0; i < e->tip_count; i++) {
        bool known = false;
        for (size_t k = 0; k < n; k++)
            known |= both[k] == e->tips[i];
        if (!known)
            both[n++] = e->tips[i];
    }
    free(s->tips);
    s->tips = both;
    s->tip_count = n;
    s->capture = e->capture;
    return CUDA_SUCCESS;
}

static CUresult begin(CUstream handle, CUgraph into, const CUgraphNode *tips, size_t count, int mode) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    NEED(mode >= 0 && mode <= 2, CUDA_ERROR_INVALID_VALUE);
    NEED(!(s->entry_flags & SIM_LEGACY), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    NEED(!s->capture, CUDA_ERROR_ILLEGAL_STATE);
    NEED(!into || graph_valid(into), CUDA_ERROR_INVALID_VALUE);
    struct capture *capture = calloc(1, sizeof *capture);
    CUgraph graph = into ? into : graph_new();
    if (!capture || !graph) {
        free(capture);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *capture = (struct capture){.graph = graph, .origin = s, .id = atomic_fetch_add(&next_id, 1), .own_graph = !into};
    s->capture = capture;
    return set_tips(&s->tips, &s->tip_count, tips, count);
}

STREAM_API(cuStreamBeginCapture_v2, _ptsz, (CUstream s, int mode), (s, mode)) { return begin(s, NULL, NULL, 0, mode); }
STREAM_API(cuStreamBeginCapture, _ptsz, (CUstream s), (s)) { return begin(s, NULL, NULL, 0, 0); }
STREAM_API(cuStreamBeginCaptureToGraph, _ptsz,
           (CUstream s, CUgraph graph, const CUgraphNode *tips, const CUgraphEdgeData *edges, size_t n, int mode),
           (s, graph, tips, edges, n, mode)) {
    (void)edges;
    NEED(graph, CUDA_ERROR_INVALID_VALUE);
    return begin(s, graph, tips, n, mode);
}

/* Does anything reachable backwards from the origin's tips include this node? Marks say what was seen. */
static bool reaches(CUgraphNode from, CUgraphNode node) {
    if (from == node)
        return true;
    if (from->mark)
        return false;
    from->mark = 1;
    for (size_t i = 0; i < from->before_count; i++)
        if (reaches(from->before[i], node))
            return true;
    return false;
}

static bool joined(CUstream origin, CUstream s) {
    for (size_t t = 0; t < s->tip_count; t++) {
        bool found = false;
        for (CUgraphNode node = origin->capture->graph->first; node; node = node->next)
            node->mark = 0;
        for (size_t i = 0; i < origin->tip_count && !found; i++)
            found = reaches(origin->tips[i], s->tips[t]);
        if (!found)
            return false;
    }
    return true;
}

static void leave(CUstream s) {
    s->capture = NULL;
    set_tips(&s->tips, &s->tip_count, NULL, 0);
}

STREAM_API(cuStreamEndCapture, _ptsz, (CUstream handle, CUgraph *out), (handle, out)) {
    CUstream s;
    NEED(out, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    struct capture *capture = s->capture;
    NEED(capture && capture->origin == s, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    bool all_joined = true;
    pthread_mutex_lock(&s->ctx->lock);
    for (CUstream other = s->ctx->streams; other; other = other->next) {
        if (other == s || other->capture != capture)
            continue;
        all_joined = all_joined && joined(s, other);
        leave(other);
    }
    pthread_mutex_unlock(&s->ctx->lock);
    leave(s);
    *out = all_joined ? capture->graph : NULL;
    if (!all_joined && capture->own_graph)
        graph_destroy(capture->graph);
    capture->over = true; /* the struct stays: events that were recorded in it may still point here */
    return all_joined ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
}

STREAM_API(cuStreamIsCapturing, _ptsz, (CUstream handle, int *status), (handle, status)) {
    CUstream s;
    NEED(status, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *status = s->capture != NULL;
    return CUDA_SUCCESS;
}

STREAM_API(cuStreamGetCaptureInfo_v2, _ptsz,
           (CUstream handle, int *status, uint64_t *id, CUgraph *graph, const CUgraphNode **tips, size_t *count),
           (handle, status, id, graph, tips, count)) {
    CUstream s;
    NEED(status, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    *status = s->capture != NULL;
    if (!s->capture)
        return CUDA_SUCCESS;
    if (id)
        *id = s->capture->id;
    if (graph)
        *graph = s->capture->graph;
    if (tips)
        *tips = s->tips;
    if (count)
        *count = s->tip_count;
    return CUDA_SUCCESS;
}
STREAM_API(cuStreamGetCaptureInfo, _ptsz, (CUstream handle, int *status, uint64_t *id), (handle, status, id)) {
    return cuStreamGetCaptureInfo_v2(handle, status, id, NULL, NULL, NULL);
}
STREAM_API(cuStreamGetCaptureInfo_v3, _ptsz,
           (CUstream handle, int *status, uint64_t *id, CUgraph *graph, const CUgraphNode **tips, const CUgraphEdgeData **edges,
            size_t *count),
           (handle, status, id, graph, tips, edges, count)) {
    if (edges)
        *edges = NULL;
    return cuStreamGetCaptureInfo_v2(handle, status, id, graph, tips, count);
}

STREAM_API(cuStreamUpdateCaptureDependencies, _ptsz, (CUstream handle, CUgraphNode *tips, size_t n, unsigned flags),
           (handle, tips, n, flags)) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    NEED(flags <= 1 && (tips || !n), CUDA_ERROR_INVALID_VALUE);
    NEED(s->capture, CUDA_ERROR_ILLEGAL_STATE);
    if (flags == 1)
        return set_tips(&s->tips, &s->tip_count, tips, n); /* set, not add */
    struct CUevent_st more = {.capture = s->capture, .tips = tips, .tip_count = n};
    return capture_event_wait(s, &more);
}
STREAM_API(cuStreamUpdateCaptureDependencies_v2, _ptsz,
           (CUstream handle, CUgraphNode *tips, const CUgraphEdgeData *edges, size_t n, unsigned flags), (handle, tips, edges, n, flags)) {
    (void)edges;
    return cuStreamUpdateCaptureDependencies(handle, tips, n, flags);
}

API(cuThreadExchangeStreamCaptureMode, (int *mode)) {
    NEED(mode && *mode >= 0 && *mode <= 2, CUDA_ERROR_INVALID_VALUE);
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}
