"""Turns end to end: real processes under the limiter, the simulated driver, the scheduler's thread. Shares by the device's own truth."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import compute  # noqa: E402
from compute import Machine, Share, SliceFiles, start_client, wait_ready  # noqa: E402
from limiter_kit import COMPUTE_SCALE as SCALE  # noqa: E402
from limiter_kit import going_on  # noqa: E402

from nbgpu_agent import layout  # noqa: E402
from nbgpu_agent.native import Native, Scheduler  # noqa: E402
from nbgpu_agent.nvml import Nvml  # noqa: E402
from nbgpu_agent.reconcile import Account  # noqa: E402
from nbgpu_agent.turns import settle  # noqa: E402

pytestmark = pytest.mark.slow
KERNEL_NS = 2_000_000 * SCALE
BYTES_OF_SLOT = ctypes.sizeof(layout.UseSlot)


@pytest.fixture
def machine(compute_machine: Machine) -> Machine:
    return compute_machine


class Room:
    """Slices on the machine and what computes in them; everything ends with the test."""

    def __init__(self, machine: Machine, folder: Path, limited: bool = True) -> None:
        self.machine = machine
        self.folder = folder
        self.scheduler: Scheduler | None = Native().scheduler(compute.turns(SCALE)) if limited else None
        self.groups: list[list[subprocess.Popen[str]]] = []
        self.entries: list[int] = []

    def add(self, share: Share, work: str = "kernels", kernel_ns: int = KERNEL_NS) -> None:
        """Make a slice and start its processes; `go` lets them compute."""
        files = SliceFiles(self.folder / str(len(self.groups)), share, self.machine.uuid())
        if self.scheduler:
            self.entries.append(files.add_to(self.scheduler, share))
        folder = files.folder if self.scheduler else None
        self.groups.append([start_client(self.machine, kernel_ns, folder, work=work) for _ in range(share.processes)])

    def go(self) -> None:
        """Let all processes compute."""
        wait_ready([client for group in self.groups for client in group])

    def shares(self, seconds: float) -> list[float]:
        """Return each living slice's part of the device over a while, in percent."""
        living = [group for group in self.groups if all(client.poll() is None for client in group)]
        return compute.measure(self.machine, living, 1, seconds)[0]

    def close(self) -> None:
        """End everything."""
        for client in [client for group in self.groups for client in group]:
            client.kill()
            client.communicate(timeout=20)
        if self.scheduler:
            self.scheduler.close()


@pytest.fixture
def room(machine: Machine, tmp_path: Path) -> Iterator[Room]:
    made = Room(machine, tmp_path)
    yield made
    made.close()


@pytest.fixture
def free_room(machine: Machine, tmp_path: Path) -> Iterator[Room]:
    """The control: the same without limiter and scheduler."""
    (tmp_path / "free").mkdir()
    made = Room(machine, tmp_path / "free", limited=False)
    yield made
    made.close()


@pytest.mark.parametrize("shares", [[Share(750), Share(250)], [Share(300, strict=True)]], ids=["75/25", "strict 30"])
def test_shares_of_real_processes(room: Room, free_room: Room, shares: list[Share]) -> None:
    errors = []
    for place in (room, free_room):
        for share in shares:
            place.add(share)
        place.go()
        time.sleep(compute.WARM_UP_SECONDS * SCALE)
        measured = place.shares(SCALE)
        errors.append(max(abs(got - share.milli / 10) for got, share in zip(measured, shares, strict=True)))
        place.close()
    assert errors[0] <= 4
    assert errors[1] > 15, "the driver alone must miss these shares"


def error_between(windows: list[list[float]]) -> float:
    """Mean error in points of two halves, in percent of what the device did in each window."""
    assert all(sum(window) > 70 for window in windows), windows
    return sum(abs(100 * window[0] / sum(window) - 50) for window in windows) / len(windows)


@pytest.mark.parametrize("work", ["memsets", "copies"])
def test_memsets_and_copies_wait_for_their_turn(room: Room, free_room: Room, work: str) -> None:
    """Two processes that only do these, in one slice, against one of GPU kernels in another: the driver alone gives them two thirds.

    Of what the device did: on a busy machine it idles where processes wait for a core.
    """
    errors = []
    for place in (room, free_room):
        place.add(Share(500, processes=2), work)
        place.add(Share(500))
        place.go()
        time.sleep(1)
        windows = [place.shares(SCALE) for _ in range(3)]
        print(work, windows)
        errors.append(error_between(windows))
        place.close()
    assert errors[0] <= 3, "two processes of a slice pay the driver's switches"
    assert errors[1] > 10, "the driver alone must miss these shares"


@pytest.mark.parametrize("work", ["memsets", "copies"])
def test_half_the_device_is_half_whatever_it_does(room: Room, work: str) -> None:
    room.add(Share(500), work)
    room.add(Share(500))
    room.go()
    time.sleep(1)
    windows = [room.shares(SCALE) for _ in range(4)]
    print(work, windows)
    assert error_between(windows) <= 2


def test_who_says_that_nothing_of_it_runs_pays_later(room: Room) -> None:
    """A slice writes "not busy" over its own words, so that its turns end while its work runs on; the agent sees the GPU compute."""
    for processes in (2, 1):
        room.add(Share(500, processes=processes), kernel_ns=15_000_000 * SCALE)
    nvml, scheduler = Nvml(compute.LIB / "sim" / "libnvidia-ml.so.1"), room.scheduler
    uuid = nvml.devices("node", True, None, "all")[0].uuid
    accounts: dict[int, Account] = {}
    owed = [0, 0]
    assert scheduler is not None

    def reconcile() -> None:
        sample = nvml.sample(uuid)
        for i, group in enumerate(room.groups):
            computed_ns = sum(sample.computed_ns.get(client.pid, 0) for client in group)
            owed[i] += settle(scheduler, room.entries[i], accounts, i, computed_ns)

    with (room.folder / "0" / "use").open("r+b") as use:

        def lie() -> None:
            for slot in range(2):
                os.pwrite(use.fileno(), bytes(16), layout.Use.slot.offset + slot * BYTES_OF_SLOT + layout.UseSlot.busy_since.offset)

        room.go()
        with going_on(lie, 0.002):
            time.sleep(1)
            without = room.shares(3)
            with going_on(reconcile, 1):
                time.sleep(4)
                shares = room.shares(6)
    print(f"without {without}, reconciled {shares}, owed {owed}")
    assert without[1] < 40, "the lie must win something, or the test shows nothing"
    assert shares[1] > 47
    assert owed[1] == 0


def test_killed_owner_leaves_the_device_to_the_other(room: Room) -> None:
    """SIGKILL at random moments, in a turn, draining, waiting: the neighbour goes on, at once and with everything."""
    seed = int(os.environ.get("NBGPU_SEED", "0")) or random.randrange(2**32)
    moments = random.Random(seed)
    room.add(Share(500))
    room.go()
    where = {"open": 0, "closed": 0}
    for _ in range(6):
        room.add(Share(500))
        wait_ready(room.groups[-1])
        time.sleep(0.3 + moments.random() * 0.3)
        assert room.scheduler is not None
        where["open" if room.scheduler.stats(room.entries[-1]).gate == 1 else "closed"] += 1
        room.groups[-1][0].kill()
        room.groups[-1][0].wait(10)
        alone = compute.measure(room.machine, room.groups[:1], 1, 0.5)[0][0]
        assert alone > 80, f"seed {seed}: the neighbour of a killed process got {alone:.0f} %"
        room.scheduler.remove(room.entries[-1])
    print(f"seed {seed}, killed with the gate {where}")


def test_without_a_scheduler_nobody_hangs(room: Room) -> None:
    """The agent is gone: burst slices run on, a strict one keeps to its share by itself."""
    room.add(Share(500))
    room.add(Share(200, strict=True))
    room.go()
    time.sleep(0.5)
    assert room.scheduler is not None
    room.scheduler.close()
    time.sleep(1)
    burst, strict = room.shares(2)
    assert burst > 50
    assert 5 < strict < 35
