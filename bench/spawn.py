"""What a slice adds to a server's start, and 50 users who start at once, on *simulated* GPUs.

``python bench/spawn.py [--quick] [--json] [--users 50] [--devices 8] [--spawns 120]``

* Two real JupyterHubs side by side, alike but for the spawner: SimpleLocalProcessSpawner and SimpleLocalGPUSpawner with pool, agent,
  limiter and simulated driver. The servers are light (`spawn_server.py`): real ones would drown the difference.
* `added_p50_ms`: single starts of both in turn, each from the POST until the hub has had the server's answer; difference of the medians.
  `added_pairs_p50_ms` is the median of the differences of neighbours in time; `cpu_ms_each` what the parts took of the processor.
  The hub looks for a new server with a random back-off of up to 0.4 s; here both look every 5 ms, so that chance does not decide.
* The burst: every user starts 1/8 of a GPU at the same moment; each server then takes memory to its limit and must be refused one block
  beyond. `failed` counts the users for whom any of that went wrong.
* `lab_import_ms`: import of the notebook side in a process that has JupyterLab loaded already, median of fresh processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "spawner"), str(ROOT / "nodeagent"), str(ROOT / "tests"), str(ROOT / "tests" / "hub")]

import httpx  # noqa: E402
from hub_process import Hub, proxy_command, until  # noqa: E402

BARS = {"failed": 0, "added_p50_ms": 30.0, "lab_import_ms": 50.0}
SHARE = "1/8"
WARM_UP = 3
PARTS = {"jupyterhub": "hub", "nbgpu_pool": "pool", "nbgpu_agent": "agent"}
"""Word of a command line -> whose CPU time it is."""
COMMON = """
import functools
import jupyterhub.utils
jupyterhub.utils.exponential_backoff = functools.partial(jupyterhub.utils.exponential_backoff, start_wait=0.005, scale_factor=1)
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 120}}
c.Spawner.http_timeout = 120
c.Spawner.cmd = [{python!r}, {server!r}]
c.JupyterHub.log_level = "WARN"
"""
GPU = COMMON + "setup(c, runtime={runtime!r})\n"
IMPORT = """
import time
import jupyterlab.labapp
start = time.perf_counter()
import nbgpu_lab
nbgpu_lab._jupyter_server_extension_points()
import nbgpu_lab.extension
print((time.perf_counter() - start) * 1000)
"""


def start_hubs(place: Path, devices: int) -> tuple[Hub, Hub]:
    """Return a stock hub and one with slices, both running, the latter's pool ready."""
    words = {"python": sys.executable, "server": str(ROOT / "bench" / "spawn_server.py"), "runtime": str(place / "run")}
    environment = {"NBGPU_SIM_STATE": str(place / "sim"), "NBGPU_SIM_DEVICES": str(devices), "NBGPU_RUNTIME_DIR": str(place / "run")}
    hubs: list[Hub] = []
    for name, more in (("stock", COMMON), ("gpu", GPU)):
        (place / name).mkdir()
        hubs.append(Hub(place / name, more.format(**words), environment=environment))
    try:
        for hub in hubs:
            hub.start()
        until(lambda: pool_devices(place) == devices, 60, f"the pool has {devices} devices\n{hubs[1].log.read_text()[-2000:]}")
    except BaseException:
        end(hubs)
        raise
    return hubs[0], hubs[1]


def end(hubs: list[Hub]) -> None:
    """End hubs with all that they started."""
    for hub in hubs:
        hub.end()


def pool_devices(place: Path) -> int:
    """Return how many devices the pool knows."""
    transport = httpx.HTTPTransport(uds=str(place / "run" / "pool.sock"))
    try:
        with httpx.Client(transport=transport, base_url="http://pool", timeout=5) as pool:
            return len(pool.get("/v1/devices").json())
    except (httpx.HTTPError, ValueError):
        return 0


def spawn_seconds(hub: Hub, user: str, options: dict[str, Any]) -> float:
    """Start a server; return the time from the POST to the hub's word that it answers. Raise when it does not."""
    start = time.perf_counter()
    answer = hub.api("POST", f"users/{user}/server", options)
    seconds = time.perf_counter() - start
    if answer.status_code != 201:
        raise RuntimeError(f"{user}: {answer.status_code} {answer.text[:200]}")
    return seconds


def one_of_many(hub: Hub, user: str) -> tuple[float, str | None]:
    """Start a share, then take it to its limit; return the seconds, and what went wrong."""
    try:
        seconds = spawn_seconds(hub, user, {"gpu_fraction": SHARE})
        said = httpx.get(f"http://127.0.0.1:{hub.port}/user/{user}/probe", timeout=120).json()
    except (RuntimeError, httpx.HTTPError, ValueError) as error:
        return 0.0, str(error)
    return seconds, wrong(said)


def wrong(said: dict[str, Any]) -> str | None:
    """Return what is wrong with a probe's answer; None when it had its limit, and not a block more."""
    if "error" in said:
        return str(said["error"])
    if said["status"] != 2:
        return f"refused with {said['status']}, not with out of memory"
    if not said["free"] - said["block"] < said["had"] <= said["free"] <= said["total"]:
        return f"had {said['had']} of {said['free']} free bytes, {said['total']} in all"
    return None


def burst(hub: Hub, users: list[str], start: Callable[[Hub, str], tuple[float, str | None]]) -> tuple[list[float], list[str]]:
    """Start all at once; return the seconds of each and what failed."""
    with ThreadPoolExecutor(len(users)) as crowd:
        results = list(crowd.map(lambda user: start(hub, user), users))
    failed = [f"{user}: {problem}" for user, (_, problem) in zip(users, results, strict=True) if problem]
    return [seconds for seconds, problem in results if problem is None], failed


def stock_start(hub: Hub, user: str) -> tuple[float, str | None]:
    """Start a server of the stock hub."""
    try:
        return spawn_seconds(hub, user, {}), None
    except (RuntimeError, httpx.HTTPError) as error:
        return 0.0, str(error)


def stop_all(hub: Hub, users: list[str]) -> None:
    """Stop all servers."""
    with ThreadPoolExecutor(8) as crowd:
        list(crowd.map(hub.stop, users))


def interleaved(stock: Hub, gpu: Hub, count: int) -> tuple[list[float], list[float]]:
    """Start and stop one server of each hub in turn; return the seconds of each start."""
    times: tuple[list[float], list[float]] = ([], [])
    turns = ((stock, {}, times[0]), (gpu, {"gpu_fraction": SHARE}, times[1]))
    for index in range(-WARM_UP, count):
        for hub, options, seconds in turns if index % 2 else turns[::-1]:
            taken = spawn_seconds(hub, "u00", options)
            if index >= 0:  # the first ones warm up
                seconds.append(taken)
            hub.stop("u00")
    return times


def cpu_seconds(hub: Hub) -> dict[str, float]:
    """Return the CPU time of a hub, and of the pool and the agent that it started, seconds so far."""
    found: dict[str, float] = {}
    for pid in hub.left():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            name = next((part for word, part in PARTS.items() if word in command), None)
            if name is not None:
                tasks = Path(f"/proc/{pid}/task").iterdir()
                found[name] = found.get(name, 0) + sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    return found


def cpu_ms_each(before: dict[str, float], after: dict[str, float], count: int) -> dict[str, float]:
    """Return the CPU time of each part per start and stop, ms."""
    return {name: round((seconds - before.get(name, 0)) * 1000 / count, 1) for name, seconds in after.items()}


def lab_import_ms(runs: int) -> float | None:
    """Return the median cost of importing the notebook side; None where JupyterLab is not installed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'labextension'}"}
    found: list[float] = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=environment, timeout=120)
        if done.returncode:
            print(done.stderr[-500:], file=sys.stderr)
            return None
        found.append(float(done.stdout.split()[-1]))
    return round(statistics.median(found), 1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; return the figures."""
    place = Path(tempfile.mkdtemp(prefix="nbgpu-bench-", dir="/tmp"))
    users = [f"u{index:02}" for index in range(options.users)]
    stock, gpu = start_hubs(place, options.devices)
    try:
        for hub in (stock, gpu):
            hub.add(*users)
        before = [cpu_seconds(hub) for hub in (stock, gpu)]
        stock_times, gpu_times = interleaved(stock, gpu, options.spawns)
        cpu = [cpu_ms_each(begun, cpu_seconds(hub), len(gpu_times) + WARM_UP) for begun, hub in zip(before, (stock, gpu), strict=True)]
        stock_burst, stock_failed = burst(stock, users, stock_start)
        stop_all(stock, users)
        gpu_burst, failed = burst(gpu, users, one_of_many)
        stop_all(gpu, users)
    except BaseException:
        print(gpu.log.read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        end([stock, gpu])
        shutil.rmtree(place, ignore_errors=True)
    for line in failed + stock_failed:
        print(f"  failed: {line}", file=sys.stderr)
    stock_p50, gpu_p50 = statistics.median(stock_times) * 1000, statistics.median(gpu_times) * 1000
    return {
        "simulated": True,
        "failed": len(failed),
        "added_p50_ms": round(gpu_p50 - stock_p50, 1),
        "lab_import_ms": lab_import_ms(3 if options.quick else 9),
        "stock_p50_ms": round(stock_p50, 1),
        "nbgpu_p50_ms": round(gpu_p50, 1),
        "added_pairs_p50_ms": round(statistics.median(b - a for a, b in zip(stock_times, gpu_times, strict=True)) * 1000, 1),
        "cpu_ms_each": {"stock": cpu[0], "nbgpu": cpu[1]},
        "spawns_each": options.spawns,
        "burst_users": options.users,
        "burst_devices": options.devices,
        "burst_p50_s": round(statistics.median(gpu_burst), 2) if gpu_burst else None,
        "burst_max_s": round(max(gpu_burst), 2) if gpu_burst else None,
        "stock_failed": len(stock_failed),
        "stock_burst_p50_s": round(statistics.median(stock_burst), 2) if stock_burst else None,
        "stock_burst_max_s": round(max(stock_burst), 2) if stock_burst else None,
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}, JupyterHub {gpu.version}",
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures for people."""
    rows = [
        ("", "stock", "nbgpu (simulated)", "at most"),
        (f"one start, p50 of {found['spawns_each']}", f"{found['stock_p50_ms']} ms", f"{found['nbgpu_p50_ms']} ms", ""),
        ("added by a slice", "", f"{found['added_p50_ms']} ms", f"{BARS['added_p50_ms']} ms"),
        ("the same, median of the pairs", "", f"{found['added_pairs_p50_ms']} ms", ""),
        *(
            (f"CPU of the {part}, start and stop", f"{found['cpu_ms_each']['stock'].get(part, '-')} ms", f"{milliseconds} ms", "")
            for part, milliseconds in found["cpu_ms_each"]["nbgpu"].items()
        ),
        (f"{found['burst_users']} at once, p50", f"{found['stock_burst_p50_s']} s", f"{found['burst_p50_s']} s", ""),
        (f"{found['burst_users']} at once, last", f"{found['stock_burst_max_s']} s", f"{found['burst_max_s']} s", ""),
        ("of them failed", str(found["stock_failed"]), str(found["failed"]), "0"),
        ("import of the notebook side", "", f"{found['lab_import_ms']} ms", f"{BARS['lab_import_ms']} ms"),
    ]
    return "\n".join(f"{a:<32}{b:>12}{c:>20}{d:>12}" for a, b, c, d in rows)


def main() -> int:
    """Measure, print, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer single starts (30)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--spawns", type=int, help="single starts of each spawner (120; quick: 30)")
    options = parser.parse_args()
    options.spawns = options.spawns or (30 if options.quick else 120)
    if proxy_command() is None:
        print("configurable-http-proxy is not installed (make setup, or npm install configurable-http-proxy).", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it started, too
    found = measure(options)
    print(f"Starting servers with a slice, simulated GPUs. {found['machine']}.")
    print(table(found))
    if options.json:
        print(json.dumps(found))
    missed = [name for name, bar in BARS.items() if found[name] is not None and found[name] > bar]
    if missed:
        print(f"Missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
