"""A hub or a pool that is SIGKILLed at chosen points of a start and a stop: cases 12 to 14 of the table in docs/kubernetes.md.

As in test_hub_life: afterwards pods that live, claims, the pool's books and the new hub's servers agree.
"""

from __future__ import annotations

import signal
import sqlite3
import sys
import time
from collections.abc import Iterator

import pytest
from gateway_kit import Gateway
from hub_kit import Fault, HubPlace, KubeHub, clean, consistent, gateway_of_hub, until
from pool_kit import Pool

pytestmark = [pytest.mark.kubernetes]
CREATE, ONE_POD, CLAIMS = r"/pods$", r"/pods/jupyter-", r"/resourceclaims$"
HALF = {"profile": "half"}
EXTRA = """
c.Spawner.http_timeout = 4
c.KubeSpawner.start_timeout = 180
"""


@pytest.fixture(scope="module")
def place() -> Iterator[HubPlace]:
    place = HubPlace()
    place.start()
    yield place
    place.stop()


@pytest.fixture(scope="module")
def gateway(place: HubPlace) -> Iterator[Gateway]:
    gateway = gateway_of_hub(place)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def pools_gateway(place: HubPlace) -> Iterator[Gateway]:
    gateway = Gateway(place)
    yield gateway
    Pool.stop_all()
    gateway.close()


@pytest.fixture(scope="module")
def pool(place: HubPlace, pools_gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(place, tmp_path_factory.mktemp("pool"), gateway=pools_gateway, reservation_ttl_seconds=6).start()


@pytest.fixture(scope="module")
def hub(place: HubPlace, pool: Pool, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeHub]:
    # a hub that starts waits for each server that it knows of, as long as http_timeout
    hub = KubeHub(
        tmp_path_factory.mktemp("hub"),
        place,
        pool,
        gateway,
        sys.executable,
        extra="c.Spawner.http_timeout = 4\nc.KubeSpawner.start_timeout = 180",
    )
    hub.start()
    hub.add("ada", "grace")
    yield hub
    hub.end()
    print(pool.log()[-5000:], hub.story(), sep="\n")  # shown when the last test has failed
    clean(place)


@pytest.fixture(autouse=True)
def agreed(place: HubPlace, pool: Pool, hub: KubeHub) -> Iterator[None]:
    """Everything agrees after each test, a start goes well, and nothing is left of it."""
    place.wait_for_rules()
    yield
    place.pending.clear()
    consistent(place, pool, hub)
    hub.spawn("ada", HALF)
    hub.ready("ada")
    assert len(consistent(place, pool, hub)) == 1
    hub.stop("ada")
    assert consistent(place, pool, hub) == set()


def test_a_watch_whose_first_list_fails(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """KubeSpawner keeps a watch that never began, and sees no pod in it: servers would count as stopped, and their pods would stay."""
    hub.kill()
    hub.start()
    with Fault(gateway, "GET", r"/pods$", 500) as fault:
        hub.spawn_aside("ada", HALF)
        fault.wait()
    hub.ready("ada")
    assert len(consistent(place, pool, hub)) == 1
    hub.stop("ada")
    assert place.pod_of("ada") is None


def test_a_hub_that_starts_while_the_api_server_is_away(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """It ends nobody's server, and knows them all once Kubernetes answers again."""
    hub.spawn("ada", HALF)
    hub.ready("ada")
    pod = place.pod_of("ada")
    hub.kill()
    gateway.close()
    try:
        hub.start()
        time.sleep(8)  # its timeouts are shorter than this
        assert hub.server("ada"), "the hub believes that the server has stopped"
    finally:
        gateway.open()
    hub.ready("ada")
    assert len(consistent(place, pool, hub)) == 1
    there = place.pod_of("ada")
    assert pod is not None
    assert there is not None
    assert there["metadata"]["uid"] == pod["metadata"]["uid"]
    hub.stop("ada")
    assert place.pod_of("ada") is None


def test_killed_before_it_asks(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """The pool does not answer; the hub dies; the pool goes on and hears nothing more."""
    assert pool.process is not None
    pool.process.send_signal(signal.SIGSTOP)
    try:
        hub.spawn_aside("ada", HALF)
        until(lambda: hub.server("ada"), 10, "the start is under way")
        hub.kill()
    finally:
        pool.process.send_signal(signal.SIGCONT)
    hub.start()
    hub.gone("ada")


def test_killed_while_the_pool_grants(hub: KubeHub, place: HubPlace, pool: Pool, pools_gateway: Gateway) -> None:
    """The claim is made and nobody ever hears of it: no pod, no saved state. It is freed after the reservation's time."""
    with Fault(pools_gateway, "POST", CLAIMS, after=True, hold=True) as fault:
        hub.spawn_aside("ada", HALF)
        fault.wait()
        hub.kill()
    assert len(place.claimed()) == 1
    hub.start()
    hub.gone("ada")


def test_killed_before_the_pod_is_made(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """Granted, bound and saved; the API server hears nothing. The new hub finds the request in its database and releases it."""
    with Fault(gateway, "POST", CREATE, 500, hold=True) as fault:
        hub.spawn_aside("ada", HALF)
        fault.wait()
        hub.kill()
    hub.start()
    hub.gone("ada")
    assert consistent(place, pool, hub, 4) == set(), "sooner than the reservation's time"


def test_killed_while_the_pod_is_made(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """The pod appears when its hub is dead, and another hub looks before that: an orphan whose slice was given back."""
    with Fault(gateway, "POST", CREATE, hold=True) as fault:
        hub.spawn_aside("ada", HALF)
        fault.wait()
        hub.kill()
        hub.start()
        hub.gone("ada")
        until(lambda: place.claimed() == set(), 10, "the new hub gives it back")
        fault.go_on.set()
        until(lambda: place.pod_of("ada"), 10, "the orphan")
    assert set(place.held().values()) == {(0, 0)}
    until(lambda: any("was given back before it started" in one for one in place.events("SliceGone")), 15, "the pool says why")
    hub.spawn("ada", HALF)  # which removes it
    hub.ready("ada")
    assert len(place.pods()) == 1


def test_killed_while_the_pod_is_pending(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """The new hub waits for its server as long as http_timeout, then stops it: pod and claim go."""
    place.pending.add("ada")
    hub.spawn("ada", HALF)
    until(lambda: place.carried(), 10, "the pod is there")
    hub.kill()
    assert len(place.claimed()) == 1
    hub.start()
    hub.gone("ada")


def test_killed_while_the_pod_starts_and_it_runs_when_the_new_hub_looks(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """It is adopted, with its slice."""
    place.pending.add("ada")
    hub.spawn("ada", HALF)
    (carried,) = until(lambda: place.carried(), 10, "the pod is there")
    hub.kill()
    place.pending.clear()
    pod = place.pod_of("ada")
    assert pod is not None
    place.do(place.kube.patch(f"/api/v1/namespaces/{place.namespace}/pods/{pod['metadata']['name']}", {"metadata": {"labels": {"x": "y"}}}))
    until(lambda: (place.pod_of("ada") or pod)["status"].get("phase") == "Running", 10, "it runs")
    hub.start()
    hub.ready("ada")
    assert hub.request_of("ada") == carried
    assert consistent(place, pool, hub) == {carried}
    hub.stop("ada")


def test_killed_before_a_stop_reaches_the_pod(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """The server runs on, and so does its slice."""
    hub.spawn("ada", HALF)
    hub.ready("ada")
    request = hub.request_of("ada")
    with Fault(gateway, "DELETE", ONE_POD, 500, hold=True, times=1000) as fault:
        hub.stop_aside("ada")
        fault.wait()
        hub.kill()
    hub.start()
    assert hub.ready("ada")["state"]["gpu_request_id"] == request
    assert consistent(place, pool, hub) == {request}
    hub.stop("ada")


def test_killed_in_the_end_of_a_stop(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Inside the finally of User.stop: the pod is gone, the hub's database says so, nobody ever calls again. The pool frees the claim."""
    hub.spawn("ada", HALF)
    hub.ready("ada")
    assert pool.process is not None
    pool.process.send_signal(signal.SIGSTOP)  # what the hub asks to release stays unheard
    try:
        hub.stop_aside("ada")
        until(lambda: place.pod_of("ada") is None, 10, "the pod is gone")
        until(lambda: _past_stop(hub), 5, "the hub is past stop()")
        hub.kill()
    finally:
        pool.process.send_signal(signal.SIGCONT)
    hub.start()
    hub.gone("ada")


def _past_stop(hub: KubeHub) -> bool:
    """Whether the hub's database says that no server runs."""
    with sqlite3.connect(hub.place / "jupyterhub.sqlite") as db:
        return db.execute("SELECT count(*) FROM spawners WHERE server_id IS NOT NULL").fetchone()[0] == 0


def test_killed_after_a_stop_that_failed(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """The pod runs on and nobody knows of it: its slice stays counted, its claim is asked back, and its user's next start removes it."""
    hub.spawn("ada", {"profile": "whole"})
    hub.ready("ada")
    request = hub.request_of("ada")
    with Fault(gateway, "DELETE", ONE_POD, 500, times=1000) as fault:
        hub.api("DELETE", "users/ada/server")
        fault.wait()
        hub.gone("ada")
        until(lambda: pool.state(request) == "releasing", 10, "it is asked back")
        hub.kill()
    hub.start()
    assert place.carried() == place.claimed() == {request}
    assert pool.books() == place.held()
    hub.spawn("ada", {"profile": "whole"})
    hub.ready("ada")
    assert hub.request_of("ada") != request
    consistent(place, pool, hub)
    hub.stop("ada")


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_pool_killed_around_the_creation_of_a_claim(
    hub: KubeHub, place: HubPlace, pool: Pool, pools_gateway: Gateway, when: str
) -> None:
    """Case 14: the hub asks again with the same id; the user only waits."""
    with Fault(pools_gateway, "POST", CLAIMS, after=when == "after", act=pool.kill) as fault:
        hub.spawn("ada", HALF)
        fault.wait()
    pool.start(ready=False)
    hub.ready("ada", 60)
    assert len(consistent(place, pool, hub)) == 1
    hub.stop("ada")


def test_the_pool_killed_while_servers_run_and_stop(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    hub.spawn("ada", HALF)
    hub.spawn("grace", HALF)
    hub.ready("ada")
    hub.ready("grace")
    kept = hub.request_of("grace")
    pool.kill()
    hub.api("DELETE", "users/ada/server")
    hub.gone("ada", 30)
    pool.start()
    assert consistent(place, pool, hub) == {kept}
    hub.stop("grace")
