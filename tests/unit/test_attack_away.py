"""What users may try with moving memory to the host: all at the same time, and again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.errors import NbgpuError
from nbgpu.quantities import GIB, MIB
from nbgpu_agent import checkpoint
from nbgpu_agent.agent import Agent
from nbgpu_agent.away import Away
from nbgpu_agent.checkpoint import Checkpoints


def held_back(phase: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What is said to one who would move 20 GiB while another slice's 20 GiB are in `phase`, on a host with 30 GiB available."""
    monkeypatch.setattr(checkpoint, "parse_meminfo", lambda _: (30 * GIB, 64 * GIB))
    away = SimpleNamespace(phase=phase, memory_bytes=20 * GIB)
    other = SimpleNamespace(record=SimpleNamespace(parked=None, kernels_away={"k": away}))
    parked = SimpleNamespace(record=SimpleNamespace(parked=SimpleNamespace(phase="parked", memory_bytes=GIB), kernels_away={}))
    agent: Any = SimpleNamespace(slices={"a": other, "b": parked})
    words = {"_moved_bytes": Agent._moved_bytes} | ({"_moving_bytes": Agent._moving_bytes} if hasattr(Agent, "_moving_bytes") else {})
    return Checkpoints("libcuda.so.1", 60 * GIB, *(lambda of=of: of(agent) for of in words.values())).host_refusal(20 * GIB)  # type: ignore[misc, arg-type]


def test_what_is_on_its_way_to_the_host_is_not_available_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each slice one at a time; of twenty slices all at once, and the kernel has not seen a byte of them yet."""
    assert held_back("parked", monkeypatch) is None, "the control: what is there already is not available as the host says itself"
    assert "of memory available" in str(held_back("parking", monkeypatch))


def test_who_is_refused_again_and_again_asks_the_driver_nothing() -> None:
    """The questions go through the one thread that the watchdog's looks go through: fifty requests a second, a question for each GPU."""
    asked = 0

    async def room(_uuid: str, _pids: Collection[int]) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        return 0, 900 * MIB

    async def flood() -> list[str]:
        checkpoints = Checkpoints("libcuda.so.1", 64 * GIB, lambda: 0)
        checkpoints.room = room
        devices = [SimpleNamespace(uuid=f"GPU-{n}", memory_bytes=GIB) for n in range(4)]
        there = {"other": SimpleNamespace(memory_bytes=4 * GIB, phase="parked")}
        live: Any = SimpleNamespace(
            id="s", may_suspend=True, coming_back=set(), slice=SimpleNamespace(devices=devices),
            record=SimpleNamespace(kernels_away=there), tenant=SimpleNamespace(read=list), memory_by_device=lambda _: [0] * 4,
        )  # fmt: skip
        away = Away(SimpleNamespace(slices={"s": live}), checkpoints)  # type: ignore[arg-type]
        away._why_not = lambda *_: None  # type: ignore[method-assign]
        said: list[str] = []
        for _ in range(50):
            with pytest.raises(NbgpuError) as refused:
                await away.suspend(live, "k")
            said.append(refused.value.message)
        return said

    said = asyncio.run(flood())
    assert "as much there as its slice has" in said[0], "the control: it is looked at once"
    assert asked <= 4, f"the driver was asked {asked} times for {len(said)} requests that were refused"
