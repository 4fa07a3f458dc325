"""Nodes and devices as integers: what fits where, and what is left."""

from __future__ import annotations

import numpy as np
import pytest

from nbgpu_pool.placement.fleet import Asked, Fleet, Gpu, Need, Node, Spot


def places(fleet: Fleet, need: Need) -> list[tuple[int, list[int]]]:
    found = fleet.fitting(Asked(fleet, [need]), np.arange(len(fleet.nodes)))
    return list(zip(found.nodes.tolist(), found.devices.tolist(), strict=True))


def test_a_need_takes_of_its_devices_and_of_its_node_and_gives_back() -> None:
    fleet = Fleet([Node([Gpu("A", 8000), Gpu("A", 8000)], cpu_milli=4000, ram_bytes=100)])
    taken = fleet.take(Spot(0, (1,)), Need(1, 250, 2000, cpu_milli=3000, ram_bytes=60))
    assert fleet.left.tolist() == [[1000, 750]]
    assert (fleet.cpu[0], fleet.ram[0]) == (1000, 40)
    assert places(fleet, Need(1, 250, cpu_milli=1000)) == [(0, [0]), (0, [1])]
    assert places(fleet, Need(1, 250, cpu_milli=1001)) == []
    assert places(fleet, Need(1, 250, ram_bytes=41)) == []
    fleet.give_back(taken)
    assert fleet.left.tolist() == [[1000, 1000]]
    assert (fleet.cpu[0], fleet.ram[0]) == (4000, 100)


def test_what_is_scarcer_of_compute_and_memory_is_what_is_left() -> None:
    fleet = Fleet([Node([Gpu("A", 8000)])])
    fleet.take(Spot(0, (0,)), Need(1, 100, 6000))
    assert fleet.left.tolist() == [[250]]
    assert fleet.free_milli.tolist() == [[900]]
    assert places(fleet, Need(1, 900, 2000)) == [(0, [0])], "both are looked at by themselves"
    assert places(fleet, Need(1, 100, 2001)) == []


def test_several_devices_are_the_tightest_of_one_node_and_one_model() -> None:
    fleet = Fleet([Node([Gpu("A"), Gpu("B"), Gpu("A"), Gpu("A")]), Node([Gpu("B"), Gpu("B")])])
    assert places(fleet, Need(2, 500)) == [(0, [0, 2]), (1, [0, 1])]
    fleet.take(Spot(0, (3,)), Need(1, 400))
    assert places(fleet, Need(2, 500)) == [(0, [3, 0]), (1, [0, 1])]
    assert places(fleet, Need(2, 1000, models=frozenset("A"))) == [(0, [0, 2])]
    assert places(fleet, Need(4, 100)) == []
    assert places(fleet, Need(9, 100)) == []


def test_places_of_several_devices_come_by_their_tightest_device() -> None:
    """So the first of equals is as the fixed order has it, and not by the models' names."""
    fleet = Fleet([Node([Gpu("B"), Gpu("A"), Gpu("A"), Gpu("B")])])
    assert places(fleet, Need(2, 100)) == [(0, [0, 3]), (0, [1, 2])]
    fleet.take(Spot(0, (3,)), Need(1, 400))
    assert places(fleet, Need(2, 100)) == [(0, [1, 2]), (0, [3, 0])]


def test_devices_of_different_sizes_with_as_much_free_are_not_alike() -> None:
    fleet = Fleet([Node([Gpu("A", 1000), Gpu("A", 1000, size_milli=500)])])
    fleet.take(Spot(0, (0,)), Need(1, 750, 840))
    fleet.take(Spot(0, (1,)), Need(1, 250, 840))
    assert fleet.left.tolist() == [[160, 80]]
    assert places(fleet, Need(1, 50)) == [(0, [0]), (0, [1])]


def test_labels_and_models() -> None:
    zone = frozenset({("zone", "x")})
    fleet = Fleet([Node([Gpu("A")]), Node([Gpu("B")], labels=zone | {("disk", "fast")}), Node([Gpu("A")], labels=zone)])
    assert places(fleet, Need(1, 1, labels=zone)) == [(1, [0]), (2, [0])]
    assert places(fleet, Need(1, 1, models=frozenset("A"), labels=zone)) == [(2, [0])]
    assert places(fleet, Need(1, 1, models=frozenset("C"))) == []


def test_a_fixed_partition_is_taken_whole_or_not_at_all() -> None:
    fleet = Fleet([Node([Gpu("slice", 1000, size_milli=285, fixed=True), Gpu("slice", 1000, size_milli=285, fixed=True)])])
    taken = fleet.take(Spot(0, (0,)), Need(1, 100, 300))
    assert fleet.left.tolist() == [[0, 285]]
    assert places(fleet, Need(1, 100)) == [(0, [1])]
    assert places(fleet, Need(1, 286)) == []
    fleet.give_back(taken)
    assert fleet.left.tolist() == [[285, 285]]


def test_devices_that_are_alike_are_looked_at_once() -> None:
    fleet = Fleet([Node([Gpu("A")] * 3), Node([Gpu("A"), Gpu("B"), Gpu("A")])])
    assert places(fleet, Need(1, 100)) == [(0, [0]), (1, [0]), (1, [1])]
    barred = np.zeros((2, 3), np.bool_)
    barred[0, 0] = True
    found = fleet.fitting(Asked(fleet, [Need(1, 100)]), np.array([0]), barred)
    assert (found.nodes.tolist(), found.devices.tolist()) == ([0, 0], [[1], [2]]), "not hidden behind one that is kept for others"


def test_who_wants_cpu_alone() -> None:
    fleet = Fleet([Node([Gpu("A")], cpu_milli=1000), Node([], cpu_milli=5000)])
    assert places(fleet, Need(0, 0, cpu_milli=2000)) == [(1, [])]
    fleet.take(Spot(1, ()), Need(0, 0, cpu_milli=2000))
    assert fleet.cpu.tolist() == [1000, 3000]


@pytest.mark.parametrize(
    ("spot", "need"),
    [
        (Spot(0, (0,)), Need(1, 501)),
        (Spot(0, (0, 1)), Need(1, 100)),
        (Spot(0, (1, 1)), Need(2, 100)),
        (Spot(0, (1,)), Need(1, 100, cpu_milli=2000)),
        (Spot(0, (1,)), Need(1, 100, labels=frozenset({("zone", "x")}))),
        (Spot(0, (1,)), Need(1, 100, models=frozenset("B"))),
    ],
)
def test_what_does_not_fit_is_not_booked(spot: Spot, need: Need) -> None:
    fleet = Fleet([Node([Gpu("A"), Gpu("A")], cpu_milli=1000)])
    fleet.take(Spot(0, (0,)), Need(1, 500))
    with pytest.raises(ValueError, match="does not fit"):
        fleet.take(spot, need)
    assert fleet.left.tolist() == [[500, 1000]]
