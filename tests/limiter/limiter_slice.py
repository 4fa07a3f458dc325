"""A slice's two files, made and read without an agent: what the limiter's tests and benchmark run against."""

from __future__ import annotations

import contextlib
import ctypes as c
import mmap
import os
import time
from pathlib import Path

from nbgpu_agent import layout

MIB = 1 << 20
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
