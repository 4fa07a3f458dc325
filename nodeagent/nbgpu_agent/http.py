"""Many Unix sockets, one event loop: uvicorn's HTTP protocol, without one uvicorn server each.

Each socket has a `Door` with its own bounds, so that one slice's flood costs the others nothing: beyond its rate a slice
gets 429, and who goes on all the same is not read from, nor accepted, until the second is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.http import App, PatientProtocol, Receive, Reread, Scope, Send, answer_error, read_body

HEADER_BYTES = 16 * 1024
KEEP_ALIVE_SECONDS = 75
ACCEPTS_AT_ONCE = 16
PATIENCE = 25
"""Requests over the rate in one second that are answered with 429 before the door shuts for as long."""
SHUT_SECONDS = 1.0


class Bounds:
    """How much one socket may ask for; None = as much as it likes."""

    def __init__(self, connections: int, body_bytes: int, requests_per_second: float | None):
        self.connections = connections
        self.body_bytes = body_bytes
        self.requests_per_second = requests_per_second


class Bucket:
    """So many a second, as many at once; None = no bound."""

    def __init__(self, per_second: float | None):
        self._rate = per_second
        self._tokens = per_second or 0.0
        self._filled = 0.0

    def take(self, now: float) -> bool:
        """Return whether there is one at `now`, seconds of the loop's clock."""
        if self._rate is None:
            return True
        self._tokens = min(self._rate, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Door:
    """One listening socket: its connections, its rate, the app behind it."""

    def __init__(
        self, path: Path | socket.socket, app: App, state: dict[str, Any], bounds: Bounds, uid: int | None = None, anyone: bool = False
    ):
        self.path = path if isinstance(path, Path) else None
        self._app = app
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._config = Config(self, lifespan="off", log_config=None, access_log=False, ws="none", http="h11", proxy_headers=False)
        self._config.timeout_keep_alive = KEEP_ALIVE_SECONDS
        self._config.h11_max_incomplete_event_size = HEADER_BYTES
        self._config.load()
        self._config.loaded_app = self
        self._server_state = ServerState()
        self._state = state
        self._requests = Bucket(bounds.requests_per_second)
        # Who opens a connection for each request is not refused before it is counted.
        self._connects = Bucket(None if bounds.requests_per_second is None else 2 * bounds.requests_per_second)
        self._over = 0
        self._over_since = 0.0
        self._paused: list[Any] = []
        self._shut: asyncio.TimerHandle | None = None
        self._connecting: set[asyncio.Task[Any]] = set()
        self._socket = _listen(path, uid, anyone) if isinstance(path, Path) else path
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # out of descriptors: try again when there may be some
                self._shut_for_a_while()
                return
            # Requests of clients that left are still worked on: who waits for events, leaves and comes again counts twice.
            open_now = max(len(self._server_state.connections), len(self._server_state.tasks)) + len(self._connecting)
            if open_now >= self._bounds.connections or not self._allowed(self._connects):
                connection.close()
                continue
            connection.setblocking(False)
            task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _protocol(self) -> PatientProtocol:
        return PatientProtocol(self._config, self._server_state, self._state, self._loop)

    def _allowed(self, bucket: Bucket) -> bool:
        """Return whether the socket may be served now; shut the door on who does not stop asking."""
        now = self._loop.time()
        if bucket.take(now):
            return True
        if now - self._over_since > SHUT_SECONDS:
            self._over, self._over_since = 0, now
        self._over += 1
        if self._over >= PATIENCE:
            self._shut_for_a_while()
        return False

    def _shut_for_a_while(self) -> None:
        if self._shut is not None:
            return
        self._loop.remove_reader(self._socket.fileno())
        # Those that wait for an answer are paused already, and must stay so: what they send would pile up here.
        self._paused = [protocol for protocol in self._server_state.connections if not protocol.flow.read_paused]  # pyright: ignore
        for protocol in self._paused:
            protocol.flow.pause_reading()
        self._shut = self._loop.call_later(SHUT_SECONDS, self._open_again)

    def _open_again(self) -> None:
        self._shut = None
        self._loop.add_reader(self._socket.fileno(), self._accept)
        for protocol in self._paused:
            if protocol in self._server_state.connections:
                protocol.flow.resume_reading()
        self._paused = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request within the bounds."""
        if not self._allowed(self._requests):
            slower = NbgpuError("Too many requests: slow down and try again in a second.", code="too-many-requests")
            await answer_error(send, 429, slower.as_json())
            return
        try:
            body = await read_body(receive, self._bounds.body_bytes)
        except ConnectionError:
            return
        if body is None:
            large = NbgpuError(f"The body of a request may have {self._bounds.body_bytes} bytes.", code="too-large")
            await answer_error(send, 413, large.as_json())
        else:
            await self._app(scope, Reread(body, receive), send)

    def close(self) -> set[asyncio.Task[Any]]:
        """Stop listening, end the connections, remove the socket; return the requests that are still being answered."""
        if self._shut is not None:
            self._shut.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for protocol in list(self._server_state.connections):
            protocol.shutdown()  # pyright: ignore
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        return set(self._server_state.tasks)


def listen_tcp(address: str) -> socket.socket:
    """Return a listening socket for ``ADDRESS:PORT``; without an address all of this machine's.

    Raises
    ------
    InvalidValue, OSError
        It is no such thing; it cannot be had.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidValue("--metrics-listen", address, "ADDRESS:PORT, or :PORT for all addresses")
    host = host.strip("[]")
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    listener = socket.create_server((host, int(port)), family=family, dualstack_ipv6=dual, backlog=64)
    listener.setblocking(False)
    return listener


def _listen(path: Path, uid: int | None, anyone: bool) -> socket.socket:
    """Return a listening socket that only its owner (`uid`, None = the agent's user), or anyone, may open; what was in its place goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    before = os.umask(0o111 if anyone else 0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    if uid is not None:
        os.chown(path, uid, -1)
    listener.listen(64)
    return listener
