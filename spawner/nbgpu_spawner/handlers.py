"""What the hub serves for nbgpu: what is free now, and leaving the queue."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from jupyterhub.apihandlers.base import APIHandler
from jupyterhub.handlers.base import BaseHandler
from jupyterhub.scopes import needs_scope
from jupyterhub.utils import url_escape_path, url_path_join
from tornado import web

from nbgpu.errors import NbgpuError
from nbgpu.models import Request

from .mixin import GPUSliceMixin
from .profiles import options_of

PATIENCE_SECONDS = 10.0


class AvailabilityHandler(APIHandler):
    """``GET /hub/api/nbgpu/availability?user=&server=``: the start page's profiles, as of now."""

    async def get(self) -> None:
        """Answer for the logged-in user, or for `user` to who may see that user's servers."""
        if self.current_user is None:
            raise web.HTTPError(403)
        await self._answer(user_name=self.get_argument("user", "", strip=False) or self.current_user.name)

    @needs_scope("read:servers")
    async def _answer(self, user_name: str) -> None:
        user = self.find_user(user_name)
        if user is None:
            raise web.HTTPError(404, "No such user")
        name = self.get_argument("server", "", strip=False)
        spawner = user.spawners.get(name, user.spawner)
        if not isinstance(spawner, GPUSliceMixin):
            raise web.HTTPError(404, "Servers here have no GPU slices")
        state = await spawner.gpu_start_state()
        self.set_header("Cache-Control", "no-store")
        self.write(json.dumps(state.as_json()))


class QueueHandler(BaseHandler):
    """What a button of the queue page posts to: for the server's user, or who may start and stop that user's servers."""

    @web.authenticated
    async def post(self) -> None:
        """Do it, then go to the page where that server is now."""
        user_name = self.get_argument("user", "", strip=False) or self.current_user.name  # pyright: ignore[reportOptionalMemberAccess]
        await self._for(user_name=user_name, server_name=self.get_argument("server", "", strip=False))

    @needs_scope("servers")
    async def _for(self, user_name: str, server_name: str) -> None:
        user = self.find_user(user_name)
        if user is None or server_name not in user.spawners:
            raise web.HTTPError(404, "No such server")
        page = await self.act(user, server_name, user.spawners[server_name])
        self.redirect(url_path_join(self.hub.base_url, page, user.escaped_name, url_escape_path(server_name)))

    async def act(self, user: Any, server_name: str, spawner: Any) -> str:
        """Do what the button says; return the hub's page to go to."""
        raise NotImplementedError


class LeaveHandler(QueueHandler):
    """``POST /hub/nbgpu/leave?user=&server=``: end a start that waits for a GPU."""

    async def act(self, user: Any, server_name: str, spawner: Any) -> str:
        """Leave, then go back to the start page."""
        if isinstance(spawner, GPUSliceMixin) and spawner.leave_gpu_queue() and spawner._spawn_future:
            await asyncio.wait([spawner._spawn_future], timeout=5)
        return "spawn" if not spawner.active else "spawn-pending"


class SmallerHandler(QueueHandler):
    """``POST /hub/nbgpu/smaller?user=&server=`` with ``choice``: start with a smaller share, in place of what is waited for."""

    async def act(self, user: Any, server_name: str, spawner: Any) -> str:
        """Take it, then go to the page of the start that waits on or begins."""
        options = options_of(self.get_body_argument("choice", ""))
        if options is None:
            raise web.HTTPError(400, "choice must be a JSON object of option names and values")
        if isinstance(spawner, GPUSliceMixin):
            with suppress(NbgpuError):  # its page says why; it waits on
                await self._start_instead(user, server_name, options, await spawner.take_instead(options), spawner)
        return "spawn-pending"

    async def _start_instead(self, user: Any, server_name: str, options: dict[str, Any], granted: Request, waiting: Any) -> None:
        """End the start that waited and begin the one that has its share; a share that no start gets goes back to the pool."""
        if waiting._spawn_future:
            await asyncio.wait([waiting._spawn_future], timeout=PATIENCE_SECONDS)
        if waiting.pending:
            await waiting.pool.release(granted.request_id)
            raise web.HTTPError(503, "The start that waited takes long to end. Nothing is reserved for you; start again in a minute.")
        user.get_spawner(server_name, replace_failed=True)
        spawner = user.spawners[server_name]
        spawner.gpu_begin_with(granted)
        start = asyncio.ensure_future(self.spawn_single_user(user, server_name=server_name, options=options))
        start.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # the start's own page tells of it
        await asyncio.wait([start], timeout=1)
        error = start.exception() if start.done() else None
        if error is not None:
            await spawner.give_back()
            if spawner._spawn_future is None:  # no page would show it
                raise error


HANDLERS = [(r"/api/nbgpu/availability", AvailabilityHandler), (r"/nbgpu/leave", LeaveHandler), (r"/nbgpu/smaller", SmallerHandler)]
