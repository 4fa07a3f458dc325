"""How others may keep a guarantee from those it is for: waiting long, or for what never comes, holding things up (docs/quotas.md). Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_pool_giveback import KEPT, LENT, Pool, grown

from nbgpu.models import GrantState
from nbgpu.quantities import GIB
from nbgpu_pool.giveback import GiveBack
from nbgpu_pool.held import GROW_SECONDS
from nbgpu_pool.idle import IdlePolicy
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas

LONG = 7300.0
"""Seconds: longer than `overtake_seconds`."""


def test_a_guarantee_is_there_though_somebody_has_waited_long() -> None:
    pool = Pool(devices=2, quotas=KEPT)
    pool.running(1000, "u")
    pool.running(500, "v")
    waits = pool.ask(1000, "w").request.request_id
    assert pool.ask(500, "n", groups=["bio"], request_id="control-1").state == GrantState.reserved, "the control"
    pool.core.cancel("control-1", "h", pool.now)
    pool.sync(LONG)
    assert pool.core.known(waits).protected
    assert pool.ask(250, "x").state == GrantState.queued, "the control: nobody else has what is kept"
    assert pool.ask(500, "n", groups=["bio"]).state == GrantState.reserved


def test_nothing_is_kept_for_who_waits_for_more_than_guarantees_leave() -> None:
    """Half a GPU is kept for bio, for ever: all eight GPUs together are had by nobody. Whoever asks for them waits, and harms nobody."""
    pool = Pool(devices=8, quotas=KEPT)
    waits = pool.ask(1000, "w", device_count=8).request.request_id
    pool.sync(LONG)
    assert pool.ask(250, "x").state == GrantState.reserved, "an empty pool starts nothing"
    assert pool.ask(500, "n", groups=["bio"]).state == GrantState.reserved
    assert pool.grant(waits).state == GrantState.queued
    pool = Pool(devices=8, quotas=KEPT)
    pool.running(1000, "u")
    pool.ask(1000, "w", device_count=7)
    pool.sync(LONG)
    assert pool.ask(250, "x").state == GrantState.queued, "the control: these seven can be had"


def test_what_is_lent_is_taken_back_though_somebody_has_waited_long() -> None:
    pool = Pool(quotas=LENT)
    for key in [pool.running(500, user) for user in "ab"]:
        pool.uses(key, 5)
    pool.ask(1000, "w")
    pool.sync(LONG)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert len(pool.shrunk()) == 2
    assert pool.grant(mine).state == GrantState.reserved


def test_sixteen_who_cannot_be_helped_keep_nobody_else_from_what_is_theirs() -> None:
    """A thousandth each of a model of which all is somebody's own: nothing gives room to them, and the seventeenth is of another group."""
    groups = {"geo": Limits(guarantee_milli=500, lend=True), "bio": Limits(guarantee_milli=500, lend=True)}
    pool = Pool(devices=2, quotas=Quotas(groups=groups | {"own": Limits(guarantee_milli=1000)}))
    pool.devices = [pool.devices[0], pool.devices[1].model_copy(update={"uuid": "GPU-rare", "model": "Rare"})]
    pool.sync()
    pool.running(1000, "owner", groups=["own"], model="Rare")
    for key in [pool.running(500, user, model="Big") for user in "ab"]:
        pool.uses(key, 5)
    for number in range(16):
        assert pool.ask(1 + number, f"g{number % 2}", groups=["geo"], model="Rare").state == GrantState.queued
    pool.core.drain()
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert len(pool.shrunk()) == 2
    assert pool.grant(mine).state == GrantState.reserved


def test_a_slice_whose_parking_never_ends_keeps_nobody_from_what_is_theirs() -> None:
    pool = Pool(devices=2, quotas=LENT, idle=IdlePolicy(after_seconds=60))
    keys = [pool.running(500, user) for user in "abcd"]
    for key in keys:
        pool.uses(key, 5)
    pool.uses(keys[0], 5, idle_seconds=100)
    mine = pool.ask(500, "m", groups=["bio"]).request.request_id
    assert pool.core.drain().parks == [keys[0]]
    pool.core.end_park(pool.core.known(keys[0]), refused=False)
    pool.seen[keys[0]] = replace(pool.seen[keys[0]], parking=True, idle_seconds=None)
    pool.sync()
    assert not pool.core.drain().resizes, "the control: its room is waited for"
    for _ in range(60):
        pool.sync(10)
    assert pool.shrunk()
    assert pool.grant(mine).state == GrantState.reserved


def test_memory_that_does_not_come_is_not_waited_for_without_end() -> None:
    """Its user tells of it at every third look: what the driver sees is counted then, and not what is said to be used."""
    pool = Pool(devices=2, quotas=LENT)
    keys = [pool.running(500, user) for user in "abcd"]
    for key in keys:
        pool.uses(key, 5)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    pool.lowered(5)
    assert not pool.core.drain().resizes, "the control: it may come yet"
    for _ in range(30):
        pool.sync(10)
    assert pool.shrunk()
    assert pool.grant(mine).state == GrantState.reserved


@pytest.mark.parametrize("idle_after", [1800, 60])
def test_notice_is_given_once_however_often_a_server_is_used_again(idle_after: int) -> None:
    """One cell each half an hour, and the hub never ends it: the guarantee is never met."""
    pool = Pool(
        quotas=LENT, give_back=GiveBack(shrink=False, end_idle_after_seconds=idle_after, notice_seconds=300, busy_notice_seconds=3600)
    )
    keys = [pool.running(500, user, mode="strict") for user in "ab"]
    for key in keys:
        pool.uses(key, 5, idle_seconds=idle_after)
    pool.ask(500, "m", groups=["bio"])
    begun, (key,) = pool.now, pool.core.asks
    assert pool.core.asks[key].due == begun + 300
    for _ in range(200):
        for one in keys:
            pool.uses(one, 5, idle_seconds=0)
        pool.sync(10)
        assert pool.core.asks[key].due >= begun + 300, "what was promised is not cut short"
        if pool.core.asks[key].due <= pool.now:
            break
        pool.sync(min(idle_after, 200))
        for one in keys:
            pool.uses(one, 5, idle_seconds=idle_after)
        pool.sync(10)
    assert pool.now <= begun + 300 + 3600 + idle_after + 220


def test_who_waits_for_a_quota_keeps_nobody_from_growing_back() -> None:
    groups = {**LENT.groups, "full": Limits(limit_milli=100)}
    pool = Pool(quotas=Quotas(groups=groups))
    keys = [pool.running(milli, user) for milli, user in ((400, "a"), (400, "b"))]
    pool.running(100, "c", groups=["full"])
    for key in keys:
        pool.uses(key, 5)
    mine = pool.ask(250, "m", groups=["bio"]).request.request_id
    assert pool.shrunk()
    pool.seen[mine] = pool.seen[keys[0]]  # it runs, and ends
    del pool.seen[mine]
    entry = pool.core.known(mine)
    assert entry.state == GrantState.reserved
    entry.was_bound = True
    pool.core.cancel(mine, "h", pool.now)
    assert pool.ask(100, "c", groups=["full"]).state == GrantState.queued
    pool.sync(GROW_SECONDS + 1)
    assert grown(pool)


def test_small_ones_of_the_own_group_do_not_pass_a_large_one_for_ever() -> None:
    assert rounds_until_let_in(fair=True) < 200


def test_control_by_arrival_two_hours_are_the_bound() -> None:
    assert rounds_until_let_in(fair=False) < 200


def rounds_until_let_in(*, fair: bool) -> int:
    """Return after how many minutes one who wants all of the group's quota has it; each minute a quarter ends and another begins."""
    pool = Pool(devices=4, quotas=Quotas(groups={"g": Limits(limit_milli=1000)}), fairness=Fairness(fair=fair))
    held = [pool.running(250, f"u{number}", groups=["g"]) for number in range(4)]
    large = pool.ask(1000, "w", groups=["g"]).request.request_id
    for minute in range(400):
        if held:
            pool.end(held.pop(0))
        if pool.grant(large).state == GrantState.reserved:
            return minute
        small = pool.ask(250, f"x{minute}", groups=["g"])
        if small.state == GrantState.reserved:
            pool.core.cancel(small.request.request_id, "h", pool.now)
            held.append(pool.running(250, f"x{minute}", groups=["g"]))
        pool.sync(60)
    return 400


def test_who_gave_it_back_has_passed_nobody_in_fair_order_either() -> None:
    pool = Pool(devices=2, fairness=Fairness(fair=True))
    pool.running(500, "v")
    pool.running(1000, "u")
    waits = pool.ask(1000, "w").request.request_id
    friend = pool.ask(100, "x").request.request_id
    pool.core.cancel(friend, "h", pool.now)
    pool.sync(LONG)
    assert not pool.core.known(waits).protected
    pool.running(100, "y")
    pool.sync(LONG)
    assert pool.core.known(waits).protected, "the control: a server has run"


def test_one_member_alone_keeps_no_other_from_what_is_theirs() -> None:
    pool = Pool(quotas=Quotas(groups={"bio": Limits(guarantee_milli=1000, lend=True)}), give_back=GiveBack(False, busy_notice_seconds=600))
    for number in range(10):
        pool.running(100, f"u{number}", mode="strict")
    mine = [pool.ask(100, "m", groups=["bio"]).request.request_id for _ in range(10)]
    pool.sync()
    assert len(pool.core.asks) == 10, "the control: for each of them"
    for key in mine:
        pool.core.cancel(key, "h", pool.now)
    pool.sync(1)
    pool.ask(100, "m", groups=["bio"])
    assert not pool.core.asks, "the control: nothing for who has left"
    pool.ask(100, "n", groups=["bio"])
    assert pool.core.asks


def test_who_holds_more_than_their_own_limit_is_made_smaller_too() -> None:
    """A mebibyte below what it holds is enough: the resize is under way for as long as the user likes."""
    pool = Pool(quotas=LENT)
    keys = [pool.running(500, user) for user in "ab"]
    for key in keys:
        pool.uses(key, 39)
        target = pool.resize(key, memory_bytes=38 * GIB)
        assert target is not None
        still = target.model_copy(update={"devices": [target.devices[0].model_copy(update={"memory_bytes": 39 * GIB})]})
        pool.seen[key] = replace(pool.seen[key], slice=still, wanted=target, keeps=True)
    pool.sync()
    assert pool.free() == (2, 0)
    mine = pool.ask(250, "m", groups=["bio"], memory_bytes=2 * GIB).request.request_id
    told = pool.core.drain().resizes
    assert len(told) == 2
    for key in told:
        entry = pool.core.known(key)
        target, held = pool.core.resize_again(entry), pool.seen[key].slice
        assert target is not None
        assert entry.taken_back
        assert (target.devices[0].compute_milli, target.devices[0].memory_bytes) == (375, 38 * GIB)
        still = target.model_copy(update={"devices": [target.devices[0].model_copy(update={"memory_bytes": 39 * GIB})]})
        pool.core.end_resize(entry, None, True, pool.now, keeps=still)
        pool.seen[key] = replace(pool.seen[key], slice=still, wanted=target)
        assert held.devices[0].memory_bytes == 39 * GIB
    pool.sync()
    assert pool.grant(mine).state == GrantState.reserved
    assert {pool.core.known(key).whole.devices[0].memory_bytes for key in keys} == {38 * GIB}, "it grows back to what its user has chosen"  # type: ignore[union-attr]


def test_who_is_being_parked_for_ever_is_asked_back() -> None:
    pool = Pool(quotas=LENT, idle=IdlePolicy(after_seconds=60), give_back=GiveBack(shrink=False, busy_notice_seconds=600))
    key = pool.running(1000, "a")
    pool.uses(key, 5, idle_seconds=100)
    pool.ask(500, "m", groups=["bio"])
    assert pool.core.drain().parks == [key]
    pool.core.end_park(pool.core.known(key), refused=False)
    pool.seen[key] = replace(pool.seen[key], parking=True, idle_seconds=None)
    pool.sync()
    assert not pool.core.asks, "the control: its room is waited for"
    for _ in range(60):
        pool.sync(10)
    assert set(pool.core.asks) == {key}


def test_one_who_cannot_be_helped_does_not_use_up_the_guarantee_of_the_others() -> None:
    """All of the rare model is somebody's own; a member of bio who waits for it has nothing that another one could not have."""
    groups = {"bio": Limits(guarantee_milli=500, lend=True), "own": Limits(guarantee_milli=1000)}
    pool = Pool(devices=2, quotas=Quotas(groups=groups))
    pool.devices = [pool.devices[0], pool.devices[1].model_copy(update={"uuid": "GPU-rare", "model": "Rare"})]
    pool.sync()
    pool.running(1000, "owner", groups=["own"], model="Rare")
    for key in [pool.running(500, user, model="Big") for user in "ab"]:
        pool.uses(key, 5)
    waits = pool.ask(500, "m", groups=["bio"], model="Rare").request.request_id
    mine = pool.ask(250, "n", groups=["bio"]).request.request_id
    assert len(pool.shrunk()) == 2
    assert (pool.grant(mine).state, pool.grant(waits).state) == (GrantState.reserved, GrantState.queued)
    other = pool.ask(500, "o", groups=["bio"]).request.request_id
    pool.sync(10)
    assert not pool.shrunk(), "the control: half of it is used by now"
    assert pool.grant(other).state == GrantState.queued


def test_control_what_is_kept_for_one_who_waits_for_their_own_is_kept_from_the_others_of_it() -> None:
    pool = Pool(quotas=Quotas(groups={"bio": Limits(guarantee_milli=1000, lend=True)}))
    pool.running(600, "v", mode="strict")
    waits = pool.ask(900, "a", groups=["bio"]).request.request_id
    pool.sync(LONG)
    assert pool.core.known(waits).protected
    assert pool.ask(300, "b", groups=["bio"]).state == GrantState.queued


def test_a_guarantee_is_met_elsewhere_first() -> None:
    """What is kept for one who has waited long stays kept while there is other room, also where that fits less well."""
    pool = Pool(devices=3, quotas=KEPT)
    first, second = [pool.running(milli, f"u{milli}") for milli in (1000, 300, 400, 500)][1::2]
    waits = pool.ask(1000, "w").request.request_id
    pool.sync(LONG)
    assert pool.core.known(waits).earmark == ("GPU-0-2",)
    pool.end(first)
    grant = pool.ask(500, "n", groups=["bio"])
    assert grant.slice is not None
    assert grant.slice.devices[0].uuid == "GPU-0-1"
    pool.end(second)
    assert pool.grant(waits).state == GrantState.reserved


def test_two_who_take_turns_at_being_idle_are_not_asked_in_turns_for_ever() -> None:
    """Whenever the one that is asked back is used again the other has been idle for long enough: it is asked instead, with notice anew."""
    pool = Pool(quotas=LENT, give_back=GiveBack(False, end_idle_after_seconds=1800, notice_seconds=300, busy_notice_seconds=3600))
    keys = [pool.running(500, user, mode="strict") for user in "ab"]
    pool.ask(500, "m", groups=["bio"])
    begun, exchanged, last = pool.now, 0, ""
    for number in range(100):
        idle, used = keys[number % 2], keys[1 - number % 2]
        pool.uses(used, 5, idle_seconds=0)
        pool.uses(idle, 5, idle_seconds=1800)
        pool.sync(10)
        ((asked, ask),) = pool.core.asks.items()
        exchanged += asked != last
        last = asked
        if ask.due <= pool.now:
            break
        pool.sync(200)
    assert exchanged > 2, "the control: milder means are taken, within reason"
    assert pool.now <= begun + 2 * 3600 + 3 * 210


def test_nothing_is_taken_where_the_quota_of_who_waits_forbids_to_go() -> None:
    """20 GiB are a quarter of the large GPU, and half of the small one: with a limit of a quarter only the large one will do."""
    quotas = Quotas(default=Limits(limit_milli=1000), users={"m": Limits(limit_milli=250)}, groups=LENT.groups)
    pool = Pool(devices=2, quotas=quotas)
    small = pool.devices[0].model_copy(update={"uuid": "GPU-a", "index": 0, "memory_bytes": 41 * GIB})
    pool.devices = [small, pool.devices[1]]
    pool.sync()
    for user in "abcd":
        pool.uses(pool.running(500, user, mode="strict" if user in "cd" else "burst"), 2)
    (asked,) = {one.slice.devices[0].uuid for key in pool.seen if (one := pool.grant(key)).slice is not None and one.slice.mode == "burst"}
    assert asked == "GPU-a"
    mine = pool.ask(200, "m", groups=["bio"], memory_bytes=20 * GIB).request.request_id
    assert not pool.shrunk()
    assert pool.grant(mine).state == GrantState.queued
    pool.ask(200, "n", groups=["bio"], memory_bytes=20 * GIB)
    assert pool.shrunk(), "the control: who may go there"


def test_what_is_kept_for_one_who_has_waited_long_is_where_their_quota_lets_them_go() -> None:
    """A small GPU, with least to be freed, of which 20 GiB are half; with a limit of a quarter it stood kept, and empty, for ever."""
    pool = Pool(devices=2, quotas=Quotas(users={"m": Limits(limit_milli=250)}))
    pool.devices = [pool.devices[0].model_copy(update={"uuid": "GPU-a", "memory_bytes": 41 * GIB}), pool.devices[1]]
    pool.sync()
    pool.running(1000, "a", model="Big", memory_bytes=80 * GIB)
    pool.sync()
    mine = pool.ask(200, "m", memory_bytes=20 * GIB).request.request_id
    pool.sync(LONG)
    assert pool.core.known(mine).protected
    assert pool.core.known(mine).earmark == ("GPU-0-1",)
    assert pool.ask(500, "x").state == GrantState.reserved, "the small one is free for others"
