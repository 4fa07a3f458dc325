"""What happened to kernels that no limit refused: one ended and gave memory back, one is slowed by its own limit. Slots in, words out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from nbgpu.models import KernelLimit
from nbgpu.quantities import format_memory, format_time

from .usage import SlotUse

THROTTLED_PART = 0.9
THROTTLED_SECONDS = 60.0
"""A kernel that has used this part of its own compute limit for so long would be faster with a higher one."""
LOOKS_MEAN = 10
"""Of about so many looks, one a second: a single one may find it between two GPU kernels, or the machine busy otherwise."""
AGAIN_SECONDS = 600.0


class Told(NamedTuple):
    """What people are told of, as `EventLog.add` takes it."""

    kind: Literal["kernel-ended", "throttled"]
    kernel_id: str
    message: str
    data: dict[str, int]


class KernelSeen:
    """One kernel at one look."""

    __slots__ = ("memory_bytes", "pids")

    def __init__(self) -> None:
        self.memory_bytes = 0
        self.pids: set[int] = set()


class Happened:
    """Compares each look at a slice's slots with the one before."""

    def __init__(self) -> None:
        self._last: Sequence[SlotUse] = ()
        self._held: dict[str, KernelSeen] = {}
        """The kernels that held memory at the last look."""
        self._mean_milli: dict[str, float] = {}
        """What kernels with a compute limit of their own have used in the last seconds."""
        self._full_since: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def look(self, slots: Sequence[SlotUse], limits: Mapping[str, KernelLimit], now: float) -> list[Told]:
        """Return what this look gives cause to tell; `now` is CLOCK_MONOTONIC, seconds."""
        if slots == self._last and not self._full_since and not limits:
            return []
        self._last = slots
        kernels = _kernels(slots)
        found = list(self._ended(kernels)) if self._held else []
        if limits or self._full_since or self._told:
            found += self._throttled(slots, kernels, limits, now)
        self._held = {kernel_id: kernel for kernel_id, kernel in kernels.items() if kernel.memory_bytes}
        return found

    def _ended(self, kernels: Mapping[str, KernelSeen]) -> Iterator[Told]:
        """Kernels that held memory, and none of whose processes is there any more."""
        for kernel_id, before in self._held.items():
            after = kernels.get(kernel_id, GONE)
            known = before.pids and (after.pids or not after.memory_bytes)  # it may not be known whose memory it is
            if known and not before.pids & after.pids:
                freed = before.memory_bytes
                message = f"{title(kernel_id)} ended: the {format_memory(freed)} of GPU memory that it held are free again."
                yield Told("kernel-ended", kernel_id, message, {"freed_bytes": freed})

    def _throttled(
        self, slots: Sequence[SlotUse], kernels: Mapping[str, KernelSeen], limits: Mapping[str, KernelLimit], now: float
    ) -> Iterator[Told]:
        """Kernels whose own compute limit has slowed them for a while."""
        for known in (self._mean_milli, self._full_since, self._told):
            for gone in known.keys() - kernels.keys():
                del known[gone]
        for kernel_id, limit in limits.items():
            if limit.compute_milli is None or kernel_id not in kernels:
                self._full_since.pop(kernel_id, None)
                continue
            used_milli = _most_milli(slots, kernel_id)
            before = self._mean_milli.get(kernel_id, used_milli)
            mean = self._mean_milli[kernel_id] = before + (used_milli - before) / LOOKS_MEAN
            if mean < THROTTLED_PART * limit.compute_milli:
                self._full_since.pop(kernel_id, None)
                continue
            since = self._full_since.setdefault(kernel_id, now)
            if now - since >= THROTTLED_SECONDS and now - self._told.get(kernel_id, -AGAIN_SECONDS) >= AGAIN_SECONDS:
                self._told[kernel_id] = now
                used = f"{title(kernel_id)} has used all of its own compute limit ({format_time(limit.compute_milli)}) for a minute"
                data = {"limit_milli": limit.compute_milli, "used_milli": round(mean)}
                yield Told("throttled", kernel_id, f"{used}. Raise the limit to make it faster.", data)


GONE = KernelSeen()


def _kernels(slots: Sequence[SlotUse]) -> dict[str, KernelSeen]:
    """Return the kernels that have slots; programs that are no kernel's come and go."""
    seen: dict[str, KernelSeen] = {}
    for slot in slots:
        if slot.kernel_id:
            kernel = seen.get(slot.kernel_id)
            if kernel is None:
                kernel = seen[slot.kernel_id] = KernelSeen()
            kernel.memory_bytes += slot.memory_bytes
            if slot.pid:
                kernel.pids.add(slot.pid)
    return seen


def _most_milli(slots: Sequence[SlotUse], kernel_id: str) -> int:
    """Return what a kernel uses of the device that it uses most."""
    by_device: dict[int, int] = {}
    for slot in slots:
        if slot.kernel_id == kernel_id:
            by_device[slot.device] = by_device.get(slot.device, 0) + slot.compute_milli
    return max(by_device.values(), default=0)


def short(kernel_id: str) -> str:
    """Return a kernel's id for people: its first eight characters."""
    return kernel_id if len(kernel_id) <= 9 else f"{kernel_id[:8]}…"


def title(kernel_id: str) -> str:
    """Return what a kernel is called in a sentence; the Jupyter server puts its notebook's name there."""
    return f"Notebook kernel {short(kernel_id)}"
