"""Which notebook a kernel belongs to, told by a Jupyter server to the command line of the same user.

The server alone knows its notebooks; the agent knows kernels by id. So the server's extension keeps a file for its slice in the user's
Jupyter runtime directory, and ``nbgpu limit`` and ``nbgpu status`` read it there. It says names, nothing else follows from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_LARGEST_BYTES = 1024**2
_LONGEST = 1024
_KERNEL_ID = re.compile(r"[A-Za-z0-9_.-]{1,39}", re.ASCII)


class KernelName(NamedTuple):
    """What a server calls a kernel; `path` of its notebook, None where it has none."""

    name: str
    path: str | None


def file_of(slice_id: str) -> Path | None:
    """Return where the server of a slice keeps its kernels' names; None without Jupyter."""
    folder = os.environ.get("JUPYTER_RUNTIME_DIR")
    if not folder:
        try:
            from jupyter_core.paths import jupyter_runtime_dir
        except ImportError:
            return None
        folder = jupyter_runtime_dir()
    return Path(folder) / f"nbgpu-kernels-{slice_id}.json"


def write_names(slice_id: str, sessions: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Say what this process, a Jupyter server, calls its kernels: ``{kernel_id: {"name", "path", ...}}``. Return the file.

    Raises
    ------
    OSError
        The runtime directory is not to be written.
    """
    path = file_of(slice_id)
    if path is None:
        return None
    names = {kernel_id: {"name": session.get("name"), "path": session.get("path")} for kernel_id, session in sessions.items()}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump({"pid": os.getpid(), "kernels": names}, file)
    fresh.replace(path)
    return path


def read_names(slice_id: str) -> dict[str, KernelName]:
    """Return what the server of a slice calls its kernels; empty when there is none, or none that this user may ask."""
    path = file_of(slice_id)
    try:
        if path is None or path.stat().st_size > _LARGEST_BYTES:
            return {}
        content = json.loads(path.read_bytes())
        os.kill(int(content["pid"]), 0)
        kernels = content["kernels"].items()
    except (OSError, OverflowError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    names: dict[str, KernelName] = {}
    for kernel_id, one in kernels:
        with contextlib.suppress(AttributeError, TypeError):
            name, notebook = one.get("name"), one.get("path")
            if _KERNEL_ID.fullmatch(kernel_id) and isinstance(name, str) and name:
                names[kernel_id] = KernelName(name[:_LONGEST], notebook[:_LONGEST] if notebook else None)
    return names
