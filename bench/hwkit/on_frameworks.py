"""Section about frameworks: what each sees, how it meets the limit, and what a step costs, in a slice and under the driver alone."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import BENCH, GIB, MIB, PYTHON
from .kit import Kit, Skip
from .places import Spec

NAMES = {"torch": "PyTorch", "cupy": "CuPy", "jax": "JAX", "numba": "Numba"}
SIMULATED = {"numba"}
"""What the simulated driver is enough for: the others need the driver's undocumented tables."""


def frameworks(kit: Kit) -> dict[str, Any]:
    """Run each framework that is installed in a slice of 6 GiB: what it is told, a result, its own out-of-memory error, life after it."""
    found: dict[str, Any] = kit.results.setdefault("frameworks", {})
    limit = kit.memory(6 * GIB, 6 * GIB)
    for name, title in NAMES.items():
        why = _why_not(kit, name)
        if why:
            found[title] = {"skipped": why}
            continue
        rows: dict[str, Any] = {}
        found[title] = rows
        for place in kit.places()[: 1 if kit.simulated else None]:
            if kit.left() < 15 and not kit.simulated:
                rows[place.name] = {"skipped": "the time was over"}
                continue
            command = [PYTHON, str(BENCH / "hwkit" / "framework_probe.py"), name, str(limit), str(kit.pick(2.0, 0.2))]
            seconds = min(60.0, max(5.0, kit.left() - 2))
            try:
                done = place.run(Spec(250, memory=limit), command, seconds)
            except Exception as error:
                rows[place.name] = {"failed": f"{type(error).__name__}: not done within {seconds:.0f} s"}
                continue
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            rows[place.name] = (
                json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-300:] or f"exit status {done.returncode}"}
            )
            row = rows[place.name]
            if place.name == "driver alone" and "step_ms" in row:
                row.pop("refused", None)
            kit.compare(
                f"{title}, a step", place.name, {key: row.get(key) for key in ("step_ms", "total_mib", "refused", "failed") if key in row}
            )
            kit.say(f"  {title}, {place.name}: {row}")
        _judge(kit, title, rows, limit)
    return found


def training(kit: Kit) -> dict[str, Any]:
    """Two PyTorch trainings at once, 70 % and 30 %: what each gets done of what one alone gets done."""
    why = _why_not(kit, "torch")
    if why:
        raise Skip(f"PyTorch: {why}")
    found: dict[str, Any] = kit.results.setdefault("training", {})
    seconds, start_up, size = 6.0, 14.0, kit.memory(8 * GIB, 8 * GIB)
    alone = _train(kit, "driver alone", [Spec(1000)], 3.0, start_up)[0]
    found["alone_steps_per_second"] = alone["steps_per_second"]
    for place in kit.places():
        if kit.left() < seconds + start_up + 3:
            found[place.name] = {"skipped": "the time was over"}
            continue
        rows = _train(kit, place.name, [Spec(700, memory=size), Spec(300, memory=size)], seconds, start_up)
        parts = [round(row["steps_per_second"] / alone["steps_per_second"] * 100, 1) for row in rows]
        found[place.name] = {"percent_of_alone": parts, "late_seconds": [row["late_seconds"] for row in rows]}
        kit.compare("two PyTorch trainings, 70 % and 30 %: of what one alone does", place.name, {"percent": parts})
        kit.say(f"  {place.name}: {parts}")
    return found


def _train(kit: Kit, place: str, specs: list[Spec], seconds: float, start_up: float) -> list[dict[str, Any]]:
    start = time.monotonic_ns() + int(start_up * 1e9)
    command = [PYTHON, str(BENCH / "hwkit" / "framework_probe.py"), "training", "0", str(seconds), str(start)]
    most = min(seconds + start_up + 20, max(5.0, kit.left()))
    with ThreadPoolExecutor(len(specs)) as pool:
        done = list(pool.map(lambda spec: kit.place(place).run(spec, command, most), specs))
    failed = next((one for one in done if one.returncode), None)
    if failed is not None:
        raise RuntimeError(f"a training under {place} ended with {failed.returncode}: {failed.stderr.strip()[-200:]}")
    return [json.loads(one.stdout.strip().splitlines()[-1]) for one in done]


def _why_not(kit: Kit, name: str) -> str:
    if kit.simulated and name not in SIMULATED:
        return "not on the simulated driver"
    return "" if importlib.util.find_spec(name) else "not installed here"


def _judge(kit: Kit, title: str, rows: dict[str, Any], limit: int) -> None:
    row = rows.get("nbgpu")
    if row is None:
        return
    good = row.get("result") == "right" and row.get("refused") == "out of memory" and row.get("after") == "right"
    good = good and row.get("total_mib") in (None, limit // MIB)
    broken = "failed" in row and "failed" in rows.get("driver alone", {})
    kit.fact(
        f"framework-{title.lower()}",
        "holds" if good else "unknown" if broken else "differs",  # it does not work here without nbgpu either
        json.dumps({key: row.get(key) for key in ("total_mib", "result", "refused", "after", "step_ms", "failed")}),
    )
