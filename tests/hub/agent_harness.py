"""A node agent as a process, and tenants that write their `use` file as the limiter would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nbgpu.client import Client
from nbgpu.errors import Unavailable
from nbgpu.models import Launch, Node, Owner, Slice, SliceDevice, Usage
from nbgpu.quantities import GIB, memory_share_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ROOT / "nodeagent/nbgpu_agent/_lib"
_T = TypeVar("_T")


def missing_libraries() -> str | None:
    """Return why no agent can run here; None when one can."""
    names = ("libnbgpu.so", "libnbgpu_agent.so", "sim/libnvidia-ml.so.1", "sim/libcuda.so.1")
    missing = [name for name in names if not (LIBRARIES / name).exists()]
    return f"not built: {', '.join(missing)} (python nodeagent/build.py)" if missing else None


def until(condition: Callable[[], _T], seconds: float = 10.0, what: str = "the condition", every: float = 0.01) -> _T:
    """Return the first true value of `condition`; AssertionError when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds} s"
        time.sleep(every)


class AgentProcess:
    """An agent of a runtime directory of its own, on simulated GPUs."""

    def __init__(self, runtime: Path, devices: int = 2):
        self.runtime = runtime
        self.devices = devices
        self.client = Client(runtime / "agent.sock", "agent")
        self.log = runtime / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.env = dict(os.environ)
        self.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "nodeagent"), os.environ.get("PYTHONPATH", "")])
        self.env["NBGPU_SIM_STATE"] = f"/dev/shm/nbgpu-test-agent-{uuid.uuid4().hex[:12]}"

    def command(self, *more: str) -> list[str]:
        """Return the agent's command line."""
        arguments = ["--runtime-dir", str(self.runtime), "--simulate", "--sim-devices", str(self.devices), "--node", "node-1"]
        return [sys.executable, "-m", "nbgpu_agent", *arguments, *more]

    def start(self, *more: str) -> AgentProcess:
        """Start it and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command(*more), env=self.env, stderr=log, stdout=log, cwd=ROOT)
        until(self._answers, 30, "the agent's first answer")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended: {self.log.read_text()[-2000:]}"
        try:
            return self.client.call("GET", "/healthz") == {"status": "ok"}
        except Unavailable:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal and return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(15)

    def kill(self) -> None:
        """SIGKILL."""
        self.stop(signal.SIGKILL)

    def close(self) -> None:
        """End it if it runs, and remove what it made."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        if os.environ.get("NBGPU_TEST_SHOW_LOG"):
            print(self.log.read_text())
        for directory in (self.runtime / "slices").glob("*/use"):
            subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.env.get("NBGPU_SIM_STATE", ""))

    # ---- what tests ask of it

    def node(self) -> Node:
        """Return `GET /v1/node`."""
        return self.client.ask(Node, "GET", "/v1/node")

    def slice(self, milli: int = 250, device: int = 0, slice_id: str | None = None, mode: str = "burst", user: str = "ada") -> Slice:
        """Return a slice of one device, to be prepared."""
        node = self.node()
        found = node.devices[device]
        part = SliceDevice(
            uuid=found.uuid,
            index=found.index,
            model=found.model,
            memory_bytes=memory_share_bytes(found.usable_bytes, milli),
            compute_milli=milli,
        )
        owner = Owner(hub="hub-1", user=user)
        return Slice(slice_id=slice_id or uuid.uuid4().hex, owner=owner, node=node.node, mode=mode, devices=[part], simulated=True)

    def put(self, wanted: Slice, uid: int | None = None) -> Launch:
        """Prepare a slice."""
        body = {"slice": wanted.model_dump(mode="json"), "uid": uid}
        return Launch.model_validate(self.client.call("PUT", f"/v1/slices/{wanted.slice_id}", body))

    def slices(self) -> dict[str, Any]:
        """Return the slices by id, as JSON."""
        return {found["slice"]["slice_id"]: found for found in self.client.call("GET", "/v1/slices")["slices"]}

    def adopt(self, slice_id: str, pid: int) -> Any:
        """Adopt a process."""
        return self.client.call("POST", f"/v1/slices/{slice_id}/processes", {"pid": pid})

    def delete(self, slice_id: str) -> bool:
        """Ask a slice to end; return whether it is gone."""
        return self.client.call("DELETE", f"/v1/slices/{slice_id}")["gone"]

    def events(self, after: int = -1, wait_seconds: float = 0, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events above an id."""
        path = f"/v1/events?after={after}&wait_seconds={wait_seconds}"
        return [event for event in self.client.call("GET", path, wait_seconds=wait_seconds) if kind in (None, event["kind"])]


def slice_client(launch: Launch) -> Client:
    """Return a client of a slice's own API."""
    return Client(launch.socket, "slice")


def usage(launch: Launch) -> Usage:
    """Return a slice's usage as the slice sees it."""
    return slice_client(launch).ask(Usage, "GET", "/v1/usage")


class Piped:
    """A program that is spoken to through its pipes."""

    process: subprocess.Popen[str]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it, whatever it does."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Tenant(Piped):
    """A process in a slice that claims a slot and changes its numbers on command, as a process under the limiter does."""

    def __init__(self, launch: Launch, kernel_id: str = "", uid: int | None = None):
        arguments = [sys.executable, str(Path(__file__).with_name("agent_tenant.py")), launch.slice_dir, kernel_id]
        path = os.pathsep.join([str(ROOT), str(ROOT / "nodeagent")])
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}, user=uid, cwd="/"
        )
        self.pid = self.process.pid
        self._expect("ready")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        assert answer == word, f"the tenant said {answer!r}"

    def do(self, *words: object) -> None:
        """Send a command and wait until it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()
        self._expect("done")


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen(["sleep", "120"])
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


__all__ = ["GIB", "AgentProcess", "Tenant", "missing_libraries", "sleeper", "slice_client", "until", "usage"]


@contextlib.contextmanager
def own_agent() -> Iterator[AgentProcess]:
    """An agent in a directory of its own that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        process = AgentProcess(Path(name))
        try:
            yield process.start()
        finally:
            process.close()


@contextlib.contextmanager
def tenants() -> Iterator[Callable[..., Tenant]]:
    """Make tenants that are ended afterwards."""
    made: list[Tenant] = []

    def make(launch: Launch, kernel_id: str = "", uid: int | None = None) -> Tenant:
        made.append(Tenant(launch, kernel_id, uid))
        return made[-1]

    yield make
    for one in made:
        one.close()
