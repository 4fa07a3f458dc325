"""The environment of a program that starts inside a slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .models import Launch

PATHS = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
"""Search paths: the slice's parts come before those that are there already."""


def environment(base: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """Return `base` with a slice's variables: nbgpu's folders in front of the search paths that are there, an empty value unsets.

    The agent's own search path, which follows nbgpu's folders in `launch`, is used only where `base` has none: a program looks
    where its user said, not where the agent does.
    """
    runtime = str(Path(launch.slice_dir).parent.parent) + "/"
    merged = dict(base)
    for name, value in launch.env.items():
        if value == "":
            merged.pop(name, None)
        elif name in PATHS and merged.get(name):
            ours = [part for part in value.split(":") if part.startswith(runtime)] or value.split(":")
            merged[name] = ":".join(ours + [part for part in merged[name].split(":") if part not in ours])
        else:
            merged[name] = value
    return merged
