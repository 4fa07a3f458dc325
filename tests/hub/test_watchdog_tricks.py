"""Who tries to be left alone by a watchdog that acts: by its looks, by company, by its own memory. Real processes."""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from agent_harness import AgentProcess, until
from attack_fixtures import LEADER_GONE, Tenancy, agent_with, last, missing, tenancy, tenants  # noqa: F401
from watchdog_kit import alive, stopped

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
Make = Callable[..., Tenancy]

TRACED = """
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
r, w = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(w, bytes([cuda() or alloc(3 * GIB)]))
    while True:
        time.sleep(0.001)
assert os.read(r, 1) == b"\\0"
def trace():
    libc.ptrace(0x4206, pid, 0, 0)  # PTRACE_SEIZE
    while os.WIFSTOPPED(status := os.waitpid(pid, 0)[1]):
        number = os.WSTOPSIG(status)
        libc.ptrace(7, pid, 0, 0 if number in (signal.SIGSTOP, signal.SIGTRAP) else number)  # PTRACE_CONT: no stop comes through
threading.Thread(target=trace, daemon=True).start()
result = pid
"""
OLD_DRIVER = "12040"
"""Without a lock for its GPU calls a process is stopped."""


@pytest.fixture(scope="module")
def agent(tenants: tuple[str, str]) -> Iterator[AgentProcess]:
    with agent_with("--watchdog", "kill") as process:
        yield process


def test_a_process_whose_first_thread_has_ended_is_ended(agent: AgentProcess, tenancy: Make) -> None:
    """It shows as a zombie on its way out, and goes on with its other threads."""
    mallory = tenancy()
    pid = mallory.enter(limited=False).run(LEADER_GONE)
    since = time.monotonic()
    try:
        until(lambda: not os.path.exists(f"/proc/{pid}/task") or len(os.listdir(f"/proc/{pid}/task")) < 2, 6, "its end")
        print(f"ended after {time.monotonic() - since:.2f} s")
    finally:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)


def test_two_who_tell_nothing_of_what_they_hold_are_ended(agent: AgentProcess, tenancy: Make, last: int) -> None:
    """Each has less than the slice and says that it once had all of it: either could be the one that took too much."""
    mallory = tenancy()
    honest = mallory.enter()
    assert honest.run("result = cuda() or alloc(GIB)") == 0
    liars = [mallory.enter(limited=False) for _ in range(2)]
    for slot, one in enumerate(liars, 9):
        one.run(f"fd = use(); lock(fd, {slot}); forge(fd, {slot}, os.getpid(), started(os.getpid()), peak=20 * GIB)")
    for one in liars:
        assert one.run("result = cuda() or alloc(7 * GIB)") == 0
    until(lambda: not any(alive(one.pid) for one in liars), 15, "their end")
    assert alive(honest.pid)


def test_who_is_kept_from_being_stopped_is_ended(tenants: tuple[str, str]) -> None:
    with agent_with("--watchdog", "suspend", NBGPU_SIM_DRIVER_VERSION=OLD_DRIVER) as agent:
        mallory = Tenancy(agent, tenants[0])
        pid = mallory.enter(limited=False).run(TRACED)
        plain = mallory.enter(limited=False)
        assert plain.run("result = cuda() or alloc(GIB)") == 0
        until(lambda: not alive(pid), 20, "its end")
        assert "went on" in agent.events(kind="killed")[0]["message"]
        stopped(plain.pid, time.monotonic())  # control: who stays stopped lives
        assert len(agent.events(kind="killed")) == 1
        mallory.close()
