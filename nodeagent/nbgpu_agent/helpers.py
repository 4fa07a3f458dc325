"""How many helper processes make checkpoint calls at a time, whoever they are for."""

from __future__ import annotations

import asyncio
from collections import Counter

AT_ONCE = 4
"""Each is a Python that opens the driver, and all of them copy over the same bus."""
OF_ONE_USER = 2
"""So many of them: one user whose processes hold theirs up keeps nobody else waiting."""


class Helpers:
    """Who may have a helper process now: the user who has the fewest comes first, then who has waited longest."""

    def __init__(self) -> None:
        self._at_work: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def take(self, user: str, patience_seconds: float | None = None) -> bool:
        """Wait for one; `give` it back. False when `patience_seconds` were not enough."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((user, turn))
        self._next()
        taken = False
        try:
            await asyncio.wait({turn}, timeout=patience_seconds)
            taken = turn.done()
        finally:  # cancelled too
            if not taken and turn.done():
                self.give(user)
            elif not taken:
                self._waiting.remove((user, turn))
        return taken

    def give(self, user: str) -> None:
        """Let another have it."""
        self._at_work[user] -= 1
        self._at_work += Counter()  # forgets those that have none
        self._next()

    def _next(self) -> None:
        while self._at_work.total() < AT_ONCE:
            may = [one for one in self._waiting if self._at_work[one[0]] < OF_ONE_USER]
            if not may:
                return
            user, turn = first = min(may, key=lambda one: self._at_work[one[0]])
            self._waiting.remove(first)
            self._at_work[user] += 1
            turn.set_result(None)
