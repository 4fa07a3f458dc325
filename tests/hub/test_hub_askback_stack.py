"""The whole line, simulated: a group's guarantee is lent, one of them waits, an idle server is told and stopped, and the member gets in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_process import Hub, until
from idle_kit import Notebook
from test_hub_stack import NEEDED, Pool

from nbgpu.models import Launch

pytestmark = [pytest.mark.skipif(not all(path.exists() for path in NEEDED), reason="C libraries are not built (make setup)")]
NOTICE_SECONDS = 6
MORE = """
from nbgpu_spawner import askback
askback.LOOK_SECONDS, askback.LEAST_SECONDS = 0.3, 2.0
c.GPUSliceMixin.gpu_end_asked_back = True
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
    hub = make_hub(MORE.format(run=str(run), notice=NOTICE_SECONDS), environment=machine)
    pool = Pool(run)
    until(lambda: pool.get("/v1/devices"), 30, "the pool has its device\n" + hub.log.read_text()[-3000:])
    hub.add("ada", "grace", "mia")
    yield hub, pool, run
    pool.http.close()


def environment(hub: Hub, user: str) -> dict[str, str]:
    pid = hub.ready(user)["state"]["pid"]
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def notebook(hub: Hub, run: Path, user: str) -> Notebook:
    """A kernel of a user's server that holds GPU memory."""
    env = environment(hub, user)
    directory = run / "slices" / hub.ready(user)["state"]["gpu_request_id"]
    return Notebook(Launch(env=env, slice_dir=str(directory), socket=env["NBGPU_SOCKET"]), kernel_id=f"kernel-{user}")


def test_an_idle_server_makes_room_and_a_busy_one_goes_on(stack: tuple[Hub, Pool, Path]) -> None:
    hub, pool, run = stack
    for user in ("ada", "grace"):
        assert hub.spawn(user, HALF).status_code in (201, 202)
    books = {"ada": notebook(hub, run, "ada"), "grace": notebook(hub, run, "grace")}
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
