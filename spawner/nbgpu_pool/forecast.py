"""Estimates as they are told: made anew every few seconds, and stretched as far as waits here have been longer than was told."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from .books import Books, Entry
from .estimate import Estimate, queue_forecast
from .sessions import USUALLY, Kinds
from .shapes import Want

LONG_QUEUE = 50
"""From so many requests on, estimates are renewed every few seconds only, not at each change."""
RENEW_SECONDS = 5
ASKED_SECONDS = 60.0
"""Shapes that start pages have asked for within this time are estimated together with the queue."""
MOST_GHOSTS = 32
ENOUGH_WAITS = 20
"""Ended waits from which on they are learnt from."""
LEAST_SECONDS = 30.0
"""Shorter estimates teach nothing."""
LEAST_STRETCH, MOST_STRETCH = 0.5, 4.0

Ghost = tuple[Want, frozenset[str]]


class _Told(NamedTuple):
    """What somebody who waits was told first."""

    at: float
    seconds: float
    """Unstretched."""


class Forecasts:
    """How long each who waits, and who would ask now, usually waits.

    Parameters
    ----------
    books, kinds
        Who holds what and waits for what, and how long sessions last.
    generation : callable
        Returns a number that rises with each change of the books.
    """

    def __init__(self, books: Books, kinds: Kinds, generation: Callable[[], int]):
        self._books, self._kinds, self._generation = books, kinds, generation
        self._age = (-1, -1)
        self._queue: dict[str, Estimate] = {}
        self._ghosts: dict[Ghost, Estimate | None] = {}
        self._asked: dict[Ghost, float] = {}
        self._told: dict[str, _Told] = {}
        self._ratios: deque[float] = deque(maxlen=200)
        """Of the last waits: how long they were over what was told."""

    def of_queue(self, now: float) -> dict[str, Estimate]:
        """Return the estimates of all who wait, by request id; unknown ones are left out."""
        self._renew(now)
        return self._queue

    def of(self, want: Want, now: float, closed: frozenset[str] = frozenset()) -> Estimate | None:
        """Return how long `want`, behind all that wait and on none of `closed`, would usually wait; None when unknown."""
        self._renew(now)
        ghost = want, closed
        self._asked.pop(ghost, None)
        self._asked[ghost] = now
        if ghost not in self._ghosts:
            self._ghosts[ghost] = self._make(now, [ghost]).get("ghost:0")
        return self._ghosts[ghost]

    def granted(self, entry: Entry, now: float) -> None:
        """Learn from a wait that is over."""
        told = self._told.pop(entry.slice_id, None)
        if told is not None:
            self._ratios.append((now - told.at) / told.seconds)

    @property
    def stretch(self) -> float:
        """Return by how much estimates are stretched, so that what is told is usually so."""
        if len(self._ratios) < ENOUGH_WAITS:
            return 1.0
        usual = sorted(self._ratios)[math.ceil(USUALLY * len(self._ratios)) - 1]
        return min(MOST_STRETCH, max(LEAST_STRETCH, usual))

    def _renew(self, now: float) -> None:
        """Forget what is older than a few seconds or, while the queue is short, than the last change."""
        short = len(self._books.entries) < LONG_QUEUE
        age = (self._generation() if short else 0), int(now) // RENEW_SECONDS
        if age == self._age:
            return
        self._age = age
        self._asked = {ghost: at for ghost, at in list(self._asked.items())[-MOST_GHOSTS:] if now - at < ASKED_SECONDS}
        ghosts = list(self._asked)
        found = self._make(now, ghosts)
        self._ghosts = {ghost: found.pop(f"ghost:{number}", None) for number, ghost in enumerate(ghosts)}
        self._queue = found
        stretch = self.stretch
        fresh = {key: _Told(now, one.seconds / stretch) for key, one in found.items() if not one.guessed and one.seconds > LEAST_SECONDS}
        queued = {entry.slice_id for entry in self._books.waiting()} if fresh or self._told else set[str]()
        self._told = {key: self._told.get(key) or fresh[key] for key in queued if key in self._told or key in fresh}

    def _make(self, now: float, ghosts: list[Ghost]) -> dict[str, Estimate]:
        stretch = self.stretch
        made = queue_forecast(self._books, self._kinds, now, ghosts)
        return {key: Estimate(one.seconds * stretch, one.guessed) for key, one in made.items()}
