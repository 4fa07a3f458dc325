"""What the kubelet asks for: a claim becomes a slice with its files, and a CDI specification; and all of it goes again.

The order makes every moment a good one to die at. Prepare: `claims.json`, the slice, the CDI specification; unprepare: the other way round.
So a specification never names a slice that is not there, and whatever is left half made, the kubelet asks for again, or to be removed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from nbgpu.claim_limits import in_force, shares, with_limits
from nbgpu.claims import API_VERSION, DRIVER, BadObject, Claim, device_name, read_claim
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.kube import Kube, NotFound, path
from nbgpu.kube_events import Reporter, reference
from nbgpu.models import Device, Slice, SliceDevice
from nbgpu.own_claims import share_problem

from ..agent import Agent
from ..books import Conflict
from ..live import LiveSlice
from ..marks import mark
from ..slicedir import ClaimOf
from . import cdi
from .checkpoint import Checkpoint, Entry, Prepared
from .gpus import Gpus

Json = dict[str, Any]
log = logging.getLogger("nbgpu.agent")
LEAVE_SECONDS = 3.0
"""How long the last processes of a container may take to be gone, once the kubelet has ended it."""


ROOM_SECONDS = 30.0
"""How long a claim waits for the room that the scheduler has counted on, or for the API server. The kubelet gives a call 45 s, and asks
again after one that failed only when it looks at the pod next: after a minute or more."""
TRY_SECONDS = 0.25


class NotPrepared(NbgpuError):
    """A claim cannot be prepared, or let go; the message goes to the kubelet and is shown at the pod."""

    code = "not-prepared"
    status = 409


class Occupied(NotPrepared):
    """Processes of an earlier pod still run: it may be otherwise soon."""


class NodeClaims:
    """Prepares the claims of this node.

    Parameters
    ----------
    key : bytes or None
        The installation's key.
    foreign : bool
        Whether claims that the pool did not make are prepared too.

    Attributes
    ----------
    lock : asyncio.Lock
        Held by whoever changes slices of claims.
    """

    def __init__(
        self,
        agent: Agent,
        kube: Kube,
        reporter: Reporter,
        checkpoint: Checkpoint,
        gpus: Gpus,
        cdi_dir: Path,
        key: bytes | None,
        foreign: bool,
    ):
        self._agent = agent
        self._kube = kube
        self._reporter = reporter
        self.checkpoint = checkpoint
        self._gpus = gpus
        self._cdi_dir = cdi_dir
        self.key = key
        self._foreign = foreign
        self.lock = asyncio.Lock()
        self.prepared: Callable[[str], None] = lambda _: None
        """Told the uid of each claim that has just been prepared: other limits may be wanted of it by now."""

    def devices(self) -> Mapping[tuple[str, str], Device]:
        """Return this node's devices as allocations name them."""
        return {(device.node, device_name(device.uuid)): device for device in self._agent.devices.values()}

    def live(self, uid: str) -> LiveSlice | None:
        """Return the slice of a claim."""
        for live in self._agent.slices.values():
            if live.record.claim is not None and live.record.claim.uid == uid:
                return live
        return None

    # -- start -----------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take up what an agent before this one left: whole claims get back what is lost of them, halves of claims go."""
        known = {live.record.claim.uid for live in self._agent.slices.values() if live.record.claim is not None}
        for uid, entry in list(self.checkpoint.claims.items()):
            if uid in known:
                cdi.write(self._cdi_dir, uid, entry.spec)
                continue
            cdi.remove(self._cdi_dir, uid)
            self.checkpoint.drop(uid)
            log.info("claim %s/%s was only half prepared, or half let go: the kubelet asks again", entry.namespace, entry.name)
        for uid in cdi.claims_in(self._cdi_dir) - known:
            cdi.remove(self._cdi_dir, uid)

    # -- prepare -----------------------------------------------------------------------------------------------------------

    async def prepare(self, namespace: str, name: str, uid: str) -> tuple[Prepared, ...]:
        """Make a claim's slice, or find it made, and return its devices.

        Raises
        ------
        NbgpuError
            It is not served here; the message is for the pod's events.
        """
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            claim: Json | None = None
            try:
                claim = await self._get(namespace, name, uid)
                mark("prepare-begin")
                async with self.lock:
                    parts = await self._prepare(claim)
                self.prepared(uid)
                return parts
            except NbgpuError as error:
                entry = self.checkpoint.claims.get(uid)
                if isinstance(error, Unavailable) and entry is not None and self.live(uid) is not None:
                    return entry.parts  # it was allocated when it was prepared, and cannot have changed
                soon = isinstance(error, (Conflict, Occupied, Unavailable)) and time.monotonic() < deadline
                if claim is not None:
                    about = reference(API_VERSION, "ResourceClaim", claim["metadata"])
                    self._reporter.say(about, "WaitsForRoom" if soon else "NotPrepared", error.message, "Normal" if soon else "Warning")
                if not soon:
                    raise
            await asyncio.sleep(TRY_SECONDS)

    async def _get(self, namespace: str, name: str, uid: str) -> Json:
        try:
            claim = await self._kube.get(path(API_VERSION, "resourceclaims", namespace, name))
        except NotFound:
            raise NotPrepared(f"ResourceClaim {namespace}/{name} is gone.") from None
        if claim["metadata"].get("uid") != uid:
            raise NotPrepared(f"ResourceClaim {namespace}/{name} is another one by now.")
        return claim

    async def _prepare(self, claim: Json) -> tuple[Prepared, ...]:
        told = self._read(claim)
        wanted = self._slice(claim, told)
        live = self.live(told.uid)
        if live is not None and _uuids(live.slice) != _uuids(wanted):
            # allocated anew without having been let go
            await self._end(told.uid, live, "its claim was allocated anew")
            live = None
        entry = self.checkpoint.claims.get(told.uid)
        if live is None:
            await self._make_room(wanted.slice_id)
            entry = self._entry(claim, told, wanted.slice_id)
            self._agent.check(wanted)  # refused before anything is written
            await asyncio.to_thread(self.checkpoint.put, told.uid, entry)
            mark("prepare-noted")
            of = ClaimOf(uid=told.uid, namespace=told.namespace, name=told.name, pods=told.pods)
            try:
                self._agent.put_slice(wanted, None, of)
            except NbgpuError:
                self.checkpoint.drop(told.uid)
                raise
            mark("prepare-sliced")
        else:
            self.set_pods(live, told.pods)
            if entry is None:  # the checkpoint was lost
                entry = self._entry(claim, told, live.id)
                await asyncio.to_thread(self.checkpoint.put, told.uid, entry)
        await asyncio.to_thread(cdi.write, self._cdi_dir, told.uid, entry.spec)
        mark("prepare-done")
        return entry.parts

    def _read(self, claim: Json) -> Claim:
        found = read_claim(claim, self.devices(), self.key)
        name = f"{claim['metadata'].get('namespace')}/{claim['metadata'].get('name')}"
        if found is None or not found.allocated:
            raise NotPrepared(f"ResourceClaim {name} holds no device of {DRIVER}.")
        if not found.sealed and not self._foreign:
            raise NotPrepared(
                f"ResourceClaim {name} was not made by nbgpu's pool, and its administrator allows no others here "
                "(chart: agent.foreignClaims). Start a server from the hub instead."
            )
        strange = None if found.sealed else share_problem(claim)
        if strange is not None:
            raise NotPrepared(f"ResourceClaim {name} is not prepared: {strange}")
        return found

    def _slice(self, claim: Json, told: Claim) -> Slice:
        """Return the slice of a claim with the limits in force; several parts of one device are one."""
        parts: dict[str, SliceDevice] = {}
        for part in told.slice.devices:
            parts.setdefault(part.uuid, part)
        limits = in_force(shares(claim, self.devices()))
        try:
            whole = told.slice.model_copy(update={"devices": list(parts.values())})
            return Slice.model_validate(with_limits(whole, limits).model_dump())
        except ValueError as error:  # pydantic's
            raise BadObject(f"ResourceClaim {told.namespace}/{told.name} cannot be a slice ({str(error)[:200]}).") from None

    def _entry(self, claim: Json, told: Claim, slice_id: str) -> Entry:
        """Return what is noted of a claim: its devices for the kubelet, and what its containers get."""
        agent = self._agent
        parts: list[Prepared] = []
        named: list[cdi.Part] = []
        devices = self.devices()
        for result in cast("list[Json]", claim["status"]["allocation"]["devices"]["results"]):
            if result.get("driver") != DRIVER:
                continue
            device = devices[result["pool"], result["device"]]
            number = len(parts)
            theirs, edits = self._gpus.container_gets(device)
            named.append(cdi.Part(f"{told.uid}-{number}", device, edits))
            parts.append(
                Prepared(
                    request=str(result.get("request", "")),
                    pool=str(result["pool"]),
                    device=str(result["device"]),
                    share_id=result.get("shareID"),
                    cdi=(*theirs, cdi.device_id(told.uid, number)),
                )
            )
        directory = agent.settings.runtime / "slices" / slice_id
        spec = cdi.specification(told.uid, directory, agent.settings.libraries, agent.settings.machine, named)
        return Entry(namespace=told.namespace, name=told.name, slice_id=slice_id, sealed=told.sealed, parts=tuple(parts), spec=spec)

    async def _make_room(self, slice_id: str) -> None:
        """End the slice of an earlier claim with this name, if its pod is gone and only the kubelet has not said so yet."""
        other = self._agent.slices.get(slice_id)
        if other is not None and other.record.claim is not None:
            await self._end(other.record.claim.uid, other, "its claim was made anew")

    def set_pods(self, live: LiveSlice, pods: tuple[str, ...]) -> None:
        """Note which pods a claim is reserved for; who had it before keeps it until the kubelet lets go of it."""
        claim = live.record.claim
        if claim is not None and not set(pods) <= set(claim.pods):
            alive = [pod for pod in claim.pods if pod not in pods and self._agent.cgroups.pod_members([pod])]
            live.save(claim=claim.model_copy(update={"pods": (*alive, *pods)}))

    # -- unprepare -----------------------------------------------------------------------------------------------------------

    async def unprepare(self, namespace: str, name: str, uid: str) -> None:
        """End a claim's slice; nothing to do where there is none.

        Raises
        ------
        Occupied
            Processes of it still run: the kubelet asks again.
        """
        mark("unprepare-begin")
        deadline = time.monotonic() + LEAVE_SECONDS
        while True:
            async with self.lock:
                try:
                    return await self._end(uid, self.live(uid), "its pod has ended")
                except Occupied:
                    if time.monotonic() > deadline:
                        raise
            await asyncio.sleep(0.05)

    async def _end(self, uid: str, live: LiveSlice | None, why: str) -> None:
        if live is not None and (pids := live.container_processes()):
            claim = live.record.claim
            named = f"{claim.namespace}/{claim.name}" if claim is not None else live.id
            some = ", ".join(map(str, sorted(pids)[:5]))
            raise Occupied(f"ResourceClaim {named} has processes that still run ({some}): its slice stays until they are gone.")
        await asyncio.to_thread(cdi.remove, self._cdi_dir, uid)
        mark("unprepare-hidden")
        if live is not None and self._agent.slices.get(live.id) is live:
            self._agent.end_claim(live, why)
        mark("unprepare-ended")
        await asyncio.to_thread(self.checkpoint.drop, uid)
        mark("unprepare-done")

    async def forget(self, uid: str) -> bool:
        """End the slice of a claim that is gone, if nothing of it runs; return whether it is ended."""
        async with self.lock:
            live = self.live(uid)
            if live is not None and (live.container_processes() or live.tenant.holders()):
                return False
            await self._end(uid, live, "its claim is gone")
            return True


def _uuids(of: Slice) -> set[str]:
    return {part.uuid for part in of.devices}
