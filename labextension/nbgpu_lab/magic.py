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
    ipython.register_magic_function(lambda line: print(summary()), "line", "gpu")


def summary() -> str:
    """Return the slice's use now, as text; also works in a kernel whose own loop runs."""
    socket_path = os.environ.get("NBGPU_SOCKET")
    if not socket_path:
        return "No GPU slice here: this process was not started inside one."
    with ThreadPoolExecutor(1) as thread:
        try:
            usage = thread.submit(asyncio.run, SliceClient(socket_path).get("/v1/usage")).result()
        except NbgpuError as error:
            return error.message
    return "\n".join(describe(usage, os.environ.get("NBGPU_KERNEL_ID")))


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
