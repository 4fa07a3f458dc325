"""What a hostile kernel, notebook, hub or agent may say to the server extension: it costs words at most, never the extension."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_slice_agent import FakeAgent
from lab_helpers import until
from tornado.httpclient import HTTPClientError
from tornado.netutil import bind_sockets

from nbgpu_lab import hub, idle
from nbgpu_lab.client import SliceClient
from nbgpu_lab.extension import SCHEMA_ID
from nbgpu_lab.notices import Notices
from nbgpu_lab.sampler import EVERY_SECONDS, Sampler

NESTED = "[" * 2000 + "]" * 2000


async def no_kernels() -> dict[str, Any]:
    return {}


def refusal(error: HTTPClientError) -> Any:
    assert error.response is not None
    return json.loads(error.response.body)["error"]


async def usage(jp_fetch: Any) -> Any:
    return json.loads((await jp_fetch("nbgpu/api/usage")).body)


@pytest.mark.parametrize(("method", "path"), [("PUT", "kernels/abc"), ("POST", "resume"), ("POST", "resize")])
async def test_what_is_nested_too_deep_is_a_plain_400(agent: FakeAgent, jp_fetch: Any, method: str, path: str) -> None:
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch("nbgpu/api", path, method=method, body=NESTED)
    assert refused.value.code == 400
    assert refusal(refused.value)["field"] == "body"


async def test_an_agents_answer_that_is_nested_too_deep_is_none(agent: FakeAgent, jp_fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await usage(jp_fetch)

    async def nested(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000)
        writer.close()

    monkeypatch.setattr(agent, "_serve", nested)
    await agent.stop()
    await agent.start()
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "1/2"}')
    assert refused.value.code == 503


async def test_a_session_of_no_path_is_a_kernel_of_no_notebook(agent: FakeAgent, jp_fetch: Any) -> None:
    """Whoever has the server's token may write that, a kernel too."""
    body = json.dumps({"name": "", "type": "notebook", "path": "a.ipynb", "kernel": {"name": "python3"}})
    session = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)
    with suppress(HTTPClientError):  # the server fails over it, and keeps it
        await jp_fetch("api/sessions", session["id"], method="PATCH", body='{"path": null, "name": null}')
    (kept,) = json.loads((await jp_fetch("api/sessions")).body)
    assert kept["path"] is None
    answer = await usage(jp_fetch)
    assert answer["agent"]["ok"] is True
    (kernel,) = answer["kernels"]
    assert (kernel["kernel_id"], kernel["path"]) == (session["kernel"]["id"], None)
    assert kernel["name"]


async def test_sessions_that_cannot_be_listed_end_nothing(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the agent was told of busy kernels stands, and it is told again once they are known."""
    monkeypatch.setattr(idle, "NOT_OFFERED_SECONDS", idle.LOOK_SECONDS)
    answers: list[Any] = [{"abc": {"state": "busy"}}, sqlite3.OperationalError("database is locked"), {"abc": {"state": "idle"}}]

    async def kernels() -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    telling = asyncio.ensure_future(idle.tell_kernels(SliceClient(agent.socket_path), kernels))
    await until(lambda: len(answers) == 1 or telling.done())
    assert not telling.done()
    telling.cancel()


JUNK_EVENTS: list[Any] = [
    {"id": float("inf"), "time": 1.0, "kind": "refused", "level": "info", "message": "x"},
    {"id": 1, "time": 1.0, "kind": "refused", "level": "info", "message": None, "kernel_id": "abc"},
    {"id": 1, "time": 1e300, "kind": "refused", "level": "info", "message": "of no day that a page can show"},
    {"id": 1, "time": 1.0, "kind": "refused", "level": "panic", "message": "no such level"},
    {"id": 1, "time": 1.0, "kind": 5, "level": "info", "message": "a kind that is none"},
    "text",
    None,
]


@pytest.mark.parametrize("junk", JUNK_EVENTS, ids=[str(one)[:40] for one in JUNK_EVENTS])
async def test_an_event_that_is_junk_ends_nothing(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any, junk: Any) -> None:
    """Also with a page that listens: only then are events held to their schema."""

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        pass

    jp_serverapp.event_logger.add_listener(schema_id=SCHEMA_ID, listener=listen)
    heard = agent._events

    async def once(after: int, wait_seconds: float) -> list[Any]:
        agent._events = heard  # type: ignore[method-assign]
        return [junk, {"id": 1, "time": 2.0, "kind": "refused", "level": "info", "message": "behind it"}]

    await until(lambda: agent.count("/v1/events"))
    agent._events = once  # type: ignore[method-assign]
    agent.tell("refused", "ends the open question")
    await until(lambda: agent._events is heard)
    agent.tell("refused", "true")

    async def told() -> list[str]:
        return [one["message"] for one in json.loads((await jp_fetch("nbgpu/api/events")).body)]

    deadline = time.monotonic() + 4
    while not {"behind it", "true"} <= set(await told()):
        assert time.monotonic() < deadline, "events are followed no more"
        await asyncio.sleep(0.05)
    assert "of no day that a page can show" not in await told()


JUNK_USAGE: list[Any] = [{"kernels": None}, {"kernels": [{}]}, {"kernels": [5], "time": 1}, []]


@pytest.mark.parametrize("junk", JUNK_USAGE, ids=str)
async def test_a_use_that_is_junk_is_no_use(agent: FakeAgent, jp_fetch: Any, junk: Any) -> None:
    assert (await usage(jp_fetch))["agent"]["ok"] is True
    agent.usage = lambda: junk  # type: ignore[method-assign]
    await asyncio.sleep(EVERY_SECONDS)
    answer = await usage(jp_fetch)
    assert (answer["agent"]["ok"], answer["slice_id"]) == (False, "fakeslice"), "the last values stay"
    del agent.usage
    await asyncio.sleep(EVERY_SECONDS)
    assert (await usage(jp_fetch))["agent"]["ok"] is True


@pytest.mark.parametrize("repeated", [False, True])
async def test_an_agent_that_answers_at_once_is_not_asked_without_end(agent: FakeAgent, repeated: bool) -> None:
    """It shall wait until there is news; one that does not costs no more than a question in a while."""
    if repeated:
        agent.tell("refused", "again and again")

    async def at_once(after: int, wait_seconds: float) -> list[Any]:
        return list(agent.events)

    agent._events = at_once  # type: ignore[method-assign]
    notices = Notices()
    following = asyncio.ensure_future(Sampler(SliceClient(agent.socket_path), no_kernels, notices).follow_events())
    await asyncio.sleep(1)
    following.cancel()
    assert 1 <= agent.count("/v1/events") <= 5
    assert len(notices.after(0)) == int(repeated)


async def test_a_hub_that_is_slow_may_have_done_it(agent: FakeAgent, jp_fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that the slice stays as it is: the hub has heard, and may do it yet."""
    [deaf] = bind_sockets(0, "127.0.0.1", family=socket.AF_INET)
    monkeypatch.setenv("JUPYTERHUB_API_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}/hub/api")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "the-servers")
    monkeypatch.setenv("JUPYTERHUB_USER", "ada")
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)

    async def words() -> str:
        with pytest.raises(HTTPClientError) as refused:
            await jp_fetch("nbgpu/api/resize", method="POST", body='{"gpu_fraction": "1/2"}')
        assert refused.value.code == 503
        return refusal(refused.value)["message"]

    try:
        assert "may change yet" in await words()
    finally:
        deaf.close()
    assert "stays as it is" in await words(), "control: nobody has heard"


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_notebook_that_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    """Reading it would hold the kernel's start for ever, or fill the server's memory: a repository may bring such a link."""
    notebook = tmp_path / "a.ipynb"
    if kind == "pipe":
        os.mkfifo(notebook)
    else:
        notebook.symlink_to("/dev/zero")
    code = f"from nbgpu_lab.provisioner import read_metadata; print(read_metadata({str(notebook)!r}))"
    limited = ["sh", "-c", f'ulimit -v 2000000; exec {sys.executable} -c "$0"', code]
    assert subprocess.run(limited, capture_output=True, text=True, timeout=10).stdout == "None\n"


async def test_a_name_turns_no_sentence_round(agent: FakeAgent, jp_fetch: Any) -> None:
    name = "\u202egpj.\u2066x\u2069ipynb"
    body = json.dumps({"name": name, "type": "notebook", "path": "a.ipynb", "kernel": {"name": "python3"}})
    kernel_id = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]
    agent.tell("refused", f"Notebook kernel {kernel_id[:8]}… was refused 1 GiB.", kernel_id=kernel_id)
    await until(lambda: agent.count("/v1/events?after=1"))
    (told,) = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert told["message"] == "gpj.xipynb was refused 1 GiB."


@pytest.mark.parametrize("name", ["אימון.ipynb", "تدريب-2024.ipynb", "\u200fa.ipynb"])
async def test_a_name_from_right_to_left_stands_by_itself_in_a_sentence(agent: FakeAgent, jp_fetch: Any, name: str) -> None:
    """Else one at the beginning turns the whole sentence."""
    body = json.dumps({"name": name, "type": "notebook", "path": "a.ipynb", "kernel": {"name": "python3"}})
    kernel_id = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]
    agent.tell("refused", f"Notebook kernel {kernel_id[:8]}… was refused 1 GiB.", kernel_id=kernel_id)
    await until(lambda: agent.count("/v1/events?after=1"))
    (told,) = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert (told["name"], told["message"]) == (name, f"\u2068{name}\u2069 was refused 1 GiB.")
