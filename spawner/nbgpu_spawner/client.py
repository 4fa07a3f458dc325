"""The pool's API as the hub calls it: tornado's HTTP client, a Unix socket or TCP with a token, errors in plain words."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.iostream import StreamClosedError
from tornado.netutil import Resolver
from tornado.simple_httpclient import HTTPStreamClosedError, HTTPTimeoutError, SimpleAsyncHTTPClient

from nbgpu.errors import NbgpuError, Refused, Unavailable
from nbgpu.models import (
    AskBack,
    Availability,
    AvailabilityQuery,
    DeviceBooks,
    Grant,
    Launch,
    LaunchGrant,
    LaunchRequest,
    Model,
    Owner,
    Request,
    Resize,
    read_answer,
)

AT_ONCE = 6
"""Calls under way, those of servers' starts and others counted apart; more of them, when a whole course starts its servers, would only keep
each other and the start pages waiting."""
STARTS = ("/requests", "/launches", "/prepare", "/bind", "/replace")
"""What a server's start calls, and what may wait for a node: nobody's giving back waits for it."""
NO_ANSWER = "The GPU pool does not answer, so no GPU can be given now. Try again in a minute, or start without a GPU."
TOKEN_REFUSED = "The GPU pool does not accept this hub's token. Tell your administrator: only they can mend it."
REFUSED_BY_NODE = "refused-by-node"
"""Code of an error that asking again does not mend: the node's word about a slice is the last one."""
_GRANT = TypeAdapter(Grant)
_LAUNCH = TypeAdapter(Launch)
_LAUNCH_GRANT = TypeAdapter(LaunchGrant)
_AVAILABILITY = TypeAdapter(list[Availability])
_DEVICES = TypeAdapter(list[DeviceBooks])
_ASKS = TypeAdapter(list[AskBack])
_T = TypeVar("_T")


class PoolUnavailable(Unavailable):
    """The pool is down, slow, or still rebuilding its books."""

    code = "pool-unavailable"


class _UnixResolver(Resolver):
    """Resolves every host to one Unix socket."""

    def initialize(self, path: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._path = path

    async def resolve(self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC) -> Any:
        return [(socket.AF_UNIX, self._path)]


def _body(of: Model) -> dict[str, Any]:
    """Return a request's body, without what is not set: a pool that is older than this hub does not know all of it."""
    return of.model_dump(mode="json", exclude_none=True)


class _Shared(Generic[_T]):
    """A question whose answer many want: it is asked once for all of them, and kept."""

    def __init__(self, ask: Callable[[], Awaitable[_T]]):
        self._ask = ask
        self._answer: tuple[float, _T] | None = None
        self._asking: asyncio.Task[tuple[float, _T]] | None = None

    async def get(self, max_age_seconds: float) -> tuple[float, _T]:
        """Return when it was asked and the answer, at most so old; whoever asks meanwhile joins the question that is on its way."""
        if self._answer is not None and time.monotonic() - self._answer[0] <= max_age_seconds:
            return self._answer
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._asked())
            self._asking.add_done_callback(_heard)
        return await asyncio.shield(self._asking)

    async def _asked(self) -> tuple[float, _T]:
        asked = time.monotonic()
        try:
            found = await self._ask()
        finally:
            self._asking = None
        self._answer = (asked, found)
        return self._answer


def _heard(asked: asyncio.Future[Any]) -> None:
    """Take note of an error that all who waited for it have left: the page was closed, or took too long."""
    if not asked.cancelled():
        asked.exception()


class PoolClient:
    """Calls the pool.

    Parameters
    ----------
    socket_path : str
        The pool's Unix socket; used when `url` is empty.
    url : str
        The pool's address on a network, such as ``http://nbgpu-pool:8200``.
    token : str
        Bearer token of role *hub*, for `url`.
    timeout_seconds : float
        How long one call may take.
    """

    def __init__(self, socket_path: str = "", url: str = "", token: str = "", timeout_seconds: float = 10.0):
        self._base = url.rstrip("/") or "http://pool"
        self.where = url or socket_path
        """For the admin's log."""
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        resolver = None if url else _UnixResolver(path=socket_path)
        # the hub may have configured another client class globally; only this one takes a resolver
        self._starts, self._others = (SimpleAsyncHTTPClient(force_instance=True, max_clients=AT_ONCE, resolver=resolver) for _ in range(2))
        self._timeout = timeout_seconds
        self._devices = _Shared(lambda: self._get(_DEVICES, "/v1/devices"))
        self._asks = _Shared(lambda: self._get(_ASKS, "/v1/asks"))

    async def acquire(self, request: Request) -> Grant:
        """Ask for a slice. Asking again with the same request id returns the same grant."""
        return _read(_GRANT, await self._call("POST", "/v1/requests", _body(request)))

    async def launch(self, request: Request, uid: int | None) -> LaunchGrant:
        """`acquire` and, when it is granted at once, `prepare`, in one call."""
        wanted = LaunchRequest(request=request, uid=uid)
        return _read(_LAUNCH_GRANT, await self._call("POST", "/v1/launches", _body(wanted)))

    async def grant(self, request_id: str) -> Grant:
        """Return what became of a request."""
        return _read(_GRANT, await self._call("GET", f"/v1/requests/{request_id}"))

    async def prepare(self, request_id: str, uid: int | None) -> Launch:
        """Make the slice on this machine, its files usable by `uid` (None: by the agent's own user)."""
        return _read(_LAUNCH, await self._call("POST", f"/v1/requests/{request_id}/prepare", {"uid": uid}))

    async def bind(self, request_id: str, pid: int | None) -> Grant:
        """Say that a server carries the grant."""
        return _read(_GRANT, await self._call("POST", f"/v1/requests/{request_id}/bind", {"pid": pid}))

    async def replace(self, request_id: str, request: Request) -> Grant:
        """Give a waiting request up for another that can be granted at once; where it cannot, it keeps its place and this raises."""
        return _read(_GRANT, await self._call("POST", f"/v1/requests/{request_id}/replace", _body(request)))

    async def resize(self, request_id: str, limits: Resize) -> Grant:
        """Give a running slice other limits, where quotas and room allow."""
        return _read(_GRANT, await self._call("POST", f"/v1/requests/{request_id}/resize", limits.model_dump(mode="json")))

    async def release(self, request_id: str) -> None:
        """Ask a grant back, or leave the queue. Unknown ids are fine."""
        await self._call("DELETE", f"/v1/requests/{request_id}")

    async def release_owner(self, owner: Owner, except_request_id: str | None = None) -> None:
        """Ask back everything that `owner` holds or waits for, but for one request."""
        body: dict[str, Any] = {"owner": owner.model_dump(mode="json")}
        if except_request_id:
            body["except_request_id"] = except_request_id
        await self._call("POST", "/v1/release", body)

    async def availability(self, query: AvailabilityQuery) -> list[Availability]:
        """Return for each shape whether it is free now, in their order."""
        return _read(_AVAILABILITY, await self._call("POST", "/v1/availability", _body(query)))

    async def devices(self, max_age_seconds: float = 5.0) -> list[DeviceBooks]:
        """Return the pool's devices, at most `max_age_seconds` old; whoever asks meanwhile joins the question that is on its way."""
        return (await self._devices.get(max_age_seconds))[1]

    async def asks(self, max_age_seconds: float = 5.0) -> tuple[float, list[AskBack]]:
        """Return when it was asked (CLOCK_MONOTONIC seconds) and what the pool asks back, of all hubs that it tells this one of."""
        return await self._asks.get(max_age_seconds)

    async def _get(self, kind: TypeAdapter[_T], path: str) -> _T:
        return _read(kind, await self._call("GET", path))

    async def _call(self, method: str, path: str, body: Any = None) -> bytes:
        request = HTTPRequest(
            self._base + path,
            method=method,
            headers=self._headers,
            body=None if body is None else json.dumps(body),
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
            allow_nonstandard_methods=True,
        )
        try:
            response = await (self._starts if path.endswith(STARTS) else self._others).fetch(request)
        except HTTPTimeoutError as error:
            raise PoolUnavailable(NO_ANSWER) from error
        except HTTPStreamClosedError as error:
            raise PoolUnavailable(NO_ANSWER) from error
        except HTTPClientError as error:
            raise _plain(error) from error
        except (OSError, StreamClosedError) as error:
            raise PoolUnavailable(NO_ANSWER) from error
        return response.body


def _read(adapter: TypeAdapter[_T], body: bytes) -> _T:
    try:
        return read_answer(adapter, json.loads(body))
    except ValueError as error:  # pydantic's is one
        raise PoolUnavailable("The GPU pool answers in another version's words. Ask the admin to update hub and pool together.") from error


def _plain(error: HTTPClientError) -> NbgpuError:
    """Return the pool's own words, where it had any."""
    code, message, field = "pool", "", None
    try:
        told = json.loads(error.response.body)["error"] if error.response else {}
        code, message, field = str(told.get("code", code)), str(told.get("message", "")), told.get("field")
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    if error.code == 503:
        # which of two replicas should answer is not a user's business
        return PoolUnavailable(NO_ANSWER if code == "not-leader" else message or NO_ANSWER, code=code)
    if error.code == 401:
        return PoolUnavailable(TOKEN_REFUSED, code="token")
    if error.code in (400, 403, 404, 409) and message:
        return Refused(message, code=code, status=error.code, field=field)
    return PoolUnavailable(NO_ANSWER)
