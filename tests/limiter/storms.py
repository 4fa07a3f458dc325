"""Storms: processes that allocate, free and launch without end, what they say of themselves, and an auditor that adds it up."""

from __future__ import annotations

import mmap
import struct
import subprocess
import time
from pathlib import Path

from limiter_kit import program
from limiter_slice import MIB

ROWS, ROW_BYTES = 16, 64
STEPS, HELD, STILL, STANDING, PID = range(5)
SNAPSHOTS, OVERS, MOST_MIB = range(3)


class Board:
    """The file of board.h; row 0 is the auditor's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "board"
        self.path.write_bytes(bytes(ROWS * ROW_BYTES))
        with self.path.open("r+b") as file:
            self.words = mmap.mmap(file.fileno(), ROWS * ROW_BYTES)
        self.free = set(range(1, ROWS))
        self.auditor: subprocess.Popen[bytes] | None = None

    def word(self, row: int, index: int) -> int:
        """Return one word."""
        return int(struct.unpack_from("<Q", self.words, row * ROW_BYTES + 8 * index)[0])

    def set(self, row: int, index: int, value: int) -> None:
        """Write one word."""
        struct.pack_into("<Q", self.words, row * ROW_BYTES + 8 * index, value)

    def start(self, seed: int, env: dict[str, str], kind: str = "storm", *more: str) -> Storm:
        """Start a process of that program on a free row."""
        return Storm(self, self.free.pop(), seed, env, kind, *more)

    def audit(self, limit: int) -> None:
        """From now on, have the sum compared with the limit."""
        self.auditor = subprocess.Popen([program("audit"), self.path, str(limit // MIB)])

    def audited(self) -> tuple[int, int, int]:
        """Return snapshots taken, those above the limit, the most bytes held in one."""
        return self.word(0, SNAPSHOTS), self.word(0, OVERS), self.word(0, MOST_MIB) * MIB

    def close(self) -> None:
        """End the auditor."""
        if self.auditor:
            self.auditor.kill()
            self.auditor.wait()


class Storm:
    """One process on the board."""

    def __init__(self, board: Board, row: int, seed: int, env: dict[str, str], kind: str, *more: str) -> None:
        self.board, self.row = board, row
        self.process = subprocess.Popen([program(kind), str(seed), str(board.path), str(row), *more], env=env)

    @property
    def steps(self) -> int:
        """Steps made."""
        return self.board.word(self.row, STEPS)

    @property
    def held(self) -> int:
        """Bytes it holds, exact while it stands still."""
        return (self.board.word(self.row, HELD) & 0xFFFFFFFF) * MIB

    def stand_still(self, seconds: float) -> None:
        """Make it pause between two steps, and wait until it does."""
        self.board.set(self.row, STILL, 1)
        deadline = time.monotonic() + seconds
        while not self.board.word(self.row, STANDING):
            assert time.monotonic() < deadline, "a witness is stuck"
            time.sleep(0.001)

    def end(self) -> None:
        """Kill it and clear its row."""
        self.process.kill()
        self.process.wait()
        for index in (PID, HELD, STEPS):
            self.board.set(self.row, index, 0)
        self.board.free.add(self.row)
