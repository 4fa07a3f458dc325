"""When each kernel last did something for its user, which Jupyter's own count does not tell: a page that is opened begins that anew."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

QUESTIONS = {"history_request", "kernel_info_request", "comm_info_request", "debug_request"}
"""What a page asks of each kernel that it shows, by the messages' types in Jupyter's protocol, which are the same in every language."""


class Activity:
    """Listens to the kernels' IOPub channels: every message there names the request that it belongs to."""

    def __init__(self) -> None:
        self._streams: dict[str, tuple[int, Any]] = {}
        """By kernel: its channel's port, which a start that is tried again may change, and what listens there."""
        self._last: dict[str, datetime] = {}

    def last(self, kernel_id: str, manager: Any) -> datetime | None:
        """Return when a kernel last did something, None where nobody knows; until it is first asked for, as Jupyter counts it."""
        jupyters = getattr(manager, "last_activity", None)
        if not isinstance(jupyters, datetime):
            return None
        with suppress(Exception):  # a manager of kernels elsewhere, or one that is just going: Jupyter's count has to do
            if self._streams.get(kernel_id, (None,))[0] != manager.iopub_port:
                self._forget(kernel_id)
                self._follow(kernel_id, manager)
        return self._last.get(kernel_id, jupyters)

    def keep(self, kernel_ids: set[str]) -> None:
        """Forget all other kernels."""
        for gone in self._streams.keys() - kernel_ids:
            self._forget(gone)

    def _forget(self, kernel_id: str) -> None:
        if kernel_id in self._streams:
            self._streams.pop(kernel_id)[1].close()
            del self._last[kernel_id]

    def _follow(self, kernel_id: str, manager: Any) -> None:
        session, stream = manager.session, manager.connect_iopub()
        self._streams[kernel_id], self._last[kernel_id] = (manager.iopub_port, stream), manager.last_activity

        def heard(frames: list[bytes]) -> None:
            with suppress(Exception):  # no message of the protocol
                _, (_, _, parent, *_) = session.feed_identities(frames)
                if session.unpack(parent).get("msg_type") not in QUESTIONS:
                    self._last[kernel_id] = datetime.now(timezone.utc)

        stream.on_recv(heard)
