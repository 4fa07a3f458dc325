"""Memory: what is counted, what is refused, by whom, and that nobody is stuck or over the limit when processes die."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from limiter_kit import environment, limiter, null_driver, run, spawn
from limiter_slice import MIB, SliceFiles
from storms import Board

from nbgpu_agent import layout

Make = Callable[..., SliceFiles]


def within(files: SliceFiles, **more: str) -> dict[str, str]:
    return environment(files, null_driver(), preload=limiter(), **more)


@pytest.mark.parametrize("limited", [True, False], ids=["limiter", "control"])
def test_refuses_one_block_beyond(make_slice: Make, limited: bool) -> None:
    files = make_slice(mem_limit=10 * MIB)
    env = within(files) if limited else environment(files, null_driver())
    got = run("start()\nsay([alloc(4 * MIB)[0], alloc(4 * MIB)[0], alloc(2 * MIB)[0], alloc(1)[0]])", env)
    assert got == ([0, 0, 0, 2] if limited else [0, 0, 0, 0])


def test_slot_says_what_was_refused(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    child = spawn("start(); a, p = alloc(4 * MIB); b, _ = alloc(8 * MIB); say([a, b]); input(); say(free(p)); input()", within(files))
    assert child.stdout
    assert child.stdin
    assert child.stdout.readline().strip() == "[0, 2]"
    (slot,) = files.slots()
    assert (slot.used, slot.allocs, slot.refusals, slot.refused_bytes) == (4 * MIB, 1, 1, 8 * MIB)
    assert slot.refused_by == layout.REFUSED_SLICE
    assert slot.peak == 4 * MIB
    assert files.use.events == 1
    assert slot.owner >> 32 == child.pid
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline().strip() == "0"
    assert (slot.used, slot.frees) == (0, 1)
    child.communicate("\n", timeout=30)


def test_memory_info_is_the_slice(make_slice: Make) -> None:
    files = make_slice(mem_limit=100 * MIB, context_bytes=20 * MIB)
    script = """
start(); before = info(); alloc(30 * MIB); total = c.c_size_t()
ok(cuda.cuDeviceTotalMem_v2(c.byref(total), 0))
say([before, info(), total.value])
"""
    assert run(script, within(files)) == [[80 * MIB, 100 * MIB], [50 * MIB, 100 * MIB], 100 * MIB]


def test_limit_follows_the_agent(make_slice: Make) -> None:
    files = make_slice(mem_limit=8 * MIB)
    child = spawn("start()\nfor line in sys.stdin: say([alloc(4 * MIB)[0], info()[1] // MIB])", within(files))
    assert child.stdin
    assert child.stdout

    def ask() -> str:
        assert child.stdin
        assert child.stdout
        child.stdin.write("\n")
        child.stdin.flush()
        return child.stdout.readline().strip()

    assert ask() == "[0, 8]"
    files.ctl.device[0].mem_limit = 6 * MIB
    assert ask() == "[2, 6]"
    files.ctl.device[0].mem_limit = 2 * MIB  # below what is in use: nothing is taken away
    assert ask() == "[2, 2]"
    files.ctl.device[0].mem_limit = 12 * MIB
    assert ask() == "[0, 12]"
    child.communicate(timeout=30)


def test_kernel_has_a_limit_of_its_own(make_slice: Make) -> None:
    files = make_slice(mem_limit=100 * MIB)
    files.kernel(3, "abc", 10 * MIB)
    script = "start(); say([alloc(8 * MIB)[0], alloc(8 * MIB)[0], info()[1] // MIB])"
    assert run(script, within(files, NBGPU_KERNEL_ID="abc")) == [0, 2, 10]
    slot = files.use.slot[0]
    assert slot.refused_by == layout.REFUSED_KERNEL
    assert run(script, within(files, NBGPU_KERNEL_ID="other")) == [0, 0, 100]
    assert run(script, within(files), argv=("-f", "/x/kernel-abc.json")) == [0, 2, 10]
    assert run(script, within(files)) == [0, 0, 100]


def test_overhead_counts_up_to_the_cap(make_slice: Make) -> None:
    files = make_slice(mem_limit=100 * MIB)
    files.ctl.device[0].overhead_cap = 40 * MIB
    for i in range(layout.SLOTS):
        files.ctl.overhead[i] = 60 * MIB
    assert run("start(); say(info())", within(files)) == [60 * MIB, 100 * MIB]


def test_unknown_pointers_reach_the_driver(make_slice: Make) -> None:
    files = make_slice(mem_limit=4 * MIB)
    assert run("start(); say([free(12345), alloc(4 * MIB)[0]])", within(files)) == [0, 0]


def test_unreadable_limits_are_no_licence(make_slice: Make) -> None:
    files = make_slice(mem_limit=4 * MIB)
    files.ctl.magic = 1
    assert run("say(cuda.cuInit(0))", within(files)) == 803


def test_a_released_context_gives_back(make_slice: Make) -> None:
    files = make_slice(mem_limit=100 * MIB, context_bytes=20 * MIB)
    child = spawn("start(); alloc(8 * MIB); say(1); input(); ok(cuda.cuDevicePrimaryCtxRelease_v2(0)); say(2); input()", within(files))
    assert child.stdout
    assert child.stdin
    child.stdout.readline()
    assert files.used() == 28 * MIB
    child.stdin.write("\n")
    child.stdin.flush()
    child.stdout.readline()
    assert files.used() == 0
    child.communicate("\n", timeout=30)


@pytest.mark.parametrize("waited_for", [True, False], ids=["waited for", "zombie"])
def test_a_killed_neighbour_is_reaped(make_slice: Make, waited_for: bool) -> None:
    files = make_slice(mem_limit=10 * MIB)
    child = spawn("start(); say(alloc(8 * MIB)[0]); input()", within(files))
    assert child.stdout
    child.stdout.readline()
    script = "start(); say(alloc(8 * MIB)[0])"
    assert run(script, within(files)) == 2
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not looked
    if waited_for:
        child.wait()
    assert run(script, within(files)) == 0
    child.communicate()


def test_a_first_thread_that_ended_is_not_death(make_slice: Make) -> None:
    """The process looks like a zombie while its other threads run, even when it has lost its lock."""
    files = make_slice(mem_limit=10 * MIB)
    script = """
import threading, time
start(); r = alloc(8 * MIB)[0]; os.closerange(3, 4096)
threading.Thread(target=lambda: (time.sleep(0.2), say(r), time.sleep(60))).start()
c.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""
    child = spawn(script, within(files))
    try:
        assert child.stdout
        assert child.stdout.readline().strip() == "0"
        assert Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        assert run("start(); say(alloc(8 * MIB)[0])", within(files)) == 2
    finally:
        child.kill()
        child.communicate()


def test_a_dropped_lock_is_not_death(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    child = spawn("start(); r = alloc(8 * MIB)[0]; os.closerange(3, 4096); say(r); input(); say(alloc(2 * MIB)[0])", within(files))
    assert child.stdout
    child.stdout.readline()
    assert run("start(); say(alloc(8 * MIB)[0])", within(files)) == 2
    out, err = child.communicate("\n", timeout=30)
    assert out.strip() == "0", err


def test_fork_has_a_slot_of_its_own(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    script = """
start(); alloc(4 * MIB)
r, w = os.pipe()
pid = os.fork()
if pid == 0:
    start()
    os.write(w, bytes([alloc(4 * MIB)[0], alloc(4 * MIB)[0]]))
    os._exit(0)
got = list(os.read(r, 2))
os.waitpid(pid, 0)
say(got + [alloc(4 * MIB)[0], info()[0] // MIB])
"""
    assert run(script, within(files)) == [0, 2, 0, 2]


def test_threads_count_exactly(make_slice: Make) -> None:
    files = make_slice(mem_limit=1 << 40)
    script = """
import threading
start()
ctx = c.c_void_p(); ok(cuda.cuCtxGetCurrent(c.byref(ctx)))
def work():
    ok(cuda.cuCtxSetCurrent(ctx))
    held = []
    for i in range(500):
        held.append(alloc(3 * MIB)[1])
        if i % 3 == 0: free(held.pop(0))
        cuda.cuLaunchKernel(None, 1, 1, 1, 1, 1, 1, 0, None, None, None)
    for p in held: free(p)
threads = [threading.Thread(target=work) for _ in range(12)]
[t.start() for t in threads]; [t.join() for t in threads]
say(1); input()
"""
    child = spawn(script, within(files))
    assert child.stdout
    assert child.stdout.readline().strip() == "1", child.stderr and child.stderr.read()
    (slot,) = files.slots()
    assert (slot.used, slot.allocs, slot.frees) == (0, 6000, 6000)
    assert files.launches(slot) == 6000
    child.communicate("\n", timeout=30)


@pytest.mark.parametrize("limited", [True, False], ids=["limiter", "control"])
def test_races_never_overshoot_and_never_refuse_wrongly(make_slice: Make, limited: bool) -> None:
    """Three processes each ask for one of two blocks, again and again, in step: exactly two get one each time."""
    files = make_slice(mem_limit=8 * MIB)
    script = "start()\nfor line in sys.stdin:\n r, p = alloc(4 * MIB)\n say(r)\n sys.stdin.readline()\n if r == 0: free(p)\n say(9)"
    env = within(files) if limited else environment(files, null_driver())
    children = [spawn(script, env) for _ in range(3)]

    def step() -> list[str]:
        for child in children:
            assert child.stdin
            child.stdin.write("\n")
            child.stdin.flush()
        return [child.stdout.readline().strip() for child in children if child.stdout]

    rounds, wrong = 100, 0
    for _ in range(rounds):
        wrong += sorted(step()) != ["0", "0", "2"]
        step()
    for child in children:
        child.communicate(timeout=30)
    assert wrong == (0 if limited else rounds)


@pytest.mark.parametrize("limited", [True, False], ids=["limiter", "control"])
def test_the_driver_never_holds_more_than_the_limit(make_slice: Make, tmp_path: Path, limited: bool) -> None:
    """Four processes at the limit all the time. The driver keeps the sum itself, in one word, and the most that it ever was."""
    limit = 24 * MIB
    files = make_slice(mem_limit=limit)
    ledger = tmp_path / "ledger"
    ledger.write_bytes(bytes(16))
    env = environment(files, null_driver(), preload=limiter() if limited else None, NULL_LEDGER=str(ledger), STORM_HOT="1")
    board = Board(tmp_path)
    storms = [board.start(seed, env) for seed in range(4)]
    deadline = time.monotonic() + 20
    while min(s.steps for s in storms) < 5_000:
        assert time.monotonic() < deadline, "somebody stands still"
        time.sleep(0.01)
    _, most = struct.unpack("<QQ", ledger.read_bytes())  # before any is killed: the ledger never hears of a death
    for storm in storms:
        storm.end()
    assert most == limit if limited else most > limit, f"{most / MIB} MiB"
    if limited:
        assert sum(slot.refusals for slot in files.use.slot) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("limited", [True, False], ids=["limiter", "control"])
def test_the_living_never_hold_more_than_the_limit(make_slice: Make, tmp_path: Path, limited: bool) -> None:
    """Processes at the limit all the time, one of them killed at any moment and replaced; exact snapshots of what the living hold."""
    limit = 24 * MIB
    files = make_slice(mem_limit=limit)
    env = environment(files, null_driver(), preload=limiter() if limited else None, STORM_HOT="1")
    board = Board(tmp_path)
    storms = [board.start(seed, env) for seed in range(4)]
    board.audit(limit)
    dice, deadline, kills = random.Random(7), time.monotonic() + 20, 0
    while (limited and kills < 150) or board.audited()[0] < 2000:
        assert time.monotonic() < deadline, f"{kills} kills, {board.audited()[0]} snapshots"
        time.sleep(dice.random() * 0.02)
        victim = storms.pop(dice.randrange(4))
        kills += victim.steps > 100
        victim.end()
        storms.append(board.start(dice.randrange(1 << 30), env))
    board.close()
    for storm in storms:
        storm.end()
    _, overs, most = board.audited()
    assert (overs == 0 and most >= limit - 4 * MIB) if limited else overs > 0


def test_slots_run_out_and_come_back(make_slice: Make) -> None:
    files = make_slice(mem_limit=100 * MIB)
    for slot in files.use.slot:
        slot.owner, slot.device, slot.used = (2**22 + 1) << 32 | 1, 0, MIB  # processes that do not exist
    files.use.high_water = layout.SLOTS
    assert run("start(); say([alloc(90 * MIB)[0], info()[0]])", within(files)) == [0, 10 * MIB]


def test_two_devices_count_apart(make_slice: Make) -> None:
    uuids = tuple(f"GPU-00000000-0000-0000-0000-00000000000{i}" for i in (3, 2))
    files = make_slice(mem_limit=8 * MIB, uuids=uuids)
    # The null driver ignores CUDA_VISIBLE_DEVICES: device 0 is not in the slice, 1 and 2 are, in the other order.
    script = """
ok(cuda.cuInit(0)); x = c.c_void_p(); first = cuda.cuDevicePrimaryCtxRetain(c.byref(x), 0)
out = [first]
for d in (1, 2):
    start(d); out += [alloc(6 * MIB)[0], alloc(6 * MIB)[0]]
    cuda.cuLaunchKernel(None, 1, 1, 1, 1, 1, 1, 0, None, None, None)
say(out); input()
"""
    child = spawn(script, within(files, NULL_DEVICES="3"))
    assert child.stdout
    assert child.stdout.readline().strip() == "[101, 0, 2, 0, 2]"
    assert sorted((s.device, s.used, files.launches(s)) for s in files.slots()) == [(0, 6 * MIB, 1), (1, 6 * MIB, 1)]
    child.communicate("\n", timeout=30)


def test_no_slice_does_nothing(make_slice: Make) -> None:
    env = environment(None, null_driver(), preload=limiter())
    assert run("start(); say([alloc(1 << 38)[0], info()[1] >> 30])", env) == [0, 80]
