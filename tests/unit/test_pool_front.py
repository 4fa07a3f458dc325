"""What comes before the pool's routes: many who change something keep nobody waiting who only looks."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from fastapi.routing import APIRoute

from nbgpu_pool import api, front
from nbgpu_pool.front import Front

CROWD = 200


async def receive() -> dict[str, Any]:
    """Be a client that has sent a request without a body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: dict[str, Any]) -> None:
    """Take the answer."""


def call(door: Front, method: str, path: str) -> asyncio.Task[None]:
    """Begin a request."""
    return asyncio.ensure_future(door({"type": "http", "method": method, "path": path, "headers": []}, receive, send))


async def order(paths: list[tuple[str, str]]) -> list[str]:
    """Return the paths of requests that arrive at the same moment, in the order in which they are served."""
    served: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        served.append(scope["path"])

    door = Front(app)
    await asyncio.wait_for(asyncio.gather(*(call(door, *path) for path in paths)), 10)
    return served


@pytest.mark.asyncio
@pytest.mark.parametrize("crowd", ["/v1/launches", "/v1/release", "/v1/requests/0123/bind"])
@pytest.mark.parametrize("look", [("POST", "/v1/availability"), ("GET", "/v1/requests")])
async def test_who_looks_does_not_wait_for_a_crowd(crowd: str, look: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    arriving = [*[("POST", crowd)] * CROWD, look]
    served = await order(arriving)
    assert len(served) == CROWD + 1
    assert served.index(look[1]) <= 2 * front.AT_ONCE
    monkeypatch.setattr(front, "READS", {("POST", crowd), look})
    assert (await order(arriving)).index(look[1]) == CROWD, "the control: first come, first served"


@pytest.mark.asyncio
async def test_giving_back_does_not_wait_for_starts_that_wait() -> None:
    """Eight starts wait for a ledger that does not answer."""
    never = asyncio.Event()
    served: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/launches":
            await never.wait()
        served.append(scope["path"])

    door = Front(app)
    starts = [call(door, "POST", "/v1/launches") for _ in range(3 * front.AT_ONCE)]
    await asyncio.wait_for(asyncio.gather(call(door, "DELETE", "/v1/requests/0123"), call(door, "POST", "/v1/release")), 5)
    assert sorted(served) == ["/v1/release", "/v1/requests/0123"]
    never.set()
    await asyncio.wait_for(asyncio.gather(*starts), 5)


def test_no_route_needs_a_thread() -> None:
    """FastAPI runs what is not async in a thread of a pool, which waits for its turn twice."""
    routes = [route for route in api.router.routes if isinstance(route, APIRoute)]
    assert len(routes) > 10
    for route in routes:
        for one in (route.endpoint, *(each.call for each in route.dependant.dependencies)):
            assert inspect.iscoroutinefunction(one), f"{route.path}: {one}"
