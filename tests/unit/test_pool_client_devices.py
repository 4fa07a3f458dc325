"""The hub asks the pool for its devices once for all who want to know; who has left is not missed."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from nbgpu_spawner.client import NO_ANSWER, PoolClient, PoolUnavailable


class Slow(PoolClient):
    async def _call(self, method: str, path: str, body: Any = None) -> bytes:
        await asyncio.sleep(0.02)
        raise PoolUnavailable(NO_ANSWER)


def test_an_error_that_nobody_waits_for_any_more_is_not_logged_as_lost() -> None:
    async def ask() -> list[str]:
        said: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(str(context["message"])))
        waits = asyncio.ensure_future(Slow(socket_path="/nowhere").devices())
        await asyncio.sleep(0)
        waits.cancel()
        await asyncio.sleep(0.05)
        gc.collect()
        return said

    assert asyncio.run(ask()) == []
