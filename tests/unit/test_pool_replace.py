"""A request that waits is given up for a smaller one that is free: in one step of the pool, so that nobody loses both."""

from __future__ import annotations

import pytest
from test_pool_idle import IdlePool
from test_pool_queue import Pool

from nbgpu.errors import NbgpuError
from nbgpu.models import AvailabilityQuery, Grant, GrantState, Owner, Request, Shape
from nbgpu_pool import availability
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas


def smaller(pool: Pool, old: Grant, milli: int, **changes: object) -> Request:
    """The request that takes the place of `old`."""
    pool.number += 1
    changes = {"request_id": f"request-{pool.number:05d}", "compute_milli": milli, **changes}
    return old.request.model_copy(update=changes)


def replace(pool: Pool, old: Grant, request: Request) -> Grant:
    return pool.core.replace(pool.core.known(old.request.request_id), request, pool.now)


def look(pool: Pool, old: Grant, milli: int, instead: bool = True) -> str:
    query = AvailabilityQuery(
        owner=old.request.owner, shapes=[Shape(compute_milli=milli)], instead_of=old.request.request_id if instead else None
    )
    return availability.answer(pool.core, query, pool.now)[0].state


def test_the_smaller_one_is_granted_and_the_first_is_gone() -> None:
    pool = Pool()
    pool.started(750, user="grace")
    old = pool.ask(500, user="ada")
    wanted = smaller(pool, old, 250)
    got = replace(pool, old, wanted)
    assert (got.state, pool.state(old.request.request_id)) == (GrantState.reserved, GrantState.gone)
    assert replace(pool, old, wanted) == got, "asked again: the answer was lost on its way"
    assert [one.request.request_id for one in pool.core.grants(pool.now, GrantState.queued)] == []


def test_where_it_is_not_free_any_more_the_first_keeps_its_place() -> None:
    pool = Pool()
    pool.started(750, user="grace")
    old = pool.ask(500, user="ada")
    behind = pool.ask(500, user="edsger")
    pool.started(250, user="barbara")
    for milli in (250, 2000):
        with pytest.raises(NbgpuError):
            replace(pool, old, smaller(pool, old, milli) if milli < 1000 else smaller(pool, old, 1000, model="none"))
    found = pool.core.grant(pool.core.known(old.request.request_id), pool.now)
    assert (found.state, found.position) == (GrantState.queued, 1)
    assert pool.core.grant(pool.core.known(behind.request.request_id), pool.now).position == 2


def test_what_waits_does_not_count_against_the_quota_of_what_takes_its_place() -> None:
    pool = Pool(quotas=Quotas(default=Limits(limit_milli=500)))
    pool.started(500, user="grace")
    pool.started(250, user="edsger")
    old = pool.ask(500, user="ada")
    assert look(pool, old, 250, instead=False) == "forbidden", "the control: beside it this would be above the quota"
    assert look(pool, old, 250) == "free"
    assert replace(pool, old, smaller(pool, old, 250)).state == GrantState.reserved


def test_room_that_is_kept_for_the_first_is_its_own_and_not_others() -> None:
    pool = Pool(fairness=Fairness(overtake_seconds=60))
    pool.started(750, user="grace")
    old = pool.ask(500, user="ada")
    pool.wait(100)  # protected: the device is earmarked
    assert look(pool, old, 250) == "free"
    assert look(pool, pool.ask(250, user="lin"), 250) == "wait", "the control: for others it is kept"
    assert replace(pool, old, smaller(pool, old, 250)).state == GrantState.reserved


def test_room_that_is_kept_for_another_is_not_taken() -> None:
    pool = Pool(fairness=Fairness(overtake_seconds=60))
    pool.started(750, user="grace")
    pool.ask(500, user="edsger")
    pool.wait(100)
    old = pool.ask(500, user="ada")
    assert look(pool, old, 250) == "wait"
    with pytest.raises(NbgpuError, match="you keep your place"):
        replace(pool, old, smaller(pool, old, 250))


def test_only_ones_own_waiting_request_is_given_up() -> None:
    pool = Pool()
    pool.started(750, user="grace")
    old = pool.ask(500, user="ada")
    with pytest.raises(NbgpuError) as caught:
        replace(pool, old, smaller(pool, old, 250, owner=Owner(hub="h", user="eve")))
    assert (caught.value.status, caught.value.code) == (409, "state")
    running = pool.ask(125, user="ada", server="second")
    with pytest.raises(NbgpuError) as caught:
        replace(pool, running, smaller(pool, running, 125))
    assert caught.value.code == "state"
    assert pool.state(old.request.request_id) == GrantState.queued


def test_one_that_was_given_up_before_it_arrived_takes_no_place() -> None:
    """Its hub has stopped waiting for the answer: what would be granted nobody would have, and the place would be lost."""
    pool = Pool()
    pool.started(750, user="grace")
    old = pool.ask(500, user="ada")
    late = smaller(pool, old, 250)
    assert pool.core.cancel(late.request_id, "h", pool.now) is None
    got = replace(pool, old, late)
    assert (got.state, got.reason) == (GrantState.gone, "cancelled before it arrived")
    assert pool.state(old.request.request_id) == GrantState.queued, "it waits on"
    strangers = smaller(pool, old, 250)
    pool.core.cancel(strangers.request_id, "another-hub", pool.now)
    assert replace(pool, old, strangers).state == GrantState.reserved, "control: that was another hub's word"


def test_who_waits_while_an_idle_notebook_is_moved_is_told_so() -> None:
    pool = IdlePool()
    ada = pool.running(1000, "ada")

    def seen() -> str:
        query = AvailabilityQuery(owner=Owner(hub="h", user="grace"), shapes=[Shape(compute_milli=500)])
        return availability.answer(pool.core, query, pool.now)[0].reason

    assert "idle" not in seen(), "the control: ada works"
    pool.idle(ada)
    assert seen() == "in use, but an idle notebook may make room for you within a minute"
    grace = pool.ask(500, "grace").request.request_id
    pool.sync()
    assert pool.asked_to_park() == [ada]
    waits = pool.grant(grace)
    assert waits.reason == "an idle notebook is being moved off the GPU to make room for you; that takes some seconds"
    assert waits.wait_seconds is not None
    assert waits.wait_seconds < 60
    assert not waits.wait_guessed
    behind = pool.ask(1000, "lin").request.request_id
    assert "idle" not in (pool.grant(behind).reason or ""), "it is not moved for this one"
    pool.park(ada)
    assert pool.grant(grace).state == GrantState.reserved
