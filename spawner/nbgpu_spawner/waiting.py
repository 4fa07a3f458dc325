"""Words and events for a start that waits for a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from html import escape
from typing import Any

from nbgpu.models import Grant
from nbgpu.words import counted

from .options import Wish


class Progress:
    """An append-only list of progress events that any number of readers follow, each from its beginning."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self.settled = False

    def tell(self, message: str, html: str | None = None, percent: int = 10) -> None:
        """Append a message, unless it is the last one again."""
        event: dict[str, Any] = {"progress": percent, "message": message}
        if html is not None:
            event["html_message"] = html
        if not self._events or self._events[-1] != event:
            self._events.append(event)
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
        while True:
            if current() is not reading:
                reading, index = current(), 0
            while index < len(reading._events):
                index += 1
                yield dict(reading._events[index - 1])
            if reading.settled:
                return
            try:
                await asyncio.wait_for(reading._news.wait(), 1)
            except asyncio.TimeoutError:
                continue


def in_line(wish: Wish, grant: Grant, leave_url: str) -> tuple[str, str]:
    """Return what a waiting user reads, as text and as HTML with a button to leave."""
    place = f"{ordinal(grant.position)} in line" if grant.position else "in line"
    text = f"Waiting for {wish}: {place}, {about(grant.wait_seconds, grant.wait_guessed)}."
    if grant.reason:
        text += f" {grant.reason[:1].upper()}{grant.reason[1:].rstrip('.')}."
    # The page puts each event into its log too: the button is of use only outside. JupyterHub 6's own "Stop Server" would end the wait as
    # well, of a named server another one: it is back when the wait is over. The token is filled in by the page that shows it.
    html = (
        "<style>#progress-log .nbgpu-leave,body:has(#progress-message .nbgpu-leave) #stop-server-btn{display:none}</style>"
        f"<span>{escape(text)}</span>"
        f'<form class="nbgpu-leave mt-2" method="post" action="{escape(leave_url)}"'
        " onsubmit=\"this.elements['_xsrf'].value=(window.jhdata||{}).xsrf_token||''\">"
        '<input type="hidden" name="_xsrf" value="">'
        '<button type="submit" class="btn btn-secondary btn-sm">Leave the queue</button></form>'
    )
    return text, html


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
    minutes = round(seconds / 60)
    if seconds < 45:
        said = "less than a minute"
    elif minutes < 90:
        said = f"about {counted(minutes, 'minute')}"
    else:
        said = f"about {round(minutes / 60)} hours"
    return f"{said} (a guess: too few servers have ended here to know)" if guessed else said


def duration(seconds: float) -> str:
    """Return a time span in words."""
    if seconds < 120:
        return counted(round(seconds), "second")
    return f"{round(seconds / 60)} minutes"


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, 11th …"""
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
