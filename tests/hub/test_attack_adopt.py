"""A hub names a process that is not its server's, when it says which one carries a slice."""

from __future__ import annotations

import contextlib
import os
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


@pytest.mark.xfail(strict=True, reason="the agent believes the pool whose process it is")
def test_a_process_of_another_slice_is_not_taken_out_of_it(agent: AgentProcess) -> None:
    ada, mallory = agent.slice(user="ada"), agent.slice(user="mallory")
    agent.put(ada)
    agent.put(mallory)
    with process_of(61234) as pid:
        agent.adopt(ada.slice_id, pid)
        with pytest.raises(NbgpuError):
            agent.adopt(mallory.slice_id, pid)


@pytest.mark.xfail(strict=True, reason="the agent believes the pool whose process it is")
def test_a_process_of_another_user_is_not_taken_in(agent: AgentProcess) -> None:
    mallory = agent.slice(user="mallory")
    agent.put(mallory, uid=61235)
    with process_of(61235) as own, process_of(61234) as other:
        agent.adopt(mallory.slice_id, own)
        with pytest.raises(NbgpuError):
            agent.adopt(mallory.slice_id, other)
