"""Claims of this node as the API server tells of them: limits, pods, and claims that are gone without a word of the kubelet."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import time
from typing import Any, cast

from nbgpu.claim_limits import Limit, Share, Wanted, counted, fits, published, read_limits, report, shares, wanted_of, with_limits
from nbgpu.claims import API_VERSION, DRIVER, BadObject
from nbgpu.errors import NbgpuError
from nbgpu.kube import Kube, NotFound, path
from nbgpu.kube_events import Reporter, reference
from nbgpu.kube_reflector import LEFT_OUT, Key, Reflector
from nbgpu.models import Slice

from ..agent import Agent
from ..books import Conflict
from ..live import LiveSlice
from ..marks import mark
from .claims import NodeClaims
from .publisher import Publisher

Json = dict[str, Any]
GONE_SECONDS = 60.0
"""How long the kubelet may take to let go of a claim that is gone."""
LOOK_SECONDS = 10.0
RETRY_SECONDS = 3.0
log = logging.getLogger("nbgpu.agent")


class Follower:
    """Keeps slices as their claims want them.

    Attributes
    ----------
    publisher : Publisher
        Set once it is made: it asks `capacity` of this.
    """

    publisher: Publisher

    def __init__(self, agent: Agent, kube: Kube, reporter: Reporter, claims: NodeClaims):
        self._agent = agent
        self._kube = kube
        self._reporter = reporter
        self._claims = claims
        self._path = path(API_VERSION, "resourceclaims")
        self.items: Reflector[Json] = Reflector(
            kube, self._path, lambda claim: claim if self._is_mine(claim) else LEFT_OUT, changed=self._changed, told=self._told
        )
        self._booked: dict[str, dict[str, Limit]] = {}
        """Limits for which capacity is being taken back, by claim uid and device uuid."""
        self._due: dict[str, Json] = {}
        self._gone_since: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._trimmed = False
        claims.prepared = self._again
        agent.on_settled = self._freed
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow."""
        self.items.start()
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._look_for_gone())]

    async def stop(self) -> None:
        """Stop to follow."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.items.stop()

    # -- what there is ---------------------------------------------------------------------------------------------------

    def _is_mine(self, claim: Json) -> bool:
        """Return whether a claim holds a part of this node's devices."""
        status = cast("Json", claim.get("status") or {})
        allocation = cast("Json", status.get("allocation") or {})
        results = cast("list[Json]", cast("Json", allocation.get("devices") or {}).get("results") or [])
        return any(one.get("driver") == DRIVER and one.get("pool") == self._agent.settings.node for one in results)

    def _changed(self, key: Key, old: Json | None, new: Json | None) -> None:
        if new is not None:
            uid = str(new["metadata"]["uid"])
            live = self._claims.live(uid)
            if live is not None:
                consumers = cast("list[Json]", new["status"].get("reservedFor") or [])
                self._claims.set_pods(live, tuple(str(one.get("uid")) for one in consumers if one.get("resource") == "pods"))
                self._due[uid] = new
        self._wake.set()

    def _told(self) -> None:
        self._wake.set()
        if not self._trimmed and self.items.ready:
            self._trimmed = True
            trim()

    def _shares(self, claim: Json) -> list[Share]:
        """Return what a claim holds here, as far as it can be read; an event tells of the rest."""
        devices = self._claims.devices()  # all of this node
        try:
            return shares(claim, devices)
        except BadObject as error:
            self._reporter.say(reference(API_VERSION, "ResourceClaim", claim["metadata"]), "Unreadable", error.message)
        with contextlib.suppress(BadObject):
            return shares(claim, devices, known_only=True)
        return []

    def _counts(self, claim: Json) -> dict[str, Limit]:
        """Return what a claim counts on each device: the limits of its slice, else what it reports; the larger one while it is to grow."""
        uid = str(claim["metadata"].get("uid"))
        held = self._shares(claim)
        found = counted(held)
        live = self._claims.live(uid)
        if live is not None:
            found.update({part: limit for part, limit in _limits(live.slice).items() if part in found})
        if uid in self._booked:
            asked = self._booked[uid]
            found = {part: limit.larger(asked[part]) if part in asked else limit for part, limit in found.items()}
        return found

    def capacity(self) -> dict[str, tuple[int, int]]:
        """Return what may be allocated of each device: memory in bytes, milli-GPU."""
        on: dict[str, list[tuple[Limit, Limit]]] = {uuid: [] for uuid in self._agent.devices}
        for claim in self.items.items.values():
            consumed = wanted_of(self._shares(claim), None)
            for uuid, counts in self._counts(claim).items():
                on[uuid].append((consumed[uuid], counts))
        found = {uuid: published(self._agent.devices[uuid].usable_bytes, held) for uuid, held in on.items()}
        return {uuid: (one.memory_bytes, one.compute_milli) for uuid, one in found.items()}

    # -- limits --------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self.items.ready:
                continue
            self.publisher.wake()
            due, self._due = self._due, {}
            for uid, claim in due.items():
                try:
                    async with self._claims.lock:
                        await self._settle(uid, claim)
                except NbgpuError as error:
                    log.warning("limits of claim %s: %s", _named(claim), error.message)
                    asyncio.get_running_loop().call_later(RETRY_SECONDS, self._again, uid)
                except Exception:
                    log.exception("limits of claim %s", _named(claim))
                    asyncio.get_running_loop().call_later(10 * RETRY_SECONDS, self._again, uid)

    def _freed(self, live: LiveSlice) -> None:
        """A slice whose limits were lowered has freed memory: its claim says what it still counts, and more may be allocated."""
        if live.record.claim is not None:
            self._again(live.record.claim.uid)

    def _again(self, uid: str) -> None:
        for claim in self.items.items.values():
            if claim["metadata"]["uid"] == uid:
                self._due.setdefault(uid, claim)
                self._wake.set()

    def look_at_all(self) -> None:
        """Look at the limits of all claims: this agent has just started."""
        for claim in self.items.items.values():
            if self._claims.live(uid := str(claim["metadata"]["uid"])) is not None:
                self._due[uid] = claim
        self._wake.set()

    async def _settle(self, uid: str, claim: Json) -> None:
        """Bring the limits that the pool wants of a claim in force, as far as they fit."""
        live = self._claims.live(uid)
        if live is None:
            return
        about = reference(API_VERSION, "ResourceClaim", claim["metadata"])
        try:
            wanted = read_limits(claim, self._claims.key)
        except BadObject as error:
            self._reporter.say(about, "LimitsNotBelieved", error.message)
            return
        held = self._shares(claim)
        target = {part: limit for part, limit in wanted_of(held, wanted).items() if part in _limits(live.slice)}
        now = _limits(live.limits)  # not what it counts: memory that it still holds above them is no limit
        low = {part: _smaller(now[part], limit) for part, limit in target.items()}
        self._agent.change(live, with_limits(live.limits, low, wanted))
        if low != now:
            mark("resize-lowered")
        if low != target:
            await self._grow(uid, live, about, target, wanted)
        await self._tell(claim, held, live, wanted)
        self._booked.pop(uid, None)
        await self.publisher.publish()

    async def _grow(self, uid: str, live: LiveSlice, about: Json, target: dict[str, Limit], wanted: Wanted | None) -> None:
        """Raise limits: what is published first, so that nobody is given the room meanwhile."""
        self._booked[uid] = target
        await self.publisher.publish()
        mark("resize-booked")
        counts: dict[str, list[Limit]] = {part: [] for part in target}
        async with contextlib.aclosing(self._kube.pages(self._path)) as pages:  # the watch may be behind
            async for page in pages:
                for claim in page.items:
                    if self._is_mine(claim) and claim["metadata"].get("uid") != uid:
                        for part, limit in self._counts(claim).items():
                            counts.get(part, []).append(limit)
        now = _limits(live.slice)
        full = [
            part
            for part, limit in target.items()
            if not fits(self._agent.devices[part].usable_bytes, [*counts[part], limit.larger(now[part])])
        ]
        if full:
            self._reporter.say(
                about, "LimitsNotRaised", f"There is no room to raise its limits on {', '.join(full)}: they stay as they are."
            )
            return
        try:
            self._agent.change(live, with_limits(live.limits, target, wanted))
        except Conflict as error:
            self._reporter.say(about, "LimitsNotRaised", error.message)
        mark("resize-raised")

    async def _tell(self, claim: Json, held: list[Share], live: LiveSlice, wanted: Wanted | None) -> None:
        """Report what the slice counts in the claim's status, where that is not what it says already."""
        now, keeps = _limits(live.slice), live.record.lowered is not None
        answered, number = (wanted.seal, wanted.limits.number) if wanted is not None else ("", 0)
        if all(
            (one.answered, one.keeps) == (answered, keeps) and (one.in_force == now.get(one.uuid) or len(held) != len(now)) for one in held
        ):
            return
        meta: Json = {"name": claim["metadata"]["name"], "namespace": claim["metadata"]["namespace"], "uid": claim["metadata"]["uid"]}
        body: Json = {
            "apiVersion": API_VERSION,
            "kind": "ResourceClaim",
            "metadata": meta,
            "status": {"devices": [report(one, now.get(one.uuid, one.consumed), answered, number, keeps) for one in held]},
        }
        where = path(API_VERSION, "resourceclaims", meta["namespace"], meta["name"], "status")
        told = await self._kube.patch(where, body, kind="apply", manager="nbgpu-agent", force=True)
        self.items.note(told)
        mark("resize-told")

    # -- claims that are gone ----------------------------------------------------------------------------------------------

    async def _look_for_gone(self) -> None:
        """End slices whose claims are gone and that the kubelet will never let go of: it has forgotten them."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self.items.ready or self.items.away is not None:
                self._gone_since.clear()
                continue
            try:
                await self._end_gone()
            except NbgpuError as error:
                log.warning("looking for claims that are gone: %s", error.message)
            except Exception:
                log.exception("looking for claims that are gone")

    async def _end_gone(self) -> None:
        there = {str(claim["metadata"]["uid"]) for claim in self.items.items.values()}
        known = {live.record.claim.uid: live.record.claim for live in self._agent.slices.values() if live.record.claim is not None}
        self._gone_since = {uid: since for uid, since in self._gone_since.items() if uid in known and uid not in there}
        now = time.monotonic()
        for uid, claim in known.items():
            if uid in there or now - self._gone_since.setdefault(uid, now) < GONE_SECONDS:
                continue
            try:
                found = await self._kube.get(path(API_VERSION, "resourceclaims", claim.namespace, claim.name))
                if found["metadata"].get("uid") == uid and self._is_mine(found):
                    continue
            except NotFound:
                pass
            if await self._claims.forget(uid):
                log.info("claim %s/%s is gone, and nothing of it ran: its slice has ended", claim.namespace, claim.name)


def trim() -> None:
    """Give back what reading all claims of the cluster has taken: most of them were looked at and dropped."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _limits(of: Slice) -> dict[str, Limit]:
    return {part.uuid: Limit(memory_bytes=part.memory_bytes, compute_milli=part.compute_milli) for part in of.devices}


def _smaller(one: Limit, other: Limit) -> Limit:
    return Limit(memory_bytes=min(one.memory_bytes, other.memory_bytes), compute_milli=min(one.compute_milli, other.compute_milli))


def _named(claim: Json) -> str:
    return f"{claim['metadata'].get('namespace')}/{claim['metadata'].get('name')}"
