"""How exactly slices get their shares of GPU time, *simulated*: real processes, the simulated driver, the limiter and the scheduler.

``python bench/compute.py [--quick] [--json] [--time-scale 4] [--scenario TEXT] [--kernel-ms 1,5] [--policy]``

Each scenario runs twice in the same run: under nbgpu, and as the control with the driver alone. Shares are measured where they are
true, in the simulated device: how long each process' GPU kernels ran in windows of one second of device time.

Time scale N: everything the device does (GPU kernels, the driver's round-robin slices and its switches) takes N times as long, as on
a slower GPU, and so do the scheduler's turns, so that a machine with few cores shows the policy and not its own wake-up delays. The
limiter's own constants stay as shipped. ``--shipped-turns`` leaves the scheduler's too.
NBGPU_SIM_TIME_SCALE, which slows the device's clock, is not used for it: events would then tell device time, N times less than has passed
by the clock that the limiter's pauses, turn ends and heartbeats go by, which no real GPU does and the limiter would misread.

``--scheduler`` tells what the turns cost the agent: CPU time of the scheduler's thread a turn, and in percent of a core.

``--policy`` runs no processes: the policy alone in virtual time, over a whole sweep of drivers and hosts, to tighter bars.

The driver alone is fair between processes, so equal scenarios also come with two processes in the first slice ("2 : 1", and 8 x 12.5).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "nodeagent"), str(ROOT / "bench")]

import compute_policy  # noqa: E402

from nbgpu_agent import layout  # noqa: E402
from nbgpu_agent.native import Native, SchedConfig, Scheduler  # noqa: E402

LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
GIB = 1024**3
DRIVER_SLICE_US, DRIVER_SWITCH_US = 2000, 100
WARM_UP_SECONDS = 1.5  # of device time
START_SECONDS = 60.0


@dataclass(frozen=True)
class Share:
    """One slice of a scenario: its compute share, its mode, how many processes compute in it."""

    milli: int
    strict: bool = False
    processes: int = 1


SCENARIOS: dict[str, list[Share]] = {
    "50/50": [Share(500), Share(500)],
    "50/50, 2 : 1": [Share(500, processes=2), Share(500)],
    "75/25": [Share(750), Share(250)],
    "70/30": [Share(700), Share(300)],
    "10/20/30/40": [Share(milli) for milli in (100, 200, 300, 400)],
    "8 x 12.5": [Share(125, processes=2), *[Share(125)] * 7],
    "strict 30 alone": [Share(300, strict=True)],
}
BARS = "mean error <= 2 points in 1-s windows; strict 30 within 1; 2 : 1 within 3 (two processes of a slice pay the driver's switches)"
BAR_POINTS = {"strict 30 alone": 1.0, "50/50, 2 : 1": 3.0}


class Machine:
    """The simulated machine of this run and its truth."""

    def __init__(self, folder: Path, time_scale: int, devices: int = 1) -> None:
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("NBGPU_") and k != "LD_PRELOAD"},
            "LD_LIBRARY_PATH": str(LIB / "sim"),
            "NBGPU_SIM_STATE": str(folder / "machine"),
            "NBGPU_SIM_DEVICES": str(devices),
            "NBGPU_SIM_TIME_SCALE": "1",
            "NBGPU_SIM_SLICE_US": str(DRIVER_SLICE_US * time_scale),
            "NBGPU_SIM_SWITCH_US": str(DRIVER_SWITCH_US * time_scale),
            "NBGPU_SIM_MEMORY_SLOWER": str(time_scale),
        }
        os.environ.update({k: v for k, v in self.env.items() if k.startswith("NBGPU_SIM_")})
        self._nvml = ctypes.CDLL(str(LIB / "sim" / "libnvidia-ml.so.1"))
        self._check(self._nvml.nvmlInit_v2())
        self._device = self._handle(0)

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise SystemExit(f"simulated NVML: error {code}")

    def _handle(self, device: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(device, ctypes.byref(handle)))
        return handle

    def uuid(self, device: int = 0) -> bytes:
        """Return a device's UUID."""
        text = ctypes.create_string_buffer(96)
        self._check(self._nvml.nvmlDeviceGetUUID(self._handle(device), text, 96))
        return text.value

    def busy(self, pid: int) -> tuple[int, int]:
        """Return how long a process' GPU kernels have run, and the device's clock, in ns."""
        busy, now = ctypes.c_ulonglong(), ctypes.c_ulonglong()
        self._check(self._nvml.nbgpuSimProcessBusy(self._device, pid, ctypes.byref(busy), ctypes.byref(now)))
        return busy.value, now.value


class SliceFiles:
    """One slice's `ctl` and `use`, as the agent makes them; it has the same share of each of its devices."""

    def __init__(self, folder: Path, share: Share, *uuids: bytes) -> None:
        folder.mkdir()
        self.folder = folder
        ctl = layout.Ctl()
        ctl.magic, ctl.version, ctl.size, ctl.generation = layout.CTL_MAGIC, layout.VERSION, layout.CTL_SIZE, 1
        for device in ctl.device:
            device.gate = layout.GATE_NONE
        for device, uuid in zip(ctl.device, uuids, strict=False):
            device.uuid, device.mem_limit, device.compute_milli = uuid, 8 * GIB, share.milli
            device.mode = layout.MODE_STRICT if share.strict else layout.MODE_BURST
            device.context_bytes = device.overhead_cap = GIB
        use = layout.Use()
        use.magic, use.version, use.size = layout.USE_MAGIC, layout.VERSION, layout.USE_SIZE
        (folder / "ctl").write_bytes(bytes(ctl))
        (folder / "use").write_bytes(bytes(use))

    def add_to(self, scheduler: Scheduler, share: Share, physical: int = 0, device: int = 0) -> int:
        """Let the scheduler give it turns on its `device`, which is that one of the machine."""
        ctl_fd = os.open(self.folder / "ctl", os.O_RDWR)
        use_fd = os.open(self.folder / "use", os.O_RDWR)
        try:
            mode = layout.MODE_STRICT if share.strict else layout.MODE_BURST
            return scheduler.add(ctl_fd, use_fd, device, physical, share.milli, mode)
        finally:
            os.close(ctl_fd)
            os.close(use_fd)


def start_client(
    machine: Machine,
    kernel_ns: int,
    slice_folder: Path | None,
    kernel_id: str = "",
    work: str = "kernels",
    library: Path = LIB / "libnbgpu.so",
) -> subprocess.Popen[str]:
    """Start one computing process, in a slice (as the process of a notebook kernel, when one is named) or free.

    `work` may be ``memsets`` or ``copies`` too.
    """
    env = dict(machine.env)
    if kernel_id:
        env["NBGPU_KERNEL_ID"] = kernel_id
    if slice_folder is not None:
        env |= {"LD_PRELOAD": str(library), "NBGPU_SLICE_DIR": str(slice_folder)}
    command = [sys.executable, "-S", str(ROOT / "bench" / "compute_client.py"), str(kernel_ns), work]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_ready(clients: list[subprocess.Popen[str]]) -> None:
    """Wait until all have a context, then let them go together."""
    for client in clients:
        assert client.stdout is not None
        if client.stdout.readline().strip() != "ready":
            raise SystemExit("a computing process did not start: see its error above")
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()


def measure(machine: Machine, groups: list[list[subprocess.Popen[str]]], windows: int, window_seconds: float) -> list[list[float]]:
    """Return each window's shares of the device, in percent, one for each slice."""
    out: list[list[float]] = []
    before = [[machine.busy(client.pid) for client in group] for group in groups]
    for _ in range(windows):
        time.sleep(window_seconds)
        after = [[machine.busy(client.pid) for client in group] for group in groups]
        out.append(
            [sum((a[0] - b[0]) / (a[1] - b[1]) * 100 for a, b in zip(x, y, strict=True)) for x, y in zip(after, before, strict=True)]
        )
        before = after
    return out


def turns(scale: int) -> SchedConfig:
    """Return the scheduler's constants, `scale` times as long as shipped."""
    shipped_us = {
        "min_turn_ns": 2000,
        "period_ns": 30000,
        "period_per_slice_ns": 7500,
        "lag_ns": 30000,
        "idle_grace_ns": 300,
        "overlap_behind_ns": 1000,
        "overlap_ns": 10000,
        "handover_ns": 500,
        "whole_ns": 1000000,
    }
    return SchedConfig(**{name: us * 1000 * scale for name, us in shipped_us.items()})


def run(
    machine: Machine, folder: Path, shares: list[Share], kernel_ns: int, config: SchedConfig | None, windows: int, scale: int
) -> dict[str, Any]:
    """Run one scenario once, with these turns or (None) with the driver alone, and return its figures."""
    scheduler = Native().scheduler(config) if config else None
    groups: list[list[subprocess.Popen[str]]] = []
    entries: list[int] = []
    folder.mkdir()
    try:
        for number, share in enumerate(shares):
            files = SliceFiles(folder / str(number), share, machine.uuid()) if scheduler else None
            if files and scheduler:
                entries.append(files.add_to(scheduler, share))
            groups.append([start_client(machine, kernel_ns, files.folder if files else None) for _ in range(share.processes)])
        wait_ready([client for group in groups for client in group])
        time.sleep(WARM_UP_SECONDS * scale)
        before = scheduler.totals() if scheduler else None
        turns_before = sum(scheduler.stats(entry).turns for entry in entries) if scheduler else 0
        started = time.monotonic()
        measured = measure(machine, groups, windows, scale)
        figures = judge(measured, shares)
        if scheduler and before:
            after = scheduler.totals()
            turned = sum(scheduler.stats(entry).turns for entry in entries) - turns_before
            figures["us_per_turn"] = round((after.cpu_ns - before.cpu_ns) / 1e3 / max(1, turned), 1)
            figures["us_per_wakeup"] = round((after.cpu_ns - before.cpu_ns) / 1e3 / max(1, after.wakeups - before.wakeups), 1)
            figures["scheduler_cpu_percent"] = round((after.cpu_ns - before.cpu_ns) / 1e7 / (time.monotonic() - started), 2)
        return figures
    finally:
        for client in [client for group in groups for client in group]:
            client.kill()
            client.communicate(timeout=20)
        if scheduler:
            scheduler.close()
        shutil.rmtree(folder)


def judge(measured: list[list[float]], shares: list[Share]) -> dict[str, Any]:
    """Return errors in points against the shares, over all windows and slices."""
    errors = [abs(got - share.milli / 10) for window in measured for got, share in zip(window, shares, strict=True)]
    return {
        "share_error_mean": round(statistics.mean(errors), 2),
        "share_error_max": round(max(errors), 2),
        "busy_ratio": round(statistics.mean(sum(window) for window in measured) / 100, 3),
        "shares": [round(statistics.mean(column), 2) for column in zip(*measured, strict=True)],
    }


def meets_bar(name: str, figures: dict[str, Any]) -> bool:
    """Whether a scenario is within its bar."""
    return bool(figures["share_error_mean"] <= BAR_POINTS.get(name.rpartition(",")[0], 2.0))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Accuracy of shares of GPU time on the simulated driver")
    parser.add_argument("--quick", action="store_true", help="kernels of 1 and 5 ms, two windows")
    parser.add_argument("--policy", action="store_true", help="the policy alone, in virtual time, over a sweep of drivers and hosts")
    parser.add_argument("--scheduler", action="store_true", help="what the turns cost: up to 8 devices x 8 busy slices")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--time-scale", type=int, default=4, help="how many times slower the device is than the clock (default 4)")
    parser.add_argument("--shipped-turns", action="store_true", help="do not scale the scheduler's turns")
    parser.add_argument("--windows", type=int, help="windows of one second of device time")
    parser.add_argument("--kernel-ms", help="lengths of GPU kernels, such as 1,2,5")
    parser.add_argument("--scenario", default="", help="only those whose name contains this")
    options = parser.parse_args(arguments)
    options.windows = options.windows or (2 if options.quick else 5)
    options.kernel_ms = [float(x) for x in (options.kernel_ms or ("1,5" if options.quick else "1,2,5")).split(",")]
    return options


def build() -> None:
    """Compile what is missing."""
    subprocess.run([sys.executable, str(ROOT / "nodeagent" / "build.py")], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Run the scenarios, print a table; 1 when one misses its bar, or the control does not."""
    options = parse()
    if options.policy:
        return compute_policy.main(options.quick, options.json)
    if options.scheduler:
        import compute_scheduler  # it takes this module's machine and slices

        return compute_scheduler.main(options.time_scale, 4.0 if options.quick else 15.0, options.json, options.scenario)
    config = turns(1 if options.shipped_turns else options.time_scale)
    build()
    results: dict[str, Any] = {}
    print(
        f"GPU time by shares, simulated driver (time scale {options.time_scale}, driver slice {DRIVER_SLICE_US} us, "
        f"switch {DRIVER_SWITCH_US} us, {options.windows} windows of 1 s of device time).\nBars: {BARS}."
    )
    columns = f"{'mean error':>10} {'worst':>6} {'busy':>6}"
    print(f"{'scenario':<18} {'kernel':>7} | {columns} | driver alone: {columns}")
    with tempfile.TemporaryDirectory(prefix="nbgpu-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        machine = Machine(folder, options.time_scale)
        for scenario, shares in SCENARIOS.items():
            if options.scenario not in scenario:
                continue
            for kernel_ms in options.kernel_ms:
                kernel_ns = int(kernel_ms * 1e6 * options.time_scale)
                ours = run(machine, folder / "run", shares, kernel_ns, config, options.windows, options.time_scale)
                control = run(machine, folder / "run", shares, kernel_ns, None, max(1, options.windows // 2), options.time_scale)
                results[f"{scenario}, {kernel_ms:g} ms"] = {"kernel_ms": kernel_ms, **ours, "control": {"kernel_ms": kernel_ms, **control}}
                print(
                    f"{scenario:<18} {kernel_ms:>4g} ms | {ours['share_error_mean']:>10.2f} {ours['share_error_max']:>6.2f} "
                    f"{ours['busy_ratio'] * 100:>5.1f}% |               {control['share_error_mean']:>10.2f} "
                    f"{control['share_error_max']:>6.2f} {control['busy_ratio'] * 100:>5.1f}%",
                    flush=True,
                )
    missed = [name for name, figures in results.items() if not meets_bar(name, figures)]
    blind = [name for name, figures in results.items() if meets_bar(name, figures["control"])]
    for name in missed:
        print(f"MISSED: {name}: {results[name]['shares']}")
    for name in blind:
        print(f"NO CONTROL: {name}: the driver alone is within the bar too")
    if options.json:
        head = {
            "benchmark": "compute",
            "simulated": True,
            "time_scale": options.time_scale,
            "windows": options.windows,
            "cores": os.cpu_count(),
        }
        print(json.dumps({**head, "scenarios": results}))
    return 1 if missed or blind else 0


if __name__ == "__main__":
    raise SystemExit(main())
