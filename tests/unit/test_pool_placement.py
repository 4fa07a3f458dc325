"""Placement: what a request means on a device, and where it goes."""

from __future__ import annotations

import heapq
import random
from dataclasses import replace

import pytest

from nbgpu.errors import InvalidValue
from nbgpu.models import Device, Request, Shape
from nbgpu.quantities import GIB, MIB
from nbgpu_pool.books import Books
from nbgpu_pool.placement import DEFAULT_POLICY, Buckets, Policy, Room, family, nearest, place
from nbgpu_pool.queue import hopeless
from nbgpu_pool.shapes import Part, Want, by_model, resolve, want_of


def device(index: int, node: str = "a", model: str = "Big", gib: int = 80, healthy: bool = True) -> Device:
    return Device(
        uuid=f"GPU-{node}-{index}", index=index, model=model, node=node, memory_bytes=gib * GIB, reserve_bytes=GIB, healthy=healthy
    )


def rooms(*parts_of_each: list[int], node_size: int = 8) -> list[Room]:
    """Devices that hold parts of these milli-GPU (memory in step)."""
    found: list[Room] = []
    for number, parts in enumerate(parts_of_each):
        room = Room.empty(device(number % node_size, node="abcdefgh"[number // node_size]))
        for milli in parts:
            part = resolve(want(milli), room.device)
            assert part is not None
            room.take(part)
        found.append(room)
    return found


def want(milli: int | None = None, count: int = 1, **more: object) -> Want:
    return want_of(Shape(device_count=count, compute_milli=milli, **more))  # type: ignore[arg-type]


def where(found: list[tuple[Room, Part]] | None) -> list[str] | None:
    return None if found is None else [f"{room.device.node}{room.device.index}" for room, _ in found]


def test_a_share_brings_its_memory_and_memory_its_share() -> None:
    big = device(0)
    assert resolve(want(250), big) == Part(79 * GIB // 4 // MIB * MIB, 250)
    assert resolve(want(memory_milli=500), big) == Part(79 * GIB // 2 // MIB * MIB, 500)
    assert resolve(want(memory_bytes=20 * GIB), big) == Part(20 * GIB, 254)
    assert resolve(want(100, memory_bytes=20 * GIB), big) == Part(20 * GIB, 100)
    assert resolve(want(100, memory_milli=500), big) == Part(79 * GIB // 2 // MIB * MIB, 100)
    assert resolve(want(memory_bytes=80 * GIB), big) is None, "the reserve is not for slices"
    assert resolve(want(250, model="Small"), big) is None


def test_eight_eighths_fill_a_device_and_a_ninth_does_not_fit() -> None:
    (room,) = rooms([125] * 8)
    assert room.free_milli == 0
    assert place([room], want(1)) is None


def test_by_model_says_what_each_means() -> None:
    found = by_model(want(memory_bytes=20 * GIB), [device(0), device(0, "b", "Small", 24)])
    assert found == {"Big": Part(20 * GIB, 254), "Small": Part(20 * GIB, 870)}


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        (Shape(), "compute_milli"),
        (Shape(memory_milli=1, memory_bytes=GIB), "memory_bytes"),
        (Shape(compute_milli=1, device_count=17), "device_count"),
    ],
)
def test_senseless_wants_name_their_field(shape: Shape, field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        want_of(shape)
    assert caught.value.field == field


def test_best_fit_fills_what_is_begun() -> None:
    assert where(place(rooms([], [500], [750]), want(250))) == ["a2"]
    assert where(place(rooms([], [500], [750]), want(500))) == ["a1"]
    assert where(place(rooms([], [500], [750]), want(1000))) == ["a0"]


def test_ties_go_to_the_first_of_the_fixed_order() -> None:
    assert where(place(rooms([], [], []), want(250))) == ["a0"]
    assert where(place(rooms([500], [500], []), want(250))) == ["a0"]


def test_thirds_and_halves_keep_apart_while_there_is_room() -> None:
    assert [family(milli) for milli in (333, 666, 167, 500, 250, 125, 1000, 375, 200)] == [3, 3, 3, 1, 1, 1, 1, 1, 0]
    assert where(place(rooms([500], [333], []), want(333))) == ["a1"]
    assert where(place(rooms([500], []), want(333))) == ["a1"], "an empty device rather than a half's"
    assert where(place(rooms([333], []), want(250))) == ["a1"]
    assert where(place(rooms([333], [1000]), want(250))) == ["a0"], "nothing else is left"
    assert where(place(rooms([500], []), want(333), policy=Policy(keep_thirds_apart=False))) == ["a0"], "control"


def test_the_last_idle_devices_are_not_opened_while_there_is_another_place() -> None:
    """One of 20 is idle: sizes mix rather; a whole device is what it is kept for, and it is better than nothing."""
    pool = [[500], *[[1000]] * 18, []]
    assert where(place(rooms(*pool), want(333))) == ["a0"]
    assert where(place(rooms(*pool), want(333), policy=Policy(keep_last_idle=False))) == ["c3"], "control"
    assert where(place(rooms(*pool[:-2], [], []), want(333))) == ["c2"], "two are idle"
    assert where(place(rooms(*pool), want(1000))) == where(place(rooms(*pool), want(750))) == ["c3"]


def test_an_idle_device_is_opened_where_fewest_are_idle() -> None:
    found = rooms([], [], [1000], [1000], [], [], [], [], node_size=4)
    assert where(place(found, want(1000))) == ["a0"]
    found = rooms([], [], [], [], [], [], [1000], [1000], node_size=4)
    assert where(place(found, want(1000))) == ["b0"], "node a stays whole for who needs all of it"
    assert where(place(found, want(1000, count=4))) == ["a0", "a1", "a2", "a3"]


def test_several_devices_come_from_one_node_or_not_at_all() -> None:
    found = rooms([500], [], [500], [], node_size=2)
    assert where(place(found, want(500, count=2))) == ["a0", "a1"]
    assert place(found, want(1000, count=2)) is None, "two idle devices, but on two nodes"
    books = Books()
    books.rebuild([room.device.model_copy(update={"healthy": False}) for room in found])
    assert hopeless(books, want(100, count=3))
    assert not hopeless(books, want(100, count=2)), "if it were empty and healthy"


def test_several_devices_are_of_one_model() -> None:
    mixed = [Room.empty(device(0)), Room.empty(device(1, model="Small", gib=24)), Room.empty(device(2))]
    assert where(place(mixed, want(500, count=2))) == ["a0", "a2"]
    assert place(mixed, want(500, count=3)) is None


def test_sick_and_barred_devices_and_caps() -> None:
    sick = [Room.empty(device(0, healthy=False)), Room.empty(device(1))]
    assert where(place(sick, want(250))) == ["a1"]
    assert place(sick, want(250), barred={"GPU-a-1"}) is None
    assert place(sick, want(250), cap=Part(2**60, 249)) is None
    assert place(sick, want(250), cap=Part(2**60, 250)) is not None
    both = [Room.empty(device(0, model="Small", gib=24)), Room.empty(device(1))]
    assert where(place(both, want(memory_bytes=20 * GIB), cap=Part(2**60, 300))) == ["a1"], "20 GiB is a smaller share of the large one"


def test_nearest_names_where_least_must_be_freed() -> None:
    assert nearest(rooms([1000], [750], [500, 250, 250]), want(500)) == ("GPU-a-1",)
    assert nearest(rooms([1000], [750]), want(500, count=2)) == ("GPU-a-1", "GPU-a-0")
    assert nearest(rooms([1000]), want(500, model="Small")) == ()


def refused_share(policy: Policy, seed: int, load: float = 0.7, devices: int = 48, days: float = 2.0) -> float:
    """GPU-weighted share of refusals on a notebook workload without a queue (sizes of placement.md, third-heavy mix)."""
    rng = random.Random(seed)
    sizes, weights = [125, 250, 333, 500, 1000], [15, 15, 45, 15, 10]
    mean = sum(size * weight for size, weight in zip(sizes, weights, strict=True)) / sum(weights) / 1000
    hours = 3.0
    rate = load * devices / (mean * hours)
    free = [Room.empty(device(number % 8, node=f"n{number // 8:02d}")) for number in range(devices)]
    ends: list[tuple[float, int, Room, Part]] = []
    at, number, offered, refused = 0.0, 0, 0, 0
    while at < days * 24:
        at += rng.expovariate(rate)
        while ends and ends[0][0] <= at:
            _, _, room, part = heapq.heappop(ends)
            room.give_back(part)
        size = rng.choices(sizes, weights)[0]
        length = rng.lognormvariate(0, 1.2) * hours / 2.0544332106438876
        found = place(free, want(size), policy=policy)
        number += 1
        if at > 12:
            offered += size
            refused += 0 if found else size
        if found:
            room, part = found[0]
            room.take(part)
            heapq.heappush(ends, (at + length, number, room, part))
    return refused / offered


def test_keeping_thirds_apart_refuses_less_on_notebooks() -> None:
    seeds = (42, 43, 44)
    apart = sum(refused_share(DEFAULT_POLICY, seed, load=0.85) for seed in seeds)
    mixed = sum(refused_share(replace(DEFAULT_POLICY, keep_thirds_apart=False), seed, load=0.85) for seed in seeds)
    print(f"refused, sum of {len(seeds)} seeds: apart {apart:.4f}, mixed {mixed:.4f}")
    assert apart < mixed


def test_a_request_can_be_made_of_every_shape() -> None:
    """The books rebuild a request from a slice; it means the same part again."""
    part = resolve(want(333), device(0))
    assert part is not None
    request = Request.model_validate(
        {
            "request_id": "12345678",
            "owner": {"hub": "h", "user": "u"},
            "compute_milli": part.compute_milli,
            "memory_bytes": part.memory_bytes,
        }
    )
    assert resolve(want_of(request), device(0)) == part


def test_the_index_by_state_finds_the_same_place_as_looking_at_each_room() -> None:
    luck = random.Random(4)
    for _ in range(60):
        devices = [
            device(n, node=f"n{node:02}", model=luck.choice(["Big", "Small"]), gib=luck.choice([80, 40]), healthy=luck.random() > 0.1)
            for node in range(luck.randint(1, 8))
            for n in range(luck.randint(1, 4))
        ]
        found = {one.uuid: Room.empty(one) for one in devices}
        index = Buckets(found)
        for _ in range(80):
            asked = want(luck.choice([125, 250, 333, 500, 1000]), **luck.choice([{}, {"model": "Big"}, {"memory_bytes": 20 * GIB}]))
            barred = {uuid for uuid in found if luck.random() < 0.1}
            cap = luck.choice([None, Part(30 * GIB, 400)])
            plain = place(list(found.values()), asked, barred=barred, cap=cap)
            quick = index.place(asked, barred, cap, DEFAULT_POLICY, coming=False)
            assert where(plain) == where(quick)
            if plain is not None:
                room, part = plain[0]
                room.take(part)
                index.changed(room.device.node)
            elif luck.random() < 0.5:
                taken = [room for room in found.values() if room.part_count and room.free_milli < 1000]
                if taken:
                    room = luck.choice(taken)
                    fresh = Room.empty(room.device)
                    room.free_bytes, room.free_milli, room.part_count = fresh.free_bytes, fresh.free_milli, 0
                    room.binary_count = room.thirds_count = 0
                    index.changed(room.device.node)
