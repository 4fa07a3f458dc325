"""One-move hints: whose move to another device would let in a request that fits nowhere now.

A move needs a session that can be moved (idle, checkpointed) or a user who agrees: who can be moved is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from ..shapes import Part, Want, resolve
from .best_fit import DEFAULT_POLICY, Place, Policy, Room, score
from .buckets import Buckets

MOST_LOOKS = 64
"""Different moves that are weighed for one hint: of equal devices and equal parts only the first is looked at."""

Held = Mapping[str, Sequence[tuple[str, Part]]]


class Move(NamedTuple):
    """A slice's move, and who gets in by it."""

    slice_id: str
    source: str
    """UUID of the device it leaves."""
    to: Place
    """One device of the same model; the part stays the same."""
    lets_in: Place
    """Where the request goes then."""


class _Chance(NamedTuple):
    """A slice that would have to go."""

    slice_id: str
    room: Room
    part: Part
    asked: Part
    """Of each device, by the request."""
    beside: list[Room]
    """Where the request's other parts go."""
    fit: tuple[int, int, int]
    """How well the request fits then, as `score`."""


def one_move(
    rooms: Sequence[Room],
    buckets: Buckets,
    held: Held,
    want: Want,
    *,
    barred: Set[str] = frozenset(),
    policy: Policy = DEFAULT_POLICY,
    most_looks: int = MOST_LOOKS,
) -> Move | None:
    """Return the one move that lets `want` in and leaves the best fit on both devices; None where there is none, or where it fits as it is.

    Parameters
    ----------
    rooms : sequence of Room
        In the fixed order of placement.
    buckets : Buckets
        Of the same rooms.
    held : mapping
        By device: id and part of each slice on it that can be moved, of slices of one device.
    barred : set of str
        Devices that are kept for others.

    Notes
    -----
    Smaller slices are tried first. A slice as large as what is asked for helps nobody: where it could go, the request could.
    Who makes way for a request for several devices does not go to one that another of its parts goes to.
    """
    best: tuple[tuple[int, ...], Move] | None = None
    chances = sorted(_chances(rooms, held, want, barred, policy), key=lambda one: (one.part.compute_milli, one.fit))
    for chance in chances[:most_looks]:
        device = chance.room.device
        there = barred | {device.uuid} | {room.device.uuid for room in chance.beside}
        same = Want(1, chance.part.compute_milli, None, chance.part.memory_bytes, device.model)
        found = buckets.place(same, there, None, policy, coming=False)
        if found is None or found[0][1] != chance.part:
            continue
        value = [a + b for a, b in zip(score(*found[0], policy), chance.fit, strict=True)]
        if best is None or tuple(value) < best[0]:
            lets_in = [(room, chance.asked) for room in (chance.room, *chance.beside)]
            best = tuple(value), Move(chance.slice_id, device.uuid, found, lets_in)
    return best[1] if best is not None else None


def _chances(rooms: Iterable[Room], held: Held, want: Want, barred: Set[str], policy: Policy) -> list[_Chance]:
    """Return, once for each kind of device and part, who would have to go; nobody where `want` fits as it is."""
    found: list[_Chance] = []
    seen: set[tuple[object, ...]] = set()
    nodes: dict[tuple[str, str], list[Room]] = {}
    for room in rooms:
        if room.device.healthy and not room.coming and room.device.uuid not in barred:
            nodes.setdefault((room.device.node, room.device.model), []).append(room)
    for alike in nodes.values():
        asked = resolve(want, alike[0].device)
        if asked is None:
            continue
        fitting = _best_first(alike, asked, policy)
        if len(fitting) >= want.device_count:
            return []
        if len(fitting) < want.device_count - 1:
            continue
        for room in alike:
            short_milli, short_bytes = asked.compute_milli - room.free_milli, asked.memory_bytes - room.free_bytes
            for slice_id, part in held.get(room.device.uuid, ()):
                enough = part.compute_milli >= short_milli and part.memory_bytes >= short_bytes
                if not enough or room in fitting or (part.compute_milli >= asked.compute_milli and part.memory_bytes >= asked.memory_bytes):
                    continue
                kind = _kind(room), part, room.device.node if fitting else None
                if kind not in seen:
                    seen.add(kind)
                    after = room.copy()
                    after.give_back(part)
                    found.append(_Chance(slice_id, room, part, asked, fitting, score(after, asked, policy)))
    return found


def _best_first(rooms: Iterable[Room], part: Part, policy: Policy) -> list[Room]:
    return sorted((room for room in rooms if room.fits(part)), key=lambda room: score(room, part, policy))


def _kind(room: Room) -> tuple[object, ...]:
    """Return all that decides how good it is that a part leaves a room."""
    return room.device.model, room.device.usable_bytes, room.free_bytes, room.free_milli, room.binary_count, room.thirds_count
