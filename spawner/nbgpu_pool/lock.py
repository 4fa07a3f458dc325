"""One pool per runtime directory; a newer one may take over.

A hub that was killed leaves its managed services alive, and the new hub's copy finds the place taken: with `takeover` it ends
the old one and takes its place. The lock is the kernel's, which also names its holder, so no stale file can mislead.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import time
from pathlib import Path

from nbgpu.errors import NbgpuError

_FLOCK = "hhqqi4x"
"""`struct flock` on 64-bit Linux: type, whence, start, length, pid."""
STOP_SECONDS = 6.0


class Taken(NbgpuError):
    """Another pool runs here."""

    code = "taken"
    status = 409


class InstanceLock:
    """Held until `close` or the end of the process."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)

    def acquire(self, *, takeover: bool) -> int | None:
        """Take the lock; return the pid of the pool that was ended for it, if one was.

        Raises
        ------
        Taken
            Another pool holds it, and `takeover` is off or could not end it.
        """
        if self._try():
            return None
        holder = self._holder()
        if not takeover:
            who = f"Another nbgpu pool (pid {holder or 'unknown'}) serves {self.path.parent}."
            raise Taken(f"{who} Stop it first, or start this one with --takeover.")
        for number in (signal.SIGTERM, signal.SIGKILL):
            holder = self._holder()
            if holder:
                _stop(holder, number, STOP_SECONDS)
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                if self._try():
                    return holder
                time.sleep(0.02)
        raise Taken(f"The nbgpu pool (pid {holder or 'unknown'}) that serves {self.path.parent} could not be ended.")

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _holder(self) -> int | None:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        return pid if kind != fcntl.F_UNLCK and pid > 0 else None


def _stop(pid: int, number: signal.Signals, wait_seconds: float) -> None:
    """Signal a process and wait for its end; the pidfd makes sure that no other gets its signal."""
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
        select.select([pidfd], [], [], wait_seconds)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)
