"""A server that is asked back tells its user: what happens, when, why, what to do; and that it is over. The hub is a stand-in."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fake_slice_agent import FakeAgent
from lab_helpers import until
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from nbgpu_lab import askback
from nbgpu_lab.askback import KIND, WITHDRAWN, AskedBack
from nbgpu_lab.notices import Notices

WHY = "it uses what is guaranteed to group bio and was lent"


class Heard:
    """What the hub says, and what the user then reads."""

    def __init__(self) -> None:
        self.clock = 1000.0
        self.notices = Notices()
        self.asked = AskedBack(self.notices, lambda: self.clock)

    def __call__(self, seconds: float, later: float = 0.0, **more: Any) -> list[str]:
        self.clock += later
        self.asked.hear({"kind": "guarantee", "seconds": seconds, "ends": True, "idle": True, "reason": WHY, **more})
        return self.said()

    def said(self) -> list[str]:
        assert {one["kind"] for one in self.notices.after(0)} <= {KIND}
        return [one["message"] for one in self.notices.after(0)]


def test_what_happens_when_and_why_is_said_once_and_once_more_before_the_end() -> None:
    heard = Heard()
    assert heard(300) == [f"Save your work: this server will be stopped in 5 minutes, because {WHY}."]
    assert len(heard(260, 40)) == 1
    assert heard.asked.now() == {"ends": True, "reason": WHY, "seconds": 260.0}
    assert heard(100, 160)[1:] == [f"Save your work: this server will be stopped in 2 minutes, because {WHY}."]
    heard(20, 80)
    assert len(heard(-3, 23)) == 2
    heard.clock += 5
    now = heard.asked.now()
    assert now is not None
    assert now["seconds"] == -8


def test_where_nobody_ends_it_the_user_is_asked() -> None:
    assert Heard()(300, ends=False) == [f"Please save your work and stop this server within 5 minutes, because {WHY}."]
    assert Heard()(-1, ends=False) == [f"Please save your work and stop this server, because {WHY}."]


def test_that_it_is_over_is_said_once() -> None:
    heard = Heard()
    heard(300)
    for _ in range(3):
        heard.asked.hear(None)
    assert heard.said()[1:] == [WITHDRAWN]
    assert heard.notices.after(0)[-1]["level"] == "info"
    assert heard.asked.now() is None
    assert len(heard(300)) == 3, "anew"


def test_an_end_that_moves_and_another_reason_are_said() -> None:
    heard = Heard()
    heard(300)
    assert len(heard(400)) == 2
    assert len(heard(400, reason="a session here lasts 2 hours at most")) == 3
    assert len(heard(400, ends=False, reason="a session here lasts 2 hours at most")) == 4


@pytest.mark.parametrize(
    "junk",
    [[], "x", {}, {"seconds": "5", "ends": True, "reason": "r"}, {"seconds": float("nan"), "ends": True, "reason": "r"}, {"seconds": 1}],
)
def test_junk_is_not_heard(junk: object) -> None:
    heard = Heard()
    heard(300)
    heard.asked.hear(junk)
    assert len(heard.said()) == 1
    assert heard.asked.now() is not None


class FakeHub(web.RequestHandler):
    def initialize(self, said: dict[str, Any]) -> None:
        self.said = said

    def get(self) -> None:
        self.said["heard"].append((self.request.headers["Authorization"], self.request.query))
        self.set_status(self.said["status"])
        self.finish(self.said["body"])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[dict[str, Any]]:
    """What the hub answers, and what it heard."""
    found: dict[str, Any] = {"status": 200, "body": "", "heard": []}
    sockets = bind_sockets(0, "127.0.0.1", family=socket.AF_INET)
    server = HTTPServer(web.Application([("/hub/api/nbgpu/asked", FakeHub, {"said": found})]))

    async def start() -> None:
        server.add_sockets(sockets)

    jp_asyncio_loop.run_until_complete(start())
    monkeypatch.setenv("JUPYTERHUB_API_URL", f"http://127.0.0.1:{sockets[0].getsockname()[1]}/hub/api")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "the-servers")
    monkeypatch.setenv("JUPYTERHUB_USER", "ada")
    for name in ("FIRST_SECONDS", "AGAIN_SECONDS", "SOONEST_SECONDS", "LATEST_SECONDS"):
        monkeypatch.setattr(askback, name, 0.05)
    yield found
    server.stop()


def says(said: dict[str, Any], asked: dict[str, Any] | None) -> None:
    said["body"] = json.dumps({"asked": asked, "again_seconds": 0.01})


ASKED = {"kind": "guarantee", "seconds": 300.0, "ends": True, "idle": True, "reason": WHY, "newer": 1}


async def usage(jp_fetch: Any) -> Any:
    return json.loads((await jp_fetch("nbgpu/api/usage", params={"after": "0"})).body)


async def test_every_page_is_told_also_one_that_comes_later(said: dict[str, Any], agent: FakeAgent, jp_fetch: Any) -> None:
    says(said, ASKED)

    async def look() -> Any:
        return await usage(jp_fetch)

    for _ in range(200):
        found = await look()
        if found["asked_back"]:
            break
        await asyncio.sleep(0.02)
    assert 290 < found["asked_back"]["seconds"] <= 300
    later = await look()
    assert [(one["kind"], one["level"]) for one in later["events"]] == [(KIND, "warning")]
    assert later["events"][0]["message"].startswith("Save your work: this server will be stopped in 5 minutes")
    assert set(said["heard"]) == {("token the-servers", "user=ada&server=")}
    says(said, None)
    for _ in range(200):
        found = await look()
        if not found["asked_back"]:
            break
        await asyncio.sleep(0.02)
    assert found["asked_back"] is None
    assert [one["message"] for one in found["events"]][1:] == [WITHDRAWN]


@pytest.mark.parametrize(
    ("status", "body"), [(404, '{"status": 404, "message": "Not Found"}'), (502, "<html>"), (200, "[]"), (200, '{"asked": 5}'), (503, "{}")]
)
async def test_a_hub_that_is_older_or_away_changes_nothing(
    said: dict[str, Any], agent: FakeAgent, jp_fetch: Any, status: int, body: str
) -> None:
    says(said, ASKED)
    for _ in range(200):
        if (await usage(jp_fetch))["asked_back"]:
            break
        await asyncio.sleep(0.02)
    said.update(status=status, body=body)
    before = len(said["heard"])
    await until(lambda: len(said["heard"]) > before + 2, 10)
    found = await usage(jp_fetch)
    assert found["asked_back"], "it is not said to be over"
    assert len(found["events"]) == 1


async def test_without_a_hub_nobody_is_asked(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    assert (await usage(jp_fetch))["asked_back"] is None
    names = [task.get_coro().__name__ for task in asyncio.all_tasks() if task.get_coro() is not None]
    assert "tell_kernels" in names
    assert "follow" not in names


async def test_the_event_is_of_the_published_schema(said: dict[str, Any], agent: FakeAgent, jp_serverapp: Any, jp_fetch: Any) -> None:
    from nbgpu_lab.extension import SCHEMA_ID

    heard: list[dict[str, Any]] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        heard.append(data)

    jp_serverapp.event_logger.add_listener(schema_id=SCHEMA_ID, listener=listen)
    says(said, ASKED)
    await until(lambda: heard, 10)
    assert heard[0]["kind"] == KIND
