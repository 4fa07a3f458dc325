"""Who waits for an agent's changes: what is told together, and how soon."""

from __future__ import annotations

import asyncio
import time

import pytest

from nbgpu_agent.events import Changes

pytestmark = pytest.mark.asyncio

SOON, LATER = 0.03, 0.4


async def seconds_until_told(changes: Changes, *steps: tuple[float, float | None]) -> float:
    """Wait while each step's change (or the end, None) happens after its pause; return how long the wait took."""
    start = time.monotonic()
    waiting = asyncio.create_task(changes.above(changes.generation, 5))
    for pause, within in steps:
        await asyncio.sleep(pause)
        if within is None:
            changes.close()
        else:
            changes.note(within)
    await waiting
    return time.monotonic() - start


async def test_a_change_is_told_when_it_is_due() -> None:
    assert LATER <= await seconds_until_told(Changes(), (0, LATER)) < 2
    assert SOON <= await seconds_until_told(Changes(), (0, SOON)) < LATER


async def test_an_urgent_change_does_not_wait_for_one_that_has_time() -> None:
    assert await seconds_until_told(Changes(), (0, LATER), (0.05, SOON)) < LATER
    assert await seconds_until_told(Changes(), (0, SOON), (0, LATER)) < LATER, "nor is it put off by a later one"


async def test_changes_that_go_on_do_not_put_the_answer_off() -> None:
    assert await seconds_until_told(Changes(), *[(0.05, LATER)] * 12) < 0.05 * 12 + LATER / 2, "by the first one's time"


async def test_what_is_above_already_is_told_at_once() -> None:
    changes = Changes()
    before = changes.generation
    changes.note(LATER)
    start = time.monotonic()
    await changes.above(before, 5)
    assert time.monotonic() - start < LATER


async def test_the_end_and_the_deadline_end_the_wait() -> None:
    assert await seconds_until_told(Changes(), (0, 5), (0.05, None)) < 1
    assert await seconds_until_told(Changes(), (0.05, None)) < 1
    changes = Changes()
    start = time.monotonic()
    await changes.above(changes.generation, 0.1)
    assert 0.1 <= time.monotonic() - start < 1
