"""Rooms by what is left of them: of thousands of devices only a few dozen differ, so that a place is found without looking at each.

The same place as `best_fit.place` finds, for one device: a test compares them. The places of what was asked for last are kept: a change
is compared with them when there is time (`refresh`), so that most decisions are one look.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from ..shapes import Part, Want, resolve, within
from .best_fit import Place, Policy, Room, scarce, score

MOST_KEPT = 16
"""Wants whose place is kept."""


class Best(NamedTuple):
    """The place of a want, nobody being barred from any; the less the better."""

    value: tuple[int, ...]
    rank: int
    part: Part


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
        self._idle = 0
        """Idle devices that are there."""
        self._kept: dict[tuple[Want, Policy], Best | None] = {}
        self._kept_scarce = False
        """Whether idle devices were scarce for those."""
        self._touched: set[int] = set()
        """Ranks that have changed since."""
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
            self._touched.add(rank)
            self._idle += _idle(state) - _idle(old)
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
        if not coming:
            if self._touched:
                self.refresh()
            key = want, policy
            best = self._kept.get(key, _UNKNOWN)
            if best is _UNKNOWN:
                if len(self._kept) >= MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                best = self._kept[key] = self._look(want, frozenset(), None, policy, coming=False)
            if best is None:
                return None
            room, part = self._rooms[best.rank], best.part
            if (not barred or room.device.uuid not in barred) and within(part, room.device.usable_bytes, cap):
                return [(room, part)]
        best = self._look(want, barred, cap, policy, coming=coming)
        return [(self._rooms[best.rank], best.part)] if best is not None else None

    def refresh(self) -> None:
        """Bring the places that are kept up to date: when there is time, else the next decision does."""
        last_idle = scarce(self._idle, self._count)
        touched, self._touched = self._touched, set()
        for key, best in self._kept.items():
            want, policy = key
            if last_idle != self._kept_scarce or (best is not None and best.rank in touched):
                best = self._look(want, frozenset(), None, policy, coming=False)
            else:
                for rank in touched:
                    better = self._value(rank, want, policy, last_idle)
                    if better is not None and (best is None or better[:2] < best[:2]):
                        best = better
            self._kept[key] = best
        self._kept_scarce = last_idle

    def _value(self, rank: int, want: Want, policy: Policy, last_idle: bool) -> Best | None:
        """Return how good a room is for `want`; None where it does not fit."""
        room, state = self._rooms[rank], self._state[rank]
        part = resolve(want, room.device)
        if state is None or state.coming or part is None or not room.fits(part):
            return None
        return Best((*score(room, part, policy, last_idle), state.idle_count), rank, part)

    def _look(self, want: Want, barred: Set[str], cap: Part | None, policy: Policy, *, coming: bool) -> Best | None:
        """Look at each state."""
        out = {self._rank[uuid] for uuid in barred if uuid in self._rank}
        best: Best | None = None
        last_idle = scarce(self._idle, self._count)
        for state, ranks in self._ranks.items():
            first = self._rooms[ranks[0]]
            part = resolve(want, first.device)
            if state.coming != coming or part is None or not first.fits(part) or not within(part, state.usable_bytes, cap):
                continue
            value = *score(first, part, policy, last_idle), state.idle_count
            if best is not None and value > best.value:
                continue
            rank = next((one for one in ranks if one not in out), None) if out else ranks[0]
            if rank is not None and (best is None or (value, rank) < best[:2]):
                best = Best(value, rank, part)
        return best


_UNKNOWN = Best((), -1, Part(0, 0))


def _idle(state: State | None) -> bool:
    return state is not None and state.idle_count > 0 and not state.coming


def of_each_kind(rooms: Iterable[Room]) -> list[Room]:
    """Return the rooms of one node of each kind: nodes with the same models and sizes can hold the same."""
    nodes: dict[str, list[Room]] = {}
    for room in rooms:
        nodes.setdefault(room.device.node, []).append(room)
    kinds = {tuple((room.device.model, room.device.usable_bytes) for room in node): node for node in nodes.values()}
    return [room for node in kinds.values() for room in node]
