"""What the test_attack_* files share: an agent as root, two tenants as ordinary users, their attackers."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_harness import AgentProcess, missing_libraries, until
from attacker import PYTHON, Attacker, users

from nbgpu.models import Launch, Slice

LEADER_GONE = """
r, w = os.pipe()
result = os.fork()
if result == 0:
    def hold():
        code = cuda() or alloc(3 * GIB)
        os.write(w, bytes([code]))
        time.sleep(60)
    threading.Thread(target=hold).start()
    ctypes.CDLL(None).syscall(60, 0)  # exit of this thread alone
assert os.read(r, 1) == b"\\0"
"""
"""A child that holds GPU memory goes on though its first thread, its leader, has ended: it shows as a zombie."""


def missing() -> str | None:
    """Return why there can be no attack here; None when there can."""
    if os.geteuid() != 0:
        return "needs root: tenants are users of their own"
    if not os.path.exists(PYTHON) or shutil.which("useradd") is None:
        return f"needs {PYTHON} and useradd"
    return missing_libraries()


@pytest.fixture(scope="module")
def tenants() -> Iterator[tuple[str, str]]:
    with users() as names:
        yield names


@contextlib.contextmanager
def agent_with(*arguments: str, **env: str) -> Iterator[AgentProcess]:
    """An agent as root with further arguments and environment."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-attack-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        process = AgentProcess(Path(name))
        process.env |= env
        try:
            yield process.start(*arguments)
        finally:
            process.close()


@pytest.fixture(scope="module")
def agent(tenants: tuple[str, str]) -> Iterator[AgentProcess]:
    with agent_with() as process:
        yield process


def metrics(agent: AgentProcess) -> str:
    """Return the agent's page for Prometheus."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(agent.runtime / "agent.sock"))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


class Tenancy:
    """A slice of a user and the processes in it."""

    def __init__(self, agent: AgentProcess, user: str, milli: int = 125, mode: str = "burst"):
        self.agent = agent
        self.user = user
        self.slice: Slice = agent.slice(milli, mode=mode, user=user)
        self.id = self.slice.slice_id
        self.launch: Launch = agent.put(self.slice, uid=pwd.getpwnam(user).pw_uid)
        self.attackers: list[Attacker] = []

    def enter(self, adopt: bool = True, **options: object) -> Attacker:
        """Start a process in the slice."""
        self.attackers.append(Attacker(self.launch, self.user, **options))  # type: ignore[arg-type]
        if adopt:
            self.agent.adopt(self.id, self.attackers[-1].pid)
        return self.attackers[-1]

    def close(self) -> None:
        """End its processes and the slice."""
        for one in self.attackers:
            one.close()
        self.agent.delete(self.id)


@pytest.fixture
def tenancy(agent: AgentProcess, tenants: tuple[str, str]) -> Iterator[Callable[..., Tenancy]]:
    made: list[Tenancy] = []

    def make(user: str = tenants[0], **options: object) -> Tenancy:
        made.append(Tenancy(agent, user, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()
    until(lambda: not agent.slices(), 5, "the end of all slices")


@pytest.fixture
def last(agent: AgentProcess) -> int:
    """The last event's id as the test begins."""
    return (agent.events() or [{"id": -1}])[-1]["id"]
