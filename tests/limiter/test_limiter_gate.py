"""The gate: who waits, what the slice's words say meanwhile, and that nothing waits for ever."""

from __future__ import annotations

import ctypes as c
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from limiter_kit import environment, going_on, limiter, null_driver, spawn
from limiter_slice import MIB, SliceFiles

from nbgpu_agent import layout

Make = Callable[..., SliceFiles]
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
LAUNCH = """
import time
start()
def launch(stream=None):
    return cuda.cuLaunchKernel(None, 1, 1, 1, 1, 1, 1, 0, stream, None, None)
"""
TALK = LAUNCH + "for line in sys.stdin:\n a = time.monotonic(); ok(launch()); say(round(time.monotonic() - a, 3))"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.001)


@contextmanager
def beating(files: SliceFiles) -> Iterator[None]:
    """A living scheduler's heartbeat."""
    files.beat()
    with going_on(files.beat, 0.02):
        yield


def set_gate(files: SliceFiles, gate: int, turn_end_ns: int = 0) -> None:
    device = files.ctl.device[0]
    device.turn_end_ns = turn_end_ns
    device.gate = gate
    word = c.addressof(device) + layout.CtlDevice.gate.offset
    c.CDLL(None).syscall(SYS_FUTEX, c.c_void_p(word), 1, 1 << 20, None, None, 0)


class Child:
    """A process that launches once for each line."""

    def __init__(self, files: SliceFiles, *, limited: bool = True, **more: str) -> None:
        env = environment(files, null_driver(), preload=limiter(), **more) if limited else environment(files, null_driver())
        self.process = spawn(TALK, env)
        self.answers: list[float] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.append(float(line))

    def launch(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0


@pytest.mark.slow
def test_a_closed_gate_makes_it_wait_and_ask(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_CLOSED)
    with beating(files):
        child = Child(files)
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "the slice wants its turn")
        (slot,) = files.slots()
        assert (slot.want, files.use.idle[0], slot.launches) == (1, 0, 0)
        assert files.use.bell > 0
        assert not child.answers
        set_gate(files, layout.GATE_OPEN, 1)
        wait_for(lambda: len(child.answers) == 1, "the launch goes through")
        wait_for(lambda: files.use.want[0] == 0 and slot.want == 0, "it stops wanting")
        wait_for(lambda: files.use.idle[0] == 1 and slot.busy_since == 0, "its idle end is seen")
        assert slot.stall_ns > 0
        assert files.launches(slot) == 1
        assert slot.last_launch_ns > 0
        child.end()


def test_control_without_the_limiter_nobody_waits(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_CLOSED)
    with beating(files):
        child = Child(files, limited=False)
        child.launch()
        wait_for(lambda: len(child.answers) == 1, "the launch goes through")
        child.end()


def test_alone_on_the_device_it_rings_nothing(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_OPEN)
    with beating(files):
        child = Child(files)
        for i in range(20):
            child.launch()
            wait_for(lambda want=i + 1: len(child.answers) == want, "a launch goes through")
        wait_for(lambda: files.use.idle[0] == 1, "idle")
        assert files.use.bell == 0
        child.end()


def test_idle_is_told_while_others_wait(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_OPEN)
    with beating(files):
        set_gate(files, layout.GATE_OPEN, 1 << 62)
        child = Child(files)
        child.launch()
        wait_for(lambda: files.use.idle[0] == 1 and files.use.bell > 0, "idle is rung")
        assert files.slots()[0].busy_ns > 0
        child.end()


def test_suspended_waits_until_resumed(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_SUSPENDED)
    with beating(files):
        child = Child(files)
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "it waits")
        time.sleep(0.3)
        assert not child.answers
        set_gate(files, layout.GATE_NONE)
        wait_for(lambda: len(child.answers) == 1, "the launch goes through")
        child.end()


def test_a_kernels_own_gate(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_NONE)
    files.kernel(5, "k", 0, compute_milli=100)
    files.ctl.kernel[5].gate[0] = layout.GATE_CLOSED
    with beating(files):
        child, other = Child(files, NBGPU_KERNEL_ID="k"), Child(files, NBGPU_KERNEL_ID="o")
        other.launch()
        wait_for(lambda: len(other.answers) == 1, "another kernel goes through")
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "it waits")
        files.ctl.kernel[5].gate[0] = layout.GATE_OPEN
        wait_for(lambda: len(child.answers) == 1, "the launch goes through")
        child.end()
        other.end()


def test_who_has_no_limit_obeys_the_gate_of_the_rest_while_another_has_one(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_OPEN)
    device = files.ctl.device[0]
    device.rest_gate = layout.GATE_CLOSED
    with beating(files):
        child = Child(files, NBGPU_KERNEL_ID="o")
        child.launch()
        wait_for(lambda: len(child.answers) == 1, "nobody is limited: no gate of the rest")
        files.kernel(5, "k", 0, compute_milli=100)
        files.ctl.kernels_limited = 1
        files.ctl.generation += 1
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "it waits")
        time.sleep(0.1)
        assert len(child.answers) == 1
        device.rest_gate = layout.GATE_OPEN
        wait_for(lambda: len(child.answers) == 2, "the launch goes through")
        wait_for(lambda: files.slots()[0].busy_since == 0, "idle")
        before = files.use.bell
        child.launch()
        wait_for(lambda: len(child.answers) == 3 and files.use.bell > before, "its idle end is rung, though nobody waits for the slice")
        child.end()


def test_a_limit_set_while_running_is_obeyed(make_slice: Make) -> None:
    """The fast path must notice that turns begin, and that its kernel has got a gate."""
    files = make_slice(mem_limit=MIB, gate=layout.GATE_NONE)
    with beating(files):
        child = Child(files, NBGPU_KERNEL_ID="k")
        child.launch()
        wait_for(lambda: len(child.answers) == 1, "ungated")
        files.ctl.kernel[0].gate[0] = layout.GATE_CLOSED
        files.ctl.kernel[0].compute_milli = 50
        files.ctl.kernel[0].id = b"k"
        files.ctl.generation += 1
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "it waits")
        files.ctl.kernel[0].compute_milli = 0
        files.ctl.generation += 1
        wait_for(lambda: len(child.answers) == 2, "the launch goes through")
        set_gate(files, layout.GATE_CLOSED)
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "it waits")
        set_gate(files, layout.GATE_NONE)
        wait_for(lambda: len(child.answers) == 3, "the launch goes through")
        child.end()


@pytest.mark.parametrize("mode", [layout.MODE_BURST, layout.MODE_STRICT], ids=["burst", "strict"])
def test_a_dead_scheduler_blocks_nobody(make_slice: Make, mode: int) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_CLOSED, mode=mode)
    files.ctl.heartbeat_ns = 1
    child = Child(files)
    for _ in range(50):
        child.launch()
    wait_for(lambda: len(child.answers) == 50, "launches go through")
    child.end()


def test_a_scheduler_that_dies_meanwhile(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_CLOSED)
    with beating(files):
        child = Child(files)
        child.launch()
        wait_for(lambda: files.use.want[0] == 1, "it waits")
    wait_for(lambda: len(child.answers) == 1, "the launch goes through without a scheduler", 2)
    child.end()


def test_words_are_over_all_processes(make_slice: Make) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_CLOSED)
    with beating(files):
        children = [Child(files), Child(files)]
        for child in children:
            child.launch()
        wait_for(lambda: sum(s.want for s in files.slots()) == 2, "both want")
        children[0].process.kill()
        children[0].process.wait()
        assert files.use.want[0] == 1
        set_gate(files, layout.GATE_OPEN, 1)
        wait_for(lambda: len(children[1].answers) == 1, "the living goes through")
        children[1].end()
        third = Child(files)  # tidies up after the dead
        third.launch()
        wait_for(lambda: len(third.answers) == 1 and files.use.idle[0] == 1, "idle, though one died wanting")
        assert files.use.want[0] == 0
        third.end()


LOSES_ITS_LOCK = (
    LAUNCH
    + """
import threading
threading.Thread(target=lambda: (sys.stdin.readline(), os.closerange(3, 4096)), daemon=True).start()
ok(launch())
"""
)


@pytest.mark.parametrize("why", ["turn missed", "lock lost", "control: nothing happens"])
def test_who_waits_rings_once_and_again_only_with_news(make_slice: Make, why: str) -> None:
    """The scheduler pays for each ring, and knows already that it wants."""
    files = make_slice(mem_limit=MIB, gate=layout.GATE_CLOSED)
    with beating(files):
        child = spawn(LOSES_ITS_LOCK, environment(files, null_driver(), preload=limiter()))
        try:
            wait_for(lambda: files.use.want[0] == 1 and files.use.bell > 0, "it wants")
            time.sleep(0.05)
            before = files.use.bell
            if why == "turn missed":
                files.ctl.device[0].gate_generation += 1
            elif why == "lock lost":
                assert child.stdin
                child.stdin.write("\n")
                child.stdin.flush()
            if why.startswith("control"):
                time.sleep(0.3)
                assert files.use.bell == before
            else:
                wait_for(lambda: files.use.bell == before + 1, "it rings", 1)
                time.sleep(0.2)
                assert files.use.bell == before + 1, "once"
        finally:
            child.kill()
            child.communicate()
