"""What a tenant may do to win GPU time of its neighbour, or to hold the device: only it suffers. By the device's own truth.

Two slices of a half each that compute all the time; one is hostile. Junk for the agent and its socket: tests/hub/test_agent_hostile.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import compute  # noqa: E402
from compute import Machine, Share, SliceFiles, start_client, wait_ready  # noqa: E402
from limiter_kit import COMPUTE_SCALE as SCALE  # noqa: E402
from limiter_slice import wait_until  # noqa: E402

from nbgpu_agent import layout  # noqa: E402
from nbgpu_agent.native import Native  # noqa: E402

pytestmark = pytest.mark.slow
KERNEL_NS = 1_000_000 * SCALE
HALF, SPARE = 50, 6  # percent; what a busy machine may cost in a short window
SLOT, SLOT_BYTES = layout.Use.slot.offset, ctypes.sizeof(layout.UseSlot)


class Duel:
    """A neighbour that computes, and a hostile slice whose process is started anew for each attack."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.scheduler = machine, Native().scheduler(compute.turns(SCALE))
        self.slices = [SliceFiles(folder / str(i), Share(500), machine.uuid()) for i in range(2)]
        self.entries = [files.add_to(self.scheduler, Share(500)) for files in self.slices]
        self.neighbour = self.start(1)
        self.use_fd = os.open(self.slices[0].folder / "use", os.O_RDWR)

    def start(self, index: int, limited: bool = True) -> subprocess.Popen[str]:
        """Start a process in a slice and let it compute."""
        client = start_client(self.machine, KERNEL_NS, self.slices[index].folder if limited else None)
        wait_ready([client])
        return client

    def neighbours_percent(self, seconds: float) -> float:
        """Return what the neighbour gets of the device."""
        return compute.measure(self.machine, [[self.neighbour]], 1, seconds)[0][0]

    def word(self, slot: int, name: str, value: int) -> None:
        """Write a word of a hostile slot; 4 or 8 bytes as it is."""
        field = getattr(layout.UseSlot, name)
        os.pwrite(self.use_fd, struct.pack("<Q", value)[: field.size], SLOT + slot * SLOT_BYTES + field.offset)

    def close(self) -> None:
        """End everything."""
        self.neighbour.kill()
        self.neighbour.communicate(timeout=20)
        self.scheduler.close()
        os.close(self.use_fd)


@pytest.fixture(scope="module")
def duel(compute_machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duel]:
    made = Duel(compute_machine, tmp_path_factory.mktemp("duel"))
    yield made
    made.close()


@pytest.fixture
def hostile(duel: Duel) -> Iterator[subprocess.Popen[str]]:
    os.ftruncate(duel.use_fd, 0)
    os.ftruncate(duel.use_fd, layout.USE_SIZE)
    use = layout.Use()
    use.magic, use.version, use.size = layout.USE_MAGIC, layout.VERSION, layout.USE_SIZE
    os.pwrite(duel.use_fd, bytes(use), 0)
    client = duel.start(0)
    time.sleep(0.3 * SCALE)
    yield client
    client.kill()
    client.communicate(timeout=20)


def says_idle(duel: Duel, dice: random.Random) -> None:
    duel.word(0, "busy_since", 0)
    duel.word(0, "want", 0)


def nonsense_of_time(duel: Duel, dice: random.Random) -> None:
    times = [0, 1, time.monotonic_ns() + 10**12, 2**63, 2**64 - 1]
    for name in ("busy_since", "busy_ns", "last_launch_ns", "stall_ns", "near", "want"):
        duel.word(0, name, dice.choice(times))


def junk_everywhere(duel: Duel, dice: random.Random) -> None:
    os.pwrite(duel.use_fd, dice.randbytes(200), dice.randrange(layout.USE_SIZE - 200))
    os.pwrite(duel.use_fd, dice.randbytes(64), SLOT + dice.randrange(256))


def fills_its_slots(duel: Duel, dice: random.Random) -> None:
    """All of them want and are busy, and have a lock, as living processes would."""
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, SLOT + 8 * SLOT_BYTES, 248 * SLOT_BYTES, 0)
    fcntl.fcntl(duel.use_fd, 37, lock)  # F_OFD_SETLK
    row = layout.UseSlot(owner=os.getpid() << 32 | 1, ready=1, want=1, busy_since=1)
    os.pwrite(duel.use_fd, bytes(row) * 248, SLOT + 8 * SLOT_BYTES)
    os.pwrite(duel.use_fd, struct.pack("<I", layout.SLOTS), layout.Use.high_water.offset)


def truncates_and_grows(duel: Duel, dice: random.Random) -> None:
    os.ftruncate(duel.use_fd, dice.choice([0, 100, SLOT + 100, layout.USE_SIZE, 2**30]))


def floods_the_bell(duel: Duel, dice: random.Random) -> None:
    for _ in range(100):
        os.pwrite(duel.use_fd, struct.pack("<I", dice.randrange(2**32)), layout.Use.bell.offset)


ATTACKS = [says_idle, nonsense_of_time, junk_everywhere, fills_its_slots, truncates_and_grows, floods_the_bell]


@contextlib.contextmanager
def under(duel: Duel, attack: Callable[[Duel, random.Random], None]) -> Iterator[None]:
    """Attack every two milliseconds."""
    stop, dice = threading.Event(), random.Random(1)

    def go() -> None:
        while not stop.wait(0.002):
            attack(duel, dice)

    thread = threading.Thread(target=go)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_neighbour_keeps_its_half(duel: Duel, hostile: subprocess.Popen[str], attack: Callable[[Duel, random.Random], None]) -> None:
    with under(duel, attack):
        time.sleep(0.5)
        percent = duel.neighbours_percent(0.5 * SCALE)
    print(f"{attack.__name__}: the neighbour gets {percent:.1f} %")
    assert percent >= HALF - SPARE


def test_who_is_stopped_in_its_turn_does_not_hold_the_device(duel: Duel, hostile: subprocess.Popen[str]) -> None:
    """SIGSTOP to itself, whenever its gate is open; before that each had its half."""
    before = duel.neighbours_percent(0.5 * SCALE)
    deadline = time.monotonic() + 10
    while duel.scheduler.stats(duel.entries[0]).gate != layout.GATE_OPEN:
        assert time.monotonic() < deadline
    hostile.send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.2 * SCALE)  # its work ends, and the patience with it
        percent = duel.neighbours_percent(0.5 * SCALE)
    finally:
        hostile.send_signal(signal.SIGCONT)
    print(f"the neighbour gets {before:.1f} %, beside the stopped one {percent:.1f} %")
    assert percent > 85
    assert before < HALF + SPARE, "control: who is not stopped has its half"
    ran = duel.machine.busy(hostile.pid)[0]  # it pays for the time in which it never said that its work was done
    assert wait_until(lambda: duel.machine.busy(hostile.pid)[0] > ran + 50_000_000, 15), "who goes on is served again"


def test_control_outside_the_limiter_two_processes_take_more(duel: Duel) -> None:
    """The same work in no slice: the neighbour, one of three processes, does not keep its half."""
    clients = [duel.start(0, limited=False) for _ in range(2)]
    try:
        time.sleep(0.5)
        percent = duel.neighbours_percent(0.5 * SCALE)
    finally:
        for client in clients:
            client.kill()
            client.communicate(timeout=20)
    assert percent < HALF - SPARE
