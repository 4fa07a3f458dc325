"""The pool under load, of *simulated* devices: requests over HTTP, and how long a decision takes inside the process.

``python bench/pool.py [--quick] [--json] [--only http|decide] [--nodes 777] [--devices 8] [--grants 10000] [--streams 5000]
[--beside] [--rule best-fit|value] [--quotas]``

* The service is a real `python -m nbgpu_pool --kubernetes` on a loopback port, its ledger a stand-in for the API server in a process of
  its own (as in `bench/pool_kube.py`): that is how a pool of this size is deployed. `grants` of its slices run.
* `pairs_per_s`: acquire and release, each a request, on 16 connections from one process; `p99_ms` of the single requests. `wrong`: answers
  that were not what they had to be, which must be 0; after it the books hold what they held before.
* `cpu_us_per_pair`: processor time of the service for a pair; unlike the others it says something on a machine that others use too.
* The baseline in the same run, by turns with it: an empty handler of FastAPI and one of Starlette in the same server class
  (`fastapi_per_s`, `starlette_per_s`, requests a second: a pair is two).
* `streams_rss_mb`: the memory of a service of 64 nodes while `streams` clients wait in its queue, each following its events;
  `streams_added_mb`: what they added; `streams_pairs_per_s` and `streams_p99_ms` as above while they wait. With `--beside` the service is
  the large one, whose books take 200 MB by themselves.
* `decide_median_us`, `decide_p99_us` (`value_decide_…` for the rule by value): a decision inside the process on 6,212 devices, while
  requests come and go; `scaling` the same on more. What is renewed after an answer is `after_us`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "spawner"), str(ROOT / "tests"), str(ROOT / "bench")]

import httpx  # noqa: E402
from pool_decide import scaling  # noqa: E402
from pool_kube import KEY, NAMESPACE, TOKEN, kubeconfig  # noqa: E402
from pool_load import Found, Stream, connect, empty, message, pairs  # noqa: E402

BARS_LEAST = {"pairs_per_s": 1000.0}
BARS_MOST = {"p99_ms": 50.0, "streams_rss_mb": 250.0, "decide_median_us": 5.0, "decide_p99_us": 100.0,
             "value_decide_median_us": 5.0, "value_decide_p99_us": 100.0}  # fmt: skip
CONNECTIONS = 16
BASELINE = """
import asyncio, socket, sys
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from nbgpu_pool.main import _server

api = FastAPI()

@api.post("/fastapi")
async def nothing() -> dict[str, str]:
    return {}

async def plain(_):
    return JSONResponse({})

app = Starlette(routes=[Route("/starlette", plain, methods=["POST"]), Mount("/", api)])
at = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
at.bind(("127.0.0.1", 0)); at.listen(512)
print(at.getsockname()[1], flush=True)
asyncio.run(_server(app).serve(sockets=[at]))
"""


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], **more: Any) -> Generator[subprocess.Popen[str], None, None]:
    """Run a process; end it with what is done inside."""
    running = subprocess.Popen(command, text=True, **more)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()


@contextlib.contextmanager
def service(folder: Path, options: argparse.Namespace) -> Generator[tuple[int, int], None, None]:
    """Run the pool with its ledger; yield its port and its process id."""
    sizes = ["--nodes", str(options.nodes), "--devices", str(options.devices), "--claims", str(options.grants)]
    ledger = [sys.executable, str(ROOT / "bench" / "pool_kube.py"), "--serve", *sizes]
    with process(ledger, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as api:
        assert api.stdout is not None
        url = api.stdout.readline().strip()
        (folder / "key").write_bytes(KEY)
        token = {"role": "hub", "hub": "hub", "namespaces": [NAMESPACE], "env": "BENCH_TOKEN"}
        config = {"tokens": [token], "queue": {"total": 1000 + options.streams, "per_user": 100}, "placement": {"rule": options.rule}}
        if options.quotas:
            config["quotas"] = {"default": {"limit": 10}}
        (folder / "pool.yaml").write_text(json.dumps(config))
        env = {**os.environ, "KUBECONFIG": str(kubeconfig(folder, url)), "NBGPU_NAMESPACE": "nbgpu", "BENCH_TOKEN": TOKEN,
               "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "spawner")])}  # fmt: skip
        port = free_port()
        command = [*options.under, sys.executable, "-m", "nbgpu_pool", "--kubernetes", "--listen", f"127.0.0.1:{port}",
                   "--config", str(folder / "pool.yaml"), "--seal-key", str(folder / "key")]  # fmt: skip
        with (folder / "log").open("ab") as log, process(command, env=env, stderr=log) as pool:
            with client(port) as http:
                until(lambda: bool(http.get("/healthz").json()["ready"]), pool, folder)
            try:
                yield port, pool.pid
            finally:
                if options.keep_log:
                    options.keep_log.write_bytes((folder / "log").read_bytes())


def until(ready: Any, running: subprocess.Popen[str], folder: Path) -> None:
    """Wait until `ready()`."""
    deadline = time.monotonic() + 120
    while True:
        assert running.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, "never ready"
        with contextlib.suppress(httpx.ConnectError):
            if ready():
                return
        time.sleep(0.1)


def client(port: int) -> httpx.Client:
    """Return a client of the pool."""
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)


def rss_mb(pid: int) -> float:
    """Return the memory of a process now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def granted(port: int) -> int:
    """Return how much the books have given in all, milli-GPU."""
    with client(port) as http:
        return sum(one["compute_granted_milli"] for one in http.get("/v1/devices").json())


async def waiting(port: int, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Let clients queue and follow their events; measure what that takes."""
    streams: list[Stream] = []
    loop = asyncio.get_running_loop()
    before = rss_mb(pid)
    begun = time.perf_counter()
    connection = await connect(port)
    for number in range(options.streams):
        asked = {"request_id": f"waits-{number:06}", "owner": {"hub": "hub", "user": f"waiter-{number}"}, "namespace": NAMESPACE,
                 "compute_milli": 1000, "device_count": options.devices}  # fmt: skip
        status, body = await connection.ask(message("POST", "/v1/requests", TOKEN, json.dumps(asked).encode()))
        assert status == 200, body
        assert b'"state":"queued"' in body, body
    connection.close()
    queued = time.perf_counter() - begun
    for number in range(options.streams):
        stream = Stream(message("GET", f"/v1/requests/waits-{number:06}/events", TOKEN))
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)
        streams.append(stream)
    deadline = time.monotonic() + 60
    while any(not stream.events for stream in streams):
        assert time.monotonic() < deadline, f"{sum(not one.events for one in streams)} of {options.streams} streams were told nothing"
        assert not any(stream.lost for stream in streams), f"{sum(one.lost for one in streams)} streams were closed"
        await asyncio.sleep(0.1)
    memory = rss_mb(pid)
    loaded = await pairs(port, TOKEN, options.seconds, CONNECTIONS, 1000)
    memory = max(memory, rss_mb(pid))
    lost = sum(one.lost for one in streams)
    for stream in streams:
        assert stream.transport is not None
        stream.transport.abort()
    return {
        "streams": options.streams,
        "streams_rss_mb": round(memory),
        "streams_added_mb": round(memory - before),
        "streams_lost": lost,
        "streams_queued_per_s": round(options.streams / queued),
        "streams_pairs_per_s": round(loaded.pairs / loaded.seconds),
        "streams_p99_ms": round(loaded.percentile_ms(0.99), 1),
        "streams_wrong": len(loaded.wrong),
    }


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the part over HTTP."""
    total = Found()
    fastapi, starlette = [], []
    used = bare_used = 0.0
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "spawner")])}
    with service(folder, options) as (port, pid), process([sys.executable, "-c", BASELINE], stdout=subprocess.PIPE, env=env) as plain:
        assert plain.stdout is not None
        bare = int(plain.stdout.readline())
        before = granted(port)
        await pairs(port, TOKEN, 1.0, CONNECTIONS, 999)
        for turn in range(options.runs):
            used -= cpu_seconds(pid)
            total.add(await pairs(port, TOKEN, options.seconds, CONNECTIONS, turn))
            used += cpu_seconds(pid)
            bare_used -= cpu_seconds(plain.pid)
            fastapi.append(await empty(bare, "/fastapi", options.seconds / 2, CONNECTIONS))
            bare_used += cpu_seconds(plain.pid)
            starlette.append(await empty(bare, "/starlette", options.seconds / 2, CONNECTIONS))
        wrong = [*total.wrong, *([] if granted(port) == before else ["the books do not hold what they held before"])]
        if wrong:
            print("\n".join(wrong[:5]), file=sys.stderr)
        found = {
            "pairs_per_s": round(total.pairs / total.seconds),
            "p50_ms": round(total.percentile_ms(0.5), 2),
            "p99_ms": round(total.percentile_ms(0.99), 1),
            "wrong": len(wrong),
            "cpu_us_per_pair": round(1e6 * used / max(total.pairs, 1)),
            "fastapi_cpu_us_per_pair": round(2e6 * bare_used / max(sum(fastapi) * options.seconds / 2, 1)),
            "fastapi_per_s": round(statistics.median(fastapi)),
            "starlette_per_s": round(statistics.median(starlette)),
            "rss_mb": round(rss_mb(pid)),
        }
        if options.streams and options.beside:
            return found | await waiting(port, pid, options)
    if options.streams:
        small = argparse.Namespace(**{**vars(options), "nodes": 64, "grants": 64 * options.devices})
        with service(folder, small) as (port, pid):
            found |= await waiting(port, pid, small)
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"The pool under load: {found['devices']} simulated GPUs, {found['grants']} live grants, rule {found['rule']}.")
    rows = [("", "nbgpu (simulated)", "bar", "the same server with an empty handler")]
    if "pairs_per_s" in found:
        bare = f"{found['fastapi_per_s'] // 2} FastAPI, {found['starlette_per_s'] // 2} Starlette"
        rows += [
            ("acquire + release", f"{found['pairs_per_s']} pairs/s", ">= 1000", bare),
            ("one request, p50 / p99", f"{found['p50_ms']} / {found['p99_ms']} ms", "p99 <= 50", ""),
            ("processor time for a pair", f"{found['cpu_us_per_pair']} us", "", f"{found['fastapi_cpu_us_per_pair']} us FastAPI"),
            ("wrong answers", str(found["wrong"]), "0", ""),
        ]
    if "streams_rss_mb" in found:
        rows += [
            (
                f"{found['streams']} wait with event streams",
                f"{found['streams_rss_mb']} MB",
                "<= 250",
                f"{found['streams_added_mb']} MB of it are theirs",
            ),
            ("acquire + release meanwhile", f"{found['streams_pairs_per_s']} pairs/s", "", ""),
            ("one request meanwhile, p99", f"{found['streams_p99_ms']} ms", "", ""),
        ]
    for name, key in (("best fit", "decide"), ("by value", "value_decide")):
        for size in found.get("scaling", ()):
            one = found["scaling"][size][key]
            told = f"{one['median_us']} / {one['p99_us']} us"
            rows.append((f"decision, {name}, {size} GPUs, p50 / p99", told, "5 / 100", f"and after the answer {one['after_us']} us"))
    print("\n".join(f"{a:<48}{b:>22}{c:>12}   {d}" for a, b, c, d in rows))
    print(found["machine"])


def main() -> int:
    """Measure, print, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--nodes", type=int, default=777)
    parser.add_argument("--devices", type=int, default=8, help="of each node")
    parser.add_argument("--grants", type=int, default=10000)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--rule", choices=["best-fit", "value"], default="best-fit")
    parser.add_argument("--beside", action="store_true", help="let the clients wait at the large pool")
    parser.add_argument("--quotas", action="store_true", help="with a quota for each user")
    parser.add_argument("--only", choices=["http", "decide"], help="one half of it")
    parser.add_argument("--seconds", type=float, help="of each stretch")
    parser.add_argument("--keep-log", type=Path, help="where to leave the log of the service")
    parser.add_argument("--under", type=shlex.split, default=[], help="a profiler and its options, before the service's command")
    options = parser.parse_args()
    options.runs, seconds = (2, 3.0) if options.quick else (5, 6.0)
    options.seconds = options.seconds or seconds
    found: dict[str, Any] = {"devices": options.nodes * options.devices, "grants": options.grants, "rule": options.rule}
    if options.only != "decide":
        with tempfile.TemporaryDirectory(prefix="nbgpu-bench-") as name:
            found |= asyncio.run(measure(options, Path(name)))
    if options.only != "http":
        found["scaling"] = scaling(options.quick)
        for key in ("decide", "value_decide"):
            one = found["scaling"][str(6212)][key]
            found |= {f"{key}_median_us": one["median_us"], f"{key}_p99_us": one["p99_us"], f"{key}_after_us": one["after_us"]}
    found["machine"] = f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}"
    show(found)
    if options.json:
        print(json.dumps(found))
    missed = [name for name, bar in BARS_LEAST.items() if found.get(name, bar) < bar]
    missed += [name for name, bar in BARS_MOST.items() if found.get(name, bar) > bar]
    missed += [name for name in ("wrong", "streams_wrong", "streams_lost") if found.get(name)]
    if missed:
        print(f"Missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
