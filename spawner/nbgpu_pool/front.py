"""What comes before every route: who speaks, whether that role may change anything, and how much it may send.

Here rather than in the routes, so that a new route is closed until somebody opens it, and so that a stranger's body is not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from nbgpu.errors import NbgpuError
from nbgpu.http import App, Receive, Reread, Scope, Send, answer_error, read_body

from .auth import ANY_HUB, Guard, Principal

FOR_EVERYBODY = {("GET", "/healthz"), ("GET", "/openapi.json")}
READS = {("POST", "/v1/availability")}
"""What only reads though it is no GET."""
AT_ONCE = 8
"""Calls under way that change something, each some milliseconds of work: when a whole course starts its servers, more of them would end no
sooner, and keep waiting who only looks. Those that wait for the ledger are counted apart, so that nobody's giving back waits for it.
"""
WAITING = ("/launches", "/prepare", "/bind", "/resize")
BODY_BYTES = 1024**2
BODY_SECONDS = 10.0


class Front:
    """ASGI middleware of the pool. Leaves the `Principal` in the request's state, as ``speaker``.

    Parameters
    ----------
    guard : Guard, optional
        Checks bearer tokens; None on the Unix socket, whose callers have the role *hub* for every hub.
    """

    def __init__(self, app: App, guard: Guard | None = None):
        self._app = app
        self._guard = guard
        self._starts, self._others = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        try:
            scope.setdefault("state", {})["speaker"] = self._speaker(scope)
            body = await asyncio.wait_for(read_body(receive, BODY_BYTES), BODY_SECONDS)
            if body is None:
                raise NbgpuError(f"The body of a request may have {BODY_BYTES} bytes.", code="too-large", status=413, field="body")
        except NbgpuError as error:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
            await answer_error(send, error.status, error.as_json(), headers)
        except (asyncio.TimeoutError, TimeoutError):
            late = NbgpuError(f"The body did not arrive within {BODY_SECONDS:g} seconds.", code="too-slow", field="body")
            await answer_error(send, 408, late.as_json())
        except ConnectionError:
            return
        else:
            async with self._turn(scope["method"], scope["path"]):
                await self._app(scope, Reread(body, receive), send)

    def _speaker(self, scope: Scope) -> Principal | None:
        asked = scope["method"], scope["path"]
        if self._guard is None:
            return ANY_HUB
        if asked in FOR_EVERYBODY:
            return None
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        speaker = self._guard.principal(given[0].decode("latin-1") if given else None)
        if scope["method"] != "GET" and asked not in READS:
            speaker.must_be_hub()
        return speaker

    @asynccontextmanager
    async def _turn(self, method: str, path: str) -> AsyncGenerator[None, None]:
        if method == "GET" or (method, path) in READS:
            yield
            return
        async with self._starts if path.endswith(WAITING) else self._others:
            await asyncio.sleep(0)  # those that never wait would else all be served before the loop looks at anything else
            yield
