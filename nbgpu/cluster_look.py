"""A Kubernetes cluster as an administrator sees it, read at one moment: for `nbgpu status --cluster` and `nbgpu doctor --cluster`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .claim_limits import in_force, shares, with_limits
from .claims import DRIVER, OWNER_ANNOTATION, SLICE_LABEL, BadObject, device_name, devices_of, read_claim
from .errors import NbgpuError
from .kube import Json, Kube, NotAllowed, NotFound, path
from .kube_check import cluster_problem
from .loose import as_dict, as_dicts
from .models import Device, Owner, Slice

RESOURCE = "resource.k8s.io/v1"
PARTS = "app.kubernetes.io/name=nbgpu"
COMPONENT = "app.kubernetes.io/component"
ENFORCE = "pod-security.kubernetes.io/enforce"


class Event(NamedTuple):
    """A warning about a pod."""

    reason: str
    message: str
    pod: str = ""
    """Its namespace and name."""


@dataclass(frozen=True)
class Holding:
    """A claim that holds, or asks for, parts of GPUs."""

    namespace: str
    name: str
    owner: str
    """As its annotation says; a claim of somebody's own by its namespace and name."""
    slice: Slice | None
    """With the limits in force; None: it waits for a node and names no GPU yet."""
    state: str
    """``running``, ``waiting`` (its pod has no node yet), ``idle`` (there is no pod with it) or ``releasing``."""
    pods: tuple[str, ...]
    problem: str = ""


@dataclass
class Cluster:
    """All that matters of it. What these credentials may not read is named in `unread`."""

    version: str = ""
    runtimes: dict[str, str] = field(default_factory=dict[str, str])
    """Container runtime by node with our devices."""
    problem: str | None = None
    """Why it cannot share devices, in one line."""
    has_class: bool = False
    devices: list[Device] = field(default_factory=list[Device])
    malformed: list[str] = field(default_factory=list[str])
    ready: dict[str, bool] = field(default_factory=dict[str, bool])
    also: dict[str, int] = field(default_factory=dict[str, int])
    """GPUs that NVIDIA's device plugin hands out, by node."""
    holdings: list[Holding] = field(default_factory=list[Holding])
    agents: list[Json] = field(default_factory=list[Json])
    pools: list[Json] = field(default_factory=list[Json])
    pods: list[Json] = field(default_factory=list[Json])
    """Of the installation."""
    carried: set[tuple[str, str]] | None = None
    """Namespaces and request ids of the slices for which there is a pod; None: not known."""
    runtime_classes: set[str] = field(default_factory=set[str])
    events: list[Event] = field(default_factory=list[Event])
    unguarded: list[str] = field(default_factory=list[str])
    """Namespaces of servers in which Pod Security lets anybody who makes pods mount the host's files."""
    unread: list[str] = field(default_factory=list[str])


def look(namespace: str = "default") -> Cluster:
    """Read the cluster of KUBECONFIG."""

    async def read() -> Cluster:
        kube = Kube()
        try:
            return await _read(kube, namespace)
        finally:
            await kube.close()

    return asyncio.run(read())


async def _read(kube: Kube, namespace: str) -> Cluster:
    found = Cluster()
    told = await kube.get("/version")
    found.version = str(told.get("gitVersion", "unknown"))
    found.problem = await cluster_problem(kube, namespace)
    with contextlib.suppress(NotFound, NotAllowed):
        found.has_class = bool(await kube.get(path(RESOURCE, "deviceclasses", name=DRIVER)))
    nodes = await _list(kube, found, "nodes", path("v1", "nodes"))
    slices = await _list(kube, found, "resourceslices", path(RESOURCE, "resourceslices"), fields=f"spec.driver={DRIVER}")
    claims = await _list(kube, found, "resourceclaims", path(RESOURCE, "resourceclaims"))
    found.agents = await _list(kube, found, "daemonsets", path("apps/v1", "daemonsets"), labels=f"{PARTS},{COMPONENT}=agent")
    found.pools = await _list(kube, found, "deployments", path("apps/v1", "deployments"), labels=f"{PARTS},{COMPONENT}=pool")
    found.pods = await _list(kube, found, "pods", path("v1", "pods"), labels=PARTS)
    with contextlib.suppress(NotAllowed):
        found.carried = carried((await kube.list(path("v1", "pods"), labels=SLICE_LABEL)).items)
    found.runtime_classes = {
        str(one["metadata"]["name"]) for one in await _list(kube, found, "runtimeclasses", path("node.k8s.io/v1", "runtimeclasses"))
    }
    events = await _list(kube, found, "events", path("v1", "events"), fields="involvedObject.kind=Pod,type=Warning")
    found.events = [_event(one) for one in events]
    take_in(found, nodes, slices, claims)
    bindings = await _list(kube, found, "rolebindings", path("rbac.authorization.k8s.io/v1", "rolebindings"), labels=PARTS)
    found.unguarded = unguarded(await _list(kube, found, "namespaces", path("v1", "namespaces")), bindings, found.holdings)
    return found


def _event(one: Json) -> Event:
    of = as_dict(one.get("involvedObject"))
    return Event(str(one.get("reason", "")), str(one.get("message", "")), f"{of.get('namespace')}/{of.get('name')}")


async def _list(kube: Kube, found: Cluster, what: str, where: str, labels: str = "", fields: str = "") -> list[Json]:
    try:
        return (await kube.list(where, labels=labels, fields=fields)).items
    except (NotAllowed, NotFound):
        found.unread.append(what)
        return []


def carried(pods: list[Json]) -> set[tuple[str, str]]:
    """Return namespace and request id of the slice of each pod that has not ended."""
    alive = [as_dict(one.get("metadata")) for one in pods if as_dict(one.get("status")).get("phase") not in ("Succeeded", "Failed")]
    return {(str(meta.get("namespace", "")), str(as_dict(meta.get("labels")).get(SLICE_LABEL, ""))) for meta in alive}


def take_in(found: Cluster, nodes: list[Json], slices: list[Json], claims: list[Json]) -> None:
    """Fill in what the objects say: pure."""
    for one in slices:
        try:
            found.devices += devices_of(one)
        except BadObject as error:
            found.malformed.append(error.message)
    ours = {device.node for device in found.devices}
    for node in nodes:
        name, status = str(node["metadata"]["name"]), as_dict(node.get("status"))
        if name in ours:
            conditions = as_dicts(status.get("conditions"))
            found.ready[name] = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
            found.runtimes[name] = str(as_dict(status.get("nodeInfo")).get("containerRuntimeVersion", ""))
            other = str(as_dict(status.get("allocatable")).get("nvidia.com/gpu", "0"))
            if other.isdigit() and int(other):
                found.also[name] = int(other)
    names = {(device.node, device_name(device.uuid)): device for device in found.devices}
    found.holdings = sorted(_holdings(claims, names, found.carried), key=lambda one: (one.namespace, one.name))


def unguarded(namespaces: list[Json], bindings: list[Json], holdings: list[Holding]) -> list[str]:
    """Return where servers run, or may by the roles that the chart gives, and Pod Security enforces neither baseline nor restricted."""
    ours = {str(one["metadata"].get("namespace")) for one in bindings if str(one["roleRef"].get("name")).endswith("-pool-claims")}
    ours |= {one.namespace for one in holdings}
    levels = {str(one["metadata"]["name"]): as_dict(one["metadata"].get("labels")).get(ENFORCE) for one in namespaces}
    return sorted(name for name in ours if name in levels and levels[name] not in ("baseline", "restricted"))


def _holdings(claims: list[Json], names: dict[tuple[str, str], Device], carried: set[tuple[str, str]] | None) -> Iterator[Holding]:
    for claim in claims:
        meta = as_dict(claim.get("metadata"))
        labels = as_dict(meta.get("labels"))
        try:
            read = read_claim(claim, names, None)
            problem = ""
        except BadObject as error:
            read, problem = None, error.message
        status = as_dict(claim.get("status"))
        ours = SLICE_LABEL in labels and str(meta.get("name", "")).startswith("nbgpu-")
        if read is None and not problem and not ours and (status.get("allocation") or not _wants_ours(claim)):
            continue
        pods = tuple(str(one.get("name", "")) for one in as_dicts(status.get("reservedFor")))
        deleting = "deletionTimestamp" in meta
        slice_of = str(meta.get("namespace", "")), str(labels.get(SLICE_LABEL, ""))
        idle = bool(status.get("allocation")) or (carried is not None and slice_of not in carried)
        state = "releasing" if deleting else "running" if pods else "idle" if idle else "waiting"
        held = with_limits(read.slice, in_force(shares(claim, names))) if read is not None else None
        yield Holding(str(meta.get("namespace", "")), str(meta.get("name", "")), _owner(meta), held, state, pods, problem)


def _wants_ours(claim: Json) -> bool:
    """Return whether a claim asks for the DeviceClass that the chart makes."""
    requests = as_dicts(as_dict(as_dict(claim.get("spec")).get("devices")).get("requests"))
    return any(as_dict(one.get("exactly")).get("deviceClassName") == DRIVER for one in requests)


def _owner(meta: Json) -> str:
    try:
        owner = Owner.model_validate(json.loads(as_dict(meta.get("annotations"))[OWNER_ANNOTATION]))
    except (KeyError, ValueError, TypeError):
        return f"{meta.get('namespace')}/{meta.get('name')}"
    return f"{owner.user}/{owner.server} ({owner.hub})" if owner.server else f"{owner.user} ({owner.hub})"


def granted(cluster: Cluster) -> dict[str, tuple[int, int, int]]:
    """Return bytes, milli-GPU and number of slices by device."""
    sums = {device.uuid: (0, 0, 0) for device in cluster.devices}
    for one in cluster.holdings:
        for part in one.slice.devices if one.slice is not None else []:
            memory, milli, count = sums.get(part.uuid, (0, 0, 0))
            sums[part.uuid] = memory + part.memory_bytes, milli + part.compute_milli, count + 1
    return sums


def need_cluster() -> None:
    """Raise where the parts that speak to Kubernetes are not installed."""
    try:
        import kubernetes.config  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]  # noqa: F401
    except ImportError:
        raise NbgpuError("To look at a cluster: pip install 'nbgpu[kubernetes]'.", code="no-cluster") from None
