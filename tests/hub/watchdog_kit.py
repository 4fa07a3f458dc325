"""Programs of tenants that get past the limiter, each in its way (`evade.c`), and what a test of the watchdog asks of them."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from agent_harness import ROOT, AgentProcess, until
from attack_fixtures import Tenancy, metrics
from attacker import Attacker
from native_build import build_module

from nbgpu.quantities import GIB

HELD = 3 * GIB
SIM = ROOT / "nodeagent" / "simgpu"
LOCKS = 10_000
BOUND_SECONDS = 2.0
MARGIN_SECONDS = 0.5
"""For a loaded machine, and the way from the offence to the test's clock."""
WAYS = {
    "static": "unlimited",
    "setuid": "unlimited",
    "pid-namespace": "unlimited",
    "no-preload": "unlimited",
    "dlopen": "unlimited",
    "dlmopen": "unlimited",
    "direct": "unlimited",
    "many-locks": "unlimited",
    "forged-for-others": "unlimited",
    "forged-for-itself": "overhead",
    "forged-with-peak": "overhead",
}
"""How a program gets past the limiter, and as what the watchdog sees it."""


@functools.cache
def built() -> Path | None:
    """Return a directory of `evade.c`, compiled once for all tests; None where there is no compiler, or no libc to link statically."""
    compiler = build_module().find_compiler(None)
    if compiler is None:
        return None
    name = tempfile.mkdtemp(prefix="nbgpu-evade-", dir="/tmp")
    atexit.register(shutil.rmtree, name, ignore_errors=True)
    Path(name).chmod(0o755)
    flags = [f"-I{ROOT / 'nodeagent' / 'include'}", "-std=gnu11", "-O0", "-pthread", "-w", str(ROOT / "tests" / "hub" / "evade.c")]
    state, driver = sorted(map(str, SIM.glob("sim_*.c"))), sorted(map(str, SIM.glob("drv_*.c")))
    for program, more in {
        "static": ["-static", "-DSTATIC", "-DNBGPU_FAULTS", *state, *driver],
        "direct": ["-static", "-DDIRECT", "-DNBGPU_FAULTS", *state],
        "plain": [],
    }.items():
        command = [*compiler, *flags, *more, "-o", f"{name}/{program}", "-ldl", "-lrt"]
        if subprocess.run(command, check=False, timeout=120, capture_output=True).returncode:
            return None
    shutil.copy(f"{name}/static", f"{name}/setuid")
    os.chmod(f"{name}/setuid", 0o4755)
    return Path(name)


@pytest.fixture
def programs() -> Path:
    """A directory of `evade.c` compiled statically (`static`), as root's (`setuid`), without a driver (`direct`), and plainly (`plain`)."""
    found = built()
    if found is None:
        pytest.skip("no C compiler that links statically")
    return found


def offend(way: str, tenancy: Tenancy, programs: Path, size: int = HELD) -> tuple[int, float]:
    """Let a program of the slice get past the limiter; return its pid and when it had its memory (CLOCK_MONOTONIC)."""
    if way in ("no-preload", "forged-for-others", "forged-for-itself", "forged-with-peak"):
        one = tenancy.enter(limited=False)
        if way == "forged-for-others":
            one.run("forge(use(), 20, os.getppid() or 1, 1); forge(use(), 21, 1, started(1))")
        elif way != "no-preload":
            slot, peak = (9, "") if way == "forged-for-itself" else (10, ", peak=4 * GIB")
            one.run(f"fd = use(); lock(fd, {slot}); forge(fd, {slot}, os.getpid(), started(os.getpid()){peak})")
        if way == "forged-with-peak":
            size = 12 * GIB  # beyond the slice: a peak is believed up to the slice's limit
        assert one.run(f"result = cuda() or alloc({size})") == 0
        return one.pid, time.monotonic()
    shell = tenancy.enter()
    if way == "many-locks":  # it takes too long to ask who holds which slot
        # downwards: each is put in front; at odd places, where no slot has its own
        shell.run(f"fd = use(); [fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * i + 1) for i in range({LOCKS}, 0, -1)]")
        way = "direct"
    library = str(Path(tenancy.launch.env["LD_LIBRARY_PATH"].split(":")[0]) / "libcuda.so.1")
    command = {
        "static": [f"{programs}/static", "cuda", str(size)],
        "setuid": [f"{programs}/setuid", "cuda", str(size)],
        "pid-namespace": ["unshare", "--user", "--map-root-user", "--pid", "--fork", f"{programs}/static", "cuda", str(size)],
        "direct": [f"{programs}/direct", "direct", str(size)],
    }.get(way, [f"{programs}/plain", way, str(size), library])
    return start(shell, command)


def fill_and_ignore(mallory: Tenancy) -> tuple[Attacker, Attacker]:
    """Return an honest kernel that holds most of a slice, and who then takes more without the limiter, though it tells the truth."""
    kernel = mallory.enter()
    assert kernel.run("result = cuda() or alloc(6 * GIB)") == 0
    time.sleep(1.5)
    one = mallory.enter(limited=False)
    one.run("fd = use(); lock(fd, 9); forge(fd, 9, os.getpid(), started(os.getpid()), used=6 * GIB, peak=6 * GIB)")
    assert one.run("result = cuda() or alloc(6 * GIB)") == 0
    return kernel, one


def start(shell: Attacker, command: list[str]) -> tuple[int, float]:
    """Start a program from a shell in the slice, the preload in its environment; return its pid and when it had its memory."""
    said, pid = shell.run(
        f"""
        child = subprocess.Popen({command!r}, stdout=subprocess.PIPE, text=True)
        said, pid = child.stdout.readline(), child.pid
        if {command[0]!r} == "unshare":
            pid = int(open(f"/proc/{{pid}}/task/{{pid}}/children").read().split()[0])
        result = said, pid
        """
    )
    assert said == "ok\n", said
    return pid, time.monotonic()


def state(pid: int) -> str:
    """Return a process's state letter; Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def alive(pid: int) -> bool:
    """Return whether a process runs or is stopped."""
    return state(pid) not in ("Z", "X")


def ended(pid: int, since: float) -> float:
    """Wait for a process's end and return how long after `since` it was; hold it to the watchdog's bound."""
    until(lambda: not alive(pid), 6, f"the end of process {pid}")
    took = time.monotonic() - since
    print(f"ended after {took:.2f} s")
    assert took < BOUND_SECONDS + MARGIN_SECONDS
    return took


def end(pids: Iterable[int]) -> None:
    """End programs that a test has left: they outlive the shell that started them."""
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def stopped(pid: int, since: float) -> float:
    """Wait until a process is stopped, as `ended` does for its end."""
    until(lambda: state(pid) == "T", 6, f"process {pid} stopped")
    took = time.monotonic() - since
    print(f"stopped after {took:.2f} s")
    assert took < BOUND_SECONDS + MARGIN_SECONDS
    return took


def action(agent: AgentProcess, kind: str, what: str) -> float:
    """Return how often the watchdog did something for a kind of finding, by its metrics."""
    pattern = rf'^nbgpu_watchdog_actions_total{{action="{what}",kind="{kind}"}} (\S+)$'
    found = re.search(pattern, metrics(agent), re.M)
    return float(found[1]) if found else 0.0


def of_slice(events: list[dict[str, Any]], slice_id: str) -> list[dict[str, Any]]:
    """Return the events of one slice."""
    return [event for event in events if event["slice_id"] == slice_id]
