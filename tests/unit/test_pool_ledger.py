"""What the pool reads of an agent that is newer than it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpcore
import pytest

from nbgpu.models import Owner, Slice, SliceDevice
from nbgpu.quantities import GIB
from nbgpu_pool.ledger import AgentLedger

SLICE = Slice(
    slice_id="slice-00001",
    owner=Owner(hub="h", user="u", server=""),
    node="n",
    mode="burst",
    devices=[SliceDevice(uuid="GPU-0", index=0, model="Big", memory_bytes=GIB, compute_milli=250)],
)


def newer(found: Slice) -> dict[str, Any]:
    said = {"slice": found.model_dump(mode="json"), "state": "running", "process_count": 1, "created": 1.0}
    return {**said, "what_a_later_version_says": {"more": 1}}


@pytest.mark.asyncio
async def test_an_agent_that_says_more_is_understood(tmp_path: Path) -> None:
    ledger = AgentLedger(tmp_path / "none.sock")

    async def answer(method: str, *_: object) -> httpcore.Response:
        all_of_it = {"generation": 1, "slices": [newer(SLICE)], "devices": [], "later": True}
        found = httpcore.Response(200, content=json.dumps(newer(SLICE) if method == "PATCH" else all_of_it).encode())
        await found.aread()
        return found

    ledger._request = answer  # type: ignore[method-assign,assignment]
    assert await ledger.resize(SLICE) is None
    seen = await anext(ledger.watch(lambda: 1, lambda: False))
    assert [one.slice for one in seen.slices] == [SLICE]  # type: ignore[union-attr]
    await ledger.close()
