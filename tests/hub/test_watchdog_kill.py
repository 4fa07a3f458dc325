"""A watchdog with the policy `kill` ends exactly the process that gets past the limiter; with `event` it ends nobody. Real processes."""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, until, usage
from attack_fixtures import Tenancy, agent_with, last, metrics, missing, tenancy, tenants  # noqa: F401
from watchdog_kit import HELD, WAYS, action, alive, end, ended, fill_and_ignore, of_slice, offend, programs, start  # noqa: F401

from nbgpu.quantities import GIB

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]


@pytest.fixture(scope="module")
def agent(tenants: tuple[str, str]) -> Iterator[AgentProcess]:
    with agent_with("--watchdog", "kill") as process:
        yield process


@pytest.mark.parametrize("way", WAYS)
def test_who_gets_past_the_limiter_is_ended_and_nobody_else(
    agent: AgentProcess, tenancy: Make, tenants: tuple[str, str], last: int, programs: Path, way: str
) -> None:
    mallory, grace = tenancy(), tenancy(tenants[1])
    kernel, neighbour = mallory.enter(), grace.enter()
    for one in (kernel, neighbour):
        assert one.run("result = cuda() or alloc(5 * GIB)") == 0
    before = action(agent, WAYS[way], "kill")
    pid, since = offend(way, mallory, programs)
    ended(pid, since)
    event = until(lambda: of_slice(agent.events(last, kind="killed"), mallory.id), 1, "the event")[0]
    assert (event["data"]["pid"], event["data"]["for_kind"], event["level"]) == (pid, WAYS[way], "error")
    assert action(agent, WAYS[way], "kill") == before + 1
    # its memory is free, and the others go on
    until(lambda: kernel.run("result = alloc(GIB)") == 0, 1, "room in the slice")
    assert neighbour.run("result = alloc(GIB)") == 0
    time.sleep(1.0)
    assert usage(mallory.launch).devices[0].memory_used_bytes < 6.5 * GIB
    assert alive(kernel.pid)
    assert alive(neighbour.pid)
    assert of_slice(agent.events(last), grace.id) == []
    assert len(agent.events(last, kind="killed")) == 1


def test_opening_the_driver_by_its_path_gets_nobody_past(agent: AgentProcess, tenancy: Make, last: int, programs: Path) -> None:
    mallory = tenancy()
    library = str(Path(mallory.launch.env["LD_LIBRARY_PATH"].split(":")[0]) / "libcuda.so.1")
    pid, _ = start(mallory.enter(), [f"{programs}/plain", "dlsym", str(HELD), library])
    assert usage(mallory.launch).devices[0].memory_used_bytes > HELD, "it is counted"
    with pytest.raises(AssertionError, match="failed 2"):
        start(mallory.enter(), [f"{programs}/plain", "dlsym", str(30 * GIB), library])
    time.sleep(2.5)
    assert alive(pid)
    assert agent.events(last, kind="killed") == []
    end([pid])


def test_control_with_the_policy_event_all_of_them_live(tenants: tuple[str, str], programs: Path) -> None:
    with agent_with("--watchdog", "event") as agent:
        mallory = Tenancy(agent, tenants[0])
        pids: dict[str, int] = {}
        try:
            for way in WAYS:
                pids[way] = offend(way, mallory, programs, GIB)[0]
            unlimited = {pids[way] for way in WAYS if WAYS[way] == "unlimited"}
            until(lambda: {event["data"]["pid"] for event in agent.events(kind="unlimited")} >= unlimited, 5, "all are told")
            time.sleep(2)
            assert [way for way, pid in pids.items() if not alive(pid)] == []
            assert agent.events(kind="killed") == []
            assert "nbgpu_watchdog_actions_total{" not in metrics(agent)
        finally:
            mallory.close()
            end(pids.values())


def test_a_process_of_no_slice_is_never_touched(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    stranger = mallory.enter(limited=False, adopt=False)
    assert stranger.run("result = cuda() or alloc(20 * GIB)") == 0
    until(lambda: agent.events(last, kind="foreign"), 3, "it is told")
    time.sleep(2)
    assert stranger.run("result = alloc(GIB)") == 0
    assert agent.events(last, kind="killed") == []


def test_who_ignores_a_full_slice_is_ended_not_who_filled_it(agent: AgentProcess, tenancy: Make, last: int) -> None:
    """It tells the truth about itself, so nothing is hidden: the slice is over its limit, and one has grown alone."""
    mallory = tenancy()
    kernel, one = fill_and_ignore(mallory)
    ended(one.pid, time.monotonic())
    event = until(lambda: agent.events(last, kind="killed"), 1, "the event")[0]
    assert (event["data"]["pid"], event["data"]["for_kind"]) == (one.pid, "over-limit")
    assert kernel.run("result = alloc(GIB)") == 0


def test_who_forks_away_is_found_again_each_time(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    kernel, one = mallory.enter(), mallory.enter(limited=False)
    assert kernel.run("result = cuda() or alloc(GIB)") == 0
    time.sleep(0.3)
    one.run(
        """
        def hold():
            os.setsid()
            cuda() or alloc(GIB)
            time.sleep(60)
        if os.fork() == 0:
            for _ in range(4):  # a parent that uses no GPU itself starts another as soon as one is ended
                child = os.fork()
                if child == 0:
                    hold()
                os.waitpid(child, 0)
            os._exit(0)
        """
    )
    until(lambda: len(agent.events(last, kind="killed")) == 4, 12, "four are ended")
    pids = [event["data"]["pid"] for event in agent.events(last, kind="killed")]
    assert len(set(pids)) == 4
    assert one.pid not in pids
    assert kernel.run("result = alloc(GIB)") == 0


def test_wiping_anothers_slot_ends_nobody(agent: AgentProcess, tenancy: Make, last: int) -> None:
    """Processes of a slice may write each other's slots: what a process once told is not forgotten for that."""
    mallory = tenancy()
    kernel, one = mallory.enter(), mallory.enter(limited=False)
    assert kernel.run("result = cuda() or alloc(5 * GIB)") == 0
    time.sleep(1.5)
    one.run("os.pwrite(use(), bytes(F['slot_bytes']), F['slot'])")
    time.sleep(2.5)
    assert alive(kernel.pid)
    assert agent.events(last, kind="unlimited"), "control: it looks like one without the limiter"
    assert agent.events(last, kind="killed") == []


SPIN = """
module, function = ctypes.c_void_p(), ctypes.c_void_p()
assert libcuda.cuModuleLoadData(ctypes.byref(module), b"simulated") == 0
assert libcuda.cuModuleGetFunction(ctypes.byref(function), module, b"spin_1000us") == 0
def spin():
    libcuda.cuCtxSetCurrent(context)
    while True:
        for _ in range(20):
            libcuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
        libcuda.cuCtxSynchronize()
context = ctypes.c_void_p()
libcuda.cuCtxGetCurrent(ctypes.byref(context))
threading.Thread(target=spin, daemon=True).start()
"""


def test_who_computes_past_a_strict_share_is_ended_not_who_waits_for_its_turns(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy(mode="strict")
    kernel = mallory.enter()
    assert kernel.run("result = cuda() or alloc(GIB)") == 0
    kernel.run(SPIN)
    one = mallory.enter(limited=False)
    one.run("fd = use(); lock(fd, 9); forge(fd, 9, os.getpid(), started(os.getpid()), used=2 * GIB, peak=2 * GIB)")
    assert one.run("result = cuda() or alloc(GIB)") == 0
    time.sleep(2.5)
    assert agent.events(last, kind="killed") == [], "control: its memory is as it says"
    one.run(SPIN)
    until(lambda: not alive(one.pid), 10, "its end", every=0.05)
    event = until(lambda: agent.events(last, kind="killed"), 1, "the event")[0]
    assert (event["data"]["pid"], event["data"]["for_kind"]) == (one.pid, "over-share")
    time.sleep(7)
    assert alive(kernel.pid)
    assert len(agent.events(last, kind="killed")) == 1
