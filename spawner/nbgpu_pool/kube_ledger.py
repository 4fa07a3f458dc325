"""The ledger of a cluster: ResourceClaims, which kube-scheduler allocates and Kubernetes keeps as long as a pod uses them.

`KubeLedger` writes claims and follows what becomes of them; `kube_view` says what the objects mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from nbgpu.claim_limits import LIMITS_ANNOTATION, Limit, Limits, limits_annotation
from nbgpu.claims import DRIVER, SLICE_LABEL, BadObject, claim_for, claim_name, move_note, read_claim
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.kube import ApiServerAway, Conflict, Expired, Json, Kube, KubeError, NotAllowed, NotFound, Rejected, path
from nbgpu.kube_events import Reporter, reference
from nbgpu.kube_reflector import Key, Reflector
from nbgpu.models import Launch, Slice

from .agents import LABELS, Agents, keep_agent
from .coming import Coming
from .kube_view import ClaimInfo, NodeInfo, PodInfo, Published, View, about, keep_claim, keep_node, keep_pod, keep_published
from .ledger import LedgerRefused
from .state import Snapshot

RESOURCE = "resource.k8s.io/v1"
KEEPER_SECONDS = 1.0
TRIES = 5
STRANGERS_SECONDS = 10.0
LOST_SECONDS = 5.0
"""How long a pod may be without its claim before that is told: one watch may be ahead of the other."""
FRESH_SECONDS = 0.5
"""How often it is looked whether another snapshot is wanted though nothing has changed."""
GATHER_SECONDS = 0.02
"""What changes within so long becomes one snapshot."""
BUSY_SHARE = 4.0
"""A snapshot that took long to take in is followed by a pause of so many times that."""
CREATIONS = 12
"""Claims that are being created at once: more wait in the API server instead, each on a connection of its own, and its answers come
together, which keeps everybody else waiting.
"""
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
    coming : sequence of Coming
        Groups of nodes that would be started where they are asked for.
    hubs : mapping, optional
        Those that the pool serves, with patterns of the namespaces of their servers; claims of others are told of. None: any.
    agents_in : str
        Namespace of the pods of agents, the pool's own; empty: nothing is known of them.
    """

    def __init__(
        self,
        kube: Kube,
        key: bytes,
        *,
        ttl_seconds: float,
        may_act: Callable[[], bool] = lambda: True,
        coming: Sequence[Coming] = (),
        hubs: Mapping[str, Sequence[str]] | None = None,
        agents_in: str = "",
    ):
        self.kube = kube
        self.who = "The Kubernetes API server"
        self._coming, self._hubs, self._agents_in = coming, hubs, agents_in
        self.agents = Agents()
        self._key = key
        self._ttl = ttl_seconds
        self._may_act = may_act
        self._reporter = Reporter(kube, "nbgpu-pool")
        self._changed = asyncio.Event()
        self._where: dict[str, str] = {}
        """Namespace of each claim that this process made, while it may exist."""
        self._bare: dict[str, float] = {}
        """Claims that a pod carried or was to carry: since when there has been none."""
        self._left: dict[Key, float] = {}
        """Claims of an earlier installation's pool: since when there has been no pod with them."""
        self._strangers_at = 0.0
        self._moving = asyncio.Lock()
        self._creating = asyncio.Semaphore(CREATIONS)
        self._lost: dict[Key, float] = {}
        self._reset()

    def _reset(self) -> None:
        self.view = View(self._key, time.time, self._coming)
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
                if new is None and old is not None and old.claim is not None:
                    self._where.pop(old.claim.slice.slice_id, None)
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
        self._agents = Reflector(kube, path("v1", "pods", self._agents_in), keep_agent, labels=LABELS) if self._agents_in else None

    # -- the pool's calls --------------------------------------------------------------------------------------------

    async def prepare(self, wanted: Slice, uid: int | None) -> Launch:
        """Create the claim of a slice; one that is there already must be the very same."""
        self._must_lead()
        assert wanted.namespace is not None
        if wanted.slice_id in self.view.notes:
            raise ApiServerAway("The slice is being moved to another node; try again.")
        claim = claim_for(wanted, self._key)
        self._where[wanted.slice_id] = wanted.namespace
        try:
            async with self._creating:
                self._must_lead()  # it may have waited
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
        try:
            return await self._release(slice_id)
        except (NotAllowed, Rejected) as error:
            raise LedgerRefused(error.message) from None

    async def _release(self, slice_id: str) -> bool:
        note = self.view.notes.get(slice_id)
        if note is not None:
            await self._delete(note, self.view.claims[note].uid)
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

    async def resize(self, wanted: Slice, *, only_unused: bool = False) -> Slice | None:
        """Write what limits are wanted into the claim's annotation. `only_unused`: what is used is not known here, no memory is taken."""
        self._must_lead()
        there = _claim_path(wanted.namespace or "", wanted.slice_id)
        key = self.view.ids.get(wanted.slice_id)
        info = self.view.claims.get(key) if key is not None else None
        if info is None or info.claim is None or not info.claim.allocated or info.claim.deleting:
            raise LedgerRefused("its claim holds no GPU (any more)", status=409)
        limits = Limits(
            devices={one.uuid: Limit(memory_bytes=one.memory_bytes, compute_milli=one.compute_milli) for one in wanted.devices},
            mode=wanted.mode,
            number=max(time.time_ns() // 1_000_000, info.number + 1),  # the pool before this one may have had another clock
        )
        version: str | None = info.version
        for _ in range(TRIES):
            written = limits_annotation(info.uid, wanted.namespace or "", claim_name(wanted.slice_id), limits, self._key)
            try:
                # at that version only: a call that was given up and arrives late must not undo a later one
                changed = await self.kube.patch(
                    there, {"metadata": {"annotations": {LIMITS_ANNOTATION: written}}}, uid=info.uid, version=version
                )
            except Conflict:
                found = await self._get(there)
                if found is None or found["metadata"]["uid"] != info.uid or "deletionTimestamp" in found["metadata"]:
                    raise LedgerRefused("its claim is being given back", status=409) from None
                version = found["metadata"]["resourceVersion"]
                continue
            except NotFound:
                raise LedgerRefused("its claim is gone", status=409) from None
            except (NotAllowed, Rejected) as error:
                raise LedgerRefused(error.message) from None
            self._claims.note(changed)
            return None
        raise ApiServerAway("The claim of the slice changes all the time; try again.")

    async def park(self, slice_id: str, idle_seconds: float) -> None:
        """No slice of a claim is parked yet."""
        raise LedgerRefused("Slices are not parked on Kubernetes yet.", status=409)

    async def restore(self, slice_id: str) -> None:
        """No slice of a claim is parked yet."""
        raise LedgerRefused("Slices are not parked on Kubernetes yet.", status=409)

    async def move(self, old: Slice, new: Slice) -> None:
        """Delete a claim that has no devices, and make it again for others, under the same name: the pod that waits for it looks again.

        A note says where to as long as there may be no claim, so that a pool that starts then finishes it.
        """
        self._must_lead()
        async with self._moving:
            await self._move(old, new)

    async def _move(self, old: Slice, new: Slice) -> None:
        namespace, name = old.namespace or "", claim_name(old.slice_id)
        claims = path(RESOURCE, "resourceclaims", namespace)
        found = await self._get(f"{claims}/{name}")
        there = self._ours(found) if found is not None else None
        if found is not None and there is not None and there.slice == new:
            await self._drop_note(new)
            return
        if found is not None and (there is None or there.slice != old or _is_bound(found)):
            await self._drop_note(new)
            raise LedgerRefused("it has its devices now" if _is_bound(found) else "its claim is another's")
        await self._write_note(claims, new)
        if found is not None:
            meta = found["metadata"]
            try:
                left = await self.kube.delete(f"{claims}/{name}", uid=meta["uid"], version=meta["resourceVersion"])
            except Conflict as error:
                raise ApiServerAway("The claim has changed; looking again.") from error
            except NotFound:
                left = {}
            if "deletionTimestamp" in left.get("metadata", {}):
                self._claims.note(left)
                raise ApiServerAway("The old claim is still there.")
            self._claims.note_gone((namespace, name), meta["uid"])
        await self._make_moved(claims, new)

    async def _write_note(self, claims: str, new: Slice) -> None:
        note = move_note(new, self._key)
        try:
            made = await self.kube.create(claims, note)
        except Conflict:
            made = await self.kube.patch(
                f"{claims}/{note['metadata']['name']}", {"metadata": {"annotations": note["metadata"]["annotations"]}}
            )
        except (NotFound, NotAllowed, Rejected) as error:
            raise LedgerRefused(error.message) from error
        self._claims.note(made)

    async def _make_moved(self, claims: str, new: Slice) -> None:
        try:
            made = await self.kube.create(claims, claim_for(new, self._key))
        except Conflict as error:
            raise ApiServerAway("There is a claim already; looking again.") from error
        self._claims.note(made)
        await self._drop_note(new)

    async def _drop_note(self, new: Slice) -> None:
        key = self.view.notes.get(new.slice_id)
        if key is not None:
            await self._delete(key, self.view.claims[key].uid)

    async def _get(self, where: str) -> Json | None:
        with contextlib.suppress(NotFound):
            return await self.kube.get(where)
        return None

    async def _delete(self, key: Key, uid: str, version: str | None = None) -> bool:
        """Delete a claim; True when there is none (any more)."""
        try:
            left = await self.kube.delete(path(RESOURCE, "resourceclaims", *key), uid=uid, version=version)
        except NotFound:
            left = {}
        except Conflict:
            return False  # another one of that name, or another version: the watch will tell of it
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
            for one in (self._published, self._nodes, self._pods, self._agents):
                if one is not None:
                    one.start()
            told_away, whole = False, True
            while True:
                self._changed.clear()
                problem = self._problem()
                if problem is None:
                    told_away = False
                    begun = time.monotonic()
                    view = self.view
                    begin, ids = mark(), frozenset(view.seen)
                    yield Snapshot(begin, view.devices(), view.touched(), view.less(), view.coming(), ids, whole, view.unusable())
                    whole = False
                    if not fresh():
                        await asyncio.sleep(max(GATHER_SECONDS, BUSY_SHARE * (time.monotonic() - begun)))
                    while not self._changed.is_set() and not fresh():
                        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                            await asyncio.wait_for(self._changed.wait(), FRESH_SECONDS)
                    await asyncio.sleep(0)
                    continue
                if not told_away and any(one.away is not None for one in self._all):
                    told_away = True
                    yield problem
                if all(one.ready for one in self._all if one is not self._claims):  # a claim is read by its devices, and judged by its pods
                    self._claims.start()
                await self._changed.wait()
        finally:
            keeper.cancel()
            followed = [*self._all, *([self._agents] if self._agents is not None else [])]
            await asyncio.gather(keeper, *(one.stop() for one in followed), return_exceptions=True)

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
                    self._look_for_agents(time.monotonic())
                    self._tell_problems()
                    self._tell_lost(time.monotonic())
                    await self._own()
                    await self._finish_moves()
                    await self._delete_bare()
                    await self._delete_left_over()
                    self._tell_strangers(time.monotonic())
            except NbgpuError as error:
                log.info("keeping house waits: %s", error.message)
            except Exception:
                log.exception("keeping house failed")

    def _look_for_agents(self, now: float) -> None:
        """See which nodes have no agent; while that cannot be followed, none is said to be away."""
        if self._agents is None or not self._agents.ready:
            return
        nodes = {one.node for one in self.view.published.values()}
        away = self.agents.away(self._agents.items.values(), nodes, now) if self._agents.away is None else frozenset[str]()
        if self.view.agents_away(away):
            log.warning("agents that do not run: %s", ", ".join(sorted(away)) or "none any more")
            self._changed.set()

    def _tell_problems(self) -> None:
        for kind, metadata, words in self.view.problems():
            self._reporter.say(reference(RESOURCE, kind, metadata), "NotUsable", words)

    def _tell_lost(self, now: float) -> None:
        """Say of a pod that carries a slice which was given back why it does not start."""
        lost = {
            key: pod
            for key, pod in self.view.pods.items()
            if pod.alive and not (pod.running or pod.deleting or pod.claim_key in self._claims.items or pod.request_id in self.view.notes)
        }
        self._lost = {key: self._lost.get(key, now) for key in lost}
        for key, since in self._lost.items():
            if now - since >= LOST_SECONDS:
                pod = lost[key]
                about = reference("v1", "Pod", {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid})
                words = f"Its slice of a GPU ({pod.request_id}) was given back before it started, so it cannot start; delete it."
                self._reporter.say(about, "SliceGone", words)

    def _tell_strangers(self, now: float) -> None:
        """Say of claims of hubs that are no longer configured that nobody will give them back but their pod's end."""
        if self._hubs is None or now - self._strangers_at < STRANGERS_SECONDS:
            return
        self._strangers_at = now
        for key, info in self.view.claims.items():
            if info.claim is not None and info.claim.sealed and info.claim.slice.owner.hub not in self._hubs:
                words = f"The pool has no hub {info.claim.slice.owner.hub} any more: this slice counts until its pod ends."
                self._reporter.say(reference(RESOURCE, "ResourceClaim", about(key, info)), "HubUnknown", words)

    async def _finish_moves(self) -> None:
        """Finish what a pool before this one began: the core counts where the note says, and knows of no move."""
        for slice_id in list(self.view.notes):
            async with self._moving:
                key = self.view.notes.get(slice_id)
                if key is not None:
                    with self._told(key):
                        await self._finish_move(slice_id, key, self.view.claims[key])

    async def _finish_move(self, slice_id: str, key: Key, note: ClaimInfo) -> None:
        if slice_id in self.view.ids:
            await self._delete(key, note.uid)
        elif note.moves_to is not None and self.view.seen[slice_id].state == "running":
            log.info("finishing the move of %s to node=%s", slice_id, note.moves_to.node)
            await self._make_moved(path(RESOURCE, "resourceclaims", key[0]), note.moves_to)

    async def _own(self) -> None:
        """Make running pods the owners of their claims, so that these go with them.

        Not before a reservation's time is over: a hub whose creation of a pod was answered late deletes that pod and makes it once more,
        with the same claim. A claim that loses its pod so early is deleted as one without any.
        """
        for key in list(self.view.unowned):
            pod = self.view.new_owner(key) if key in self.view.claims else None
            if pod is not None and self.view.age_seconds(key) >= self._ttl:
                with self._told(key):
                    await self._make_owner(key, self.view.claims[key], pod)

    async def _make_owner(self, key: Key, info: ClaimInfo, pod: PodInfo) -> None:
        # said rather than left out: see the chart's admission.yaml for what that could do to kube-scheduler
        owner = {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid, "controller": False}
        try:
            changed = await self.kube.patch(
                path(RESOURCE, "resourceclaims", *key), {"metadata": {"ownerReferences": [owner]}}, uid=info.uid, version=info.version
            )
            self._claims.note(changed)
        except (Conflict, NotFound):
            pass  # it has changed: next time

    @contextlib.contextmanager
    def _told(self, key: Key) -> Generator[None]:
        """What Kubernetes refuses about one claim is told, and keeps nobody from looking after the others."""
        info = self.view.claims[key]
        try:
            yield
        except (NotAllowed, Rejected, Expired) as error:
            self._reporter.say(reference(RESOURCE, "ResourceClaim", about(key, info)), "NotKept", error.message)

    async def _delete_bare(self) -> None:
        """Delete claims whose pod never came, or has gone without them."""
        now, bare = time.monotonic(), self.view.bare
        self._bare = {one: self._bare.get(one, now) for one in bare if one in self._bare or one in self.view.carried}
        for slice_id, since in list(self._bare.items()):
            key = self.view.ids.get(slice_id)
            if key is not None and slice_id in bare and now - since >= self._ttl:
                with self._told(key):
                    await self._delete(key, self.view.claims[key].uid)
                    log.info("orphan %s in namespace %s: it has had no pod for %.0f s, deleted", slice_id, key[0], now - since)

    async def _delete_left_over(self) -> None:
        """Delete claims of an earlier installation's pool, whose key nobody has any more, that hold nothing and have had no pod for long.

        At the version that was looked at: one that the scheduler gives devices just then stays.
        """
        now, view = time.monotonic(), self.view
        alone = [key for key in view.left_over if self._serves(key) and not any(pod.alive for pod in view.pods_of(key))]
        self._left = {key: self._left.get(key, now) for key in alone}
        for key, since in self._left.items():
            info = view.claims.get(key)
            if info is not None and key in view.left_over and now - since >= self._ttl:
                with self._told(key):
                    if await self._delete(key, info.uid, info.version):
                        words = "claim %s in namespace %s, sealed with another key, held nothing and had no pod for %.0f s: deleted"
                        log.info(words, key[1], key[0], now - since)

    def _serves(self, key: Key) -> bool:
        """Return whether a claim that was left over is of a hub of this pool, in a namespace of that hub."""
        of = self.view.claims[key].left_over
        patterns = ["*"] if self._hubs is None else self._hubs.get(of.owner.hub, ()) if of is not None else ()
        return any(fnmatchcase(key[0], pattern) for pattern in patterns)


def _is_bound(claim: Json) -> bool:
    """Return whether a claim has its devices, or is used."""
    status: Json = claim.get("status") or {}
    return bool(status.get("allocation") or status.get("reservedFor"))


def _claim_path(namespace: str, slice_id: str) -> str:
    return path(RESOURCE, "resourceclaims", namespace, claim_name(slice_id))
