"""The agent's admin API on `agent.sock`. Who may open that socket may do everything here."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from nbgpu import __version__
from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import (
    AgentSlice,
    AgentSlices,
    Bytes,
    Event,
    Idle,
    KernelId,
    KernelLimit,
    Launch,
    Milli,
    Mode,
    Model,
    Node,
    Pid,
    Resume,
    Slice,
    SliceId,
    Usage,
)

from .agent import Agent
from .metrics import Metrics
from .slicedir import Suspended

MAX_ID = 2**53
Seconds = Annotated[float, Query(ge=0, le=30, allow_inf_nan=False)]
After = Annotated[int, Query(ge=-1, le=MAX_ID)]
SlicePath = Annotated[SliceId, Path()]
Uid = Annotated[int, Field(ge=0, le=2**32 - 2)]


class PutSlice(Model):
    """Body of ``PUT /v1/slices/{slice_id}``."""

    slice: Slice
    uid: Uid | None = None
    """Who may use the slice's files; null = the agent's own user."""


class Adopt(Model):
    """Body of ``POST /v1/slices/{slice_id}/processes``."""

    pid: Pid


class PatchSlice(Model):
    """Body of ``PATCH /v1/slices/{slice_id}``: new limits on each of its devices; null = as it is."""

    memory_bytes: Bytes | None = None
    compute_milli: Milli | None = None
    mode: Mode | None = None
    only_unused: bool = False
    """Take only memory that it does not use: where it uses more than it would keep, its limits stay (409)."""


class Park(Model):
    """Body of ``POST /v1/slices/{slice_id}/park``."""

    idle_seconds: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
    """So long the slice must have been idle."""


class Gone(Model):
    """Answer of ``DELETE /v1/slices/{slice_id}``."""

    gone: bool


class Health(Model):
    """Answer of ``GET /healthz``."""

    status: str


class ErrorBody(Model):
    """What went wrong, for people (`message`) and programs (`code`)."""

    code: str
    message: str
    field: str | None = None


class ErrorAnswer(Model):
    """Body of every answer from 400 on."""

    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "An input is not as it must be"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "There is no such slice"}}
CONFLICT: dict[int | str, dict[str, Any]] = {409: {"model": ErrorAnswer, "description": "It does not fit what is there"}}


def error_response(error: NbgpuError) -> JSONResponse:
    """Return the answer for an error."""
    return JSONResponse(error.as_json(), error.status)


def _validation(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    names = [part for part in first["loc"] if part not in ("body", "query", "path")]
    field = "body" if first["type"] == "json_invalid" else ".".join(str(name) for name in names) or "body"
    return error_response(NbgpuError(f"{field}: {first['msg']}.", code="invalid", status=400, field=field))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(NbgpuError)
    async def own(_: Request, error: NbgpuError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return _validation(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        code = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "invalid")
        answer = error_response(NbgpuError(f"{error.detail}.", code=code, status=error.status_code))
        answer.headers.update(error.headers or {})
        return answer


def make_app(agent: Agent, metrics: Metrics) -> FastAPI:
    """Return the ASGI app of the admin API."""
    # No documentation pages: they would load scripts from elsewhere.
    app = FastAPI(title="nbgpu node agent", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    # The default 422 is answered as a 400 here.
    _add_error_handlers(app)
    _add_slices(app, agent)
    _add_rest(app, agent, metrics)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi
    return app


def _add_slices(app: FastAPI, agent: Agent) -> None:
    @app.get("/v1/slices")
    async def slices(after: After = -1, wait_seconds: Seconds = 0) -> AgentSlices:  # pyright: ignore[reportUnusedFunction]
        """All slices; waits until the generation is above `after`."""
        return await agent.list_slices(after, wait_seconds)

    @app.put("/v1/slices/{slice_id}", responses=CONFLICT)
    async def put(slice_id: SlicePath, body: PutSlice) -> Launch:  # pyright: ignore[reportUnusedFunction]
        """Prepare a slice; the same again is answered the same."""
        if body.slice.slice_id != slice_id:
            raise InvalidValue("slice.slice_id", body.slice.slice_id, f"that of the path, {slice_id}")
        return agent.put_slice(body.slice, body.uid)

    @app.get("/v1/slices/{slice_id}/launch", responses=NOT_FOUND)
    async def launch(slice_id: SlicePath) -> Launch:  # pyright: ignore[reportUnusedFunction]
        """How to start a process inside a slice."""
        return agent.launch(agent.find(slice_id))

    @app.post("/v1/slices/{slice_id}/processes", responses=NOT_FOUND | CONFLICT)
    async def adopt(slice_id: SlicePath, body: Adopt) -> AgentSlice:  # pyright: ignore[reportUnusedFunction]
        """Adopt a running process and its descendants."""
        return agent.adopt(slice_id, body.pid)

    @app.delete("/v1/slices/{slice_id}")
    async def delete(slice_id: SlicePath) -> Gone:  # pyright: ignore[reportUnusedFunction]
        """Ask a slice to end: it does when its last process has."""
        return Gone(gone=agent.release(slice_id))

    @app.patch("/v1/slices/{slice_id}", responses=NOT_FOUND | CONFLICT)
    async def patch(slice_id: SlicePath, body: PatchSlice) -> AgentSlice:  # pyright: ignore[reportUnusedFunction]
        """Give a slice new limits."""
        return await agent.patch(slice_id, body.memory_bytes, body.compute_milli, body.mode, only_unused=body.only_unused)

    @app.get("/v1/slices/{slice_id}/usage", responses=NOT_FOUND)
    async def usage(slice_id: SlicePath) -> Usage:  # pyright: ignore[reportUnusedFunction]
        """What one slice uses, now."""
        return agent.parking.usage(agent.find(slice_id))

    @app.get("/v1/slices/{slice_id}/suspended", responses=NOT_FOUND)
    async def suspended(slice_id: SlicePath) -> list[Suspended]:  # pyright: ignore[reportUnusedFunction]
        """Processes that the watchdog has stopped, and those that an administrator has excused since."""
        return list(agent.find(slice_id).record.suspended)

    @app.post("/v1/slices/{slice_id}/resume", responses=NOT_FOUND | CONFLICT)
    async def resume(slice_id: SlicePath, body: Resume) -> list[Suspended]:  # pyright: ignore[reportUnusedFunction]
        """Let suspended processes go on; the watchdog leaves them alone until they end."""
        return await agent.resume(slice_id, body.pid, "an administrator")

    @app.post("/v1/slices/{slice_id}/park", responses=NOT_FOUND | CONFLICT)
    async def park(slice_id: SlicePath, body: Park) -> Idle | None:  # pyright: ignore[reportUnusedFunction]
        """Begin to park an idle slice (docs/idle.md); the list of slices tells when it is parked."""
        live = agent.find(slice_id)
        await agent.parking.park(live, body.idle_seconds)
        return agent.parking.model(live)

    @app.post("/v1/slices/{slice_id}/restore", responses=NOT_FOUND | CONFLICT)
    async def restore(slice_id: SlicePath) -> Idle | None:  # pyright: ignore[reportUnusedFunction]
        """Begin to bring a parked slice back, with the limits that it had; the same again is answered the same."""
        live = agent.find(slice_id)
        agent.parking.restore(live)
        return agent.parking.model(live)

    @app.put("/v1/slices/{slice_id}/kernels/{kernel_id}", responses=NOT_FOUND | CONFLICT)
    async def kernel(slice_id: SlicePath, kernel_id: Annotated[KernelId, Path()], body: KernelLimit) -> KernelLimit:  # pyright: ignore[reportUnusedFunction]
        """Limit a kernel inside its slice; both null removes its limit."""
        return agent.set_kernel_limit(agent.find(slice_id), kernel_id, body)


def _add_rest(app: FastAPI, agent: Agent, metrics: Metrics) -> None:
    @app.get("/v1/node")
    async def node() -> Node:  # pyright: ignore[reportUnusedFunction]
        """What this agent serves."""
        return agent.node()

    @app.get("/v1/usage")
    async def usages() -> list[Usage]:  # pyright: ignore[reportUnusedFunction]
        """What each slice uses, now."""
        return [agent.parking.usage(live) for live in list(agent.slices.values())]

    @app.get("/v1/events")
    async def events(after: After = -1, wait_seconds: Seconds = 0, slice_id: SliceId | None = None) -> list[Event]:  # pyright: ignore[reportUnusedFunction]
        """Events of all slices above the id `after`; waits for one when there is none. With `slice_id` that slice's, at once."""
        if slice_id is not None:
            return agent.events.after(after, slice_id)
        return await agent.events.wait(after, wait_seconds)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metric() -> PlainTextResponse:  # pyright: ignore[reportUnusedFunction]
        """Prometheus text."""
        return PlainTextResponse(metrics.text(), media_type=metrics.content_type)

    @app.get("/healthz")
    async def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Whether the agent answers."""
        return Health(status="ok")
