/* Graphs as the sources about them share them: drv_graph*.c and drv_capture.c. */
#ifndef NBGPU_DRV_GRAPH_H
#define NBGPU_DRV_GRAPH_H

#include "drv.h"

/* Memory that a graph's allocation node hands out: its address is fixed, it is held from launch to free. */
struct graph_allocation {
    CUdeviceptr base;
    size_t size;
    int device, references;
    bool held;
    struct graph_allocation *next;
};

/* What a node does; an executable graph keeps copies of these. */
struct work {
    int type; /* CU_GRAPH_NODE_TYPE_* */
    bool enabled;
    CUDA_KERNEL_NODE_PARAMS kernel;
    uint64_t kernel_ns;
    CUDA_MEMCPY3D copy;
    struct box box;
    CUDA_MEMSET_NODE_PARAMS memset;
    struct fill fill;
    CUDA_HOST_NODE_PARAMS host;
    CUgraph child;
    CUevent event;
    struct graph_allocation *allocation;
    CUdeviceptr freed;
};

struct CUgraphNode_st {
    uint32_t magic;
    CUgraph graph;
    struct work work;
    CUgraphNode *before; /* what it depends on */
    size_t before_count;
    CUgraphNode next;
    uint32_t mark; /* of the sort */
};

struct CUgraph_st {
    uint32_t magic;
    CUgraphNode first, last;
    size_t count;
    bool is_child; /* belongs to a node */
};

struct step {
    CUgraphNode node;
    struct work work;
};

struct CUgraphExec_st {
    uint32_t magic;
    unsigned long long flags;
    struct step *steps;
    size_t count, room;
};

bool graph_valid(CUgraph graph);
bool node_valid(CUgraphNode node);
CUresult graph_add(CUgraphNode *out, CUgraph graph, const CUgraphNode *before, size_t count, const struct work *work);
void graph_destroy(CUgraph graph);
CUgraph graph_new(void);
CUresult work_of_kernel(struct work *work, const CUDA_KERNEL_NODE_PARAMS *params, bool second_version);
CUresult work_of_copy(struct work *work, const CUDA_MEMCPY3D *copy);
CUresult work_of_memset(struct work *work, const CUDA_MEMSET_NODE_PARAMS *params);
struct work work_of(int type);

/* drv_graphmem.c */
CUresult graph_allocate(int device, size_t bytes, struct graph_allocation **out);
CUresult graph_hold(struct graph_allocation *allocation);
void graph_let_go(struct graph_allocation *allocation);
void graph_allocation_release(struct graph_allocation *allocation);
struct graph_allocation *graph_allocation_at(CUdeviceptr p);

#endif
