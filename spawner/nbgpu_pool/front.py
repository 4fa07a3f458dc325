"""What comes before every route: who speaks, whether that role may change anything, and how much it may send.

Here rather than in the routes, so that a new route is closed until somebody opens it, and so that a stranger's body is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from nbgpu.errors import NbgpuError
from nbgpu.http import App, Receive, Reread, Scope, Send, answer_error, read_body

from .auth import ANY_HUB, Guard, Principal
from .connections import RETRY_SECONDS, Streams

FOR_EVERYBODY = {("GET", "/healthz"), ("GET", "/openapi.json")}
READS = {("POST", "/v1/availability")}
"""What only reads though it is no GET."""
STREAMS = "/events"
"""How the paths of event streams end."""
AT_ONCE = 8
"""Calls that change something, of those that arrive at the same moment, that begin before the loop looks at anything else: each is some
milliseconds of work, and when a whole course starts its servers nobody who only looks waits for all of it.
"""
BODY_BYTES = 1024**2
BODY_SECONDS = 10.0


class Front:
    """ASGI middleware of the pool. Leaves the `Principal` in the request's state, as ``speaker``.

    Parameters
    ----------
    guard : Guard, optional
        Checks bearer tokens; None on the Unix socket, whose callers have the role *hub* for every hub.
    streams : Streams, optional
        Bounds the event streams; None = as many connections as the process may have.
    """

    def __init__(self, app: App, guard: Guard | None = None, streams: Streams | None = None):
        self._app = app
        self._guard = guard
        self._streams = streams or Streams()
        self._begin = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        try:
            scope.setdefault("state", {})["speaker"] = self._speaker(scope)
            body = await _in_time(receive) if _has_body(scope) else b""
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
            if scope["method"] != "GET" and (scope["method"], scope["path"]) not in READS:
                async with self._begin:  # to begin only: nobody waits for an answer of the ledger, or of a client that does not read
                    await asyncio.sleep(0)
            await self._bounded(scope, Reread(body, receive), send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; an event stream counts as one while it lasts."""
        speaker: Principal | None = scope["state"]["speaker"]
        with contextlib.ExitStack() as held:
            if scope["method"] == "GET" and scope["path"].endswith(STREAMS) and speaker is not None:
                try:
                    held.enter_context(self._streams.one(speaker))
                except NbgpuError as error:
                    await answer_error(send, error.status, error.as_json(), {"retry-after": str(RETRY_SECONDS)})
                    return
            await self._app(scope, receive, send)

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


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in scope["headers"])


async def _in_time(receive: Receive) -> bytes | None:
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(read_body(receive, BODY_BYTES), BODY_SECONDS)
    async with asyncio.timeout(BODY_SECONDS):  # `wait_for` makes a task of it, a sixth of all that a call costs
        return await read_body(receive, BODY_BYTES)
