"""A slice's two files and a process in it, played by a test without the limiter."""

from __future__ import annotations

import ctypes as c
import fcntl
import mmap
import os
import platform
import struct
import time
from pathlib import Path

from nbgpu_agent import layout

_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
_F_OFD_SETLK = 37
_LIBC = c.CDLL(None, use_errno=True)


class SliceFiles:
    """`ctl` and `use` as the agent makes them, and the words a process of the slice would write."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.use_path = folder / "use"
        self.ctl_fd = self._make(folder / "ctl", layout.CTL_SIZE)
        self.use_fd = self._make(self.use_path, layout.USE_SIZE)
        self._lock_fd = os.open(self.use_path, os.O_RDWR)
        self._ctl_map = mmap.mmap(self.ctl_fd, layout.CTL_SIZE)
        self._use_map = mmap.mmap(self.use_fd, layout.USE_SIZE)
        self.ctl = layout.Ctl.from_buffer(self._ctl_map)
        self.use = layout.Use.from_buffer(self._use_map)
        self.ctl.magic, self.ctl.version, self.ctl.size = layout.CTL_MAGIC, layout.VERSION, layout.CTL_SIZE
        self.use.magic, self.use.version, self.use.size = layout.USE_MAGIC, layout.VERSION, layout.USE_SIZE

    @staticmethod
    def _make(path: Path, size: int) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.ftruncate(fd, size)
        return fd

    def close(self) -> None:
        """Unmap and close."""
        del self.ctl, self.use
        self._ctl_map.close()
        self._use_map.close()
        os.close(self.ctl_fd)
        os.close(self.use_fd)
        os.close(self._lock_fd)

    def take_slot(self, slot: int = 0, device: int = 0) -> None:
        """Own a slot as a live process does, lock included: one of the open file, for a process does not see its own POSIX locks."""
        lock_at = layout.Use.slot.offset + slot * c.sizeof(layout.UseSlot)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, lock_at, 1, 0)
        fcntl.fcntl(self._lock_fd, _F_OFD_SETLK, lock)
        row = self.use.slot[slot]
        row.owner = os.getpid() << 32 | 1
        row.device = device
        row.ready = 1
        self.use.high_water = max(self.use.high_water, slot + 1)

    def ring(self) -> None:
        """Raise the bell and wake who waits for it."""
        self.use.bell = (self.use.bell + 1) & 0xFFFFFFFF
        _LIBC.syscall(_FUTEX, c.byref(self.use, layout.Use.bell.offset), 1, 2**31 - 1, None, None, 0)

    def say(self, slot: int = 0, *, want: int | None = None, busy: bool | None = None, near: int | None = None) -> None:
        """Change words of a slot, then ring."""
        row = self.use.slot[slot]
        if want is not None:
            row.want = want
        if busy is not None:
            row.busy_since = time.monotonic_ns() if busy else 0
        if near is not None:
            row.near = near
        self.ring()

    def gate(self, device: int = 0) -> int:
        """Return the gate word."""
        return self.ctl.device[device].gate


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    """Wait for a condition; return whether it came true in time."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return bool(condition())
