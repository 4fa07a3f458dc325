"""Server-sent events: a request's grant while it waits, and the pool's generation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, cast

from starlette.responses import Response, StreamingResponse

from nbgpu.http import Receive, Scope, Send
from nbgpu.models import Grant, GrantState, Hints

from .auth import Principal
from .books import Entry
from .service import Service

REFRESH_SECONDS = 5.0
"""How often a waiting request's estimate is looked at again; also keeps the connection alive."""
HINTS_SECONDS = 1.0
"""Hints are looked for no more often."""
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""Of an event stream that no proxy holds back."""


def stream(source: AsyncIterator[str]) -> StreamingResponse:
    """Return `source` as an event stream."""
    return StreamingResponse(source, headers={name.decode(): value.decode() for name, value in HEADERS})


class Following(Response):
    """`grant` events until a request is no longer queued, with `held` until it has ended, or until the client has left.

    Sent as ASGI messages: a stream of Starlette's costs three times the memory, and a whole course may wait here.

    Parameters
    ----------
    touch : bool
        Who follows it asks for it: it stays in the queue.
    """

    def __init__(self, service: Service, entry: Entry, *, touch: bool, held: bool = False):
        super().__init__()
        self._service, self._entry, self._touch, self._held = service, entry, touch, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._follow(receive, send)
        await send({"type": "http.response.body", "body": b""})

    async def _follow(self, receive: Receive, send: Send) -> None:
        service, entry = self._service, self._entry
        last: tuple[object, ...] | None = None
        while not service.closing and not _left(receive):
            now = service.clock()
            if self._touch:
                service.core.touch(entry, now)
            current = service.core.entry(entry.slice_id) or entry
            generation = service.core.generation
            grant = service.core.grant(current, now)
            shown = grant.state, grant.position, _rough(grant), grant.reason, grant.note, grant.slice, grant.resizing
            if shown != last:
                last = shown
                await _send(send, f"event: grant\ndata: {grant.model_dump_json()}\n\n")
                if grant.state == GrantState.gone or (grant.state != GrantState.queued and not self._held):
                    return
            elif not await service.changed(generation, REFRESH_SECONDS, entry.slice_id):
                await _send(send, ": still waiting\n\n")


async def _send(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def _left(receive: Receive) -> bool:
    """Return whether the client has hung up, without waiting for it to."""
    while True:
        told = cast("Coroutine[None, None, dict[str, Any]]", receive())
        try:
            told.send(None)
        except StopIteration as done:
            if done.value["type"] == "http.disconnect":
                return True
        else:  # it would wait
            told.close()
            return False


async def of_pool(service: Service) -> AsyncIterator[str]:
    """Yield a `change` event now and whenever availability may have changed."""
    while not service.closing:
        generation = service.core.generation
        yield f"event: change\ndata: {json.dumps({'generation': generation})}\n\n"
        while not service.closing and not await service.changed(generation, REFRESH_SECONDS):
            yield ": nothing new\n\n"


def _rough(grant: Grant) -> int | None:
    """A change of the estimate by less than half a minute is not worth an event."""
    return None if grant.wait_seconds is None else round(grant.wait_seconds / 30)


async def of_hints(service: Service, speaker: Principal) -> AsyncIterator[str]:
    """Yield a `hints` event now and whenever another idle server could make room, or for another (`nbgpu_pool.hints`)."""
    last: object = None
    while not service.closing:
        generation, found = service.core.generation, hints_for(service, speaker)
        shown = [one.model_copy(update={"idle_seconds": 0.0}) for one in found.hints]
        if shown != last:
            last = shown
            yield f"event: hints\ndata: {found.model_dump_json()}\n\n"
        elif not await service.changed(generation, REFRESH_SECONDS):
            yield ": nothing new\n\n"
        await asyncio.sleep(HINTS_SECONDS)


def hints_for(service: Service, speaker: Principal) -> Hints:
    """Return the hints that a speaker may see: of its own hub's people, on both sides."""
    found = service.hints()
    seen = [one for one in found.hints if speaker.sees(one.owner.hub) and speaker.sees(one.slice_owner.hub)]
    return found if len(seen) == len(found.hints) else found.model_copy(update={"hints": seen})
