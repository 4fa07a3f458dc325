"""Limits of memory with each backend: the limiter alone, and the (simulated) driver's by cgroup beside it. Real cgroups and processes.

Programs run where the agent does, in its mount namespace with cgroup v2 at its place: there the simulated driver looks for a
process's cgroup.
"""

# ruff: noqa: F811 (fixtures by import)
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentProcess, missing_libraries, until, usage
from attack_fixtures import metrics
from test_agent_cgroups import HereAgent
from watchdog_kit import programs  # noqa: F401

from nbgpu.errors import Unavailable
from nbgpu.models import Launch, Slice
from nbgpu.quantities import GIB

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes cgroups and mount namespaces"),
    pytest.mark.skipif(bool(missing_libraries()), reason=str(missing_libraries())),
]
R615 = "13040"
PROGRAM = """
import ctypes as c, json, os, sys
import pynvml as n
cuda = c.CDLL("libcuda.so.1")
GIB, MIB, OUT = 1 << 30, 1 << 20, 2
def start():
    context = c.c_void_p()
    return cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(c.byref(context), 0) or cuda.cuCtxSetCurrent(context)
def alloc(size):
    return cuda.cuMemAlloc_v2(c.byref(c.c_uint64()), c.c_size_t(size))
def managed(size):
    return cuda.cuMemAllocManaged(c.byref(c.c_uint64()), c.c_size_t(size), 1)
def info():
    free, total = c.c_size_t(), c.c_size_t()
    assert cuda.cuMemGetInfo_v2(c.byref(free), c.byref(total)) == 0
    n.nvmlInit()
    return free.value, total.value, n.nvmlDeviceGetMemoryInfo(n.nvmlDeviceGetHandleByIndex(0)).total
def limit(path):
    n.nvmlInit()
    found = n.c_nvmlGetMemoryLimits_v1_t(path.encode())
    try: n.nvmlDeviceGetMemoryLimits_v1(n.nvmlDeviceGetHandleByIndex(0), found)
    except n.NVMLError as error: return str(error)
    return [found.softLimit, found.hardLimit]
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Place:
    """An agent on a machine with driver r615, and programs beside it."""

    def __init__(self, agent: AgentProcess):
        self.agent = agent
        self.made: list[subprocess.Popen[str]] = []
        self.children: list[int] = []
        """Programs that those have started."""

    def inside(self, *command: str, env: dict[str, str]) -> subprocess.Popen[str]:
        """Start a program in the agent's mount namespace."""
        assert self.agent.process is not None
        enter = ["nsenter", f"--mount=/proc/{self.agent.process.pid}/ns/mnt", "--", *command]
        self.made.append(subprocess.Popen(enter, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return self.made[-1]

    def program(self, launch: Launch, *, preload: bool = True, kernel: str = "kernel-a") -> subprocess.Popen[str]:
        """Start one that does what it is asked, with the limiter or without."""
        env = os.environ | launch.env | {"NBGPU_KERNEL_ID": kernel}
        return self.inside(sys.executable, "-c", PROGRAM, env=env if preload else {k: v for k, v in env.items() if k != "LD_PRELOAD"})

    def slice(self, milli: int = 250) -> tuple[Slice, Launch]:
        """Prepare a slice: of 250 milli-GPU, 19.5 GiB."""
        wanted = self.agent.slice(milli)
        return wanted, self.agent.put(wanted)

    def enter(self, wanted: Slice, launch: Launch, **options: Any) -> subprocess.Popen[str]:
        """Start a program in a slice, which is in the slice's cgroup when this returns."""
        process = self.program(launch, **options)
        self.agent.adopt(wanted.slice_id, process.pid)
        until(lambda: f"nbgpu-{wanted.slice_id}" in Path(f"/proc/{process.pid}/cgroup").read_text(), 5, "it is in the slice's cgroup")
        return process

    def limit(self, wanted: Slice) -> Any:
        """Return the driver's limits of a slice's cgroup: soft and hard, or what it says where that is gone."""
        env = os.environ | {"LD_LIBRARY_PATH": str(Path(self.agent.env["SIM"])), "NBGPU_SIM_STATE": self.agent.env["NBGPU_SIM_STATE"]}
        process = self.inside(sys.executable, "-c", PROGRAM, env=env)
        found = ask(process, f"limit('/sys/fs/cgroup/nbgpu-{wanted.slice_id}')")
        end(process)
        return found

    def end_all(self) -> None:
        """End all programs."""
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.made:
            end(process)
        self.children, self.made = [], []

    def close(self) -> None:
        """End everything."""
        self.end_all()
        self.agent.close()


def ask(process: subprocess.Popen[str], code: str) -> Any:
    """Return what an expression is in a program."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(code + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"the program ended over {code}"
    return json.loads(line)


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL."""
    process.kill()
    process.communicate()


@contextlib.contextmanager
def place(*arguments: str, version: str = R615) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-test-", dir="/tmp") as name:
        agent = HereAgent(Path(name), "v2")
        agent.env |= {"NBGPU_SIM_DRIVER_VERSION": version}
        made = Place(agent)
        try:
            agent.start(*arguments)
            agent.env["SIM"] = str(next(Path(name).glob("lib*/*/sim"), ""))
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module", params=["limiter", "driver"])
def both(request: pytest.FixtureRequest) -> Iterator[Place]:
    with place("--memory-backend", request.param) as made:
        made.agent.backend = request.param  # type: ignore[attr-defined]
        yield made


def backend(of: Place) -> str:
    return of.agent.backend  # type: ignore[attr-defined]


@contextlib.contextmanager
def filled(of: Place) -> Iterator[tuple[Slice, Launch, subprocess.Popen[str]]]:
    """A slice with a program in it that has a context."""
    wanted, launch = of.slice()
    process = of.enter(wanted, launch)
    try:
        assert ask(process, "start()") == 0
        until(lambda: usage(launch).backend == backend(of), 3, "who holds its memory")
        yield wanted, launch, process
    finally:
        of.end_all()
        until(lambda: not of.agent.slices(), 5, "the end of the slice")


def test_a_slice_is_refused_more_than_its_limit_and_sees_no_more(both: Place) -> None:
    with filled(both) as (wanted, launch, one):
        limit_bytes = wanted.devices[0].memory_bytes
        free, total, by_nvml = ask(one, "info()")
        assert (total, by_nvml) == (limit_bytes, limit_bytes)
        assert ask(one, "alloc(5 * GIB)") == 0
        last = (both.agent.events() or [{"id": -1}])[-1]["id"]
        assert ask(one, "alloc(16 * GIB)") == 2
        told = both.agent.events(last, wait_seconds=2)
        assert [event["kind"] for event in told] == ["refused"]
        assert "this server's slice of 19.5 GiB has 14.2 GiB left" in told[0]["message"]
        two = both.enter(wanted, launch, kernel="kernel-b")
        assert ask(two, "start()") == 0
        assert ask(two, "alloc(14 * GIB)") == 2, "they share the limit"
        assert ask(two, "alloc(13 * GIB)") == 0
        assert 0 < ask(one, "info()")[0] < free
        end(two)


def test_managed_memory_counts(both: Place) -> None:
    with filled(both) as (_, _, one):
        assert ask(one, "managed(15 * GIB)") == 0
        assert ask(one, "managed(5 * GIB)") == 2
        assert ask(one, "alloc(5 * GIB)") == 2


def test_a_kernel_has_its_limit_inside_the_slice(both: Place) -> None:
    with filled(both) as (wanted, _, one):
        both.agent.client.call("PUT", f"/v1/slices/{wanted.slice_id}/kernels/kernel-a", {"memory_bytes": 2 * GIB})
        assert ask(one, "alloc(2 * GIB)") == 2
        assert ask(one, "alloc(GIB)") == 0


def test_a_limit_is_changed_while_its_programs_run(both: Place) -> None:
    with filled(both) as (wanted, _, one):
        assert ask(one, "alloc(10 * GIB)") == 0
        both.agent.client.call("PATCH", f"/v1/slices/{wanted.slice_id}", {"memory_bytes": 5 * GIB})
        assert ask(one, "alloc(100 * MIB)") == 2, "below what it holds: it keeps that, and gets no more"
        both.agent.client.call("PATCH", f"/v1/slices/{wanted.slice_id}", {"memory_bytes": 30 * GIB})
        assert ask(one, "alloc(18 * GIB)") == 0


def evade(of: Place, launch: Launch, wanted: Slice, programs: Path, way: str, size: int) -> int:
    """Return what an allocation gives that no limiter sees: 0 or 2 (out of memory). Its holder lives until the slice's end."""
    shell = of.enter(wanted, launch, preload=False)
    if way == "no-preload":
        assert ask(shell, "start()") == 0
        return int(ask(shell, f"alloc({size})"))
    child = f"__import__('subprocess').Popen(['{programs}/{way}', '{'cuda' if way == 'static' else way}', '{size}'], stdout=-1, text=True)"
    pid = ask(shell, f"globals().update(child={child}) or child.pid")
    said = ask(shell, "child.stdout.readline()")
    of.children.append(pid)
    return 0 if said == "ok\n" else int(said.split()[-1])


@pytest.mark.parametrize("way", ["static", "no-preload", "direct"])
def test_who_evades_the_limiter_is_refused_by_the_driver_and_by_nobody_else(both: Place, programs: Path, way: str) -> None:
    with filled(both) as (wanted, launch, kernel):
        assert ask(kernel, "alloc(10 * GIB)") == 0
        assert evade(both, launch, wanted, programs, way, 5 * GIB) == 0, "inside the slice's limit it is only seen"
        # control: without the driver's limit the same request goes through, and is only told of
        assert evade(both, launch, wanted, programs, way, 10 * GIB) == (2 if backend(both) == "driver" else 0)
        if backend(both) == "limiter":
            until(lambda: [e for e in both.agent.events(kind="over-limit") if e["slice_id"] == wanted.slice_id], 4, "it is told of")
        both.end_all()


def test_who_is_refused_because_another_evades_the_limiter_is_told_of_the_slice(both: Place) -> None:
    with filled(both) as (wanted, launch, kernel):
        other = both.enter(wanted, launch, preload=False)
        assert ask(other, "start() or alloc(12 * GIB)") == 0
        last = both.agent.events()[-1]["id"] if both.agent.events() else -1
        until(lambda: both.agent.events(last, kind="unlimited"), 4, "NVML has been looked at")
        assert ask(kernel, "alloc(10 * GIB)") == (2 if backend(both) == "driver" else 0)
        if backend(both) == "limiter":
            return  # control: it knows nothing of the other
        told = until(lambda: both.agent.events(last, kind="refused"), 3, "the event")
        assert "this server's slice of 19.5 GiB has 6.9 GiB left" in told[0]["message"]
        assert (told[0]["data"]["limit"], told[0]["kernel_id"]) == ("slice", "kernel-a")
        end(other)
        until(lambda: ask(kernel, "alloc(10 * GIB)") == 0, 2, "control: without the other there is room")


def test_the_driver_has_the_limit_while_the_slice_lives(both: Place) -> None:
    with filled(both) as (wanted, _, _):
        limit_bytes = wanted.devices[0].memory_bytes
        assert both.limit(wanted) == ([limit_bytes, limit_bytes] if backend(both) == "driver" else [0, 2**64 - 1])
        assert f'backend="{backend(both)}"' in metrics(both.agent)
        held = f'nbgpu_slice_driver_limited{{hub="hub-1",server="",slice_id="{wanted.slice_id}",user="ada"}}'
        assert f"{held} {1.0 if backend(both) == 'driver' else 0.0}" in metrics(both.agent)
        assert both.agent.slices()[wanted.slice_id]["backend"] == backend(both)
        assert both.agent.node().backend == backend(both)
    assert "Not Found" in str(both.limit(wanted)), "no cgroup is left, and no limit with it"


def test_an_agent_that_was_killed_finds_its_limits_and_leaves_none() -> None:
    with place() as made:
        made.agent.backend = "driver"  # type: ignore[attr-defined]
        with filled(made) as (wanted, launch, one):
            limit_bytes = wanted.devices[0].memory_bytes
            made.agent.kill()
            made.agent.start()
            assert made.limit(wanted) == [limit_bytes, limit_bytes]
            until(lambda: usage(launch).backend == "driver", 3, "the driver holds it again")
            made.agent.kill()
            made.agent.start("--memory-backend", "limiter")
            assert made.limit(wanted) == [0, 2**64 - 1], "what an earlier agent has set is taken away"
            assert usage(launch).backend == "limiter"
            made.agent.backend = "limiter"  # type: ignore[attr-defined]
            made.agent.kill()
            end(one)  # nobody sees its end
            made.agent.start()
        assert "Not Found" in str(made.limit(wanted))


@pytest.mark.parametrize("point", ["limit-noted", "limit-set", "limit-cleared"])
def test_an_agent_that_dies_over_a_limit_leaves_none(point: str) -> None:
    with place() as made:
        made.agent.env["NBGPU_MARK"] = f"{point}:1"
        made.agent.stop()
        made.agent.start()
        wanted, launch = made.slice()
        process = made.program(launch)
        with contextlib.suppress(Unavailable):
            made.agent.adopt(wanted.slice_id, process.pid)
            if point == "limit-cleared":
                until(lambda: made.agent.slices()[wanted.slice_id]["backend"] == "driver", 3, "the driver holds it")
                made.agent.client.call("DELETE", f"/v1/slices/{wanted.slice_id}")
                end(process)
        assert made.agent.process is not None
        assert made.agent.process.wait(10) == -signal.SIGKILL, "it died at the marked point"
        del made.agent.env["NBGPU_MARK"]
        made.agent.start("--memory-backend", "limiter")
        if point == "limit-cleared":
            until(lambda: not made.agent.slices(), 5, "the end of the slice")
        assert made.limit(wanted) == [0, 2**64 - 1] or (point == "limit-cleared" and "Not Found" in str(made.limit(wanted)))
        assert "limited" not in read_record(made, wanted) or read_record(made, wanted)["limited"] is None


def read_record(of: Place, wanted: Slice) -> dict[str, Any]:
    """Return what is written of a slice; nothing where it is gone."""
    try:
        return json.loads((of.agent.runtime / "slices" / wanted.slice_id / "slice.json").read_text())
    except FileNotFoundError:
        return {}


def test_a_slice_without_a_cgroup_is_held_by_the_limiter_and_says_so() -> None:
    with place() as made:
        wanted, launch = made.slice()
        closed = "/sys/fs/cgroup/closed-for-tests"
        made.inside("sh", "-c", f"mkdir {closed} && echo 0 >{closed}/cgroup.max.descendants", env={}).wait(5)
        process = made.program(launch)
        made.inside("sh", "-c", f"echo {process.pid} >{closed}/cgroup.procs", env={}).wait(5)
        try:
            made.agent.adopt(wanted.slice_id, process.pid)
            told = until(lambda: made.agent.events(kind="limiter-only"), 3, "it is told")
            assert "not the driver: it has no cgroup of its own" in told[0]["message"]
            assert ask(process, "start()") == 0
            assert (usage(launch).backend, made.agent.node().backend) == ("limiter", "driver")
            assert ask(process, "alloc(20 * GIB)") == 2, "the limiter holds it"
            assert ask(process, "alloc(19 * GIB)") == 0
            assert len(made.agent.events(kind="limiter-only")) == 1
        finally:
            end(process)
            until(lambda: not made.agent.slices(), 5, "the end of the slice")
            made.inside("rmdir", closed, env={}).wait(5)


def test_an_older_driver_leaves_memory_to_the_limiter() -> None:
    with place(version="13030") as made:
        node = made.agent.node()
        assert (node.backend, "does not limit memory by cgroup" in node.backend_reason) == ("limiter", True)
        assert "memory is held by: limiter (this driver" in made.agent.log.read_text()
        made.agent.stop()
        with pytest.raises(AssertionError, match="--memory-backend driver cannot be"):
            made.agent.start("--memory-backend", "driver")
