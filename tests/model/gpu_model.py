"""A GPU, its driver's round robin and slices' processes in virtual time: what the scheduling policy is played against.

Time goes in ticks of 0.1 ms. The driver runs one process at a time, in turns of 2 ms, and loses 0.1 ms at each change. A process behaves
as the limiter makes it: at most 2 ms and two GPU kernels outstanding, nothing new while its gate is closed.
"""

from __future__ import annotations

import ctypes as c
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from native_build import build_module

ROOT = Path(__file__).parents[2]
TICK_NS = 100_000
MS = 1_000_000
NEVER = 2**64 - 1
GATE_OPEN = 1


def build_policy(folder: Path) -> c.CDLL:
    """Compile the policy with its harness into `folder` and load it."""
    compiler = build_module().find_compiler(None)
    out = folder / "libpolicy.so"
    agentlib = ROOT / "nodeagent" / "agentlib"
    sources = [agentlib / "sched_policy.c", agentlib / "sched_charge.c", Path(__file__).parent / "sched_harness.c"]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{agentlib}"]
    subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(out)], check=True, timeout=120)
    lib = c.CDLL(str(out))
    lib.harness_new.restype = c.c_void_p
    lib.harness_new.argtypes = [c.c_uint64]
    lib.harness_free.argtypes = [c.c_void_p]
    lib.harness_join.argtypes = [c.c_void_p, c.c_uint32, c.c_int, c.c_uint64]
    lib.harness_leave.argtypes = [c.c_void_p, c.c_int, c.c_uint64]
    lib.harness_set.argtypes = [c.c_void_p, c.c_int, c.c_uint32, c.c_int, c.c_uint64]
    lib.harness_suspend.argtypes = [c.c_void_p, c.c_int, c.c_int, c.c_uint64]
    lib.harness_observe.argtypes = [c.c_void_p, c.c_int, c.c_int, c.c_int, c.c_int, c.c_uint32, c.c_uint64]
    lib.harness_pull.argtypes = lib.harness_close.argtypes = [c.c_void_p, c.c_int, c.c_uint64]
    lib.harness_ahead.restype = c.c_uint64
    lib.harness_ahead.argtypes = [c.c_void_p, c.c_int]
    lib.harness_bring.argtypes = [c.c_void_p, c.c_int, c.c_uint64, c.c_uint64]
    lib.harness_step.restype = c.c_uint64
    lib.harness_step.argtypes = [c.c_void_p, c.c_uint64]
    for name in ("turn_end", "charged", "overruns"):
        getattr(lib, f"harness_{name}").restype = c.c_uint64
        getattr(lib, f"harness_{name}").argtypes = [c.c_void_p, c.c_int]
    lib.harness_gate.restype = c.c_uint32
    lib.harness_gate.argtypes = [c.c_void_p, c.c_int]
    return lib


@dataclass
class Load:
    """What one slice does: GPU kernels of `kernel_ms` from `processes` processes, without end or with a pause of `gap_ms` after each."""

    milli: int
    kernel_ms: float = 1.0
    strict: bool = False
    processes: int = 1
    gap_ms: float | None = None
    reports: bool = True  # False: says neither near nor idle, as a hostile or a dead one does


@dataclass
class Process:
    """One process: what it has outstanding on the GPU."""

    load: Load
    queue: list[int] = field(default_factory=list)
    idle_until: int = 0
    busy_ns: int = 0
    alive: bool = True

    def want(self, now: int) -> bool:
        """Whether it would submit now."""
        if not self.alive:
            return False
        if self.load.gap_ms is not None:
            return not self.queue and now >= self.idle_until
        return len(self.queue) < 2 or sum(self.queue) < 2 * MS

    def submit(self) -> None:
        """Put one GPU kernel into the queue."""
        self.queue.append(int(self.load.kernel_ms * MS))

    def run(self, ns: int, now: int) -> None:
        """Let the GPU work on it."""
        self.busy_ns += ns
        while self.queue and ns >= self.queue[0]:
            ns -= self.queue.pop(0)
        if self.queue:
            self.queue[0] -= ns
        elif self.load.gap_ms is not None:
            self.idle_until = now + int(self.load.gap_ms * MS)


class Model:
    """One device with slices; `lib` None leaves every gate open, which is the driver alone."""

    def __init__(self, lib: c.CDLL | None, loads: list[Load]) -> None:
        self.lib = lib
        self.now = 10**12
        self.loads = loads
        self.slices = [[Process(load) for _ in range(load.processes)] for load in loads]
        self.device = lib.harness_new(self.now) if lib else None
        self.wake_at = 0
        self.seen: list[tuple[bool, bool, bool] | None] = [None] * len(loads)
        self.edges = [0] * len(loads)
        self.ids = [lib.harness_join(self.device, x.milli, x.strict, self.now) for x in loads] if lib else []
        self.running: Process | None = None
        self.turn_left = 0
        self.switch_left = 0
        self.busy_ns = 0

    def close(self) -> None:
        """Free the policy's state."""
        if self.lib:
            self.lib.harness_free(self.device)
            self.device = None

    def is_open(self, i: int) -> bool:
        """Whether the slice may submit."""
        return self.lib is None or self.lib.harness_gate(self.device, self.ids[i]) == GATE_OPEN

    def words(self, i: int) -> tuple[bool, bool, bool]:
        """`want`, `busy`, `near` as the slice's processes write them."""
        closed = not self.is_open(i)
        want = closed and any(p.want(self.now) for p in self.slices[i])
        left = sum(sum(p.queue) for p in self.slices[i])
        busy = left > 0 or not self.loads[i].reports
        near = closed and left < MS // 2 and self.loads[i].reports
        return want, busy, near

    def decide(self) -> None:
        """Tell the policy what changed and let it decide, until nothing changes."""
        if self.lib is None:
            return
        due = self.now >= self.wake_at
        for _ in range(8):
            for i in range(len(self.slices)):
                words = self.words(i)
                if words != self.seen[i]:
                    self.seen[i] = words
                    self.edges[i] += 1
                    self.lib.harness_observe(self.device, self.ids[i], *words, self.edges[i], self.now)
                    due = True
            if not due:
                return
            self.wake_at = self.lib.harness_step(self.device, self.now)
            due = False
            self.submit()

    def submit(self) -> None:
        """Let every process with an open gate submit."""
        for i, processes in enumerate(self.slices):
            if self.is_open(i):
                for process in processes:
                    while process.want(self.now):
                        process.submit()

    def run_gpu(self) -> None:
        """One tick of the driver's round robin."""
        ready = [p for s in self.slices for p in s if p.queue]
        if not ready:
            self.running = None
            return
        if self.running not in ready or self.turn_left <= 0:
            order = [p for s in self.slices for p in s]
            start = order.index(self.running) + 1 if self.running in order else 0
            following = next(p for p in order[start:] + order[:start] if p.queue)
            self.switch_left = 1 if following is not self.running and self.running is not None else 0
            self.running = following
            self.turn_left = 2 * MS
        if self.switch_left:
            self.switch_left -= 1
            return
        assert self.running is not None
        self.running.run(TICK_NS, self.now)
        self.turn_left -= TICK_NS
        self.busy_ns += TICK_NS

    def tick(self) -> None:
        """Advance by 0.1 ms."""
        self.decide()
        self.submit()
        self.run_gpu()
        self.now += TICK_NS

    def run(self, seconds: float) -> list[float]:
        """Advance; return each slice's part of the time, in percent."""
        before = [sum(p.busy_ns for p in s) for s in self.slices]
        busy, ticks = self.busy_ns, int(seconds * 1e9 / TICK_NS)
        for _ in range(ticks):
            self.tick()
        self.busy_percent = (self.busy_ns - busy) / (ticks * TICK_NS) * 100
        return [(sum(p.busy_ns for p in s) - b) / (ticks * TICK_NS) * 100 for s, b in zip(self.slices, before, strict=True)]
