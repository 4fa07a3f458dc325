"""Servers as processes on this machine: the slice is prepared before the process starts, and knows its pid right after."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from jupyterhub.spawner import LocalProcessSpawner, SimpleLocalProcessSpawner
from jupyterhub.utils import maybe_future
from traitlets import Any as AnyTrait
from traitlets import Bool, TraitError, default

from nbgpu.errors import NbgpuError
from nbgpu.launch import environment
from nbgpu.models import Grant, Launch, Request
from nbgpu.procs import is_alive

from .mixin import GPUSliceMixin
from .profiles import Profile, custom_fields, default_profiles, overrides
from .refusal import GPURefusal

PROVISIONER = "nbgpu-provisioner"
_HOLD_BACK = ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "nbgpu"]
"""Runs what follows once a line has come; ends when whoever would send it has died."""


class LocalGPUMixin(GPUSliceMixin):
    """`GPUSliceMixin` for spawners that start servers on the hub's own machine."""

    profile_list = AnyTrait(
        config=True,
        help="""What the start page offers: a list of profiles (or a dict, or a callable of the spawner) in KubeSpawner's format.

        `kubespawner_override` sets any trait of this spawner. A profile with ``"gpu_custom": True`` lets the user say how much.
        For example::

            c.LocalGPUMixin.profile_list = [
                {"display_name": "CPU only", "slug": "cpu", "default": True},
                {"display_name": "A third of a GPU", "kubespawner_override": {"gpu_fraction": "1/3", "gpu_mode": "strict"}},
            ]
        """,
    )

    @default("profile_list")
    def _default_profile_list(self) -> list[Profile]:
        return default_profiles(self._gpu_configured)

    gpu_login_terminals = Bool(
        False,
        config=True,
        help="""True: JupyterLab's terminals are login shells, as they are without nbgpu. These set PATH anew and then find
        neither `nbgpu` nor what a slice brings along. A `terminado_settings` of the admin's or the user's own wins in any case.
        """,
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gpu_launch: Launch | None = None
        self._gpu_command = ""

    async def apply_gpu_profile(self, profile: Profile | None, options: dict[str, Any]) -> None:
        """Set the traits that the checked `options` stand for."""
        for chosen in overrides(profile, options):
            for name, value in chosen.items():
                value = await maybe_future(value(self)) if callable(value) else value
                try:
                    self._apply_overrides({name: value})
                except TraitError as error:
                    self.log.error("Profile %s sets %s wrongly: %s", (profile or {}).get("slug"), name, error)
                    raise GPURefusal("This profile is set up wrongly; ask the admin.", reason="gpu-profile", status_code=500) from None
        for name, value in custom_fields(profile, options).items():
            setattr(self, name, value)

    async def start(self) -> Any:
        """Get the slice, prepare it, start the server inside it."""
        self._gpu_launch = None
        grant = await self.acquire_slice()
        if grant is None:
            return await maybe_future(super().start())
        try:
            if self._gpu_launch is None:  # it had to wait
                self._gpu_launch = await self.pool.prepare(grant.request.request_id, self.gpu_uid())
            with self._held_back() as let_go:
                where = await maybe_future(super().start())
                await self.gpu_started()
                await asyncio.gather(self.bind_slice(self.gpu_server_pid()), self._save_address(where))
                let_go()
        except BaseException as error:
            # once the server lives, the hub stops it first: `run_post_stop_hook` releases then
            if self.gpu_server_pid() is None:
                await self.give_back()
            if isinstance(error, NbgpuError):
                raise self.refuse(error) from None
            raise
        return where

    async def ask_for_slice(self, request: Request) -> Grant:
        """Send the request; what is granted at once comes prepared."""
        answer = await self.pool.launch(request, self.gpu_uid())
        self._gpu_launch = answer.launch
        return answer.grant

    @contextmanager
    def _held_back(self) -> Iterator[Callable[[], None]]:
        """Hold the server's process back until the returned function is called: then it is known to the hub and in its slice.

        A hub that dies before that takes the process along, which nobody would know of; a server never runs outside of its slice.
        """
        if not isinstance(self, LocalProcessSpawner):
            yield lambda: None
            return
        command, kwargs = self.cmd, self.popen_kwargs
        read_end, write_end = os.pipe()
        try:
            self._gpu_command = command[0] if command else ""
            self.cmd = [*_HOLD_BACK, *command]
            self.popen_kwargs = {**kwargs, "stdin": read_end}
            yield lambda: _write(write_end)
        finally:
            self.cmd, self.popen_kwargs, self._gpu_command = command, kwargs, ""
            os.close(read_end)
            os.close(write_end)

    async def _save_address(self, where: Any) -> None:
        """Let a hub that is killed from here on find the server again."""
        await asyncio.sleep(0.001)  # saving holds this loop up: first the pool is asked
        if self.server is not None and isinstance(where, tuple):
            self.server.ip, self.server.port = where
        self.save_early_state()

    async def gpu_started(self) -> None:
        """The server was just started: learn what `gpu_server_pid` needs to know."""

    def gpu_search_path(self, env: dict[str, str]) -> str | None:
        """Return where the server's command is looked for."""
        return env.get("PATH")

    def gpu_uid(self) -> int | None:
        """Return who may use the slice's files; None stands for the agent's own account."""
        return pwd.getpwnam(self.user.name).pw_uid

    def gpu_server_pid(self) -> int | None:
        """Return the pid of this server while it lives."""
        pid = getattr(self, "pid", 0)
        process = getattr(self, "proc", None)
        if not pid or (process is not None and process.poll() is not None):
            return None
        return pid if os.path.exists(f"/proc/{pid}") else None

    async def _signal(self, sig: int) -> bool:
        """Signal 0 asks whether the server lives: one that has ended and that nobody has waited for yet does not.

        A hub that starts again would take it for alive, and wait for its answer until `http_timeout`.
        """
        if sig == 0 and not is_alive(self.pid):  # pyright: ignore[reportAttributeAccessIssue]
            return False
        return await super()._signal(sig)  # pyright: ignore[reportAttributeAccessIssue]

    def get_env(self) -> dict[str, str]:
        """Add the slice's environment; a server without a GPU gets none of it."""
        env = super().get_env()
        if not self.gpu_login_terminals:
            env["NBGPU_PLAIN_TERMINALS"] = "1"  # nbgpu_lab reads it
        if self._gpu_launch is None:
            return env
        env = environment(env, self._gpu_launch)
        if server_has_provisioner(self._gpu_command or (self.cmd[0] if self.cmd else ""), self.gpu_search_path(env)):
            env.setdefault("JUPYTER_DEFAULT_PROVISIONER_NAME", PROVISIONER)
        return env


class LocalGPUSpawner(LocalGPUMixin, LocalProcessSpawner):
    """Servers of real users of this machine, each with a slice of a GPU."""


class SimpleLocalGPUSpawner(LocalGPUMixin, SimpleLocalProcessSpawner):
    """Servers for any name, all under the hub's own account: for trying nbgpu. It isolates nobody, and the start page says so."""

    @default("gpu_isolates")
    def _default_gpu_isolates(self) -> bool:
        return False

    def gpu_uid(self) -> int | None:
        """Return None: every server runs as the hub's account, which is the agent's."""
        return None


def _write(end: int) -> None:
    with suppress(BrokenPipeError):  # it has died: the hub will see
        os.write(end, b"go\n")


@cache
def server_has_provisioner(command: str, path: str | None = None) -> bool:
    """Return whether the Python of the server's `command` has nbgpu's kernel provisioner installed.

    Naming a provisioner that is missing would hide every kernel. Only looks at files: the command may be run as another user.
    """
    program = shutil.which(command or "jupyterhub-singleuser", path=path)
    if program is None:
        return False
    prefixes = {Path(program).parent.parent}
    if Path(program).parent == Path(sys.executable).parent:
        prefixes.add(Path(sys.prefix))
    for prefix in prefixes:
        for names in prefix.glob("lib/python3*/*-packages/nbgpu-*.dist-info/entry_points.txt"):
            if PROVISIONER in names.read_text(errors="replace"):
                return True
    return False
