"""A pool as a process, for tests to talk to, kill and start again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nbgpu.client import PoolClient
from nbgpu.errors import NbgpuError

ROOT = Path(__file__).resolve().parents[2]


class PoolProcess:
    """`python -m nbgpu_pool`, to be killed and started again."""

    def __init__(self, directory: Path, *arguments: str, env: dict[str, str] | None = None):
        self.directory = directory
        self.command = [sys.executable, "-m", "nbgpu_pool", "--runtime-dir", str(directory), *arguments]
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "spawner")]), **(env or {})}
        self.client = PoolClient(directory / "pool.sock", 5)
        self.log = (directory / "pool.log").open("ab")
        self.process: subprocess.Popen | None = None

    def start(self, *, ready: bool = True) -> None:
        self.process = subprocess.Popen(self.command, env=self.env, stderr=self.log)
        if ready:
            until(self.ready)

    def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "pool.log").read_text()
        with contextlib.suppress(NbgpuError):
            return bool(self.client.call("GET", "/healthz")["ready"])
        return False

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(10)


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)
