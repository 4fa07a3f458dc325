"""Section about what the limiter costs: nanoseconds of a call, counted by a C program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from . import BENCH, PREBUILT, ROOT, ptx
from .kit import Kit, Skip
from .places import Spec

NAME = "limiter_calls"
CALLS = {
    "launch": ("launch", 400, 0),
    "alloc + free": ("alloc", 20, 0),
    "alloc + free, 2,000 blocks held": ("alloc", 20, 2000),
    "cuMemGetInfo": ("meminfo", 20, 0),
}


def _build_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nbgpu_build", ROOT / "nodeagent" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nbgpu_build"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def program(folder: Path) -> Path:
    """Compile bench/limiter_calls.c into a folder; return the program.

    Raises
    ------
    Skip
        There is no C compiler.
    """
    compiler = _build_module().find_compiler(None)
    if compiler is None:
        raise Skip(f"no C compiler here, and no {PREBUILT / NAME} (made by `python3 bench/hardware.py --prepare` on another machine)")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    flags = ["-std=gnu11", "-O2", f"-I{ROOT / 'nodeagent' / 'include'}"]
    done = subprocess.run([*compiler, *flags, "-o", str(path), str(BENCH / f"{NAME}.c"), "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise Skip(f"{NAME}.c could not be compiled: {done.stderr.strip()[-200:]}")
    return path


def cost(kit: Kit) -> dict[str, Any]:
    """What a launch, an allocation and a question cost with and without the limiter; runs take turns, the least median of 201 counts."""
    tool = PREBUILT / NAME
    if not tool.is_file() or not os.access(tool, os.X_OK):
        tool = program(kit.folder)
    module = kit.folder / "kernels.ptx"
    version, target = _target(kit)
    module.write_bytes(ptx.text(version, target)[:-1])
    found: dict[str, Any] = kit.results.setdefault("cost", {})
    for label, (what, count, live) in CALLS.items():
        rounds = int(kit.pick(5 if what == "launch" else 2, 1))  # the driver's own launch differs by a fifth from one process to the next
        if kit.simulated:
            count, live = max(5, count // 20), live // 20
        values: dict[str, list[float]] = {}
        for _ in range(rounds):
            for place in kit.places():
                place.env["BENCH_PTX"] = str(module)
                done = place.run(Spec(500), [str(tool), what, str(count), str(live)], 60)
                if done.returncode:
                    found.setdefault("failed", []).append(f"{label} under {place.name}: {done.stderr.strip()[-200:]}")
                    continue
                values.setdefault(place.name, []).append(float(done.stdout.split()[0]))
        found[label] = {name: min(numbers) for name, numbers in values.items()}
        found.setdefault("all", {})[label] = values
        for name, number in found[label].items():
            kit.compare(f"cost of {label}", name, {"ns": round(number, 1)})
    launch = found.get("launch", {})
    if {"nbgpu", "driver alone"} <= launch.keys():
        added = launch["nbgpu"] - launch["driver alone"]
        kit.fact(
            "launch-cost",
            "unknown" if kit.simulated else "holds" if added <= 30 else "differs",
            f"{launch['driver alone']:.0f} ns without, {launch['nbgpu']:.0f} ns in a slice that is alone: {added:+.0f} ns",
        )
    return found


def _target(kit: Kit) -> tuple[str, str]:
    said = str(kit.machine.get("ptx", ""))
    return next((pair for pair in ptx.TARGETS if said.endswith(pair[1])), ptx.TARGETS[0])
