"""`bench/compute.py --scheduler`: what the turns cost the scheduler's thread, in CPU time.

Devices x slices that all compute without end, as real processes under the limiter on the simulated driver, in turns as shipped and in turns
`--time-scale` times as long. CPU time is the thread's own clock: it tells the same on a busy machine, where time on the wall does not.
Looks (times that a slice's slots were read) and bells (times that a slice woke the thread) are counted apart from the turns, and beside
them stands what one sleep costs a thread on this machine: no wake-up costs less.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from compute import START_SECONDS, WARM_UP_SECONDS, Machine, Share, SliceFiles, build, start_client, turns, wait_ready

from nbgpu_agent.native import Native, Scheduler

US_PER_TURN, CPU_PERCENT = 20.0, 2.5
BARS = f"a turn <= {US_PER_TURN:g} us of CPU time, 8 devices x 8 tenants <= {CPU_PERCENT:g} % of a core"
CELLS = {"1 x 2": (1, 2), "1 x 8": (1, 8), "8 x 8": (8, 8)}
KERNEL_MS = 5
IDLE_SECONDS = 3.0
SLEEPS, SLEEP_SECONDS = 50, 0.02  # about as long as the thread sleeps: one millisecond costs less, for everything is still in the caches


def turns_of(scheduler: Scheduler, entries: list[int]) -> int:
    """Return how many turns these had."""
    return sum(scheduler.stats(entry).turns for entry in entries)


def cost(machine: Machine, folder: Path, devices: int, tenants: int, scale: int, seconds: float) -> dict[str, Any]:
    """Return what the scheduler's thread did for `tenants` busy slices on each of `devices`."""
    share = Share(1000 // tenants)
    clients: list[subprocess.Popen[str]] = []
    entries: list[int] = []
    folder.mkdir()
    with Native().scheduler(turns(scale)) as scheduler:
        try:
            slices = [SliceFiles(folder / str(i), share, machine.uuid(i % devices)) for i in range(devices * tenants)]
            entries = [files.add_to(scheduler, share, i % devices) for i, files in enumerate(slices)]
            time.sleep(0.2)
            idle, began = scheduler.totals(), time.monotonic()
            time.sleep(IDLE_SECONDS)
            idle_percent = (scheduler.totals().cpu_ns - idle.cpu_ns) / 1e7 / (time.monotonic() - began)
            clients = [start_client(machine, int(KERNEL_MS * 1e6 * scale), files.folder) for files in slices]
            wait_ready(clients)
            time.sleep(WARM_UP_SECONDS * scale)
            before, turned, began = scheduler.totals(), -turns_of(scheduler, entries), time.monotonic()
            time.sleep(seconds)
            after, passed = scheduler.totals(), time.monotonic() - began
            turned += turns_of(scheduler, entries)
        finally:
            for client in clients:
                client.kill()
            for client in clients:
                client.communicate(timeout=START_SECONDS)
            shutil.rmtree(folder)
    wakeups, turned, cpu_ns = after.wakeups - before.wakeups, max(1, turned), after.cpu_ns - before.cpu_ns
    return {
        "devices": devices,
        "tenants_per_device": tenants,
        "time_scale": scale,
        "us_per_turn": round(cpu_ns / 1e3 / turned, 1),
        "us_per_wakeup": round(cpu_ns / 1e3 / max(1, wakeups), 1),
        "wakeups_per_turn": round(wakeups / turned, 2),
        "bells_per_turn": round((after.bells - before.bells) / turned, 2),
        "looks_per_turn": round((after.looks - before.looks) / turned, 2),
        "turns_per_second": round(turned / passed, 1),
        "scheduler_cpu_percent": round(cpu_ns / 1e7 / passed, 2),
        "idle_cpu_percent": round(idle_percent, 2),
    }


def sleep_us() -> float:
    """Return the CPU time that one sleep and waking from it cost a thread on this machine: the least that a wake-up can cost."""
    began = time.thread_time_ns()
    for _ in range(SLEEPS):
        time.sleep(SLEEP_SECONDS)
    return round((time.thread_time_ns() - began) / 1e3 / SLEEPS, 1)


def measure(scale: int, seconds: float, only: str) -> list[dict[str, Any]]:
    """Return the cells of one time scale. A process has one simulated machine: call this in a new one."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nbgpu-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        machine = Machine(Path(name), scale, max(devices for devices, _ in CELLS.values()))
        for cell, (devices, tenants) in CELLS.items():
            if only in cell:
                rows.append(
                    cost(machine, Path(name) / "run", devices, tenants, scale, seconds) | {"cell": cell, "us_per_sleep": sleep_us()}
                )
    return rows


def is_missed(row: dict[str, Any]) -> bool:
    """Whether a cell is beyond its bar."""
    return bool(row["us_per_turn"] > US_PER_TURN or (row["cell"] == "8 x 8" and row["scheduler_cpu_percent"] > CPU_PERCENT))


def main(time_scale: int, seconds: float, as_json: bool, only: str = "") -> int:
    """Measure every cell, print a table; 1 when a bar is missed."""
    build()
    rows: list[dict[str, Any]] = []
    print(f"Cost of the scheduler's thread, simulated driver, GPU kernels of {KERNEL_MS} ms, {seconds:g} s each.\nBars: {BARS}.")
    print(
        f"{'devices x slices':<17} {'scale':>5} | {'us/turn':>8} {'us/wake':>8} {'us/sleep':>8} | {'wakes':>6} {'bells':>6} "
        f"{'looks':>6} a turn | {'turns/s':>8} {'% of a core':>11} {'idle %':>7}"
    )
    for scale in sorted({1, time_scale}):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(measure, scale, seconds, only).result()
        for row in found:
            print(
                f"{row['cell']:<17} {scale:>5} | {row['us_per_turn']:>8.1f} {row['us_per_wakeup']:>8.1f} {row['us_per_sleep']:>8.1f} | "
                f"{row['wakeups_per_turn']:>6.1f} {row['bells_per_turn']:>6.1f} {row['looks_per_turn']:>6.1f}        "
                f"| {row['turns_per_second']:>8.1f} {row['scheduler_cpu_percent']:>11.2f} {row['idle_cpu_percent']:>7.2f}",
                flush=True,
            )
        rows += found
    for row in filter(is_missed, rows):
        print(
            f"MISSED: {row['cell']}, scale {row['time_scale']}: {row['us_per_turn']} us a turn, {row['scheduler_cpu_percent']} % of a core"
        )
    if as_json:
        print(json.dumps({"benchmark": "compute", "mode": "scheduler", "simulated": True, "cores": os.cpu_count(), "cells": rows}))
    return 1 if any(map(is_missed, rows)) else 0
