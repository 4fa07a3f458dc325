"""A slice is made smaller than what its programs hold: nobody else is given that memory until it is free. All real, on a simulated GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from agent_harness import GIB, AgentProcess, missing_libraries, until
from idle_kit import Notebook, idle_agent, refusal
from pool_process import PoolProcess

from nbgpu.client import AgentClient
from nbgpu.errors import NbgpuError
from nbgpu.models import AgentSlice, DeviceBooks, GrantState, Owner, Request, Resize

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
HELD_GIB, LEFT_GIB = 16, 4


class Ada:
    """A pool, an agent with one GPU, and ada's notebook that holds most of her half of it."""

    def __init__(self, runtime: Path):
        self.agent = idle_agent(AgentProcess(runtime, devices=1))
        (runtime / "pool.yaml").write_text("quotas: {default: {limit: {memory: 40GiB}}}\n")
        self.pool = PoolProcess(runtime)
        self.pool.start()
        self.usable = self.books().device.usable_bytes
        self.key = self.ask("ada", self.usable // 2)
        self.notebook = Notebook(self.pool.client.prepare(self.key, None), mib=64, agent=self.agent)
        self.pool.client.bind(self.key, self.notebook.pid)
        assert self.notebook.do("more", HELD_GIB * 1024) == "0"

    def ask(self, user: str, memory_bytes: int) -> str:
        asked = Request(request_id=uuid4().hex, owner=Owner(hub="h", user=user), compute_milli=100, memory_bytes=memory_bytes)
        return self.pool.client.acquire(asked).request.request_id

    def state(self, key: str) -> GrantState:
        return self.pool.client.grant(key).state

    def books(self) -> DeviceBooks:
        (found,) = self.pool.client.devices()
        return found

    def slice(self) -> AgentSlice:
        slices = AgentClient(self.agent.runtime / "agent.sock").slices().slices
        return next(one for one in slices if one.slice.slice_id == self.key)

    def shrink(self) -> None:
        granted = self.pool.client.resize(self.key, Resize(memory_bytes=LEFT_GIB * GIB))
        assert granted.resizing is not None
        assert granted.resizing[0].memory_bytes == LEFT_GIB * GIB
        # Of a slice that is younger than the agent's last look at the driver all is held.
        until(lambda: "still hold 16" in (self.pool.client.grant(self.key).note or ""), 5, "what she holds is told")

    def close(self) -> None:
        self.notebook.close()
        if self.pool.process is not None and self.pool.process.poll() is None:
            self.pool.kill(15)
        self.agent.close()


@pytest.fixture
def ada(runtime: Path) -> Iterator[Ada]:
    found = Ada(runtime)
    yield found
    found.close()


def still_booked(ada: Ada) -> None:
    """What ada holds is hers in every book, and her limit is the new one."""
    assert ada.books().memory_granted_bytes >= HELD_GIB * GIB
    seen = ada.slice()
    assert seen.slice.devices[0].memory_bytes >= HELD_GIB * GIB
    assert seen.lowered is not None
    assert seen.lowered.devices[0].memory_bytes == LEFT_GIB * GIB
    usage = ada.notebook.client.call("GET", "/v1/usage")
    assert usage["devices"][0]["memory_limit_bytes"] == LEFT_GIB * GIB


def test_memory_that_is_still_held_is_given_to_nobody(ada: Ada) -> None:
    ada.shrink()
    until(lambda: ada.books().memory_granted_bytes < 20 * GIB, 5, "what she does not hold is free")
    still_booked(ada)
    grace = ada.ask("grace", ada.usable - LEFT_GIB * GIB)
    fits = ada.ask("linus", ada.usable - 20 * GIB - 40 * GIB) if ada.usable > 65 * GIB else None
    time.sleep(1.5)  # some looks of the agent
    assert ada.state(grace) == GrantState.queued, "the GPU has no room for both"
    assert ada.notebook.do("second" if False else "launch") is not None
    assert fits is None or ada.state(fits) in (GrantState.queued, GrantState.reserved)
    if fits is not None:
        ada.pool.client.cancel(fits)
    assert refusal(ada.agent, ada.key) is not None, "nor is it parked meanwhile"
    ada.notebook.do("less")
    until(lambda: ada.state(grace) == GrantState.reserved, 10, "it is given once it is free")
    until(lambda: ada.pool.client.grant(ada.key).resizing is None, 5, "the shrink is done")
    assert ada.slice().lowered is None
    assert ada.books().memory_granted_bytes <= ada.usable


def test_neither_agent_nor_pool_forget_it_when_they_start_anew(ada: Ada) -> None:
    ada.shrink()
    ada.agent.kill()
    ada.agent.start("--idle-host-memory", "64 GiB")
    time.sleep(2.5)
    until(lambda: ada.slice() is not None, 10)
    still_booked(ada)
    ada.pool.kill()
    ada.pool.start()
    still_booked(ada)
    grant = ada.pool.client.grant(ada.key)
    assert grant.resizing is not None
    assert grant.note is not None
    grace = ada.ask("grace", ada.usable - LEFT_GIB * GIB)
    assert ada.state(grace) == GrantState.queued
    ada.notebook.close()  # the server ends: all of it is free
    until(lambda: ada.state(grace) == GrantState.reserved, 10)


@pytest.mark.parametrize("mark", ["limits-lowered", "limits-settled"])
def test_an_agent_that_is_killed_at_it_goes_on(ada: Ada, mark: str) -> None:
    ada.agent.kill()
    ada.agent.env["NBGPU_MARK"] = f"{mark}:1"
    ada.agent.start("--idle-host-memory", "64 GiB")

    def told() -> bool:
        with contextlib.suppress(NbgpuError):  # it dies of it
            ada.pool.client.resize(ada.key, Resize(memory_bytes=LEFT_GIB * GIB))
        return ada.agent.process is not None and ada.agent.process.poll() is not None

    until(told, 10, "the agent is killed", every=0.2)
    del ada.agent.env["NBGPU_MARK"]
    ada.agent.start("--idle-host-memory", "64 GiB")
    until(lambda: (ada.pool.client.grant(ada.key).note or "").startswith("The slice was made smaller"), 10, "the pool has it in its books")
    until(lambda: ada.books().memory_granted_bytes < 20 * GIB, 5)
    still_booked(ada)
    ada.notebook.do("less")
    until(lambda: ada.books().memory_granted_bytes == LEFT_GIB * GIB, 10)


def test_it_grows_again_into_what_it_still_holds(ada: Ada) -> None:
    ada.shrink()
    ada.pool.client.resize(ada.key, Resize(memory_bytes=10 * GIB))
    seen = ada.slice()
    assert seen.lowered is not None
    assert seen.lowered.devices[0].memory_bytes == 10 * GIB
    ada.pool.client.resize(ada.key, Resize(memory_bytes=18 * GIB))
    until(lambda: ada.pool.client.grant(ada.key).resizing is None, 5)
    assert ada.slice().lowered is None
    assert ada.slice().slice.devices[0].memory_bytes == 18 * GIB


def test_kernels_limits_follow_the_slice(ada: Ada) -> None:
    """Half of the slice's time stays half of it, and no kernel may have more memory than the slice; grown again it is as it was set."""
    own = ada.notebook.client
    kernel_id = ada.notebook.kernel_id
    as_set = {"memory_bytes": 10 * GIB, "compute_milli": 50}

    def kernel() -> dict[str, object]:
        (found,) = (one for one in own.call("GET", "/v1/usage")["kernels"] if one["kernel_id"] == kernel_id)
        return found

    assert own.call("PUT", f"/v1/kernels/{kernel_id}", as_set) == as_set
    assert (kernel()["limit"], kernel()["limit_set"]) == (as_set, None)
    ada.pool.client.resize(ada.key, Resize(memory_bytes=LEFT_GIB * GIB, compute_milli=30))
    until(lambda: kernel()["limit"] == {"memory_bytes": LEFT_GIB * GIB, "compute_milli": 15}, 5)
    assert kernel()["limit_set"] == as_set
    ada.agent.kill()
    ada.agent.start("--idle-host-memory", "64 GiB")
    until(lambda: kernel()["limit"] == {"memory_bytes": LEFT_GIB * GIB, "compute_milli": 15}, 5)

    def grown() -> bool:
        with contextlib.suppress(NbgpuError):  # the pool finds the agent again within two seconds
            ada.pool.client.resize(ada.key, Resize(memory_bytes=20 * GIB, compute_milli=100))
            return True
        return False

    until(grown, 10, "the pool answers", every=0.2)
    until(lambda: (kernel()["limit"], kernel()["limit_set"]) == (as_set, None), 5)
