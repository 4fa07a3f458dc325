"""`nbgpu.keep`: what a signal has killed is started again at once; what ended by itself, or was told to end, is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} {sys.argv[2:]}\\n'); time.sleep(float(os.environ['LIFE']))"


class Kept:
    def __init__(self, place: Path, life: str = "60"):
        self.notes = place / "notes"
        self.notes.touch()
        command = [sys.executable, "-m", "nbgpu.keep", sys.executable, "-c", PROGRAM, str(self.notes), "--takeover"]
        self.keeper = subprocess.Popen(command, env={**os.environ, "LIFE": life}, stderr=subprocess.DEVNULL)

    def started(self, count: int) -> list[str]:
        """Return a line of each start, once there were so many."""
        deadline = time.monotonic() + 20
        while len(lines := self.notes.read_text().splitlines()) < count:
            assert time.monotonic() < deadline, lines
            time.sleep(0.02)
        return lines


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path)
    yield found
    found.keeper.kill()
    found.keeper.wait()
    for line in found.notes.read_text().splitlines():
        pid = int(line.split()[0])
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def test_who_was_killed_is_started_again_and_takes_no_place_of_others(kept: Kept) -> None:
    (first,) = kept.started(1)
    assert first.endswith("['--takeover']")
    os.kill(int(first.split()[0]), signal.SIGKILL)
    _, second = kept.started(2)
    assert second.endswith("[]")
    assert kept.keeper.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_end(kept: Kept, number: signal.Signals) -> None:
    (line,) = kept.started(1)
    kept.keeper.send_signal(number)
    assert kept.keeper.wait(20) != 0
    assert not Path(f"/proc/{line.split()[0]}").exists()
    assert len(kept.started(1)) == 1


def test_who_ends_by_itself_is_not_started_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, life="0")
    assert kept.keeper.wait(20) == 0
    assert len(kept.started(1)) == 1
