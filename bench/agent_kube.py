"""How much memory and CPU the agent takes with its Kubernetes client and gRPC, on a large cluster, with *simulated* GPUs.

``python bench/agent_kube.py [--quick] [--json] [--nodes 1000] [--claims 20000] [--seconds 20]``

* The stand-in for the API server of `bench/pool_kube.py` (a process of its own) serves nodes, ResourceSlices and claims of all nodes; the
  agent, a real ``python -m nbgpu_agent --kubernetes``, follows all of them, as it must to know what is allocated on its own GPUs.
* `agent_rss_mb`: its memory once it has published its devices and sat for `--seconds`; `agent_cpu_percent` of a core meanwhile.
* `baseline_rss_mb`: the same agent without ``--kubernetes``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import httpx  # noqa: E402
from pool_kube import KEY, kubeconfig  # noqa: E402

RSS_MB = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Return a process's memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def sit(arguments: Sequence[str], runtime: Path, env: dict[str, str], url: str | None, seconds: float) -> tuple[float, float]:
    """Run an agent; return its memory in MB and its CPU in percent of a core once it has settled."""
    command = [
        sys.executable,
        "-m",
        "nbgpu_agent",
        "--simulate",
        "--sim-devices=8",
        "--node=bench-node",
        f"--runtime-dir={runtime}",
        *arguments,
    ]
    with open(runtime.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, env=env, stderr=log)
    try:
        deadline = time.monotonic() + 300
        with (
            httpx.Client(transport=httpx.HTTPTransport(uds=str(runtime / "agent.sock")), base_url="http://agent") as agent,
            httpx.Client() as api,
        ):
            while True:
                assert process.poll() is None, runtime.with_suffix(".log").read_text()
                assert time.monotonic() < deadline, "never ready"
                with contextlib.suppress(httpx.HTTPError):
                    up = agent.get("/healthz").status_code == 200
                    found = url is None or api.get(f"{url}/apis/resource.k8s.io/v1/resourceslices/bench-node-gpu.nbgpu.io").status_code
                    if up and found in (True, 200):
                        break
                time.sleep(0.1)
        time.sleep(2)
        before, begun = cpu_seconds(process.pid), time.monotonic()
        time.sleep(seconds)
        return rss_mb(process.pid), 100 * (cpu_seconds(process.pid) - before) / (time.monotonic() - begun)
    finally:
        process.terminate()
        process.wait(30)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run it all."""
    sizes = ["--nodes", str(options.nodes), "--devices", "8", "--claims", str(options.claims)]
    with tempfile.TemporaryDirectory(prefix="nbgpu-") as name:
        folder = Path(name)
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "pool_kube.py"), "--serve", *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            node = {"metadata": {"name": "bench-node"}, "status": {}}
            httpx.post(f"{url}/api/v1/nodes", json=node).raise_for_status()
            (folder / "key").write_bytes(KEY)
            env = {
                **os.environ,
                "KUBECONFIG": str(kubeconfig(folder, url)),
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "nodeagent")]),
            }
            kube = ["--kubernetes", f"--seal-key={folder / 'key'}", f"--kubelet-dir={folder / 'k'}", f"--cdi-dir={folder / 'cdi'}"]
            rss, cpu = sit(kube, folder / "r", env, url, options.seconds)
            bare_rss, bare_cpu = sit([], folder / "b", env, None, options.seconds)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(30)
    return {
        "agent_rss_mb": round(rss, 1),
        "agent_cpu_percent": round(cpu, 2),
        "baseline_rss_mb": round(bare_rss, 1),
        "baseline_cpu_percent": round(bare_cpu, 2),
        "nodes": options.nodes,
        "claims": options.claims,
        "devices_of_this_node": 8,
        "simulated": True,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 nodes, 2,000 claims, 5 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--claims", type=int, default=20000)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    if options.quick:
        options.nodes, options.claims, options.seconds = 100, 2000, 5
    found = measure(options)
    print(f"agent on Kubernetes, {found['nodes']} nodes, {found['claims']} claims (simulated GPUs)")
    print(f"  memory {found['agent_rss_mb']} MB (aim {RSS_MB:.0f}; without Kubernetes {found['baseline_rss_mb']})")
    print(f"  CPU {found['agent_cpu_percent']} % of a core (without Kubernetes {found['baseline_cpu_percent']})")
    if options.json:
        print(json.dumps(found))
    return 0 if found["agent_rss_mb"] <= RSS_MB else 1


if __name__ == "__main__":
    sys.exit(main())
