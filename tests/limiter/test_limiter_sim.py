"""The limiter on the simulated driver, through the libraries that people use: cuda.bindings and nvidia-ml-py, unmodified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limiter_kit import environment, limiter, needs_numba, run, sim_driver, spawn
from limiter_slice import MIB, SliceFiles

pytest.importorskip("cuda.bindings")
pytest.importorskip("pynvml")

Make = Callable[..., SliceFiles]

BINDINGS = """
from cuda.bindings import driver as cu
def ck(result):
    assert int(result[0]) == 0, result
    return result[1] if len(result) == 2 else result[1:]
def code(result):
    return int(result[0])
def begin():
    ck(cu.cuInit(0))
    context = ck(cu.cuDevicePrimaryCtxRetain(0)); ck(cu.cuCtxSetCurrent(context))
    return ck(cu.cuDeviceGet(0))
def left():
    return ck(cu.cuMemGetInfo())[0] // MIB
def uuid(device):
    h = bytes(ck(cu.cuDeviceGetUuid(device)).bytes).hex()
    return f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
"""


class Machine:
    """A simulated machine of three devices, and slices on it."""

    def __init__(self, state: Path, make: Make) -> None:
        self.more = {"NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "3", "NBGPU_SIM_MEMORY_MIB": "8192"}
        self.make = make
        bare = environment(None, sim_driver(), **self.more)
        self.uuids: list[str] = run(BINDINGS + "ck(cu.cuInit(0)); say([uuid(d) for d in range(ck(cu.cuDeviceGetCount()))])", bare)

    def slice(self, *devices: int, mem_limit: int, **options: Any) -> SliceFiles:
        """A slice of the named devices, in that order."""
        return self.make(mem_limit=mem_limit, uuids=tuple(self.uuids[d] for d in devices), **options)

    def within(self, files: SliceFiles | None, **more: str) -> dict[str, str]:
        """Environment under the limiter; None: none, the control."""
        return environment(files, sim_driver(), preload=limiter() if files else None, **self.more, **more)


@pytest.fixture
def machine(make_slice: Make, tmp_path: Path) -> Iterator[Machine]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    state = base / f"nbgpu-test-limiter-{os.getpid()}"
    yield Machine(state, make_slice)
    for left in base.glob(state.name + "*"):
        left.unlink()


def test_only_the_slices_devices_exist(machine: Machine) -> None:
    files = machine.slice(2, 0, mem_limit=100 * MIB)
    script = BINDINGS + "ck(cu.cuInit(0)); say([uuid(d) for d in range(ck(cu.cuDeviceGetCount()))])"
    both = [machine.uuids[2], machine.uuids[0]]
    assert run(script, machine.within(files)) == both
    assert run(script, machine.within(files, CUDA_VISIBLE_DEVICES="1")) == both[1:]
    assert run(script, machine.within(files, CUDA_VISIBLE_DEVICES="1,0")) == both[::-1]
    assert run(script, machine.within(files, CUDA_VISIBLE_DEVICES=machine.uuids[0])) == both[1:]
    assert run(script, machine.within(files, CUDA_VISIBLE_DEVICES="0,7,1")) == both[:1]
    nobodys = BINDINGS + "say([code(cu.cuInit(0))])"
    assert run(nobodys, machine.within(files, CUDA_VISIBLE_DEVICES=machine.uuids[1])) == [100]
    assert run(nobodys, machine.within(files, CUDA_VISIBLE_DEVICES="")) == [100]
    assert run(script, machine.within(None)) == machine.uuids


def test_pools_count_what_they_hold(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=200 * MIB)
    script = (
        BINDINGS
        + """
begin(); whole = left(); out = []
p = ck(cu.cuMemAllocAsync(64 * MIB, 0)); out.append(whole - left() >= 64)
out.append(code(cu.cuMemAllocAsync(190 * MIB, 0)))
ck(cu.cuMemFreeAsync(p, 0)); ck(cu.cuStreamSynchronize(0)); out.append(left() == whole)
props = cu.CUmemPoolProps(); props.allocType = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
props.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE; props.location.id = 0
pool = ck(cu.cuMemPoolCreate(props))
ck(cu.cuMemPoolSetAttribute(pool, cu.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, cu.cuuint64_t(1 << 40)))
q = ck(cu.cuMemAllocFromPoolAsync(128 * MIB, pool, 0))
ck(cu.cuMemFreeAsync(q, 0)); ck(cu.cuStreamSynchronize(0))
out.append(whole - left() >= 128)          # kept by the pool: still held
r = cu.cuMemAlloc(180 * MIB); out.append(code(r))  # what a pool only keeps is taken back before anything is refused
ck(cu.cuMemFree(r[1])); ck(cu.cuMemPoolDestroy(pool)); out.append(left() == whole)
say(out)
"""
    )
    assert run(script, machine.within(files)) == [True, 2, True, True, 0, True]
    assert run(script.replace("say(out)", "say(out[1])"), machine.within(None)) == 0


def test_created_memory_lives_until_unmapped(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=100 * MIB)
    script = (
        BINDINGS
        + """
begin(); whole = left(); out = []
p = cu.CUmemAllocationProp(); p.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
p.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE; p.location.id = 0
a = ck(cu.cuMemCreate(60 * MIB, p, 0)); out.append(whole - left())
out.append(code(cu.cuMemCreate(60 * MIB, p, 0)))
at = ck(cu.cuMemAddressReserve(60 * MIB, 0, 0, 0)); ck(cu.cuMemMap(at, 60 * MIB, 0, a, 0))
ck(cu.cuMemRelease(a)); out.append(whole - left())
ck(cu.cuMemUnmap(at, 60 * MIB)); out.append(whole - left())
b = ck(cu.cuMemCreate(60 * MIB, p, 0)); ck(cu.cuMemRelease(b)); out.append(whole - left())
say(out)
"""
    )
    assert run(script, machine.within(files)) == [60, 2, 60, 0, 0]


def test_arrays_pitch_and_managed_are_counted(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=100 * MIB)
    script = (
        BINDINGS
        + """
begin(); whole = left(); out = []
d = cu.CUDA_ARRAY_DESCRIPTOR(); d.Width, d.Height, d.NumChannels = 4096, 2048, 1
d.Format = cu.CUarray_format.CU_AD_FORMAT_FLOAT
a = ck(cu.cuArrayCreate(d)); out.append(30 <= whole - left() <= 36)
d.Height = 8192; out.append(code(cu.cuArrayCreate(d)))
ck(cu.cuArrayDestroy(a)); out.append(left() == whole)
p, pitch = ck(cu.cuMemAllocPitch(1000 * 1000, 40, 4)); out.append(38 <= whole - left() <= 42)
ck(cu.cuMemFree(p)); out.append(left() == whole)
m = ck(cu.cuMemAllocManaged(50 * MIB, 1)); out.append(whole - left())
out.append(code(cu.cuMemAllocManaged(60 * MIB, 1))); ck(cu.cuMemFree(m)); out.append(left() == whole)
say(out)
"""
    )
    assert run(script, machine.within(files)) == [True, 2, True, True, True, 50, 2, True]


def test_arrays_of_the_oldest_form_are_counted(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=100 * MIB)
    script = (
        BINDINGS
        + """
begin(); whole = left(); out = []
def create(call, *words):
    array = c.c_void_p(); return getattr(cuda, call)(c.byref(array), (c.c_uint * len(words))(*words)), array
result, flat = create("cuArrayCreate", 4096, 2048, 0x20, 1); out += [result, 30 <= whole - left() <= 36]
result, deep = create("cuArray3DCreate", 1024, 1024, 8, 0x20, 1, 0); out += [result, 62 <= whole - left() <= 72]
out += [create("cuArrayCreate", 4096, 4096, 0x20, 1)[0], create("cuArray3DCreate", 1024, 1024, 16, 0x20, 1, 0)[0]]
ok(cuda.cuArrayDestroy(flat)); ok(cuda.cuArrayDestroy(deep)); out.append(left() == whole)
say(out)
"""
    )
    assert run(script, machine.within(files)) == [0, True, 0, True, 2, 2, True]


def test_a_second_context_costs_too(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=1000 * MIB, context_bytes=300 * MIB)
    script = (
        BINDINGS
        + """
ck(cu.cuInit(0)); out = []; made = []
import ctypes
for i in range(4):
    x = c.c_void_p(); r = cuda.cuCtxCreate_v2(c.byref(x), 0, 0); out.append(r); made.append(x)
pointer = alloc(50 * MIB)[0]; out.append(pointer)
say(out); input()
ok(cuda.cuCtxDestroy_v2(made[2])); ok(cuda.cuCtxDestroy_v2(made[1])); say(1); input()
"""
    )
    child = spawn(script, machine.within(files))
    assert child.stdout
    assert child.stdin
    assert child.stdout.readline().strip() == "[0, 0, 0, 2, 0]", child.stderr and child.stderr.read()
    assert files.used() == 950 * MIB
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline().strip() == "1"
    assert files.used() == 300 * MIB, "the driver frees what a context held"
    child.communicate("\n", timeout=30)


def test_nvml_is_the_slice(machine: Machine) -> None:
    files = machine.slice(2, 0, mem_limit=500 * MIB, context_bytes=100 * MIB)
    files.ctl.device[0].compute_used_milli = 125
    other = machine.slice(2, mem_limit=300 * MIB)
    neighbour = spawn(BINDINGS + "begin(); ck(cu.cuMemAlloc(200 * MIB)); say(1); input()", machine.within(other))
    assert neighbour.stdout
    assert neighbour.stdout.readline().strip() == "1", neighbour.stderr and neighbour.stderr.read()
    script = (
        BINDINGS
        + """
import pynvml as n
begin(); ck(cu.cuMemAlloc(50 * MIB)); n.nvmlInit()
h = n.nvmlDeviceGetHandleByIndex(0); m = n.nvmlDeviceGetMemoryInfo(h); m2 = n.nvmlDeviceGetMemoryInfo(h, version=n.nvmlMemory_v2)
out = {
    "uuids": [n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByIndex(i)) for i in range(n.nvmlDeviceGetCount())],
    "index": n.nvmlDeviceGetIndex(h), "memory": [m.total // MIB, m.used // MIB, m.free // MIB, m2.total // MIB, m2.used // MIB],
    "processes": [[p.pid == os.getpid(), p.usedGpuMemory // MIB] for p in n.nvmlDeviceGetComputeRunningProcesses(h)],
    "graphics": len(n.nvmlDeviceGetGraphicsRunningProcesses(h)), "gpu": n.nvmlDeviceGetUtilizationRates(h).gpu,
}
try: n.nvmlDeviceGetHandleByUUID(sys.argv[1]); out["foreign"] = "visible"
except n.NVMLError as error: out["foreign"] = str(error)
say(out)
"""
    )
    got = run(script, machine.within(files), argv=(machine.uuids[1],))
    assert got == {
        "uuids": [machine.uuids[2], machine.uuids[0]],
        "index": 0,
        "memory": [500, 150, 350, 500, 150],
        "processes": [[True, 150]],
        "graphics": 0,
        "gpu": 50,
        "foreign": "Not Found",
    }
    control = run(script, environment(None, sim_driver(), **machine.more), argv=(machine.uuids[1],))
    assert control["foreign"] == "visible"
    neighbour.communicate("\n", timeout=30)


def test_graph_memory_is_counted(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=100 * MIB)
    script = (
        BINDINGS
        + """
begin(); whole = left(); s = ck(cu.cuStreamCreate(1)); out = []
def graph(size):
    ck(cu.cuStreamBeginCapture(s, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    p = ck(cu.cuMemAllocAsync(size, s)); ck(cu.cuMemFreeAsync(p, s))
    return ck(cu.cuGraphInstantiate(ck(cu.cuStreamEndCapture(s)), 0))
small = graph(40 * MIB); out.append(left() == whole)
ck(cu.cuGraphLaunch(small, s)); ck(cu.cuStreamSynchronize(s)); out.append(whole - left() >= 40)
big = graph(120 * MIB); out.append(code(cu.cuGraphLaunch(big, s)))
ck(cu.cuDeviceGraphMemTrim(0)); out.append(left() == whole)
say(out)
"""
    )
    bare = spawn(script, machine.within(None))
    _, errors = bare.communicate(timeout=60)
    if "NOT_SUPPORTED" in errors:
        pytest.skip("the simulated driver does not run graphs that allocate")
    assert run(script, machine.within(files)) == [True, True, 2, True]


def test_graphs_in_graphs_and_uploaded_ones_are_counted(machine: Machine) -> None:
    files = machine.slice(1, mem_limit=100 * MIB)
    script = (
        BINDINGS
        + """
begin(); whole = left(); s = ck(cu.cuStreamCreate(1)); out = []
def graph(size):
    ck(cu.cuStreamBeginCapture(s, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    p = ck(cu.cuMemAllocAsync(size, s)); ck(cu.cuMemFreeAsync(p, s))
    return ck(cu.cuStreamEndCapture(s))
def around(inner):
    outer = ck(cu.cuGraphCreate(0)); made = cu.cuGraphAddChildGraphNode(outer, None, 0, inner)
    return outer if code(made) == 0 else None
small = ck(cu.cuGraphInstantiate(graph(40 * MIB), 0)); out.append(left() == whole)
out += [code(cu.cuGraphUpload(small, s)), code(cu.cuGraphLaunch(small, s))]; ck(cu.cuStreamSynchronize(s)); out.append(whole - left() >= 40)
ck(cu.cuDeviceGraphMemTrim(0)); out.append(left() == whole)
big = ck(cu.cuGraphInstantiate(graph(120 * MIB), 0)); out.append(code(cu.cuGraphUpload(big, s)))
nested = around(around(graph(120 * MIB)))
exec_ = cu.cuGraphInstantiate(nested, 0) if nested else None
out.append(code(cu.cuGraphLaunch(exec_[1], s)) if exec_ and code(exec_) == 0 else "the driver refuses")
say(out)
"""
    )
    assert run(script, machine.within(files)) == [True, 0, 0, True, True, 2, 2]
    assert run(script.replace("say(out)", "say(out[-2:])"), machine.within(None)) == [0, 0]


NUMBA = """
import json, os
import numpy as np
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError
MIB = 1 << 20
context = cuda.current_context(); out = []
free, total = context.get_memory_info(); out += [total // MIB, free == total]
held = [cuda.device_array(10 * MIB, dtype=np.uint8) for _ in range(20)]
out.append(context.get_memory_info()[0] // MIB)
for size in (10, 4000):
    try: cuda.device_array(size * MIB, dtype=np.uint8)
    except CudaAPIError as problem: out.append("OUT_OF_MEMORY" in str(problem))
    else: out.append("not refused")
held[0].copy_to_device(np.full(10 * MIB, 7, dtype=np.uint8)); out.append(int(held[0].copy_to_host().min()))
del held[1]; context.memory_manager.deallocations.clear(); out.append(context.get_memory_info()[0] // MIB)
again = cuda.to_device(np.arange(MIB)); out.append(int(again.copy_to_host()[-1]) + 1 == MIB)
print(json.dumps(out))
"""


@pytest.mark.slow
def test_numba_sees_and_keeps_the_slice(machine: Machine) -> None:
    """numba-cuda's driver layer: its ordinary exception at the limit, and the process goes on."""
    needs_numba()
    files = machine.slice(1, mem_limit=200 * MIB)
    assert run(NUMBA, machine.within(files)) == [200, True, 0, True, True, 7, 10, True]
    control = run(NUMBA, machine.within(None))
    assert control[0] == 8192
    assert control[3] == "not refused"
