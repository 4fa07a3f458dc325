"""What a slice adds to a start on Kubernetes, and 200 starts at once, on *simulated* GPUs; KUBECONFIG names the cluster.

``python bench/spawn_kube.py [--quick] [--json] [--spawns 60] [--nodes 50] [--devices 4] [--pods stand-in]``

* Two real JupyterHubs, alike but for the spawner: KubeSpawner and KubeGPUSpawner with a real pool. `added_p50_ms`, `added_p95_ms`:
  single starts of both in turn, each from the POST until the hub has had the server's answer; differences of the medians and of the
  95th percentiles.
  Hubs look for a pod and its server with random back-offs of up to 5 s; here both look every 20 ms, so that chance does not decide.
* `pool_p50_ms`: what of a start its hub waited for the pool: all its calls together (the pool in turn waits for the API server).
* With an agent on the cluster's node the pods are real (`pods: real`): a container with a light server, the slice prepared by the agent.
  Without one (`pods: stand-in`) API server and scheduler are real; nodes are objects only, and their stand-in kubelet says "Running".
* The burst: nodes that are objects only, whole devices, as many users as devices, all at the same moment, through `start()` of as many
  spawners in this process. `failed` counts starts that failed, `double_booked` the devices of which more is allocated than they have.
  Meanwhile a process of its own asks the pool every 20 ms what is free: `availability_p50_ms`, `availability_p99_ms`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "tests" / "kubernetes"
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("spawner", "nodeagent", "tests", "tests/hub")), str(KIT)]

import node_kit  # noqa: E402
import pytest  # noqa: E402
import real_kit  # noqa: E402
from hub_kit import HubPlace, KubeHub, clean, gateway_of_hub  # noqa: E402
from hub_process import Hub, proxy_command  # noqa: E402
from pool_kit import TOKEN, Pool  # noqa: E402

BARS = {"added_p50_ms": 300.0, "added_p95_ms": 1000.0, "pool_p50_ms": 30.0, "failed": 0, "double_booked": 0, "availability_p99_ms": 50.0}
WARM_UP = 2
LOOK = """
import functools
import jupyterhub.utils
jupyterhub.utils.exponential_backoff = functools.partial(jupyterhub.utils.exponential_backoff, start_wait=0.02, scale_factor=1)
"""
EXTRA = (
    LOOK
    + """
c.JupyterHub.log_level = "WARN"
c.JupyterHub.tornado_settings = {"slow_spawn_timeout": 120}
"""
)
TIMED = """
import time
import nbgpu_spawner.client as pool_client
whole = pool_client.PoolClient._call
async def timed(self, method, path, body=None):
    begun = time.perf_counter()
    try:
        return await whole(self, method, path, body)
    finally:
        with open(POOL_CALLS, "a") as file:
            file.write(f"{begun} {(time.perf_counter() - begun) * 1000}\\n")
pool_client.PoolClient._call = timed
"""
STOCK = """
def setup(c, **ignored):
    pass
"""
ASK = """
import json, sys, time, httpx
url, token, query = sys.argv[1:4]
http = httpx.Client(headers={"Authorization": "Bearer " + token}, timeout=30, trust_env=False)
print("ready", flush=True)
begun = time.monotonic()
while time.monotonic() - begun < 600:
    start = time.perf_counter()
    ok = http.post(url, content=query, headers={"Content-Type": "application/json"}).status_code == 200
    print((time.perf_counter() - start) * 1000 if ok else -1, flush=True)
    time.sleep(0.02)
"""


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def start_seconds(hub: Hub, user: str, options: dict[str, Any]) -> float:
    """Start a server and return how long that took; raise when it did not come up."""
    begun = time.perf_counter()
    answer = hub.api("POST", f"users/{user}/server", options)
    seconds = time.perf_counter() - begun
    if answer.status_code != 201:
        raise RuntimeError(f"{user}: {answer.status_code} {answer.text[:300]}")
    return seconds


class Calls:
    """What the hub with slices has waited for its pool, by start."""

    def __init__(self, file: Path):
        self._file = file
        self._read = 0

    def take(self) -> float:
        """Return the milliseconds of all calls since the last time."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        found, self._read = lines[self._read :], len(lines)
        return sum(float(line.split()[1]) for line in found)


def singles(stack: ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """Start servers of both hubs in turn."""
    node = real_node(stack, options)
    place = HubPlace(nodes=0 if node else 1, devices=2)
    stack.callback(place.stop)
    place.start()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbgpu-bench-", dir="/tmp")))
    pool = real_kit.pool_for(node, place, folder) if node else Pool(place, folder).start()
    stack.callback(Pool.stop_all)
    stack.callback(clean, place)
    told = real_kit.told_for(node) if node else {}
    calls = Calls(folder / "calls")
    hubs: list[KubeHub] = []
    for name, extra in (("stock", EXTRA + STOCK), ("gpu", f"POOL_CALLS = {str(folder / 'calls')!r}\n" + EXTRA + TIMED)):
        (folder / name).mkdir()
        gateway = gateway_of_hub(place)
        stack.callback(gateway.close)
        hub = KubeHub(folder / name, place, pool, gateway, extra=extra, **told)
        stack.callback(hub.end)
        hub.start()
        hub.add(name)
        hubs.append(hub)
    stock, gpu = hubs
    times: dict[str, list[float]] = {"stock": [], "gpu": []}
    waited: list[float] = []
    for index in range(-WARM_UP, options.spawns):
        turns = [(stock, "stock", {"profile": "cpu"}), (gpu, "gpu", {"profile": "quarter"})]
        for hub, name, wish in turns if index % 2 else turns[::-1]:
            calls.take()
            seconds = start_seconds(hub, name, wish)
            if index >= 0:  # the first ones warm up
                times[name].append(seconds * 1000)
                if name == "gpu":
                    waited.append(calls.take())
            hub.stop(name)
    p50 = {name: statistics.median(found) for name, found in times.items()}
    p95 = {name: percentile(found, 0.95) for name, found in times.items()}
    pairs = [b - a for a, b in zip(times["stock"], times["gpu"], strict=True)]
    return {
        "pods": "real" if node else "stand-in",
        "spawns_each": options.spawns,
        "stock_p50_ms": round(p50["stock"]),
        "stock_p95_ms": round(p95["stock"]),
        "nbgpu_p50_ms": round(p50["gpu"]),
        "nbgpu_p95_ms": round(p95["gpu"]),
        "added_p50_ms": round(p50["gpu"] - p50["stock"], 1),
        "added_p95_ms": round(p95["gpu"] - p95["stock"], 1),
        "added_pairs_p50_ms": round(statistics.median(pairs), 1),
        "pool_p50_ms": round(statistics.median(waited), 1),
        "pool_p95_ms": round(percentile(waited, 0.95), 1),
        "hub": gpu.version,
    }


def real_node(stack: ExitStack, options: argparse.Namespace) -> node_kit.Node | None:
    """Return the cluster's real node with an agent on it; None where it has none, or pods shall be stand-ins."""
    if options.pods == "stand-in":
        return None
    try:
        node = node_kit.Node()
    except pytest.skip.Exception as why:
        if options.pods == "real":
            raise RuntimeError(str(why)) from None
        return None
    stack.callback(node.close)
    node.start()
    return node


# -- the burst


def spawner(number: int, place: HubPlace, pool: Pool) -> Any:
    """Return one user's spawner, with as much of a hub around it as it needs."""
    from traitlets.config import Config

    from nbgpu_spawner.kube import KubeGPUSpawner

    config = Config({
        "KubeGPUSpawner": {
            "namespace": place.namespace, "image": "localhost/none:1", "node_selector": {"poolkube": place.run_id},
            "tolerations": [{"key": "poolkube", "operator": "Exists"}], "start_timeout": 300, "gpu_wait_timeout": 200,
            "gpu_fraction": 1, "gpu_model": place.model, "gpu_hub_name": "hub", "delete_grace_period": 0, "events_enabled": False,
            "pool_url": f"http://127.0.0.1:{pool.port}", "pool_token": TOKEN, "k8s_api_request_timeout": 30, "pool_timeout": 30.0,
        }
    })  # fmt: skip
    made = KubeGPUSpawner(_mock=True, config=config)
    name = f"user{number}"
    made.user = SimpleNamespace(
        name=name, id=number, groups=[], settings={}, escaped_name=name, url=f"/user/{name}", server=None, db=None, spawner=made
    )
    made.hub = SimpleNamespace(public_host="", base_url="/hub/", api_url="http://h/api", url="http://h")
    made.orm_spawner = None
    made.pod_name = f"jupyter-{name}"
    made.get_env = dict
    made.get_args = list
    return made


async def all_at_once(place: HubPlace, pool: Pool, users: int) -> tuple[list[float], list[str]]:
    """Start everybody at the same moment; return the seconds of each start and what failed."""
    spawners = [spawner(number, place, pool) for number in range(users)]
    await spawners[0]._start_watching_pods()
    seconds: list[float] = []
    failed: list[str] = []

    async def one(made: Any) -> None:
        begun = time.perf_counter()
        try:
            await made.start()
            seconds.append(time.perf_counter() - begun)
        except Exception as error:
            failed.append(f"{made.user.name}: {type(error).__name__} {str(error)[:200]}")

    await asyncio.gather(*map(one, spawners))
    return seconds, failed


def burst(stack: ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """All users at once on as many whole devices."""
    place = HubPlace(options.nodes, options.devices)
    stack.callback(place.stop)
    place.start()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbgpu-bench-", dir="/tmp")))
    pool = Pool(place, folder).start()
    stack.callback(Pool.stop_all)
    stack.callback(clean, place)
    users = options.nodes * options.devices
    while len(pool.books()) < users:
        time.sleep(0.1)
    shapes = [{"memory_milli": milli, "compute_milli": milli, "model": place.model} for milli in (125, 250, 500, 1000)]
    query = json.dumps({"owner": {"hub": "hub", "user": "looker"}, "shapes": shapes})
    url = f"http://127.0.0.1:{pool.port}/v1/availability"
    asking = subprocess.Popen([sys.executable, "-c", ASK, url, TOKEN, query], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    asking.stdout.readline()
    begun = time.perf_counter()
    seconds, failed = asyncio.run(all_at_once(place, pool, users))
    whole = time.perf_counter() - begun
    asking.terminate()
    lines = asking.communicate(timeout=30)[0].splitlines()
    answers = [float(line) for line in lines if line.replace(".", "").replace("-", "").replace("e", "").isdigit()]
    for line in failed[:10]:
        print(f"  failed: {line}", file=sys.stderr)
    held = place.held()
    return {
        "burst_users": users,
        "burst_nodes": options.nodes,
        "failed": len(failed) + sum(one < 0 for one in answers),
        "double_booked": sum(milli > 1000 or memory > 80 * 1024**3 for memory, milli in held.values()),
        "allocated": sum(milli == 1000 for _, milli in held.values()),
        "burst_p50_s": round(statistics.median(seconds), 2) if seconds else None,
        "burst_all_s": round(whole, 1),
        "availability_asked": len(answers),
        "availability_p50_ms": round(statistics.median(answers), 1),
        "availability_p99_ms": round(percentile(answers, 0.99), 1),
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures for people."""
    rows = [
        ("", "stock", "nbgpu (simulated)", "at most"),
        (f"one start, p50 of {found['spawns_each']}", f"{found['stock_p50_ms']} ms", f"{found['nbgpu_p50_ms']} ms", ""),
        ("one start, p95", f"{found['stock_p95_ms']} ms", f"{found['nbgpu_p95_ms']} ms", ""),
        ("added by a slice, p50", "", f"{found['added_p50_ms']} ms", f"{BARS['added_p50_ms']:.0f} ms"),
        ("added by a slice, p95", "", f"{found['added_p95_ms']} ms", f"{BARS['added_p95_ms']:.0f} ms"),
        ("of that waiting for the pool, p50", "", f"{found['pool_p50_ms']} ms", f"{BARS['pool_p50_ms']:.0f} ms"),
        (f"{found['burst_users']} at once, p50", "", f"{found['burst_p50_s']} s", ""),
        (f"{found['burst_users']} at once, all", "", f"{found['burst_all_s']} s", ""),
        ("of them failed", "", str(found["failed"]), "0"),
        ("devices given twice", "", str(found["double_booked"]), "0"),
        ("availability meanwhile, p99", "", f"{found['availability_p99_ms']} ms", f"{BARS['availability_p99_ms']:.0f} ms"),
    ]
    return "\n".join(f"{a:<36}{b:>12}{c:>20}{d:>12}" for a, b, c, d in rows)


def main() -> int:
    """Measure, print, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer single starts (15)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--spawns", type=int, help="single starts of each spawner (60; quick: 15)")
    parser.add_argument("--nodes", type=int, default=50, help="nodes of the burst (50)")
    parser.add_argument("--devices", type=int, default=4, help="devices of each (4)")
    parser.add_argument(
        "--pods", choices=["auto", "stand-in", "real"], default="auto", help="of the single starts (auto: real where an agent can run)"
    )
    options = parser.parse_args()
    options.spawns = options.spawns or (15 if options.quick else 60)
    if not os.environ.get("KUBECONFIG") or proxy_command() is None:
        print("Needs a cluster in KUBECONFIG, and configurable-http-proxy (make setup): nothing was measured.", file=sys.stderr)
        return 0 if options.quick else 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it started, too
    found: dict[str, Any] = {"simulated": True}
    for part in (singles, burst):
        with ExitStack() as stack:
            found |= part(stack, options)
    found["machine"] = f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}, JupyterHub {found.pop('hub')}"
    print(f"Starting servers with a slice on Kubernetes, simulated GPUs, {found['pods']} pods. {found['machine']}.")
    print(table(found))
    if options.json:
        print(json.dumps(found))
    missed = [name for name, bar in BARS.items() if found[name] > bar]
    if missed:
        print(f"Missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
