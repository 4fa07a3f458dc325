"""What the pool's and the agent's HTTP servers share: bounds that hold before a program's own code sees a request.

Only servers import this: it needs uvicorn, which `nbgpu` itself does not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEAD_SECONDS = 5.0
"""How long the head of a request may take to arrive, from the connection or its first byte on."""
MOST_CONNECTIONS = 1000
"""Of one listening socket; those beyond are closed at once, so that a flood does not take every descriptor of the process."""
DRAINED = 8
"""So many times the allowed body is read, and dropped, of one that is too long: who is still sending would not see the answer."""


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits for ever for the rest of a request's head: this one for `HEAD_SECONDS`."""

    _late: asyncio.TimerHandle | None = None

    def most_connections(self) -> int:
        """Return how many connections there may be at a time."""
        return MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections():
            transport.abort()
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Wait no longer once the head is there; a byte more does not start the time anew."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._wait_for_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


async def read_body(receive: Receive, most_bytes: int) -> bytes | None:
    """Return a request's body; None when it has more than `most_bytes`. ConnectionError when the client left."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left")
        part: bytes = message.get("body", b"")
        size += len(part)
        if size <= most_bytes:
            parts.append(part)
        if not message.get("more_body") or size > DRAINED * most_bytes:
            return b"".join(parts) if size <= most_bytes else None


class Reread:
    """`receive` of an app whose request's body has been read already."""

    def __init__(self, body: bytes, receive: Receive):
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


async def answer_error(send: Send, status: int, error: dict[str, object], headers: dict[str, str] | None = None) -> None:
    """Answer with an error as all of nbgpu's APIs do (`NbgpuError.as_json`), and close: what is still sent is not read."""
    body = json.dumps(error).encode()
    shown = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in shown.items()]})
    await send({"type": "http.response.body", "body": body})
