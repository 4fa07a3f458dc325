"""Servers that the pool asks back: their users are told and, where the admin wants that, the hub then ends them (docs/quotas.md).

The pool says what is asked back and how long it may still last; a server is ended only where its user was told, only after what the user
was told, and only if it is still asked back at that moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from jupyterhub.handlers.base import BaseHandler
from tornado.httputil import HTTPServerRequest

from nbgpu.errors import NbgpuError
from nbgpu.models import AskBack, Owner

from .client import PoolClient

if TYPE_CHECKING:
    from .mixin import GPUSliceMixin

LOOK_SECONDS = 10.0
"""Between two looks at what is asked back; what a user is told is at most so old."""
LEAST_SECONDS = 60.0
"""A server runs on for so long at least after its user was told."""
AT_ONCE = 10
"""Servers whose stop begins at one look."""
AGAIN_SECONDS, ASKED_SECONDS = 45.0, 20.0
"""How often a server is to ask; and one that is asked back."""
MOST_PER_SECOND = 10.0
"""Servers that ask: where there are many, each asks less often."""


class Told(NamedTuple):
    """What the user of a server was told."""

    kind: str
    """Of the ask."""
    until: float
    """For so long it goes on at least (CLOCK_MONOTONIC seconds)."""


def seconds_left(ask: AskBack, told: Told | None, now: float) -> float:
    """Return for how long a server that is asked back now goes on at least; 0 or less: it may be ended, when its user was told."""
    promised = told.until - now if told is not None and told.kind == ask.kind else LEAST_SECONDS
    return max(ask.due_seconds, promised)


def to_end(asks: Iterable[AskBack], told: Mapping[str, Told], running: Mapping[str, Owner], now: float) -> list[AskBack]:
    """Return those of the asks that are to be acted upon now.

    Parameters
    ----------
    asks : iterable of AskBack
        What the pool asks back at this moment, of whatever hub.
    told : mapping
        By request id, what users were told.
    running : mapping
        Whose the servers are that may be ended, by the request id of their slices.
    now : float
        CLOCK_MONOTONIC seconds.
    """
    return [ask for ask in asks if running.get(ask.request_id) == ask.owner and seconds_left(ask, told.get(ask.request_id), now) <= 0]


class AskedBack:
    """What one pool asks back of this hub's servers, and which users were told."""

    def __init__(self, pool: PoolClient):
        self.pool = pool
        self.told: dict[str, Told] = {}
        """By request id; no longer than it is asked back."""
        self.servers: WeakSet[GPUSliceMixin] = WeakSet()
        """That have a slice, or had one."""
        self.task: asyncio.Task[None] | None = None
        self._untold: set[str] = set()
        """Asks that are due and of which the log says that nobody could be told."""

    async def asks(self, max_age_seconds: float) -> dict[str, AskBack]:
        """Return what is asked back, by request id, its time as of now; one request to the pool for all who want to know."""
        asked_at, found = await self.pool.asks(max_age_seconds)
        age = time.monotonic() - asked_at
        asks = {ask.request_id: ask.model_copy(update={"due_seconds": ask.due_seconds - age}) for ask in found}
        self.told = {one: told for one, told in self.told.items() if one in asks and asks[one].kind == told.kind}
        self._untold &= asks.keys()
        return asks

    async def tell(self, spawner: GPUSliceMixin, request_id: str, *, user_reads: bool) -> dict[str, Any]:
        """Return what a server is to tell its user, and when it is to ask again.

        Parameters
        ----------
        user_reads : bool
            The answer goes to the user; else it counts as said to nobody.
        """
        ask = (await self.asks(LOOK_SECONDS)).get(request_id)
        if ask is None or ask.owner != spawner.gpu_owner():
            return {"asked": None, "again_seconds": max(AGAIN_SECONDS, len(self.servers) / MOST_PER_SECOND)}
        ends, now = spawner.gpu_end_asked_back, time.monotonic()
        seconds = seconds_left(ask, self.told.get(request_id), now) if ends else ask.due_seconds
        if ends and user_reads:
            self.told[request_id] = Told(ask.kind, now + seconds)
        asked = {"kind": ask.kind, "seconds": round(seconds, 1), "ends": ends, "idle": ask.idle, "reason": ask.reason}
        return {"asked": asked, "again_seconds": ASKED_SECONDS}

    def running(self) -> dict[str, GPUSliceMixin]:
        """Return the servers that run and may be ended, by the request id of their slices."""
        found: dict[str, GPUSliceMixin] = {}
        for spawner in list(self.servers):
            request_id = spawner.gpu_running_request()
            if request_id is not None and spawner.gpu_end_asked_back and spawner.user.spawners.get(spawner.name) is spawner:
                found[request_id] = spawner
        return found

    async def look(self, log: Any) -> None:
        """End what is to be ended now."""
        if not self.running():
            return
        asks, running, now = await self.asks(0), self.running(), time.monotonic()  # those that run after the answer
        owners = {one: spawner.gpu_owner() for one, spawner in running.items()}
        due = to_end(asks.values(), self.told, owners, now)
        await asyncio.gather(*(self._end(running[ask.request_id], ask) for ask in due[:AT_ONCE]))
        for ask in asks.values():
            late = ask.due_seconds < -LEAST_SECONDS and owners.get(ask.request_id) == ask.owner
            if late and ask.request_id not in self.told and ask.request_id not in self._untold:
                self._untold.add(ask.request_id)
                why = "its user could not be told: the server has no JupyterLab with nbgpu, or it does not ask"
                log.warning("%s: it is asked back (%s) and goes on: %s", running[ask.request_id]._log_name, ask.reason, why)

    async def _end(self, spawner: GPUSliceMixin, ask: AskBack) -> None:
        spawner.log.info("%s: its server is stopped, its slice %s was asked back: %s", spawner._log_name, ask.request_id, ask.reason)
        self.told[ask.request_id] = Told(ask.kind, time.monotonic() + LEAST_SECONDS)  # one whose stop fails is not tried at each look
        try:
            await stop(spawner)
        except Exception:
            spawner.log.exception("%s: its server could not be stopped", spawner._log_name)

    async def run(self, log: Any) -> None:
        """Look, for ever: whatever goes wrong once goes wrong once."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look(log)
            except NbgpuError as error:
                log.debug("nbgpu: what is asked back is not known now: %s", error)
            except Exception:
                log.exception("nbgpu: a look at what is asked back failed")


_by_pool: dict[PoolClient, AskedBack] = {}


def watch(spawner: GPUSliceMixin) -> AskedBack:
    """Remember a server that has a slice; where its admin wants that, look from now on whether it is to be ended."""
    pool = spawner.pool
    found = _by_pool.get(pool)
    if found is None:
        found = _by_pool[pool] = AskedBack(pool)
    found.servers.add(spawner)
    if spawner.gpu_end_asked_back and found.task is None:
        found.task = asyncio.ensure_future(found.run(spawner.log))
    return found


class _Nobody:
    """The connection of a request that nobody has sent."""

    def set_close_callback(self, callback: Any) -> None:
        pass


class _Service(NamedTuple):
    """Who asks, as the hub's handlers want to know."""

    kind: str = "service"
    name: str = "nbgpu"


async def stop(spawner: GPUSliceMixin) -> None:
    """Stop a server as the hub does when it is asked to by its API, whose handler this is: proxy, hooks, state, metrics and events."""
    app = spawner.user.settings["app"]
    handler = BaseHandler(app.tornado_application, HTTPServerRequest("DELETE", app.hub.base_url, connection=_Nobody()))  # pyright: ignore[reportArgumentType]
    handler._jupyterhub_user = _Service()
    await handler.stop_single_user(spawner.user, spawner.name)
