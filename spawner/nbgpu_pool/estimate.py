"""How long a wait will be: from what runs, for how long, and how long sessions last here; until enough have ended, called a guess."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nbgpu.models import GrantState

from .books import Books, Entry
from .placement import Room, place
from .shapes import Part, Want

ENOUGH_SESSIONS = 5
"""Observed sessions from which on an estimate is no guess."""
USUALLY = 0.75
"""People read that they wait "usually within 5 minutes": with the median every second one would be disappointed."""
GUESS_SECONDS = 3600.0
PARK_SECONDS = 15.0
"""Until a slice that is being parked has given its room back."""
MAX_EVENTS = 300
MAX_TRIES = 400


class Estimate(NamedTuple):
    """When a request likely gets its place."""

    seconds: float
    guessed: bool
    """It rests on a session of a kind of which too few have ended here."""


class Sessions:
    """Lengths of the last sessions of one kind, in seconds.

    Parameters
    ----------
    guess_seconds : float
        What stands in for sessions that were not seen yet.
    keep : int
        How many sessions are remembered.
    """

    def __init__(self, guess_seconds: float = GUESS_SECONDS, keep: int = 500):
        self._guess_seconds = guess_seconds
        self._lengths: deque[float] = deque(maxlen=keep)
        self._sorted: list[float] | None = None

    @property
    def guessing(self) -> bool:
        """Whether too few sessions have ended here to judge by."""
        return len(self._lengths) < ENOUGH_SESSIONS

    def ended(self, length_seconds: float) -> None:
        """Note that a session of this length has ended."""
        self._lengths.append(max(0.0, length_seconds))
        self._sorted = None

    def guesses(self, age_seconds: float) -> bool:
        """Whether what is said of a session of this age is a guess: too few have ended here, or none that reached it."""
        return self.guessing or age_seconds >= max(self._lengths)

    def remaining_seconds(self, age_seconds: float) -> float:
        """Return the time within which `USUALLY` of the sessions that reached this age have ended."""
        if self._sorted is None:
            self._sorted = sorted([*self._lengths, *[self._guess_seconds] * (ENOUGH_SESSIONS - len(self._lengths))])
        first = bisect_right(self._sorted, age_seconds)
        count = len(self._sorted) - first
        # Older than all seen so far: as long again is the usual guess.
        return self._sorted[first + math.ceil(count * USUALLY) - 1] - age_seconds if count else age_seconds


class Kinds:
    """The sessions of each hub by themselves: how long programs of the command line run says nothing of how long notebooks do.

    Parameters
    ----------
    guess_seconds : float
        As of `Sessions`.
    """

    def __init__(self, guess_seconds: float = GUESS_SECONDS):
        self._guess_seconds = guess_seconds
        self._kinds: dict[str, Sessions] = {}
        self._unknown = Sessions(guess_seconds)

    def of(self, hub: str) -> Sessions:
        """Return the sessions of a hub."""
        return self._kinds.get(hub, self._unknown)

    def ended(self, hub: str, length_seconds: float) -> None:
        """Note that a session of a hub has ended."""
        if hub not in self._kinds:
            self._kinds[hub] = Sessions(self._guess_seconds)
        self._kinds[hub].ended(length_seconds)


Waiting = tuple[str, Want, str, frozenset[str]]
"""Who waits, for what, of which hub, and on which devices they are not placed."""
Return = tuple[list[tuple[str, Part]], float, bool]
"""A parked slice that wants its place back: what it lacks on its devices, how long it lasts then, and whether that is a guess."""
End = tuple[float, int, bool, list[tuple[str, Part]]]
"""When a session ends, a number that tells those of one moment apart, whether that is a guess, what it gives back."""


def queue_forecast(books: Books, kinds: Kinds, now: float, ghosts: Sequence[tuple[Want, frozenset[str]]] = ()) -> dict[str, Estimate]:
    """Return in how many seconds each queued request, and each of `ghosts` behind them, likely gets its place.

    Plays the known sessions to their likely ends, serving the queue in order, after the parked slices that come back. Keys: request ids;
    ``"ghost:<n>"`` for ghosts.
    What is not reached within the bounds of the play is left out. A ghost is a want and the devices on which it is not placed.
    """
    rooms = {uuid: replace(room) for uuid, room in books.rooms.items()}
    ends: list[End] = []
    for number, entry in enumerate(books.entries.values()):
        if not entry.holds:
            continue
        sessions = kinds.of(entry.request.owner.hub)
        if entry.state == GrantState.releasing:
            ends.append((0.0, number, False, entry.parts()))
        elif entry.parking:
            ends.append((PARK_SECONDS, number, False, entry.parts()))
        else:
            age = 0.0 if entry.state == GrantState.reserved else max(0.0, now - entry.started)
            ends.append((sessions.remaining_seconds(age), number, sessions.guesses(age), entry.parts()))
    heapq.heapify(ends)
    waiting: list[Waiting] = [(entry.slice_id, entry.want, entry.request.owner.hub, books.closed(entry)) for entry in books.waiting()]
    waiting += [(f"ghost:{number}", want, "", closed) for number, (want, closed) in enumerate(ghosts)]
    return _play(rooms, ends, waiting, kinds, [_returning(entry, kinds, now) for entry in books.wanted_back()])


def _returning(entry: Entry, kinds: Kinds, now: float) -> Return:
    held, age, sessions = dict(entry.parts()), max(0.0, now - entry.started), kinds.of(entry.request.owner.hub)
    lacks = [(uuid, part.without(held.get(uuid, Part(0, 0)))) for uuid, part in entry.quota_parts()]
    return lacks, sessions.remaining_seconds(age), sessions.guesses(age)


def _come_back(rooms: dict[str, Room], ends: list[End], returning: list[Return], at: float, number: int) -> list[Return]:
    """Give those that come back their places, in their order, as far as there is room; return who still waits for theirs."""
    still: list[Return] = []
    kept: set[str] = set()
    for one in returning:
        lacks, seconds, guessed = one
        if all(uuid in rooms and uuid not in kept and rooms[uuid].fits(part) for uuid, part in lacks):
            for uuid, part in lacks:
                rooms[uuid].take(part)
            heapq.heappush(ends, (at + seconds, number + len(ends), guessed, lacks))
        else:
            still.append(one)
            kept.update(uuid for uuid, _ in lacks)
    return still


def _play(rooms: dict[str, Room], ends: list[End], waiting: list[Waiting], kinds: Kinds, returning: list[Return]) -> dict[str, Estimate]:
    nodes: dict[str, list[Room]] = {}
    for room in rooms.values():
        nodes.setdefault(room.device.node, []).append(room)
    found: dict[str, Estimate] = {}
    at, guessed, tries, number = 0.0, False, 0, 10**6
    look = list(rooms.values())
    for _ in range(MAX_EVENTS):
        misfits: set[tuple[Want, frozenset[str]]] = set()
        still: list[Waiting] = []
        returning = _come_back(rooms, ends, returning, at, 2 * 10**6)
        kept = frozenset(uuid for lacks, _, _ in returning for uuid, _ in lacks)
        for key, want, hub, closed in waiting:
            if (want, closed) in misfits:
                still.append((key, want, hub, closed))
                continue
            tries += 1
            spot = place(look, want, barred=closed | kept)
            if spot is None:
                misfits.add((want, closed))
                still.append((key, want, hub, closed))
                continue
            found[key] = Estimate(at, guessed)
            if not key.startswith("ghost:"):
                for room, part in spot:
                    room.take(part)
                number += 1
                lasts = kinds.of(hub)
                parts = [(room.device.uuid, part) for room, part in spot]
                heapq.heappush(ends, (at + lasts.remaining_seconds(0.0), number, lasts.guesses(0.0), parts))
        waiting = still
        if not waiting or not ends or tries > MAX_TRIES:
            break
        guessed = guessed or ends[0][2]
        at, freed = _end_next(rooms, ends, at)
        look = [room for node in sorted(freed) for room in nodes[node]]  # what did not fit before can only fit where something came free
    return {key: estimate for key, estimate in found.items() if math.isfinite(estimate.seconds)}


def _end_next(rooms: dict[str, Room], ends: list[End], at: float) -> tuple[float, set[str]]:
    time, _, _, parts = heapq.heappop(ends)
    freed: set[str] = set()
    for uuid, part in parts:
        if uuid in rooms:
            rooms[uuid].give_back(part)
            freed.add(rooms[uuid].device.node)
    return max(at, time), freed
