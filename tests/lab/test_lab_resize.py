"""A server asks its hub for another size of its slice; the hub is a stand-in that says what it heard."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fake_slice_agent import FakeAgent
from tornado import web
from tornado.httpclient import HTTPClientError
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

Heard = list[tuple[str, str, Any]]


class FakeHub(web.RequestHandler):
    def initialize(self, heard: Heard, answer: dict[str, Any]) -> None:
        self.heard, self.answer = heard, answer

    def get(self) -> None:
        self.post()

    def post(self) -> None:
        self.heard.append((self.request.headers["Authorization"], self.request.query, json.loads(self.request.body or b"null")))
        self.set_status(self.answer["status"])
        self.finish(self.answer["body"])


@pytest.fixture
def answer() -> dict[str, Any]:
    return {"status": 200, "body": json.dumps({"in_force": True, "devices": [], "note": None})}


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[Heard]:
    found: Heard = []
    sockets = bind_sockets(0, "127.0.0.1", family=socket.AF_INET)
    server = HTTPServer(web.Application([("/hub/api/nbgpu/resize", FakeHub, {"heard": found, "answer": answer})]))

    async def start() -> None:
        server.add_sockets(sockets)

    jp_asyncio_loop.run_until_complete(start())
    monkeypatch.setenv("JUPYTERHUB_API_URL", f"http://127.0.0.1:{sockets[0].getsockname()[1]}/hub/api")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "the-servers")
    monkeypatch.setenv("JUPYTERHUB_USER", "ada l&x=y")
    monkeypatch.setenv("JUPYTERHUB_SERVER_NAME", "big")
    yield found
    server.stop()


async def resize(jp_fetch: Any, **asked: str) -> Any:
    return json.loads((await jp_fetch("nbgpu/api/resize", method="POST", body=json.dumps(asked))).body)


async def test_asks_the_hub_with_the_servers_own_token(agent: FakeAgent, jp_fetch: Any, heard: Heard) -> None:
    assert json.loads((await jp_fetch("nbgpu/api/usage")).body)["may_resize"] is True
    assert (await resize(jp_fetch, gpu_fraction="1/2"))["in_force"] is True
    assert heard == [("token the-servers", "user=ada+l%26x%3Dy&server=big", {"gpu_fraction": "1/2"})]


async def test_asks_the_hub_what_is_free(agent: FakeAgent, jp_fetch: Any, heard: Heard, answer: dict[str, Any]) -> None:
    answer["body"] = '{"devices": [{"uuid": "GPU-1", "index": 0, "free_bytes": 5, "free_milli": 250}]}'
    assert json.loads((await jp_fetch("nbgpu/api/resize")).body) == json.loads(answer["body"])
    assert heard == [("token the-servers", "user=ada+l%26x%3Dy&server=big", None)]


@pytest.mark.parametrize(
    ("status", "body", "expected", "words"),
    [
        (403, '{"error": {"code": "quota", "message": "Your quota is half a GPU."}}', 403, "Your quota is half a GPU."),
        (409, '{"error": {"code": "no-room", "message": "GPU 0 has 2 GiB free."}}', 409, "GPU 0 has 2 GiB free."),
        (404, '{"status": 404, "message": "Not Found"}', 403, "does not let a running server"),
        (502, "<html>", 503, "JupyterHub does not answer"),
        (200, "<html>", 503, "JupyterHub does not answer"),
    ],
)
async def test_a_no_is_told_in_its_own_words(
    agent: FakeAgent, jp_fetch: Any, heard: Heard, answer: dict[str, Any], status: int, body: str, expected: int, words: str
) -> None:
    answer.update(status=status, body=body)
    with pytest.raises(HTTPClientError) as refused:
        await resize(jp_fetch, gpu_fraction="1")
    assert refused.value.code == expected
    assert words in json.loads(refused.value.response.body)["error"]["message"]


async def test_without_a_hub_it_is_not_offered(agent: FakeAgent, jp_fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUPYTERHUB_API_URL", raising=False)
    assert json.loads((await jp_fetch("nbgpu/api/usage")).body)["may_resize"] is False
    with pytest.raises(HTTPClientError) as refused:
        await resize(jp_fetch, gpu_fraction="1")
    assert refused.value.code == 403
