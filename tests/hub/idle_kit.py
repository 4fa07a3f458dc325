"""What tests of idle notebooks share: a kernel that holds GPU memory, and its Jupyter server's words to the agent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from agent_harness import ROOT, AgentProcess, Piped, slice_client, until

from nbgpu.client import Client
from nbgpu.errors import NbgpuError
from nbgpu.models import Launch, Slice

PROGRAM = Path(__file__).with_name("idle_program.py")


class Notebook(Piped):
    """A notebook's kernel in a slice (`idle_program.py`), and what its Jupyter server would tell the agent of it."""

    def __init__(self, launch: Launch, kernel_id: str = "kernel-a", mib: int = 64, agent: AgentProcess | None = None, limited: bool = True):
        self.agent, self.slice_id = agent, Path(launch.slice_dir).name
        env = os.environ | launch.env | {"NBGPU_KERNEL_ID": kernel_id, "PYTHONPATH": str(ROOT / "tests/limiter")}
        if not limited:
            env = {name: value for name, value in env.items() if name not in ("LD_PRELOAD", "NBGPU_SLICE_DIR")}
        arguments = [sys.executable, "-S", str(PROGRAM)]
        self.process = subprocess.Popen(arguments, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.client: Client = slice_client(launch)
        self.kernel_id = kernel_id
        assert self._line() == "ready"
        self.sum = self.do("hold", mib) if mib else ""

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def begin(self, *words: object) -> None:
        """Send a command; `end` returns its answer."""
        print(*words, file=self.process.stdin, flush=True)

    def end(self, seconds: float = 20) -> str | None:
        """Return the answer; None when there is none in time."""
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self._line()), daemon=True)
        reader.start()
        reader.join(seconds)
        self.reader = reader
        return found[0] if found else None

    def do(self, *words: object) -> str:
        """Send a command and return its answer."""
        self.begin(*words)
        answer = self.end()
        assert answer is not None, f"no answer to {words}"
        return answer

    def tell(self, busy: bool = False) -> Any:
        """Say what the Jupyter server would: whether the kernel is busy."""
        return self.client.call("PUT", "/v1/idle", {"kernels": {self.kernel_id: busy}})

    def state(self) -> str:
        """Return where the slice is: held, parking, parked, restoring."""
        if self.agent is not None:  # the slice's own socket takes 50 requests a second
            return self.agent.slices()[self.slice_id]["idle"]["state"]
        return self.client.call("GET", "/v1/idle")["state"]


def idle_agent(agent: AgentProcess, *more: str) -> AgentProcess:
    """Start an agent that parks slices."""
    return agent.start("--idle-host-memory", "64 GiB", *more)


def open_notebook(agent: AgentProcess, milli: int = 500, **more: Any) -> tuple[Notebook, Slice]:
    """A slice with one notebook in it."""
    wanted = agent.slice(milli, user=more.pop("user", "ada"))
    notebook = Notebook(agent.put(wanted), agent=agent, **more)
    agent.adopt(wanted.slice_id, notebook.pid)
    return notebook, wanted


def refusal(agent: AgentProcess, slice_id: str, idle_seconds: float = 0) -> str | None:
    """Ask for a slice to be parked; return why it is not."""
    try:
        agent.client.call("POST", f"/v1/slices/{slice_id}/park", {"idle_seconds": idle_seconds})
    except NbgpuError as error:
        return error.message
    return None


def restore(agent: AgentProcess, slice_id: str) -> None:
    """Have a slice brought back."""
    agent.client.call("POST", f"/v1/slices/{slice_id}/restore")


def parked(agent: AgentProcess, notebook: Notebook, slice_id: str) -> None:
    """Park a slice and wait until it is."""
    notebook.tell()
    why = refusal(agent, slice_id)
    assert why is None, why
    until(lambda: notebook.state() == "parked", 20, "the slice is parked")


def held_bytes(agent: AgentProcess, slice_id: str) -> int:
    """Return the limit in force on the slice's first device."""
    return agent.slices()[slice_id]["slice"]["devices"][0]["memory_bytes"]


def smi_used_mib(launch: Launch) -> int:
    """Return what the simulated nvidia-smi says is in use on the first GPU, outside every slice."""
    env = {name: value for name, value in (os.environ | launch.env).items() if name not in ("LD_PRELOAD", "NBGPU_SLICE_DIR")}
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=20).stdout)
