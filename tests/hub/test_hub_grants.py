"""The grant's life in a real hub, against a pool that is slow, full or broken on demand."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_pool import FakePool
from hub_process import Hub, error_text, until

HALF = {"profile": "half"}
MORE = """
c.GPUSliceMixin.pool_timeout = 1.0
c.GPUSliceMixin.gpu_wait_timeout = 6
c.Spawner.consecutive_failure_limit = 2
setup(c, embedded=False, runtime={place!r})
"""


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    found = make_hub(MORE.format(place=str(place)))
    found.add("ada", "grace", "alan")
    return found


@pytest.fixture(autouse=True)
def clean(hub: Hub, calm_pool: FakePool) -> Iterator[FakePool]:
    yield calm_pool
    calm_pool.stall_seconds, calm_pool.full = 0.0, False
    for user in ("ada", "grace", "alan"):
        if hub.server(user):
            hub.stop(user)


def test_a_server_carries_its_grant_and_gives_it_back(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.launch_env = {"NBGPU_SOCKET": "/run/api.sock", "LD_PRELOAD": "", "PATH": "/sim/bin"}
    assert hub.spawn("ada", HALF).status_code in (201, 202)
    server = hub.ready("ada")
    assert calm_pool.states() == {"ada": "bound"}
    (request_id,) = calm_pool.held()
    request = calm_pool.grants[request_id]["request"]
    assert (request["memory_milli"], request["compute_milli"], request["mode"]) == (500, 500, "burst")
    assert request["owner"] == {"hub": "jupyterhub", "user": "ada", "server": ""}
    assert server["user_options"] == HALF
    assert server["state"]["gpu_request_id"] == request_id
    pid = server["state"]["pid"]
    assert calm_pool.bound_pids[request_id] == pid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"NBGPU_SOCKET=/run/api.sock" in environment
    assert any(line.startswith(b"PATH=/sim/bin:/") for line in environment)
    hub.stop("ada")
    assert calm_pool.held() == []


def test_cpu_only_asks_for_nothing(hub: Hub, calm_pool: FakePool) -> None:
    assert hub.spawn("ada", {"profile": "cpu"}).status_code in (201, 202)
    pid = hub.ready("ada")["state"]["pid"]
    assert not any(line.startswith(("POST /v1/requests", "POST /v1/launches")) for line in calm_pool.calls)
    assert b"NBGPU_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_server_that_dies_gives_back_without_stop(hub: Hub, calm_pool: FakePool) -> None:
    hub.spawn("ada", HALF)
    pid = hub.ready("ada")["state"]["pid"]
    os.kill(pid, 9)
    assert hub.api("DELETE", "users/ada/server").status_code in (202, 204)  # makes the hub look
    hub.gone("ada")
    assert calm_pool.held() == []


def test_refusals_say_why_and_never_count(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.refuse = (403, "Your quota is a quarter of a GPU; you ask for half.")
    for _ in range(4):  # the limit of this hub is 2 consecutive failures
        answer = hub.spawn("ada", HALF)
        assert answer.status_code == 403, answer.text
        assert answer.json()["message"] == calm_pool.refuse[1]
    page = hub.login("ada").submit({"profile": "half"})
    assert page.status_code == 403
    assert error_text(page.text) == calm_pool.refuse[1]
    calm_pool.refuse = None
    time.sleep(2.5)  # a hub that aborts does so 2 s later
    assert hub.answers()
    assert "Aborting due to" not in hub.log.read_text()
    assert hub.spawn("ada", {"profile": "cpu"}).status_code in (201, 202)
    hub.ready("ada")
    assert calm_pool.held() == []


def test_waiting_is_shown_and_ends_when_there_is_room(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    browser = hub.login("ada")
    browser.submit({"profile": "half"})
    events = browser.watch()
    later: list[dict[str, object]] = []
    until(lambda: any("1st in line" in event["message"] for event in events), 10, "the place in line is shown")
    later = browser.watch()  # a second reader starts from the beginning
    waiting = next(event for event in events if "1st in line" in event["message"])
    assert waiting["message"] == "Waiting for half of a GPU: 1st in line, usually within 4 minutes."
    assert 'action="/hub/nbgpu/leave?user=ada&amp;server="' in waiting["html_message"]
    assert "Leave the queue" in waiting["html_message"]
    until(lambda: any("1st in line" in str(event["message"]) for event in later), 5, "the second reader sees it too")
    calm_pool.admit()
    hub.ready("ada")
    until(lambda: any(event.get("ready") for event in events), 10, "the progress ends")
    assert [event["message"] for event in events].count("The GPU is yours. Your server is starting; that takes some seconds.") == 1
    assert any("Got half of a GPU" in event["message"] for event in events)


def test_leaving_the_queue_ends_the_start(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    browser = hub.login("ada")
    browser.submit({"profile": "half"})
    until(lambda: calm_pool.states().get("ada") == "queued", 10, "ada waits")
    assert browser.http.post("nbgpu/leave").status_code == 403, "without the XSRF token"
    token = browser.token(browser.http.get("home").text)
    page = browser.http.post("nbgpu/leave", data={"_xsrf": token})
    assert "How much of a GPU do you need?" in page.text
    hub.gone("ada", 5)
    assert calm_pool.held() == []
    assert hub.spawn("ada", {"profile": "cpu"}).status_code in (201, 202)
    hub.ready("ada")


def test_nobody_leaves_for_another(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    hub.login("ada").submit({"profile": "half"})
    until(lambda: calm_pool.states().get("ada") == "queued", 10, "ada waits")
    grace = hub.login("grace")
    token = grace.token(grace.http.get("home").text)
    assert grace.http.post("nbgpu/leave?user=ada", data={"_xsrf": token}).status_code in (403, 404)
    assert grace.http.get("api/nbgpu/availability?user=ada", headers={"X-XSRFToken": token}).status_code in (403, 404)
    assert calm_pool.states()["ada"] == "queued"


def test_cancel_while_queued_releases(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    hub.spawn("ada", HALF)
    until(lambda: calm_pool.states().get("ada") == "queued", 10, "ada waits")
    assert hub.api("DELETE", "users/ada/server").status_code in (202, 204)
    hub.gone("ada")
    until(lambda: calm_pool.held() == [], 5, "nothing is held")


def test_cancel_inside_the_call_that_grants_releases(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.stall_seconds = 0.6  # each call takes so long: the cancel lands inside one, and the grant is never seen by the spawner
    hub.spawn_aside("ada", HALF)
    until(lambda: "POST /v1/launches" in calm_pool.calls or calm_pool.states(), 10, "the pool was asked")
    assert hub.api("DELETE", "users/ada/server").status_code in (202, 204)
    calm_pool.stall_seconds = 0
    hub.gone("ada")
    until(lambda: calm_pool.held() == [], 5, "nothing is held")


def test_no_room_in_time_is_said(make_hub: Callable[..., Hub], hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    browser = hub.login("alan")
    browser.submit({"profile": "half"})
    events = browser.watch(40)
    failed = until(lambda: next((event for event in events if event.get("failed")), None), 35, "the wait ends")
    assert "There was no room for half of a GPU within 6 seconds." in failed["message"]
    assert "start without a GPU" in failed["message"]
    hub.gone("alan", 5)
    assert calm_pool.held() == []


def test_pool_down_is_said_in_plain_words(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.stall_seconds = 3  # longer than pool_timeout
    answer = hub.spawn("ada", HALF)
    events = hub.login("ada").watch()
    if answer.status_code == 202:
        failed = until(lambda: next((event for event in events if event.get("failed")), None), 30, "it fails")
        text = failed["message"]
    else:
        assert answer.status_code == 503
        text = answer.json()["message"]
    assert "The GPU pool does not answer" in text
    assert "Traceback" not in text
    hub.gone("ada")
    browser = hub.login("ada")
    page = browser.form()
    assert "The GPU pool does not answer" in page
    assert "Nobody knows now whether it is free" in page
    calm_pool.stall_seconds = 0
    assert hub.spawn("ada", {"profile": "cpu"}).status_code in (201, 202)
    hub.ready("ada")
    hub.stop("ada")
    assert hub.spawn("ada", HALF).status_code in (201, 202)
    hub.ready("ada")


def test_a_token_that_the_pool_does_not_know_is_told_apart_from_a_pool_that_is_away(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.refuse = (401, "Who are you?")
    answer = hub.spawn("ada", HALF)
    events = hub.login("ada").watch()
    text = answer.json()["message"] if answer.status_code == 503 else ""
    if not text:
        text = until(lambda: next((event for event in events if event.get("failed")), None), 30, "it fails")["message"]
    assert "does not accept this hub's token" in text
    assert "does not answer" not in text
    assert f"the GPU pool at {calm_pool.path} does not answer: HTTP 401" in hub.log.read_text()
    calm_pool.refuse = None
    hub.gone("ada")
    assert hub.spawn("ada", HALF).status_code in (201, 202)
    hub.ready("ada")


def test_a_pool_that_restarts_costs_only_time(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.fail_next.update({"requests": 1, "bind": 1})
    hub.spawn("ada", HALF)
    hub.ready("ada")
    assert calm_pool.states() == {"ada": "bound"}


def test_a_pool_that_forgot_the_queue_is_asked_again(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    hub.spawn("ada", HALF)
    (request_id,) = until(calm_pool.held, 10, "ada waits")
    with calm_pool.lock:
        calm_pool.grants.clear()
        calm_pool.full = False
    hub.ready("ada")
    assert calm_pool.held() == [request_id], "the same request, not a second one"


def test_prepare_refused_gives_back_and_starts_nothing(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.prepare_refused = "The GPU node refused the slice."
    answer = hub.spawn("ada", HALF)
    assert answer.status_code == 503, answer.text
    assert answer.json()["message"] == "The GPU node refused the slice."
    assert calm_pool.held() == []


def test_killed_while_waiting_nothing_stays(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = True
    hub.spawn("ada", HALF)
    until(lambda: calm_pool.states().get("ada") == "queued", 10, "ada waits")
    hub.kill()
    hub.start()
    until(lambda: calm_pool.held() == [], 10, "the new hub released what the old one asked for")
    hub.gone("ada")


SLOW_SAVE = """
import nbgpu_spawner.local as local
if __import__("os").path.exists({flag!r}):  # the control: without what holds a server back
    import contextlib
    local.LocalGPUMixin._held_back = lambda self: contextlib.nullcontext(lambda: None)
async def save(self, where):
    open({there!r}, "w").write(str(self.pid))
    __import__("time").sleep(60)
local.LocalGPUMixin._save_address = save
"""


def servers_of(hub: Hub) -> list[int]:
    """Return the living processes that were started as servers of ada."""
    found = []
    for pid in hub.left():
        with contextlib.suppress(OSError):
            if b"JUPYTERHUB_USER=ada\0" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def test_killed_before_the_server_is_known_it_ends_too(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.fail_next["bind"] = 1000  # keeps the start inside bind, after the process lives
    hub.spawn_aside("ada", HALF)
    # the second time: while the pool is asked first, the hub saves what it asked for; before that the reservation's TTL answers for it
    until(lambda: sum(line.endswith("/bind") for line in calm_pool.calls) > 1, 10, "the server's process lives")
    assert servers_of(hub)
    hub.kill()
    until(lambda: not servers_of(hub), 5, "the process of a server that is in no slice has ended")
    calm_pool.fail_next.clear()
    hub.start()
    hub.gone("ada")
    until(lambda: calm_pool.held() == [], 5, "nothing is held")
    hub.spawn("ada", HALF)
    hub.ready("ada")


@pytest.mark.parametrize("held_back", [True, False])
def test_a_server_that_nobody_knows_of_does_not_run(hub: Hub, calm_pool: FakePool, place: Path, held_back: bool) -> None:
    """Killed between the server's start and the first word of it in the database; the control leaves an orphan."""
    flag, there, config = place / "control", place / "there", place / "config.py"
    plain = config.read_text()
    if not held_back:
        flag.touch()
    try:
        hub.kill()
        config.write_text(plain + SLOW_SAVE.format(flag=str(flag), there=str(there)))
        hub.start()
        hub.spawn_aside("ada", HALF)
        until(there.exists, 20, "the server's process lives")
        hub.kill()
        if held_back:
            until(lambda: not servers_of(hub), 5, "it has ended with its hub")
        else:
            time.sleep(2)
            assert servers_of(hub) == [int(there.read_text())], "nobody would end it"
    finally:
        for pid in servers_of(hub):
            os.kill(pid, 9)
        there.unlink(missing_ok=True)
        flag.unlink(missing_ok=True)
        config.write_text(plain)
        hub.start()
    hub.gone("ada")
    hub.spawn("ada", HALF)  # asks back what that owner still holds; without it the reservation's TTL does
    hub.ready("ada")
    assert len(calm_pool.held()) == 1


def test_killed_and_restarted_running_servers_keep_their_grants(hub: Hub, calm_pool: FakePool) -> None:
    hub.spawn("grace", HALF)
    before = hub.ready("grace")["state"]
    hub.kill()
    hub.start()
    assert hub.ready("grace")["state"] == before
    assert calm_pool.states()["grace"] == "bound"
    hub.stop("grace")
    assert calm_pool.held() == []
