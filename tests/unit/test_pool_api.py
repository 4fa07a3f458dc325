"""The pool's real ASGI application and service against a fake agent on a real Unix socket."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx
import pytest
from pool_fake_agent import AgentTruth, FakeAgent, device

from nbgpu.quantities import GIB, MIB
from nbgpu_pool.api import create_app
from nbgpu_pool.auth import Guard, Principal, Token
from nbgpu_pool.ledger import AgentLedger
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.service import Service
from nbgpu_pool.state import Settings
from nbgpu_pool.windows import Window

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


class World:
    """A fake agent and a pool over it, both of which can be stopped and started."""

    def __init__(self, directory: Path, devices: int, settings: Settings, guard: Guard | None):
        self.truth = AgentTruth([device(index) for index in range(devices)])
        self.agent = FakeAgent(directory / "agent.sock", self.truth)
        self.directory, self.settings, self.guard = directory, settings, guard

    async def start_pool(self) -> None:
        self.service = Service(AgentLedger(self.directory / "agent.sock"), self.settings)
        transport = httpx.ASGITransport(create_app(self.service, self.guard))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://pool")
        self.service.start()

    async def stop_pool(self) -> None:
        await self.http.aclose()
        await self.service.stop()

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            await asyncio.sleep(0.005)

    async def ask(self, milli: int = 250, **more: object) -> httpx.Response:
        return await self.http.post("/v1/requests", json=body(milli, **more))

    async def grant(self, request_id: str) -> dict:
        return (await self.http.get(f"/v1/requests/{request_id}")).json()

    async def bound(self, milli: int = 250, **more: object) -> str:
        """A slice whose server runs."""
        grant = (await self.ask(milli, **more)).json()
        request_id = grant["request"]["request_id"]
        assert grant["state"] == "reserved", grant
        assert (await self.http.post(f"/v1/requests/{request_id}/prepare", json={"uid": None})).status_code == 200
        answer = await self.http.post(f"/v1/requests/{request_id}/bind", json={"pid": 4321})
        assert answer.json()["state"] == "bound", answer.text
        return request_id


def body(milli: int = 250, *, user: str = "ada", server: str = "", hub: str = "hub", request_id: str | None = None, **more: object) -> dict:
    owner = {"hub": hub, "user": user, "server": server}
    return {"request_id": request_id or uuid4().hex, "owner": owner, "compute_milli": milli, **more}


@asynccontextmanager
async def world(devices: int = 1, *, guard: Guard | None = None, ready: bool = True, **settings: object) -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="nbgpu-pool-", dir="/tmp") as name:
        here = World(Path(name), devices, Settings(**settings), guard)  # type: ignore[arg-type]
        if ready:
            await here.agent.start()
        await here.start_pool()
        if ready:
            await here.until(lambda: here.service.core.ready)
        try:
            yield here
        finally:
            await here.stop_pool()
            await here.agent.stop()


async def test_a_slice_from_request_to_end() -> None:
    async with world() as w:
        request_id = await w.bound(250)
        grant = await w.grant(request_id)
        assert grant["slice"]["devices"][0]["memory_bytes"] == 79 * GIB // 4 // MIB * MIB
        books = (await w.http.get("/v1/devices")).json()
        assert books[0]["compute_granted_milli"] == 250
        assert books[0]["slices"] == [request_id]
        asked = await w.http.delete(f"/v1/requests/{request_id}")
        assert asked.json()["state"] == "releasing"
        assert (await w.http.get("/v1/devices")).json()[0]["compute_granted_milli"] == 250, "only the last process's end frees it"
        await w.until(lambda: w.truth.slices[request_id].state == "releasing")
        w.truth.end(request_id)
        await w.until(lambda: w.service.core.entry(request_id).state == "gone")
        assert (await w.http.get("/v1/devices")).json()[0]["compute_granted_milli"] == 0


async def test_acquiring_twice_is_one_grant_and_another_body_is_refused() -> None:
    async with world() as w:
        first = await w.ask(250, request_id="same-request")
        again = await w.ask(250, request_id="same-request")
        assert first.json()["slice"] == again.json()["slice"]
        other = await w.ask(500, request_id="same-request")
        assert other.status_code == 409
        assert other.json()["error"]["code"] == "conflict"
        assert (await w.http.get("/v1/devices")).json()[0]["compute_granted_milli"] == 250


async def test_release_before_its_request() -> None:
    async with world() as w:
        assert (await w.http.delete("/v1/requests/late-request")).status_code == 204
        late = await w.ask(250, request_id="late-request")
        assert late.json()["state"] == "gone"
        assert (await w.ask(250, request_id="late-requesu")).json()["state"] == "reserved", "control: without the DELETE it is granted"
        assert w.truth.slices == {}


async def test_queue_events_and_leaving() -> None:
    async with world() as w:
        first = await w.bound(1000)
        waiting = (await w.ask(250, user="grace")).json()
        assert (waiting["state"], waiting["position"], waiting["wait_guessed"]) == ("queued", 1, True)
        assert 3500 < waiting["wait_seconds"] <= 3600
        third = (await w.ask(250, user="edsger")).json()
        assert third["position"] == 2
        events = asyncio.create_task(collect(w, third["request"]["request_id"]))
        left = await w.http.delete(f"/v1/requests/{waiting['request']['request_id']}")
        assert left.json()["state"] == "gone"
        await w.until(lambda: w.service.core.known(third["request"]["request_id"]).state == "queued")
        w.truth.end(first)
        seen = await asyncio.wait_for(events, 5)
        assert seen[-1]["state"] == "reserved"
        assert all(one["state"] == "queued" for one in seen[:-1])


async def collect(w: World, request_id: str) -> list[dict]:
    answer = await w.http.get(f"/v1/requests/{request_id}/events")
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


async def test_nothing_is_granted_before_the_books_are_rebuilt() -> None:
    async with world(ready=False) as w:
        early = await w.ask(250)
        assert early.status_code == 503
        assert "rebuilding the books" in early.json()["error"]["message"]
        assert (await w.http.get("/v1/requests/some-request")).status_code == 503
        assert (await w.http.get("/healthz")).json() == {"status": "ok", "ready": False, "connected": False}
        await w.agent.start()
        await w.until(lambda: w.service.core.ready)
        assert (await w.ask(250)).json()["state"] == "reserved"


async def test_a_new_pool_finds_what_runs() -> None:
    async with world() as w:
        running = await w.bound(500)
        prepared = (await w.ask(250)).json()["request"]["request_id"]
        await w.http.post(f"/v1/requests/{prepared}/prepare", json={})
        await w.stop_pool()
        await w.start_pool()
        await w.until(lambda: w.service.core.ready)
        assert (await w.grant(running))["state"] == "bound"
        assert (await w.grant(prepared))["state"] == "reserved"
        assert (await w.ask(500)).json()["state"] == "queued", "three quarters are given"
        again = await w.ask(500, request_id=running)
        assert again.json()["state"] == "bound", "the same request finds its grant again"


async def test_agent_away_holds_the_queue_and_its_return_frees_what_ended() -> None:
    async with world() as w:
        running = await w.bound(1000)
        await w.agent.stop()
        await w.until(lambda: not w.service.core.connected)
        w.truth.end(running)
        held = (await w.ask(250, user="grace")).json()
        assert held["state"] == "queued"
        assert "does not answer" in held["reason"]
        assert (await w.grant(running))["state"] == "bound", "from the cache"
        prepare = await w.http.post(f"/v1/requests/{running}/prepare", json={})
        assert prepare.status_code == 503
        shape = {"owner": {"hub": "hub", "user": "x"}, "shapes": [{"compute_milli": 250}]}
        assert (await w.http.post("/v1/availability", json=shape)).json()[0]["state"] == "wait"
        await w.agent.start()
        await w.until(lambda: w.service.core.known(held["request"]["request_id"]).state == "reserved")
        assert (await w.grant(running))["state"] == "gone"


async def test_reservation_falls_back_when_nobody_carries_it() -> None:
    async with world(reservation_ttl_seconds=0.3) as w:
        lost = (await w.ask(1000)).json()["request"]["request_id"]
        prepared = await w.http.post(f"/v1/requests/{lost}/prepare", json={})
        assert prepared.status_code == 200
        next_one = (await w.ask(1000, user="grace")).json()
        assert next_one["state"] == "queued"
        await w.until(lambda: w.service.core.entry(next_one["request"]["request_id"]).state == "reserved")
        assert (await w.grant(lost))["state"] == "gone"
        assert lost not in w.truth.slices
        bind = await w.http.post(f"/v1/requests/{lost}/bind", json={"pid": 1})
        assert bind.status_code == 409
        assert "expired" in bind.json()["error"]["message"]


async def test_bound_needs_no_renewal() -> None:
    """Control of the test above: the same, but a server carries it."""
    async with world(reservation_ttl_seconds=0.3) as w:
        kept = await w.bound(1000)
        await asyncio.sleep(0.8)
        assert (await w.grant(kept))["state"] == "bound"


async def test_release_by_owner_spares_the_new_request() -> None:
    async with world() as w:
        old = await w.bound(250, server="lab")
        new = (await w.ask(250, server="lab")).json()["request"]["request_id"]
        other = (await w.ask(250, server="other")).json()["request"]["request_id"]
        owner = {"hub": "hub", "user": "ada", "server": "lab"}
        freed = await w.http.post("/v1/release", json={"owner": owner, "except_request_id": new})
        assert [one["request"]["request_id"] for one in freed.json()] == [old]
        assert (await w.grant(new))["state"] == "reserved"
        assert (await w.grant(other))["state"] == "reserved"


async def test_quota_says_which_and_by_how_much() -> None:
    quotas = Quotas(default=Limits(limit_milli=500))
    async with world(2, quotas=quotas) as w:
        await w.bound(250, server="train")
        refused = await w.ask(500, server="lab")
        assert refused.status_code == 403
        assert refused.json()["error"] == {
            "code": "quota",
            "message": "Your quota is half a GPU: you hold a quarter of a GPU on 'train' and asked for half a GPU.",
        }
    async with world(2) as w:
        await w.bound(250, server="train")
        assert (await w.ask(500, server="lab")).status_code == 200, "control: without the quota it is granted"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"compute_milli": 0}, "compute_milli"),
        ({"compute_milli": -5}, "compute_milli"),
        ({"compute_milli": 1001}, "compute_milli"),
        ({"compute_milli": "NaN"}, "compute_milli"),
        ({"compute_milli": None}, "compute_milli"),
        ({"memory_milli": 10, "memory_bytes": 2**30}, "memory_bytes"),
        ({"device_count": 0}, "device_count"),
        ({"device_count": 17}, "device_count"),
        ({"request_id": "Bad Id"}, "request_id"),
        ({"owner": {"hub": "", "user": "a"}}, "owner.hub"),
        ({"mode": "fast"}, "mode"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_invalid_input_names_field_and_range(change: dict, field: str) -> None:
    async with world() as w:
        answer = await w.http.post("/v1/requests", json={**body(250), **change})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["field"]) == ("invalid", field)
        assert "must be" in error["message"] or "leave it out" in error["message"]


async def test_junk_bodies_and_paths() -> None:
    async with world() as w:
        for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}'):
            answer = await w.http.post("/v1/requests", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "invalid"
        assert (await w.http.get("/nowhere")).json()["error"]["code"] == "unknown"
        assert (await w.http.put("/v1/requests")).status_code == 405
        assert (await w.http.get("/v1/requests/unknown-id")).status_code == 404


async def test_impossible_is_not_a_wait() -> None:
    async with world() as w:
        for change in ({"device_count": 2}, {"model": "Abacus"}, {"compute_milli": None, "memory_bytes": 90 * GIB}):
            answer = await w.http.post("/v1/requests", json={**body(250), **change})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "impossible"), answer.text


async def test_several_devices_are_all_or_nothing_on_one_node() -> None:
    async with world(2) as w:
        await w.bound(500, server="one")
        both = await w.ask(500, device_count=2)
        assert both.json()["state"] == "reserved"
        assert len({one["uuid"] for one in both.json()["slice"]["devices"]}) == 2
        more = await w.ask(500, device_count=2)
        assert more.json()["state"] == "queued", "one device has room, the other has not"
        books = (await w.http.get("/v1/devices")).json()
        assert sorted(one["compute_granted_milli"] for one in books) == [500, 1000]


async def test_node_refuses_a_slice() -> None:
    async with world() as w:
        request_id = (await w.ask(250)).json()["request"]["request_id"]
        w.truth.fail_next = [409]
        answer = await w.http.post(f"/v1/requests/{request_id}/prepare", json={})
        assert answer.status_code == 503
        assert "refused the slice" in answer.json()["error"]["message"]
        await w.until(lambda: w.service.core.entry(request_id).state == "gone")
        assert (await w.http.get("/v1/devices")).json()[0]["compute_granted_milli"] == 0


async def test_release_is_asked_until_the_agent_answers() -> None:
    async with world() as w:
        request_id = await w.bound(250)
        w.truth.fail_next = [500, 500]
        await w.http.delete(f"/v1/requests/{request_id}")
        await w.until(lambda: w.truth.slices[request_id].state == "releasing")
        assert not w.truth.fail_next


async def test_cancel_overtakes_a_slow_prepare() -> None:
    async with world() as w:
        request_id = (await w.ask(1000)).json()["request"]["request_id"]
        w.truth.delay_seconds = 0.2
        slow = asyncio.create_task(w.http.post(f"/v1/requests/{request_id}/prepare", json={}))
        await w.until(lambda: w.service.core.known(request_id).busy == 1)
        assert (await w.http.delete(f"/v1/requests/{request_id}")).json()["state"] == "releasing"
        await slow
        await w.until(lambda: w.service.core.entry(request_id).state == "gone")
        assert w.truth.slices == {}


async def test_availability_in_plain_words() -> None:
    settings = {"quotas": Quotas(users={"poor": Limits(limit_milli=250)}), "fairness": Fairness()}
    async with world(**settings) as w:
        shapes = [{"compute_milli": 250}, {"compute_milli": 1000}, {"memory_bytes": 100 * GIB}, {}]
        query = {"owner": {"hub": "hub", "user": "ada"}, "shapes": shapes}
        quarter, whole, huge, empty = (await w.http.post("/v1/availability", json=query)).json()
        assert (quarter["state"], quarter["reason"], quarter["compute_milli"]) == ("free", "free now", {"Simulated H100 80GB": 250})
        assert whole["state"] == "free"
        assert (huge["state"], huge["reason"]) == ("impossible", "No GPU here has that much: the largest has 79 GiB.")
        assert empty["state"] == "impossible"
        await w.bound(250)
        quarter, whole, *_ = (await w.http.post("/v1/availability", json=query)).json()
        assert (quarter["state"], whole["state"]) == ("free", "wait")
        assert whole["reason"] == "in use: perhaps free within 60 minutes"
        for _ in range(6):
            w.service.core.sessions.ended("hub", 580)
        await w.ask(1000, user="grace")
        whole = (await w.http.post("/v1/availability", json=query)).json()[1]
        assert whole["reason"] == "in use: usually free within 20 minutes, 1 waits before you"
        query["owner"]["user"] = "poor"
        assert "Your quota is a quarter" in (await w.http.post("/v1/availability", json=query)).json()[1]["reason"]


HUB, OTHER, READ = "secret-of-hub-one-1", "secret-of-hub-two-2", "secret-of-a-reader-3"
TOKENS = Guard([Token(HUB, Principal("hub", "hub")), Token(OTHER, Principal("hub", "other")), Token(READ, Principal("read"))])


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_roles_by_token() -> None:
    async with world(guard=TOKENS) as w:
        mine = body(250)
        assert (await w.http.post("/v1/requests", json=mine)).status_code == 401
        assert (await w.http.post("/v1/requests", json=mine, headers=bearer("wrong" * 5))).status_code == 401
        assert (await w.http.post("/v1/requests", json=mine, headers=bearer(READ))).status_code == 403
        assert (await w.http.post("/v1/requests", json=mine, headers=bearer(OTHER))).status_code == 403
        assert (await w.http.post("/v1/requests", json=mine, headers=bearer(HUB))).status_code == 200
        url = f"/v1/requests/{mine['request_id']}"
        assert (await w.http.get(url, headers=bearer(OTHER))).status_code == 404
        assert (await w.http.delete(url, headers=bearer(OTHER))).status_code == 204
        assert (await w.http.get(url, headers=bearer(READ))).json()["state"] == "reserved"
        assert (await w.http.get("/v1/requests", headers=bearer(OTHER))).json() == []
        assert len((await w.http.get("/v1/requests", headers=bearer(HUB))).json()) == 1
        assert (await w.http.post(url + "/renew", headers=bearer(READ))).status_code == 403
        assert (await w.http.get("/metrics")).status_code == 401
        assert 'nbgpu_pool_requests{state="reserved"} 1.0' in (await w.http.get("/metrics", headers=bearer(READ))).text
        assert (await w.http.get("/healthz")).status_code == 200
        assert HUB not in repr(Token(HUB, Principal("hub", "hub")))


async def test_availability_stream() -> None:
    async with world() as w:
        from nbgpu_pool import events

        source = events.of_pool(w.service)
        first = await anext(source)
        await w.ask(250)
        second = await asyncio.wait_for(anext(source), 2)
        assert first.startswith("event: change\ndata: ")
        assert first != second
        await source.aclose()


async def test_resize_on_one_machine() -> None:
    async with world() as here:
        first, second = await here.bound(500), await here.bound(250, user="bob")

        async def resize(request_id: str, **asked: object) -> httpx.Response:
            return await here.http.post(f"/v1/requests/{request_id}/resize", json=asked)

        shrunk = (await resize(first, compute_milli=250, memory_milli=250, mode="strict")).json()
        assert here.truth.slices[first].slice.devices[0].compute_milli == 250
        assert here.truth.slices[first].slice.mode == "strict"
        assert shrunk["state"] == "bound"
        await here.until(lambda: here.service.core.known(first).wanted is None)
        assert (await resize(second, compute_milli=750)).status_code == 200
        refused = await resize(first, compute_milli=500)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no-room")
        assert (await resize(first)).json()["error"]["code"] == "invalid"
        assert (await resize("unknown-request", compute_milli=5)).status_code == 404
        await here.until(lambda: here.service.core.known(second).wanted is None)
        await here.stop_pool()
        await here.start_pool()
        await here.until(lambda: here.service.core.ready)
        books = (await here.http.get("/v1/devices")).json()
        assert books[0]["compute_granted_milli"] == 1000


async def test_a_resize_that_the_agent_does_not_answer_is_told_again() -> None:
    async with world() as here:
        request_id = await here.bound(250)
        here.truth.fail_next = [503]
        refused = await here.http.post(f"/v1/requests/{request_id}/resize", json={"compute_milli": 500})
        assert refused.status_code == 503
        assert here.truth.slices[request_id].slice.devices[0].compute_milli == 250
        assert "asked to fail" in (await here.grant(request_id))["note"]
        await here.agent.stop()
        lost = await here.http.post(f"/v1/requests/{request_id}/resize", json={"compute_milli": 500})
        assert lost.status_code == 503
        await here.agent.start()
        if lost.json()["error"]["code"] == "agent-away":  # else it was known to be away before it was asked
            await here.until(lambda: here.truth.slices[request_id].slice.devices[0].compute_milli == 500)


async def test_a_held_slice_can_be_followed_to_its_end() -> None:
    async with world() as here:
        request_id = await here.bound(250)

        async def follow() -> list[str]:
            answer = await here.http.get(f"/v1/requests/{request_id}/events", params={"held": True})
            return [json.loads(line[6:])["state"] for line in answer.text.splitlines() if line.startswith("data: ")]

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.1)
        await here.http.delete(f"/v1/requests/{request_id}")
        await asyncio.sleep(0.1)
        here.truth.end(request_id)
        assert await asyncio.wait_for(following, 10) == ["bound", "releasing", "gone"]


async def test_reservations_and_what_is_asked_back() -> None:
    window = Window("class biology", "bio", 8, 125, frozenset(range(7)), 0, 24 * 60, ZoneInfo("UTC"))
    async with world(windows=(window,)) as w:
        (found,) = (await w.http.get("/v1/reservations")).json()
        assert (found["name"], found["place_count"], found["ready_count"], found["short_count"]) == ("class biology", 8, 8, 0)
        assert found["begins_seconds"] <= 0 < found["ends_seconds"]
        assert (await w.ask(125)).json()["state"] == "queued"
        request_id = await w.bound(125, user="student", groups=["bio"], session_seconds=60)
        assert (await w.http.get("/v1/asks")).json() == []
        w.service.core.known(request_id).started -= 100
        await w.until(lambda: w.service.asks(), 15)
        (ask,) = (await w.http.get("/v1/asks")).json()
        assert (ask["request_id"], ask["kind"]) == (request_id, "session")
        assert ask["due_seconds"] < -39
        assert "must be stopped by its user or by hub hub" in ask["needs"]
        assert (await w.grant(request_id))["note"].startswith("Please save your work and stop this server now")


async def test_what_may_not_be_so_any_more_is_asked_back_from_nobody() -> None:
    """Who acts on it ends servers: one that was idle may be busy since the node was last heard of."""
    async with world() as w:
        request_id = await w.bound(125, session_seconds=60)
        w.service.core.known(request_id).started -= 100
        await w.until(lambda: w.service.asks(), 15)
        await w.agent.stop()
        await w.until(lambda: not w.service.core.connected)
        refused = await w.http.get("/v1/asks")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "agent-away")
        w.service.core.ready = False
        assert (await w.http.get("/v1/asks")).json()["error"]["code"] == "starting"
