"""`bench/compute.py --policy`: the scheduling policy alone, in virtual time, over a sweep of drivers and hosts.

Cells and bars: tests/model/policy_sweep.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "model")]

import policy_sweep  # noqa: E402
from gpu_sim import Gpu, Sim, Work, build  # noqa: E402

BARS = (
    f"shares: mean error <= {policy_sweep.MEAN_POINTS:g} point, worst window <= {policy_sweep.WORST_POINTS:g}, busy >= "
    f"{policy_sweep.BUSY_RATIO:g} of one tenant alone; strict: every window within {policy_sweep.STRICT_POINTS:g} (late "
    f"{policy_sweep.LATE_STRICT_POINTS:g}); 100 ms kernels: "
    f"{policy_sweep.LONG_LEAST:g} to {policy_sweep.LONG_MOST:g} %; strict beside long kernels: "
    f"{policy_sweep.LONG_BESIDE_LEAST:g} of its share, of that what the driver does not lose between two, to its share; visits: "
    f"gate p99 <= {policy_sweep.GATE_P99_MS:g} ms, done within "
    f"{policy_sweep.VISIT_RATIO:g} of the driver alone (p99), busy >= {policy_sweep.VISIT_BUSY:g} of it"
)
HIGHER_IS_WORSE = ("mean", "worst", "gate_p99_ms", "visit_ratio")
LOWER_IS_WORSE = ("busy_ratio",)


def worst_cells(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """For each figure the cell that is worst in it."""
    out: dict[str, Any] = {}
    for name in HIGHER_IS_WORSE:
        if name in cells[0]:
            out[name] = max(cells, key=lambda cell: cell[name])
    for name in LOWER_IS_WORSE:
        if name in cells[0]:
            out[name] = min(cells, key=lambda cell: cell[name])
    if "share" in cells[0]:
        out["lowest"], out["highest"] = min(cells, key=lambda cell: cell["share"]), max(cells, key=lambda cell: cell["share"])
    return out


def row(name: str, cells: list[dict[str, Any]], worst: dict[str, Any]) -> str:
    """One line of the table."""
    figures = [f"{figure} {cell[figure]:g}" for figure, cell in worst.items() if figure in cell]
    if "lowest" in worst:
        figures = [f"share {worst['lowest']['share']:g} to {worst['highest']['share']:g}"]
    missed = sum(bool(cell["misses"]) for cell in cells)
    control = [cell["control_mean"] for cell in cells if "control_mean" in cell]
    beside = f" | driver alone: mean {min(control):g} to {max(control):g}" if control else ""
    return f"{name:<40} {len(cells):>4} cells, {missed} missed | worst: {', '.join(figures)}{beside}"


def cost_us() -> float:
    """What one decision costs with eight slices, with the simulation around it, in microseconds."""
    with tempfile.TemporaryDirectory() as folder, Sim(build(Path(folder)), Gpu(), [Work(125)] * 8) as sim:
        began, steps = time.process_time(), sim.steps
        sim.run(60)
        return (time.process_time() - began) * 1e6 / (sim.steps - steps)


def main(quick: bool, as_json: bool) -> int:
    """Play the sweep; 1 when a cell misses its bar, or the driver alone never does."""
    gpus = policy_sweep.corners() if quick else list(policy_sweep.whole_sweep())
    gpus = policy_sweep.stopping(gpus) + gpus
    print(f"The policy in virtual time, {len(gpus)} drivers and hosts: time slice 0.5 to 6 ms, switch 0.05 to 0.5 ms, jitter 0 to 0.5 ms,")
    print("slices that stop by themselves at their turns' ends, on time or late, or whose gates are closed then.")
    print(f"Bars: {BARS}.")
    with tempfile.TemporaryDirectory() as folder:
        found = policy_sweep.sweep(build(Path(folder)), gpus, windows=5 if quick else 10)
    out: dict[str, Any] = {}
    for name, cells in found.items():
        worst = worst_cells(cells)
        out[name] = {
            "cells": len(cells),
            "missed": [cell for cell in cells if cell["misses"]],
            "control_within_bar": sum(cell["control_blind"] for cell in cells),
            "worst": worst,
        }
        print(row(name, cells, worst))
    if as_json:
        head = {"benchmark": "compute-policy", "simulated": True, "virtual_time": True, "bars": BARS, "decision_us": round(cost_us(), 2)}
        print(json.dumps({**head, "scenarios": out}))
    blind = [name for name, cells in out.items() if cells["control_within_bar"] == cells["cells"]]
    for name in blind:
        print(f"NO CONTROL: {name}: the driver alone is within the bar in every cell")
    return 1 if blind or any(cells["missed"] for cells in out.values()) else 0
