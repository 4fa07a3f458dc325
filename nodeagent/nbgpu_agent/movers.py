"""Background work on slices that moves memory: one at a time for each key, and an error of it is logged, not lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Hashable, Iterator
from typing import Any, Generic, TypeVar

log = logging.getLogger("nbgpu.agent")
Key = TypeVar("Key", bound=Hashable)


class Movers(Generic[Key]):
    """Tasks by what they work on."""

    def __init__(self) -> None:
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tasks)

    def start(self, key: Key, work: Coroutine[Any, Any, None], failed: str) -> None:
        """Begin `work`; `failed` is logged when it meets an error."""
        task = self._tasks[key] = asyncio.create_task(work)

        def done(ended: asyncio.Task[None]) -> None:
            if self._tasks.get(key) is ended:
                del self._tasks[key]
            if not ended.cancelled() and ended.exception() is not None:
                log.error("%s", failed, exc_info=ended.exception())

        task.add_done_callback(done)

    async def close(self) -> None:
        """Leave everything as it is: the next agent goes on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
