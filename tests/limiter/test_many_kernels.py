"""Many Jupyter kernels on one device: no cell fails, nothing is refused, and no process grows.

``-m soak``: 32 kernels for ten minutes; otherwise eight for some seconds. Real ipykernels, the limiter, turns, the simulated driver.
"""

from __future__ import annotations

import mmap
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

from compute import LIB, Machine, Share, SliceFiles  # noqa: E402
from limiter_kit import PRELUDE  # noqa: E402

from nbgpu_agent import layout  # noqa: E402

pytestmark = pytest.mark.slow
MIB = 1 << 20
SLICES = 4
GROWTH_MIB = 1.0  # of one process, between a third of the time and its end: what an interpreter's heap may move by
SETUP = (
    PRELUDE
    + """
start()
module, function, ns = c.c_void_p(), c.c_void_p(), c.c_uint64(2_000_000)
ok(cuda.cuModuleLoadData(c.byref(module), b".visible .entry work_arg_ns(.param .u64 ns)\\n"))
ok(cuda.cuModuleGetFunction(c.byref(function), module, b"work_arg_ns"))
parameters, kept = (c.c_void_p * 1)(c.addressof(ns)), []
def step(launches):
    code, pointer = alloc(8 * MIB); ok(code)
    ok(cuda.cuMemsetD8Async(c.c_uint64(pointer), 0, c.c_size_t(8 * MIB), None))
    for _ in range(launches): ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, parameters, None))
    ok(cuda.cuCtxSynchronize()); ok(free(pointer))
"""
)
STEP, LEAK = "step(10)", "step(10); kept.append(bytearray(os.urandom(1 << 20)))"


def resident_mib(pid: int) -> float:
    """Return the memory that a process alone has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024


class Kernel(threading.Thread):
    """A Jupyter kernel and whoever types into it."""

    def __init__(self, env: dict[str, str], cell: str, number: int, sockets: Path) -> None:
        super().__init__(daemon=True)
        self.cell, self.dice, self.cells = cell, random.Random(number), 0
        self.failed: list[Any] = []
        self.stop = threading.Event()
        self.manager = manager.KernelManager(kernel_name="python3", transport="ipc", ip=str(sockets / f"k{number}"))  # ports may be taken
        self.manager.start_kernel(env=env | {"NBGPU_KERNEL_ID": f"kernel-{number}"})
        self.client = self.manager.blocking_client()
        self.client.start_channels()

    @property
    def pid(self) -> int:
        """Its process."""
        return int(self.manager.provisioner.pid)

    def type(self, code: str) -> None:
        """Run a cell, and note what goes wrong."""
        reply = self.client.execute(code, reply=True, timeout=120)["content"]
        if reply["status"] != "ok":
            self.failed.append((reply.get("ename"), reply.get("evalue")))
        self.cells += 1

    def run(self) -> None:
        self.client.wait_for_ready(timeout=120)
        self.type(SETUP)
        while not self.stop.is_set():
            self.type(self.cell)
            self.stop.wait(self.dice.uniform(0, 0.2))

    def end(self) -> None:
        """Shut it down."""
        self.stop.set()
        self.join(120)
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


class Room:
    """Slices on the machine with kernels in them."""

    def __init__(self, machine: Machine, folder: Path, kernels: int, cell: str, mem_limit: int) -> None:
        self.sockets = tempfile.TemporaryDirectory(prefix="nbgpu-", dir="/tmp")  # names of sockets are short
        self.uses: list[layout.Use] = []
        self.kernels: list[Kernel] = []
        files = [self._slice(folder / str(i), machine, mem_limit) for i in range(min(SLICES, kernels))]
        command = [sys.executable, str(ROOT / "tests" / "limiter" / "sched_process.py"), *(str(one.folder) for one in files)]
        self.scheduler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.scheduler.stdout
        assert self.scheduler.stdout.readline() == "ready\n"
        for number in range(kernels):
            env = machine.env | {"LD_PRELOAD": str(LIB / "libnbgpu.so"), "NBGPU_SLICE_DIR": str(files[number % len(files)].folder)}
            self.kernels.append(Kernel(env, cell, number, Path(self.sockets.name)))
        self.plain = Kernel(machine.env, STEP, kernels, Path(self.sockets.name))
        """What a kernel without the limiter grows by: IPython keeps each cell."""
        for kernel in [*self.kernels, self.plain]:
            kernel.start()

    def _slice(self, folder: Path, machine: Machine, mem_limit: int) -> SliceFiles:
        share = Share(1000 // SLICES)
        made = SliceFiles(folder, share, machine.uuid())
        for name, kind in (("ctl", layout.Ctl), ("use", layout.Use)):
            with (folder / name).open("r+b") as file:
                words: Any = kind.from_buffer(mmap.mmap(file.fileno(), 0))
            if isinstance(words, layout.Ctl):
                words.device[0].context_bytes, words.device[0].mem_limit = 64 * MIB, mem_limit
            else:
                self.uses.append(words)
        return made

    def refusals(self) -> int:
        """Return allocations that were refused, to anybody."""
        return sum(slot.refusals for use in self.uses for slot in use.slot)

    def grown_mib(self, seconds: float) -> tuple[list[float], float]:
        """Let them work; return by how much each process has grown over the last two thirds of the time, and the plain kernel."""
        deadline = time.monotonic() + 240
        while any(kernel.cells < 3 for kernel in self.kernels):
            assert time.monotonic() < deadline, "kernels do not start"
            time.sleep(0.05)
        time.sleep(seconds / 3)
        pids = [*(kernel.pid for kernel in self.kernels), self.scheduler.pid, self.plain.pid]
        before = [resident_mib(pid) for pid in pids]
        time.sleep(seconds * 2 / 3)
        *grown, plain = [resident_mib(pid) - was for pid, was in zip(pids, before, strict=True)]
        return grown, plain

    def close(self) -> None:
        """End everything."""
        for kernel in [*self.kernels, self.plain]:
            kernel.stop.set()
        for kernel in [*self.kernels, self.plain]:
            kernel.end()
        self.sockets.cleanup()
        self.scheduler.kill()
        self.scheduler.communicate(timeout=20)


@contextmanager
def room(machine: Machine, folder: Path, kernels: int, cell: str = STEP, mem_limit: int = 8 << 30) -> Iterator[Room]:
    made = Room(machine, folder, kernels, cell, mem_limit)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(("kernels", "seconds"), [(8, 9), pytest.param(32, 600, marks=pytest.mark.soak)])
@pytest.mark.timeout(1200)
def test_no_cell_fails_and_no_process_grows(
    compute_machine: Machine, tmp_path: Path, kernels: int, seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with room(compute_machine, tmp_path, kernels) as made:
        grown, plain = made.grown_mib(seconds)
        cells, failed = sum(kernel.cells for kernel in made.kernels), [what for kernel in made.kernels for what in kernel.failed]
        refused = made.refusals()
    with capsys.disabled():
        print(f"\n{kernels} kernels, {seconds} s: {cells} cells, {len(failed)} failed, {refused} refused")
        print(f"grown by {max(grown):.1f} MiB, without the limiter {plain:.1f}")
    assert cells > 3 * kernels
    assert not failed
    assert refused == 0
    assert max(grown) < max(plain, 0) + GROWTH_MIB


def test_control_a_leak_and_a_slice_that_is_too_small_are_seen(compute_machine: Machine, tmp_path: Path) -> None:
    with room(compute_machine, tmp_path, 1, LEAK) as made:
        grown, plain = made.grown_mib(4)
        assert max(grown[:-1]) > max(plain, 0) + GROWTH_MIB
    (tmp_path / "small").mkdir()
    with room(compute_machine, tmp_path / "small", 1, mem_limit=66 * MIB) as made:
        made.grown_mib(0.1)
        assert made.refusals() > 0
        assert made.kernels[0].failed
