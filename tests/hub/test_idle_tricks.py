"""A tenant uses the parking of idle slices to take host memory, or GPU memory that is another's by then (docs/idle.md)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_harness import ROOT, AgentProcess, missing_libraries, until
from idle_kit import held_bytes, idle_agent, open_notebook, parked, refusal, smi_used_mib

from nbgpu.models import Launch
from nbgpu.quantities import MIB
from nbgpu_agent import layout

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
GREEDY_MIB = 8192
GREEDY = f"""
import ctypes, fcntl, mmap, os, sys, time
from nbgpu_agent import layout
from sim_client import Cuda
cuda = Cuda()
cuda.alloc(1 << 20)
use, ctl = (os.open(sys.argv[1] + name, mode) for name, mode in (("/use", os.O_RDWR), ("/ctl", os.O_RDONLY)))
started = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
slot = layout.UseSlot(owner=os.getpid() << 32 | 1, start_time=started, ready=1, kernel_id=b"kernel-a", used=1 << 20)
at = layout.Use.slot.offset + 3 * ctypes.sizeof(slot)
fcntl.lockf(use, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
os.pwrite(use, bytes(slot), at)
os.pwrite(use, (4).to_bytes(4, "little"), layout.Use.high_water.offset)
words = layout.Ctl.from_buffer_copy
limits = mmap.mmap(ctl, layout.CTL_SIZE, prot=mmap.PROT_READ)
print("ready", flush=True)
while words(limits).device[0].gate != layout.GATE_SUSPENDED:
    time.sleep(0.0005)
cuda.alloc({GREEDY_MIB} << 20)
print("took it", flush=True)
time.sleep(60)
"""
RESTORE = """
import ctypes, sys
cuda, pid = ctypes.CDLL("libcuda.so.1"), int(sys.argv[1])
cuda.cuInit(0)
assert cuda.cuCheckpointProcessRestore(pid, (ctypes.c_uint64 * 16)()) == 0
assert cuda.cuCheckpointProcessUnlock(pid, (ctypes.c_uint64 * 16)()) == 0
"""


def unlimited(launch: Launch) -> dict[str, str]:
    """Return the environment of a program past the limiter."""
    env = os.environ | launch.env | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "nodeagent", ROOT / "tests/limiter")))}
    return {name: value for name, value in env.items() if name not in ("LD_PRELOAD", "NBGPU_SLICE_DIR")}


@contextmanager
def greedy(agent: AgentProcess, launch: Launch, slice_id: str) -> Iterator[subprocess.Popen[str]]:
    """A program past the limiter that says otherwise, and takes much more once its slice's gate is closed to be parked."""
    with subprocess.Popen(
        [sys.executable, "-c", GREEDY, launch.slice_dir], env=unlimited(launch), stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        agent.adopt(slice_id, one.pid)
        yield one
        one.kill()


def test_what_is_taken_after_the_look_is_not_moved_to_the_host(runtime: Path) -> None:
    agent = AgentProcess(runtime).start("--idle-host-memory", "1 GiB")
    notebook, wanted = open_notebook(agent, 900)
    launch = agent.put(wanted)
    with greedy(agent, launch, wanted.slice_id) as one:
        until(lambda: agent.slices()[wanted.slice_id]["process_count"] == 2, 10, "the agent knows it")
        notebook.tell()
        until(lambda: refusal(agent, wanted.slice_id) is None, 10, "it is idle, and small enough")
        assert one.stdout is not None
        assert one.stdout.readline() == "took it\n"
        until(lambda: notebook.state() == "held", 20, "it is left as it was")
        assert smi_used_mib(launch) > GREEDY_MIB
    assert not agent.events(kind="parked")
    notebook.close()
    agent.close()


def test_nobody_uses_up_the_hosts_room_by_words(runtime: Path) -> None:
    agent = AgentProcess(runtime).start("--idle-host-memory", "4 GiB")
    liar, one = open_notebook(agent, 100)
    other, two = open_notebook(agent, 100, user="grace")
    with open(Path(agent.put(one).slice_dir) / "use", "r+b", buffering=0) as use:
        use.seek(layout.Use.slot.offset + layout.UseSlot.used.offset)
        use.write(bytes(ctypes.c_uint64(3500 * MIB)))
    parked(agent, liar, one.slice_id)
    parked(agent, other, two.slice_id)
    for notebook in (liar, other):
        notebook.close()
    agent.close()


@pytest.mark.parametrize("watchdog", ["kill", "event"])
def test_who_restores_itself_does_not_keep_what_is_anothers_by_now(runtime: Path, watchdog: str) -> None:
    agent = idle_agent(AgentProcess(runtime), "--watchdog", watchdog)
    notebook, wanted = open_notebook(agent, 500, mib=4096)
    launch = agent.put(wanted)
    time.sleep(2.5)  # the watchdog has seen it hold that memory in its own right
    parked(agent, notebook, wanted.slice_id)
    assert held_bytes(agent, wanted.slice_id) == 0
    subprocess.run([sys.executable, "-S", "-c", RESTORE, str(notebook.pid)], env=unlimited(launch), check=True, timeout=20)
    assert smi_used_mib(launch) > 4096
    until(lambda: agent.events(kind="over-limit"), 6, "it is told of")
    if watchdog == "kill":
        assert notebook.process.wait(8) == -9
    else:
        time.sleep(2)
        assert notebook.process.poll() is None, "control"
    notebook.close()
    agent.close()
