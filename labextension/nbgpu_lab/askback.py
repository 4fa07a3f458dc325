"""Whether this server is asked back for somebody who waits (docs/quotas.md): the hub is asked now and then, and the user is told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from math import isfinite
from typing import Any

from nbgpu.errors import NbgpuError
from nbgpu.words import rough_time

from . import hub
from .notices import Notices

Json = dict[str, Any]
KIND = "asked-back"
FIRST_SECONDS = 20.0
AGAIN_SECONDS = 60.0
"""Where the hub does not say how soon it wants to be asked again."""
SOONEST_SECONDS, LATEST_SECONDS = 10.0, 600.0
JITTER = 0.25
"""Servers that were started together do not ask together: each pause is longer or shorter by up to this part."""
REMIND_SECONDS = 120.0
"""When so much is left, the user is told once more, unless it was not twice as long before."""
MOVED_SECONDS = 60.0
"""An end that has moved by more than this is told."""
WITHDRAWN = "This server is not asked back any more: it goes on."
_MOST_REASON = 500


class AskedBack:
    """What the hub has said last, and what the user was told of it.

    Parameters
    ----------
    notices : Notices
        Where the user is told.
    clock : callable
        Seconds that never jump.
    """

    def __init__(self, notices: Notices, clock: Callable[[], float] = time.monotonic):
        self._notices, self._clock = notices, clock
        self._asked: Json | None = None
        self._until = 0.0
        self._said_until, self._said_left = 0.0, 0.0
        """What the last notice said: the end, and how long that was away."""

    def now(self) -> Json | None:
        """Return what a page shows: `seconds` until the end, `ends` (the hub stops it then), `reason`; None: nothing is asked."""
        return self._asked and {**self._asked, "seconds": round(self._until - self._clock(), 1)}

    def hear(self, asked: object) -> None:
        """Take over what the hub says: an object as in docs/interfaces.md, None where nothing is asked; what is neither is not heard."""
        if asked is None:
            if self._asked is not None:
                self._asked = None
                self._notices.say(KIND, WITHDRAWN, level="info")
            return
        if not isinstance(asked, dict):
            return
        seconds, ends, reason = asked.get("seconds"), asked.get("ends"), asked.get("reason")
        if not isinstance(seconds, (int, float)) or not isfinite(seconds) or not isinstance(ends, bool) or not isinstance(reason, str):
            return
        before, self._asked = self._asked, {"ends": ends, "reason": reason[:_MOST_REASON]}
        self._until = self._clock() + seconds
        moved = abs(self._until - self._said_until) > MOVED_SECONDS
        soon = seconds <= REMIND_SECONDS and self._said_left >= 2 * REMIND_SECONDS
        if before != self._asked or moved or soon:
            self._said_until, self._said_left = self._until, seconds
            self._notices.say(KIND, words(self._asked, seconds))


def words(asked: Json, seconds: float) -> str:
    """Return what a user reads: what happens, when, why, what to do."""
    left = rough_time(seconds, "seconds")
    if asked["ends"]:
        when = f"will be stopped in {left}" if seconds > 0 else "is being stopped"
        return f"Save your work: this server {when}, because {asked['reason']}."
    within = f" within {left}" if seconds > 0 else ""
    return f"Please save your work and stop this server{within}, because {asked['reason']}."


async def follow(asked: AskedBack) -> None:
    """Ask the hub, for ever, as often as it wants; one that is away or too old is asked again later, and nobody hears of that."""
    pause = FIRST_SECONDS
    while True:
        await asyncio.sleep(pause * random.uniform(1 - JITTER, 1 + JITTER))
        try:
            answer = await hub.asked()
            asked.hear(answer["asked"])
            pause = min(max(float(answer["again_seconds"]), SOONEST_SECONDS), LATEST_SECONDS)
        except NbgpuError as error:
            pause = LATEST_SECONDS if error.code == "not-offered" else AGAIN_SECONDS
        except (KeyError, TypeError, ValueError):  # no answer of ours
            pause = LATEST_SECONDS
