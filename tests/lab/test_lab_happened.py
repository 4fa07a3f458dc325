"""What the server notices by itself: memory that came free with a process, a limit that slows; and that both keep to the schema."""

from __future__ import annotations

from typing import Any

import pytest
from fake_slice_agent import GIB, FakeAgent
from jupyter_events import EventLogger

from nbgpu_lab import extension
from nbgpu_lab.client import SliceClient
from nbgpu_lab.happened import Happened
from nbgpu_lab.notices import Notices
from nbgpu_lab.sampler import Sampler

NAMED = {"name": "train.ipynb", "path": "deep/train.ipynb"}


def kernel(
    kernel_id: str | None = "abc", held: int = 8 * GIB, pids: tuple[int, ...] = (1,), milli: int = 0, limit: int | None = None
) -> Any:
    device = {"uuid": "GPU-1", "memory_used_bytes": held, "memory_peak_bytes": held, "compute_used_milli": milli}
    limits = {"memory_bytes": None, "compute_milli": limit}
    return {"kernel_id": kernel_id, "pids": list(pids), "limit": limits, "devices": [device], **NAMED}


def usage(time: float, *kernels: Any) -> Any:
    return {"time": time, "kernels": list(kernels)}


@pytest.mark.parametrize("after", [(), (kernel(held=0, pids=()),), (kernel(held=GIB, pids=(2,)),)])
def test_memory_of_an_ended_process_is_free_again(after: tuple[Any, ...]) -> None:
    """Its kernel is gone, waits, or has another process."""
    happened = Happened()
    assert happened.look(usage(100, kernel())) == []
    (told,) = happened.look(usage(101, *after))
    assert (told["kind"], told["level"], told["path"]) == ("kernel-ended", "info", "deep/train.ipynb")
    assert told["data"] == {"freed_bytes": 8 * GIB}
    assert told["message"] == "train.ipynb ended: the 8 GiB of GPU memory that it held are free again."
    assert happened.look(usage(102, *after)) == []


@pytest.mark.parametrize(
    ("before", "now", "after"),
    [
        (kernel(), 101, (kernel(held=0),)),  # it freed its memory, and runs
        (kernel(held=0), 101, ()),  # it held nothing
        (kernel(pids=()), 101, (kernel(pids=()),)),  # whose it is is not known
        (kernel(), 101, (kernel(pids=()),)),
        (kernel(None), 101, ()),  # a terminal's programs come and go
        (kernel(), 200, ()),  # nobody looked meanwhile: when and why is not known
        (kernel(), 90, ()),  # the clock was set
    ],
)
def test_nothing_ended(before: Any, now: float, after: tuple[Any, ...]) -> None:
    happened = Happened()
    happened.look(usage(100, before))
    assert happened.look(usage(now, *after)) == []


def throttled(milli: int, limit: int | None, seconds: range) -> list[int]:
    happened = Happened()
    looks = {now: happened.look(usage(now, kernel(milli=milli, limit=limit))) for now in seconds}
    return [now for now, told in looks.items() if [one["kind"] for one in told] == ["throttled"]]


def test_a_limit_that_slows_for_a_minute_is_said_once_in_ten() -> None:
    assert throttled(125, 125, range(1000, 2000)) == [1060, 1660]
    assert throttled(119, 125, range(1000, 1000 + 55)) == []


@pytest.mark.parametrize(("milli", "limit"), [(100, 125), (250, None)])
def test_a_limit_that_leaves_room_or_is_none_is_not_said(milli: int, limit: int | None) -> None:
    assert throttled(milli, limit, range(1000, 1300)) == []


def test_a_pause_begins_the_minute_anew() -> None:
    happened = Happened()
    for now in range(1000, 1200):
        milli = 0 if now % 50 == 0 else 125
        assert happened.look(usage(now, kernel(milli=milli, limit=125))) == []


async def test_the_sampler_keeps_what_happened_and_it_keeps_to_the_schema(agent: FakeAgent) -> None:
    notices, emitted = Notices(), []
    logger = EventLogger()
    logger.register_event_schema(extension._SCHEMA)
    notices.listeners.append(lambda notice: emitted.append(logger.emit(schema_id=extension.SCHEMA_ID, data=notice)))
    sampler = Sampler(SliceClient(agent.socket_path), names, notices, keep_seconds=0)
    agent.kernel("abc", 8 * GIB)
    await sampler.usage()
    assert notices.after(0) == []
    del agent.kernels["abc"]
    await sampler.usage()
    (notice,) = notices.after(0)
    assert (notice["kind"], notice["name"], notice["path"]) == ("kernel-ended", "<b>ノート</b>.ipynb", "<b>ノート</b>.ipynb")
    assert len(emitted) == 1


async def names() -> dict[str, Any]:
    return {"abc": {"name": "<b>ノート</b>.ipynb", "path": "<b>ノート</b>.ipynb", "type": "notebook", "state": "idle"}}
