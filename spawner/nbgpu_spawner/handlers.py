"""What the hub serves for nbgpu: what is free now, and leaving the queue."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from jupyterhub.apihandlers.base import APIHandler
from jupyterhub.handlers.base import BaseHandler
from jupyterhub.scopes import needs_scope
from jupyterhub.utils import url_escape_path, url_path_join
from tornado import web

from .mixin import GPUSliceMixin


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


class LeaveHandler(BaseHandler):
    """``POST /hub/nbgpu/leave?user=&server=``: end a start that waits for a GPU."""

    @web.authenticated
    async def post(self) -> None:
        """Leave, then go back to the start page."""
        user_name = self.get_argument("user", "", strip=False) or self.current_user.name  # pyright: ignore[reportOptionalMemberAccess]
        await self._leave(user_name=user_name, server_name=self.get_argument("server", "", strip=False))

    @needs_scope("servers")
    async def _leave(self, user_name: str, server_name: str) -> None:
        user = self.find_user(user_name)
        if user is None or server_name not in user.spawners:
            raise web.HTTPError(404, "No such server")
        spawner: Any = user.spawners[server_name]
        if isinstance(spawner, GPUSliceMixin) and spawner.leave_gpu_queue() and spawner._spawn_future:
            await asyncio.wait([spawner._spawn_future], timeout=5)
        page = "spawn" if not spawner.active else "spawn-pending"
        self.redirect(url_path_join(self.hub.base_url, page, user.escaped_name, url_escape_path(server_name)))


HANDLERS = [(r"/api/nbgpu/availability", AvailabilityHandler), (r"/nbgpu/leave", LeaveHandler)]
