"""Programs that compute together on one *simulated* GPU get the time that their slices promise; without nbgpu they do not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import LIBRARIES, missing_libraries

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "bench" / "compute_client.py"
SCALE = 4  # everything the device does takes 4 times as long, so that two cores judge the policy and not their own wake-ups
KERNEL_NS = 2_000_000 * SCALE
SECONDS = 6.0
TRUTH = """
import ctypes, sys
nvml, device = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p()
assert nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
for line in sys.stdin:
    busy, now = ctypes.c_ulonglong(), ctypes.c_ulonglong()
    assert nvml.nbgpuSimProcessBusy(device, int(line), ctypes.byref(busy), ctypes.byref(now)) == 0
    print(busy.value, now.value, flush=True)
"""
"""Says of each pid how long its GPU kernels ran, and the device's clock, in ns. A process of its own, as the driver reads settings once."""

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries())),
]


class SharedGPU:
    """One simulated GPU, programs that compute on it, and the device's own truth of how long each one ran."""

    def __init__(self, runtime: Path, state: Path):
        sim = {
            "NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1",
            "NBGPU_SIM_SLICE_US": str(2000 * SCALE), "NBGPU_SIM_SWITCH_US": str(100 * SCALE),
        }  # fmt: skip
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NBGPU_") and name != "LD_PRELOAD"}
        self.env = clean | sim | {"NBGPU_RUNTIME_DIR": str(runtime), "NBGPU_IDLE_SECONDS": "1"}
        self.programs: list[subprocess.Popen[str]] = []
        self._truth = subprocess.Popen(
            [sys.executable, "-S", "-c", TRUTH, str(LIBRARIES / "sim" / "libnvidia-ml.so.1")],
            env=self.env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *slice_options: str) -> subprocess.Popen[str]:
        """Start a program that computes without end: in a slice, or (with no options) on the GPU as it is."""
        command = [sys.executable, "-S", str(CLIENT), str(KERNEL_NS)]
        env = self.env
        if slice_options:
            command = [sys.executable, "-m", "nbgpu", "run", *slice_options, "--", *command]
        else:
            env = env | {"LD_LIBRARY_PATH": str(LIBRARIES / "sim")}
        program = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.programs.append(program)
        return program

    def go(self) -> None:
        """Wait until all programs have a context, then let them compute."""
        for program in self.programs:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
        for program in self.programs:
            assert program.stdin is not None
            program.stdin.write("go\n")
            program.stdin.flush()

    def _busy(self, pid: int) -> list[int]:
        assert self._truth.stdin is not None
        assert self._truth.stdout is not None
        self._truth.stdin.write(f"{pid}\n")
        self._truth.stdin.flush()
        return [int(word) for word in self._truth.stdout.readline().split()]

    def shares(self) -> list[float]:
        """Return each program's part of the device's time, in percent, over `SECONDS`."""
        time.sleep(1)  # the first turns
        pids = [pid_of(program) for program in self.programs]
        before = [self._busy(pid) for pid in pids]
        time.sleep(SECONDS)
        after = [self._busy(pid) for pid in pids]
        return [(b[0] - a[0]) / (b[1] - a[1]) * 100 for a, b in zip(before, after, strict=True)]

    def close(self) -> None:
        """End who told the truth."""
        self._truth.communicate(timeout=10)

    def end(self) -> None:
        """End the programs."""
        for program in self.programs:
            program.kill()
            program.communicate()
        self.programs.clear()


def pid_of(started: subprocess.Popen[str]) -> int:
    """Return the pid of a program: that of the child, where `nbgpu run` was started."""
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    return int(children[0]) if children else started.pid


@pytest.fixture(scope="module")
def gpu() -> Iterator[SharedGPU]:
    """A GPU whose pool and agent `nbgpu run` starts on demand; they end by themselves."""
    state = Path(f"/dev/shm/nbgpu-test-shares-{uuid.uuid4().hex[:8]}")
    with tempfile.TemporaryDirectory(prefix="nbgpu-", dir="/tmp", ignore_cleanup_errors=True) as runtime:
        shared = SharedGPU(Path(runtime), state)
        yield shared
        shared.end()
        shared.close()
        deadline = time.monotonic() + 30
        while (Path(runtime) / "pool.sock").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    state.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _ended(gpu: SharedGPU) -> Iterator[None]:
    yield
    gpu.end()


def test_two_trainers_with_three_quarters_and_a_quarter(gpu: SharedGPU) -> None:
    gpu.start("--gpu", "3/4")
    gpu.start("--gpu", "1/4")
    gpu.go()
    assert gpu.shares() == pytest.approx([75, 25], abs=4)


def test_control_the_driver_alone_gives_both_trainers_the_same(gpu: SharedGPU) -> None:
    gpu.start()
    gpu.start()
    gpu.go()
    first, second = gpu.shares()
    assert abs(first - second) < 10
    assert abs(first - 75) > 10


def test_eight_slices_of_an_eighth_compute_together(gpu: SharedGPU) -> None:
    for _ in range(8):
        gpu.start("--gpu", "1/8")
    gpu.go()
    assert gpu.shares() == pytest.approx([12.5] * 8, abs=3)
