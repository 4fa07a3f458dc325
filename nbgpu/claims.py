"""Slices as Kubernetes objects: ResourceSlices say which devices there are, ResourceClaims who holds what.

Pure: objects are plain dictionaries as the API server speaks them (`resource.k8s.io/v1`), nothing here talks to one. The pool writes
claims and reads both; the agent writes ResourceSlices and reads claims.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import InvalidValue, NbgpuError
from .models import Device, Owner, Slice, SliceDevice

DRIVER = "gpu.nbgpu.io"
"""Name of the DRA driver, and of the DeviceClass that stands for its devices."""
API_VERSION = "resource.k8s.io/v1"
PARAMETERS = {"apiVersion": f"{DRIVER}/v1", "kind": "Slice"}
SLICE_LABEL = "nbgpu.io/slice"
"""On a claim and its pod: the request id, which is the slice id."""
HUB_LABEL = "nbgpu.io/hub"
"""On a claim: the hub's name as far as a label can hold it."""
MOVE_LABEL = "nbgpu.io/move"
"""On a note that a claim is being moved: the request id; as an annotation: where to."""
OWNER_ANNOTATION = "nbgpu.io/owner"
MANAGED_BY = {"app.kubernetes.io/managed-by": "nbgpu"}
COMING = "coming:"
"""How the names of nodes begin that have to be started first, and the UUIDs of their devices; no real one has a colon there."""
DEVICES_PER_SLICE_OBJECT = 64
"""Devices in one ResourceSlice; a node has no more."""
FOREIGN_HUB = "kubernetes"
"""Hub of the owner of a claim that the pool did not make: the user is its namespace, the server its name."""

MIB = 1024**2

Json = dict[str, Any]
_NO_LABEL = re.compile(r"[^A-Za-z0-9_.-]+")
_QUANTITY = re.compile(r"^([0-9.]+(?:[eE][+-]?[0-9]+)?)(m|[kMGTPE]|[KMGTPE]i)?$", re.ASCII)
_SUFFIX = {
    "m": Decimal("0.001"),
    **{letter: Decimal(1000) ** (power + 1) for power, letter in enumerate("kMGTPE")},
    **{f"{letter}i": Decimal(1024) ** (power + 1) for power, letter in enumerate("KMGTPE")},
}


class BadObject(NbgpuError):
    """An object of Kubernetes that nbgpu cannot use; the message names it and what is wrong."""

    code = "bad-object"
    status = 422


class _Loose(BaseModel):
    """As much of an object of Kubernetes as is read here; null stands for what is not there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _no_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = cast("Json", value)
        return given if None not in given.values() else {name: one for name, one in given.items() if one is not None}


class _Meta(_Loose):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    creationTimestamp: str = ""
    deletionTimestamp: str | None = None


class _Class(_Loose):
    deviceClassName: str = ""


class _Request(_Loose):
    exactly: _Class | None = None
    firstAvailable: tuple[_Class, ...] = ()


class _Opaque(_Loose):
    driver: str
    parameters: Json = {}


class _Config(_Loose):
    opaque: _Opaque | None = None


class _Asked(_Loose):
    requests: tuple[_Request, ...] = ()
    config: tuple[_Config, ...] = ()


class _Spec(_Loose):
    devices: _Asked = _Asked()


class _Result(_Loose):
    driver: str
    pool: str
    device: str
    consumedCapacity: dict[str, str | int] = {}


class _Results(_Loose):
    results: tuple[_Result, ...] = ()


class _Allocation(_Loose):
    devices: _Results = _Results()


class _Consumer(_Loose):
    resource: str = ""
    uid: str = ""


class _Status(_Loose):
    allocation: _Allocation = _Allocation()
    reservedFor: tuple[_Consumer, ...] = ()


class _Object(_Loose):
    metadata: _Meta = _Meta()
    spec: _Spec = _Spec()
    status: _Status = _Status()

    def results(self) -> list[_Result]:
        """Return the parts of nbgpu's devices that the claim holds."""
        return [one for one in self.status.allocation.devices.results if one.driver == DRIVER]

    def asks(self) -> bool:
        """Return whether the claim asks for devices of nbgpu."""
        wanted = [each for one in self.spec.devices.requests for each in (one.exactly, *one.firstAvailable) if each]
        return any(one.deviceClassName == DRIVER for one in wanted)

    def parameters(self) -> list[Json]:
        """Return what the claim tells the driver."""
        found = [one.opaque.parameters for one in self.spec.devices.config if one.opaque and one.opaque.driver == DRIVER]
        return [one for one in found if one.get("kind") == PARAMETERS["kind"]]


class _Move(_Loose):
    slice: Slice
    seal: str


class _PublishedDevice(_Loose):
    attributes: dict[str, dict[str, Any]]
    taints: tuple[Json, ...] = ()

    def device(self, node: str) -> Device:
        """Return the device as the agent described it."""
        values = {name: next(iter(value.values()), None) for name, value in self.attributes.items()}
        words = {"uuid": "uuid", "index": "index", "model": "model", "memory_bytes": "memoryBytes", "reserve_bytes": "reserveBytes"}
        told = {ours: values.get(theirs) for ours, theirs in words.items()}
        return Device.model_validate({**told, "node": node, "simulated": values.get("simulated", False), "healthy": not self.taints})


class _PublishedSpec(_Loose):
    nodeName: str
    devices: tuple[_PublishedDevice, ...] = ()


class _Published(_Loose):
    spec: _PublishedSpec


@dataclass(frozen=True)
class Claim:
    """A ResourceClaim that holds, or asks for, parts of nbgpu's devices."""

    uid: str
    namespace: str
    name: str
    slice: Slice
    allocated: bool
    """kube-scheduler has given it its devices; `slice` tells what it holds. Else what it asks for."""
    pods: tuple[str, ...]
    """UIDs of the pods that it is reserved for."""
    deleting: bool
    sealed: bool
    """Made by the pool: its parameters carry the seal of the installation's key."""
    created: str


def claim_name(request_id: str) -> str:
    """Return the name of the ResourceClaim of a request: a retry of its creation meets it."""
    return f"nbgpu-{request_id}"


def device_name(uuid: str) -> str:
    """Return the name of a device in ResourceSlices: its UUID as a DNS label."""
    return re.sub(r"[^a-z0-9-]+", "-", uuid.lower()).strip("-")[:63]


def is_coming(name: str) -> bool:
    """Return whether a node, or a device, of that name has to be started first."""
    return name.startswith(COMING)


def parse_quantity(value: object) -> int:
    """Return a quantity of Kubernetes (``"20Gi"``, ``"250"``) as a whole number, rounded up; ValueError when it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) < 19 and value.isascii() and value.isdecimal():
        return int(value)  # as the pool writes them
    return int(exact_quantity(value).to_integral_value(rounding="ROUND_CEILING"))


def exact_quantity(value: object) -> Decimal:
    """Return a quantity of Kubernetes (``"20Gi"``, ``"250m"``) as it is; ValueError when it is none, or is too large."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    match = _QUANTITY.match(value) if isinstance(value, str) and len(value) <= 40 else None
    if match is None:
        raise ValueError(f"{value!r} is not a quantity")
    try:
        exact = Decimal(match[1]) * _SUFFIX.get(match[2] or "", Decimal(1))
        if abs(exact) < 2**63:
            return exact
    except InvalidOperation:
        raise ValueError(f"{value!r} is not a quantity") from None
    raise ValueError(f"{value!r} is too large")


# -- ResourceSlices


def resource_slice(
    node: str,
    devices: Sequence[Device],
    published: Mapping[str, tuple[int, int]],
    generation: int,
    node_uid: str | None = None,
) -> Json:
    """Return the ResourceSlice of a node.

    Parameters
    ----------
    published : mapping
        Memory in bytes and compute in milli-GPU that may be allocated, by device uuid (`claim_limits.published`), where it is not all that
        the device has: less after a slice has grown, more after one has given back.
    generation : int
        Of the node's pool of devices; rises at every change.
    node_uid : str, optional
        The object goes when the Node does.
    """
    metadata: Json = {"name": f"{node}-{DRIVER}", "labels": dict(MANAGED_BY)}
    if node_uid:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid}]
    return {
        "apiVersion": API_VERSION,
        "kind": "ResourceSlice",
        "metadata": metadata,
        "spec": {
            "driver": DRIVER,
            "nodeName": node,
            "pool": {"name": node, "generation": generation, "resourceSliceCount": 1},
            "devices": [_device(device, *published.get(device.uuid, (device.usable_bytes, 1000))) for device in devices],
        },
    }


def _device(device: Device, memory: int, milli: int) -> Json:
    found: Json = {
        "name": device_name(device.uuid),
        "allowMultipleAllocations": True,
        "attributes": {
            "uuid": {"string": device.uuid},
            "model": {"string": device.model[:64]},
            "index": {"int": device.index},
            "memoryBytes": {"int": device.memory_bytes},
            "reserveBytes": {"int": device.reserve_bytes},
            "simulated": {"bool": device.simulated},
        },
        "capacity": {
            "memory": _capacity(memory, device.usable_bytes, MIB),
            "compute": _capacity(milli, 1000, 1),
        },
    }
    if not device.healthy:
        found["taints"] = [{"key": f"{DRIVER}/unhealthy", "effect": "NoSchedule"}]
    return found


def _capacity(value: int, whole: int, step: int) -> Json:
    """Return a capacity as the API server takes it: at least a step, and all that it names a whole number of steps."""
    most = max(step, min(value, whole) // step * step)  # one claim never gets more than the device has, whatever others gave back
    allowed = {"min": str(step), "max": str(most)}
    if value >= 2 * step:
        allowed["step"] = str(step)
    # a claim that does not say how much gets the whole device
    return {"value": str(max(step, value)), "requestPolicy": {"default": str(most), "validRange": allowed}}


def devices_of(resource_slice: Json) -> list[Device]:
    """Return the devices of one of the agents' ResourceSlices.

    Raises
    ------
    BadObject
        It is not as an agent writes it.
    """
    try:
        spec = _Published.model_validate(resource_slice).spec
        return [one.device(spec.nodeName) for one in spec.devices]
    except ValueError as error:  # pydantic's too
        told = f"ResourceSlice {object_name(resource_slice)} is not as an agent of nbgpu writes it ({_first(error)})"
        raise BadObject(f"{told}; its devices are left out.") from None


# -- ResourceClaims


def claim_for(wanted: Slice, key: bytes) -> Json:
    """Return the ResourceClaim that stands for a granted slice.

    Parameters
    ----------
    wanted : Slice
        With its `namespace`.
    key : bytes
        The installation's key: the agent prepares what it seals.
    """
    if wanted.namespace is None:
        raise InvalidValue("namespace", None, "the Kubernetes namespace of the server's pod")
    name = claim_name(wanted.slice_id)
    stated = wanted.model_dump(mode="json")
    parameters = {**PARAMETERS, "mode": wanted.mode, "slice": stated, "seal": seal(wanted.namespace, name, wanted, key)}
    owner = json.dumps(wanted.owner.model_dump(mode="json"), sort_keys=True)
    hub = _NO_LABEL.sub("-", wanted.owner.hub)[:63].strip("-_.")
    return {
        "apiVersion": API_VERSION,
        "kind": "ResourceClaim",
        "metadata": {
            "name": name,
            "namespace": wanted.namespace,
            "labels": {**MANAGED_BY, SLICE_LABEL: wanted.slice_id, HUB_LABEL: hub},
            "annotations": {OWNER_ANNOTATION: owner},
        },
        "spec": {
            "devices": {
                "requests": [_request(number, part) for number, part in enumerate(wanted.devices)],
                "config": [{"opaque": {"driver": DRIVER, "parameters": parameters}}],
                **(_distinct() if len(wanted.devices) > 1 and is_coming(wanted.node) else {}),
            }
        },
    }


def _distinct() -> Json:
    return {"constraints": [{"distinctAttribute": f"{DRIVER}/uuid"}]}


def _request(number: int, part: SliceDevice) -> Json:
    # of a node that has to be started first nobody knows the devices: an autoscaler compares what one like it would have
    name, value = ("model", part.model[:64]) if is_coming(part.uuid) else ("uuid", part.uuid)
    return {
        "name": f"gpu-{number}",
        "exactly": {
            "deviceClassName": DRIVER,
            "allocationMode": "ExactCount",
            "count": 1,
            "selectors": [{"cel": {"expression": f'device.attributes["{DRIVER}"].{name} == {json.dumps(value)}'}}],
            "capacity": {"requests": {"memory": str(part.memory_bytes), "compute": str(part.compute_milli)}},
        },
    }


def move_name(request_id: str) -> str:
    """Return the name of the note that a claim is being moved."""
    return f"{claim_name(request_id)}-move"


def move_note(to: Slice, key: bytes) -> Json:
    """Return the note that the claim of a slice is being deleted and made again at another place: a claim that asks for nothing.

    Whoever finds it and no claim makes that of `to`.
    """
    name = move_name(to.slice_id)
    told = {"slice": to.model_dump(mode="json"), "seal": seal(to.namespace or "", name, to, key)}
    return {
        "apiVersion": API_VERSION,
        "kind": "ResourceClaim",
        "metadata": {
            "name": name,
            "namespace": to.namespace,
            "labels": {**MANAGED_BY, MOVE_LABEL: to.slice_id},
            "annotations": {MOVE_LABEL: json.dumps(told, sort_keys=True)},
        },
        "spec": {"devices": {}},
    }


def read_move(claim: Json, key: bytes | None) -> Slice | None:
    """Return where a note says that a slice goes; None where it is no note of the pool's."""
    meta = claim.get("metadata")
    annotations = cast("Json", meta).get("annotations") if isinstance(meta, dict) else None
    text = cast("Json", annotations).get(MOVE_LABEL) if isinstance(annotations, dict) else None
    if key is None or not isinstance(text, str):
        return None
    try:
        told = _Move.model_validate_json(text)
    except ValidationError:
        return None
    where = _Meta.model_validate({name: str(cast("Json", meta).get(name, "")) for name in ("name", "namespace")})
    fits = told.slice.namespace == where.namespace and move_name(told.slice.slice_id) == where.name
    good = hmac.compare_digest(seal(where.namespace, where.name, told.slice, key).encode(), told.seal.encode("utf-8", "replace"))
    return told.slice if fits and good else None


def as_body(thing: Json) -> bytes:
    """Return an object as the body of a request that creates it: the very bytes that the API server would write itself.

    It keeps opaque parameters as they came, and compares a claim's immutable spec byte by byte: after a create with other spaces,
    escapes or order of keys, each later patch of the claim, of its labels even, is refused ("field is immutable").
    """
    text = json.dumps(thing, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "surrogatepass")


def seal(namespace: str, name: str, of: Slice, key: bytes) -> str:
    """Return the seal of a claim's parameters, HMAC-SHA256 in hexadecimal: who cannot read the installation's key cannot make one."""
    text = json.dumps({"namespace": namespace, "name": name, "slice": of.model_dump(mode="json")}, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def concerns(claim: Json) -> bool:
    """Return whether a claim holds or asks for devices of nbgpu; one that cannot be read does not."""
    try:
        found = _Object.model_validate(claim)
    except ValidationError:
        return False
    return bool(found.results()) or found.asks()


def read_claim(claim: Json, devices: Mapping[tuple[str, str], Device], key: bytes | None) -> Claim | None:
    """Return what a claim holds, or asks for; None for one that names no device yet: it waits, and holds nothing.

    Parameters
    ----------
    devices : mapping
        By node and `device_name`.
    key : bytes, optional
        The installation's key; None trusts no claim's own words.

    Raises
    ------
    BadObject
        Malformed, or on a device that nobody published.
    """
    try:
        found = _Object.model_validate(claim)
        stated = _stated(found, key)
        results = found.results()
        if results:
            taken = [_taken(one, devices) for one in results]
            if stated is not None and _as_stated(stated, results, taken):  # as good as always, and a copy takes its time
                return _claim(found, stated, allocated=True, sealed=True)
            held = {
                "node": taken[0].node,
                "devices": [_held(one, device) for one, device in zip(results, taken, strict=True)],
                "simulated": any(device.simulated for device in taken),
                "namespace": found.metadata.namespace,
            }
            slice_ = (stated or _foreign(found, taken[0].node)).model_copy(update=held)
        elif stated is not None:
            slice_ = stated
        else:
            return None
        return _claim(found, slice_, allocated=bool(results), sealed=stated is not None)
    except ValueError as error:  # pydantic's too
        raise BadObject(f"ResourceClaim {object_name(claim)} cannot be read ({_first(error)}); it is not served.") from None


def _claim(found: _Object, of: Slice, *, allocated: bool, sealed: bool) -> Claim:
    meta = found.metadata
    pods = tuple(one.uid for one in found.status.reservedFor if one.resource == "pods")
    deleting = meta.deletionTimestamp is not None
    return Claim(meta.uid, meta.namespace, meta.name, of, allocated, pods, deleting, sealed, meta.creationTimestamp)


def _as_stated(stated: Slice, results: Sequence[_Result], taken: Sequence[Device]) -> bool:
    """Return whether a claim holds just what the pool wrote that it should."""
    if len(results) != len(stated.devices):
        return False
    return all(
        (part.uuid, part.index, part.model, stated.node, stated.simulated)
        == (device.uuid, device.index, device.model, device.node, device.simulated)
        and {"memory", "compute"} <= one.consumedCapacity.keys()
        and parse_quantity(one.consumedCapacity["memory"]) == part.memory_bytes
        and parse_quantity(one.consumedCapacity["compute"]) == part.compute_milli
        for part, one, device in zip(stated.devices, results, taken, strict=True)
    )


def _taken(result: _Result, devices: Mapping[tuple[str, str], Device]) -> Device:
    device = devices.get((result.pool, result.device))
    if device is None:
        raise ValueError(f"it holds {result.device} of node {result.pool}, which no agent publishes")
    return device


def _held(result: _Result, device: Device) -> SliceDevice:
    consumed = result.consumedCapacity
    memory = parse_quantity(consumed["memory"]) if "memory" in consumed else device.usable_bytes
    milli = parse_quantity(consumed["compute"]) if "compute" in consumed else 1000
    return SliceDevice(uuid=device.uuid, index=device.index, model=device.model, memory_bytes=memory, compute_milli=milli)


def _stated(claim: _Object, key: bytes | None) -> Slice | None:
    """Return the slice that a claim's parameters tell of, when it was the pool that wrote them."""
    namespace, name = claim.metadata.namespace, claim.metadata.name
    for parameters in claim.parameters():
        told = parameters.get("seal")
        if key is None or not isinstance(told, str) or "slice" not in parameters:
            continue
        try:
            stated = Slice.model_validate(parameters["slice"])
        except ValidationError:
            continue  # not the pool's words
        fits = stated.namespace == namespace and claim_name(stated.slice_id) == name
        if hmac.compare_digest(seal(namespace, name, stated, key).encode(), told.encode("utf-8", "replace")) and fits:
            return stated
    return None


def left_over(claim: Json, key: bytes) -> Slice | None:
    """Return of which slice a claim tells that holds nothing and was sealed with another key than the installation's.

    A pool of an earlier installation made it, or whoever can make claims: it may be deleted, and believed in nothing else.
    """
    try:
        found = _Object.model_validate(claim)
        if found.status.allocation.devices.results or found.status.reservedFor or found.metadata.deletionTimestamp is not None:
            return None
        if _stated(found, key) is not None:
            return None
        told = [Slice.model_validate(one["slice"]) for one in found.parameters() if "seal" in one and "slice" in one]
    except ValueError:  # pydantic's too
        return None
    where = found.metadata.namespace, found.metadata.name
    return next((one for one in told if (one.namespace, claim_name(one.slice_id)) == where), None)


def _foreign(claim: _Object, node: str) -> Slice:
    """Return the frame of a slice of somebody's own claim: of its words only the mode counts."""
    meta = claim.metadata
    mode = "strict" if any(one.get("mode") == "strict" for one in claim.parameters()) else "burst"
    placeholder = SliceDevice(uuid="unknown", index=0, model="unknown", memory_bytes=0, compute_milli=1)
    owner = Owner(hub=FOREIGN_HUB, user=meta.namespace, server=meta.name)
    return Slice(slice_id=f"claim-{meta.uid}", owner=owner, node=node, mode=mode, devices=[placeholder])


def object_name(thing: Json) -> str:
    """Return an object's name for a message, whatever the object is."""
    try:
        meta = _Object.model_validate({"metadata": thing.get("metadata")}).metadata
    except (ValidationError, AttributeError):
        return "(without a name)"
    return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name or "(without a name)"


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)[:200]
