"""Suspending a process: when the driver does not answer, has no lock, or the process ends meanwhile. A driver that is played."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator

import pytest

from nbgpu.procs import stat_fields
from nbgpu_agent import procs, suspension
from nbgpu_agent.offenders import Offence
from nbgpu_agent.policy import Kind
from nbgpu_agent.procs import Process
from nbgpu_agent.responses import kept
from nbgpu_agent.slicedir import Suspended
from nbgpu_agent.suspension import GpuLock, Suspender

GIB = 1024**3


class PlayedLock(GpuLock):
    """Locks at once, never, or ends its process first."""

    def __init__(self, does: str):
        self.lacks = "" if does != "nothing" else "there is none"
        self.does = does
        self.held: set[int] = set()
        self.go_on = threading.Event()

    def lock(self, pid: int) -> bool:
        if self.does == "hangs":
            self.go_on.wait(20)
        if self.does in ("locks", "ends"):
            self.held.add(pid)
        if self.does == "ends":
            child = next(one for one in CHILDREN if one.pid == pid)
            child.kill()
            child.wait()
        return pid in self.held

    def unlock(self, pid: int) -> bool:
        self.held.discard(pid)
        return True

    def locked(self, pid: int) -> bool:
        return pid in self.held


CHILDREN: list[subprocess.Popen[bytes]] = []


@pytest.fixture
def process() -> Iterator[Process]:
    child = subprocess.Popen(["sleep", "60"])
    CHILDREN.append(child)
    found = procs.find(child.pid)
    assert found is not None
    yield found
    child.kill()
    child.wait()
    CHILDREN.remove(child)


async def becomes(process: Process, stopped: bool) -> bool:
    """Wait until a process is stopped, or runs: a signal takes its time."""
    for _ in range(200):
        if (stat_fields(process.pid)[0] == b"T") is stopped:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize(("does", "how"), [("locks", "lock"), ("refuses", "stop"), ("nothing", "stop"), ("hangs", "stop")])
def test_it_is_locked_else_stopped_and_goes_on(process: Process, does: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspension, "ANSWER_SECONDS", 0.05)
    played = PlayedLock(does)

    async def main() -> None:
        suspender = Suspender(played)
        assert await suspender.suspend(process) == how
        assert await becomes(process, how == "stop")
        assert await suspender.holds(process) is (how == "lock")
        assert await suspender.resume(process)
        assert await becomes(process, False)
        assert not played.held
        played.go_on.set()
        suspender.close()

    asyncio.run(main())


def test_a_pid_that_may_be_anothers_by_now_is_unlocked(process: Process) -> None:
    played = PlayedLock("ends")

    async def main() -> None:
        assert await Suspender(played).suspend(process) is None
        assert not played.held

    asyncio.run(main())


@pytest.mark.parametrize(("version", "lacks"), [("550.54", "has no lock"), ("nonsense", "has no lock"), ("580.00", "cannot do it")])
def test_a_driver_without_the_lock_says_why(version: str, lacks: str) -> None:
    assert lacks in GpuLock("libnot-there.so.1", version).lacks


@pytest.mark.parametrize(
    ("kind", "held_gib", "seconds", "holds"),
    [
        ("unlimited", 3, 60, True),
        ("unlimited", 4, 60, False),  # it goes on allocating
        ("over-limit", 9, 60, True),  # that is the server's sum
        ("overhead", 9, 60, True),  # seen of another kind: what it held then is not known
        ("over-share", 3, 5, True),  # what was begun before the lock
        ("over-share", 3, 9, False),
    ],
)
def test_whether_a_lock_holds_is_seen_by_what_its_process_takes(kind: Kind, held_gib: int, seconds: float, holds: bool) -> None:
    before = "unlimited" if kind == "overhead" else kind
    entry = Suspended(pid=1, start_time=1, kind=before, since=1000.0, how="lock", memory_bytes=3 * GIB)
    offence = Offence("slice-00", kind, "GPU-0", Process(1, 1), held_gib * GIB, 0, 900)
    assert kept(entry, offence, 1000.0 + seconds) is holds
