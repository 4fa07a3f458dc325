/* Executable graphs. A launch runs the nodes in one order that their dependencies allow, on the launching stream; GPU kernels
 * that follow each other become one entry of the queue. */
#define _GNU_SOURCE
#include "drv_graph.h"

enum { AUTO_FREE_ON_LAUNCH = 1 };

static CUresult append(CUgraphExec exec, CUgraphNode node) {
    if (exec->count == exec->room) {
        size_t room = exec->room ? 2 * exec->room : 16;
        struct step *more = realloc(exec->steps, room * sizeof *more);
        NEED(more, CUDA_ERROR_OUT_OF_MEMORY);
        exec->steps = more;
        exec->room = room;
    }
    exec->steps[exec->count++] = (struct step){node, node->work};
    if (node->work.type == CU_GRAPH_NODE_TYPE_MEM_ALLOC)
        node->work.allocation->references++;
    return CUDA_SUCCESS;
}

static CUresult append_sorted(CUgraphExec exec, CUgraph graph);

/* Depth first, what a node depends on before it. Marks: 0 new, 1 being visited, 2 done. */
static CUresult visit(CUgraphExec exec, CUgraphNode node) {
    if (node->mark == 2)
        return CUDA_SUCCESS;
    NEED(node->mark == 0, CUDA_ERROR_INVALID_VALUE); /* a cycle */
    node->mark = 1;
    for (size_t i = 0; i < node->before_count; i++)
        TRY(visit(exec, node->before[i]));
    node->mark = 2;
    return node->work.type == CU_GRAPH_NODE_TYPE_GRAPH ? append_sorted(exec, node->work.child) : append(exec, node);
}

static CUresult append_sorted(CUgraphExec exec, CUgraph graph) {
    for (CUgraphNode node = graph->first; node; node = node->next)
        node->mark = 0;
    for (CUgraphNode node = graph->first; node; node = node->next)
        TRY(visit(exec, node));
    return CUDA_SUCCESS;
}

static void destroy_exec(CUgraphExec exec) {
    for (size_t i = 0; i < exec->count; i++)
        if (exec->steps[i].work.type == CU_GRAPH_NODE_TYPE_MEM_ALLOC)
            graph_allocation_release(exec->steps[i].work.allocation);
    exec->magic = 0;
    free(exec->steps);
    free(exec);
}

static CUresult instantiate(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    TRY(drv_ready());
    NEED(out && graph_valid(graph), CUDA_ERROR_INVALID_VALUE);
    CUgraphExec exec = calloc(1, sizeof *exec);
    NEED(exec, CUDA_ERROR_OUT_OF_MEMORY);
    exec->magic = EXEC_MAGIC;
    exec->flags = flags;
    CUresult result = append_sorted(exec, graph);
    if (result == CUDA_SUCCESS) {
        *out = exec;
    } else {
        destroy_exec(exec);
    }
    return result;
}

API(cuGraphInstantiate, (CUgraphExec * out, CUgraph graph, CUgraphNode *error, char *log, size_t room)) {
    if (error)
        *error = NULL;
    if (log && room)
        *log = 0;
    return instantiate(out, graph, 0);
}
API(cuGraphInstantiate_v2, (CUgraphExec * out, CUgraph graph, CUgraphNode *error, char *log, size_t room)) {
    return cuGraphInstantiate(out, graph, error, log, room);
}
API(cuGraphInstantiateWithFlags, (CUgraphExec * out, CUgraph graph, unsigned long long flags)) { return instantiate(out, graph, flags); }
STREAM_API(cuGraphInstantiateWithParams, _ptsz, (CUgraphExec * out, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *p), (out, graph, p)) {
    NEED(p, CUDA_ERROR_INVALID_VALUE);
    CUresult result = instantiate(out, graph, p->flags);
    p->hErrNode_out = NULL;
    p->result_out = result == CUDA_SUCCESS ? 0 : 1;
    return result;
}

static bool exec_valid(CUgraphExec exec) { return exec && exec->magic == EXEC_MAGIC; }

API(cuGraphExecDestroy, (CUgraphExec exec)) {
    TRY(drv_ready());
    NEED(exec_valid(exec), CUDA_ERROR_INVALID_VALUE);
    destroy_exec(exec);
    return CUDA_SUCCESS;
}
API(cuGraphExecGetFlags, (CUgraphExec exec, unsigned long long *flags)) {
    NEED(exec_valid(exec) && flags, CUDA_ERROR_INVALID_VALUE);
    *flags = exec->flags;
    return CUDA_SUCCESS;
}

static CUresult flush(CUstream s, uint64_t *kernel_ns) {
    if (!*kernel_ns)
        return CUDA_SUCCESS;
    struct submission what = {.kind = SIM_COMPUTE, .ns = *kernel_ns};
    *kernel_ns = 0;
    return drv_submit(s, &what, NULL);
}

static CUresult run_step(CUstream s, const struct work *work) {
    struct host_work *host;
    struct graph_allocation *freed;
    switch (work->type) {
    case CU_GRAPH_NODE_TYPE_MEMCPY:
        return drv_copy(&work->box, s, false);
    case CU_GRAPH_NODE_TYPE_MEMSET:
        return drv_fill(&work->fill, s, false);
    case CU_GRAPH_NODE_TYPE_HOST:
        TRY(drv_host_work_make(work->host.fn, work->host.userData, false, &host));
        return drv_submit(s, &(struct submission){.kind = SIM_MARK, .work = host}, NULL);
    case CU_GRAPH_NODE_TYPE_EVENT_RECORD:
        return drv_event_record(work->event, s);
    case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
        return drv_event_wait(s, work->event);
    case CU_GRAPH_NODE_TYPE_MEM_FREE:
        if ((freed = graph_allocation_at(work->freed)))
            graph_let_go(freed);
        return CUDA_SUCCESS;
    default:
        return CUDA_SUCCESS;
    }
}

/* All or nothing, before anything runs: what the graph will allocate. */
static CUresult hold_all(CUgraphExec exec) {
    for (size_t i = 0; i < exec->count; i++) {
        struct work *work = &exec->steps[i].work;
        if (work->type != CU_GRAPH_NODE_TYPE_MEM_ALLOC)
            continue;
        NEED(!work->allocation->held || exec->flags & AUTO_FREE_ON_LAUNCH, CUDA_ERROR_INVALID_VALUE);
        CUresult result = graph_hold(work->allocation);
        while (result != CUDA_SUCCESS && i--)
            if (exec->steps[i].work.type == CU_GRAPH_NODE_TYPE_MEM_ALLOC)
                graph_let_go(exec->steps[i].work.allocation);
        TRY(result);
    }
    return CUDA_SUCCESS;
}

STREAM_API(cuGraphLaunch, _ptsz, (CUgraphExec exec, CUstream handle), (exec, handle)) {
    CUstream s;
    uint64_t kernel_ns = 0;
    TRY(drv_stream(handle, &s));
    NEED(exec_valid(exec), CUDA_ERROR_INVALID_VALUE);
    NEED(!s->capture, CUDA_ERROR_NOT_SUPPORTED);
    TRY(hold_all(exec));
    for (size_t i = 0; i < exec->count; i++) {
        const struct work *work = &exec->steps[i].work;
        if (!work->enabled)
            continue;
        if (work->type == CU_GRAPH_NODE_TYPE_KERNEL) {
            kernel_ns += work->kernel_ns;
            continue;
        }
        TRY(flush(s, &kernel_ns));
        TRY(run_step(s, work));
    }
    return flush(s, &kernel_ns);
}
STREAM_API(cuGraphUpload, _ptsz, (CUgraphExec exec, CUstream handle), (exec, handle)) {
    CUstream s;
    NEED(exec_valid(exec), CUDA_ERROR_INVALID_VALUE);
    return drv_stream(handle, &s);
}

static CUresult step_of(CUgraphExec exec, CUgraphNode node, int type, struct work **work) {
    NEED(exec_valid(exec) && node, CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < exec->count; i++)
        if (exec->steps[i].node == node && (type < 0 || exec->steps[i].work.type == type)) {
            *work = &exec->steps[i].work;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

#define STEP(type)                                                                                                                         \
    struct work *work;                                                                                                                     \
    TRY(step_of(exec, node, type, &work))
API(cuGraphExecKernelNodeSetParams, (CUgraphExec exec, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *p)) {
    STEP(CU_GRAPH_NODE_TYPE_KERNEL);
    return work_of_kernel(work, p, false);
}
API(cuGraphExecKernelNodeSetParams_v2, (CUgraphExec exec, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *p)) {
    STEP(CU_GRAPH_NODE_TYPE_KERNEL);
    return work_of_kernel(work, p, true);
}
API(cuGraphExecMemcpyNodeSetParams, (CUgraphExec exec, CUgraphNode node, const CUDA_MEMCPY3D *copy, CUcontext ctx)) {
    STEP(CU_GRAPH_NODE_TYPE_MEMCPY);
    (void)ctx;
    return work_of_copy(work, copy);
}
API(cuGraphExecMemsetNodeSetParams, (CUgraphExec exec, CUgraphNode node, const CUDA_MEMSET_NODE_PARAMS *p, CUcontext ctx)) {
    STEP(CU_GRAPH_NODE_TYPE_MEMSET);
    (void)ctx;
    return work_of_memset(work, p);
}
API(cuGraphExecHostNodeSetParams, (CUgraphExec exec, CUgraphNode node, const CUDA_HOST_NODE_PARAMS *p)) {
    STEP(CU_GRAPH_NODE_TYPE_HOST);
    NEED(p && p->fn, CUDA_ERROR_INVALID_VALUE);
    work->host = *p;
    return CUDA_SUCCESS;
}
API(cuGraphNodeSetEnabled, (CUgraphExec exec, CUgraphNode node, unsigned enabled)) {
    STEP(-1);
    work->enabled = enabled != 0;
    return CUDA_SUCCESS;
}
API(cuGraphNodeGetEnabled, (CUgraphExec exec, CUgraphNode node, unsigned *enabled)) {
    STEP(-1);
    NEED(enabled, CUDA_ERROR_INVALID_VALUE);
    *enabled = work->enabled;
    return CUDA_SUCCESS;
}

static CUresult update(CUgraphExec exec, CUgraph graph, CUgraphNode *error) {
    CUgraphExec fresh;
    NEED(exec_valid(exec), CUDA_ERROR_INVALID_VALUE);
    TRY(instantiate(&fresh, graph, exec->flags));
    bool same = fresh->count == exec->count;
    for (size_t i = 0; same && i < exec->count; i++) {
        same = fresh->steps[i].work.type == exec->steps[i].work.type && exec->steps[i].work.type != CU_GRAPH_NODE_TYPE_MEM_ALLOC;
        if (!same && error)
            *error = fresh->steps[i].node;
    }
    for (size_t i = 0; same && i < exec->count; i++)
        exec->steps[i].work = fresh->steps[i].work;
    destroy_exec(fresh);
    return same ? CUDA_SUCCESS : CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
}
API(cuGraphExecUpdate_v2, (CUgraphExec exec, CUgraph graph, CUgraphExecUpdateResultInfo *info)) {
    NEED(info, CUDA_ERROR_INVALID_VALUE);
    memset(info, 0, sizeof *info);
    CUresult result = update(exec, graph, &info->errorNode);
    info->result = result == CUDA_SUCCESS ? 0 : 2; /* the topology changed */
    return result;
}
API(cuGraphExecUpdate, (CUgraphExec exec, CUgraph graph, CUgraphNode *error, int *out)) {
    CUgraphNode unused = NULL;
    CUresult result = update(exec, graph, error ? error : &unused);
    if (out)
        *out = result == CUDA_SUCCESS ? 0 : 2;
    return result;
}
