"""The routes of the server extension, in a real Jupyter server."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from fake_slice_agent import GIB, FakeAgent
from lab_helpers import until
from tornado.httpclient import HTTPClientError

from nbgpu.kernel_names import KernelName, read_names
from nbgpu_agent.happened import Happened, Told
from nbgpu_agent.procs import Process
from nbgpu_agent.responses import action_message
from nbgpu_agent.usage import SlotUse
from nbgpu_lab import extension, limits, sampler
from nbgpu_lab.client import SliceClient
from nbgpu_lab.notices import Notices
from nbgpu_lab.sampler import EVERY_SECONDS, Sampler


async def usage(jp_fetch: Any, **query: str) -> Any:
    return json.loads((await jp_fetch("nbgpu/api/usage", params=query)).body)


async def test_no_slice_shows_nothing(jp_fetch: Any) -> None:
    assert await usage(jp_fetch) == {"slice_id": None}
    assert json.loads((await jp_fetch("nbgpu/api/events")).body) == []
    with pytest.raises(HTTPClientError) as refusal:
        await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body="{}")
    assert refusal.value.code == 404


async def test_many_tabs_cost_the_agent_no_more(agent: FakeAgent, jp_fetch: Any) -> None:
    answers = await asyncio.gather(*(usage(jp_fetch) for _ in range(100)))
    assert {answer["devices"][0]["memory_used_bytes"] for answer in answers} == {3 * GIB}
    assert all(answer["agent"]["ok"] for answer in answers)
    # 100 answers may take longer than an answer is kept
    assert agent.count("/v1/usage") <= 3


async def asked_in_a_minute(agent: FakeAgent, tabs: int, **how: float) -> int:
    """Return how often the agent is asked while so many pages ask the server once a second, each in its own moment."""
    now = [0.0]
    sampler = Sampler(SliceClient(agent.socket_path), no_kernels, Notices(), clock=lambda: now[0], **how)
    before = agent.count("/v1/usage")
    # a page waits a second after each answer
    for now[0] in sorted(tab / tabs + 1.003 * turn for tab in range(tabs) for turn in range(60)):
        await sampler.usage()
    return agent.count("/v1/usage") - before


async def test_a_hundred_tabs_cost_the_agent_what_one_does(agent: FakeAgent) -> None:
    assert await asked_in_a_minute(agent, 1) == 60, "a page alone is always answered anew"
    assert await asked_in_a_minute(agent, 100) <= 62
    assert await asked_in_a_minute(agent, 100, every_seconds=0.5) > 110, "control"
    assert await asked_in_a_minute(agent, 10, every_seconds=0) == 600, "control"


async def test_what_has_changed_is_asked_for_anew(agent: FakeAgent, jp_fetch: Any) -> None:
    """A limit that was just set is shown at once, whatever was answered a moment ago."""
    agent.kernel("abc", GIB)
    await usage(jp_fetch)
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "5 GiB"}')
    assert (await usage(jp_fetch))["kernels"][0]["limit"]["memory_bytes"] == 5 * GIB


async def test_change_is_seen_after_a_second(agent: FakeAgent, jp_fetch: Any) -> None:
    await usage(jp_fetch)
    agent.used_bytes = 7 * GIB
    deadline = asyncio.get_running_loop().time() + 1.5
    while (await usage(jp_fetch))["devices"][0]["memory_used_bytes"] != 7 * GIB:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def test_polling_is_no_activity(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    settings = jp_serverapp.web_app.settings
    settings.pop("api_last_activity", None)
    for path in ("usage", "history", "events"):
        await jp_fetch("nbgpu/api", path)
    assert "api_last_activity" not in settings
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "1 GiB"}')
    assert "api_last_activity" in settings


@pytest.mark.slow
async def test_agent_away_keeps_the_last_values(agent: FakeAgent, jp_fetch: Any) -> None:
    await usage(jp_fetch)
    await agent.stop()
    await asyncio.sleep(EVERY_SECONDS)
    answer = await usage(jp_fetch)
    assert answer["agent"]["ok"] is False
    assert answer["devices"][0]["memory_used_bytes"] == 3 * GIB
    since = answer["agent"]["since"]
    await asyncio.sleep(EVERY_SECONDS)
    assert (await usage(jp_fetch))["agent"]["since"] == since
    with pytest.raises(HTTPClientError) as refusal:
        await jp_fetch("nbgpu/api/history", params={"seconds": "60"})
    assert refusal.value.code == 503
    await agent.start()
    await asyncio.sleep(EVERY_SECONDS)
    assert (await usage(jp_fetch))["agent"]["ok"] is True


async def test_agent_never_seen(socket_path: str, jp_fetch: Any) -> None:
    answer = await usage(jp_fetch)
    assert answer["slice_id"] is None
    assert answer["agent"]["ok"] is False


async def test_kernels_carry_their_notebooks(agent: FakeAgent, jp_fetch: Any) -> None:
    async def open_session(name: str, kind: str, path: str) -> str:
        body = json.dumps({"name": name, "type": kind, "path": path, "kernel": {"name": "python3"}})
        return json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]

    notebook = await open_session("", "notebook", "deep/train.ipynb")
    console = await open_session("Console 1", "console", "console-1-abc")
    bare = json.loads((await jp_fetch("api/kernels", method="POST", body="{}")).body)["id"]
    agent.kernel(notebook, 2 * GIB)
    agent.kernel(None, GIB)
    kernels = {kernel["kernel_id"]: kernel for kernel in (await usage(jp_fetch))["kernels"]}
    assert kernels[notebook]["name"] == "train.ipynb"
    assert kernels[notebook]["path"] == "deep/train.ipynb"
    assert kernels[notebook]["devices"][0]["memory_used_bytes"] == 2 * GIB
    assert (kernels[console]["name"], kernels[console]["type"]) == ("Console 1", "console")
    assert kernels[console]["devices"] == []
    assert (kernels[bare]["name"], kernels[bare]["path"]) == ("python3", None)
    assert list(kernels)[-1] is None
    assert {kernels[one]["kernel_name"] for one in (notebook, console, bare)} == {"Python 3 (ipykernel)"}
    assert {kernels[one]["language"] for one in (notebook, console, bare)} == {"python"}
    assert (kernels[None]["kernel_name"], kernels[None]["state"], kernels[None]["state_seconds"]) == (None, None, None)


async def test_the_servers_time_is_told(agent: FakeAgent, jp_fetch: Any) -> None:
    assert abs((await usage(jp_fetch))["now"] - time.time()) < 5


async def test_where_a_limit_comes_from_is_told(agent: FakeAgent, jp_fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ORIGINS", origins := limits.Origins())
    agent.kernel("abc", GIB)

    async def source() -> str | None:
        await asyncio.sleep(EVERY_SECONDS)
        return (await usage(jp_fetch))["kernels"][0]["limit_source"]

    assert await source() is None
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "5 GiB"}')
    assert await source() == "panel"
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "5 GiB", "kept": true}')
    assert await source() == "notebook"
    agent.limits["abc"] = {"memory_bytes": GIB, "compute_milli": None}
    assert await source() == "command"
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body="{}")
    assert await source() is None
    for number in range(3000):
        origins.remember(str(number), {"memory_bytes": 1}, "panel", {"compute": "1/2"})
    assert len(origins._set) <= 1000
    assert len(origins._parts) <= 1000


@pytest.mark.parametrize(("asked", "milli", "part"), [("10 %", 12, 100), ("2.5%", 3, 25), ("1/2", 62, 500)])
async def test_a_part_of_the_time_is_told_as_it_was_asked_for(agent: FakeAgent, jp_fetch: Any, asked: str, milli: int, part: int) -> None:
    """What is in force is whole thousandths of the GPU's time: 10 % of an eighth are 12, which are 9.6 %."""
    agent.compute_milli = 125
    agent.kernel("abc", GIB)

    async def told() -> tuple[int, int | None]:
        await asyncio.sleep(EVERY_SECONDS)
        kernel = (await usage(jp_fetch))["kernels"][0]
        return kernel["limit"]["compute_milli"], kernel["limit_part_milli"]

    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body=json.dumps({"compute": asked}))
    assert await told() == (milli, part)
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body=json.dumps({"memory": "1/2", "compute_milli": milli}))
    assert await told() == (milli, part), "the memory alone was changed"
    agent.limits["abc"] = {"memory_bytes": None, "compute_milli": 20}
    assert await told() == (20, None), "something else is in force"
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body=json.dumps({"compute_milli": 20}))
    assert await told() == (20, None)


@pytest.mark.parametrize("path", ["<img src=x onerror=alert(1)>.ipynb", "a\nb\x1b[2J\u202e.ipynb", '"}]; evil.ipynb', "x" * 10_000])
async def test_odd_paths_are_data(agent: FakeAgent, jp_fetch: Any, path: str) -> None:
    """JSON that no browser takes for a page; the panel shows it as text."""
    body = json.dumps({"name": "", "type": "notebook", "path": path, "kernel": {"name": "python3"}})
    kernel_id = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]
    agent.tell("refused", f"Notebook kernel {kernel_id[:8]}… was refused 1 GiB.", kernel_id=kernel_id)
    answer = await jp_fetch("nbgpu/api/usage")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    (kernel,) = (one for one in json.loads(answer.body)["kernels"] if one["kernel_id"] == kernel_id)
    assert (kernel["path"], kernel["name"]) == (path, path)
    await until(lambda: agent.count("/v1/events?after=1"))
    (event,) = json.loads((await jp_fetch("nbgpu/api/events")).body)
    said = path.translate(dict.fromkeys(map(ord, "\n\x1b\u202e")))  # what would turn or break a sentence is left out of it
    assert (event["name"], event["message"]) == (path, f"{said} was refused 1 GiB.")


@pytest.mark.parametrize("kernel_id", ["%1b%5b2J", "a%0ab", "%3Cb%3E", "..%2fother", "x" * 40, "x" * 10_000])
async def test_odd_kernel_ids_are_no_kernels(agent: FakeAgent, jp_fetch: Any, kernel_id: str) -> None:
    with pytest.raises(HTTPClientError) as refusal:
        await jp_fetch(f"nbgpu/api/kernels/{kernel_id}", method="PUT", body='{"memory": "5 GiB"}')
    assert refusal.value.code == 404
    assert agent.limits == {}


async def test_limits_a_kernel(agent: FakeAgent, jp_fetch: Any) -> None:
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "5 GiB"}')
    assert agent.limits == {"abc": {"memory_bytes": 5 * GIB, "compute_milli": None}}
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "1/2"}')
    assert agent.limits == {"abc": {"memory_bytes": 10 * GIB, "compute_milli": None}}
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "", "compute": "1/2"}')
    assert agent.limits == {"abc": {"memory_bytes": None, "compute_milli": 125}}
    await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory_bytes": null, "compute_milli": null}')
    assert agent.limits == {}


async def test_the_command_line_is_told_the_notebooks_names(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    """Nobody looks at the panel: that a kernel starts is enough."""
    asked = {"path": "work/train.ipynb", "name": "train.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
    session = json.loads((await jp_fetch("api", "sessions", method="POST", body=json.dumps(asked))).body)
    named = {session["kernel"]["id"]: KernelName("train.ipynb", "work/train.ipynb")}
    await until(lambda: read_names("fakeslice") == named)
    await jp_fetch("api", "sessions", session["id"], method="DELETE")
    await until(lambda: read_names("fakeslice") == {})


@pytest.mark.parametrize(
    "body",
    ["[]", "junk", '{"memory": "5 apples"}', '{"memory_bytes": -1}', "x" * 10_000, '{"other": 1}', '{"compute": "5 GiB"}', '{"kept": 1}'],
)
async def test_junk_limit_is_a_plain_400(agent: FakeAgent, jp_fetch: Any, body: str) -> None:
    with pytest.raises(HTTPClientError) as refusal:
        await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body=body)
    assert refusal.value.code == 400
    assert json.loads(refusal.value.response.body)["error"]["code"] == "invalid"
    assert agent.limits == {}


async def test_limit_above_the_slice_says_what_may_be_written(agent: FakeAgent, jp_fetch: Any) -> None:
    with pytest.raises(HTTPClientError) as refusal:
        await jp_fetch("nbgpu/api/kernels/abc", method="PUT", body='{"memory": "30 GiB"}')
    assert refusal.value.code == 400
    error = json.loads(refusal.value.response.body)["error"]
    most = "at most 20 GiB, this server's slice, or a fraction of it such as 0.5, 1/2 or 25%"
    assert (error["field"], error["message"]) == ("memory", f"Memory limit is '30 GiB'; it must be {most}.")
    assert agent.count("/v1/kernels/") == 0


async def test_refusal_becomes_an_event(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    heard: list[dict[str, Any]] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        heard.append(data)

    jp_serverapp.event_logger.add_listener(schema_id="https://schema.nbgpu.io/slice/v1", listener=listen)
    before = (await usage(jp_fetch))["last_event"]
    agent.tell("refused", "The slice's limit of 20 GiB refused 1 GiB.")
    await until(lambda: heard, seconds=1)
    assert heard[0]["message"] == "The slice's limit of 20 GiB refused 1 GiB."
    (event,) = json.loads((await jp_fetch("nbgpu/api/events", params={"after": str(before)})).body)
    assert event["kind"] == "refused"
    assert (await usage(jp_fetch, after=str(before)))["events"] == [event]
    assert (await usage(jp_fetch, after=str(event["id"])))["events"] == []


async def test_an_event_names_its_notebook(agent: FakeAgent, jp_fetch: Any) -> None:
    body = json.dumps({"name": "", "type": "notebook", "path": "train.ipynb", "kernel": {"name": "python3"}})
    kernel_id = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]
    agent.tell("refused", f"Notebook kernel {kernel_id[:8]}… was refused 1 GiB.", kernel_id=kernel_id)
    agent.tell("refused", "Notebook kernel 12345678… was refused 1 GiB.", kernel_id="12345678-gone")
    await until(lambda: agent.count("/v1/events?after=2"))
    known, unknown = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert (known["name"], known["path"], known["message"]) == ("train.ipynb", "train.ipynb", "train.ipynb was refused 1 GiB.")
    assert (unknown["name"], unknown["message"]) == (None, "Notebook kernel 12345678… was refused 1 GiB.")


async def test_what_happens_while_no_page_looks_is_there_by_name(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    """A kernel ends with its notebook: the panel that is opened later lists it, and listeners got an event of the schema."""
    heard: list[Any] = []

    async def listen(logger: Any, schema_id: str, data: Any) -> None:
        heard.append(data)

    jp_serverapp.event_logger.add_listener(schema_id=extension.SCHEMA_ID, listener=listen)
    name = "<b>ノート</b>.ipynb"
    asked = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}}
    session = json.loads((await jp_fetch("api/sessions", method="POST", body=json.dumps(asked))).body)
    kernel_id = session["kernel"]["id"]
    await until(lambda: kernel_id in read_names("fakeslice"))
    await jp_fetch("api", "sessions", session["id"], method="DELETE")
    await until(lambda: read_names("fakeslice") == {})
    (ended,) = ended_kernel(kernel_id, 8 * GIB)
    agent.tell(ended.kind, ended.message, kernel_id=kernel_id, level="info")
    await until(lambda: heard)
    (event,) = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert (event["kind"], event["name"], event["path"]) == ("kernel-ended", name, name)
    assert event["message"] == f"{name} ended: the 8 GiB of GPU memory that it held are free again."
    assert [one["message"] for one in heard] == [event["message"]]


def ended_kernel(kernel_id: str, held_bytes: int) -> list[Told]:
    """Return what the agent says of a kernel whose process has ended."""
    happened = Happened()
    happened.look([SlotUse(0, kernel_id, 4711, held_bytes, held_bytes, 0)], {}, 1)
    return happened.look([], {}, 2)


async def test_a_suspended_kernel_is_told_of_and_let_go_on(agent: FakeAgent, jp_fetch: Any) -> None:
    agent.suspend(4711, "some-kernel")
    usage = json.loads((await jp_fetch("nbgpu/api/usage")).body)
    assert [(one["pid"], one["kernel_id"], one["how"]) for one in usage["suspended"]] == [(4711, "some-kernel", "lock")]
    assert usage["may_resume"] is True
    agent.may_resume = False
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch("nbgpu/api/resume", method="POST", body=json.dumps({"pid": 4711}))
    assert refused.value.code == 403
    assert "Only an administrator" in json.loads(refused.value.response.body)["error"]["message"]
    agent.may_resume = True
    await jp_fetch("nbgpu/api/resume", method="POST", body=json.dumps({"pid": 4711}))
    assert json.loads((await jp_fetch("nbgpu/api/usage")).body)["suspended"] == []


async def test_a_kernels_memory_is_moved_to_the_host_and_back(agent: FakeAgent, jp_fetch: Any) -> None:
    agent.kernel("some-kernel", 5 << 30)
    agent.may_suspend = True
    usage = json.loads((await jp_fetch("nbgpu/api/usage")).body)
    assert (usage["may_suspend"], usage["kernels"][0]["away"]) == (True, None)
    path = ("nbgpu", "api", "kernels", "some-kernel")
    moved = json.loads((await jp_fetch(*path, "suspend", method="POST", allow_nonstandard_methods=True)).body)
    assert (moved["phase"], moved["memory_bytes"]) == ("parked", 5 << 30)
    assert json.loads((await jp_fetch("nbgpu/api/usage")).body)["kernels"][0]["away"]["phase"] == "parked", "the next answer shows it"
    assert json.loads((await jp_fetch(*path, "resume", method="POST", allow_nonstandard_methods=True)).body)["phase"] == "restoring"
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch(*path, "resume", method="POST", allow_nonstandard_methods=True)
    assert refused.value.code == 404
    assert "not suspended" in json.loads(refused.value.response.body)["error"]["message"]
    with pytest.raises(HTTPClientError) as unknown:
        await jp_fetch(*path, "elsewhere", method="POST", allow_nonstandard_methods=True)
    assert unknown.value.code == 404


@pytest.mark.parametrize("body", ["", "[]", '{"pid": "1"}', '{"pid": true}', '{"pid": -1}', "{}"])
async def test_what_names_no_process_is_refused(agent: FakeAgent, jp_fetch: Any, body: str) -> None:
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch("nbgpu/api/resume", method="POST", body=body, allow_nonstandard_methods=True)
    assert refused.value.code == 400
    assert agent.count("/v1/resume") == 0


async def test_what_the_watchdog_did_is_said_of_the_notebook(agent: FakeAgent, jp_fetch: Any) -> None:
    body = json.dumps({"name": "", "type": "notebook", "path": "train.ipynb", "kernel": {"name": "python3"}})
    kernel_id = json.loads((await jp_fetch("api/sessions", method="POST", body=body)).body)["kernel"]["id"]
    message = action_message(Process(4711, 1), kernel_id, "ended", "it used the GPU (3 GiB) without nbgpu's limiter")
    agent.tell("killed", message, kernel_id=kernel_id, level="error")
    await until(lambda: agent.count("/v1/events?after=1"))
    [told] = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert (told["kind"], told["level"], told["path"]) == ("killed", "error", "train.ipynb")
    assert told["message"] == (
        "Process 4711 (train.ipynb) was ended: it used the GPU (3 GiB) without nbgpu's limiter. Restart its kernel or program."
    )


async def test_events_survive_an_agent_restart_once(agent: FakeAgent, jp_fetch: Any) -> None:
    agent.tell("refused", "first")
    await until(lambda: agent.count("/v1/events?after=1"))
    await agent.stop()
    agent.tell("refused", "second, which ends the open question")
    await agent.start()
    await asyncio.sleep(1.3)
    agent.events.clear()
    agent.tell("refused", "a new agent counts from one again")
    await asyncio.sleep(0.2)
    events = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert [event["message"] for event in events].count("first") == 1
    assert len({event["id"] for event in events}) == len(events)


async def test_keeps_the_last_hundred(agent: FakeAgent, jp_fetch: Any) -> None:
    for number in range(150):
        agent.tell("refused", str(number))
    await until(lambda: agent.count("/v1/events?after=150"))
    events = json.loads((await jp_fetch("nbgpu/api/events")).body)
    assert [event["message"] for event in events] == [str(number) for number in range(50, 150)]


async def test_needs_a_login(agent: FakeAgent, jp_fetch: Any) -> None:
    for path in ("usage", "history", "events"):
        with pytest.raises(HTTPClientError) as refusal:
            await jp_fetch("nbgpu/api", path, headers={"Authorization": "token wrong"})
        assert refusal.value.code == 403


async def test_bad_queries(agent: FakeAgent, jp_fetch: Any) -> None:
    for path, query in (
        ("history", {"seconds": "0"}),
        ("history", {"seconds": "9999999"}),
        ("events", {"after": "-1"}),
        ("usage", {"after": "x"}),
    ):
        with pytest.raises(HTTPClientError) as refusal:
            await jp_fetch("nbgpu/api", path, params=query)
        assert refusal.value.code == 400


@pytest.mark.slow
async def test_hanging_agent_does_not_hang_the_page(agent: FakeAgent, jp_fetch: Any) -> None:
    await usage(jp_fetch)
    await asyncio.sleep(EVERY_SECONDS)
    agent.delay_seconds = 30
    answer = await asyncio.wait_for(usage(jp_fetch), 4)
    assert answer["agent"]["ok"] is False


@pytest.mark.slow
async def test_a_busy_gpu_keeps_its_server(agent: FakeAgent, jp_fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_ACTIVITY_SECONDS", 1)
    sampler = Sampler(SliceClient(agent.socket_path), no_kernels, Notices())
    settings: dict[str, Any] = {}
    watching = asyncio.ensure_future(extension._keep_busy_server(sampler, settings))
    agent.used_milli = 0
    await until(lambda: agent.count("/v1/history") >= 2, 10)
    assert settings == {}
    agent.used_milli = 100
    await until(lambda: "nbgpu_last_activity" in settings, 10)
    watching.cancel()


async def no_kernels() -> dict[str, Any]:
    return {}


async def test_as_the_server_ends_nobody_is_told_that_its_kernels_have(agent: FakeAgent, jp_fetch: Any, jp_serverapp: Any) -> None:
    """Control: while it runs, it is told."""
    jp_serverapp.write_server_info_file()
    try:
        body = json.dumps({"name": "", "type": "notebook", "path": "a.ipynb", "kernel": {"name": "python3"}})
        await jp_fetch("api/sessions", method="POST", body=body)
        for message in ("while it runs", "as it ends"):
            agent.tell("kernel-ended", message, level="info")
            await until(lambda: agent.count(f"/v1/events?after={agent.events[-1]['id']}"))
            jp_serverapp.remove_server_info_file()
    finally:
        jp_serverapp.remove_server_info_file()
    agent.tell("refused", "and else")
    await until(lambda: agent.count(f"/v1/events?after={agent.events[-1]['id']}"))
    told = [one["message"] for one in json.loads((await jp_fetch("nbgpu/api/events")).body)]
    assert told == ["while it runs", "and else"]
