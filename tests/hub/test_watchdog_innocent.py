"""With the policy `kill` for everything nobody is ended in ordinary life.

Each test lives it for some seconds, then shows that the watchdog is awake.
"""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, usage
from attack_fixtures import Tenancy, agent_with, last, missing, tenancy, tenants  # noqa: F401
from watchdog_kit import alive, ended

from nbgpu.quantities import GIB

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]
LIFE_SECONDS = 6
POLICY = ("--watchdog", "kill", "--watchdog-escalate")
SHORT = """
# A program of its own: a context, some memory, and the end that `how` says
import ctypes, os, sys, time
how = sys.argv[1]
c = ctypes.CDLL("libcuda.so.1")
d, x, p = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
failed = c.cuInit(0) or c.cuDeviceGet(ctypes.byref(d), 0) or c.cuDevicePrimaryCtxRetain(ctypes.byref(x), d) or c.cuCtxSetCurrent(x)
failed = failed or c.cuMemAlloc_v2(ctypes.byref(p), ctypes.c_size_t(512 << 20))
if how == "exec":
    os.execv(sys.executable, [sys.executable, "-c", os.environ["SHORT"], "fork"])
if how == "fork":
    child = os.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", os.environ["SHORT"], "exit"])
    failed = failed or os.waitpid(child, 0)[1]
if how == "hang":
    time.sleep(60)
os._exit(failed and 1) if how == "abrupt" else sys.exit(failed and 1)
"""
CHURN = """
# Blocks of many sizes come and go as fast as they can; what does not fit is refused
def churn(most, seconds):
    import random
    blocks, end = [], time.monotonic() + seconds
    pointer = ctypes.c_uint64()
    done = refused = 0
    while time.monotonic() < end:
        size = random.choice([3 << 10, 1 << 20, 64 << 20, 512 << 20, most // 2, most])
        if libcuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0:
            blocks.append(pointer.value)
        else:
            refused += 1
        while len(blocks) > random.randrange(12):
            libcuda.cuMemFree_v2(ctypes.c_uint64(blocks.pop(random.randrange(len(blocks)))))
        done += 1
    return done, refused
def later(most, seconds):
    global worker, answer
    def work():
        global answer
        libcuda.cuCtxSetCurrent(context)
        answer = churn(most, seconds)
    context = ctypes.c_void_p()
    libcuda.cuCtxGetCurrent(ctypes.byref(context))
    worker = threading.Thread(target=work)
    worker.start()
"""


@pytest.fixture(scope="module")
def agent(tenants: tuple[str, str]) -> Iterator[AgentProcess]:
    with agent_with(*POLICY, NBGPU_SIM_TEARDOWN_MS="500") as process:
        yield process


@pytest.fixture
def innocent(agent: AgentProcess, tenancy: Make, last: int) -> Iterator[None]:
    """Nobody has been ended by the test's end, and who then gets past the limiter is."""
    yield
    told = agent.events(last)
    assert [event["message"] for event in told if event["kind"] in ("killed", "suspended", "not-permitted")] == []
    assert {event["kind"] for event in told} <= {"refused", "limit-changed", "ended", "over-limit"}, "nor told of as one who got past"
    offender = tenancy(milli=25).enter(limited=False)
    assert offender.run("result = cuda() or alloc(GIB)") == 0
    ended(offender.pid, time.monotonic())


def test_programs_that_start_and_stop_at_once_fork_exec_and_die(innocent: None, tenancy: Make) -> None:
    shells = [tenancy().enter(env={"SHORT": SHORT}) for _ in range(2)]
    for shell in shells:
        shell.run(
            f"""
            import random
            codes = {{}}
            def live():
                end = time.monotonic() + {LIFE_SECONDS}
                while time.monotonic() < end:
                    how = random.choice(["exit", "abrupt", "fork", "exec", "hang"])
                    child = subprocess.Popen([sys.executable, "-c", os.environ["SHORT"], how])
                    if how == "hang":
                        time.sleep(random.uniform(0, 1.5))
                        child.kill()
                    codes.setdefault(how, set()).add(child.wait())
            workers = [threading.Thread(target=live) for _ in range(2)]
            [worker.start() for worker in workers]
            """
        )
    for shell in shells:
        codes = shell.run("[worker.join() for worker in workers]; result = {how: sorted(found) for how, found in codes.items()}")
        assert codes.pop("hang", [-9]) == [-9]
        assert all(found == [0] for found in codes.values()), codes


def test_processes_that_die_in_the_middle_of_an_allocation(innocent: None, tenancy: Make) -> None:
    shell = tenancy().enter(env={"SHORT": SHORT})
    kernel = shell
    assert kernel.run("result = cuda() or alloc(GIB)") == 0
    codes = shell.run(
        f"""
        result, end = [], time.monotonic() + {LIFE_SECONDS}
        while time.monotonic() < end:
            for point in ("sim.mem_take:1", "sim.mem_take:2", "sim.alloc:1", "sim.attach:1", "sim.channel_open:1"):
                env = dict(os.environ, NBGPU_FAULT=point)
                result.append(subprocess.run([sys.executable, "-c", os.environ["SHORT"], "exit"], env=env).returncode)
        """
    )
    assert set(codes) == {-9}
    assert kernel.run("result = alloc(GIB)") == 0


def test_a_full_slice_whose_kernels_take_and_free_as_fast_as_they_can(innocent: None, tenancy: Make) -> None:
    mallory = tenancy()
    kernels = [mallory.enter() for _ in range(3)]
    for kernel in kernels:
        kernel.run(CHURN)
        assert kernel.run("result = cuda()") == 0
    for kernel in kernels:
        kernel.run(f"later(4 * GIB, {LIFE_SECONDS})")
    for kernel in kernels:
        done, refused = kernel.run("worker.join(); result = answer")
        print(f"{done} allocations, {refused} refused")
        assert done > 100
        assert refused


def test_many_contexts_fill_a_slice(innocent: None, tenancy: Make) -> None:
    mallory = tenancy(milli=25)
    kernels = [mallory.enter() for _ in range(8)]
    codes = [kernel.run("result = cuda() or alloc(200 << 20)") for kernel in kernels]
    assert {0, 2} == set(codes), "some find no room"
    time.sleep(LIFE_SECONDS / 2)
    assert all(alive(kernel.pid) for kernel in kernels)


def test_agents_that_are_killed_and_start_again_under_running_kernels(agent: AgentProcess, innocent: None, tenancy: Make) -> None:
    mallory = tenancy()
    kernels = [mallory.enter() for _ in range(2)]
    for kernel in kernels:
        kernel.run(CHURN)
        assert kernel.run("result = cuda() or alloc(GIB)") == 0
    for kernel in kernels:
        kernel.run(f"later(3 * GIB, {3 * LIFE_SECONDS})")
    time.sleep(1)
    for _ in range(2):
        agent.kill()
        agent.start(*POLICY)
        fresh = mallory.enter()
        assert fresh.run("result = cuda() or alloc(64 << 20)") in (0, 2)
        time.sleep(2)
        assert alive(fresh.pid)
    assert all(kernel.run("worker.join(); result = answer[0]") > 100 for kernel in kernels)


def test_a_limit_that_is_lowered_under_what_is_held(agent: AgentProcess, innocent: None, tenancy: Make) -> None:
    mallory = tenancy()
    kernels = [mallory.enter() for _ in range(2)]
    for kernel in kernels:
        assert kernel.run("result = cuda() or alloc(4 * GIB)") == 0
    for now in (4 * GIB, 2 * GIB, 8 * GIB, 3 * GIB):
        agent.client.call("PATCH", f"/v1/slices/{mallory.id}", {"memory_bytes": now})
        time.sleep(2)
    agent.kill()
    agent.start(*POLICY)
    time.sleep(2.5)
    assert usage(mallory.launch).devices[0].memory_used_bytes > 8 * GIB
    assert all(alive(kernel.pid) for kernel in kernels)


def test_an_agent_that_finds_the_slots_file_gone(agent: AgentProcess, tenancy: Make, last: int) -> None:
    """The kernels write on into a file that nobody sees any more: as far as the new agent can tell none of them is limited."""
    mallory = tenancy()
    kernel, shell = mallory.enter(), mallory.enter(limited=False)
    assert kernel.run("result = cuda() or alloc(4 * GIB)") == 0
    agent.kill()
    use = Path(mallory.launch.slice_dir) / "use"
    subprocess.run(["umount", "-l", str(use)], check=False, capture_output=True)
    use.unlink()
    for _ in range(2):
        agent.start(*POLICY)
        time.sleep(2.5)
        agent.kill()
    agent.start(*POLICY)
    time.sleep(2.5)
    assert kernel.run("result = alloc(GIB)") == 0
    assert agent.events(last, kind="unlimited"), "it is told of"
    assert agent.events(last, kind="killed") == []
    since = time.monotonic()
    later = shell.run("result = os.fork()\nif result == 0:\n    cuda() or alloc(GIB)\n    time.sleep(60)")
    ended(later, since + 0.5)  # control: one that started since is ended
    shell.run("os.wait()")


def test_eight_slices_on_a_device_at_once(innocent: None, tenancy: Make, tenants: tuple[str, str]) -> None:
    kernels = [tenancy(tenants[number % 2], milli=120, mode="strict" if number % 3 == 0 else "burst").enter() for number in range(8)]
    for kernel in kernels:
        kernel.run(CHURN)
        assert kernel.run(f"result = cuda()\nlater(8 * GIB, {LIFE_SECONDS})") == 0
    assert all(kernel.run("worker.join(); result = answer[0]") > 20 for kernel in kernels)
