"""The kernels of this Jupyter server, of any language, busy ones too: what each belongs to and what it does."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jupyter_core.utils import ensure_async

from .activity import Activity

Json = dict[str, Any]
UNKNOWN: Json = {"name": None, "path": None, "type": None, "state": None, "state_seconds": None, "kernel_name": None, "language": None}
"""What is said of a kernel that the server does not know (any more), and of processes that are no kernel's."""

STARTED: dict[str, Json] = {}
"""Names and paths of the notebooks of kernels, as their provisioner was told: the server's own list has them a moment later."""
_MOST = 1000
ACTIVITY = Activity()
_FROM_THE_RIGHT = ("R", "AL", "AN")
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x1f\x7f-\x9f]")


def in_a_sentence(name: str) -> str:
    """Return a name without what would turn the sentence around it to another direction, or break it; letters stay, of any script.

    One that has letters which are written from right to left is marked to stand by itself: at the beginning it would turn all of it.
    """
    plain = _TURNS.sub("", name)
    return f"\u2068{plain}\u2069" if any(unicodedata.bidirectional(letter) in _FROM_THE_RIGHT for letter in plain) else plain


def starts(kernel_id: str, notebook: str, root: str) -> None:
    """A kernel is about to start for the file `notebook`, below the server's directory `root`."""
    path = Path(notebook)
    if path.suffix == ".ipynb" and path.is_relative_to(root or "/"):
        STARTED[kernel_id] = {"name": path.name, "path": path.relative_to(root or "/").as_posix()}
    while len(STARTED) > _MOST:
        del STARTED[next(iter(STARTED))]


async def kernels_of(serverapp: Any) -> dict[str, Json]:
    """Return the server's kernels by id, each with the name, path and type of what it belongs to, its state and its language.

    Kernels without a session (started through the API alone) go by the name of their kernelspec.
    """
    kernels: dict[str, Json] = {}
    for kernel in await ensure_async(serverapp.kernel_manager.list_kernels()):
        manager = None
        with suppress(Exception):  # one that is just going, or another manager's
            manager = serverapp.kernel_manager.get_kernel(kernel["id"])
        found = UNKNOWN | {"name": kernel["name"], "type": "kernel", "state": kernel.get("execution_state")}
        seconds = _idle_seconds(kernel["id"], manager, found["state"])
        kernels[kernel["id"]] = found | _spec(manager, kernel["name"]) | {"state_seconds": seconds}
    ACTIVITY.keep(set(kernels))
    for session in await serverapp.session_manager.list_sessions():
        kernel = session.get("kernel") or {}
        if kernel.get("id") in kernels:
            path = session["path"] if isinstance(session["path"], str) else None  # a client may have written anything there
            name = session["name"] or (path or "").rsplit("/", 1)[-1] or kernel["name"]
            kernels[kernel["id"]] |= {"name": str(name), "path": path, "type": session["type"]}
    return kernels


def _spec(manager: Any, name: str) -> Json:
    """Return what people call a kernel and its language: "Python 3", "python"."""
    spec: Any = None
    with suppress(Exception):  # the kernelspec may have been removed since
        spec = manager.kernel_spec
    return {"kernel_name": getattr(spec, "display_name", None) or name, "language": getattr(spec, "language", None) or None}


def _idle_seconds(kernel_id: str, manager: Any, state: str | None) -> float | None:
    """Return how long an idle or starting kernel has been so, by this server's clock alone; None: it is neither, or nobody knows."""
    since = ACTIVITY.last(kernel_id, manager)
    if state not in ("idle", "starting") or since is None:
        return None
    return round(max(0.0, (datetime.now(timezone.utc) - since).total_seconds()), 1)
