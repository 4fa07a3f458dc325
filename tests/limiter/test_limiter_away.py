"""A process whose memory is on the host (docs/idle.md) counts nothing, waits before its calls, and is never mistaken for the next one."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable

import pytest
from limiter_kit import environment, going_on, limiter, null_driver, run, spawn
from limiter_slice import MIB, SliceFiles, wait_until

from nbgpu_agent import layout

Make = Callable[..., SliceFiles]
WORD = 2**64 - 1
OBEY = """
start()
function = c.c_void_p(1)
for line in sys.stdin:
    word, size = line.split()
    if word == "alloc": say(alloc(int(size) * MIB)[0])
    if word == "free": say(info()[0] // MIB)
    if word == "launch": say([cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None) for _ in range(int(size))][-1])
"""


class Program:
    """A process in a slice that does what it is told."""

    def __init__(self, files: SliceFiles, **more: str):
        self.child = spawn(OBEY, environment(files, null_driver(), preload=limiter(), **more))

    def begin(self, word: str, size: int = 0) -> None:
        assert self.child.stdin
        self.child.stdin.write(f"{word} {size}\n")
        self.child.stdin.flush()

    def end(self) -> int:
        assert self.child.stdout
        return json.loads(self.child.stdout.readline())

    def do(self, word: str, size: int = 0) -> int:
        self.begin(word, size)
        return self.end()

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()


def set_away(files: SliceFiles, slot: int, word: int) -> None:
    files.ctl.kernels_away = 1 if word else 0
    files.ctl.away[slot] = word
    files.ctl.generation += 1


def slot_of(files: SliceFiles, program: Program) -> tuple[int, layout.UseSlot]:
    found = wait_until(lambda: any(slot.owner >> 32 == program.child.pid for slot in files.slots()))
    assert found
    return next((index, slot) for index, slot in enumerate(files.use.slot) if slot.owner >> 32 == program.child.pid)


@pytest.fixture
def pair(make_slice: Make) -> tuple[SliceFiles, Program, Program]:
    """Two processes of a slice of 10 MiB; the first holds 8."""
    files = make_slice(mem_limit=10 * MIB)
    one, two = Program(files), Program(files)
    assert one.do("alloc", 8) == 0
    assert two.do("free") == 2, "it has its slot"
    return files, one, two


def close(*programs: Program) -> None:
    for program in programs:
        program.close()


def test_memory_on_the_host_is_free_for_the_others(pair: tuple[SliceFiles, Program, Program]) -> None:
    files, one, two = pair
    assert two.do("alloc", 8) == 2, "the control: it counts"
    index, slot = slot_of(files, one)
    set_away(files, index, ~slot.owner & WORD)
    assert two.do("alloc", 8) == 2, "on its way there it counts"
    assert two.do("free") == 2
    set_away(files, index, slot.owner)
    assert two.do("free") == 10
    assert two.do("alloc", 8) == 0
    assert two.do("alloc", 4) == 2, "the limit still is one"
    set_away(files, index, ~slot.owner & WORD)
    assert two.do("alloc", 1) == 2, "on its way back it counts"
    close(one, two)


@pytest.mark.parametrize("word", ["alloc", "launch", "free"])
@pytest.mark.parametrize("gate", [layout.GATE_NONE, layout.GATE_OPEN, layout.GATE_CLOSED], ids=["ungated", "open", "closed"])
def test_who_is_away_waits_and_says_so(make_slice: Make, word: str, gate: int) -> None:
    """Not in the words that ask for a turn or say that it computes."""
    files = make_slice(mem_limit=10 * MIB, gate=layout.GATE_OPEN if gate == layout.GATE_CLOSED else gate)
    with going_on(files.beat, 0.05):
        one = Program(files)
        assert [one.do("alloc", 8), one.do("launch", 1000)] == [0, 0]
        index, slot = slot_of(files, one)
        assert wait_until(lambda: slot.busy_since == 0)
        set_away(files, index, slot.owner)
        if gate == layout.GATE_CLOSED:
            files.ctl.device[0].gate = gate
        launches = files.launches(slot)
        one.begin(word, 1)
        assert wait_until(lambda: slot.wants_back == 1)
        time.sleep(0.2)
        assert (slot.want, slot.busy_since, files.use.want[0], files.launches(slot)) == (0, 0, 0, launches)
        files.ctl.device[0].gate = gate if gate != layout.GATE_CLOSED else layout.GATE_OPEN
        set_away(files, index, 0)
        assert one.end() == (2 if word == "free" else 0)
        assert wait_until(lambda: slot.wants_back == 0)
        one.close()


def test_the_next_owner_of_a_slot_is_counted(pair: tuple[SliceFiles, Program, Program]) -> None:
    files, one, two = pair
    index, slot = slot_of(files, one)
    set_away(files, index, slot.owner)
    one.child.kill()
    one.child.wait()
    three = Program(files)
    assert three.do("alloc", 8) == 0
    assert slot_of(files, three)[0] == index, "it has the slot of the dead one"
    assert two.do("alloc", 8) == 2
    close(one, two, three)


def test_a_limit_of_a_kernel_counts_it_neither(make_slice: Make) -> None:
    files = make_slice(mem_limit=100 * MIB)
    files.kernel(0, "k", 10 * MIB)
    one, two = Program(files, NBGPU_KERNEL_ID="k"), Program(files, NBGPU_KERNEL_ID="k")
    assert [one.do("alloc", 8), two.do("alloc", 8)] == [0, 2]
    index, slot = slot_of(files, one)
    set_away(files, index, slot.owner)
    assert two.do("alloc", 8) == 0
    close(one, two)


def test_both_ways_at_once_never_give_more_than_there_is(make_slice: Make) -> None:
    """A sibling allocates as fast as it can while the agent looks whether there is room to come back: never have both."""
    files = make_slice(mem_limit=10 * MIB)
    one, greedy = Program(files), None
    assert one.do("alloc", 8) == 0
    index, slot = slot_of(files, one)
    set_away(files, index, slot.owner)
    script = """
start(); say(0)
while True:
    result, pointer = alloc(8 * MIB)
    if result == 0: free(pointer)
"""
    greedy = spawn(script, environment(files, null_driver(), preload=limiter()))
    assert greedy.stdout
    greedy.stdout.readline()
    came = stayed = 0
    until = time.monotonic() + 3
    while time.monotonic() < until:
        set_away(files, index, ~slot.owner & WORD)
        time.sleep(0.002)
        # what is counted now stays counted: somebody who adds sees it, and takes back what is too much
        if files.used() > 10 * MIB:
            stayed += 1
            set_away(files, index, slot.owner)
            continue
        came += 1
        sums = [files.used() for _ in range(200)]
        assert sum(value > 10 * MIB for value in sums) < len(sums), "one who took back is seen for a moment, not always"
        _, refused = greedy.pid, wait_until(lambda: any(one.refusals for one in files.slots()), 1)
        assert refused
        set_away(files, index, slot.owner)
    greedy.kill()
    greedy.communicate()
    one.close()
    print(f"came back {came} times, stayed {stayed} times")
    assert came


def test_a_fork_of_who_is_away_is_somebody_else(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    script = """
start(); alloc(4 * MIB); say(0); input()
child = os.fork()
if child == 0:
    start(); say([alloc(2 * MIB)[0]]); os._exit(0)
os.waitpid(child, 0)
"""
    parent = spawn(script, environment(files, null_driver(), preload=limiter()))
    assert parent.stdout
    assert parent.stdin
    parent.stdout.readline()
    (slot,) = files.slots()
    set_away(files, 0, slot.owner)
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert json.loads(parent.stdout.readline()) == [0]
    parent.communicate(timeout=20)


def test_an_older_ctl_is_not_read_beyond_its_end(make_slice: Make) -> None:
    files = make_slice(mem_limit=10 * MIB)
    env = environment(files, null_driver(), preload=limiter())
    assert run("say(cuda.cuInit(0))", env) == 0, "the control"
    files.ctl.version = 2
    subprocess.run(["truncate", "-s", str(layout.Ctl.away.offset), str(files.directory / "ctl")], check=True)
    assert run("say(cuda.cuInit(0))", env) == 803


def test_what_was_seen_idle_after_it_was_put_away_stays_idle(make_slice: Make) -> None:
    """As the agent looks: away is said first, busy looked at second. Else it would compute, for the scheduler, while it is away."""
    files = make_slice(mem_limit=10 * MIB, gate=layout.GATE_OPEN)
    with going_on(files.beat, 0.05):
        script = "start(); f = c.c_void_p(1); say(0)\nwhile True: cuda.cuLaunchKernel(f, 1, 1, 1, 1, 1, 1, 0, None, None, None)"
        one = spawn(script, environment(files, null_driver(), preload=limiter()))
        assert one.stdout
        one.stdout.readline()
        (slot,) = files.slots()
        for _ in range(100):
            set_away(files, 0, ~slot.owner & WORD)
            assert wait_until(lambda: slot.busy_since == 0 and slot.wants_back)
            launches = files.launches(slot)
            for _ in range(20):
                assert (slot.busy_since, slot.want, files.launches(slot)) == (0, 0, launches)
                time.sleep(0.0005)
            set_away(files, 0, 0)
            assert wait_until(lambda seen=launches: files.launches(slot) > seen)
        one.kill()
        one.communicate()
