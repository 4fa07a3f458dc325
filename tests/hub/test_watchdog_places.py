"""The watchdog acts where there are no cgroups, and where the agent is not root: on what is its own. Real processes."""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, until
from attack_fixtures import missing
from attacker import Attacker
from test_agent_cgroups import NOBODY, HereAgent, UsersAgent, cgroup_of
from watchdog_kit import HELD, alive, end, ended, programs, start  # noqa: F401

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@contextlib.contextmanager
def running(kind: str) -> Iterator[tuple[AgentProcess, str, Attacker]]:
    """An agent with the policy `kill`, and a slice with a shell in it of the user that the agent is."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        if kind == "user":
            os.chown(name, NOBODY, NOBODY)
        agent = UsersAgent(Path(name), devices=1) if kind == "user" else HereAgent(Path(name), kind)
        shell = None
        try:
            agent.start("--watchdog", "kill")
            wanted = agent.slice(125)
            shell = Attacker(agent.put(wanted), "nobody" if kind == "user" else None)
            agent.adopt(wanted.slice_id, shell.pid)
            yield agent, wanted.slice_id, shell
        finally:
            if shell is not None:
                shell.close()
            agent.close()


@pytest.mark.parametrize("kind", ["none", "user"])
def test_without_a_cgroup_the_offender_among_the_descendants_is_ended(kind: str, programs: Path) -> None:
    with running(kind) as (agent, slice_id, shell):
        assert "nbgpu" not in cgroup_of(shell.pid, "v1"), "no cgroup was made"
        assert shell.run("result = cuda() or alloc(GIB)") == 0
        pid, since = start(shell, [f"{programs}/static", "cuda", str(HELD)])
        ended(pid, since)
        assert [(e["slice_id"], e["data"]["pid"]) for e in agent.events(kind="killed")] == [(slice_id, pid)]
        assert shell.run("result = alloc(GIB)") == 0


def test_whom_an_agent_that_is_not_root_may_not_end_is_told_of(programs: Path) -> None:
    with running("user") as (agent, slice_id, shell):
        pid, _ = start(shell, [f"{programs}/setuid", "cuda", str(HELD)])
        try:
            event = until(lambda: agent.events(kind="not-permitted"), 4, "the event")[0]
            assert (event["slice_id"], event["data"]["pid"]) == (slice_id, pid)
            assert "Run it as root" in event["message"]
            assert alive(pid)
            assert agent.events(kind="killed") == []
        finally:
            end([pid])


def test_a_program_says_which_notebook_it_is_of_and_is_believed_only_for_its_name(programs: Path) -> None:
    with running("none") as (agent, _, shell):
        for kernel, known in (("1a2b3c4d-5e6f", "1a2b3c4d-5e6f"), ("x\\nlevel=error <b>", None)):
            shell.run(f"os.environ['NBGPU_KERNEL_ID'] = {kernel!r}")
            pid, since = start(shell, [f"{programs}/static", "cuda", str(HELD)])
            ended(pid, since)
            event = until(lambda pid=pid: [e for e in agent.events(kind="killed") if e["data"]["pid"] == pid], 1)[0]
            assert event["kernel_id"] == known
            assert (f"Process {pid} (Notebook kernel 1a2b3c4d…) was ended" in event["message"]) == (known is not None)
            assert "<b>" not in event["message"]
