"""Where the limits of kernels come from, as far as this server knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from nbgpu.errors import InvalidValue
from nbgpu.quantities import parse_fraction

Source = Literal["notebook", "panel", "command"]
"""``notebook``: its metadata says so; ``panel``: set there, for as long as the kernel lives; ``command``: by `nbgpu limit`, of whomever."""
Limit = dict[str, Any]
NO_LIMIT: Limit = {"memory_bytes": None, "compute_milli": None}
_MOST = 1000


class Origins:
    """Remembers what this server has set, for each kernel: whatever else is in force was set by a command."""

    def __init__(self) -> None:
        self._set: dict[str, tuple[Limit, Source]] = {}
        self._parts: dict[str, int] = {}
        self._ended: dict[str, None] = {}

    def remember(self, kernel_id: str, limit: Limit, source: Source, asked: object = None) -> None:
        """A limit was set, or with both None removed; `asked` is how a person wrote it (`nbgpu.kernel_limits`)."""
        part = _part(asked)
        if part is None and limit.get("compute_milli") == self.last(kernel_id)[0]["compute_milli"]:
            part = self._parts.get(kernel_id)  # that of the memory alone was changed
        self.forget(kernel_id)
        self._set[kernel_id] = {name: limit.get(name) for name in NO_LIMIT}, source
        if part is not None:
            self._parts[kernel_id] = part
        while len(self._set) > _MOST:
            self.forget(next(iter(self._set)))

    def forget(self, kernel_id: str) -> None:
        """It has no limit of this server's."""
        self._set.pop(kernel_id, None)
        self._parts.pop(kernel_id, None)

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

    def part_milli(self, kernel_id: str | None, limit: Limit) -> int | None:
        """Return what part of the slice's time was asked for, in thousandths; what is in force is whole thousandths of the GPU's.

        None: nobody asked for a part, or something else is in force since.
        """
        if kernel_id is None or self.last(kernel_id)[0]["compute_milli"] != limit.get("compute_milli"):
            return None
        return self._parts.get(kernel_id)


def _part(asked: object) -> int | None:
    """Return the part of the slice's time that is asked for in words, in thousandths."""
    try:
        return parse_fraction(cast("Mapping[str, Any]", asked)["compute"]) if isinstance(asked, Mapping) else None
    except (KeyError, InvalidValue):
        return None


ORIGINS = Origins()
"""This process's: kernel provisioners write here too, and have no other way to the server that they run in."""
