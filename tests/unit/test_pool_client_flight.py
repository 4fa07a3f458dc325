"""What a hub asks its pool for many at a time is asked once: a slow pool has no pile of the same question."""

from __future__ import annotations

import asyncio

import pytest

from nbgpu_spawner.client import PoolClient, PoolUnavailable


class Slow(PoolClient):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.away = False

    async def _call(self, method: str, path: str, body: object = None) -> bytes:
        self.asked += 1
        await self.may_answer.wait()
        if self.away:
            raise PoolUnavailable("away")
        return b"[]"


@pytest.mark.asyncio
async def test_who_asks_for_the_devices_joins_the_question_that_is_on_its_way() -> None:
    pool = Slow()
    waiting = [asyncio.ensure_future(pool.devices()) for _ in range(50)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # one that goes takes the answer from nobody
    await asyncio.sleep(0.05)
    pool.may_answer.set()
    assert await asyncio.gather(*waiting[1:]) == [[]] * 49
    assert pool.asked == 1
    await pool.devices(max_age_seconds=0)
    assert pool.asked == 2, "control: an answer that is too old is asked for again"


@pytest.mark.asyncio
async def test_a_question_that_failed_is_asked_again() -> None:
    pool = Slow()
    pool.away = True
    pool.may_answer.set()
    for asked in (1, 2):
        with pytest.raises(PoolUnavailable):
            await pool.devices()
        assert pool.asked == asked
