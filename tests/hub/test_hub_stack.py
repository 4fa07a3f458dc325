"""The whole line on one machine, simulated: hub, pool, agent, limiter, driver. Skipped where the C libraries are not built."""

from __future__ import annotations

import contextlib
import html
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_process import ROOT, Hub, until

from nbgpu.quantities import GIB, memory_share_bytes

LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
NEEDED = [LIB / "libnbgpu.so", LIB / "libnbgpu_agent.so", LIB / "sim" / "libcuda.so.1"]
BUILT = all(path.exists() for path in NEEDED)
pytestmark = [pytest.mark.skipif(not BUILT, reason="C libraries are not built (make setup)")]

MORE = """
c.Spawner.cmd = [c.Spawner.cmd[0], {server!r}]
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 30}}
def hook(spawner):
    if spawner.user.name == "hurry":
        spawner.gpu_wait_timeout = 2
c.Spawner.pre_spawn_hook = hook
setup(c, runtime={run!r}, quotas={{"users": {{"alan": {{"limit": "1/4"}}, "grace": {{"limit": "1/2"}}}}}})
"""


class Pool:
    """Reads the real pool's books."""

    def __init__(self, runtime: Path):
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(runtime / "pool.sock")), base_url="http://pool", timeout=10)

    def get(self, path: str) -> Any:
        with contextlib.suppress(httpx.HTTPError):
            answer = self.http.get(path)
            if answer.status_code == 200:
                return answer.json()
        return None

    def grants(self) -> dict[str, tuple[str, str]]:
        """Owner to request id and state, of those that hold something."""
        found = {g["request"]["owner"]["user"]: (g["request"]["request_id"], g["state"]) for g in self.get("/v1/requests") or []}
        return {user: grant for user, grant in found.items() if grant[1] != "gone"}


@pytest.fixture(scope="module")
def stack(make_hub: Callable[..., Hub], place: Path) -> Iterator[tuple[Hub, Pool, Path]]:
    run = place / "run"
    words = {"server": str(ROOT / "bench" / "spawn_server.py"), "run": str(run)}
    hub = make_hub(MORE.format(**words), environment={"NBGPU_SIM_STATE": str(place / "sim"), "NBGPU_SIM_DEVICES": "1"})
    pool = Pool(run)
    until(lambda: pool.get("/v1/devices"), 30, "the pool has its device\n" + hub.log.read_text()[-3000:])
    hub.add("ada", "grace", "hurry", "alan")
    yield hub, pool, run
    pool.http.close()


def probe(hub: Hub, user: str) -> dict[str, int]:
    return httpx.get(f"http://127.0.0.1:{hub.port}/user/{user}/probe", timeout=60).json()


def test_a_server_has_its_share_and_no_more(stack: tuple[Hub, Pool, Path]) -> None:
    hub, pool, run = stack
    assert hub.spawn("ada", {"profile": "half"}).status_code == 201
    request_id, state = pool.grants()["ada"]
    assert state == "bound"
    assert (run / "slices" / request_id).is_dir()
    said = probe(hub, "ada")
    assert said["total"] == 39 * 1024**3
    assert said["free"] - said["block"] < said["had"] <= said["free"]
    assert said["status"] == 2
    assert hub.spawn("grace", {"profile": "cpu"}).status_code == 201
    environment = Path(f"/proc/{hub.ready('grace')['state']['pid']}/environ").read_bytes()
    assert b"LD_PRELOAD" not in environment
    assert b"NBGPU_SLICE" not in environment
    hub.stop("grace")
    hub.stop("ada")
    until(lambda: pool.grants() == {}, 3, "the slice is free")
    assert not (run / "slices" / request_id).exists()


def test_a_running_server_grows_to_its_quota_and_no_further(stack: tuple[Hub, Pool, Path]) -> None:
    """It asks with its own token, as JupyterLab's panel has it do; what it gets is in force in a process that runs."""
    hub, pool, _ = stack
    assert hub.spawn("alan", {"profile": "eighth"}).status_code == 201
    environment = Path(f"/proc/{hub.ready('alan')['state']['pid']}/environ").read_bytes()
    (token,) = (word.partition(b"=")[2].decode() for word in environment.split(b"\0") if word.startswith(b"JUPYTERHUB_API_TOKEN="))

    def resize(share: str) -> httpx.Response:
        def ask() -> httpx.Response | None:
            answer = hub.api("POST", "nbgpu/resize?user=alan", {"gpu_fraction": share}, token)
            return None if answer.status_code == 429 else answer

        return until(ask, 10, "asked without haste")

    def free() -> dict[str, Any]:
        (device,) = hub.api("GET", "nbgpu/resize?user=alan", None, token).json()["devices"]
        return {name: device[name] for name in ("index", "free_bytes", "free_milli")}

    assert probe(hub, "alan")["total"] == memory_share_bytes(78 * GIB, 125)
    assert free() == {"index": 0, "free_bytes": 78 * GIB - memory_share_bytes(78 * GIB, 125), "free_milli": 875}
    assert resize("1/4").status_code == 200
    until(lambda: probe(hub, "alan")["total"] == memory_share_bytes(78 * GIB, 250), 5, "a quarter is in force")
    refused = resize("1/2")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota")
    assert "a quarter" in refused.json()["error"]["message"]
    assert probe(hub, "alan")["total"] == memory_share_bytes(78 * GIB, 250)
    assert resize("1/8").status_code == 200
    until(lambda: probe(hub, "alan")["total"] == memory_share_bytes(78 * GIB, 125), 5, "an eighth is in force")
    hub.stop("alan")
    assert "alan" not in pool.grants()


def test_a_quota_refuses_in_its_own_words_by_both(stack: tuple[Hub, Pool, Path]) -> None:
    hub, pool, _ = stack
    answer = hub.spawn("alan", {"profile": "half"})
    assert answer.status_code == 403
    assert "quarter" in answer.json()["message"]
    page = " ".join(hub.login("alan").form().split())
    assert 'value="half" required aria-describedby="nbgpu-4-what nbgpu-4-status" disabled' in page
    assert "Not for you:" in page
    assert pool.grants() == {}


@pytest.mark.parametrize("how", ["cancel", "leave", "close the page", "time out"])
def test_a_wait_that_is_given_up_leaves_nothing(stack: tuple[Hub, Pool, Path], how: str) -> None:
    hub, pool, _ = stack
    assert hub.spawn("ada", {"profile": "whole"}).status_code == 201
    user = "hurry" if how == "time out" else "grace"
    browser = hub.login(user)
    browser.submit({"profile": "half"})
    reader = browser.progress()
    until(lambda: "in line" in next(reader)["message"], 20, f"{user} sees that they wait")
    assert how == "time out" or pool.grants()[user][1] == "queued"
    if how == "cancel":
        assert hub.api("DELETE", "users/grace/server").status_code in (202, 204)
    elif how == "leave":
        token = browser.token(browser.http.get("home").text)
        browser.http.post("nbgpu/leave", data={"_xsrf": token})
    elif how == "time out":
        *_, last = reader
        assert last["failed"]
        assert "There was no room for half of a GPU within 2 seconds" in last["message"], "they are told"
    else:
        reader.close()
        browser.http.close()
        hub.stop("ada")  # the hub waits on: she gets her server, and it is hers to stop
        hub.ready("grace")
        assert pool.grants()["grace"][1] == "bound"
        hub.stop("grace")
    hub.gone(user)
    until(lambda: user not in pool.grants(), 5, "nothing is held or waited for")
    if hub.server("ada"):
        hub.stop("ada")
    until(lambda: pool.grants() == {}, 5, "all is free")


def test_a_smaller_share_takes_the_place_of_the_one_that_is_waited_for(stack: tuple[Hub, Pool, Path]) -> None:
    """Its user's quota would not allow both: the pool gives up the one for the other in one step."""
    hub, pool, run = stack
    for user, slug in (("ada", "half"), ("hurry", "quarter")):
        assert hub.spawn(user, {"profile": slug}).status_code == 201
    grace = hub.login("grace")
    grace.submit({"profile": "half"})
    until(lambda: pool.grants().get("grace", ("", ""))[1] == "queued", 10, "grace waits")
    old, _ = pool.grants()["grace"]

    def offered() -> str:
        found = re.search(r'name="choice" value="([^"]+)"', grace.http.get("spawn-pending/grace").text)
        return html.unescape(found[1]) if found else ""

    choice = until(offered, 10, "the page offers what is free")
    assert choice == '{"profile": "quarter"}', "all that is left of the GPU, by its own profile"
    token = grace.token(grace.http.get("home").text)
    page = grace.http.post("nbgpu/smaller", data={"_xsrf": token, "choice": choice})
    assert page.status_code == 200
    server = hub.ready("grace")
    assert server["user_options"] == {"profile": "quarter"}
    new, state = pool.grants()["grace"]
    assert (state, new != old) == ("bound", True)
    assert server["state"]["gpu_request_id"] == new
    assert (run / "slices" / new).is_dir()
    assert probe(hub, "grace")["total"] == 19.5 * 1024**3
    for user in ("ada", "hurry", "grace"):
        hub.stop(user)
    until(lambda: pool.grants() == {}, 5, "all is free")


def test_everything_killed_and_the_same_grants_are_there(stack: tuple[Hub, Pool, Path]) -> None:
    hub, pool, run = stack
    for user in ("ada", "grace"):
        assert hub.spawn(user, {"profile": "quarter"}).status_code == 201
    before = pool.grants()
    pids = {user: hub.ready(user)["state"]["pid"] for user in ("ada", "grace")}
    hub.kill()  # its services live on; those of the new hub take their places
    hub.start()
    until(lambda: pool.grants() == before, 30, "the pool has the same grants")
    for user, pid in pids.items():
        assert hub.ready(user)["state"]["pid"] == pid
        os.kill(pid, 0)
    assert probe(hub, "ada")["status"] == 2, "the limit holds"
    for user in pids:
        hub.stop(user)
    until(lambda: pool.grants() == {}, 5, "all is free")
    assert list((run / "slices").iterdir()) == []
