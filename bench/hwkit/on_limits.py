"""Sections about the limits: what a slice sees, what is refused, shares of GPU time, races for memory."""

from __future__ import annotations

import threading
import time
from typing import Any

from . import GIB, MIB
from .analysis import done_at, median, percentile, rates, shares
from .hub import Group, Worker, WorkerFailed
from .kit import Kit
from .places import Nbgpu, Place, Spec

SCENARIOS: dict[str, list[Spec]] = {
    "50/50": [Spec(500), Spec(500)],
    "70/30": [Spec(700), Spec(300)],
    "50/50, 2 : 1 processes": [Spec(500, processes=2), Spec(500)],
    "8 x 12.5, 2 in the first": [Spec(125, processes=2), *[Spec(125)] * 7],
    "strict 30 alone": [Spec(300, strict=True)],
}
KERNEL_US = {"70/30": (1000, 100, 10_000)}
"""Lengths of GPU kernels, microseconds; 1 ms where nothing is said."""


def view(kit: Kit) -> dict[str, Any]:
    """What a program in a slice is told of its GPU, and what it is refused, in every way to ask for memory."""
    limit = kit.memory(4 * GIB, 2 * GIB)
    found: dict[str, Any] = {"limit": limit}
    place, before = kit.place("nbgpu"), kit.nvml.memory()[0]
    with place.groups([Spec(250, memory=limit)]) as [group]:
        [worker] = group.workers
        first = worker.ask("init", 60)
        found["info"], found["nvml"] = worker.ask("info"), worker.ask("nvml_view")
        found["refusals"] = worker.ask("refusals", size=limit + 64 * MIB)
        worker.ask("load")
        worker.ask("launch_one", blocks=kit.blocks)
        time.sleep(1.5)  # a look of the agent at what the context really takes
        blocks = worker.ask("alloc", size=64 * MIB, count=1000)
        found["filled"] = {"blocks": blocks["done"], "code": blocks["code"], "nvml": kit.held([worker.pid], before)}
        if isinstance(place, Nbgpu):
            time.sleep(1.5)
            found["agent_says"] = sum(device.memory_used_bytes for usage in place.agent.all_usage() for device in usage.devices)
        worker.ask("free")
    with kit.place("driver alone").groups([Spec(1000)]) as [group]:
        [worker] = group.workers
        worker.ask("init", 60)
        found["control"] = worker.ask("refusals", size=limit + 64 * MIB)
    told = {"cuMemGetInfo": found["info"]["total"], "cuDeviceTotalMem": found["info"]["device_total"], "NVML": found["nvml"]["total"]}
    right = all(value == limit for value in told.values()) and first["devices"] == 1
    kit.fact(
        "slice-view",
        "holds" if right else "differs",
        f"limit {limit // MIB} MiB; " + ", ".join(f"{name} {value // MIB} MiB" for name, value in told.items()),
    )
    wrong = {name: code for name, code in found["refusals"].items() if code != 2}
    kit.fact(
        "refusals",
        "differs" if wrong else "holds",
        f"codes {found['refusals']}; without the limiter {found['control']}",
    )
    if "agent_says" in found:
        apart = found["agent_says"] - found["filled"]["nvml"]
        kit.fact(
            "usage-agrees",
            "holds" if abs(apart) <= 64 * MIB else "differs",
            f"the agent says {found['agent_says'] // MIB} MiB of a full slice, NVML {found['filled']['nvml'] // MIB} MiB",
        )
    over = found["filled"]["nvml"] - limit
    kit.fact(
        "filled-slice",
        "holds" if over <= 0 else "differs",
        f"NVML sees {found['filled']['nvml'] // MIB} MiB of {limit // MIB} MiB after {found['filled']['blocks']} blocks of 64 MiB",
    )
    return found


# ---- shares of GPU time


def compute(kit: Kit, groups: list[Group], kernel_us: int, seconds: float) -> list[list[list[tuple[int, float]]]]:
    """Let all workers compute at once; return, for each group and worker, (ns, ns of GPU work done) at the end of each step."""
    ns, _ = kit.calibrate()
    workers = [worker for group in groups for worker in group.workers]
    start = time.monotonic_ns() + 200_000_000
    end = start + int(seconds * 1e9)
    batch = max(1, 4000 // kernel_us)
    for worker in workers:
        worker.send("busy", start=start, end=end, rounds=max(1, int(kernel_us * 1000 / ns)), blocks=kit.blocks, batch=batch)
    answers = {id(worker): worker.receive(seconds + 40) for worker in workers}
    return [[[(at, done * kernel_us * 1e3) for at, done in answers[id(worker)]["steps"]] for worker in group.workers] for group in groups]


def summed(columns: list[list[tuple[int, float]]], begin: int, end: int, window_ns: int) -> list[float]:
    """Return a group's rate in each window, its workers together."""
    each = [rates(steps, begin, end, window_ns) for steps in columns]
    return [sum(values) for values in zip(*each, strict=False)]


def measure(kit: Kit, place: Place, specs: list[Spec], kernel_us: int, seconds: float, alone: float, groups: list[Group]) -> dict[str, Any]:
    """Return the shares of one scenario."""
    warm = kit.pick(1.0, 0.2)
    steps = compute(kit, groups, kernel_us, warm + seconds)
    begin = max(worker[0][0] for group in steps for worker in group) + int(warm * 1e9)
    window = int(kit.pick(1e9, 0.5e9))
    last = min(begin + int(seconds * 1e9), *[worker[-1][0] for group in steps for worker in group])
    columns = [summed(group, begin, max(last, begin + window), window) for group in steps]
    return shares(columns, alone, [spec.milli / 10 for spec in specs])


def gpu_shares(kit: Kit) -> dict[str, Any]:
    """Each scenario under nbgpu, the driver alone and HAMi-core: how much of what one process alone gets done each slice gets done."""
    kit.calibrate()
    found = kit.results.setdefault("shares", {})
    seconds = kit.pick(5.0, 0.5)
    lengths = sorted({us for name in SCENARIOS for us in KERNEL_US.get(name, (1000,))}) if not kit.simulated else [2000]
    alone: dict[int, float] = {}
    with kit.place("driver alone").groups([Spec(1000)]) as groups:
        kit.ready(groups)
        for kernel_us in lengths:
            [[steps]] = compute(kit, groups, kernel_us, kit.pick(1.5, 0.6))
            begin = steps[0][0] + int(0.2e9)
            alone[kernel_us] = (steps[-1][1] - done_at(steps, begin)) * 1e9 / max(1, steps[-1][0] - begin)
    found["alone_busy"] = {f"{us} us": round(rate / 1e9, 4) for us, rate in alone.items()}
    for name, specs in SCENARIOS.items():
        if kit.simulated and name.startswith("50/50"):
            continue
        if kit.simulated and len(specs) > 2:
            specs = [Spec(333, processes=specs[0].processes), Spec(333), Spec(333)]  # this tests the kit, on few cores
        for place in kit.places():
            if kit.left() < seconds + 12 and not kit.simulated:
                found.setdefault("left_out", []).append(f"{name} under {place.name}: the time was over")
                continue
            try:
                with place.groups(specs) as groups:
                    kit.ready(groups)
                    for kernel_us in [us for us in KERNEL_US.get(name, (1000,)) if us in lengths] or lengths:
                        got = measure(kit, place, specs, kernel_us, seconds, alone[kernel_us], groups)
                        label = f"shares {name}, {kernel_us / 1000:g} ms"
                        found.setdefault(label, {})[place.name] = got
                        kit.compare(
                            label,
                            place.name,
                            {key: got[key] for key in ("shares_percent", "error_mean_points", "ratio_error_points", "busy_percent")},
                        )
                        kit.say(f"  {label}: {place.name}: {got['shares_percent']}, mean error {got['error_mean_points']} points")
            except WorkerFailed as error:
                found.setdefault("failed", []).append(f"{name} under {place.name}: {error}")
    _share_facts(kit, found)
    return found


def _share_facts(kit: Kit, found: dict[str, Any]) -> None:
    rows = {name: by["nbgpu"] for name, by in found.items() if name.startswith("shares ") and "nbgpu" in by}
    if not rows:
        return
    errors = {name: row["error_mean_points"] for name, row in rows.items()}
    worst = max(errors, key=lambda name: errors[name] or 0)
    verdict = "unknown" if kit.simulated else "holds" if errors[worst] <= 3 else "differs"
    kit.fact("shares", verdict, f"worst: {worst}, mean error {errors[worst]} points", errors=errors)
    many = {
        name: by
        for name, by in found.items()
        if name.startswith("shares ") and "nbgpu" in by and "driver alone" in by and "strict" not in name
    }
    if many:
        ratio = {name: round(by["nbgpu"]["busy_percent"] / max(1e-9, by["driver alone"]["busy_percent"]), 3) for name, by in many.items()}
        kit.fact(
            "turns-lose-less",
            "unknown" if kit.simulated else "holds" if (median(list(ratio.values())) or 0) >= 0.99 else "differs",
            f"work done under nbgpu / by the driver alone: {ratio}",
        )


def small_work(kit: Kit) -> dict[str, Any]:
    """Who types in a notebook beside a training: how long a small GPU kernel takes from launch to answer, 30 % beside 70 %."""
    seconds, found = kit.pick(4.0, 1.0), {}
    ns, one = kit.calibrate()
    for place in kit.places():
        with place.groups([Spec(300), Spec(700)]) as [small, large]:
            kit.ready([small, large])
            start = time.monotonic_ns() + 200_000_000
            end = start + int(seconds * 1e9)
            large.workers[0].send("busy", start=start, end=end, rounds=int(1e6 / ns), blocks=kit.blocks, batch=4)
            told = small.workers[0].ask("short", 60, start=start + 300_000_000, end=end, rounds=int(200e3 / one), pause_ms=20)
            large.workers[0].receive(60)
        ms, gate = told["ms"], told["launch_ms"]
        found[place.name] = {
            "ms_p50": median(ms),
            "ms_p99": percentile(ms, 0.99),
            "ms_worst": max(ms, default=None),
            "launch_ms_p50": median(gate),
            "launch_ms_p99": percentile(gate, 0.99),
            "count": len(ms),
        }
        kit.compare("a 0.2 ms GPU kernel and a wait, 30 % beside a training of 70 %", place.name, found[place.name])
    return found


# ---- memory


class Sampler:
    """Asks NVML as often as it answers how much some processes hold together; keeps the most."""

    def __init__(self, kit: Kit, pids: list[int], before: int) -> None:
        self._kit, self._pids, self._before = kit, pids, before
        self.most = self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, self._kit.held(self._pids, self._before))
            self.looks += 1
            time.sleep(0.0005)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)


def driver_s_own(kit: Kit, workers: list[Worker], before: int) -> int:
    """Return the bytes that processes hold by NVML, before they allocate anything, beyond their contexts: code and stacks.

    No call names them. An agent counts them a second later as overhead, and while a process allocates and frees it knows them only roughly;
    without an agent nobody counts them.
    """
    held = kit.held([worker.pid for worker in workers], before)
    return max(0, held - len(workers) * int(kit.machine.get("context_bytes") or 0))


def races(kit: Kit) -> dict[str, Any]:
    """Four processes of one slice allocate and free at random, each wanting most of it: does their sum ever exceed the limit?"""
    limit, found = kit.memory(6 * GIB, 4 * GIB), {}
    seconds = kit.pick(8.0, 1.0)
    for place in kit.places():
        before = kit.nvml.memory()[0]
        with place.groups([Spec(250, memory=limit, processes=4)]) as [group]:
            workers = kit.ready([group])
            own = driver_s_own(kit, workers, before)
            with Sampler(kit, [worker.pid for worker in workers], before) as sampler:
                until = time.monotonic_ns() + int(seconds * 1e9)
                for number, worker in enumerate(workers):
                    worker.send("churn", until=until, least=2 * MIB, most=512 * MIB, hold=limit * 3 // 4, seed=number)
                answers = [worker.receive(seconds + 60) for worker in workers]
        total = {key: sum(answer[key] for answer in answers) for key in ("given", "refused", "other_errors")}
        over = sampler.most - limit
        found[place.name] = {
            **total,
            "most_held_bytes": sampler.most,
            "over_limit_mib": round(over / MIB),
            "driver_s_own_mib": round(own / MIB),
            "looks": sampler.looks,
            "slowest_call_ms": round(max(answer["slowest_ms"] for answer in answers), 2),
        }
        keys = ("given", "refused", "other_errors", "over_limit_mib", "slowest_call_ms")
        kit.compare("4 processes race for one slice's memory", place.name, {key: found[place.name][key] for key in keys})
    if "nbgpu" in found:
        over, own = found["nbgpu"]["over_limit_mib"], found["nbgpu"]["driver_s_own_mib"]
        control = found.get("driver alone", {}).get("over_limit_mib")
        kit.fact(
            "no-overshoot",
            "holds" if over <= own and found["nbgpu"]["refused"] else "differs",
            f"most held: {over:+d} MiB against the limit in {found['nbgpu']['looks']} looks, {found['nbgpu']['refused']} refused; "
            f"{own} MiB of code and stacks are the driver's own; "
            f"without limits {control} MiB",
        )
    return found
