"""A slice's own API, on `api.sock` in its directory. The slice is known by the socket; nothing in a request names it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import KernelId, KernelLimit, Model, Resume, Usage

from . import procs
from .agent import Agent, NoSuchSlice
from .history import HOUR, LENGTH
from .idle import MOST_KERNELS
from .live import LiveSlice

MAX_ID = 2**53
MAX_WAIT_SECONDS = 30
CHEAP_SECONDS = 0.003
COST_SHARE = 20
_KERNEL_ID: TypeAdapter[str] = TypeAdapter(KernelId)


class Kernels(Model):
    """Body of ``PUT /v1/idle``: what the Jupyter server says of its kernels."""

    kernels: Annotated[dict[KernelId, bool], Field(max_length=MOST_KERNELS)]
    """By id: whether it is busy."""


class Protect(Model):
    """Body of ``PUT /v1/idle/kernels/{kernel_id}``."""

    protected: bool
    """It keeps its GPU while it is idle."""


def with_pids(usage: Usage, pid_of: Callable[[int], int]) -> Usage:
    """Return what a slice uses with other names for its processes: in a pod those that its own programs know them by."""
    kernels = [kernel.model_copy(update={"pids": sorted(map(pid_of, kernel.pids))}) for kernel in usage.kernels]
    suspended = [one.model_copy(update={"pid": pid_of(one.pid)}) for one in usage.suspended]
    return usage.model_copy(update={"kernels": kernels, "suspended": suspended})


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _kernel_id(request: Request) -> str:
    try:
        return _KERNEL_ID.validate_python(request.path_params["kernel_id"])
    except ValidationError:
        raise InvalidValue("kernel_id", request.path_params["kernel_id"], "1 to 39 letters, digits, `-`, `_` or `.`") from None


def _number(request: Request, name: str, default: float, low: float, high: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InvalidValue(name, text, f"a number from {low:g} to {high:g}")
    return value


class SliceApi:
    """The routes of docs/interfaces.md, for whichever slice the socket is of."""

    def __init__(self, agent: Agent):
        self._agent = agent
        self._usage: dict[str, tuple[float, str]] = {}
        """By slice: until when (CLOCK_MONOTONIC seconds) an answer that was expensive to make is given again, and the answer."""

    def _live(self, request: Request) -> LiveSlice:
        live: LiveSlice = request.scope["state"]["slice"]
        if self._agent.slices.get(live.id) is not live:
            raise NoSuchSlice(live.id)
        return live

    async def slice(self, request: Request) -> Response:
        """``GET /v1/slice``."""
        return _json(self._live(request).limits.model_dump_json())

    async def usage(self, request: Request) -> Response:
        """``GET /v1/usage``."""
        live = self._live(request)
        now = time.monotonic()
        kept = self._usage.get(live.id)
        if kept is None or now >= kept[0]:
            found = self._agent.parking.usage(live)
            text = (found if live.record.claim is None else with_pids(found, procs.inner_pid)).model_dump_json()
            took = time.monotonic() - now
            # A file made to be expensive is read less often; an ordinary one at each request.
            kept = (now + (COST_SHARE * took if took > CHEAP_SECONDS else 0), text)
            self._usage = {name: one for name, one in self._usage.items() if name in self._agent.slices}
            self._usage[live.id] = kept
        return _json(kept[1])

    async def history(self, request: Request) -> Response:
        """``GET /v1/history?seconds=``."""
        seconds = int(_number(request, "seconds", LENGTH, 0, HOUR))
        return JSONResponse(self._live(request).history.as_json(seconds))

    async def kernels(self, request: Request) -> Response:
        """``GET /v1/kernels``."""
        limits = self._live(request).record.kernel_limits
        return JSONResponse({kernel_id: limit.model_dump() for kernel_id, limit in limits.items()})

    async def put_kernel(self, request: Request) -> Response:
        """``PUT /v1/kernels/{kernel_id}``."""
        live = self._live(request)
        kernel_id = _kernel_id(request)
        try:
            limit = KernelLimit.model_validate_json(await request.body())
        except ValidationError as error:
            raise _invalid(error) from None
        return _json(self._agent.set_kernel_limit(live, kernel_id, limit).model_dump_json())

    async def suspend_kernel(self, request: Request) -> Response:
        """``POST /v1/kernels/{kernel_id}/suspend``."""
        live, kernel_id = self._live(request), _kernel_id(request)
        await self._agent.away.suspend(live, kernel_id)
        return self._away(live, kernel_id)

    async def resume_kernel(self, request: Request) -> Response:
        """``POST /v1/kernels/{kernel_id}/resume``."""
        live, kernel_id = self._live(request), _kernel_id(request)
        await self._agent.away.resume(live, kernel_id)
        return self._away(live, kernel_id)

    def _away(self, live: LiveSlice, kernel_id: str) -> Response:
        self._usage.pop(live.id, None)
        found = self._agent.away.model(live, kernel_id)
        return _json("null" if found is None else found.model_dump_json())

    async def resume(self, request: Request) -> Response:
        """``POST /v1/resume``."""
        live = self._live(request)
        if not live.owner_resumes:
            raise NbgpuError("Only an administrator may let a suspended process go on here.", code="forbidden", status=403)
        try:
            pid = Resume.model_validate_json(await request.body()).pid
        except ValidationError as error:
            raise _invalid(error) from None
        in_pod = live.record.claim is not None
        if in_pod:
            pid = next((one.pid for one in live.record.suspended if procs.inner_pid(one.pid) == pid), pid)
        await self._agent.resume(live.id, pid, "this server's user")
        self._usage.pop(live.id, None)
        found = live.usage()
        return _json((with_pids(found, procs.inner_pid) if in_pod else found).model_dump_json(include={"suspended"}))

    async def idle(self, request: Request) -> Response:
        """``GET /v1/idle``; 404 ``not-offered`` where slices are never parked."""
        return self._idle(self._live(request))

    def _idle(self, live: LiveSlice) -> Response:
        found = self._agent.parking.model(live)
        if found is None:
            raise NbgpuError("Slices are not parked on this node.", code="not-offered", status=404)
        return _json(found.model_dump_json())

    async def want(self, request: Request) -> Response:
        """``POST /v1/idle/want``."""
        live = self._live(request)
        self._agent.parking.want(live)
        return self._idle(live)

    async def put_idle(self, request: Request) -> Response:
        """``PUT /v1/idle``."""
        live = self._live(request)
        try:
            told = Kernels.model_validate_json(await request.body())
        except ValidationError as error:
            raise _invalid(error) from None
        self._agent.parking.hear(live, told.kernels)
        return self._idle(live)

    async def protect(self, request: Request) -> Response:
        """``PUT /v1/idle/kernels/{kernel_id}``."""
        live = self._live(request)
        self._idle(live)
        try:
            kernel_id = _KERNEL_ID.validate_python(request.path_params["kernel_id"])
            told = Protect.model_validate_json(await request.body())
        except ValidationError as error:
            raise _invalid(error) from None
        self._agent.parking.protect(live, kernel_id, told.protected)
        return self._idle(live)

    async def events(self, request: Request) -> Response:
        """``GET /v1/events?after=&wait_seconds=``."""
        live = self._live(request)
        after = int(_number(request, "after", -1, -1, MAX_ID))
        wait_seconds = _number(request, "wait_seconds", 0, 0, MAX_WAIT_SECONDS)
        found = await self._agent.events.wait(after, wait_seconds, live.id)
        return JSONResponse([event.model_dump(mode="json") for event in found])


def _invalid(error: ValidationError) -> NbgpuError:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    return NbgpuError(f"{field}: {first['msg']}.", code="invalid", status=400, field=field)


async def _own_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, NbgpuError)
    return JSONResponse(error.as_json(), error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "invalid")
    return Response(
        json.dumps({"error": {"code": code, "message": f"{error.detail}."}}), error.status_code, error.headers, "application/json"
    )


def make_app(agent: Agent) -> Starlette:
    """Return the ASGI app that serves every slice's socket; ``scope["state"]["slice"]`` says which."""
    api = SliceApi(agent)
    handlers: Any = {NbgpuError: _own_error, HTTPException: _http_error}
    return Starlette(
        routes=[
            Route("/v1/slice", api.slice),
            Route("/v1/usage", api.usage),
            Route("/v1/history", api.history),
            Route("/v1/kernels", api.kernels),
            Route("/v1/kernels/{kernel_id}", api.put_kernel, methods=["PUT"]),
            Route("/v1/kernels/{kernel_id}/suspend", api.suspend_kernel, methods=["POST"]),
            Route("/v1/kernels/{kernel_id}/resume", api.resume_kernel, methods=["POST"]),
            Route("/v1/resume", api.resume, methods=["POST"]),
            Route("/v1/idle", api.idle),
            Route("/v1/idle", api.put_idle, methods=["PUT"]),
            Route("/v1/idle/kernels/{kernel_id}", api.protect, methods=["PUT"]),
            Route("/v1/idle/want", api.want, methods=["POST"]),
            Route("/v1/events", api.events),
        ],
        exception_handlers=handlers,
    )
