"""What the limiter costs: launches, allocations and memory queries with it, against the same program without it.

``python bench/limiter.py [--quick] [--json]``

The program calls through the pointers that cuGetProcAddress returns. The driver under it is bench/null_driver.c, whose functions return
at once, so that the difference is the limiter's own cost and not the noise of a driver: no GPU is involved and every figure is
*simulated* in that sense. Runs alternate between without and with; medians are compared. The run fails when the counters in
the slice's `use` file differ from the calls that were made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "nodeagent"), str(ROOT / "tests"), str(ROOT / "tests" / "limiter")]

from limiter_kit import environment, limiter, null_driver, program  # noqa: E402
from limiter_slice import SliceFiles  # noqa: E402

from nbgpu_agent import layout  # noqa: E402

LIMITS = {
    "launch_added_ns": 4,
    "alloc_free_added_ns_0": 120,
    "alloc_free_added_ns_10000": 120,
    "alloc_free_contended_ns": 120,
    "meminfo_added_ns": 50,
    "launch_gated_ns": 30,
}
SLICE_BYTES = 64 << 30
CROWD = 4


class CountersDiffer(Exception):
    """The slice's counters are not what was called."""


def measure(env: dict[str, str], what: str, count: int, live: int, files: SliceFiles | None) -> float:
    """Nanoseconds of one operation; with `files`, check what they count."""
    command = [str(program("limiter_calls")), what, str(count), str(live)]
    child = subprocess.Popen(command, env=env | {"BENCH_HOLD": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"limiter: {command[0]} failed")
    nanoseconds, calls = line.split()
    if files is not None:
        check_counters(files, child.pid, what, int(calls), live)
    child.communicate("\n", timeout=60)
    return float(nanoseconds)


def check_counters(files: SliceFiles, pid: int, what: str, calls: int, live: int) -> None:
    """Raise when the slot of `pid` does not say exactly what it did."""
    (slot,) = [slot for slot in files.slots() if slot.owner >> 32 == pid]
    launches = calls if what == "launch" else 0
    allocs = live + (calls if what == "alloc" else 0)
    said = (files.launches(slot), slot.allocs, slot.frees, slot.used)
    made = (launches, allocs, allocs - live, live * 4096)
    if said != made:
        raise CountersDiffer(f"{what}: the slice counts (launches, allocs, frees, bytes) {said}, made were {made}")


def compare(files: SliceFiles, what: str, count: int, live: int, rounds: int) -> tuple[float, float]:
    """Medians without and with the limiter, of runs that take turns."""
    plain, limited = environment(None, null_driver()), environment(files, null_driver(), preload=limiter())
    without, with_it = [], []
    for _ in range(rounds):
        without.append(measure(plain, what, count, live, None))
        with_it.append(measure(limited, what, count, live, files))
    return statistics.median(without), statistics.median(with_it)


def contended(files: SliceFiles, count: int, rounds: int) -> tuple[float, float]:
    """Medians without and with the limiter of an alloc+free while four processes of the slice do nothing else.

    Of CPU time, as they may have to take turns on the cores; with runs so long that they overlap.
    """
    cpu = {"BENCH_CPU_TIME": "1"}
    plain, limited = environment(None, null_driver()) | cpu, environment(files, null_driver(), preload=limiter()) | cpu
    medians: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for limits in (False, True):
            env, counted = (limited, files) if limits else (plain, None)
            with ThreadPoolExecutor(CROWD) as pool:
                times = list(pool.map(lambda _: measure(env, "alloc", 10 * count, 0, counted), range(CROWD)))  # noqa: B023
            medians[limits].append(statistics.median(times))
    return statistics.median(medians[False]), statistics.median(medians[True])


def beating(files: SliceFiles, stop: threading.Event) -> None:
    """The scheduler's heartbeat, while launches are measured behind an open gate."""
    while not stop.wait(0.05):
        files.beat()


def run(quick: bool) -> list[tuple[str, float, float, float]]:
    """Rows of (key, without, with, value)."""
    count, rounds = (2_000, 5) if quick else (10_000, 11)
    rows: list[tuple[str, float, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="nbgpu-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        files = SliceFiles(Path(folder) / "plain", mem_limit=SLICE_BYTES)
        for key, what, live in [
            ("launch_added_ns", "launch", 0),
            ("alloc_free_added_ns_0", "alloc", 0),
            ("alloc_free_added_ns_10000", "alloc", 10_000),
            ("meminfo_added_ns", "meminfo", 0),
        ]:
            without, with_it = compare(files, what, count, live, rounds)
            rows.append((key, without, with_it, with_it - without))
        without, with_it = contended(files, count, max(1, rounds // 2))
        rows.append(("alloc_free_contended_ns", without, with_it, with_it - without))
        gated = SliceFiles(Path(folder) / "gated", mem_limit=SLICE_BYTES, gate=layout.GATE_OPEN)
        stop = threading.Event()
        threading.Thread(target=beating, args=(gated, stop), daemon=True).start()
        without, with_it = compare(gated, "launch", count // 10, 0, max(3, rounds // 2))
        stop.set()
        rows.append(("launch_gated_ns", without, with_it, with_it - without))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    try:
        rows = run(options.quick)
    except CountersDiffer as error:
        raise SystemExit(f"limiter: {error}") from None
    print(f"Cost of the limiter on a null driver (simulated: no GPU), {platform.machine()}, {os.cpu_count()} CPUs; medians, counters exact")
    print(f"{'':28}{'without':>10}{'with':>10}{'ns':>10}{'at most':>10}")
    for key, without, with_it, value in rows:
        most = LIMITS.get(key)
        print(f"{key:28}{without:>10.1f}{with_it:>10.1f}{value:>10.1f}{most if most else '':>10}")
    if options.json:
        print(json.dumps({"simulated": True, "driver": "null"} | {key: round(value, 2) for key, _, _, value in rows}))


if __name__ == "__main__":
    main()
