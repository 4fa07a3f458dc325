"""A slice's two files, made and read without an agent: what the limiter's tests and benchmark run against."""

from __future__ import annotations

import contextlib
import ctypes as c
import fcntl
import mmap
import os
import platform
import struct
import time
from pathlib import Path

from nbgpu_agent import layout

MIB = 1 << 20
_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
_F_OFD_SETLK = 37
_LIBC = c.CDLL(None, use_errno=True)
NULL_UUID = "GPU-00000000-0000-0000-0000-000000000001"


class SliceFiles:
    """The directory of one slice. ``ctl`` and ``use`` are the live structures; closing unmaps them."""

    def __init__(
        self,
        directory: Path,
        *,
        mem_limit: int,
        uuids: tuple[str, ...] = (NULL_UUID,),
        gate: int = layout.GATE_NONE,
        compute_milli: int = 250,
        mode: int = layout.MODE_BURST,
        context_bytes: int = 0,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._maps: list[mmap.mmap] = []
        self.ctl: layout.Ctl = self._make("ctl", layout.Ctl)
        self.use: layout.Use = self._make("use", layout.Use)
        for index, uuid in enumerate(uuids):
            device = self.ctl.device[index]
            device.uuid, device.mem_limit, device.compute_milli, device.mode = uuid.encode(), mem_limit, compute_milli, mode
            device.context_bytes, device.overhead_cap, device.gate = context_bytes, 512 * MIB, gate
        self.ctl.generation = 1
        self.beat()
        self.ctl.version, self.ctl.size, self.ctl.magic = layout.VERSION, layout.CTL_SIZE, layout.CTL_MAGIC
        self.use.version, self.use.size, self.use.magic = layout.VERSION, layout.USE_SIZE, layout.USE_MAGIC

    def _make(self, name: str, kind: type[c.LittleEndianStructure]) -> c.LittleEndianStructure:
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(fd, c.sizeof(kind))
        mapped = mmap.mmap(fd, c.sizeof(kind))
        os.close(fd)
        self._maps.append(mapped)
        return kind.from_buffer(mapped)

    def beat(self) -> None:
        """The scheduler's sign of life."""
        self.ctl.heartbeat_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def kernel(self, index: int, kernel_id: str, mem_limit: int, compute_milli: int = 0) -> None:
        """Set a kernel's own limit."""
        entry = self.ctl.kernel[index]
        entry.mem_limit, entry.compute_milli = mem_limit, compute_milli
        for device in range(layout.DEVICES):
            entry.gate[device] = layout.GATE_NONE
        entry.id = kernel_id.encode()
        self.ctl.generation += 1

    def slots(self) -> list[layout.UseSlot]:
        """Slots that have an owner."""
        return [slot for slot in self.use.slot[: self.use.high_water] if slot.owner]

    def used(self, device: int = 0) -> int:
        """Bytes in use on a device, contexts included."""
        return sum(slot.used + slot.context for slot in self.slots() if slot.device == device)

    @staticmethod
    def launches(slot: layout.UseSlot) -> int:
        """All launches of a slot's process."""
        return slot.launches + sum(slot.launches_by_thread)

    def close(self) -> None:
        """Let the mappings go."""
        del self.ctl, self.use
        for mapped in self._maps:
            with contextlib.suppress(BufferError):  # a slot is still referred to; the mapping goes with it
                mapped.close()


class PlayedSlice(SliceFiles):
    """A slice with a process in it that the test plays without the limiter, by the words that one would write."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, mem_limit=1 << 30)
        self.use_path = directory / "use"
        self.ctl_fd, self.use_fd, self._lock_fd = (os.open(directory / name, os.O_RDWR) for name in ("ctl", "use", "use"))

    def close(self) -> None:
        """Unmap and close."""
        super().close()
        for fd in (self.ctl_fd, self.use_fd, self._lock_fd):
            os.close(fd)

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
