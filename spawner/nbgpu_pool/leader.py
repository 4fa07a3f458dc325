"""One of several replicas leads, by a Lease; who cannot renew it stops to act before another may take it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone

from nbgpu.errors import NbgpuError
from nbgpu.kube import Conflict, Json, Kube, NotFound, path

LEASE = "nbgpu-pool"
LEASE_SECONDS = 15
"""Others take over when the lease was not renewed for so long."""
ACT_SECONDS = 10.0
"""The leader acts for so long after it began to renew."""
RENEW_SECONDS = 2.0

log = logging.getLogger("nbgpu.pool")


class Leader:
    """Tries to lead, for ever.

    Parameters
    ----------
    identity : str
        Of this process, unlike any other's.
    began, ended : callable
        Awaited when a term of this process begins, and when another has taken over.
    clock : callable
        Monotonic, seconds.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        began: Callable[[], Awaitable[None]],
        ended: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.identity = identity
        self.holder = ""
        """Who leads, as far as is known."""
        self._kube = kube
        self._leases = path("coordination.k8s.io/v1", "leases", namespace)
        self._began, self._ended = began, ended
        self._clock = clock
        self._until = 0.0
        self._in_term = False
        self._seen: tuple[str, float] = ("", 0.0)
        """The lease's version, and when it was first seen here: clocks of other machines are not asked."""

    def leads(self) -> bool:
        """Whether this process may act now."""
        return self._in_term and self._clock() < self._until

    async def run(self) -> None:
        """Acquire, renew, acquire again."""
        while True:
            try:
                await asyncio.wait_for(self._round(), ACT_SECONDS)
            except (NbgpuError, TimeoutError, asyncio.TimeoutError) as error:
                log.warning("lease: %s", error or "no answer in time")
            except Exception:
                log.exception("lease: failed, trying again")
            await asyncio.sleep(RENEW_SECONDS)

    async def _round(self) -> None:
        begun = self._clock()
        lease: Json
        try:
            lease = await self._kube.get(f"{self._leases}/{LEASE}")
        except NotFound:
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": LEASE}, "spec": {}}
        self.holder = str(lease["spec"].get("holderIdentity") or "")
        mine = self.holder == self.identity
        if not mine and self._in_term:
            self._in_term = False
            log.warning("no longer leading: %s does", self.holder or "nobody")
            await self._ended()
        if not mine and self.holder and not self._expired(lease):
            return
        try:
            await self._write(lease, self.identity, LEASE_SECONDS)
        except Conflict:
            return  # another was faster
        self._until = begun + ACT_SECONDS
        self.holder = self.identity
        if not self._in_term:
            log.info("leading as %s", self.identity)
            self._in_term = True
            await self._began()

    def _expired(self, lease: Json) -> bool:
        version = str(lease["metadata"].get("resourceVersion", ""))
        if version != self._seen[0]:
            self._seen = version, self._clock()
        return self._clock() - self._seen[1] > float(lease["spec"].get("leaseDurationSeconds") or LEASE_SECONDS)

    async def _write(self, lease: Json, holder: str, seconds: int) -> None:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: Json = lease["spec"]
        if spec.get("holderIdentity") != holder:
            spec = {**spec, "acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        lease = {**lease, "spec": {**spec, "holderIdentity": holder, "renewTime": now, "leaseDurationSeconds": seconds}}
        if "resourceVersion" in lease["metadata"]:
            await self._kube.replace(f"{self._leases}/{LEASE}", lease)
        else:
            await self._kube.create(self._leases, lease)

    async def give_up(self) -> None:
        """Let another lead at once."""
        self._until = 0.0
        if self._in_term:
            self._in_term = False
            lease = await self._kube.get(f"{self._leases}/{LEASE}")
            if lease["spec"].get("holderIdentity") == self.identity:
                await self._write(lease, "", 1)
