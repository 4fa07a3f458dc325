"""Words and events for a start that waits for a GPU."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nbgpu.models import Grant
from nbgpu.words import counted, rough_time

from .form import describe, template
from .options import Wish
from .sizes import Free

MOST_EVENTS = 100
"""Of a start so many are kept, the last: who waits can make one by each press of a button."""


class Progress:
    """A list of progress events that any number of readers follow, each from its beginning, or from the oldest that is kept."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._told = 0
        self._news = asyncio.Event()
        self.settled = False
        self.readers = 0
        """Pages that follow it now."""

    def tell(self, message: str, html: str | None = None, percent: int = 10) -> None:
        """Append a message, unless it is the last one again."""
        event: dict[str, Any] = {"progress": percent, "message": message}
        if html is not None:
            event["html_message"] = html
        if not self._events or self._events[-1] != event:
            self._events.append(event)
            self._told += 1
            self._wake()

    def settle(self) -> None:
        """Say that no more will come."""
        self.settled = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def events(self, current: Callable[[], Progress]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield all events until settled. `current` gives the list that is in force: a new start replaces it."""
        reading, index = current(), 0
        reading.readers += 1
        try:
            while True:
                if current() is not reading:
                    reading.readers -= 1
                    reading, index = current(), 0
                    reading.readers += 1
                while index < reading._told:
                    index = max(index, reading._told - len(reading._events)) + 1
                    yield dict(reading._events[index - 1 - reading._told])
                if reading.settled:
                    return
                try:
                    await asyncio.wait_for(reading._news.wait(), 1)
                except asyncio.TimeoutError:
                    continue
        finally:
            reading.readers -= 1


@dataclass(frozen=True)
class Place:
    """Where somebody stands who waits, in words; what is empty is not shown."""

    title: str
    line: str = ""
    """Place in the queue, and until when."""
    why: str = ""
    known: str = ""
    """What the estimate is worth."""
    limit: str = ""
    """How long it may wait."""
    notice: str = ""
    """What became of what they just tried."""
    smaller: str = ""
    """What could be had now instead."""
    smaller_what: str = ""
    smaller_value: str = ""

    @property
    def text(self) -> str:
        """All of it in one line, for the log and for screens of words."""
        parts = [f"{self.title}: {self.line}" if self.line else self.title, self.why, self.notice]
        return " ".join(part if part.endswith(".") else f"{part}." for part in parts if part)


def place_of(
    wish: Wish,
    grant: Grant,
    free: Free | None = None,
    *,
    any_smaller: bool = False,
    patience_seconds: float | None = None,
    problem: str = "",
    notice: str = "",
) -> Place:
    """Return where a request stands.

    Parameters
    ----------
    free : Free, optional
        The largest smaller share that can be had now.
    any_smaller : bool
        Whether there is a smaller share to ask for at all.
    patience_seconds : float, optional
        How long the hub lets a start wait.
    problem : str
        Why nothing is known now.
    """
    title = f"Waiting for {wish}"
    limit = f"You may close this page: you keep your place, for {rough_time(patience_seconds)} at most." if patience_seconds else ""
    if problem:
        return Place(title, why=problem, limit=limit, notice=notice)
    if patience_seconds and grant.wait_seconds is not None and grant.wait_seconds > patience_seconds:
        limit = f"This hub lets a start wait {rough_time(patience_seconds)}: this one may end in vain."
        limit += " A smaller share may come sooner." if any_smaller else ""
    place = f"{ordinal(grant.position)} in line" if grant.position else "in line"
    reason = (grant.reason or "").strip().rstrip(".")
    found = Place(
        title,
        line=f"{place}, {about(grant.wait_seconds, grant.wait_guessed)}.",
        why=f"{reason[:1].upper()}{reason[1:]}." if reason else "",
        known=worth(grant.wait_seconds, grant.wait_guessed),
        limit=limit,
        notice=notice,
    )
    if free is None:
        return found
    what = f"{describe(free.choice.wish, free.answer)} (profile: {free.choice.profile})."
    return replace(found, smaller=str(free.choice.wish), smaller_what=what, smaller_value=free.choice.value)


def event(place: Place, leave_url: str, smaller_url: str) -> tuple[str, str]:
    """Return a progress event's message, as text and as HTML with the buttons."""
    html = template("event.html").render(place=place, place_json=json.dumps(asdict(place)), leave_url=leave_url, smaller_url=smaller_url)
    return place.text, html


def page(place: Place | None, leave_url: str, smaller_url: str, token: str) -> str:
    """Return what the queue page shows; hidden while nobody waits."""
    return template("queue.html").render(place=place, leave_url=leave_url, smaller_url=smaller_url, token=token)


def no_room(wish: Wish, waited_seconds: float, grant: Grant) -> str:
    """Return the message of a start that waited in vain."""
    why = f" ({grant.reason.rstrip('.')})" if grant.reason else ""
    return (
        f"There was no room for {wish} within {duration(waited_seconds)}{why}. "
        "Try again later, choose a smaller share, or start without a GPU."
    )


def about(seconds: float | None, guessed: bool = False) -> str:
    """Return an estimate of a wait in words."""
    if seconds is None:
        return "nobody can say yet how long"
    return f"{'perhaps' if guessed else 'usually'} within {rough_time(seconds)}"


def worth(seconds: float | None, guessed: bool) -> str:
    """Return what is known of a wait and what is not."""
    if seconds is None:
        return ""
    if guessed:
        return "A guess: too few servers have ended here to know how long they run."
    return "An estimate from how long servers here have run: three of four times it is no longer. Who stops early makes it shorter."


def duration(seconds: float) -> str:
    """Return a time span in words."""
    if seconds < 120:
        return counted(round(seconds), "second")
    return f"{round(seconds / 60)} minutes"


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, 11th …"""
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
