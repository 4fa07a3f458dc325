"""The kit's processes: each group of workers has a leader and connects back through one socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import PYTHON, WORKER

START_SECONDS = 60.0


class WorkerFailed(Exception):
    """A worker said that it could not do something, or said nothing in time."""


class Worker:
    """One connected process."""

    def __init__(self, door: socket.socket, hello: dict[str, Any], log: Path) -> None:
        self.log = log
        self.door, self.pid, self.group, self.number = door, int(hello["pid"]), str(hello["group"]), int(hello["number"])
        self._buffer = b""

    def send(self, do: str, **arguments: Any) -> None:
        """Tell it to do something."""
        try:
            self.door.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except OSError as error:
            raise WorkerFailed(f"worker {self.number} of {self.group} is gone: {error}") from None

    def receive(self, seconds: float = 30.0) -> dict[str, Any]:
        """Return its answer."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.door], [], [], left)[0]:
                raise WorkerFailed(f"worker {self.number} of {self.group} did not answer within {seconds:.0f} s")
            try:
                data = self.door.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                raise WorkerFailed(f"worker {self.number} of {self.group} ended: {end_of(self.log) or 'it printed nothing'}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"worker {self.number} of {self.group}: {answer['error']}")
        return answer

    def ask(self, do: str, seconds: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """Tell it to do something and return the answer."""
        self.send(do, **arguments)
        return self.receive(seconds)

    def kill(self) -> None:
        """End it as Jupyter's restart does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        """Return whether the process exists and is no zombie."""
        return alive(self.pid)


def alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def end_of(log: Path) -> str:
    """Return the last lines of what was printed; of a crash its first ones."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    crash = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    told = lines[-3:] if crash is None else lines[crash : crash + 6]
    return " / ".join(line.strip() for line in told)[:500]


class Group:
    """The workers of one slice, or of no slice."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log
        self.leader: Worker | None = None
        self.workers: list[Worker] = []

    def said(self) -> str:
        """Return the end of what its processes printed."""
        return end_of(self.log)


class Hub:
    """The socket where workers arrive, and every process that was started, so that none is left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "hub.sock"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen(64)
        self._groups: dict[str, Group] = {}
        self._count = 0

    def start(self, command: Sequence[str], env: dict[str, str], processes: int, *more: str) -> Group:
        """Start a group: `command` (which may be empty) is what the leader is started by, such as ``nbgpu run … --``."""
        self._count += 1
        name = f"group-{self._count}"
        log = self.folder / f"{name}.log"
        words = [*command, PYTHON, "-S", str(WORKER), str(self.path), name, str(processes), *more]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        group = self._groups[name] = Group(name, process, log)
        return group

    def gather(self, groups: Sequence[Group], processes: Sequence[int], seconds: float = START_SECONDS) -> None:
        """Wait until all workers of these groups are connected."""
        deadline = time.monotonic() + seconds
        for group, count in zip(groups, processes, strict=True):
            while len(group.workers) < count or group.leader is None:
                self._accept(group, deadline)
                group.workers.sort(key=lambda worker: worker.number)

    def more(self, group: Group, number: int, seconds: float = START_SECONDS) -> Worker:
        """Start one more worker in a group; return it."""
        assert group.leader is not None
        group.leader.ask("spawn", number=number)
        deadline, before = time.monotonic() + seconds, len(group.workers)
        while len(group.workers) == before:
            self._accept(group, deadline)
        return group.workers[-1]

    def _accept(self, group: Group, deadline: float) -> None:
        while True:
            if select.select([self._listening], [], [], 0.2)[0]:
                break
            if group.process.poll() is not None:
                raise WorkerFailed(f"a program did not start (exit status {group.process.returncode}): {group.said()}")
            if time.monotonic() > deadline:
                raise WorkerFailed(f"a program did not start in time: {group.said() or 'it printed nothing'}")
        door, _ = self._listening.accept()
        line = b""
        while not line.endswith(b"\n"):
            data = door.recv(1)
            if not data:
                return
            line += data
        hello = json.loads(line)
        owner = self._groups.get(str(hello["group"]))
        if owner is None:  # its group was ended while it started
            door.close()
            return
        worker = Worker(door, hello, owner.log)
        if worker.number == 0:
            owner.leader = worker
        else:
            owner.workers.append(worker)

    def end(self, groups: Sequence[Group], seconds: float = 10.0) -> None:
        """End groups: close their sockets, then kill what is left of them."""
        for group in groups:
            for worker in [*group.workers, *([group.leader] if group.leader else [])]:
                worker.kill()
                worker.door.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + seconds
        for group in groups:
            with contextlib.suppress(subprocess.TimeoutExpired):
                group.process.wait(max(0.1, deadline - time.monotonic()))
            while any(worker.alive() for worker in group.workers) and time.monotonic() < deadline:
                time.sleep(0.02)
            self._groups.pop(group.name, None)

    def end_all(self) -> None:
        """End all groups that are left."""
        self.end(list(self._groups.values()))

    def kill_all(self) -> None:
        """Kill all groups that are left, without a wait."""
        for group in list(self._groups.values()):
            for worker in group.workers:
                worker.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End everything."""
        self.end_all()
        self._listening.close()
