"""Counts as people write them."""

from __future__ import annotations


def counted(count: int, noun: str, many: str = "") -> str:
    """Return ``1 slice``, ``2 slices``; `many` where the plural is not made with an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {many or noun + 's'}"


def times(count: int) -> str:
    """Return ``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
