"""Claims in all shapes on a real node that also serves claims of others: limits that change while a pod runs, junk, metrics by TCP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cuda_programs import HOLD, LOOK
from lost_gpu import set_lost
from node_kit import KEY, Node, Place, until
from ports import free_port

from nbgpu.claim_limits import LIMITS_ANNOTATION, Limit, Limits, limits_annotation

pytestmark = [pytest.mark.kubernetes, pytest.mark.root]
GIB = 1024**3
MIB = 1024**2
WHOLE = 79872 * MIB
QUARTER = WHOLE // 4
AGENT_RSS_MB = 120


PORT = free_port()
AGENT_ARGUMENTS = ["--foreign-claims", f"--metrics-listen=127.0.0.1:{PORT}"]


def total(place: Place, pod: str) -> int:
    return json.loads(place.python(pod, LOOK).strip().splitlines()[-1])["total"]


def want(place: Place, claim: str, memory: int, milli: int, device: int = 0, key: bytes = KEY, uid: str = "", annotation: str = "") -> None:
    """Write the limits that the pool wants of a claim."""
    found = place.get_claim(claim)
    assert found is not None
    uuid = place.node.uuids[device]
    limits = Limits(devices={uuid: Limit(memory_bytes=memory, compute_milli=milli)}, mode="burst")
    value = annotation or limits_annotation(uid or found["metadata"]["uid"], place.namespace, claim, limits, key)
    body = {"metadata": {"annotations": {LIMITS_ANNOTATION: value}}}
    place.api.done("PATCH", place._path("resourceclaims", claim), body, "application/merge-patch+json")


def in_force(place: Place, claim: str) -> tuple[int, int]:
    [one] = place.node.slices()[place.slice_id(claim)]["slice"]["devices"]
    return one["memory_bytes"], one["compute_milli"]


def reported(place: Place, claim: str) -> Any:
    return ((place.get_claim(claim) or {}).get("status", {}).get("devices") or [{}])[0].get("data")


def published(node: Node, device: int = 0) -> tuple[int, int]:
    from nbgpu.claims import parse_quantity

    found = node.resource_slice()
    assert found is not None
    [one] = [part for part in found["spec"]["devices"] if part["attributes"]["index"]["int"] == device]
    return parse_quantity(one["capacity"]["memory"]["value"]), parse_quantity(one["capacity"]["compute"]["value"])


def test_a_slice_shrinks_and_another_pod_gets_what_it_gave(node: Node, place: Place) -> None:
    first = place.claim(1000)
    pod = place.pod(first)
    place.wait_running(pod)
    late = place.pod(place.claim(500))
    want(place, first, WHOLE // 2, 500)
    until("the limit", lambda: in_force(place, first) == (WHOLE // 2, 500), 10)
    assert total(place, pod) == WHOLE // 2
    until("the report", lambda: (reported(place, first) or {}).get("memory_bytes") == WHOLE // 2, 10)
    place.wait_running(late)  # the room is published and given
    assert published(node) == (WHOLE + WHOLE // 2, 1500)
    # no way back while another has it: refused, said, and what is published is as before
    want(place, first, WHOLE, 1000)
    until("the refusal", lambda: [one for one in place.events(first) if "no room to raise" in one], 10)
    assert in_force(place, first) == (WHOLE // 2, 500)
    until("the capacity", lambda: published(node) == (WHOLE + WHOLE // 2, 1500), 10)
    assert reported(place, first)["memory_bytes"] == WHOLE // 2
    # once there is room, it grows
    place.delete(late)
    until("the end of the other slice", lambda: len(node.slices()) == 1, 20)
    for claim in place.api.done("GET", place._path("resourceclaims"))["items"]:
        if claim["metadata"]["name"] != first:
            place.delete_claim(claim["metadata"]["name"])
    until("the other claim's end", lambda: len(place.api.done("GET", place._path("resourceclaims"))["items"]) == 1, 20)
    want(place, first, WHOLE * 3 // 4 // MIB * MIB, 750)
    until("the limit", lambda: in_force(place, first) == (WHOLE * 3 // 4 // MIB * MIB, 750), 10)
    until("the capacity", lambda: published(node) == (WHOLE + WHOLE // 4, 1250), 10)
    assert total(place, pod) == WHOLE * 3 // 4 // MIB * MIB


@pytest.mark.parametrize("point", ["resize-lowered", "resize-told", "resize-booked", "resize-raised"])
def test_an_agent_killed_while_limits_change(node: Node, place: Place, point: str) -> None:
    grows = point in ("resize-booked", "resize-raised")
    claim = place.claim(500)
    pod = place.pod(claim)
    place.wait_running(pod)
    node.stop()
    node.launch(env={"NBGPU_MARK": f"{point}:1"})
    node.wait_ready()
    if grows:
        want(place, claim, WHOLE, 1000)
    else:
        want(place, claim, QUARTER, 250)
    assert node.process is not None
    assert node.process.wait(30) == -9
    limit = (WHOLE, 1000) if grows else (QUARTER, 250)
    node.launch()
    node.wait_ready()
    until("the limit", lambda: in_force(place, claim) == limit, 10)
    until("the capacity", lambda: published(node) == (WHOLE + WHOLE // 2 - limit[0], 1500 - limit[1]), 10)
    until("the report", lambda: (reported(place, claim) or {}).get("memory_bytes") == limit[0], 10)
    assert total(place, pod) == limit[0]


def test_limits_that_the_pool_did_not_write_count_for_nothing(node: Node, place: Place) -> None:
    claim = place.claim(250)
    pod = place.pod(claim)
    place.wait_running(pod)
    other = place.claim(250)
    for junk in (
        {"key": b"a-key-that-somebody-else-has-made"},
        {"uid": place.claim_uid(other)},  # a copy of what was written for another claim
        {"annotation": "{ not json"},
        {
            "annotation": json.dumps(
                {"devices": {"GPU-x": {"memory_bytes": 1 << 60, "compute_milli": 1000}}, "mode": "burst", "seal": "0" * 64}
            )
        },
    ):
        want(place, claim, WHOLE, 1000, **junk)  # type: ignore[arg-type]
        assert in_force(place, claim) == (QUARTER, 250)
    until("an event", lambda: [one for one in place.events(claim) if "cannot be read" in one], 10)
    assert [one for one in place.events(claim) if "was not written by the pool for this claim" in one]
    assert in_force(place, claim) == (QUARTER, 250)
    assert total(place, pod) == QUARTER
    # the control: the pool's own word counts
    want(place, claim, WHOLE // 2, 500)
    until("the limit", lambda: in_force(place, claim) == (WHOLE // 2, 500), 10)


def test_a_claim_of_ones_own(node: Node, place: Place) -> None:
    claim = place.foreign_claim("8Gi", "100")
    pod = place.pod(claim, ["python3", "-c", HOLD])
    place.wait_running(pod)
    assert total(place, pod) == 8 * GIB
    [(sid, found)] = node.slices().items()
    assert sid == f"claim-{place.claim_uid(claim)}"
    assert found["slice"]["owner"] == {"hub": "kubernetes", "user": place.namespace, "server": claim}
    # metrics by TCP, of this slice as of any other
    until("memory to be held", lambda: node.slices()[sid]["memory_used_bytes"] > GIB)
    text = httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
    assert f'user="{place.namespace}"' in text
    assert httpx.get(f"http://127.0.0.1:{PORT}/healthz").status_code == 200
    for path in ("/v1/slices", "/v1/node", "/"):
        assert httpx.get(f"http://127.0.0.1:{PORT}{path}").status_code == 404
    assert httpx.post(f"http://127.0.0.1:{PORT}/metrics").status_code == 405


def test_a_template_makes_a_slice_for_each_pod(node: Node, place: Place) -> None:
    uuid = node.devices()[0].uuid
    exactly = {
        "deviceClassName": "gpu.nbgpu.io",
        "selectors": [{"cel": {"expression": f'device.attributes["gpu.nbgpu.io"].uuid == "{uuid}"'}}],
        "capacity": {"requests": {"memory": "4Gi", "compute": "50"}},
    }
    template = {"metadata": {"name": "small"}, "spec": {"spec": {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}}}
    place.api.done("POST", place._path("resourceclaimtemplates"), template)
    pods = [place.pod("x", spec={"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "small"}]}) for _ in range(2)]
    for pod in pods:
        place.wait_running(pod)
        assert total(place, pod) == 4 * GIB
    assert len(node.slices()) == 2


def test_malformed_claims_end_no_agent(node: Node, place: Place) -> None:
    """Parameters that no pool wrote, in every shape that the API server lets through."""
    uuid = node.devices()[0].uuid
    shapes: list[Any] = [
        {"kind": "Slice", "apiVersion": "gpu.nbgpu.io/v1", "slice": None, "seal": "x"},
        {"kind": "Slice", "apiVersion": "gpu.nbgpu.io/v1", "slice": {"slice_id": "../../etc"}, "seal": "0" * 64},
        {"kind": "Slice", "apiVersion": "gpu.nbgpu.io/v1", "mode": {"a": [1]}},
        {"kind": "Other", "apiVersion": "x/v1"},
    ]
    process = node.process
    assert process is not None
    for number, parameters in enumerate(shapes):
        claim = {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceClaim",
            "metadata": {"name": f"junk-{number}"},
            "spec": {
                "devices": {
                    "requests": [
                        {
                            "name": "gpu",
                            "exactly": {
                                "deviceClassName": "gpu.nbgpu.io",
                                "selectors": [{"cel": {"expression": f'device.attributes["gpu.nbgpu.io"].uuid == "{uuid}"'}}],
                                "capacity": {"requests": {"memory": "2Gi", "compute": "10"}},
                            },
                        }
                    ],
                    "config": [{"opaque": {"driver": "gpu.nbgpu.io", "parameters": parameters}}],
                }
            },
        }
        place.api.done("POST", place._path("resourceclaims"), claim)
        place.pod(f"junk-{number}")
    control = place.pod(place.claim(250))
    place.wait_running(control)
    assert total(place, control) == QUARTER
    assert process.poll() is None
    until("the junk to be judged", lambda: node.log().count("junk-") >= 1, 20)
    assert "Traceback" not in node.log()


def test_a_gpu_that_is_lost_takes_no_new_pods(node: Node, place: Place) -> None:
    """It is tainted in the ResourceSlice: who runs there goes on, new pods wait, and come once it is back."""

    def tainted() -> list[bool]:
        found = node.resource_slice()
        assert found is not None
        return [bool(one.get("taints")) for one in found["spec"]["devices"]]

    machine = node.runtime / f"sim-{node.name}" / "state"
    runs = place.pod(place.claim(250, device=1))
    place.wait_running(runs)
    set_lost(machine, 1, True)
    try:
        until("the taint", lambda: tainted() == [False, True])
        waits, other = place.pod(place.claim(250, device=1)), place.pod(place.claim(250, device=0))
        place.wait_running(other)

        def refused() -> bool:
            conditions = (place.get_pod(waits) or {}).get("status", {}).get("conditions", [])
            return any(one["type"] == "PodScheduled" and one.get("reason") == "Unschedulable" for one in conditions)

        until("the scheduler to find no place for it", refused)
        assert place.phase(runs) == "Running"
    finally:
        set_lost(machine, 1, False)
    until("the taint to go", lambda: tainted() == [False, False])
    place.wait_running(waits)


def test_the_agent_is_small(node: Node, place: Place) -> None:
    for _ in range(4):
        place.wait_running(place.pod(place.claim(125)))
    assert node.process is not None
    rss = psutil.Process(node.process.pid).memory_info().rss / 1e6
    print(f"agent_rss_mb {rss:.0f} with 4 slices")
    assert rss <= AGENT_RSS_MB
    assert Path(node.runtime / "claims.json").stat().st_size > 100
