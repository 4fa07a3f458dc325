"""A hub names a process that is not its server's, when it says which one carries a slice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from agent_harness import AgentProcess, missing_libraries, own_agent

from nbgpu.errors import NbgpuError

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries())),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: two users of their own"),
]


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with own_agent() as found:
        yield found


@contextlib.contextmanager
def process_of(uid: int) -> Iterator[int]:
    found = subprocess.Popen(["sleep", "60"], user=uid, cwd="/")
    yield found.pid
    found.kill()
    found.wait()


def test_a_process_of_another_slice_is_not_taken_out_of_it(agent: AgentProcess) -> None:
    ada, mallory = agent.slice(user="ada"), agent.slice(user="mallory")
    agent.put(ada, uid=61234)
    agent.put(mallory, uid=61234)
    with process_of(61234) as pid:
        agent.adopt(ada.slice_id, pid)
        with pytest.raises(NbgpuError, match="belongs to another slice"):
            agent.adopt(mallory.slice_id, pid)


def test_a_process_of_another_user_is_not_taken_in(agent: AgentProcess) -> None:
    mallory = agent.slice(user="mallory")
    agent.put(mallory, uid=61235)
    with process_of(61235) as own, process_of(61234) as other:
        agent.adopt(mallory.slice_id, own)
        with pytest.raises(NbgpuError, match="runs as user 61234, and the slice was prepared for user 61235"):
            agent.adopt(mallory.slice_id, other)


def test_a_child_of_another_slices_server_is_not_taken_out_of_it(agent: AgentProcess) -> None:
    ada, mallory = agent.slice(user="ada"), agent.slice(user="mallory")
    agent.put(ada, uid=61234)
    agent.put(mallory, uid=61234)
    server = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], user=61234, cwd="/", stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    child = int(server.stdout.readline())
    try:
        agent.adopt(ada.slice_id, server.pid)
        with pytest.raises(NbgpuError, match="belongs to another slice"):
            agent.adopt(mallory.slice_id, child)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_what_started_the_agent_or_a_server_is_not_taken_in(agent: AgentProcess) -> None:
    """With it all that it has started would be the slice's: the agent, and every server of the hub."""
    ada, mallory = agent.slice(user="ada"), agent.slice(user="mallory")
    agent.put(ada, uid=61234)
    agent.put(mallory)
    hub = subprocess.Popen(
        ["python3", "-c", "import subprocess as s; print(s.Popen(['sleep', '60'], user=61234).pid, flush=True); input()"],
        cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert hub.stdout is not None
    server = int(hub.stdout.readline())
    try:
        agent.adopt(ada.slice_id, server)
        for pid in (hub.pid, os.getpid(), 1):
            with pytest.raises(NbgpuError, match="has started the agent, or a server that belongs to another slice"):
                agent.adopt(mallory.slice_id, pid)
    finally:
        hub.kill()
        hub.wait()
        os.kill(server, signal.SIGKILL)
