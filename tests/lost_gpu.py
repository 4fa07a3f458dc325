"""A simulated GPU that falls off the bus, and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "nodeagent/nbgpu_agent/_lib/sim/libnvidia-ml.so.1"
PROGRAM = "import ctypes, sys; nvml = ctypes.CDLL(sys.argv[1]); sys.exit(nvml.nvmlInit() or nvml.nbgpuSimSetLost(*map(int, sys.argv[2:])))"


def set_lost(machine: str | Path, index: int, lost: bool) -> None:
    """Let the GPU of that index be lost, for everybody who uses the simulated machine, or be found again."""
    command = [sys.executable, "-c", PROGRAM, str(LIBRARY), str(index), str(int(lost))]
    subprocess.run(command, env={**os.environ, "NBGPU_SIM_STATE": str(machine)}, check=True, timeout=30)
