"""What a request means on one device: bytes and milli-GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from nbgpu.errors import InvalidValue
from nbgpu.models import Device, Request, Resize, Shape
from nbgpu.quantities import MIB, WHOLE_MILLI, compute_for_memory_milli, least_allowed, memory_share_bytes

MAX_DEVICES = 16
"""Most devices that one slice may span (`nbgpu.models.Slice`)."""


class Part(NamedTuple):
    """A part of one device."""

    memory_bytes: int
    compute_milli: int

    def without(self, other: Part) -> Part:
        """Return what is left of it without `other`."""
        return Part(self.memory_bytes - other.memory_bytes, self.compute_milli - other.compute_milli)

    def larger(self, other: Part) -> Part:
        """Return the larger of both, number by number."""
        return Part(max(self.memory_bytes, other.memory_bytes), max(self.compute_milli, other.compute_milli))


NOTHING = Part(0, 0)


class Amount(NamedTuple):
    """Parts of devices together, and what they count against all that quotas say in GPUs: limits and guarantees."""

    memory_bytes: int = 0
    compute_milli: int = 0
    counted_milli: int = 0
    """The sum of each part's `counted_milli`."""

    @property
    def by_memory(self) -> bool:
        """Whether it counts more than its GPU time."""
        return self.counted_milli > self.compute_milli

    def plus(self, other: Amount, times: int = 1) -> Amount:
        """Return this and `times` the other."""
        return Amount(*(mine + times * its for mine, its in zip(self, other, strict=True)))


def counted_milli(part: Part, usable_bytes: int) -> int:
    """Return what a part of a device counts in quotas, in milli-GPU: the larger of its shares of GPU time and of usable memory.

    The share of memory is the smallest whose part of the memory, in whole MiB, is as large: a quarter counts 250 and never 251.
    Of a device whose size is not known (`usable_bytes` 0) time alone counts.
    """
    if part.memory_bytes <= 0 or usable_bytes < MIB:
        return part.compute_milli
    return max(part.compute_milli, min(WHOLE_MILLI, compute_for_memory_milli(part.memory_bytes, usable_bytes)))


def amount_of(part: Part, usable_bytes: int) -> Amount:
    """Return a part of a device as quotas count it."""
    return Amount(*part, counted_milli(part, usable_bytes))


def within(part: Part, usable_bytes: int, cap: Part | None) -> bool:
    """Return whether a part of a device is within what a quota leaves of it: bytes, and milli-GPU as they are counted."""
    return cap is None or (part.memory_bytes <= cap.memory_bytes and counted_milli(part, usable_bytes) <= cap.compute_milli)


class Want(NamedTuple):
    """A request without its owner; equal wants fit the same places."""

    device_count: int
    compute_milli: int | None
    memory_milli: int | None
    memory_bytes: int | None
    model: str | None


def want_of(asked: Request | Shape) -> Want:
    """Return what `asked` wants, checked.

    Raises
    ------
    InvalidValue
        Neither compute nor memory is given, memory is given twice, or the slice would span too many devices.
    """
    if asked.compute_milli is None and asked.memory_milli is None and asked.memory_bytes is None:
        raise InvalidValue("compute_milli", None, "given, unless memory_milli or memory_bytes is")
    if asked.memory_milli is not None and asked.memory_bytes is not None:
        raise InvalidValue("memory_bytes", asked.memory_bytes, "left out when memory_milli is given: they say the same thing")
    if asked.device_count > MAX_DEVICES:
        raise InvalidValue("device_count", asked.device_count, f"1 to {MAX_DEVICES}")
    return Want(asked.device_count, asked.compute_milli, asked.memory_milli, asked.memory_bytes, asked.model)


def resolve(want: Want, device: Device) -> Part | None:
    """Return the part of `device` that `want` means; None when the device, even empty, cannot hold it."""
    return _resolve(want, device.model, device.usable_bytes)


@lru_cache(maxsize=4096)
def _resolve(want: Want, model: str, usable_bytes: int) -> Part | None:
    if (want.model is not None and want.model != model) or usable_bytes < MIB:
        return None
    if want.memory_bytes is not None:
        memory = want.memory_bytes // MIB * MIB
        if memory > usable_bytes:
            return None
        return Part(memory, want.compute_milli or compute_for_memory_milli(memory, usable_bytes))
    share = want.memory_milli or want.compute_milli or 0
    return Part(memory_share_bytes(usable_bytes, share), want.compute_milli or share)


def too_small(want: Want, devices: Iterable[Device], least_bytes: int) -> str | None:
    """Return what `want` must be where its part of some device, even one, would be less than `least_bytes`; None where it is enough.

    Of the smallest device that it could be placed on: it goes wherever there is room.
    """
    parts = [(device.usable_bytes, part) for device in devices if (part := resolve(want, device)) is not None]
    if not parts:
        return None
    usable, part = min(parts)
    return least_allowed(part.memory_bytes, usable, least_bytes)


def memory_field(asked: Want | Resize) -> str:
    """Return the name of the input that says how much memory there shall be."""
    return next((name for name in ("memory_bytes", "memory_milli") if getattr(asked, name) is not None), "compute_milli")


def by_model(want: Want, devices: Iterable[Device]) -> dict[str, Part]:
    """Return what `want` means on each GPU model that could hold it; of several sizes of a model the smallest part."""
    parts: dict[str, Part] = {}
    for device in devices:
        part = resolve(want, device)
        if part is not None:
            parts[device.model] = min(part, parts.get(device.model, part))
    return parts
