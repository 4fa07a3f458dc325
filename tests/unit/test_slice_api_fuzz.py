"""Whatever comes through a slice's socket is answered or refused; the agent serves the next request all the same.

Requests that Hypothesis makes up, against the routes and against the bytes of HTTP. ``-m soak`` makes twenty times as many.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbgpu.models import KernelLimit
from nbgpu_agent.http import Bounds, Door
from nbgpu_agent.slice_api import make_app

httpx = pytest.importorskip("httpx")
FEW, MANY = 150, 3000
BODY_BYTES = 1000


class Agent:
    """As much of an agent as the routes ask for."""

    def __init__(self) -> None:
        self.limits: dict[str, KernelLimit] = {}
        said = SimpleNamespace(model_dump_json=lambda **_: "{}")
        history = SimpleNamespace(as_json=lambda seconds: [seconds])
        self.live = SimpleNamespace(
            id="slice-00", slice=said, limits=said, usage=lambda: said, history=history,
            record=SimpleNamespace(kernel_limits=self.limits, claim=None), owner_resumes=True,
        )  # fmt: skip
        self.slices = {"slice-00": self.live}
        self.settings = SimpleNamespace(backend="limiter")
        self.events = self.parking = self
        self.away = SimpleNamespace(suspend=self.move, resume=self.move, model=lambda live, kernel_id: None)

    async def wait(self, after: int, wait_seconds: float, slice_id: str) -> list[Any]:
        """Play the event log."""
        assert -1 <= after <= 2**53
        assert 0 <= wait_seconds <= 30
        assert slice_id == "slice-00"
        return []

    async def resume(self, slice_id: str, pid: int | None, by: str) -> None:
        """Play a slice with no suspended process."""
        assert pid is None or 0 < pid < 2**31

    def model(self, live: Any) -> Any:
        """Say how idle it is."""
        return live.slice

    def usage(self, live: Any) -> Any:
        """Say what is used."""
        return live.usage()

    def want(self, live: Any) -> None:
        """Play one that is wanted back."""

    def hear(self, live: Any, kernels: dict[str, bool]) -> None:
        """Take what is said of kernels."""
        assert all(isinstance(busy, bool) for busy in kernels.values())

    def protect(self, live: Any, kernel_id: str, protected: bool) -> None:
        """Take a word on a kernel."""
        assert 0 < len(kernel_id) < 40
        assert isinstance(protected, bool)

    async def move(self, live: Any, kernel_id: str) -> None:
        """Play a kernel that is moved at once, to and fro."""
        assert 0 < len(kernel_id) < 40
        assert all(letter.isalnum() or letter in "-_." for letter in kernel_id)

    def set_kernel_limit(self, live: Any, kernel_id: str, limit: KernelLimit) -> KernelLimit:
        """Keep it, as the agent does."""
        assert 0 < len(kernel_id) < 40
        assert all(letter.isalnum() or letter in "-_." for letter in kernel_id)
        self.limits[kernel_id] = limit
        return limit


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from(["", "nan", "inf", "-0", "1e309", "0x10", "\uff11\uff12", "9" * 400]), st.text()
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(["compute_milli", "memory_bytes", "x"]), inner)),
    max_leaves=8,
)
BODIES = st.one_of(
    st.binary(max_size=300),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(["kernels", "protected", "pid"]), VALUES, max_size=1).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b'{"kernels": {"a": true}}', b'{"protected": true}', b'{"pid": 4711}', b'{"memory_bytes": 1048576}']),
    st.sampled_from([b"", b"{", b"[" * 20000, b'{"compute_milli": ' + b"1" * 5000 + b"}"]),
)
ROUTES = ["/v1/slice", "/v1/usage", "/v1/history", "/v1/kernels", "/v1/events", "/v1/resume", "/v1/idle", "/v1/idle/want"]
METHODS = ["GET", "PUT", "POST", "DELETE", "OPTIONS"]
PATHS = st.one_of(
    st.sampled_from(ROUTES),
    st.text(min_size=1, max_size=60).map(lambda name: f"/v1/kernels/{name}"),
    st.text(min_size=1, max_size=60).map(lambda name: f"/v1/idle/kernels/{name}"),
    st.text(min_size=1, max_size=60).map(lambda name: f"/v1/kernels/{name}/suspend"),
    st.text(max_size=40).map(lambda name: f"/{name}"),
)
QUERIES = st.dictionaries(st.one_of(st.sampled_from(["seconds", "after", "wait_seconds"]), st.text(max_size=5)), NUMBERS, max_size=3)


def quoted(text: str) -> str:
    """For a URL that httpx takes: it refuses some itself."""
    return quote(text.encode("utf-8", "replace"), safe="/")


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])
def test_no_request_breaks_a_route(examples: int) -> None:
    agent = Agent()
    app, answers = make_app(agent), set[int]()  # type: ignore[arg-type]

    async def with_slice(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"state": {"slice": agent.live}}, receive, send)

    async def ask(method: str, path: str, query: dict[str, Any], body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(with_slice), base_url="http://slice", trust_env=False, verify=False
        ) as client:
            return await client.request(
                method,
                "/" + quoted(path).lstrip("/"),
                params={quoted(k): str(v).encode("utf-8", "replace") for k, v in query.items()},
                content=body,
            )

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(METHODS), PATHS, QUERIES, BODIES)
    def play(method: str, path: str, query: dict[str, Any], body: bytes) -> None:
        answer = asyncio.run(ask(method, path, query, body))
        answers.add(answer.status_code)
        assert answer.status_code < 500
        if answer.status_code >= 400 and method != "HEAD":
            assert set(answer.json()["error"]) >= {"code", "message"}

    for path in [*ROUTES, "/v1/kernels/a", "/v1/kernels/a/suspend", "/v1/kernels/a/resume", "/v1/idle/kernels/a"]:  # each for certain
        for method in METHODS:
            assert asyncio.run(ask(method, path, {}, b"{}")).status_code < 500, f"{method} {path}"
    play()
    assert answers >= {200, 400, 404}, "the requests came nowhere near"


@pytest.fixture
def door(runtime: Path) -> Iterator[Path]:
    """A slice's socket with the routes behind it, served by another thread."""
    loop, agent, path = asyncio.new_event_loop(), Agent(), runtime / "api.sock"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def open_it() -> Door:
        bounds = Bounds(connections=8, body_bytes=BODY_BYTES, requests_per_second=None)
        return Door(path, make_app(agent), {"slice": agent.live}, bounds)  # type: ignore[arg-type]

    async def close_it(made: Door) -> None:
        for task in made.close():
            task.cancel()
        await asyncio.sleep(0)

    made = asyncio.run_coroutine_threadsafe(open_it(), loop).result(10)
    yield path
    asyncio.run_coroutine_threadsafe(close_it(made), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


GOOD = b"GET /v1/slice HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
PIECES = st.one_of(
    st.sampled_from(
        [
            b"GET /v1/slice HTTP/1.1\r\n",
            b"PUT /v1/kernels/a HTTP/1.1\r\n",
            b"Host: a\r\n",
            b"\r\n",
            b"Content-Length: 5\r\n",
            b"Content-Length: -1\r\n",
            b"Content-Length: 99999999999999999999\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"ffffffffffffffff\r\n",
            b"0\r\n\r\n",
            b"Expect: 100-continue\r\n",
            b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
            b"X: " + b"a" * 5000 + b"\r\n",
            b"{}",
            b"\0",
        ]
    ),
    st.binary(max_size=100),
)


def say(path: Path, words: bytes) -> bytes:
    """Send these bytes and half-close; return what comes back until the end, or within a second."""
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(1)
        one.connect(str(path))
        said = b""
        with contextlib.suppress(OSError):
            one.sendall(words)
            one.shutdown(socket.SHUT_WR)
            while piece := one.recv(65536):
                said += piece
        return said


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])
def test_no_bytes_break_the_door(door: Path, examples: int) -> None:
    assert say(door, GOOD).startswith(b"HTTP/1.1 200")

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(PIECES, max_size=8))
    def play(pieces: list[bytes]) -> None:
        said = say(door, b"".join(pieces))
        assert not said.startswith(b"HTTP/1.1 5"), said
        assert b"Traceback" not in said
        assert say(door, GOOD).startswith(b"HTTP/1.1 200")

    play()
