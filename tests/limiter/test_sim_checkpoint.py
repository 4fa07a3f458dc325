"""The simulated driver's checkpoint calls: what they lock, what they give back, what comes back, and who dies on the way."""

from __future__ import annotations

import ast
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from subprocess import Popen, TimeoutExpired
from typing import Any

import pytest
from limiter_kit import environment, limiter, sim_driver
from limiter_slice import SliceFiles
from sim_machine import CONTEXT_BYTES, HERE, Machine, finish, line, wait_for

MIB = 1 << 20
RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM, ILLEGAL_STATE, NOT_READY = 1, 2, 3, 304, 401, 600
NOT_PERMITTED, NOT_SUPPORTED, UNKNOWN = 800, 801, 999

ROUND = ("Lock", "Checkpoint", "Restore", "Unlock")
CALLER = """
import ctypes as c, sys, time
lib = c.CDLL("libcuda.so.1")
def do(what, pid, *more):
    start = time.monotonic()
    code = getattr(lib, "cuCheckpoint" + what)(pid, *more)
    print(code, round((time.monotonic() - start) * 1000), flush=True)
for text in sys.stdin:
    what, pid, *more = text.split()
    if what == "GetState":
        state = c.c_int(-1)
        code = lib.cuCheckpointProcessGetState(int(pid), c.byref(state))
        print(code, state.value, flush=True)
    elif what == "Lock":
        do("ProcessLock", int(pid), (c.c_uint * 16)(int(more[0]) if more else 0))
    else:
        do("Process" + what, int(pid), None)
"""
# One thread only asks, one allocates, one launches; all count. What is written is asked back at the end.
BUSY = """
import random, threading
data = random.Random(7).randbytes(3 << 20)
held = cuda.alloc(100 << 20); cuda.write(held, data)
event, stream = cuda.event(), cuda.make("cuStreamCreate", 1)
cuda.call("cuEventRecord", event, stream)
counts, stop = [0, 0, 0], []
def loop(index, step):
    cuda.call("cuCtxSetCurrent", cuda.context)
    while not stop:
        step(); counts[index] += 1; time.sleep(0.001)
f = cuda.function("spin_1ms")
def launch(): cuda.launch(f, stream); cuda.call("cuStreamSynchronize", stream)
steps = [lambda: cuda.memory(), lambda: cuda.free(cuda.alloc(3 << 20)), launch]
threads = [threading.Thread(target=loop, args=(i, step)) for i, step in enumerate(steps)]
for t in threads: t.start()
print("up", flush=True)
for text in sys.stdin:
    if text.strip() == "end": break
    print(*counts, flush=True)
stop.append(1)
for t in threads: t.join()
assert cuda.read(held, len(data)) == data
cuda.launch(f, stream); cuda.call("cuEventSynchronize", event); cuda.call("cuStreamSynchronize", stream)
cuda.free(held)
print("whole")
"""


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    options: dict[str, Any] = getattr(request, "param", {})
    made = Machine(**{"memory_mib": 2048, **options})
    yield made
    made.close()


def say(process: Popen[str], text: str) -> str:
    assert process.stdin
    process.stdin.write(text + "\n")
    process.stdin.flush()
    return line(process)


class Caller:
    """A process that asks for checkpoints of others, as an agent does: it has no context and never calls cuInit."""

    def __init__(self, machine: Machine, **env: str) -> None:
        self.process = machine.start_plain(CALLER, **env)

    def do(self, what: str, pid: int, *more: int) -> int:
        return int(say(self.process, " ".join([what, str(pid), *map(str, more)])).split()[0])

    def took_ms(self, what: str, pid: int) -> int:
        code, ms = say(self.process, f"{what} {pid}").split()
        assert code == "0"
        return int(ms)

    def state(self, pid: int) -> int:
        code, state = say(self.process, f"GetState {pid}").split()
        assert code == "0"
        return int(state)


def counts(process: Popen[str]) -> list[int]:
    return [int(word) for word in say(process, "counts").split()]


def busy(machine: Machine, **env: str) -> Popen[str]:
    process = machine.start(BUSY, **env)
    assert line(process) == "up"
    return process


def ends_whole(process: Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("end\n")
    process.stdin.flush()
    assert finish(process) == "whole\n"


def moves(process: Popen[str], seconds: float) -> list[bool]:
    """Which of its threads made a step in that time."""
    before = counts(process)
    time.sleep(seconds)
    return [b > a for a, b in zip(before, counts(process), strict=True)]


def goes_on(process: Popen[str]) -> None:
    """Each of its threads makes a step."""
    before = counts(process)
    wait_for(lambda: all(b > a for a, b in zip(before, counts(process), strict=True)), 10, "a step of every thread")


def processes(machine: Machine) -> dict[int, int]:
    """Bytes by pid, as NVML has them."""
    script = """
import ctypes as c
class P(c.Structure): _fields_ = [("pid", c.c_uint), ("used", c.c_ulonglong), ("gi", c.c_uint), ("ci", c.c_uint)]
n = c.CDLL("libnvidia-ml.so.1"); n.nvmlInit_v2(); h = c.c_void_p(); count = c.c_uint(64); out = (P * 64)()
assert n.nvmlDeviceGetHandleByIndex_v2(0, c.byref(h)) == 0
assert n.nvmlDeviceGetComputeRunningProcesses_v3(h, c.byref(count), out) == 0
print({out[i].pid: out[i].used for i in range(count.value)})
"""
    found: dict[int, int] = ast.literal_eval(finish(machine.start_plain(script)))
    return found


def test_a_locked_process_makes_no_call_and_goes_on_when_unlocked(machine: Machine) -> None:
    target, caller = busy(machine), Caller(machine)
    pid = target.pid
    assert caller.state(pid) == RUNNING
    goes_on(target)  # the control
    assert caller.do("Lock", pid) == 0
    assert caller.state(pid) == LOCKED
    assert moves(target, 0.3) == [False] * 3  # not even those that only ask
    assert caller.do("Unlock", pid) == 0
    assert caller.state(pid) == RUNNING
    goes_on(target)
    ends_whole(target)


def test_a_checkpoint_gives_the_memory_to_others_and_restore_brings_all_back(machine: Machine) -> None:
    target, caller = busy(machine), Caller(machine)
    pid = target.pid
    assert caller.do("Lock", pid) == 0
    held = CONTEXT_BYTES + 100 * MIB
    assert processes(machine)[pid] == held
    assert caller.do("Checkpoint", pid) == 0
    assert caller.state(pid) == CHECKPOINTED
    assert machine.used() == 0
    assert processes(machine) == {}
    assert moves(target, 0.3) == [False] * 3
    machine.run("cuda.alloc((2048 - 300) << 20)")  # all of the GPU is another's
    wait_for(lambda: machine.used() == 0, 5, "the other one's end")
    assert caller.do("Restore", pid) == 0
    assert caller.state(pid) == LOCKED
    assert processes(machine) == {pid: held}
    assert moves(target, 0.2) == [False] * 3
    assert caller.do("Unlock", pid) == 0
    goes_on(target)
    ends_whole(target)


def test_pools_graphs_virtual_memory_and_streams_live_through_a_checkpoint(machine: Machine) -> None:
    target = machine.start(
        """
        import hashlib
        s, f = cuda.make("cuStreamCreate", 1), cuda.function("spin_2ms")
        graph, execution, pooled, va, handle = c.c_void_p(), c.c_void_p(), c.c_uint64(), c.c_uint64(), c.c_uint64()
        cuda.call("cuStreamBeginCapture_v2", s, 0); cuda.launch(f, s); cuda.call("cuStreamEndCapture", s, c.byref(graph))
        cuda.call("cuGraphInstantiateWithFlags", c.byref(execution), graph, c.c_ulonglong(0))
        cuda.call("cuMemAllocAsync", c.byref(pooled), c.c_size_t(5 << 20), s)
        prop, access, size = (c.c_int * 8)(1, 0, 1, 0), (c.c_int * 3)(1, 0, 3), 4 << 20
        cuda.call("cuMemCreate", c.byref(handle), c.c_size_t(size), prop, c.c_ulonglong(0))
        cuda.call("cuMemAddressReserve", c.byref(va), c.c_size_t(size), c.c_size_t(0), c.c_uint64(0), c.c_ulonglong(0))
        cuda.call("cuMemMap", va, c.c_size_t(size), c.c_size_t(0), handle, c.c_ulonglong(0))
        cuda.call("cuMemSetAccess", va, c.c_size_t(size), access, c.c_size_t(1))
        small = [cuda.alloc(700) for _ in range(50)]
        places = [(p, 600) for p in small] + [(pooled, 5 << 20), (va, size)]
        for i, (p, n) in enumerate(places): cuda.write(p, os.urandom(n))
        def digest(): return hashlib.sha256(b"".join(cuda.read(p, n) for p, n in places)).hexdigest()
        before, seen = cuda.event(), digest()
        cuda.call("cuEventRecord", before, s)
        done = []
        fn = c.CFUNCTYPE(None, c.c_void_p)(lambda _: done.append(1))
        cuda.launch(f, s); cuda.call("cuLaunchHostFunc", s, fn, None)
        print("up", flush=True); sys.stdin.readline()
        assert done == [1]
        assert digest() == seen
        after = cuda.event()
        cuda.call("cuGraphLaunch", execution, s); cuda.call("cuEventRecord", after, s); cuda.call("cuStreamSynchronize", s)
        assert cuda.elapsed_ms(before, after) > 4
        for p in small: cuda.free(p)
        cuda.call("cuMemFreeAsync", pooled, s); cuda.call("cuStreamSynchronize", s)
        cuda.call("cuMemUnmap", va, c.c_size_t(size)); cuda.call("cuMemRelease", handle)
        print(cuda.memory()[0])
        """
    )
    assert line(target) == "up"
    caller = Caller(machine)
    for what in ("Lock", "Checkpoint", "Restore", "Unlock"):
        assert caller.do(what, target.pid) == 0, what
    assert int(finish(target)) == 2048 * MIB - CONTEXT_BYTES


def test_restore_without_room_leaves_it_checkpointed_until_there_is_room(machine: Machine) -> None:
    target, caller = busy(machine), Caller(machine)
    pid = target.pid
    assert [caller.do(what, pid) for what in ("Lock", "Checkpoint")] == [0, 0]
    other = machine.start("p = cuda.alloc(1700 << 20); print('held', flush=True); sys.stdin.readline()")
    assert line(other) == "held"
    assert caller.do("Restore", pid) == OUT_OF_MEMORY
    assert caller.state(pid) == CHECKPOINTED
    assert machine.used() == 1700 * MIB + CONTEXT_BYTES
    finish(other)
    wait_for(lambda: machine.used() == 0, 5, "the other one's end")
    assert [caller.do(what, pid) for what in ("Restore", "Unlock")] == [0, 0]
    ends_whole(target)


@pytest.mark.parametrize("machine", [{"restore_oom_fatal": 1}], indirect=True)
def test_r580_never_restores_what_once_found_no_room(machine: Machine) -> None:
    target, caller = busy(machine), Caller(machine)
    pid = target.pid
    assert [caller.do(what, pid) for what in ("Lock", "Checkpoint")] == [0, 0]
    other = machine.start("p = cuda.alloc(1700 << 20); print('held', flush=True); sys.stdin.readline()")
    assert line(other) == "held"
    assert caller.do("Restore", pid) == OUT_OF_MEMORY
    finish(other)
    wait_for(lambda: machine.used() == 0, 5, "the other one's end")
    assert caller.do("Restore", pid) == OPERATING_SYSTEM
    assert caller.do("Unlock", pid) == ILLEGAL_STATE


@pytest.mark.parametrize("machine", [{"memory_mib": 2048, "time_scale": 100}], indirect=True)
def test_copying_takes_what_25_gb_a_second_take(machine: Machine) -> None:
    target = machine.start("p = cuda.alloc(256 << 20); print('up', flush=True); sys.stdin.readline()")
    assert line(target) == "up"
    caller = Caller(machine)
    want = 256 * MIB / 25e9 * 1000 * 100  # ms, 100 times slower than the device
    assert caller.took_ms("Lock", target.pid) < want / 2
    for what in ("Checkpoint", "Restore"):
        assert want <= caller.took_ms(what, target.pid) < 2 * want
    assert caller.took_ms("Unlock", target.pid) < want / 2
    finish(target)


def test_lock_waits_for_what_runs_and_gives_up_at_its_timeout(machine: Machine) -> None:
    target = machine.start(
        """
        f = cuda.function("spin_400ms"); cuda.call("cuCtxSynchronize")
        print("up", flush=True)
        for text in sys.stdin:
            if text.strip() == "launch": cuda.launch(f); print("launched", flush=True)
            else: cuda.memory(); print("asked", flush=True)
        """
    )
    assert line(target) == "up"
    caller = Caller(machine)
    assert say(target, "launch") == "launched"
    assert caller.do("Lock", target.pid, 100) == NOT_READY
    assert caller.state(target.pid) == RUNNING
    assert say(target, "ask") == "asked"
    assert caller.took_ms("Lock", target.pid) > 50
    assert caller.state(target.pid) == LOCKED


def test_only_the_documented_order_is_allowed(machine: Machine) -> None:
    target, caller = busy(machine), Caller(machine)
    allowed = {RUNNING: ("Lock",), LOCKED: ("Checkpoint", "Unlock"), CHECKPOINTED: ("Restore",)}
    for what in ("Lock", "Checkpoint", "Restore", "Checkpoint", "Restore", "Unlock", "Lock", "Unlock"):
        state = caller.state(target.pid)
        refused = {other: caller.do(other, target.pid) for other in ROUND if other not in allowed[state]}
        assert set(refused.values()) == {ILLEGAL_STATE}, (state, refused)
        assert caller.do(what, target.pid) == 0
    ends_whole(target)
    assert caller.do("Lock", os.getpid()) == NOT_INITIALIZED
    assert caller.do("Lock", 0) == INVALID_VALUE


def test_arguments_that_are_not_understood_are_refused(machine: Machine) -> None:
    machine.run(
        """
        lib, pid = cuda.lib, os.getpid()
        assert lib.cuCheckpointProcessLock(pid, (c.c_uint * 16)(0, 1)) == 1
        assert lib.cuCheckpointProcessUnlock(pid, (c.c_uint * 16)(*[0] * 15, 1)) == 1
        assert lib.cuCheckpointProcessGetState(pid, None) == 1
        cuda.call("cuCheckpointProcessLock", pid, None)
        assert lib.cuCheckpointProcessCheckpoint(pid, (c.c_uint64 * 8)(8)) == 801   # to storage of one's own
        assert lib.cuCheckpointProcessCheckpoint(pid, (c.c_uint64 * 8)(0, 1)) == 1
        cuda.call("cuCheckpointProcessCheckpoint", pid, None)
        tid = c.c_int(); cuda.call("cuCheckpointProcessGetRestoreThreadId", pid, c.byref(tid)); assert tid.value == pid
        cuda.call("cuCheckpointProcessRestore", pid, (c.c_uint64 * 8)())
        cuda.call("cuCheckpointProcessUnlock", pid, None)
        uuid, other = (c.c_char * 16)(), (c.c_char * 16)()
        cuda.call("cuDeviceGetUuid_v2", uuid, 0); cuda.call("cuDeviceGetUuid_v2", other, 1)
        for old, new, code in ((uuid, uuid, 0), (other, uuid, 1), (uuid, other, 801)):
            cuda.call("cuCheckpointProcessLock", pid, None); cuda.call("cuCheckpointProcessCheckpoint", pid, None)
            pair = c.create_string_buffer(old.raw + new.raw, 32)
            assert lib.cuCheckpointProcessRestore(pid, (c.c_uint64 * 8)(c.addressof(pair), 1)) == code
            if code: cuda.call("cuCheckpointProcessRestore", pid, None)
            cuda.call("cuCheckpointProcessUnlock", pid, None)
        assert cuda.lib.cuCheckpointOperationComplete(None) == 1
        cuda.free(cuda.alloc(1 << 20))
        """
    )


def test_a_process_checkpoints_itself_and_what_explains_errors_is_never_locked(machine: Machine) -> None:
    machine.run(
        """
        pid, p, n = os.getpid(), cuda.alloc(10 << 20), c.c_int()
        cuda.write(p, b"kept")
        cuda.call("cuCheckpointProcessLock", pid, None); cuda.call("cuCheckpointProcessCheckpoint", pid, None)
        text = c.c_char_p(); cuda.call("cuGetErrorString", 401, c.byref(text)); assert text.value
        cuda.call("cuDriverGetVersion", c.byref(n)); assert n.value == 13000
        cuda.call("cuCheckpointProcessRestore", pid, None); cuda.call("cuCheckpointProcessUnlock", pid, None)
        assert cuda.read(p, 4) == b"kept"
        """
    )


def test_managed_memory_cannot_be_checkpointed_and_no_more_once_it_is_freed(machine: Machine) -> None:
    target = machine.start(
        """
        p = c.c_uint64(); cuda.call("cuMemAllocManaged", c.byref(p), c.c_size_t(1 << 20), 1)
        print("up", flush=True); sys.stdin.readline()
        cuda.free(p); print("freed", flush=True); sys.stdin.readline()
        """
    )
    assert line(target) == "up"
    caller = Caller(machine)
    assert caller.do("Lock", target.pid) == 0
    assert caller.do("Checkpoint", target.pid) == NOT_SUPPORTED
    assert caller.state(target.pid) == LOCKED
    assert caller.do("Unlock", target.pid) == 0
    assert say(target, "") == "freed"
    for what in ("Lock", "Checkpoint", "Restore", "Unlock"):
        assert caller.do(what, target.pid) == 0, what
    finish(target)


def test_memory_that_is_handed_out_cannot_be_checkpointed(machine: Machine) -> None:
    target = machine.start(
        """
        p, name = cuda.alloc(2 << 20), (c.c_ubyte * 64)()
        cuda.call("cuIpcGetMemHandle", name, p)
        print("up", flush=True); sys.stdin.readline()
        """
    )
    assert line(target) == "up"
    caller = Caller(machine)
    assert caller.do("Lock", target.pid) == 0
    assert caller.do("Checkpoint", target.pid) == NOT_SUPPORTED
    assert caller.do("Unlock", target.pid) == 0
    finish(target)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_users_process_is_nobodys_but_roots(machine: Machine) -> None:
    target = busy(machine)
    become = "import ctypes, os\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    other, root = machine.start_plain(become + CALLER), Caller(machine)
    for what in ROUND:
        assert int(say(other, f"{what} {target.pid}").split()[0]) == NOT_PERMITTED
    assert root.do("Lock", target.pid) == 0
    assert root.do("Unlock", target.pid) == 0
    ends_whole(target)


def test_those_who_ask_at_once_take_turns(machine: Machine) -> None:
    """Each answer is one that the order of operations allows, and the process is whole at the end."""
    ask = """
import ctypes as c, random, sys
lib, pid, answers = c.CDLL("libcuda.so.1"), int(sys.stdin.readline()), set()
for _ in range(300):
    what = random.choice(["Lock", "Checkpoint", "Restore", "Unlock"])
    answers.add(getattr(lib, "cuCheckpointProcess" + what)(pid, None))
print(*sorted(answers))
"""
    target, caller = busy(machine), Caller(machine)
    askers = [machine.start_plain(ask) for _ in range(3)]
    for asker in askers:
        assert asker.communicate(f"{target.pid}\n", timeout=60)[0].split() == ["0", str(ILLEGAL_STATE)]
    bring_to_run(caller, target.pid)
    goes_on(target)
    ends_whole(target)
    wait_for(lambda: machine.used() == 0, 5, "books return to zero")


def test_the_limiter_passes_them_on_and_is_locked_with_its_process(make_slice: Callable[..., SliceFiles], machine: Machine) -> None:
    script = "import ctypes as c\nb = (c.c_ubyte * 16)()\ncuda.call('cuDeviceGetUuid_v2', b, 0)\nprint(bytes(b).hex())"
    h = machine.run(script).strip()
    files = make_slice(mem_limit=1024 * MIB, uuids=(f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}",))
    target = busy(machine, **environment(files, sim_driver(), preload=limiter(), NBGPU_SIM_STATE=str(machine.state), PYTHONPATH=str(HERE)))
    caller, pid = Caller(machine), target.pid
    assert [caller.do(what, pid) for what in ("Lock", "Checkpoint")] == [0, 0]
    assert moves(target, 0.3) == [False] * 3
    assert machine.used() == 0
    assert sum(slot.used for slot in files.slots()) >= 100 * MIB  # nobody tells the limiter: it counts as before
    assert [caller.do(what, pid) for what in ("Restore", "Unlock")] == [0, 0]
    goes_on(target)
    ends_whole(target)


def test_cuda_core_unmodified(machine: Machine) -> None:
    pytest.importorskip("cuda.core.checkpoint")
    target = busy(machine)
    script = f"""
from cuda.core import checkpoint
process = checkpoint.Process({target.pid})
def state(): return str(getattr(process.state, "value", process.state))
seen = [state()]
for step in (lambda: process.lock(timeout_ms=5000), process.checkpoint, process.restore, process.unlock): step(); seen.append(state())
print(*seen, process.restore_thread_id)
"""
    expected = ["running", "locked", "checkpointed", "locked", "running", str(target.pid)]
    assert finish(machine.start_plain(script)).split() == expected
    ends_whole(target)


def test_a_failed_process_has_failed_for_good(machine: Machine) -> None:
    target = machine.start("print('up', flush=True); sys.stdin.readline(); print(cuda.lib.cuCtxSynchronize())")
    assert line(target) == "up"
    caller = Caller(machine, NBGPU_SIM_CHECKPOINT_FAULT="checkpoint")
    assert caller.do("Lock", target.pid) == 0
    assert caller.do("Checkpoint", target.pid) == UNKNOWN
    assert caller.state(target.pid) == FAILED
    assert caller.do("Unlock", target.pid) == ILLEGAL_STATE
    assert say(target, "") == str(UNKNOWN)


# Marked points of who asks, each with the most passes that one round makes, and of the process itself.
ASKING = {
    "sim.checkpoint_state": 6,
    "sim.checkpoint_wait": 1,
    "sim.checkpoint_saved": 1,
    "sim.checkpoint_give": 2,
    "sim.mem_take": 1,
    "sim.restore_take": 2,
}
TRIES = 50
ASKED = {"sim.call": 40, "sim.call_blocked": 2}
ONE_ROUND = """
import ctypes as c, sys
lib = c.CDLL("libcuda.so.1")
for what in {round!r}: assert getattr(lib, "cuCheckpointProcess" + what)(int(sys.stdin.readline()), None) == 0, what
"""


def one_round(machine: Machine, pid: int, **env: str) -> Popen[str]:
    process = machine.start_plain(ONE_ROUND.format(round=ROUND), **env)
    assert process.stdin
    process.stdin.write(f"{pid}\n" * len(ROUND))
    process.stdin.flush()
    return process


def dies_at(machine: Machine, pid: int, point: str, nth: int) -> bool:
    """One round by a process that is to die on its way; only where there was nothing to wait for does it never come by."""
    code = one_round(machine, pid, NBGPU_FAULT=f"{point}:{nth}").wait(30)
    assert code == -signal.SIGKILL or (code == 0 and point == "sim.checkpoint_wait"), (point, nth, code)
    return code != 0


def bring_to_run(caller: Caller, pid: int) -> int:
    """What a new agent does with a process that it finds in any state; the state that it was."""
    found = caller.state(pid)
    if found == CHECKPOINTED:
        assert caller.do("Restore", pid) == 0
    if found in (CHECKPOINTED, LOCKED):
        assert caller.do("Unlock", pid) == 0
    return found


@pytest.mark.slow
def test_who_asks_dies_anywhere_and_the_process_lives_on(machine: Machine) -> None:
    seed = int(os.environ.get("NBGPU_TEST_SEED", random.randrange(1 << 30)))
    print(f"NBGPU_TEST_SEED={seed}")
    dice, landed, found = random.Random(seed), Counter[str](), Counter[int]()
    target, caller = busy(machine), Caller(machine)
    pid = target.pid
    storm = int(os.environ.get("NBGPU_TEST_STORM", "1"))
    for point, most in storm * list(ASKING.items()):
        for nth in range(1, most + 1):
            assert any(dies_at(machine, pid, point, nth) for _ in range(TRIES)), (point, nth)
            landed[point] += 1
            if dice.random() < 0.5:  # a look from outside, which must not be needed
                assert machine.used() in (0, CONTEXT_BYTES + 100 * MIB, CONTEXT_BYTES + 103 * MIB, CONTEXT_BYTES + 104 * MIB)
            found[bring_to_run(caller, pid)] += 1
            goes_on(target)
            assert processes(machine)[pid] >= CONTEXT_BYTES + 100 * MIB, (point, nth)
    print(dict(landed), "found", dict(found))
    assert set(landed) == set(ASKING)
    assert set(found) == {RUNNING, LOCKED, CHECKPOINTED}
    ends_whole(target)
    wait_for(lambda: machine.used() == 0, 5, "books return to zero")


@pytest.mark.slow
def test_the_process_dies_anywhere_and_nothing_is_held(machine: Machine) -> None:
    landed = Counter[str]()
    stages = [ROUND[:n] for n in range(len(ROUND) + 1)]
    for stage in stages:
        for death in ("kill", *ASKED):
            env = {} if death == "kill" else {"NBGPU_FAULT": f"{death}:{ASKED[death]}"}
            target = machine.start(BUSY, **env)
            caller = Caller(machine)
            line_or_death(target)
            for what in stage:
                caller.do(what, target.pid)
            if death == "kill" or not stage:
                target.kill()
            try:
                target.wait(3)
                landed[f"{death} after {stage[-1] if stage else 'nothing'}"] += 1
            except TimeoutExpired:
                target.kill()  # a locked one makes no call
                target.wait(10)
            wait_for(lambda: machine.used() == 0, 5, f"what it held, killed at {death} after {stage}")
            assert caller.do("Lock", target.pid) == NOT_INITIALIZED
    print(dict(landed))
    assert sum(landed.values()) > len(stages)


def line_or_death(process: Popen[str]) -> None:
    assert process.stdout
    process.stdout.readline()


@pytest.mark.slow
def test_the_process_dies_in_the_middle_of_its_checkpoint(machine: Machine) -> None:
    slow = Machine(memory_mib=2048, time_scale=100)
    try:
        for what in ("Checkpoint", "Restore"):
            target = slow.start("p = cuda.alloc(512 << 20); print('up', flush=True); sys.stdin.readline()")
            assert line(target) == "up"
            caller = Caller(slow)
            for before in ROUND[: ROUND.index(what)]:
                assert caller.do(before, target.pid) == 0
            assert caller.process.stdin
            caller.process.stdin.write(f"{what} {target.pid}\n")  # takes 2 s
            caller.process.stdin.flush()
            time.sleep(0.3)
            target.kill()
            line(caller.process)
            target.wait(10)
            wait_for(lambda: slow.used() == 0, 1, f"what it held, killed in {what}")
    finally:
        slow.close()
    assert machine.used() == 0


@pytest.mark.slow
def test_control_with_nobody_to_finish_what_the_dead_began() -> None:
    machine = Machine(memory_mib=2048)
    machine.env["LD_LIBRARY_PATH"] = str(sim_driver("NBGPU_CONTROL_UNFINISHED"))
    try:
        target = busy(machine)
        child = one_round(machine, target.pid, NBGPU_FAULT="sim.checkpoint_state:1")
        assert child.wait(30) == -signal.SIGKILL
        assert moves(target, 0.5) == [False] * 3
    finally:
        machine.close()
