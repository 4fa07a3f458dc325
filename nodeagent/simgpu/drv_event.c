/* Events: their times are the device's, taken when the entry that records them comes to its turn. */
#define _GNU_SOURCE
#include "drv.h"

API(cuEventCreate, (CUevent * out, unsigned flags)) {
    CUcontext ctx;
    NEED(out && flags <= 7, CUDA_ERROR_INVALID_VALUE);
    NEED(!(flags & CU_EVENT_INTERPROCESS), CUDA_ERROR_NOT_SUPPORTED);
    TRY(drv_current(&ctx));
    CUevent e = calloc(1, sizeof *e);
    NEED(e, CUDA_ERROR_OUT_OF_MEMORY);
    *e = (struct CUevent_st){.magic = EVENT_MAGIC, .flags = flags, .ctx = ctx};
    *out = e;
    return CUDA_SUCCESS;
}

static void forget_record(CUevent e) {
    CUcontext in = e->recorded_in;
    if (!in)
        return;
    pthread_mutex_lock(&in->lock);
    struct slot *slot = &in->slots[e->seq % SIM_QUEUE];
    if (slot->event == e)
        slot->event = NULL;
    pthread_mutex_unlock(&in->lock);
}

API(cuEventDestroy_v2, (CUevent e)) {
    TRY(drv_ready());
    NEED(e && e->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    forget_record(e);
    capture_forget_event(e);
    e->magic = 0;
    free(e);
    return CUDA_SUCCESS;
}
API(cuEventDestroy, (CUevent e)) { return cuEventDestroy_v2(e); }

CUresult drv_event_record(CUevent e, CUstream s) {
    if (s->capture)
        return capture_event_record(s, e);
    capture_forget_event(e);
    forget_record(e);
    return drv_submit(s, &(struct submission){.kind = SIM_MARK, .event = e}, NULL);
}

CUresult drv_event_wait(CUstream s, CUevent e) {
    if (e->capture || s->capture)
        return capture_event_wait(s, e);
    if (!e->recorded || __atomic_load_n(&e->resolved, __ATOMIC_ACQUIRE))
        return CUDA_SUCCESS;
    if (e->recorded_in == s->ctx && sim_entry_done(drv.sim.m, e->channel, e->generation, e->seq))
        return CUDA_SUCCESS;
    return drv_submit(s, &(struct submission){.kind = SIM_WAIT, .wait_for = e}, NULL);
}

STREAM_API(cuEventRecord, _ptsz, (CUevent e, CUstream handle), (e, handle)) {
    CUstream s;
    TRY(drv_stream(handle, &s));
    NEED(e && e->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(e->ctx == s->ctx, CUDA_ERROR_INVALID_HANDLE);
    return drv_event_record(e, s);
}
STREAM_API(cuEventRecordWithFlags, _ptsz, (CUevent e, CUstream handle, unsigned flags), (e, handle, flags)) {
    CUstream s;
    NEED(flags <= 1, CUDA_ERROR_INVALID_VALUE);
    TRY(drv_stream(handle, &s));
    NEED(e && e->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(e->ctx == s->ctx, CUDA_ERROR_INVALID_HANDLE);
    return drv_event_record(e, s);
}

/* True when the event has happened; its time is then kept in it. */
static bool happened(CUevent e) {
    if (!e->recorded || __atomic_load_n(&e->resolved, __ATOMIC_ACQUIRE))
        return true;
    if (!sim_entry_done(drv.sim.m, e->channel, e->generation, e->seq))
        return false;
    CUcontext in = e->recorded_in;
    pthread_mutex_lock(&in->lock);
    struct slot *slot = &in->slots[e->seq % SIM_QUEUE];
    if (slot->event == e && !e->resolved) { /* else the slot's next user has kept the time already */
        e->done_ns = in->entries[e->seq % SIM_QUEUE].done_ns;
        e->resolved = true;
        slot->event = NULL;
    }
    pthread_mutex_unlock(&in->lock);
    return true;
}

API(cuEventQuery, (CUevent e)) {
    TRY(drv_ready());
    NEED(e && e->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(!e->capture, CUDA_ERROR_CAPTURED_EVENT);
    if (happened(e))
        return CUDA_SUCCESS;
    sim_advance(&drv.sim, (unsigned)e->recorded_in->device);
    return happened(e) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API(cuEventSynchronize, (CUevent e)) {
    TRY(drv_ready());
    NEED(e && e->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(!e->capture, CUDA_ERROR_CAPTURED_EVENT);
    if (!happened(e))
        TRY(drv_wait(e->recorded_in, e->seq));
    happened(e);
    pools_trim();
    return CUDA_SUCCESS;
}

API(cuEventElapsedTime_v2, (float *ms, CUevent from, CUevent to)) {
    TRY(drv_ready());
    NEED(ms, CUDA_ERROR_INVALID_VALUE);
    NEED(from && from->magic == EVENT_MAGIC && to && to->magic == EVENT_MAGIC, CUDA_ERROR_INVALID_HANDLE);
    NEED(from->recorded && to->recorded, CUDA_ERROR_INVALID_HANDLE);
    NEED(!((from->flags | to->flags) & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE);
    if (!happened(from) || !happened(to)) {
        TRY(cuEventQuery(from));
        TRY(cuEventQuery(to));
    }
    *ms = (float)((double)(int64_t)(to->done_ns - from->done_ns) / 1e6);
    return CUDA_SUCCESS;
}
API(cuEventElapsedTime, (float *ms, CUevent from, CUevent to)) { return cuEventElapsedTime_v2(ms, from, to); }
