"""Random starts, stops, cancels, evictions, kills and API errors on a cluster; after each step everything must agree.

The whole form is `make soak`; the short one is part of every run. ``NBGPU_SEED`` repeats a run. What was killed in which phase is printed:
kills in idle code prove nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_kit import Gateway
from hub_kit import HubPlace, KubeHub, clean, consistent, differences, gateway_of_hub, until
from pool_kit import Pool

pytestmark = [pytest.mark.kubernetes]
USERS = [f"user{number}" for number in range(6)]
PROFILES = ["quarter", "quarter", "half", "whole", "cpu"]
SETTLE_SECONDS = 60
FAULTS = ["hub", "pool ends", "both", "hub's API", "pool's API", "cancel", "evict", "delete", "slow pods"]
WEIGHTS = [2, 2, 1, 2, 2, 2, 1, 1, 2]
"""A pool that is killed leaves a lease that ends 15 s later; one that ends gives it back."""
FAULTY = 0.6
"""Share of the steps with a fault."""
SEED = 20261
PENDING_SECONDS = 12


@pytest.fixture
def place() -> Iterator[HubPlace]:
    place = HubPlace(nodes=2, devices=1)
    place.start()
    yield place
    Pool.stop_all()
    clean(place)
    place.stop()


class Weather:
    """Lets a share of the calls through a gateway fail: before or after the API server heard of them."""

    def __init__(self, gateway: Gateway, rng: random.Random):
        self._rng, self._lock = rng, threading.Lock()
        self.share = 0.0
        self.failed = 0
        gateway.before = gateway.after = self._look

    def _look(self, method: str, path: str) -> int | str | None:
        with self._lock:
            if self.share == 0 or "/leases" in path or self._rng.random() >= self.share:
                return None
            self.failed += 1
            return self._rng.choice([500, 503, "drop"])


class Soak:
    """One run."""

    def __init__(self, place: HubPlace, folder: Path, seed: int):
        self.rng = random.Random(seed)
        self.place = place
        gateways = gateway_of_hub(place), Gateway(place)
        self.weather = {"hub's API": Weather(gateways[0], self.rng), "pool's API": Weather(gateways[1], self.rng)}
        self.pool = Pool(place, folder, gateway=gateways[1], reservation_ttl_seconds=6).start()
        extra = "c.Spawner.http_timeout = 5\nc.KubeSpawner.start_timeout = 45\nc.GPUSliceMixin.gpu_wait_timeout = 10"
        self.hub = KubeHub(folder, place, self.pool, gateways[0], sys.executable, extra=extra)
        self.hub.start()
        self.hub.add(*USERS)
        self.landed: Counter[str] = Counter()
        self.outcome: Counter[str] = Counter()

    def step(self) -> None:
        """One start or stop, most times with a fault in it; then compare everything."""
        self.place.wait_for_rules()
        servers = self.servers()
        user = self.rng.choice(USERS)
        stop = user in servers
        fault = self.rng.choices(FAULTS, WEIGHTS)[0] if self.rng.random() < FAULTY else ""
        if fault in ("evict", "delete") and not stop:
            fault = ""
        operation = "stop" if stop else "start"
        delay = self.rng.choice([0.0, self.rng.random() * 0.2, self.rng.random()]) * (0.2 if stop else 1)
        late = self.rng.random() < 0.6
        profile = self.rng.choice(PROFILES)
        if fault == "slow pods":
            self.place.pending.add(user)
        if fault in self.weather:
            self.weather[fault].share = self.rng.choice([0.1, 0.3])
        asking = threading.Thread(target=self.ask, args=(operation, user, profile), daemon=True)
        if fault in ("evict", "delete"):
            getattr(self.place, fault)(user)
        asking.start()
        if fault in ("hub", "pool ends", "both", "cancel", "slow pods", *self.weather):
            if fault in self.weather:
                before = self.weather[fault].failed
                time.sleep(1.5)
                phase = "with calls that failed" if self.weather[fault].failed > before else "with nothing that failed"
            else:
                self.wait_for_traces(user if late else "")
                time.sleep(delay)
                phase = self.phase(user)
            self.landed[f"{fault:10} in {operation:5} {phase}"] += 1
        if fault == "cancel":
            self.ask("stop", user, "")
        if fault in ("hub", "both"):
            self.hub.kill()
        if fault in ("pool ends", "both"):
            self.pool.kill(signal.SIGKILL if fault == "both" else signal.SIGTERM)
        for one in self.weather.values():
            one.share = 0.0
        if fault == "slow pods" and self.rng.random() < 0.5:
            time.sleep(1)
            self.ask("stop", user, "")
        if fault in ("pool ends", "both"):
            self.pool.start(ready=False)
        if fault in ("hub", "both"):
            self.hub.start()
        asking.join(60)
        self.place.pending.clear()
        self.wake(user)
        self.settle(f"{operation} {user} {profile} {fault}")
        there = user in self.servers()
        self.outcome[f"{operation} {'with' if fault else 'without'} a fault -> {'runs' if there else 'none'}"] += 1
        if not fault and operation == "stop":
            assert not there, f"{user} was stopped and runs"

    def wait_for_traces(self, user: str, seconds: float = 1.5) -> None:
        """Wait until the cluster shows something of a user's start: a fault before that proves little."""
        begun = time.monotonic()
        while user and "nothing" in self.phase(user) and time.monotonic() - begun < seconds:
            time.sleep(0.01)

    def ask(self, operation: str, user: str, profile: str) -> None:
        """Start or stop a server; the hub may die meanwhile."""
        with contextlib.suppress(httpx.HTTPError):
            if operation == "start":
                self.hub.spawn(user, {"profile": profile})
            else:
                self.hub.api("DELETE", f"users/{user}/server")

    def wake(self, user: str) -> None:
        """Let the kubelet look again at a pod that it was to leave pending."""
        pod = self.place.pod_of(user)
        if pod is not None and pod["status"].get("phase") == "Pending" and pod["spec"].get("nodeName"):
            self.place.do(self.place._tend((pod["metadata"]["namespace"], pod["metadata"]["name"]), pod))

    def servers(self) -> dict[str, dict[str, object]]:
        """Return the servers by user."""
        return {one["name"]: one["servers"][""] for one in self.hub.api("GET", "users").json() if one["servers"]}

    def phase(self, user: str) -> str:
        """Return how far a start or stop is, as the cluster sees it."""
        pod = self.place.pod_of(user)
        if pod is not None:
            return f"with a pod that is {'Terminating' if 'deletionTimestamp' in pod['metadata'] else pod['status'].get('phase')}"
        states = {one["metadata"]["annotations"].get("nbgpu.io/owner", "") for one in self.place.claims()}
        return "with a claim" if any(f'"{user}"' in one for one in states) else "with nothing"

    def settle(self, what: str) -> None:
        """Wait until nothing is pending; give up those who wait for room; then compare."""
        until(self.pool.ready, SETTLE_SECONDS, "for the pool")
        begun = time.monotonic()
        while pending := [user for user, server in self.servers().items() if server["pending"] or not server["ready"]]:
            if time.monotonic() - begun > PENDING_SECONDS:
                for user in pending:
                    self.ask("stop", user, "")
            assert time.monotonic() - begun < SETTLE_SECONDS, f"{what}: {pending} never settle\n{self.hub.log.read_text()[-5000:]}"
            time.sleep(0.1)
        consistent(self.place, self.pool, self.hub, SETTLE_SECONDS)

    def run(self, steps: int) -> None:
        """So many steps, then stop everything: nothing may stay."""
        begun = time.monotonic()
        done = 0
        try:
            while done < steps:
                self.step()
                done += 1
        finally:
            failed = {name: one.failed for name, one in self.weather.items()}
            print(f"{done} steps in {time.monotonic() - begun:.0f} s; calls that were made to fail: {failed}")
            for what, count in sorted([*self.outcome.items(), *self.landed.items()]):
                print(f"{count:4d}  {what}")
        for user in self.servers():
            self.hub.stop(user)
        assert consistent(self.place, self.pool, self.hub) == set()


def run(place: HubPlace, folder: Path, steps: int) -> Soak:
    seed = int(os.environ.get("NBGPU_SEED", SEED))
    print(f"seed {seed}")
    soak = Soak(place, folder, seed)
    try:
        soak.run(steps)
    finally:
        soak.hub.end()
    return soak


@pytest.mark.timeout(600)
def test_a_short_soak(place: HubPlace, tmp_path: Path) -> None:
    run(place, tmp_path, 40)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_whole_soak(place: HubPlace, tmp_path: Path) -> None:
    begun = time.monotonic()
    soak = run(place, tmp_path, 500)
    print(f"500 steps in {time.monotonic() - begun:.0f} s")
    inside = sum(count for what, count in soak.landed.items() if "with nothing" not in what)
    assert inside > sum(soak.landed.values()) / 2, "most faults land inside an operation"


def test_the_comparison_sees_what_it_must_see(place: HubPlace, tmp_path: Path) -> None:
    """The control: a claim without a pod, a pod without a claim, and a slice that the pool does not know are each a difference."""
    pool = Pool(place, tmp_path, reservation_ttl_seconds=60).start()
    assert differences(place, pool) == []
    request = "0123456789abcdef"
    pool.granted(request)
    assert any("claims are" in one for one in differences(place, pool))
    place.pod(request, labels=False)
    until(lambda: place.phase(request) == "Running")
    assert differences(place, pool), "the pod is not known as one that carries it"
    place.delete_pod(request)
    pool.give_back(request)
    until(lambda: differences(place, pool) == [])
