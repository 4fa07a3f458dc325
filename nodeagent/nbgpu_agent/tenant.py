"""What a slice's processes write in `use`, read with distrust: slots, who they belong to, how fast they work.

A tenant's words cost only the tenant (security.md rule 1): whatever is written here changes what is shown of that slice, no other.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from . import layout, procs
from .native import LOCKED_ELSEWHERE, Native, UseRow
from .procs import Process
from .watch import Watch

_SLOT = layout.Use.slot.offset
_OWNER = layout.UseSlot.owner.offset
_USED = layout.UseSlot.used.offset
_SHARES = layout.UseSlot.shares.offset
_READY = layout.UseSlot.ready.offset
_WANT = layout.UseSlot.want.offset
_SLOT_BYTES = ctypes.sizeof(layout.UseSlot)
_RATE_FLOOR_NS = 200_000_000
LOOK_AGAIN_SECONDS = 0.5
ASK_SECONDS = 0.005
ASK_SHARE = 20
"""Asking who holds a lock takes as long as the tenant took locks: at most about `ASK_SECONDS` at once, and 1/20 of the time."""


@dataclass
class SlotState:
    """What the agent itself knows of a slot's owner."""

    owner: int
    process: Process | None = None
    """As this machine counts pids; None when it could not be found."""
    watch: Watch | None = None
    elsewhere: bool = False
    """Somebody holds the slot who has no pid here."""
    look_at: float = 0.0
    """When to look for the process again, CLOCK_MONOTONIC seconds."""
    refusals: int = 0
    """Those that were reported."""
    samples: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(CLOCK_MONOTONIC ns, busy ns) of the last two ticks."""
    overhead_bytes: int = 0
    overhead_seen: int | None = None
    """As the last look found it; None: there was none."""

    def grant(self, found_bytes: int) -> int:
        """Take what a look found beyond the slot's words; return what counts of it: no more than the look before found.

        NVML's sample is older than the words: what was freed in between looks like overhead, once.
        """
        before, self.overhead_seen = self.overhead_seen, found_bytes
        self.overhead_bytes = found_bytes if before is None else min(found_bytes, before)
        return self.overhead_bytes


def busy_ns(row: UseRow, now_ns: int) -> int:
    """Return a slot's GPU time, the busy interval that is still open included."""
    return row.busy_ns + (now_ns - row.busy_since if 0 < row.busy_since < now_ns else 0)


class Tenant:
    """The `use` file of one slice.

    Parameters
    ----------
    fd : int
        The file, open for reading and writing; closed by `close`.
    on_death : callable
        Called when the process of a slot has ended.
    is_member : callable
        Tells whether a pid belongs to the slice by other signs than this file.
    """

    def __init__(self, fd: int, native: Native, device_count: int, on_death: Callable[[], None], is_member: Callable[[int], bool]):
        self.fd = fd
        self._native = native
        self._device_count = device_count
        self._on_death = on_death
        self._is_member = is_member
        self.states: dict[int, SlotState] = {}
        self.junk: str | None = None
        self.events_word = 0
        """As last looked at: another one says that there were refusals since, its value means nothing."""
        self._asked_seconds = 0.0
        self._ask_from = 0.0

    def read(self) -> list[UseRow]:
        """Return the slots in use; what is junk is left out and named in `self.junk`."""
        self._asked_seconds = 0.0
        try:
            rows = self._native.use_read(self.fd)
            self.junk = None if time.monotonic() >= self._ask_from else self.junk
        except OSError as error:
            # Who was seen in the slots is not forgotten for that: the slice does not end before they do.
            self.junk = "its file is no use file any more" if error.errno == errno.EBADMSG else str(error.strerror)
            return []
        for row in rows:
            if row.junk or row.device >= self._device_count:
                self.junk = "it holds numbers that cannot be"
        if self.junk is not None:
            rows = [row for row in rows if row.device < self._device_count]
        now = time.monotonic()
        for row in rows:
            state = self.states.get(row.slot)
            if state is None or state.owner != row.owner or state.process is None:
                self._know(row, now)
        if len(rows) != len(self.states):
            for slot in self.states.keys() - {row.slot for row in rows}:
                self._forget(slot)
        return rows

    def check_size(self) -> None:
        """Note as junk when the file has grown; one that is too short cannot be read anyway."""
        if os.fstat(self.fd).st_size > layout.USE_SIZE:
            self.junk = "its file is larger than it was made"

    def _know(self, row: UseRow, now: float) -> None:
        state = self.states.get(row.slot)
        if state is None or state.owner != row.owner:
            self._forget(row.slot)
            state = self.states[row.slot] = SlotState(row.owner)
            state.samples = [(time.monotonic_ns(), busy_ns(row, time.monotonic_ns()))]
        if state.process is None and now >= state.look_at:
            state.look_at = now + LOOK_AGAIN_SECONDS
            state.process = self._owner_of(row, state)
            if state.process is not None:
                state.watch = Watch(state.process, lambda _: self._on_death())

    def _owner_of(self, row: UseRow, state: SlotState) -> Process | None:
        """Return the process that holds a slot's lock; where it is free, the one that the slot names, if that is of this slice."""
        holder = self._holder(row.slot)
        if holder is None:
            return None
        state.elsewhere = holder == LOCKED_ELSEWHERE
        if state.elsewhere:
            return None
        process = procs.find(holder or row.pid)
        if process is None:
            return None
        if holder:
            # The same holder before and after: its pid was not another's in between.
            return process if self._holder(row.slot) == holder else None
        # It lost its lock (a program may close all descriptors) before this agent came.
        return process if process.start_time == row.start_time and self._is_member(process.pid) else None

    def _holder(self, slot: int) -> int | None:
        """Return who holds a slot's lock as `Native.use_locked` does; None when asking takes too long."""
        began = time.monotonic()
        if began < self._ask_from:
            return None
        holder = self._native.use_locked(self.fd, slot)
        self._spent(time.monotonic() - began)
        return holder

    def _spent(self, seconds: float) -> None:
        self._asked_seconds += seconds
        if self._asked_seconds > ASK_SECONDS:
            self._ask_from = time.monotonic() + ASK_SHARE * self._asked_seconds
            self._asked_seconds = 0.0
            self.junk = "it has more locks than can be looked at"

    def _forget(self, slot: int) -> None:
        state = self.states.pop(slot, None)
        if state is not None and state.watch is not None:
            state.watch.close()

    def alive(self, row: UseRow) -> bool:
        """Return whether the owner of a slot lives: its lock is held, or the process is there though it lost the lock."""
        watch = self.states[row.slot].watch
        if watch is not None and watch.alive():
            return True
        if self._holder(row.slot) != 0:
            return True
        if watch is not None:
            return False
        # Never seen with its lock: on this machine's own pids its word is enough, it costs only itself.
        return procs.start_time(row.pid) == row.start_time

    def reap(self, before_freeing: Callable[[], None]) -> list[UseRow]:
        """Free the slots whose owners are gone; return those that are in use after it.

        Parameters
        ----------
        before_freeing : callable
            Called when there are such slots, while they still say what their owners left.
        """
        rows = self.read()
        gone = [row for row in rows if not self.alive(row)]
        if not gone:
            return rows
        before_freeing()
        freed = [self._free(row) for row in gone]
        return self.read() if any(freed) else rows

    def _free(self, row: UseRow) -> bool:
        """Free one slot, unless it is another's by now, in the way that the limiter does it.

        With the slot's record lock held nobody else reaps or takes it. Numbers go first and the owner's word last, so that
        dying in between leaves a slot that is still to be freed.
        """
        at = _SLOT + row.slot * _SLOT_BYTES
        began = time.monotonic()
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except OSError:
            return False
        try:
            if os.pread(self.fd, 8, at + _OWNER) != struct.pack("<Q", row.owner):
                return False
            os.pwrite(self.fd, bytes(4), at + _SHARES)  # first: what it covered counts for who holds it
            os.pwrite(self.fd, bytes(16), at + _USED)  # used, context
            os.pwrite(self.fd, bytes(16), at + _WANT)  # want, near, busy_since
            os.pwrite(self.fd, bytes(4), at + _READY)
            os.pwrite(self.fd, bytes(8), at + _OWNER)
            return True
        except OSError:
            return False
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, at)
            self._spent(time.monotonic() - began)

    def holding(self) -> dict[int, Process]:
        """Return the live owners of slots by their pids, as far as this machine has pids for them."""
        return {
            state.process.pid: state.process
            for state in self.states.values()
            if state.process is not None and state.watch is not None and state.watch.alive()
        }

    def holders(self) -> set[int]:
        """Return the pids of live owners of slots, as far as this machine has pids for them."""
        return set(self.holding())

    def locked_elsewhere(self) -> bool:
        """Return whether a slot is held by somebody who has no pid here."""
        return any(
            state.elsewhere and state.process is None and self._holder(slot) == LOCKED_ELSEWHERE for slot, state in self.states.items()
        )

    def tick(self, rows: list[UseRow], now_ns: int) -> None:
        """Keep this moment's busy times: rates are measured against the tick before the last."""
        for row in rows:
            samples = self.states[row.slot].samples
            samples.append((now_ns, busy_ns(row, now_ns)))
            if len(samples) > 2:
                del samples[0]

    def compute_milli(self, row: UseRow, now_ns: int) -> int:
        """Return the share of its device that a slot used over the last one to two seconds, 0..1000."""
        then_ns, then_busy = self.states[row.slot].samples[0]
        elapsed = max(now_ns - then_ns, _RATE_FLOOR_NS)
        return min(1000, max(0, (busy_ns(row, now_ns) - then_busy) * 1000 // elapsed))

    def close(self) -> None:
        """Stop watching and close the file."""
        for slot in list(self.states):
            self._forget(slot)
        os.close(self.fd)
