"""What a running server asks for its user: a larger or smaller slice (quotas and room are the pool's), and whether it is asked back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from jupyterhub.apihandlers.base import APIHandler
from jupyterhub.scopes import needs_scope
from tornado import web

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import DeviceBooks, Grant, Resize
from nbgpu.quantities import WHOLE_MILLI

from .askback import watch
from .client import PoolUnavailable
from .mixin import GPUSliceMixin
from .options import Wish, check_against, wish_from
from .profiles import AMOUNTS, Profile

PAUSE_SECONDS = 2.0
"""A server may ask so often: each time is written down by the pool and its node."""
ROOM_SECONDS = 1.0
"""So long an answer of what is free beside a server is given again: each is two of the few calls that the hub makes at a time for all."""
_MOST_BYTES = 4096
_asked: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
"""By spawner: when it was asked for last (CLOCK_MONOTONIC seconds)."""
_rooms: WeakKeyDictionary[Any, tuple[float, asyncio.Task[dict[str, Any]]]] = WeakKeyDictionary()
"""By spawner: since when it is asked what is free, and the answer, which may be on its way."""


def wanted(asked: Any) -> Wish:
    """Return what a user writes in the words of the start page: `gpu_fraction`, `gpu_memory`, `gpu_compute`.

    Raises
    ------
    InvalidValue
        Names the field and what it must be.
    """
    if not isinstance(asked, dict):
        raise InvalidValue("body", asked, f"an object with {', '.join(AMOUNTS)}")
    for name in asked:
        if name not in AMOUNTS:
            raise InvalidValue(str(name)[:60], asked[name], f"left out: {', '.join(AMOUNTS)} can be changed while a server runs")
    wish = wish_from(asked)
    if wish is None:
        raise InvalidValue("gpu_fraction", "", "a fraction of one GPU such as 0.25, 1/4 or 25%", "Share of a GPU")
    return wish


def limits(wish: Wish) -> Resize:
    """Return the pool's words for a wish; what it does not name stays as it is."""
    shape = wish.shape
    return Resize(memory_bytes=shape.memory_bytes, memory_milli=shape.memory_milli, compute_milli=shape.compute_milli)


def must_be_offered(allowed: bool | None, profiles: list[Profile]) -> None:
    """Raise unless users may choose sizes of their own: what the start page does not offer is not to be had around it.

    Parameters
    ----------
    allowed : bool, optional
        The admin's word; None: where a profile lets users say how much, or there are no profiles.
    """
    if allowed is None:
        allowed = not profiles or any(profile.get("gpu_custom") for profile in profiles)
    if not allowed:
        message = "A running server keeps its share of the GPU here. Stop it and choose another at the start."
        raise NbgpuError(message, code="not-offered", status=403)


def answer(grant: Grant) -> dict[str, Any]:
    """Return what became of it: the limits, and whether they are in force yet."""
    parts = grant.resizing or (grant.slice.devices if grant.slice is not None else [])
    devices = [part.model_dump(include={"uuid", "index", "memory_bytes", "compute_milli"}) for part in parts]
    return {"in_force": grant.resizing is None, "devices": devices, "note": grant.note}


async def resize(spawner: GPUSliceMixin, asked: Any) -> dict[str, Any]:
    """Ask the pool for what the user of a running server wants. Raises NbgpuError with words for them."""
    must_be_offered(spawner.gpu_resize, await spawner.gpu_profiles())
    wish = wanted(asked)
    with suppress(PoolUnavailable):  # then the pool's own check has to do
        books = await spawner.pool.devices()
        check_against(wish, [book.device for book in books], max((book.least_bytes for book in books), default=0))
    request_id = running_request(spawner)
    now = time.monotonic()
    if now - _asked.get(spawner, -PAUSE_SECONDS) < PAUSE_SECONDS:
        raise NbgpuError("That was asked a moment ago. Try again in some seconds.", code="too-often", status=429)
    _asked[spawner] = now
    await _own(spawner, request_id)
    _rooms.pop(spawner, None)
    try:
        return answer(await spawner.pool.resize(request_id, limits(wish)))
    except NbgpuError as error:
        if error.code != "state":
            raise
        message = (
            "The slice cannot be changed now: it is lent to others while its notebooks are idle, or not ready yet. Run a cell, or wait."
        )
        raise NbgpuError(message, code="state", status=409) from error


async def room(spawner: GPUSliceMixin) -> dict[str, Any]:
    """Return what is free beside a running server's slice, on each of its GPUs. Raises NbgpuError with words for its user."""
    must_be_offered(spawner.gpu_resize, await spawner.gpu_profiles())
    request_id, now = running_request(spawner), time.monotonic()
    known = _rooms.get(spawner)
    if known is None or now - known[0] >= ROOM_SECONDS:
        known = _rooms[spawner] = now, asyncio.create_task(_look(spawner, request_id))
        known[1].add_done_callback(lambda asked: asked.cancelled() or asked.exception())
    try:
        return await asyncio.shield(known[1])
    except NbgpuError:
        if _rooms.get(spawner) is known:
            del _rooms[spawner]
        raise


async def _look(spawner: GPUSliceMixin, request_id: str) -> dict[str, Any]:
    grant = await _own(spawner, request_id)
    mine = {part.uuid for part in grant.slice.devices} if grant.slice is not None else set()
    books = [book for book in await spawner.pool.devices(max_age_seconds=0) if book.device.uuid in mine]
    return {"devices": [_free(book) for book in books]}


def _free(book: DeviceBooks) -> dict[str, Any]:
    device, healthy = book.device, book.device.healthy  # nothing grows on a GPU that is not
    return {
        "uuid": device.uuid,
        "index": device.index,
        "free_bytes": max(0, device.usable_bytes - book.memory_granted_bytes) if healthy else 0,
        "free_milli": max(0, WHOLE_MILLI - book.compute_granted_milli) if healthy else 0,
    }


def running_request(spawner: GPUSliceMixin) -> str:
    """Return the id of the slice that a server runs in. Raises NbgpuError with words for its user."""
    request_id = spawner.gpu_running_request()
    if request_id is None:
        raise NbgpuError("This server has no slice of a GPU.", code="no-slice", status=404)
    return request_id


async def _own(spawner: GPUSliceMixin, request_id: str) -> Grant:
    grant = await spawner.pool.grant(request_id)
    if grant.request.owner != spawner.gpu_owner():
        # the id may have come from a pod's annotation, which others may have written
        raise NbgpuError("This server has no slice of a GPU.", code="no-slice", status=404)
    return grant


class ServerHandler(APIHandler):
    """What a server asks of the hub with its own token: ``?user=&server=``. Who may use the server may ask too."""

    async def for_server(self, act: Callable[[GPUSliceMixin], Awaitable[dict[str, Any]]]) -> None:
        """Answer for the named server of the token's user, or of `user` to who has access to it."""
        if self.current_user is None:
            raise web.HTTPError(403)
        user_name = self.get_argument("user", "", strip=False) or self.current_user.name
        await self._answer(act, user_name=user_name, server_name=self.get_argument("server", "", strip=False))

    @needs_scope("access:servers")
    async def _answer(self, act: Callable[[GPUSliceMixin], Awaitable[dict[str, Any]]], user_name: str, server_name: str) -> None:
        user = self.find_user(user_name)
        spawner = user.spawners.get(server_name) if user is not None and server_name in user.orm_user.orm_spawners else None
        if spawner is None or not isinstance(spawner, GPUSliceMixin):
            raise web.HTTPError(404, "No such server with a slice of a GPU")
        try:
            found = await act(spawner)
        except NbgpuError as error:
            self.set_status(error.status)
            found = error.as_json()
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(found))


class ResizeHandler(ServerHandler):
    """``/hub/api/nbgpu/resize``: ``GET`` says what is free beside a server's slice, ``POST`` asks for another size."""

    async def get(self) -> None:
        """Answer with what is free."""
        await self.for_server(room)

    async def post(self) -> None:
        """Answer with what became of it."""
        await self.for_server(lambda spawner: resize(spawner, self._body()))

    def _body(self) -> Any:
        try:
            return json.loads(self.request.body) if len(self.request.body) <= _MOST_BYTES else None
        except (ValueError, RecursionError):
            return None


class AskedHandler(ServerHandler):
    """``GET /hub/api/nbgpu/asked``: whether a server's slice is asked back, for its user to read."""

    async def get(self) -> None:
        """Answer; to a token of the server's user it counts as told to them."""
        await self.for_server(self._asked)

    async def _asked(self, spawner: GPUSliceMixin) -> dict[str, Any]:
        request_id, token = running_request(spawner), self.get_token()
        user_reads = token is not None and token.user_id == spawner.user.orm_user.id
        return await watch(spawner).tell(spawner, request_id, user_reads=user_reads)


HANDLERS = [(r"/api/nbgpu/resize", ResizeHandler), (r"/api/nbgpu/asked", AskedHandler)]
