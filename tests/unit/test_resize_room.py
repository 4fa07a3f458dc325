"""What is free beside a running server's slice: asked by anybody who can use the server, as often as they like."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.models import Grant, Owner
from nbgpu_spawner import resize

OWNER = {"hub": "h", "user": "mallory", "server": ""}


class Pool:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    async def grant(self, request_id: str) -> Grant:
        self.calls["grant"] += 1
        await asyncio.sleep(0.01)
        return Grant.model_validate({"request": {"request_id": request_id, "owner": OWNER, "compute_milli": 250}, "state": "queued"})

    async def devices(self, max_age_seconds: float = 5.0) -> list[Any]:
        self.calls["devices"] += 1
        return []


class Server:
    """As much of a spawner as is asked for."""

    gpu_resize = True

    def __init__(self, pool: Pool):
        self.pool = pool

    async def gpu_profiles(self) -> list[Any]:
        return []

    def gpu_running_request(self) -> str:
        return "request-1"

    def gpu_owner(self) -> Any:
        return Owner.model_validate(OWNER)


def test_however_often_a_server_asks_the_pool_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question was two calls of the six that the hub makes at a time for all, one of them all of the pool's devices."""
    now = 100.0
    monkeypatch.setattr(resize, "time", SimpleNamespace(monotonic=lambda: now))
    pool = Pool()
    one, other = Server(pool), Server(pool)

    async def many(server: Any) -> None:
        for _ in range(3):
            found = await asyncio.gather(*(resize.room(server) for _ in range(20)))
            assert found == [{"devices": []}] * 20

    asyncio.run(many(one))
    assert pool.calls == {"grant": 1, "devices": 1}
    asyncio.run(many(other))
    assert pool.calls == {"grant": 2, "devices": 2}, "each server has an answer of its own"
    now += resize.ROOM_SECONDS + 0.1
    asyncio.run(many(one))
    assert pool.calls == {"grant": 3, "devices": 3}, "and a new one after a second"
