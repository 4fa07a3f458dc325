"""Copies and memsets: those inside the device wait for the slice's turn, those with the host are counted and never wait."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import environment, limiter, sim_driver, spawn
from limiter_slice import MIB, SliceFiles, wait_until
from shared_kit import SharedMachine, shared_machine
from test_limiter_gate import beating, set_gate

from nbgpu_agent import layout

Make = Callable[..., SliceFiles]
CHILD = """
N = 2 * MIB
class Copy2D(c.Structure):
    _fields_ = [(side + name, kind) for side in ("src", "dst") for name, kind in
                (("X", c.c_size_t), ("Y", c.c_size_t), ("Type", c.c_int), ("Host", c.c_void_p), ("Device", c.c_uint64),
                 ("Array", c.c_void_p), ("Pitch", c.c_size_t))] + [("Width", c.c_size_t), ("Height", c.c_size_t)]
class Copy3D(c.Structure):
    _fields_ = [(side + name, kind) for side in ("src", "dst") for name, kind in
                (("X", c.c_size_t), ("Y", c.c_size_t), ("Z", c.c_size_t), ("Lod", c.c_size_t), ("Type", c.c_int), ("Host", c.c_void_p),
                 ("Device", c.c_uint64), ("Array", c.c_void_p), ("Reserved", c.c_void_p), ("Pitch", c.c_size_t), ("Rows", c.c_size_t))
                ] + [("Width", c.c_size_t), ("Height", c.c_size_t), ("Depth", c.c_size_t)]
start(); host = c.create_string_buffer(N); stream = c.c_void_p(); ok(cuda.cuStreamCreate(c.byref(stream), 1))
a, b = (c.c_uint64(alloc(N)[1]) for _ in range(2)); array = [c.c_void_p(), c.c_void_p()]
for one in array: ok(cuda.cuArrayCreate_v2(c.byref(one), (c.c_uint64 * 3)(N, 0, 1 | 1 << 32)))
def box(kind, source, target, size=N, height=4, **more):
    made = kind(Width=size // height, Height=height, **more)
    for side, at in (("src", source), ("dst", target)):
        setattr(made, side + "Pitch", size // height)
        if at is host: setattr(made, side + "Type", 1); setattr(made, side + "Host", c.addressof(host))
        elif isinstance(at, c.c_uint64): setattr(made, side + "Type", 2); setattr(made, side + "Device", at.value)
        elif at == "unified": setattr(made, side + "Type", 4); setattr(made, side + "Device", a.value)
    return c.byref(made)
def flat(*ends, **more): return box(Copy2D, *ends, **more)
def deep(*ends, **more): return box(Copy3D, *ends, Depth=1, **more)
def n(size=N): return c.c_size_t(size)
def many(*items): return (c.c_uint64 * len(items))(*(getattr(i, "value", i) for i in items))
S, Z = stream, n(0)
def sets(size=N):
    found = {}
    for bits in (8, 16, 32):
        w = size * 8 // bits
        for end in ("", "_ptds"):
            found[f"cuMemsetD{bits}_v2{end}"] = (a, 0, n(w)); found[f"cuMemsetD2D{bits}_v2{end}"] = (a, n(size // 4), 0, n(w // 4), n(4))
        for end in ("", "_ptsz"):
            found[f"cuMemsetD{bits}Async{end}"] = (a, 0, n(w), S)
            found[f"cuMemsetD2D{bits}Async{end}"] = (a, n(size // 4), 0, n(w // 4), n(4), S)
    return found
def both(calls, end): return {name + e: arguments for name, arguments in calls.items() for e in ("", end)}
INSIDE = sets() | both({
    "cuMemcpy": (b, a, n()), "cuMemcpyDtoD_v2": (b, a, n()), "cuMemcpyPeer": (b, None, a, None, n()), "cuMemcpy2D_v2": (flat(a, b),),
    "cuMemcpy2DUnaligned_v2": (flat("unified", b),), "cuMemcpy3D_v2": (deep(a, b),), "cuMemcpy3DPeer": (deep(a, b),),
    "cuMemcpyDtoA_v2": (array[0], Z, a, n()), "cuMemcpyAtoD_v2": (a, array[0], Z, n()), "cuMemcpyAtoA_v2": (array[0], Z, array[1], Z, n()),
}, "_ptds") | both({
    "cuMemcpyAsync": (b, a, n(), S), "cuMemcpyDtoDAsync_v2": (b, a, n(), S), "cuMemcpyPeerAsync": (b, None, a, None, n(), S),
    "cuMemcpy2DAsync_v2": (flat(a, b), S), "cuMemcpy3DAsync_v2": (deep(a, b), S), "cuMemcpy3DPeerAsync": (deep(a, b), S),
    "cuMemcpyBatchAsync": (many(b), many(a), many(N), n(1), None, None, Z, None, S),
    "cuMemcpyBatchAsync_v2": (many(b), many(a), many(N), n(1), None, None, Z, S),
}, "_ptsz") | {"cuMemcpyWithAttributesAsync": (b, a, n(), None, S)}
H = c.cast(host, c.c_void_p); HOST = c.c_uint64(H.value)
OUTSIDE = both({
    "cuMemcpy": (a, HOST, n()), "cuMemcpyHtoD_v2": (a, H, n()), "cuMemcpyDtoH_v2": (H, a, n()), "cuMemcpy2D_v2": (flat(host, a),),
    "cuMemcpy2DUnaligned_v2": (flat(a, host),), "cuMemcpy3D_v2": (deep(host, a),), "cuMemcpyHtoA_v2": (array[0], Z, H, n()),
    "cuMemcpyAtoH_v2": (H, array[0], Z, n()),
}, "_ptds") | both({
    "cuMemcpyAsync": (HOST, a, n(), S), "cuMemcpyHtoDAsync_v2": (a, H, n(), S), "cuMemcpyDtoHAsync_v2": (H, a, n(), S),
    "cuMemcpy2DAsync_v2": (flat(a, host), S), "cuMemcpy3DAsync_v2": (deep(a, host), S), "cuMemcpyHtoAAsync_v2": (array[0], Z, H, n(), S),
    "cuMemcpyAtoHAsync_v2": (H, array[0], Z, n(), S), "cuMemcpyBatchAsync": (many(a), many(HOST), many(N), n(1), None, None, Z, None, S),
    "cuMemcpyBatchAsync_v2": (many(a), many(HOST), many(N), n(1), None, None, Z, S),
}, "_ptsz")
SMALL = {"small": [("cuMemsetD8Async", (a, 0, n(1000), S))] * 15}
CALLS = {"inside": INSIDE, "outside": OUTSIDE}
say([[kind, name] for kind, calls in CALLS.items() for name in calls])
for line in sys.stdin:
    kind, name = json.loads(line)
    for call, arguments in [(name, CALLS[kind][name])] if kind in CALLS else SMALL["small"]:
        result = getattr(cuda, call)(*arguments)
    say(result)
"""


class Child:
    """A process that makes the calls it is told to."""

    def __init__(self, env: dict[str, str], script: str = CHILD) -> None:
        self.process = spawn(script, env)
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)

    def tell(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        try:
            return self.answers.get(timeout=20).strip()
        except queue.Empty:
            self.process.kill()
            raise AssertionError(self.process.communicate()[1] or "no answer") from None


@pytest.fixture
def machine(make_slice: Make, tmp_path: Path) -> Iterator[SharedMachine]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    with shared_machine(make_slice, base / f"nbgpu-test-copies-{os.getpid()}") as made:
        yield made


def start(machine: SharedMachine, files: SliceFiles | None) -> tuple[Child, list[list[str]]]:
    child = Child(environment(files, sim_driver(), preload=limiter() if files else None, **machine.more))
    return child, json.loads(child.answer())


def quoted(kind: str, name: str) -> str:
    return f'["{kind}", "{name}"]'


def test_every_variant_inside_the_device_waits(machine: SharedMachine) -> None:
    files = machine.slice(100 * MIB)
    with beating(files):
        child, calls = start(machine, files)
        inside = [name for kind, name in calls if kind == "inside"]
        assert len(inside) > 60
        for name in inside:
            set_gate(files, layout.GATE_CLOSED)
            child.tell(quoted("inside", name))
            assert wait_until(lambda: files.use.want[0] == 1 or not child.answers.empty())
            assert child.answers.empty(), f"{name} did not wait"
            set_gate(files, layout.GATE_OPEN, 1)
            assert child.answer() == "0", name
        (slot,) = files.slots()
        assert files.launches(slot) == 0
        assert slot.copied_bytes == 0
        assert wait_until(lambda: files.use.idle[0] == 1)
        child.process.kill()
        child.process.communicate()


def test_with_the_host_it_is_counted_and_does_not_wait(machine: SharedMachine) -> None:
    files = machine.slice(100 * MIB)
    with beating(files):
        child, calls = start(machine, files)
        set_gate(files, layout.GATE_CLOSED)
        (slot,) = files.slots()
        before = slot.copied_bytes
        for name in [name for kind, name in calls if kind == "outside"]:
            child.tell(quoted("outside", name))
            assert child.answer() == "0", name
            assert slot.copied_bytes == before + 2 * MIB, name
            before = slot.copied_bytes
        assert files.use.want[0] == 0
        child.process.kill()
        child.process.communicate()


def test_small_ones_add_up(machine: SharedMachine) -> None:
    files = machine.slice(100 * MIB)
    with beating(files):
        child, _ = start(machine, files)
        set_gate(files, layout.GATE_CLOSED)
        child.tell(quoted("small", ""))
        assert child.answer() == "0"
        child.tell(quoted("small", ""))
        assert wait_until(lambda: files.use.want[0] == 1)
        assert child.answers.empty()
        set_gate(files, layout.GATE_OPEN, 1)
        assert child.answer() == "0"
        child.process.kill()
        child.process.communicate()


def test_control_without_the_limiter_nothing_waits(machine: SharedMachine) -> None:
    child, calls = start(machine, None)
    for kind, name in calls:
        child.tell(quoted(kind, name))
        assert child.answer() == "0", name
    child.process.kill()
    child.process.communicate()
