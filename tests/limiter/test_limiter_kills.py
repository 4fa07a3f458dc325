"""Thousands of processes killed at marked points of the limiter, beside witnesses that must go on, exactly counted.

``-m soak`` runs 10,000 kills; otherwise a seeded tenth. The control is a build that takes a lock across processes.
"""

from __future__ import annotations

import ctypes as c
import os
import platform
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from limiter_kit import environment, limiter, null_driver, run, sim_driver
from limiter_slice import MIB, SliceFiles, wait_until
from shared_kit import shared_machine
from storms import Board, Storm

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
CALLS = {  # the same of storm_calls.c, on the simulated driver
    "handed-out": 4,
    "opened": 3,
    "share-listed": 6,
    "share-ended": 6,
    "multicast-bound": 3,
    "multicast-unbound": 3,
    "external-imported": 3,
    "external-mapped": 3,
    "pool-reserved": 4,
    "copy-admitted": 6,
    "fence-wait": 3,
    "context-made": 3,
    "green-ended": 3,
}
LIMIT = 48 * MIB
STUCK_SECONDS = 10.0
AT_ONCE = 4
TURN_NS = 2_000_000
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
        while not self.stop.wait(TURN_NS / 1e9):
            self.files.beat()
            device.turn_end_ns = self.files.ctl.heartbeat_ns + TURN_NS
            device.gate = layout.GATE_CLOSED if device.gate == layout.GATE_OPEN else layout.GATE_OPEN
            syscall(SYS_FUTEX, c.c_void_p(word), 1, 1 << 20, None, None, 0)
        device.gate = layout.GATE_OPEN


def moves(files: SliceFiles, pid: int, seconds: float) -> bool:
    """Whether a process makes steps: one that merely never comes by its marked point is not stuck."""

    def steps() -> int:
        return sum(s.allocs + s.frees + s.refusals + files.launches(s) for s in files.slots() if s.owner >> 32 == pid)

    before, deadline = steps(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if steps() != before:
            return True
    words = [(s.want, s.near, s.busy_since, s.used, s.refusals) for s in files.slots() if s.owner >> 32 == pid]
    where = [(path.parent / "wchan").read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    print(f"stuck: process {pid}, slot (want, near, busy_since, used, refusals) {words}, threads in {where}")
    return False


def storm(
    files: SliceFiles,
    board: Board,
    base: dict[str, str],
    points: dict[str, int],
    kills: int,
    seed: int,
    stuck_seconds: float,
    *program: str,
) -> tuple[Counter[str], int]:
    """Kill `kills` processes at these points; return where they died, and how many were stuck."""
    dice, hit, stuck = random.Random(seed), Counter[str](), 0
    running: list[tuple[str, Storm, float]] = []
    plan = [name for name in points for _ in range(kills // len(points) + 1)]
    dice.shuffle(plan)
    while (plan and stuck < AT_ONCE) or running:
        while plan and len(running) < AT_ONCE and stuck < AT_ONCE:
            name = plan.pop()
            env = base | {"NBGPU_MARK": f"{name}:{dice.randint(1, points[name])}"}
            running.append((name, board.start(dice.randrange(1 << 30), env, *program), time.monotonic()))
        for entry in list(running):
            name, child, began = entry
            patience = 3 if name.startswith("reap") else stuck_seconds  # others may reap first
            if child.process.poll() is None and time.monotonic() - began < patience:
                continue
            running.remove(entry)
            if child.process.poll() is None:
                stuck += not moves(files, child.process.pid, stuck_seconds / 2)
            else:
                assert child.process.returncode == -signal.SIGKILL, f"{name}: ended with {child.process.returncode}"
                hit[name] += 1
            child.end()
        time.sleep(0.0005)
    return hit, stuck


class Pauses(threading.Thread):
    """The longest time in which a witness made no step."""

    def __init__(self, witnesses: list[Storm]) -> None:
        super().__init__(daemon=True)
        self.witnesses, self.stop, self.longest_seconds = witnesses, threading.Event(), 0.0

    def run(self) -> None:
        seen = [(w.steps, time.monotonic()) for w in self.witnesses]
        while not self.stop.wait(0.005):
            now = time.monotonic()
            for i, witness in enumerate(self.witnesses):
                if witness.steps != seen[i][0]:
                    seen[i] = (witness.steps, now)
                self.longest_seconds = max(self.longest_seconds, now - seen[i][1])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(1500)
def test_killed_anywhere_nobody_is_stuck_and_nothing_is_lost(
    make_slice: Callable[..., SliceFiles], tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("NBGPU_SEED", "20240611"))
    files = make_slice(mem_limit=LIMIT, gate=layout.GATE_OPEN, context_bytes=MIB)
    env = environment(files, null_driver(), preload=limiter("NBGPU_MARKS"))
    board = Board(tmp_path)
    gate = Gate(files)
    gate.start()
    witnesses = [board.start(i, env) for i in (1, 2)]
    pauses = Pauses(witnesses)
    pauses.start()
    board.audit(LIMIT)
    try:
        steps = [w.steps for w in witnesses]
        hit, stuck = storm(files, board, env, POINTS, kills, seed, STUCK_SECONDS)
        board.close()
        pauses.stop.set()
        snapshots, overs, most = board.audited()
        with capsys.disabled():
            print(f"\nseed {seed}: {sum(hit.values())} kills, {stuck} stuck; longest pause of a witness {pauses.longest_seconds:.2f} s")
            print(f"  {snapshots} snapshots, {overs} over the limit; at most {most // MIB} of {LIMIT // MIB} MiB")
            print("  " + ", ".join(f"{name} {hit[name]}" for name in POINTS))
        assert stuck == 0
        assert overs == 0
        assert snapshots > kills
        assert most > LIMIT * 3 // 4, "nobody came near the limit"
        assert min(hit[name] for name in POINTS) >= kills // 100
        assert pauses.longest_seconds < STUCK_SECONDS
        assert all(w.steps > before + 100 for w, before in zip(witnesses, steps, strict=True)), "a witness stood still"
        for witness in witnesses:
            witness.stand_still(STUCK_SECONDS)
        by_pid = {slot.owner >> 32: slot for slot in files.slots()}
        for witness in witnesses:
            assert by_pid[witness.process.pid].used == witness.held
        held = sum(w.held for w in witnesses) + 2 * MIB  # and their contexts
        files.ctl.device[0].mem_limit = LIMIT + 16 * MIB  # they may hold all of it
        room = (LIMIT + 16 * MIB - held - MIB) // (2 * MIB)
        script = f"start(); say([sum(alloc(2 * MIB)[0] == 0 for _ in range({room + 3})), info()[0]])"
        assert run(script, env) == [room, 0], "what the dead held has not come back whole"
    finally:
        board.close()
        pauses.stop.set()
        gate.stop.set()
        for witness in witnesses:
            witness.end()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [260, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(1500)
def test_killed_in_whatever_call_nothing_is_lost(
    make_slice: Callable[..., SliceFiles], tmp_path: Path, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory handed out and opened, multicast, external memory, pools, copies, green contexts, full queues."""
    seed = int(os.environ.get("NBGPU_SEED", "20240611"))
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    (tmp_path / "names").write_bytes(bytes(16 * 64))
    program = ("storm_calls", str(tmp_path / "names"))
    with shared_machine(make_slice, base / f"nbgpu-test-kills-{os.getpid()}") as machine:
        files = machine.slice(LIMIT, gate=layout.GATE_OPEN)
        env = environment(files, sim_driver(), preload=limiter("NBGPU_MARKS"), **machine.more)
        board, gate = Board(tmp_path), Gate(files)
        gate.start()
        witnesses = [board.start(i, env, *program) for i in (1, 2)]
        pauses = Pauses(witnesses)
        pauses.start()
        board.audit(LIMIT)
        try:
            steps = [w.steps for w in witnesses]
            hit, stuck = storm(files, board, env, CALLS, kills, seed, STUCK_SECONDS, *program)
            pauses.stop.set()
            board.close()
            snapshots, overs, most = board.audited()
            with capsys.disabled():
                print(f"\nseed {seed}: {sum(hit.values())} kills, {stuck} stuck; longest pause of a witness {pauses.longest_seconds:.2f} s")
                print(f"  {snapshots} snapshots, {overs} over the limit; at most {most // MIB} of {LIMIT // MIB} MiB")
                print("  " + ", ".join(f"{name} {hit[name]}" for name in CALLS))
            assert stuck == 0
            assert overs == 0
            assert most > LIMIT // 2, "nobody came near the limit"
            assert min(hit[name] for name in CALLS) >= kills // len(CALLS)
            assert all(w.steps > before + 20 for w, before in zip(witnesses, steps, strict=True)), "a witness stood still"
        finally:
            pauses.stop.set()
            board.close()
            for witness in witnesses:
                witness.end()
            gate.stop.set()
        room = LIMIT // (2 * MIB)
        script = f"start(); say(sum(alloc(2 * MIB)[0] == 0 for _ in range({room + 3})))"
        assert run(script, env) == room, "what the dead held has not come back whole"
        assert wait_until(lambda: machine.physical() == 0), "the device is not empty"
        assert len(files.slots()) == 1, "only the last one's slot is left, which nobody came to reap"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_control_with_a_lock_gets_stuck(make_slice: Callable[..., SliceFiles], tmp_path: Path) -> None:
    files = make_slice(mem_limit=LIMIT, gate=layout.GATE_OPEN)
    gate = Gate(files)
    gate.start()
    try:
        env = environment(files, null_driver(), preload=limiter("NBGPU_MARKS", "NBGPU_CONTROL_LOCK"))
        _, stuck = storm(files, Board(tmp_path), env, POINTS, 200, 1, 2.0)
    finally:
        gate.stop.set()
    assert stuck > 0
