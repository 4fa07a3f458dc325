"""The simulated driver's memory: books across processes, contents, pools, virtual memory, graphs, deaths."""

from __future__ import annotations

import os
import random
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sim_machine import CONTEXT_BYTES, Machine, finish, line, wait_for

MIB = 1 << 20


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    options: dict[str, Any] = getattr(request, "param", {})
    made = Machine(**{"memory_mib": 2048, **options})
    yield made
    made.close()


def test_what_is_written_comes_back(machine: Machine) -> None:
    machine.run(
        """
        import random
        data = random.Random(1).randbytes(3 << 20)
        p, q = cuda.alloc(len(data)), cuda.alloc(len(data))
        cuda.write(p, data); assert cuda.read(p, len(data)) == data
        cuda.call("cuMemcpyDtoD_v2", q, c.c_uint64(p.value + 512), c.c_size_t(1 << 20))
        assert cuda.read(q, 1 << 20) == data[512:512 + (1 << 20)]
        cuda.call("cuMemsetD32_v2", c.c_uint64(q.value + 8), 0x01020304, c.c_size_t(2))
        assert cuda.read(q, 20) == data[512:520] + bytes([4, 3, 2, 1] * 2) + data[528:532]
        cuda.free(p); p = cuda.alloc(len(data))
        assert cuda.lib.cuMemcpyHtoD_v2(p, data, c.c_size_t(len(data) + 1)) == 1  # beyond the block
        small = [cuda.alloc(700) for _ in range(100)]
        for i, s in enumerate(small): cuda.write(s, bytes([i]) * 700)
        for i, s in enumerate(small): assert cuda.read(s, 700) == bytes([i]) * 700
        """
    )


def test_contents_beyond_the_budget_are_an_error_that_says_so(machine: Machine) -> None:
    machine.run(
        """
        p = cuda.alloc(64 << 20)
        cuda.write(p, b"x" * (7 << 20))
        code = cuda.lib.cuMemcpyHtoD_v2(p, b"x" * (9 << 20), c.c_size_t(9 << 20))
        text = c.c_char_p(); cuda.lib.cuGetErrorString(code, c.byref(text))
        assert code == OPERATING_SYSTEM and b"NBGPU_SIM_BACKING_MIB" in text.value, (code, text.value)
        cuda.free(p); q = cuda.alloc(64 << 20); cuda.write(q, b"y" * (7 << 20))  # freed contents give their room back
        """,
        NBGPU_SIM_BACKING_MIB="8",
    )


HOLD = "p = cuda.alloc({size}); print('held', flush=True); sys.stdin.readline()"


def test_physical_memory_is_shared_by_processes(machine: Machine) -> None:
    holder = machine.start(HOLD.format(size=1000 * MIB))
    assert line(holder) == "held"
    assert machine.used() == 1000 * MIB + CONTEXT_BYTES
    refused = """
        free, total = cuda.memory()
        assert total == 2048 << 20 and free == total - ((1000 + 2 * 300) << 20), (free, total)
        try: cuda.alloc(free + 1)
        except CudaError as e: assert e.code == OUT_OF_MEMORY
        else: raise SystemExit("not refused")
        cuda.free(cuda.alloc(free)); assert cuda.memory() == (free, total)
        """
    machine.run(refused)
    finish(holder)
    wait_for(lambda: machine.used() == 0, 5, "books return to zero")


@pytest.mark.parametrize("machine", [{"memory_mib": 2048, "teardown_ms": 800}], indirect=True)
def test_killed_process_gives_its_memory_back_after_the_teardown_lag(machine: Machine) -> None:
    holder = machine.start(HOLD.format(size=500 * MIB))
    assert line(holder) == "held"
    holder.kill()
    holder.wait(10)
    assert machine.used() > 500 * MIB  # still being torn down
    wait_for(lambda: machine.used() == 0, 5, "memory of the killed process")


def test_reserved_is_more_than_used_in_a_pool_until_it_is_trimmed(machine: Machine) -> None:
    machine.run(
        """
        pool = cuda.make("cuDeviceGetDefaultMemPool", 0)
        def get(attribute):
            value = c.c_uint64(); cuda.call("cuMemPoolGetAttribute", pool, attribute, c.byref(value)); return value.value
        before, p, s = cuda.memory()[0], c.c_uint64(), cuda.make("cuStreamCreate", 0)
        cuda.call("cuMemPoolSetAttribute", pool, 4, c.byref(c.c_uint64(2**64 - 1)))
        cuda.call("cuMemAllocAsync", c.byref(p), c.c_size_t(1000), s)
        assert get(7) == 1024 and get(5) == 32 << 20, (get(7), get(5))
        assert cuda.memory()[0] == before - (32 << 20)
        cuda.write(p, b"pool"); assert cuda.read(p, 4) == b"pool"
        cuda.call("cuMemFreeAsync", p, s); cuda.call("cuStreamSynchronize", s)
        assert get(7) == 0 and get(5) == 32 << 20 and get(8) == 1024
        cuda.call("cuMemPoolTrimTo", pool, c.c_size_t(0))
        assert get(5) == 0 and cuda.memory()[0] == before
        assert cuda.lib.cuMemAllocAsync(c.byref(p), c.c_size_t(4 << 30), s) == OUT_OF_MEMORY
        """
    )


def test_graph_memory_is_held_from_launch_to_trim(machine: Machine) -> None:
    machine.run(
        """
        s, p, graph, execution = cuda.make("cuStreamCreate", 0), c.c_uint64(), c.c_void_p(), c.c_void_p()
        before = cuda.memory()[0]
        cuda.call("cuStreamBeginCapture_v2", s, 0)
        cuda.call("cuMemAllocAsync", c.byref(p), c.c_size_t(100 << 20), s)
        cuda.launch(cuda.function("spin_5ms"), s)
        cuda.call("cuMemsetD8Async", p, 7, c.c_size_t(16), s)
        cuda.call("cuMemFreeAsync", p, s)
        cuda.call("cuStreamEndCapture", s, c.byref(graph))
        count = c.c_size_t(); cuda.call("cuGraphGetNodes", graph, None, c.byref(count)); assert count.value == 4
        cuda.call("cuGraphInstantiateWithFlags", c.byref(execution), graph, c.c_ulonglong(0))
        assert cuda.memory()[0] == before
        a, b = cuda.event(), cuda.event()
        cuda.call("cuEventRecord", a, s); cuda.call("cuGraphLaunch", execution, s); cuda.call("cuEventRecord", b, s)
        cuda.call("cuStreamSynchronize", s)
        assert cuda.elapsed_ms(a, b) >= 5
        assert cuda.memory()[0] == before - (100 << 20)
        cuda.call("cuDeviceGraphMemTrim", 0); assert cuda.memory()[0] == before
        """
    )


def test_forked_capture_joins_and_an_unjoined_one_fails(machine: Machine) -> None:
    machine.run(
        """
        f, e, back = cuda.function("spin_1ms"), cuda.event(), cuda.event()
        one, two = cuda.make("cuStreamCreate", 1), cuda.make("cuStreamCreate", 1)
        def capture(join):
            graph = c.c_void_p()
            cuda.call("cuStreamBeginCapture_v2", one, 0)
            cuda.launch(f, one); cuda.call("cuEventRecord", e, one); cuda.call("cuStreamWaitEvent", two, e, 0)
            cuda.launch(f, two); cuda.launch(f, one)
            if join: cuda.call("cuEventRecord", back, two); cuda.call("cuStreamWaitEvent", one, back, 0)
            return cuda.lib.cuStreamEndCapture(one, c.byref(graph)), graph
        code, graph = capture(False); assert code == 904 and not graph.value
        code, graph = capture(True); assert code == 0
        edges = c.c_size_t(); cuda.call("cuGraphGetEdges", graph, None, None, c.byref(edges)); assert edges.value == 2
        """
    )


def test_virtual_memory_maps_one_handle_twice(machine: Machine) -> None:
    machine.run(
        """
        prop, access = (c.c_int * 8)(1, 0, 1, 0), (c.c_int * 3)(1, 0, 3)
        handle, va, size, before = c.c_uint64(), c.c_uint64(), 4 << 20, cuda.memory()[0]
        assert cuda.lib.cuMemCreate(c.byref(handle), c.c_size_t(1000), prop, c.c_ulonglong(0)) == 1  # not a multiple of 2 MiB
        cuda.call("cuMemCreate", c.byref(handle), c.c_size_t(size), prop, c.c_ulonglong(0))
        assert cuda.memory()[0] == before - size
        cuda.call("cuMemAddressReserve", c.byref(va), c.c_size_t(2 * size), c.c_size_t(0), c.c_uint64(0), c.c_ulonglong(0))
        second = c.c_uint64(va.value + size)
        for at in (va, second):
            cuda.call("cuMemMap", at, c.c_size_t(size), c.c_size_t(0), handle, c.c_ulonglong(0))
        assert cuda.lib.cuMemcpyHtoD_v2(va, b"early", c.c_size_t(5)) == 1  # no access yet
        cuda.call("cuMemSetAccess", va, c.c_size_t(2 * size), access, c.c_size_t(1))
        cuda.write(va, b"shared"); assert cuda.read(second, 6) == b"shared"
        cuda.call("cuMemRelease", handle); assert cuda.memory()[0] == before - size  # the mappings hold it
        cuda.call("cuMemUnmap", va, c.c_size_t(2 * size)); assert cuda.memory()[0] == before
        cuda.call("cuMemAddressFree", va, c.c_size_t(2 * size))
        """
    )


def test_oom_at_the_nth_allocation(machine: Machine) -> None:
    machine.run(
        """
        kept = [cuda.alloc(1000), cuda.alloc(1 << 22)]
        try: cuda.alloc(1000)
        except CudaError as e: assert e.code == OUT_OF_MEMORY
        else: raise SystemExit("not injected")
        cuda.alloc(1000)
        """,
        NBGPU_SIM_OOM_AT="3",
    )


def test_everybody_may_use_the_state_file_whatever_the_umask(machine: Machine) -> None:
    finish(machine.start_plain("import os; os.umask(0o077)\nfrom sim_client import *\nCuda()"))
    assert stat.S_IMODE(os.stat(machine.state).st_mode) == 0o666


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_two_users_share_the_machine(machine: Machine) -> None:
    holder = machine.start(HOLD.format(size=600 * MIB))
    assert line(holder) == "held"
    script = (
        "import os\nfrom sim_client import *\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "cuda = Cuda(); p = cuda.alloc(100 << 20); print(cuda.memory()[0])"
    )
    assert int(finish(machine.start_plain(script))) == 2048 * MIB - 700 * MIB - 2 * CONTEXT_BYTES
    holder.kill()
    holder.wait(10)
    wait_for(lambda: machine.used() == 0, 5, "memory of both users")


POINTS = ("sim.attach", "sim.mem_take", "sim.mem_give", "sim.channel_open", "sim.alloc", "sim.free", "sim.submit", "sim.advance")
STORM = """
import random
r, f = random.Random(int(os.environ["SEED"])), cuda.function("spin_50us")
live = []
while True:
    live.append(cuda.alloc(r.choice([1000, 1 << 20, 5 << 20, 40 << 20])))
    for _ in range(r.randrange(4)): cuda.launch(f)
    if len(live) > 5: cuda.free(live.pop(r.randrange(len(live))))
    if r.random() < 0.2: cuda.call("cuCtxSynchronize")
"""


@pytest.mark.slow
def test_kill_storm_leaves_nobody_stuck_and_the_books_at_zero(machine: Machine) -> None:
    """Processes kill themselves at marked points, under every lock there is, while one that lives must go on."""
    seed = int(os.environ.get("NBGPU_TEST_SEED", random.randrange(1 << 30)))
    rounds = int(os.environ.get("NBGPU_TEST_STORM", "16"))
    print(f"NBGPU_TEST_SEED={seed}")
    chosen, landed = random.Random(seed), Counter[str]()
    survivor = machine.start(
        """
        f, n = cuda.function("spin_100us"), 0
        print("up", flush=True)
        import select
        while not select.select([sys.stdin], [], [], 0)[0]:
            cuda.free(cuda.alloc(3 << 20)); cuda.launch(f); cuda.call("cuCtxSynchronize"); n += 1
        print(n)
        """
    )
    assert line(survivor) == "up"
    for start in range(0, rounds, 4):
        points = [POINTS[(start + i) % len(POINTS)] for i in range(4)]
        children = []
        for point in points:
            nth = 1 if point in ("sim.attach", "sim.channel_open") else chosen.randrange(2, 60)
            children.append((point, machine.start(STORM, SEED=str(chosen.random())[2:], NBGPU_FAULT=f"{point}:{nth}")))
        for point, child in children:
            child.communicate(timeout=30)
            assert child.returncode == -signal.SIGKILL, (point, child.returncode)
            landed[point] += 1
    print(dict(landed))
    assert set(landed) == set(POINTS)
    assert survivor.stdin
    survivor.stdin.write("stop\n")
    survivor.stdin.flush()
    assert int(finish(survivor)) > 10
    wait_for(lambda: machine.used() == 0, 5, "books return to zero")
    machine.run("assert cuda.memory()[0] == (2048 - 300) << 20")
