"""Limits of a running slice on Kubernetes, that change while its claim cannot: what is wanted, what is in force, what may be allocated.

An allocated claim's spec and allocation are immutable. So the pool writes the limits that it *wants* into the claim's annotation
`nbgpu.io/limits`, sealed; the agent brings them in force when they fit and writes those *in force* into the claim's `status.devices`;
and what a claim holds more or less than was allocated is booked in the capacity that the agent publishes. Pure functions of claims, so
that whoever died at any step computes the same again.

The order that keeps the sum of the limits in force within the device, whatever kube-scheduler allocates meanwhile:

* shrink: lower the limit, report it, then publish more (`counted` without `booked`); memory that the slice still holds above it is
  reported as in force (`keeps`) and counts, until it is free;
* growth: publish less first (`counted` with the wanted limits), wait until the API server has it, look at *all* allocated claims again;
  where `fits` says no, publish as before and refuse (`answered`, an event); else raise the limit and report it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .claims import DRIVER, BadObject, object_name, parse_quantity
from .loose import Json, as_dict, as_list
from .models import Bytes, Device, Milli, Mode, Name, Slice

LIMITS_ANNOTATION = "nbgpu.io/limits"
WHOLE_MILLI = 1000


class Limit(BaseModel):
    """A slice's limits on one device."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    memory_bytes: Bytes
    compute_milli: Milli

    def larger(self, other: Limit) -> Limit:
        """Return the larger of both, number by number."""
        return Limit(memory_bytes=max(self.memory_bytes, other.memory_bytes), compute_milli=max(self.compute_milli, other.compute_milli))


class Limits(BaseModel):
    """What the pool wants of a slice, by device uuid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: Annotated[dict[Name, Limit], Field(min_length=1, max_length=16)]
    mode: Mode
    number: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """A larger one each time that they are wanted, so that what was refused once can be wanted again, and what was wanted once is not put
    back by whoever has kept it."""


class _Written(Limits):
    seal: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Wanted:
    """Limits that the pool wrote, with the seal by which the agent says that it has dealt with them."""

    limits: Limits
    seal: str


@dataclass(frozen=True)
class Share:
    """One result of a claim's allocation: a part of one device."""

    uuid: str
    pool: str
    device: str
    share_id: str | None
    consumed: Limit
    """What kube-scheduler counts."""
    in_force: Limit
    """What the agent reports that it counts; as allocated where it has reported nothing (that can be read)."""
    answered: str
    """Seal of the wanted limits that the agent has dealt with last: brought in force or, where `in_force` is otherwise, refused."""
    keeps: bool = False
    """They are in force, and the slice still holds more memory than that: `in_force` counts it until it is free."""


# -- what is wanted


def limits_annotation(uid: str, namespace: str, name: str, limits: Limits, key: bytes) -> str:
    """Return the value of the annotation `nbgpu.io/limits`.

    Parameters
    ----------
    uid, namespace, name : str
        Of the claim: on another one the value counts for nothing.
    key : bytes
        The installation's key.
    """
    stated = limits.model_dump(mode="json")
    return json.dumps({**stated, "seal": _seal(uid, namespace, name, limits, key)}, sort_keys=True, separators=(",", ":"))


def _seal(uid: str, namespace: str, name: str, limits: Limits, key: bytes) -> str:
    told = {"uid": uid, "namespace": namespace, "name": name, "limits": limits.model_dump(mode="json")}
    return hmac.new(key, json.dumps(told, sort_keys=True, separators=(",", ":")).encode(), hashlib.sha256).hexdigest()


def read_limits(claim: Json, key: bytes | None) -> Wanted | None:
    """Return the limits that the pool wants of a claim; None where it has none to say: then as allocated.

    Raises
    ------
    BadObject
        There is an annotation and it is junk, or the pool did not write it for this very claim, or before what the agent has dealt with
        last; or there was one, and it is gone.
    """
    meta = claim.get("metadata")
    annotations = cast("Json", meta).get("annotations") if isinstance(meta, dict) else None
    text = cast("Json", annotations).get(LIMITS_ANNOTATION) if isinstance(annotations, dict) else None
    latest = latest_number(claim)
    told = f"The annotation {LIMITS_ANNOTATION} of ResourceClaim {object_name(claim)}"
    if text is None:
        if latest:
            raise BadObject(f"{told} was taken away; its limits stay as they are.")
        return None
    try:
        written = _Written.model_validate_json(text if isinstance(text, str) and len(text) <= 16384 else "")
    except ValidationError:
        raise BadObject(f"{told} cannot be read; its limits stay as they are.") from None
    limits = Limits(devices=written.devices, mode=written.mode, number=written.number)
    where = cast("Json", meta)
    seal = _seal(str(where.get("uid")), str(where.get("namespace")), str(where.get("name")), limits, key) if key is not None else ""
    if not hmac.compare_digest(seal, written.seal):
        raise BadObject(f"{told} was not written by the pool for this claim; its limits stay as they are.")
    if limits.number < latest:
        raise BadObject(f"{told} is an older one, put back; its limits stay as they are.")
    return Wanted(limits, seal)


def latest_number(claim: Json) -> int:
    """Return the number of the limits that the agent has dealt with last; 0 where it has dealt with none."""
    return max((data.number for _, data in _reports(as_list(as_dict(claim.get("status")).get("devices")))), default=0)


# -- what is in force


class _Loose(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Data(Limit):
    answered: str = ""
    number: int = 0
    keeps: bool = False


class _Reported(_Loose):
    driver: str
    pool: str
    device: str
    shareID: str | None = None
    data: _Data


class _Result(_Loose):
    driver: str
    pool: str
    device: str
    shareID: str | None = None
    consumedCapacity: dict[str, str | int] = {}


def shares(claim: Json, devices: Mapping[tuple[str, str], Device], *, known_only: bool = False) -> list[Share]:
    """Return the parts of nbgpu's devices that a claim holds.

    Parameters
    ----------
    devices : mapping
        By node and `device_name`.
    known_only : bool
        Leave out parts of devices that are not among these: of a GPU that is lost, nothing is known while the others go on.

    Raises
    ------
    BadObject
        Its allocation is malformed, or on a device that nobody published.
    """
    try:
        status = as_dict(claim.get("status"))
        results = [_Result.model_validate(one) for one in as_list(as_dict(as_dict(status.get("allocation")).get("devices")).get("results"))]
        reported = dict(_reports(as_list(status.get("devices"))))
        known = [one for one in results if one.driver == DRIVER and (not known_only or (one.pool, one.device) in devices)]
        return [_share(one, devices, reported) for one in known]
    except ValueError as error:  # pydantic's too
        raise BadObject(f"The allocation of ResourceClaim {object_name(claim)} cannot be read ({str(error)[:200]}).") from None


def _share(result: _Result, devices: Mapping[tuple[str, str], Device], reported: Mapping[tuple[str, str, str | None], _Data]) -> Share:
    device = devices.get((result.pool, result.device))
    if device is None:
        raise ValueError(f"it holds {result.device} of node {result.pool}, which no agent publishes")
    taken = result.consumedCapacity
    memory = parse_quantity(taken["memory"]) if "memory" in taken else device.usable_bytes
    consumed = Limit(memory_bytes=memory, compute_milli=parse_quantity(taken.get("compute", WHOLE_MILLI)))
    data = reported.get((result.pool, result.device, result.shareID))
    in_force = Limit(memory_bytes=data.memory_bytes, compute_milli=data.compute_milli) if data is not None else consumed
    answered, keeps = (data.answered, data.keeps) if data is not None else ("", False)
    return Share(device.uuid, result.pool, result.device, result.shareID, consumed, in_force, answered, keeps)


def _reports(entries: list[Any]) -> Iterable[tuple[tuple[str, str, str | None], _Data]]:
    for entry in entries:
        try:
            one = _Reported.model_validate(entry)
        except ValidationError:
            continue  # as good as not reported
        if one.driver == DRIVER:
            yield (one.pool, one.device, one.shareID), one.data


def report(share: Share, limit: Limit, answered: str = "", number: int = 0, keeps: bool = False) -> Json:
    """Return the entry of `status.devices` by which the agent says which limits are in force.

    Parameters
    ----------
    answered : str
        Seal of the wanted limits that this is the answer to: brought in force, or refused where `limit` is otherwise.
    number : int
        Of the same.
    keeps : bool
        It is in force, and the slice still holds more memory than that: `limit` counts it.
    """
    data: Json = limit.model_dump(mode="json")
    if answered:
        data["answered"] = answered
    if number:
        data["number"] = number
    if keeps:
        data["keeps"] = True
    found: Json = {"driver": DRIVER, "pool": share.pool, "device": share.device, "data": data}
    return found if share.share_id is None else {**found, "shareID": share.share_id}


def in_force(held: Iterable[Share]) -> dict[str, Limit]:
    """Return the limits in force by device uuid; several parts of one device are one."""
    return _by_device((one.uuid, one.in_force) for one in held)


def wanted_of(held: Iterable[Share], wanted: Wanted | None) -> dict[str, Limit]:
    """Return the limits that the pool wants by device uuid: as allocated where it has not said otherwise."""
    asked = wanted.limits.devices if wanted is not None else {}
    return {uuid: asked.get(uuid, limit) for uuid, limit in _by_device((one.uuid, one.consumed) for one in held).items()}


def is_settled(held: Iterable[Share], wanted: Wanted | None) -> bool:
    """Return whether the limits in force are those that the pool wants."""
    held = list(held)
    return in_force(held) == wanted_of(held, wanted)


def is_refused(held: Iterable[Share], wanted: Wanted | None) -> bool:
    """Return whether the agent has looked at the wanted limits and brought others in force."""
    held = list(held)
    goal, now = wanted_of(held, wanted), in_force(held)
    grows = any(goal[uuid].larger(now[uuid]) != now[uuid] for uuid in goal)  # a slice that keeps what it holds may be refused more
    return wanted is not None and goal != now and any(one.answered == wanted.seal and (grows or not one.keeps) for one in held)


def counted(held: Iterable[Share], booked: Wanted | None = None) -> dict[str, Limit]:
    """Return what a claim counts by device: what is in force or, where a growth is being booked, the larger of that and what is wanted.

    The pool's books always count with `booked`, the capacity that the agent publishes only from when it begins with the growth.
    """
    held = list(held)
    asked = wanted_of(held, booked) if booked is not None else {}
    return {uuid: limit.larger(asked[uuid]) if uuid in asked else limit for uuid, limit in in_force(held).items()}


def with_limits(of: Slice, limits: Mapping[str, Limit], wanted: Wanted | None = None) -> Slice:
    """Return a slice with these limits on its devices, and the mode that the pool wants of it."""
    parts = [part.model_copy(update=limits[part.uuid].model_dump()) if part.uuid in limits else part for part in of.devices]
    return of.model_copy(update={"devices": parts, "mode": wanted.limits.mode if wanted is not None else of.mode})


# -- what may be allocated


@dataclass(frozen=True)
class Capacity:
    """What is published of a device: kube-scheduler allocates until the sum of what is consumed reaches it."""

    memory_bytes: int
    compute_milli: int


def published(usable_bytes: int, held: Iterable[tuple[Limit, Limit]]) -> Capacity:
    """Return the capacity to publish of a device: what it has, plus what its claims hold less than allocated, minus what they hold more.

    Parameters
    ----------
    usable_bytes : int
        `Device.usable_bytes`.
    held : iterable of (consumed, counted)
        Of each allocated claim on the device: what kube-scheduler counts, and what it really takes (`counted`).
    """
    memory, milli = usable_bytes, WHOLE_MILLI
    for consumed, counts in held:
        memory += consumed.memory_bytes - counts.memory_bytes
        milli += consumed.compute_milli - counts.compute_milli
    return Capacity(max(0, memory), max(0, milli))


def fits(usable_bytes: int, counts: Iterable[Limit]) -> bool:
    """Return whether a device has room for these limits, that of every claim on it."""
    memory, milli = usable_bytes, WHOLE_MILLI
    for one in counts:
        memory -= one.memory_bytes
        milli -= one.compute_milli
    return memory >= 0 and milli >= 0


def _by_device(limits: Iterable[tuple[str, Limit]]) -> dict[str, Limit]:
    found: dict[str, Limit] = {}
    for uuid, limit in limits:
        known = found.get(uuid)
        if known is not None:
            limit = Limit(
                memory_bytes=known.memory_bytes + limit.memory_bytes,
                compute_milli=min(WHOLE_MILLI, known.compute_milli + limit.compute_milli),
            )
        found[uuid] = limit
    return found
