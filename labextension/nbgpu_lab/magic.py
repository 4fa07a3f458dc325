"""``%gpu``: the slice in two lines of text."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nbgpu.errors import NbgpuError
from nbgpu.quantities import format_memory, format_memory_of, format_share

from .client import SliceClient


def register(ipython: Any) -> None:
    """Add the magic to an IPython shell."""
    ipython.register_magic_function(lambda line: print(answer(line)), "line", "gpu")


def answer(line: str) -> str:
    """Return what ``%gpu`` prints: the slice's use; with ``keep`` or ``keep off`` whether this notebook keeps its GPU while it is idle."""
    words = line.split()
    if not words:
        return summary()
    if words not in (["keep"], ["keep", "off"]):
        return "%gpu shows what is used; %gpu keep: this notebook keeps its GPU while it is idle; %gpu keep off: no more."
    return keep(len(words) == 1)


def keep(protected: bool) -> str:
    """Have the agent never park this kernel, or let it be parked again (docs/idle.md)."""
    kernel_id = os.environ.get("NBGPU_KERNEL_ID")
    if not kernel_id:
        return "No notebook kernel in a GPU slice: there is nothing to keep."
    said = _ask("PUT", f"/v1/idle/kernels/{kernel_id}", {"protected": protected})
    if isinstance(said, NbgpuError):
        return "Idle notebooks keep their GPU here anyway." if said.code == "not-offered" else said.message
    return "This notebook keeps its GPU while it is idle." if protected else "This notebook's GPU may be given to others while it is idle."


def summary() -> str:
    """Return the slice's use now, as text; also works in a kernel whose own loop runs."""
    usage = _ask("GET", "/v1/usage")
    if isinstance(usage, NbgpuError):
        return usage.message
    return "\n".join(describe(usage, os.environ.get("NBGPU_KERNEL_ID")))


def _ask(method: str, path: str, body: object = None) -> Any:
    """Return the agent's answer, or the error that it is."""
    socket_path = os.environ.get("NBGPU_SOCKET")
    if not socket_path:
        return NbgpuError("No GPU slice here: this process was not started inside one.", code="no-slice", status=404)
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, SliceClient(socket_path).request(method, path, body)).result()
        except NbgpuError as error:
            return error


def describe(usage: dict[str, Any], kernel_id: str | None) -> list[str]:
    """Return one line per device of a ``Usage``, and one for the kernel that asks."""
    lines = []
    for device in usage["devices"]:
        memory = format_memory_of(device["memory_used_bytes"], device["memory_limit_bytes"])
        share = format_share(device["compute_limit_milli"])
        lines.append(f"GPU {device['index']} ({device['model']}): {memory} used, compute {device['utilization_percent']} % of {share}")
    for kernel in usage["kernels"]:
        if kernel_id and kernel["kernel_id"] == kernel_id:
            own = sum(device["memory_used_bytes"] for device in kernel["devices"])
            cap = kernel["limit"]["memory_bytes"]
            lines.append(f"This kernel: {format_memory(own)}" + (f" of its own limit of {format_memory(cap)}" if cap is not None else ""))
    return lines
