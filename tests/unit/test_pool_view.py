"""What the pool makes of the objects of a cluster."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("httpx")

from nbgpu.claims import claim_for, move_note
from nbgpu.kube import Json
from nbgpu.models import Owner, Slice, SliceDevice
from nbgpu_pool.kube_view import View, keep_claim, keep_pod

KEY = b"k" * 16
ID = "0123456789abcdef"


def claim_of(reserved: list[Json], version: str) -> Json:
    part = SliceDevice(uuid="GPU-1", index=0, model="H100", memory_bytes=2**30, compute_milli=250)
    held = Slice(slice_id=ID, owner=Owner(hub="h", user="ada"), node="n", mode="burst", devices=[part], namespace="ns")
    made = copy.deepcopy(claim_for(held, KEY))
    made["metadata"] |= {"uid": "u", "resourceVersion": version, "creationTimestamp": "2026-01-01T00:00:00Z", "namespace": "ns"}
    made["status"] = {"reservedFor": reserved} if reserved else {}
    return made


def test_a_claim_whose_pod_has_gone_is_bare_whichever_is_told_first() -> None:
    """Nobody would ever delete it else: its pod may have gone before it was made the claim's owner."""
    pod = {
        "metadata": {"name": "p", "namespace": "ns", "uid": "pod", "labels": {"nbgpu.io/slice": ID}},
        "spec": {"resourceClaims": [{"name": "nbgpu", "resourceClaimName": f"nbgpu-{ID}"}]},
        "status": {"phase": "Running"},
    }
    for pod_first in (True, False):
        view = View(KEY, lambda: 1e9)
        keep = keep_claim(view)
        key = ("ns", f"nbgpu-{ID}")
        view.claim_changed(key, keep(claim_of([], "1")))
        assert (view.bare, view.carried) == ({ID}, set()), "one that no pod ever had is its reservation's"
        running = keep_pod(pod)
        view.pod_changed(("ns", "p"), None, running)
        view.claim_changed(key, keep(claim_of([{"resource": "pods", "name": "p", "uid": "pod"}], "2")))
        assert (view.bare, view.carried) == (set(), {ID})
        ends = [lambda: view.pod_changed(("ns", "p"), running, None), lambda: view.claim_changed(key, keep(claim_of([], "3")))]  # noqa: B023
        for end in ends if pod_first else ends[::-1]:
            end()
        assert (view.bare, view.carried) == ({ID}, {ID})
        view.claim_changed(key, None)
        assert (view.bare, view.carried) == (set(), set())


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({}, True),
        ({"key": KEY}, False),
        ({"status": {"reservedFor": [{"resource": "pods", "name": "p", "uid": "pod"}]}}, False),
        ({"status": {"allocation": {"devices": {"results": [{"driver": "another", "pool": "n", "device": "d"}]}}}}, False),
        ({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, False),
        ({"metadata": {"name": "another"}}, False),
        ({"metadata": {"namespace": "another"}}, False),
        ({"parameters": {"seal": None, "slice": {"junk": 1}}}, False),
    ],
)
def test_what_another_key_sealed_and_nobody_uses_is_left_over(change: Json, left: bool) -> None:
    made = claim_of([], "1")
    made["metadata"] |= change.get("metadata", {})
    made["status"] |= change.get("status", {})
    made["spec"]["devices"]["config"][0]["opaque"]["parameters"] |= change.get("parameters", {})
    key = made["metadata"]["namespace"], made["metadata"]["name"]
    view = View(change.get("key", b"another key"), lambda: 1e9)
    view.claim_changed(key, keep_claim(view)(made))
    assert view.left_over == ({key} if left else set())
    view.claim_changed(key, None)
    assert view.left_over == set()


def test_a_claim_that_is_deleted_and_has_no_devices_holds_nothing_however_long_it_stays() -> None:
    """Who may delete it can have it stay for ever: by a finalizer of its own, or deleted in the foreground with a dependent that stays."""
    view = View(KEY, lambda: 1e9)
    keep = keep_claim(view)
    key = ("ns", f"nbgpu-{ID}")
    view.claim_changed(key, keep(claim_of([], "1")))
    assert view.seen[ID].state == "prepared"
    deleted = claim_of([], "2")
    deleted["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["foregroundDeletion"]}
    view.claim_changed(key, keep(deleted))
    assert (view.seen, view.ids, view.bare) == ({}, {}, set())
    held = claim_of([{"resource": "pods", "name": "p", "uid": "pod"}], "3")
    held["metadata"] |= deleted["metadata"] | {"resourceVersion": "3"}
    view.claim_changed(key, keep(held))
    assert view.seen[ID].state == "releasing", "one that a pod is reserved for counts"
    view.claim_changed(key, None)
    assert (view.seen, view.ids) == ({}, {})


def test_a_note_of_a_move_that_is_deleted_counts_nothing_however_long_it_stays() -> None:
    part = SliceDevice(uuid="GPU-1", index=0, model="H100", memory_bytes=2**30, compute_milli=250)
    to = Slice(slice_id=ID, owner=Owner(hub="h", user="ada"), node="n", mode="burst", devices=[part], namespace="ns")
    note = move_note(to, KEY)
    note["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    view = View(KEY, lambda: 1e9)
    keep = keep_claim(view)
    key = ("ns", note["metadata"]["name"])
    view.claim_changed(key, keep(copy.deepcopy(note)))
    assert (list(view.notes), view.seen[ID].state) == ([ID], "prepared")
    note["metadata"] |= {"resourceVersion": "2", "deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["example.org/held"]}
    view.claim_changed(key, keep(note))
    assert (view.notes, view.seen) == ({}, {})
