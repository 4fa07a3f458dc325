"""Idle slices are parked for those who wait, keep their place, and come back before new requests (docs/idle.md). Pure."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_pool_held import Pool

from nbgpu.errors import NbgpuError, Refused
from nbgpu.models import GrantState, Resize, Slice
from nbgpu.quantities import GIB
from nbgpu_pool.core import Core
from nbgpu_pool.idle import PARKED_NOTE, WANTED_NOTE, IdlePolicy
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.state import Seen, Settings

POLICY = IdlePolicy(after_seconds=600)


def emptied(full: Slice) -> Slice:
    return full.model_copy(update={"devices": [part.model_copy(update={"memory_bytes": 0, "compute_milli": 0}) for part in full.devices]})


class IdlePool(Pool):
    """A pool whose ledger parks slices when it is asked to."""

    def __init__(self, **more: object):
        super().__init__(**{"idle": POLICY, **more})  # type: ignore[arg-type]

    def idle(self, key: str, seconds: float = 1000) -> None:
        self.seen[key] = replace(self.seen[key], idle_seconds=seconds)
        self.sync()

    def asked_to_park(self) -> list[str]:
        """Return what the ledger is asked to park; it has taken note."""
        asked = self.core.drain().parks
        for key in asked:
            self.core.end_park(self.core.known(key), refused=False)
            self.seen[key] = replace(self.seen[key], idle_seconds=None, parking=True)
        return asked

    def park(self, key: str) -> None:
        """The ledger has parked it."""
        one = self.seen[key]
        self.seen[key] = replace(one, slice=emptied(one.slice), full=one.slice, parking=False, idle_seconds=None)
        self.sync()

    def want(self, key: str, seconds: float = 0) -> None:
        self.seen[key] = replace(self.seen[key], wanted_seconds=seconds)
        self.sync()

    def told_to_restore(self) -> list[str]:
        """Return what the ledger is told to bring back; it has."""
        told = self.core.drain().resizes
        for key in told:
            entry = self.core.known(key)
            assert self.core.resize_again(entry) == self.seen[key].full
            self.core.end_resize(entry, None, True, self.now)
            full = self.seen[key].full
            assert full is not None
            self.seen[key] = replace(self.seen[key], slice=full, full=None, wanted_seconds=None)
        return told


def test_an_idle_slice_is_parked_for_one_who_waits_and_comes_back_when_there_is_room() -> None:
    pool = IdlePool()
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    assert pool.asked_to_park() == [], "nobody waits"
    grace = pool.ask(500, "grace").request.request_id
    pool.sync()
    assert pool.asked_to_park() == [ada]
    pool.sync()
    assert pool.grant(grace).state == GrantState.queued, "its room is its own until the ledger says that it is parked"
    pool.park(ada)
    assert pool.grant(grace).state == GrantState.reserved
    assert pool.grant(ada).note == PARKED_NOTE
    assert pool.free() == (40, 500)
    pool.want(ada)
    assert pool.grant(ada).note == WANTED_NOTE
    assert pool.told_to_restore() == []
    late = pool.ask(250, "linus").request.request_id
    pool.sync()
    assert pool.grant(late).state == GrantState.queued, "what is free there is kept for who comes back"
    pool.core.cancel(grace, "h", pool.now)
    pool.sync()
    assert pool.told_to_restore() == [ada]
    assert pool.free() == (0, 0), "booked before it is back"
    pool.sync()
    assert pool.free() == (0, 0)
    assert pool.grant(ada).note is None
    assert pool.grant(late).state == GrantState.queued


def test_who_waits_behind_a_slice_that_comes_back_is_told_no_moment_and_no_usual_time() -> None:
    """Room that is free but kept for it is not theirs in a moment; it comes free after it, and two ended servers make that a guess."""
    pool = IdlePool()
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    grace = pool.ask(500, "grace").request.request_id
    pool.sync()
    pool.asked_to_park()
    pool.park(ada)
    for _ in range(2):
        pool.core.sessions.ended("h", 30.0)
    pool.want(ada)
    late = pool.ask(250, "linus").request.request_id
    estimate = pool.core.forecast(pool.now)[late]
    assert (estimate.seconds, estimate.guessed) == (7200.0, True), "after grace, who is taken to stay an hour, and then ada"
    quarter = pool.core.known(late).want
    ghost = pool.core.forecasts.of(quarter, pool.now)
    assert ghost is not None
    assert ghost.guessed
    assert ghost.seconds >= estimate.seconds
    pool.core.cancel(late, "h", pool.now)
    pool.core.cancel(grace, "h", pool.now)
    pool.sync()
    assert pool.told_to_restore() == [ada]


def test_control_without_wanting_the_room_goes_to_who_waits() -> None:
    pool = IdlePool()
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    pool.ask(500, "grace")
    pool.sync()
    pool.asked_to_park()
    pool.park(ada)
    assert pool.ask(250, "linus").state == GrantState.reserved


@pytest.mark.parametrize(
    "policy",
    [
        IdlePolicy(),
        IdlePolicy(after_seconds=2000),
        IdlePolicy(after_seconds=600, least_bytes=81 * GIB),
        IdlePolicy(after_seconds=600, users=frozenset({"ada"})),
        IdlePolicy(after_seconds=600, groups=frozenset({"staff"})),
    ],
    ids=["off", "not-long", "too-small", "user", "group"],
)
def test_the_policy_protects(policy: IdlePolicy) -> None:
    pool = IdlePool(idle=policy)
    ada = pool.running(1000, "ada", groups=["staff"])
    pool.idle(ada)
    pool.ask(500, "grace")
    pool.sync()
    assert pool.asked_to_park() == []


def test_no_more_are_parked_than_are_needed_and_the_longest_idle_first() -> None:
    pool = IdlePool(devices=2)
    keys = [pool.running(500, f"u{number}") for number in range(4)]
    for number, key in enumerate(keys):
        pool.idle(key, 1000 + 10 * number)
    pool.ask(500, "grace")
    pool.sync()
    assert pool.asked_to_park() == [keys[3]]
    pool.sync()
    pool.ask(1000, "linus")
    pool.sync()
    assert pool.asked_to_park() == [], "one who waits at a time"
    pool.park(keys[3])
    assert len(pool.asked_to_park()) == 2, "a whole device: both of one"


def test_nothing_is_parked_for_a_quota_or_where_it_would_not_help() -> None:
    pool = IdlePool(quotas=Quotas(default=Limits(limit_milli=1000)))
    ada = pool.running(500, "ada")
    grace = pool.running(500, "grace")
    pool.idle(grace)
    with pytest.raises(Refused):
        pool.ask(750, "ada")
    pool.core.cancel(ada, "h", pool.now)  # on its way back: it counts until it is gone
    pool.ask(1000, "ada")
    pool.sync()
    assert pool.asked_to_park() == [], "ada's own slice must end first: parking grace's would not do"


def test_a_parked_slice_counts_in_its_owners_quota() -> None:
    pool = IdlePool(quotas=Quotas(default=Limits(limit_milli=1000)), devices=2)
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    pool.running(1000, "grace")
    pool.ask(1000, "linus")
    pool.sync()
    assert pool.asked_to_park() == [ada]
    pool.park(ada)
    with pytest.raises(Refused):
        pool.ask(125, "ada")


def test_a_refusal_is_not_asked_again_until_the_ledger_says_that_it_is_idle() -> None:
    pool = IdlePool()
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    pool.ask(500, "grace")
    pool.sync()
    assert pool.core.drain().parks == [ada]
    pool.core.end_park(pool.core.known(ada), refused=True)
    pool.core.tick(pool.now + 10)
    assert pool.core.drain().parks == []
    pool.idle(ada)
    assert pool.core.drain().parks == [ada]


def test_a_parked_slice_is_not_resized_and_nobody_grows_into_its_way_back() -> None:
    pool = IdlePool()
    ada = pool.running(500, "ada")
    grace = pool.running(500, "grace")
    pool.idle(ada)
    pool.ask(250, "linus")
    pool.sync()
    pool.asked_to_park()
    pool.park(ada)
    with pytest.raises(NbgpuError, match="parked"):
        pool.core.begin_resize(pool.core.known(ada), Resize(compute_milli=100), pool.now)
    pool.want(ada)
    with pytest.raises(NbgpuError, match="kept"):
        pool.core.begin_resize(pool.core.known(grace), Resize(compute_milli=600), pool.now)


def test_another_idle_slice_is_parked_for_one_that_comes_back() -> None:
    pool = IdlePool()
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    grace = pool.ask(1000, "grace").request.request_id
    pool.sync()
    pool.asked_to_park()
    pool.park(ada)
    entry = pool.core.known(grace)
    pool.seen[grace] = replace(pool.seen[ada], slice=pool.core.begin_prepare(entry), full=None)
    pool.core.end_prepare(entry, None, True, pool.now)
    pool.want(ada)
    assert pool.asked_to_park() == []
    pool.idle(grace)
    assert pool.asked_to_park() == [grace]
    pool.park(grace)
    assert pool.told_to_restore() == [ada]


def test_of_two_that_come_back_the_first_is_not_passed_by_a_smaller_one() -> None:
    pool = IdlePool()
    big, small = pool.running(750, "ada"), pool.running(250, "grace")
    for key in (big, small):
        pool.idle(key)
    first, second = (pool.ask(500, user).request.request_id for user in ("linus", "mary"))
    pool.sync()
    while pool.core.known(second).state == GrantState.queued:
        for key in pool.asked_to_park():
            pool.park(key)
        pool.sync()
    assert {pool.grant(key).state for key in (first, second)} == {GrantState.reserved}
    pool.want(big, 10)
    pool.want(small, 5)
    pool.core.cancel(first, "h", pool.now)
    pool.sync()
    assert pool.told_to_restore() == [], "500 are free: enough for the small one, which came second"
    pool.core.cancel(second, "h", pool.now)
    pool.sync()
    assert sorted(pool.told_to_restore()) == sorted([big, small])


def test_a_pool_that_starts_anew_finds_what_is_parked_and_who_wants_back() -> None:
    pool = IdlePool()
    ada = pool.running(1000, "ada")
    pool.idle(ada)
    pool.ask(1000, "grace")
    pool.sync()
    pool.asked_to_park()
    pool.park(ada)
    pool.want(ada, 5)
    pool.core = Core(Settings(idle=POLICY, quotas=Quotas(default=Limits(limit_milli=1000))))
    pool.sync()
    assert pool.told_to_restore() == [ada]
    with pytest.raises(Refused):
        pool.ask(125, "ada")


def serve(pool: IdlePool, rng: random.Random) -> tuple[int, int]:
    """The ledger does what it is asked, now or later; return how many it was asked to park and has brought back."""
    effects = pool.core.drain()
    for key in effects.parks:
        refused = rng.random() < 0.2
        pool.core.end_park(pool.core.known(key), refused)
        if not refused:
            pool.seen[key] = replace(pool.seen[key], idle_seconds=None, parking=True)
    back = [key for key in effects.resizes if rng.random() < 0.5]
    for key in back:
        one, entry = pool.seen[key], pool.core.known(key)
        full = one.full or one.slice  # told once more what is so already
        assert pool.core.resize_again(entry) == full
        pool.core.end_resize(entry, None, rng.random() < 0.8, pool.now)  # done, or nobody knows
        pool.seen[key] = replace(pool.seen[key], slice=full, full=None, wanted_seconds=None)
    return len(effects.parks), len(back)


def test_books_hold_whatever_happens_in_whatever_order() -> None:
    """Random parkings, wishes, requests, ends and restarts: what is in force and what is booked never exceeds a device."""
    parks = backs = 0
    for seed in range(30):
        rng, pool = random.Random(seed), IdlePool(devices=2)
        for _ in range(100):
            key, step = rng.choice([*pool.seen, ""]), rng.random()
            one = pool.seen.get(key)
            if one is None or step < 0.2:
                take(pool, rng)
            elif step < 0.5 and one.parking:
                pool.park(key)
            elif step < 0.7 and one.full is not None:
                pool.want(key)
            elif step < 0.75:
                del pool.seen[key]
            elif step < 0.8:
                pool.core = Core(Settings(idle=POLICY))
            elif one.full is None and not one.parking:
                pool.idle(key)
            pool.sync(1)
            done = serve(pool, rng)
            parks, backs = parks + done[0], backs + done[1]
            for device in pool.devices:
                parts = [part for seen in pool.seen.values() for part in seen.slice.devices if part.uuid == device.uuid]
                assert sum(part.compute_milli for part in parts) <= 1000, seed
                assert sum(part.memory_bytes for part in parts) <= device.usable_bytes, seed
            assert not pool.core.books.overbooked(), seed
    assert parks > 100, parks
    assert backs > 30, backs


def take(pool: IdlePool, rng: random.Random) -> None:
    """Somebody asks; who is granted it has a server."""
    pool.ask(rng.choice([250, 500, 1000]), f"u{pool.number}")
    for entry in list(pool.core.books.entries.values()):
        if entry.state == GrantState.reserved:
            pool.seen[entry.slice_id] = Seen(pool.core.begin_prepare(entry), "running")
            pool.core.end_prepare(entry, None, True, pool.now)
