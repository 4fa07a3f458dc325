"""A stand-in for a node's agent, as far as limits go: it brings in force what the pool wants, by the rules of `nbgpu.claim_limits`."""

from __future__ import annotations

import asyncio
import contextlib
import time

from place_kit import RESOURCE, Place

from nbgpu.claim_limits import Limit, Share, Wanted, fits, in_force, is_settled, published, read_limits, report, shares, wanted_of
from nbgpu.claims import BadObject, device_name
from nbgpu.kube import Conflict, Json, NotFound, path
from nbgpu.kube_reflector import Reflector

Key = tuple[str, str]


class Agent:
    """The agent of one node of a `Place`.

    Attributes
    ----------
    in_force : dict
        By claim and device: what its slices' files would say. Kept over `stop` and `start`.
    exceeded : list of str
        When the limits in force were more than a device has.
    refuses : bool
        Whether it says no to each growth.
    """

    def __init__(self, place: Place, node: str, key: bytes):
        self.in_force: dict[str, dict[str, Limit]] = {}
        self.exceeded: list[str] = []
        self.refuses = False
        self.slow_seconds = 0.0
        """Between two writes."""
        self._place, self._node, self._key = place, node, key
        self._task: asyncio.Task[None] | None = None
        self._claims: Reflector[Json] | None = None

    def start(self) -> Agent:
        """Begin."""
        self._place.do(self._start())
        return self

    def stop(self) -> None:
        """End, between any two steps."""
        self._place.do(self._stop())

    async def _start(self) -> None:
        self._claims = Reflector(self._place.kube, path(RESOURCE, "resourceclaims"), lambda claim: claim)
        self._claims.start()
        self._task = asyncio.create_task(self._run())

    async def _stop(self) -> None:
        assert self._task is not None
        assert self._claims is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._claims.stop()

    async def _run(self) -> None:
        assert self._claims is not None
        while True:
            seen = self._claims.generation
            if self._claims.ready:
                with contextlib.suppress(Conflict, NotFound):
                    await self._step(self._held(list(self._claims.items.values())))
            await self._claims.wait(seen, 1.0)

    # -- what there is

    def _held(self, claims: list[Json]) -> dict[str, tuple[Json, list[Share]]]:
        names = {(one.node, device_name(one.uuid)): one for one in self._place.devices[self._node]}
        found: dict[str, tuple[Json, list[Share]]] = {}
        for claim in claims:
            results = claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", [])
            if any((one["pool"], one["device"]) in names for one in results):
                found[claim["metadata"]["uid"]] = claim, shares(claim, names)
        return found

    def _own(self, uid: str, held: list[Share]) -> dict[str, Limit]:
        return self.in_force.get(uid) or in_force(held)

    def _fits(self, limits: list[dict[str, Limit]]) -> bool:
        return all(
            fits(device.usable_bytes, [one[device.uuid] for one in limits if device.uuid in one])
            for device in self._place.devices[self._node]
        )

    def _set(self, uid: str, limits: dict[str, Limit]) -> None:
        self.in_force[uid] = limits
        if not self._fits(list(self.in_force.values())):
            self.exceeded.append(f"{time.time()}: {self.in_force}")

    # -- what it does

    async def _step(self, held: dict[str, tuple[Json, list[Share]]]) -> None:
        for uid in set(self.in_force) - set(held):
            del self.in_force[uid]
        for uid, (_, parts) in held.items():
            if uid not in self.in_force and self._fits([*self.in_force.values(), in_force(parts)]):
                self._set(uid, in_force(parts))  # prepared
        for uid, (claim, parts) in held.items():
            with contextlib.suppress(BadObject):
                wanted = read_limits(claim, self._key)
                answered = {one.answered for one in parts}
                if uid in self.in_force and wanted is not None and answered != {wanted.seal} and not is_settled(parts, wanted):
                    await self._bring(uid, claim, parts, wanted)
        await self._publish(held, None)

    async def _bring(self, uid: str, claim: Json, parts: list[Share], wanted: Wanted) -> None:
        target, now = wanted_of(parts, wanted), self.in_force[uid]
        low = {uuid: _lower(limit, target[uuid]) for uuid, limit in now.items()}
        if low != now:  # what shrinks needs no room
            self._set(uid, low)
            await self._report(claim, parts, low, "" if low != target else wanted.seal)
        if low == target:
            return
        await self._publish(self._held(list(self._claims.items.values() if self._claims else [])), (uid, target))
        await asyncio.sleep(self.slow_seconds)
        again = self._held((await self._place.kube.list(path(RESOURCE, "resourceclaims"))).items)
        others = [self._own(one, found) for one, (_, found) in again.items() if one != uid]
        others += [limits for one, limits in self.in_force.items() if one not in again]  # their claims are gone, their slices not yet
        if uid in again and not self.refuses and self._fits([*others, target]):
            self._set(uid, target)
        await self._report(claim, parts, self.in_force[uid], wanted.seal)

    async def _report(self, claim: Json, parts: list[Share], limits: dict[str, Limit], answered: str) -> None:
        meta = claim["metadata"]
        where = path(RESOURCE, "resourceclaims", meta["namespace"], meta["name"], "status")
        devices = [report(one, limits[one.uuid], answered) for one in parts]
        changed = await self._place.kube.patch(where, {"status": {"devices": devices}}, uid=meta["uid"])
        if self._claims is not None:
            self._claims.note(changed)
        await asyncio.sleep(self.slow_seconds)

    async def _publish(self, held: dict[str, tuple[Json, list[Share]]], booked: tuple[str, dict[str, Limit]] | None) -> None:
        by_device: dict[str, list[tuple[Limit, Limit]]] = {}
        for uid, (_, parts) in held.items():
            counts = self._own(uid, parts)
            reported, consumed = in_force(parts), wanted_of(parts, None)
            for uuid, limit in counts.items():
                limit = limit.larger(reported[uuid])  # what is not reported yet is not given away yet
                if booked is not None and booked[0] == uid:
                    limit = limit.larger(booked[1][uuid])
                by_device.setdefault(uuid, []).append((consumed[uuid], limit))
        capacities = {one.uuid: published(one.usable_bytes, by_device.get(one.uuid, [])) for one in self._place.devices[self._node]}
        told = {uuid: (one.memory_bytes, one.compute_milli) for uuid, one in capacities.items()}
        if told != self._published:
            self._published = told
            await self._place.publish_soon(self._node, told)

    _published: dict[str, tuple[int, int]] | None = None


def _lower(one: Limit, other: Limit) -> Limit:
    return Limit(memory_bytes=min(one.memory_bytes, other.memory_bytes), compute_milli=min(one.compute_milli, other.compute_milli))
