"""A hub on a cluster: starts and stops, what goes wrong in them, and who gives up. The hub has the rights of z2jh's hub and no more.

The numbers are those of the table in docs/kubernetes.md. After each test pods that live, claims, the pool's books and the hub's
servers agree. The pods "run" on nodes that are objects only; API server, scheduler, controllers, hub and pool are real.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
from gateway_kit import Gateway
from hub_kit import Fault, HubPlace, KubeHub, clean, consistent, gateway_of_hub, until
from pool_kit import Pool

from nbgpu.kube import path

pytestmark = [pytest.mark.kubernetes]
PYTHONS = {"hub6": sys.executable, "hub5": os.environ.get("NBGPU_HUB55_PYTHON", "")}
USERS = ("ada", "grace", "alan", "edsger")
CREATE, ONE_POD = r"/pods$", r"/pods/jupyter-"


@pytest.fixture(scope="module")
def place() -> Iterator[HubPlace]:
    place = HubPlace()
    place.start()
    yield place
    place.stop()


@pytest.fixture(scope="module")
def pool(place: HubPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    quotas = {"users": {"edsger": {"limit": "1/4"}}}
    yield Pool(place, tmp_path_factory.mktemp("pool"), reservation_ttl_seconds=6, quotas=quotas).start()
    Pool.stop_all()


@pytest.fixture(scope="module")
def gateway(place: HubPlace) -> Iterator[Gateway]:
    gateway = gateway_of_hub(place)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module", params=["hub6", "hub5"])
def hub(
    request: pytest.FixtureRequest, place: HubPlace, pool: Pool, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KubeHub]:
    python = PYTHONS[request.param]
    if not python:
        pytest.skip("NBGPU_HUB55_PYTHON names no Python with JupyterHub 5.5")
    hub = KubeHub(tmp_path_factory.mktemp("hub"), place, pool, gateway, python)
    hub.start()
    hub.add(*USERS)
    yield hub
    hub.end()
    print(pool.log()[-5000:], hub.story(), sep="\n")  # shown when the last test has failed
    clean(place)


@pytest.fixture(autouse=True)
def agreed(place: HubPlace, pool: Pool, hub: KubeHub) -> Iterator[None]:
    """Everything agrees after each test, and again when all servers are stopped."""
    place.wait_for_rules()
    yield
    place.pending.clear()
    place.deaf.clear()
    consistent(place, pool, hub)
    for user in USERS:
        for name, server in hub.api("GET", f"users/{user}").json()["servers"].items():
            if server is not None:
                hub.api("DELETE", f"users/{user}/servers/{name}" if name else f"users/{user}/server")
        until(lambda user=user: not hub.api("GET", f"users/{user}").json()["servers"], 30, f"{user}'s servers to end")
    assert consistent(place, pool, hub) == set()


def served(hub: KubeHub, user: str, profile: str = "quarter") -> str:
    """Return the request id of a server that is ready."""
    assert hub.spawn(user, {"profile": profile}).status_code in (201, 202)
    hub.ready(user)
    return hub.request_of(user)


# -- 1: a life


def test_a_normal_start_and_stop(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 1: what the user sees, what the pod says, and what is left."""
    browser = hub.login("ada")
    place.silent.update(place.nodes)  # until the page has told of it, the pod waits for its kubelet
    browser.submit({"profile": "half"})
    events = browser.watch()
    until(lambda: [one for one in events if "to start your server" in one["message"]], 20, "the page says what it waits for")
    place.wake()
    hub.ready("ada")
    request = hub.request_of("ada")
    assert consistent(place, pool, hub) == {request}
    assert pool.state(request) == "bound"
    pod = place.pod_of("ada")
    assert pod is not None
    assert pod["spec"]["resourceClaims"] == [{"name": "nbgpu", "resourceClaimName": f"nbgpu-{request}"}]
    assert pod["spec"]["containers"][0]["resources"]["claims"] == [{"name": "nbgpu"}]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in pod["spec"]["containers"][0]["env"]
    claim = place.claim(request)
    assert claim is not None
    assert [one["name"] for one in claim["status"]["reservedFor"]] == [pod["metadata"]["name"]]
    words = [event["message"] for event in events]
    node = pool.http.get(f"/v1/requests/{request}").json()["slice"]["node"]
    assert any(f"Waiting for {node} to start your server." in one for one in words), words
    hub.stop("ada")
    assert place.pods() == []
    assert consistent(place, pool, hub) == set()


def test_servers_without_a_gpu_and_with_options_and_names(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Named servers hold slices of their own; choices of a profile count; a server without a GPU holds nothing."""
    served(hub, "ada", "cpu")
    assert place.claimed() == set()
    assert hub.api("POST", "users/ada/servers/two", {"profile": "sized", "gpu": "large"}).status_code in (201, 202)
    assert hub.api("POST", "users/ada/servers/three", {"profile": "custom", "gpu_memory": "8 GiB"}).status_code in (201, 202)
    servers = until(
        lambda: (found := hub.api("GET", "users/ada").json()["servers"]) and all(one["ready"] for one in found.values()) and found, 30
    )
    assert len(servers) == 3
    wanted = {
        name: pool.http.get(f"/v1/requests/{one['state']['gpu_request_id']}").json()["slice"] for name, one in servers.items() if name
    }
    assert wanted["two"]["devices"][0]["compute_milli"] == 500
    assert wanted["three"]["devices"][0]["memory_bytes"] == 8 * 1024**3
    assert {one["owner"]["server"] for one in wanted.values()} == {"two", "three"}
    assert len(consistent(place, pool, hub)) == 2


def test_restart_of_the_hub_and_of_a_server(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """A hub that is replaced keeps what runs; a server that is stopped and started gets a slice of its own anew."""
    first = served(hub, "ada")
    hub.kill()
    hub.start()
    assert hub.ready("ada")["state"]["gpu_request_id"] == first
    hub.stop("ada")
    assert served(hub, "ada") != first


# -- 2, 3, 4: the pool refuses, or makes wait


def test_the_pool_refuses(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 2: quota and too big, the same words from REST and form; six in a row do not stop a hub whose limit is four failures."""
    for _ in range(6):
        answer = hub.spawn("edsger", {"profile": "half"})
        assert answer.status_code == 403, answer.text
        assert "limit" in answer.json()["message"] or "quota" in answer.json()["message"]
    page = hub.login("edsger").submit({"profile": "half"})
    assert page.status_code == 403
    assert answer.json()["message"] in page.text.replace("&#39;", "'")
    answer = hub.spawn("ada", {"profile": "custom", "gpu_fraction": "1/4", "gpu_count": "3"})
    assert answer.status_code == 400, answer.text
    assert "GPUs of one machine" in answer.json()["message"] or "Number of GPUs" in answer.json()["message"]
    time.sleep(2.5)  # a hub that aborts does so 2 s later
    assert hub.answers()
    served(hub, "edsger", "cpu")


def test_waits_then_gets(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 3."""
    served(hub, "ada", "whole")
    served(hub, "grace", "whole")
    browser = hub.login("alan")
    browser.submit({"profile": "half"})
    events = browser.watch(40)
    until(lambda: any("1st in line" in event["message"] for event in events), 15, "the place in line")
    assert len(place.claimed()) == 2
    hub.stop("grace")
    hub.ready("alan")
    assert consistent(place, pool, hub) == {hub.request_of("ada"), hub.request_of("alan")}
    until(lambda: any(event.get("ready") for event in events), 10, "the progress ends")
    assert any("Got half of a GPU" in event["message"] for event in events)


def test_cancelled_while_queued(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 4, by the hub's stop and by the button."""
    served(hub, "ada", "whole")
    served(hub, "grace", "whole")
    hub.spawn("alan", {"profile": "half"})
    until(lambda: "queued" in {one["state"] for one in pool.http.get("/v1/requests").json()}, 15, "alan waits")
    assert hub.api("DELETE", "users/alan/server").status_code in (202, 204)
    hub.gone("alan")
    assert len(consistent(place, pool, hub)) == 2
    browser = hub.login("alan")
    browser.submit({"profile": "half"})
    until(lambda: "queued" in {one["state"] for one in pool.http.get("/v1/requests").json()}, 15, "alan waits")
    browser.http.post("nbgpu/leave", data={"_xsrf": browser.token(browser.http.get("home").text)})
    hub.gone("alan", 5)
    assert len(consistent(place, pool, hub)) == 2


# -- 5, 6, 7, 8: cut short, or never up


def test_cancelled_before_the_pod_exists(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """Case 5: the API server never hears of the pod."""
    with Fault(gateway, "POST", CREATE, 500, hold=True) as fault:
        hub.spawn_aside("ada", {"profile": "half"})
        fault.wait()
        assert len(place.claimed()) == 1
        assert hub.api("DELETE", "users/ada/server").status_code in (202, 204)
        hub.gone("ada")
    assert consistent(place, pool, hub) == set()


def test_an_orphan_that_appears_late(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """Case 13: the pod of a start that was given up is committed afterwards. It never runs, and the hub removes it."""
    with Fault(gateway, "POST", CREATE, hold=True) as fault:
        hub.spawn_aside("ada", {"profile": "half"})
        fault.wait()
        assert hub.api("DELETE", "users/ada/server").status_code in (202, 204)
        hub.gone("ada")
        until(lambda: place.claimed() == set(), 10, "the claim is given back")
        fault.go_on.set()
        orphan = until(lambda: place.pod_of("ada"), 10, "the orphan")
    assert orphan["status"]["phase"] == "Pending"
    until(lambda: place.pod_of("ada") is None, 15, "the hub to remove it")
    served(hub, "ada")


def test_start_timeout_with_the_pod_pending(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 6."""
    place.pending.add("ada")
    hub.spawn("ada", {"profile": "hasty"})
    until(lambda: place.carried(), 10, "the pod is there")
    hub.gone("ada", 20)
    assert place.pods() == []
    assert consistent(place, pool, hub) == set()


def test_a_server_that_never_answers(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 7."""
    place.deaf.add("ada")
    hub.spawn("ada", {"profile": "curt"})
    until(lambda: place.carried(), 10, "the pod is there")
    hub.gone("ada", 20)
    assert place.pods() == []
    assert consistent(place, pool, hub) == set()


def test_evicted(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 8: the hub never calls stop(); the pod stays as Failed, and the next start removes it."""
    request = served(hub, "ada")
    place.evict("ada")
    hub.gone("ada", 20)
    assert consistent(place, pool, hub) == set()
    assert (place.pod_of("ada") or {})["status"]["phase"] == "Failed"
    assert served(hub, "ada") != request


def test_deleted_by_hand(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 8."""
    served(hub, "ada")
    place.delete("ada")
    hub.gone("ada", 20)
    assert consistent(place, pool, hub) == set()


def test_a_container_that_ends(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """The hub's poll deletes the pod and releases; then stop, which does not release a second time what is another's by then."""
    served(hub, "ada")
    pod = place.pod_of("ada")
    assert pod is not None
    ended = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    place.set_status(
        pod, {"phase": "Succeeded", "containerStatuses": [{**pod["status"]["containerStatuses"][0], "ready": False, "state": ended}]}
    )
    hub.gone("ada", 20)
    until(lambda: place.pods() == [], 10, "the hub deletes it")
    assert consistent(place, pool, hub) == set()


# -- the scheduler, the API server


def test_no_cpu_left_is_said_in_plain_words(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    browser = hub.login("ada")
    browser.submit({"profile": "big"})
    events = browser.watch(20)
    told = until(lambda: [event["message"] for event in events if "CPU" in event["message"]], 15, "what lacks")
    assert not told[-1].startswith("0/"), told
    assert hub.api("DELETE", "users/ada/server").status_code in (202, 204)
    hub.gone("ada")


def test_a_pod_of_that_name_is_there_already(hub: KubeHub, place: HubPlace, pool: Pool) -> None:
    """Case 10: what a hub that lost its memory left runs with a whole device, and both are taken; the new start gets its turn."""
    first = served(hub, "ada", "whole")
    served(hub, "grace", "whole")
    hub.kill()
    database = hub.place / "jupyterhub.sqlite"
    import sqlite3

    with sqlite3.connect(database) as db:
        db.execute("UPDATE spawners SET server_id = NULL, state = '{}' WHERE user_id = (SELECT id FROM users WHERE name = 'ada')")
    hub.start()
    assert first in place.carried()
    second = served(hub, "ada", "whole")
    assert second != first
    assert consistent(place, pool, hub) == {second, hub.request_of("grace")}


def test_a_pod_that_shows_up_while_it_is_made(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """Case 10: 409 at creation: KubeSpawner's stop() runs inside start(), and the grant lives through it."""

    def other() -> None:
        pod = {
            "metadata": {
                "name": "jupyter-ada",
                "labels": {"component": "singleuser-server"},
                "annotations": {"hub.jupyter.org/username": "x"},
            },
            "spec": {"containers": [{"name": "notebook", "image": "localhost/none:1"}], "nodeSelector": {"nobody": "has"}},
        }
        place.do(place.kube.create(path("v1", "pods", place.namespace), pod))

    with Fault(gateway, "POST", CREATE, act=other) as fault:
        hub.spawn("ada", {"profile": "half"})
        fault.wait()
        (claimed,) = place.claimed()
        uid = (place.claim(claimed) or {})["metadata"]["uid"]
        hub.ready("ada")
    assert hub.request_of("ada") == claimed
    assert (place.claim(claimed) or {})["metadata"]["uid"] == uid, "the very same claim"


@pytest.mark.parametrize("answer", [None, 500, "drop"])
def test_a_creation_that_is_answered_late_or_wrongly(
    hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway, answer: int | str | None
) -> None:
    """Case 10: the pod is made and runs, the hub does not know; it deletes that pod and makes it once more, with the same claim."""
    with Fault(gateway, "POST", CREATE, answer, after=True, hold=True) as fault:
        hub.spawn("ada", {"profile": "half"})
        fault.wait()
        pod = until(lambda: (found := place.pod_of("ada")) and found["status"].get("phase") == "Running" and found, 10, "it runs")
        (claimed,) = place.claimed()
        if answer is None:
            time.sleep(2.5)  # longer than k8s_api_request_timeout
        fault.go_on.set()
        hub.ready("ada")
    now = place.pod_of("ada")
    assert now is not None
    assert now["metadata"]["uid"] != pod["metadata"]["uid"]
    assert hub.request_of("ada") == claimed
    assert consistent(place, pool, hub) == {claimed}


def test_a_stop_that_fails(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """Case 11: the pod runs on, so its slice is nobody else's, though hub and pool were told to give it back; then it is removed."""
    first = served(hub, "ada", "whole")
    other = served(hub, "grace", "whole")
    with Fault(gateway, "DELETE", ONE_POD, 500, times=1000) as fault:
        hub.api("DELETE", "users/ada/server")
        fault.wait()
        hub.gone("ada")
        until(lambda: pool.state(first) == "releasing", 10, "it is asked back")
        hub.spawn("alan", {"profile": "whole"})
        until(lambda: "queued" in {one["state"] for one in pool.http.get("/v1/requests").json()}, 10, "alan waits")
        time.sleep(2)
        assert place.carried() == {first, other} == place.claimed()
        assert pool.books() == place.held()
    hub.ready("alan")
    assert consistent(place, pool, hub) == {other, hub.request_of("alan")}


def test_the_api_server_away_while_a_server_starts(hub: KubeHub, place: HubPlace, pool: Pool, gateway: Gateway) -> None:
    """A start goes on when the API server is back, and says meanwhile what it waits for."""
    with Fault(gateway, "POST", CREATE, 503, times=1000) as fault:
        browser = hub.login("ada")
        browser.submit({"profile": "half"})
        events = browser.watch(40)
        fault.wait()
        until(lambda: any("Kubernetes does not answer; trying again." in event["message"] for event in events), 10, "it is said")
        time.sleep(3)
    hub.ready("ada")


def test_the_hub_has_no_other_rights(hub: KubeHub, place: HubPlace) -> None:
    """The control of this whole file: what z2jh's Role does not give is refused."""
    kube = place.do(place.as_hub())
    try:
        for where, body in (
            (path("resource.k8s.io/v1", "resourceclaims", place.namespace), {"metadata": {"name": "x"}, "spec": {}}),
            (path("v1", "namespaces"), {"metadata": {"name": "x"}}),
        ):
            with pytest.raises(Exception, match="forbidden"):
                place.do(kube.create(where, body))
        with pytest.raises(Exception, match="forbidden"):
            place.do(kube.get(path("v1", "nodes")))
    finally:
        place.do(kube.close())
