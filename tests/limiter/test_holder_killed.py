"""How long a process that is killed in its turn keeps the GPU from its neighbour: until the neighbour's gate opens, with real processes."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

from compute import Machine, Share, SliceFiles, start_client, wait_ready  # noqa: E402
from limiter_slice import wait_until  # noqa: E402

from nbgpu_agent import layout  # noqa: E402
from nbgpu_agent.native import Native, Scheduler  # noqa: E402

pytestmark = pytest.mark.slow
KERNEL_NS = 2_000_000
HOLDER, NEIGHBOUR = Share(590), Share(410)
"""Of 125 ms: the longest turn in which the scheduler does not look before its end whether its slice lives."""
LEAST_LEFT_NS = 40_000_000
KILLS, STOPS = 30, 5
AT_ONCE = 5
"""Processes that have a context: the slice has memory for eight."""
MEDIAN_SECONDS, MOST_SECONDS = 0.08, 0.5
"""At most 80 ms by what the scheduler does; a busy machine adds to it."""


class Place:
    """Two slices; in the second one somebody computes all the time, in the first one, one after the other, who is killed."""

    def __init__(self, machine: Machine, folder: Path, scheduler: Scheduler) -> None:
        self.machine = machine
        self.folders: list[Path] = []
        for name, share in (("holder", HOLDER), ("neighbour", NEIGHBOUR)):
            files = SliceFiles(folder / name, share, machine.uuid())
            files.add_to(scheduler, share)
            self.folders.append(files.folder)
        self.processes = [start_client(machine, KERNEL_NS, self.folders[1])]
        wait_ready(self.processes)

    def holders(self, count: int) -> list[subprocess.Popen[str]]:
        """Start so many processes in the first slice, which compute once they are let go."""
        made = [start_client(self.machine, KERNEL_NS, self.folders[0]) for _ in range(count)]
        self.processes += made
        return made

    def device(self, slice_number: int) -> layout.CtlDevice:
        """Return what the scheduler wrote for a slice."""
        return layout.Ctl.from_buffer_copy((self.folders[slice_number] / "ctl").read_bytes()).device[0]

    def is_open(self, slice_number: int) -> bool:
        """Whether the slice has its turn."""
        return self.device(slice_number).gate == layout.GATE_OPEN

    def left_ns(self) -> int:
        """Return how much of the first slice's turn is left; one that nobody waits for has no end."""
        device = self.device(0)
        return device.turn_end_ns - time.monotonic_ns() if device.gate == layout.GATE_OPEN else 0

    def seconds_held(self, holder: subprocess.Popen[str], sent: signal.Signals, part_of_turn: float) -> float:
        """Send the signal after this part of a turn; return after what time the neighbour's gate opened."""
        assert wait_until(lambda: not self.is_open(0)), "the neighbour has its turn"
        assert wait_until(lambda: self.left_ns() > LEAST_LEFT_NS and not self.is_open(1))
        time.sleep(max(0, self.left_ns()) * part_of_turn / 1e9)
        began = time.monotonic()
        os.kill(holder.pid, sent)
        assert wait_until(lambda: self.is_open(1))
        return time.monotonic() - began

    def close(self) -> None:
        """End everything."""
        for process in self.processes:
            process.kill()
            process.communicate(timeout=20)


@pytest.fixture
def place(compute_machine: Machine, tmp_path: Path) -> Iterator[Place]:
    with Native().scheduler() as scheduler:
        made = Place(compute_machine, tmp_path, scheduler)
        yield made
        made.close()


def test_a_killed_holder_keeps_the_gpu_for_less_than_its_turn_and_a_little(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Control: one that is stopped still has its lock and says that its work runs, so it is waited for 60 ms longer."""
    dice = random.Random(int(os.environ.get("NBGPU_SEED", "20241129")))

    def held(count: int, sent: signal.Signals) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < count:
            for holder in place.holders(AT_ONCE):
                wait_ready([holder])
                seconds.append(place.seconds_held(holder, sent, dice.uniform(0.05, 0.9)))
                holder.kill()
                holder.wait(20)
        return seconds

    killed, stopped = held(KILLS, signal.SIGKILL), held(STOPS, signal.SIGSTOP)
    with capsys.disabled():
        for name, seconds in (("killed", killed), ("stopped", stopped)):
            median = statistics.median(seconds)
            print(f"\n{len(seconds)} {name} in their turns: {median * 1000:.0f} ms (median), {max(seconds) * 1000:.0f} ms at most", end="")
        print()
    assert statistics.median(killed) <= MEDIAN_SECONDS
    assert max(killed) <= MOST_SECONDS
    assert statistics.median(stopped) > MEDIAN_SECONDS
