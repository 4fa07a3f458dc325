"""What a slice counts in everything that quotas say in GPUs: the larger of its shares of time and of memory (docs/quotas.md). Pure."""

from __future__ import annotations

import pytest
from test_pool_held import Pool

from nbgpu.errors import NbgpuError, Refused
from nbgpu.models import AvailabilityQuery, Device, GrantState, Owner, Shape
from nbgpu.quantities import GIB, MIB, memory_share_bytes
from nbgpu_pool.availability import answer
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.shapes import Part, counted_milli

SIZES = (80 * GIB, 78 * GIB, 24 * GIB - 640 * MIB, 81_559 * MIB - 2049 * MIB, 85_899_345_919)
"""Usable bytes of devices; most are no round number of MiB for any share."""
KEPT = Quotas(groups={name: Limits(guarantee_milli=500) for name in ("bio", "geo")})


@pytest.mark.parametrize("usable_bytes", SIZES)
def test_equal_shares_are_equal_whatever_is_rounded(usable_bytes: int) -> None:
    for milli in range(1, 1001):
        memory = memory_share_bytes(usable_bytes, milli)
        assert counted_milli(Part(memory, milli), usable_bytes) == milli
        assert counted_milli(Part(memory, 1), usable_bytes) == milli, "and memory alone counts the same share"
        if milli < 1000:
            assert counted_milli(Part(memory + MIB, milli), usable_bytes) in (milli, milli + 1), "the control"


def test_what_counts_nothing_more() -> None:
    assert counted_milli(Part(0, 0), 80 * GIB) == 0, "a parked slice"
    assert counted_milli(Part(100 * GIB, 1), 80 * GIB) == 1000, "no part is more than its device"
    assert counted_milli(Part(GIB, 7), 0) == 7, "of a size that is not known"


def test_a_slice_counts_the_larger_share_on_each_of_its_devices() -> None:
    pool = Pool(devices=4, quotas=Quotas(default=Limits(limit_milli=1000)))
    pool.running(250, "u", memory_bytes=40 * GIB, device_count=2)
    with pytest.raises(Refused):
        pool.ask(1, "u", memory_bytes=GIB)
    pool.ask(500, "v", memory_bytes=GIB, device_count=2)
    with pytest.raises(Refused):
        pool.ask(1, "v", memory_bytes=GIB)


def test_four_quarters_fill_a_limit_of_one() -> None:
    pool = Pool(devices=2, quotas=Quotas(default=Limits(limit_milli=1000)))
    pool.devices = [device.model_copy(update={"reserve_bytes": GIB + 333 * MIB}) for device in pool.devices]
    pool.sync()
    for _ in range(4):
        pool.running(250)
    with pytest.raises(Refused):
        pool.ask(10)


def test_where_gib_are_asked_for_a_larger_gpu_counts_less() -> None:
    """The smaller one, which fits better, would be above the limit."""
    pool = Pool(devices=2, quotas=Quotas(default=Limits(limit_milli=250)))
    small = pool.devices[0].model_copy(update={"uuid": "GPU-small", "model": "Small", "memory_bytes": 41 * GIB})
    pool.devices = [small, pool.devices[1]]
    pool.sync()
    grant = pool.ask(1, memory_bytes=20 * GIB)
    assert grant.slice is not None
    assert grant.slice.devices[0].model == "Big"
    control = Pool(devices=2)
    control.devices = pool.devices
    control.sync()
    grant = control.ask(1, memory_bytes=20 * GIB)
    assert grant.slice is not None
    assert grant.slice.devices[0].model == "Small"


def test_a_device_without_memory_has_nothing_free_for_a_guarantee() -> None:
    pool = Pool(devices=2, quotas=Quotas(groups={"bio": Limits(guarantee_milli=1000)}))
    assert pool.ask(1, "u", memory_bytes=80 * GIB).state == GrantState.reserved
    assert pool.core.books.free_milli == 1000
    assert pool.ask(1, "v", memory_bytes=8 * GIB).state == GrantState.queued, "what is left is kept, to the last GiB"
    assert pool.ask(1000, "m", groups=["bio"]).state == GrantState.reserved


def test_what_is_left_of_the_scarcer_is_what_counts_as_free() -> None:
    """Of half a GPU's time and all of its memory half a GPU is free; who takes of what is there to spare takes nothing kept."""
    pool = Pool(quotas=Quotas(groups={"bio": Limits(guarantee_milli=500)}))
    pool.running(499, "u", memory_bytes=GIB)
    assert pool.ask(1, "v", memory_bytes=39 * GIB).state == GrantState.reserved
    assert pool.ask(500, "m", groups=["bio"]).state == GrantState.reserved


def test_what_is_free_is_counted_as_it_changes() -> None:
    pool = Pool(devices=3)
    keys = [pool.running(milli, memory_bytes=gib * GIB) for milli, gib in ((100, 70), (600, 5), (300, 10), (1, 60))]
    pool.resize(keys[2], memory_bytes=18 * GIB)
    pool.in_force(keys[2])
    del pool.seen[keys[0]]
    pool.core.mark += 1
    pool.sync()
    books, kept = pool.core.books, pool.core.books.free_milli
    books.rebuild(list(books.devices.values()), books.less)
    assert books.free_milli == kept


def test_memory_does_not_grow_into_what_is_kept_for_others() -> None:
    pool = Pool(quotas=KEPT)
    key = pool.running(250, "m", groups=["bio"])
    pool.resize(key, memory_bytes=40 * GIB)
    with pytest.raises(NbgpuError, match="kept for users and groups with a guarantee"):
        pool.resize(key, memory_bytes=60 * GIB)


def test_half_a_gpu_that_is_guaranteed_does_not_cover_half_a_gpu_more() -> None:
    """What a slice has counts within the guarantee when it grows."""
    pool = Pool(quotas=KEPT)
    key = pool.running(500, "m", groups=["bio"])
    with pytest.raises(NbgpuError, match="kept for users and groups with a guarantee"):
        pool.resize(key, compute_milli=1000)
    assert pool.ask(500, "g", groups=["geo"]).state == GrantState.reserved


def test_the_start_page_says_so_before_anybody_asks() -> None:
    pool = Pool(quotas=Quotas(default=Limits(limit_milli=250)))
    shapes = [Shape(compute_milli=1, memory_bytes=80 * GIB), Shape(compute_milli=250), Shape(compute_milli=1, memory_bytes=20 * GIB)]
    found = answer(pool.core, AvailabilityQuery(owner=Owner(hub="h", user="u"), groups=[], shapes=shapes), pool.now)
    assert [one.state for one in found] == ["forbidden", "free", "free"]
    assert "80 GiB of GPU memory, which counts as 1 GPU" in (found[0].reason or "")


def test_what_is_held_on_a_node_that_is_away_still_counts() -> None:
    pool = Pool(nodes=2, quotas=Quotas(default=Limits(limit_milli=1000)))
    key = pool.running(1, memory_bytes=80 * GIB)
    where = pool.grant(key).slice
    assert where is not None
    pool.devices = [device for device in pool.devices if device.node != where.node]
    pool.sync()
    with pytest.raises(Refused):
        pool.ask(1, memory_bytes=20 * GIB)


def test_sizes_that_change_are_counted_anew() -> None:
    pool = Pool(quotas=Quotas(groups={"g": Limits(limit_milli=500)}))
    pool.running(1, "a", groups=["g"], memory_bytes=20 * GIB)
    assert pool.core.books.granted_by(frozenset("g"))["group", "g"].counted_milli == 250
    pool.devices = [Device.model_validate({**pool.devices[0].model_dump(), "reserve_bytes": 41 * GIB})]
    pool.sync()
    assert pool.core.books.granted_by(frozenset("g"))["group", "g"].counted_milli == 500
    assert pool.ask(10, "b", groups=["g"]).state == GrantState.queued
