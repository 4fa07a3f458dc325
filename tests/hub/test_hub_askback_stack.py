"""The whole line, simulated: a group's guarantee is lent, one of them waits, an idle server is told and stopped, and the member gets in."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_process import TOKEN, Hub, until
from idle_kit import Notebook
from test_hub_stack import NEEDED, Pool
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from nbgpu.models import Launch

pytestmark = [pytest.mark.skipif(not all(path.exists() for path in NEEDED), reason="C libraries are not built (make setup)")]
NOTICE_SECONDS = 6
MORE = """
from nbgpu_spawner import askback
askback.LOOK_SECONDS, askback.LEAST_SECONDS = 0.3, 5.0
c.GPUSliceMixin.gpu_end_asked_back = True
def real(spawner):
    if spawner.user.name == "alan":
        spawner.cmd, spawner.args = [{python!r}, "-m", "jupyterhub.singleuser", "--allow-root"], []
        spawner.default_url = "/lab"
c.Spawner.pre_spawn_hook = real
c.JupyterHub.load_groups = {{"bio": {{"users": ["mia"]}}}}
give_back = {{"shrink": False, "end_idle_after_seconds": 1, "notice_seconds": {notice}}}
setup(
    c,
    runtime={run!r},
    quotas={{"groups": {{"bio": {{"guarantee": "1/2", "lend": True}}}}}},
    pool_config={{"give_back": give_back}},
    agent_args=["--idle-host-memory", "64 GiB"],
)
"""
HALF = {"profile": "half"}


@pytest.fixture(scope="module")
def stack(make_hub: Callable[..., Hub], place: Path) -> Iterator[tuple[Hub, Pool, Path]]:
    run = place / "run"
    machine = {"NBGPU_SIM_STATE": str(place / "sim"), "NBGPU_SIM_DEVICES": "1"}
    hub = make_hub(MORE.format(run=str(run), notice=NOTICE_SECONDS, python=sys.executable), environment=machine)
    pool = Pool(run)
    until(lambda: pool.get("/v1/devices"), 30, "the pool has its device\n" + hub.log.read_text()[-3000:])
    hub.add("ada", "grace", "mia", "alan")
    yield hub, pool, run
    pool.http.close()


def environment(hub: Hub, user: str) -> dict[str, str]:
    pid = hub.ready(user)["state"]["pid"]
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def notebook(hub: Hub, run: Path, user: str, kernel_id: str) -> Notebook:
    """A kernel of a user's server that holds GPU memory."""
    env = environment(hub, user)
    directory = run / "slices" / hub.ready(user)["state"]["gpu_request_id"]
    return Notebook(Launch(env=env, slice_dir=str(directory), socket=env["NBGPU_SOCKET"]), kernel_id=kernel_id)


def test_an_idle_server_makes_room_and_a_busy_one_goes_on(stack: tuple[Hub, Pool, Path]) -> None:
    hub, pool, run = stack
    for user in ("ada", "grace"):
        assert hub.spawn(user, HALF).status_code in (201, 202)
    books = {user: notebook(hub, run, user, f"kernel-{user}") for user in ("ada", "grace")}
    try:
        hub.spawn_aside("mia", HALF)
        until(lambda: pool.grants().get("mia", ("", ""))[1] == "queued", 20, "mia waits")

        def asked() -> list[dict[str, Any]]:
            books["ada"].tell(busy=False)
            books["grace"].tell(busy=True)
            return pool.get("/v1/asks")

        (ask,) = until(asked, 20, "the idle server is asked back")
        assert ask["owner"]["user"] == "ada"
        token = environment(hub, "ada")["JUPYTERHUB_API_TOKEN"]
        told = until(lambda: hub.api("GET", "nbgpu/asked?user=ada", None, token).json()["asked"], 10, "ada is told")
        assert 2 <= told["seconds"] <= NOTICE_SECONDS
        assert "guaranteed to group bio" in told["reason"]
        hub.gone("ada", NOTICE_SECONDS + 15)
        books["ada"].process.kill()  # a real server's kernels end with it; this one is the test's own
        assert hub.ready("mia", 60)
        assert hub.ready("grace")
        until(lambda: pool.get("/v1/asks") == [], 10, "nobody is asked any more")
        assert {user: state for user, (_, state) in pool.grants().items()} == {"grace": "bound", "mia": "bound"}
    finally:
        for book in books.values():
            book.process.kill()
            book.process.wait(10)
        for user in ("grace", "mia"):
            if hub.server(user):
                hub.stop(user)


@pytest.mark.slow
def test_a_real_server_tells_its_user_by_itself(stack: tuple[Hub, Pool, Path]) -> None:
    """JupyterLab's server with the extension and an idle kernel: it asks the hub, keeps the notice for whoever comes, and is stopped."""
    hub, pool, run = stack
    for user in ("alan", "grace"):
        assert hub.spawn(user, HALF).status_code in (201, 202)
        hub.ready(user, 90)

    def call(method: str, path: str) -> httpx.Response:
        url = f"http://127.0.0.1:{hub.port}/user/alan/{path}"
        return httpx.request(method, url, headers={"Authorization": f"token {TOKEN}"}, timeout=30)

    kernel_id = call("POST", "api/kernels").json()["id"]

    async def open_page() -> None:
        url = f"ws://127.0.0.1:{hub.port}/user/alan/api/kernels/{kernel_id}/channels"
        page = await websocket_connect(HTTPRequest(url, headers={"Authorization": f"token {TOKEN}"}))
        while call("GET", f"api/kernels/{kernel_id}").json()["execution_state"] != "idle":
            await asyncio.wait_for(page.read_message(), 30)
        page.close()

    asyncio.run(asyncio.wait_for(open_page(), 60))  # until somebody listens a kernel counts as starting
    mine = notebook(hub, run, "alan", kernel_id)
    try:
        hub.spawn_aside("mia", HALF)
        until(lambda: pool.grants().get("mia", ("", ""))[1] == "queued", 20, "mia waits")

        def told() -> list[str]:
            answer = call("GET", "nbgpu/api/events")
            return [one["message"] for one in answer.json() if one["kind"] == "asked-back"] if answer.status_code == 200 else []

        (words,) = until(told, 90, "the server has told")
        assert words.startswith("Save your work: this server will be stopped in")
        assert "guaranteed to group bio" in words
        hub.gone("alan", 30)
        mine.process.kill()
        assert hub.ready("mia", 60)
        assert hub.ready("grace")
    finally:
        mine.process.kill()
        mine.process.wait(10)
