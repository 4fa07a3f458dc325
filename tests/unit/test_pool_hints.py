"""One-move hints: whose move or end would let in somebody who waits, as the core finds them and the API tells them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
from test_pool_api import HUB, READ, bearer
from test_pool_held import Pool

from nbgpu.models import GrantState, Hint
from nbgpu_pool import events
from nbgpu_pool import hints as pool_hints
from nbgpu_pool.api import create_app
from nbgpu_pool.auth import Guard, Principal, Token
from nbgpu_pool.hints import IDLE_SECONDS, MOST_ENDS, MOST_WAITING, answer
from nbgpu_pool.idle import IdlePolicy
from nbgpu_pool.service import Service
from nbgpu_pool.state import Settings, Snapshot


class HintPool(Pool):
    def idle(self, key: str, seconds: float | None = 2 * IDLE_SECONDS) -> None:
        self.seen[key] = replace(self.seen[key], idle_seconds=seconds)
        self.sync()

    def hints(self) -> list[Hint]:
        return answer(self.core, self.now).hints


def halves_in_the_way(**more: object) -> tuple[HintPool, list[str], str]:
    """Two devices with a half on each, and one who waits for a whole device."""
    pool = HintPool(devices=2, **more)
    first = [pool.running(500, f"u{n}") for n in range(4)]
    for gone in (first[0], first[2]):
        del pool.seen[gone]
        pool.sync()
    return pool, [first[1], first[3]], pool.ask(1000, "grace").request.request_id


def test_a_move_is_told_where_one_will_do() -> None:
    pool, (one, other), waits = halves_in_the_way()
    assert pool.hints() == [], "nobody is idle"
    pool.idle(one)
    (hint,) = pool.hints()
    assert (hint.kind, hint.request_id, hint.slice_id, hint.slice_owner.user) == ("move", waits, one, "u1")
    assert (hint.from_devices, hint.to_device, hint.devices) == (["GPU-0-0"], "GPU-0-1", ["GPU-0-0"])
    assert hint.idle_seconds >= 2 * IDLE_SECONDS
    pool.idle(one, None)
    pool.idle(other)
    assert pool.hints()[0].slice_id == other
    del pool.seen[one]
    pool.sync()
    assert pool.hints() == [], "it has got in"


def test_what_is_said_is_so() -> None:
    """Who follows the hint lets the request in; control: with the other one moved nobody gets in."""
    for follow in (True, False):
        pool, (one, other), waits = halves_in_the_way()
        pool.idle(one)
        (hint,) = pool.hints()
        moved = hint.slice_id if follow else other
        at = pool.seen[moved].slice
        to = hint.to_device if follow else at.devices[0].uuid
        there = at.model_copy(update={"devices": [at.devices[0].model_copy(update={"uuid": to})]})
        pool.seen[moved] = replace(pool.seen[moved], slice=there)
        pool.sync()
        assert (pool.grant(waits).state.value == "reserved") is follow


def test_the_end_of_one_is_told_where_no_move_helps() -> None:
    pool = HintPool(devices=1)
    ada = pool.running(1000, "ada")
    waits = pool.ask(500, "grace").request.request_id
    assert pool.hints() == []
    pool.idle(ada, IDLE_SECONDS - 1)
    assert pool.hints() == [], "not idle for long enough"
    pool.idle(ada)
    (hint,) = pool.hints()
    assert (hint.kind, hint.request_id, hint.slice_id, hint.to_device, hint.devices) == ("end", waits, ada, None, ["GPU-0-0"])


def test_one_must_be_enough_and_whoever_waits_for_a_quota_or_is_protected_is_left_out() -> None:
    pool = HintPool(devices=1)
    keys = [pool.running(500, f"u{n}") for n in range(2)]
    pool.ask(1000, "grace")
    for key in keys:
        pool.idle(key)
    found = answer(pool.core, pool.now)
    assert (found.hints, found.idle_count, found.waiting_count) == ([], 2, 1)
    for policy in (IdlePolicy(users=frozenset({"u1"})), IdlePolicy(after_seconds=10 * IDLE_SECONDS)):
        pool, (one, _), _ = halves_in_the_way(idle=policy)
        pool.idle(one)
        assert pool.hints() == []


def test_a_long_queue_is_looked_at_from_its_head() -> None:
    pool, (one, _), _ = halves_in_the_way(queue_per_user=1000)
    for _ in range(3 * MOST_WAITING):
        pool.ask(1000, "linus")
    pool.idle(one)
    assert len(pool.hints()) == MOST_WAITING


class Nothing:
    who = "The GPU node"

    async def close(self) -> None:
        pass


@pytest.mark.asyncio
async def test_the_api_tells_them_to_those_who_may_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HINTS_SECONDS", 0.01)
    monkeypatch.setattr("nbgpu_pool.service.HINTS_SECONDS", 0.0)
    pool, (one, _), waits = halves_in_the_way()
    service = Service(Nothing(), Settings(), clock=lambda: pool.now)  # type: ignore[arg-type]
    service.core = pool.core
    other = "another-hub-" + "x" * 20
    guard = Guard([Token(HUB, Principal("hub", "h")), Token(other, Principal("hub", "other")), Token(READ, Principal("read"))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service, guard)), base_url="http://pool") as http:

        async def told(secret: str) -> dict:
            return (await http.get("/v1/hints", headers=bearer(secret))).json()

        assert (await http.get("/v1/hints")).status_code == 401
        assert (await told(READ))["hints"] == []
        pool.idle(one)
        assert [hint["request_id"] for hint in (await told(READ))["hints"]] == [waits]
        assert (await told(HUB))["hints"] == (await told(READ))["hints"]
        assert (await told(other))["hints"] == [], "neither who waits nor who is idle is that hub's"
        assert "Hints" in (await http.get("/openapi.json")).text
        source = events.of_hints(service, Principal("read"))
        first = await asyncio.wait_for(anext(source), 2)
        assert first.startswith("event: hints\ndata: ")
        assert json.loads(first.partition("data: ")[2])["idle_count"] == 1
        del pool.seen[one]
        pool.core.snapshot(Snapshot(pool.core.mark, pool.devices, list(pool.seen.values())), pool.now)
        service.settle()
        assert json.loads((await asyncio.wait_for(anext(source), 5)).partition("data: ")[2])["hints"] == []
        await source.aclose()


def test_a_long_queue_for_what_nobody_s_end_would_give_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many idle servers was tried for each who waits: seconds in which the pool answered nobody, for whoever asked for that."""
    looks = 0
    real = pool_hints._after_end

    def counted(*given: object) -> list[str]:
        nonlocal looks
        looks += 1
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(pool_hints, "_after_end", counted)
    pool = HintPool(nodes=MOST_ENDS // 4, devices=8)
    for number in range(4 * MOST_ENDS):
        entry = pool.core.known(pool.ask(500, f"u{number}").request.request_id)
        entry.state, entry.idle_from, entry.expires = GrantState.bound, -2 * IDLE_SECONDS, None
    for count in (2, 3, 4):
        pool.ask(1000, f"w{count}", device_count=count)
    assert pool.hints() == []
    assert 0 < looks <= 3 * MOST_ENDS
