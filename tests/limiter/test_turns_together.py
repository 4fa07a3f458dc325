"""A slice with parts of two devices has its turns on both together: the scheduler's thread on real files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_slice import PlayedSlice, wait_until

from nbgpu_agent import layout, native

SECONDS = 2.0
Make = Callable[..., list[PlayedSlice]]


@pytest.fixture
def scheduler() -> Iterator[native.Scheduler]:
    with native.Native().scheduler() as running:
        yield running


@pytest.fixture
def make(scheduler: native.Scheduler, tmp_path: Path) -> Iterator[Make]:
    """Make slices that always compute: for each its GPUs and its share."""
    made: list[PlayedSlice] = []

    def make_all(*slices: tuple[list[int], int]) -> list[PlayedSlice]:
        for gpus, milli in slices:
            files = PlayedSlice(tmp_path / str(len(made)))
            made.append(files)
            for device, gpu in enumerate(gpus):
                scheduler.add(files.ctl_fd, files.use_fd, device, gpu, milli, layout.MODE_BURST)
                files.take_slot(device, device)
                files.say(device, want=1, busy=True)
        return made

    yield make_all
    for files in made:
        files.close()


def apart(one: Callable[[], int], other: Callable[[], int]) -> float:
    """Return the part of the time with a gate open in which the other was not."""
    assert wait_until(lambda: one() == layout.GATE_OPEN)
    time.sleep(0.5)
    looks = different = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        open_gates = (one() == layout.GATE_OPEN) + (other() == layout.GATE_OPEN)
        looks += open_gates > 0
        different += open_gates == 1
        time.sleep(0.001)
    assert looks > 50
    return different / looks


NEIGHBOURS = [([0], 500), ([1], 200), ([1], 150), ([1], 150)]


def test_parts_of_one_slice_have_their_turns_together(make: Make) -> None:
    both = make(([0, 1], 500), *NEIGHBOURS)[0]
    assert apart(both.gate, lambda: both.gate(1)) < 0.1


def closed_within(gate: Callable[[], int], seconds: float) -> bool:
    """Whether the gate closes in that time."""
    return wait_until(lambda: gate() != layout.GATE_OPEN, seconds)


@pytest.mark.parametrize("peer_computes", [True, False], ids=["peer computes", "control"])
def test_a_part_that_may_wait_for_its_peer_keeps_its_turn(make: Make, peer_computes: bool) -> None:
    """Idle in its turn a slice is done with it; not while its part on the other device computes."""
    both = make(([0, 1], 500), ([0], 500), ([1], 500))[0]
    assert wait_until(lambda: both.gate() != layout.GATE_OPEN and both.gate(1) != layout.GATE_OPEN)
    assert wait_until(lambda: both.gate() == both.gate(1) == layout.GATE_OPEN)
    if not peer_computes:
        both.say(1, want=0, busy=False)
    both.say(0, want=0, busy=False)
    assert closed_within(both.gate, 0.02) != peer_computes


def test_parts_of_two_slices_do_not(make: Make) -> None:
    """The control."""
    here, there = make(([0], 500), ([1], 500), *NEIGHBOURS)[:2]
    assert apart(here.gate, there.gate) > 0.3
