"""How long a wait will be: what runs is played to its end several times, each time with other lengths that sessions here have had."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from nbgpu.models import GrantState

from .books import Books, Entry
from .placement import Room, place
from .sessions import USUALLY, Kinds
from .shapes import Part, Want, resolve

PARK_SECONDS = 15.0
"""Until a slice that is being parked has given its room back."""
PLAYS = 14
"""So that `USUALLY` is the eleventh of them. Of many sessions one ends long before each usually has: no single play tells."""
MANY_SESSIONS = 2000
"""Where more run every third play is enough: of so many the plays differ little."""
MOST_WAITING = 500
"""Who is further back is told nothing."""
MAX_EVENTS = 300
MAX_TRIES = 4000
"""Of each play."""
_STARTED = 1 << 30

_SHARES = tuple((quantile + 0.5) / PLAYS for quantile in range(PLAYS))
_ORDERS = [[(start + step * play) % PLAYS for play in range(PLAYS)] for start in range(PLAYS) for step in (1, 3, 5, 9, 11, 13)]
"""Of the quantiles of a session's remaining time in the plays: each once."""
Parts = list[tuple[str, Part]]


class Estimate(NamedTuple):
    """When a request likely gets its place."""

    seconds: float
    guessed: bool
    """It rests on a session of a kind of which too few have ended here."""


class _Ends(NamedTuple):
    """A session in one play."""

    at: float
    number: int
    guessed: bool
    parts: Parts


class _Lasts(NamedTuple):
    """How long a session still lasts, in each play."""

    lengths: Sequence[float]
    """By quantile."""
    age: float
    order: Sequence[int]
    """Which quantile each play has."""
    guessed: bool = False

    def seconds(self, play: int) -> float:
        return self.lengths[self.order[play]] - self.age


class _Running:
    """A session in all plays."""

    def __init__(self, lasts: _Lasts, entry: Entry):
        self.lasts, self._entry = lasts, entry

    @cached_property
    def parts(self) -> Parts:
        """Return what it gives back."""
        return self._entry.parts()


class _Returns(NamedTuple):
    """A parked slice that wants its place back: what it lacks on its devices, and how long it lasts then."""

    lacks: Parts
    lasts: _Lasts
    number: int


class _Waits(NamedTuple):
    """Who waits, and how long they would stay; a ghost takes no room."""

    key: str
    number: int
    want: Want
    closed: frozenset[str]
    lasts: _Lasts
    earmark: tuple[str, ...] = ()
    ghost: bool = False


def queue_forecast(books: Books, kinds: Kinds, now: float, ghosts: Sequence[tuple[Want, frozenset[str]]] = ()) -> dict[str, Estimate]:
    """Return within how many seconds each queued request, and each of `ghosts` behind them, usually gets its place.

    The queue is served in order as sessions end, after the parked slices that come back; who waits for a quota is left out, and what is
    not reached within the bounds of most plays. A session has each quantile of its remaining time in one of the plays, which ones is
    settled by its number: what is told does not jump about. Keys: request ids; ``"ghost:<n>"`` for ghosts, each a want and the devices on
    which it is not placed.
    """
    queue = [entry for entry in books.waiting() if not entry.holder]
    if not queue and not ghosts:
        return {}
    lasting = _Lasting(kinds, now)
    waiting = [
        _Waits(entry.slice_id, number, entry.want, books.closed(entry), lasting.of(entry), entry.earmark)
        for number, entry in enumerate(queue[:MOST_WAITING])
    ]
    if len(queue) <= MOST_WAITING:
        waiting += [_Waits(f"ghost:{n}", _STARTED + n, want, closed, _AT_ONCE, ghost=True) for n, (want, closed) in enumerate(ghosts)]
    returning = [_returns(entry, lasting) for entry in books.wanted_back()]
    running = [_Running(lasting.of(entry), entry) for entry in books.entries.values() if entry.holds]
    told: dict[str, list[Estimate]] = {one.key: [] for one in waiting}
    plays = range(0, PLAYS, 1 if len(running) <= MANY_SESSIONS else 3)
    for play in plays:
        for key, estimate in _Play(_Board(books), play, _first(running, play), returning, waiting).run().items():
            told[key].append(estimate)
    usual = math.ceil(USUALLY * len(plays)) - 1
    return {key: sorted(of)[usual] for key, of in told.items() if len(of) > usual}


class _Lasting:
    """How long sessions still last."""

    def __init__(self, kinds: Kinds, now: float):
        self._kinds, self._now = kinds, now
        self._lengths: dict[tuple[str, int], list[float]] = {}

    def of(self, entry: Entry) -> _Lasts:
        """Return how long a session lasts from now, or would if it began now."""
        if entry.state == GrantState.releasing:
            return _AT_ONCE
        if entry.parking:
            return _PARKED
        sessions = self._kinds.of(entry.request.owner.hub)
        age = max(0.0, self._now - entry.started) if entry.state == GrantState.bound else 0.0
        mixed = entry.number * 2654435761 >> 7
        order = _ORDERS[mixed % len(_ORDERS)]
        longer = sessions.longer(age)
        if not longer:
            return _Lasts([age + sessions.remaining_seconds(age, share) for share in _SHARES], age, order, True)
        key = entry.request.owner.hub, longer
        if key not in self._lengths:
            self._lengths[key] = [age + sessions.remaining_seconds(age, share) for share in _SHARES]
        return _Lasts(self._lengths[key], age, order, sessions.guessing)


_AT_ONCE = _Lasts((0.0,) * PLAYS, 0.0, _ORDERS[0])
_PARKED = _Lasts((PARK_SECONDS,) * PLAYS, 0.0, _ORDERS[0])


def _first(running: list[_Running], play: int) -> list[_Ends]:
    """Return the sessions that end first, in order."""
    ends = [(one.lasts.seconds(play), number) for number, one in enumerate(running)]
    ends = sorted(ends) if len(ends) <= MAX_EVENTS else heapq.nsmallest(MAX_EVENTS, ends)
    return [_Ends(at, number, running[number].lasts.guessed, running[number].parts) for at, number in ends]


def _returns(entry: Entry, lasting: _Lasting) -> _Returns:
    held = dict(entry.parts())
    lacks = [(uuid, part.without(held.get(uuid, Part(0, 0)))) for uuid, part in entry.quota_parts()]
    return _Returns(lacks, lasting.of(entry), entry.number)


class _Board:
    """The rooms of one play: copies of those that it changes."""

    def __init__(self, books: Books):
        self._buckets, self._rooms = books.buckets, books.rooms
        self._own: dict[str, Room] = {}

    def room(self, uuid: str) -> Room | None:
        """Return a device's room, to be changed; None: it is gone."""
        own = self._own.get(uuid)
        if own is None and uuid in self._rooms:
            own = self._own[uuid] = self._rooms[uuid].copy()
        return own

    def node(self, name: str) -> list[Room]:
        """Return all rooms of a node, to be changed."""
        return [room for one in self._buckets.of([name]) if (room := self.room(one.device.uuid)) is not None]


@dataclass
class _Play:
    """One way in which things may go."""

    board: _Board
    play: int
    ends: list[_Ends]
    """A heap."""
    returning: list[_Returns]
    waiting: Iterable[_Waits]

    def run(self) -> dict[str, Estimate]:
        """Return when who waits got in, as far as it was reached."""
        lines: dict[tuple[Want, frozenset[str]], deque[_Waits]] = {}
        for one in self.waiting:
            lines.setdefault((one.want, one.closed), deque()).append(one)
        self.lines = list(lines.values())
        self.earmarks = {uuid: one.key for one in self.waiting for uuid in one.earmark}
        self.ends, self.found, self.tries, self.at, self.guessed = list(self.ends), dict[str, Estimate](), 0, 0.0, False
        for _ in range(MAX_EVENTS):
            if not self.lines or not self.ends or self.tries > MAX_TRIES:
                break
            freed = self._end_next()
            self._come_back()
            self._let_in(freed)
        return self.found

    def _end_next(self) -> list[Room]:
        ended = heapq.heappop(self.ends)
        self.at, self.guessed = max(self.at, ended.at), self.guessed or ended.guessed
        freed: list[Room] = []
        for uuid, part in ended.parts:
            room = self.board.room(uuid)
            if room is not None:
                room.give_back(part)
                freed.append(room)
        return freed

    def _come_back(self) -> None:
        """Give those that come back their places, in their order, as far as there is room."""
        still: list[_Returns] = []
        self.kept = set[str]()
        for one in self.returning:
            rooms = [self.board.room(uuid) for uuid, _ in one.lacks if uuid not in self.kept]
            if len(rooms) == len(one.lacks) and all(
                room is not None and room.fits(part) for room, (_, part) in zip(rooms, one.lacks, strict=True)
            ):
                self._start([(room, part) for room, (_, part) in zip(rooms, one.lacks, strict=True) if room is not None], one)
            else:
                still.append(one)
                self.kept.update(uuid for uuid, _ in one.lacks)
        self.returning = still

    def _let_in(self, freed: list[Room]) -> None:
        """Serve the queue: what did not fit before can only fit where something came free."""
        if not freed:
            return
        most = max(room.free_milli for room in freed)
        lines = [line for line in self.lines if line[0].want.device_count > 1 or (line[0].want.compute_milli or 0) <= most]
        while lines:
            line = min(lines, key=lambda line: line[0].number)
            one = line[0]
            self.tries += 1
            spot = self._spot(one, freed)
            if spot is None:
                lines.remove(line)
                continue
            self.found[one.key] = Estimate(self.at, self.guessed)
            if not one.ghost:
                self._start(spot, one)
                for uuid in one.earmark:
                    self.earmarks.pop(uuid, None)
            line.popleft()
            if not line:
                lines.remove(line)
                self.lines.remove(line)

    def _start(self, spot: Sequence[tuple[Room, Part]], one: _Returns | _Waits) -> None:
        for room, part in spot:
            room.take(part)
        parts = [(room.device.uuid, part) for room, part in spot]
        heapq.heappush(self.ends, _Ends(self.at + one.lasts.seconds(self.play), _STARTED + one.number, one.lasts.guessed, parts))

    def _spot(self, one: _Waits, freed: list[Room]) -> Sequence[tuple[Room, Part]] | None:
        def barred(room: Room) -> bool:
            uuid = room.device.uuid
            return uuid in one.closed or uuid in self.kept or self.earmarks.get(uuid, one.key) != one.key

        if one.want.device_count > 1:
            for node in dict.fromkeys(room.device.node for room in freed):
                rooms = self.board.node(node)
                spot = place(rooms, one.want, barred={room.device.uuid for room in rooms if barred(room)})
                if spot is not None:
                    return spot
            return None
        for room in freed:
            part = resolve(one.want, room.device)
            if part is not None and room.fits(part) and room.device.healthy and not barred(room):
                return [(room, part)]
        return None
