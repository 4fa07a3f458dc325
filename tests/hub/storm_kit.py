"""What a storm of kills needs: who lives, which part is where in an operation, and what the books of all parts say."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hub_process import NO_TLS, Hub

from nbgpu.client import AgentClient, PoolClient
from nbgpu.models import GrantState

SPAWN_MARKS = {
    " nbgpu.pool INFO request ": "granted",
    " agent: prepared slice=": "preparing",
    " nbgpu.pool INFO prepared ": "starting",
    " agent: adopted slice=": "binding",
    " nbgpu.pool INFO bound ": "answering",
}
STOP_MARKS = {" nbgpu.pool INFO release ": "releasing", " nbgpu.pool INFO gone ": "gone"}
PHASES = {"spawn": ["acquiring", *SPAWN_MARKS.values()], "stop": ["stopping", *STOP_MARKS.values()]}
"""In their order; the first has left no line in the log yet."""


@dataclass
class Books:
    """One moment, as each part sees it. A server is its user's name; a slice is its id."""

    hub: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    """User to the pid and slice of the server that the hub says is ready."""
    pool: dict[str, str] = field(default_factory=dict[str, str])
    """Slice to state, of all that is held or waited for."""
    agent: dict[str, str] = field(default_factory=dict[str, str])
    directories: set[str] = field(default_factory=set[str])
    living: dict[int, str] = field(default_factory=dict[int, str])
    """Pid to slice, of every process that lives in one."""
    over: list[str] = field(default_factory=list[str])
    """Devices that gave more than they have."""
    given: dict[str, int] = field(default_factory=dict[str, int])
    """Compute in milli-GPU that the pool has given of each device."""

    def differences(self) -> list[str]:
        """Return what does not fit together, in words; nothing when all parts agree."""
        found = [f"device {uuid} gave more than it has" for uuid in self.over]
        found += [f"slice {one} is {state} in the pool" for one, state in self.pool.items() if state != "bound"]
        found += [f"slice {one} is {state} at the agent" for one, state in self.agent.items() if state != "running"]
        servers = dict(self.hub.values())
        if servers != self.living:
            found.append(f"the hub has {servers}, there live {self.living}")
        if len(set(self.living.values())) < len(self.living):
            found.append(f"a slice was given twice: {self.living}")
        for name, known in (("pool", set(self.pool)), ("agent", set(self.agent)), ("directories", self.directories)):
            if known != set(self.living.values()):
                found.append(f"{name}: {sorted(known)}, there live {sorted(self.living.values())}")
        return found


class Storm:
    """A hub with its parts, to be killed and compared."""

    def __init__(self, hub: Hub, run: Path):
        self.hub, self.run = hub, run
        self.pool = PoolClient(run / "pool.sock", 5)
        self.agent = AgentClient(run / "agent.sock", 5)

    # -- processes

    def processes(self) -> dict[int, list[str]]:
        """Return the command line of each living process of this hub, by pid."""
        found: dict[int, list[str]] = {}
        for pid in self.hub.left():
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        return found

    def pids(self, module: str) -> list[int]:
        """Return the pids of ``python -m module`` of this hub."""
        return [pid for pid, words in self.processes().items() if words[1:3] == ["-m", module]]

    def living(self) -> dict[int, str]:
        """Return the processes that live in a slice, with its id: by their environment, which no part of nbgpu can change."""
        found: dict[int, str] = {}
        for pid in self.hub.left():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if line.startswith(b"NBGPU_SLICE_DIR="):
                        found[pid] = line.decode().rpartition("/")[2]
        return found

    def kill(self, victim: str) -> None:
        """SIGKILL ``pool``, ``agent``, ``hub`` or ``all`` of them, with those that look after them."""
        modules = {"pool": ["nbgpu_pool"], "agent": ["nbgpu_agent"], "all": ["nbgpu.keep", "nbgpu_pool", "nbgpu_agent"]}
        pids = [pid for module in modules.get(victim, []) for pid in self.pids(module)]
        if victim in ("hub", "all"):
            self.hub.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- books

    def books(self) -> Books:
        """Return what each part says now; parts that are away make it raise."""
        listed = self.hub.api("GET", "users").json()
        servers = {
            user["name"]: server for user in listed if (server := user["servers"].get("")) and (server["ready"] or server["pending"])
        }
        hub = {
            name: (server["state"].get("pid", 0), server["state"].get("gpu_request_id", "?")) if server["ready"] else (0, server["pending"])
            for name, server in servers.items()
        }
        node, slices = self.agent.node(), self.agent.slices().slices
        parts = [part for one in slices for part in one.slice.devices]
        over = [
            device.uuid
            for device in node.devices
            if sum(part.memory_bytes for part in parts if part.uuid == device.uuid) > device.usable_bytes
            or sum(part.compute_milli for part in parts if part.uuid == device.uuid) > 1000
        ]
        grants = {one.request.request_id: one.state.value for one in self.pool.grants() if one.state != GrantState.gone}
        given = {one.device.uuid: one.compute_granted_milli for one in self.pool.devices()}
        directories = {path.name for path in (self.run / "slices").iterdir()}
        return Books(hub, grants, {one.slice.slice_id: one.state for one in slices}, directories, self.living(), over, given)

    def settled(self, seconds: float) -> Books:
        """Return the books once all parts agree; fail with the last differences."""
        deadline = time.monotonic() + seconds
        last: list[str] = ["nothing answered"]
        while time.monotonic() < deadline:
            try:
                books = self.books()
                last = books.differences()
                if not last:
                    return books
            except Exception as error:  # a part is still away
                last = [f"{type(error).__name__}: {error}"]
            time.sleep(0.1)
        noise = ("] 200 GET ", " agent: refused slice=")
        lines = [line for line in self.hub.log.read_text(errors="replace").splitlines() if not any(word in line for word in noise)]
        told = "\n".join(line[:300] for line in lines[-100:])
        raise AssertionError(f"after {seconds} s the parts do not agree: {'; '.join(last)}\n{told}")

    def probe(self, user: str) -> dict[str, Any]:
        """Return what a user's server has to say."""
        return httpx.get(f"http://127.0.0.1:{self.hub.port}/user/{user}/probe", timeout=20, verify=NO_TLS).json()


class Killer(threading.Thread):
    """Kills once an operation has come to a phase, a random moment later; tells where it really was then."""

    def __init__(self, storm: Storm, operation: str, phase: str, victim: str, delay_seconds: float):
        super().__init__(daemon=True)
        self.storm, self.phase, self.victim, self.delay_seconds = storm, phase, victim, delay_seconds
        self.marks = SPAWN_MARKS if operation == "spawn" else STOP_MARKS
        self.order = PHASES[operation]
        self.log = storm.hub.log.open("rb")
        self.log.seek(0, os.SEEK_END)
        self.text = ""
        self.over = threading.Event()
        self.landed = ""

    def now(self) -> str:
        """Return the phase that the log tells of."""
        self.text += self.log.read().decode(errors="replace")
        return max((phase for mark, phase in self.marks.items() if mark in self.text), key=self.order.index, default=self.order[0])

    def run(self) -> None:
        """Wait for the phase (or the operation's end), then kill."""
        wanted = self.order.index(self.phase)
        while self.order.index(self.now()) < wanted and not self.over.is_set():
            time.sleep(0.0005)
        time.sleep(self.delay_seconds)
        self.landed = "after" if self.over.is_set() else self.now()
        self.storm.kill(self.victim)
        self.log.close()
