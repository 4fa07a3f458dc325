"""The rule `ours` over the service's rooms; needs NumPy, and is imported only where the configuration names that rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

import numpy as np

from ..shapes import Part, Want, resolve, within
from .best_fit import Place, Room
from .chooser import Chooser
from .fleet import Fleet, Gpu, Need, Node, evenly
from .rules import Ours

MOST_WANTS = 1024
MOST_KEPT = 16
"""Wants whose place is kept up to date."""


class Valued:
    """Rooms of nodes that are there, valued by who is likely to ask.

    Parameters
    ----------
    rooms : mapping
        In a fixed order; the nodes come as `evenly` says.
    before : Valued, optional
        What it has learnt of demand is kept.
    """

    def __init__(self, rooms: Mapping[str, Room], before: Valued | None = None):
        listed: dict[str, list[Room]] = {}
        for room in rooms.values():
            if not room.coming:
                listed.setdefault(room.device.node, []).append(room)
        nodes = [Node([Gpu(_kind(room), max(room.device.usable_bytes, 1)) for room in node]) for node in listed.values()]
        turn, names = evenly(nodes), list(listed)
        self._nodes = {names[index]: listed[names[index]] for index in turn}
        self._row = {node: row for row, node in enumerate(self._nodes)}
        self._rooms = list(self._nodes.values())
        self._at = {room.device.uuid: (row, column) for row, node in enumerate(self._rooms) for column, room in enumerate(node)}
        self._kinds = {_kind(room): room for node in self._rooms for room in node}
        self._needs: dict[Want, list[tuple[Need, Part, int]]] = {}
        self.fleet = Fleet([nodes[index] for index in turn])
        for node in self._nodes:
            self.changed(node)
        self.rule = Ours(self.fleet, learnt=before.rule if before is not None else None)
        self.chooser = Chooser(self.fleet, self.rule)
        self._kept: dict[Want, Place | None] = {}
        self._kept_at = (-1, -1)
        """The fleet's clock and the rule's version when those were found."""

    def changed(self, node: str) -> None:
        """Take over what has changed of a node's rooms."""
        row = self._row.get(node)
        if row is None:
            return
        there = [(room.free_milli, room.free_bytes) if room.device.healthy else (-1, -1) for room in self._rooms[row]]
        self.fleet.put(row, [milli for milli, _ in there], [memory for _, memory in there])

    def arrived(self, want: Want) -> None:
        """Learn that somebody asks; where it means other parts on other models, that is several shapes. `refresh` does the rest."""
        for need, *_ in self._meant(want):
            self.rule.note(need)

    def place(self, want: Want, barred: Set[str], cap: Part | None) -> Place | None:
        """Return the place with the best score; None: none was found."""
        if not barred and cap is None:
            if self._kept_at == (self.fleet.clock, self.rule.version) and want in self._kept:
                return self._kept[want]
            if want not in self._kept and len(self._kept) >= MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            found = self._kept[want] = self._look(want, barred, cap)  # of another moment than the others it is void until `refresh`
            return found
        return self._look(want, barred, cap)

    def refresh(self) -> None:
        """Renew weights where it is time, and find the places of what is asked for: when there is time, as it takes 100 times a look."""
        self.rule.renew()
        at = self.fleet.clock, self.rule.version
        if self._kept_at != at:
            self.chooser.refresh()
            self._kept = {want: self._look(want, frozenset(), None) for want in self._kept}
            self._kept_at = at

    def _look(self, want: Want, barred: Set[str], cap: Part | None) -> Place | None:
        kept = None
        if barred:
            kept = np.zeros(self.fleet.left.shape, np.bool_)
            for uuid in barred:
                if uuid in self._at:
                    kept[self._at[uuid]] = True
        best: tuple[int, int, Place] | None = None
        for need, part, usable_bytes in self._meant(want):
            if not within(part, usable_bytes, cap):  # by the smallest device that is meant, where it counts most
                continue
            found = self.chooser.best(need, kept)
            if found is not None and (best is None or (-found[0], found[1].node) < best[:2]):
                rooms = self._rooms[found[1].node]
                best = -found[0], found[1].node, [(rooms[column], part) for column in found[1].devices]
        return best[2] if best is not None else None

    def _meant(self, want: Want) -> list[tuple[Need, Part, int]]:
        if want not in self._needs:
            if len(self._needs) >= MOST_WANTS:
                self._needs.clear()
            self._needs[want] = list(self._resolved(want))
        return self._needs[want]

    def _resolved(self, want: Want) -> Iterator[tuple[Need, Part, int]]:
        kinds: dict[Part, list[str]] = {}
        for kind, room in self._kinds.items():
            part = resolve(want, room.device)
            if part is not None:
                kinds.setdefault(part, []).append(kind)
        for part, accepted in kinds.items():
            models = None if len(accepted) == len(self._kinds) else frozenset(accepted)
            smallest = min(self._kinds[kind].device.usable_bytes for kind in accepted)
            yield Need(want.device_count, part.compute_milli, part.memory_bytes, models=models), part, smallest


def _kind(room: Room) -> str:
    """Return what decides which part a request means on a device."""
    return f"{room.device.model}, {room.device.usable_bytes}"
