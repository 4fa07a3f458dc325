"""Servers that the pool asks back, in a real hub: told, then stopped by the hub's own stop; nobody who was not told, nobody else's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_pool import FakePool
from hub_process import Hub, until

LOOK_SECONDS, LEAST_SECONDS = 0.3, 2.0
assert 12 * LOOK_SECONDS > LEAST_SECONDS
MORE = """
from nbgpu_spawner import askback
askback.LOOK_SECONDS, askback.LEAST_SECONDS = {look}, {least}
c.GPUSliceMixin.gpu_end_asked_back = {ends}
c.GPUSliceMixin.pool_timeout = 1.0
c.Authenticator.refresh_pre_stop = True
c.JupyterHub.allow_named_servers = True
def stopped(spawner):
    with open({hook!r}, "a") as out:
        out.write(spawner.user.name + "/" + spawner.name + chr(10))
c.Spawner.post_stop_hook = stopped
setup(c, embedded=False, runtime={place!r})
"""
EIGHTH = {"profile": "eighth"}


class Stage:
    """A hub with servers that are asked back as a test wants."""

    def __init__(self, hub: Hub, pool: FakePool, place: Path):
        self.hub, self.pool, self.hooks = hub, pool, place / "stopped"

    def start(self, user: str, name: str = "") -> str:
        """Start a server; return its request id."""
        path = f"users/{user}/servers/{name}" if name else f"users/{user}/server"
        assert self.hub.api("POST", path, EIGHTH).status_code in (201, 202)
        until(lambda: self.server(user, name).get("ready"), 30, f"{user}/{name} is ready")
        return self.server(user, name)["state"]["gpu_request_id"]

    def server(self, user: str, name: str = "") -> dict[str, Any]:
        return self.hub.api("GET", f"users/{user}").json()["servers"].get(name) or {}

    def ask_back(self, request_id: str, due_seconds: float, **more: Any) -> None:
        with self.pool.lock:
            self.pool.asks[request_id] = (time.monotonic() + due_seconds, more)

    def tell(self, user: str, name: str = "", token: str | None = None) -> httpx.Response:
        """Ask as the server does, with its own token."""
        if token is None:
            environment = Path(f"/proc/{self.server(user, name)['state']['pid']}/environ").read_bytes().split(b"\0")
            (token,) = (word.partition(b"=")[2].decode() for word in environment if word.startswith(b"JUPYTERHUB_API_TOKEN="))
        return self.hub.api("GET", f"nbgpu/asked?user={user}&server={name}", None, token)

    def told(self, user: str, name: str = "") -> dict[str, Any] | None:
        """Tell the user, as soon as the hub knows of the ask."""
        return until(lambda: self.tell(user, name).json()["asked"], 5, "it is told")

    def looks(self, count: int = 12) -> None:
        """Wait until the hub has looked so often: by default for longer than the least notice."""
        before = self.looked()
        until(lambda: self.looked() >= before + count, 10, "the hub looks")

    def looked(self) -> int:
        with self.pool.lock:
            return self.pool.calls.count("GET /v1/asks")

    def hooked(self) -> list[str]:
        return self.hooks.read_text().split() if self.hooks.exists() else []


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    words = {"look": LOOK_SECONDS, "least": LEAST_SECONDS, "ends": True, "place": str(place), "hook": str(place / "stopped")}
    found = make_hub(MORE.format(**words))
    found.add("ada", "grace")
    return found


@pytest.fixture
def stage(hub: Hub, calm_pool: FakePool, place: Path) -> Iterator[Stage]:
    found = Stage(hub, calm_pool, place)
    found.hooks.unlink(missing_ok=True)
    yield found
    with calm_pool.lock:
        calm_pool.asks.clear()
        calm_pool.fail_next.clear()
    for user in ("ada", "grace"):
        for name in hub.api("GET", f"users/{user}").json()["servers"]:
            hub.api("DELETE", f"users/{user}/servers/{name}" if name else f"users/{user}/server")
        until(lambda user=user: not hub.api("GET", f"users/{user}").json()["servers"], 20, f"{user} has no servers")


def test_who_was_told_is_stopped_when_the_notice_is_over_and_others_are_not(stage: Stage) -> None:
    mine, other = stage.start("ada"), stage.start("grace")
    stage.ask_back(mine, 3)
    told = stage.told("ada")
    assert told is not None
    assert 2 < told["seconds"] <= 3
    assert (told["ends"], told["kind"], told["reason"]) == (True, "guarantee", "it uses what is guaranteed to group bio and was lent")
    begun = time.monotonic()
    assert stage.tell("grace").json()["asked"] is None
    stage.looks(4)
    assert stage.server("ada")["ready"], "within its notice"
    stage.hub.gone("ada", 15)
    assert time.monotonic() - begun >= told["seconds"] - 0.2
    assert stage.hooked() == ["ada/"], "the admin's hook, once"
    assert stage.pool.held() == [other], "the slice went back to the pool"
    assert stage.server("grace")["ready"]
    log = stage.hub.log.read_text()
    assert f"its slice {mine} was asked back: it uses what is guaranteed to group bio" in log
    assert "Traceback" not in log
    assert stage.start("ada") not in (mine, other), "it may come again"


def test_who_was_not_told_goes_on(stage: Stage) -> None:
    stage.ask_back(stage.start("ada"), -10)
    until(lambda: stage.hub.api("GET", "nbgpu/asked?user=ada").json()["asked"], 5, "an admin's service reads it: nobody is told by that")
    stage.looks()
    assert stage.server("ada")["ready"]
    until(lambda: "its user could not be told" in stage.hub.log.read_text(), 5, "the admin reads it")
    told = stage.told("ada")
    assert told is not None
    assert told["seconds"] == pytest.approx(LEAST_SECONDS, abs=0.2), "who is told late has that time"
    stage.hub.gone("ada", 15)


def test_a_withdrawn_ask_stops_nobody(stage: Stage) -> None:
    mine = stage.start("ada")
    stage.ask_back(mine, 1)
    stage.told("ada")
    with stage.pool.lock:
        stage.pool.asks.clear()
    stage.looks()
    assert stage.server("ada")["ready"]
    assert stage.tell("ada").json()["asked"] is None


@pytest.mark.parametrize("whose", ["another hub's", "another user's", "a slice before this one"])
def test_what_is_not_this_servers_stops_nobody(stage: Stage, whose: str) -> None:
    mine = stage.start("ada")
    owner = {"hub": "jupyterhub", "user": "ada", "server": ""}
    if whose == "a slice before this one":
        stage.ask_back("0" * 32, -1, owner=owner)
    else:
        stage.ask_back(mine, -1, owner={**owner, **({"hub": "other"} if whose == "another hub's" else {"user": "grace"})})
    assert stage.tell("ada").json()["asked"] is None
    stage.looks()
    assert stage.server("ada")["ready"]


def test_only_the_named_server_that_is_meant(stage: Stage) -> None:
    default, named = stage.start("ada"), stage.start("ada", "big")
    stage.ask_back(named, 1)
    assert stage.told("ada", "big") is not None
    assert stage.tell("ada").json()["asked"] is None
    until(lambda: not stage.server("ada", "big").get("ready"), 15, "the named one is stopped")
    until(lambda: stage.pool.held() == [default], 15, "and its slice free")
    assert stage.server("ada")["ready"]


def test_a_pool_that_is_away_and_a_hub_that_was_killed(stage: Stage) -> None:
    """Nobody is stopped blindly; a hub that comes back tells anew before it stops anybody."""
    stage.ask_back(stage.start("ada"), 1)
    stage.told("ada")
    with stage.pool.lock:
        stage.pool.fail_next["asks"] = 10**6
    assert stage.tell("ada").status_code in (200, 503)
    stage.looks()
    assert stage.server("ada")["ready"]
    stage.hub.kill()
    stage.pool.fail_next.clear()
    stage.hub.start()
    stage.looks(12)
    assert stage.server("ada")["ready"], "this hub has told nobody"
    told = stage.told("ada")
    assert told is not None
    assert told["seconds"] == pytest.approx(LEAST_SECONDS, abs=0.2)
    stage.hub.gone("ada", 15)


def test_the_pool_is_asked_once_a_period_however_many_servers_ask(stage: Stage) -> None:
    for user in ("ada", "grace"):
        stage.start(user)
    begun, before = time.monotonic(), stage.looked()
    for _ in range(25):
        for user in ("ada", "grace"):
            assert stage.tell(user).status_code == 200
    spent = time.monotonic() - begun
    assert stage.looked() - before <= 2 * (spent / LOOK_SECONDS + 2), "the task's own, and one look that all who ask share"


def test_nobody_reads_what_is_said_to_another(stage: Stage) -> None:
    for user in ("ada", "grace"):
        stage.start(user)
    environment = Path(f"/proc/{stage.server('ada')['state']['pid']}/environ").read_bytes().split(b"\0")
    (token,) = (word.partition(b"=")[2].decode() for word in environment if word.startswith(b"JUPYTERHUB_API_TOKEN="))
    assert stage.tell("grace", token=token).status_code in (403, 404)
    assert stage.tell("grace", token="wrong").status_code == 403
