/* What a graph looks like, and its nodes' parameters. */
#define _GNU_SOURCE
#include <stdio.h>

#include "drv_graph.h"

/* The way these calls list things: *count says how many fit, then how many there are. */
struct list {
    void **out;
    size_t room, found;
};
static void put(struct list *list, void *item) {
    if (list->out && list->found < list->room)
        list->out[list->found] = item;
    list->found++;
}
static CUresult finish(struct list *list, size_t *count) {
    *count = list->out && list->found > list->room ? list->room : list->found;
    return CUDA_SUCCESS;
}

API(cuGraphGetNodes, (CUgraph graph, CUgraphNode *nodes, size_t *count)) {
    NEED(graph_valid(graph) && count, CUDA_ERROR_INVALID_VALUE);
    struct list list = {(void **)nodes, *count, 0};
    for (CUgraphNode node = graph->first; node; node = node->next)
        put(&list, node);
    return finish(&list, count);
}
API(cuGraphGetRootNodes, (CUgraph graph, CUgraphNode *nodes, size_t *count)) {
    NEED(graph_valid(graph) && count, CUDA_ERROR_INVALID_VALUE);
    struct list list = {(void **)nodes, *count, 0};
    for (CUgraphNode node = graph->first; node; node = node->next)
        if (!node->before_count)
            put(&list, node);
    return finish(&list, count);
}
API(cuGraphGetEdges, (CUgraph graph, CUgraphNode *from, CUgraphNode *to, size_t *count)) {
    NEED(graph_valid(graph) && count && !from == !to, CUDA_ERROR_INVALID_VALUE);
    struct list sources = {(void **)from, *count, 0}, targets = {(void **)to, *count, 0};
    for (CUgraphNode node = graph->first; node; node = node->next)
        for (size_t i = 0; i < node->before_count; i++) {
            put(&sources, node->before[i]);
            put(&targets, node);
        }
    return finish(&sources, count);
}
API(cuGraphGetEdges_v2, (CUgraph graph, CUgraphNode *from, CUgraphNode *to, CUgraphEdgeData *edges, size_t *count)) {
    NEED(count, CUDA_ERROR_INVALID_VALUE);
    if (edges)
        memset(edges, 0, *count * sizeof *edges);
    return cuGraphGetEdges(graph, from, to, count);
}
API(cuGraphNodeGetDependencies, (CUgraphNode node, CUgraphNode *nodes, size_t *count)) {
    NEED(node_valid(node) && count, CUDA_ERROR_INVALID_VALUE);
    struct list list = {(void **)nodes, *count, 0};
    for (size_t i = 0; i < node->before_count; i++)
        put(&list, node->before[i]);
    return finish(&list, count);
}
API(cuGraphNodeGetDependencies_v2, (CUgraphNode node, CUgraphNode *nodes, CUgraphEdgeData *edges, size_t *count)) {
    NEED(count, CUDA_ERROR_INVALID_VALUE);
    if (edges)
        memset(edges, 0, *count * sizeof *edges);
    return cuGraphNodeGetDependencies(node, nodes, count);
}
API(cuGraphNodeGetDependentNodes, (CUgraphNode node, CUgraphNode *nodes, size_t *count)) {
    NEED(node_valid(node) && count, CUDA_ERROR_INVALID_VALUE);
    struct list list = {(void **)nodes, *count, 0};
    for (CUgraphNode other = node->graph->first; other; other = other->next)
        for (size_t i = 0; i < other->before_count; i++)
            if (other->before[i] == node)
                put(&list, other);
    return finish(&list, count);
}
API(cuGraphNodeGetDependentNodes_v2, (CUgraphNode node, CUgraphNode *nodes, CUgraphEdgeData *edges, size_t *count)) {
    NEED(count, CUDA_ERROR_INVALID_VALUE);
    if (edges)
        memset(edges, 0, *count * sizeof *edges);
    return cuGraphNodeGetDependentNodes(node, nodes, count);
}
API(cuGraphNodeGetType, (CUgraphNode node, int *type)) {
    NEED(node_valid(node) && type, CUDA_ERROR_INVALID_VALUE);
    *type = node->work.type;
    return CUDA_SUCCESS;
}

#define IS(type_) NEED(node_valid(node) && node->work.type == type_ && p, CUDA_ERROR_INVALID_VALUE)
API(cuGraphKernelNodeGetParams, (CUgraphNode node, CUDA_KERNEL_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_KERNEL);
    memcpy(p, &node->work.kernel, offsetof(CUDA_KERNEL_NODE_PARAMS, kern));
    return CUDA_SUCCESS;
}
API(cuGraphKernelNodeGetParams_v2, (CUgraphNode node, CUDA_KERNEL_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_KERNEL);
    *p = node->work.kernel;
    return CUDA_SUCCESS;
}
API(cuGraphKernelNodeSetParams, (CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_KERNEL);
    return work_of_kernel(&node->work, p, false);
}
API(cuGraphKernelNodeSetParams_v2, (CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_KERNEL);
    return work_of_kernel(&node->work, p, true);
}
API(cuGraphMemcpyNodeGetParams, (CUgraphNode node, CUDA_MEMCPY3D *p)) {
    IS(CU_GRAPH_NODE_TYPE_MEMCPY);
    *p = node->work.copy;
    return CUDA_SUCCESS;
}
API(cuGraphMemcpyNodeSetParams, (CUgraphNode node, const CUDA_MEMCPY3D *p)) {
    IS(CU_GRAPH_NODE_TYPE_MEMCPY);
    return work_of_copy(&node->work, p);
}
API(cuGraphMemsetNodeGetParams, (CUgraphNode node, CUDA_MEMSET_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_MEMSET);
    memcpy(p, &node->work.memset, offsetof(CUDA_MEMSET_NODE_PARAMS, ctx));
    return CUDA_SUCCESS;
}
API(cuGraphMemsetNodeSetParams, (CUgraphNode node, const CUDA_MEMSET_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_MEMSET);
    return work_of_memset(&node->work, p);
}
API(cuGraphHostNodeGetParams, (CUgraphNode node, CUDA_HOST_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_HOST);
    *p = node->work.host;
    return CUDA_SUCCESS;
}
API(cuGraphHostNodeSetParams, (CUgraphNode node, const CUDA_HOST_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_HOST);
    NEED(p->fn, CUDA_ERROR_INVALID_VALUE);
    node->work.host = *p;
    return CUDA_SUCCESS;
}
API(cuGraphChildGraphNodeGetGraph, (CUgraphNode node, CUgraph *p)) {
    IS(CU_GRAPH_NODE_TYPE_GRAPH);
    *p = node->work.child;
    return CUDA_SUCCESS;
}
API(cuGraphEventRecordNodeGetEvent, (CUgraphNode node, CUevent *p)) {
    IS(CU_GRAPH_NODE_TYPE_EVENT_RECORD);
    *p = node->work.event;
    return CUDA_SUCCESS;
}
API(cuGraphEventWaitNodeGetEvent, (CUgraphNode node, CUevent *p)) {
    IS(CU_GRAPH_NODE_TYPE_WAIT_EVENT);
    *p = node->work.event;
    return CUDA_SUCCESS;
}
API(cuGraphMemAllocNodeGetParams, (CUgraphNode node, CUDA_MEM_ALLOC_NODE_PARAMS *p)) {
    IS(CU_GRAPH_NODE_TYPE_MEM_ALLOC);
    const struct graph_allocation *a = node->work.allocation;
    *p = (CUDA_MEM_ALLOC_NODE_PARAMS){.bytesize = a->size, .dptr = a->base};
    p->poolProps.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    p->poolProps.location = (CUmemLocation){CU_MEM_LOCATION_TYPE_DEVICE, drv_ordinal(a->device)};
    return CUDA_SUCCESS;
}
API(cuGraphMemFreeNodeGetParams, (CUgraphNode node, CUdeviceptr *p)) {
    IS(CU_GRAPH_NODE_TYPE_MEM_FREE);
    *p = node->work.freed;
    return CUDA_SUCCESS;
}

API(cuGraphDebugDotPrint, (CUgraph graph, const char *path, unsigned flags)) {
    (void)flags;
    NEED(graph_valid(graph) && path, CUDA_ERROR_INVALID_VALUE);
    FILE *file = fopen(path, "we");
    NEED(file, CUDA_ERROR_OPERATING_SYSTEM);
    fputs("digraph {\n", file);
    for (CUgraphNode node = graph->first; node; node = node->next) {
        fprintf(file, "  \"%p\" [label=\"type %d\"];\n", (void *)node, node->work.type);
        for (size_t i = 0; i < node->before_count; i++)
            fprintf(file, "  \"%p\" -> \"%p\";\n", (void *)node->before[i], (void *)node);
    }
    fputs("}\n", file);
    fclose(file);
    return CUDA_SUCCESS;
}

/* User objects: references counted, the destructor called at the last. */
struct CUuserObject_st {
    CUhostFn destroy;
    void *object;
    _Atomic unsigned references;
};
API(cuUserObjectCreate, (CUuserObject * out, void *object, CUhostFn destroy, unsigned references, unsigned flags)) {
    NEED(out && destroy && references && flags == 1, CUDA_ERROR_INVALID_VALUE);
    *out = malloc(sizeof **out);
    NEED(*out, CUDA_ERROR_OUT_OF_MEMORY);
    (*out)->destroy = destroy;
    (*out)->object = object;
    atomic_init(&(*out)->references, references);
    return CUDA_SUCCESS;
}
API(cuUserObjectRetain, (CUuserObject object, unsigned count)) {
    NEED(object && count, CUDA_ERROR_INVALID_VALUE);
    atomic_fetch_add(&object->references, count);
    return CUDA_SUCCESS;
}
API(cuUserObjectRelease, (CUuserObject object, unsigned count)) {
    NEED(object && count, CUDA_ERROR_INVALID_VALUE);
    if (atomic_fetch_sub(&object->references, count) == count) {
        object->destroy(object->object);
        free(object);
    }
    return CUDA_SUCCESS;
}
