"""The calls of every server's start, wait and end, without what FastAPI does around a route: with it a call costs twice as much.

They are the routes of `api` all the same: whatever is not as it should be (a body that is no request, an id that is none) goes on to
those, which say what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pydantic import BaseModel, ValidationError

from nbgpu.errors import NbgpuError
from nbgpu.http import App, Receive, Reread, Scope, Send, read_body
from nbgpu.models import Grant, Request

from .auth import Principal
from .front import BODY_BYTES
from .problems import answer_of

PATH = "/v1/requests"
_ONE = re.compile(rf"{PATH}/([a-z0-9][a-z0-9-]{{6,46}}[a-z0-9])")
_EVENTS = re.compile(rf"{_ONE.pattern}/events")
_HELD = {b"": False, b"held=true": True}
_JSON = [b"application/json"]

Acquire = Callable[[Request, Principal], Grant]
Release = Callable[[str, Principal], "Grant | None"]
Follow = Callable[[str, Principal, bool], App]


class Hot:
    """ASGI middleware inside `Front`.

    Parameters
    ----------
    acquire, release, follow : callable
        What ``POST /v1/requests``, ``DELETE /v1/requests/{request_id}`` and ``GET /v1/requests/{request_id}/events`` do.
    """

    def __init__(self, app: App, acquire: Acquire, release: Release, follow: Follow):
        self._app, self._acquire, self._release, self._follow = app, acquire, release, follow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass it on."""
        method, path = scope["method"], scope["path"]
        speaker: Principal = scope["state"]["speaker"]
        try:
            if method == "POST" and path == PATH and [value for name, value in scope["headers"] if name == b"content-type"] == _JSON:
                body = await read_body(receive, BODY_BYTES) or b""
                receive = Reread(body, receive)
                asked = _read(body)
                if asked is not None:
                    await _answer(send, self._acquire(asked, speaker))
                    return
            elif method == "DELETE" and (found := _ONE.fullmatch(path)):
                await _answer(send, self._release(found[1], speaker))
                return
            elif method == "GET" and (found := _EVENTS.fullmatch(path)) and scope["query_string"] in _HELD:
                await self._follow(found[1], speaker, _HELD[scope["query_string"]])(scope, receive, send)
                return
        except NbgpuError as error:
            await answer_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _read(body: bytes) -> Request | None:
    try:
        return Request.model_validate_json(body)
    except ValidationError:
        return None


async def _answer(send: Send, found: BaseModel | None) -> None:
    body = b"" if found is None else found.model_dump_json().encode()
    headers = [] if found is None else [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 204 if found is None else 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
