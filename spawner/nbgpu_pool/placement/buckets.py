"""Rooms by what is left of them: of thousands of devices only a few dozen differ, so that a place is found without looking at each.

The same place as `best_fit.place` finds, for one device: a test compares them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from ..shapes import Part, Want, resolve
from .best_fit import Place, Policy, Room, scarce, score


class State(NamedTuple):
    """All of a room that decides how well something fits there."""

    model: str
    usable_bytes: int
    free_bytes: int
    free_milli: int
    has_binary: bool
    has_thirds: bool
    idle_count: int
    """Of an idle device: how many of its node are; else 0."""
    coming: bool


class Buckets:
    """Rooms by state.

    Parameters
    ----------
    rooms : mapping
        In the fixed order of placement.
    """

    def __init__(self, rooms: Mapping[str, Room]):
        self._rooms = list(rooms.values())
        self._rank = {uuid: rank for rank, uuid in enumerate(rooms)}
        self._nodes: dict[str, list[int]] = {}
        for rank, room in enumerate(self._rooms):
            self._nodes.setdefault(room.device.node, []).append(rank)
        self._state: list[State | None] = [None] * len(self._rooms)
        self._ranks: dict[State, list[int]] = {}
        self._count = sum(not room.coming for room in self._rooms)
        for node in self._nodes:
            self.changed(node)

    def changed(self, node: str) -> None:
        """Take over what has changed of a node's rooms."""
        ranks = self._nodes.get(node, ())
        idle = sum(self._rooms[rank].part_count == 0 for rank in ranks)
        for rank in ranks:
            state = self._of(self._rooms[rank], idle)
            old = self._state[rank]
            if state == old:
                continue
            if old is not None:
                bucket = self._ranks[old]
                del bucket[bisect_left(bucket, rank)]
                if not bucket:
                    del self._ranks[old]
            self._state[rank] = state
            if state is not None:
                insort(self._ranks.setdefault(state, []), rank)

    def _of(self, room: Room, idle: int) -> State | None:
        device = room.device
        if not device.healthy or room.free_milli <= 0:
            return None
        return State(
            device.model,
            device.usable_bytes,
            room.free_bytes,
            room.free_milli,
            room.binary_count > 0,
            room.thirds_count > 0,
            idle if room.part_count == 0 else 0,
            room.coming,
        )

    def of(self, nodes: Iterable[str]) -> list[Room]:
        """Return the rooms of some nodes, in the fixed order."""
        return [self._rooms[rank] for rank in sorted(rank for node in nodes for rank in self._nodes.get(node, ()))]

    def place(self, want: Want, barred: Set[str], cap: Part | None, policy: Policy, *, coming: bool) -> Place | None:
        """Return the best place for `want`, of one device."""
        out = {self._rank[uuid] for uuid in barred if uuid in self._rank}
        best: tuple[tuple[int, ...], int, Part] | None = None
        idle = sum(len(ranks) for state, ranks in self._ranks.items() if state.idle_count and not state.coming)
        last_idle = scarce(idle, self._count)
        for state, ranks in self._ranks.items():
            first = self._rooms[ranks[0]]
            part = resolve(want, first.device)
            if state.coming != coming or part is None or not first.fits(part):
                continue
            if cap is not None and (part.memory_bytes > cap.memory_bytes or part.compute_milli > cap.compute_milli):
                continue
            value = *score(first, part, policy, last_idle), state.idle_count
            if best is not None and value > best[0]:
                continue
            rank = next((one for one in ranks if one not in out), None)
            if rank is not None and (best is None or (value, rank) < best[:2]):
                best = value, rank, part
        return [(self._rooms[best[1]], best[2])] if best is not None else None


def of_each_kind(rooms: Iterable[Room]) -> list[Room]:
    """Return the rooms of one node of each kind: nodes with the same models and sizes can hold the same."""
    nodes: dict[str, list[Room]] = {}
    for room in rooms:
        nodes.setdefault(room.device.node, []).append(room)
    kinds = {tuple((room.device.model, room.device.usable_bytes) for room in node): node for node in nodes.values()}
    return [room for node in kinds.values() for room in node]
