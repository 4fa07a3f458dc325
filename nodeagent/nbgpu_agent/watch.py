"""Tells when processes end: at once through pidfds, by polling where there are none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from .procs import Process, open_pidfd

POLL_SECONDS = 0.2


class Watch:
    """A process that is being watched."""

    def __init__(self, process: Process, callback: Callable[[Process], None]):
        self.process = process
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._fd = open_pidfd(process)
        if self._fd is None:
            self._poll()
        else:
            self._loop.add_reader(self._fd, self._ended)

    def _poll(self) -> None:
        if self.process.alive():
            self._timer = self._loop.call_later(POLL_SECONDS, self._poll)
        else:
            self._timer = self._loop.call_soon(self._ended)

    def _ended(self) -> None:
        self.close()
        self._callback(self.process)

    def alive(self) -> bool:
        """Return whether the process runs: what the pidfd has said so far, with no look at /proc where there is one."""
        return self._fd is not None or self.process.alive()

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
