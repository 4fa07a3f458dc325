"""What one user may try at the hub against another: their start page, their place in the queue; and names made to break things."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from fake_pool import FakePool
from hub_process import Browser, Hub, until

pytestmark = pytest.mark.timeout(120)
ODD = ["<img src=x onerror=alert(1)>\"'[red]x", "\u202egnp \u00fcn\u00ef\u2603", "a%2fb?c=d&e", "x\x1b[2J"]


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    more = "\n".join(
        [
            "c.Authenticator.admin_users = {'boss'}",
            "c.JupyterHub.allow_named_servers = True",
            "c.Spawner.start_timeout = 120",
            f"setup(c, embedded=False, runtime={str(place)!r})",
        ]
    )
    found = make_hub(more)
    found.add("ada", "grace")
    return found


@pytest.fixture(scope="module")
def ada(hub: Hub) -> Browser:
    return hub.login("ada")


@pytest.fixture(scope="module")
def boss(hub: Hub) -> Browser:
    return hub.login("boss")


def availability(browser: Browser, user: str) -> httpx.Response:
    headers = {"X-XSRFToken": browser.token(browser.http.get("home").text), "Sec-Fetch-Mode": "cors"}
    return browser.http.get("api/nbgpu/availability", params={"user": user}, headers=headers)


def leave(browser: Browser, user: str, server: str = "", token: str | None = None) -> httpx.Response:
    xsrf = browser.token(browser.http.get("home").text) if token is None else token
    return browser.http.post(
        "nbgpu/leave", params={"user": user, "server": server}, data={"_xsrf": xsrf} if xsrf else {}, follow_redirects=False
    )


def test_availability_is_for_who_may_see_the_servers(hub: Hub, ada: Browser, boss: Browser, calm_pool: FakePool) -> None:
    mine = availability(ada, "ada")
    assert mine.status_code == 200
    assert mine.headers["cache-control"] == "no-store"
    theirs, unknown = availability(ada, "grace"), availability(ada, "nobody-of-that-name")
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.text.replace("grace", "") == unknown.text.replace("nobody-of-that-name", ""), "nor does it tell who exists"
    assert availability(boss, "grace").status_code == 200, "control: with the right it is answered"
    assert httpx.get(hub.url + "api/nbgpu/availability", params={"user": "ada"}).status_code == 403, "nobody"
    bad = httpx.get(hub.url + "api/nbgpu/availability", params={"user": "ada"}, headers={"Authorization": "token wrong"})
    assert bad.status_code == 403


@pytest.fixture
def grace_waits(hub: Hub, calm_pool: FakePool) -> None:
    """Grace's start waits in the queue."""
    calm_pool.full = True
    hub.spawn("grace", {"profile": "half"})
    until(lambda: any(one["state"] == "queued" for one in calm_pool.grants.values()), 10, "grace waits")


def queued(pool: FakePool) -> int:
    with pool.lock:
        return sum(one["state"] == "queued" for one in pool.grants.values())


def test_nobody_throws_another_out_of_the_queue(hub: Hub, ada: Browser, boss: Browser, calm_pool: FakePool, grace_waits: None) -> None:
    grace = hub.login("grace")
    attempts = {
        "another user": leave(ada, "grace"),
        "without XSRF": leave(grace, "grace", token=""),
        "with another's XSRF": leave(grace, "grace", token=ada.token(ada.http.get("home").text)),
        "by GET": grace.http.get("nbgpu/leave", params={"user": "grace"}, follow_redirects=False),
        "by GET, as a form": grace.http.get("nbgpu/leave", params={"user": "grace", "_xsrf": grace.token(grace.http.get("home").text)}),
        "not logged in": httpx.post(hub.url + "nbgpu/leave", params={"user": "grace"}, follow_redirects=False),
    }
    said = {what: answer.status_code for what, answer in attempts.items()}
    assert said["another user"] in (403, 404), said
    assert said["without XSRF"] == said["with another's XSRF"] == 403, said
    assert said["by GET"] == said["by GET, as a form"] == 405, said
    assert said["not logged in"] in (302, 403), said
    assert queued(calm_pool) == 1, "she is where she was"
    assert leave(boss, "grace").status_code == 302, "control: an admin may"
    until(lambda: queued(calm_pool) == 0, 10, "she has left")
    hub.gone("grace")


def test_who_waits_may_leave(hub: Hub, calm_pool: FakePool, grace_waits: None) -> None:
    grace = hub.login("grace")
    assert leave(grace, "grace", "no-such-server").status_code == 404
    answer = leave(grace, "grace")
    assert answer.status_code == 302
    assert answer.headers["location"].startswith("/hub/"), "to this hub and nowhere else"
    until(lambda: queued(calm_pool) == 0, 10, "she has left")
    hub.gone("grace")


def resize(hub: Hub, token: str, user: str, share: str = "1/2") -> httpx.Response:
    return hub.api("POST", f"nbgpu/resize?user={user}", {"gpu_fraction": share}, token)


def test_a_server_may_ask_for_another_size_of_its_own_slice_only(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    """With the token that every server has; what it gets is the pool's word."""
    tokens: dict[str, str] = {}
    for user in ("ada", "grace"):
        hub.spawn(user, {"profile": "quarter"})
        hub.ready(user)
        tokens[user] = httpx.get(hub.url.replace("/hub/", f"/user/{user}/env")).json()["JUPYTERHUB_API_TOKEN"]

    def milli() -> list[int]:
        with calm_pool.lock:
            return sorted(one["slice"]["devices"][0]["compute_milli"] for one in calm_pool.grants.values() if one["state"] == "bound")

    try:
        refused = {
            "another's": resize(hub, tokens["ada"], "grace"),
            "no such user": resize(hub, tokens["ada"], "nobody-of-that-name"),
            "no such server": hub.api("POST", "nbgpu/resize?user=ada&server=x", {"gpu_fraction": "1"}, tokens["ada"]),
            "nobody": resize(hub, "wrong", "ada"),
            "a page without XSRF": ada.http.post("api/nbgpu/resize", json={"gpu_fraction": "1"}),
        }
        assert {what: answer.status_code for what, answer in refused.items()} == {
            "another's": 404, "no such user": 404, "no such server": 404, "nobody": 403, "a page without XSRF": 403,
        }  # fmt: skip
        for what, answer in (("another's", hub.api("GET", "nbgpu/resize?user=grace", None, tokens["ada"])),
                             ("nobody", hub.api("GET", "nbgpu/resize?user=ada", None, "wrong"))):  # fmt: skip
            assert answer.status_code in (403, 404), what
            assert "free" not in answer.text
        assert hub.api("GET", "nbgpu/resize?user=ada", None, tokens["ada"]).status_code == 200, "control: its own"
        assert milli() == [250, 250]
        answer = resize(hub, tokens["ada"], "ada")
        assert answer.status_code == 200, "control: its own"
        assert (answer.json()["in_force"], answer.json()["devices"][0]["compute_milli"]) == (True, 500)
        assert milli() == [250, 500]
        assert resize(hub, tokens["ada"], "ada").status_code == 429, "not without pause"
        calm_pool.refuse = 403, "Your quota is half a GPU."
        refusal = resize(hub, tokens["grace"], "grace", "1")
        assert (refusal.status_code, refusal.json()["error"]["message"]) == (403, "Your quota is half a GPU.")
        assert milli() == [250, 500]
        junk = hub.api("POST", "nbgpu/resize?user=grace", {"gpu_fraction": "7"}, tokens["grace"])
        assert (junk.status_code, junk.json()["error"]["field"]) == (400, "gpu_fraction")
        for body in (
            "[" * 1500,
            "NaN",
            '{"gpu_fraction": -1}',
            '{"gpu_fraction": NaN}',
            '{"gpu_memory": 1e999}',
            '{"gpu_fraction": {"a": []}}',
        ):
            junk = httpx.post(
                f"{hub.url}api/nbgpu/resize?user=grace", content=body, headers={"Authorization": f"token {tokens['grace']}"}, timeout=10
            )
            assert (junk.status_code, junk.json()["error"]["code"]) == (400, "invalid"), body
        asked = len(calm_pool.calls)
        calm_pool.refuse = None
        time.sleep(2.1)  # the pause is over
        with ThreadPoolExecutor(20) as threads:
            answers = [one.status_code for one in threads.map(lambda _: resize(hub, tokens["grace"], "grace"), range(50))]
        assert sorted(answers) == [200] + [429] * 49, "50 at once are one"
        assert sum(call.endswith("/resize") for call in calm_pool.calls[asked:]) == 1
        with calm_pool.lock:
            theirs = next(one for one in calm_pool.grants.values() if one["request"]["owner"]["user"] == "grace")
            theirs["request"]["owner"] = {"hub": "jupyterhub", "user": "mallory", "server": ""}
        answer = until(lambda: (said := resize(hub, tokens["grace"], "grace")).status_code != 429 and said, 5, "the pause is over")
        assert answer.status_code == 404, "a slice of somebody else's"
    finally:
        calm_pool.refuse = None
        hub.stop("ada")
        hub.stop("grace")


JUNK = [
    {"profile": {"$ne": 1}}, {"profile": "half\x00"}, {"profile": "x" * 100_000}, {"__proto__": {"a": 1}}, 
    {"gpu_fraction": "1/" + "9" * 5000},
    {"gpu_fraction": "9" * 10_000}, {"gpu_fraction": "\u0661/\u0662"}, {"gpu_fraction": "1e-400000000"}, {"gpu_memory": "1e99999999 GiB"},
    {"gpu_fraction": "0x1p-1"}, {"gpu_count": "1" * 5000, "gpu_fraction": 1}, {"gpu_model": "\x1b[2J\n<b>", "gpu_fraction": 1},
    {"gpu_fraction": [[[[[[[[]]]]]]]]}, {"gpu_mode": None, "gpu_fraction": "a" * 200_000}, {"a\nb": "c"}, {"pool_token": "x"},
    {"gpu_hub_name": "other"}, {"environment": {"LD_PRELOAD": ""}}, {"cmd": ["sh"]}, "half", 5,
]  # fmt: skip


@pytest.mark.parametrize("options", JUNK, ids=[json.dumps(one)[:30] for one in JUNK])
def test_options_that_are_junk(hub: Hub, calm_pool: FakePool, options: object) -> None:
    """By the REST API, which takes any JSON; nothing is asked for, nothing is quoted whole."""
    began = time.monotonic()
    answer = hub.spawn("ada", options)
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.content) < 1000
    assert time.monotonic() - began < 5
    assert calm_pool.held() == []
    assert hub.server("ada") is None
    assert "Traceback" not in hub.log.read_text()


@pytest.mark.parametrize("name", ODD, ids=[ascii(name) for name in ODD])
def test_odd_names_are_names(hub: Hub, boss: Browser, calm_pool: FakePool, name: str) -> None:
    """A user of that name sees the start page and gets a slice; an admin sees theirs; nothing of it is markup, or a line of the log."""
    name = name.lower()
    made = hub.api("POST", f"users/{quote(name, safe='')}")
    assert made.status_code in (201, 409), made.text
    known = made.json()["name"] if made.status_code == 201 else name
    user = quote(known, safe="")
    page = boss.http.get(f"spawn/{user}")
    assert page.status_code == 200
    assert "<img src=x" not in page.text
    # A name with a control character cannot be asked for by query: that page is as it was loaded.
    assert availability(boss, known).status_code == (404 if "\x1b" in known else 200)
    for server in ("", "servers/" + quote("<b>'\"[/]\n", safe="")):
        path = f"users/{user}/{server or 'server'}"
        answer = hub.api("POST", path, {"profile": "half"})
        assert answer.status_code in (201, 202, 400), answer.text
        if answer.status_code == 400:
            assert server, answer.text  # the hub itself refuses such names of servers
            continue
        until(lambda: calm_pool.held(), 10, "the slice")
        owner = next(one["request"]["owner"] for one in calm_pool.grants.values())
        assert owner["user"] == known
        until(lambda path=path: hub.api("DELETE", path).status_code == 204, 20, "its end")
        until(lambda: not calm_pool.held(), 10, "the slice back")
        calm_pool.grants.clear()
    assert "\x1b[2J" not in hub.log.read_text()


def test_a_name_that_is_too_long(hub: Hub, boss: Browser, calm_pool: FakePool) -> None:
    name = "u" * 300
    hub.api("POST", f"users/{name}")
    other = name + "v"
    hub.api("POST", f"users/{other}")
    assert boss.http.get(f"spawn/{name}").status_code == 200
    for one in (name, other):
        hub.api("POST", f"users/{one}/server", {"profile": "half"})
    until(lambda: len(calm_pool.grants) == 2, 10, "both requests")
    owners = {one["request"]["owner"]["user"] for one in calm_pool.grants.values()}
    assert len(owners) == 2, "two users are two owners"
    assert {len(owner) for owner in owners} == {255}
    for one in (name, other):
        until(lambda one=one: hub.api("DELETE", f"users/{one}/server").status_code == 204, 20, "its end")
    until(lambda: not calm_pool.held(), 20, "both slices back")
