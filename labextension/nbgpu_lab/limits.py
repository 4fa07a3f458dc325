"""A kernel's limits as people write them ("5 GiB", "1/2") into the numbers that the agent takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nbgpu.errors import InvalidValue
from nbgpu.quantities import MIB, WHOLE_MILLI, memory_share_bytes, parse_fraction, parse_memory

_NUMBERS = {"memory_bytes": (0, 2**60), "compute_milli": (1, WHOLE_MILLI)}


def kernel_limit(asked: object, devices: list[dict[str, Any]]) -> dict[str, int | None]:
    """Return a ``KernelLimit`` from what a notebook's metadata or the panel asks for.

    Parameters
    ----------
    asked : mapping
        ``memory`` and ``compute`` as text (an amount such as ``"5 GiB"``, or a fraction *of the slice* such as ``0.5`` or
        ``"1/2"``; compute takes fractions only), or ``memory_bytes`` and ``compute_milli`` as numbers. What is missing,
        None or empty has no limit of its own.
    devices : list of dict
        The slice's devices, each with ``memory_limit_bytes`` and ``compute_limit_milli`` (as in ``Usage``).

    Raises
    ------
    InvalidValue
        Junk; the message names the field and what is allowed.
    """
    if not isinstance(asked, Mapping):
        raise InvalidValue("nbgpu", asked, 'an object such as {"memory": "5 GiB", "compute": "1/2"}')
    unknown = sorted(set(map(str, asked)) - {"memory", "compute", *_NUMBERS})
    if unknown:
        raise InvalidValue(unknown[0], asked[unknown[0]], "left out; memory and compute are the limits that a kernel has")
    limit: dict[str, int | None] = {name: _number(name, asked.get(name)) for name in _NUMBERS}
    if not _empty(asked.get("memory")):
        limit["memory_bytes"] = _memory_bytes(asked["memory"], devices)
    if not _empty(asked.get("compute")):
        share = parse_fraction(asked["compute"], "compute")
        whole = min(int(device["compute_limit_milli"]) for device in devices)
        limit["compute_milli"] = max(1, whole * share // WHOLE_MILLI)
    return limit


def _memory_bytes(value: object, devices: list[dict[str, Any]]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB:
        return parse_memory(value, "memory")
    whole = min(int(device["memory_limit_bytes"]) for device in devices)
    if isinstance(value, str) and value.strip()[-1:].isalpha():
        return parse_memory(value, "memory")
    try:
        return memory_share_bytes(whole, parse_fraction(value, "memory"))
    except InvalidValue:
        raise InvalidValue("memory", value, "an amount such as 5 GiB, or a fraction of the slice such as 0.5 or 1/2") from None


def _number(name: str, value: object) -> int | None:
    low, high = _NUMBERS[name]
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value != int(value)
        or not low <= value <= high
    ):
        raise InvalidValue(name, value, f"a whole number from {low} to {high}, or null")
    return int(value)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
