"""One-move hints: whose move lets in a request that fits nowhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgpu.models import Device
from nbgpu.quantities import GIB
from nbgpu_pool.placement import Buckets, Move, Policy, Room, one_move, place
from nbgpu_pool.shapes import Part, Want, resolve


def want(milli: int, count: int = 1, model: str | None = None) -> Want:
    return Want(count, milli, None, None, model)


class Pool:
    """Devices that hold slices of these milli-GPU; the slice ``1.0`` is the first on the second device."""

    def __init__(self, *held: list[int], node_size: int = 8, models: str = "", coming: bool = False):
        self.rooms: list[Room] = []
        self.held: dict[str, list[tuple[str, Part]]] = {}
        for number, sizes in enumerate(held):
            node = f"n{number // node_size}"
            model = models[number] if models else "A"
            device = Device(uuid=str(number), index=number % node_size, model=model, node=node, memory_bytes=80 * GIB, reserve_bytes=0)
            room = Room.empty(device)
            for order, milli in enumerate(sizes):
                part = resolve(want(milli), device)
                assert part is not None
                room.take(part)
                self.held.setdefault(device.uuid, []).append((f"{number}.{order}", part))
            self.rooms.append(room)

    def hint(self, asked: Want, **more: object) -> Move | None:
        buckets = Buckets({room.device.uuid: room for room in self.rooms})
        return one_move(self.rooms, buckets, self.held, asked, **more)  # type: ignore[arg-type]

    def words(self, asked: Want, **more: object) -> str:
        """Return slice, where it goes, where the request goes."""
        found = self.hint(asked, **more)
        if found is None:
            return ""
        return " ".join([found.slice_id, found.to[0][0].device.uuid, *(room.device.uuid for room, _ in found.lets_in)])


def test_a_quarter_makes_way_for_a_half() -> None:
    assert Pool([500, 250], [500, 250]).words(want(500)) == "0.1 1 0"


def test_nothing_is_hinted_where_it_fits_or_where_one_move_is_not_enough() -> None:
    assert Pool([500], [500, 250]).words(want(500)) == ""
    assert Pool([500, 500], [500, 250, 250]).words(want(125)) == ""
    assert Pool([250, 250], [500, 250, 125]).words(want(1000)) == "", "two would have to go"


def test_one_as_large_helps_nobody() -> None:
    assert Pool([1000], [500, 500], [250, 250, 250, 250]).words(want(1000)) == ""
    assert Pool([500, 250], [1000]).words(want(500)) == ""


def test_who_cannot_be_moved_stays_and_kept_devices_are_left_alone() -> None:
    pool = Pool([500, 250], [500, 250])
    pool.held = {"1": pool.held["1"]}
    assert pool.words(want(500)) == "1.1 0 1"
    assert pool.words(want(500), barred={"0"}) == pool.words(want(500), barred={"1"}) == ""
    pool.held = {}
    assert pool.words(want(500)) == ""


def test_it_leaves_the_best_fit() -> None:
    assert Pool([125], [500, 250], [500, 125, 250], [500, 250]).words(want(1000)) == "0.0 2 0", "the eighth fills its new device"
    assert Pool([125], [250], [500, 250], [500, 125, 250]).words(want(1000)) == "0.0 3 0", "the smaller of the two"


def test_thirds_stay_apart_where_they_can() -> None:
    pool = Pool([333, 333], [333, 333], [500, 125])
    assert pool.words(want(500)) == "0.0 1 0" or pool.words(want(500)) == "2.1 0 2"
    pool = Pool([333], [500, 125], [333, 333])
    assert pool.words(want(1000)) == "0.0 2 0"
    assert pool.words(want(1000), policy=Policy(keep_thirds_apart=False)) == "0.0 2 0"
    pool = Pool([250], [333, 333], [500, 125])
    assert pool.words(want(1000)) == "0.0 2 0"
    assert pool.words(want(1000), policy=Policy(keep_thirds_apart=False)) == "0.0 1 0"


def test_a_request_for_several_devices() -> None:
    pool = Pool([], [125], [500], [1000], node_size=2)
    assert pool.words(want(1000, 2)) == "1.0 2 1 0"
    assert Pool([], [125], [], [1000], node_size=2).words(want(1000, 2)) == "1.0 2 1 0"
    assert Pool([125], [125], [], [1000], node_size=2).words(want(1000, 2)) == "", "two would have to go"


def test_a_slice_goes_to_a_device_of_its_model() -> None:
    assert Pool([125], [500], models="AB").words(want(1000)) == ""
    assert Pool([125], [500], models="AB").words(want(1000, model="B")) == ""
    assert Pool([125], [500], [250], models="ABA").words(want(1000, model="A")) == "0.0 2 0"


def test_looks_are_bounded() -> None:
    assert Pool([500, 250], [500, 250]).words(want(500), most_looks=0) == ""


DEVICE = st.lists(st.sampled_from([125, 250, 333, 500]), max_size=5).filter(lambda sizes: sum(sizes) <= 1000)


@settings(max_examples=200, deadline=None)
@given(st.lists(DEVICE, min_size=1, max_size=5), st.sampled_from([125, 250, 333, 500, 1000]), st.integers(1, 2))
def test_a_move_is_found_exactly_where_there_is_one(held: list[list[int]], milli: int, count: int) -> None:
    pool = Pool(*held, node_size=3)
    asked = want(milli, count)
    found = pool.hint(asked)
    possible = place(pool.rooms, asked) is None and _any_move(pool, asked)
    assert (found is not None) == possible or (found is None and count > 1)
    if found is None:
        return
    source, (target, part) = pool.rooms[int(found.source)], found.to[0]
    assert (found.slice_id, part) in pool.held[found.source]
    assert target is not source
    source.give_back(part)
    assert target.fits(part)
    target.take(part)
    for room, need in found.lets_in:
        assert room.fits(need)
        room.take(need)
    assert len(found.lets_in) == count
    assert len({room.device.node for room, _ in found.lets_in}) == 1


def _any_move(pool: Pool, asked: Want) -> bool:
    """Whether it fits after some one move: all are tried."""
    for uuid, slices in pool.held.items():
        for _, part in slices:
            for target in range(len(pool.rooms)):
                rooms = [replace(room) for room in pool.rooms]
                rooms[int(uuid)].give_back(part)
                if target == int(uuid) or not rooms[target].fits(part):
                    continue
                rooms[target].take(part)
                if place(rooms, asked) is not None:
                    return True
    return False


@pytest.mark.parametrize("healthy", [True, False])
def test_a_device_that_is_out_of_order_is_no_place(healthy: bool) -> None:
    pool = Pool([125], [500])
    pool.rooms[1].device = pool.rooms[1].device.model_copy(update={"healthy": healthy})
    assert pool.words(want(1000)) == ("0.0 1 0" if healthy else "")
