"""What a node may give: sums of slices against devices. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import Device, KernelLimit, Slice
from nbgpu.quantities import MIB, WHOLE_MILLI, format_memory

from .layout import DEVICES


class Conflict(NbgpuError):
    """What is asked does not fit what is there."""

    code = "conflict"
    status = 409


def check_slice(wanted: Slice, devices: Mapping[str, Device], node: str) -> None:
    """Raise InvalidValue unless `wanted` names devices of this node, each once, and a part of each that is not empty."""
    if wanted.node != node:
        raise InvalidValue("slice.node", wanted.node, f"this node, {node!r}")
    if len(wanted.devices) > DEVICES:
        raise InvalidValue("slice.devices", len(wanted.devices), f"at most {DEVICES} devices")
    seen: set[str] = set()
    for part in wanted.devices:
        device = devices.get(part.uuid)
        if device is None:
            raise InvalidValue("slice.devices.uuid", part.uuid, f"one of this node's devices: {', '.join(devices) or 'it has none'}")
        if part.uuid in seen:
            raise InvalidValue("slice.devices.uuid", part.uuid, "named once")
        seen.add(part.uuid)
        if part.index != device.index:
            raise InvalidValue("slice.devices.index", part.index, f"{device.index}, the index of {part.uuid}")
        if part.memory_bytes < MIB:
            raise InvalidValue("slice.devices.memory_bytes", part.memory_bytes, "at least 1 MiB")
        if part.compute_milli < 1:
            raise InvalidValue("slice.devices.compute_milli", part.compute_milli, "from 1 to 1000")


def check_fits(wanted: Slice, others: Iterable[Slice], devices: Mapping[str, Device]) -> None:
    """Raise Conflict when `wanted` beside `others` would exceed a device's memory minus reserve, or 1000 milli-GPU."""
    memory = dict.fromkeys(devices, 0)
    compute = dict.fromkeys(devices, 0)
    for other in others:
        for part in other.devices:
            memory[part.uuid] = memory.get(part.uuid, 0) + part.memory_bytes
            compute[part.uuid] = compute.get(part.uuid, 0) + part.compute_milli
    for part in wanted.devices:
        device = devices[part.uuid]
        if not device.healthy:
            raise Conflict(f"GPU {device.index} ({device.uuid}) does not answer: it takes no new slices until it does.")
        left = device.usable_bytes - memory[part.uuid]
        if part.memory_bytes > left:
            raise Conflict(
                f"GPU {device.index} ({device.uuid}) has {format_memory(max(0, left))} left, "
                f"slice {wanted.slice_id} needs {format_memory(part.memory_bytes)}."
            )
        share = WHOLE_MILLI - compute[part.uuid]
        if part.compute_milli > share:
            raise Conflict(
                f"GPU {device.index} ({device.uuid}) has {max(0, share)} of 1000 milli-GPU of its time left, "
                f"slice {wanted.slice_id} needs {part.compute_milli}."
            )


def emptied(full: Slice) -> Slice:
    """Return what a slice holds while it is parked: nothing of each of its devices."""
    nothing = {"memory_bytes": 0, "compute_milli": 0}
    return full.model_copy(update={"devices": [part.model_copy(update=nothing) for part in full.devices]})


def holding(limits: Slice, held_bytes: Sequence[int]) -> Slice:
    """Return what a slice with these limits counts while it holds so much memory on each of its devices."""
    pairs = zip(limits.devices, held_bytes, strict=True)
    parts = [part.model_copy(update={"memory_bytes": max(part.memory_bytes, held)}) for part, held in pairs]
    return limits.model_copy(update={"devices": parts})


def check_kernel_limit(limit: KernelLimit, within: Slice) -> None:
    """Raise InvalidValue when a kernel's limit is nothing, or above its slice's on any device."""
    memory = min(part.memory_bytes for part in within.devices)
    if limit.memory_bytes is not None and not MIB <= limit.memory_bytes <= memory:
        raise InvalidValue("memory_bytes", limit.memory_bytes, f"between 1 MiB and the slice's {format_memory(memory)} ({memory} bytes)")
    compute = share_milli(within)
    if limit.compute_milli is not None and not 1 <= limit.compute_milli <= compute:
        raise InvalidValue("compute_milli", limit.compute_milli, f"from 1 to {compute}, the slice's share in thousandths of the GPU's time")


def share_milli(of: Slice) -> int:
    """Return the compute share that parts of a slice's time are taken of, milli-GPU: the least of its devices'."""
    return min(part.compute_milli for part in of.devices)


def kernel_limit_in(limit: KernelLimit, of_milli: int, within: Slice) -> KernelLimit:
    """Return what a kernel's limit is in a slice that may have another size since it was set.

    Parameters
    ----------
    of_milli : int
        The slice's share when it was set: its compute stays that part of it.
    """
    memory, compute, share = limit.memory_bytes, limit.compute_milli, share_milli(within)
    if memory is not None:
        memory = min(memory, *(part.memory_bytes for part in within.devices))
    if compute is not None and share != of_milli:
        compute = max(1, min(share, (2 * compute * share + of_milli) // (2 * of_milli)))
    return KernelLimit(memory_bytes=memory, compute_milli=compute)


def resized(current: Slice, memory_bytes: int | None, compute_milli: int | None, mode: str | None) -> Slice:
    """Return `current` with new limits on each of its devices; None = as it is."""
    parts = [
        part.model_copy(
            update={
                "memory_bytes": part.memory_bytes if memory_bytes is None else memory_bytes,
                "compute_milli": part.compute_milli if compute_milli is None else compute_milli,
            }
        )
        for part in current.devices
    ]
    return current.model_copy(update={"devices": parts, "mode": mode or current.mode})
