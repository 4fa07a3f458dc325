"""The pool's HTTP API (docs/interfaces.md)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from nbgpu import __version__
from nbgpu.errors import NbgpuError
from nbgpu.models import (
    Availability,
    AvailabilityQuery,
    DeviceBooks,
    Grant,
    GrantState,
    Hints,
    Launch,
    LaunchGrant,
    LaunchRequest,
    Owner,
    Request,
    Resize,
    SliceId,
)

from . import events
from .auth import Guard, Principal
from .books import Entry
from .front import Front
from .hot import Hot
from .problems import ERRORS, install_handlers, without_422
from .service import Service


class Body(BaseModel):
    """A request's body; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PrepareBody(Body):
    """Who may use the slice's files; null = the agent's own user."""

    uid: Annotated[int, Field(ge=0, lt=2**32 - 1)] | None = None


class BindBody(Body):
    """The server's process; null where the ledger sees by itself what carries the slice."""

    pid: Annotated[int, Field(ge=1, le=2**22)] | None = None


class ReleaseBody(Body):
    """Whose slices to give back."""

    owner: Owner
    except_request_id: SliceId | None = None


# async, or FastAPI would have a thread of a pool read each of these words: two hops that wait for whatever the loop has to do


async def _service(http: HttpRequest) -> Service:
    return http.app.state.service


async def _speaker(http: HttpRequest) -> Principal:
    return http.state.speaker


RequestId = Annotated[SliceId, Path()]
Pool = Annotated[Service, Depends(_service)]
Speaker = Annotated[Principal, Depends(_speaker)]

router = APIRouter(responses=ERRORS)


def create_app(service: Service, guard: Guard | None = None) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    guard : Guard, optional
        Checks bearer tokens; None on the Unix socket, whose callers have the role *hub* for every hub.
    """
    app = FastAPI(title="nbgpu pool", version=__version__, docs_url=None, redoc_url=None, summary="Who gets which part of which GPU.")
    app.state.service = service
    acts = partial(_acquire, service), partial(_give_up, service), partial(_following, service)
    app.add_middleware(Hot, acquire=acts[0], release=acts[1], follow=acts[2])
    app.add_middleware(Front, guard=guard)
    install_handlers(app)
    app.include_router(router)
    plain = app.openapi
    app.openapi = lambda: without_422(plain())
    return app


def _entry(pool: Service, request_id: str, speaker: Principal) -> Entry:
    """Return a request that the speaker may see; another hub's is as unknown as one that never was."""
    entry = pool.core.known(request_id)
    if not speaker.sees(entry.request.owner.hub):
        raise NbgpuError(f"No request {request_id} is known here.", code="unknown", status=404, field="request_id")
    return entry


def _must_be_free_for(speaker: Principal, request: Request, pool: Service) -> None:
    """Raise unless the speaker may make this request; a request id of another hub is taken."""
    speaker.must_speak_for(request.owner.hub)
    speaker.must_run_in(request.namespace)
    known = pool.core.entry(request.request_id)
    if known is not None and not speaker.sees(known.request.owner.hub):
        raise NbgpuError("This request_id is taken; use a new one.", code="conflict", status=409, field="request_id")


def _acquire(pool: Service, request: Request, speaker: Principal) -> Grant:
    _must_be_free_for(speaker, request, pool)
    return pool.request(request)


def _give_up(pool: Service, request_id: str, speaker: Principal) -> Grant | None:
    entry = pool.core.entry(request_id)
    if entry is not None and not speaker.sees(entry.request.owner.hub):
        return None
    return pool.cancel(request_id, speaker.hub)


def _following(pool: Service, request_id: str, speaker: Principal, held: bool) -> Response:
    return events.Following(pool, _entry(pool, request_id, speaker), touch=speaker.role == "hub", held=held)


@router.post("/v1/requests")
async def make_request(body: Request, pool: Pool, speaker: Speaker) -> Grant:
    """Ask for a slice: granted at once, or queued. Idempotent by `request_id`."""
    return _acquire(pool, body, speaker)


@router.post("/v1/launches")
async def make_launch(body: LaunchRequest, pool: Pool, speaker: Speaker) -> LaunchGrant:
    """Ask for a slice and, where it is granted at once, prepare it: two calls in one, as idempotent as they are."""
    _must_be_free_for(speaker, body.request, pool)
    return await pool.launch(body)


@router.get("/v1/requests")
async def list_requests(pool: Pool, speaker: Speaker, state: Annotated[GrantState | None, Query()] = None) -> list[Grant]:
    """Return all requests that have not ended, or those in one state."""
    found = pool.core.grants(pool.clock(), state)
    return [grant for grant in found if speaker.sees(grant.request.owner.hub)]


@router.get("/v1/requests/{request_id}")
async def get_request(request_id: RequestId, pool: Pool, speaker: Speaker) -> Grant:
    """Return a request; a hub that asks for a queued one keeps it in the queue."""
    entry = _entry(pool, request_id, speaker)
    if speaker.role == "hub":
        pool.core.touch(entry, pool.clock())
    return pool.core.grant(entry, pool.clock())


@router.get("/v1/requests/{request_id}/events", response_class=StreamingResponse)
async def follow_request(request_id: RequestId, pool: Pool, speaker: Speaker, held: Annotated[bool, Query()] = False) -> Response:
    """Server-sent events `grant`, at each change, until the request is no longer queued; with `held`, until it has ended."""
    return _following(pool, request_id, speaker, held)


@router.delete("/v1/requests/{request_id}", response_model=Grant, responses={204: {"description": "Unknown; remembered."}})
async def give_up(request_id: RequestId, pool: Pool, speaker: Speaker) -> Any:
    """Leave the queue, or ask a slice back. An unknown id is remembered: its late request is answered `gone`."""
    return _give_up(pool, request_id, speaker) or Response(status_code=204)


@router.post("/v1/requests/{request_id}/replace")
async def replace(request_id: RequestId, body: Request, pool: Pool, speaker: Speaker) -> Grant:
    """Give a waiting request up for another that can be granted at once; where it cannot (409), the first keeps its place."""
    _must_be_free_for(speaker, body, pool)
    _entry(pool, request_id, speaker)
    return pool.replace(request_id, body)


@router.post("/v1/requests/{request_id}/renew")
async def renew(request_id: RequestId, pool: Pool, speaker: Speaker) -> Grant:
    """Start a reservation's time anew."""
    _entry(pool, request_id, speaker)
    return pool.renew(request_id)


@router.post("/v1/requests/{request_id}/prepare")
async def prepare(request_id: RequestId, body: PrepareBody, pool: Pool, speaker: Speaker) -> Launch:
    """Make the slice at the agent and say how to start a process in it."""
    _entry(pool, request_id, speaker)
    return await pool.prepare(request_id, body.uid)


@router.post("/v1/requests/{request_id}/bind")
async def bind(request_id: RequestId, body: BindBody, pool: Pool, speaker: Speaker) -> Grant:
    """Say that a server's process carries the slice: from now on only its end frees it."""
    _entry(pool, request_id, speaker)
    return await pool.bind(request_id, body.pid)


@router.post("/v1/requests/{request_id}/resize")
async def resize(request_id: RequestId, body: Resize, pool: Pool, speaker: Speaker) -> Grant:
    """Give a running slice other limits: what grows is booked at once, what shrinks is free when its node says so."""
    _entry(pool, request_id, speaker)
    return await pool.resize(request_id, body)


@router.post("/v1/release")
async def release(body: ReleaseBody, pool: Pool, speaker: Speaker) -> list[Grant]:
    """Give up all that an owner holds or waits for, but one request."""
    speaker.must_speak_for(body.owner.hub)
    return pool.release_owner(body.owner, body.except_request_id)


@router.post("/v1/availability")
async def availability(body: AvailabilityQuery, pool: Pool, speaker: Speaker) -> list[Availability]:
    """Return, for each shape, whether its owner could have it now, and if not, why and what to expect."""
    if not speaker.sees(body.owner.hub):
        speaker.must_speak_for(body.owner.hub)
    return pool.availability(body)


@router.get("/v1/availability/events", response_class=StreamingResponse)
async def follow_pool(pool: Pool, speaker: Speaker) -> StreamingResponse:
    """Server-sent events `change`: ask for the availability again."""
    return events.stream(events.of_pool(pool))


@router.get("/v1/hints")
async def get_hints(pool: Pool, speaker: Speaker) -> Hints:
    """Return which idle server's move, or end, would let in somebody who waits; nothing is moved by it."""
    return events.hints_for(pool, speaker)


@router.get("/v1/hints/events", response_class=StreamingResponse)
async def follow_hints(pool: Pool, speaker: Speaker) -> StreamingResponse:
    """Server-sent events `hints`, now and at each change."""
    return events.stream(events.of_hints(pool, speaker))


@router.get("/v1/devices")
async def devices(pool: Pool, speaker: Speaker) -> list[DeviceBooks]:
    """Return what each device has given."""
    return pool.core.device_books()


@router.get("/metrics", response_class=Response)
async def metrics(pool: Pool, speaker: Speaker) -> Response:
    """Return the Prometheus text."""
    return Response(pool.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/healthz")
async def healthz(pool: Pool) -> dict[str, str | bool]:
    """Return that the pool lives, whether its books are rebuilt and whether the ledger answers."""
    return {"status": "ok", "ready": pool.core.ready, "connected": pool.core.connected}
