"""Limits of compute of a slice's kernels, end to end: real processes under the limiter, the simulated driver, the scheduler's thread."""

from __future__ import annotations

import ctypes
import os
import statistics
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

from nbgpu.models import KernelLimit  # noqa: E402
from nbgpu_agent import layout  # noqa: E402
from nbgpu_agent.native import Native  # noqa: E402
from nbgpu_agent.slicedir import CtlFile  # noqa: E402

pytestmark = pytest.mark.slow
KERNEL_NS = 1_000_000 * SCALE
WINDOWS = 4
BAR_POINTS = 2.0


@pytest.fixture
def machine(compute_machine: Machine) -> Machine:
    return compute_machine


class House:
    """Slices with kernels in them; everything ends with the test."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.scheduler = Native().scheduler(compute.turns(SCALE))
        self.slices: list[tuple[int, SliceFiles, CtlFile]] = []
        self.clients: dict[str, subprocess.Popen[str]] = {}

    def add(self, share: Share, *kernels: str) -> None:
        """Make a slice and start one process for each kernel named."""
        files = SliceFiles(self.folder / str(len(self.slices)), share, self.machine.uuid())
        self.slices.append((files.add_to(self.scheduler, share), files, CtlFile(files.folder)))
        for name in kernels:
            self.clients[name] = start_client(self.machine, KERNEL_NS, files.folder, name)

    def limit(self, **milli: int) -> None:
        """Give kernels of the first slice these limits and no others."""
        entry, _, ctl = self.slices[0]
        ctl.set_kernels({name: KernelLimit(compute_milli=value) for name, value in milli.items()})
        self.scheduler.kernels(entry)

    def go(self) -> None:
        """Let all processes compute, and warm up."""
        wait_ready(list(self.clients.values()))
        time.sleep(0.5 * SCALE)

    def error(self, windows: int = WINDOWS, **percent: float) -> float:
        """Return the mean error in points over so many seconds of device time, of those kernels that are named.

        Where the whole device is due to them, of what it did: on a busy machine it idles where processes wait for a core.
        """
        [measured] = compute.measure(self.machine, [[self.clients[name]] for name in percent], 1, windows * SCALE)
        did = sum(measured) if sum(percent.values()) == 100 else 100
        print([round(share, 1) for share in measured], "due", percent)  # shown with a failure
        assert did > 70, "the machine is too busy"
        return statistics.mean(abs(100 * got / did - due) for got, due in zip(measured, percent.values(), strict=True))

    def close(self) -> None:
        """End everything."""
        for client in self.clients.values():
            client.kill()
            client.communicate(timeout=20)
        self.scheduler.close()
        for _, _, ctl in self.slices:
            ctl.close()


@pytest.fixture
def house(machine: Machine, tmp_path: Path) -> Iterator[House]:
    made = House(machine, tmp_path)
    yield made
    made.close()


def test_a_limited_kernel_beside_one_without_limit(house: House) -> None:
    house.add(Share(1000), "a", "b")
    house.go()
    assert house.error(1, a=25, b=75) > 15, "without a limit the two must share alike, or the test shows nothing"
    house.limit(a=250)
    time.sleep(0.5 * SCALE)
    assert house.error(a=25, b=75) <= BAR_POINTS


def test_a_limited_kernel_alone_on_an_idle_device(house: House) -> None:
    house.add(Share(1000), "a")
    house.limit(a=250)
    house.go()
    assert house.error(a=25) <= BAR_POINTS
    house.limit()
    time.sleep(0.2 * SCALE)
    assert house.error(1, a=25) > 50, "without a limit it must take it all, or the test shows nothing"


@pytest.mark.parametrize("strict", [False, True], ids=["burst", "strict"])
def test_inside_a_slice_that_has_half_beside_a_neighbour(house: House, strict: bool) -> None:
    house.add(Share(500, strict=strict), "a", "b")
    house.add(Share(500), "neighbour")
    house.go()
    assert house.error(1, a=15, b=35, neighbour=50) > 2 * BAR_POINTS, "without a limit the two must share alike, or the test shows nothing"
    house.limit(a=150)
    time.sleep(0.5 * SCALE)
    assert house.error(a=15, b=35, neighbour=50) <= BAR_POINTS


def test_resized_while_it_runs(house: House) -> None:
    house.add(Share(1000), "a", "b")
    house.limit(a=100)
    house.go()
    for milli in (100, 400, 200):
        house.limit(a=milli)
        time.sleep(0.3 * SCALE)
        assert house.error(a=milli / 10, b=100 - milli / 10) <= BAR_POINTS


def test_the_slice_is_resized_around_its_kernels(house: House) -> None:
    house.add(Share(600, strict=True), "a", "b")
    house.limit(a=150)
    house.go()
    assert house.error(a=15, b=45) <= BAR_POINTS
    house.scheduler.set(house.slices[0][0], 300, layout.MODE_STRICT)
    time.sleep(0.3 * SCALE)
    assert house.error(a=15, b=15) <= BAR_POINTS
    house.scheduler.set(house.slices[0][0], 200, layout.MODE_STRICT)
    time.sleep(0.3 * SCALE)
    assert house.error(a=10, b=10) <= BAR_POINTS, "a limit is no share: within a smaller slice both have alike"


def test_killed_at_any_moment_leaves_the_slice_to_the_others(house: House) -> None:
    house.add(Share(1000), "b")
    house.go()
    for number in range(5):
        name = f"a{number}"
        house.limit(**{name: 500})
        house.clients[name] = start_client(house.machine, KERNEL_NS, house.slices[0][1].folder, name)
        wait_ready([house.clients[name]])
        time.sleep(0.3 + 0.037 * number)
        before = house.machine.busy(house.clients[name].pid)[0]
        assert before > 0
        house.clients[name].kill()
        house.clients[name].wait(10)
        alone = compute.measure(house.machine, [[house.clients["b"]]], 1, 0.5)[0][0]
        assert alone > 80, f"the kernel beside a killed one got {alone:.0f} %"


def test_a_limit_and_lies_together_win_nothing_of_the_neighbour(house: House) -> None:
    """The slice's user writes over what its kernels say of themselves: that ends turns early, and no kernel's limit makes more of it."""
    house.add(Share(500), "a", "b")
    house.add(Share(500), "neighbour")
    house.go()
    without = share_beside_lies(house)
    house.limit(a=100)
    assert share_beside_lies(house) > min(without, 50) - 3


def share_beside_lies(house: House) -> float:
    """Return what the neighbour gets, in percent, while the first slice's slots are written to say that nothing is outstanding."""
    slot_bytes, first = ctypes.sizeof(layout.UseSlot), layout.Use.slot.offset + layout.UseSlot.busy_since.offset
    with (house.slices[0][1].folder / "use").open("r+b") as file:
        before = house.machine.busy(house.clients["neighbour"].pid)
        stop = time.monotonic() + 2 * SCALE
        while time.monotonic() < stop:
            for index in range(2):
                os.pwrite(file.fileno(), bytes(16), first + index * slot_bytes)
            time.sleep(0.002)
        after = house.machine.busy(house.clients["neighbour"].pid)
    return (after[0] - before[0]) / (after[1] - before[1]) * 100


def test_without_a_scheduler_a_limited_kernel_keeps_to_its_limit_by_itself(house: House) -> None:
    house.add(Share(1000), "a", "b")
    house.limit(a=200)
    house.go()
    house.scheduler.close()
    time.sleep(1)
    shares = compute.measure(house.machine, [[house.clients["a"]], [house.clients["b"]]], 1, 2)[0]
    assert 5 < shares[0] < 30
    assert shares[1] > 50
