"""Starts kernels of any language inside the slice: under their own id, and with the limit that their notebook asks for."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from nbgpu.errors import NbgpuError
from nbgpu.kernel_limits import kernel_limit
from nbgpu.logs import one_line

from .client import SliceClient
from .kernel_args import kernel_arguments, magic_argument
from .kernels import starts
from .limits import NO_LIMIT, ORIGINS
from .notices import SERVER

_MAX_NOTEBOOK_BYTES = 256 * 1024**2


class SliceProvisioner(LocalProvisioner):
    """A local kernel that carries ``NBGPU_KERNEL_ID``; its limit comes from the notebook's metadata.

    ``"nbgpu": {"memory": "5 GiB", "compute": "1/2"}`` in a notebook's metadata limits its kernel before the process starts; a fraction
    is of the server's slice. Junk there becomes a notice: the kernel starts in any case. A restart of the kernel reads the metadata again;
    a limit that was set since, from the panel without keeping it in the notebook or by a command, outlives it. In a server without a
    slice a Python kernel gets ``%gpu`` alone, which says so.
    """

    _started = False

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Name the kernel in its environment, and limit it."""
        env = {**(kwargs.get("env") or os.environ), "NBGPU_KERNEL_ID": self.kernel_id}
        kwargs["env"] = env
        socket_path, notebook = os.environ.get("NBGPU_SOCKET"), env.get("JPY_SESSION_NAME", "")
        if socket_path:
            starts(self.kernel_id, notebook, getattr(getattr(self.parent, "parent", None), "root_dir", ""))
            await self._limit(SliceClient(socket_path), notebook, again=self._started)
        self._started = True
        argv = self.kernel_spec.argv
        more = await kernel_arguments(SliceClient(socket_path), argv) if socket_path else magic_argument(argv)
        kwargs["extra_arguments"] = [*(kwargs.get("extra_arguments") or []), *more]
        return await super().pre_launch(**kwargs)

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the limit with the kernel."""
        await super().cleanup(restart=restart)
        socket_path = os.environ.get("NBGPU_SOCKET")
        if socket_path and not restart:
            ORIGINS.ended(self.kernel_id)
            try:
                await SliceClient(socket_path).put(f"/v1/kernels/{self.kernel_id}", NO_LIMIT)
            except NbgpuError as error:
                self.log.debug("nbgpu: the limit of kernel %s stays until the slice ends: %s", self.kernel_id, error)

    async def _limit(self, client: SliceClient, notebook: str, *, again: bool) -> None:
        name = one_line(Path(notebook).name)
        try:
            if again and not Path(notebook).is_file():
                return  # renamed since the start: what it says cannot be read, and what holds goes on holding
            asked = await asyncio.to_thread(read_metadata, notebook)
            before, source = ORIGINS.last(self.kernel_id)
            if asked is None and source != "notebook":
                return
            if again and (source == "panel" or (await client.get("/v1/kernels")).get(self.kernel_id, NO_LIMIT) != before):
                return  # set since, not by the notebook
            limit = NO_LIMIT if asked is None else kernel_limit(asked, (await client.get("/v1/usage"))["devices"])
            if limit != before:
                ORIGINS.remember(self.kernel_id, await client.put(f"/v1/kernels/{self.kernel_id}", limit), "notebook", asked)
        except NbgpuError as error:
            self._tell(f"{name} asks in its metadata (nbgpu) for a limit that was not set: {error.message} {self._as_it_is()}")
        except Exception as error:
            self._tell(f"The limit in the metadata of {name} was not set ({type(error).__name__}). {self._as_it_is()}")

    def _as_it_is(self) -> str:
        limited = ORIGINS.last(self.kernel_id)[0] != NO_LIMIT
        return "Its kernel keeps the limit that it has." if limited else "Its kernel runs with the whole slice."

    def _tell(self, message: str) -> None:
        self.log.warning("nbgpu: kernel %s: %s", self.kernel_id, message)
        SERVER.say("metadata", message, kernel_id=self.kernel_id)


def read_metadata(notebook: str) -> object:
    """Return what a notebook's metadata says under ``nbgpu``, None when it says nothing or is no readable notebook file.

    Large notebooks that do not mention the word are not parsed.
    """
    path = Path(notebook)
    try:
        if path.suffix != ".ipynb" or not path.is_file() or path.stat().st_size > _MAX_NOTEBOOK_BYTES:
            return None
        content = path.read_bytes()
        if b'"nbgpu"' not in content:
            return None
        metadata = json.loads(content).get("metadata")
    except (OSError, ValueError, AttributeError):
        return None
    return metadata.get("nbgpu") if isinstance(metadata, dict) else None
