"""Several hubs on one cluster, orphans of every kind, and the API server away: who may touch what, and what is left by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_kit import Gateway
from place_kit import GIB, RESOURCE, Place, until
from pool_kit import TOKEN, Pool, check, new_id, served

from nbgpu.claims import claim_for
from nbgpu.kube import path
from nbgpu.models import Owner, Slice, SliceDevice

pytestmark = [pytest.mark.kubernetes]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place(nodes=1, devices=2)
    place.start()
    place.make_namespace(f"{place.namespace}-two")
    yield place
    place.do(place.kube.delete(path("v1", "namespaces", name=f"{place.namespace}-two")))
    place.stop()


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    yield
    Pool.stop_all()
    place.clean()


def test_two_hubs_with_namespaces_of_their_own(place: Place, tmp_path: Path) -> None:
    """Same users, same pool of GPUs; neither sees, uses or ends what is the other's, whatever it asks."""
    second = f"{place.namespace}-two"
    pool = Pool(place, tmp_path, tokens={"hub": [place.namespace], "other": [second, f"{second}-*"]}, reservation_ttl_seconds=20).start()
    other = pool.speaks("other")
    request = served(place, pool)
    theirs = new_id()
    owner = {"hub": "other", "user": "ada"}
    wish = {"request_id": theirs, "owner": owner, "compute_milli": 250, "model": place.model, "namespace": second}
    made = other.post("/v1/launches", json={"request": wish})
    assert (made.status_code, made.json()["grant"]["state"]) == (200, "reserved")
    place.pod(theirs, namespace=second)
    until(lambda: place.get("v1", "pods", second, f"pod-{theirs}")["status"].get("phase") == "Running")  # type: ignore[index]
    for asked, code in (
        (other.get(f"/v1/requests/{request}"), 404),
        (other.delete(f"/v1/requests/{request}"), 204),
        (other.post(f"/v1/requests/{request}/resize", json={"compute_milli": 100}), 404),
        (other.post(f"/v1/requests/{request}/bind", json={}), 404),
        (other.post("/v1/release", json={"owner": {"hub": "hub", "user": "ada"}}), 403),
        (other.post("/v1/launches", json={"request": {**wish, "request_id": new_id(), "namespace": place.namespace}}), 403),
        (other.post("/v1/launches", json={"request": {**wish, "request_id": request}}), 409),
        (other.post("/v1/launches", json={"request": {**wish, "request_id": new_id(), "owner": {"hub": "hub", "user": "x"}}}), 403),
    ):
        assert asked.status_code == code, asked.text
    assert [one["request"]["request_id"] for one in other.get("/v1/requests").json()] == [theirs]
    assert pool.state(request) == "bound"
    released = other.post("/v1/release", json={"owner": owner}).json()
    assert [one["request"]["request_id"] for one in released] == [theirs]
    time.sleep(0.5)
    assert place.claim(theirs, second) is not None, "its pod runs"
    assert pool.state(request) == "bound", "the other hub's user of the same name"
    place.do(place.kube.delete(path("v1", "pods", second, f"pod-{theirs}")))
    until(lambda: place.claim(theirs, second) is None)
    check(place, pool, [request])


def test_claims_of_a_hub_that_is_not_configured_any_more(place: Place, tmp_path: Path) -> None:
    """What its pods hold counts and is told; what nobody carries is freed."""
    pool = Pool(place, tmp_path, reservation_ttl_seconds=3).start()
    carried, bare = served(place, pool), new_id()
    pool.granted(bare)
    pool.kill()
    again = Pool(place, tmp_path, tokens={"another": [f"{place.namespace}*"]}, reservation_ttl_seconds=3).start()
    until(lambda: place.claim(bare) is None, why=again.log)
    until(lambda: any("has no hub hub any more" in one for one in place.events("HubUnknown")))
    assert again.state(carried) == "unknown", "it is not this hub's"
    check(place, again, [carried])
    place.delete_pod(carried)
    until(lambda: place.claim(carried) is None)
    check(place, again, [])


@pytest.mark.parametrize("key", ["the same key", "another key"])
def test_a_server_that_ended_while_no_pool_ran(place: Place, tmp_path: Path, key: str) -> None:
    """Its claim is freed by the pool that leads next, also where an installation anew has made another key."""
    pool = Pool(place, tmp_path, reservation_ttl_seconds=60).start()
    ended, late, pending = served(place, pool), new_id(), new_id()
    for request in (late, pending):
        pool.granted(request)
    assert pool.bind(late).status_code == 200
    place.pod(pending, cpu="1000")
    pool.kill()
    place.delete_pod(ended)
    until(lambda: (place.claim(ended) or {}).get("status") in ({}, None), why="for Kubernetes to take its devices back")
    assert not (place.claim(ended) or {})["metadata"].get("ownerReferences"), "Kubernetes would delete it else"
    others = _claim_of(place, "hub", f"{place.namespace}-two"), _claim_of(place, "another", place.namespace)
    folder = tmp_path / key
    folder.mkdir()
    if key == "the same key":
        (folder / "seal.key").write_bytes(pool.key)
    again = Pool(place, folder, tokens={"hub": [place.namespace]}, reservation_ttl_seconds=8).start()
    time.sleep(4)
    assert place.claim(ended) is not None, "not before its time"
    place.pod(late)  # of a start that was under way
    until(lambda: place.claim(ended) is None, 12, again.log)
    until(lambda: place.phase(late) == "Running")
    time.sleep(10)
    assert place.claim(late) is not None
    assert place.claim(pending) is not None, "its pod waits for a node"
    for name, namespace in others:
        assert place.get(RESOURCE, "resourceclaims", namespace, name) is not None, "it is not this hub's"
        place.do(place.kube.delete(path(RESOURCE, "resourceclaims", namespace, name)))
    for request in (late, pending):
        place.delete_pod(request)
    until(lambda: place.claim(late) is None and place.claim(pending) is None, 20, again.log)
    check(place, again, [])


def _claim_of(place: Place, hub: str, namespace: str) -> tuple[str, str]:
    """Make the claim of a pool that is not there; return its name and namespace."""
    device = place.devices[place.nodes[0]][0]
    part = SliceDevice(uuid=device.uuid, index=0, model=device.model, memory_bytes=GIB, compute_milli=100)
    owner = Owner(hub=hub, user="ada")
    held = Slice(slice_id=new_id(), owner=owner, node=device.node, mode="burst", devices=[part], namespace=namespace)
    made = place.do(place.kube.create(path(RESOURCE, "resourceclaims", namespace), claim_for(held, b"a key that nobody has")))
    return made["metadata"]["name"], namespace


def test_a_claim_reserved_for_a_pod_that_is_gone(place: Place, tmp_path: Path) -> None:
    """Kubernetes takes the reservation off, and what is left is an orphan."""
    pool = Pool(place, tmp_path, reservation_ttl_seconds=3).start()
    request = served(place, pool)
    until(lambda: (place.claim(request) or {})["metadata"].get("ownerReferences"))
    there = path(RESOURCE, "resourceclaims", place.namespace, f"nbgpu-{request}")
    place.do(place.kube.patch(there, {"metadata": {"ownerReferences": None}}))
    ghost = {"resource": "pods", "name": "ghost", "uid": "11111111-1111-1111-1111-111111111111"}
    used = (place.claim(request) or {})["status"]["reservedFor"]
    place.do(place.kube.patch(f"{there}/status", {"status": {"reservedFor": [*used, ghost]}}))
    place.delete_pod(request)
    until(lambda: place.claim(request) is None, 40, lambda: f"{place.claim(request)}\n{pool.log()}")
    until(lambda: pool.state(request) == "gone")
    check(place, pool, [])


def test_foreign_claims_are_seen_by_namespace(place: Place, tmp_path: Path) -> None:
    """In the books, in the metrics, and by `nbgpu status --cluster` and `--pool`, which an administrator would ask."""
    pool = Pool(place, tmp_path, reservation_ttl_seconds=20).start()
    request = served(place, pool)
    device = place.devices[place.nodes[0]][1]
    place.foreign("own", 30 * GIB, 300, device.uuid)
    until(lambda: pool.books()[device.uuid] == (30 * GIB, 300))
    metrics = pool.http.get("/metrics").text
    assert f'nbgpu_pool_foreign_compute_milli{{namespace="{place.namespace}"}} 300.0' in metrics
    assert f'nbgpu_pool_foreign_memory_bytes{{namespace="{place.namespace}"}} {30 * GIB:.10g}'.partition(" ")[0] in metrics

    def nbgpu(*command: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "NBGPU_POOL_TOKEN": TOKEN}
        return subprocess.run([sys.executable, "-m", "nbgpu", *command], env=env, capture_output=True, text=True, timeout=60)

    claims = {one["name"]: one for one in json.loads(nbgpu("status", "--cluster", "--json").stdout)["claims"]}
    assert (claims["own"]["state"], claims["own"]["owner"]) == ("running", f"{place.namespace}/own")
    assert (claims[f"nbgpu-{request}"]["owner"], claims[f"nbgpu-{request}"]["pods"]) == ("ada (hub)", [f"pod-{request}"])
    table = nbgpu("status", "--pool", f"http://127.0.0.1:{pool.port}").stdout
    assert "ada" in table
    assert "30 GiB" in table
    looked = nbgpu("doctor", "--cluster")
    assert "DeviceClass gpu.nbgpu.io is there" in looked.stdout, looked
    place.delete_pod("own")
    place.do(place.kube.delete(path(RESOURCE, "resourceclaims", place.namespace, "own")))
    until(lambda: f'nbgpu_pool_foreign_compute_milli{{namespace="{place.namespace}"}}' not in pool.http.get("/metrics").text)
    check(place, pool, [request])


def test_availability_while_the_api_server_is_away(place: Place, tmp_path: Path, gateway: Gateway) -> None:
    """It is answered from what was known, and says so, longer than the lease is held; nothing is granted meanwhile."""
    pool = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=60).start()
    request = served(place, pool)

    def looked() -> tuple[str, str]:
        shapes = [{"compute_milli": 500, "model": place.model}]
        answer = pool.http.post("/v1/availability", json={"owner": {"hub": "hub", "user": "bob"}, "shapes": shapes})
        assert answer.status_code == 200, answer.text
        return answer.json()[0]["state"], answer.json()[0]["reason"]

    assert looked() == ("free", "free now")
    gateway.close()
    until(lambda: looked()[0] == "wait", 10)
    assert looked()[1].startswith("free now, as of ")
    assert "The Kubernetes API server does not answer at the moment" in looked()[1]
    bob = new_id()
    waiting = pool.http.post("/v1/requests", json=pool.request(bob, "bob"))
    assert waiting.status_code in (200, 503)
    assert "does not answer" in waiting.text
    until(lambda: not pool.ready(), 20)  # its lease has run out
    assert looked()[0] == "wait"
    assert pool.http.get(f"/v1/requests/{request}").json()["state"] == "bound"
    refused = pool.ask(new_id(), "bob")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not-leader")
    assert "API server does not answer" in refused.json()["error"]["message"]
    gateway.open()
    until(lambda: pool.ready() and looked() == ("free", "free now"), 40, pool.log)
    until(lambda: pool.state(bob) == "reserved")
    pool.give_back(bob)
    check(place, pool, [request])
