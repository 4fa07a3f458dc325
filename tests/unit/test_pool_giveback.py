"""What a guarantee keeps can be lent, and is taken back when somebody it is kept for waits (docs/quotas.md). Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_pool_held import Pool as Played

from nbgpu.models import AvailabilityQuery, GrantState, Owner, Shape
from nbgpu.quantities import GIB
from nbgpu_pool import giveback
from nbgpu_pool.availability import answer
from nbgpu_pool.giveback import LATE_SECONDS, GiveBack
from nbgpu_pool.held import GROW_PAUSE_SECONDS, GROW_SECONDS, SPARED_SECONDS
from nbgpu_pool.idle import IdlePolicy
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.state import Seen

LENT = Quotas(groups={"bio": Limits(guarantee_milli=500, lend=True)})
KEPT = Quotas(groups={"bio": Limits(guarantee_milli=500)})


class Pool(Played):
    def sync(self, seconds: float = 0.0) -> None:
        for entry in self.core.books.waiting():  # their hubs go on asking
            self.core.touch(entry, self.now + seconds)
        super().sync(seconds)

    def uses(self, key: str, gib: float, idle_seconds: float | None = None) -> None:
        self.seen[key] = replace(self.seen[key], used_bytes=int(gib * GIB), idle_seconds=idle_seconds, unused_seconds=idle_seconds)
        self.sync()

    def shrunk(self, refuse: bool = False) -> dict[str, int]:
        """Return what slices are told to keep, in milli-GPU; the node does it."""
        told: dict[str, int] = {}
        for key in self.core.drain().resizes:
            entry = self.core.known(key)
            target = self.core.resize_again(entry)
            assert target is not None
            assert entry.taken_back
            told[key] = target.devices[0].compute_milli
            self.core.end_resize(entry, "it uses more" if refuse else None, not refuse, self.now)
            if not refuse:
                self.seen[key] = replace(self.seen[key], wanted=target)
                self.in_force(key)
        return told

    def lowered(self, used_gib: int) -> list[str]:
        """The smaller limits are in force, and all memory counts as held until the agent has looked again; return of which slices."""
        chosen = self.core.drain().resizes
        for key in chosen:
            entry = self.core.known(key)
            target, held = self.core.resize_again(entry), entry.slice
            assert target is not None
            assert held is not None
            part = held.devices[0].model_copy(update={"compute_milli": target.devices[0].compute_milli})
            still = held.model_copy(update={"devices": [part]})
            self.core.end_resize(entry, None, True, self.now, keeps=still)
            self.seen[key] = replace(self.seen[key], slice=still, wanted=target, keeps=True, used_bytes=used_gib * GIB)
        self.sync()
        return chosen

    def end(self, key: str) -> None:
        del self.seen[key]
        self.core.mark += 1
        self.sync()


def test_what_is_lent_is_used_and_what_is_kept_is_not() -> None:
    assert Pool(quotas=LENT).ask(1000).state == GrantState.reserved
    assert Pool(quotas=KEPT).ask(1000).state == GrantState.queued, "the control"


def test_what_is_waited_for_is_lent_to_nobody_else() -> None:
    pool = Pool(quotas=LENT)
    first, second = pool.running(500, "a", mode="strict"), pool.running(500, "b", mode="strict")
    mine = pool.ask(500, "m", groups=["bio"]).request.request_id
    other = pool.ask(125, "c").request.request_id
    pool.end(first)
    assert pool.grant(mine).state == GrantState.reserved
    assert pool.grant(other).state == GrantState.queued
    pool.end(second)
    assert pool.grant(other).state == GrantState.reserved


def test_a_small_request_does_not_pass_a_group_that_waits_for_its_own() -> None:
    """Half of the half has come free: it adds up for the group."""
    pool = Pool(quotas=LENT)
    first, second, _ = (pool.running(milli, "a", mode="strict") for milli in (250, 250, 500))
    mine = pool.ask(500, "m", groups=["bio"]).request.request_id
    pool.end(first)
    assert pool.ask(125, "c").state == GrantState.queued
    pool.end(second)
    assert pool.grant(mine).state == GrantState.reserved


def test_burst_slices_give_first_what_they_do_not_use_and_keep_half() -> None:
    pool = Pool(quotas=LENT)
    keys = [pool.running(500, user) for user in "ab"]
    for key in keys:
        pool.uses(key, 5)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert pool.shrunk() == dict.fromkeys(keys, 375), "two give a little"
    assert pool.grant(mine).state == GrantState.reserved
    assert "made smaller" in (pool.grant(keys[0]).note or "")
    assert "group bio" in (pool.grant(keys[0]).note or "")
    assert not pool.core.asks


@pytest.mark.parametrize(("used_gib", "others_give"), [(5, False), (38, True)], ids=["not looked at again yet", "used"])
def test_nobody_else_gives_while_memory_that_is_not_used_is_on_its_way(used_gib: int, others_give: bool) -> None:
    """The smaller limit is in force; all counts as held until the agent has looked again: nothing more is taken meanwhile."""
    pool = Pool(devices=2, quotas=LENT)
    keys = [pool.running(500, user) for user in "abcd"]
    for key in keys:
        pool.uses(key, 5)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    chosen = pool.lowered(used_gib)
    assert len(chosen) == 2
    assert bool(pool.core.drain().resizes) is others_give
    for key in chosen:
        pool.in_force(key)
    assert pool.grant(mine).state == GrantState.reserved


@pytest.mark.parametrize(
    ("more", "used", "policy"),
    [
        ({"mode": "strict"}, 5, GiveBack()),
        ({}, 39, GiveBack()),
        ({}, 5, GiveBack(shrink=False)),
        ({}, 5, GiveBack(least_milli=950)),
    ],
    ids=["strict", "in use", "not allowed", "keeps too much"],
)
def test_who_gives_nothing(more: dict[str, object], used: float, policy: GiveBack) -> None:
    pool = Pool(quotas=LENT, give_back=policy)
    for user in "ab":
        pool.uses(pool.running(500, user, **more), used)
    pool.ask(250, "m", groups=["bio"])
    assert pool.shrunk() == {}
    assert not pool.core.asks


def test_nothing_is_taken_for_who_asks_beyond_the_guarantee_or_has_none() -> None:
    pool = Pool(quotas=LENT)
    for user in "ab":
        pool.uses(pool.running(500, user), 5)
    pool.ask(625, "m", groups=["bio"])
    pool.ask(125, "n")
    assert pool.shrunk() == {}


def test_a_server_that_never_used_its_gpu_is_idle_too() -> None:
    """It cannot be parked, as it holds no memory; it is asked back like any other that nobody uses."""
    pool = Pool(quotas=LENT, give_back=GiveBack(shrink=False, end_idle_after_seconds=600))
    never, busy = pool.running(500, "a"), pool.running(500, "b")
    pool.seen[never] = replace(pool.seen[never], used_bytes=0, unused_seconds=590)
    pool.seen[busy] = replace(pool.seen[busy], used_bytes=0)
    pool.sync()
    pool.ask(500, "m", groups=["bio"])
    assert not pool.core.asks
    pool.seen[never] = replace(pool.seen[never], unused_seconds=600)
    pool.sync(10)
    assert list(pool.core.asks) == [never]
    assert pool.core.asks[never].idle


def test_who_does_not_end_is_not_waited_for_for_ever() -> None:
    """A program of `nbgpu run`, or a server of a hub that ends none: after a while another is asked in its place, in its turn."""
    pool = Pool(quotas=LENT, give_back=GiveBack(shrink=False, notice_seconds=60, busy_notice_seconds=90))
    first, second = pool.running(500, "a"), pool.running(500, "b")
    mine = pool.ask(500, "m", groups=["bio"]).request.request_id
    (asked,) = pool.core.asks
    other = first if asked == second else second
    pool.sync(90 + LATE_SECONDS - 1)
    assert list(pool.core.asks) == [asked]
    pool.sync(6)
    assert list(pool.core.asks) == [other]
    assert pool.core.asks[other].due - pool.now == pytest.approx(90)
    pool.sync(30)
    assert list(pool.core.asks) == [other], "with all the notice that there is"
    pool.end(other)
    assert pool.grant(mine).state == GrantState.reserved
    assert not pool.core.asks


def test_who_is_within_their_own_guarantee_gives_nothing() -> None:
    both = Quotas(groups={"bio": Limits(guarantee_milli=500, lend=True), "geo": Limits(guarantee_milli=500, lend=True)})
    pool = Pool(quotas=both)
    own, beyond = pool.running(500, "g", groups=["geo"]), pool.running(500, "x")
    for key in (own, beyond):
        pool.uses(key, 5)
    pool.ask(250, "m", groups=["bio"])
    assert pool.shrunk() == {beyond: 250}


def test_a_node_that_refuses_is_not_asked_again_at_once_and_nothing_is_said_to_the_user() -> None:
    pool = Pool(quotas=LENT)
    keys = [pool.running(500, user) for user in "ab"]
    for key in keys:
        pool.uses(key, 5)
    pool.ask(250, "m", groups=["bio"])
    assert set(pool.shrunk(refuse=True)) == set(keys)
    assert pool.grant(keys[0]).note is None
    pool.sync()
    assert pool.shrunk() == {}
    pool.sync(SPARED_SECONDS)
    assert set(pool.shrunk()) == set(keys)


def asking(**policy: float) -> tuple[Pool, str, str, str]:
    pool = Pool(quotas=LENT, give_back=GiveBack(shrink=False, **policy))  # type: ignore[arg-type]
    busy, idle = pool.running(500, "busy"), pool.running(500, "idle")
    pool.uses(idle, 5, idle_seconds=1000)
    return pool, busy, idle, pool.ask(500, "m", groups=["bio"]).request.request_id


def test_idle_servers_are_asked_back_with_notice_and_the_pool_says_who_would_have_to_end_them() -> None:
    pool, busy, idle, mine = asking(end_idle_after_seconds=600, notice_seconds=300)
    assert set(pool.core.asks) == {idle}
    ask = pool.core.asks[idle]
    assert (ask.kind, ask.due - pool.now, ask.idle) == ("guarantee", 300, True)
    assert "must be stopped by its user or by hub h" in ask.needs
    assert "group bio" in ask.needs
    assert "within 5 minutes" in (pool.grant(idle).note or "")
    assert pool.grant(busy).note is None
    assert idle in pool.core.drain().asked
    pool.sync(400)
    assert pool.core.asks[idle].due < pool.now, "it is not promised anew"
    assert pool.grant(idle).state == GrantState.bound, "nothing is ended by the pool"
    assert pool.core.drain().asked == [], "said once"
    pool.end(idle)
    assert pool.grant(mine).state == GrantState.reserved
    assert not pool.core.asks


def test_an_ask_ends_with_the_need() -> None:
    pool, _, idle, mine = asking(end_idle_after_seconds=600)
    assert idle in pool.core.asks
    pool.core.cancel(mine, "h", pool.now)
    pool.sync()
    assert not pool.core.asks
    assert pool.grant(idle).note is None


def test_without_a_policy_for_it_nobody_is_asked() -> None:
    pool, *_ = asking()
    assert not pool.core.asks
    pool, *_ = asking(end_idle_after_seconds=2000)
    assert not pool.core.asks, "not idle for long enough"


def test_one_that_is_used_again_is_not_asked_any_more_or_has_the_longer_notice() -> None:
    pool, _, idle, _ = asking(end_idle_after_seconds=600, notice_seconds=300)
    pool.uses(idle, 5, None)
    assert not pool.core.asks
    pool, _, idle, _ = asking(end_idle_after_seconds=600, notice_seconds=300, busy_notice_seconds=3600)
    assert set(pool.core.asks) == {idle}, "idle ones first"
    pool.uses(idle, 5, None)
    (ask,) = pool.core.asks.values()
    assert (ask.idle, ask.due - pool.now) == (False, 3600)


def test_idle_slices_are_parked_before_anybody_is_made_smaller() -> None:
    pool = Pool(quotas=LENT, idle=IdlePolicy(after_seconds=600), give_back=GiveBack(end_idle_after_seconds=600))
    busy, idle = pool.running(500, "busy"), pool.running(500, "idle")
    pool.uses(busy, 5)
    pool.uses(idle, 5, idle_seconds=1000)
    pool.ask(250, "m", groups=["bio"])
    effects = pool.core.drain()
    assert (effects.parks, effects.resizes) == ([idle], [])
    assert not pool.core.asks


def test_who_could_not_be_let_in_by_all_that_is_lent_costs_the_pool_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was tried for each lent slice, at each request of anybody: 1.3 s where two such ones waited in a pool of 250 devices."""
    looks = 0
    real = giveback.place

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal looks
        looks += 1
        return real(*given, **more)

    monkeypatch.setattr(giveback, "place", counted)
    pool = Pool(devices=8, quotas=Quotas(groups={"bio": Limits(guarantee_milli=4000, lend=True)}))
    for number in range(32):
        entry = pool.core.known(pool.ask(250, user=f"u{number}", mode="burst").request.request_id)
        entry.state, entry.expires, entry.used_bytes = GrantState.bound, None, GIB
    for number in range(2):
        pool.ask(1000, user=f"w{number}", groups=["bio"], memory_bytes=(60 + number) * GIB)
    looks, pool.core._planned = 0, ()
    pool.ask(10, user="another")
    assert 0 < looks <= 6
    looks = 0
    pool.ask(10, user="another")
    assert looks == 0, "nothing that matters has changed"


def grown(pool: Pool, seconds: float = 1.0) -> dict[str, int]:
    """Return what slices are told to have again, in milli-GPU; the node does it."""
    pool.sync(seconds)
    told: dict[str, int] = {}
    for key in pool.core.drain().resizes:
        entry = pool.core.known(key)
        target = pool.core.resize_again(entry)
        assert target is not None
        assert not entry.taken_back
        told[key] = target.devices[0].compute_milli
        pool.core.end_resize(entry, None, True, pool.now)
        pool.seen[key] = replace(pool.seen[key], wanted=target)
        pool.in_force(key)
    return told


def shrunk_pool() -> tuple[Pool, list[str], str]:
    """Two slices were made smaller for one who is there now."""
    pool = Pool(quotas=LENT)
    keys = [pool.running(500, user) for user in "ab"]
    for key in keys:
        pool.uses(key, 5)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert pool.shrunk() == dict.fromkeys(keys, 375)
    runs(pool, mine)
    return pool, keys[::-1], mine


def runs(pool: Pool, key: str) -> None:
    """A server runs in what was granted."""
    entry = pool.core.known(key)
    pool.seen[key] = Seen(pool.core.begin_prepare(entry), "running")
    pool.core.end_prepare(entry, None, True, pool.now)
    pool.sync()
    assert pool.grant(key).state == GrantState.bound


def test_what_was_made_smaller_grows_back_one_at_a_time_once_nobody_needs_it() -> None:
    pool, keys, mine = shrunk_pool()
    assert grown(pool, GROW_SECONDS) == {}, "there is no room"
    pool.end(mine)
    assert grown(pool) == {keys[0]: 500}
    assert pool.grant(keys[0]).note is None
    assert grown(pool, GROW_PAUSE_SECONDS / 2) == {}
    assert grown(pool, GROW_PAUSE_SECONDS / 2) == {keys[1]: 500}
    assert [entry.slice.devices[0].memory_bytes // GIB for entry in map(pool.core.known, keys) if entry.slice] == [40, 40]
    assert grown(pool, GROW_SECONDS) == {}, "that is all"


def test_it_does_not_go_to_and_fro() -> None:
    pool, keys, mine = shrunk_pool()
    pool.end(mine)
    assert grown(pool, GROW_SECONDS - 1) == {}
    assert grown(pool) == {keys[0]: 500}
    pool.uses(keys[0], 5)
    again = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert pool.shrunk(), "taken again"
    runs(pool, again)
    pool.end(again)
    assert grown(pool, GROW_SECONDS - 1) == {}


def test_nothing_grows_back_while_anybody_waits_or_where_the_user_has_chosen_since() -> None:
    pool, keys, mine = shrunk_pool()
    pool.end(mine)
    pool.resize(keys[0], compute_milli=300)
    pool.in_force(keys[0])
    waits = pool.ask(1000, "w").request.request_id
    assert grown(pool, GROW_SECONDS) == {}
    pool.core.cancel(waits, "h", pool.now)
    assert grown(pool) == {keys[1]: 500}
    assert grown(pool, GROW_SECONDS) == {}


def test_a_growth_that_its_node_refuses_is_not_tried_for_ever() -> None:
    pool, keys, mine = shrunk_pool()
    pool.end(mine)
    pool.sync(GROW_SECONDS)
    pool.core.drain()
    entry = pool.core.known(keys[0])
    assert pool.core.resize_again(entry) is not None
    pool.core.end_resize(entry, "no", False, pool.now)
    pool.core.drain()
    assert pool.grant(keys[0]).resizing is None
    assert keys[0] not in grown(pool, GROW_SECONDS)


def test_one_whose_node_refused_to_make_it_smaller_has_nothing_to_grow_back_to() -> None:
    pool = Pool(quotas=LENT)
    keys = [pool.running(500, user) for user in "ab"]
    for key in keys:
        pool.uses(key, 5)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert set(pool.shrunk(refuse=True)) == set(keys)
    pool.core.cancel(mine, "h", pool.now)
    assert grown(pool, GROW_SECONDS) == {}


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (GiveBack(), "others make room for you at once"),
        (GiveBack(shrink=False, notice_seconds=60, busy_notice_seconds=600), "it is asked back, for within 10 minutes"),
    ],
)
def test_the_start_page_says_that_others_make_room(policy: GiveBack, says: str) -> None:
    """Not when servers usually end: who has a right to it need not wait for that."""
    pool = Pool(quotas=LENT, give_back=policy)
    for user in "ab":
        pool.uses(pool.running(500, user), 5)

    def reason(groups: list[str], milli: int = 250) -> str:
        query = AvailabilityQuery(owner=Owner(hub="h", user="m"), groups=groups, shapes=[Shape(compute_milli=milli)])
        (found,) = answer(pool.core, query, pool.now)
        assert found.state == "wait"
        return found.reason

    assert reason(["bio"]) == f"in use, but what is guaranteed to you was lent: {says}"
    assert "perhaps free within" in reason([])
    assert "perhaps free within" in reason(["bio"], 625), "beyond the guarantee"
    assert not pool.core.asks, "looking takes nothing"
    assert pool.shrunk() == {}
    pool.ask(500, "n", groups=["bio"])
    assert "lent" not in reason(["bio"]), "another has asked for all of it first"
