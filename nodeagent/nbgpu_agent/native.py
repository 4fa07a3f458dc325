"""`libnbgpu_agent.so` by ctypes: the GPU-time scheduler and the reader of tenants' `use` files.

The contract is in ``nodeagent/agentlib/nbgpu_agent.h``. Calls release the GIL; the scheduler's thread never takes it.
"""

from __future__ import annotations

import ctypes as c
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import layout

ABI = 6
LOCKED_ELSEWHERE = 0x7FFFFFFF
JUNK_DEVICE, JUNK_KERNEL_ID, JUNK_MEMORY, JUNK_COMPUTE, JUNK_OWNER = 1, 2, 4, 8, 16


class SchedConfig(c.Structure):
    """Constants of the scheduling policy in ns; 0 = default."""

    _fields_ = [
        ("min_turn_ns", c.c_uint64),
        ("period_ns", c.c_uint64),
        ("period_per_slice_ns", c.c_uint64),
        ("lag_ns", c.c_uint64),
        ("idle_grace_ns", c.c_uint64),
        ("overlap_behind_ns", c.c_uint64),
        ("overlap_ns", c.c_uint64),
        ("heartbeat_ns", c.c_uint64),
        ("handover_ns", c.c_uint64),
        ("whole_ns", c.c_uint64),
    ]


class _SchedStats(c.Structure):
    _fields_ = [
        ("charged_ns", c.c_uint64),
        ("turns", c.c_uint64),
        ("overruns", c.c_uint64),
        ("junk", c.c_uint64),
        ("gate", c.c_uint32),
        ("active", c.c_uint32),
        ("held_ns", c.c_uint64),
        ("ahead_ns", c.c_uint64),
    ]


class _SchedTotals(c.Structure):
    _fields_ = [
        ("wakeups", c.c_uint64),
        ("bells", c.c_uint64),
        ("looks", c.c_uint64),
        ("cpu_ns", c.c_uint64),
        ("entries", c.c_uint32),
        ("polling", c.c_uint32),
    ]


class _UseHead(c.Structure):
    _fields_ = [("high_water", c.c_uint32), ("events", c.c_uint32), ("bell", c.c_uint32), ("reserved", c.c_uint32)]


_ROW = struct.Struct(f"<4I2Q{layout.KERNEL_ID_BYTES}s7Q4I6Q")
"""NbgpuUseRow, in the order of `UseRow`."""


class SchedStats(NamedTuple):
    """What the scheduler did for one (slice, device)."""

    charged_ns: int
    turns: int
    overruns: int
    junk: int
    gate: int
    active: bool
    held_ns: int
    """Time that it could compute in."""
    ahead_ns: int
    """Device time that it took beyond its share and has not yet waited for."""


@dataclass(frozen=True)
class SchedTotals:
    """What the scheduler's thread costs: times that it woke, of these because a slice rang, and times that it read a slice's slots."""

    wakeups: int
    bells: int
    looks: int
    cpu_ns: int
    entries: int
    polling: bool


@dataclass(frozen=True)
class UseHead:
    """Head of a `use` file, checked."""

    high_water: int
    events: int
    bell: int


class UseRow(NamedTuple):
    """One slot in use, every number in its range; `junk` (JUNK_*) says which ones were not and are 0 here. Sizes in bytes."""

    slot: int
    junk: int
    pid: int
    device: int
    owner: int
    start_time: int
    kernel_id: str
    used: int
    context: int
    peak: int
    allocs: int
    frees: int
    refusals: int
    refused_bytes: int
    refused_by: int
    want: int
    near: int
    wants_back: int
    busy_since: int
    busy_ns: int
    launches: int
    last_launch_ns: int
    stall_ns: int
    copied_bytes: int


def library_path() -> Path:
    """Return where the built library is (`nodeagent/build.py` puts it there)."""
    return Path(__file__).parent / "_lib" / "libnbgpu_agent.so"


def _load(path: Path) -> c.CDLL:
    lib = c.CDLL(str(path))
    lib.nbgpu_agent_abi.restype = c.c_uint32
    lib.nbgpu_agent_abi.argtypes = []
    if lib.nbgpu_agent_abi() != ABI:
        raise OSError(f"{path} has ABI {lib.nbgpu_agent_abi()}, this agent needs {ABI}: build it again")
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "nbgpu_sched_open": (c.c_void_p, [c.c_void_p]),
        "nbgpu_sched_add": (c.c_int, [c.c_void_p, c.c_int, c.c_int, c.c_uint32, c.c_uint32, c.c_uint32, c.c_uint32]),
        "nbgpu_sched_set": (c.c_int, [c.c_void_p, c.c_int, c.c_uint32, c.c_uint32]),
        "nbgpu_sched_kernels": (c.c_int, [c.c_void_p, c.c_int]),
        "nbgpu_sched_suspend": (c.c_int, [c.c_void_p, c.c_int, c.c_int]),
        "nbgpu_sched_owe": (c.c_int, [c.c_void_p, c.c_int, c.c_uint64]),
        "nbgpu_sched_bring": (c.c_int, [c.c_void_p, c.c_int, c.c_uint64]),
        "nbgpu_sched_remove": (c.c_int, [c.c_void_p, c.c_int]),
        "nbgpu_sched_stats": (c.c_int, [c.c_void_p, c.c_int, c.c_void_p]),
        "nbgpu_sched_totals": (c.c_int, [c.c_void_p, c.c_void_p]),
        "nbgpu_use_head": (c.c_int, [c.c_int, c.c_void_p]),
        "nbgpu_use_read": (c.c_int, [c.c_int, c.c_void_p, c.c_int]),
        "nbgpu_use_events": (None, [c.c_void_p, c.c_int, c.c_void_p]),
        "nbgpu_use_locked": (c.c_int, [c.c_int, c.c_uint32]),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    lib.nbgpu_sched_close.restype = None
    lib.nbgpu_sched_close.argtypes = [c.c_void_p]
    return lib


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Native:
    """The library, loaded."""

    def __init__(self, path: Path | None = None) -> None:
        self._lib = _load(path or library_path())
        self._rows = c.create_string_buffer(_ROW.size * layout.SLOTS)
        self._lock = threading.Lock()

    def use_head(self, fd: int) -> UseHead:
        """Return the head of a `use` file; OSError EBADMSG when it is none."""
        out = _UseHead()
        _check(self._lib.nbgpu_use_head(fd, c.byref(out)), "use file")
        return UseHead(out.high_water, out.events, out.bell)

    def use_read(self, fd: int) -> list[UseRow]:
        """Return the slots in use, in order; OSError EBADMSG when the file is none."""
        # A new buffer costs more than the call: one is kept, and used by one thread at a time.
        with self._lock:
            count = _check(self._lib.nbgpu_use_read(fd, self._rows, layout.SLOTS), "use file")
            found = [_ROW.unpack_from(self._rows, i * _ROW.size) for i in range(count)]
        return [UseRow._make((*row[:6], row[6].rstrip(b"\0").decode("ascii"), *row[7:])) for row in found]

    def use_events(self, fds: Sequence[int]) -> list[int]:
        """Return of each file the word that rises with each refusal; 0 where it cannot be read."""
        words = (c.c_uint32 * len(fds))()
        self._lib.nbgpu_use_events((c.c_int * len(fds))(*fds), len(fds), words)
        return list(words)

    def use_locked(self, fd: int, slot: int) -> int:
        """Return the pid that holds the slot's lock, 0 for nobody, LOCKED_ELSEWHERE for one with no pid here."""
        return _check(self._lib.nbgpu_use_locked(fd, slot), "use file")

    def scheduler(self, config: SchedConfig | None = None) -> Scheduler:
        """Start a scheduler thread."""
        return Scheduler(self._lib, config)


class Scheduler:
    """The GPU-time scheduler: one thread for all slices and devices of the node. Close it, or use it in a ``with``."""

    def __init__(self, lib: c.CDLL, config: SchedConfig | None = None) -> None:
        self._lib = lib
        c.set_errno(0)
        self._handle: int | None = lib.nbgpu_sched_open(c.byref(config) if config is not None else None)
        if not self._handle:
            raise OSError("the GPU-time scheduler could not start its thread")

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread. Processes fall back at once (limiter.md, scheduler dead). Idempotent."""
        if self._handle:
            self._lib.nbgpu_sched_close(self._handle)
            self._handle = None

    def add(self, ctl_fd: int, use_fd: int, device: int, physical: int, compute_milli: int, mode: int) -> int:
        """Schedule a slice on its `device` (index in ctl), which is GPU `physical`; return the entry's id. Descriptors are duplicated."""
        return _check(self._lib.nbgpu_sched_add(self._handle, ctl_fd, use_fd, device, physical, compute_milli, mode), "scheduler add")

    def set(self, entry: int, compute_milli: int, mode: int) -> None:
        """Give an entry another share or mode."""
        _check(self._lib.nbgpu_sched_set(self._handle, entry, compute_milli, mode), "scheduler set")

    def kernels(self, entry: int) -> None:
        """Take over the kernels' limits of compute that were written into an entry's ctl."""
        _check(self._lib.nbgpu_sched_kernels(self._handle, entry), "scheduler kernels")

    def suspend(self, entry: int, suspended: bool) -> None:
        """Close an entry's gate until it is resumed."""
        _check(self._lib.nbgpu_sched_suspend(self._handle, entry, int(suspended)), "scheduler suspend")

    def owe(self, entry: int, ns: int) -> None:
        """Let an entry pay for time that it computed beyond what it said."""
        _check(self._lib.nbgpu_sched_owe(self._handle, entry, ns), "scheduler owe")

    def bring(self, entry: int, ns: int) -> None:
        """Let an entry wait for what its user took beyond a share before."""
        _check(self._lib.nbgpu_sched_bring(self._handle, entry, ns), "scheduler bring")

    def remove(self, entry: int) -> None:
        """Forget an entry."""
        _check(self._lib.nbgpu_sched_remove(self._handle, entry), "scheduler remove")

    def stats(self, entry: int) -> SchedStats:
        """Return what was done for an entry."""
        out = _SchedStats()
        _check(self._lib.nbgpu_sched_stats(self._handle, entry, c.byref(out)), "scheduler stats")
        return SchedStats(out.charged_ns, out.turns, out.overruns, out.junk, out.gate, bool(out.active), out.held_ns, out.ahead_ns)

    def totals(self) -> SchedTotals:
        """Return what the thread costs."""
        out = _SchedTotals()
        _check(self._lib.nbgpu_sched_totals(self._handle, c.byref(out)), "scheduler totals")
        return SchedTotals(out.wakeups, out.bells, out.looks, out.cpu_ns, out.entries, bool(out.polling))
