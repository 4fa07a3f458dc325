"""Thousands of processes killed at marked points of the limiter, beside witnesses that must go on, exactly counted.

``-m soak`` runs 10,000 kills; otherwise a seeded tenth. The control is a build that takes a lock across processes.
"""

from __future__ import annotations

import ctypes as c
import mmap
import os
import platform
import random
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from limiter_kit import environment, limiter, null_driver, program, run
from limiter_slice import MIB, SliceFiles

from nbgpu_agent import layout

POINTS = {  # marked point -> most passes to wait for
    "claim-locked": 1,
    "claim-filled": 1,
    "claim-owned": 1,
    "context-reserved": 1,
    "reap-locked": 1,
    "reap-half": 1,
    "charge-added": 8,
    "charge-taken-back": 3,
    "alloc-reserved": 8,
    "alloc-real": 8,
    "alloc-done": 8,
    "free-taken": 6,
    "free-real": 6,
    "uncharged": 6,
    "wanting": 2,
    "granted": 2,
    "publish-half": 4,
    "busy-half": 3,
    "idle-half": 2,
    "launch-admitted": 4,
    "launch-submitted": 4,
}
LIMIT = 48 * MIB
STUCK_SECONDS = 10.0
AT_ONCE = 4
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]


class Gate(threading.Thread):
    """Plays the scheduler: a heartbeat, and a gate that is closed every other moment."""

    def __init__(self, files: SliceFiles) -> None:
        super().__init__(daemon=True)
        self.files, self.stop = files, threading.Event()

    def run(self) -> None:
        syscall = c.CDLL(None).syscall
        device = self.files.ctl.device[0]
        word = c.addressof(device) + layout.CtlDevice.gate.offset
        while not self.stop.wait(0.002):
            self.files.beat()
            device.turn_end_ns = self.files.ctl.heartbeat_ns
            device.gate = layout.GATE_CLOSED if device.gate == layout.GATE_OPEN else layout.GATE_OPEN
            syscall(SYS_FUTEX, c.c_void_p(word), 1, 1 << 20, None, None, 0)
        device.gate = layout.GATE_OPEN


class Witness:
    """A process that nobody kills: it must go on, and its slot must say what it holds."""

    def __init__(self, folder: Path, seed: int, env: dict[str, str]) -> None:
        path = folder / f"witness{seed}"
        path.write_bytes(bytes(32))
        with path.open("r+b") as file:
            self.words = mmap.mmap(file.fileno(), 32)
        self.process = subprocess.Popen([program("storm"), str(seed), str(path)], env=env)

    def word(self, index: int) -> int:
        """One of the four shared words."""
        return int(struct.unpack_from("<Q", self.words, 8 * index)[0])

    def stand_still(self, still: bool) -> None:
        """Make it pause between two steps, and wait until it does."""
        struct.pack_into("<Q", self.words, 16, int(still))
        deadline = time.monotonic() + STUCK_SECONDS
        while still and not self.word(3):
            assert time.monotonic() < deadline, "a witness is stuck"
            time.sleep(0.001)


def moves(files: SliceFiles, pid: int) -> bool:
    """Whether a process makes steps: one that merely never comes by its marked point is not stuck."""

    def steps() -> int:
        return sum(s.allocs + s.frees + s.refusals + files.launches(s) for s in files.slots() if s.owner >> 32 == pid)

    before, deadline = steps(), time.monotonic() + 5
    while time.monotonic() < deadline:
        if steps() != before:
            return True
    words = [(s.want, s.near, s.busy_since, s.used, s.refusals) for s in files.slots() if s.owner >> 32 == pid]
    where = [(path.parent / "wchan").read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    print(f"stuck: process {pid}, slot (want, near, busy_since, used, refusals) {words}, threads in {where}")
    return False


def storm(files: SliceFiles, library: Path, kills: int, seed: int, stuck_seconds: float) -> tuple[Counter[str], int]:
    """Kill `kills` processes; return where they died, and how many never got there."""
    dice, hit, stuck = random.Random(seed), Counter[str](), 0
    base = environment(files, null_driver(), preload=library)
    running: list[tuple[str, subprocess.Popen[bytes], float]] = []
    plan = [name for name in POINTS for _ in range(kills // len(POINTS) + 1)]
    dice.shuffle(plan)
    while (plan and stuck < AT_ONCE) or running:
        while plan and len(running) < AT_ONCE and stuck < AT_ONCE:
            name = plan.pop()
            env = base | {"NBGPU_MARK": f"{name}:{dice.randint(1, POINTS[name])}"}
            running.append((name, subprocess.Popen([program("storm"), str(dice.randrange(1 << 30))], env=env), time.monotonic()))
        for entry in list(running):
            name, process, began = entry
            if process.poll() is None and time.monotonic() - began < (
                3 if name.startswith("reap") else stuck_seconds
            ):  # others may reap first
                continue
            running.remove(entry)
            if process.poll() is None:
                stuck += not moves(files, process.pid)
                process.kill()
                process.wait()
            else:
                assert process.returncode == -signal.SIGKILL, f"{name}: ended with {process.returncode}"
                hit[name] += 1
        time.sleep(0.0005)
    return hit, stuck


def over_the_limit(files: SliceFiles, seconds: float) -> bool:
    """Whether the sum stays above the limit (a reservation that is taken back may pass through it for an instant)."""
    deadline = time.monotonic() + seconds
    while files.used() > LIMIT:
        if time.monotonic() > deadline:
            return True
    return False


@pytest.mark.parametrize("kills", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(1500)
def test_killed_anywhere_nobody_is_stuck_and_nothing_is_lost(
    make_slice: Callable[..., SliceFiles], tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("NBGPU_SEED", "20240611"))
    files = make_slice(mem_limit=LIMIT, gate=layout.GATE_OPEN, context_bytes=MIB)
    library = limiter("NBGPU_MARKS")
    gate = Gate(files)
    gate.start()
    witnesses = [Witness(tmp_path, i, environment(files, null_driver(), preload=library)) for i in (1, 2)]
    overs = 0
    watching = threading.Event()

    def watch() -> None:
        nonlocal overs
        while not watching.wait(0.01):
            overs += over_the_limit(files, 0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        steps = [w.word(0) for w in witnesses]
        hit, stuck = storm(files, library, kills, seed, STUCK_SECONDS)
        watching.set()
        watcher.join()
        with capsys.disabled():
            print(f"\nseed {seed}: {sum(hit.values())} kills, {stuck} stuck, {overs} times over the limit")
            print("  " + ", ".join(f"{name} {hit[name]}" for name in POINTS))
        assert stuck == 0
        assert overs == 0
        assert min(hit[name] for name in POINTS) >= kills // 100
        assert all(w.word(0) > before + 100 for w, before in zip(witnesses, steps, strict=True)), "a witness stood still"
        for witness in witnesses:
            witness.stand_still(True)
        by_pid = {slot.owner >> 32: slot for slot in files.slots()}
        for witness in witnesses:
            assert by_pid[witness.process.pid].used == witness.word(1)
        held = sum(w.word(1) for w in witnesses) + 2 * MIB  # and their contexts
        files.ctl.device[0].mem_limit = LIMIT + 16 * MIB  # they may hold all of it
        room = (LIMIT + 16 * MIB - held - MIB) // (2 * MIB)
        script = f"start(); say([sum(alloc(2 * MIB)[0] == 0 for _ in range({room + 3})), info()[0]])"
        got = run(script, environment(files, null_driver(), preload=library))
        assert got == [room, 0], "what the dead held has not come back whole"
    finally:
        watching.set()
        gate.stop.set()
        for witness in witnesses:
            witness.process.kill()
            witness.process.wait()


@pytest.mark.timeout(200)
def test_control_with_a_lock_gets_stuck(make_slice: Callable[..., SliceFiles]) -> None:
    files = make_slice(mem_limit=LIMIT, gate=layout.GATE_OPEN)
    gate = Gate(files)
    gate.start()
    try:
        _, stuck = storm(files, limiter("NBGPU_MARKS", "NBGPU_CONTROL_LOCK"), 200, 1, 3.0)
    finally:
        gate.stop.set()
    assert stuck > 0
