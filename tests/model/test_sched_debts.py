"""A slice that ends and starts anew, again and again, does not shed what it took beyond its share."""

from __future__ import annotations

import ctypes as c

import pytest
from gpu_model import MS, TICK_NS, Load, Model, build_policy

TENTH, AWAY_NS, SECONDS = 100, 1000 * MS, 40


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    return build_policy(tmp_path_factory.mktemp("policy"))


def share(lib: c.CDLL, restarts: bool, remembered: bool = True) -> float:
    """Return what a slice of a tenth gets, percent, beside one that computes; its GPU kernels last half a second; it may end after each."""
    model = Model(lib, [Load(TENTH, 500.0), Load(900)])
    process, back_at, seen_ns, debt_ns = model.slices[0][0], 0, 0, 0
    for _ in range(SECONDS * 1000 * MS // TICK_NS):
        model.decide()
        model.submit()
        model.run_gpu()
        model.now += TICK_NS
        if restarts and not back_at and not process.queue and process.busy_ns > seen_ns and not model.is_open(0):
            seen_ns, process.alive, back_at = process.busy_ns, False, model.now + AWAY_NS
            debt_ns = lib.harness_ahead(model.device, model.ids[0])
            lib.harness_leave(model.device, model.ids[0], model.now)
        elif back_at and model.now >= back_at:
            process.alive, back_at, model.seen[0] = True, 0, None
            model.ids[0] = lib.harness_join(model.device, TENTH, False, model.now)
            if remembered:
                lib.harness_bring(model.device, model.ids[0], max(0, debt_ns - AWAY_NS * TENTH // 1000), model.now)
    model.close()
    return process.busy_ns / (SECONDS * 1000 * MS) * 100


def test_who_ends_and_starts_anew_gets_no_more_than_who_stays(policy: c.CDLL) -> None:
    stays, restarts, forgotten = share(policy, False), share(policy, True), share(policy, True, remembered=False)
    print(f"stays {stays:.1f} %, restarts {restarts:.1f} %, control: its debt is forgotten {forgotten:.1f} %")
    assert stays < 13
    assert restarts < 13, "as long as what it owes is remembered"
    assert forgotten > 20
