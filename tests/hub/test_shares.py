"""Programs that compute together on one *simulated* GPU get the time that their slices promise; without nbgpu they do not."""

from __future__ import annotations

import ctypes
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

pytestmark = [
    pytest.mark.slow,
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
        # this process looks at the device with the driver's own library; its settings are read once, at the first call
        self._nvml = ctypes.CDLL(str(LIBRARIES / "sim" / "libnvidia-ml.so.1"))
        self._device = ctypes.c_void_p()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in sim.items():
                patch.setenv(name, value)
            assert self._nvml.nvmlInit_v2() == 0
        assert self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)) == 0

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

    def _busy(self, pid: int) -> tuple[int, int]:
        busy, now = ctypes.c_ulonglong(), ctypes.c_ulonglong()
        assert self._nvml.nbgpuSimProcessBusy(self._device, pid, ctypes.byref(busy), ctypes.byref(now)) == 0
        return busy.value, now.value

    def shares(self) -> list[float]:
        """Return each program's part of the device's time, in percent, over `SECONDS`."""
        time.sleep(1)  # the first turns
        before = [self._busy(program.pid) for program in self.programs]
        time.sleep(SECONDS)
        after = [self._busy(program.pid) for program in self.programs]
        return [(b[0] - a[0]) / (b[1] - a[1]) * 100 for a, b in zip(before, after, strict=True)]

    def end(self) -> None:
        """End the programs."""
        for program in self.programs:
            program.kill()
            program.communicate()
        self.programs.clear()


@pytest.fixture(scope="module")
def gpu() -> Iterator[SharedGPU]:
    """A GPU whose pool and agent `nbgpu run` starts on demand; they end by themselves."""
    state = Path(f"/dev/shm/nbgpu-test-shares-{uuid.uuid4().hex[:8]}")
    with tempfile.TemporaryDirectory(prefix="nbgpu-", dir="/tmp", ignore_cleanup_errors=True) as runtime:
        shared = SharedGPU(Path(runtime), state)
        yield shared
        shared.end()
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
