"""The simulated driver's shared memory: it lives as long as a process holds it, and is told as one's, then as another's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import environment, run, sim_driver
from limiter_slice import SliceFiles, wait_until
from shared_kit import WAYS, SharedMachine, shared_machine

pytest.importorskip("pynvml")
Make = Callable[..., SliceFiles]
TOLD = """
import pynvml as n
n.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0)
say({p.pid: p.usedGpuMemory // MIB for p in n.nvmlDeviceGetComputeRunningProcesses(h) if p.usedGpuMemory})
"""


@pytest.fixture
def machine(make_slice: Make, tmp_path: Path) -> Iterator[SharedMachine]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    with shared_machine(make_slice, base / f"nbgpu-test-sim-shared-{os.getpid()}") as made:
        yield made


def told(machine: SharedMachine) -> dict[int, int]:
    answer = run(TOLD, environment(None, sim_driver(), **machine.more))
    return {int(pid): mib for pid, mib in answer.items()}


@pytest.mark.parametrize("way", WAYS)
def test_nvml_tells_it_of_its_maker_then_of_who_is_left(machine: SharedMachine, way: str) -> None:
    maker, one, two = (machine.start(None) for _ in range(3))
    _, name = maker.ask("make", way, 64)
    assert [opener.ask("open", way, name) for opener in (one, two)] == [0, 0]
    assert told(machine) == {maker.process.pid: 64}
    maker.kill()
    assert wait_until(lambda: list(told(machine).values()) == [64])
    for opener, other in ((one, two), (two, one)):
        if opener.process.pid in told(machine):
            opener.ask("close", True)
            assert told(machine) == {other.process.pid: 64}
            break
    assert two.process.poll() is None
    one.kill()
    two.kill()
    assert wait_until(lambda: machine.physical() == 0)


@pytest.mark.parametrize("way", WAYS)
def test_the_dead_hand_nothing_out(machine: SharedMachine, way: str) -> None:
    maker, late = machine.start(None), machine.start(None)
    _, name = maker.ask("make", way, 64)
    if way == "ipc":
        maker.kill()
        assert wait_until(lambda: machine.physical() == 0)
        assert late.ask("open", way, name) == 1
    else:  # by a descriptor that outlived it
        late.ask("open", way, name)
        late.ask("close", True)
        assert machine.physical() == 64
        maker.kill()
        assert wait_until(lambda: machine.physical() == 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("who", ["maker", "opener"])
def test_killed_under_the_devices_lock(machine: SharedMachine, way: str, who: str) -> None:
    fault = {"NBGPU_FAULT": "sim.share:1"}
    maker = machine.start(None, **(fault if who == "maker" else {}))
    opener = machine.start(None, **(fault if who == "opener" else {}))
    if who == "maker":
        maker.tell("make", way, 64)
        assert maker.process.wait(timeout=30) == -signal.SIGKILL
    else:
        _, name = maker.ask("make", way, 64)
        opener.tell("open", way, name)
        opener.tell("close", True)
        assert opener.process.wait(timeout=30) == -signal.SIGKILL
        assert machine.physical() == 64
        maker.kill()
    assert wait_until(lambda: machine.physical() == 0)
    assert machine.start(None).ask("make", way, 64)[0] == 0


def test_small_blocks_and_old_contents(machine: SharedMachine) -> None:
    """A block of less than 2 MiB lies beside others, whose contents stay theirs."""
    maker, opener = machine.start(None), machine.start(None)
    script = """
p, q = alloc(1000)[1], alloc(1000)[1]; write(p, "mine"); write(q, "ours"); it.pointer = q
name = Handle(); ok(cuda.cuIpcGetMemHandle(c.byref(name), c.c_uint64(q))); write(p, "MINE")
again = Handle(); ok(cuda.cuIpcGetMemHandle(c.byref(again), c.c_uint64(q)))
own = cuda.cuIpcOpenMemHandle_v2(c.byref(c.c_uint64()), name, 1)
result = [bytes(name.bytes).hex(), read(p, 4), bytes(name.bytes) == bytes(again.bytes), own]
"""
    name, *rest = maker.ask("do", script)
    assert rest == ["MINE", True, 201]
    assert opener.ask("open", "ipc", name) == 0
    assert opener.ask("read", 4) == "ours"
    opener.ask("write", "OURS")
    assert maker.ask("read", 4) == "OURS"
    assert machine.physical() == 2
