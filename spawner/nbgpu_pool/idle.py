"""Which idle slices are parked for whom, and which parked ones come back (docs/idle.md). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from nbgpu.models import GrantState, Slice

from .books import Books, Entry
from .placement import Policy, Room, place
from .shapes import Part

PARKED_NOTE = "Its notebooks are idle: its part of the GPU was given back until one of them is used."
WANTED_NOTE = "One of its notebooks is used again: its part of the GPU comes back before all others that wait."


@dataclass(frozen=True)
class IdlePolicy:
    """When an idle slice may be parked."""

    after_seconds: float | None = None
    """How long it must have been idle; None: nothing is parked."""
    least_bytes: int = 0
    """Of GPU memory that must be gained by it."""
    users: frozenset[str] = frozenset()
    """Whose slices are never parked."""
    groups: frozenset[str] = frozenset()

    def allows(self, entry: Entry, now: float) -> bool:
        """Return whether a slice may be parked now, as far as the pool knows."""
        if self.after_seconds is None or entry.idle_from is None or now - entry.idle_from < self.after_seconds:
            return False
        if entry.state != GrantState.bound or entry.slice is None or entry.full is not None:
            return False
        if entry.busy or entry.parking or entry.wanted is not None or entry.moving is not None:
            return False
        if self.protects(entry):
            return False
        return sum(part.memory_bytes for part in entry.slice.devices) >= self.least_bytes

    def protects(self, entry: Entry) -> bool:
        """Return whether a slice is left alone, whatever it does."""
        groups = (*entry.request.groups, *(entry.slice.groups if entry.slice is not None else ()))
        return entry.request.owner.user in self.users or bool(self.groups.intersection(groups))


def note_of(entry: Entry) -> str | None:
    """Return what the user of a parked slice should know; None of one that is not parked."""
    if entry.full is None:
        return None
    return PARKED_NOTE if entry.wants_from is None else WANTED_NOTE


def has_room(books: Books, entry: Entry) -> bool:
    """Return whether a parked slice has its room on its devices now."""
    assert entry.full is not None
    held = dict(entry.parts())
    return all(_fits(books.rooms.get(uuid), part, held.get(uuid, Part(0, 0))) for uuid, part in _parts(entry.full))


def _fits(room: Room | None, part: Part, held: Part) -> bool:
    if room is None or not room.device.healthy:
        return False
    return room.fits(Part(part.memory_bytes - held.memory_bytes, part.compute_milli - held.compute_milli))


def to_park(books: Books, policy: IdlePolicy, placing: Policy, now: float) -> tuple[Entry, list[Entry]] | None:
    """Return for whom slices are to be parked, and which: as few as will do, the longest idle first. None: nobody is helped by it.

    Those who come back are looked at first, then the queue in its order.
    """
    found = sorted((one for one in books.entries.values() if policy.allows(one, now)), key=lambda one: (one.idle_from, one.number))
    if not found:
        return None
    for entry in books.wanted_back():
        chosen = _for_return(books, entry, found)
        if chosen:
            return entry, chosen
    kept = books.kept()
    taken = {uuid for one in books.waiting() for uuid in one.earmark}
    for entry in books.waiting():
        if entry.holder:
            continue
        chosen = _for_request(books, entry, found, (taken - set(entry.earmark)) | kept | books.closed(entry), placing)
        if chosen:
            return entry, chosen
    return None


def makes_room(books: Books, policy: IdlePolicy, placing: Policy, entry: Entry, now: float) -> bool:
    """Return whether slices that may be parked now would make room for one who asks."""
    found = [one for one in books.entries.values() if policy.allows(one, now)] if policy.after_seconds is not None else []
    taken = {uuid for one in books.waiting() if one is not entry for uuid in one.earmark}
    return bool(found) and bool(_for_request(books, entry, found, taken | books.kept() | books.closed(entry), placing))


def _for_return(books: Books, entry: Entry, found: Iterable[Entry]) -> list[Entry]:
    assert entry.full is not None
    wanted = dict(_parts(entry.full))
    rooms = {uuid: room.copy() for uuid, room in books.rooms.items() if uuid in wanted}
    if len(rooms) < len(wanted):
        return []
    return _fewest(rooms, found, lambda: all(_fits(rooms[uuid], part, Part(0, 0)) for uuid, part in wanted.items()))


def _for_request(books: Books, entry: Entry, found: Iterable[Entry], barred: Set[str], placing: Policy) -> list[Entry]:
    rooms = {room.device.uuid: room.copy() for room in books.ordered_rooms()}
    return _fewest(rooms, found, lambda: place(list(rooms.values()), entry.want, barred=barred, policy=placing) is not None)


def _fewest(rooms: dict[str, Room], found: Iterable[Entry], fits: object) -> list[Entry]:
    """Return which of `found` must give their parts of `rooms` back so that `fits`; nothing where it fits anyway, or never does."""
    assert callable(fits)
    if fits():  # what it waits for is not room
        return []
    chosen: list[Entry] = []
    for one in found:
        if any(uuid in rooms for uuid, _ in one.parts()):
            _move(rooms, one, back=True)
            chosen.append(one)
            if fits():
                break
    else:
        return []
    for one in chosen[:-1]:  # some may have been on other devices
        _move(rooms, one, back=False)
        if fits():
            chosen = [other for other in chosen if other is not one]
        else:
            _move(rooms, one, back=True)
    return chosen


def _move(rooms: dict[str, Room], entry: Entry, *, back: bool) -> None:
    for uuid, part in entry.parts():
        if uuid in rooms:
            rooms[uuid].give_back(part) if back else rooms[uuid].take(part)


def _parts(of: Slice) -> list[tuple[str, Part]]:
    return [(device.uuid, Part(device.memory_bytes, device.compute_milli)) for device in of.devices]
