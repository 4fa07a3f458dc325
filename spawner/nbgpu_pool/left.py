"""Claims that left the queue again after something was taken from others for them: who does that often has nothing taken for them."""

from __future__ import annotations

from collections import Counter

from .giveback import Claim

LEFT_SECONDS = 600.0
"""For so long it is remembered."""
MOST_OF_USER, MOST_OF_HOLDER = 2, 10
"""So many in that time of one user, and in all of one guarantee: one member alone keeps nobody else from what is theirs."""


class Left:
    """When claims left, by user (`Claim.user`). What is remembered is bounded by `MOST_OF_HOLDER` and those who wait."""

    def __init__(self) -> None:
        self._when: dict[tuple[str, ...], list[float]] = {}

    def note(self, claim: Claim, now: float) -> None:
        """A claim left before a server ran."""
        self._when.setdefault(claim.user, []).append(now)

    def spent(self, now: float) -> frozenset[tuple[str, ...]]:
        """Return for whom nothing is taken now: holders, and users of them (`Claim`)."""
        recent = {user: [at for at in when if now - at < LEFT_SECONDS] for user, when in self._when.items()} if self._when else {}
        self._when = {user: when for user, when in recent.items() if when}
        counted = Counter[tuple[str, ...]]()
        for (kind, name, *_), when in self._when.items():
            counted[kind, name] += min(len(when), MOST_OF_USER)  # of one who had many taken for them at a time no more count
        holders = {holder for holder, count in counted.items() if count >= MOST_OF_HOLDER}
        return frozenset(holders | {user for user, when in self._when.items() if len(when) >= MOST_OF_USER})
