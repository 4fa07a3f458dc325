"""Pool and agent, both real processes, on simulated GPUs: whoever is killed, the books are those of the processes that live."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from agent_harness import AgentProcess, missing_libraries
from test_pool_process import PoolProcess, until

from nbgpu.client import AgentClient, PoolClient
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import GrantState, Owner, Request, Resize

pytestmark = [pytest.mark.timeout(240), pytest.mark.skipif(bool(missing_libraries()), reason=str(missing_libraries()))]


@pytest.fixture
def agent(runtime: Path) -> Iterator[AgentProcess]:
    found = AgentProcess(runtime).start()
    yield found
    found.close()


@pytest.fixture
def pool(runtime: Path, agent: AgentProcess) -> Iterator[PoolProcess]:
    (runtime / "pool.yaml").write_text("reservation_ttl_seconds: 3\nqueue_ttl_seconds: 4\nqueue: {per_user: 100}\n")
    found = PoolProcess(runtime, "--config", str(runtime / "pool.yaml"))
    found.start()
    yield found
    if found.process and found.process.poll() is None:
        found.kill(15)


class Servers(threading.Thread):
    """One user who starts and stops servers: processes that do nothing, in slices."""

    def __init__(self, number: int, runtime: Path, stop: threading.Event, seed: int):
        super().__init__(daemon=True)
        self.pool, self.stop, self.rng = PoolClient(runtime / "pool.sock", 10), stop, random.Random(seed)
        self.number = number
        self.doing = "nothing"
        self.rounds = 0
        self.living: dict[str, subprocess.Popen[bytes]] = {}
        self.surprises: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                self.serve()
            except Unavailable:
                time.sleep(0.05)
            except NbgpuError as error:
                if error.status not in (404, 409, 503):
                    self.surprises.append(f"{self.doing}: {error.status} {error.message}")
            except Exception as error:
                self.surprises.append(f"{self.doing}: {error!r}")
            self.doing = "nothing"

    def serve(self) -> None:
        owner = Owner(hub="h", user=f"user-{self.number}", server=str(self.rounds))
        asked = Request(request_id=uuid4().hex, owner=owner, compute_milli=self.rng.choice([125, 250, 333]))
        process: subprocess.Popen[bytes] | None = None
        try:
            self.doing = "request"
            grant = self.pool.acquire(asked)
            self.doing = "wait"
            while grant.state == GrantState.queued and not self.stop.is_set():
                time.sleep(0.05)
                grant = self.pool.grant(asked.request_id)
            if grant.state != GrantState.reserved:
                return
            self.doing = "prepare"
            launch = self.pool.prepare(asked.request_id, None)
            process = subprocess.Popen(["sleep", "600"], env={**os.environ, **{key: value for key, value in launch.env.items() if value}})
            self.doing = "bind"
            assert self.pool.bind(asked.request_id, process.pid).state == GrantState.bound
            self.living[asked.request_id] = process
            self.rounds += 1
            time.sleep(self.rng.random() * 0.3)
            if len(self.living) > 1 or self.rng.random() < 0.7:
                self.end(next(iter(self.living)))
        finally:
            if asked.request_id not in self.living:
                self.doing = "release"
                if process is not None:
                    process.kill()
                    process.wait()
                with contextlib.suppress(NbgpuError):
                    self.pool.cancel(asked.request_id)

    def end(self, key: str) -> None:
        process = self.living.pop(key)
        process.kill()
        process.wait()


def overbooked(agent: AgentProcess) -> bool:
    client = AgentClient(agent.runtime / "agent.sock")
    parts = [part for one in client.slices().slices for part in one.slice.devices]
    return any(
        sum(part.compute_milli for part in parts if part.uuid == device.uuid) > 1000
        or sum(part.memory_bytes for part in parts if part.uuid == device.uuid) > device.usable_bytes
        for device in client.node().devices
    )


def stopped(pool: PoolProcess, look: bool) -> float:
    """Start and stop a server of a whole device; return how many seconds after its last process its slice was free."""
    asked = Request(request_id=uuid4().hex, owner=Owner(hub="h", user="ada"), compute_milli=1000)
    assert pool.client.acquire(asked).state == GrantState.reserved
    launch = pool.client.prepare(asked.request_id, None)
    process = subprocess.Popen(["sleep", "600"], env={**os.environ, **{key: value for key, value in launch.env.items() if value}})
    assert pool.client.bind(asked.request_id, process.pid).state == GrantState.bound
    pool.client.cancel(asked.request_id)
    if look:
        time.sleep(0.7)
        assert pool.client.grant(asked.request_id).state == GrantState.releasing, "a living server keeps what it has"
    process.kill()
    process.wait()
    begun = time.monotonic()
    until(lambda: pool.client.grant(asked.request_id).state == GrantState.gone, 5)
    return time.monotonic() - begun


def test_a_stopped_server_is_free_at_once(pool: PoolProcess, agent: AgentProcess) -> None:
    took = sorted(stopped(pool, look=number == 0) for number in range(5))
    print("free after " + ", ".join(f"{seconds:.3f}" for seconds in took) + " s (simulated)")
    assert took[2] <= 0.5


def test_a_running_server_is_resized(pool: PoolProcess, agent: AgentProcess) -> None:
    """Through the pool, by the agent's own limits; room is counted once, and comes free when it is free."""
    asked = Request(request_id=uuid4().hex, owner=Owner(hub="h", user="ada"), compute_milli=1000)
    pool.client.acquire(asked)
    launch = pool.client.prepare(asked.request_id, None)
    process = subprocess.Popen(["sleep", "600"], env={**os.environ, **{key: value for key, value in launch.env.items() if value}})
    try:
        pool.client.bind(asked.request_id, process.pid)
        pool.client.resize(asked.request_id, Resize(compute_milli=500, memory_milli=500))
        until(lambda: [one.compute_granted_milli for one in pool.client.devices()].count(500) == 1, 5)
        (held,) = AgentClient(agent.runtime / "agent.sock").slices().slices
        assert held.slice.devices[0].compute_milli == 500
        pool.client.resize(asked.request_id, Resize(compute_milli=750, mode="strict"))
        (held,) = AgentClient(agent.runtime / "agent.sock").slices().slices
        assert (held.slice.devices[0].compute_milli, held.slice.mode) == (750, "strict")
        pool.kill()
        pool.start()
        assert max(one.compute_granted_milli for one in pool.client.devices()) == 750
    finally:
        process.kill()
        process.wait()


def test_whoever_is_killed_the_books_are_those_of_the_living(pool: PoolProcess, agent: AgentProcess) -> None:
    seed = int(os.environ.get("NBGPU_SEED", random.SystemRandom().randrange(2**32)))
    kills = int(os.environ.get("NBGPU_KILLS", "10"))
    print(f"seed {seed}")
    rng = random.Random(seed)
    stop = threading.Event()
    users = [Servers(number, agent.runtime, stop, seed + number) for number in range(6)]
    for user in users:
        user.start()
    landed: Counter[str] = Counter()
    try:
        for _ in range(kills):
            before = sum(user.rounds for user in users)
            until(lambda before=before: sum(user.rounds for user in users) > before + 2, 30)
            time.sleep(rng.random() * 0.3)
            victim = rng.choice(["pool", "agent", "both"])
            landed.update(f"{victim} while {user.doing}" for user in users if user.doing != "nothing")
            if victim != "agent":
                pool.kill()
            if victim != "pool":
                agent.kill()
                agent.start()
            if victim != "agent":
                pool.start()
            assert not overbooked(agent)
    finally:
        stop.set()
        for user in users:
            user.join(30)
    print(f"clients were in: {dict(landed)}, servers started: {sum(user.rounds for user in users)}")
    try:
        assert [one for user in users for one in user.surprises] == []
        living = {key for user in users for key in user.living}
        assert living, "some servers run on through everything"

        def agree() -> bool:
            with contextlib.suppress(NbgpuError):
                grants = {one.request.request_id for one in pool.client.grants() if one.state == GrantState.bound}
                books = {key for one in pool.client.devices() for key in one.slices}
                return grants == books == living
            return False

        until(agree, 20)
    finally:
        for user in users:
            for key in list(user.living):
                user.end(key)
    until(lambda: not pool.client.grants(), 20)
    assert all(one.compute_granted_milli == 0 and one.memory_granted_bytes == 0 for one in pool.client.devices())


def test_what_was_lent_is_taken_back_where_it_is_not_used(runtime: Path, agent: AgentProcess) -> None:
    """The pool's word alone takes no memory: the agent has it, and looks whether it is used."""
    devices = len(AgentClient(runtime / "agent.sock").node().devices)
    (runtime / "pool.yaml").write_text("quotas: {groups: {bio: {guarantee: 1/2, lend: true}}}\nqueue: {per_user: 100}\n")
    pool = PoolProcess(runtime, "--config", str(runtime / "pool.yaml"))
    pool.start()
    processes: list[subprocess.Popen[bytes]] = []

    def ask(milli: int, user: str, groups: list[str]) -> Request:
        return Request(request_id=uuid4().hex, owner=Owner(hub="h", user=user), groups=groups, compute_milli=milli)

    try:
        lent = [ask(500, f"user-{number}", []) for number in range(2 * devices)]
        for asked in lent:
            assert pool.client.acquire(asked).state == GrantState.reserved
            launch = pool.client.prepare(asked.request_id, None)
            processes.append(
                subprocess.Popen(["sleep", "600"], env={**os.environ, **{key: value for key, value in launch.env.items() if value}})
            )
            assert pool.client.bind(asked.request_id, processes[-1].pid).state == GrantState.bound
        mine = ask(250, "student", ["bio"])
        pool.client.acquire(mine)
        until(lambda: pool.client.grant(mine.request_id).state == GrantState.reserved, 15)
        held = {one.slice.slice_id: one.slice.devices[0] for one in AgentClient(runtime / "agent.sock").slices().slices}
        smaller = [one for one in lent if held[one.request_id].compute_milli < 500]
        assert [held[one.request_id].compute_milli for one in smaller] == [375, 375]
        for one in smaller:
            assert "group bio needs what is guaranteed to them" in (pool.client.grant(one.request_id).note or "")
        pool.client.prepare(mine.request_id, None)
        assert not overbooked(agent)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        pool.kill(15)
