"""Points at which a test ends the agent as SIGKILL would: ``NBGPU_MARK=name:n``, at the n-th pass. The limiter has the same, in C."""

from __future__ import annotations

import os
import signal

_name, _, _count = os.environ.get("NBGPU_MARK", "").rpartition(":")
_left = int(_count) if _name and _count.isdigit() else 0


def mark(name: str) -> None:
    """Die here, if the test says so."""
    global _left
    if _left and name == _name:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGKILL)
