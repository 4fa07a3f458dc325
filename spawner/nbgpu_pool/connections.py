"""How many connections there may be, and how many of them event streams may have: what plain requests need is kept from these."""

from __future__ import annotations

import contextlib
import resource
from collections import Counter
from collections.abc import Callable, Generator

from nbgpu.errors import NbgpuError

from .auth import Principal

MOST_CONNECTIONS = 8000
"""Of one listening socket: everybody who waits may keep one for their events."""
SOCKETS = 2
"""The Unix socket and the address: there are descriptors for both of them full, and an eighth of all for everything else."""
RETRY_SECONDS = 5


class TooManyStreams(NbgpuError):
    """An event stream beyond what there may be."""

    code = "too-many-streams"
    status = 429


def raise_file_limit() -> None:
    """Let this process have as many descriptors as all its connections take, or as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = SOCKETS * MOST_CONNECTIONS * 8 // 7 + 1
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(hard, wanted), hard))


def most_connections() -> int:
    """Return how many connections a socket may have at a time; fewer where the process may not have that many descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else with_descriptors(soft)


def with_descriptors(count: int) -> int:
    """Return how many connections a socket may have where the process may have so many descriptors."""
    return min(MOST_CONNECTIONS, count * 7 // 8 // SOCKETS)


def of_all(connections: int) -> int:
    """Return how many of a socket's connections may be event streams."""
    return connections * 7 // 8


def of_one(role: str, connections: int) -> int:
    """Return how many of those one hub may have, or all who only look together."""
    return connections * 3 // 4 if role == "hub" else min(100, connections // 10)


class Streams:
    """The event streams of one socket.

    Parameters
    ----------
    connections : callable
        Returns how many connections the socket may have.
    """

    def __init__(self, connections: Callable[[], int] = most_connections):
        self._connections = connections
        self._open: Counter[tuple[str, str | None]] = Counter()

    @contextlib.contextmanager
    def one(self, speaker: Principal) -> Generator[None, None, None]:
        """Count one more for as long as it is open.

        Raises
        ------
        TooManyStreams
            Its speaker has as many as one may have (429), or all together have (503).
        """
        key, connections = (speaker.role, speaker.hub), self._connections()
        most = of_one(speaker.role, connections)
        if self._open[key] >= most:
            whose = "One hub" if speaker.role == "hub" else f"All with the role {speaker.role!r} together"
            raise TooManyStreams(f"{whose} may have {most} event streams, and that many are open: close some, or ask without events.")
        if self._open.total() >= of_all(connections):
            raise TooManyStreams("The pool has no more event streams at the moment: ask without events, or again later.", status=503)
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
