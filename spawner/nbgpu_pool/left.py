"""Claims that left the queue again after something was taken from others for them: who does that often has nothing taken for them."""

from __future__ import annotations

from .giveback import Claim

LEFT_SECONDS = 600.0
"""For so long it is remembered."""
MOST_OF_USER, MOST_OF_HOLDER = 2, 10
"""So many in that time of one user, and in all of one guarantee: one member alone keeps nobody else from what is theirs."""


class Left:
    """When claims left, by whose they were. What is remembered is bounded by `MOST_OF_HOLDER` and those who wait."""

    def __init__(self) -> None:
        self._when: dict[tuple[str, ...], list[float]] = {}

    def note(self, claim: Claim, now: float) -> None:
        """A claim left before a server ran."""
        for whose in (claim.holder, claim.user):
            self._when.setdefault(whose, []).append(now)

    def spent(self, now: float) -> frozenset[tuple[str, ...]]:
        """Return for whom nothing is taken now: holders, and users of them (`Claim`)."""
        recent = {whose: [at for at in when if now - at < LEFT_SECONDS] for whose, when in self._when.items()} if self._when else {}
        self._when = {whose: when for whose, when in recent.items() if when}
        return frozenset(one for one, when in self._when.items() if len(when) >= (MOST_OF_HOLDER if len(one) == 2 else MOST_OF_USER))
