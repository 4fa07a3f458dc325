"""How often the scheduler wakes for a turn: counted, with its real thread and slices that write what the limiter would."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from limiter_slice import PlayedSlice

from nbgpu_agent import layout, native

WARM_UP_SECONDS, WINDOWS, WINDOW_SECONDS = 1.8, 4, 1.0
LOOK_SECONDS = 0.0005
DRAIN_NS = 500_000
WAKES_MOST = 1.3


class Trainer:
    """A slice that always has work, and submits at once. It stops when its turn is over, or only once its gate is closed."""

    def __init__(self, files: PlayedSlice, stops_by_itself: bool) -> None:
        self.files, self.stops_by_itself = files, stops_by_itself
        self.row, self.device = files.use.slot[0], files.ctl.device[0]
        self.done_ns, self.looked_ns = 0, time.monotonic_ns()
        files.take_slot()
        files.say(want=1)

    def act(self) -> None:
        """Do what is to be done now."""
        now_ns, end_ns = time.monotonic_ns(), self.device.turn_end_ns
        is_open = self.device.gate == layout.GATE_OPEN
        over = not is_open or (self.stops_by_itself and end_ns and now_ns >= end_ns)
        if not self.row.busy_since:
            if not over:
                self.row.busy_since, self.row.want, self.done_ns = self.looked_ns, 0, 0  # slow hosts get longer turns
        elif over and not self.done_ns:
            self.row.want, self.done_ns = 1, now_ns + DRAIN_NS
        elif self.done_ns and now_ns >= self.done_ns:
            self.row.busy_since = 0
            self.files.ring()
        self.looked_ns = now_ns


class Pair:
    """Two trainers with half of a device each, and their scheduler."""

    def __init__(self, folder: Path, stops_by_itself: bool) -> None:
        self.scheduler = native.Native().scheduler()
        self.trainers = [Trainer(PlayedSlice(folder / str(i)), stops_by_itself) for i in range(2)]
        files = [trainer.files for trainer in self.trainers]
        self.entries = [self.scheduler.add(x.ctl_fd, x.use_fd, 0, 0, 500, layout.MODE_BURST) for x in files]
        self.stop = threading.Event()
        self.player = threading.Thread(target=self.play)
        self.player.start()

    def play(self) -> None:
        """Let both act until told to stop; where it may, before others who want the processor, as the scheduler's thread does."""
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
        while not self.stop.wait(LOOK_SECONDS):
            for trainer in self.trainers:
                trainer.act()

    def counted(self) -> tuple[int, int]:
        """Return the thread's wakes and the slices' turns so far."""
        return self.scheduler.totals().wakeups, sum(self.scheduler.stats(entry).turns for entry in self.entries)

    def close(self) -> None:
        """End everything."""
        self.stop.set()
        self.player.join()
        self.scheduler.close()
        for trainer in self.trainers:
            del trainer.row, trainer.device
            trainer.files.close()


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[dict[bool, Pair]]:
    made = {stops: Pair(tmp_path / str(stops), stops) for stops in (True, False)}
    yield made
    for pair in made.values():
        pair.close()


def test_a_turn_costs_the_scheduler_one_wake(pairs: dict[bool, Pair]) -> None:
    """A slice stops by itself when its turn is over, and what it rings then is all that the thread wakes for, beats included.

    Control: slices that go on until their gates are closed cost a wake for that and one for what they ring then. The best of some windows:
    on a busy machine rings come late.
    """
    wakes: dict[bool, list[float]] = {True: [], False: []}
    time.sleep(WARM_UP_SECONDS)
    for _ in range(WINDOWS):
        before = {stops: pair.counted() for stops, pair in pairs.items()}
        time.sleep(WINDOW_SECONDS)
        for stops, pair in pairs.items():
            (wakeups, turns), (wakeups_before, turns_before) = pair.counted(), before[stops]
            assert turns - turns_before > 5 * WINDOW_SECONDS, "too few turns to count by"
            wakes[stops].append((wakeups - wakeups_before) / (turns - turns_before))
    print(f"wakes a turn: {min(wakes[True]):.2f}, where slices do not stop by themselves {min(wakes[False]):.2f}")
    assert min(wakes[True]) <= WAKES_MOST
    assert min(wakes[False]) > 1.6
