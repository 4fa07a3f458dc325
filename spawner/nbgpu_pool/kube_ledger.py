"""The ledger of a cluster: ResourceClaims, which kube-scheduler allocates and Kubernetes keeps as long as a pod uses them.

`KubeLedger` writes claims and follows what becomes of them; `kube_view` says what the objects mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from nbgpu.claims import DRIVER, SLICE_LABEL, BadObject, claim_for, claim_name, read_claim
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.kube import ApiServerAway, Conflict, Json, Kube, KubeError, NotFound, path
from nbgpu.kube_events import Reporter, reference
from nbgpu.kube_reflector import Key, Reflector
from nbgpu.models import Launch, Slice

from .core import Snapshot
from .kube_view import ClaimInfo, NodeInfo, PodInfo, Published, View, keep_claim, keep_node, keep_pod, keep_published
from .ledger import LedgerRefused

RESOURCE = "resource.k8s.io/v1"
KEEPER_SECONDS = 1.0
LOST_SECONDS = 5.0
"""How long a pod may be without its claim before that is told: one watch may be ahead of the other."""
GATHER_SECONDS = 0.02
"""What changes within so long becomes one snapshot."""
BUSY_SHARE = 4.0
"""A snapshot that took long to take in is followed by a pause of so many times that."""
NOTHING = Launch(env={}, slice_dir="", socket="")
"""What a spawner needs to start a pod in a slice: the pod names the claim, all else is the agent's."""

log = logging.getLogger("nbgpu.pool")


class KubeLedger:
    """Slices as ResourceClaims.

    Parameters
    ----------
    key : bytes
        The installation's key.
    ttl_seconds : float
        A claim that was carried and has had no pod for so long is deleted.
    may_act : callable
        False where another replica may be the leader: then nothing is written.
    """

    def __init__(self, kube: Kube, key: bytes, *, ttl_seconds: float, may_act: Callable[[], bool] = lambda: True):
        self.kube = kube
        self._key = key
        self._ttl = ttl_seconds
        self._may_act = may_act
        self._reporter = Reporter(kube, "nbgpu-pool")
        self._changed = asyncio.Event()
        self._where: dict[str, str] = {}
        """Namespace of each claim that this process made, while it may exist."""
        self._bare: dict[str, float] = {}
        """Claims that a pod carried or was to carry: since when there has been none."""
        self._lost: dict[Key, float] = {}
        self._reset()

    def _reset(self) -> None:
        self.view = View(self._key, time.time)
        view, hear = self.view, self._changed.set
        kube = self.kube

        def published(key: Key, old: Published | None, new: Published | None) -> None:
            view.published_changed(key[1], new)
            hear()

        def node(key: Key, old: NodeInfo | None, new: NodeInfo | None) -> None:
            if old != new:
                view.node_changed(key[1], new)
                hear()

        def claim(key: Key, old: ClaimInfo | None, new: ClaimInfo | None) -> None:
            if old is not None or new is not None:
                view.claim_changed(key, new)
                hear()

        def pod(key: Key, old: PodInfo | None, new: PodInfo | None) -> None:
            if old != new:
                view.pod_changed(key, old, new)
                hear()

        driver = f"spec.driver={DRIVER}"
        self._published = Reflector(kube, path(RESOURCE, "resourceslices"), keep_published, fields=driver, changed=published, told=hear)
        self._nodes = Reflector(kube, path("v1", "nodes"), keep_node, changed=node, told=hear)
        self._claims = Reflector(kube, path(RESOURCE, "resourceclaims"), keep_claim(view), changed=claim, told=hear)
        self._pods = Reflector(kube, path("v1", "pods"), keep_pod, labels=SLICE_LABEL, changed=pod, told=hear)
        self._all: list[Reflector[Any]] = [self._published, self._nodes, self._claims, self._pods]

    # -- the pool's calls --------------------------------------------------------------------------------------------

    async def prepare(self, wanted: Slice, uid: int | None) -> Launch:
        """Create the claim of a slice; one that is there already must be the very same."""
        self._must_lead()
        assert wanted.namespace is not None
        claim = claim_for(wanted, self._key)
        self._where[wanted.slice_id] = wanted.namespace
        try:
            made = await self.kube.create(path(RESOURCE, "resourceclaims", wanted.namespace), claim)
        except Conflict as error:
            made = await self._met(wanted, error)
        except KubeError as error:
            del self._where[wanted.slice_id]
            raise LedgerRefused(error.message) from error
        self._claims.note(made)
        return NOTHING

    async def _met(self, wanted: Slice, error: Conflict) -> Json:
        """Return the claim that has the name already."""
        where = f"ResourceClaim {claim_name(wanted.slice_id)} in namespace {wanted.namespace}"
        try:
            found = await self.kube.get(_claim_path(wanted.namespace or "", wanted.slice_id))
        except NotFound:
            raise ApiServerAway(f"{where} was there and is gone again; try again.") from error
        there = self._ours(found)
        if there is None or there.slice != wanted:
            raise LedgerRefused(f"{where} exists already and stands for something else; use a new request id.", status=409)
        if there.deleting:
            raise LedgerRefused(f"{where} is being given back; use a new request id.", status=409)
        return found

    def _ours(self, thing: Json) -> Any:
        """Return what the pool wrote into a claim; None for another's, and for one with no word of it left."""
        with contextlib.suppress(BadObject):
            found = read_claim({**thing, "status": {}}, {}, self._key)
            return found if found is not None and found.sealed else None
        return None

    async def adopt(self, slice_id: str, pid: int | None) -> None:
        """Take note that a pod with the claim will come, or has come: without one for long it is deleted."""
        self._must_lead()
        problem = self._problem()
        if problem is not None:
            raise problem
        key = self.view.ids.get(slice_id)
        if key is None or self.view.seen[slice_id].state == "releasing":
            raise NbgpuError(f"The claim of request {slice_id} is gone: it was given back.", code="bind-failed", status=409)
        self._bare[slice_id] = time.monotonic()

    async def release(self, slice_id: str) -> bool:
        """Delete the claim: Kubernetes keeps it while a pod uses it."""
        self._must_lead()
        key = self.view.ids.get(slice_id)
        info = self.view.claims.get(key) if key is not None else None
        if key is not None and info is not None and info.claim is not None:
            return await self._delete(key, info.uid) if info.claim.sealed else False
        namespace = self._where.get(slice_id)
        if namespace is None:
            return True
        try:  # its creation was not answered
            found = await self.kube.get(_claim_path(namespace, slice_id))
        except NotFound:
            del self._where[slice_id]
            return True
        return self._ours(found) is None or await self._delete((namespace, claim_name(slice_id)), found["metadata"]["uid"])

    async def _delete(self, key: Key, uid: str) -> bool:
        """Delete a claim; True when there is none (any more)."""
        try:
            left = await self.kube.delete(path(RESOURCE, "resourceclaims", *key), uid=uid)
        except NotFound:
            left = {}
        except Conflict:
            return False  # another one of that name: the watch will tell of it
        if "deletionTimestamp" in left.get("metadata", {}):
            self._claims.note(left)
            return False
        self._claims.note_gone(key, uid)
        return True

    def _must_lead(self) -> None:
        if not self._may_act():
            raise Unavailable("Another replica of the pool may have taken over; try again.", code="not-leader")

    # -- following -----------------------------------------------------------------------------------------------------

    async def watch(self, mark: Callable[[], int], fresh: Callable[[], bool]) -> AsyncIterator[Snapshot | Unavailable]:
        """Follow the cluster's objects."""
        self._reset()
        keeper = asyncio.create_task(self._keep(), name="keeper")
        try:
            self._published.start()
            self._nodes.start()
            told_away = False
            while True:
                self._changed.clear()
                problem = self._problem()
                if problem is None:
                    told_away = False
                    begun = time.monotonic()
                    yield Snapshot(mark(), self.view.devices(), list(self.view.seen.values()), self.view.extra_bytes())
                    if not fresh():
                        await asyncio.sleep(max(GATHER_SECONDS, BUSY_SHARE * (time.monotonic() - begun)))
                        await self._changed.wait()
                    await asyncio.sleep(0)
                    continue
                if not told_away and any(one.away is not None for one in self._all):
                    told_away = True
                    yield problem
                if self._published.ready and self._nodes.ready:  # claims are read by the devices that they name
                    self._claims.start()
                    self._pods.start()
                await self._changed.wait()
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, *(one.stop() for one in self._all), return_exceptions=True)

    def _problem(self) -> Unavailable | None:
        for one in self._all:
            if one.away is not None:
                return Unavailable(one.away.message)
        return None if all(one.ready for one in self._all) else Unavailable("Kubernetes has not told yet what there is.")

    async def close(self) -> None:
        """Let what is being told be told."""
        await self._reporter.close()

    # -- what nobody else does -----------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(KEEPER_SECONDS)
            try:
                if self._problem() is None and self._may_act():
                    self._tell_problems()
                    self._tell_lost(time.monotonic())
                    await self._own()
                    await self._delete_bare(time.monotonic())
            except NbgpuError as error:
                log.info("keeping house waits: %s", error.message)
            except Exception:
                log.exception("keeping house failed")

    def _tell_problems(self) -> None:
        for kind, metadata, words in self.view.problems():
            self._reporter.say(reference(RESOURCE, kind, metadata), "NotUsable", words)

    def _tell_lost(self, now: float) -> None:
        """Say of a pod that carries a slice which was given back why it does not start."""
        lost = {
            key: pod
            for key, pod in self.view.pods.items()
            if pod.alive and not pod.running and not pod.deleting and pod.claim_key not in self._claims.items
        }
        self._lost = {key: self._lost.get(key, now) for key in lost}
        for key, since in self._lost.items():
            if now - since >= LOST_SECONDS:
                pod = lost[key]
                about = reference("v1", "Pod", {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid})
                words = f"Its slice of a GPU ({pod.request_id}) was given back before it started, so it cannot start; delete it."
                self._reporter.say(about, "SliceGone", words)

    async def _own(self) -> None:
        """Make running pods the owners of their claims, so that these go with them.

        Not before a reservation's time is over: a hub whose creation of a pod was answered late deletes that pod and makes it once more,
        with the same claim. A claim that loses its pod so early is deleted as one without any.
        """
        for key in list(self.view.unowned):
            pod = self.view.new_owner(key) if key in self.view.claims else None
            if pod is not None and self.view.age_seconds(key) >= self._ttl:
                await self._make_owner(key, self.view.claims[key], pod)

    async def _make_owner(self, key: Key, info: ClaimInfo, pod: PodInfo) -> None:
        owner = {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid}
        try:
            changed = await self.kube.patch(
                path(RESOURCE, "resourceclaims", *key), {"metadata": {"ownerReferences": [owner]}}, uid=info.uid, version=info.version
            )
            self._claims.note(changed)
        except (Conflict, NotFound):
            pass  # it has changed: next time

    async def _delete_bare(self, now: float) -> None:
        """Delete claims whose pod never came, or has gone without them."""
        bare = self.view.bare
        self._bare = {one: self._bare.get(one, now) for one in bare if one in self._bare or one in self.view.carried}
        for slice_id, since in list(self._bare.items()):
            key = self.view.ids.get(slice_id)
            if key is not None and slice_id in bare and now - since >= self._ttl:
                log.info("orphan %s in namespace %s: it has had no pod for %.0f s, deleted", slice_id, key[0], now - since)
                await self._delete(key, self.view.claims[key].uid)


def _claim_path(namespace: str, slice_id: str) -> str:
    return path(RESOURCE, "resourceclaims", namespace, claim_name(slice_id))
