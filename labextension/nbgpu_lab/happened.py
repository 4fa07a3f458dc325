"""What the agent does not tell of: memory that a kernel gave back by ending, a limit that slows. Seen from one look to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nbgpu.quantities import format_memory, format_time

from .kernels import in_a_sentence

Json = dict[str, Any]
THROTTLED_PART = 0.95
THROTTLED_SECONDS = 60.0
"""A kernel that has used this part of its own compute limit for so long would be faster with a higher one."""
AGAIN_SECONDS = 600.0
MOST_SECONDS_BETWEEN = 15.0
"""Looks that are further apart say nothing of the time between them."""


class Happened:
    """Compares each look at the slice's usage (`nbgpu_lab.sampler`) with the one before."""

    def __init__(self) -> None:
        self._held: dict[str, Json] = {}
        self._looked = 0.0
        self._full_since: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def look(self, usage: Json) -> list[Json]:
        """Return the notices that this look gives cause to (`nbgpu_lab.notices.Notices.add`)."""
        now = float(usage["time"])
        kernels = {kernel["kernel_id"]: kernel for kernel in usage["kernels"] if kernel["kernel_id"] is not None}
        near = 0 <= now - self._looked <= MOST_SECONDS_BETWEEN
        found = list(self._ended(kernels)) if near else []
        if not near:
            self._full_since.clear()
        found += self._throttled(kernels, now)
        self._held = {kernel_id: kernel for kernel_id, kernel in kernels.items() if memory_bytes(kernel)}
        self._looked = now
        return found

    def _ended(self, kernels: dict[str, Json]) -> Iterator[Json]:
        """Kernels that held memory, and none of whose processes is there any more."""
        for kernel_id, before in self._held.items():
            after = kernels.get(kernel_id) or {"pids": [], "devices": []}
            known = before["pids"] and (after["pids"] or not memory_bytes(after))  # the agent may not know whose memory it is
            if known and not set(before["pids"]) & set(after["pids"]):
                freed = memory_bytes(before)
                message = f"{title(before)} ended: the {format_memory(freed)} of GPU memory that it held are free again."
                yield notice("kernel-ended", message, before, freed_bytes=freed)

    def _throttled(self, kernels: dict[str, Json], now: float) -> Iterator[Json]:
        """Kernels whose own compute limit has slowed them for a while."""
        for known in (self._full_since, self._told):
            for gone in known.keys() - kernels.keys():
                del known[gone]
        for kernel_id, kernel in kernels.items():
            limit = kernel["limit"]["compute_milli"]
            most = max((device["compute_used_milli"] for device in kernel["devices"]), default=0)
            if limit is None or most < THROTTLED_PART * limit:
                self._full_since.pop(kernel_id, None)
                continue
            since = self._full_since.setdefault(kernel_id, now)
            if now - since >= THROTTLED_SECONDS and now - self._told.get(kernel_id, -AGAIN_SECONDS) >= AGAIN_SECONDS:
                self._told[kernel_id] = now
                used = f"{title(kernel)} has used all of its own compute limit ({format_time(limit)}) for a minute"
                message = f"{used}. Raise the limit to make it faster."
                yield notice("throttled", message, kernel, limit_milli=limit, used_milli=most)


def memory_bytes(kernel: Json) -> int:
    """Return what a kernel holds on all devices."""
    return sum(device["memory_used_bytes"] for device in kernel["devices"])


def title(kernel: Json) -> str:
    """Return what a kernel is called in a sentence."""
    return in_a_sentence(kernel.get("name") or "") or f"Notebook kernel {kernel['kernel_id'][:8]}…"


def notice(kind: str, message: str, kernel: Json, **data: int) -> Json:
    """Return a notice about a kernel: for people to know, not to act on."""
    about = {name: kernel.get(name) for name in ("kernel_id", "name", "path")}
    return {"kind": kind, "level": "info", "message": message, **about, "data": data}
