"""Tells whoever may look at a file that this process still gets round: what strangers can keep busy, a port, is no place to ask."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

SECONDS = 5.0
"""Between two touches; the chart's probes take a minute without one for the end."""
T = TypeVar("T")


async def beside(path: Path | None, work: Coroutine[Any, Any, T], seconds: float = SECONDS) -> T:
    """Do `work`, and meanwhile renew the time of the file `path`, where there is one, for as long as the event loop gets round."""
    touching = asyncio.create_task(_touch(path, seconds)) if path is not None else None
    try:
        return await work
    finally:
        if touching is not None:
            touching.cancel()


async def _touch(path: Path, seconds: float) -> None:
    while True:
        with contextlib.suppress(OSError):  # a full disk is no hung process
            path.touch()
        await asyncio.sleep(seconds)
