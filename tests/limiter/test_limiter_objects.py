"""What takes or keeps device memory besides allocations: multicast and external memory, green contexts, heaps, code, graphs' nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import environment, limiter, run, sim_driver
from limiter_slice import MIB, SliceFiles, wait_until
from shared_kit import SharedMachine, shared_machine
from test_limiter_gate import beating, set_gate

from nbgpu_agent import layout
from nbgpu_agent.watchdog import SlotSeen, overheads

Make = Callable[..., SliceFiles]


@pytest.fixture
def machine(make_slice: Make, tmp_path: Path) -> Iterator[SharedMachine]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    with shared_machine(make_slice, base / f"nbgpu-test-objects-{os.getpid()}") as made:
        yield made


MULTICAST = """
def create(mib):
    h = c.c_uint64(); return cuda.cuMemCreate(c.byref(h), c.c_size_t(mib * MIB), (c.c_int * 8)(1, 0, 1, 0), c.c_ulonglong(0)), h
def left(): return info()[0] // MIB
mc, zero, size, out = c.c_uint64(), c.c_size_t(0), c.c_size_t(64 * MIB), []
ok(cuda.cuMulticastCreate(c.byref(mc), (c.c_uint64 * 4)(1, 64 * MIB, 0, 0))); ok(cuda.cuMulticastAddDevice(mc, 0)); out.append(left())
h = create(64)[1]; ok(cuda.cuMulticastBindMem(mc, zero, h, zero, size, c.c_ulonglong(0))); ok(cuda.cuMemRelease(h)); out.append(left())
out.append(create(64)[0])                                   # what is bound is still there
ok(cuda.cuMulticastUnbind(mc, 0, zero, size)); out.append(left())
h = create(64)[1]; at = c.c_uint64()
ok(cuda.cuMemAddressReserve(c.byref(at), size, zero, c.c_uint64(0), c.c_ulonglong(0)))
ok(cuda.cuMemMap(at, size, zero, h, c.c_ulonglong(0)))
ok(cuda.cuMulticastBindAddr(mc, zero, at, size, c.c_ulonglong(0)))
ok(cuda.cuMemUnmap(at, size)); ok(cuda.cuMemRelease(h)); out.append(left())
ok(cuda.cuMemMap(at, size, zero, mc, c.c_ulonglong(0))); ok(cuda.cuMemRelease(mc)); out.append(left())
ok(cuda.cuMemUnmap(at, size)); out.append(left())           # the object is gone, and with it what was bound
result = out
"""


def test_what_is_bound_to_a_multicast_object_stays_counted(machine: SharedMachine) -> None:
    files = machine.slice(100 * MIB)
    assert machine.start(files).ask("do", MULTICAST) == [100, 36, 2, 100, 36, 36, 100]
    assert machine.start(None).ask("do", MULTICAST)[2] == 0, "the control: without the limiter it is not refused"
    assert wait_until(lambda: machine.physical() == 64)  # of the control's second piece


EXTERNAL = """
class Handle_(c.Structure):
    _fields_ = [("type", c.c_int), ("fd", c.c_int), ("more", c.c_int * 4), ("size", c.c_ulonglong), ("rest", c.c_uint * 17)]
class Buffer(c.Structure): _fields_ = [("at", c.c_ulonglong), ("size", c.c_ulonglong), ("rest", c.c_uint * 17)]
def left(): return info()[0] // MIB
def bring():
    memory, d = c.c_void_p(), Handle_(type=1, size={size} * MIB)
    c.cast(c.byref(d, 8), c.POINTER(c.c_int))[0] = os.open("/proc/{pid}/fd/{fd}", os.O_RDWR)
    return cuda.cuImportExternalMemory(c.byref(memory), c.byref(d)), memory
out = [left()]
code, memory = bring(); out += [code, left()]
again, more = bring(); out += [again, left()]               # the same file: the same memory
p = c.c_uint64(); ok(cuda.cuExternalMemoryGetMappedBuffer(c.byref(p), memory, c.byref(Buffer(0, {size} * MIB)))); out.append(left())
out.append(read(p.value, 5)); ok(cuda.cuDestroyExternalMemory(memory)); ok(cuda.cuDestroyExternalMemory(more)); out.append(left())
ok(cuda.cuMemFree_v2(p)); out.append(left())
result = out
"""


def test_external_memory_counts_until_its_last_mapping_is_gone(machine: SharedMachine) -> None:
    """What a graphics interface made counts for who imports it (here that of a process without the limiter)."""
    files = machine.slice(100 * MIB)
    _, (pid, fd, _) = machine.start(None).ask("make", "descriptor", 64)
    script = EXTERNAL.replace("{pid}", str(pid)).replace("{fd}", str(fd)).replace("{size}", "64")
    assert machine.start(files).ask("do", script) == [100, 0, 36, 0, 36, 36, "hello", 36, 100]
    small = machine.slice(50 * MIB)
    refused = script.split("again,")[0] + "\nresult = out"
    assert machine.start(small).ask("do", refused) == [50, 2, 50]
    assert machine.start(None).ask("do", refused)[1] == 0, "the control"


GREEN = """
import time
ok(cuda.cuInit(0)); resource = c.create_string_buffer(256); desc, green, stream, context = (c.c_void_p() for _ in range(4))
ok(cuda.cuDeviceGetDevResource(0, resource, 1)); ok(cuda.cuDevResourceGenerateDesc(c.byref(desc), resource, 1))
made = cuda.cuGreenCtxCreate(c.byref(green), desc, 0, 1); say(made)
if made == 0:
    ok(cuda.cuCtxFromGreenCtx(c.byref(context), green)); ok(cuda.cuCtxSetCurrent(context))
    ok(cuda.cuGreenCtxStreamCreate(c.byref(stream), green, 1, 0))
    module, function = c.c_void_p(), c.c_void_p(); ok(cuda.cuModuleLoadData(c.byref(module), b"any"))
    ok(cuda.cuModuleGetFunction(c.byref(function), module, b"spin_10us"))
    for line in sys.stdin:
        if line == "launch\\n": ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, None, None)); say("launched")
        if line == "alloc\\n": say(alloc(64 * MIB)[0])
        if line == "end\\n": ok(cuda.cuGreenCtxDestroy(green)); say("ended")
"""


def test_a_green_context_costs_what_its_context_does_and_waits(machine: SharedMachine) -> None:
    from test_limiter_copies import Child

    files = machine.slice(100 * MIB, context_bytes=30 * MIB)
    with beating(files):
        child = Child(environment(files, sim_driver(), preload=limiter(), **machine.more), GREEN)
        assert child.answer() == "0"
        assert files.used() == 30 * MIB
        child.tell("alloc")
        assert child.answer() == "0"
        child.tell("alloc")
        assert child.answer() == "2"
        set_gate(files, layout.GATE_CLOSED)
        child.tell("launch")
        assert wait_until(lambda: files.use.want[0] == 1)
        assert child.answers.empty()
        set_gate(files, layout.GATE_OPEN, 1)
        assert child.answer() == '"launched"'
        child.tell("end")
        assert child.answer() == '"ended"'
        assert files.used() == 0, "and with the context what was allocated in it"
        child.process.kill()
        child.process.communicate()
    small = machine.slice(20 * MIB, context_bytes=30 * MIB)
    assert run(GREEN, environment(small, sim_driver(), preload=limiter(), **machine.more)) == 2
    assert run(GREEN, environment(None, sim_driver(), **machine.more), stdin="") == 0, "the control"


HEAP = """
def left(): return info()[0] // MIB
def heap(mib, which=2): return cuda.cuCtxSetLimit(which, c.c_size_t(mib * MIB))
out = [left(), heap(48), left(), heap(28), left(), heap(200), left(), heap(17, 1), left()]
context = c.c_void_p(); ok(cuda.cuCtxCreate_v2(c.byref(context), 0, 0)); out += [heap(28), left()]
ok(cuda.cuCtxDestroy_v2(context)); start(); out.append(left())
result = out
"""


def test_heaps_on_the_device_count(machine: SharedMachine) -> None:
    files = machine.slice(100 * MIB)
    assert machine.start(files).ask("do", HEAP) == [100, 0, 60, 0, 60, 2, 60, 0, 50, 0, 30, 50]
    assert machine.start(None).ask("do", HEAP)[5] == 0, "the control"


NVML = "import pynvml as n\nn.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0)\n"
CODE = """
text = (".version 8.0\\n.target sm_90\\n.address_size 64\\n.visible .global .align 4 .b8 big[20971520];\\n"
        ".visible .entry f()\\n{ ret; }\\n// " + "x" * (30 << 20)).encode()
module = c.c_void_p()
"""
WAYS = {
    "module": CODE + "ok(cuda.cuModuleLoadData(c.byref(module), text)); result = 0",
    "library": CODE
    + "ok(cuda.cuLibraryLoadData(c.byref(module), text, None, None, 0, None, None, 0)); p, n = c.c_uint64(), c.c_size_t()\n"
    + "ok(cuda.cuLibraryGetGlobal(c.byref(p), c.byref(n), module, b'big')); result = 0",
    "stack": "result = cuda.cuCtxSetLimit(0, c.c_size_t(1024 + 200))",
}


@pytest.mark.parametrize("way", WAYS)
def test_code_and_stacks_are_measured_as_overhead(machine: SharedMachine, way: str) -> None:
    """They pass the limiter; what the agent measures by NVML beyond the slot's own count is the slice's."""
    pytest.importorskip("pynvml")
    files = machine.slice(300 * MIB)
    child = machine.start(files)
    assert child.ask("alloc", 10) == 0
    child.ask("do", WAYS[way])
    (slot,) = files.slots()
    told = run(
        NVML + "say({p.pid: p.usedGpuMemory for p in n.nvmlDeviceGetComputeRunningProcesses(h)})",
        environment(None, sim_driver(), **machine.more),
    )
    nvml = {int(pid): size for pid, size in told.items()}
    seen = SlotSeen(0, child.process.pid, slot.used, slot.context, False)
    granted, measured = overheads([seen], nvml, 512 * MIB)[0]
    assert granted == measured
    assert 50 * MIB <= measured <= 54 * MIB
    before = child.ask("left")
    files.ctl.overhead[0] = granted
    assert before - child.ask("left") == measured // MIB
    assert child.ask("alloc", before - 10) == 2


NODES = """
def left(): return info()[0] // MIB
class Params(c.Structure):
    _fields_ = [("pool", c.c_int * 4), ("security", c.c_void_p), ("most", c.c_size_t), ("usage", c.c_ushort), ("reserved", c.c_ubyte * 54),
                ("access", c.c_void_p), ("accesses", c.c_size_t), ("bytes", c.c_size_t), ("pointer", c.c_uint64)]
stream = c.c_void_p(); ok(cuda.cuStreamCreate(c.byref(stream), 1))
def graph(mib):
    g, node, end, e = (c.c_void_p() for _ in range(4)); ok(cuda.cuGraphCreate(c.byref(g), 0))
    p = Params(pool=(1, 0, 1, 0), bytes=mib * MIB); ok(cuda.cuGraphAddMemAllocNode(c.byref(node), g, None, c.c_size_t(0), c.byref(p)))
    ok(cuda.cuGraphAddMemFreeNode(c.byref(end), g, c.byref(node), c.c_size_t(1), c.c_uint64(p.pointer)))
    ok(cuda.cuGraphInstantiateWithFlags(c.byref(e), g, c.c_ulonglong(0))); return e
out = [left(), cuda.cuGraphLaunch_ptsz(graph(64), stream)]; ok(cuda.cuStreamSynchronize(stream)); out.append(left())
out.append(cuda.cuGraphLaunch_ptsz(graph(128), stream)); ok(cuda.cuDeviceGraphMemTrim(0)); out.append(left())
result = out
"""
PER_THREAD = """
def left(): return info()[0] // MIB
p, out = c.c_uint64(), [left()]
out += [cuda.cuMemAllocAsync_ptsz(c.byref(p), c.c_size_t(64 * MIB), None), left()]
out.append(cuda.cuMemAllocAsync_ptsz(c.byref(c.c_uint64()), c.c_size_t(64 * MIB), None))
ok(cuda.cuMemFreeAsync_ptsz(p, None)); ok(cuda.cuStreamSynchronize_ptsz(None)); out.append(left())
out += [cuda.cuMemAllocAsync(c.byref(p), c.c_size_t(64 * MIB), c.c_void_p(2)), left()]
result = out
"""


def test_nodes_that_allocate_count_when_they_are_launched(machine: SharedMachine) -> None:
    assert machine.start(machine.slice(100 * MIB)).ask("do", NODES) == [100, 0, 36, 2, 100]
    assert machine.start(None).ask("do", NODES)[3] == 0, "the control"


def test_per_thread_default_streams_count_alike(machine: SharedMachine) -> None:
    assert machine.start(machine.slice(100 * MIB)).ask("do", PER_THREAD) == [100, 0, 36, 2, 100, 0, 36]
    assert machine.start(None).ask("do", PER_THREAD)[3] == 0, "the control"


def test_a_makers_context_that_ends_covers_nothing_any_more(machine: SharedMachine) -> None:
    files = machine.slice(100 * MIB)
    maker, opener = machine.start(files), machine.start(files)
    _, name = maker.ask("make", "ipc", 64)
    assert opener.ask("open", "ipc", name) == 0
    maker.ask("do", "result = cuda.cuDevicePrimaryCtxReset_v2(0)")
    assert machine.physical() == 64
    assert opener.ask("left") == 36
    opener.ask("close", True)
    assert opener.ask("left") == 100
