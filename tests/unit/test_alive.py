"""A file whose time tells that an event loop gets round."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from nbgpu.alive import beside

pytestmark = pytest.mark.asyncio


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


async def test_the_files_time_is_renewed_while_the_loop_gets_round(tmp_path: Path) -> None:
    path = tmp_path / "alive"

    async def work() -> str:
        await asyncio.sleep(0.05)
        os.utime(path, (0, 0))
        await asyncio.sleep(0.5)
        assert age(path) < 60
        os.utime(path, (0, 0))
        time.sleep(0.2)  # the control: a loop that hangs
        assert age(path) > 60
        return "done"

    assert await beside(path, work(), 0.02) == "done"
    os.utime(path, (0, 0))
    await asyncio.sleep(0.2)
    assert age(path) > 60, "it ends with the work"


async def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    assert await beside(tmp_path / "missing" / "alive", asyncio.sleep(0.1, "done"), 0.02) == "done"


async def test_without_a_file(tmp_path: Path) -> None:
    assert await beside(None, asyncio.sleep(0, "done")) == "done"
    assert not list(tmp_path.iterdir())
