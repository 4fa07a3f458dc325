"""The scheduler is killed and started again, time after time, while slices compute: nobody blocks.

``-m soak`` kills 100 times, otherwise 5. The control is a limiter that does not look at the scheduler's heartbeat.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

from compute import Machine, Share, SliceFiles, start_client, wait_ready  # noqa: E402
from limiter_kit import limiter  # noqa: E402

from nbgpu_agent import layout  # noqa: E402

pytestmark = pytest.mark.slow
KERNEL_NS = 2_000_000
BLOCKED_SECONDS = 0.6


class Watch(threading.Thread):
    """How long each slice went without launching anything after the scheduler was killed, at the longest.

    Before that it may have waited for its turn, which is no fault of the kill.
    """

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(daemon=True)
        self.stop, self.longest_seconds, self.late_seconds = threading.Event(), [0.0] * len(folders), 0.0
        self.killed_at: list[float] = []
        self._maps = [mmap.mmap(os.open(folder / "use", os.O_RDWR), layout.USE_SIZE) for folder in folders]
        self._uses = [layout.Use.from_buffer(mapped) for mapped in self._maps]

    def launches(self) -> list[int]:
        """Return how often each slice has launched."""
        return [sum(slot.launches + sum(slot.launches_by_thread) for slot in use.slot[: use.high_water]) for use in self._uses]

    def run(self) -> None:
        seen, since = self.launches(), [time.monotonic()] * len(self._uses)
        before = time.monotonic()
        while not self.stop.wait(0.004):
            launches, now = self.launches(), time.monotonic()
            self.late_seconds, before = max(self.late_seconds, now - before), now
            for i, count in enumerate(launches):
                first = next((at for at in self.killed_at if at >= since[i]), None)
                self.longest_seconds[i] = max(self.longest_seconds[i], now - first if first else 0.0)
                if count != seen[i]:
                    seen[i], since[i] = count, now


class Place:
    """Slices that compute, and a scheduler that can be killed."""

    def __init__(self, machine: Machine, folder: Path, library: Path) -> None:
        self.folders: list[Path] = []
        self.clients: list[subprocess.Popen[str]] = []
        self.scheduler: subprocess.Popen[str] | None = None
        for number, share in enumerate([Share(500), Share(300), Share(200)]):
            self.folders.append(SliceFiles(folder / str(number), share, machine.uuid()).folder)
        self.start()
        for path in self.folders:
            self.clients.append(start_client(machine, KERNEL_NS, path, library=library))
        wait_ready(self.clients)

    def start(self) -> None:
        """Start the scheduler and wait until it gives turns."""
        command = [sys.executable, str(ROOT / "tests" / "limiter" / "sched_process.py"), *map(str, self.folders)]
        self.scheduler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.scheduler.stdout
        assert self.scheduler.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """Kill the scheduler."""
        assert self.scheduler
        self.scheduler.kill()
        self.scheduler.communicate(timeout=20)

    def close(self) -> None:
        """End everything."""
        self.kill()
        for client in self.clients:
            client.kill()
            client.communicate(timeout=20)


@pytest.fixture
def make_place(compute_machine: Machine, tmp_path: Path) -> Iterator[Callable[[Path], Place]]:
    made: list[Place] = []

    def make(library: Path) -> Place:
        made.append(Place(compute_machine, tmp_path, library))
        return made[-1]

    yield make
    for place in made:
        place.close()


def storm(place: Place, kills: int, seed: int, dead_seconds: float | None) -> tuple[Watch, int]:
    """Kill it so often, at random moments, dead for a random time or for this one. Returns pauses, and kills behind a closed gate."""
    dice, closed = random.Random(seed), 0
    time.sleep(1)
    watch = Watch(place.folders)
    watch.start()
    before = watch.launches()
    for _ in range(kills):
        time.sleep(dice.uniform(0.05, 0.6))
        closed += any(gate_of(folder) == layout.GATE_CLOSED for folder in place.folders)
        watch.killed_at.append(time.monotonic())
        place.kill()
        time.sleep(dice.uniform(0, 1.2) if dead_seconds is None else dead_seconds)
        place.start()
    time.sleep(0.8)
    watch.stop.set()
    watch.join()
    assert all(now > was for now, was in zip(watch.launches(), before, strict=True))
    return watch, closed


def gate_of(folder: Path) -> int:
    """Return the slice's gate word."""
    return layout.Ctl.from_buffer_copy((folder / "ctl").read_bytes()).device[0].gate


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.timeout(400)
def test_nobody_blocks_while_the_scheduler_is_dead(
    make_place: Callable[[Path], Place], kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("NBGPU_SEED", "20240611"))
    watch, closed = storm(make_place(limiter()), kills, seed, None)
    with capsys.disabled():
        pauses = ", ".join(f"{seconds:.2f} s" for seconds in watch.longest_seconds)
        print(f"\nseed {seed}: scheduler killed {kills} times, {closed} behind a closed gate; longest pauses {pauses}")
    assert closed > kills // 2, "kills while nobody waits show nothing"
    assert max(watch.longest_seconds) - watch.late_seconds <= BLOCKED_SECONDS


def test_control_without_a_look_at_the_heartbeat_it_blocks(make_place: Callable[[Path], Place]) -> None:
    watch, _ = storm(make_place(limiter("NBGPU_CONTROL_NO_FALLBACK")), 1, 1, 1.5)
    assert max(watch.longest_seconds) > BLOCKED_SECONDS
