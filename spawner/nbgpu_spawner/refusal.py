"""How a spawn is refused: plain words for the user, nothing on the hub's failure counter, on hub 5 and 6."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from html import escape
from typing import Any

from tornado import web
from tornado.log import app_log, gen_log

from nbgpu.errors import NbgpuError

try:
    from jupyterhub.spawner import SpawnException as _Base

    HUB_COUNTS_REFUSALS = False
except ImportError:  # JupyterHub 5 has none
    _Base = web.HTTPError
    HUB_COUNTS_REFUSALS = True


EVERYDAY = ("gpu-no-room", "gpu-queue-full")
"""Of those that are 503: everything works, and is in use."""
_lately: deque[weakref.ref[GPURefusal]] = deque(maxlen=50)


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
    who : str
        Whose server it is, for the log.
    """

    def __init__(self, message: str, *, reason: str, status_code: int = 503, field: str | None = None, who: str = ""):
        if HUB_COUNTS_REFUSALS:
            super().__init__(status_code, message, reason=reason)
        else:
            super().__init__(message, reason=reason, status_code=status_code)  # pyright: ignore
        self.headers = {"Nbgpu-Field": field} if field and field.isascii() and field.isprintable() else {}
        # both hubs show these two to people in preference to str(error)
        self.jupyterhub_message = message
        self.jupyterhub_html_message = f"<p>{escape(message)}</p>"
        self.who, self.logged = who, False
        _lately.append(weakref.ref(self))

    def __str__(self) -> str:
        return f"{self.status_code} {self.reason}: {self.jupyterhub_message}"


def _in_one_line(record: logging.LogRecord) -> bool:
    """Make of all that the hub and tornado log of a refusal one line without a stack trace: it is an answer to a user, no fault of the hub.

    What its user can mend, a typing error or a full GPU, is no news to an admin either: it is logged as information.
    """
    error = _refusal_in(record)
    if error is None:
        return True
    if error.logged:
        return False
    error.logged = True
    record.msg = f"Not starting {error.who}'s server: {error}" if error.who else f"{record.getMessage()}: {error}"
    record.args, record.exc_info, record.exc_text = (), None, None
    if error.status_code < 500 or error.reason in EVERYDAY:
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
    return True


def _refusal_in(record: logging.LogRecord) -> GPURefusal | None:
    """Return the refusal that is logged: as an exception, as one of the message's parts, or as the end of a text."""
    parts = record.args if isinstance(record.args, tuple) else ()
    for found in (record.exc_info[1] if record.exc_info else None, *parts):
        if isinstance(found, GPURefusal):
            return found
    if record.levelno >= logging.WARNING and _lately:
        text = record.getMessage()
        lately = (found for found in (one() for one in reversed(_lately)) if found is not None)
        return next((one for one in lately if one.jupyterhub_message and text.endswith(one.jupyterhub_message)), None)
    return None


for _logger in (logging.getLogger("JupyterHub"), logging.getLogger("asyncio"), app_log, gen_log):
    _logger.addFilter(_in_one_line)


def refusal(error: NbgpuError, who: str = "") -> GPURefusal:
    """Return `error` as what a spawn raises; the words stay the same."""
    return GPURefusal(error.message, reason=f"gpu-{error.code}", status_code=error.status, field=error.field, who=who)


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
