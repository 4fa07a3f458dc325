"""``python -m nbgpu_agent --kubernetes``: waits for the node, then serves it as any agent does, and the kubelet beside."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nbgpu.kube import Kube, seal_key
from nbgpu.kube_events import Reporter

from ..agent import Agent
from ..nvml import Nvml
from ..runtime import RuntimeLock, StartError
from .cdi import LIBRARY, PRELOAD, write_whole
from .checkpoint import Checkpoint
from .claims import NodeClaims
from .follow import Follower
from .gpus import Gpus
from .plugin import Plugin
from .publisher import Publisher

if TYPE_CHECKING:
    from ..main import Options

log = logging.getLogger("nbgpu.agent")
LOCK_SECONDS = 0.1


class Kubernetes:
    """The agent's part on Kubernetes.

    Parameters
    ----------
    runtime : Path
        The runtime directory.

    Raises
    ------
    NbgpuError
        No key, or no way to the cluster.
    """

    def __init__(self, options: Options, runtime: Path):
        if options.node is None:
            raise StartError("--kubernetes needs --node: the name of the Node that this agent is on.")
        if options.seal_key is None and not options.foreign_claims:
            raise StartError("--kubernetes needs --seal-key: the file with the key that the pool seals its claims with.")
        self._options = options
        self._runtime = runtime
        self._key = None if options.seal_key is None else seal_key(options.seal_key)
        self._kube = Kube()
        # Containers get parts of it; nobody else on the node has business there.
        (runtime / "slices").chmod(0o700)
        self._plugin = Plugin(options.kubelet_dir, runtime, os.environ.get("POD_UID") or uuid.uuid4().hex[:12])

    def ready(self) -> bool:
        """Return whether the kubelet knows this agent: the one before it may end."""
        return self._plugin.registered.is_set()

    async def wait_for_lock(self, lock: RuntimeLock, ended: asyncio.Event, rehearse: Callable[[], Awaitable[None]]) -> bool:
        """Wait until the runtime directory is this agent's; False when it is to end before.

        While another has it (a DaemonSet is being updated) this one is registered already and passes on what the kubelet asks: from
        then on the other may end, so first it makes sure by `rehearse`, which raises otherwise, that it can serve as its options say.
        """
        if lock.take():
            return True
        await rehearse()
        log.info("another agent serves this node: waiting for its end")
        await self._plugin.start()
        while not lock.take():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended.wait(), LOCK_SECONDS)
                await self._plugin.stop()
                return False
        return True

    async def stop(self) -> None:
        """Take back what the kubelet knows of this agent; once is enough."""
        await self._plugin.stop()

    @contextlib.asynccontextmanager
    async def serving(self, agent: Agent, nvml: Nvml) -> AsyncGenerator[None, None]:
        """Serve the kubelet and keep the ResourceSlice, from when the slices are loaded until the agent ends."""
        options = self._options
        preload = agent.settings.libraries / PRELOAD
        if not preload.exists():
            write_whole(preload, f"{LIBRARY}\n")
        reporter = Reporter(self._kube, "nbgpu-agent")
        checkpoint = Checkpoint(self._runtime)
        gpus = Gpus(agent.settings.simulated, (options.cdi_dir, Path("/etc/cdi")))
        claims = NodeClaims(agent, self._kube, reporter, checkpoint, gpus, options.cdi_dir, self._key, options.foreign_claims)
        claims.restore()
        follower = Follower(agent, self._kube, reporter, claims)
        publisher = Publisher(agent, self._kube, reporter, follower.capacity, nvml.count)
        publisher.may = lambda: follower.items.ready
        follower.publisher = publisher
        try:
            self._plugin.serve(claims, agent)
            if not self._plugin.started:
                await self._plugin.start()
            follower.start()
            publisher.start()
            follower.look_at_all()
            yield
        finally:
            await self._plugin.stop()
            await publisher.stop()
            await follower.stop()
            await reporter.close()
            await self._kube.close()
