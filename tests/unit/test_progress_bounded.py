"""The events of a start that waits: one who presses a button again and again does not fill the hub's memory with them."""

from __future__ import annotations

import asyncio
from typing import Any

from nbgpu_spawner.waiting import MOST_EVENTS, Progress


def test_so_many_events_are_kept_and_nobody_misses_the_last() -> None:
    """Each refused "take a smaller share" is another event, of some kB, for as long as the wait lasts."""

    async def play() -> tuple[list[str], list[str], int]:
        progress = Progress()
        slow: list[str] = []
        reader = progress.events(lambda: progress)
        for number in range(3):
            progress.tell(f"event {number}")
        slow.append((await anext(reader))["message"])
        for number in range(3, 5 * MOST_EVENTS):
            progress.tell(f"event {number}")
        progress.settle()
        slow += [event["message"] async for event in reader]
        late = [event["message"] async for event in progress.events(lambda: progress)]
        return slow, late, progress.readers

    slow, late, readers = asyncio.run(play())
    last = [f"event {number}" for number in range(4 * MOST_EVENTS, 5 * MOST_EVENTS)]
    assert late == last
    assert slow == ["event 0", *last], "who reads slowly misses some in between, none twice"
    assert readers == 0


def test_few_are_all_read_in_order() -> None:
    async def play() -> list[Any]:
        progress = Progress()
        for number in range(10):
            progress.tell(f"event {number}")
        progress.settle()
        return [event["message"] async for event in progress.events(lambda: progress)]

    assert asyncio.run(play()) == [f"event {number}" for number in range(10)]
