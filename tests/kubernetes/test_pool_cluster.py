"""The pool on a real cluster: claims are made, carried, freed and found again, whoever dies or meddles.

GPUs and nodes are objects only (`place_kit`); API server, scheduler and controllers are real. After each test the pool's
books say what the cluster's claims hold, and those are the claims of the pods that live.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_kit import Gateway
from place_kit import GIB, RESOURCE, Place, until
from pool_kit import Pool, check, new_id, served

from nbgpu.claims import DRIVER, claim_for, device_name
from nbgpu.kube import path
from nbgpu.models import Owner, Slice, SliceDevice

pytestmark = [pytest.mark.kubernetes]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    place.start()
    yield place
    place.stop()


@pytest.fixture
def pool(place: Place, tmp_path: Path) -> Pool:
    return Pool(place, tmp_path, reservation_ttl_seconds=6).start()


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    """What a test leaves is removed, and must be removable."""
    yield
    Pool.stop_all()
    place.clean()


# -- a life


def test_a_slice_from_request_to_end(place: Place, pool: Pool) -> None:
    request = served(place, pool)
    assert pool.state(request) == "bound"
    claim = place.claim(request)
    assert claim is not None
    assert pool.books()[_device(claim)] == (20 * GIB, 250)
    pod = place.get("v1", "pods", place.namespace, f"pod-{request}")
    assert pod is not None
    until(
        lambda: [one["uid"] for one in (place.claim(request) or claim)["metadata"].get("ownerReferences", [])] == [pod["metadata"]["uid"]],
        why="for the pod to own the claim",
    )
    check(place, pool, [request])
    pool.give_back(request)
    until(lambda: pool.state(request) == "releasing")
    time.sleep(0.5)
    assert pool.books()[_device(claim)] == (20 * GIB, 250), "counted as long as the pod runs"
    place.delete_pod(request)
    until(lambda: pool.state(request) == "gone")
    check(place, pool, [])


def test_the_claim_goes_with_its_pod_though_nobody_gives_it_back(place: Place, pool: Pool) -> None:
    request = served(place, pool)
    until(lambda: (place.claim(request) or {})["metadata"].get("ownerReferences"))
    place.delete_pod(request)
    until(lambda: pool.state(request) == "gone")
    check(place, pool, [])


def test_asking_again_meets_the_claim(place: Place, pool: Pool) -> None:
    request = new_id()
    first = pool.granted(request)
    claim = place.claim(request)
    assert claim is not None
    assert pool.granted(request) == {**first, "expires_seconds": pytest.approx(first["expires_seconds"], abs=6)}
    assert (place.claim(request) or {})["metadata"]["uid"] == claim["metadata"]["uid"]
    assert pool.ask(request, compute_milli=500).status_code == 409
    pool.give_back(request)
    until(lambda: place.claim(request) is None)
    check(place, pool, [])


def test_a_name_that_somebody_took_is_refused(place: Place, pool: Pool) -> None:
    request = new_id()
    taken = {"metadata": {"name": f"nbgpu-{request}"}, "spec": {"devices": {"requests": []}}}
    place.do(place.kube.create(path(RESOURCE, "resourceclaims", place.namespace), taken))
    answer = pool.ask(request)
    assert answer.status_code == 503
    assert "exists already" in answer.json()["error"]["message"]
    until(lambda: pool.state(request) == "gone")
    assert place.claim(request) is not None, "what is not the pool's is not deleted"
    assert all(one == (0, 0) for one in pool.books().values())


def written(place: Place, method: str, where: str, body: bytes) -> int:
    """Send bytes that no JSON library would write; return the status."""
    work = place.kube._http.request(method, where, content=body, headers={"Content-Type": "application/json"})
    return place.do(work).status_code


def test_no_words_in_somebodys_claim_hide_the_others(place: Place, pool: Pool) -> None:
    claims = path(RESOURCE, "resourceclaims", place.namespace)
    for name, words in (("deep", b"[" * 5000 + b"]" * 5000), ("no-text", b'"\xff"')):
        asked = b'"requests":[{"name":"g","exactly":{"deviceClassName":"gpu.example.com"}}]'
        told = b'"config":[{"opaque":{"driver":"gpu.example.com","parameters":{"a":%s}}}]' % words
        body = b'{"metadata":{"name":"%s"},"spec":{"devices":{%s,%s}}}' % (name.encode(), asked, told)
        assert written(place, "POST", claims, body) == 201
    request = served(place, pool)
    pool.kill()
    pool.start()
    assert pool.state(request) == "bound"
    pool.give_back(request)
    place.delete_pod(request)
    until(lambda: pool.state(request) == "gone")


def test_a_claim_that_is_deleted_before_it_has_devices_holds_nothing(place: Place, pool: Pool) -> None:
    """In the foreground, with a dependent that does not go, it stays for ever."""
    request = new_id()
    pool.granted(request)
    claim = place.claim(request)
    assert claim is not None
    owner = {"apiVersion": RESOURCE, "kind": "ResourceClaim", "name": claim["metadata"]["name"], "uid": claim["metadata"]["uid"]}
    maps = path("v1", "configmaps", place.namespace)
    held = {"metadata": {"name": "held", "finalizers": ["example.org/held"], "ownerReferences": [{**owner, "blockOwnerDeletion": True}]}}
    place.do(place.kube.create(maps, held))
    where = path(RESOURCE, "resourceclaims", place.namespace, owner["name"])
    assert written(place, "DELETE", where, b'{"propagationPolicy":"Foreground"}') == 200
    until(lambda: pool.state(request) == "gone")
    time.sleep(1)
    assert place.claim(request) is not None, "the control: it is still there"
    assert all(one == (0, 0) for one in pool.books().values())
    place.do(place.kube.patch(f"{maps}/held", {"metadata": {"finalizers": None}}))
    until(lambda: place.claim(request) is None)


def test_namespaces(place: Place, pool: Pool) -> None:
    assert pool.ask(new_id(), namespace="default").status_code == 403
    missing = pool.ask(new_id(), namespace=None)
    assert (missing.status_code, missing.json()["error"]["field"]) == (400, "namespace")
    nowhere = pool.ask(new_id(), namespace=f"{place.namespace}-nowhere")
    assert nowhere.status_code == 503
    assert "not found" in nowhere.json()["error"]["message"]


# -- who dies


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pool_killed_around_the_creation_of_a_claim(place: Place, tmp_path: Path, gateway: Gateway, when: str) -> None:
    """Case 14: the client's retry finds the grant that the dead pool made; where it made none, a new one."""
    pool = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=30).start()
    request = new_id()
    killed: list[str] = []

    def kill(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/resourceclaims") and not killed:
            killed.append(path)
            pool.kill()

    setattr(gateway, when, kill)
    with pytest.raises(Exception, match=r"(disconnected|reset|closed)"):
        pool.ask(request)
    assert killed
    setattr(gateway, when, lambda method, path: None)
    made = place.claim(request)
    assert (made is not None) == (when == "after" or made is not None)  # before: the answer may still have come through
    again = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=30).start()
    again.granted(request)
    now = place.claim(request)
    assert now is not None
    if made is not None:
        assert now["metadata"]["uid"] == made["metadata"]["uid"]
    assert sum(milli for _, milli in again.books().values()) == 250
    again.give_back(request)
    until(lambda: place.claim(request) is None)
    check(place, again, [])


def test_a_claim_of_a_dead_pool_that_nobody_asks_for_again_is_freed(place: Place, pool: Pool, tmp_path: Path) -> None:
    request = new_id()
    pool.granted(request)
    pool.kill()
    again = Pool(place, tmp_path, reservation_ttl_seconds=2).start()
    assert again.state(request) == "reserved"
    until(lambda: place.claim(request) is None, why=again.log)
    check(place, again, [])


def test_a_hub_that_dies_between_bind_and_pod(place: Place, pool: Pool) -> None:
    """Bound, and no pod ever comes: the claim is an orphan after the reservation's time."""
    request = new_id()
    pool.granted(request)
    assert pool.bind(request).status_code == 200
    until(lambda: pool.state(request) == "bound")
    time.sleep(4)
    assert place.claim(request) is not None, "not before its time"
    until(lambda: place.claim(request) is None)
    until(lambda: pool.state(request) == "gone")
    check(place, pool, [])


def test_two_replicas_and_the_leader_killed(place: Place, tmp_path: Path) -> None:
    """Case 15: one leads, the other refuses; a killed leader is followed by the other, which knows all."""
    pools = [Pool(place, tmp_path).start(ready=False) for _ in range(2)]
    until(lambda: any(one.ready() for one in pools), 40)
    leader = next(one for one in pools if one.ready())
    other = next(one for one in pools if one is not leader)
    until(lambda: other.answers() and "not-leader" in other.ask(new_id()).text, why=other.log)
    assert other.http.get("/healthz").status_code == 200
    assert other.http.get("/v1/devices").status_code == 503
    request = served(place, leader)
    waiting = new_id()
    leader.granted(waiting)
    leader.kill()
    begun = time.monotonic()
    until(other.ready, 40, other.log)
    assert time.monotonic() - begun < 30
    assert (other.state(request), other.state(waiting)) == ("bound", "reserved")
    other.granted(waiting)
    other.give_back(waiting)
    until(lambda: place.claim(waiting) is None)
    check(place, other, [request])
    leader.start(ready=False)
    until(lambda: leader.answers() and leader.http.get("/healthz").json()["leads"] is False)
    other.kill(signal.SIGTERM)
    begun = time.monotonic()
    until(leader.ready, 40, leader.log)
    assert time.monotonic() - begun < 10, "one that ends gives its lease back"
    check(place, leader, [request])


def test_a_leader_without_its_lease_grants_nothing(place: Place, tmp_path: Path, gateway: Gateway) -> None:
    """It stops before another may lead; the lease is another's when it looks again."""
    first = Pool(place, tmp_path, gateway=gateway).start()
    gateway.before = lambda method, path: 503 if "/leases" in path else None
    until(lambda: not first.ready(), 20)
    refused = first.ask(new_id())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not-leader")
    second = Pool(place, tmp_path).start()
    gateway.before = lambda method, path: None
    until(lambda: "no longer leading" in first.log())
    assert first.ask(new_id()).status_code == 503
    second.granted(request := new_id())
    second.give_back(request)
    until(lambda: place.claim(request) is None)
    check(place, second, [])


# -- who meddles


def test_somebodys_own_claims_count(place: Place, pool: Pool) -> None:
    node = place.nodes[0]
    devices = [one.uuid for devices in place.devices.values() for one in devices]
    for number, device in enumerate(devices):
        place.foreign(f"own-{number}", 60 * GIB, 800, device)
    until(lambda: all(held == (60 * GIB, 800) for held in pool.books().values()))
    request = new_id()
    assert pool.ask(request).json()["grant"]["state"] == "queued"
    place.do(place.kube.delete(path("v1", "pods", place.namespace, "pod-own-0")))
    until(lambda: place.get("v1", "pods", place.namespace, "pod-own-0") is None)
    place.do(place.kube.delete(path(RESOURCE, "resourceclaims", place.namespace, "own-0")))
    grant = until(lambda: (found := pool.http.get(f"/v1/requests/{request}").json())["state"] == "reserved" and found)
    assert grant["slice"]["node"] == node
    assert [one["uuid"] for one in grant["slice"]["devices"]] == [devices[0]]
    pool.give_back(request)
    until(lambda: pool.books() == place.held())


def test_claims_edited_by_hand(place: Place, pool: Pool) -> None:
    """Labels, annotations and owners taken off or forged change nothing of what counts."""
    request = served(place, pool)
    there = path(RESOURCE, "resourceclaims", place.namespace, f"nbgpu-{request}")
    labels = {"nbgpu.io/slice": "another-slice", "nbgpu.io/hub": None, "app.kubernetes.io/managed-by": None}
    place.do(place.kube.patch(there, {"metadata": {"labels": labels, "annotations": {"nbgpu.io/owner": "{junk"}}}))
    time.sleep(1)
    assert pool.state(request) == "bound"
    assert pool.books() == place.held()
    pool.give_back(request)
    place.delete_pod(request)
    until(lambda: place.claim(request) is None)
    check(place, pool, [])


def test_a_claim_deleted_by_hand(place: Place, pool: Pool) -> None:
    """Before its pod comes, it is gone and so is the grant; while the pod runs it stays, and counts, until the pod ends."""
    early, used = new_id(), served(place, pool)
    pool.granted(early)
    for request in (early, used):
        place.do(place.kube.delete(path(RESOURCE, "resourceclaims", place.namespace, f"nbgpu-{request}")))
    until(lambda: (pool.state(early), pool.state(used)) == ("gone", "releasing"))
    check(place, pool, [used])
    assert pool.bind(early).status_code == 409
    place.delete_pod(used)
    until(lambda: pool.state(used) == "gone")
    check(place, pool, [])


def test_a_malformed_resource_slice(place: Place, pool: Pool) -> None:
    """Its devices are left out, what is held there still counts, and it is told once; the others go on."""
    request = served(place, pool)
    claim = place.claim(request)
    assert claim is not None
    node = claim["status"]["allocation"]["devices"]["results"][0]["pool"]
    broken = place.get(RESOURCE, "resourceslices", None, f"{node}-{DRIVER}")
    assert broken is not None
    for device in broken["spec"]["devices"]:
        device["attributes"].pop("uuid")
    broken["spec"]["pool"]["generation"] += 1000
    place.generation += 2000
    place.do(place.kube.replace(path(RESOURCE, "resourceslices", None, f"{node}-{DRIVER}"), broken))
    until(lambda: len(pool.books()) == 2)
    assert pool.state(request) == "bound"
    other = new_id()
    assert pool.granted(other)["slice"]["node"] != node
    until(lambda: any("not as an agent of nbgpu writes it" in one for one in place.events("NotUsable", "default")))
    pool.kill()
    pool.start()
    assert pool.state(request) == "bound", "the claim's own words still tell whose it is"
    assert pool.http.get(f"/v1/requests/{request}").json()["slice"]["node"] == node
    pool.give_back(other)
    place.publish(node)
    until(lambda: len(pool.books()) == 4)
    until(lambda: pool.books() == place.held())
    check(place, pool, [request])


def test_nothing_is_granted_where_a_claim_cannot_be_read(place: Place, pool: Pool) -> None:
    """A claim holds a device by a name that is not the device's: nobody knows how much of what is left."""
    node = place.nodes[0]
    device = place.devices[node][0]
    allocation = {"devices": {"results": [
        {"request": "gpu", "driver": DRIVER, "pool": node, "device": device_name(device.uuid), "shareID": str(uuid.uuid4()),
         "consumedCapacity": {"memory": "1.5e-3", "compute": "junk"}}
    ]}}  # fmt: skip
    view_claim = {"metadata": {"name": "odd", "namespace": place.namespace, "uid": "u"}, "status": {"allocation": allocation}}
    from nbgpu_pool.kube_view import NodeInfo, View, keep_claim, keep_published

    # the API server lets no such claim in, so the pool's own reading is asked
    view = View(b"k" * 16, time.time)
    view.node_changed(node, NodeInfo(True))
    view.published_changed("x", keep_published(place.get(RESOURCE, "resourceslices", None, f"{node}-{DRIVER}") or {}))
    assert [one.healthy for one in view.devices()] == [True, True]
    view.claim_changed((place.namespace, "odd"), keep_claim(view)(view_claim))
    assert [one.healthy for one in view.devices() if one.uuid == device.uuid] == [False]
    assert [one.healthy for one in view.devices() if one.uuid != device.uuid] == [True]


# -- what goes away


def test_a_namespace_deleted(place: Place, pool: Pool) -> None:
    """Case 19."""
    space = f"{place.namespace}-b"
    place.make_namespace(space)
    request, early = new_id(), new_id()
    for one in (request, early):
        pool.granted(one, namespace=space)
    place.pod(request, namespace=space)
    until(lambda: (place.get("v1", "pods", space, f"pod-{request}") or {})["status"].get("phase") == "Running")
    place.do(place.kube.delete(path("v1", "namespaces", name=space)))
    until(lambda: (pool.state(request), pool.state(early)) == ("gone", "gone"), 30)
    refused = pool.ask(new_id(), namespace=space)
    assert refused.status_code == 503
    check(place, pool, [])
    until(lambda: place.get("v1", "namespaces", None, space) is None, 30)


def test_a_node_that_goes_away_and_returns(place: Place, pool: Pool) -> None:
    """Case 18: while it is not ready nothing new comes there, what it holds counts, and afterwards all is as it was."""
    request = served(place, pool)
    node = pool.http.get(f"/v1/requests/{request}").json()["slice"]["node"]
    place.silent.add(node)
    place.set_ready(node, False)
    healthy = lambda: {one["device"]["node"] for one in pool.http.get("/v1/devices").json() if one["device"]["healthy"]}  # noqa: E731
    until(lambda: node not in healthy())
    assert pool.state(request) == "bound"
    for _ in range(3):
        other = new_id()
        assert pool.granted(other, compute_milli=500)["slice"]["node"] != node
        pool.give_back(other)
    check(place, pool, [request])
    place.set_ready(node, True)
    place.silent.discard(node)
    until(lambda: node in healthy())
    assert pool.state(request) == "bound"
    check(place, pool, [request])


def test_a_node_removed_with_its_resource_slice(place: Place, pool: Pool) -> None:
    request = served(place, pool)
    node = pool.http.get(f"/v1/requests/{request}").json()["slice"]["node"]
    place.do(place.kube.delete(path(RESOURCE, "resourceslices", None, f"{node}-{DRIVER}")))
    until(lambda: len(pool.books()) == 2)
    assert pool.state(request) == "bound"
    pool.kill()
    pool.start()
    assert pool.state(request) == "bound", "known by the claim's own words"
    place.publish(node)
    until(lambda: len(pool.books()) == 4)
    check(place, pool, [request])


def test_the_api_server_away_for_a_while(place: Place, tmp_path: Path, gateway: Gateway) -> None:
    """Nothing is lost, nothing is granted meanwhile, and what happened meanwhile is known afterwards."""
    pool = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=6).start()
    kept, ended = served(place, pool), served(place, pool)
    for request in (kept, ended):
        until(lambda request=request: (place.claim(request) or {})["metadata"].get("ownerReferences"))
    gateway.close()
    until(lambda: not pool.ready(), 20)
    refused = pool.ask(new_id())
    assert refused.status_code == 503
    assert "API server" in refused.json()["error"]["message"]
    place.delete_pod(ended)
    time.sleep(5)
    gateway.open()
    until(pool.ready, 30, pool.log)
    until(lambda: pool.http.get("/healthz").json()["connected"])
    until(lambda: pool.state(ended) == "gone")
    assert pool.state(kept) == "bound"
    check(place, pool, [kept])


def test_slow_and_failing_creation(place: Place, tmp_path: Path, gateway: Gateway) -> None:
    """Case 10: an answer that is lost after the claim was made; the retry meets the claim, the grant lives."""
    pool = Pool(place, tmp_path, gateway=gateway).start()
    request = new_id()
    left = ["drop", 500, 500]
    gateway.after = lambda method, path: left.pop() if method == "POST" and path.endswith("/resourceclaims") and left else None
    for _ in range(3):
        answer = pool.ask(request)
        assert answer.status_code == 503
        assert pool.state(request) == "reserved"
    made = place.claim(request)
    assert made is not None
    pool.granted(request)
    assert (place.claim(request) or {})["metadata"]["uid"] == made["metadata"]["uid"]
    gateway.before = lambda method, path: 500 if method == "DELETE" and "/resourceclaims/" in path else None
    pool.give_back(request)
    time.sleep(1.5)
    assert pool.state(request) == "releasing"
    gateway.before = lambda method, path: None
    until(lambda: place.claim(request) is None)
    until(lambda: pool.state(request) == "gone")
    check(place, pool, [])


def test_a_pod_that_comes_late_with_a_slice_that_was_given_back(place: Place, pool: Pool) -> None:
    """Case 13: it never gets a device, and its Event says why."""
    request = new_id()
    pool.granted(request)
    pool.give_back(request)
    until(lambda: place.claim(request) is None)
    place.pod(request)
    until(lambda: any(request in one for one in place.events("SliceGone")))
    assert place.phase(request) == "Pending"
    assert sum(milli for _, milli in place.held().values()) == 0
    # nor when the request comes after it, as it is known to be withdrawn
    assert pool.ask(request).json()["grant"]["state"] == "gone"
    assert place.phase(request) == "Pending"
    place.delete_pod(request)
    check(place, pool, [])


def test_a_forged_claim_of_a_withdrawn_request_is_not_served_as_the_pools(place: Place, pool: Pool) -> None:
    device = place.devices[place.nodes[0]][0]
    part = SliceDevice(uuid=device.uuid, index=0, model=device.model, memory_bytes=80 * GIB, compute_milli=1000)
    owner = Owner(hub="hub", user="mallory")
    forged = Slice(
        slice_id=new_id(), owner=owner, node=device.node, mode="burst", devices=[part], namespace=place.namespace
    )  # sealed with a key of one's own
    place.do(place.kube.create(path(RESOURCE, "resourceclaims", place.namespace), claim_for(forged, b"not the installation's")))
    time.sleep(1)
    assert pool.state(forged.slice_id) == "unknown"
    assert all(one == (0, 0) for one in pool.books().values()), "it asks, and holds nothing"
    place.pod(forged.slice_id)
    until(lambda: place.phase(forged.slice_id) == "Running")
    until(lambda: pool.books()[device.uuid] == (80 * GIB, 1000))
    assert pool.state(forged.slice_id) == "unknown", "counted as the namespace's own"
    place.delete_pod(forged.slice_id)


def test_three_that_want_what_two_can_have(place: Place, pool: Pool) -> None:
    """Whole devices for all but one; the last waits, and gets its turn when one ends."""
    requests = [served(place, pool, user=f"u{number}", compute_milli=1000) for number in range(4)]
    last = new_id()
    assert pool.ask(last, "u9", compute_milli=1000).json()["grant"]["state"] == "queued"
    check(place, pool, requests)
    pool.give_back(requests[0])
    place.delete_pod(requests[0])
    until(lambda: pool.state(last) == "reserved")
    pool.granted(last, "u9", compute_milli=1000)
    place.pod(last)
    until(lambda: place.phase(last) == "Running")
    check(place, pool, [*requests[1:], last])


def _device(claim: dict[str, object]) -> str:
    selector = claim["spec"]["devices"]["requests"][0]["exactly"]["selectors"][0]["cel"]["expression"]  # type: ignore[index]
    return selector.rpartition("==")[2].strip().strip('"')
