"""Who waits for changes: some at a time, their own grant at once, and not for a client that has left."""

from __future__ import annotations

import asyncio
import random

import pytest
from test_pool_held import Pool
from test_pool_idle import IdlePool

from nbgpu_pool import events, service
from nbgpu_pool.quotas import Limits, Quotas, Tally
from nbgpu_pool.service import Service
from nbgpu_pool.shapes import Amount
from nbgpu_pool.state import Seen, Settings


class Nothing:
    who = "The GPU node"

    async def close(self) -> None:
        pass


def served(pool: Pool) -> Service:
    found = Service(Nothing(), Settings(), clock=lambda: pool.now)  # type: ignore[arg-type]
    found.core = pool.core
    return found


@pytest.mark.asyncio
async def test_many_are_woken_some_at_a_time_and_who_is_granted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "WAKING_SECONDS", 3600.0)
    pool = Pool()
    there = served(pool)
    first, second = pool.ask(1000).request.request_id, pool.ask(1000).request.request_id
    others = [asyncio.create_task(there.changed(pool.core.generation, 3600.0)) for _ in range(10 * service.WOKEN_AT_ONCE)]
    own = asyncio.create_task(there.changed(pool.core.generation, 3600.0, second))
    await asyncio.sleep(0)
    pool.core.cancel(first, "h", pool.now)
    there.settle()
    assert await asyncio.wait_for(own, 5)
    assert sum(one.done() for one in others) in (service.WOKEN_AT_ONCE - 1, service.WOKEN_AT_ONCE)
    monkeypatch.setattr(service, "WAKING_SECONDS", 0.001)
    there._go_on_waking()
    assert all(await asyncio.wait_for(asyncio.gather(*others), 5))
    assert not await there.changed(pool.core.generation, 0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize("stays", [False, True])
async def test_a_client_that_has_left_keeps_nothing_in_the_queue(monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    monkeypatch.setattr(events, "REFRESH_SECONDS", 0.01)
    pool = Pool()
    there = served(pool)
    pool.ask(1000)
    entry = pool.core.known(pool.ask(1000).request.request_id)
    told: list[bytes] = []
    left = asyncio.Event()

    async def receive() -> dict[str, object]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        told.append(message.get("body", b""))

    task = asyncio.create_task(events.Following(there, entry, touch=True)({"type": "http"}, receive, send))
    while len(told) < 4:
        await asyncio.sleep(0.005)
    assert told[1].startswith(b"event: grant")
    if not stays:
        left.set()
        await asyncio.wait_for(task, 5)
    assert task.done() is not stays
    task.cancel()


def test_what_counts_for_quotas_is_kept_up_to_date_through_parking_and_moves() -> None:
    """Compared with counting all of it anew, with the groups that have a quota changing too."""
    luck = random.Random(7)
    pool = IdlePool(devices=4, queue_per_user=10**4)
    names = ["staff", "students"]
    for _ in range(300):
        keys = list(pool.seen)
        act = luck.random()
        if act < 0.4 or not keys:
            grant = pool.ask(luck.choice([125, 250, 500]), luck.choice("abc"), groups=luck.sample(names, luck.randint(0, 2)))
            if grant.slice is not None:
                key = grant.request.request_id
                pool.seen[key] = pool_seen(pool, key)
        elif act < 0.6:
            pool.idle(luck.choice(keys))
        elif act < 0.75:
            for key in pool.asked_to_park():
                if luck.random() < 0.7:
                    pool.park(key)
        elif act < 0.85:
            for key in [key for key in keys if pool.seen[key].full is not None]:
                pool.want(key)
            pool.told_to_restore()
        else:
            del pool.seen[luck.choice(keys)]
        pool.sync(1.0)
        groups = frozenset(luck.choice([names, names[:1], []]))
        quotas = Quotas(groups=dict.fromkeys(groups, Limits(limit_milli=4000)))
        plain = Tally.of(quotas, pool.core.books.holdings(groups, granted_only=True)).held
        assert pool.core.books.granted_by(groups) == {account: part for account, part in plain.items() if part != Amount()}


def pool_seen(pool: Pool, key: str) -> Seen:
    """The server of a grant starts."""
    entry = pool.core.known(key)
    seen = Seen(pool.core.begin_prepare(entry), "running")
    pool.core.end_prepare(entry, None, True, pool.now)
    return seen
