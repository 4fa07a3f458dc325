"""Claims and ResourceSlices, as whole objects."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgpu.claims import (
    DRIVER,
    BadObject,
    as_body,
    claim_for,
    claim_name,
    concerns,
    device_name,
    devices_of,
    parse_quantity,
    read_claim,
    resource_slice,
)
from nbgpu.errors import InvalidValue
from nbgpu.models import Device, Owner, Slice, SliceDevice

GIB = 1024**3
KEY = b"k" * 32
DEVICE = Device(uuid="GPU-51c0ffee-1", index=0, model="H100", node="node-1", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)
PART = SliceDevice(uuid=DEVICE.uuid, index=0, model="H100", memory_bytes=20 * GIB, compute_milli=250)
SLICE = Slice(
    slice_id="a" * 32, owner=Owner(hub="hub", user="ada"), node="node-1", mode="burst", devices=[PART], groups=["g"], namespace="jhub"
)
DEVICES = {("node-1", device_name(DEVICE.uuid)): DEVICE}
UID = "0f7fc9a5-2a3b-4c5d-8e9f-001122334455"


def allocated(claim: dict[str, Any], memory: str = "20Gi", compute: str = "250", device: str = device_name(DEVICE.uuid)) -> dict[str, Any]:
    """Return `claim` as the API server shows it once it is allocated to a pod."""
    claim = copy.deepcopy(claim)
    claim["metadata"] |= {"uid": UID, "creationTimestamp": "2026-01-01T00:00:00Z"}
    result = {"request": "gpu-0", "driver": DRIVER, "pool": "node-1", "device": device, "shareID": "s"}
    claim["status"] = {
        "allocation": {"devices": {"results": [{**result, "consumedCapacity": {"memory": memory, "compute": compute}}]}},
        "reservedFor": [{"resource": "pods", "name": "jupyter-ada", "uid": "pod-uid"}],
    }
    return claim


def test_the_pools_claim() -> None:
    claim = claim_for(SLICE, KEY)
    seal = claim["spec"]["devices"]["config"][0]["opaque"]["parameters"].pop("seal")
    assert len(seal) == 64
    assert claim == {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {
            "name": "nbgpu-" + "a" * 32,
            "namespace": "jhub",
            "labels": {"app.kubernetes.io/managed-by": "nbgpu", "nbgpu.io/slice": "a" * 32, "nbgpu.io/hub": "hub"},
            "annotations": {"nbgpu.io/owner": '{"hub": "hub", "server": "", "user": "ada"}'},
        },
        "spec": {
            "devices": {
                "requests": [
                    {
                        "name": "gpu-0",
                        "exactly": {
                            "deviceClassName": "gpu.nbgpu.io",
                            "allocationMode": "ExactCount",
                            "count": 1,
                            "selectors": [{"cel": {"expression": 'device.attributes["gpu.nbgpu.io"].uuid == "GPU-51c0ffee-1"'}}],
                            "capacity": {"requests": {"memory": str(20 * GIB), "compute": "250"}},
                        },
                    }
                ],
                "config": [
                    {
                        "opaque": {
                            "driver": "gpu.nbgpu.io",
                            "parameters": {
                                "apiVersion": "gpu.nbgpu.io/v1",
                                "kind": "Slice",
                                "mode": "burst",
                                "slice": SLICE.model_dump(mode="json"),
                            },
                        }
                    }
                ],
            }
        },
    }


def test_a_claim_needs_a_namespace() -> None:
    with pytest.raises(InvalidValue, match="namespace"):
        claim_for(SLICE.model_copy(update={"namespace": None}), KEY)


def test_a_nodes_devices_come_back() -> None:
    tired = DEVICE.model_copy(update={"healthy": False})
    found = resource_slice("node-1", [tired], {DEVICE.uuid: (70 * GIB, 900)}, 7)
    assert found["spec"]["devices"][0]["capacity"]["memory"]["value"] == str(70 * GIB)
    assert found["spec"]["devices"][0]["capacity"]["compute"]["value"] == "900"
    assert found["spec"]["pool"] == {"name": "node-1", "generation": 7, "resourceSliceCount": 1}
    assert devices_of(found) == [tired]


@pytest.mark.parametrize("broken", [{}, {"spec": 3}, {"spec": {"nodeName": "n", "devices": [{"name": "x"}]}}, {"spec": {"devices": [7]}}])
def test_a_malformed_resource_slice_is_named(broken: dict[str, Any]) -> None:
    with pytest.raises(BadObject, match="ResourceSlice odd"):
        devices_of({"metadata": {"name": "odd"}, **broken})


def test_an_allocated_claim_tells_what_it_holds() -> None:
    claim = read_claim(allocated(claim_for(SLICE, KEY)), DEVICES, KEY)
    assert claim is not None
    assert (claim.slice, claim.sealed, claim.allocated, claim.pods) == (SLICE, True, True, ("pod-uid",))
    assert claim.name == claim_name(SLICE.slice_id)


def test_what_kubernetes_allocated_counts_not_what_the_parameters_say() -> None:
    claim = read_claim(allocated(claim_for(SLICE, KEY), memory="10Gi", compute="100"), DEVICES, KEY)
    assert claim is not None
    assert (claim.slice.devices[0].memory_bytes, claim.slice.devices[0].compute_milli) == (10 * GIB, 100)


@pytest.mark.parametrize("change", ["key", "owner", "namespace", "name"])
def test_a_forged_claim_is_somebodys_own(change: str) -> None:
    claim = allocated(claim_for(SLICE, b"f" * 32 if change == "key" else KEY))
    if change == "owner":
        claim["spec"]["devices"]["config"][0]["opaque"]["parameters"]["slice"]["owner"]["user"] = "grace"
    elif change != "key":
        claim["metadata"][change] = "other"
    found = read_claim(claim, DEVICES, KEY)
    assert found is not None
    assert not found.sealed
    assert found.slice.owner == Owner(hub="kubernetes", user=claim["metadata"]["namespace"], server=claim["metadata"]["name"])
    assert found.slice.slice_id == f"claim-{UID}"


def test_somebodys_own_claim_holds_what_it_consumes() -> None:
    own = {
        "metadata": {"name": "mine", "namespace": "lab"},
        "spec": {
            "devices": {
                "requests": [{"name": "gpu", "exactly": {"deviceClassName": DRIVER, "capacity": {"requests": {"compute": "500"}}}}],
                "config": [{"opaque": {"driver": DRIVER, "parameters": {"kind": "Slice", "mode": "strict"}}}],
            }
        },
    }
    assert concerns(own)
    assert read_claim(own, DEVICES, KEY) is None
    found = read_claim(allocated(own, memory="78Gi", compute="500"), DEVICES, KEY)
    assert found is not None
    assert (found.slice.mode, found.slice.devices[0].memory_bytes, found.slice.devices[0].compute_milli) == ("strict", 78 * GIB, 500)


@pytest.mark.parametrize(
    "words", [{"slice": None, "seal": "x"}, {"slice": {"slice_id": "../x"}, "seal": "x"}, {"slice": {}, "seal": "\ud800"}]
)
def test_words_that_make_no_sense_are_somebodys_own_too(words: dict[str, Any]) -> None:
    """Were such a claim unreadable, nobody else would be given a part of the GPU that it has a thousandth of."""
    claim = allocated(claim_for(SLICE, KEY))
    parameters = claim["spec"]["devices"]["config"][0]["opaque"]["parameters"]
    parameters |= words
    if isinstance(words["slice"], dict) and not words["slice"]:
        parameters["slice"] = SLICE.model_dump(mode="json")
    found = read_claim(claim, DEVICES, KEY)
    assert found is not None
    assert (found.sealed, found.slice.owner.hub) == (False, "kubernetes")
    assert found.slice.devices[0].memory_bytes == SLICE.devices[0].memory_bytes


def test_a_claim_on_an_unknown_device_is_an_error() -> None:
    with pytest.raises(BadObject, match="which no agent publishes"):
        read_claim(allocated(claim_for(SLICE, KEY), device="gpu-gone"), DEVICES, KEY)


@pytest.mark.parametrize(
    ("text", "value"),
    [("20Gi", 20 * GIB), ("250", 250), (7, 7), ("1500m", 2), ("1e3", 1000), ("2k", 2000), ("0.5Ki", 512), ("80E", None)],
)
def test_quantities(text: object, value: int | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="too large"):
            parse_quantity(text)
    else:
        assert parse_quantity(text) == value


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["driver", "devices", "results", "x"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.sampled_from(["metadata", "spec", "status"]), max_size=2), junk, st.integers(0, 200))
def test_whatever_a_claim_holds_it_is_read_or_named(places: list[str], value: Any, cut: int) -> None:
    claim = allocated(claim_for(SLICE, KEY))
    text = json.dumps(claim)
    for place in places:
        claim[place] = value
    for odd in (claim, json.loads(text.replace('"gpu.nbgpu.io"', json.dumps(value), max(1, cut % 4)))):
        concerns(odd)
        with contextlib.suppress(BadObject):
            read_claim(odd, DEVICES, KEY)


def test_a_body_is_what_the_api_server_itself_would_write() -> None:
    thing = {"b": "Ada <&> \u00e4\u2028\u2029", "a": [1, None]}
    assert as_body(thing) == '{"a":[1,null],"b":"Ada \\u003c\\u0026\\u003e \u00e4\\u2028\\u2029"}'.encode()
    assert json.loads(as_body(thing)) == thing
