"""How a spawn is refused: plain words for the user, nothing on the hub's failure counter, on hub 5 and 6."""

from __future__ import annotations

import logging
from html import escape
from typing import Any

from tornado import web
from tornado.log import app_log

from nbgpu.errors import NbgpuError

try:
    from jupyterhub.spawner import SpawnException as _Base

    HUB_COUNTS_REFUSALS = False
except ImportError:  # JupyterHub 5 has none
    _Base = web.HTTPError
    HUB_COUNTS_REFUSALS = True


class GPURefusal(_Base):  # pyright: ignore[reportGeneralTypeIssues]
    """A spawn that ends with a message for the user: JupyterHub 6's `SpawnException`, also on JupyterHub 5.

    Parameters
    ----------
    message : str
        Plain text: what happened, and what to do.
    reason : str
        One word for logs and metrics.
    status_code : int
        400 bad input, 403 quota, 409 left the queue, 503 no room or no pool.
    field : str, optional
        The option that was wrong. The hub's JSON has a fixed form: programs find it in the header ``Nbgpu-Field``.
    """

    def __init__(self, message: str, *, reason: str, status_code: int = 503, field: str | None = None):
        if HUB_COUNTS_REFUSALS:
            super().__init__(status_code, message, reason=reason)
        else:
            super().__init__(message, reason=reason, status_code=status_code)  # pyright: ignore
        self.headers = {"Nbgpu-Field": field} if field and field.isascii() and field.isprintable() else {}
        # both hubs show these two to people in preference to str(error)
        self.jupyterhub_message = message
        self.jupyterhub_html_message = f"<p>{escape(message)}</p>"

    def __str__(self) -> str:
        return f"{self.status_code} {self.reason}: {self.jupyterhub_message}"


def _in_one_line(record: logging.LogRecord) -> bool:
    """Take the stack trace from what the hub logs of a refusal: it is an answer to a user, no fault of the hub."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, GPURefusal):
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {error}", (), None
    return True


def _no_second_word(record: logging.LogRecord) -> bool:
    """Drop what tornado logs of a refusal that came after the hub had answered "pending": the hub has a line of its own for it."""
    return not (record.exc_info and isinstance(record.exc_info[1], GPURefusal))


logging.getLogger("JupyterHub").addFilter(_in_one_line)
app_log.addFilter(_no_second_word)


def refusal(error: NbgpuError) -> GPURefusal:
    """Return `error` as what a spawn raises; the words stay the same."""
    return GPURefusal(error.message, reason=f"gpu-{error.code}", status_code=error.status, field=error.field)


def spare_failure_counter(spawner: Any) -> None:
    """Keep the refusal that is about to be raised off the hub's count of failed spawns.

    Three full GPUs in a row are no broken hub. JupyterHub 6 knows that of a `SpawnException`; JupyterHub 5 counts every failure and
    stops itself at ``consecutive_failure_limit``.
    """
    spawner.consecutive_failure_limit = 0
    future = getattr(spawner, "_spawn_future", None)
    if not HUB_COUNTS_REFUSALS or future is None or future.done():
        return
    settings = spawner.user.settings

    def uncount(_: Any) -> None:
        settings["failure_count"] = max(0, settings.get("failure_count", 0) - 1)

    future.add_done_callback(uncount)  # runs after the hub's own callback, which was added first
