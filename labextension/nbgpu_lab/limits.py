"""A kernel's limit as people write it ("5 GiB", "1/2") into the number that the agent takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nbgpu.errors import InvalidValue
from nbgpu.quantities import MIB, format_memory, memory_share_bytes, parse_fraction, parse_memory

LABEL = "Memory limit"
"""What the panel calls it."""
_LARGEST_BYTES = 2**60
_TIME = ("compute", "compute_milli")


def kernel_limit(asked: object, devices: list[dict[str, Any]]) -> dict[str, int | None]:
    """Return a ``KernelLimit`` from what a notebook's metadata or the panel asks for.

    Parameters
    ----------
    asked : mapping
        ``memory`` as text (an amount such as ``"5 GiB"``, or a fraction *of the slice* such as ``0.5`` or ``"1/2"``), or
        ``memory_bytes`` as a number. Missing, None or empty: no limit of its own.
    devices : list of dict
        The slice's devices, each with ``memory_limit_bytes`` (as in ``Usage``).

    Raises
    ------
    InvalidValue
        Junk, more than the slice, or a limit of time, which one kernel alone cannot have yet; names the field and what is allowed.
    """
    if not isinstance(asked, Mapping):
        raise InvalidValue("nbgpu", asked, 'an object such as {"memory": "5 GiB"}')
    unknown = sorted(set(map(str, asked)) - {"memory", "memory_bytes", *_TIME})
    if unknown:
        raise InvalidValue(unknown[0], asked[unknown[0]], "left out; memory is the limit that a kernel has")
    for name in _TIME:
        if not _empty(asked.get(name)):
            raise InvalidValue(name, asked[name], "left out: a slice's kernels share its time, one alone cannot be limited yet")
    name = "memory_bytes" if _empty(asked.get("memory")) else "memory"
    value = asked.get(name)
    whole = min(int(device["memory_limit_bytes"]) for device in devices)
    memory_bytes = _number(name, value) if name == "memory_bytes" else _memory_bytes(value, whole)
    if memory_bytes is not None and memory_bytes > whole:
        most = f"at most {format_memory(whole)}, this server's slice, or a fraction of it such as 0.5 or 1/2"
        raise InvalidValue(name, value, most, LABEL)
    return {"memory_bytes": memory_bytes, "compute_milli": None}


def _memory_bytes(value: object, whole: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB:
        return parse_memory(value, "memory")
    try:
        if isinstance(value, str) and value.strip()[-1:].isalpha():
            return parse_memory(value, "memory")
        return memory_share_bytes(whole, parse_fraction(value, "memory"))
    except InvalidValue:
        raise InvalidValue("memory", value, "an amount such as 5 GiB, or a fraction of the slice such as 0.5 or 1/2", LABEL) from None


def _number(name: str, value: object) -> int | None:
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value != int(value)
        or not 0 <= value <= _LARGEST_BYTES
    ):
        raise InvalidValue(name, value, f"a whole number from 0 to {_LARGEST_BYTES}, or null")
    return int(value)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
