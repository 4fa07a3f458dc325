"""What the tests of the notebook side share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], seconds: float = 5) -> object:
    """Wait until `condition` holds, and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "not within the deadline"
        await asyncio.sleep(0.01)
    return result
