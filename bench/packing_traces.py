"""Nodes and requests of `bench/packing.py`: read from CSV files in openb's columns, or made up."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nbgpu_pool.placement.fleet import Gpu, Need, Node

MIB = 1024**2
T = TypeVar("T")


def _read(path: Path, what: str, make: Callable[[dict[str, str]], T]) -> list[T]:
    """Make something of each row. ValueError, with the line, for one of which nothing can be made."""
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        found: list[T] = []
        for row in rows:
            try:
                found.append(make(row))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {rows.line_num}: no {what}: {error!r}") from None
    return found


def read_nodes(path: Path) -> list[Node]:
    """Read ``sn, cpu_milli, memory_mib, gpu, model``.

    Raises
    ------
    ValueError
        With the line.
    """
    return _read(path, "node", _node)


def _node(row: dict[str, str]) -> Node:
    return Node([Gpu(row["model"])] * int(row["gpu"]), int(row["cpu_milli"]), int(row["memory_mib"]) * MIB)


def read_needs(path: Path) -> list[Need]:
    """Read ``name, cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec``; models in ``gpu_spec`` are parted by ``|``.

    Raises
    ------
    ValueError
        With the line.
    """
    return _read(path, "request", _need)


def _need(row: dict[str, str]) -> Need:
    count = int(row["num_gpu"])
    milli = int(row["gpu_milli"]) if count else 0
    models = frozenset((row.get("gpu_spec") or "").split("|")) - {""} if count else frozenset[str]()
    return Need(count, milli, 0, int(row["cpu_milli"]), int(row["memory_mib"]) * MIB, models or None)


def made_up_nodes(scale: int = 1) -> list[Node]:
    """Return nodes of our own invention: for each `scale` 27 of them with 116 devices."""
    large = Node([Gpu("Large")] * 8, 88_000, 360 * 1024 * MIB)
    twin = Node([Gpu("Small")] * 2, 40_000, 180 * 1024 * MIB)
    single = Node([Gpu("Old")], 12_000, 60 * 1024 * MIB)
    some = [large, twin, twin, twin, large, large, single, twin, large, twin, large, single, twin, large, *[twin] * 4]
    return [*some, large, large, twin, *[large] * 4, *[single] * 2] * scale


def made_up_needs(count: int, seed: int, *, models: bool = False) -> list[Need]:
    """Return requests of our own invention: many small ones, some whole devices, a few whole nodes, some that want CPU alone."""
    luck = random.Random(seed)
    shapes: list[tuple[int, int, int, int]] = [  # devices, part, CPU, how often
        (1, 125, 1_500, 10), (1, 250, 3_000, 14), (1, 333, 3_500, 8), (1, 500, 6_000, 16), (1, 700, 7_000, 6), (1, 820, 9_000, 9),
        (1, 1000, 8_000, 14), (1, 1000, 16_000, 6), (2, 1000, 20_000, 4), (4, 1000, 44_000, 2), (8, 1000, 80_000, 1), (0, 0, 6_000, 10),
    ]  # fmt: skip
    found: list[Need] = []
    for devices, part, cpu, _ in luck.choices(shapes, [often for *_, often in shapes], k=count):
        wanted = luck.choice([None, None, frozenset({"Large"}), frozenset({"Small", "Old"})]) if models and devices == 1 else None
        found.append(Need(devices, part, 0, cpu, 4096 * MIB * max(devices, 1), wanted))
    return found


def write_trace(folder: Path, nodes: list[Node], needs: list[Need]) -> tuple[Path, Path]:
    """Write both as CSV files; return their paths, nodes first."""
    node_path, need_path = folder / "nodes.csv", folder / "requests.csv"
    with node_path.open("w", newline="") as lines:
        out = csv.writer(lines)
        out.writerow(["sn", "cpu_milli", "memory_mib", "gpu", "model"])
        for number, node in enumerate(nodes):
            out.writerow([f"node-{number:04}", node.cpu_milli, (node.ram_bytes or 0) // MIB, len(node.gpus), node.gpus[0].model])
    with need_path.open("w", newline="") as lines:
        out = csv.writer(lines)
        out.writerow(["name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "gpu_spec"])
        for number, need in enumerate(needs):
            models = "|".join(sorted(need.models or ()))
            out.writerow([f"pod-{number:04}", need.cpu_milli, need.ram_bytes // MIB, need.device_count, need.compute_milli, models])
    return node_path, need_path
