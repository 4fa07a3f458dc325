"""Counts as people write them."""

from __future__ import annotations

import math
from typing import Literal


def counted(count: int, noun: str, many: str = "") -> str:
    """Return ``1 slice``, ``2 slices``; `many` where the plural is not made with an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {many or noun + 's'}"


def times(count: int) -> str:
    """Return ``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def rough_time_down(seconds: float) -> str:
    """Return a duration for people, rounded down: ``40 minutes``, ``2 hours``; at least a minute."""
    minutes = max(1, int(seconds // 60))
    if minutes == 1:
        return "a minute"
    return f"{minutes} minutes" if minutes <= 90 else f"{minutes // 60} hours"


def rough_time(seconds: float, least: Literal["minutes", "seconds"] = "minutes") -> str:
    """Return a duration for people, rounded up: ``a minute``, ``10 minutes``, ``2 hours``; with `least` also ``40 seconds``."""
    if least == "seconds" and seconds < 60:
        return f"{max(1, math.ceil(seconds))} seconds" if seconds > 1 else "a second"
    minutes = max(1, math.ceil(seconds / 60))
    if minutes == 1:
        return "a minute"
    if minutes > 10:
        minutes = math.ceil(minutes / 5) * 5
    if minutes <= 90:
        return f"{minutes} minutes"
    return f"{math.ceil(minutes / 60)} hours"
