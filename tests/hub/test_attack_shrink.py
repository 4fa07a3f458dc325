"""A tenant tells nothing of what it just took and makes its slice smaller: the driver's figures are older. All real, on a simulated GPU."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path

import pytest
from agent_harness import GIB, missing_libraries, until
from test_shrink import HELD_GIB, LEFT_GIB, Ada

from nbgpu.models import GrantState, Resize
from nbgpu_agent import layout

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
ATTEMPTS = 6
USED = [layout.Use.slot.offset + slot * ctypes.sizeof(layout.UseSlot) + layout.UseSlot.used.offset for slot in range(8)]


def wiped(ada: Ada, words: dict[int, bytes] | None = None) -> dict[int, bytes]:
    """Have her slots tell of nothing, or what they told before (`words`); return what they told."""
    use = os.open(Path(ada.agent.runtime) / "slices" / ada.key / "use", os.O_RDWR)
    told = {at: os.pread(use, 8, at) for at in USED}
    for at in USED:
        if any(told[at]) or words:
            os.pwrite(use, (words or {}).get(at, struct.pack("<Q", 0)), at)
    os.close(use)
    return told


def test_what_was_taken_since_the_last_look_is_given_to_nobody(runtime: Path) -> None:
    ada = Ada(runtime)
    try:
        for _ in range(ATTEMPTS):  # each is within one of the agent's seconds, or not
            ada.notebook.do("less")
            until(lambda: ada.slice().memory_used_bytes < 2 * GIB, 5)
            time.sleep(2.2)  # two looks of the agent
            ada.pool.client.resize(ada.key, Resize(memory_bytes=ada.usable // 2))
            until(lambda: ada.pool.client.grant(ada.key).resizing is None, 5)
            assert ada.notebook.do("more", HELD_GIB * 1024) == "0"
            told = wiped(ada)
            ada.pool.client.resize(ada.key, Resize(memory_bytes=LEFT_GIB * GIB))
            grace = ada.ask("grace", ada.usable - LEFT_GIB * GIB)
            state = ada.state(grace)
            ada.pool.client.cancel(grace)
            wiped(ada, told)
            assert state == GrantState.queued, f"she still holds {HELD_GIB} GiB, and grace was granted all beside {LEFT_GIB}"
        until(lambda: ada.books().memory_granted_bytes < (HELD_GIB + 3) * GIB, 5, "what she does not hold is free")
    finally:
        ada.close()
