"""The rules by hand: FGD's formula, ties, scarcity, remainders, what is learnt of demand."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from nbgpu.models import Device
from nbgpu.quantities import GIB
from nbgpu_pool.placement import Room, place
from nbgpu_pool.placement.chooser import Chooser
from nbgpu_pool.placement.demand import Demand, typical
from nbgpu_pool.placement.fleet import Asked, Fleet, Gpu, Need, Node, Spot, Taken, evenly
from nbgpu_pool.placement.remainders import worth
from nbgpu_pool.placement.rules import BestFit, Fgd, Ours, Parameters, hash_of
from nbgpu_pool.placement.values import ONE, scarcity
from nbgpu_pool.shapes import Part, Want, resolve

SHARED, PAIR = Need(1, 300, cpu_milli=1000), Need(2, 1000, cpu_milli=2000)
HALF_AND_HALF = {SHARED: ONE // 2, PAIR: ONE // 2}


def begun(left: list[int], cpu: int = 10_000) -> Fleet:
    """One node whose devices have so much left."""
    fleet = Fleet([Node([Gpu("A")] * len(left), cpu_milli=cpu)])
    for index, milli in enumerate(left):
        if milli < 1000:
            fleet.take(Spot(0, (index,)), Need(1, 1000 - milli))
    return fleet


def test_fgd_by_hand() -> None:
    """Left 400 and 1000. F = 1/2 (1400 - 1400) + 1/2 (1400 - 0) = 700: a pair finds no two whole devices.

    300 on the first: left 100 and 1000: F = 1/2 100 + 1/2 1100 = 600, 100 less: 2 steps of 40.
    300 on the second: left 400 and 700: F = 1/2 0 + 1/2 1100 = 550, 150 less: 3 steps of 40.
    """
    fleet = begun([400, 1000])
    rule = Fgd(fleet, HALF_AND_HALF)
    places = fleet.fitting(Asked(fleet, [SHARED]), np.array([0]))
    assert rule.scores(places).tolist() == [2, 3]
    assert Chooser(fleet, rule).choose(SHARED) == Spot(0, (1,))
    exact = Fgd(fleet, HALF_AND_HALF, rounded_milli=1)
    assert exact.scores(places).tolist() == [100, 150]


def test_fgd_counts_gpu_that_no_cpu_is_left_for_as_lost() -> None:
    """CPU for one more: after it neither shape can start, all of what is left is lost: F = 1100, 400 more than before."""
    fleet = begun([400, 1000], cpu=1500)
    places = fleet.fitting(Asked(fleet, [SHARED]), np.array([0]))
    assert Fgd(fleet, HALF_AND_HALF, rounded_milli=1).scores(places).tolist() == [-400, -400]


def test_fgd_knows_the_frequent_ones_beforehand() -> None:
    needs = [SHARED] * 90 + [PAIR] * 6 + [Need(8, 1000)] * 4
    assert typical(needs, 96) == {SHARED: 90, PAIR: 6}


def test_ties_and_what_is_within_the_rounding_go_to_the_first_node() -> None:
    nodes = [Node([Gpu("A")], cpu_milli=10_000), Node([Gpu("A")], cpu_milli=10_000)]
    for first, second in ((0, 20), (20, 0)):
        fleet = Fleet(nodes)
        for node, milli in enumerate((first, second)):
            if milli:
                fleet.take(Spot(node, (0,)), Need(1, milli))
        shares = {Need(1, 1000): ONE}
        asked = Need(1, 10)
        exact = Chooser(fleet, Fgd(fleet, shares, rounded_milli=1)).choose(asked)
        assert exact == Spot(1 if second else 0, (0,)), "the whole device is what the expected request needs"
        coarse = Fgd(fleet, {Need(1, 990): ONE // 100, SHARED: ONE * 99 // 100})
        assert Chooser(fleet, coarse).choose(asked) == Spot(0, (0,)), "both lose less than one step: the first of the order"


def test_whole_numbers_only() -> None:
    fleet = begun([400, 1000])
    rule = Ours(fleet, [SHARED, PAIR])
    places = fleet.fitting(Asked(fleet, [SHARED]), np.array([0]))
    for one in (rule.scores(places), rule.values.value, rule.remainder, fleet.left):
        assert one.dtype.kind == "i"


@pytest.mark.parametrize(("free", "usable"), [(1000, 1000), (4000, 1000), (6_212_000, 17_000), (7, 3), (10**9, 1), (5, 0)])
def test_scarcity_is_exact(free: int, usable: int) -> None:
    found = Fraction(scarcity(free, usable, 50), ONE)
    if usable == 0 or Fraction(free, usable) ** 3 >= 2500:
        assert found == 50
    else:
        assert found**2 <= Fraction(free, usable) ** 3 < (found + Fraction(1, ONE)) ** 2


def test_a_model_that_nobody_has_asked_for_yet_is_not_given_away_first() -> None:
    """Half want an A, half any device: with nothing known of those who want a B, who can use every device filled all Bs."""
    fleet = Fleet([Node([Gpu("A")] * 8), Node([Gpu("B")] * 2), Node([Gpu("A")] * 8)])
    rule = Ours(fleet)
    chooser = Chooser(fleet, rule)
    for number in range(12):
        need = Need(1, 1000, models=None if number % 2 else frozenset({"A"}))
        rule.arrived(need)
        spot = chooser.choose(need)
        assert spot is not None
        fleet.take(spot, need)
    assert fleet.left[fleet.model == fleet.models.index("B")].max() == 1000, "somebody may want a B"


def test_a_model_that_comes_later_is_expected_too() -> None:
    before = Ours(Fleet([Node([Gpu("A")])]))
    before.arrived(Need(1, 500))
    after = Ours(Fleet([Node([Gpu("A")]), Node([Gpu("B", size_milli=250, fixed=True)] * 4)]), learnt=before)
    assert set(after.demand.counts) == {
        Need(1, 500),
        Need(1, 1000, models=frozenset({"A"})),
        Need(1, 250, models=frozenset({"B"})),
    }


def test_scarcity_moves_weight_and_adds_none() -> None:
    """The fuller the pool, the scarcer whole devices and nodes: the V of the pool stays what it is with the bare shares."""
    fleet = Fleet([Node([Gpu("A")] * 2)] * 20)
    for node in range(19):
        for device in range(2):
            fleet.take(Spot(node, (device,)), Need(1, 600))
    rule = Ours(fleet, [SHARED, PAIR])
    shares, usable = rule.demand.shares(ONE), rule.values.usable_by_shape()
    even = sum(share * one for share, one in zip(shares.values(), usable, strict=True))
    uneven = sum(weight * one for weight, one in zip(rule.values.weights, usable, strict=True))
    assert usable == [38 * 400 + 2000, 2000]
    assert uneven == pytest.approx(even, rel=1e-6)
    assert rule.values.weights[1] > 5 * rule.values.weights[0], "whole nodes are scarce"


def test_nodes_come_in_an_order_of_their_own_each_kind_spread_evenly() -> None:
    large, small, single = Node([Gpu("A")] * 8, 64_000), Node([Gpu("A")] * 2), Node([Gpu("B")], 8000, 1 << 30, frozenset({("a", "b")}))
    listed = [large] * 2 + [small] * 4 + [single]
    assert [listed[index] for index in evenly(listed)] == [small, large, small, single, small, large, small]
    again = list(listed)
    for seed in range(5):
        random.Random(seed).shuffle(again)
        assert [again[index] for index in evenly(again)] == [listed[index] for index in evenly(listed)]
    assert evenly([small] * 3) == [0, 1, 2], "nodes of one kind stay as they are listed"
    assert evenly([]) == []


def test_gpu_that_cpu_cannot_feed_counts_half() -> None:
    """A node with 2 devices and CPU for one of the expected: V = 1/2 (2000 + 1000)."""
    for cpu, value in ((4000, 2000), (2000, 1500), (1999, 0), (3000, 1750)):
        fleet = Fleet([Node([Gpu("A")] * 2, cpu_milli=cpu)])
        rule = Ours(fleet, [Need(1, 1000, cpu_milli=2000)])
        rule.values.follow()
        assert rule.values.value[0] / (2 * ONE) == pytest.approx(value, abs=0.01)


def test_a_remainder_is_worth_what_fills_it_exactly() -> None:
    found = worth({500: 1})
    assert (found[0], found[499], found[500], found[999], found[1000]) == (0, 0, 500, 500, 1000)
    found = worth({333: 3, 500: 2})
    assert (found[332], found[333], found[500], found[666], found[1000]) == (0, 333, 500, 667, 1000)
    found = worth({810: 9, 190: 1})
    assert (found[190], found[810], found[1000]) == (0, 1000, 1000), "the small one finds room beside every large one"
    assert worth({})[999] == 0
    assert worth({1000: 5})[1000] == 1000


def test_worth_rises_and_two_remainders_are_worth_no_more_together_than_one_of_both() -> None:
    luck = random.Random(3)
    for _ in range(12):
        shares = {luck.choice([20, 125, 167, 190, 250, 333, 460, 500, 700, 810, 900]): luck.randint(1, 50) for _ in range(7)}
        found = worth(shares).tolist()
        assert found == sorted(found)
        assert found[1000] == 1000
        assert all(found[one] + found[two] <= found[one + two] + 2 for one in range(0, 1001, 13) for two in range(0, 1001 - one, 17))


def test_demand_is_what_has_arrived_and_the_newer_counts_more() -> None:
    demand = Demand(100, [PAIR])
    assert demand.shares(1000) == {PAIR: 1000}
    for _ in range(3):
        demand.arrived(SHARED._replace(memory_bytes=5, ram_bytes=7))
    assert demand.shares(1000)[SHARED] == pytest.approx(750, abs=15)
    for _ in range(300):
        demand.arrived(SHARED)
    assert demand.shares(1000)[PAIR] < 5
    for _ in range(30_000):  # far over the largest count
        demand.arrived(PAIR)
    assert demand.shares(1000)[PAIR] >= 999


def test_a_policys_hash_is_of_its_parameters() -> None:
    fleet = begun([1000])
    assert hash_of(Ours(fleet)) == hash_of(Ours(fleet, [SHARED]))
    assert hash_of(Ours(fleet)) != hash_of(Ours(fleet, parameters=Parameters(remainder_weight=2)))
    assert hash_of(Fgd(fleet, {})) != hash_of(BestFit(fleet))


def test_best_fit_finds_the_same_place_as_the_services() -> None:
    luck = random.Random(7)
    for _ in range(25):
        width = [luck.randint(1, 4) for _ in range(luck.randint(1, 6))]
        sizes = [[luck.choice([80, 40]) for _ in range(count)] for count in width]
        rooms = [
            Room.empty(
                Device(uuid=f"{node}.{index}", index=index, model=f"{gib}", node=f"n{node:02}", memory_bytes=gib * GIB, reserve_bytes=GIB)
            )
            for node, row in enumerate(sizes)
            for index, gib in enumerate(row)
        ]
        fleet = Fleet([Node([Gpu(f"{gib}", (gib - 1) * GIB) for gib in row]) for row in sizes])
        chooser = Chooser(fleet, BestFit(fleet))
        taken: list[tuple[Room, Taken]] = []
        for _ in range(60):
            want = Want(1, luck.choice([125, 250, 333, 500, 1000]), None, None, luck.choice(["80", "40"]))
            part = (
                next(part for room in rooms if (part := resolve(want, room.device)))
                if want.model in {one.device.model for one in rooms}
                else None
            )
            there = place(rooms, want)
            spot = (
                None
                if part is None
                else chooser.choose(Need(1, part.compute_milli, part.memory_bytes, models=frozenset({str(want.model)})))
            )
            assert (spot is None) == (there is None)
            if spot is not None and there is not None and part is not None:
                assert there[0][0].device.uuid == f"{spot.node}.{spot.devices[0]}"
                there[0][0].take(part)
                taken.append((there[0][0], fleet.take(spot, Need(1, part.compute_milli, part.memory_bytes))))
            if taken and luck.random() < 0.4:
                room, one = taken.pop(luck.randrange(len(taken)))
                room.give_back(Part(one.bytes[0], one.milli[0]))
                fleet.give_back(one)
