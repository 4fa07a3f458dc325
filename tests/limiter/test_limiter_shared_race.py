"""Hand-overs and allocations of many processes at once: what the slice really holds of the device is never above its limit."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_slice import MIB, SliceFiles
from shared_kit import SharedMachine, shared_machine

Make = Callable[..., SliceFiles]
pytestmark = pytest.mark.slow
LIMIT = 100
SECONDS = 4
ALLOCATE = """
import random, time
dice, end, held = random.Random({seed}), time.monotonic() + {seconds}, []
while time.monotonic() < end:
    code, p = alloc(2 * MIB * dice.randrange(1, 12))
    if code == 0: held.append(p)
    while held and (code or dice.randrange(2)): ok(free(held.pop(dice.randrange(len(held))))); code = 0
for p in held: ok(free(p))
result = 1
"""
WATCH = """
import time
most, looks, end = 0, 0, time.monotonic() + {seconds}
while time.monotonic() < end:
    free_bytes, total = info(); most = max(most, total - free_bytes); looks += 1
result = [most // MIB, looks]
"""


@pytest.fixture
def machine(make_slice: Make, tmp_path: Path) -> Iterator[SharedMachine]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    with shared_machine(make_slice, base / f"nbgpu-test-race-{os.getpid()}") as made:
        yield made


def hand_over(machine: SharedMachine, files: SliceFiles | None, way: str, seed: int, moved: list[int]) -> None:
    """One pair: makes, opens, lets go in either order, until the time is over."""
    dice, end = random.Random(seed), time.monotonic() + SECONDS
    maker, opener = machine.start(files), machine.start(files)
    while time.monotonic() < end:
        result, *name = maker.ask("make", way, 2 * dice.randrange(4, 16))
        if result:
            continue
        opened = opener.ask("open", way, name[0]) == 0
        if dice.randrange(2) and opened:
            opener.ask("close", True)
            opened = False
        maker.ask("close", False)
        if opened:
            opener.ask("close", True)
        moved.append(1)


def play(machine: SharedMachine, files: SliceFiles | None, seed: int) -> tuple[int, int]:
    """Most MiB ever in use, and hand-overs made."""
    watcher, moved = machine.start(None), list[int]()
    allocators = [machine.start(files) for _ in range(2)]
    pairs = [
        threading.Thread(target=hand_over, args=(machine, files, way, seed + i, moved)) for i, way in enumerate(("ipc", "descriptor") * 2)
    ]
    for i, one in enumerate(allocators):
        one.tell("do", ALLOCATE.format(seed=seed + 10 + i, seconds=SECONDS))
    for pair in pairs:
        pair.start()
    most, looks = watcher.ask("do", WATCH.format(seconds=SECONDS))
    for pair in pairs:
        pair.join()
    for one in allocators:
        assert one.answer() == 1
    print(f"seed {seed}: at most {most} MiB in {looks} looks, {len(moved)} hand-overs")
    return most, len(moved)


def test_the_device_never_holds_more_than_the_limit(machine: SharedMachine) -> None:
    seed = int(os.environ.get("NBGPU_TEST_SEED", random.randrange(1 << 30)))
    files = machine.slice(LIMIT * MIB)
    most, moved = play(machine, files, seed)
    assert LIMIT // 2 < most <= LIMIT
    assert moved > 20
    assert machine.start(files).ask("left") == LIMIT, "nothing stays counted"
    assert machine.physical() == 0
    assert play(machine, None, seed)[0] > LIMIT, "the control"
