"""A way to the API server that a test can cut, hold up and falsify."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import uvicorn
from place_kit import Place
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


class Gateway:
    """A way to the API server that a pool takes and a test can cut: plain HTTP on loopback, forwarded with the test's own rights.

    Attributes
    ----------
    before, after : callable
        Asked with method and path before a call is passed on, and when its answer is there; `after` may hold it back. A returned status
        is answered instead; ``"drop"`` cuts the connection.
    """

    def __init__(self, place: Place):
        self._place = place
        self.before: Callable[[str, str], int | str | None] = lambda method, path: None
        self.after: Callable[[str, str], int | str | None] = lambda method, path: None
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._cut = asyncio.Event()
        place.do(self._open())

    def open(self) -> None:
        """Let calls through again."""
        self._place.do(self._open())

    def close(self) -> None:
        """Refuse connections, and cut those that there are."""
        self._place.do(self._close())

    async def _open(self) -> None:
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        self._cut = asyncio.Event()
        app = Starlette(routes=[Route("/{path:path}", self._pass, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])])
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=0)
        self._server = uvicorn.Server(config)
        config.load()
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        self._task = asyncio.create_task(self._server.serve([listening]))
        while not self._server.started:
            await asyncio.sleep(0.01)

    async def _close(self) -> None:
        assert self._server is not None
        assert self._task is not None
        self._cut.set()
        self._server.should_exit = self._server.force_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _pass(self, http: Request) -> Response:
        content = await http.body()  # before anything waits: a call that is held goes on though its client has left
        told = await asyncio.to_thread(self.before, http.method, http.url.path)
        if told is not None:
            return self._instead(told)
        inner = self._place.kube._http  # the test's own client, with its rights
        headers = {name: value for name, value in http.headers.items() if name in ("content-type", "accept", "accept-encoding")}
        url = http.url.path + (f"?{http.url.query}" if http.url.query else "")
        timeout = httpx.Timeout(30, read=120)
        request = inner.build_request(http.method, url, content=content, headers=headers, timeout=timeout)
        answer = await inner.send(request, stream=True)
        if http.query_params.get("watch"):
            return StreamingResponse(self._stream(answer), answer.status_code, media_type="application/json")
        content = await answer.aread()
        await answer.aclose()
        told = await asyncio.to_thread(self.after, http.method, http.url.path)
        return self._instead(told) if told is not None else Response(content, answer.status_code, media_type="application/json")

    def _instead(self, told: int | str) -> Response:
        if isinstance(told, str):
            return StreamingResponse(self._broken(), 200)
        return Response(json.dumps({"kind": "Status", "code": told, "message": "the test wants it so"}), told)

    async def _broken(self) -> AsyncIterator[bytes]:
        yield b"{"
        raise ConnectionError("cut")

    async def _stream(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        cut, chunks = asyncio.ensure_future(self._cut.wait()), answer.aiter_raw()
        try:
            while True:
                chunk = asyncio.ensure_future(anext(chunks, b""))
                await asyncio.wait([cut, chunk], return_when=asyncio.FIRST_COMPLETED)
                if not chunk.done() or chunk.exception() or not chunk.result():
                    chunk.cancel()
                    return
                yield chunk.result()
        finally:
            cut.cancel()
            chunk.add_done_callback(lambda one: one.cancelled() or one.exception())  # one that nobody waits for any more may fail
            await answer.aclose()
