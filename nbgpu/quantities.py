"""Fractions of a GPU and amounts of memory: exact, and integers inside.

A fraction is written as ``0.25``, ``1/4`` or ``"25%"`` and kept as *milli-GPU* (1000 = a whole device).
Memory is kept in bytes; a share of memory is rounded down to a whole MiB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from .errors import InvalidValue

MIB = 1024**2
GIB = 1024**3
WHOLE_MILLI = 1000

_FRACTION_RANGE = "a fraction of one GPU above 0 and up to 1, such as 0.25, 1/4 or 25%"
_FRACTION_LEAST = "at least 0.001, a thousandth of a GPU, and up to 1"
_MEMORY_RANGE = "an amount above 0 with a binary unit, such as 20 GiB or 512 MiB"
_NUMBER = re.compile(r"^\d{1,9}(\.\d{1,9})?$", re.ASCII)
_MEMORY = re.compile(r"^(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT])(?:iB|i)?$", re.IGNORECASE | re.ASCII)
_UNITS = {"K": 1024, "M": MIB, "G": GIB, "T": 1024 * GIB}
_WORDS = {1000: "the whole GPU", 750: "three quarters", 500: "half", 333: "a third", 250: "a quarter", 125: "an eighth"}


def parse_fraction(value: object, field: str = "gpu_fraction") -> int:
    """Return a fraction of one GPU as milli-GPU.

    Parameters
    ----------
    value : int, float, Fraction or str
        ``0.25``, ``1``, ``"1/3"``, ``"25%"``.
    field : str
        Name of the input, for the error.

    Returns
    -------
    int
        1..1000; a fraction that is no whole milli-GPU is rounded down (1/3 -> 333).

    Raises
    ------
    InvalidValue
        Not a number, not above 0, above 1, or below one milli-GPU.
    """
    milli = _milli(value)
    if milli is None:
        exact = _exact(value)
        if exact is not None and 0 < exact * WHOLE_MILLI < 1:
            raise InvalidValue(field, value, _FRACTION_LEAST)
        raise InvalidValue(field, value, _FRACTION_RANGE + _comma(value, _milli))
    return milli


def parse_memory(value: object, field: str = "gpu_memory") -> int:
    """Return an amount of memory in bytes, a whole number of MiB (rounded down).

    Parameters
    ----------
    value : int or str
        Bytes as an integer, or text with a binary unit: ``"20 GiB"``, ``"20G"``, ``"512 MiB"``.
    field : str
        Name of the input, for the error.

    Raises
    ------
    InvalidValue
        No such amount, or below one MiB.
    """
    amount = _memory_bytes(value)
    if amount is None:
        raise InvalidValue(field, value, _MEMORY_RANGE + (_comma(value, _memory_bytes) or _decimal_unit(value)))
    return amount


def memory_share_bytes(usable_bytes: int, milli: int) -> int:
    """Return `milli` thousandths of `usable_bytes`, rounded down to a whole MiB."""
    return usable_bytes * milli // WHOLE_MILLI // MIB * MIB


def compute_for_memory_milli(memory_bytes: int, usable_bytes: int) -> int:
    """Return the smallest share, in milli-GPU, whose part of the memory is at least `memory_bytes`."""
    whole_mib = -(-memory_bytes // MIB) * MIB  # a share is rounded down to a MiB, so what is wanted is rounded up
    return max(1, -(-whole_mib * WHOLE_MILLI // usable_bytes))


def least_allowed(memory_bytes: int, usable_bytes: int, least_bytes: int) -> str | None:
    """Return what a part of a GPU must be, in words, where `memory_bytes` of it are too few for a program to start; else None.

    Parameters
    ----------
    usable_bytes : int
        What the GPU has for slices: all of it is never too little.
    least_bytes : int
        The least that a slice may have.
    """
    least_bytes = min(least_bytes, usable_bytes)
    if memory_bytes >= least_bytes:
        return None
    share = format_share(compute_for_memory_milli(least_bytes, usable_bytes))
    amount = format_memory(least_bytes) if least_bytes % (GIB // 2) == 0 else f"{-(-least_bytes // MIB)} MiB"  # rounded down it is refused
    return f"at least {share} of a GPU here, {amount} of its memory: a program's CUDA context alone takes hundreds of MiB"


def format_memory(memory_bytes: int) -> str:
    """Return `memory_bytes` for people: ``19.5 GiB``, ``512 MiB``; at most one decimal, rounded down.

    JupyterLab's side writes the same (``labextension/src/format.ts``); ``tests/data/memory_words.json`` holds both to it.
    """
    if memory_bytes >= GIB:
        return f"{_trim(Fraction(memory_bytes, GIB))} GiB"
    if memory_bytes >= MIB:
        return f"{_trim(Fraction(memory_bytes, MIB))} MiB"
    return f"{memory_bytes} B"


def format_memory_of(used_bytes: int, limit_bytes: int) -> str:
    """Return memory used of a limit, each in its own unit, which is written once when they share it: ``1.2 of 19.5 GiB``."""
    used, limit = format_memory(used_bytes), format_memory(limit_bytes)
    number, _, unit = used.partition(" ")
    return f"{number if limit.endswith(f' {unit}') else used} of {limit}"


def format_share(milli: int) -> str:
    """Return a share for people: ``a quarter``, ``a third``, ``37.5 %``."""
    return _WORDS.get(milli, f"{_trim(Fraction(milli, 10))} %")


def format_time(milli: int) -> str:
    """Return a share of a GPU's time: ``a quarter of the GPU's time``, ``all of the GPU's time``."""
    return f"{'all' if milli == WHOLE_MILLI else format_share(milli)} of the GPU's time"


def _trim(value: Fraction) -> str:
    tenths = math.floor(value * 10)
    return str(tenths // 10) if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10}"


def _milli(value: object) -> int | None:
    exact = _exact(value)
    if exact is None or exact <= 0 or exact > 1 or exact * WHOLE_MILLI < 1:
        return None
    return math.floor(exact * WHOLE_MILLI)


def _memory_bytes(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        exact = Fraction(value)
    else:
        match = _MEMORY.match(value.strip()) if isinstance(value, str) else None
        if match is None:
            return None
        exact = Fraction(match[1]) * _UNITS[match[2].upper()]
    return math.floor(exact / MIB) * MIB if MIB <= exact <= 2**60 else None


def _decimal_unit(value: object) -> str:
    """Return what to add to an allowed range where ``GB`` stands for what is ``GiB`` here."""
    meant = re.sub(r"(?<=[KMGT])B$", "iB", value.strip(), flags=re.IGNORECASE) if isinstance(value, str) else ""
    return f": {meant}" if meant != value and _memory_bytes(meant) is not None else ""


def _comma(value: object, parse: Callable[[object], int | None]) -> str:
    """Return what to add to an allowed range where a decimal comma is all that is wrong with `value`."""
    if not isinstance(value, str) or "," not in value:
        return ""
    meant = value.strip().replace(",", ".")
    return f", with a point in place of the comma: {meant}" if parse(meant) is not None else ""


def _exact(value: object) -> Fraction | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, Fraction)):
        return Fraction(value)
    if isinstance(value, float):
        return Fraction(Decimal(repr(value))) if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.endswith("%"):
        number = text[:-1].strip()
        return Fraction(number) / 100 if _NUMBER.match(number) else None
    top, slash, bottom = text.partition("/")
    if not slash:
        return Fraction(text) if _NUMBER.match(text) else None
    top, bottom = top.strip(), bottom.strip()
    if not (_NUMBER.match(top) and _NUMBER.match(bottom)) or Fraction(bottom) == 0:
        return None
    return Fraction(top) / Fraction(bottom)
