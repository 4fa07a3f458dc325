"""Every way to launch meets the gate. Behind an open one a thread launches a few times without a look at the books: nothing is lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import environment, limiter, null_driver, run, sim_driver, spawn
from limiter_slice import MIB, SliceFiles
from test_limiter_gate import beating, set_gate, wait_for

from nbgpu_agent import layout

Make = Callable[..., SliceFiles]
WORK = """
import threading, time
start()
module, function, ns = c.c_void_p(), c.c_void_p(), c.c_uint64()
ok(cuda.cuModuleLoadData(c.byref(module), b".visible .entry work_arg_ns(.param .u64 ns)\\n\\0"))
ok(cuda.cuModuleGetFunction(c.byref(function), module, b"work_arg_ns"))
parameters = (c.c_void_p * 1)(c.addressof(ns))
def launch(us, stream=None):
    ns.value = us * 1000
    ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, parameters, None))
def stream():
    made = c.c_void_p(); ok(cuda.cuStreamCreate(c.byref(made), 1)); return made
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Settings of a simulated machine."""
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    state = base / f"nbgpu-test-pass-{os.getpid()}"
    yield {"NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1"}
    state.unlink(missing_ok=True)


def on_machine(machine: dict[str, str], make_slice: Make) -> SliceFiles:
    script = """
ok(cuda.cuInit(0)); b = (c.c_ubyte * 16)(); ok(cuda.cuDeviceGetUuid_v2(b, 0)); h = bytes(b).hex()
say(f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}")
"""
    uuid = run(script, environment(None, sim_driver(), **machine))
    return make_slice(mem_limit=4096 * MIB, uuids=(uuid,), gate=layout.GATE_OPEN)


@pytest.mark.slow
def test_what_was_launched_unseen_is_busy_until_it_is_done(machine: dict[str, str], make_slice: Make) -> None:
    """Nobody synchronizes, and the last launches have no fence of their own."""
    files = on_machine(machine, make_slice)
    script = (
        WORK
        + """
say(1); input()
for _ in range(100): launch(100)
for _ in range(40):
    time.sleep(0.01)
    for _ in range(4): launch(100)
say(2); input()
"""
    )
    with beating(files):
        child = spawn(script, environment(files, sim_driver(), preload=limiter(), **machine))
        assert child.stdin
        assert child.stdout
        for line in ("1\n", "2\n"):
            assert child.stdout.readline() == line
            if line == "1\n":
                child.stdin.write("\n")
                child.stdin.flush()
        (slot,) = files.slots()
        assert files.launches(slot) == 260
        wait_for(lambda: slot.busy_since == 0, "idle")
        assert slot.busy_ns == pytest.approx(260 * 100_000, rel=0.25), "GPU time, without the pauses in between"
        child.communicate("\n", timeout=30)


def test_captured_launches_are_not_taken_for_work(machine: dict[str, str], make_slice: Make) -> None:
    files = on_machine(machine, make_slice)
    script = (
        WORK
        + """
s = stream()
for _ in range(200): launch(20, s)
ok(cuda.cuStreamBeginCapture_v2(s, 0))
for _ in range(5): launch(200_000, s)
graph = c.c_void_p(); ok(cuda.cuStreamEndCapture(s, c.byref(graph)))
n = c.c_size_t(); ok(cuda.cuGraphGetNodes(graph, None, c.byref(n)))
for _ in range(10): launch(20, s)
say(n.value); input()
"""
    )
    with beating(files):
        child = spawn(script, environment(files, sim_driver(), preload=limiter(), **machine))
        assert child.stdout
        assert child.stdout.readline() == "5\n", child.stderr and child.stderr.read()
        (slot,) = files.slots()
        wait_for(lambda: slot.busy_since == 0, "idle")
        assert files.launches(slot) == 210
        assert slot.busy_ns < 300e6, "what was captured never ran"
        child.communicate("\n", timeout=30)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_gate_that_closes_in_between_is_obeyed_at_once(make_slice: Make, threads: int) -> None:
    files = make_slice(mem_limit=MIB, gate=layout.GATE_OPEN)
    script = f"""
import threading
start(); context = c.c_void_p(); ok(cuda.cuCtxGetCurrent(c.byref(context)))
def work():
    cuda.cuCtxSetCurrent(context)
    while True: cuda.cuLaunchKernel(None, 1, 1, 1, 1, 1, 1, 0, None, None, None)
for _ in range({threads}): threading.Thread(target=work, daemon=True).start()
input()
"""
    with beating(files):
        child = spawn(script, environment(files, null_driver(), preload=limiter()))
        wait_for(lambda: len(files.slots()) == 1 and files.launches(files.slots()[0]) > 2000, "launches")
        (slot,) = files.slots()
        for _ in range(5):
            set_gate(files, layout.GATE_CLOSED)
            wait_for(lambda: slot.want == threads, "all threads wait")
            before = files.launches(slot)
            time.sleep(0.05)
            assert files.launches(slot) == before
            set_gate(files, layout.GATE_OPEN)
            wait_for(lambda want=before + 2000: files.launches(slot) > want, "launches go on")
        child.communicate("\n", timeout=30)


WAYS = """
class Config(c.Structure):
    _fields_ = [("size", c.c_uint * 6), ("shared", c.c_uint), ("stream", c.c_void_p), ("attributes", c.c_void_p), ("count", c.c_uint)]
class Params(c.Structure):
    _fields_ = [("function", c.c_void_p), ("size", c.c_uint * 6), ("shared", c.c_uint), ("stream", c.c_void_p), ("parameters", c.c_void_p)]
ones = (c.c_uint * 6)(1, 1, 1, 1, 1, 1)
config = Config(ones, 0, None, None, 0)
at = c.cast(parameters, c.c_void_p)
several = (Params * 1)(Params(function, ones, 0, stream(), at))
s = stream(); graph, exec_ = c.c_void_p(), c.c_void_p()
ok(cuda.cuStreamBeginCapture_v2(s, 0)); launch(10, s); ok(cuda.cuStreamEndCapture(s, c.byref(graph)))
ok(cuda.cuGraphInstantiateWithFlags(c.byref(exec_), graph, c.c_ulonglong(0)))
plain = (1, 1, 1, 1, 1, 1, 0, None, parameters)
ways = {
    "cuLaunchKernel": lambda f: f(function, *plain, None), "cuLaunchKernel_ptsz": lambda f: f(function, *plain, None),
    "cuLaunchKernelEx": lambda f: f(c.byref(config), function, parameters, None),
    "cuLaunchKernelEx_ptsz": lambda f: f(c.byref(config), function, parameters, None),
    "cuLaunchCooperativeKernel": lambda f: f(function, *plain), "cuLaunchCooperativeKernel_ptsz": lambda f: f(function, *plain),
    "cuLaunchCooperativeKernelMultiDevice": lambda f: f(several, 1, 0),
    "cuGraphLaunch": lambda f: f(exec_, s), "cuGraphLaunch_ptsz": lambda f: f(exec_, s),
    "cuLaunch": lambda f: f(function), "cuLaunchGrid": lambda f: f(function, 1, 1), "cuLaunchGridAsync": lambda f: f(function, 1, 1, None),
}
say(list(ways))
for line in sys.stdin:
    name = line.strip()
    ok(ways[name](getattr(cuda, name))); ok(cuda.cuCtxSynchronize()); say(name)
"""


def test_every_way_to_launch_waits_for_its_turn(machine: dict[str, str], make_slice: Make) -> None:
    files = on_machine(machine, make_slice)
    with beating(files):
        child = spawn(WORK + WAYS, environment(files, sim_driver(), preload=limiter(), **machine))
        assert child.stdin
        assert child.stdout
        ways = json.loads(child.stdout.readline())
        assert len(ways) == 12
        wait_for(lambda: len(files.slots()) == 1, "a slot")
        (slot,) = files.slots()
        for name in ways:
            set_gate(files, layout.GATE_CLOSED)
            before = files.launches(slot)
            child.stdin.write(name + "\n")
            child.stdin.flush()
            wait_for(lambda: slot.want == 1, f"{name} waits")
            assert files.launches(slot) == before
            set_gate(files, layout.GATE_OPEN)
            assert child.stdout.readline().strip() == f'"{name}"', child.stderr and child.stderr.read()
            assert files.launches(slot) == before + 1, name
        child.communicate(timeout=30)
