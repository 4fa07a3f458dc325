"""Tells the agent which kernels are busy, so that an idle notebook can give its GPU back until it is used (docs/idle.md)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nbgpu.errors import NbgpuError

from .client import SliceClient

LOOK_SECONDS = 0.5
TELL_SECONDS = 10.0
"""How often the agent is told what it knows."""
NOT_OFFERED_SECONDS = 60.0
EXTENSION = "nbgpu_lab.kernel_wait"


async def tell_kernels(client: SliceClient, kernels: Callable[[], Awaitable[dict[str, dict[str, Any]]]]) -> None:
    """Tell, for ever, which kernels are busy: at once when that has changed; where nothing is ever parked ask now and then."""
    told: dict[str, bool] = {}
    told_at = -TELL_SECONDS
    busy: dict[str, bool] = {}
    while True:
        pause = LOOK_SECONDS
        with suppress(Exception):  # the server's own list fails: what was known last stands
            busy = {kernel_id: one.get("state") != "idle" for kernel_id, one in (await kernels()).items()}
        if busy != told or time.monotonic() - told_at >= TELL_SECONDS:
            try:
                await client.put("/v1/idle", {"kernels": busy})
                told, told_at = busy, time.monotonic()
            except NbgpuError as error:
                pause = NOT_OFFERED_SECONDS if error.status == 404 else 2 * LOOK_SECONDS
        await asyncio.sleep(pause)


async def waiting_argument(client: SliceClient, argv: list[str]) -> list[str]:
    """Return what a Python kernel is started with so that its cells wait while the slice is parked; nothing where that is not offered."""
    if not any(word in ("ipykernel_launcher", "ipykernel") for word in argv):
        return []
    try:
        await client.get("/v1/idle")
    except NbgpuError:
        return []
    return [f"--IPKernelApp.extra_extensions={EXTENSION}"]
