"""The one definition of usage. Pure: slots and samples in, `Usage` out.

Memory = tracked allocations + contexts + measured overhead; compute = busy GPU time over wall time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from nbgpu.models import Backend, DeviceUsage, KernelDeviceUsage, KernelLimit, KernelUsage, Slice, Suspension, Usage

NO_LIMIT = KernelLimit()
TIMES = 3
"""So many samples in a row NVML must see much more than a slice tells, to be believed instead."""


class SlotUse(NamedTuple):
    """One process on one device of the slice (`device` counts the slice's own). Memory in bytes, compute in milli-GPU."""

    device: int
    kernel_id: str
    pid: int | None
    memory_bytes: int
    peak_bytes: int
    compute_milli: int
    refusals: int = 0
    launches: int = 0
    last_launch_ns: int = 0


@dataclass
class Doubts:
    """Of one quantity, by the device's place in the slice: what NVML saw, where that was much more than was told for `TIMES` looks.

    Fewer prove nothing: NVML's samples are of a little earlier.
    """

    tolerance: int
    seen: dict[int, int] = field(default_factory=dict[int, int])
    times: dict[int, int] = field(default_factory=dict[int, int])

    def look(self, index: int, seen: int, told: int) -> bool:
        """Compare what NVML sees with what the slice tells; return whether that is doubtful."""
        self.times[index] = self.times.get(index, 0) + 1 if seen > told + self.tolerance else 0
        if self.times[index] >= TIMES:
            self.seen[index] = seen
        else:
            self.seen.pop(index, None)
        return self.times[index] > 0


def memory_by_device(part_of: Slice, slots: Iterable[SlotUse], seen_bytes: Mapping[int, int] = MappingProxyType({})) -> list[int]:
    """Return the memory that a slice uses on each of its devices, bytes: `seen_bytes` where NVML saw much more than was told."""
    sums = [0] * len(part_of.devices)
    for slot in slots:
        sums[slot.device] += slot.memory_bytes
    return [max(value, seen_bytes.get(index, 0)) for index, value in enumerate(sums)]


def compute_by_device(part_of: Slice, slots: Iterable[SlotUse], seen_milli: Mapping[int, int]) -> list[int]:
    """Return the compute that a slice uses on each of its devices, milli-GPU: `seen_milli` where NVML saw much more than was told."""
    sums = [0] * len(part_of.devices)
    for slot in slots:
        sums[slot.device] += slot.compute_milli
    return [min(1000, max(value, seen_milli.get(index, 0))) for index, value in enumerate(sums)]


def device_usage(part_of: Slice, memory: Sequence[int], compute: Sequence[int]) -> list[DeviceUsage]:
    """Return the use of each device beside its limits."""
    return [
        DeviceUsage(
            uuid=part.uuid,
            index=part.index,
            model=part.model,
            memory_limit_bytes=part.memory_bytes,
            memory_used_bytes=memory[index],
            compute_limit_milli=part.compute_milli,
            compute_used_milli=compute[index],
            utilization_percent=min(100, compute[index] * 100 // part.compute_milli),
        )
        for index, part in enumerate(part_of.devices)
    ]


def kernel_usage(part_of: Slice, slots: Sequence[SlotUse], limits: Mapping[str, KernelLimit], now_ns: int) -> list[KernelUsage]:
    """Return the use of each kernel that has a slot or a limit, and of everything else under None."""
    names = dict.fromkeys([slot.kernel_id for slot in slots if slot.kernel_id])
    names.update(dict.fromkeys(limits))
    if any(not slot.kernel_id for slot in slots):
        names[""] = None
    slots_of: dict[str, list[SlotUse]] = {name: [] for name in names}
    for slot in slots:
        slots_of[slot.kernel_id].append(slot)
    found: list[KernelUsage] = []
    for name, own in slots_of.items():
        last_ns = max((slot.last_launch_ns for slot in own), default=0)
        found.append(
            KernelUsage(
                kernel_id=name or None,
                pids=sorted({slot.pid for slot in own if slot.pid}),
                limit=limits.get(name, NO_LIMIT),
                devices=_kernel_devices(part_of, own),
                refusals=sum(slot.refusals for slot in own),
                launches=sum(slot.launches for slot in own),
                idle_seconds=round(max(0, now_ns - last_ns) / 1e9, 3) if last_ns else None,
            )
        )
    return found


def _kernel_devices(part_of: Slice, slots: Sequence[SlotUse]) -> list[KernelDeviceUsage]:
    return [
        KernelDeviceUsage(
            uuid=part.uuid,
            memory_used_bytes=sum(slot.memory_bytes for slot in slots if slot.device == index),
            memory_peak_bytes=sum(slot.peak_bytes for slot in slots if slot.device == index),
            compute_used_milli=min(1000, sum(slot.compute_milli for slot in slots if slot.device == index)),
        )
        for index, part in enumerate(part_of.devices)
        if any(slot.device == index for slot in slots)
    ]


def slice_usage(
    part_of: Slice,
    slots: Sequence[SlotUse],
    limits: Mapping[str, KernelLimit],
    seen_bytes: Mapping[int, int],
    seen_milli: Mapping[int, int],
    backend: Backend,
    time: float,
    now_ns: int,
    suspended: Sequence[Suspension] = (),
    may_resume: bool = False,
) -> Usage:
    """Return the use of one slice at Unix `time` (s) and CLOCK_MONOTONIC `now_ns`."""
    memory = memory_by_device(part_of, slots, seen_bytes)
    compute = compute_by_device(part_of, slots, seen_milli)
    return Usage(
        slice_id=part_of.slice_id,
        mode=part_of.mode,
        backend=backend,
        simulated=part_of.simulated,
        time=time,
        devices=device_usage(part_of, memory, compute),
        kernels=kernel_usage(part_of, slots, limits, now_ns),
        suspended=list(suspended),
        may_resume=may_resume,
    )
