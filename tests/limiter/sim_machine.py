"""Simulated machines for tests: own state file, programs on it, the machine's books read from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from limiter_kit import sim_driver

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TIMEOUT = 60
CONTEXT_BYTES = 300 << 20


class Machine:
    """One simulated machine."""

    def __init__(self, **settings: object) -> None:
        base = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
        self.state = Path(tempfile.mktemp(prefix="nbgpu-test-sim-", dir=base))
        self.env = {
            **os.environ,
            "NBGPU_SIM_STATE": str(self.state),
            "LD_LIBRARY_PATH": str(sim_driver()),
            "PYTHONPATH": str(HERE),
            **{f"NBGPU_SIM_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: str, **env: str) -> subprocess.Popen[str]:
        """A Python program on this machine; `cuda` is a connected `Cuda`."""
        text = "import ctypes as c, os, sys, time\nfrom sim_client import *\ncuda = Cuda()\n" + textwrap.dedent(script)
        return self.start_plain(text, **env)

    def start_plain(self, script: str, **env: str) -> subprocess.Popen[str]:
        """A Python program on this machine as it is written."""
        command = [sys.executable, "-c", script]
        process = subprocess.Popen(
            command, env={**self.env, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def run(self, script: str, **env: str) -> str:
        """Run it to its end, which must be a good one; what it printed."""
        return finish(self.start(script, **env))

    def used(self, device: int = 0) -> int:
        """Physical bytes in use, by the machine's own books as NVML reads them (in a process of its own)."""
        script = (
            "import ctypes as c\nfrom sim_client import Memory\n"
            "n = c.CDLL('libnvidia-ml.so.1'); n.nvmlInit_v2(); h = c.c_void_p(); m = Memory()\n"
            f"assert n.nvmlDeviceGetHandleByIndex_v2({device}, c.byref(h)) == 0\n"
            "assert n.nvmlDeviceGetMemoryInfo(h, c.byref(m)) == 0\nprint(m.used)"
        )
        return int(finish(self.start_plain(script)))

    def close(self) -> None:
        """End what still runs; forget the machine."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait(TIMEOUT)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream and not stream.closed:
                    stream.close()
        self.state.unlink(missing_ok=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a program's good end."""
    out, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, f"ended with {process.returncode}\n{out}\n{error}"
    return out


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Until it holds; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - start


def line(process: subprocess.Popen[str]) -> str:
    """The next line that a program prints."""
    assert process.stdout
    text = process.stdout.readline()
    if not text:
        assert process.stderr
        raise AssertionError(f"ended early: {process.stderr.read()}")
    return text.strip()
