"""Claims that people write themselves: a share that is a fraction is not taken for a thousandth of a GPU without a word."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx")

from nbgpu.claims import DRIVER, device_name, resource_slice
from nbgpu.models import Device
from nbgpu.own_claims import share_problem
from nbgpu.quantities import GIB
from nbgpu_pool.kube_view import View, keep_claim, keep_published

DEVICE = Device(uuid="GPU-1", index=0, model="H100", node="n", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)
UNITS = 'compute is in thousandths, "250" is a quarter and "1000" the whole GPU.'


def claim(compute: object, device_class: str = DRIVER, *, by_list: bool = False, taken: str = "1") -> dict[str, Any]:
    asked: dict[str, Any] = {"deviceClassName": device_class, "capacity": {"requests": {"memory": "20Gi", "compute": compute}}}
    request = {"name": "gpu", "firstAvailable": [{"name": "a", **asked}]} if by_list else {"name": "gpu", "exactly": asked}
    consumed = {"memory": "20Gi", "compute": taken}
    result = {"request": "gpu", "driver": DRIVER, "pool": "n", "device": device_name("GPU-1"), "shareID": "s", "consumedCapacity": consumed}
    return {
        "metadata": {
            "name": "own",
            "namespace": "ns",
            "uid": "0f7fc9a5-2a3b-4c5d",
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"devices": {"requests": [request]}},
        "status": {"allocation": {"devices": {"results": [result]}}},
    }


@pytest.mark.parametrize("by_list", [False, True])
@pytest.mark.parametrize(
    ("compute", "words"),
    [
        ("0.25", 'compute 0.25, which Kubernetes takes for a thousandth of a GPU\'s time: {} For a quarter write "250".'),
        ("250m", 'compute 0.25, which Kubernetes takes for a thousandth of a GPU\'s time: {} For a quarter write "250".'),
        ("1", 'compute 1, which Kubernetes takes for a thousandth of a GPU\'s time: {} For the whole GPU write "1000".'),
        (1, 'compute 1, which Kubernetes takes for a thousandth of a GPU\'s time: {} For the whole GPU write "1000".'),
        ("0.0001", "compute 0.0001, which Kubernetes takes for a thousandth of a GPU's time: {}"),
        ("250.5", "compute 250.5, which Kubernetes takes for 251 thousandths of a GPU's time: {}"),
        ("0", "compute 0, which Kubernetes takes for a thousandth of a GPU's time: {}"),
    ],
)
def test_a_fraction_is_refused_in_words(compute: object, words: str, by_list: bool) -> None:
    assert share_problem(claim(compute, by_list=by_list)) == f"it asks for {words.format(UNITS)}"


@pytest.mark.parametrize("compute", ["250", 250, "1000", "2", "1k", "250000m", None, "junk", [], "1e400"])
def test_thousandths_are_thousandths(compute: object) -> None:
    assert share_problem(claim(compute)) is None


@pytest.mark.parametrize("junk", [{}, {"spec": 3}, {"spec": {"devices": {"requests": [7, {"exactly": []}, {"firstAvailable": [None]}]}}}])
def test_junk_says_nothing(junk: dict[str, Any]) -> None:
    assert share_problem(junk) is None
    assert share_problem(claim("0.25", "gpu.example.com")) is None


@pytest.mark.parametrize(("compute", "taken", "told"), [("250m", "1", True), ("250", "250", False)])
@pytest.mark.parametrize("allocated", [True, False])
def test_the_pool_tells_of_it_and_counts_what_it_holds(compute: str, taken: str, told: bool, allocated: bool) -> None:
    view = View(b"k" * 16, lambda: 1e9)
    view.published_changed("n", keep_published(resource_slice("n", [DEVICE], {}, 1)))
    thing = claim(compute, taken=taken)
    if not allocated:
        thing["status"] = {}
    view.claim_changed(("ns", "own"), keep_claim(view)(thing))
    said = [(kind, words) for kind, _, words in view.problems()]
    assert [kind for kind, _ in said] == (["ResourceClaim"] if told else [])
    assert not told or UNITS in said[0][1]
    held = [part.compute_milli for seen in view.seen.values() for part in seen.slice.devices]
    assert held == ([int(taken)] if allocated else [])
