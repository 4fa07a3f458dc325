"""What loads the pool in `bench/pool.py`: clients that speak as little HTTP as they can, so that the server is what is measured."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

SIZES = (125, 250, 333, 500, 1000)
WEIGHTS = (25, 30, 15, 15, 15)
"""Parts of a device that are asked for, and how often: the notebook mix of `bench/notebooks.py`."""


@dataclass
class Found:
    """What was measured."""

    seconds: float = 0.0
    pairs: int = 0
    latencies: list[float] = field(default_factory=list)
    """Of single requests, seconds."""
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Count another stretch of time too."""
        self.seconds += other.seconds
        self.pairs += other.pairs
        self.latencies += other.latencies
        self.wrong += other.wrong

    def percentile_ms(self, share: float) -> float:
        """Return the latency below which this share of the requests was."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Connection(asyncio.Protocol):
    """One connection that is kept: `ask` one request at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        """Put the answer together."""
        self._data += data
        head, there, body = self._data.partition(b"\r\n\r\n")
        if not there:
            return
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
        if len(body) >= length and self._answer is not None:
            self._data = b""
            self._answer.set_result((int(head[9:12]), body))

    async def ask(self, message: bytes) -> tuple[int, bytes]:
        """Send; return status and body."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return await self._answer

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.abort()


def message(method: str, path: str, token: str, body: bytes = b"") -> bytes:
    """Return a request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nhost: pool\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def pairs(port: int, token: str, seconds: float, connections: int, seed: int, users: int = 5000) -> Found:
    """Acquire and release, on some connections at once, each one pair after the other; parts only, as a part of each device is in use."""
    found = Found()
    end = time.perf_counter() + seconds
    begun = time.perf_counter()

    async def one(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        connection = await connect(port)
        count = 0
        while time.perf_counter() < end:
            count += 1
            request_id = f"pair-{seed}-{number}-{count}"
            owner = {"hub": "hub", "user": f"user-{rng.randrange(users)}", "server": f"s{number}"}
            asked = {"request_id": request_id, "owner": owner, "compute_milli": rng.choices(SIZES[:4], WEIGHTS[:4])[0], "namespace": "jhub"}
            sent = time.perf_counter()
            status, body = await connection.ask(message("POST", "/v1/requests", token, json.dumps(asked).encode()))
            taken = time.perf_counter()
            if status != 200 or b'"state":"reserved"' not in body:
                found.wrong.append(f"acquire: {status} {body[:200]!r}")
            gone, body = await connection.ask(message("DELETE", f"/v1/requests/{request_id}", token))
            found.latencies += [taken - sent, time.perf_counter() - taken]
            if gone != 200 or b'"state":"gone"' not in body:
                found.wrong.append(f"release: {gone} {body[:200]!r}")
            found.pairs += 1
        connection.close()

    await asyncio.gather(*(one(number) for number in range(connections)))
    found.seconds = time.perf_counter() - begun
    return found


async def empty(port: int, path: str, seconds: float, connections: int) -> float:
    """Return how many requests a second an empty handler answers."""
    end = time.perf_counter() + seconds
    begun = time.perf_counter()
    asked = message("POST", path, "none", json.dumps({"request_id": "x" * 20, "owner": {"hub": "hub", "user": "user-1"}}).encode())
    count = 0

    async def one() -> None:
        nonlocal count
        connection = await connect(port)
        while time.perf_counter() < end:
            status, _ = await connection.ask(asked)
            assert status == 200
            count += 1
        connection.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return count / (time.perf_counter() - begun)


async def connect(port: int) -> Connection:
    """Open a connection."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


class Stream(asyncio.Protocol):
    """A client that follows its request's events."""

    def __init__(self, asked: bytes) -> None:
        self.asked = asked
        self.events = 0
        self.lost = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for them."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.asked)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self.lost = True

    def data_received(self, data: bytes) -> None:
        """Count."""
        self.events += data.count(b"event: grant")
