"""Helper processes of the agent: few at a time over all slices, and no user has them all."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.models import Owner
from nbgpu_agent import checkpoint
from nbgpu_agent.away import Away
from nbgpu_agent.checkpoint import TOO_MANY, Checkpoints
from nbgpu_agent.helpers import AT_ONCE, OF_ONE_USER, Helpers
from nbgpu_agent.live import LiveSlice
from nbgpu_agent.parking import Parking

MOVED: Any = SimpleNamespace(processes=(), device_bytes=())


class Slow(Checkpoints):
    """Checkpoints whose helper processes are only counted."""

    def __init__(self) -> None:
        super().__init__("libcuda.so.1", 1, lambda: 0)
        self.now: list[str] = []
        self.most = self.most_of_one = 0
        self.order: list[str] = []
        self.may_end = asyncio.Event()

    async def bring(self, slice_id: str) -> None:
        """Bring processes of a slice back."""
        left = [MOVED, MOVED, None]  # before, when it has its helper, after
        await self.bring_back(slice_id, slice_id, (), lambda: left.pop(0) if left else None)

    async def _child(self, what: str, moved: Any, go: Any) -> dict[str, str]:
        name = asyncio.current_task().get_name()  # type: ignore[union-attr]
        self.now.append(name)
        self.order.append(name)
        self.most = max(self.most, len(self.now))
        self.most_of_one = max(self.most_of_one, self.now.count(name))
        await self.may_end.wait()
        await asyncio.sleep(0)
        self.now.remove(name)
        return {"1": "running"}


async def begin(slow: Slow, slices: list[str]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(slow.bring(name), name=name) for name in slices]
    for _ in range(10):
        await asyncio.sleep(0)
    return tasks


@pytest.mark.asyncio
async def test_twelve_kernels_that_come_back_at_once_have_few_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [f"slice-{number % 3}" for number in range(12)]
    slow = Slow()
    tasks = await begin(slow, slices)
    assert (slow.most, slow.most_of_one) == (AT_ONCE, 2)
    slow.may_end.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert sorted(slow.order) == sorted(slices), "each had its turn"
    assert slow.most == AT_ONCE
    monkeypatch.setattr("nbgpu_agent.helpers.AT_ONCE", 100)
    monkeypatch.setattr("nbgpu_agent.helpers.OF_ONE_USER", 100)
    free = Slow()
    tasks = await begin(free, slices)
    assert free.most == 12, "the control"
    free.may_end.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)


@pytest.mark.asyncio
async def test_a_user_whose_helpers_hang_keeps_nobody_waiting() -> None:
    slow = Slow()
    hang = await begin(slow, ["greedy"] * 12)
    assert slow.now == ["greedy"] * OF_ONE_USER
    others = await begin(slow, ["other"])
    assert slow.now.count("other") == 1
    slow.may_end.set()
    await asyncio.wait_for(asyncio.gather(*hang, *others), 10)


@pytest.mark.asyncio
async def test_who_has_none_comes_before_who_has_some() -> None:
    helpers = Helpers()
    for name in ("a", "a", "b", "b"):
        assert await helpers.take(name)
    order: list[str] = []

    async def wait(name: str) -> None:
        await helpers.take(name)
        order.append(name)

    tasks = [asyncio.create_task(wait(name)) for name in ("a", "b", "c")]
    await asyncio.sleep(0)
    helpers.give("a")
    await asyncio.sleep(0.01)
    assert order == ["c"]
    helpers.give("b")
    await asyncio.sleep(0.01)
    assert order[1:] in (["a"], ["b"])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.asyncio
async def test_who_leaves_gives_its_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = Helpers()
    for number in range(AT_ONCE):
        assert await helpers.take(f"s{number}")
    assert not await helpers.take("late", 0.01)
    waits = asyncio.create_task(helpers.take("late"))
    await asyncio.sleep(0)
    helpers.give("s0")
    waits.cancel()  # at the moment of its turn
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert await helpers.take("next", 1)
    monkeypatch.setattr(checkpoint, "PATIENCE_SECONDS", 0.01)
    full = Slow()
    full._helpers = helpers  # type: ignore[attr-defined]

    async def go() -> bool:
        return True

    assert await full.put_away("other", MOVED, (), go) == TOO_MANY


class Stopped:
    """A slice that was to be put away, and a kernel of it, while others have all the helper processes."""

    def __init__(self, helpers: Helpers, user: str = "ada", server: str = "") -> None:
        self.checkpoints = Slow()
        self.checkpoints._helpers = helpers  # type: ignore[attr-defined]
        self.record = SimpleNamespace(parked=MOVED, kernels_away={"k": MOVED})
        self.told: list[str] = []
        self.gate_closed = True
        self.id, self.owner = f"{user}-{server}", user
        self.slice = SimpleNamespace(owner=Owner(hub="h", user=user, server=server), devices=())
        self.full = self.slice
        self.user = LiveSlice.user.fget(SimpleNamespace(record=SimpleNamespace(slice=self.slice)))  # type: ignore[attr-defined]
        self.agent: Any = SimpleNamespace(
            slices={self.id: self}, touch=lambda: None, write_limits=lambda _: None, turns=SimpleNamespace(suspend=self.suspend),
            events=SimpleNamespace(add=lambda kind, *_, **__: self.told.append(kind)),
        )  # fmt: skip

    def save(self, parked: None) -> None:
        """Note that it is not parked."""
        self.record.parked = parked

    def save_away(self, kernel_id: str, entry: None) -> None:
        """Note that a kernel is not away."""
        del self.record.kernels_away[kernel_id]

    def suspend(self, live: Any, closed: bool) -> None:
        """Close its gate, or open it."""
        self.gate_closed = closed

    async def undo_parking(self, why: str, seconds: float) -> None:
        """Leave the slice as it was."""
        live: Any = self
        await asyncio.wait_for(Parking(self.agent, self.checkpoints)._undo(live, why), seconds)

    async def undo_away(self, why: str, seconds: float) -> None:
        """Leave the kernel as it was."""
        live: Any = self
        await asyncio.wait_for(Away(self.agent, self.checkpoints)._undo(live, "k", why), seconds)


@pytest.mark.asyncio
async def test_of_what_had_no_helper_nothing_is_locked_and_it_goes_on_at_once() -> None:
    helpers = Helpers()
    for number in range(AT_ONCE):
        assert await helpers.take(f"other-{number}")
    idle = Stopped(helpers)
    await idle.undo_parking(TOO_MANY, 5)
    assert (idle.record.parked, idle.gate_closed) == (None, False)
    await idle.undo_away(TOO_MANY, 5)
    assert (idle.record.kernels_away, idle.told) == ({}, ["not-suspended"])
    locked = Stopped(helpers)
    for undo in (locked.undo_parking, locked.undo_away):
        with pytest.raises(asyncio.TimeoutError):
            await undo("it is used again", 0.05)  # the control: what may be locked needs a helper to go on
    assert (locked.record.parked, locked.gate_closed, locked.told) == (MOVED, True, [])


@pytest.mark.asyncio
async def test_two_servers_of_one_user_have_the_helpers_of_one() -> None:
    helpers = Helpers()
    servers = [Stopped(helpers, "greedy", name) for name in ("", "two") for _ in range(OF_ONE_USER)]
    hang = [asyncio.create_task(one.undo_parking("it is used again", 10)) for one in servers]
    other = Stopped(helpers, "other")
    hang.append(asyncio.create_task(other.undo_parking("it is used again", 10)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert sum(len(one.checkpoints.now) for one in servers) == OF_ONE_USER
    assert len(other.checkpoints.now) == 1
    for one in (*servers, other):
        one.checkpoints.may_end.set()
    await asyncio.gather(*hang)
