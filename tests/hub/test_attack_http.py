"""The bounds that hold before a program's own code sees a request, each with a control: the same with the bound off."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

import nbgpu.http
from nbgpu.errors import NbgpuError
from nbgpu.http import PatientProtocol
from nbgpu_pool import front, main
from nbgpu_pool.api import create_app
from nbgpu_pool.auth import Guard, Principal, Token
from nbgpu_pool.ledger import AgentLedger
from nbgpu_pool.service import Service

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]
SECRETS = ["a-secret-of-the-hub", "a-secret-of-the-agent", "a-secret-of-a-reader"]
HUB = f"Authorization: Bearer {SECRETS[0]}\r\n"


def guard() -> Guard:
    return Guard([Token(secret, Principal(role)) for secret, role in zip(SECRETS, ("hub", "agent", "read"), strict=True)])  # type: ignore[arg-type]


@asynccontextmanager
async def served(place: Path, protocol: type[H11Protocol]) -> AsyncIterator[str]:
    """The pool's application with a guard, at a Unix socket, so that no port is needed."""
    app = create_app(Service(AgentLedger(place / "agent.sock")), guard())
    path = str(place / "s")
    server = uvicorn.Server(uvicorn.Config(app, uds=path, http=protocol, lifespan="off", log_config=None, ws="none"))
    server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield path
    server.should_exit = server.force_exit = True
    await task


async def closed_after(path: str, begin: bytes, dribble: bytes, most_seconds: float) -> tuple[float, bytes]:
    """Send `begin`, then `dribble` byte by byte; return when the server closed (most_seconds: it did not) and what it said."""
    reader, writer = await asyncio.open_unix_connection(path)
    began = time.monotonic()
    writer.write(begin)
    said = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        while not said.done() and time.monotonic() - began < most_seconds:
            writer.write(dribble)
            await writer.drain()
            await asyncio.wait([said], timeout=0.05)
    took = time.monotonic() - began
    writer.close()
    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
        if not said.done():
            said.cancel()
        return took, await said
    return took, b""


@pytest.mark.parametrize(("protocol", "held"), [(PatientProtocol, False), (H11Protocol, True)], ids=["bounded", "control"])
async def test_a_head_that_never_ends(runtime: Path, monkeypatch: pytest.MonkeyPatch, protocol: type[H11Protocol], held: bool) -> None:
    monkeypatch.setattr(nbgpu.http, "HEAD_SECONDS", 0.3)
    async with served(runtime, protocol) as path:
        for begin in (b"", b"GET /healthz HTTP/1.1\r\nX-Slow: ", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /v1"):
            took, _ = await closed_after(path, begin, b"a", 0.9)
            assert (took >= 0.9) == held, (begin, took)
        reader, writer = await asyncio.open_unix_connection(path)  # who is waited for no longer is served all the same
        for _ in range(5):
            await asyncio.sleep(0.1)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize(("seconds", "held"), [(0.3, False), (60, True)], ids=["bounded", "control"])
async def test_a_body_that_comes_slowly(runtime: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, held: bool) -> None:
    monkeypatch.setattr(front, "BODY_SECONDS", seconds)
    begin = f"POST /v1/requests HTTP/1.1\r\nHost: a\r\n{HUB}Content-Length: 1000\r\n\r\n".encode()
    async with served(runtime, PatientProtocol) as path:
        took, said = await closed_after(path, begin, b"a", 0.9)
    assert (took >= 0.9) == held
    assert held or said.startswith(b"HTTP/1.1 408 "), said


@pytest.mark.parametrize(("limit", "status"), [(1024**2, b"413"), (1024**3, b"400")], ids=["bounded", "control"])
async def test_a_long_body(runtime: Path, monkeypatch: pytest.MonkeyPatch, limit: int, status: bytes) -> None:
    monkeypatch.setattr(front, "BODY_BYTES", limit)
    body = b"x" * 2 * 1024**2
    begin = f"POST /v1/requests HTTP/1.1\r\nHost: a\r\n{HUB}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with served(runtime, PatientProtocol) as path:
        _, said = await closed_after(path, begin + body, b"", 5)
    assert said.split(b" ")[1] == status


@pytest.mark.parametrize(("most", "served_"), [(20, 20), (1000, 30)], ids=["bounded", "control"])
async def test_more_connections_than_there_may_be(runtime: Path, monkeypatch: pytest.MonkeyPatch, most: int, served_: int) -> None:
    monkeypatch.setattr(nbgpu.http, "MOST_CONNECTIONS", most)
    async with served(runtime, PatientProtocol) as path:
        streams = [await asyncio.open_unix_connection(path) for _ in range(30)]
        answered = 0
        for reader, writer in streams:
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
                answered += (await reader.read(12)) == b"HTTP/1.1 200"
        for _, writer in streams:
            writer.close()
    assert answered == served_


async def test_connections_are_bounded_by_the_descriptors_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the hub on the other socket, and the pool itself, need some when strangers have taken all of theirs."""
    protocol = main.Protocol.__new__(main.Protocol)
    for limit, most in ((4096, 1792), (18_288, 8000), (10**6, 8000), (resource.RLIM_INFINITY, 8000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert protocol.most_connections() == most


async def test_every_token_is_compared_whole_and_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by timing: each look compares a digest of what was given with the digest of every token, whatever was given."""
    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return real(one, other)

    one = guard()
    monkeypatch.setattr(hmac, "compare_digest", noting)
    known = SECRETS[0]
    for given in (None, "", "Bearer", "Bearer ", f"Bearer {known[:8]}", f"Bearer {known[:-1]}", f"Bearer {known}x", "Bearer " + "x" * 9000,
                  f"Basic {known}", f"Bearer {known}", f"Bearer {SECRETS[2]}", "Bearer \udcff"):  # fmt: skip
        seen.clear()
        with contextlib.suppress(NbgpuError):
            assert one.principal(given).role in ("hub", "read")
        assert len(seen) == len(SECRETS), given
        assert {len(part) for pair in seen for part in pair} == {32}, "digests, so that not even the length tells"
        assert len({other for _, other in seen}) == 1
    with pytest.raises(NbgpuError):
        one.principal(f"Basic {known}")
    assert known not in repr(Token(known, Principal("hub")))
