"""The agent remembers what a user's slice took beyond its share, for the user's next slice on that GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from limiter_slice import PlayedSlice, wait_until

from nbgpu_agent import layout
from nbgpu_agent.native import Native
from nbgpu_agent.turns import Debt, Turns

SECOND = 1_000_000_000


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], tuple[Any, PlayedSlice]]]:
    """Make slices of half a device, as far as `Turns` looks at them."""
    made: list[PlayedSlice] = []

    def one(user: str) -> tuple[Any, PlayedSlice]:
        files = PlayedSlice(tmp_path / str(len(made)))
        made.append(files)
        files.take_slot()
        owner, part = SimpleNamespace(hub="hub-1", user=user), SimpleNamespace(uuid="GPU-0", compute_milli=500)
        wanted = SimpleNamespace(owner=owner, mode="burst", devices=[part])
        record, ctl, tenant = SimpleNamespace(parked=None), SimpleNamespace(fd=files.ctl_fd), SimpleNamespace(fd=files.use_fd)
        live = SimpleNamespace(
            id="s", owner=user, slice=wanted, full=wanted, record=record, ctl=ctl, tenant=tenant, entries=[], accounts={}
        )
        return live, files

    yield one
    for files in made:
        files.close()


def test_the_next_slice_of_the_same_user_brings_the_debt_along(make: Callable[[str], tuple[Any, PlayedSlice]]) -> None:
    turns = Turns(Native(), [SimpleNamespace(uuid="GPU-0", index=0)])  # pyright: ignore[reportArgumentType]
    try:
        scheduler = turns._scheduler  # pyright: ignore[reportPrivateUsage]
        neighbour, files = make("grace")
        turns.add(neighbour)
        files.say(want=1)
        assert wait_until(lambda: files.gate() == layout.GATE_OPEN)
        first, _ = make("ada")
        turns.add(first)
        before = scheduler.stats(first.entries[0]).ahead_ns
        scheduler.owe(first.entries[0], SECOND)
        assert scheduler.stats(first.entries[0]).ahead_ns > before + SECOND // 2
        turns.remove(first)
        ahead = {}
        for user in ("ada", "eve"):
            live, _ = make(user)
            turns.add(live)
            ahead[user] = scheduler.stats(live.entries[0]).ahead_ns
            turns.remove(live)
        print(ahead)
        assert ahead["ada"] > SECOND // 2
        assert ahead["eve"] < SECOND // 10, "control: another's slice begins anew"
    finally:
        turns.close()


def test_a_debt_is_over_when_a_slice_that_stayed_would_have_waited_for_it() -> None:
    now = time.monotonic_ns()
    debt = Debt(SECOND, now, 100)
    assert debt.left_ns(now) == SECOND
    assert debt.left_ns(now + 4 * SECOND) == SECOND * 6 // 10
    assert debt.left_ns(now + 11 * SECOND) == 0
