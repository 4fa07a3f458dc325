/* Graphs: nodes, their order, their parameters. */
#define _GNU_SOURCE
#include "drv_graph.h"

bool graph_valid(CUgraph graph) { return graph && graph->magic == GRAPH_MAGIC; }
bool node_valid(CUgraphNode node) { return node && node->magic == GRAPH_MAGIC + 1; }

struct work work_of(int type) { return (struct work){.type = type, .enabled = true}; }

CUgraph graph_new(void) {
    CUgraph graph = calloc(1, sizeof *graph);
    if (graph)
        graph->magic = GRAPH_MAGIC;
    return graph;
}

static void forget_work(struct work *work) {
    if (work->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC)
        graph_allocation_release(work->allocation);
    if (work->type == CU_GRAPH_NODE_TYPE_GRAPH && work->child)
        graph_destroy(work->child);
}

static void free_node(CUgraphNode node) {
    forget_work(&node->work);
    node->magic = 0;
    free(node->before);
    free(node);
}

void graph_destroy(CUgraph graph) {
    for (CUgraphNode node = graph->first, next; node; node = next) {
        next = node->next;
        free_node(node);
    }
    graph->magic = 0;
    free(graph);
}

static CUresult depend(CUgraphNode node, CUgraphNode on) {
    for (size_t i = 0; i < node->before_count; i++)
        if (node->before[i] == on)
            return CUDA_SUCCESS;
    CUgraphNode *more = realloc(node->before, (node->before_count + 1) * sizeof *more);
    NEED(more, CUDA_ERROR_OUT_OF_MEMORY);
    node->before = more;
    node->before[node->before_count++] = on;
    return CUDA_SUCCESS;
}

CUresult graph_add(CUgraphNode *out, CUgraph graph, const CUgraphNode *before, size_t count, const struct work *work) {
    TRY(drv_ready());
    NEED(out && graph_valid(graph) && (before || !count), CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < count; i++)
        NEED(node_valid(before[i]) && before[i]->graph == graph, CUDA_ERROR_INVALID_VALUE);
    CUgraphNode node = calloc(1, sizeof *node);
    NEED(node, CUDA_ERROR_OUT_OF_MEMORY);
    *node = (struct CUgraphNode_st){.magic = GRAPH_MAGIC + 1, .graph = graph, .work = *work};
    for (size_t i = 0; i < count; i++)
        TRY(depend(node, before[i]));
    if (graph->last) {
        graph->last->next = node;
    } else {
        graph->first = node;
    }
    graph->last = node;
    graph->count++;
    *out = node;
    return CUDA_SUCCESS;
}

CUresult work_of_kernel(struct work *work, const CUDA_KERNEL_NODE_PARAMS *p, bool second_version) {
    CUfunction f;
    NEED(p, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_function(p->func || !second_version ? p->func : (CUfunction)p->kern, &f));
    CUlaunchConfig config = {p->gridDimX,  p->gridDimY,       p->gridDimZ, p->blockDimX, p->blockDimY,
                             p->blockDimZ, p->sharedMemBytes, NULL,        NULL,         0};
    NEED(p->gridDimX && p->gridDimY && p->gridDimZ && p->blockDimX && p->blockDimY && p->blockDimZ, CUDA_ERROR_INVALID_VALUE);
    memset(&work->kernel, 0, sizeof work->kernel);
    memcpy(&work->kernel, p, second_version ? sizeof *p : offsetof(CUDA_KERNEL_NODE_PARAMS, kern));
    work->kernel.func = f;
    work->kernel_ns = launch_ns(f, &config, p->kernelParams, p->extra);
    return CUDA_SUCCESS;
}

CUresult work_of_copy(struct work *work, const CUDA_MEMCPY3D *copy) {
    NEED(copy, CUDA_ERROR_INVALID_VALUE);
    work->copy = *copy;
    return box_of_copy3d(copy, &work->box);
}

CUresult work_of_memset(struct work *work, const CUDA_MEMSET_NODE_PARAMS *p) {
    NEED(p && (p->elementSize == 1 || p->elementSize == 2 || p->elementSize == 4), CUDA_ERROR_INVALID_VALUE);
    memset(&work->memset, 0, sizeof work->memset);
    memcpy(&work->memset, p, offsetof(CUDA_MEMSET_NODE_PARAMS, ctx));
    work->fill = (struct fill){p->dst, p->pitch, p->width, p->height ? p->height : 1, p->elementSize, p->value};
    return CUDA_SUCCESS;
}

API(cuGraphCreate, (CUgraph * out, unsigned flags)) {
    TRY(drv_ready());
    NEED(out && !flags, CUDA_ERROR_INVALID_VALUE);
    *out = graph_new();
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API(cuGraphDestroy, (CUgraph graph)) {
    TRY(drv_ready());
    NEED(graph_valid(graph) && !graph->is_child, CUDA_ERROR_INVALID_VALUE);
    graph_destroy(graph);
    return CUDA_SUCCESS;
}

#define INTO CUgraphNode *out, CUgraph graph, const CUgraphNode *before, size_t count
#define ADD(type_, fill_in)                                                                                                                \
    struct work work = work_of(type_);                                                                                                     \
    fill_in;                                                                                                                               \
    return graph_add(out, graph, before, count, &work)

API(cuGraphAddKernelNode, (INTO, const CUDA_KERNEL_NODE_PARAMS *p)) {
    ADD(CU_GRAPH_NODE_TYPE_KERNEL, TRY(work_of_kernel(&work, p, false)));
}
API(cuGraphAddKernelNode_v2, (INTO, const CUDA_KERNEL_NODE_PARAMS *p)) {
    ADD(CU_GRAPH_NODE_TYPE_KERNEL, TRY(work_of_kernel(&work, p, true)));
}
API(cuGraphAddMemcpyNode, (INTO, const CUDA_MEMCPY3D *copy, CUcontext ctx)) {
    (void)ctx;
    ADD(CU_GRAPH_NODE_TYPE_MEMCPY, TRY(work_of_copy(&work, copy)));
}
API(cuGraphAddMemsetNode, (INTO, const CUDA_MEMSET_NODE_PARAMS *p, CUcontext ctx)) {
    (void)ctx;
    ADD(CU_GRAPH_NODE_TYPE_MEMSET, TRY(work_of_memset(&work, p)));
}
API(cuGraphAddHostNode, (INTO, const CUDA_HOST_NODE_PARAMS *p)) {
    NEED(p && p->fn, CUDA_ERROR_INVALID_VALUE);
    ADD(CU_GRAPH_NODE_TYPE_HOST, work.host = *p);
}
API(cuGraphAddEmptyNode, (INTO)) { ADD(CU_GRAPH_NODE_TYPE_EMPTY, (void)0); }
API(cuGraphAddEventRecordNode, (INTO, CUevent event)) {
    NEED(event && event->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_VALUE);
    ADD(CU_GRAPH_NODE_TYPE_EVENT_RECORD, work.event = event);
}
API(cuGraphAddEventWaitNode, (INTO, CUevent event)) {
    NEED(event && event->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_VALUE);
    ADD(CU_GRAPH_NODE_TYPE_WAIT_EVENT, work.event = event);
}
API(cuGraphAddMemAllocNode, (INTO, CUDA_MEM_ALLOC_NODE_PARAMS *p)) {
    int device;
    NEED(p && p->bytesize, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_device(p->poolProps.location.id, &device));
    struct work work = work_of(CU_GRAPH_NODE_TYPE_MEM_ALLOC);
    TRY(graph_allocate(device, p->bytesize, &work.allocation));
    p->dptr = work.allocation->base;
    return graph_add(out, graph, before, count, &work);
}
API(cuGraphAddMemFreeNode, (INTO, CUdeviceptr p)) {
    NEED(graph_allocation_at(p), CUDA_ERROR_INVALID_VALUE);
    ADD(CU_GRAPH_NODE_TYPE_MEM_FREE, work.freed = p);
}

static CUresult clone_graph(CUgraph from, CUgraph *out);

API(cuGraphAddChildGraphNode, (INTO, CUgraph child)) {
    NEED(graph_valid(child), CUDA_ERROR_INVALID_VALUE);
    struct work work = work_of(CU_GRAPH_NODE_TYPE_GRAPH);
    TRY(clone_graph(child, &work.child));
    work.child->is_child = true;
    return graph_add(out, graph, before, count, &work);
}

API(cuGraphAddNode, (INTO, CUgraphNodeParams *p)) {
    NEED(p, CUDA_ERROR_INVALID_VALUE);
    switch (p->type) {
    case CU_GRAPH_NODE_TYPE_KERNEL:
        return cuGraphAddKernelNode_v2(out, graph, before, count, &p->kernel);
    case CU_GRAPH_NODE_TYPE_MEMCPY:
        return cuGraphAddMemcpyNode(out, graph, before, count, &p->memcpy.copyParams, NULL);
    case CU_GRAPH_NODE_TYPE_MEMSET:
        return cuGraphAddMemsetNode(out, graph, before, count, &p->memset, NULL);
    case CU_GRAPH_NODE_TYPE_HOST:
        return cuGraphAddHostNode(out, graph, before, count, &p->host);
    case CU_GRAPH_NODE_TYPE_GRAPH:
        return cuGraphAddChildGraphNode(out, graph, before, count, p->graph.graph);
    case CU_GRAPH_NODE_TYPE_EMPTY:
        return cuGraphAddEmptyNode(out, graph, before, count);
    case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
        return cuGraphAddEventWaitNode(out, graph, before, count, p->event);
    case CU_GRAPH_NODE_TYPE_EVENT_RECORD:
        return cuGraphAddEventRecordNode(out, graph, before, count, p->event);
    case CU_GRAPH_NODE_TYPE_MEM_ALLOC:
        return cuGraphAddMemAllocNode(out, graph, before, count, &p->alloc);
    case CU_GRAPH_NODE_TYPE_MEM_FREE:
        return cuGraphAddMemFreeNode(out, graph, before, count, p->free_dptr);
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
}
API(cuGraphAddNode_v2,
    (CUgraphNode * out, CUgraph graph, const CUgraphNode *before, const CUgraphEdgeData *edges, size_t count, CUgraphNodeParams *p)) {
    (void)edges;
    return cuGraphAddNode(out, graph, before, count, p);
}

static CUresult copy_work(const struct work *from, struct work *to) {
    *to = *from;
    if (from->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC)
        to->allocation->references++;
    return from->type == CU_GRAPH_NODE_TYPE_GRAPH ? clone_graph(from->child, &to->child) : CUDA_SUCCESS;
}

static CUresult clone_graph(CUgraph from, CUgraph *out) {
    CUgraph graph = graph_new();
    NEED(graph, CUDA_ERROR_OUT_OF_MEMORY);
    uint32_t number = 0;
    for (CUgraphNode node = from->first; node; node = node->next) {
        struct work work;
        CUgraphNode made;
        TRY(copy_work(&node->work, &work));
        TRY(graph_add(&made, graph, NULL, 0, &work));
        made->mark = node->mark = number++;
    }
    CUgraphNode made = graph->first;
    for (CUgraphNode node = from->first; node; node = node->next, made = made->next)
        for (size_t i = 0; i < node->before_count; i++)
            for (CUgraphNode other = graph->first; other; other = other->next)
                if (other->mark == node->before[i]->mark)
                    TRY(depend(made, other));
    *out = graph;
    return CUDA_SUCCESS;
}

API(cuGraphClone, (CUgraph * out, CUgraph graph)) {
    TRY(drv_ready());
    NEED(out && graph_valid(graph), CUDA_ERROR_INVALID_VALUE);
    return clone_graph(graph, out);
}

API(cuGraphAddDependencies, (CUgraph graph, const CUgraphNode *from, const CUgraphNode *to, size_t count)) {
    TRY(drv_ready());
    NEED(graph_valid(graph) && (!count || (from && to)), CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < count; i++) {
        NEED(node_valid(from[i]) && node_valid(to[i]) && from[i] != to[i], CUDA_ERROR_INVALID_VALUE);
        TRY(depend(to[i], from[i]));
    }
    return CUDA_SUCCESS;
}
API(cuGraphAddDependencies_v2,
    (CUgraph graph, const CUgraphNode *from, const CUgraphNode *to, const CUgraphEdgeData *edges, size_t count)) {
    (void)edges;
    return cuGraphAddDependencies(graph, from, to, count);
}
API(cuGraphRemoveDependencies, (CUgraph graph, const CUgraphNode *from, const CUgraphNode *to, size_t count)) {
    TRY(drv_ready());
    NEED(graph_valid(graph) && (!count || (from && to)), CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; node_valid(to[i]) && k < to[i]->before_count; k++)
            if (to[i]->before[k] == from[i])
                to[i]->before[k] = to[i]->before[--to[i]->before_count];
    return CUDA_SUCCESS;
}
API(cuGraphRemoveDependencies_v2,
    (CUgraph graph, const CUgraphNode *from, const CUgraphNode *to, const CUgraphEdgeData *edges, size_t count)) {
    (void)edges;
    return cuGraphRemoveDependencies(graph, from, to, count);
}

API(cuGraphDestroyNode, (CUgraphNode node)) {
    TRY(drv_ready());
    NEED(node_valid(node), CUDA_ERROR_INVALID_VALUE);
    CUgraph graph = node->graph;
    CUgraphNode previous = NULL;
    for (CUgraphNode other = graph->first; other; other = other->next) {
        if (other->next == node)
            previous = other;
        cuGraphRemoveDependencies(graph, &node, &other, 1);
    }
    if (previous) {
        previous->next = node->next;
    } else {
        graph->first = node->next;
    }
    if (graph->last == node)
        graph->last = previous;
    graph->count--;
    free_node(node);
    return CUDA_SUCCESS;
}
