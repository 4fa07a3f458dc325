"""What people should know, in order, with ids that go on rising over restarts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from nbgpu.models import Event, EventKind

log = logging.getLogger("nbgpu.agent")
KEPT = 200
"""Events of one slice, and of all that belong to none."""
KEPT_ENDED = 2000
"""Events of slices that ended."""
AT_ONCE = 30
PER_SECOND = 5.0
"""Events of one kind about one slice. A tenant that makes more loses its own: `left_out` in the next one says how many."""
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Signal:
    """Wakes all who wait, each time that something happened."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[bool]] = set()
        self._closed = False

    def fire(self, happened: bool = True) -> None:
        """Wake everyone who waits now."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(happened)

    def close(self) -> None:
        """Nothing will happen any more: nobody waits from now on."""
        self._closed = True
        self.fire(False)

    async def wait(self, seconds: float) -> bool:
        """Wait for the next `fire`, at most so long; return whether it came."""
        if self._closed:
            return False
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            return await asyncio.wait_for(waiter, seconds)
        except asyncio.TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)


def first_id() -> int:
    """Return a number above every id that an earlier agent gave: milliseconds of Unix time."""
    return int(time.time() * 1000)


class Changes(Signal):
    """Counts changes, and tells those who wait for more of them; what changes close together is told together."""

    def __init__(self) -> None:
        super().__init__()
        self.generation = first_id()
        self._tell_at = 0.0
        """When the latest change is told, by `time.monotonic`."""

    def note(self, within_seconds: float) -> None:
        """Something has changed, which those who wait shall hear of within so long."""
        self.generation += 1
        now = time.monotonic()
        self._tell_at = now + within_seconds if self._tell_at <= now else min(self._tell_at, now + within_seconds)
        self.fire()

    async def above(self, generation: int, seconds: float) -> None:
        """Wait until there are changes above `generation` and it is time to tell them, at most so long. Older ones are told at once."""
        if self.generation > generation:
            return
        deadline = time.monotonic() + seconds
        while (now := time.monotonic()) < deadline:
            changed = self.generation > generation
            if changed and self._tell_at <= now:
                return
            if not await self.wait((min(deadline, self._tell_at) if changed else deadline) - now):
                return


@dataclass
class Flow:
    """How many events of one kind a slice may still make."""

    left: float = AT_ONCE
    at: float = 0.0
    left_out: int = 0

    def take(self, now: float) -> bool:
        """Return whether one more may be told at `now`, seconds."""
        self.left = min(AT_ONCE, self.left + (now - self.at) * PER_SECOND)
        self.at = now
        if self.left < 1:
            self.left_out += 1
            return False
        self.left -= 1
        return True


class EventLog:
    """The last events of all slices, and those who wait for more. Each slice has its own: one's flood pushes out no other's."""

    def __init__(self) -> None:
        self._events: dict[str | None, deque[Event]] = {}
        self._ended: deque[Event] = deque(maxlen=KEPT_ENDED)
        self._flows: dict[tuple[str | None, str], Flow] = {}
        self._next = first_id()
        self._all = Signal()
        self._by_slice: dict[str, Signal] = {}
        self.counts: dict[str, int] = {}

    def add(
        self,
        kind: EventKind,
        level: Literal["info", "warning", "error"],
        message: str,
        slice_id: str | None = None,
        kernel_id: str | None = None,
        owner: str = "",
        **data: int | float | str | None,
    ) -> Event | None:
        """Record an event, log it in one line, wake those who wait for it; one too many of its kind is only counted (None)."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        flow = self._flows.setdefault((slice_id, kind), Flow(at=time.monotonic()))
        if not flow.take(time.monotonic()):
            return None
        if flow.left_out:
            data["left_out"], flow.left_out = flow.left_out, 0
        values: dict[str, Any] = {"kind": kind, "level": level, "message": message, "slice_id": slice_id, "kernel_id": kernel_id}
        event = Event(id=self._next, time=time.time(), data=data, **values)
        self._next += 1
        self._events.setdefault(slice_id, deque(maxlen=KEPT)).append(event)
        log.log(_LEVELS[level], "%s slice=%s owner=%s kernel=%s: %s", kind, slice_id or "-", owner or "-", kernel_id or "-", message)
        self._all.fire()
        if slice_id in self._by_slice:
            self._by_slice[slice_id].fire()
        return event

    def after(self, event_id: int, slice_id: str | None = None) -> list[Event]:
        """Return the events above `event_id`, of one slice, ended or not, or of all, oldest first."""
        if event_id >= self._next - 1:
            return []
        if slice_id is not None:
            known = self._events.get(slice_id)
            of_slice = known if known is not None else (event for event in self._ended if event.slice_id == slice_id)
            return [event for event in of_slice if event.id > event_id]
        found = [event for events in (*self._events.values(), self._ended) for event in events if event.id > event_id]
        return sorted(found, key=lambda event: event.id)

    async def wait(self, event_id: int, seconds: float, slice_id: str | None = None) -> list[Event]:
        """Return `after`; when there is nothing yet, wait at most `seconds` for it."""
        deadline = time.monotonic() + seconds
        signal = self._all if slice_id is None else self._by_slice.setdefault(slice_id, Signal())
        while not (found := self.after(event_id, slice_id)):
            left = deadline - time.monotonic()
            if left <= 0 or not await signal.wait(left):
                return self.after(event_id, slice_id)
        return found

    def close(self) -> None:
        """Answer all who wait with what there is."""
        self._all.close()
        for signal in self._by_slice.values():
            signal.close()

    def forget(self, slice_id: str) -> None:
        """Drop the waiting list of a slice that ended; those who wait see its last events."""
        self._ended.extend(self._events.pop(slice_id, ()))
        self._flows = {key: flow for key, flow in self._flows.items() if key[0] != slice_id}
        signal = self._by_slice.pop(slice_id, None)
        if signal is not None:
            signal.fire()
