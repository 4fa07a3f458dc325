"""What the node agent costs and how fast it tells, on simulated GPUs.

``python bench/agent.py [--quick] [--json] [--devices 8] [--slices 8] [--seconds 30] [--samples 400] [--seed 1] [--pixel]``

Every slice has one live process that allocates through the limiter. Measured:

* ``cpu_percent``, ``rss_mb`` of the agent, its GPU-time scheduler included, while all slices live and nobody asks;
  beside it a process that only asks NVML the same questions once a second (``nvml_only_*``);
* ``cpu_percent_polled``: the same with every slice's usage asked once per 2 s, as JupyterLab does;
* ``visible_api_p99_s``: from an allocation's return to the answer of the slice's API that shows it;
* ``refusal_p99_s``: from a refusal's return to its event at the slice's API;
* ``visible_pixel_p99_s``, with ``--pixel``: from an allocation's return to the status bar of a real JupyterLab in a real Chromium,
  while all other slices live (`agent_pixel.py`); null, with the reason, where this machine has no Chromium or no built front end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "nodeagent"):
    sys.path.insert(0, str(folder))

from agent_pixel import measure_pixel, why_not  # noqa: E402

from nbgpu.client import AgentClient, SliceClient  # noqa: E402
from nbgpu.errors import NbgpuError, Unavailable  # noqa: E402
from nbgpu.models import Launch, Owner, Slice, SliceDevice  # noqa: E402
from nbgpu.quantities import MIB, memory_share_bytes  # noqa: E402

NVML_ONLY = """
import ctypes, os, sys, time
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
print("ready", flush=True)
while True:
    for handle in handles:
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
        try:
            pynvml.nvmlDeviceGetProcessUtilization(handle, 0)
        except pynvml.NVMLError:
            pass
    time.sleep(1)
"""


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process's threads. To the ns: counting clock ticks misjudges who wakes with the tick."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def rss_mb(pid: int) -> float:
    """Return a process's resident memory, MB of 10^6 bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def percentile(values: list[float], part: float) -> float:
    """Return the value that `part` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


class Tenant:
    """One slice with one process in it."""

    def __init__(self, client: AgentClient, wanted: Slice, environment: dict[str, str]):
        self.slice = wanted
        self.launch: Launch = client.prepare(wanted, None)
        self.api = SliceClient(self.launch.socket)
        arguments = [sys.executable, "-S", "-E", str(ROOT / "bench/agent_tenant.py"), "0"]
        env = environment | self.launch.env
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        client.adopt(wanted.slice_id, self.process.pid)

    def line(self) -> str:
        """Return the process's next word."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, command: str) -> tuple[int, int]:
        """Send a command; return (CUresult, CLOCK_MONOTONIC ns at its return)."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        result, at = self.line().split()
        return int(result), int(at)


class Node:
    """An agent on simulated devices, full of slices."""

    def __init__(self, devices: int, slices: int):
        self.runtime = Path(tempfile.mkdtemp(prefix="nbgpu-bench-", dir="/tmp"))
        self.state = Path(f"/dev/shm/nbgpu-bench-agent-{uuid.uuid4().hex[:8]}")
        self.env = dict(os.environ, NBGPU_SIM_STATE=str(self.state), PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "nodeagent")]))
        arguments = [
            "-m",
            "nbgpu_agent",
            "--runtime-dir",
            str(self.runtime),
            "--simulate",
            "--sim-devices",
            str(devices),
            "--node",
            "bench",
        ]
        self.log = self.runtime / "agent.log"
        with open(self.log, "wb") as log:
            self.agent = subprocess.Popen([sys.executable, *arguments, "--log-level", "warning"], env=self.env, stderr=log)
        self.client = AgentClient(self.runtime / "agent.sock")
        self.tenants: list[Tenant] = []
        self._wait()
        node = self.client.node()
        milli = 1000 // slices
        for device in node.devices:
            for number in range(slices):
                part = SliceDevice(
                    uuid=device.uuid,
                    index=device.index,
                    model=device.model,
                    memory_bytes=memory_share_bytes(device.usable_bytes, milli),
                    compute_milli=milli,
                )
                owner = Owner(hub="bench", user=f"user-{device.index}-{number}")
                wanted = Slice(slice_id=uuid.uuid4().hex, owner=owner, node="bench", mode="burst", devices=[part], simulated=True)
                self.tenants.append(Tenant(self.client, wanted, self.env))
        for tenant in self.tenants:
            if tenant.line() != "ready":
                raise SystemExit("a tenant could not use its slice")

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.agent.poll() is not None:
                raise SystemExit(f"the agent ended: {self.log.read_text()}")
            try:
                self.client.node()
            except Unavailable:
                time.sleep(0.05)
            else:
                return
        raise SystemExit("the agent did not answer in 30 s")

    def close(self) -> None:
        """End all processes and remove all files."""
        for tenant in self.tenants:
            tenant.process.kill()
        for tenant in self.tenants:
            tenant.process.wait(10)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.agent.poll() is None and self.client.slices().slices:
            time.sleep(0.05)
        self.agent.terminate()
        self.agent.wait(10)
        shutil.rmtree(self.runtime, ignore_errors=True)
        self.state.unlink(missing_ok=True)


def nvml_only(node: Node) -> subprocess.Popen[str]:
    """Start the baseline: a process that does nothing but ask NVML once a second."""
    library = next((node.runtime / "lib").glob("*/sim/libnvidia-ml.so.1"))
    process = subprocess.Popen([sys.executable, "-c", NVML_ONLY, str(library)], stdout=subprocess.PIPE, text=True, env=node.env)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def measure_cost(node: Node, seconds: float) -> dict[str, float]:
    """Return CPU and memory of the agent and of the baseline over the same seconds; then of the agent while it is polled."""
    baseline = nvml_only(node)
    try:
        time.sleep(3)
        begun, agent, base = time.monotonic(), cpu_seconds(node.agent.pid), cpu_seconds(baseline.pid)
        time.sleep(seconds)
        elapsed = time.monotonic() - begun
        found = {
            "cpu_percent": (cpu_seconds(node.agent.pid) - agent) / elapsed * 100,
            "nvml_only_cpu_percent": (cpu_seconds(baseline.pid) - base) / elapsed * 100,
            "nvml_only_rss_mb": rss_mb(baseline.pid),
        }
    finally:
        baseline.kill()
        baseline.wait()
    begun, agent = time.monotonic(), cpu_seconds(node.agent.pid)
    pause = 2.0 / len(node.tenants)
    number = 0
    while time.monotonic() - begun < seconds / 2:
        node.tenants[number % len(node.tenants)].api.usage()
        number += 1
        time.sleep(max(0.0, begun + number * pause - time.monotonic()))
    found["cpu_percent_polled"] = (cpu_seconds(node.agent.pid) - agent) / (time.monotonic() - begun) * 100
    found["rss_mb"] = rss_mb(node.agent.pid)
    return found


def measure_visible(node: Node, samples: int, dice: random.Random) -> list[float]:
    """Return seconds from an allocation's return to the API's answer that shows it."""
    found: list[float] = []
    while len(found) < samples:
        tenant = dice.choice(node.tenants)
        size = dice.randrange(64, 1024, 2) * MIB
        before = tenant.api.usage().devices[0].memory_used_bytes
        result, at = tenant.do(f"alloc {size}")
        if result:
            raise SystemExit(f"an allocation within the slice failed: {result}")
        while abs(tenant.api.usage().devices[0].memory_used_bytes - before - size) > 32 * MIB:
            time.sleep(0.002 if time.monotonic_ns() - at < 5e7 else 0.025)  # a slice's socket answers 50 requests a second
            if time.monotonic_ns() - at > 10**10:
                raise SystemExit("an allocation was not seen within 10 s")
        found.append((time.monotonic_ns() - at) / 1e9)
        tenant.do("free")
    return found


def measure_refusals(node: Node, samples: int, dice: random.Random) -> list[float]:
    """Return seconds from a refusal's return to its event at the slice's API, each slice asked once, waiting."""
    found: list[float] = []
    lock = threading.Lock()
    for tenant in dice.sample(node.tenants * (1 + samples // len(node.tenants)), samples):
        last = (tenant.api.events() or [None])[-1]
        seen: list[float] = []

        def wait(api: SliceClient = tenant.api, after: int = last.id if last else -1, seen: list[float] = seen) -> None:
            events = api.events(after, 10)
            if any(event.kind == "refused" for event in events):
                with lock:
                    seen.append(time.monotonic_ns() / 1e9)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.01 + dice.random() * 0.3)
        result, at = tenant.do(f"alloc {tenant.slice.devices[0].memory_bytes + MIB}")
        waiting.join(15)
        if result != 2 or not seen:
            raise SystemExit(f"the refusal (CUresult {result}) was not told within 10 s")
        found.append(seen[0] - at / 1e9)
    return found


def machine() -> dict[str, Any]:
    """Return what ran this."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--slices", type=int, default=8, help="on each device")
    parser.add_argument("--seconds", type=float, help="of measuring the cost (default: 30, quick 10)")
    parser.add_argument("--samples", type=int, help="allocations and a fifth as many refusals (default: 500, quick 150)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pixel", action="store_true", help="measure to the status bar of JupyterLab, too (needs Chromium)")
    options = parser.parse_args()
    seconds = options.seconds or (10 if options.quick else 30)
    samples = options.samples or (150 if options.quick else 500)
    dice = random.Random(options.seed)
    node = Node(options.devices, options.slices)
    try:
        results: dict[str, Any] = measure_cost(node, seconds)
        visible = measure_visible(node, samples, dice)
        refusals = measure_refusals(node, max(30, samples // 5), dice)
        skipped = why_not() if options.pixel else "not asked for (--pixel)"
        pixels: list[float] = []
        if skipped is None:
            one = dice.choice(node.tenants)
            pixels = measure_pixel(one.launch.socket, one.do, one.slice.devices[0].memory_bytes, max(20, samples // 5), dice)
    except NbgpuError as error:
        raise SystemExit(error.message) from None
    finally:
        node.close()
    for name, values in (("visible_api", visible), ("refusal", refusals)):
        results[f"{name}_p50_s"] = statistics.median(values)
        results[f"{name}_p99_s"] = percentile(values, 0.99)
    results = {name: round(value, 4) for name, value in results.items()}
    results["visible_pixel_p50_s"] = round(statistics.median(pixels), 4) if pixels else None
    results["visible_pixel_p99_s"] = round(percentile(pixels, 0.99), 4) if pixels else None
    results |= {"pixel_skipped": skipped, "pixel_samples": len(pixels)}
    results |= {"devices": options.devices, "slices": options.devices * options.slices, "seconds": seconds, "samples": samples}
    results |= {"seed": options.seed, "simulated": True, "machine": machine()}
    print_table(results)
    if options.json:
        print(json.dumps(results))


def print_table(results: dict[str, Any]) -> None:
    """Print the results beside what must be reached."""
    print(f"node agent, {results['devices']} simulated GPUs, {results['slices']} slices with one allocating process each")
    rows = [
        ("CPU, nobody asks", "cpu_percent", "%", "<= 1"),
        ("CPU, Lab in every slice", "cpu_percent_polled", "%", ""),
        ("CPU, a process that only asks NVML", "nvml_only_cpu_percent", "%", "baseline"),
        ("memory", "rss_mb", "MB", "<= 70"),
        ("memory, only NVML", "nvml_only_rss_mb", "MB", "baseline"),
        ("allocation to API, p50", "visible_api_p50_s", "s", ""),
        ("allocation to API, p99", "visible_api_p99_s", "s", "<= 0.2"),
        ("refusal to event, p50", "refusal_p50_s", "s", ""),
        ("refusal to event, p99", "refusal_p99_s", "s", "<= 1"),
    ]
    for label, key, unit, wanted in rows:
        print(f"  {label:36} {results[key]:9.4g} {unit:3} {wanted}")
    if results["pixel_skipped"]:
        print(f"  allocation to status bar in JupyterLab: skipped, {results['pixel_skipped']}")
    else:
        for part, wanted in (("p50", ""), ("p99", "<= 2")):
            print(f"  {'allocation to status bar, ' + part:36} {results[f'visible_pixel_{part}_s']:9.4g} s   {wanted}")


if __name__ == "__main__":
    main()
