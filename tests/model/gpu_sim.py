"""`gpu_sim.c` from Python: build it with the policy (or with a policy that has a fault), play loads, read what came of it."""

from __future__ import annotations

import ctypes as c
import subprocess
from dataclasses import dataclass
from pathlib import Path

from native_build import build_module

HERE = Path(__file__).resolve().parent
AGENTLIB = HERE.parents[1] / "nodeagent" / "agentlib"
MS = 1_000_000
WAITS = 4096
HONEST, ALWAYS_BUSY, NEVER_BUSY, LATE, RUNS_ON = range(5)
POLICY = ("sched_policy.c", "sched_charge.c")
SOURCES = ("gpu_sim.c", "gpu_histories.c")


class _Driver(c.Structure):
    _fields_ = [
        *[(name, c.c_uint64) for name in ("slice_ns", "switch_ns", "jitter_ns", "notice_ns", "late_ns", "seed")],
        ("limited", c.c_int32),
        ("rings", c.c_int32),
    ]


class _Load(c.Structure):
    _fields_ = [
        *[(name, c.c_uint32) for name in ("milli", "strict", "processes", "late_us")],
        *[(name, c.c_uint64) for name in ("kernel_ns", "work_ns", "gap_ns", "liar")],
    ]


@dataclass(frozen=True)
class Gpu:
    """The driver and the hosts: its time slice, what a switch costs, how long a host takes for a submission at most.

    With `rings` slices stop by themselves at their turns' ends and ring, up to `late_ms` late; without, the scheduler sees all at once.
    """

    slice_ms: float = 2.0
    switch_ms: float = 0.1
    jitter_ms: float = 0.0
    notice_ms: float = 0.05
    seed: int = 1
    rings: bool = False
    late_ms: float = 0.0


@dataclass(frozen=True)
class Work:
    """What one slice does: GPU kernels of `kernel_ms` without end, or `work_ms` of them, a pause of `gap_ms`, and so on.

    Up to `late_ms` later than the others it stops at its turn's end, and rings.
    """

    milli: int
    kernel_ms: float = 1.0
    strict: bool = False
    processes: int = 1
    work_ms: float = 0.0
    gap_ms: float = 0.0
    liar: int = HONEST
    late_ms: float = 0.0


def build(folder: Path, faults: dict[str, str] | None = None) -> c.CDLL:
    """Compile the policy with the simulation; `faults` replaces pieces of the policy's source, each found exactly once."""
    policy = {name: (AGENTLIB / name).read_text() for name in POLICY}
    for good, bad in (faults or {}).items():
        found = [name for name in POLICY if good in policy[name]]
        assert [policy[name].count(good) for name in found] == [1], f"the policy no longer has exactly one: {good}"
        policy[found[0]] = policy[found[0]].replace(good, bad)
    for name, text in policy.items():
        (folder / name).write_text(text)
    out = folder / "libgpusim.so"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", f"-I{AGENTLIB}", f"-I{HERE}"]
    files = [*(folder / name for name in POLICY), *(HERE / name for name in SOURCES if (HERE / name).exists())]
    subprocess.run([*build_module().find_compiler(None), *flags, *map(str, files), "-o", str(out)], check=True, timeout=120)
    lib = c.CDLL(str(out))
    lib.sim_new.restype = c.c_void_p
    lib.sim_new.argtypes = [c.POINTER(_Driver), c.c_void_p]
    lib.sim_free.argtypes = [c.c_void_p]
    lib.sim_add.argtypes = [c.c_void_p, c.POINTER(_Load)]
    lib.sim_run.argtypes = [c.c_void_p, c.c_uint64]
    lib.sim_busy.restype = c.c_uint64
    lib.sim_busy.argtypes = [c.c_void_p, c.c_int]
    lib.sim_held.restype = c.c_uint64
    lib.sim_held.argtypes = [c.c_void_p, c.c_int]
    lib.sim_owe.argtypes = [c.c_void_p, c.c_int, c.c_uint64]
    for name in ("sim_now", "sim_steps", "sim_wakes", "sim_turns", "sim_period", "sim_mark"):
        getattr(lib, name).restype = c.c_uint64
        getattr(lib, name).argtypes = [c.c_void_p]
    for name in ("sim_waits", "sim_visits"):
        getattr(lib, name).restype = c.c_uint32
        getattr(lib, name).argtypes = [c.c_void_p, c.c_int, c.POINTER(c.c_uint64)]
    return lib


class Sim:
    """One device with slices in virtual time; `limited` False: the driver alone."""

    def __init__(self, lib: c.CDLL, gpu: Gpu, works: list[Work], limited: bool = True) -> None:
        self.lib = lib
        times_ms = (gpu.slice_ms, gpu.switch_ms, gpu.jitter_ms, gpu.notice_ms, gpu.late_ms)
        driver = _Driver(*(int(x * MS) for x in times_ms), gpu.seed, limited, gpu.rings)
        self._sim = lib.sim_new(c.byref(driver), None)
        self.slices = [lib.sim_add(self._sim, c.byref(self._load(work))) for work in works]

    @staticmethod
    def _load(work: Work) -> _Load:
        times_ns = (int(ms * MS) for ms in (work.kernel_ms, work.work_ms, work.gap_ms))
        return _Load(work.milli, work.strict, work.processes, int(work.late_ms * 1000), *times_ns, work.liar)

    def __enter__(self) -> Sim:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.sim_free(self._sim)

    def run(self, seconds: float) -> list[float]:
        """Advance; return each slice's part of the time in percent."""
        before = [self.lib.sim_busy(self._sim, i) for i in self.slices]
        self.lib.sim_run(self._sim, int(seconds * 1e9))
        return [(self.lib.sim_busy(self._sim, i) - b) / seconds / 1e7 for i, b in zip(self.slices, before, strict=True)]

    def busy_ns(self, i: int) -> int:
        """Return how long a slice has computed so far, ns."""
        return self.lib.sim_busy(self._sim, self.slices[i])

    def held_ns(self, i: int) -> int:
        """Return the time that a slice could compute in so far, as the policy knows it."""
        return self.lib.sim_held(self._sim, self.slices[i])

    def owe(self, i: int, ns: int) -> None:
        """Let a slice pay for what it computed beyond that."""
        self.lib.sim_owe(self._sim, self.slices[i], ns)

    def mark(self) -> None:
        """Forget the waits and visits so far."""
        self.lib.sim_mark(self._sim)

    def waits_ms(self, i: int) -> list[float]:
        """Return how long each submission that had to wait for the gate, or could have, waited there."""
        out = (c.c_uint64 * WAITS)()
        return [x / MS for x in out[: self.lib.sim_waits(self._sim, self.slices[i], out)]]

    def visits_ms(self, i: int) -> list[float]:
        """Return how long each visit took, from its first submission until its work was done."""
        out = (c.c_uint64 * WAITS)()
        return [x / MS for x in out[: self.lib.sim_visits(self._sim, self.slices[i], out)]]

    @property
    def period_ms(self) -> float:
        """The policy's period now."""
        return self.lib.sim_period(self._sim) / MS

    @property
    def steps(self) -> int:
        """Decisions of the policy so far."""
        return self.lib.sim_steps(self._sim)

    @property
    def wakes(self) -> int:
        """Times so far that the scheduler woke; only with `rings`."""
        return self.lib.sim_wakes(self._sim)

    @property
    def turns(self) -> int:
        """Turns of all slices so far."""
        return self.lib.sim_turns(self._sim)
