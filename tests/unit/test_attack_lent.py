"""What a member of a group with a lent guarantee may try against those who were lent it (docs/quotas.md). Pure."""

from __future__ import annotations

from typing import Any

import pytest
from test_pool_giveback import LENT, Pool, grown

from nbgpu.models import GrantState
from nbgpu.quantities import GIB
from nbgpu_pool import giveback
from nbgpu_pool.giveback import GiveBack
from nbgpu_pool.quotas import Limits, Quotas

ASKED = GiveBack(shrink=False, busy_notice_seconds=600)


def test_memory_beyond_the_guarantee_is_not_asked_back() -> None:
    """Half a GPU is guaranteed. A thousandth of the time with all of the memory is not within it: all others would have to go."""
    pool = Pool(quotas=LENT, give_back=GiveBack(shrink=False, busy_notice_seconds=600))
    servers = [pool.running(250, user, mode="strict") for user in "abcd"]
    pool.ask(1000, "m", groups=["bio"])
    assert not pool.core.asks, "the control: all of the time is beyond half a GPU"
    pool = Pool(quotas=LENT, give_back=GiveBack(shrink=False, busy_notice_seconds=600))
    servers = [pool.running(250, user, mode="strict") for user in "abcd"]
    pool.ask(1, "m", groups=["bio"], memory_bytes=80 * GIB)
    assert set(pool.core.asks) != set(servers), "for half a GPU all of them are asked back"


def test_many_small_ones_with_much_memory_do_not_shrink_a_pool() -> None:
    quotas = Quotas(groups={"bio": Limits(guarantee_milli=500, lend=True)})
    pool = Pool(devices=4, quotas=quotas)
    keys = [pool.running(500, f"u{number}") for number in range(8)]
    for key in keys:
        pool.uses(key, 5)
    for _ in range(4):
        pool.ask(1, "m", groups=["bio"], memory_bytes=40 * GIB)
    lost = sum(500 - milli for milli in pool.shrunk().values())
    assert lost <= 500, f"{lost} thousandths were taken from others for a guarantee of 500"


def test_memory_beyond_the_guarantee_is_not_had_out_of_what_is_kept_for_others() -> None:
    """Geo's half is kept; bio's own half is free: a member of bio may have that, not the memory of both."""
    kept = Quotas(groups={name: Limits(guarantee_milli=500) for name in ("bio", "geo")})
    pool = Pool(quotas=kept)
    assert pool.ask(1, "m", groups=["bio"], memory_bytes=80 * GIB).state == GrantState.queued
    assert pool.ask(500, "g", groups=["geo"]).state == GrantState.reserved, "what is kept free is there"


def test_who_asks_and_gives_up_again_and_again_hands_others_what_was_lent() -> None:
    """A friend in no group waits. Each time that the member leaves, the friends get what was taken from the others."""
    pool = Pool(devices=2, quotas=LENT)
    victims = [pool.running(500, f"u{number}") for number in range(4)]
    for key in victims:
        pool.uses(key, 5)
    friends = [pool.ask(250, f"friend{number}", mode="strict").request.request_id for number in range(4)]
    for _ in range(4):
        mine = pool.ask(500, "m", groups=["bio"]).request.request_id
        pool.shrunk()
        pool.core.cancel(mine, "h", pool.now)
        grown(pool)  # what is told to grow back does
        for key in friends:
            entry = pool.core.known(key)
            if entry.state == GrantState.reserved:
                pool.core.renew(entry, pool.now)
    had = [key for key in friends if pool.grant(key).state == GrantState.reserved]
    left = [pool.grant(key).slice.devices[0].compute_milli for key in victims]  # type: ignore[union-attr]
    assert not had, f"the victims have {left} of 500 each, {len(had)} friends in no group have a quarter of a GPU each"


def test_control_without_the_member_nobody_is_made_smaller() -> None:
    pool = Pool(devices=2, quotas=LENT)
    for number in range(4):
        pool.uses(pool.running(500, f"u{number}"), 5)
    pool.ask(250, "friend", mode="strict")
    assert pool.shrunk() == {}


@pytest.mark.parametrize("rounds", [20])
def test_request_and_cancel_asks_back_again_and_again(rounds: int) -> None:
    """Each is a warning in the pool's log, a word in the victim's grant, and an event for all who follow."""
    pool = Pool(quotas=LENT, give_back=GiveBack(shrink=False, busy_notice_seconds=600))
    for user in "ab":
        pool.running(500, user, mode="strict")
    pool.core.drain()
    asked = 0
    for _ in range(rounds):
        mine = pool.ask(500, "m", groups=["bio"]).request.request_id
        asked += len(pool.core.drain().asked)
        pool.core.cancel(mine, "h", pool.now)
        pool.sync()
    assert asked <= 2, f"asked back {asked} times in {rounds} rounds of one second or less"


def test_all_who_wait_for_their_own_have_servers_asked_back_at_once() -> None:
    """What is taken for the first is not there for the second: it would be asked for ten minutes later."""
    pool = Pool(quotas=Quotas(groups={"bio": Limits(guarantee_milli=1000, lend=True)}), give_back=ASKED)
    servers = [pool.running(250, user, mode="strict") for user in "abcd"]
    pool.ask(500, "m", groups=["bio"])
    assert len(pool.core.asks) == 2, "the control: for one of them"
    pool.ask(500, "n", groups=["bio"])
    assert set(pool.core.asks) == set(servers)


def test_who_waits_for_servers_that_are_asked_back_already_costs_the_pool_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody stops them. With 250 devices and twelve who wait each request of anybody took 1.4 s of CPU."""
    devices, claims, looks = 40, 12, 0
    real = giveback.place

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal looks
        looks += 1
        return real(*given, **more)

    monkeypatch.setattr(giveback, "place", counted)
    groups = {"bio": Limits(guarantee_milli=1000 * claims, lend=True), "geo": Limits(guarantee_milli=250 * (devices - claims))}
    pool = Pool(devices=devices, quotas=Quotas(groups=groups), give_back=GiveBack(busy_notice_seconds=600))
    for number in range(4 * devices):  # from those that came first alone a whole device can be had
        own = ["geo"] if number >= 4 * claims and number % 4 == 0 else []
        entry = pool.core.known(pool.ask(250, user=f"u{number}", groups=own).request.request_id)
        if entry.slice is not None:
            entry.state, entry.expires, entry.used_bytes = GrantState.bound, None, 18 * GIB
    for number in range(claims):
        pool.ask(1000, user=f"m{number}", groups=["bio"])
    assert looks > 0, "the control: it is counted"
    looks = 0
    pool.ask(10, user="another")
    assert looks == 0, f"{looks} places were looked for because of one small request, and nothing has changed"
    looks, ask = 0, next(iter(pool.core.asks.values()))
    pool.core.known(ask.slice_id).used_bytes = 17 * GIB
    pool.core._planned = ()
    pool.core._serve(pool.now)
    assert 0 < looks <= 100, f"{looks} places were looked for in a plan that finds all of it asked back"
    assert len(pool.core.asks) == 4 * claims
