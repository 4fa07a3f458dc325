/* Questions that NVML asks of the machine. */
#include <stdio.h>
#include <string.h>

#include "sim_state.h"

int sim_processes(struct sim *sim, unsigned d, struct sim_process *out, int max) {
    int found = 0;
    sim_reap(sim, false);
    for (int c = 0; c < SIM_CLIENTS; c++) {
        struct sim_client *client = &sim->m->client[c];
        if (atomic_load(&client->state) != SIM_CLIENT_LIVE || sim_client_bytes(sim->m, c, d) == 0)
            continue;
        int pid = sim_client_pid(sim, c);
        if (pid < 0)
            continue;
        if (found < max) {
            struct sim_process *process = &out[found];
            *process = (struct sim_process){.pid = pid, .client = c, .uid = client->uid, .contexts = atomic_load(&client->contexts[d])};
            process->mem_bytes = sim_client_bytes(sim->m, c, d);
            memcpy(process->name, client->name, sizeof process->name - 1);
        }
        found++;
    }
    return found;
}

uint64_t sim_mem_used(struct sim *sim, unsigned device) {
    sim_reap(sim, false);
    return atomic_load(&sim->m->device[device].mem_used);
}

uint64_t sim_busy_ns(struct sim *sim, unsigned d, int client, uint64_t *now_ns) {
    sim_advance(sim, d);
    sim_lock(sim, d);
    uint64_t busy = atomic_load_explicit(&sim->m->client[client].busy_ns[d], memory_order_relaxed);
    *now_ns = atomic_load_explicit(&sim->m->device[d].now_ns, memory_order_relaxed);
    sim_unlock(sim, d);
    return busy;
}

int sim_samples(struct sim *sim, unsigned d, int client, struct sim_sample *out, int max) {
    struct sim_machine *m = sim->m;
    uint64_t sample_ns = SIM_SAMPLE_MS * 1000000ull / m->time_scale;
    int written = 0;
    sim_advance(sim, d);
    sim_lock(sim, d);
    const struct sim_bucket *history = client < 0 ? m->device[d].history : m->client_history[client][d];
    uint64_t running = atomic_load(&m->device[d].now_ns) / sample_ns;
    for (uint64_t back = 1; written < max && back < SIM_BUCKETS && back <= running; back++) {
        const struct sim_bucket *bucket = &history[(running - back) % SIM_BUCKETS];
        uint64_t busy = bucket->index == running - back ? bucket->busy_ns : 0;
        out[written++] = (struct sim_sample){
            .end_wall_ns = m->base_ns + (running - back + 1) * sample_ns * m->time_scale,
            .busy_percent = (uint32_t)(busy * 100 / sample_ns),
        };
    }
    sim_unlock(sim, d);
    return written;
}
