"""How long sessions last here, as far as it was seen."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque

ENOUGH_SESSIONS = 5
"""Observed sessions from which on an estimate is no guess."""
USUALLY = 0.75
"""People read that they wait "usually within 5 minutes": with the median every second one would be disappointed."""
GUESS_SECONDS = 3600.0


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
        return self.guessing or not self.longer(age_seconds)

    def longer(self, age_seconds: float) -> int:
        """Return how many sessions lasted longer than this."""
        lengths = self._in_order()
        return len(lengths) - bisect_right(lengths, age_seconds)

    def remaining_seconds(self, age_seconds: float, share: float = USUALLY) -> float:
        """Return the time within which this share of the sessions that reached this age have ended."""
        lengths, count = self._in_order(), self.longer(age_seconds)
        if count:
            return lengths[math.ceil(count * share) - 1 - count] - age_seconds
        # Older than all seen so far: as long again usually, and less or more as for a tail that falls with the square.
        return age_seconds * (1 / math.sqrt(1 - share) - 1)

    def _in_order(self) -> list[float]:
        if self._sorted is None:
            self._sorted = sorted([*self._lengths, *[self._guess_seconds] * (ENOUGH_SESSIONS - len(self._lengths))])
        return self._sorted


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
