"""The pool on Kubernetes: `python -m nbgpu_pool --kubernetes --listen 0.0.0.0:8200 --config FILE --seal-key FILE`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import cast

import uvicorn

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.http import App
from nbgpu.kube import Kube, seal_key
from nbgpu.kube_check import cluster_problem

from .api import create_app
from .auth import Guard
from .config import Config, ConfigError
from .endpoint import Endpoint, own_endpoint
from .gate import Gate
from .kube_ledger import KubeLedger
from .leader import Leader
from .service import Service

LOOK_AGAIN_SECONDS = 15.0
COLLECT_AFTER = 200_000
"""Objects made between two looks of the garbage collector. What a page of a list is read into goes by itself; Python's own 700 make the
collector look through all claims again and again, which took more than half of a rebuild's time."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

log = logging.getLogger("nbgpu.pool")


class Replica:
    """One replica of the pool: leads or waits.

    Parameters
    ----------
    key : bytes
        The installation's key, that seals claims.
    namespace : str
        Where the lease is.
    """

    @classmethod
    def connect(cls, config: Config, guard: Guard, key_file: Path) -> Replica:
        """Return a replica for the cluster at hand; `NbgpuError` where something that it needs is missing."""
        return cls(Kube(), config, guard, seal_key(key_file), own_namespace())

    def __init__(self, kube: Kube, config: Config, guard: Guard, key: bytes, namespace: str):
        self._kube, self._config, self._guard, self._key = kube, config, guard, key
        self._namespace = namespace
        self._service: Service | None = None
        self._endpoint: Endpoint | None = None
        self._leading_here: asyncio.Task[None] | None = None
        name = os.environ.get("NBGPU_POD_NAME") or socket.gethostname()
        self.leader = Leader(kube, namespace, f"{name}_{uuid.uuid4().hex[:8]}", self._begin, self._end)
        self.gate = Gate(self.leader.leads, lambda: self.leader.holder)
        self.gate.problem = Unavailable("The pool is starting.", code="starting")

    def configure(self, config: Config) -> None:
        """Go on with another configuration; `ConfigError` where a pool on Kubernetes cannot."""
        check(config)
        self._config = config
        if self._service is not None:
            self._service.configure(config.settings())

    def listens(self, port: int) -> None:
        """Note the port at which this replica is found while it leads."""
        self._endpoint = own_endpoint(self._kube, self._namespace, port, self.leader.leads)

    async def run(self) -> None:
        """Look at the cluster until it can be used, then try to lead."""
        said = ""
        while (problem := await self._problem()) is not None:
            self.gate.problem = Unavailable(problem, code="cluster")
            if problem != said:
                log.error("%s", problem)
            said = problem
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        self.gate.problem = None
        await self.leader.run()

    async def _problem(self) -> str | None:
        try:
            return await cluster_problem(self._kube, *claims_namespaces(self._config, self._namespace))
        except NbgpuError as error:
            return error.message

    async def _begin(self) -> None:
        """A term begins: with books that are rebuilt from what is there now."""
        await self._end()
        config = self._config
        ledger = KubeLedger(
            self._kube,
            self._key,
            ttl_seconds=config.reservation_ttl_seconds,
            may_act=self.leader.leads,
            coming=[group.group() for group in config.coming],
            hubs=hubs_namespaces(config),
            agents_in=self._namespace,
        )
        service = Service(ledger, config.settings())
        service.start()
        self._service = service
        self.gate.core, self.gate.app = service.core, cast("App", create_app(service, self._guard))
        if self._endpoint is not None:
            self._leading_here = asyncio.create_task(self._endpoint.run())

    async def _end(self) -> None:
        if self._leading_here is not None:
            self._leading_here.cancel()
            self._leading_here = None
        service, self._service = self._service, None
        self.gate.app = self.gate.core = None
        if service is not None:
            await service.stop()

    async def stop(self) -> None:
        """End the term, if there is one, so that another may begin."""
        await self._end()
        with contextlib.suppress(NbgpuError):
            await self.leader.give_up()
        await self._kube.close()


def claims_namespaces(config: Config, own: str) -> list[str]:
    """Return namespaces where the pool makes claims."""
    named = [one for token in config.tokens for one in token.namespaces or () if not set(one) & set("*?[")]
    return list(dict.fromkeys(named)) or [own]


def hubs_namespaces(config: Config) -> dict[str, list[str]]:
    """Return each hub with patterns of the namespaces where its servers may run."""
    found: dict[str, list[str]] = {}
    for token in config.tokens:
        if token.hub is not None:
            found.setdefault(token.hub, []).extend(token.namespaces or ())
    return found


def own_namespace() -> str:
    """Return the namespace that this pod runs in."""
    if "NBGPU_NAMESPACE" in os.environ:
        return os.environ["NBGPU_NAMESPACE"]
    with contextlib.suppress(OSError):
        return NAMESPACE_FILE.read_text().strip()
    raise ConfigError("NBGPU_NAMESPACE does not name the namespace of the pool's lease.")


def check(config: Config) -> None:
    """Raise `ConfigError` where the configuration lacks what a pool on Kubernetes needs."""
    if not config.tokens:
        raise ConfigError("--kubernetes needs tokens: name at least one under `tokens` in the configuration.")
    if config.idle.after_seconds is not None:
        raise ConfigError("idle.after_seconds is not offered on Kubernetes yet: leave it out.")
    for token in config.tokens:
        if token.role == "hub" and not token.namespaces:
            told = f"The token of hub {token.hub} names no `namespaces`: say where its servers may run, such as [jhub] or ['jhub-*']."
            raise ConfigError(told)


async def serve(replica: Replica, server: uvicorn.Server, listening: socket.socket, reload: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP has the configuration read again."""
    gc.set_threshold(COLLECT_AFTER)
    replica.listens(listening.getsockname()[1])
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reload)
    serving, leading = asyncio.create_task(server.serve(sockets=[listening])), asyncio.create_task(replica.run())
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait([stop, serving, leading], return_when=asyncio.FIRST_COMPLETED)
    if leading.done() and not leading.cancelled() and (error := leading.exception()) is not None:
        log.error("the pool cannot go on: %s", error)
    log.info("stopping")
    leading.cancel()
    stop.cancel()
    await replica.stop()
    server.should_exit = True
    await asyncio.gather(serving, leading, stop, return_exceptions=True)
