"""Who is served next where the queue goes by shares: the group with the lowest dominant share (docs/quotas.md). Pure."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from test_pool_queue import Pool

from nbgpu.models import GrantState
from nbgpu.quantities import GIB
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas

GROUPS = Quotas(groups={"a": Limits(), "b": Limits(), "heavy": Limits(weight=3)})
FAIR = Fairness(fair=True)


def pool_of(fairness: Fairness = FAIR, devices: int = 1, quotas: Quotas = GROUPS) -> Pool:
    return Pool(devices=devices, fairness=fairness, quotas=quotas, queue_per_user=1000)


def in_line(pool: Pool) -> list[str]:
    return [one.request.owner.user for one in pool.core.books.waiting()]


def full(pool: Pool) -> list[str]:
    """The pool is held by somebody in no group; return their servers, an eighth each."""
    return [pool.started(125, user="x") for _ in range(8 * len(pool.devices))]


@pytest.mark.parametrize(("fairness", "order"), [(FAIR, "a1 b1 a2 b2 a3"), (Fairness(), "a1 a2 a3 b1 b2")], ids=["fair", "the control"])
def test_groups_take_turns_and_within_a_group_it_goes_by_arrival(fairness: Fairness, order: str) -> None:
    pool = pool_of(fairness)
    held = full(pool)
    keys = {user: pool.ask(125, user=user, groups=[user[0]]).request.request_id for user in ("a1", "a2", "a3", "b1", "b2")}
    assert in_line(pool) == order.split()
    for place, user in enumerate(order.split(), 1):
        assert pool.core.grant(pool.core.known(keys[user]), pool.now).position == place, "what people read is what happens"
    for user in order.split():
        pool.end(held.pop())
        assert pool.state(keys[user]) == GrantState.reserved


def test_what_a_group_holds_already_counts() -> None:
    pool = pool_of()
    pool.started(500, user="a0", groups=["a"])
    pool.started(500, user="x")
    for number in range(5):
        pool.ask(125, user=f"a{number}", groups=["a"])
    for number in range(5):
        pool.ask(125, user=f"b{number}", groups=["b"])
    assert "".join(user[0] for user in in_line(pool)) == "bbbbabaaaa", "b has caught up after four eighths; equals go by arrival"


def test_the_larger_of_time_and_memory_is_what_counts() -> None:
    """Ghodsi's example: one group is after memory, the other after time; each has its turn by the resource it takes most of."""
    pool = pool_of()
    full(pool)
    for number in range(6):
        pool.ask(100, user=f"m{number}", groups=["a"], memory_bytes=40 * GIB)  # half the memory
    for number in range(6):
        pool.ask(250, user=f"t{number}", groups=["b"], memory_bytes=GIB)  # a quarter of the time
    assert "".join(user[0] for user in in_line(pool))[:6] == "mttmtt"


def test_a_weight_makes_a_share_count_for_less() -> None:
    pool = pool_of()
    full(pool)
    for number in range(6):
        pool.ask(125, user=f"a{number}", groups=["a"])
        pool.ask(125, user=f"h{number}", groups=["heavy"])
    assert Counter(user[0] for user in in_line(pool)[:8]) == {"h": 6, "a": 2}


def test_who_is_in_several_groups_counts_for_the_one_that_has_least_and_who_is_in_none_alone() -> None:
    pool = pool_of(devices=2)
    pool.started(1000, user="a0", groups=["a"])
    pool.started(1000, user="x")
    pool.ask(125, user="a1", groups=["a"])
    pool.ask(125, user="both", groups=["a", "b"])
    pool.ask(125, user="y", groups=["unknown"])
    pool.ask(125, user="x", groups=["unknown"])
    assert in_line(pool) == ["both", "y", "a1", "x"]


def test_small_ones_still_pass_what_does_not_fit() -> None:
    pool = pool_of()
    pool.started(750, user="a0", groups=["a"])
    assert pool.ask(1000, user="b", groups=["b"]).state == GrantState.queued
    assert pool.ask(250, user="a1", groups=["a"]).state == GrantState.reserved


def stream(fairness: Fairness, rounds: int = 200) -> int | None:
    """Group a's eighths come whenever one ends; return after how many of them b's request for a whole device got in."""
    pool = pool_of(fairness)
    running = [pool.started(125, user=f"a{n}", groups=["a"]) for n in range(8)]
    whole = pool.ask(1000, user="b", groups=["b"]).request.request_id
    passed = 0
    for _ in range(rounds):
        pool.ask(125, user="a", groups=["a"])
        pool.now += 1
        if running:
            pool.end(running.pop(0))
        for entry in [one for one in pool.core.books.entries.values() if one.state == GrantState.reserved]:
            if entry.slice_id == whole:
                return passed
            passed += 1
            running.append(pool.run(pool.core.grant(entry, pool.now)))
        for entry in pool.core.books.waiting():
            pool.core.touch(entry, pool.now)
    return None


def test_overtaking_stays_bounded_and_the_control_starves() -> None:
    passed = stream(Fairness(overtake_count=20, overtake_seconds=10_000, fair=True))
    assert passed is not None
    assert passed <= 20
    by_time = stream(Fairness(overtake_count=10_000, overtake_seconds=60, fair=True))
    assert by_time is not None
    assert by_time <= 62
    assert stream(Fairness(overtake_count=10_000, overtake_seconds=10_000, fair=True)) is None


def test_waiting_long_alone_does_not_put_a_group_before_one_that_has_less() -> None:
    """Else every long queue would go by arrival again."""
    pool = pool_of(Fairness(overtake_seconds=60, fair=True))
    held = full(pool)
    for number in range(8):
        pool.ask(125, user=f"a{number}", groups=["a"])
    pool.wait(200)
    pool.end(held.pop())
    assert [one.request.owner.user for one in pool.core.books.entries.values() if one.state == GrantState.reserved] == ["a0"]
    late = pool.ask(125, user="b", groups=["b"]).request.request_id
    assert in_line(pool)[0] == "b"
    pool.end(held.pop())
    assert pool.state(late) == GrantState.reserved


@pytest.mark.parametrize("seed", range(2))
def test_under_load_groups_hold_alike_and_the_control_does_not(seed: int) -> None:
    def held_by(fairness: Fairness) -> Counter[str]:
        dice, pool = random.Random(seed), pool_of(fairness, devices=2)
        running = [pool.started(125, user="a", groups=["a"]) for _ in range(16)]
        held: Counter[str] = Counter()
        for step in range(160):
            there = Counter(one.request.owner.user[0] for one in pool.core.books.waiting())
            for group, most in (("a", 12), ("b", 4)):  # three of four who wait are a's
                for _ in range(most - there[group]):
                    pool.ask(125, user=f"{group}{step}", groups=[group])
            pool.wait(60)
            pool.end(running.pop(dice.randrange(len(running))))
            for entry in [one for one in pool.core.books.entries.values() if one.state == GrantState.reserved]:
                running.append(pool.run(pool.core.grant(entry, pool.now)))
            if step > 60:
                held.update(one.request.owner.user[0] for one in pool.core.books.entries.values() if one.holds)
        return held

    fair, control = held_by(FAIR), held_by(Fairness())
    assert 0.45 < fair["b"] / fair.total() < 0.55
    assert control["b"] / control.total() < 0.4
