"""The parts of the hardware kit; `bench/hardware.py` is the program."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
PREBUILT = ROOT / ".nbgpu" / "hardware"
"""Where ``bench/hardware.py --prepare`` puts what a machine without a C compiler needs."""
PYTHON = sys.executable
WORKER = BENCH / "hardware_worker.py"
GIB, MIB = 1024**3, 1024**2
