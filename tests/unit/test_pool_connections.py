"""Event streams leave connections to plain requests, whoever keeps them open."""

from __future__ import annotations

import contextlib

import pytest
from fastapi.routing import APIRoute
from starlette.responses import StreamingResponse

from nbgpu_pool import api
from nbgpu_pool.auth import Principal
from nbgpu_pool.connections import MOST_CONNECTIONS, Streams, TooManyStreams, of_all, of_one
from nbgpu_pool.front import STREAMS


@pytest.mark.parametrize("connections", [10, 100, 341, 1000, MOST_CONNECTIONS])
def test_all_streams_together_leave_some_to_requests(connections: int) -> None:
    hubs = [Principal("hub", f"hub-{number}") for number in range(3)]
    streams = Streams(lambda: connections)
    opened = dict.fromkeys(hubs, 0)
    with contextlib.ExitStack() as held:
        for hub in hubs:
            with contextlib.suppress(TooManyStreams):
                while opened[hub] < 2 * connections:
                    held.enter_context(streams.one(hub))
                    opened[hub] += 1
        assert sum(opened.values()) == of_all(connections) < connections
        assert opened[hubs[0]] == of_one("hub", connections), "one alone leaves streams to the others"
        assert opened[hubs[1]] > 0
        with pytest.raises(TooManyStreams, match="The pool has no more event streams") as refused:
            held.enter_context(streams.one(hubs[2]))
        assert refused.value.status == 503
        with pytest.raises(TooManyStreams, match="One hub may have"):
            held.enter_context(streams.one(hubs[0]))
    held.enter_context(streams.one(hubs[0]))  # the control: what is closed counts no more


def test_who_only_reads_has_few_and_a_large_hub_thousands() -> None:
    streams = Streams(lambda: MOST_CONNECTIONS)
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(streams.one(Principal("read")))
        with pytest.raises(TooManyStreams, match="All with the role 'read' together may have 100") as refused:
            held.enter_context(streams.one(Principal("read")))
        assert refused.value.status == 429
        for _ in range(5000):
            held.enter_context(streams.one(Principal("hub", "large")))


def test_every_event_stream_is_counted() -> None:
    """A new route that streams has to be named as those are."""
    routes = [route for route in api.router.routes if isinstance(route, APIRoute)]
    found = {route.path for route in routes if route.response_class is StreamingResponse}
    assert len(found) == 3
    assert all(path.endswith(STREAMS) for path in found)
