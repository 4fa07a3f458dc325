"""Pods that find no node where the pool meant: tried elsewhere, told, finished by whoever comes after; and nodes that come late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_kit import Gateway
from place_kit import GIB, Place, until
from pool_kit import Pool, check, new_id

from nbgpu.kube import path

pytestmark = [pytest.mark.kubernetes]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place(nodes=2, devices=2)
    place.start()
    yield place
    place.stop()


@pytest.fixture
def pool(place: Place, tmp_path: Path) -> Pool:
    return Pool(place, tmp_path, reservation_ttl_seconds=30).start()


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    yield
    Pool.stop_all()
    place.clean()


def carried(place: Place, pool: Pool, cpu: str = "4", **wish: object) -> str:
    """Return the request of a pod that was made, wherever it comes to run."""
    request = new_id()
    pool.granted(request, **wish)
    assert pool.bind(request).status_code == 200
    place.pod(request, cpu=cpu)
    return request


def node_of(pool: Pool, request: str) -> str:
    return pool.grant(request)["slice"]["node"]


def note(pool: Pool, request: str) -> str:
    return pool.grant(request)["note"] or ""


def test_no_cpu_left_on_the_node(place: Place, pool: Pool) -> None:
    """It runs on the other node within seconds, and its user can read why it took longer."""
    place.fill(place.nodes[0], "6")
    begun = time.monotonic()
    request = carried(place, pool)
    assert node_of(pool, request) == place.nodes[0]
    until(lambda: "Insufficient cpu" in note(pool, request) or place.phase(request) == "Running")
    until(lambda: place.phase(request) == "Running", 20, pool.log)
    assert time.monotonic() - begun < 12
    until(lambda: node_of(pool, request) == place.nodes[1])
    until(lambda: note(pool, request) == "")
    check(place, pool, [request])
    other = new_id()
    assert pool.granted(other)["slice"]["node"] == place.nodes[1], "the next of that kind is spared the detour"
    pool.give_back(other)


def test_several_devices_go_together_and_nothing_is_moved_in_part(place: Place, pool: Pool) -> None:
    place.fill(place.nodes[0], "6")
    request = carried(place, pool, device_count=2, compute_milli=500)
    until(lambda: place.phase(request) == "Running", 20, pool.log)
    until(lambda: node_of(pool, request) == place.nodes[1])
    claim = place.claim(request)
    assert claim is not None
    results = claim["status"]["allocation"]["devices"]["results"]
    assert [one["pool"] for one in results] == [place.nodes[1]] * 2
    assert len({one["device"] for one in results}) == 2
    check(place, pool, [request])


def test_no_other_node_has_room_either(place: Place, pool: Pool) -> None:
    """The grant stays, its reason is the scheduler's, and it goes on by itself when there is room."""
    for node in place.nodes:
        place.fill(node, "6")
    request = carried(place, pool)
    until(lambda: "tried" in note(pool, request), 10, pool.log)
    until(lambda: node_of(pool, request) == place.nodes[1])
    until(lambda: "Insufficient cpu" in note(pool, request))
    claim = place.claim(request)
    assert claim is not None
    time.sleep(14)  # as long as another try would take
    assert (place.claim(request) or {})["metadata"]["uid"] == claim["metadata"]["uid"], "no node is tried twice"
    assert (pool.state(request), place.phase(request)) == ("bound", "Pending")
    place.delete_pod(f"filler-{place.nodes[1]}")
    until(lambda: place.phase(request) == "Running", 20)
    until(lambda: note(pool, request) == "")
    check(place, pool, [request])


MOMENTS = {
    "the note is written": ("POST", "/resourceclaims"),
    "the old claim is deleted": ("DELETE", "/nbgpu-{}"),
    "the new claim is made": ("POST", "/resourceclaims"),
    "the note is removed": ("DELETE", "/nbgpu-{}-move"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pool_killed_in_a_move(place: Place, tmp_path: Path, gateway: Gateway, moment: str) -> None:
    """Killed after each of its steps: the next one finishes it, and the pod runs."""
    pool = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=30).start()
    place.fill(place.nodes[0], "6")
    request = new_id()
    pool.granted(request)
    assert pool.bind(request).status_code == 200
    method, ending = MOMENTS[moment]
    skip = [None] if moment == "the new claim is made" else []
    killed: list[str] = []

    def kill(asked: str, path: str) -> None:
        if asked == method and path.endswith(ending.format(request)) and not killed:
            if skip:
                skip.pop()
            else:
                killed.append(path)
                pool.kill()

    gateway.after = kill
    place.pod(request, cpu="4")
    until(lambda: killed, 15, pool.log)
    again = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=30).start()
    assert again.state(request) == "bound"
    assert sum(milli for _, milli in again.books().values()) == 250, "counted once, wherever it is going"
    until(lambda: place.phase(request) == "Running", 25, again.log)
    until(lambda: node_of(again, request) == place.nodes[1])
    check(place, again, [request])


def test_given_back_in_the_middle_of_a_move(place: Place, tmp_path: Path, gateway: Gateway) -> None:
    pool = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=30).start()
    place.fill(place.nodes[0], "6")
    request = new_id()
    pool.granted(request)
    assert pool.bind(request).status_code == 200
    gateway.before = lambda method, path: (
        500 if method == "POST" and path.endswith("/resourceclaims") and place.claim(request) is None else None
    )
    place.pod(request, cpu="4")
    until(lambda: place.claim(request) is None, 15, pool.log)
    pool.give_back(request)
    gateway.before = lambda method, path: None
    place.delete_pod(request)
    until(lambda: pool.state(request) == "gone")
    check(place, pool, [])


# -- nodes that come late


def test_a_node_that_has_to_be_started(place: Place, tmp_path: Path) -> None:
    """Obtainable though it is not there: the pod is made and waits, which is what an autoscaler sees; then the node comes."""
    model, name = f"Late {place.run_id}", f"poolkube-{place.run_id}-late"
    labels = {"pool": f"late-{place.run_id}"}
    group = {"name": "late", "model": model, "devices": 2, "memory": "82 GiB", "reserve": "2 GiB", "nodes": 1, "labels": labels}
    pool = Pool(place, tmp_path, reservation_ttl_seconds=30, coming=[group]).start()
    shapes = [{"compute_milli": 500, "model": model}, {"compute_milli": 500, "model": place.model}]
    looked = pool.http.post("/v1/availability", json={"owner": {"hub": "hub", "user": "ada"}, "shapes": shapes}).json()
    assert [one["state"] for one in looked] == ["wait", "free"]
    assert looked[0]["reason"] == "a node has to be started first: usually within 5 minutes"
    request = carried(place, pool, cpu="1", model=model, device_count=2, compute_milli=500)
    until(lambda: "started first" in note(pool, request))
    until(lambda: any("unschedulable" in str(one).lower() for one in _conditions(place, request)))
    again = Pool(place, tmp_path, reservation_ttl_seconds=30, coming=[group]).start(ready=False)
    pool.kill()
    until(again.ready, 30, again.log)
    assert "started first" in note(again, request), "a pool that starts knows it from the claim"
    assert again.ask(new_id(), "bob", model=model, compute_milli=1000).json()["grant"]["state"] == "queued"
    place.add_node(name, model, 2, labels)
    try:
        until(lambda: place.phase(request) == "Running", 20, again.log)
        until(lambda: node_of(again, request) == name)
        until(lambda: note(again, request) == "")
        claim = place.claim(request)
        assert claim is not None
        assert len({one["device"] for one in claim["status"]["allocation"]["devices"]["results"]}) == 2
        held = place.held()
        assert [held[one.uuid] for one in place.devices[name]] == [(40 * GIB, 500)] * 2
        until(lambda: all(not one["device"]["uuid"].startswith("coming:") for one in again.http.get("/v1/devices").json()))
    finally:
        Pool.stop_all()
        place.clean()
        place.remove_node(name)


def _conditions(place: Place, request: str) -> list[object]:
    pod = place.get("v1", "pods", place.namespace, f"pod-{request}")
    return (pod or {}).get("status", {}).get("conditions", [])


def test_a_node_that_has_to_be_started_and_is_not_asked_for_any_more(place: Place, tmp_path: Path) -> None:
    model = f"Never {place.run_id}"
    group = {"name": "never", "model": model, "devices": 1, "memory": "40 GiB", "nodes": 1}
    pool = Pool(place, tmp_path, reservation_ttl_seconds=30, coming=[group]).start()
    request = carried(place, pool, model=model, compute_milli=1000)
    assert pool.ask(new_id(), model=model, compute_milli=1000).json()["grant"]["state"] == "queued"
    pool.give_back(request)
    place.do(place.kube.delete(path("v1", "pods", place.namespace, f"pod-{request}")))
    until(lambda: pool.state(request) == "gone")
    assert place.claim(request) is None
