"""Server-sent events: a request's grant while it waits, and the pool's generation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from nbgpu.models import Grant, GrantState

from .books import Entry
from .service import Service

REFRESH_SECONDS = 5.0
"""How often a waiting request's estimate is looked at again; also keeps the connection alive."""


def stream(source: AsyncIterator[str]) -> StreamingResponse:
    """Return `source` as an event stream that no proxy holds back."""
    return StreamingResponse(source, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


async def of_request(service: Service, entry: Entry, *, touch: bool, held: bool = False) -> AsyncIterator[str]:
    """Yield `grant` events until the request is no longer queued, with `held` until it has ended; `touch`: who follows it asks for it."""
    last: tuple[object, ...] | None = None
    while not service.closing:
        now = service.clock()
        if touch:
            service.core.touch(entry, now)
        current = service.core.entry(entry.slice_id) or entry
        generation = service.core.generation
        grant = service.core.grant(current, now)
        shown = grant.state, grant.position, _rough(grant), grant.reason, grant.note, grant.slice, grant.resizing
        if shown != last:
            last = shown
            yield f"event: grant\ndata: {grant.model_dump_json()}\n\n"
            if grant.state == GrantState.gone or (grant.state != GrantState.queued and not held):
                return
        elif not await service.changed(generation, REFRESH_SECONDS):
            yield ": still waiting\n\n"


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
