"""What the objects of a cluster mean for the pool: pure, fed object by object.

Kept of each object is only what is needed; a claim that cannot be read is kept whole, to be read again when the devices change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast

from nbgpu.claim_limits import (
    LIMITS_ANNOTATION,
    counted,
    in_force,
    is_refused,
    is_settled,
    latest_number,
    read_limits,
    shares,
    wanted_of,
    with_limits,
)
from nbgpu.claims import (
    DRIVER,
    MOVE_LABEL,
    SLICE_LABEL,
    BadObject,
    Claim,
    claim_name,
    concerns,
    device_name,
    devices_of,
    left_over,
    parse_quantity,
    read_claim,
    read_move,
)
from nbgpu.models import Device, Slice
from nbgpu.own_claims import share_problem
from nbgpu.quantities import WHOLE_MILLI

from .coming import Coming, devices_to_come
from .shapes import Part
from .state import Seen

_PREFIX = claim_name("")
Json = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True)
class NodeInfo:
    """As much of a Node as matters."""

    ready: bool
    """And not cordoned: new pods may come."""
    labels: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Published:
    """A ResourceSlice of an agent."""

    node: str
    devices: tuple[Device, ...]
    offered: tuple[Part, ...]
    """What may be allocated of each device: less than all after a slice has grown, more after one has given back."""
    metadata: Json
    problem: str = ""


@dataclass(frozen=True)
class PodInfo:
    """A pod with our label."""

    uid: str
    name: str
    namespace: str
    request_id: str
    claims: tuple[str, ...]
    node: str
    ended: bool
    running: bool
    deleting: bool
    refusal: str
    """Why kube-scheduler finds no node for it; empty when it has one or has not looked yet."""

    @property
    def claim_key(self) -> Key:
        """The pool's claim that it should carry."""
        return self.namespace, claim_name(self.request_id)

    @property
    def alive(self) -> bool:
        """Whether its claim is in use, or will be."""
        return not self.ended and claim_name(self.request_id) in self.claims


@dataclass(frozen=True)
class ClaimInfo:
    """A ResourceClaim that concerns nbgpu."""

    uid: str
    version: str
    claim: Claim | None
    """None: it asks for devices and holds none yet, or cannot be read."""
    owners: tuple[str, ...] = ()
    """UIDs of the objects that it goes with."""
    problem: str = ""
    holds: tuple[Key, ...] = ()
    """Of one that cannot be read: nodes and names of the devices that it seems to hold."""
    raw: bytes = b""
    slice: Slice | None = None
    """With the limits in force."""
    wanted: Slice | None = None
    """With the limits that its annotation wants, where these are not in force."""
    refused: bool = False
    keeps: bool = False
    """They are in force, and it still holds more memory than that: `slice` counts it."""
    number: int = 0
    """Of the limits that its agent has dealt with last."""
    less: tuple[tuple[str, Part], ...] = ()
    """By device: how much more than it holds kube-scheduler counts (negative: less)."""
    warning: str = ""
    """What is wrong with it, though it counts."""
    moves_to: Slice | None = None
    """Of a note that a claim is being moved (`nbgpu.claims.move_note`)."""
    left_over: Slice | None = None
    """Of one that an earlier installation's pool made, and that holds nothing (`nbgpu.claims.left_over`)."""


def keep_node(thing: Json) -> NodeInfo:
    """Return what matters of a Node."""
    conditions = _list(_part(thing, "status"), "conditions")
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    labels = frozenset((str(name), str(value)) for name, value in (_part(_part(thing, "metadata"), "labels")).items())
    return NodeInfo(ready and not _part(thing, "spec").get("unschedulable", False), labels)


def keep_published(thing: Json) -> Published:
    """Return what matters of a ResourceSlice; one that is malformed has a `problem` and no devices."""
    metadata = _meta(thing, "name", "uid")
    try:
        devices = devices_of(thing)
        spec = _part(thing, "spec")
        node, pool = str(spec.get("nodeName", "")), _part(spec, "pool").get("name")
        if pool != node:
            raise BadObject(f"ResourceSlice {metadata['name']} of node {node} is of pool {pool!r}; its devices are left out.")
        offered = [_offered(raw, device) for raw, device in zip(_list(spec, "devices"), devices, strict=True)]
        return Published(node, tuple(devices), tuple(offered), metadata)
    except BadObject as error:
        return Published(str(_part(thing, "spec").get("nodeName", "")), (), (), metadata, error.message)


def _offered(raw: Json, device: Device) -> Part:
    try:
        capacity = raw["capacity"]
        return Part(*(parse_quantity(capacity[name]["value"]) for name in ("memory", "compute")))
    except (KeyError, TypeError, ValueError):
        raise BadObject(f"Device {device.uuid} of node {device.node} is published without its capacities; it is left out.") from None


def keep_pod(thing: Json) -> PodInfo:
    """Return what matters of a pod."""
    meta, spec, status = _part(thing, "metadata"), _part(thing, "spec"), _part(thing, "status")
    phase = status.get("phase", "Pending")
    refused = [one for one in _list(status, "conditions") if one.get("type") == "PodScheduled" and one.get("status") == "False"]
    named = [one.get("resourceClaimName") for one in _list(spec, "resourceClaims")]
    return PodInfo(
        uid=meta.get("uid", ""),
        name=meta["name"],
        namespace=meta.get("namespace", ""),
        request_id=_part(meta, "labels").get(SLICE_LABEL, ""),
        claims=tuple(name for name in named if name),
        node=spec.get("nodeName", ""),
        ended=phase in ("Succeeded", "Failed"),
        running=phase == "Running",
        deleting="deletionTimestamp" in meta,
        refusal=str(refused[0].get("message", "")) if refused and not spec.get("nodeName") else "",
    )


class View:
    """All that the pool knows of a cluster, and what it makes of it.

    Parameters
    ----------
    key : bytes
        The installation's key: what it seals is the pool's.
    now : callable
        Unix time, seconds.
    coming : sequence of Coming
        Nodes that would be started where they are asked for.
    """

    def __init__(self, key: bytes, now: Callable[[], float], coming: Sequence[Coming] = ()):
        self._key = key
        self._now = now
        self._groups = coming
        self._coming: list[Device] = []
        self.nodes: dict[str, NodeInfo] = {}
        self.published: dict[str, Published] = {}
        self.claims: dict[Key, ClaimInfo] = {}
        self.pods: dict[Key, PodInfo] = {}
        self.by_name: dict[Key, Device] = {}
        """Devices by node and name, those too that are no longer published but may be held."""
        self.seen: dict[str, Seen] = {}
        self.ids: dict[str, Key] = {}
        """The claim of each slice."""
        self._pods_of: dict[Key, set[Key]] = {}
        self._unread: set[Key] = set()
        self._devices: list[Device] | None = None
        self._went = False
        """Devices are no longer published: those that nobody holds can be forgotten."""
        self._less: dict[str, Part] = {}
        self._unusable: dict[str, str] = {}
        self._agents_away: frozenset[str] = frozenset()
        self._resized: set[Key] = set()
        """Claims that hold more or less than kube-scheduler counts."""
        self._warned: set[Key] = set()
        self.notes: dict[str, Key] = {}
        """By slice: the note that its claim is being moved."""
        self._doubles: list[tuple[str, Json, str]] = []
        self._touched: set[str] = set()
        self.carried: set[str] = set()
        """Slices of the pool that a pod carries, or did."""
        self.bare: set[str] = set()
        """Slices of the pool that no pod carries now."""
        self.left_over: set[Key] = set()
        """Claims that an earlier installation's pool made, and that hold nothing."""
        self.unowned: set[Key] = set()
        """Claims whose pod runs and is not their owner yet."""

    # -- devices -----------------------------------------------------------------------------------------------------

    def node_changed(self, name: str, new: NodeInfo | None) -> None:
        """Take over a Node."""
        if new is None:
            self.nodes.pop(name, None)
        else:
            self.nodes[name] = new
        self._devices = None

    def published_changed(self, name: str, new: Published | None) -> None:
        """Take over a ResourceSlice; claims that could not be read may be read now."""
        if new is None:
            self.published.pop(name, None)
            self._went = True
        else:
            self.published[name] = new
            for device in new.devices:
                self.by_name[device.node, device_name(device.uuid)] = device
        self._devices = None
        for key in list(self._unread):
            self.claim_changed(key, self.read(json.loads(self.claims[key].raw)))

    def _forget_devices(self) -> None:
        """Forget those that nobody publishes or holds any more."""
        kept = {(one.node, device_name(one.uuid)) for published in self.published.values() for one in published.devices}
        for info in self.claims.values():
            kept.update(info.holds)
            if info.slice is not None:
                kept.update((info.slice.node, device_name(part.uuid)) for part in info.slice.devices)
        self._went = False
        self.by_name = {key: device for key, device in self.by_name.items() if key in kept}

    def devices(self) -> list[Device]:
        """Return the devices, unhealthy those that cannot take anybody now: their node is away, or it is unknown what is held on them.

        The same list as long as nothing has changed.
        """
        if self._devices is None:
            self._devices = self._gather()
        return self._devices

    def less(self) -> dict[str, Part]:
        """Return by device how much less is offered than the limits in force leave, as in `Snapshot`."""
        self.devices()
        return self._less

    def unusable(self) -> dict[str, str]:
        """Return by device that is not healthy why, as in `Snapshot`."""
        self.devices()
        return self._unusable

    def agents_away(self, nodes: frozenset[str]) -> bool:
        """Take over which nodes have no agent that answers; return whether that is news."""
        if nodes == self._agents_away:
            return False
        self._agents_away, self._devices = nodes, None
        return True

    def coming(self) -> list[Device]:
        """Return the devices of nodes that would be started where they are asked for."""
        self.devices()
        return self._coming

    def _gather(self) -> list[Device]:
        if self._went:
            self._forget_devices()
        barred = {held for key in self._unread for held in self.claims[key].holds}
        found: dict[str, Device] = {}
        self._less, self._unusable, self._doubles = {}, {}, []
        held: dict[str, Part] = {}
        for key in self._resized:
            for uuid, part in self.claims[key].less:
                known = held.get(uuid, Part(0, 0))
                held[uuid] = Part(known.memory_bytes + part.memory_bytes, known.compute_milli + part.compute_milli)
        for published in sorted(self.published.values(), key=lambda one: one.node):
            node = self.nodes.get(published.node)
            for device, offered in zip(published.devices, published.offered, strict=True):
                if device.uuid in found:
                    words = f"Its device {device.uuid} is left out: node {found[device.uuid].node} publishes the same UUID."
                    self._doubles.append(("ResourceSlice", published.metadata, words))
                    continue
                why = self._why_not(device, node, barred)
                found[device.uuid] = device if not why or not device.healthy else device.model_copy(update={"healthy": False})
                if why:
                    self._unusable[device.uuid] = why
                more = held.get(device.uuid, Part(0, 0))
                memory = device.usable_bytes + more.memory_bytes - offered.memory_bytes
                milli = WHOLE_MILLI + more.compute_milli - offered.compute_milli
                if memory > 0 or milli > 0:
                    self._less[device.uuid] = Part(max(0, memory), max(0, milli))
        self._coming = devices_to_come(self._groups, self._members(found.values())) if self._groups else []
        return list(found.values())

    def _why_not(self, device: Device, node: NodeInfo | None, barred: set[Key]) -> str:
        """Return why a device takes nobody now; empty where it does."""
        if node is None or not node.ready:
            return f"node {device.node} is away or takes no new servers"
        if device.node in self._agents_away:
            return f"the agent of nbgpu on node {device.node} does not run"
        if not device.healthy:
            return f"GPU {device.index} of node {device.node} is not healthy"
        if barred and (device.node, device_name(device.uuid)) in barred:
            return f"what is held on GPU {device.index} of node {device.node} cannot be read"
        return ""

    def _members(self, devices: Iterable[Device]) -> list[tuple[frozenset[tuple[str, str]], frozenset[str]]]:
        """Return of each node its labels and its GPUs' models."""
        models: dict[str, set[str]] = {}
        for device in devices:
            models.setdefault(device.node, set()).add(device.model)
        return [(node.labels, frozenset(models.get(name, ()))) for name, node in self.nodes.items()]

    # -- claims and pods -----------------------------------------------------------------------------------------------

    def read(self, thing: Json) -> ClaimInfo:
        """Return what matters of a ResourceClaim."""
        uid, version = str(thing["metadata"].get("uid", "")), str(thing["metadata"].get("resourceVersion", ""))
        owners = tuple(str(one.get("uid", "")) for one in _list(_part(thing, "metadata"), "ownerReferences"))
        moves_to = read_move(thing, self._key)
        if moves_to is not None:
            deleted = "deletionTimestamp" in thing["metadata"]  # whatever finalizer keeps it
            return ClaimInfo(uid, version, None, owners, moves_to=None if deleted else moves_to)
        try:
            claim = read_claim(thing, self.by_name, self._key)
            own = claim is None or not claim.sealed
            strange = share_problem(thing) or "" if own else ""
            if claim is None:
                return ClaimInfo(uid, version, None, owners, left_over=left_over(thing, self._key), warning=strange)
            info = ClaimInfo(uid, version, claim, owners, slice=claim.slice, warning=strange)
            return self._limits(info, claim, thing) if _has_limits(thing) else info
        except BadObject as error:
            problem = error.message
        told: Claim | None = None
        with suppress(BadObject):  # where the allocation names what nobody publishes, what the pool itself wrote into it still counts
            status = {name: value for name, value in _part(thing, "status").items() if name != "allocation"}
            told = read_claim({**thing, "status": status}, self.by_name, self._key)
        raw = {"metadata": _meta(thing, *_READ), "spec": thing.get("spec"), "status": thing.get("status")}
        slice_ = told.slice if told is not None else None
        return ClaimInfo(uid, version, told, owners, problem, tuple(_peek(thing)), json.dumps(raw).encode(), slice_)

    def _limits(self, info: ClaimInfo, claim: Claim, thing: Json) -> ClaimInfo:
        """Add the limits that are in force and those that are wanted, of a claim that has words about them."""
        held = shares(thing, self.by_name)
        if len({one.uuid for one in held}) < len(held):  # nobody resizes such a one
            return info
        warning, asked = info.warning, None
        if claim.sealed:
            try:
                asked = read_limits(thing, self._key)
            except BadObject as error:
                warning = error.message
        limits = in_force(held)
        found = with_limits(claim.slice, limits, asked)
        counts = counted(held, asked)
        consumed = wanted_of(held, None)
        less = [
            (uuid, Part(one.memory_bytes - counts[uuid].memory_bytes, one.compute_milli - counts[uuid].compute_milli))
            for uuid, one in consumed.items()
            if one != counts[uuid]
        ]
        settled = not claim.sealed or bool(warning) or is_settled(held, asked)
        wanted = None if settled else with_limits(claim.slice, wanted_of(held, asked), asked)
        refused = wanted is not None and is_refused(held, asked)
        keeps = wanted is not None and any(one.keeps for one in held)
        number = latest_number(thing)
        return replace(info, slice=found, wanted=wanted, refused=refused, keeps=keeps, less=tuple(less), number=number, warning=warning)

    def claim_changed(self, key: Key, new: ClaimInfo | None) -> None:
        """Take over a ResourceClaim."""
        old = self.claims.pop(key, None)
        carried = old is not None and new is not None and old.uid == new.uid and _id_of(old) in self.carried
        if old is not None and old.claim is not None and self.ids.get(old.claim.slice.slice_id) == key:
            self._forget(old.claim.slice.slice_id)
        self.unowned.discard(key)
        if old is not None and old.moves_to is not None and self.notes.get(old.moves_to.slice_id) == key:
            del self.notes[old.moves_to.slice_id]
            self._forget_note(old.moves_to.slice_id)
        (self._warned.add if new is not None and new.warning else self._warned.discard)(key)
        (self.left_over.add if new is not None and new.left_over is not None else self.left_over.discard)(key)
        if (old.less if old is not None else ()) != (new.less if new is not None else ()):
            self._devices = None
            (self._resized.add if new is not None and new.less else self._resized.discard)(key)
        unread = new is not None and bool(new.problem)
        if unread or key in self._unread:
            self._devices = None
            (self._unread.add if unread else self._unread.discard)(key)
        if new is not None:
            self.claims[key] = new
            if carried:
                self.carried.add(_id_of(new))
            if new.moves_to is not None:
                self.notes[new.moves_to.slice_id] = key
            self._look(key)
        lost = new if new is not None and new.moves_to is not None else old
        slice_ = None if lost is None else lost.moves_to or lost.slice
        if slice_ is not None and slice_.slice_id in self.notes and slice_.slice_id not in self.ids:
            self._look_at_note(slice_.slice_id)

    def _look_at_note(self, slice_id: str) -> None:
        """A slice is between two claims: it holds what the note says."""
        to = self.claims[self.notes[slice_id]].moves_to
        assert to is not None
        pods = [pod for pod in self.pods_of((to.namespace or "", claim_name(slice_id))) if pod.alive]
        self._touched.add(slice_id)
        self.seen[slice_id] = Seen(to, "running" if pods else "prepared", placed=False, refusal=_refusal(pods))

    def _forget_note(self, slice_id: str) -> None:
        if slice_id not in self.ids:
            self.seen.pop(slice_id, None)

    def pod_changed(self, key: Key, old: PodInfo | None, new: PodInfo | None) -> None:
        """Take over a pod."""
        if old is not None:
            others = self._pods_of.get(old.claim_key, set()) - {key}
            self._pods_of[old.claim_key] = others
            if not others:
                del self._pods_of[old.claim_key]
        if new is None:
            self.pods.pop(key, None)
        else:
            self.pods[key] = new
            self._pods_of.setdefault(new.claim_key, set()).add(key)
        for claim in {pod.claim_key for pod in (old, new) if pod is not None}:
            self._look(claim)

    def _look(self, key: Key) -> None:
        """See anew what a claim's slice is."""
        info = self.claims.get(key)
        if info is None or info.claim is None:
            if info is None and key[1].startswith(_PREFIX) and (slice_id := key[1][len(_PREFIX) :]) in self.notes:
                self._look_at_note(slice_id)
            return
        slice_id = info.claim.slice.slice_id
        if info.claim.deleting and not (info.claim.allocated or info.claim.pods):
            # Kubernetes gives it no devices any more: it holds nothing, whatever finalizer keeps it
            if self.ids.get(slice_id) == key:
                self._forget(slice_id)
            self.carried.discard(slice_id)
            return
        state = self._state(key, info.claim)
        self.ids[slice_id] = key
        placed = info.claim.allocated or not info.claim.sealed
        refusal = "" if placed else _refusal(self.pods_of(key))
        age = max(0.0, self._now() - _unix(info.claim.created))
        self._touched.add(slice_id)
        self.seen[slice_id] = Seen(info.slice or info.claim.slice, state, age, info.wanted, info.refused, placed, refusal, keeps=info.keeps)
        if info.claim.sealed:
            if state == "running":
                self.carried.add(slice_id)
            (self.bare.add if state == "prepared" else self.bare.discard)(slice_id)
            (self.unowned.add if state == "running" and self.new_owner(key) else self.unowned.discard)(key)

    def _forget(self, slice_id: str) -> None:
        del self.ids[slice_id], self.seen[slice_id]
        self.carried.discard(slice_id)
        self.bare.discard(slice_id)

    def new_owner(self, key: Key) -> PodInfo | None:
        """Return the running pod that should become a claim's owner."""
        info = self.claims[key]
        used = info.claim.pods if info.claim is not None else ()
        runs = (pod for pod in self.pods_of(key) if pod.running and not pod.deleting and pod.uid in used)
        return next((pod for pod in runs if pod.uid not in info.owners), None)

    def age_seconds(self, key: Key) -> float:
        """Return how old a claim is."""
        info = self.claims[key]
        return max(0.0, self._now() - _unix(info.claim.created)) if info.claim is not None else 0.0

    def _state(self, key: Key, claim: Claim) -> str:
        if claim.deleting:
            return "releasing"
        return "running" if not claim.sealed or self._carriers(key, claim) else "prepared"

    def _carriers(self, key: Key, claim: Claim) -> set[str]:
        """Return the UIDs of the pods that use a claim, or wait for a node with it."""
        ours = {self.pods[one].uid: self.pods[one] for one in self._pods_of.get(key, ())}
        reserved = {uid for uid in claim.pods if uid not in ours or not ours[uid].ended}
        return reserved | {uid for uid, pod in ours.items() if pod.alive}

    def touched(self) -> list[Seen]:
        """Return the slices that may be others than when this was asked last."""
        found = [self.seen[one] for one in self._touched if one in self.seen]
        self._touched.clear()
        return found

    def pods_of(self, key: Key) -> list[PodInfo]:
        """Return the pods with the label of a claim."""
        return [self.pods[one] for one in self._pods_of.get(key, ())]

    def problems(self) -> Iterable[tuple[str, Json, str]]:
        """Yield kind, metadata and words of each object that cannot be used."""
        yield from (("ResourceSlice", one.metadata, one.problem) for one in self.published.values() if one.problem)
        yield from self._doubles
        for key in self._unread:
            info = self.claims[key]
            yield "ResourceClaim", about(key, info), info.problem
        for key in self._warned:
            info = self.claims[key]
            yield "ResourceClaim", about(key, info), info.warning


def about(key: Key, info: ClaimInfo) -> Json:
    """Return what an Event about a claim needs of it."""
    return {"namespace": key[0], "name": key[1], "uid": info.uid, "resourceVersion": info.version}


_READ = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "ownerReferences", "annotations")


def keep_claim(view: View) -> Callable[[Json], ClaimInfo | None]:
    """Return what keeps a ResourceClaim: nothing of one that does not concern nbgpu."""

    def keep(thing: Json) -> ClaimInfo | None:
        ours = _peek(thing) or MOVE_LABEL in _part(_part(thing, "metadata"), "labels") or concerns(thing)
        return view.read(thing) if ours else None

    return keep


def _peek(thing: Json) -> list[Key]:
    """Return which of nbgpu's devices a claim seems to hold, however malformed it is."""
    try:
        results = cast("list[Any]", thing["status"]["allocation"]["devices"]["results"])
    except (KeyError, TypeError):
        return []
    ours = [cast("Json", one) for one in results if isinstance(one, dict) and cast("Json", one).get("driver") == DRIVER]
    return [(str(one.get("pool")), str(one.get("device"))) for one in ours]


def _id_of(info: ClaimInfo) -> str:
    return info.claim.slice.slice_id if info.claim is not None else ""


def _has_limits(thing: Json) -> bool:
    return bool(_part(thing, "status").get("devices")) or LIMITS_ANNOTATION in _part(_part(thing, "metadata"), "annotations")


def _refusal(pods: Iterable[PodInfo]) -> str:
    return next((pod.refusal for pod in pods if pod.alive and pod.refusal), "")


def _part(thing: Json, name: str) -> Json:
    return cast("Json", thing.get(name) or {})


def _list(thing: Json, name: str) -> list[Json]:
    return cast("list[Json]", thing.get(name) or [])


def _meta(thing: Json, *names: str) -> Json:
    meta = _part(thing, "metadata")
    return {name: meta[name] for name in names if meta.get(name) is not None}


def _unix(stamp: str) -> float:
    try:
        return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return float("inf")  # as good as just made
