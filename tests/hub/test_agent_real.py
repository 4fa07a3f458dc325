"""The agent with the real limiter on the simulated driver: what a program holds, is refused, and hides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import ROOT, AgentProcess, missing_libraries, own_agent, until, usage

from nbgpu.models import Launch
from nbgpu.quantities import GIB, MIB

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with own_agent() as process:
        yield process


class Program:
    """A CUDA program (bench/agent_tenant.py) in a slice; without the limiter when `limited` is False."""

    def __init__(self, launch: Launch, limited: bool = True):
        env = os.environ | launch.env | {"NBGPU_KERNEL_ID": "kernel-a"}
        if not limited:
            env = {name: value for name, value in env.items() if name not in ("LD_PRELOAD", "NBGPU_SLICE_DIR")}
        arguments = [sys.executable, "-S", "-E", str(ROOT / "bench/agent_tenant.py"), "0"]
        self.process = subprocess.Popen(arguments, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def allocate(self, size: int) -> int:
        """Return the CUresult of an allocation."""
        print("alloc", size, file=self.process.stdin, flush=True)
        return int(self._line().split()[0])

    def close(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate(timeout=10)


def test_what_a_program_holds_is_shown_and_what_it_is_refused_is_told(agent: AgentProcess) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    program = Program(launch)
    try:
        agent.adopt(wanted.slice_id, program.pid)
        assert program.allocate(5 * GIB) == 0
        seen = usage(launch)
        context = seen.devices[0].memory_used_bytes - 5 * GIB
        assert 0 < context < 1 * GIB, "the context counts"
        assert (seen.kernels[0].kernel_id, seen.kernels[0].pids) == ("kernel-a", [program.pid])
        last = (agent.events() or [{"id": -1}])[-1]["id"]
        assert program.allocate(16 * GIB) == 2
        told = agent.events(last, wait_seconds=2)
        assert [event["kind"] for event in told] == ["refused"]
        assert "was refused 16 GiB: this server's slice of 19.5 GiB has 14.2 GiB left" in told[0]["message"]
        agent.client.call("PATCH", f"/v1/slices/{wanted.slice_id}", {"memory_bytes": 30 * GIB})
        assert program.allocate(16 * GIB) == 0, "a raised limit is in force at once"
    finally:
        program.close()
    until(lambda: not agent.slices(), 0.5, "the end of the slice")
    until(lambda: not list(Path("/sys/fs/cgroup").glob(f"*/nbgpu-{wanted.slice_id}")), 3, "the end of the cgroup", every=0.1)


def test_a_kernel_killed_while_it_allocates_leaves_its_memory_to_its_neighbour(agent: AgentProcess) -> None:
    """The neighbour does nothing meanwhile, so that only the agent can notice: the limiter of the dead one is dead, too."""
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    neighbour = Program(launch)
    try:
        agent.adopt(wanted.slice_id, neighbour.pid)
        alone = usage(launch).devices[0].memory_used_bytes
        victim = Program(launch)
        assert victim.allocate(12 * GIB) == 0
        assert neighbour.allocate(16 * GIB) == 2, "the control: while it lives there is no room"
        assert victim.process.stdin is not None
        for _ in range(500):  # it dies in the middle of these
            victim.process.stdin.write(f"alloc {MIB}\n")
        victim.process.stdin.flush()
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        victim.process.communicate(timeout=10)
        until(lambda: usage(launch).devices[0].memory_used_bytes == alone, 1.0, "the dead kernel's memory is free")
        print(f"free after {time.monotonic() - killed:.2f} s (simulated)")
        assert neighbour.allocate(16 * GIB) == 0
    finally:
        neighbour.close()
    until(lambda: not agent.slices(), 1, "the end of the slice")


@pytest.mark.parametrize("limited", [False, True])
def test_a_program_without_the_limiter_is_told_within_two_seconds(agent: AgentProcess, limited: bool) -> None:
    wanted = agent.slice(250)
    launch = agent.put(wanted)
    last = (agent.events() or [{"id": -1}])[-1]["id"]
    program = Program(launch, limited)
    try:
        agent.adopt(wanted.slice_id, program.pid)
        assert program.allocate(3 * GIB) == 0
        began = time.monotonic()
        if limited:  # the control: nothing is told of a program that is limited
            time.sleep(3)
            assert agent.events(last) == []
        else:
            told = until(lambda: agent.events(last, kind="unlimited"), 4, "the event", every=0.1)
            assert time.monotonic() - began < 3.2  # two samples, one a second, on a busy machine
            assert (told[0]["slice_id"], told[0]["data"]["pid"]) == (wanted.slice_id, program.pid)
            assert told[0]["data"]["memory_bytes"] >= 3 * GIB
    finally:
        program.close()
    until(lambda: not agent.slices(), 2, "the end of the slice")


def test_a_program_of_no_slice_is_foreign(agent: AgentProcess) -> None:
    wanted = agent.slice(125)
    launch = agent.put(wanted)
    program = Program(launch, limited=False)
    try:
        program.allocate(64 * MIB)
        told = until(lambda: agent.events(kind="foreign"), 5, "the event", every=0.1)
        assert (told[-1]["slice_id"], told[-1]["data"]["pid"]) == (None, program.pid)
    finally:
        program.close()
        agent.delete(wanted.slice_id)
