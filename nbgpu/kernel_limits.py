"""A kernel's limits as people write them ("5 GiB", "1/2", "25%") into the numbers that the agent takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from .errors import InvalidValue
from .logs import one_line
from .quantities import MIB, WHOLE_MILLI, format_memory, memory_share_bytes, parse_fraction, parse_memory

LABELS = {"memory": "Memory limit", "compute": "Compute limit"}
"""What the panel calls them."""
_LARGEST_BYTES = 2**60
_SUCH_AS = "such as 0.5, 1/2 or 25%"
_FRACTION = f"a fraction of the slice {_SUCH_AS}"
_MEMORY = f"an amount such as 5 GiB, or {_FRACTION}"


def kernel_limit(asked: object, devices: list[dict[str, Any]], labels: Mapping[str, str] = LABELS) -> dict[str, int | None]:
    """Return a ``KernelLimit`` from what a notebook's metadata, the panel or the command line asks for.

    Parameters
    ----------
    asked : mapping
        ``memory`` as text (an amount such as ``"5 GiB"``, or a fraction *of the slice* such as ``0.5``, ``"1/2"`` or ``"25%"``), or
        ``memory_bytes`` as a number; ``compute`` as a fraction of the slice's time, or ``compute_milli`` as a number, of the device's.
        Missing, None or empty: no limit of its own.
    devices : list of dict
        The slice's devices, each with ``memory_limit_bytes`` and ``compute_limit_milli`` (as in ``Usage``).
    labels : mapping
        What ``memory`` and ``compute`` are called where the person wrote them.

    Raises
    ------
    InvalidValue
        Junk, or more than the slice; names the field and what is allowed.
    """
    if not isinstance(asked, Mapping):
        raise InvalidValue("nbgpu", asked, 'an object such as {"memory": "5 GiB", "compute": "1/2"}')
    words = cast("Mapping[str, Any]", asked)
    unknown = sorted(set(map(str, words)) - {"memory", "memory_bytes", "compute", "compute_milli"})
    if unknown:
        # a notebook's own word, shown in a sentence: not whole, nothing in it that turns or breaks the line
        raise InvalidValue(
            one_line(unknown[0][:40]), words.get(unknown[0]), "left out; memory and compute are the limits that a kernel has"
        )
    return {
        "memory_bytes": _memory(words, min(int(device["memory_limit_bytes"]) for device in devices), labels["memory"]),
        "compute_milli": _compute(words, min(int(device["compute_limit_milli"]) for device in devices), labels["compute"]),
    }


def _memory(asked: Mapping[str, Any], whole: int, label: str) -> int | None:
    name = "memory_bytes" if _empty(asked.get("memory")) else "memory"
    value = asked.get(name)
    memory_bytes = _number(name, value, _LARGEST_BYTES) if name == "memory_bytes" else _memory_bytes(value, whole, label)
    if memory_bytes is not None and memory_bytes > whole:
        raise InvalidValue(name, value, f"at most {format_memory(whole)}, this server's slice, or a fraction of it {_SUCH_AS}", label)
    return memory_bytes


def _memory_bytes(value: object, whole: int, label: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB:
        return parse_memory(value, "memory")
    try:
        if isinstance(value, str) and value.strip()[-1:].isalpha():
            return parse_memory(value, "memory")
        return memory_share_bytes(whole, parse_fraction(value, "memory"))
    except InvalidValue:
        raise InvalidValue("memory", value, _MEMORY, label) from None


def _compute(asked: Mapping[str, Any], whole: int, label: str) -> int | None:
    if _empty(asked.get("compute")):
        value = asked.get("compute_milli")
        milli = _number("compute_milli", value, 1000)
        if milli is not None and not 1 <= milli <= whole:
            raise InvalidValue("compute_milli", value, f"from 1 to {whole}, the slice's share in thousandths of the GPU's time")
        return milli
    try:
        return part_milli(whole, parse_fraction(asked["compute"], "compute"))
    except InvalidValue:
        raise InvalidValue("compute", asked["compute"], _FRACTION, label) from None


def _number(name: str, value: object, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or value != int(value):
        raise InvalidValue(name, value, f"a whole number from 0 to {most}, or null")
    return int(value)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def part_milli(whole_milli: int, thousandths: int) -> int:
    """Return `thousandths` of a slice's share, in thousandths of the GPU's time: rounded down, at least one."""
    return max(1, whole_milli * thousandths // WHOLE_MILLI)
