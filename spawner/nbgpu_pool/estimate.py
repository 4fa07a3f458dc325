"""How long a wait will be: from what runs, for how long, and how long sessions last here; until enough have ended, called a guess."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from nbgpu.models import GrantState

from .books import Books
from .placement import Room, place
from .shapes import Part, Want

ENOUGH_SESSIONS = 5
"""Observed sessions from which on an estimate is no guess."""
GUESS_SECONDS = 3600.0
MAX_EVENTS = 300
MAX_TRIES = 400


class Sessions:
    """Lengths of the last sessions, in seconds.

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

    def remaining_seconds(self, age_seconds: float) -> float:
        """Return the median of what sessions that reached this age still lasted."""
        if self._sorted is None:
            self._sorted = sorted([*self._lengths, *[self._guess_seconds] * (ENOUGH_SESSIONS - len(self._lengths))])
        first = bisect_right(self._sorted, age_seconds)
        count = len(self._sorted) - first
        # Older than all seen so far: as long again is the usual guess.
        return self._sorted[first + count // 2] - age_seconds if count else age_seconds


def queue_forecast(books: Books, sessions: Sessions, now: float, ghosts: Sequence[Want] = ()) -> dict[str, float]:
    """Return in how many seconds each queued request, and each of `ghosts` behind them, likely gets its place.

    Plays the known sessions to their likely ends, serving the queue in order. Keys: request ids; ``"ghost:<n>"`` for ghosts.
    What is not reached within the bounds of the play is left out.
    """
    typical = sessions.remaining_seconds(0.0)
    rooms = {uuid: replace(room) for uuid, room in books.rooms.items()}
    ends: list[tuple[float, int, list[tuple[str, Part]]]] = []
    for number, entry in enumerate(books.entries.values()):
        if entry.holds and entry.state != GrantState.reserved:
            left = 0.0 if entry.state == GrantState.releasing else sessions.remaining_seconds(max(0.0, now - entry.started))
            ends.append((left, number, entry.parts()))
        elif entry.state == GrantState.reserved:
            ends.append((typical, number, entry.parts()))
    heapq.heapify(ends)
    waiting = [(entry.slice_id, entry.want) for entry in books.waiting()]
    waiting += [(f"ghost:{number}", want) for number, want in enumerate(ghosts)]
    return _play(rooms, ends, waiting, typical)


def _play(
    rooms: dict[str, Room], ends: list[tuple[float, int, list[tuple[str, Part]]]], waiting: list[tuple[str, Want]], typical: float
) -> dict[str, float]:
    nodes: dict[str, list[Room]] = {}
    for room in rooms.values():
        nodes.setdefault(room.device.node, []).append(room)
    found: dict[str, float] = {}
    at, tries, number = 0.0, 0, 10**6
    look = list(rooms.values())
    for _ in range(MAX_EVENTS):
        misfits: set[Want] = set()
        still: list[tuple[str, Want]] = []
        for key, want in waiting:
            if want in misfits:
                still.append((key, want))
                continue
            tries += 1
            spot = place(look, want)
            if spot is None:
                misfits.add(want)
                still.append((key, want))
                continue
            found[key] = at
            if not key.startswith("ghost:"):
                for room, part in spot:
                    room.take(part)
                number += 1
                heapq.heappush(ends, (at + typical, number, [(room.device.uuid, part) for room, part in spot]))
        waiting = still
        if not waiting or not ends or tries > MAX_TRIES:
            break
        at, freed = _end_next(rooms, ends, at)
        look = [room for node in sorted(freed) for room in nodes[node]]  # what did not fit before can only fit where something came free
    return {key: float(seconds) for key, seconds in found.items() if math.isfinite(seconds)}


def _end_next(rooms: dict[str, Room], ends: list[tuple[float, int, list[tuple[str, Part]]]], at: float) -> tuple[float, set[str]]:
    time, _, parts = heapq.heappop(ends)
    freed: set[str] = set()
    for uuid, part in parts:
        if uuid in rooms:
            rooms[uuid].give_back(part)
            freed.add(rooms[uuid].device.node)
    return max(at, time), freed
