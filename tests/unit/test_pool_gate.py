"""A replica that may not lead any more: what only reads is answered from the cache, what is acted upon is not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbgpu_pool.gate import Gate


@pytest.mark.parametrize(
    ("leads", "path", "status"),
    [(True, "/v1/asks", 200), (False, "/v1/asks", 503), (False, "/v1/devices", 200), (True, "/v1/devices", 200)],
)
def test_what_is_asked_back_is_told_by_who_leads_alone(leads: bool, path: str, status: int) -> None:
    said: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        said.append(message)

    gate = Gate(lambda: leads, lambda: "other")
    gate.app = app
    asyncio.run(gate({"type": "http", "method": "GET", "path": path, "headers": []}, None, send))  # type: ignore[arg-type]
    assert said[0]["status"] == status
