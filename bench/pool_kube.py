"""How fast, and in how much memory, the pool rebuilds its books on a large cluster, of *simulated* devices.

``python bench/pool_kube.py [--quick] [--json] [--nodes 1000] [--devices 8] [--claims 20000] [--runs 3]``

* A stand-in for the API server (`tests/fake_kube.py`, a process of its own) serves nodes, ResourceSlices, claims (allocated, sealed,
  used) and their pods, in pages of 500. A real one would have to hold 1,000 nodes; what it would answer is the same.
* `rebuild_s`: from the moment a real `python -m nbgpu_pool --kubernetes` leads until it is ready, with every claim in its books (they are
  compared); `rss_mb`: its memory then. Median and largest of the runs.
* `start_s`: the same from the start of the process on.
* `official_s`, `official_mb`: a process that lists the same claims, and nothing else, with the official client's models.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "spawner"), str(ROOT / "tests")]

import httpx  # noqa: E402

BARS = {"rebuild_s": 6.0, "rss_mb": 300.0}
KEY = b"the installation's key of the benchmark"
TOKEN = "the-token-of-the-benchmark"
NAMESPACE = "jhub"
GIB = 1024**3
OFFICIAL = """
import sys, time
from kubernetes import client, config
config.load_kube_config()
api = client.ApiClient()
begun, items, token = time.perf_counter(), [], None
while True:
    page = client.ResourceV1Api(api).list_resource_claim_for_all_namespaces(limit=500, _continue=token)
    items += page.items
    token = page.metadata._continue
    if not token:
        break
rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(len(items), time.perf_counter() - begun, rss / 1024)
"""


def objects(nodes: int, devices: int, claims: int) -> dict[str, list[dict[str, Any]]]:
    """Return what is in the cluster, by collection."""
    from nbgpu.claims import claim_for, device_name, resource_slice
    from nbgpu.models import Device, Owner, Slice, SliceDevice

    all_devices = [
        Device(uuid=f"GPU-{node:04}-{index}", index=index, model="Simulated H100 80GB", node=f"node-{node:04}", memory_bytes=82 * GIB,
               reserve_bytes=2 * GIB, simulated=True)
        for node in range(nodes)
        for index in range(devices)
    ]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"nodes": [], "resourceslices": [], "resourceclaims": [], "pods": []}
    for node in range(nodes):
        name = f"node-{node:04}"
        found["nodes"].append({"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
        found["resourceslices"].append(resource_slice(name, all_devices[node * devices : (node + 1) * devices], {}, 1))
    for number in range(claims):
        device = all_devices[number % len(all_devices)]
        milli = 250
        part = SliceDevice(
            uuid=device.uuid, index=device.index, model=device.model, memory_bytes=device.usable_bytes // 4, compute_milli=milli
        )
        owner = Owner(hub="hub", user=f"user-{number % 5000}", server=str(number // 5000))
        held = Slice(slice_id=f"{number:032x}", owner=owner, node=device.node, mode="burst", devices=[part], simulated=True,
                     namespace=NAMESPACE)  # fmt: skip
        pod = {"name": f"jupyter-{number}", "uid": f"00000000-0000-0000-0000-{number:012}"}
        claim = claim_for(held, KEY)
        claim["metadata"] |= {
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "finalizers": ["resource.kubernetes.io/delete-protection"],
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", **pod}],
            "managedFields": [{"manager": "nbgpu", "operation": "Update", "fieldsV1": {f"f:{each}": {".": {}} for each in range(20)}}],
        }
        consumed = {"memory": str(part.memory_bytes), "compute": str(milli)}
        of = {"driver": "gpu.nbgpu.io", "pool": device.node, "device": device_name(device.uuid)}
        result = {"request": "gpu-0", **of, "shareID": pod["uid"], "consumedCapacity": consumed}
        claim["status"] = {"allocation": {"devices": {"results": [result]}}, "reservedFor": [{"resource": "pods", **pod}]}
        found["resourceclaims"].append(claim)
        env = [{"name": f"JUPYTERHUB_VARIABLE_{each}", "value": "x" * 30} for each in range(20)]
        found["pods"].append({
            "metadata": {**pod, "namespace": NAMESPACE, "labels": {"nbgpu.io/slice": held.slice_id, "app": "jupyterhub"}},
            "spec": {
                "nodeName": device.node,
                "resourceClaims": [{"name": "nbgpu", "resourceClaimName": claim["metadata"]["name"]}],
                "containers": [{"name": "notebook", "image": "registry.example.org/user:1", "env": env}],
            },
            "status": {"phase": "Running", "conditions": [{"type": "PodScheduled", "status": "True"}]},
        })  # fmt: skip
    return found


def serve(options: argparse.Namespace) -> None:
    """Be the API server until the end of stdin."""
    from fake_kube import FakeKube

    async def run() -> None:
        fake = FakeKube()
        paths = {"nodes": "/api/v1/nodes", "pods": "/api/v1/pods"}
        for plural, things in objects(options.nodes, options.devices, options.claims).items():
            for thing in things:
                fake.put(paths.get(plural, f"/apis/resource.k8s.io/v1/{plural}"), thing)
        fake.history.clear()
        for collection in fake.objects:
            fake.texts(collection)  # a real one has them at hand too
        gc.freeze()
        await fake.start()
        print(fake.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await fake.stop()

    asyncio.run(run())


def kubeconfig(folder: Path, url: str) -> Path:
    """Write the way to `url`."""
    file = folder / "kubeconfig"
    cluster, context = {"name": "c", "cluster": {"server": url}}, {"name": "x", "context": {"cluster": "c", "user": "u"}}
    told = {"current-context": "x", "clusters": [cluster], "users": [{"name": "u", "user": {}}], "contexts": [context]}
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **told}))
    return file


def one_rebuild(folder: Path, env: dict[str, str], options: argparse.Namespace) -> tuple[float, float, float]:
    """Return seconds of a rebuild, seconds since the process began, and its memory in MB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "nbgpu_pool", "--kubernetes", "--listen", f"127.0.0.1:{port}", "--config", str(folder / "pool.yaml"),
        "--seal-key", str(folder / "key"),
    ]  # fmt: skip
    begun = time.perf_counter()
    led = 0.0
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.perf_counter() - begun < 120, "never ready"
                with contextlib.suppress(httpx.ConnectError):
                    told = http.get("/healthz").json()
                    led = led or (time.perf_counter() if told["leads"] else 0.0)
                    if told["ready"]:
                        break
                time.sleep(0.05)
            done = time.perf_counter()
            held = http.get("/v1/devices").json()
            assert sum(one["compute_granted_milli"] for one in held) == 250 * options.claims, "the books lack something"
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            rss = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
            return done - led, done - begun, rss
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run it all."""
    sizes = ["--nodes", str(options.nodes), "--devices", str(options.devices), "--claims", str(options.claims)]
    with tempfile.TemporaryDirectory(prefix="nbgpu-bench-") as name:
        folder = Path(name)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            (folder / "key").write_bytes(KEY)
            token = {"role": "hub", "hub": "hub", "namespaces": [NAMESPACE], "env": "BENCH_TOKEN"}
            (folder / "pool.yaml").write_text(json.dumps({"tokens": [token]}))
            env = {
                **os.environ, "KUBECONFIG": str(kubeconfig(folder, url)), "NBGPU_NAMESPACE": NAMESPACE, "BENCH_TOKEN": TOKEN,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "spawner")]),
            }  # fmt: skip
            runs, official = [], []
            for _ in range(options.runs):
                runs.append(one_rebuild(folder, env, options))
                told = subprocess.run([sys.executable, "-c", OFFICIAL], env=env, capture_output=True, text=True, check=True, timeout=300)
                official.append([float(word) for word in told.stdout.split()])
            assert all(count == options.claims for count, _, _ in official)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(30)
    return {
        "rebuild_s": round(statistics.median(one[0] for one in runs), 2),
        "rebuild_max_s": round(max(one[0] for one in runs), 2),
        "start_s": round(statistics.median(one[1] for one in runs), 2),
        "rss_mb": round(max(one[2] for one in runs)),
        "official_s": round(statistics.median(one[1] for one in official), 2),
        "official_mb": round(max(one[2] for one in official)),
        "nodes": options.nodes,
        "devices": options.nodes * options.devices,
        "claims": options.claims,
        "runs": options.runs,
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
    }


def main() -> int:
    """Measure, print, and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=8, help="of each node")
    parser.add_argument("--claims", type=int, default=20000)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs = options.runs or (1 if options.quick else 3)
    if options.serve:
        serve(options)
        return 0
    found = measure(options)
    print(f"Rebuilding the pool's books, {found['nodes']} nodes, {found['devices']} simulated GPUs, {found['claims']} claims and pods.")
    rows = [
        ("", "nbgpu (simulated)", "at most", "official client, claims alone"),
        ("rebuilt in", f"{found['rebuild_s']} s", f"{BARS['rebuild_s']} s", f"{found['official_s']} s"),
        ("slowest run", f"{found['rebuild_max_s']} s", "", ""),
        ("from the start of the process", f"{found['start_s']} s", "", ""),
        ("most memory", f"{found['rss_mb']} MB", f"{BARS['rss_mb']:.0f} MB", f"{found['official_mb']} MB"),
    ]
    print("\n".join(f"{a:<32}{b:>20}{c:>12}{d:>32}" for a, b, c, d in rows))
    print(found["machine"])
    if options.json:
        print(json.dumps(found))
    missed = [name for name, bar in BARS.items() if found[name] > bar]
    if missed:
        print(f"Missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
