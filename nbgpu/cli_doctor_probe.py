"""The checks of ``nbgpu doctor`` that look from inside a slice: in this one, or by a tiny program started in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .cli_common import own_slice, pool
from .cli_doctor import Check, Facts
from .cli_doctor_checks import libraries_dir
from .cli_serve import command_of, is_served
from .client import SliceClient
from .errors import NbgpuError
from .paths import runtime_dir
from .quantities import GIB, MIB, format_memory
from .words import counted

PROBE_BYTES = GIB
PROBE_SECONDS = 90
OURS_IDLE_SECONDS = "1"
"""Agent and pool that were started for the probe alone end by themselves when idle so long: another may have a slice there by then."""
END_SECONDS = 10.0
FIRST_LINE = "nbgpu-probe "
PROGRAM = """
import ctypes, json, os
found = {"preload": os.environ.get("LD_PRELOAD", ""), "socket": os.environ.get("NBGPU_SOCKET", "")}
found["mapped"] = "libnbgpu" in open("/proc/self/maps").read()
found["cgroup"] = "nbgpu-" in open("/proc/self/cgroup").read()
try:
    cuda = ctypes.CDLL("libcuda.so.1")
    found["init"] = cuda.cuInit(0)
    count, size = ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), 0)
    found["count"], found["total"] = count.value, size.value
except OSError as error:
    found["error"] = str(error)
print("nbgpu-probe " + json.dumps(found), flush=True)
"""
"""Asks the driver what a program in a slice sees; needs nothing but Python."""


def own_slice_answers(facts: Facts) -> list[Check]:
    """The slice's own socket answers."""
    api = own_slice()
    assert api is not None
    try:
        usage = api.usage()
    except NbgpuError as error:
        return [
            Check("slice", "warning", f"its socket does not answer: {error.message}", "Limits hold meanwhile; the admin starts the agent.")
        ]
    devices = ", ".join(f"{format_memory(use.memory_limit_bytes)} of GPU {use.index}" for use in usage.devices)
    return [Check("slice", "ok", f"{usage.slice_id[:8]}: {devices}, {usage.mode}")]


def inside(facts: Facts) -> list[Check]:
    """What a program that this process starts sees."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PROBE_SECONDS)
    api = own_slice()
    return judge(done, api)


def probe(facts: Facts) -> list[Check]:
    """Start a tiny program in a slice, as `nbgpu run` does, and judge what it saw."""
    folder = libraries_dir()
    if folder is None or not (folder / "libnbgpu.so").is_file():
        return []
    try:
        command_of("nbgpu_agent", "agent")
        command_of("nbgpu_pool", "pool")
    except NbgpuError as error:
        return [Check("probe", "note", f"no slice to try here: {error.message}")]
    command = [sys.executable, "-m", "nbgpu", "run", "--memory", probe_memory(facts), "--no-wait", "--", sys.executable, "-c", PROGRAM]
    runtime = runtime_dir()
    ours = not facts.pool_answers and not (runtime.is_dir() and is_served(runtime))
    env = {**os.environ, "NBGPU_RUNTIME_DIR": str(runtime)} | ({"NBGPU_IDLE_SECONDS": OURS_IDLE_SECONDS} if ours else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=env)
        if done.returncode and "Nothing is free now" in done.stderr:
            return [Check("probe", "note", "every GPU is taken: nothing was tried; run this again later")]
        return judge(done, None)
    except subprocess.TimeoutExpired:
        return [Check("probe", "error", f"a program in a slice did not end within {PROBE_SECONDS} s", "Look at the agent's log.")]
    finally:
        if ours:
            wait_for_end(runtime)


def wait_for_end(runtime: Path) -> None:
    """Wait until the agent and the pool that the probe started have ended; where somebody took a slice meanwhile they stay."""
    deadline = time.monotonic() + END_SECONDS
    while runtime.is_dir() and is_served(runtime) and time.monotonic() < deadline:
        time.sleep(0.1)


def probe_memory(facts: Facts) -> str:
    """Return how much memory the tiny program is given: not less than a slice must have."""
    least = max((books.least_bytes for books in pool().devices()), default=0) if facts.pool_answers else 0
    return f"{max(PROBE_BYTES, least) // MIB} MiB"


def judge(done: subprocess.CompletedProcess[str], api: SliceClient | None) -> list[Check]:
    """Judge what the probe program printed."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(FIRST_LINE)]
    if not lines:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return [Check("probe", "error", f"a program could not be run in a slice: {said}", "")]
    seen: dict[str, Any] = json.loads(lines[0].removeprefix(FIRST_LINE))
    if not seen["mapped"]:
        what = f"LD_PRELOAD is not in force in a slice (it is {seen['preload'] or 'unset'}): nothing limits its programs"
        return [Check("probe", "error", what, "Does a wrapper (sudo, ssh, a module system, env -i) drop the environment?")]
    found = [Check("limits", "ok", "the limiter is loaded in a program of a slice"), *_preload_version(seen["preload"])]
    found.append(_driver_seen(seen, api))
    how = "has a cgroup of its own" if seen["cgroup"] else "has no cgroup of its own: its processes are known by ancestry"
    found.append(Check("slice's cgroup", "ok" if seen["cgroup"] else "note", f"a slice {how}"))
    return found


def _preload_version(preload: str) -> list[Check]:
    """The limiter that slices load is the one that is installed."""
    folder = libraries_dir()
    used = next((Path(part) for part in preload.replace(":", " ").split() if part.endswith("libnbgpu.so")), None)
    if folder is None or used is None or not used.is_file() or not (folder / "libnbgpu.so").is_file():
        return []
    if used.read_bytes() != (folder / "libnbgpu.so").read_bytes():
        return [Check("limiter version", "warning", f"slices load {used}, which is not the installed one", "Restart the agent.")]
    return [Check("limiter version", "ok", "slices load the installed one")]


def _driver_seen(seen: dict[str, Any], api: SliceClient | None) -> Check:
    """The driver, asked from inside, knows the slice's size."""
    if "error" in seen:
        return Check(
            "GPU in a slice", "error", f"libcuda.so.1 cannot be loaded: {seen['error']}", "Is the driver (or sim/) on the library path?"
        )
    if seen["init"] or not seen["count"]:
        return Check(
            "GPU in a slice",
            "error",
            f"cuInit answers {seen['init']}, {counted(seen['count'], 'device')}",
            "Is /dev/nvidia* open to the user?",
        )
    if api is not None:
        limit = api.usage().devices[0].memory_limit_bytes
        if limit != seen["total"]:
            what = f"the driver says {format_memory(seen['total'])}, the slice has {format_memory(limit)}"
            return Check("GPU in a slice", "error", what, "Was LD_PRELOAD replaced in this program?")
    return Check("GPU in a slice", "ok", f"a program sees {counted(seen['count'], 'GPU')} of {format_memory(seen['total'])}")
