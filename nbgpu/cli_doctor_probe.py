"""The checks of ``nbgpu doctor`` that look from inside a slice: in this one, or by a tiny program started in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cli_common import own_slice
from .cli_doctor import Check, Facts
from .cli_doctor_checks import held_slices, libraries_dir
from .cli_serve import LOCK, START_SECONDS, STOP_SECONDS, command_of, is_served, refuse_beside_system, without_prefix
from .client import AgentClient, PoolClient, SliceClient
from .errors import NbgpuError, Unavailable
from .models import Usage
from .paths import AGENT_SOCKET, POOL_SOCKET, runtime_path
from .quantities import GIB, MIB, format_memory
from .words import counted

PROBE_BYTES = GIB
PROBE_SECONDS = 90
OURS_IDLE_SECONDS = "60"
"""Agent and pool that were started for the probe alone end by themselves then, should this program be killed."""
END_SECONDS = 5.0
"""How long the agent is given to see that the tiny program has ended."""
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
    """Start a tiny program in a slice, as `nbgpu run` does, and judge what it saw.

    Where nothing serves the runtime directory, that is done in one of its own: what is there is neither used nor taken over.
    """
    folder = libraries_dir()
    if folder is None or not (folder / "libnbgpu.so").is_file():
        return []
    runtime = runtime_path()
    if facts.node is not None and facts.pool_answers:
        return in_slice(runtime)
    if facts.node is not None or facts.pool_answers or _starts(runtime):
        return [Check("probe", "note", "nothing was tried: agent and pool do not both answer")]
    if held_slices():
        return [Check("probe", "note", "nothing was tried beside slices that no agent serves")]
    try:
        refuse_beside_system(runtime)
        command_of("nbgpu_agent", "agent")
        command_of("nbgpu_pool", "pool")
    except NbgpuError as error:
        return [Check("probe", "note", f"no slice to try here: {error.message}")]
    try:
        with served_aside(runtime) as aside:
            return in_slice(aside)
    except NbgpuError as error:
        return [Check("probe", "error", f"agent and pool could not be tried: {error.message}", "")]


def _starts(runtime: Path) -> bool:
    """Return whether an `nbgpu serve` lives there; without leaving a lock behind."""
    return (runtime / LOCK).exists() and is_served(runtime)


@contextmanager
def served_aside(runtime: Path) -> Generator[Path]:
    """Run an agent and a pool in a directory of their own beside `runtime`, on the same file system; both are gone afterwards."""
    above = next((one for one in (runtime.absolute().parent, Path("/tmp")) if os.access(one, os.W_OK | os.X_OK)), None)
    with tempfile.TemporaryDirectory(prefix="nbgpu-try-", dir=above, ignore_cleanup_errors=True) as name:
        aside, log = Path(name), Path(name) / "try.log"
        command = [sys.executable, "-m", "nbgpu", "serve", "--idle-exit", OURS_IDLE_SECONDS]
        with log.open("wb") as out:
            # Ctrl-C in the terminal reaches only us, and we end it.
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=_env(aside), start_new_session=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not PoolClient(aside / POOL_SOCKET, 2).healthy():
                if server.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text(errors="replace").strip().splitlines()
                    raise Unavailable(without_prefix(said[-1:]) or "they did not answer.", code="start")
                time.sleep(0.05)
            yield aside
        finally:
            _wait_for_end(aside)
            server.terminate()
            try:
                server.wait(3 * STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for_end(aside: Path) -> None:
    """Wait until the agent has put away the slice of the tiny program."""
    deadline = time.monotonic() + END_SECONDS
    try:
        while AgentClient(aside / AGENT_SOCKET, 2).slices().slices and time.monotonic() < deadline:
            time.sleep(0.02)
    except NbgpuError:
        pass  # it ended before


def _env(runtime: Path) -> dict[str, str]:
    return {**os.environ, "NBGPU_RUNTIME_DIR": str(runtime)}


def in_slice(runtime: Path) -> list[Check]:
    """Start the tiny program in a slice of the pool there."""
    pool = PoolClient(runtime / POOL_SOCKET)
    size = f"{probe_bytes(pool) // MIB} MiB"
    command = [sys.executable, "-m", "nbgpu", "run", "--memory", size, "--no-wait", "--", sys.executable, "-c", PROGRAM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=_env(runtime))
    except subprocess.TimeoutExpired:
        return [Check("probe", "error", f"a program in a slice did not end within {PROBE_SECONDS} s", "Look at the agent's log.")]
    if done.returncode and "Nothing is free now" in done.stderr:
        return [Check("probe", "note", "every GPU is taken: nothing was tried; run this again later")]
    return judge(done, None)


def probe_bytes(pool: PoolClient) -> int:
    """Return how much memory the tiny program is given: not less than a slice must have."""
    return max(PROBE_BYTES, max((books.least_bytes for books in pool.devices()), default=0))


def judge(done: subprocess.CompletedProcess[str], api: SliceClient | None) -> list[Check]:
    """Judge what the probe program printed."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(FIRST_LINE)]
    if not lines:
        said = without_prefix((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1:])
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
    whose = ""
    if api is not None:
        limit, own = limit_of(api.usage(), os.environ.get("NBGPU_KERNEL_ID") or None, seen["total"])
        whose = ", this kernel's limit" if own else ""
        if limit != seen["total"]:
            what = f"the driver says {format_memory(seen['total'])}, the {'kernel' if own else 'slice'} has {format_memory(limit)}"
            return Check("GPU in a slice", "error", what, "Was LD_PRELOAD replaced in this program?")
    return Check("GPU in a slice", "ok", f"a program sees {counted(seen['count'], 'GPU')} of {format_memory(seen['total'])}{whose}")


def limit_of(usage: Usage, kernel_id: str | None, seen_bytes: int) -> tuple[int, bool]:
    """Return the bytes that a program of a kernel sees of the slice's first device, and whether the kernel's own limit says so.

    Where no provisioner has told the kernel's id, the limiter finds it by itself: then any kernel's limit that was seen is taken for its.
    """
    whole = usage.devices[0].memory_limit_bytes
    own = [one.limit.memory_bytes for one in usage.kernels if one.limit.memory_bytes is not None and kernel_id in (None, one.kernel_id)]
    found = seen_bytes if kernel_id is None and seen_bytes in own else own[0] if kernel_id is not None and own else whole
    return (found, True) if found < whole else (whole, False)
