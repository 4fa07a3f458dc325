"""Running slices are given other limits on a real cluster, with a stand-in for the agent; the scheduler is real and races for the room."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_stand_in import Agent
from gateway_kit import Gateway
from place_kit import GIB, RESOURCE, Place, until
from pool_kit import Pool, check, new_id, served

from nbgpu.claim_limits import LIMITS_ANNOTATION
from nbgpu.claims import DRIVER
from nbgpu.kube import Conflict, NotFound, path

pytestmark = [pytest.mark.kubernetes]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place(nodes=1, devices=1)
    place.start()
    yield place
    place.stop()


@pytest.fixture
def pool(place: Place, tmp_path: Path) -> Iterator[Pool]:
    yield Pool(place, tmp_path, reservation_ttl_seconds=6).start()
    Pool.stop_all()


@pytest.fixture
def agent(place: Place, pool: Pool) -> Iterator[Agent]:
    agent = Agent(place, place.nodes[0], pool.key).start()
    yield agent
    agent.stop()
    assert not agent.exceeded


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    yield
    place.clean()
    place.publish(place.nodes[0])


def limits(pool: Pool, request: str) -> tuple[int, int]:
    """Return GiB and milli-GPU that are in force."""
    part = pool.grant(request)["slice"]["devices"][0]
    return part["memory_bytes"] // GIB, part["compute_milli"]


def settled(pool: Pool, request: str, memory: int, milli: int) -> None:
    until(lambda: limits(pool, request) == (memory, milli) and pool.grant(request)["resizing"] is None, why=str(pool.grant(request)))


def test_a_slice_shrinks_and_grows(place: Place, pool: Pool, agent: Agent) -> None:
    request = served(place, pool, compute_milli=500)
    assert pool.resize(request, memory_milli=250, compute_milli=250).status_code == 200
    settled(pool, request, 20, 250)
    assert place.consumed(request) == (40 * GIB, 500), "an allocated claim stays as it is"
    other = served(place, pool, soon=True, compute_milli=750)  # which the scheduler lets in by what is published now
    refused = pool.resize(request, compute_milli=500)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no-room")
    pool.give_back(other)
    place.delete_pod(other)
    until(lambda: pool.state(other) == "gone")
    grown = pool.resize(request, memory_milli=750, compute_milli=750)
    assert grown.status_code == 200
    settled(pool, request, 60, 750)
    again = pool.resize(request, memory_milli=750, compute_milli=750)
    assert (again.status_code, again.json()["resizing"]) == (200, None)
    assert pool.ask(new_id(), compute_milli=500).json()["grant"]["state"] == "queued"
    check(place, pool, [request])
    assert pool.http.post(f"/v1/requests/{new_id()}/resize", json={"compute_milli": 5}).status_code == 404
    assert pool.resize(request).status_code == 400


def test_an_agent_that_says_no_and_one_that_is_away(place: Place, pool: Pool, agent: Agent) -> None:
    request = served(place, pool)
    agent.refuses = True
    assert pool.resize(request, compute_milli=500).status_code == 200
    until(lambda: "could not grow" in (pool.grant(request)["note"] or ""))
    settled(pool, request, 20, 250)
    agent.refuses = False
    time.sleep(1)
    assert limits(pool, request) == (20, 250), "what was refused does not come later"
    assert pool.resize(request, compute_milli=500).status_code == 200
    settled(pool, request, 20, 500)
    agent.stop()
    assert pool.resize(request, compute_milli=100).status_code == 200
    time.sleep(1)
    assert pool.books() == place.held(), "a shrink frees nothing before it is in force"
    agent.start()
    settled(pool, request, 20, 100)
    check(place, pool, [request])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pool_killed_around_the_writing_of_limits(place: Place, tmp_path: Path, gateway: Gateway, when: str) -> None:
    """What was written counts for the next pool, what was not is as if it had not been asked; asking again is the same."""
    pool = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=6).start()
    agent = Agent(place, place.nodes[0], pool.key)
    request = served(place, pool)
    until(lambda: (place.claim(request) or {})["metadata"].get("ownerReferences"))  # no other patch is on its way
    killed: list[str] = []

    def kill(method: str, path: str) -> None:
        if method == "PATCH" and path.endswith(f"/nbgpu-{request}") and not killed:
            killed.append(path)
            pool.kill()

    setattr(gateway, when, kill)
    with pytest.raises(Exception, match=r"(disconnected|reset|closed)"):
        pool.resize(request, compute_milli=1000, memory_milli=1000)
    assert killed
    setattr(gateway, when, lambda method, path: None)
    again = Pool(place, tmp_path, gateway=gateway, reservation_ttl_seconds=30).start()
    written = LIMITS_ANNOTATION in (place.claim(request) or {})["metadata"]["annotations"]
    assert written or when == "before"
    state = again.ask(new_id(), compute_milli=250).json()["grant"]["state"]
    assert state == ("queued" if written else "reserved"), "room that is asked for is given to nobody else"
    if written:
        agent.start()
        settled(again, request, 80, 1000)
        assert again.resize(request, compute_milli=1000, memory_milli=1000).status_code == 200
        agent.stop()
    Pool.stop_all()


def test_limits_edited_by_hand(place: Place, pool: Pool, agent: Agent) -> None:
    """Whoever may edit claims changes nothing, and it is told."""
    request, other = served(place, pool), served(place, pool, "grace")
    assert pool.resize(request, compute_milli=500, memory_milli=500).status_code == 200
    settled(pool, request, 40, 500)
    annotation = (place.claim(request) or {})["metadata"]["annotations"][LIMITS_ANNOTATION]
    there = path(RESOURCE, "resourceclaims", place.namespace, f"nbgpu-{other}")
    for junk in (annotation, annotation.replace("500", "900"), json.dumps({"devices": 7}), "{"):
        place.do(place.kube.patch(there, {"metadata": {"annotations": {LIMITS_ANNOTATION: junk}}}))
    until(lambda: any("its limits stay as they are" in one for one in place.events("NotUsable")))
    time.sleep(0.5)
    assert limits(pool, other) == (20, 250)
    assert pool.grant(other)["resizing"] is None
    assert pool.resize(other, compute_milli=100).status_code == 200, "the pool writes over it"
    settled(pool, other, 20, 100)
    check(place, pool, [request, other])


def test_one_shrinks_another_grows_one_is_given_back_and_the_scheduler_races(place: Place, pool: Pool, agent: Agent) -> None:
    """Case 21, on one device: the stand-in checks the limits in force at each change; afterwards the books say what is in force."""
    agent.slow_seconds = 0.03
    a, b, c = (served(place, pool, user) for user in ("ada", "bob", "cleo"))
    ends = time.monotonic() + 12
    raced: list[str] = []

    def race() -> None:
        """Somebody with claims of their own for whatever is free."""
        luck = random.Random(21)
        while time.monotonic() < ends:
            name = f"racer-{uuid.uuid4().hex[:6]}"
            capacity = {"requests": {"memory": str(luck.choice([4, 16, 30]) * GIB), "compute": str(luck.choice([50, 200, 400]))}}
            selector = {"cel": {"expression": f'device.attributes["{DRIVER}"].model == "{place.model}"'}}
            asked = {"name": "gpu", "exactly": {"deviceClassName": DRIVER, "selectors": [selector], "capacity": capacity}}
            place.do(place.kube.create(path(RESOURCE, "resourceclaims", place.namespace), {
                "metadata": {"name": name}, "spec": {"devices": {"requests": [asked]}}}))  # fmt: skip
            place.pod(name, claim=name, labels=False)
            time.sleep(luck.choice([0.2, 0.5]))
            claim = place.get(RESOURCE, "resourceclaims", place.namespace, name) or {}
            if claim.get("status", {}).get("allocation"):
                raced.append(name)
            for api, plural, one in (("v1", "pods", f"pod-{name}"), (RESOURCE, "resourceclaims", name)):
                with contextlib.suppress(NotFound, Conflict):
                    place.do(place.kube.delete(path(api, plural, place.namespace, one)))

    racer = threading.Thread(target=race)
    racer.start()
    luck, sizes, answers = random.Random(7), [100, 150, 250, 400, 500], []
    gone = False
    while time.monotonic() < ends:
        for request in (a, b):
            size = luck.choice(sizes)
            answers.append(pool.resize(request, memory_milli=size, compute_milli=size).status_code)
        if not gone and time.monotonic() > ends - 6:
            pool.give_back(c)
            place.delete_pod(c)
            gone = True
        time.sleep(luck.choice([0.05, 0.2, 0.4]))
    racer.join()
    assert set(answers) <= {200, 409}
    assert answers.count(200) > 10
    assert len(raced) > 3, "else nobody raced"
    assert not agent.exceeded
    until(lambda: pool.state(c) == "gone")
    for request in (a, b):
        until(lambda request=request: pool.grant(request)["resizing"] is None, 70, str(pool.grant(request)))
    check(place, pool, [a, b])
