"""Puts the slice's routes, events and activity into a Jupyter server."""

from __future__ import annotations

import asyncio
import atexit
import os
from datetime import datetime, timezone
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory

from nbgpu.errors import NbgpuError
from nbgpu.kernel_names import write_names
from nbgpu.logs import one_line

from . import askback, hub
from .client import SliceClient
from .handlers import routes
from .idle import tell_kernels
from .kernels import kernels_of
from .notices import SERVER
from .sampler import Json, Sampler

SCHEMA_ID = "https://schema.nbgpu.io/slice/v1"
PROVISIONER = "nbgpu-provisioner"
_SCHEMA = Path(__file__).with_name("event_schemas") / "slice-v1.yaml"
_ACTIVITY_SECONDS = 60
KERNEL_ACTIONS = "https://events.jupyter.org/jupyter_server/kernel_actions/v1"
SESSION_SECONDS = 1.0
"""A kernel's session is saved after the kernel has started."""


def load(serverapp: Any) -> None:
    """Add nbgpu to `serverapp`. On a server without a slice (no ``$NBGPU_SOCKET``) the answer "no slice", and ``%gpu`` that says so."""
    socket_path = os.environ.get("NBGPU_SOCKET")
    web_app = serverapp.web_app
    if os.environ.get("NBGPU_PLAIN_TERMINALS"):
        serverapp.io_loop.add_callback(plain_terminals, serverapp)  # once all extensions are loaded, that of terminals too
    _use_provisioner(serverapp)
    if not socket_path:
        web_app.add_handlers(".*$", routes(web_app.settings["base_url"], None, SERVER))
        return
    life = Life(Path(serverapp.info_file))
    client = SliceClient(socket_path)
    sampler = Sampler(client, lambda: kernels_of(serverapp), SERVER, tell_names=NameFile(serverapp.log).write, ends=life.ends)
    asked = askback.AskedBack(SERVER)
    web_app.add_handlers(".*$", routes(web_app.settings["base_url"], sampler, SERVER, asked))
    _emit_notices(serverapp)
    _follow_kernels(serverapp, sampler, life)
    idle = tell_kernels(SliceClient(socket_path), lambda: kernels_of(serverapp))
    tasks = [sampler.follow_events(), _keep_busy_server(sampler, web_app.settings), idle]
    if hub.offered():
        tasks.append(askback.follow(asked))
    web_app.settings["nbgpu_tasks"] = [_start(serverapp, task) for task in tasks]
    serverapp.log.info("nbgpu: this server has a GPU slice, its agent is asked at %s", socket_path)


class Life:
    """Whether the server is about to end: first of all it takes back the file `info` that says where it is."""

    def __init__(self, info: Path):
        self._info = info
        self._was_there = False

    def look(self) -> None:
        """Look while the server runs: one whose file could not be written is never said to end."""
        self._was_there = self._was_there or self._info.exists()

    def ends(self) -> bool:
        """Return whether it ends now."""
        return self._was_there and not self._info.exists()


class NameFile:
    """The file in which the command line finds the notebooks' names; it goes with the server."""

    def __init__(self, log: Any):
        self._log = log
        self._path: Path | None = None

    def write(self, slice_id: str, names: dict[str, Json]) -> None:
        """Write what the kernels are called now; a directory that cannot be written costs the names only."""
        try:
            path = write_names(slice_id, names)
        except OSError as error:
            self._log.debug("nbgpu: kernels' names for `nbgpu limit` were not written: %s", error)
            return
        if self._path is None and path is not None:
            atexit.register(path.unlink, missing_ok=True)
        self._path = path


def _follow_kernels(serverapp: Any, sampler: Sampler, life: Life) -> None:
    """Look at the kernels again soon after one has come or gone, also when no page is open."""

    async def heard(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        if data.get("action") in ("start", "shutdown"):
            life.look()
            await asyncio.sleep(SESSION_SECONDS)
            sampler.forget()
            await sampler.usage()

    try:
        serverapp.event_logger.add_listener(schema_id=KERNEL_ACTIONS, listener=heard)
    except Exception as error:  # another version of the server: names are as of the last look at the panel
        serverapp.log.debug("nbgpu: kernels that come and go are not followed: %s", error)


def plain_terminals(serverapp: Any) -> None:
    """Let terminals start the same shell as before, but not as a login shell: that would set PATH anew and lose ``nbgpu``.

    A ``shell_command`` that is configured, anywhere, is left alone.
    """
    manager = serverapp.web_app.settings.get("terminal_manager")
    if manager is not None and serverapp.terminado_settings.get("shell_command") is None:
        manager.shell_command = [word for word in manager.shell_command if word != "-l"]


def _start(serverapp: Any, task: Any) -> asyncio.Future[None]:
    """Run `task` on the server's loop, which may not run yet; a failure is logged, not lost."""
    future = asyncio.ensure_future(task, loop=serverapp.io_loop.asyncio_loop)

    def done(ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and ended.exception():
            serverapp.log.error("nbgpu: a background task failed", exc_info=ended.exception())

    future.add_done_callback(done)
    return future


def _use_provisioner(serverapp: Any) -> None:
    """Start this server's kernels through our provisioner, unless the admin has named another one."""
    factory = KernelProvisionerFactory.instance(parent=serverapp)
    if factory.default_provisioner_name != "local-provisioner":
        return
    if PROVISIONER in {entry_point.name for entry_point in entry_points(group=KernelProvisionerFactory.GROUP_NAME)}:
        factory.default_provisioner_name = PROVISIONER
    elif os.environ.get("NBGPU_SOCKET"):
        serverapp.log.warning(
            "nbgpu: the kernel provisioner is not installed (pip install 'nbgpu[lab]'): limits in notebooks' metadata are not set"
        )


def _emit_notices(serverapp: Any) -> None:
    """Send every notice to the server's event log as well."""
    serverapp.event_logger.register_event_schema(_SCHEMA)

    def emit(notice: Json) -> None:
        try:
            serverapp.event_logger.emit(schema_id=SCHEMA_ID, data=notice)
        except Exception as error:  # not of the schema, or a listener's: whoever tells of the next one goes on
            serverapp.log.warning("nbgpu: a notice was not sent as an event: %s", one_line(str(error)[:200]))

    SERVER.listeners.append(emit)


async def _keep_busy_server(sampler: Sampler, settings: dict[str, Any]) -> None:
    """While the slice's GPU works, the server counts as active: a training in a terminal must not be culled."""
    while True:
        await asyncio.sleep(_ACTIVITY_SECONDS)
        try:
            history = await sampler.history(_ACTIVITY_SECONDS)
            busy = any(any(device["compute_used_milli"]) for device in history["devices"].values())
        except (NbgpuError, KeyError, TypeError):
            continue
        if busy:
            settings["nbgpu_last_activity"] = datetime.now(timezone.utc)
