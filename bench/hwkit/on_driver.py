"""Sections about the driver alone: the machine, how functions are found, what contexts and blocks cost, how the driver shares time."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from . import BENCH, MIB, PYTHON, ROOT
from .analysis import median, percentile, runs, time_slices
from .kit import Kit, Skip
from .places import Nbgpu, Spec, missing_packages

FRAMEWORKS = ("torch", "cupy", "jax", "numba", "cuda.bindings")
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}


def machine(kit: Kit) -> dict[str, Any]:
    """What this machine is, and what of it changes what can be measured. Nothing is changed."""
    nvml = kit.nvml
    used, total = nvml.memory()
    names = [_name(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    mig = nvml.pair("nvmlDeviceGetMigMode")
    major = nvml.text("nvmlSystemGetDriverVersion", of_device=False)
    found: dict[str, Any] = {
        "gpu": nvml.text("nvmlDeviceGetName"),
        "uuid": nvml.text("nvmlDeviceGetUUID"),
        "gpus_on_machine": nvml.count(),
        "memory_bytes": total,
        "used_bytes_before": used,
        "driver": major,
        "compute_mode": COMPUTE_MODES.get(nvml.number("nvmlDeviceGetComputeMode") or 0, "unknown"),
        "persistence": bool(nvml.number("nvmlDeviceGetPersistenceMode")),
        "mig": bool(mig and mig[0]),
        "mps": any(name.startswith("nvidia-cuda-mps") for name in names),
        "sm_clock_mhz": nvml.number("nvmlDeviceGetClockInfo", 1),
        "sm_clock_max_mhz": nvml.number("nvmlDeviceGetMaxClockInfo", 1),
        "others_on_gpu": len(nvml.processes()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_limits_by_driver": nvml.limits_memory(),
        "kernel": platform.release(),
        "root": os.geteuid() == 0,
        "python": platform.python_version(),
        "c_compiler": shutil.which("gcc") or shutil.which("cc"),
        "frameworks": [name for name in FRAMEWORKS if _installed(name)],
        "missing_for_agent": missing_packages(),
    }
    kit.machine.update(found)
    with kit.place("driver alone").groups([Spec(1000)]) as [group]:
        [worker] = group.workers
        first = worker.ask("init", 90)
        found["processors"] = first["processors"]
        found["context_bytes"] = nvml.processes().get(worker.pid, 0)
        found["ptx"] = worker.ask("load")["target"]
        found["pids_agree"] = worker.pid in nvml.processes()
        kit.machine.update(found)
        own = [pid for pid in nvml.processes() if pid != worker.pid]
    kit.fact(
        "nvml-pids",
        "holds" if found["pids_agree"] else "differs",
        "the worker's pid is in NVML's list" if found["pids_agree"] else f"pid {worker.pid} is not in NVML's list, which has {own[:8]}",
    )
    limits = found["memory_limits_by_driver"]
    recent = (major or "").partition(".")[0].isdecimal() and int((major or "").partition(".")[0]) >= 615
    kit.fact(
        "memory-limits-r615",
        "holds" if bool(limits) == recent else "differs",
        f"driver {major} {'has them' if limits else 'does not know the call' if limits is None else 'says Not Supported'}; nothing was set",
    )
    notes = []
    if found["mig"]:
        notes.append("MIG is on: the figures are of one instance, and were not made for it")
    if found["mps"]:
        notes.append("an MPS server runs: clients may share it, and then the driver does not slice time between them")
    if found["compute_mode"] != "default":
        notes.append(f"compute mode {found['compute_mode']}: several processes may be refused a context")
    if found["others_on_gpu"]:
        notes.append(
            f"{found['others_on_gpu']} other process(es) held the GPU at the start: figures of time and free memory are beside them"
        )
    if Path("/run/nbgpu/agent.sock").exists():
        notes.append(
            "an nbgpu agent of this machine is there already: its slices and the kit's share the GPU without knowing of each other"
        )
    if not found["root"]:
        notes.append("not root: cgroups of slices cannot be made, and checkpointing may be refused")
    found["notes"] = notes
    return found


def start(kit: Kit) -> dict[str, Any]:
    """Start the agent and the pool, as users do; where that fails the limiter and the scheduler must do."""
    begun = time.monotonic()
    place = kit.place("nbgpu")
    found: dict[str, Any] = {"how": kit.nbgpu_how, "seconds": round(time.monotonic() - begun, 2)}
    if isinstance(place, Nbgpu):
        node = place.agent.node()
        found["devices"] = [device.model_dump(mode="json", exclude={"node"}) for device in node.devices]
        found["agent_warnings"] = [line for line in place.log("agent") if " WARNING " in line or " ERROR " in line]
        probe = kit.folder / "run" / "probe.json"
        found["probe"] = json.loads(probe.read_text())["context_bytes"] if probe.exists() else "no context could be measured"
        begun = time.monotonic()
        done = place.run(Spec(100), [PYTHON, "-S", "-c", "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"], 30)
        found["first_run"] = {
            "seconds": round(time.monotonic() - begun, 2),
            "cuInit": done.stdout.strip(),
            "said": done.stderr.strip()[-200:],
        }
    return found


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""  # it has ended


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def resolution(kit: Kit) -> dict[str, Any]:
    """Whether what cuGetProcAddress returns is what is exported, and whether the limiter catches it all."""
    requests = [str(ROOT / "tests" / "data" / f"cudart{version}_requests.txt") for version in (12, 13)]
    command = [PYTHON, "-S", str(BENCH / "hwkit" / "resolution_probe.py"), str(ROOT / "nodeagent/limiter/functions.h"), *requests]
    done = kit.place("driver alone").run(Spec(1000), command, 30)
    if done.returncode:
        raise Skip(f"the driver was not asked: {done.stderr.strip()[-200:]}")
    plain = json.loads(done.stdout)
    known = [hook for hook in plain["hooks"] if hook.get("got")]
    other = [
        f"{hook['asked']} v{hook['version']} f{hook['flags']}: {hook['by'] or 'no exported function'}" for hook in known if not hook["same"]
    ]
    missing = [hook["name"] for hook in plain["hooks"] if not hook["exported"]]
    unnamed = sorted({row[0] for row in plain["requests"] if row[3] == 0 and not row[4]})
    kit.fact(
        "proc-address",
        "holds" if known and not other else "differs",
        f"{len(known) - len(other)} of {len(known)} the same; others: {other[:12] or 'none'}",
        other=other,
        not_exported=missing,
        runtimes_got_unexported=unnamed,
        requests=len(plain["requests"]),
        driver_version=plain["version"],
    )
    found = {"driver_api": plain["version"], "hooks": len(plain["hooks"]), "other_address": other, "not_exported": missing}
    found["runtime_requests"] = {"asked": len(plain["requests"]), "answered_by_unexported": unnamed}
    try:
        inside = kit.place("nbgpu").run(Spec(250), command, 60)
    except Skip as error:
        return {**found, "in_slice": str(error)}
    if inside.returncode:
        kit.fact(
            "resolution-escapes",
            "unknown",
            f"failed in a slice: {inside.stderr.strip()[-200:]}",
        )
        return found
    seen = json.loads(inside.stdout)
    bases = {hook["asked"] for hook in seen["hooks"] if hook.get("asked")}
    escaped = [f"{h['asked']} v{h['version']} f{h['flags']}" for h in seen["hooks"] if h.get("got") and "libnbgpu" not in h["in"]]
    escaped += [f"{row[0]} v{row[1]} f{row[2]}" for row in seen["requests"] if row[0] in bases and row[3] == 0 and "libnbgpu" not in row[5]]
    kit.fact(
        "resolution-escapes",
        "differs" if escaped else "holds",
        f"{len(escaped)} of {len(seen['hooks']) + len(seen['requests'])} requests reach the driver's own: "
        f"{sorted(set(escaped))[:12] or 'none'}",
        escaped=sorted(set(escaped)),
    )
    return {**found, "escaped": sorted(set(escaped))}


def contexts(kit: Kit) -> dict[str, Any]:
    """What a context, a module, a first launch, a second context and small blocks really take."""
    nvml, found = kit.nvml, {}
    used = nvml.memory()[0]

    with kit.place("driver alone").groups([Spec(1000, processes=2)]) as [group]:
        one, two = group.workers

        def now() -> tuple[int, int]:
            return nvml.processes().get(one.pid, 0), nvml.memory()[0] - used

        first = one.ask("init", 60)
        found["init_seconds"], found["context_seconds"] = first["init_seconds"], first["context_seconds"]
        steps = {"context": now()}
        one.ask("load")
        steps["and the module"] = now()
        one.ask("launch_one", blocks=kit.blocks)
        steps["and the first launches"] = now()
        free, total = (one.ask("info")[key] for key in ("free", "total"))
        found["meminfo_total_less_than_nvml"] = nvml.memory()[1] - total
        before = now()
        small = {}
        for size, count in ((1, 512), (4096, 512), (256 * 1024, 64), (MIB, 16), (3 * MIB, 8)):
            one.ask("alloc", size=size, count=count)
            small[f"{count} x {size} B"] = {"asked": size * count, "taken": now()[0] - before[0]}
            one.ask("free")
        second = one.ask("second_context")
        steps["and a second context"] = now()
        two.ask("init", 60)
        steps["a second process's context"] = (nvml.processes().get(two.pid, 0), nvml.memory()[0] - used)
        found["steps"] = {name: {"nvml_process": mine, "device": device} for name, (mine, device) in steps.items()}
        found["small_blocks"], found["second_context_code"], found["free_seen"] = small, second["code"], free
    context = steps["context"][0]
    cap = max(256 * MIB, context)
    extra = steps["and the first launches"][0] - context
    kit.fact(
        "context-cost",
        "holds" if context and abs(steps["a second process's context"][0] - context) <= 32 * MIB else "differs" if context else "unknown",
        f"{context // MIB} MiB, in a second process {steps['a second process' + chr(39) + 's context'][0] // MIB} MiB; "
        f"a second context in the process + {(steps['and a second context'][0] - steps['and the first launches'][0]) // MIB} MiB",
        steps=found["steps"],
    )
    kit.fact(
        "overhead-cap",
        "unknown" if not context else "holds" if extra <= cap else "differs",
        f"module and first launches add {extra // MIB} MiB; the cap is {cap // MIB} MiB",
    )
    return found


def driver_time(kit: Kit) -> dict[str, Any]:
    """The driver's time slice, what a switch costs, what events then say, how deep the queue is, how long a release takes."""
    found: dict[str, Any] = {}
    blocks = kit.blocks
    long_ns = int(kit.pick(500e6, 60e6))
    ns, lonely = kit.calibrate()
    with kit.place("driver alone").groups([Spec(1000), Spec(1000)]) as groups:
        one, two = kit.ready(groups)
        found["ns_per_round"], found["ns_per_round_one_block"] = ns, lonely
        for name, grid in (("full grid", blocks), ("one block", 1)):
            at = time.monotonic_ns() + 200_000_000
            for worker in (one, two):
                worker.send("gaps", start=at, ns=long_ns, blocks=grid, least_ns=20_000)
            answers = [worker.receive(60) for worker in (one, two)]
            when = [runs(answer["first"], answer["last"], [tuple(gap) for gap in answer["gaps"]]) for answer in answers]
            found[name] = time_slices(*when)
        alone = one.ask("timed", 60, start=0, rounds=int(5e6 / ns), blocks=blocks, count=20)["ms"]
        at = time.monotonic_ns() + 200_000_000
        two.send("busy", start=at, end=at + int(kit.pick(1.2e9, 0.5e9)), rounds=int(1e6 / ns), blocks=blocks, batch=10)
        beside = one.ask("timed", 60, start=at + 200_000_000, rounds=int(5e6 / ns), blocks=blocks, count=20)["ms"]
        two.receive(60)
        found["events_ms"] = {"alone": median(alone), "beside_another": median(beside), "beside_another_p90": percentile(beside, 0.9)}
        found["queue_depth"] = one.ask("depth", 60, rounds=int(400e6 / lonely), most=4000)["blocked_at"]
        found["events"] = one.ask("event_costs", count=int(kit.pick(2000, 200)))
    full = found["full grid"]
    slice_us, switch_us = full.get("slice_us_median"), full.get("switch_us_median")
    nothing = "simulated: no GPU kernel is executed" if kit.simulated else "no switches were seen"
    kit.fact(
        "driver-slice",
        "unknown" if not slice_us else "holds" if 1000 <= slice_us <= 4000 else "differs",
        nothing
        if not slice_us
        else f"median {slice_us / 1e3:.2f} ms, p90 {full['slice_us_p90'] / 1e3:.2f} ms ({full['switches']} switches)",
        **full,
    )
    kit.fact(
        "driver-switch",
        "unknown" if switch_us is None else "holds" if 20 <= switch_us <= 300 else "differs",
        nothing
        if switch_us is None
        else f"median {switch_us:.0f} us with a full grid, {found['one block'].get('switch_us_median')} us with one block",
    )
    ratio = found["events_ms"]["beside_another"] / found["events_ms"]["alone"]
    kit.fact(
        "events-lie",
        "holds" if ratio > 1.3 else "differs",
        f"a 5 ms GPU kernel is said to take {ratio:.2f} times as long beside another process",
    )
    depth = found["queue_depth"]
    kit.fact(
        "queue-depth",
        "unknown" if depth is None else "holds" if 900 <= depth <= 1100 else "differs",
        "more than 4,000 launches were taken" if depth is None else f"launch {depth} waited",
    )
    return found
