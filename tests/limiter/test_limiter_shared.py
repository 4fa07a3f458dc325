"""Memory that several processes hold: counted once in a slice, while one of its processes keeps it alive."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_slice import MIB, SliceFiles, wait_until
from shared_kit import WAYS, Process, SharedMachine, shared_machine

Make = Callable[..., SliceFiles]
pytestmark = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def machine(make_slice: Make, tmp_path: Path) -> Iterator[SharedMachine]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    with shared_machine(make_slice, base / f"nbgpu-test-shared-{os.getpid()}") as made:
        yield made


def hand_over(maker: Process, opener: Process, way: str, mib: int) -> int:
    result, *name = maker.ask("make", way, mib)
    assert result == 0
    return int(opener.ask("open", way, name[0]))


def test_in_one_slice_it_counts_once(machine: SharedMachine, way: str) -> None:
    files = machine.slice(100 * MIB)
    maker, opener = machine.start(files), machine.start(files)
    assert hand_over(maker, opener, way, 64) == 0
    assert opener.ask("read", 5) == "hello"
    opener.ask("write", "there")
    assert maker.ask("read", 5) == "there"
    assert opener.ask("left") == maker.ask("left") == 36
    opener.ask("close", True)
    assert maker.ask("left") == 36
    maker.ask("close", False)
    assert maker.ask("left") == 100


@pytest.mark.parametrize("end", ["killed", "freed"])
def test_it_counts_on_while_somebody_holds_it(machine: SharedMachine, way: str, end: str) -> None:
    """Its maker dies or frees it: the slice must not get room for memory that is still there."""
    files = machine.slice(100 * MIB)
    maker, opener, third = machine.start(files), machine.start(files), machine.start(files)
    assert hand_over(maker, opener, way, 64) == 0
    if end == "killed":
        maker.kill()
        assert third.ask("alloc", 64) == 2  # whoever asks reaps the dead first
    else:
        maker.ask("close", False)
    assert third.ask("left") == 36
    assert third.ask("alloc", 64) == 2
    assert opener.ask("read", 5) == "hello"
    assert machine.physical() == 64
    opener.ask("close", True)
    assert third.ask("left") == 100
    assert third.ask("alloc", 64) == 0
    assert wait_until(lambda: machine.physical() == 64)


def test_a_neighbours_memory_counts_for_who_opens_it(machine: SharedMachine, way: str) -> None:
    one, other = machine.slice(100 * MIB), machine.slice(100 * MIB)
    maker, opener = machine.start(one), machine.start(other)
    assert hand_over(maker, opener, way, 64) == 0
    assert (maker.ask("left"), opener.ask("left")) == (36, 36)
    maker.kill()
    assert opener.ask("left") == 36
    assert opener.ask("alloc", 64) == 2
    assert opener.ask("read", 5) == "hello"
    assert machine.start(one).ask("left") == 100
    opener.ask("close", True)
    assert opener.ask("left") == 100
    assert wait_until(lambda: machine.physical() == 0)


def test_a_chain_of_makers_that_die_gains_nothing(machine: SharedMachine, way: str) -> None:
    """Fill the slice, hand over, die, and again by a new process of another slice: the opener's limit holds."""
    one, other = machine.slice(100 * MIB), machine.slice(100 * MIB)
    opener, second = machine.start(other), machine.start(other)
    maker = machine.start(one)
    assert hand_over(maker, opener, way, 64) == 0
    maker.kill()
    again = machine.start(one)
    assert hand_over(again, second, way, 64) == 2
    again.kill()
    assert wait_until(lambda: machine.physical() == 64), "what was refused is not kept open"
    assert second.ask("left") == 36


def test_control_without_the_limiter(machine: SharedMachine, way: str) -> None:
    opener, second = machine.start(None), machine.start(None)
    for one in (opener, second):
        maker = machine.start(None)
        assert hand_over(maker, one, way, 64) == 0
        maker.kill()
    assert wait_until(lambda: machine.physical() == 128)


@pytest.mark.parametrize("point", ["opened", "share-listed", "share-ended"])
def test_an_opener_killed_anywhere_leaves_nothing(machine: SharedMachine, way: str, point: str) -> None:
    files = machine.slice(100 * MIB)
    maker, third = machine.start(files), machine.start(files)
    opener = machine.start(files, "NBGPU_MARKS", NBGPU_MARK=f"{point}:1")
    result, name = maker.ask("make", way, 64)
    assert result == 0
    opener.tell("open", way, name)
    opener.tell("close", True)
    assert opener.process.wait(timeout=30) == -signal.SIGKILL
    assert third.ask("left") == 36
    maker.kill()
    assert wait_until(lambda: third.ask("alloc", 90) == 0)
