"""Under what the kit's workloads run: nbgpu as users have it, the driver alone, HAMi-core.

* `Nbgpu`: ``nbgpu agent`` and ``nbgpu pool`` in a runtime directory of their own, every group by ``nbgpu run``.
* `Bare`: where nbgpu's Python packages are missing: the limiter and the GPU-time scheduler on slice files written here, like the agent's.
* `Stock`: no limits, the driver's own time slices.
* `Hami`: HAMi-core's library, by its environment variables.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import GIB, LIB, MIB, PYTHON, ROOT
from .hub import Group, Hub

NEEDED = ("pydantic", "typer", "rich", "fastapi", "uvicorn", "prometheus_client", "yaml", "httpx", "pynvml")
"""What ``nbgpu[agent,pool]`` needs; where one is missing, `Bare` stands in."""
START_SECONDS = 60.0


@dataclass(frozen=True)
class Spec:
    """One slice: a share of the time, memory (0: the same share of it), mode, how many processes compute in it."""

    milli: int
    memory: int = 0
    strict: bool = False
    processes: int = 1


LIBC = ctypes.CDLL(None)


def end_with_us() -> None:
    """In a child: be asked to end when the kit is gone, however that went (PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, int(signal.SIGTERM), 0, 0, 0)


def missing_packages() -> list[str]:
    """Return what is missing for an agent and a pool."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def clean(env: dict[str, str]) -> dict[str, str]:
    """Return an environment with nothing of a slice in it."""
    ours = ("NBGPU_SLICE_DIR", "NBGPU_SOCKET", "NBGPU_KERNEL_ID", "NBGPU_RUNTIME_DIR", "LD_PRELOAD")
    return {name: value for name, value in env.items() if name not in ours and not name.startswith("CUDA_DEVICE_MEMORY")}


class Place:
    """Where groups of workers run."""

    name = ""

    def __init__(self, hub: Hub, env: dict[str, str]) -> None:
        self.hub, self.env = hub, env

    def command(self, spec: Spec) -> tuple[list[str], dict[str, str]]:
        """Return how a program is started in a slice of its own: words before it, its environment."""
        raise NotImplementedError

    @contextlib.contextmanager
    def groups(self, specs: Sequence[Spec], *more: str) -> Iterator[list[Group]]:
        """Start a group for each slice; end all afterwards."""
        made: list[Group] = []
        try:
            for spec in specs:
                words, env = self.command(spec)
                made.append(self.hub.start(words, env, spec.processes, *more))
            self.hub.gather(made, [spec.processes for spec in specs])
            yield made
        finally:
            self.hub.end(made)
            self.ended()

    def run(self, spec: Spec, program: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Run a program to its end in a slice of its own."""
        words, env = self.command(spec)
        process = subprocess.Popen(
            [*words, *program], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            out, error = process.communicate(timeout=seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.ended()
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def ended(self) -> None:
        """Called when groups have ended: wait until what they held is free again."""

    def close(self) -> None:
        """End what this place needed."""

    def kill(self) -> None:
        """The same without a wait."""


class Stock(Place):
    """The driver alone."""

    name = "driver alone"

    def command(self, spec: Spec) -> tuple[list[str], dict[str, str]]:
        """Nothing before the program."""
        return [], self.env


class Hami(Place):
    """HAMi-core: its library preloaded, its limits by environment, a shared file for each container (here: for each slice)."""

    name = "HAMi-core"

    def __init__(self, hub: Hub, env: dict[str, str], library: Path, total: int) -> None:
        super().__init__(hub, env)
        self._library, self._total, self._count = library, total, 0

    def command(self, spec: Spec) -> tuple[list[str], dict[str, str]]:
        """The environment that its device plugin gives a container."""
        self._count += 1
        cache = self.hub.folder / f"hami-{self._count}.cache"
        memory = (spec.memory or self._total * spec.milli // 1000) // MIB
        return [], {
            **self.env,
            "LD_PRELOAD": str(self._library),
            "CUDA_DEVICE_MEMORY_LIMIT": f"{memory}m",
            "CUDA_DEVICE_MEMORY_LIMIT_0": f"{memory}m",
            "CUDA_DEVICE_SM_LIMIT": str(round(spec.milli / 10)),
            "CUDA_DEVICE_MEMORY_SHARED_CACHE": str(cache),
            "GPU_CORE_UTILIZATION_POLICY": "force",
            "LIBCUDA_LOG_LEVEL": "1",
        }


class Nbgpu(Place):
    """nbgpu as users have it."""

    name = "nbgpu"

    def __init__(self, hub: Hub, env: dict[str, str], runtime: Path, device: int, simulated: bool) -> None:
        super().__init__(hub, {**env, "NBGPU_RUNTIME_DIR": str(runtime), "NBGPU_QUIET": "1"})
        self.env["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "nodeagent"), str(ROOT / "spawner"), *filter(None, [env.get("PYTHONPATH")])]
        )
        from nbgpu.client import AgentClient, PoolClient

        self.agent, self.pool = AgentClient(runtime / "agent.sock", 5), PoolClient(runtime / "pool.sock", 5)
        self._runtime = runtime
        options = ["--simulate", "--sim-devices", "1"] if simulated else ["--no-simulate", "--devices", str(device)]
        self._parts: list[subprocess.Popen[bytes]] = []
        try:
            for name, words in (("agent", options), ("pool", [])):
                with open(runtime.parent / f"{name}.log", "wb") as log:
                    command = [PYTHON, "-m", "nbgpu", name, *words]
                    part = subprocess.Popen(
                        command,
                        env=self.env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # Ctrl-C is ours: we end it in order
                        preexec_fn=end_with_us,
                    )
                self._parts.append(part)
                self._wait(name, part)
        except BaseException:
            self.close()
            raise

    def _wait(self, name: str, part: subprocess.Popen[bytes]) -> None:
        client = self.agent if name == "agent" else self.pool
        deadline = time.monotonic() + START_SECONDS
        while not client.healthy():
            if part.poll() is not None or time.monotonic() > deadline:
                said = (self._runtime.parent / f"{name}.log").read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"nbgpu {name} did not start: {' / '.join(said[-3:]) or 'it said nothing'}")
            time.sleep(0.05)

    def log(self, name: str) -> list[str]:
        """Return the last lines of the agent's or the pool's log."""
        return (self._runtime.parent / f"{name}.log").read_text(errors="replace").splitlines()[-40:]

    def command(self, spec: Spec) -> tuple[list[str], dict[str, str]]:
        """``nbgpu run`` with this slice's options."""
        part = f"{spec.milli / 10:g}%"
        size = ["--memory", f"{spec.memory // MIB}MiB", "--compute", part] if spec.memory else ["--gpu", part]
        words = [PYTHON, "-m", "nbgpu", "run", *size, "--mode", "strict" if spec.strict else "burst", "--"]
        return words, self.env

    def ended(self) -> None:
        """Wait until the agent has no slice left."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and self.agent.slices().slices:
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill both."""
        for part in self._parts:
            part.kill()

    def close(self) -> None:
        """End the pool, then the agent."""
        for part in reversed(self._parts):
            part.terminate()
            try:
                part.wait(8)
            except subprocess.TimeoutExpired:
                part.kill()
                part.wait()


class Bare(Place):
    """The limiter and the scheduler without an agent."""

    name = "nbgpu"

    def __init__(self, hub: Hub, env: dict[str, str], folder: Path, uuid: str, usable: int, context: int) -> None:
        super().__init__(hub, env)
        sys.path.insert(0, str(ROOT / "nodeagent"))
        from nbgpu_agent import layout
        from nbgpu_agent.native import Native

        self._layout: Any = layout
        self._scheduler = Native(LIB / "libnbgpu_agent.so").scheduler()
        self._folder, self._uuid, self._usable, self._context, self._count = folder, uuid, usable, context, 0
        self._entries: list[int] = []

    def command(self, spec: Spec) -> tuple[list[str], dict[str, str]]:
        """A slice directory and the limiter preloaded."""
        layout = self._layout
        self._count += 1
        folder = self._folder / f"slice-{self._count}"
        folder.mkdir()
        mode = layout.MODE_STRICT if spec.strict else layout.MODE_BURST
        ctl, use = layout.Ctl(), layout.Use()
        ctl.magic, ctl.version, ctl.size, ctl.generation = layout.CTL_MAGIC, layout.VERSION, layout.CTL_SIZE, 1
        for device in ctl.device:
            device.gate = layout.GATE_NONE
        first = ctl.device[0]
        first.uuid, first.compute_milli, first.mode = self._uuid.encode(), spec.milli, mode
        first.mem_limit = spec.memory or self._usable * spec.milli // 1000
        first.context_bytes, first.overhead_cap = self._context, max(256 * MIB, self._context)
        use.magic, use.version, use.size = layout.USE_MAGIC, layout.VERSION, layout.USE_SIZE
        (folder / "ctl").write_bytes(bytes(ctl))
        (folder / "use").write_bytes(bytes(use))
        ctl_fd, use_fd = os.open(folder / "ctl", os.O_RDWR), os.open(folder / "use", os.O_RDWR)
        try:
            self._entries.append(self._scheduler.add(ctl_fd, use_fd, 0, 0, spec.milli, mode))
        finally:
            os.close(ctl_fd)
            os.close(use_fd)
        return [], {**self.env, "LD_PRELOAD": str(LIB / "libnbgpu.so"), "NBGPU_SLICE_DIR": str(folder)}

    def ended(self) -> None:
        """Forget the slices."""
        for entry in self._entries:
            self._scheduler.remove(entry)
        self._entries.clear()
        for folder in self._folder.glob("slice-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Stop the scheduler."""
        self._scheduler.close()


def default_usable(total: int) -> int:
    """Return what of a device slices get together: the agent's own default reserve taken off."""
    return total - min(2 * GIB, total // 20 // MIB * MIB)
