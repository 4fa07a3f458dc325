"""The watchdog suspends by the driver's checkpoint lock where it can: GPU calls wait, the process answers. On the *simulated* driver."""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from agent_harness import ROOT, AgentProcess, slice_client, until, usage
from attack_fixtures import Tenancy, agent_with, last, metrics, missing, tenancy, tenants  # noqa: F401
from attacker import Attacker
from watchdog_kit import alive, fill_and_ignore, state, stopped

from nbgpu.errors import NbgpuError

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]
KERNEL = "1a2b3c4d-5e6f"


@pytest.fixture(scope="module")
def agent(tenants: tuple[str, str]) -> Iterator[AgentProcess]:
    with agent_with("--watchdog", "suspend") as process:
        yield process


def offender(mallory: Tenancy, before: str = "0") -> Attacker:
    """Return a process of a notebook kernel that holds memory past the limiter, and then tries to get more in a thread of its own."""
    one = mallory.enter(limited=False, env={"NBGPU_KERNEL_ID": KERNEL})
    assert one.run(f"result = cuda() or alloc(GIB) or {before}") == 0
    return one


def locked(mallory: Tenancy, pid: int) -> dict[str, Any]:
    """Wait until a process is suspended by the lock; return what is told of it."""

    def found() -> list[Any]:
        told = [one.model_dump() for one in usage(mallory.launch).suspended]
        return [one for one in told if one["pid"] == pid and mallory.agent.events(kind="suspended")]

    return until(found, 4, f"process {pid} is suspended", every=0.05)[0]  # a slice's socket answers 50 requests a second


def ask_for_more(one: Attacker) -> None:
    one.run("done = []; threading.Thread(target=lambda: done.append(cuda() or alloc(1)), daemon=True).start()")


def test_its_gpu_calls_wait_and_it_answers_until_an_administrator_lets_it_go_on(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    kernel = mallory.enter()
    assert kernel.run("result = cuda() or alloc(GIB)") == 0
    since = time.monotonic()
    one = offender(mallory)
    told = locked(mallory, one.pid)
    assert time.monotonic() - since < 2.5
    assert (told["kernel_id"], told["kind"], told["how"]) == (KERNEL, "unlimited", "lock")
    assert told["reason"].startswith("it used the GPU (")
    event = until(lambda: agent.events(last, kind="suspended"), 1, "the event")[0]
    assert f"Process {one.pid} (Notebook kernel 1a2b3c4d…) was suspended: it used the GPU" in event["message"]
    assert "Its GPU calls wait." in event["message"]
    ask_for_more(one)
    time.sleep(1.5)
    assert one.run("result = done, 7") == [[], 7], "it answers, and its call to the GPU waits"
    assert state(one.pid) != "T"
    assert kernel.run("result = alloc(GIB)") == 0, "a neighbour in the slice goes on"
    # an agent that was killed knows it still
    agent.kill()
    agent.start("--watchdog", "suspend")
    assert [(e.pid, e.how) for e in usage(mallory.launch).suspended] == [(one.pid, "lock")]
    time.sleep(2)
    assert one.run("result = done") == []
    assert f'nbgpu_slice_suspended_processes{{hub="hub-1",server="",slice_id="{mallory.id}",user="{mallory.user}"}} 1.0' in metrics(agent)
    assert "running, 1 suspended" in nbgpu(agent, "status")
    assert "its GPU calls wait" in nbgpu(agent, "resume")
    assert f"Process {one.pid} goes on" in nbgpu(agent, "resume", str(one.pid))
    until(lambda: one.run("result = done") == [0], 2, "its call is answered")
    assert usage(mallory.launch).suspended == []
    ask_for_more(one)
    time.sleep(3)
    assert one.run("result = done") == [0], "an administrator means it: it is left alone"


def nbgpu(agent: AgentProcess, *arguments: str, env: dict[str, str] | None = None, status: int = 0) -> str:
    """Return what the command line says."""
    full = os.environ | {"NBGPU_RUNTIME_DIR": str(agent.runtime), "PYTHONPATH": agent.env["PYTHONPATH"]} | (env or {})
    done = subprocess.run([sys.executable, "-m", "nbgpu", *arguments], env=full, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("point", ["suspend-noted", "suspend-held"])
def test_an_agent_that_dies_over_it_knows_it_again(tenants: tuple[str, str], point: str) -> None:
    with agent_with("--watchdog", "suspend", NBGPU_MARK=f"{point}:1") as agent:
        mallory = Tenancy(agent, tenants[0])
        try:
            one = offender(mallory)
            assert agent.process is not None
            assert agent.process.wait(10) == -signal.SIGKILL, "it died at the marked point"
            del agent.env["NBGPU_MARK"]
            agent.start("--watchdog", "suspend")
            stopped(one.pid, time.monotonic())  # locked or not: nobody knows how far it came
            assert [e.pid for e in usage(mallory.launch).suspended] == [one.pid]
            agent.client.call("POST", f"/v1/slices/{mallory.id}/resume", {"pid": one.pid})
            ask_for_more(one)
            until(lambda: one.run("result = done") == [0], 3, "neither lock nor stop is left")
        finally:
            mallory.close()


def test_restarting_the_kernel_ends_a_locked_process_and_frees_its_memory(agent: AgentProcess, tenancy: Make) -> None:
    mallory = tenancy()
    one = offender(mallory)
    locked(mallory, one.pid)
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not alive(one.pid), 1, "its end")
    until(lambda: mallory.id not in agent.slices(), 1, "the end of the slice")
    used = re.compile(r'^nbgpu_device_memory_used_bytes{index="0",.*} 0.0$', re.M)
    until(lambda: used.search(metrics(agent)), 3, "its memory is free")


def test_who_lets_itself_go_on_is_stopped(agent: AgentProcess, tenancy: Make) -> None:
    mallory = tenancy()
    one = offender(mallory)
    locked(mallory, one.pid)
    assert one.run("result = libcuda.cuCheckpointProcessUnlock(os.getpid(), None)") == 0, "the driver lets one's own user"
    stopped(one.pid, time.monotonic())
    assert [e.how for e in usage(mallory.launch).suspended] == ["stop"]
    agent.client.call("POST", f"/v1/slices/{mallory.id}/resume", {"pid": None})
    until(lambda: state(one.pid) == "S", 2, "it goes on")
    assert one.run("result = alloc(1)") == 0


LONG = """
module, function = ctypes.c_void_p(), ctypes.c_void_p()
assert libcuda.cuModuleLoadData(ctypes.byref(module), b"anything") == 0
assert libcuda.cuModuleGetFunction(ctypes.byref(function), module, b"spin_20000000us") == 0
result = libcuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
"""


def test_who_cannot_be_locked_in_time_is_stopped(agent: AgentProcess, tenancy: Make) -> None:
    """Its GPU kernel goes on for 20 s: so long a lock would wait."""
    one = tenancy().enter(limited=False)
    assert one.run("result = cuda()") == 0
    assert one.run(LONG) == 0
    stopped(one.pid, time.monotonic())


def test_an_older_driver_has_no_lock(tenants: tuple[str, str]) -> None:
    with agent_with("--watchdog", "suspend", NBGPU_SIM_DRIVER_VERSION="12040") as agent:
        assert "the watchdog suspends by SIGSTOP (this driver (550.00) has no lock" in agent.log.read_text()
        mallory = Tenancy(agent, tenants[0])
        try:
            one = offender(mallory)
            stopped(one.pid, time.monotonic())
            assert [e.how for e in usage(mallory.launch).suspended] == ["stop"]
        finally:
            mallory.close()


def test_it_goes_on_when_what_it_was_suspended_for_is_over(agent: AgentProcess, tenancy: Make, last: int) -> None:
    mallory = tenancy()
    kernel, one = fill_and_ignore(mallory)
    assert locked(mallory, one.pid)["kind"] == "over-limit"
    ask_for_more(one)
    time.sleep(3)
    assert one.run("result = done") == [], "control: it is not over yet"
    kernel.close()  # its memory is free: the slice is within its limit
    began = time.monotonic()
    until(lambda: one.run("result = done") == [0], 15, "it goes on")
    assert time.monotonic() - began > 8
    assert [event["data"]["for_kind"] for event in agent.events(last, kind="resumed")] == ["over-limit"]
    assert alive(one.pid)


@pytest.mark.parametrize("allowed", [True, False])
def test_its_user_lets_it_go_on_where_the_policy_says_so(tenants: tuple[str, str], allowed: bool) -> None:
    with agent_with("--watchdog", "suspend", *(["--watchdog-owner-resumes"] if allowed else [])) as agent:
        mallory, grace = Tenancy(agent, tenants[0]), Tenancy(agent, tenants[1])
        try:
            one, other = offender(mallory), offender(grace)
            locked(mallory, one.pid)
            locked(grace, other.pid)
            assert usage(mallory.launch).may_resume is allowed
            own = slice_client(mallory.launch)
            with pytest.raises(NbgpuError, match="is not suspended" if allowed else "Only an administrator"):
                own.call("POST", "/v1/resume", {"pid": other.pid})
            inside = {"NBGPU_SOCKET": mallory.launch.socket}
            said = nbgpu(agent, "resume", str(one.pid), env=inside, status=0 if allowed else 1)
            assert f"Process {one.pid} goes on" in said if allowed else "Only an administrator" in said
            ask_for_more(one)
            time.sleep(2)
            assert one.run("result = done") == ([0] if allowed else [])
            assert [e.pid for e in usage(grace.launch).suspended] == [other.pid], "another's is not"
            for body in ({"pid": -1}, {"pid": "x"}, {"pids": 1}, []):
                with pytest.raises(NbgpuError) as caught:
                    own.call("POST", "/v1/resume", body)
                assert caught.value.status == (400 if allowed else 403), json.dumps(body)
        finally:
            mallory.close()
            grace.close()
