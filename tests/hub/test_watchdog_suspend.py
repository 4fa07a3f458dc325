"""A watchdog with the policy `suspend`: who gets past the limiter is stopped, goes on when it may, and ends when the policy says so.

By SIGSTOP, on a driver that has no lock; `test_watchdog_lock.py` has those that have one.
"""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, until
from attack_fixtures import Tenancy, agent_with, last, metrics, missing, tenancy, tenants  # noqa: F401
from watchdog_kit import HELD, action, alive, end, ended, offend, programs, state, stopped  # noqa: F401

from nbgpu.errors import NbgpuError
from nbgpu.quantities import GIB

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]
R550 = "12040"


@pytest.fixture(scope="module")
def agent(tenants: tuple[str, str]) -> Iterator[AgentProcess]:
    with agent_with("--watchdog", "suspend", NBGPU_SIM_DRIVER_VERSION=R550) as process:
        yield process


def stays(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether something is true all the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not condition():
            return False
        time.sleep(0.05)
    return True


def test_it_is_stopped_and_stays_so_until_an_administrator_lets_it_go_on(
    agent: AgentProcess, tenancy: Make, last: int, programs: Path
) -> None:
    mallory = tenancy()
    kernel = mallory.enter()
    assert kernel.run("result = cuda() or alloc(GIB)") == 0
    pid, since = offend("static", mallory, programs)
    try:
        stopped(pid, since)
        event = until(lambda: agent.events(last, kind="suspended"), 1, "the event")[0]
        assert (event["slice_id"], event["data"]["pid"], event["data"]["for_kind"]) == (mallory.id, pid, "unlimited")
        assert f"Process {pid} was stopped" in event["message"]
        assert [one["pid"] for one in agent.client.call("GET", f"/v1/slices/{mallory.id}/suspended")] == [pid]
        until(lambda: agent.slices()[mallory.id]["memory_used_bytes"] >= HELD + GIB, 4, "what it holds is shown, though nobody tells it")
        assert f'nbgpu_slice_suspended_processes{{hub="hub-1",server="",slice_id="{mallory.id}",user="{mallory.user}"}} 1.0' in metrics(
            agent
        )
        # its own user lets it go on: not for long
        mallory.enter().run(f"os.kill({pid}, signal.SIGCONT)")
        until(lambda: state(pid) == "T", 2, "it is stopped again")
        # an agent that was killed finds it again
        agent.kill()
        agent.start("--watchdog", "suspend")
        assert stays(lambda: state(pid) == "T", 1.5)
        left = agent.client.call("POST", f"/v1/slices/{mallory.id}/resume", {"pid": pid})
        assert [(one["pid"], one["excused"]) for one in left] == [(pid, True)]
        until(lambda: state(pid) == "S", 1, "it goes on")
        assert stays(lambda: state(pid) != "T", 3), "an administrator means it: it is left alone"
        assert kernel.run("result = alloc(GIB)") == 0
        assert [event["data"]["pid"] for event in agent.events(last, kind="resumed")] == [pid]
        with pytest.raises(NbgpuError, match="is not suspended"):
            agent.client.call("POST", f"/v1/slices/{mallory.id}/resume", {"pid": pid})
    finally:
        end([pid])
    until(lambda: agent.client.call("GET", f"/v1/slices/{mallory.id}/suspended") == [], 3, "one that ended is not listed")


def test_restarting_the_kernel_ends_a_stopped_process(agent: AgentProcess, tenancy: Make) -> None:
    mallory = tenancy()
    one = mallory.enter(limited=False)
    assert one.run("result = cuda() or alloc(GIB)") == 0
    stopped(one.pid, time.monotonic())
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not alive(one.pid), 1, "its end")
    until(lambda: mallory.id not in agent.slices(), 1, "the end of the slice")


def test_a_stopped_process_that_is_told_to_end_does(agent: AgentProcess, tenancy: Make, programs: Path) -> None:
    """A kernel that is restarted sends its programs SIGTERM: one that stands still cannot answer it."""
    mallory = tenancy()
    kernel = mallory.enter()
    pid, since = offend("static", mallory, programs)
    try:
        stopped(pid, since)
        kernel.run(f"os.kill({pid}, signal.SIGUSR1)")
        assert stays(lambda: state(pid) == "T", 1.5), "control: another signal waits with it"
        kernel.run(f"os.kill({pid}, signal.SIGTERM)")
        until(lambda: not alive(pid), 3, "its end")
    finally:
        end([pid])


def test_what_stays_suspended_is_killed_after_the_grace_time(tenants: tuple[str, str], programs: Path) -> None:
    with agent_with("--watchdog", "unlimited=suspend", "--watchdog-grace", "2", NBGPU_SIM_DRIVER_VERSION=R550) as agent:
        mallory = Tenancy(agent, tenants[0])
        try:
            pid, since = offend("direct", mallory, programs)
            stopped(pid, since)
            assert stays(lambda: state(pid) == "T", 1.0), "control: not at once"
            until(lambda: not alive(pid), 4, "its end")
            assert [event["data"]["pid"] for event in agent.events(kind="killed")] == [pid]
        finally:
            mallory.close()


def test_a_slice_that_offends_again_and_again_ends_where_the_policy_says_so(tenants: tuple[str, str], programs: Path) -> None:
    with agent_with("--watchdog", "kill", "--watchdog-escalate") as agent:
        mallory, grace = Tenancy(agent, tenants[0]), Tenancy(agent, tenants[1])
        try:
            kernel, neighbour = mallory.enter(), grace.enter()
            for one in (kernel, neighbour):
                assert one.run("result = cuda() or alloc(GIB)") == 0
            for number in range(3):
                assert alive(kernel.pid), f"{number} offences are borne"
                ended(*offend("direct", mallory, programs))
            until(lambda: mallory.id not in agent.slices(), 2, "the end of the slice")
            assert not alive(kernel.pid)
            assert neighbour.run("result = alloc(GIB)") == 0
            assert action(agent, "repeated", "kill-slice") == 1
        finally:
            for one in (mallory, grace):
                one.close()
