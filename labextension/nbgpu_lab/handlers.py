"""HTTP routes of the Jupyter server: ``nbgpu/api/...`` (docs/interfaces.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web

from nbgpu.errors import InvalidValue, NbgpuError, Unavailable
from nbgpu.kernel_limits import kernel_limit

from . import hub
from .askback import AskedBack
from .notices import Notices
from .sampler import NO_SLICE, Sampler

HISTORY_SECONDS = 600
_MOST_HISTORY_SECONDS = 3600
_MAX_BODY_BYTES = 4096


def _answers(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[None]]:
    """Finish the request with what `method` returns, or with the error that it raises, as JSON."""

    @wraps(method)
    async def answer(self: SliceHandler, *args: str) -> None:
        try:
            result = await method(self, *args)
        except NbgpuError as error:
            self.set_status(error.status)
            result = error.as_json()
        self.finish(json.dumps(result))

    return answer


class SliceHandler(APIHandler):
    """What all routes share. `sampler` is None on a server without a slice."""

    auth_resource = "nbgpu"
    _track_activity = False  # a page that polls must not keep an idle server alive

    def initialize(self, sampler: Sampler | None, notices: Notices, asked: AskedBack | None) -> None:
        """Take what the application was made with."""
        self.sampler, self.asked = sampler, asked
        self.notices = notices

    def slice(self) -> Sampler:
        """Return the sampler, or refuse: there is no slice."""
        if self.sampler is None:
            raise NbgpuError("This server has no GPU slice.", code="no-slice", status=404)
        return self.sampler

    def json_object(self, allowed: str) -> dict[str, Any]:
        """Return the body, which must be `allowed`."""
        body = self.request.body
        try:
            asked = json.loads(body) if len(body) <= _MAX_BODY_BYTES else None
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise InvalidValue("body", body[:40].decode("utf-8", "replace"), allowed)
        return asked

    def whole_number(self, name: str, default: int, low: int, high: int) -> int:
        """Return a whole number from the query."""
        text = self.get_query_argument(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 17 and low <= int(text) <= high):
            raise InvalidValue(name, text, f"a whole number from {low} to {high}")
        return int(text)


class UsageHandler(SliceHandler):
    """``GET nbgpu/api/usage[?after=<event id>]``: the slice now; with `after`, also the notices since that id."""

    @web.authenticated
    @authorized
    @_answers
    async def get(self) -> Any:
        if self.sampler is None:
            return NO_SLICE
        # "now", so that a page whose clock is another one can say when things were
        usage = {**await self.sampler.usage(), "now": time.time(), "may_resize": hub.offered(), "last_event": self.notices.last_id}
        usage["asked_back"] = self.asked.now() if self.asked is not None else None
        if self.get_query_argument("after", None) is None:
            return usage
        return {**usage, "events": self.notices.after(self.whole_number("after", 0, 0, 2**53))}


class HistoryHandler(SliceHandler):
    """``GET nbgpu/api/history?seconds=600``: per device one value a second; beyond ten minutes, to an hour, one in ten."""

    @web.authenticated
    @authorized
    @_answers
    async def get(self) -> Any:
        return await self.slice().history(self.whole_number("seconds", HISTORY_SECONDS, 1, _MOST_HISTORY_SECONDS))


class EventsHandler(SliceHandler):
    """``GET nbgpu/api/events?after=<id>``: the last notices, oldest first."""

    @web.authenticated
    @authorized
    @_answers
    async def get(self) -> Any:
        return self.notices.after(self.whole_number("after", 0, 0, 2**53)) if self.sampler else []


class KernelHandler(SliceHandler):
    """``PUT nbgpu/api/kernels/{kernel_id}``: a ``KernelLimit``, or the same as text (`nbgpu.kernel_limits`).

    With ``"kept": true`` the limit is what the notebook's metadata says too, and is shown as the notebook's.
    """

    _track_activity = True

    @web.authenticated
    @authorized
    @_answers
    async def put(self, kernel_id: str) -> Any:
        sampler = self.slice()
        asked = self.json_object("a JSON object with a kernel's limits")
        kept = asked.pop("kept", False)
        if not isinstance(kept, bool):
            raise InvalidValue("kept", kept, "true or false: whether the notebook's metadata has this limit")
        usage = await sampler.usage()
        if not usage.get("devices"):
            raise Unavailable("The GPU's node agent does not answer yet. Try again in a moment.")
        return await sampler.set_limit(kernel_id, kernel_limit(asked, usage["devices"]), "notebook" if kept else "panel", asked)


class MoveHandler(SliceHandler):
    """``POST nbgpu/api/kernels/{kernel_id}/suspend`` or ``.../resume``: a kernel's GPU memory to the host's, and back."""

    _track_activity = True

    @web.authenticated
    @authorized
    @_answers
    async def post(self, kernel_id: str, where: str) -> Any:
        return await self.slice().move(kernel_id, where)


class ResumeHandler(SliceHandler):
    """``POST nbgpu/api/resume``: ``{"pid": int}``, a suspended process that shall go on."""

    _track_activity = True

    @web.authenticated
    @authorized
    @_answers
    async def post(self) -> Any:
        pid = self.json_object('{"pid": number}').get("pid")
        if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
            raise InvalidValue("pid", pid, "the number of a process")
        return await self.slice().resume(pid)


class ResizeHandler(SliceHandler):
    """``POST nbgpu/api/resize``: asks the hub for a larger or smaller slice, ``{"gpu_fraction"?, "gpu_memory"?, "gpu_compute"?}``.

    ``GET``: what is free beside it.
    """

    _track_activity = True

    @web.authenticated
    @authorized
    @_answers
    async def get(self) -> Any:
        self.slice()
        return await hub.room()

    @web.authenticated
    @authorized
    @_answers
    async def post(self) -> Any:
        self.slice()
        return await hub.resize(self.json_object('an object such as {"gpu_fraction": "1/2"}'))


def routes(
    base_url: str, sampler: Sampler | None, notices: Notices, asked: AskedBack | None = None
) -> list[tuple[str, type[SliceHandler], dict[str, Any]]]:
    """Return the routes to add to a Jupyter server's web application."""
    made_with = {"sampler": sampler, "notices": notices, "asked": asked}
    paths: list[tuple[str, type[SliceHandler]]] = [
        ("usage", UsageHandler),
        ("history", HistoryHandler),
        ("events", EventsHandler),
        ("resume", ResumeHandler),
        ("resize", ResizeHandler),
        (r"kernels/([A-Za-z0-9_.-]{1,39})", KernelHandler),
        (r"kernels/([A-Za-z0-9_.-]{1,39})/(suspend|resume)", MoveHandler),
    ]
    return [(url_path_join(base_url, "nbgpu/api", path), handler, made_with) for path, handler in paths]
