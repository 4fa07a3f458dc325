"""The turns of a slice's kernels in virtual time: shares under limits, one at a time, the stopped and the dead hold up nobody."""

from __future__ import annotations

import ctypes as c
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpu_model import GATE_OPEN, MS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import build_module

REST = 64
TICK_NS = 100_000
GATE_CLOSED, GATE_NONE = 0, 3


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    out = tmp_path_factory.mktemp("kernels") / "libkernels.so"
    agentlib = ROOT / "nodeagent" / "agentlib"
    sources = [agentlib / "sched_kernels.c", Path(__file__).parent / "kernels_harness.c"]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{agentlib}"]
    subprocess.run([*build_module().find_compiler(None), *flags, *map(str, sources), "-o", str(out)], check=True, timeout=120)
    made = c.CDLL(str(out))
    made.kernels_new.restype = made.kernels_decide.restype = c.c_uint64
    made.kernels_new.argtypes = [c.c_uint64]
    made.kernels_free.argtypes = [c.c_uint64]
    made.kernels_limit.argtypes = [c.c_uint64, c.c_uint32, c.c_char_p, c.c_uint32, c.c_uint64]
    made.kernels_say.argtypes = [c.c_uint64, c.c_uint32, c.c_int, c.c_int, c.c_int, c.c_uint32, c.c_uint64]
    made.kernels_decide.argtypes = [c.c_uint64, c.c_int, c.c_uint64]
    made.kernels_gate_of.restype = c.c_uint32
    made.kernels_gate_of.argtypes = made.kernels_asks.argtypes = [c.c_uint64, c.c_uint32]
    return made


@dataclass
class Kernel:
    """One member: how much it has outstanding, how long it ran; `stopped` after it was let in, it never comes."""

    cap: int
    left_ns: int = 0
    ran_ns: int = 0
    hung_ns: int = 0
    stopped: bool = False
    hangs: bool = False


class Play:
    """A device that is all the slice's, or is away from it half of the time; kernels that always have more to do."""

    def __init__(self, lib: c.CDLL, caps: dict[int, int]) -> None:
        self.lib = lib
        self.now = 10**12
        self.state = lib.kernels_new(self.now)
        self.kernels = {index: Kernel(cap) for index, cap in caps.items()}
        self.slice_open = True
        for index, kernel in self.kernels.items():
            if index != REST:
                lib.kernels_limit(self.state, index, f"k{index}".encode(), kernel.cap, self.now)

    def close(self) -> None:
        self.lib.kernels_free(self.state)

    def gate(self, index: int) -> int:
        """Return a member's gate word."""
        return self.lib.kernels_gate_of(self.state, index)

    def decide(self) -> None:
        """Tell what all say, until nothing changes."""
        for _ in range(4):
            before = [self.gate(i) for i in self.kernels]
            for index, kernel in self.kernels.items():
                closed = self.gate(index) == GATE_CLOSED or not self.slice_open
                want = closed or kernel.stopped
                busy, near = kernel.left_ns > 0 or kernel.hangs, closed and kernel.left_ns < MS // 2 and not kernel.hangs
                self.lib.kernels_say(self.state, index, want, busy, near, 1, kernel.ran_ns + kernel.hung_ns)
            assert self.lib.kernels_decide(self.state, self.slice_open, self.now) > self.now
            if before == [self.gate(i) for i in self.kernels]:
                return

    def tick(self) -> None:
        """Advance by 0.1 ms: who is let in keeps 2 ms outstanding, the slice's device works on all that is outstanding alike."""
        self.decide()
        assert sum(self.gate(index) == GATE_OPEN for index in self.kernels) <= 1
        for index, kernel in self.kernels.items():
            if self.slice_open and self.gate(index) == GATE_OPEN and not kernel.stopped:
                kernel.left_ns = max(kernel.left_ns, 2 * MS)
            kernel.hung_ns += TICK_NS if kernel.hangs else 0
        running = [kernel for kernel in self.kernels.values() if kernel.left_ns > 0 and self.slice_open]
        for kernel in running:
            done = min(kernel.left_ns, TICK_NS // len(running))
            kernel.ran_ns += done
            kernel.left_ns -= done
        self.now += TICK_NS

    def shares(self, seconds: float, slice_milli: int = 1000) -> dict[int, float]:
        """Return what each ran, in percent of the device's time, with the slice let in for its part of each 30 ms."""
        before = {index: kernel.ran_ns for index, kernel in self.kernels.items()}
        ticks = int(seconds * 1e9 / TICK_NS)
        for number in range(ticks):
            self.slice_open = number % 300 < slice_milli * 3 // 10
            self.tick()
        return {index: (kernel.ran_ns - before[index]) / (ticks * TICK_NS) * 100 for index, kernel in self.kernels.items()}


@pytest.fixture
def play(lib: c.CDLL) -> Iterator[list[Play]]:
    made: list[Play] = []
    yield made
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("caps", "slice_milli", "due"),
    [
        ({0: 250, REST: 0}, 1000, {0: 25, REST: 75}),
        ({0: 250}, 1000, {0: 25}),
        ({0: 100, 1: 200, REST: 0}, 1000, {0: 10, 1: 20, REST: 70}),
        ({0: 10, REST: 0}, 1000, {0: 1, REST: 99}),
        ({0: 900, REST: 0}, 1000, {0: 50, REST: 50}),  # a limit is no share: below it both have alike
        ({0: 150, REST: 0}, 500, {0: 15, REST: 35}),
        ({0: 500, REST: 0}, 500, {0: 25, REST: 25}),
        ({0: 100}, 500, {0: 10}),
    ],
)
def test_shares_under_limits(lib: c.CDLL, play: list[Play], caps: dict[int, int], slice_milli: int, due: dict[int, float]) -> None:
    play.append(Play(lib, caps))
    play[0].shares(0.5, slice_milli)
    for _ in range(3):
        shares = play[0].shares(1, slice_milli)
        assert shares == pytest.approx(due, abs=2.0)
        for index, cap in caps.items():
            assert not cap or shares[index] <= cap / 10 + 1


def test_a_slice_whose_kernels_have_spent_their_limits_asks_for_no_turn(lib: c.CDLL, play: list[Play]) -> None:
    play.append(Play(lib, {0: 100}))
    asked = 0
    for _ in range(10_000):
        play[0].tick()
        asked += play[0].gate(0) == GATE_OPEN or lib.kernels_asks(play[0].state, 0)
    assert asked < 1500, "with a tenth of the time it must not be at the device for much more than that"


@pytest.mark.parametrize("how", ["stopped", "hangs"])
def test_who_stops_in_its_turn_holds_up_the_others_for_milliseconds(lib: c.CDLL, play: list[Play], how: str) -> None:
    """Stopped: it was let in and never comes. Hangs: its words say for ever that work is outstanding."""
    play.append(Play(lib, {0: 500, REST: 0}))
    play[0].shares(0.2)
    setattr(play[0].kernels[0], how, True)
    play[0].shares(0.2)
    assert play[0].shares(1)[REST] > 75


def test_a_limit_that_is_taken_away_leaves_no_gate(lib: c.CDLL, play: list[Play]) -> None:
    play.append(Play(lib, {0: 100, REST: 0}))
    play[0].shares(0.1)
    lib.kernels_limit(play[0].state, 0, b"", 0, play[0].now)
    assert play[0].gate(0) == GATE_NONE
    del play[0].kernels[0]
    assert play[0].shares(0.1)[REST] > 98


WORDS = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 10**9), st.booleans(), WORDS, WORDS, WORDS), max_size=60))
def test_whatever_they_write_one_at_a_time_is_let_in(lib: c.CDLL, steps: list[tuple[int, bool, tuple[int, ...]]]) -> None:
    now = 10**12
    state = lib.kernels_new(now)
    try:
        lib.kernels_limit(state, 3, b"a", 1, now)
        lib.kernels_limit(state, 63, b"b", 1000, now)
        for passed, slice_open, *words in steps:
            now += passed
            for index, said in zip((3, 63, REST), words, strict=True):
                lib.kernels_say(state, index, *said)
            assert lib.kernels_decide(state, slice_open, now) > now
            gates = [lib.kernels_gate_of(state, index) for index in (3, 63, REST)]
            assert sum(gate == GATE_OPEN for gate in gates) <= 1
            assert lib.kernels_gate_of(state, 0) == GATE_NONE
    finally:
        lib.kernels_free(state)
