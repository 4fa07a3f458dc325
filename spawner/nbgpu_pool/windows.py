"""Devices that are kept for a group at certain times: classes (docs/quotas.md). Pure: told the time of the day, never asks for it.

From `drain_seconds` before a window begins its devices are chosen, those where least runs that will not have ended by then. On them a
request whose longest session ends before is placed as on any other; one without a longest session only where there is no other
place, and told until when. From `notice_seconds` on nobody comes who would not be gone, and who is there is asked back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from nbgpu.models import GrantState, Reservation
from nbgpu.quantities import WHOLE_MILLI

from .books import Books, Entry
from .giveback import Ask
from .placement import Room

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True)
class Window:
    """So many places for a group, on some days of each week."""

    name: str
    group: str
    count: int
    milli: int
    """Of each place."""
    days: frozenset[int]
    """0 = Monday."""
    begin_minutes: int
    """Since midnight, as the clock on the wall shows; the end is on the same day."""
    end_minutes: int
    zone: ZoneInfo
    drain_seconds: float = 14_400.0
    notice_seconds: float = 1800.0
    model: str | None = None

    def next(self, wall: float) -> tuple[float, float]:
        """Return begin and end (Unix time) of the window that is on at `wall`, else of the next."""
        today = datetime.fromtimestamp(wall, self.zone).date()
        for ahead in range(-1, 9):
            day = today + timedelta(days=ahead)
            if day.weekday() in self.days:
                midnight = datetime.combine(day, time(), self.zone)
                # arithmetic of one zone is that of the clock on the wall: 9:00 is 9:00 on the days on which the clock is changed, too
                begin, end = (midnight + timedelta(minutes=minutes) for minutes in (self.begin_minutes, self.end_minutes))
                if wall < end.timestamp():
                    return begin.timestamp(), end.timestamp()
        raise ValueError(f"reservation {self.name} has no days")

    @property
    def device_count(self) -> int:
        """How many devices it takes: whole ones."""
        return -(-self.count // (WHOLE_MILLI // self.milli))

    def words(self, unix: float, wall: float) -> str:
        """Return a time for people, with the day where that is another one."""
        then, now = (datetime.fromtimestamp(one, self.zone) for one in (unix, wall))
        return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%A %H:%M}"


@dataclass
class Kept:
    """What is kept for a window now."""

    window: Window
    begin: float
    """Of the core's clock, as `end`."""
    end: float
    until: str
    """When it begins, in words."""
    devices: tuple[str, ...] = ()
    short: int = 0
    """Devices that it should have beside these, and that there are not."""

    def mine(self, entry: Entry) -> bool:
        """Whether it is kept for this request's owner."""
        return self.window.group in entry.request.groups or (entry.slice is not None and self.window.group in entry.slice.groups)

    def ends_before(self, entry: Entry, now: float) -> bool:
        """Whether a session is over when the window begins, as far as its longest length tells; one that has run over is not believed."""
        longest = entry.request.session_seconds
        if longest is None:
            return False
        end = (entry.started if entry.was_bound else now) + longest
        return now < end <= self.begin


@dataclass
class Windows:
    """Which devices are kept for whom.

    Parameters
    ----------
    start_seconds : float
        So long a grant may take until its session begins.
    """

    windows: Sequence[Window]
    start_seconds: float = 0.0
    kept: list[Kept] = field(default_factory=list[Kept])
    now: float = 0.0

    def look(self, books: Books, now: float, wall: float) -> bool:
        """Choose devices for the windows that are on or near; return whether anything is other than before.

        Parameters
        ----------
        now, wall : float
            The same moment by the core's clock and by Unix time. Where the latter jumps, so do windows.
        """
        self.now = now
        before = {(one.window.name, round(one.begin)): one for one in self.kept}
        found: list[Kept] = []
        for window in self.windows:
            begin, end = window.next(wall)
            if wall < begin - window.drain_seconds:
                continue
            one = Kept(window, now + begin - wall, now + end - wall, window.words(begin, wall))
            old = before.get((window.name, round(one.begin)))
            taken = {uuid for other in found for uuid in other.devices}
            one.devices = _chosen(books, one, old.devices if old is not None else (), taken, now)
            one.short = max(0, window.device_count - len(one.devices))
            found.append(one)
        same = [(one.window.name, one.devices, one.begin <= now) for one in found] == [
            (one.window.name, one.devices, one.begin <= now) for one in self.kept
        ]
        self.kept = found
        return not same

    def closed(self, entry: Entry) -> frozenset[str]:
        """Return the devices on which `entry` is not placed now."""
        return self._where(
            entry, lambda one: self.now >= one.begin - one.window.notice_seconds or entry.request.session_seconds is not None
        )

    def last(self, entry: Entry) -> frozenset[str]:
        """Return the devices on which `entry` is placed only where there is no other place."""
        return self._where(entry, lambda one: True)

    def own(self, entry: Entry) -> frozenset[str]:
        """Return the devices that are kept for `entry`."""
        return frozenset(uuid for one in self.kept if one.mine(entry) for uuid in one.devices)

    def _where(self, entry: Entry, counts: Callable[[Kept], bool]) -> frozenset[str]:
        return frozenset(
            uuid
            for one in self.kept
            if not one.mine(entry) and not one.ends_before(entry, self.now + self.start_seconds) and counts(one)
            for uuid in one.devices
        )

    def of(self, uuids: Iterable[str], entry: Entry) -> Kept | None:
        """Return what keeps one of these devices from `entry` first; None: nothing does."""
        wanted = set(uuids)
        found = [
            one for one in self.kept if wanted.intersection(one.devices) and not one.mine(entry) and not one.ends_before(entry, self.now)
        ]
        return min(found, key=lambda one: one.begin, default=None)

    def asks(self, books: Books) -> list[Ask]:
        """Return who is to be gone when a window begins."""
        found: list[Ask] = []
        for one in self.kept:
            if self.now < one.begin - one.window.notice_seconds:
                continue
            for entry in _on(books, one.devices):
                if not one.mine(entry) and not one.ends_before(entry, self.now):
                    why = f"its GPU is kept for {one.window.name} (group {one.window.group}) from {one.until} on"
                    found.append(Ask(entry.slice_id, entry.request.owner, "reserved", one.begin, why))
        return found

    def places(self, books: Books, one: Kept) -> int:
        """Return how many places a window has now: free ones and those that its group holds."""
        count = 0
        for uuid in one.devices:
            room = books.rooms[uuid]
            theirs = sum(part.compute_milli for entry in _on(books, (uuid,)) if one.mine(entry) for at, part in entry.parts() if at == uuid)
            memory = sum(part.memory_bytes for entry in _on(books, (uuid,)) if one.mine(entry) for at, part in entry.parts() if at == uuid)
            usable = max(1, room.device.usable_bytes)
            left = min(room.free_milli + theirs, (room.free_bytes + memory) * WHOLE_MILLI // usable)
            count += max(0, left) // one.window.milli
        return min(count, one.window.count)


def reservations(books: Books, windows: Iterable[Window], wall: float) -> list[Reservation]:
    """Return of each window the one that is on, else the next."""
    kept = {one.window.name: one for one in books.windows.kept} if books.windows is not None else {}
    found: list[Reservation] = []
    for window in windows:
        begin, end = window.next(wall)
        one = kept.get(window.name)
        found.append(
            Reservation(
                name=window.name,
                group=window.group,
                begins_seconds=begin - wall,
                ends_seconds=end - wall,
                place_count=window.count,
                ready_count=books.windows.places(books, one) if one is not None and books.windows is not None else 0,
                devices=list(one.devices) if one is not None else [],
                short_count=one.short if one is not None else 0,
            )
        )
    return found


def _on(books: Books, devices: Iterable[str]) -> list[Entry]:
    there = set(devices)
    states = (GrantState.reserved, GrantState.bound)
    return [one for one in books.entries.values() if one.state in states and any(uuid in there for uuid, _ in one.quota_parts())]


def _chosen(books: Books, kept: Kept, before: Sequence[str], taken: set[str], now: float) -> tuple[str, ...]:
    """Return the devices of a window: those it had, as long as they work, and those where least runs that will not have ended."""
    window = kept.window
    usable: dict[str, Room] = {
        room.device.uuid: room
        for room in books.ordered_rooms()
        if room.device.healthy and room.device.uuid not in taken and window.model in (None, room.device.model)
    }
    found = [uuid for uuid in before if uuid in usable]
    if len(found) < window.device_count:
        runs = dict.fromkeys(usable, 0)
        for entry in books.entries.values():
            if entry.holds and not kept.mine(entry) and not kept.ends_before(entry, now):
                for uuid, part in entry.quota_parts():
                    if uuid in runs:
                        runs[uuid] += max(part.compute_milli, part.memory_bytes * WHOLE_MILLI // max(1, usable[uuid].device.usable_bytes))
        rest = [uuid for uuid in reversed(usable) if uuid not in found]  # of equals the last: best fit fills the first
        found += sorted(rest, key=lambda uuid: runs[uuid])
    return tuple(found[: window.device_count])
