"""Which processes are a slice's: with cgroups v1, v2, without any, and by an agent that is not root. Real processes, real cgroups.

A hierarchy of version 2 is mounted in a mount namespace of the agent's own: enough for membership, whatever the host has.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentProcess, missing_libraries, until

from nbgpu_agent import procs

NOBODY = pwd.getpwnam("nobody").pw_uid
AS_NOBODY = [
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
]  # fmt: skip
"""Nobody, who may read everything: a checkout and its Python may lie in somebody's home. Nothing else is root's about it."""
BASE = "/sys/fs/cgroup"
HAS_V1 = any(Path(BASE, name, "cgroup.procs").exists() for name in ("freezer", "pids"))
MOUNTS = {"v1": "true", "v2": f"mount -t tmpfs none {BASE} && mount -t cgroup2 none {BASE}", "none": f"mount -t tmpfs none {BASE}"}
"""What is mounted for an agent, in its own mount namespace, before it starts."""
# It starts a daemon the moment it is told to and ends at once: nobody has time to see who descends from whom.
DAEMON = """
import os, sys
sys.stdin.readline()
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
        os.close(1)
        os.execvp("sleep", ["sleep", "60"])
    os._exit(0)
os.wait()
print(os.read(read, 20).decode(), flush=True)
"""
CHILD = """
import subprocess, sys
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.readline()
child.kill()
"""
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes cgroups and mount namespaces"),
    pytest.mark.skipif(bool(missing_libraries()), reason=str(missing_libraries())),
]


class HereAgent(AgentProcess):
    """An agent with the hierarchy of `kind`."""

    def __init__(self, runtime: Path, kind: str):
        super().__init__(runtime, devices=1)
        self.kind = kind

    def command(self, *more: str) -> list[str]:
        """Return its command line, in a mount namespace of its own."""
        return ["unshare", "--mount", "sh", "-c", f'{MOUNTS[self.kind]} && exec "$@"', "agent", *super().command(*more)]


class UsersAgent(AgentProcess):
    """An agent of an ordinary user."""

    def command(self, *more: str) -> list[str]:
        """Return its command line."""
        return [*AS_NOBODY, *super().command(*more)]


@contextlib.contextmanager
def running(kind: str) -> Iterator[AgentProcess]:
    """An agent in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        if kind == "user":
            os.chown(name, NOBODY, NOBODY)
        agent = UsersAgent(Path(name), devices=1) if kind == "user" else HereAgent(Path(name), kind)
        try:
            yield agent.start()
        finally:
            agent.close()


@contextlib.contextmanager
def tenant(agent: AgentProcess, program: str, become: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A slice with a process in it."""
    slice_id = agent.put(wanted := agent.slice(250)) and wanted.slice_id
    process = subprocess.Popen([*become, sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
    try:
        agent.adopt(slice_id, process.pid)
        yield slice_id, process
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate("\n", 5)
        process.kill()
        process.communicate()


def cgroup_of(pid: int, kind: str) -> str:
    """Return the cgroup that a process is in, as the host has it."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        if (kind == "v2" and number == "0") or (kind == "v1" and "freezer" in names.split(",")):
            return path
    return ""


def daemonise(process: subprocess.Popen[str]) -> int:
    """Tell the tenant to leave a daemon behind and end; return the daemon's pid."""
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    daemon = int(process.stdout.readline())
    process.wait(10)
    return daemon


@pytest.mark.parametrize("kind", [pytest.param("v1", marks=pytest.mark.skipif(not HAS_V1, reason="this machine has no cgroup v1")), "v2"])
def test_in_a_cgroup_a_daemon_stays_in_its_slice(kind: str) -> None:
    with running(kind) as agent, tenant(agent, DAEMON) as (slice_id, process):
        until(lambda: cgroup_of(process.pid, kind).endswith(f"/nbgpu-{slice_id}"), 5, "the tenant is in the slice's cgroup")
        daemon = daemonise(process)
        try:
            assert cgroup_of(daemon, kind).endswith(f"/nbgpu-{slice_id}")
            until(lambda: agent.slices()[slice_id]["process_count"] == 1, 3, "the daemon alone is left")
            assert not agent.delete(slice_id)
            assert stays(agent, slice_id, 1.5)
        finally:
            os.kill(daemon, 9)
        until(lambda: slice_id not in agent.slices(), 3, "the slice ends with the daemon")
        until(lambda: not left(slice_id, kind), 3, "no cgroup is left")


def test_control_without_a_cgroup_such_a_daemon_is_lost() -> None:
    """The same, where none can be made: what the test above sees is the cgroup's doing."""
    with running("none") as agent, tenant(agent, DAEMON) as (slice_id, process):
        daemon = daemonise(process)
        try:
            until(lambda: slice_id not in agent.slices(), 3, "the slice ends, though the daemon lives")
            assert procs.start_time(daemon) is not None
        finally:
            os.kill(daemon, 9)


@pytest.mark.parametrize("kind", ["none", "user"])
def test_without_a_cgroup_children_are_known_by_descent(kind: str) -> None:
    with running(kind) as agent, tenant(agent, CHILD, AS_NOBODY if kind == "user" else ()) as (slice_id, process):
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert cgroup_of(process.pid, "v1") == cgroup_of(os.getpid(), "v1"), "no cgroup was made"
        until(lambda: count(agent, slice_id) == 2, 5, "the child is known")
        process.kill()
        process.wait(10)
        try:
            assert stays(agent, slice_id, 1.5), "the child holds the slice"
        finally:
            os.kill(child, 9)
        until(lambda: slice_id not in agent.slices(), 3, "the slice ends with its last process")


def test_an_agent_that_is_not_root_serves_and_starts_again() -> None:
    with running("user") as agent, tenant(agent, CHILD, AS_NOBODY) as (slice_id, _):
        assert os.stat(agent.runtime / "agent.sock").st_uid == NOBODY
        directory = agent.runtime / "slices" / slice_id
        assert {path.name: path.stat().st_uid for path in directory.iterdir()} == dict.fromkeys(
            ("slice.json", "ctl", "use", "api.sock"), NOBODY
        )
        agent.kill()
        agent.start()
        assert agent.slices()[slice_id]["state"] == "running"


def count(agent: AgentProcess, slice_id: str) -> Any:
    """Return how many processes a slice has; 0 when it is gone."""
    return agent.slices().get(slice_id, {"process_count": 0})["process_count"]


def stays(agent: AgentProcess, slice_id: str, seconds: float) -> bool:
    """Return whether the agent keeps a slice for so long: longer than it takes to end one."""
    with contextlib.suppress(AssertionError):
        until(lambda: slice_id not in agent.slices(), seconds, "it ended", every=0.1)
        return False
    return True


def left(slice_id: str, kind: str) -> bool:
    """Return whether a slice's cgroup is still there."""
    if kind == "v1":
        return any(path.exists() for path in (Path(BASE, name, f"nbgpu-{slice_id}") for name in ("freezer", "pids")))
    look = f"{MOUNTS['v2']} && find {BASE} -name nbgpu-{slice_id}"
    return bool(subprocess.run(["unshare", "--mount", "sh", "-c", look], capture_output=True, text=True, timeout=20, check=True).stdout)
