"""Whether a process that a hub names may be taken into a slice: what is in a slice is limited, stopped and ended with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from nbgpu.procs import user_of

from . import procs
from .live import LiveSlice
from .procs import Process


def why_not(live: LiveSlice, pid: int, slices: Iterable[LiveSlice]) -> str | None:
    """Return why a process is not adopted into `live`, in words that follow "it"; None where it may be, or has ended.

    Parameters
    ----------
    slices : iterable of LiveSlice
        All of this node's.
    """
    process, uid = procs.find(pid), user_of(pid)
    if process is None or uid is None:
        return None
    if uid not in _accounts(live):
        return f"runs as user {uid}, and the slice was prepared for user {_accounts(live)[0]}"
    others = [one for one in slices if one is not live]
    roots = {root.pid for one in others for root in one.record.roots if Process(root.pid, root.start_time).alive()}
    if not roots.isdisjoint(_upwards(pid)) or any(one.holds(process) for one in others):
        return "belongs to another slice"
    if pid in _above({os.getpid(), *roots}):
        return "has started the agent, or a server that belongs to another slice"
    return None


def _accounts(live: LiveSlice) -> tuple[int, ...]:
    """Return the users whose processes it may hold: without one of its own those of the agent, and root, who may run there as well."""
    return (os.geteuid(), 0) if live.record.uid is None else (live.record.uid,)


def _upwards(pid: int | None) -> Iterator[int]:
    """Yield a process and what it descends from."""
    while pid:
        yield pid
        pid = procs.parent(pid)


def _above(pids: Iterable[int]) -> set[int]:
    """Return `pids` and all that they descend from."""
    found: set[int] = set()
    for one in pids:
        for pid in _upwards(one):
            if pid in found:
                break
            found.add(pid)
    return found
