/* Memory that processes share: it lives as long as one of them holds it.
 *
 * Who holds what is the truth, a bit per client; whose it is (for NVML) follows from it: the maker's while that holds it, else the
 * first holder's. All under the lock of the memory's device, so that a death in between is repaired like any other.
 */
#include "sim_state.h"

#include "nbgpu_fault.h"

enum { FREE, MAKING, LIVE };

static bool holds(const struct sim_shared *s, uint32_t client) { return atomic_load(&s->holders[client / 64]) >> (client % 64) & 1; }

static int first_holder(const struct sim_shared *s) {
    if (holds(s, s->maker))
        return (int)s->maker;
    for (int word = 0; word < SIM_CLIENTS / 64; word++)
        if (atomic_load(&s->holders[word]))
            return word * 64 + __builtin_ctzll(atomic_load(&s->holders[word]));
    return -1;
}

static bool on(const struct sim_shared *s, unsigned device) { return atomic_load(&s->state) == LIVE && s->device == device; }

uint64_t sim_client_bytes(struct sim_machine *m, int client, unsigned device) {
    uint64_t bytes = atomic_load(&m->client[client].mem[device]);
    for (int i = 0; i < SIM_SHARED; i++)
        if (on(&m->shared[i], device) && first_holder(&m->shared[i]) == client)
            bytes += m->shared[i].bytes;
    return bytes;
}

bool sim_client_shares(struct sim_machine *m, int client) {
    for (int i = 0; i < SIM_SHARED; i++)
        if (atomic_load(&m->shared[i].state) == LIVE && holds(&m->shared[i], (uint32_t)client))
            return true;
    return false;
}

uint64_t sim_shared_bytes(struct sim_machine *m, unsigned device) {
    uint64_t bytes = 0;
    for (int i = 0; i < SIM_SHARED; i++)
        if (on(&m->shared[i], device) && first_holder(&m->shared[i]) >= 0)
            bytes += m->shared[i].bytes;
    return bytes;
}

int sim_shared_make(struct sim *sim, unsigned device, uint64_t bytes, bool fresh) {
    struct sim_machine *m = sim->m;
    uint32_t none = FREE;
    int found = -1;
    if (fresh && !sim_mem_take(sim, device, bytes))
        return -1;
    for (int i = 0; i < SIM_SHARED && found < 0; i++, none = FREE)
        if (atomic_compare_exchange_strong(&m->shared[i].state, &none, MAKING))
            found = i;
    if (found < 0) {
        if (fresh)
            sim_mem_give(sim, device, bytes);
        return -1;
    }
    struct sim_shared *s = &m->shared[found];
    sim_lock(sim, device);
    s->device = device;
    s->maker = (uint32_t)sim->client;
    s->bytes = bytes;
    s->id = atomic_fetch_add(&m->shared_ids, 1) + 1;
    for (int word = 0; word < SIM_CLIENTS / 64; word++)
        atomic_store(&s->holders[word], 0);
    atomic_fetch_or(&s->holders[sim->client / 64], 1ull << (sim->client % 64));
    atomic_store(&s->state, LIVE);
    NBGPU_POINT("sim.share");
    atomic_fetch_sub(&m->client[sim->client].mem[device], bytes); /* from its own into what is shared: the sum stays */
    sim_unlock(sim, device);
    return found;
}

bool sim_shared_join(struct sim *sim, int index, uint64_t id) {
    if (index < 0 || index >= SIM_SHARED)
        return false;
    struct sim_shared *s = &sim->m->shared[index];
    const unsigned device = s->device;
    sim_lock(sim, device);
    const bool there = on(s, device) && s->id == id && first_holder(s) >= 0;
    if (there)
        atomic_fetch_or(&s->holders[sim->client / 64], 1ull << (sim->client % 64));
    sim_unlock(sim, device);
    return there;
}

/* With the device's lock held. */
static void leave(struct sim_machine *m, struct sim_shared *s, int client) {
    atomic_fetch_and(&s->holders[client / 64], ~(1ull << (client % 64)));
    NBGPU_POINT("sim.share");
    if (first_holder(s) >= 0)
        return;
    atomic_fetch_sub(&m->device[s->device].mem_used, s->bytes);
    atomic_store(&s->state, FREE);
}

void sim_shared_leave(struct sim *sim, int index) {
    struct sim_shared *s = &sim->m->shared[index];
    const unsigned device = s->device;
    sim_lock(sim, device);
    leave(sim->m, s, sim->client);
    sim_unlock(sim, device);
}

void sim_shared_drop_client(struct sim_machine *m, int client, unsigned device) {
    for (int i = 0; i < SIM_SHARED; i++) {
        struct sim_shared *s = &m->shared[i];
        if (on(s, device) && (holds(s, (uint32_t)client) || first_holder(s) < 0)) /* the last: its end was cut short */
            leave(m, s, client);
    }
}
