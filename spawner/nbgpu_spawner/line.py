"""One start that waits in the pool's queue: what its page shows, asked of the pool no more often than somebody looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nbgpu.errors import NbgpuError
from nbgpu.models import AvailabilityQuery, Grant

from .client import PoolClient
from .options import Wish
from .profiles import Profile
from .sizes import Free, any_smaller, choices, largest_free
from .waiting import Place, place_of

LOOK_SECONDS = 3.0
NOTICE_SECONDS = 30.0
_ASK_SECONDS = 1.5


class Line:
    """What is known of a wait.

    Parameters
    ----------
    wish : Wish
        What it waits for.
    grant : Grant
        The request, as the pool last had it.
    profiles : list of Profile
        Those that its user may choose.
    configured, options : mapping
        The spawner's own values, and what the user chose.
    patience_seconds : float
        How long it may wait.
    """

    def __init__(
        self,
        wish: Wish,
        grant: Grant,
        profiles: list[Profile],
        configured: Mapping[str, Any],
        options: Mapping[str, Any],
        patience_seconds: float,
    ):
        self.wish, self.grant, self.patience_seconds = wish, grant, patience_seconds
        self.problem = ""
        """Why the pool's last word may be old."""
        self._known = profiles, configured, options
        self._free: Free | None = None
        self._any_smaller = False
        self._looked = float("-inf")
        self._notice, self._noticed = "", float("-inf")

    def notice(self, words: str) -> None:
        """Show for a while what became of what the user just tried."""
        self._notice, self._noticed = words, time.monotonic()
        self._looked = float("-inf")

    def place(self) -> Place:
        """Return what to show."""
        notice = self._notice if time.monotonic() - self._noticed < NOTICE_SECONDS else ""
        return place_of(
            self.wish,
            self.grant,
            self._free,
            any_smaller=self._any_smaller,
            patience_seconds=self.patience_seconds,
            problem=self.problem,
            notice=notice,
        )

    async def look(self, pool: PoolClient) -> None:
        """Ask what smaller share is free, if the last answer is old."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, free = time.monotonic(), None
        with suppress(NbgpuError, asyncio.TimeoutError):
            free = await asyncio.wait_for(self._ask(pool), _ASK_SECONDS)
        self._free = free  # until then the last answer is shown

    async def _ask(self, pool: PoolClient) -> Free | None:
        request = self.grant.request
        tried = choices(*self._known, books=await pool.devices())
        shapes = [self.wish.shape, *(one.wish.shape for one in tried)]
        query = AvailabilityQuery(owner=request.owner, groups=request.groups, shapes=shapes, instead_of=request.request_id)
        first, *answers = await pool.availability(query)
        self._any_smaller = any_smaller(tried, answers, (self.wish, first))
        return largest_free(tried, answers, than=(self.wish, first))
