"""The environment of a program that starts inside a slice."""

from __future__ import annotations

from collections.abc import Mapping

from .models import Launch

PATHS = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
"""Search paths: the slice's parts come before those that are there already."""


def environment(base: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """Return `base` with a slice's variables: search paths in front of what is there, an empty value unsets."""
    merged = dict(base)
    for name, value in launch.env.items():
        if value == "":
            merged.pop(name, None)
        elif name in PATHS and merged.get(name):
            parts = value.split(":")
            merged[name] = ":".join([*parts, *(part for part in merged[name].split(":") if part not in parts)])
        else:
            merged[name] = value
    return merged
