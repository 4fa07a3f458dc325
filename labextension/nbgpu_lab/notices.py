"""The last notices of this server: the agent's events and the server's own, in one order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

Notice = dict[str, Any]
MESSAGE_MOST = 20_000
"""Characters of a notice: a sentence of anybody's names fits, a page that draws it does not stand still."""


class Notices:
    """Keeps the last notices and tells listeners of each new one.

    Ids are this server's own: they rise, also over a restart of the agent (whose ids may start again) and of this server.
    """

    def __init__(self, keep: int = 100, clock: Callable[[], float] = time.time):
        self._kept: deque[Notice] = deque(maxlen=keep)
        self._clock = clock
        self.listeners: list[Callable[[Notice], None]] = []
        self.last_id = 0

    def add(self, event: Notice) -> Notice:
        """Keep `event` (an agent's ``Event`` or one of our own) under a new id, and return it.

        Raises
        ------
        TypeError
            Its message is no text: no page could show it.
        """
        message = event.get("message")
        if not isinstance(message, str):
            raise TypeError(f"a notice says {type(message).__name__}")
        self.last_id = max(self.last_id + 1, int(self._clock() * 1000))
        notice = {
            "time": self._clock(),
            "slice_id": None,
            "kernel_id": None,
            "name": None,
            "path": None,
            "data": {},
            **event,
            "message": message if len(message) <= MESSAGE_MOST else f"{message[:MESSAGE_MOST]}…",
            "id": self.last_id,
        }
        self._kept.append(notice)
        for listener in self.listeners:
            listener(notice)
        return notice

    def say(self, kind: str, message: str, *, level: str = "warning", kernel_id: str | None = None) -> Notice:
        """Keep a notice of this server's own."""
        return self.add({"kind": kind, "level": level, "message": message, "kernel_id": kernel_id})

    def after(self, last_seen: int) -> list[Notice]:
        """Return the kept notices with an id above `last_seen`, oldest first."""
        return [notice for notice in self._kept if notice["id"] > last_seen]


SERVER = Notices()
"""This process's notices: kernel provisioners write here too, and have no other way to the server that they run in."""
