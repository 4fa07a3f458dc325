"""Limits of a running slice: what the pool wants, what the agent has in force, what may be allocated meanwhile."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgpu.claim_limits import (
    LIMITS_ANNOTATION,
    Limit,
    Limits,
    Wanted,
    counted,
    fits,
    in_force,
    is_refused,
    is_settled,
    latest_number,
    limits_annotation,
    published,
    read_limits,
    report,
    shares,
    wanted_of,
    with_limits,
)
from nbgpu.claims import BadObject, claim_for, device_name, resource_slice
from nbgpu.models import Device, Owner, Slice, SliceDevice
from nbgpu_pool.kube_view import NodeInfo, View, keep_claim, keep_published

GIB = 1024**3
KEY = b"k" * 32
UID = "0f7fc9a5-2a3b-4c5d-8e9f-001122334455"
DEVICE = Device(uuid="GPU-51c0ffee-1", index=0, model="H100", node="node-1", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)
PART = SliceDevice(uuid=DEVICE.uuid, index=0, model="H100", memory_bytes=20 * GIB, compute_milli=250)
SLICE = Slice(slice_id="a" * 32, owner=Owner(hub="hub", user="ada"), node="node-1", mode="burst", devices=[PART], namespace="jhub")
DEVICES = {("node-1", device_name(DEVICE.uuid)): DEVICE}
AS_ALLOCATED = Limit(memory_bytes=20 * GIB, compute_milli=250)
LARGER = Limit(memory_bytes=30 * GIB, compute_milli=200)


def a_claim(*, wants: Limit | None = None, reports: Limit | None = None, answered: str = "") -> dict[str, Any]:
    """Return an allocated claim of the pool."""
    claim = claim_for(SLICE, KEY)
    claim["metadata"] |= {"uid": UID, "creationTimestamp": "2026-01-01T00:00:00Z"}
    result = {"request": "gpu-0", "driver": "gpu.nbgpu.io", "pool": "node-1", "device": device_name(DEVICE.uuid), "shareID": "share"}
    claim["status"] = {"allocation": {"devices": {"results": [{**result, "consumedCapacity": {"memory": "20Gi", "compute": "250"}}]}}}
    if wants is not None:
        written = limits_annotation(UID, "jhub", claim["metadata"]["name"], Limits(devices={DEVICE.uuid: wants}, mode="strict"), KEY)
        claim["metadata"]["annotations"][LIMITS_ANNOTATION] = written
    if reports is not None:
        claim["status"]["devices"] = [report(shares(claim, DEVICES)[0], reports, answered)]
    return claim


def wanted(claim: dict[str, Any]) -> Wanted:
    found = read_limits(claim, KEY)
    assert found is not None
    return found


def test_the_annotation_and_the_report_as_they_are_written() -> None:
    claim = a_claim(wants=LARGER, reports=AS_ALLOCATED, answered="f" * 64)
    assert json.loads(claim["metadata"]["annotations"][LIMITS_ANNOTATION]) == {
        "devices": {DEVICE.uuid: {"memory_bytes": 30 * GIB, "compute_milli": 200}},
        "mode": "strict",
        "number": 0,
        "seal": wanted(claim).seal,
    }
    assert claim["status"]["devices"] == [
        {
            "driver": "gpu.nbgpu.io",
            "pool": "node-1",
            "device": "gpu-51c0ffee-1",
            "shareID": "share",
            "data": {"memory_bytes": 20 * GIB, "compute_milli": 250, "answered": "f" * 64},
        }
    ]


def test_what_counts_while_a_growth_is_booked() -> None:
    claim = a_claim(wants=LARGER)
    held = shares(claim, DEVICES)
    assert in_force(held) == {DEVICE.uuid: AS_ALLOCATED}
    assert wanted_of(held, wanted(claim)) == {DEVICE.uuid: LARGER}
    assert not is_settled(held, wanted(claim))
    assert counted(held) == {DEVICE.uuid: AS_ALLOCATED}
    assert counted(held, wanted(claim)) == {DEVICE.uuid: Limit(memory_bytes=30 * GIB, compute_milli=250)}


def test_without_an_annotation_and_a_report_a_slice_is_as_allocated() -> None:
    claim = a_claim()
    assert read_limits(claim, KEY) is None
    held = shares(claim, DEVICES)
    assert is_settled(held, None)
    assert wanted_of(held, None) == in_force(held) == counted(held) == {DEVICE.uuid: AS_ALLOCATED}


def test_in_force_and_refused() -> None:
    claim = a_claim(wants=LARGER)
    seal = wanted(claim).seal
    done = shares(a_claim(wants=LARGER, reports=LARGER, answered=seal), DEVICES)
    assert is_settled(done, wanted(claim))
    assert not is_refused(done, wanted(claim))
    refused = shares(a_claim(wants=LARGER, reports=AS_ALLOCATED, answered=seal), DEVICES)
    assert is_refused(refused, wanted(claim))
    still = shares(a_claim(wants=LARGER, reports=AS_ALLOCATED, answered="e" * 64), DEVICES)
    assert not is_refused(still, wanted(claim))


def test_memory_that_is_still_held_counts_and_is_no_refusal() -> None:
    """The limit was lowered below use: it is in force, and what is held counts until it is free; nothing more is published for it."""
    smaller = Limit(memory_bytes=5 * GIB, compute_milli=250)
    claim = a_claim(wants=smaller)
    told = report(shares(claim, DEVICES)[0], Limit(memory_bytes=17 * GIB, compute_milli=250), wanted(claim).seal, 0, keeps=True)
    claim["status"]["devices"] = [told]
    held = shares(claim, DEVICES)
    assert not is_refused(held, wanted(claim))
    assert not is_settled(held, wanted(claim))
    assert counted(held)[DEVICE.uuid].memory_bytes == counted(held, wanted(claim))[DEVICE.uuid].memory_bytes == 17 * GIB
    found = published(78 * GIB, [(held[0].consumed, counted(held)[DEVICE.uuid])])
    assert found.memory_bytes == (78 + 20 - 17) * GIB
    view = View(KEY, lambda: 0.0)
    view.node_changed("node-1", NodeInfo(True))
    view.published_changed("node-1", keep_published(resource_slice("node-1", [DEVICE], {}, 1)))
    info = keep_claim(view)(claim)
    assert info.keeps
    assert not info.refused
    assert info.slice is not None
    assert info.slice.devices[0].memory_bytes == 17 * GIB
    assert info.wanted is not None
    assert info.wanted.devices[0].memory_bytes == 5 * GIB


@pytest.mark.parametrize(
    ("memory_gib", "milli", "refused"), [(5, 250, False), (17, 200, False), (18, 250, True), (5, 251, True), (30, 500, True)]
)
def test_what_is_still_held_hides_no_growth_that_was_refused(memory_gib: int, milli: int, refused: bool) -> None:
    claim = a_claim(wants=Limit(memory_bytes=memory_gib * GIB, compute_milli=milli))
    seal = wanted(claim).seal
    in_force_now = Limit(memory_bytes=17 * GIB, compute_milli=250)
    for answered, expected in ((seal, refused), ("e" * 64, False)):
        claim["status"]["devices"] = [report(shares(claim, DEVICES)[0], in_force_now, answered, 0, keeps=True)]
        assert is_refused(shares(claim, DEVICES), wanted(claim)) is expected


def test_what_was_refused_can_be_wanted_again() -> None:
    first, again = (Limits(devices={DEVICE.uuid: LARGER}, mode="burst", number=number) for number in (1, 2))
    claim = a_claim()
    claim["metadata"]["annotations"][LIMITS_ANNOTATION] = limits_annotation(UID, "jhub", claim["metadata"]["name"], first, KEY)
    claim["status"]["devices"] = [report(shares(claim, DEVICES)[0], AS_ALLOCATED, wanted(claim).seal)]
    assert is_refused(shares(claim, DEVICES), wanted(claim))
    claim["metadata"]["annotations"][LIMITS_ANNOTATION] = limits_annotation(UID, "jhub", claim["metadata"]["name"], again, KEY)
    assert not is_refused(shares(claim, DEVICES), wanted(claim))


@pytest.mark.parametrize(("number", "good"), [(None, False), (1, False), (2, True), (3, True)])
def test_what_the_pool_wanted_once_is_not_wanted_for_ever(number: int | None, good: bool) -> None:
    """Who may write annotations could keep the larger limits that a slice had, and put them back, or take away what lowered them."""
    claim = a_claim()
    claim["status"]["devices"] = [report(shares(claim, DEVICES)[0], AS_ALLOCATED, "f" * 64, 2)]
    if number is not None:
        again = Limits(devices={DEVICE.uuid: LARGER}, mode="burst", number=number)
        claim["metadata"]["annotations"][LIMITS_ANNOTATION] = limits_annotation(UID, "jhub", claim["metadata"]["name"], again, KEY)
    assert latest_number(claim) == 2
    if good:
        assert wanted(claim).limits.number == number
    else:
        with pytest.raises(BadObject, match="its limits stay as they are"):
            read_limits(claim, KEY)


def test_a_slice_with_the_limits_in_force() -> None:
    claim = a_claim(wants=LARGER, reports=LARGER)
    found = with_limits(SLICE, in_force(shares(claim, DEVICES)), wanted(claim))
    assert (found.devices[0].memory_bytes, found.devices[0].compute_milli, found.mode) == (30 * GIB, 200, "strict")
    assert found.devices[0].index == 0


def test_beside_a_lost_gpu_the_others_count() -> None:
    claim = a_claim(reports=LARGER)
    lost = {**claim["status"]["allocation"]["devices"]["results"][0], "device": "gpu-lost"}
    claim["status"]["allocation"]["devices"]["results"].append(lost)
    with pytest.raises(BadObject, match="gpu-lost"):
        shares(claim, DEVICES)
    assert in_force(shares(claim, DEVICES, known_only=True)) == {DEVICE.uuid: LARGER}


@pytest.mark.parametrize("change", ["uid", "namespace", "name", "key", "limits", "mode"])
def test_an_annotation_of_another_claim_or_edited_counts_for_nothing(change: str) -> None:
    claim = a_claim(wants=LARGER)
    key = KEY
    annotations = claim["metadata"]["annotations"]
    if change == "key":
        key = b"f" * 32
    elif change in ("limits", "mode"):
        written = json.loads(annotations[LIMITS_ANNOTATION])
        if change == "mode":
            written["mode"] = "burst"
        else:
            written["devices"][DEVICE.uuid]["memory_bytes"] *= 2
        annotations[LIMITS_ANNOTATION] = json.dumps(written)
    else:
        claim["metadata"][change] = "other"
    with pytest.raises(BadObject, match="was not written by the pool for this claim"):
        read_limits(claim, key)
    assert read_limits(a_claim(wants=LARGER), KEY) is not None


@pytest.mark.parametrize("junk", ["", "7", "{}", '{"devices": {}, "mode": "burst", "seal": "' + "0" * 64 + '"}', "x" * 20000])
def test_a_junk_annotation_is_named(junk: str) -> None:
    claim = a_claim()
    claim["metadata"]["annotations"][LIMITS_ANNOTATION] = junk
    with pytest.raises(BadObject, match=f"of ResourceClaim jhub/nbgpu-{'a' * 32} cannot be read"):
        read_limits(claim, KEY)


@pytest.mark.parametrize(
    "data", [None, {}, 7, {"memory_bytes": -1, "compute_milli": 100}, {"memory_bytes": GIB}, {"memory_bytes": GIB, "compute_milli": 0}]
)
def test_a_junk_report_is_as_good_as_none(data: Any) -> None:
    claim = a_claim(reports=LARGER)
    claim["status"]["devices"][0]["data"] = data
    assert in_force(shares(claim, DEVICES)) == {DEVICE.uuid: AS_ALLOCATED}


@pytest.mark.parametrize("field", ["driver", "pool", "device", "shareID"])
def test_a_report_about_something_else_is_not_about_this(field: str) -> None:
    claim = a_claim(reports=LARGER)
    claim["status"]["devices"][0][field] = "other"
    assert in_force(shares(claim, DEVICES)) == {DEVICE.uuid: AS_ALLOCATED}


def test_what_is_published() -> None:
    tenth = Limit(memory_bytes=8 * GIB, compute_milli=100)
    assert published(78 * GIB, []).memory_bytes == 78 * GIB
    shrunk = published(78 * GIB, [(AS_ALLOCATED, tenth)])
    assert (shrunk.memory_bytes, shrunk.compute_milli) == (90 * GIB, 1150)
    grown = published(78 * GIB, [(tenth, AS_ALLOCATED)])
    assert (grown.memory_bytes, grown.compute_milli) == (66 * GIB, 850)
    assert fits(78 * GIB, [AS_ALLOCATED] * 3)
    assert not fits(78 * GIB, [AS_ALLOCATED] * 4)


limits = st.builds(Limit, memory_bytes=st.integers(1, 40).map(lambda n: n * GIB), compute_milli=st.integers(1, 500))


@given(st.lists(st.tuples(limits, limits), max_size=6), limits)
def test_who_is_allocated_within_what_is_published_fits_with_what_counts(held: list[tuple[Limit, Limit]], comer: Limit) -> None:
    capacity = published(78 * GIB, held)
    consumed = [one for one, _ in held]
    allocated = (
        sum(one.memory_bytes for one in consumed) + comer.memory_bytes <= capacity.memory_bytes
        and sum(one.compute_milli for one in consumed) + comer.compute_milli <= capacity.compute_milli
    )
    assert not allocated or fits(78 * GIB, [*(counts for _, counts in held), comer])


@given(st.integers(0, 3000 * 1024**2), st.integers(0, 3000))
def test_whatever_is_published_the_api_server_takes_it(memory: int, milli: int) -> None:
    device = DEVICE.model_copy(update={"memory_bytes": 1000 * 1024**2 + 77, "reserve_bytes": 0})
    made = resource_slice("node-1", [device], {device.uuid: (memory, milli)}, 1)["spec"]["devices"][0]["capacity"]
    for name, unit in (("memory", 1024**2), ("compute", 1)):
        value, policy = int(made[name]["value"]), made[name]["requestPolicy"]
        low, high, default = int(policy["validRange"]["min"]), int(policy["validRange"]["max"]), int(policy["default"])
        assert low == unit <= default == high <= value  # kubernetes: pkg/apis/resource/validation, validateRequestPolicyRange
        assert high <= 1000 * unit
        if "step" in policy["validRange"]:
            assert low + unit <= value
            assert (high - low) % unit == 0


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["driver", "devices", "data", "x"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["metadata", "annotations", "status", "allocation", "devices", "limits"]), junk)
def test_whatever_a_claim_holds_it_is_read_or_named(place: str, value: Any) -> None:
    claim = copy.deepcopy(a_claim(wants=LARGER, reports=LARGER))
    where = {"annotations": claim["metadata"], "allocation": claim["status"], "devices": claim["status"]}.get(place, claim)
    if place == "limits":
        claim["metadata"]["annotations"][LIMITS_ANNOTATION] = value
    else:
        where[place] = value
    for read in (lambda: read_limits(claim, KEY), lambda: shares(claim, DEVICES)):
        with contextlib.suppress(BadObject):
            read()
