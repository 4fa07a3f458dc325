"""The Kubernetes client's side: calls and refusals, lists in pages, the reflector through faults."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fake_kube import FakeKube
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kubernetes", reason="nbgpu[kubernetes] is not installed")

from nbgpu.kube import (
    DEEPEST,
    ApiServerAway,
    Conflict,
    Expired,
    Kube,
    NoCluster,
    NotAllowed,
    NotFound,
    Rejected,
    _flat,
    _refusal,
    credentials,
    newer,
    path,
)
from nbgpu.kube_reflector import LEFT_OUT, Reflector

MAPS = "/api/v1/configmaps"
pytestmark = pytest.mark.asyncio


def kubeconfig(folder: Path, url: str, token: str = "secret-1") -> Path:
    """Write a kubeconfig for `url`."""
    file = folder / "kubeconfig"
    user = {"name": "u", "user": {"token": token}}
    cluster = {"name": "c", "cluster": {"server": url}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    told = {"apiVersion": "v1", "kind": "Config", "current-context": "x", "clusters": [cluster], "users": [user], "contexts": [context]}
    file.write_text(json.dumps(told))
    return file


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeKube]:
    async with FakeKube() as server:
        yield server


@pytest_asyncio.fixture
async def kube(fake: FakeKube, tmp_path: Path) -> AsyncIterator[Kube]:
    client = Kube(credentials(kubeconfig(tmp_path, fake.url)))
    yield client
    await client.close()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def a_map(name: str, **data: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "data": data}


def followed(kube: Kube, **more: Any) -> Reflector[dict[str, str]]:
    reflector: Reflector[dict[str, str]] = Reflector(kube, MAPS, lambda thing: thing.get("data", {}), **more)
    reflector.start()
    return reflector


# -- calls


async def test_create_read_change_delete(kube: Kube, fake: FakeKube) -> None:
    there = path("v1", "configmaps", "ns")
    made = await kube.create(there, a_map("a", x="1"))
    uid, version = made["metadata"]["uid"], made["metadata"]["resourceVersion"]
    one = path("v1", "configmaps", "ns", "a")
    assert (await kube.get(one))["data"] == {"x": "1"}
    changed = await kube.patch(one, {"data": {"y": "2"}}, uid=uid, version=version)
    assert changed["data"] == {"x": "1", "y": "2"}
    with pytest.raises(Conflict):
        await kube.patch(one, {"data": {"y": "3"}}, version=version)
    with pytest.raises(Conflict):
        await kube.replace(one, made)
    with pytest.raises(Conflict):
        await kube.delete(one, uid="another")
    await kube.delete(one, uid=uid)
    with pytest.raises(NotFound):
        await kube.delete(one)
    assert fake.tokens[0] == "Bearer secret-1"


async def test_a_taken_name_is_told_from_a_changed_object(kube: Kube) -> None:
    await kube.create(path("v1", "configmaps", "ns"), a_map("a"))
    with pytest.raises(Conflict) as caught:
        await kube.create(path("v1", "configmaps", "ns"), a_map("a"))
    assert caught.value.reason == "AlreadyExists"
    assert "/api/v1/namespaces/ns/configmaps" in caught.value.message


@pytest.mark.parametrize(
    ("status", "error"),
    [(403, NotAllowed), (422, Rejected), (400, Rejected), (410, Expired), (429, ApiServerAway), (500, ApiServerAway), (503, ApiServerAway)],
)
async def test_refusals(kube: Kube, fake: FakeKube, status: int, error: type[Exception]) -> None:
    fake.fault = lambda method, path: status
    with pytest.raises(error, match="the test wants it so"):
        await kube.get(path("v1", "configmaps", "ns", "a"))


async def test_a_refusals_own_full_stop_is_not_doubled() -> None:
    assert _refusal("POST", "/x", 403, b'{"message": "ask the administrator."}').message.startswith(
        "Kubernetes refuses to create /x: ask the administrator. Look at"
    )


async def test_a_server_that_is_not_there(kube: Kube, fake: FakeKube) -> None:
    await fake.stop()
    with pytest.raises(ApiServerAway, match="does not answer"):
        await kube.get("/version")
    await fake.start()
    with pytest.raises(NotFound):
        await kube.get(path("v1", "configmaps", "ns", "a"))


async def test_an_answer_that_comes_too_late(kube: Kube, fake: FakeKube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbgpu.kube.CALL_SECONDS", -4.8)  # with the 5 s to connect: 0.2 s
    fake.delay_seconds = 1.0
    with pytest.raises(ApiServerAway):
        await kube.get(path("v1", "configmaps", "ns", "a"))


async def test_a_list_in_pages(kube: Kube, fake: FakeKube) -> None:
    for number in range(25):
        fake.put(MAPS, a_map(f"m{number:02}"), "ns")
    fake.requests.clear()
    found = await kube.list(MAPS, page=10)
    assert [one["metadata"]["name"] for one in found.items] == [f"m{number:02}" for number in range(25)]
    assert len(fake.requests) == 3
    assert found.version == str(fake.version)


async def test_a_list_whose_version_goes_between_pages(kube: Kube, fake: FakeKube) -> None:
    for number in range(25):
        fake.put(MAPS, a_map(f"m{number:02}"), "ns")
    pages = kube.pages(MAPS, page=10)
    await anext(pages)
    fake.put(MAPS, a_map("another"), "ns")
    fake.compact()
    with pytest.raises(Expired):
        await anext(pages)


async def test_no_call_goes_without_the_token_while_another_reads_it(fake: FakeKube, tmp_path: Path) -> None:
    configuration = credentials(kubeconfig(tmp_path, fake.url))
    configuration.refresh_api_key_hook = lambda of: time.sleep(0.2)
    client = Kube(configuration)
    fake.put(MAPS, a_map("a"), "ns")
    await asyncio.gather(*(client.get(path("v1", "configmaps", "ns", "a")) for _ in range(5)))
    assert set(fake.tokens) == {"Bearer secret-1"}
    await client.close()


async def test_a_token_that_was_replaced(fake: FakeKube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a service account's: the server knows the new one only, and the client reads it at the first 401."""
    configuration = credentials(kubeconfig(tmp_path, fake.url))
    now = ["secret-1"]
    configuration.refresh_api_key_hook = lambda of: of.api_key.update(BearerToken=f"bearer {now[0]}\n")
    client = Kube(configuration)
    fake.put(MAPS, a_map("a"), "ns")
    await client.get(path("v1", "configmaps", "ns", "a"))
    now[0] = "secret-2"
    fake.fault = lambda method, path: None if fake.tokens[-1] == "bearer secret-2" else 401
    await client.get(path("v1", "configmaps", "ns", "a"))
    assert fake.tokens[-2:] == ["bearer secret-1", "bearer secret-2"]
    now[0] = "secret-3"
    fake.fault = lambda method, path: 401
    with pytest.raises(NotAllowed):
        await client.get(path("v1", "configmaps", "ns", "a"))
    await client.close()


async def test_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoCluster, match="KUBECONFIG"):
        credentials(tmp_path / "none")
    (tmp_path / "junk").write_text("{]")
    with pytest.raises(NoCluster, match="junk"):
        credentials(tmp_path / "junk")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(NoCluster, match="service account"):
        credentials()


async def test_versions_are_numbers() -> None:
    assert newer("10", "9")
    assert not newer("9", "10")
    assert not newer("9", "9")
    assert newer("1", "")


# -- the reflector


async def test_it_follows(kube: Kube, fake: FakeKube) -> None:
    fake.put(MAPS, a_map("a", x="1"), "ns")
    told: list[Any] = []
    states: list[Any] = []
    reflector = followed(
        kube, changed=lambda key, old, new: told.append((key, old, new)), told=lambda: states.append((reflector.ready, reflector.away))
    )
    await until(lambda: reflector.ready)
    assert reflector.items == {("ns", "a"): {"x": "1"}}
    fake.put(MAPS, a_map("b"), "ns")
    fake.put(MAPS, a_map("a", x="2"), "ns")
    fake.remove(MAPS, "b", "ns")
    await until(lambda: len(told) == 4)
    assert told == [
        (("ns", "a"), None, {"x": "1"}),
        (("ns", "b"), None, {}),
        (("ns", "a"), {"x": "1"}, {"x": "2"}),
        (("ns", "b"), {}, None),
    ]
    assert states == [(True, None)]
    await reflector.stop()
    await until(lambda: fake.open_watches == 0)


async def test_waiting_for_a_change(kube: Kube, fake: FakeKube) -> None:
    reflector = followed(kube)
    assert await reflector.wait(0, 5.0)
    assert reflector.ready
    seen = reflector.generation
    assert not await reflector.wait(seen, 0.05)
    fake.put(MAPS, a_map("a"), "ns")
    assert await reflector.wait(seen, 5.0)
    await reflector.stop()


@pytest.mark.slow
async def test_a_dropped_watch_goes_on_where_it_was(kube: Kube, fake: FakeKube) -> None:
    fake.put(MAPS, a_map("a"), "ns")
    states: list[object] = []
    reflector = followed(kube, told=lambda: states.append(reflector.away))
    await until(lambda: fake.open_watches == 1)
    lists = sum(one == ("GET", MAPS) for one in fake.requests)
    for number in range(3):
        fake.drop_watches()
        fake.put(MAPS, a_map(f"b{number}"), "ns")
        await until(lambda number=number: ("ns", f"b{number}") in reflector.items)
    assert states == [None], "a dropped watch is no reason to call the server away"
    assert sum(one == ("GET", MAPS) for one in fake.requests) - lists <= 6, "only watches, no list"
    await reflector.stop()


@pytest.mark.slow
@pytest.mark.parametrize("quietly", [False, True])
async def test_a_history_that_is_gone_is_listed_again(kube: Kube, fake: FakeKube, quietly: bool) -> None:
    fake.expire_watches_quietly = quietly
    fake.put(MAPS, a_map("a"), "ns")
    fake.put(MAPS, a_map("b"), "ns")
    gone: list[Any] = []
    reflector = followed(kube, changed=lambda key, old, new: gone.append(key) if new is None else None)
    await until(lambda: fake.open_watches == 1)
    await fake.stop()
    fake.remove(MAPS, "a", "ns")
    fake.put(MAPS, a_map("c", x="1"), "ns")
    fake.compact()
    await fake.start()
    await until(lambda: set(reflector.items) == {("ns", "b"), ("ns", "c")})
    assert gone == [("ns", "a")]
    assert reflector.away is None
    await reflector.stop()


@pytest.mark.slow
async def test_a_server_that_is_away_is_told_and_followed_again(kube: Kube, fake: FakeKube) -> None:
    fake.put(MAPS, a_map("a"), "ns")
    states: list[bool] = []
    reflector = followed(kube, told=lambda: states.append(reflector.away is None))
    await until(lambda: fake.open_watches == 1)
    await fake.stop()
    await until(lambda: reflector.away is not None)
    assert reflector.ready
    assert reflector.items == {("ns", "a"): {}}, "what it knew stays"
    fake.put(MAPS, a_map("b"), "ns")
    await fake.start()
    await until(lambda: ("ns", "b") in reflector.items)
    assert states == [True, False, True]
    await reflector.stop()


@pytest.mark.slow
async def test_errors_and_junk_end_nothing(kube: Kube, fake: FakeKube) -> None:
    left = [500, 200, 503, 403, 404, 429]
    fake.fault = lambda method, path: left.pop() if left else None
    fake.put(MAPS, a_map("a"), "ns")
    reflector = followed(kube)
    await until(lambda: reflector.away is not None)
    await until(lambda: not left, 90)
    await until(lambda: ("ns", "a") in reflector.items, 40)
    assert reflector.away is None
    await reflector.stop()


async def test_a_slow_server_is_waited_for(kube: Kube, fake: FakeKube) -> None:
    fake.put(MAPS, a_map("a"), "ns")
    fake.delay_seconds = 0.5
    reflector = followed(kube)
    await until(lambda: reflector.ready)
    fake.put(MAPS, a_map("b"), "ns")
    await until(lambda: ("ns", "b") in reflector.items)
    await reflector.stop()


async def test_what_a_call_returned_is_there_at_once_and_never_outlives_its_end(kube: Kube, fake: FakeKube) -> None:
    reflector = followed(kube)
    await until(lambda: fake.open_watches == 1)
    made = await kube.create(path("v1", "configmaps", "ns"), a_map("a", x="1"))
    reflector.note(made)
    assert reflector.items == {("ns", "a"): {"x": "1"}}
    fake.remove(MAPS, "a", "ns")
    await until(lambda: not reflector.items)
    reflector.note(made)  # the answer of a slow call, after the watch has told of the end
    assert not reflector.items
    made = await kube.create(path("v1", "configmaps", "ns"), a_map("a", x="2"))
    await until(lambda: reflector.items == {("ns", "a"): {"x": "2"}})
    await reflector.stop()


async def test_what_was_deleted_here_does_not_come_back(kube: Kube, fake: FakeKube) -> None:
    told: list[Any] = []
    reflector = followed(kube, changed=lambda key, old, new: told.append((old, new)))
    await until(lambda: fake.open_watches == 1)
    made = fake.put(MAPS, a_map("a"), "ns")
    await until(lambda: reflector.items)
    fake.put(MAPS, a_map("a", late="1"), "ns")
    reflector.note_gone(("ns", "a"), made["metadata"]["uid"])
    fake.put(MAPS, a_map("z"), "ns")
    await until(lambda: ("ns", "z") in reflector.items)
    assert ("ns", "a") not in reflector.items
    fake.remove(MAPS, "a", "ns")
    fake.put(MAPS, a_map("a", again="1"), "ns")  # a new object of the name
    await until(lambda: reflector.items.get(("ns", "a")) == {"again": "1"})
    assert told == [(None, {}), ({}, None), (None, {}), (None, {"again": "1"})]
    await reflector.stop()


async def test_what_cannot_be_kept_ends_nothing(kube: Kube, fake: FakeKube, caplog: pytest.LogCaptureFixture) -> None:
    def keep(thing: dict[str, Any]) -> str:
        if "bad" in thing.get("data", {}):
            raise KeyError("bad")
        return "kept"

    reflector: Reflector[str] = Reflector(kube, MAPS, keep)
    fake.put(MAPS, a_map("b", bad="1"), "ns")
    fake.put(MAPS, a_map("c"), "ns")
    reflector.start()
    await until(lambda: reflector.ready)
    assert reflector.items == {("ns", "c"): "kept"}
    assert "left out" in caplog.text
    await reflector.stop()


async def test_what_is_nobodys_business_is_not_held(kube: Kube, fake: FakeKube) -> None:
    told: list[tuple[Any, Any]] = []

    def keep(thing: dict[str, Any]) -> str:
        return "kept" if "mine" in thing.get("data", {}) else LEFT_OUT

    reflector: Reflector[str] = Reflector(kube, MAPS, keep, changed=lambda _, old, new: told.append((old, new)))
    fake.put(MAPS, a_map("a"), "ns")
    fake.put(MAPS, a_map("b", mine="1"), "ns")
    reflector.start()
    await until(lambda: reflector.ready)
    assert reflector.items == {("ns", "b"): "kept"}
    fake.put(MAPS, a_map("a", mine="1"), "ns")
    await until(lambda: ("ns", "a") in reflector.items)
    fake.put(MAPS, a_map("a"), "ns")  # not any more
    await until(lambda: ("ns", "a") not in reflector.items)
    fake.remove(MAPS, "a", "ns")
    fake.put(MAPS, a_map("c", mine="1"), "ns")
    await until(lambda: ("ns", "c") in reflector.items)
    assert told == [(None, "kept"), (None, "kept"), ("kept", None), (None, "kept")]
    await reflector.stop()


# -- what others write


@pytest.mark.parametrize(
    "junk",
    [
        pytest.param(b"[" * 5000 + b"]" * 5000, id="nested"),
        pytest.param(b'{"a":' * 2000 + b'"\\"]}"' + b"}" * 2000, id="objects"),
        pytest.param(b'"\xff\xfe"', id="no-text"),
    ],
)
async def test_what_somebody_writes_into_one_object_does_not_hide_the_others(kube: Kube, fake: FakeKube, junk: bytes) -> None:
    """The API server tells a claim's opaque parameters as they were written: anybody who may make claims wrote them."""
    fake.spoil = lambda told: told.replace(b'"junk"', junk)
    fake.put(MAPS, a_map("a", x="1"), "ns")
    fake.put(MAPS, a_map("b", own="junk", x="[2]"), "ns")
    reflector = followed(kube)
    await until(lambda: reflector.ready or reflector.away is not None)
    assert reflector.away is None
    assert reflector.items["ns", "a"] == {"x": "1"}
    assert reflector.items["ns", "b"]["x"] == "[2]"
    fake.put(MAPS, a_map("c", own="junk", x="{3}"), "ns")  # and in a watch
    fake.put(MAPS, a_map("d", x="4"), "ns")
    await until(lambda: ("ns", "d") in reflector.items)
    assert reflector.items["ns", "c"]["x"] == "{3}"
    await reflector.stop()


@given(
    value=st.recursive(
        st.sampled_from([1, None, '[{"\\]}']), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("[x"), inner)
    ),
    depth=st.integers(90, 110),
)
async def test_what_is_nested_too_deep_is_null_and_nothing_else_is(value: Any, depth: int) -> None:
    def cut(thing: Any, level: int) -> Any:
        if not isinstance(thing, (list, dict)):
            return thing
        if level > DEEPEST:
            return None
        if isinstance(thing, list):
            return [cut(one, level + 1) for one in thing]
        return {name: cut(one, level + 1) for name, one in thing.items()}

    for number in range(depth):
        value = [value, "]"] if number % 2 else {"[": value}
    assert json.loads(_flat(json.dumps(value, separators=(",", ":")).encode())) == cut(value, 1)


async def test_large_objects_come_few_at_a_time(kube: Kube, fake: FakeKube, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of 500 objects of 1.5 MiB is more than a pool or an agent may have of memory."""
    for number in range(60):
        fake.put(MAPS, a_map(f"m{number:02}", x="x" * (4096 if 20 <= number < 40 else 1)), "ns")
    sizes: list[int] = []

    async def listed() -> list[str]:
        sizes.clear()
        names: list[str] = []
        async for page in kube.pages(MAPS):
            sizes.append(len(json.dumps(page.items)))
            names += [one["metadata"]["name"] for one in page.items]
        return names

    everything = [f"m{number:02}" for number in range(60)]
    assert await listed() == everything
    assert len(sizes) == 1
    monkeypatch.setattr("nbgpu.kube.PAGE_BYTES", 20000)
    assert await listed() == everything
    assert max(sizes) <= 20000
    monkeypatch.setattr("nbgpu.kube.PAGE_BYTES", 2000)  # one that is larger than a page may be comes alone
    assert await listed() == everything
    assert len(sizes) < 60
