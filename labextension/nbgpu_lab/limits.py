"""Where the limits of kernels come from, as far as this server knows."""

from __future__ import annotations

from typing import Any, Literal

Source = Literal["notebook", "panel", "command"]
"""``notebook``: its metadata says so; ``panel``: set there, for as long as the kernel lives; ``command``: by `nbgpu limit`, of whomever."""
Limit = dict[str, Any]
NO_LIMIT: Limit = {"memory_bytes": None, "compute_milli": None}
_MOST = 1000


class Origins:
    """Remembers what this server has set, for each kernel: whatever else is in force was set by a command."""

    def __init__(self) -> None:
        self._set: dict[str, tuple[Limit, Source]] = {}
        self._ended: dict[str, None] = {}

    def remember(self, kernel_id: str, limit: Limit, source: Source) -> None:
        """A limit was set, or with both None removed."""
        self.forget(kernel_id)
        self._set[kernel_id] = {name: limit.get(name) for name in NO_LIMIT}, source
        while len(self._set) > _MOST:
            del self._set[next(iter(self._set))]

    def forget(self, kernel_id: str) -> None:
        """It has no limit of this server's."""
        self._set.pop(kernel_id, None)

    def ended(self, kernel_id: str) -> None:
        """The kernel has ended; its limit goes with it."""
        self.forget(kernel_id)
        self._ended[kernel_id] = None
        while len(self._ended) > _MOST:
            del self._ended[next(iter(self._ended))]

    def has_ended(self, kernel_id: str | None) -> bool:
        """Return whether the kernel has ended: nobody needs to hear that it has no limit any more."""
        return kernel_id in self._ended

    def last(self, kernel_id: str) -> tuple[Limit, Source | None]:
        """Return what this server has set last, and from where."""
        return self._set.get(kernel_id, (NO_LIMIT, None))

    def source(self, kernel_id: str | None, limit: Limit) -> Source | None:
        """Return where the limit in force comes from; None: there is none."""
        in_force = {name: limit.get(name) for name in NO_LIMIT}
        if kernel_id is None or in_force == NO_LIMIT:
            return None
        known, source = self.last(kernel_id)
        return source if known == in_force and source is not None else "command"


ORIGINS = Origins()
"""This process's: kernel provisioners write here too, and have no other way to the server that they run in."""
