"""What is taken from others is taken for somebody: it is theirs while they wait, and given back when they leave (docs/quotas.md). Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_pool_giveback import LENT, Pool, grown, runs

from nbgpu.models import GrantState
from nbgpu_pool.giveback import GiveBack
from nbgpu_pool.held import PLAN_SECONDS
from nbgpu_pool.left import LEFT_SECONDS, MOST_OF_HOLDER, MOST_OF_USER
from nbgpu_pool.quotas import Limits, Quotas

ALL = Quotas(groups={"bio": Limits(guarantee_milli=1000, lend=True)})
ASKED = GiveBack(shrink=False, busy_notice_seconds=600)


def lent(milli: int = 500, servers: int = 2, **settings: object) -> tuple[Pool, list[str]]:
    pool = Pool(**{"quotas": LENT, **settings})  # type: ignore[arg-type]
    keys = [pool.running(milli, f"u{number}") for number in range(servers)]
    for key in keys:
        pool.uses(key, 5)
    return pool, keys


def claim(pool: Pool, milli: int = 250, user: str = "m") -> str:
    return pool.ask(milli, user, groups=["bio"]).request.request_id


def leave(pool: Pool, key: str) -> None:
    pool.core.cancel(key, "h", pool.now)


def limits(pool: Pool, keys: list[str]) -> list[int]:
    found = [pool.grant(key).slice for key in keys]
    return [one.devices[0].compute_milli for one in found if one is not None]


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_what_was_taken_for_one_who_leaves_is_given_back_before_others_have_it(how: str) -> None:
    pool, keys = lent()
    friend = pool.ask(125, "friend", mode="strict").request.request_id
    mine = claim(pool)
    assert pool.shrunk() == dict.fromkeys(keys, 375)
    assert pool.grant(mine).state == GrantState.reserved
    if how == "cancelled":
        leave(pool, mine)
    else:
        pool.sync(pool.core.settings.reservation_ttl_seconds)
    assert pool.grant(friend).state == GrantState.queued
    assert grown(pool) == dict.fromkeys(keys, 500)
    assert pool.grant(keys[0]).note is None
    assert limits(pool, keys) == [500, 500]


def test_control_when_a_server_has_run_others_have_what_it_leaves() -> None:
    pool, keys = lent()
    friend = pool.ask(125, "friend", mode="strict").request.request_id
    mine = claim(pool)
    pool.shrunk()
    runs(pool, mine)
    pool.end(mine)
    assert pool.grant(friend).state == GrantState.reserved
    assert limits(pool, keys) == [375, 375]


def test_a_shrink_that_is_still_under_way_is_called_off() -> None:
    pool, keys = lent()
    friend = pool.ask(125, "friend", mode="strict").request.request_id
    leave(pool, claim(pool))
    assert grown(pool) == dict.fromkeys(keys, 500)
    assert limits(pool, keys) == [500, 500]
    assert pool.grant(friend).state == GrantState.queued


def test_while_the_node_is_told_to_make_it_smaller_it_is_owed() -> None:
    pool, keys = lent()
    friend = pool.ask(125, "friend", mode="strict").request.request_id
    mine = claim(pool)
    entries = [pool.core.known(key) for key in keys]
    for entry in entries:
        pool.seen[entry.slice_id] = replace(pool.seen[entry.slice_id], wanted=pool.core.resize_again(entry))
    leave(pool, mine)
    pool.sync()
    for entry in entries:
        pool.core.end_resize(entry, None, True, pool.now)
    assert grown(pool) == dict.fromkeys(keys, 500)
    assert pool.grant(friend).state == GrantState.queued


def test_only_what_was_taken_for_the_one_who_left_is_given_back() -> None:
    pool, keys = lent()
    first = claim(pool)
    assert pool.shrunk() == dict.fromkeys(keys, 375)
    runs(pool, first)
    for key in keys:
        pool.uses(key, 5)
    second = claim(pool, user="n")
    assert pool.shrunk() == dict.fromkeys(keys, 250)
    leave(pool, second)
    assert grown(pool) == dict.fromkeys(keys, 375)
    assert "made smaller" in (pool.grant(keys[0]).note or "")
    pool.end(first)
    assert list(grown(pool, 600).values()) == [500], "and the rest later"


def test_who_takes_a_smaller_share_instead_leaves_the_rest_at_once_and_all_of_it_later() -> None:
    pool, keys = lent()
    friend = pool.ask(125, "friend", mode="strict").request.request_id
    mine = claim(pool, 500)
    first, second = keys
    told = {key: pool.core.resize_again(pool.core.known(key)) for key in keys}
    for key in keys:
        pool.core.end_resize(pool.core.known(key), None, True, pool.now)
        pool.seen[key] = replace(pool.seen[key], wanted=told[key])
    pool.in_force(first)
    assert limits(pool, keys) == [250, 500]
    old = pool.core.known(mine)
    smaller = old.request.model_copy(update={"request_id": "request-smaller", "compute_milli": 250})
    assert pool.core.replace(old, smaller, pool.now).state == GrantState.reserved
    assert grown(pool) == {second: 500}
    assert limits(pool, keys) == [250, 500]
    leave(pool, "request-smaller")
    assert grown(pool) == {first: 500}
    assert pool.grant(friend).state == GrantState.queued
    assert claim(pool, 500), "it has left once"
    assert pool.shrunk() == dict.fromkeys(keys, 250)


def test_who_has_chosen_since_is_left_alone() -> None:
    pool, keys = lent()
    mine = claim(pool)
    pool.shrunk()
    pool.resize(keys[0], compute_milli=300)
    pool.in_force(keys[0])
    leave(pool, mine)
    assert grown(pool) == {keys[1]: 500}


def test_each_who_waits_has_their_own_servers_asked_back_and_only_theirs_are_withdrawn() -> None:
    pool, _ = lent(250, 4, quotas=ALL, give_back=ASKED)
    first = claim(pool, 500)
    of_first = dict(pool.core.asks)
    pool.now += 60
    claim(pool, 500, "n")
    assert len(pool.core.asks) == 4
    assert {key: pool.core.asks[key] for key in of_first} == of_first, "as they were, with the time that they have"
    leave(pool, first)
    pool.sync()
    assert len(pool.core.asks) == 2
    assert not pool.core.asks.keys() & of_first.keys()


def test_an_ask_that_is_not_needed_any_more_is_withdrawn() -> None:
    pool, keys = lent(250, 4, quotas=ALL, give_back=ASKED)
    claim(pool, 500)
    asked = list(pool.core.asks)
    pool.end(next(key for key in keys if key not in asked))
    assert len(pool.core.asks) == 1
    assert pool.core.asks.keys() <= set(asked)


def test_one_that_becomes_idle_is_asked_instead_of_one_that_is_busy() -> None:
    pool, keys = lent(500, 2, give_back=GiveBack(shrink=False, busy_notice_seconds=3600, end_idle_after_seconds=600))
    claim(pool, 500)
    (asked,) = pool.core.asks
    (other,) = (key for key in keys if key != asked)
    pool.uses(other, 5, idle_seconds=1000)
    assert set(pool.core.asks) == {other}


def test_what_a_slice_is_giving_already_is_not_counted_again_when_all_of_it_is_asked_back() -> None:
    """Of 500 a half is on its way: another half is all that an end of that server would add."""
    pool, keys = lent(500, 2, quotas=ALL, give_back=GiveBack(busy_notice_seconds=600))
    claim(pool, 500)
    effects = pool.core.drain()
    assert set(effects.resizes) == set(keys), "nobody has answered yet"
    claim(pool, 500, "n")
    assert set(pool.core.asks) == set(keys)


def test_a_plan_is_made_again_when_something_it_goes_by_changes() -> None:
    pool, keys = lent(500, 2, give_back=GiveBack(shrink=False, end_idle_after_seconds=600))
    claim(pool, 500)
    assert not pool.core.asks
    pool.uses(keys[0], 5, idle_seconds=600 - PLAN_SECONDS)
    assert not pool.core.asks
    pool.now += PLAN_SECONDS
    pool.uses(keys[0], 5, idle_seconds=600)
    assert set(pool.core.asks) == {keys[0]}


def test_who_leaves_again_and_again_has_nothing_taken_for_them_and_others_of_the_group_have() -> None:
    pool, _ = lent(500, 2, give_back=ASKED)
    for _ in range(MOST_OF_USER):
        mine = claim(pool, 500)
        assert pool.core.asks
        leave(pool, mine)
    last = claim(pool, 500)
    assert not pool.core.asks
    leave(pool, last)
    other = claim(pool, 500, "n")
    assert pool.core.asks
    pool.sync(LEFT_SECONDS / 2)
    assert pool.core.asks, "what is asked for one who still waits stays"
    leave(pool, other)
    claim(pool, 500)
    assert not pool.core.asks
    pool.sync(LEFT_SECONDS / 2)
    assert pool.core.asks, "later it is as before"


def test_a_group_whose_members_leave_in_turns_has_nothing_taken_either() -> None:
    pool, _ = lent(500, 2, give_back=ASKED)
    asked = 0
    for number in range(3 * MOST_OF_HOLDER):
        mine = claim(pool, 500, f"m{number}")
        asked += bool(pool.core.asks)
        leave(pool, mine)
    assert asked == MOST_OF_HOLDER


def test_who_leaves_and_had_nothing_taken_for_them_does_not_count() -> None:
    pool, keys = lent(500, 2, give_back=GiveBack(shrink=False, end_idle_after_seconds=600))
    for _ in range(3):
        leave(pool, claim(pool, 500))
    pool.uses(keys[0], 5, idle_seconds=1000)
    claim(pool, 500)
    assert pool.core.asks


def test_what_was_taken_is_not_remembered_for_ever() -> None:
    pool, _ = lent(quotas=ALL)
    for number in range(5):
        mine = claim(pool, user=f"m{number}")
        pool.shrunk()
        leave(pool, mine)
        grown(pool)
    pool.sync(LEFT_SECONDS)
    assert not pool.core._claims
    assert not pool.core._taken
    assert not pool.core._owed
    assert not pool.core._left._when
