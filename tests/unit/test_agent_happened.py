"""What the agent says of kernels that no limit refused: memory that came free with a process, a limit that slows."""

from __future__ import annotations

import pytest

from nbgpu.models import KernelLimit
from nbgpu_agent.happened import Happened
from nbgpu_agent.usage import SlotUse

GIB = 1024**3
KERNEL = "1a2b3c4d-5e6f"


def slot(kernel_id: str = KERNEL, held: int = 8 * GIB, pid: int | None = 1, milli: int = 0, device: int = 0) -> SlotUse:
    return SlotUse(device=device, kernel_id=kernel_id, pid=pid, memory_bytes=held, peak_bytes=held, compute_milli=milli)


@pytest.mark.parametrize("after", [(), (slot(held=0, pid=None),), (slot(held=GIB, pid=2),)])
def test_memory_of_an_ended_process_is_free_again(after: tuple[SlotUse, ...]) -> None:
    """Its kernel is gone, waits, or has another process."""
    happened = Happened()
    assert happened.look([slot(), slot(held=GIB, device=1)], {}, 100) == []
    (told,) = happened.look(after, {}, 101)
    assert (told.kind, told.kernel_id, told.data) == ("kernel-ended", KERNEL, {"freed_bytes": 9 * GIB})
    assert told.message == "Notebook kernel 1a2b3c4d… ended: the 9 GiB of GPU memory that it held are free again."
    assert happened.look(after, {}, 102) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((slot(),), (slot(held=0),)),  # it freed its memory, and runs
        ((slot(held=0),), ()),  # it held nothing, or others have its GPU meanwhile
        ((slot(), slot(pid=2)), (slot(pid=2),)),  # one of its two
        ((slot(pid=None),), (slot(pid=None),)),  # whose it is is not known
        ((slot(pid=None),), ()),
        ((slot(),), (slot(pid=None),)),
        ((slot(""),), ()),  # a terminal's programs come and go
    ],
)
def test_nothing_ended(before: tuple[SlotUse, ...], after: tuple[SlotUse, ...]) -> None:
    happened = Happened()
    happened.look(before, {}, 100)
    assert happened.look(after, {}, 101) == []


def throttled(milli: int, limit: int | None, seconds: range) -> list[int]:
    happened = Happened()
    limits = {KERNEL: KernelLimit(compute_milli=limit)} if limit else {}
    looks = {now: happened.look([slot(milli=milli), slot("other", milli=250)], limits, now) for now in seconds}
    return [now for now, told in looks.items() if [(one.kind, one.kernel_id) for one in told] == [("throttled", KERNEL)]]


def test_a_limit_that_slows_for_a_minute_is_said_once_in_ten() -> None:
    assert throttled(125, 125, range(1000, 2000)) == [1060, 1660]
    assert throttled(114, 125, range(1000, 1000 + 55)) == []


def test_single_looks_that_find_it_between_two_gpu_kernels_do_not_begin_the_minute_anew() -> None:
    happened, limits = Happened(), {KERNEL: KernelLimit(compute_milli=125)}
    looks = [happened.look([slot(milli=60 if now % 15 == 0 else 127)], limits, now) for now in range(1000, 1100)]
    assert [told.kind for found in looks for told in found] == ["throttled"]


@pytest.mark.parametrize(("milli", "limit"), [(100, 125), (250, None)])
def test_a_limit_that_leaves_room_or_is_none_is_not_said(milli: int, limit: int | None) -> None:
    assert throttled(milli, limit, range(1000, 1300)) == []


def test_a_pause_begins_the_minute_anew() -> None:
    happened, limits = Happened(), {KERNEL: KernelLimit(compute_milli=125)}
    for now in range(1000, 1200):
        assert happened.look([slot(milli=0 if now % 50 < 5 else 125)], limits, now) == []


def test_what_was_known_of_a_kernel_goes_with_it() -> None:
    happened, limits = Happened(), {KERNEL: KernelLimit(compute_milli=125)}
    for now in range(1000, 1059):
        assert happened.look([slot(held=0, milli=125)], limits, now) == []
    assert happened.look([], limits, 1059) == []
    assert happened.look([slot(held=0, milli=125)], limits, 1070) == []
    assert happened.look([slot(held=0, milli=125)], limits, 1071) == []
