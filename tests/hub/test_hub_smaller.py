"""A smaller share in place of the one that is waited for: whatever goes wrong, nobody loses both, and nothing is held that nobody has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fake_pool import FakePool
from hub_process import Browser, Hub, until

SMALL = '{"profile": "eighth"}'
MORE = """
c.GPUSliceMixin.pool_timeout = 1.0
c.GPUSliceMixin.gpu_wait_timeout = 30
def hook(spawner):
    if spawner.user.name == "alan" and spawner.user_options.get("profile") == "eighth":
        raise RuntimeError("the hook fails")
c.Spawner.pre_spawn_hook = hook
c.JupyterHub.allow_named_servers = True
setup(c, embedded=False, runtime={place!r})
"""


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    found = make_hub(MORE.format(place=str(place)))
    found.add("ada", "grace", "alan")
    return found


@pytest.fixture
def ada(hub: Hub, calm_pool: FakePool) -> Iterator[Browser]:
    """Waits for half a GPU while an eighth is free."""
    calm_pool.full = calm_pool.small_free = True
    browser = wait_as(hub, calm_pool, "ada")
    yield browser
    calm_pool.fail_next.clear()
    if hub.server("ada"):
        hub.stop("ada")


def wait_as(hub: Hub, pool: FakePool, user: str) -> Browser:
    browser = hub.login(user)
    browser.submit({"profile": "half"})
    until(lambda: pool.states().get(user) == "queued", 10, f"{user} waits")
    return browser


def take(browser: Browser, choice: str, path: str = "nbgpu/smaller") -> httpx.Response:
    token = browser.token(browser.http.get("home").text)
    return browser.http.post(path, data={"_xsrf": token, "choice": choice})


def still_waits(hub: Hub, pool: FakePool, user: str = "ada") -> bool:
    server = hub.server(user)
    return pool.states()[user] == "queued" and server is not None and server["pending"] == "spawn" and len(pool.held()) == 1


def test_it_starts_with_the_smaller_one(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    assert take(ada, SMALL).status_code == 200
    server = hub.ready("ada")
    (request_id,) = calm_pool.held()
    assert server["state"]["gpu_request_id"] == request_id
    assert server["user_options"] == {"profile": "eighth"}, "what the next start begins with"
    assert calm_pool.grants[request_id]["request"]["memory_milli"] == 125
    log = hub.log.read_text()
    assert "You took a smaller share instead." in log
    assert "Traceback" not in log


def test_an_answer_of_the_pool_that_is_lost_loses_nothing(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    calm_pool.fail_next["replace"] = 1
    assert take(ada, SMALL).status_code == 200
    assert hub.ready("ada")["user_options"] == {"profile": "eighth"}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ('{"profile": "custom", "gpu_fraction": "7/2"}', "Share of a GPU is &#39;7/2&#39;; it must be"),
        ('{"profile": "gone"}', "Profile is &#39;gone&#39;; it must be one of"),
        ('{"profile": "cpu"}', "to start without one, leave the queue"),
    ],
)
def test_what_cannot_be_is_said_and_the_place_kept(hub: Hub, ada: Browser, calm_pool: FakePool, choice: str, words: str) -> None:
    page = take(ada, choice)
    assert page.status_code == 200
    assert words in page.text
    assert still_waits(hub, calm_pool)


def test_a_pool_that_is_away_costs_nobody_their_place(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    calm_pool.fail_next["replace"] = 1000
    page = take(ada, SMALL)
    assert "The pool is starting." in page.text
    assert still_waits(hub, calm_pool)
    calm_pool.admit()
    hub.ready("ada")
    assert len(calm_pool.held()) == 1


def test_two_clicks_take_one(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    """At once, while the pool is slow: the second asks for nothing, and takes nothing from the first."""
    token = ada.token(ada.http.get("home").text)
    before = len(calm_pool.calls)
    calm_pool.stall_seconds = 0.4

    def click(_: int) -> int:
        return ada.http.post("nbgpu/smaller", data={"_xsrf": token, "choice": SMALL}, follow_redirects=False).status_code

    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(click, range(4))) == [302] * 4
    finally:
        calm_pool.stall_seconds = 0.0
    assert hub.ready("ada")["user_options"] == {"profile": "eighth"}
    assert sum(call.endswith("/replace") for call in calm_pool.calls[before:]) == 1
    assert len(calm_pool.held()) == 1


def test_only_ones_own_and_only_with_the_token(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    assert ada.http.post("nbgpu/smaller", data={"choice": SMALL}).status_code == 403
    grace = hub.login("grace")
    assert take(grace, SMALL, "nbgpu/smaller?user=ada").status_code in (403, 404)
    assert take(ada, "half").status_code == 400
    assert take(ada, SMALL, "nbgpu/smaller?user=ada&server=none").status_code == 404
    assert still_waits(hub, calm_pool)


def test_a_start_that_fails_after_it_holds_nothing(hub: Hub, calm_pool: FakePool) -> None:
    calm_pool.full = calm_pool.small_free = True
    alan = wait_as(hub, calm_pool, "alan")
    page = take(alan, SMALL)
    assert page.status_code == 500
    hub.gone("alan")
    until(lambda: calm_pool.held() == [], 5, "nothing is held")


def test_who_got_their_place_meanwhile_keeps_it(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    calm_pool.admit()
    hub.ready("ada")
    (request_id,) = calm_pool.held()
    take(ada, SMALL)
    assert calm_pool.held() == [request_id]
    assert hub.ready("ada")["user_options"] == {"profile": "half"}
