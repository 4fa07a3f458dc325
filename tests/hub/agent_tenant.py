"""A tenant for tests: takes a slot in a slice's `use` file by the limiter's protocol and writes what stdin says.

Commands, each answered with "done": ``used BYTES``, ``context BYTES``, ``refuse BYTES BY``, ``busy NS`` (adds),
``unlock`` (drops the lock and lives on), ``raw OFFSET HEX``, ``truncate BYTES``, ``leave`` (frees the slot).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import time
from pathlib import Path

from nbgpu_agent import layout
from nbgpu_agent.procs import start_time

SIZE = ctypes.sizeof(layout.UseSlot)
FORMATS = {ctypes.c_uint32: "<I", ctypes.c_uint64: "<Q"}


class Slot:
    """One slot of the file."""

    def __init__(self, directory: str, kernel_id: str):
        self.fd = os.open(Path(directory) / "use", os.O_RDWR)
        for self.number in range(layout.SLOTS):
            self.at = layout.Use.slot.offset + self.number * SIZE
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.at)
            except OSError:
                continue
            if self.get("owner") == 0:
                break
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, self.at)
        os.pwrite(self.fd, bytes(SIZE - 8), self.at + 8)
        started = start_time(os.getpid())
        assert started is not None
        self.set("start_time", started)
        os.pwrite(self.fd, kernel_id.encode(), self.at + layout.UseSlot.kernel_id.offset)
        high = layout.Use.high_water.offset
        if struct.unpack("<I", os.pread(self.fd, 4, high))[0] <= self.number:
            os.pwrite(self.fd, struct.pack("<I", self.number + 1), high)
        self.set("owner", os.getpid() << 32 | 1)
        self.set("ready", 1)

    def _field(self, name: str) -> tuple[int, str]:
        kind = next(field[1] for field in layout.UseSlot._fields_ if field[0] == name)
        return self.at + getattr(layout.UseSlot, name).offset, FORMATS[kind]

    def get(self, name: str) -> int:
        """Return a number of the slot."""
        at, code = self._field(name)
        return struct.unpack(code, os.pread(self.fd, struct.calcsize(code), at))[0]

    def set(self, name: str, value: int) -> None:
        """Write a number of the slot."""
        at, code = self._field(name)
        os.pwrite(self.fd, struct.pack(code, value), at)

    def refuse(self, size: int, by: int) -> None:
        """Count a refusal as the limiter does: the slot's numbers first, the file's word last."""
        self.set("refused_bytes", size)
        self.set("refused_by", by)
        self.set("refusals", self.get("refusals") + 1)
        at = layout.Use.events.offset
        os.pwrite(self.fd, struct.pack("<I", struct.unpack("<I", os.pread(self.fd, 4, at))[0] + 1), at)


def main() -> None:
    """Obey stdin until it closes."""
    slot = Slot(sys.argv[1], sys.argv[2])
    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word in ("used", "context"):
            slot.set(word, int(rest[0]))
        elif word == "refuse":
            slot.refuse(int(rest[0]), int(rest[1]))
        elif word == "busy":
            slot.set("busy_ns", slot.get("busy_ns") + int(rest[0]))
            slot.set("launches", slot.get("launches") + 1)
            slot.set("last_launch_ns", time.monotonic_ns())
        elif word == "unlock":
            fcntl.lockf(slot.fd, fcntl.LOCK_UN, 1, slot.at)
        elif word == "raw":
            os.pwrite(slot.fd, bytes.fromhex(rest[1]), int(rest[0]))
        elif word == "truncate":
            os.ftruncate(slot.fd, int(rest[0]))
        elif word == "leave":
            slot.set("used", 0)
            slot.set("owner", 0)
            fcntl.lockf(slot.fd, fcntl.LOCK_UN, 1, slot.at)
        else:
            raise SystemExit(f"unknown command {word}")
        print("done", flush=True)


if __name__ == "__main__":
    main()
