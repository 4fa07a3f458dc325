"""Which place: the best score of each node for each need that was asked for, [need, node], renewed only for nodes that have changed."""

from __future__ import annotations

import numpy as np

from .fleet import Asked, Bools, Fleet, Ints, Need, Places, Spot
from .rules import Rule

MOST_NEEDS = 1024
_NOWHERE = -(1 << 62)


class _Block:
    """Rows of the needs for the same number of devices."""

    def __init__(self, fleet: Fleet, device_count: int):
        self.fleet = fleet
        self.singles: list[Asked] = []
        self.all: Asked | None = None
        self.best: Ints = np.zeros((0, len(fleet.nodes)), np.int64)
        self.devices: Ints = np.zeros((0, len(fleet.nodes), device_count), np.int64)
        self.seen: list[int] = []
        self.version: list[int] = []

    def add(self, need: Need) -> int:
        """Add a row; return its number."""
        self.singles.append(Asked(self.fleet, [need]))
        self.all = None
        if len(self.singles) > len(self.best):  # room for as many again
            more = max(8, len(self.best))
            self.best = np.concatenate([self.best, np.full((more, self.best.shape[1]), _NOWHERE, np.int64)])
            self.devices = np.concatenate([self.devices, np.zeros((more, *self.devices.shape[1:]), np.int64)])
        self.seen.append(-1)
        self.version.append(-1)
        return len(self.singles) - 1

    def together(self) -> Asked:
        """Return all needs of the block."""
        if self.all is None:
            self.all = Asked(self.fleet, [one.needs[0] for one in self.singles])
        return self.all

    def note(self, number: Ints, places: Places, scores: Ints) -> None:
        """Note the best score of each row and node, of equals the first device; `number`: which row each of the needs has."""
        key = places.which * self.best.shape[1] + places.nodes
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(key)))
        top = np.flatnonzero(scores == np.maximum.reduceat(scores, starts)[group])
        first = top[np.diff(group[top], prepend=-1) != 0]
        rows, nodes = number[places.which[first]], places.nodes[first]
        self.best[rows, nodes] = scores[first]
        self.devices[rows, nodes] = places.devices[first]


class Chooser:
    """The matrix of scores.

    Parameters
    ----------
    fleet : Fleet
    rule : Rule
        Of the same fleet.
    """

    def __init__(self, fleet: Fleet, rule: Rule):
        self.fleet = fleet
        self.rule = rule
        self._blocks: dict[int, _Block] = {}
        self._rows: dict[Need, tuple[_Block, int]] = {}

    def choose(self, need: Need, barred: Bools | None = None) -> Spot | None:
        """Return the place of `best`, without its score."""
        found = self.best(need, barred)
        return found[1] if found is not None else None

    def best(self, need: Need, barred: Bools | None = None) -> tuple[int, Spot] | None:
        """Return the best score and its place, of equals that on the first node, and there that whose first device is first.

        None: it fits nowhere. Which devices come first: `Fleet.fitting`.

        Parameters
        ----------
        barred : array of bool, [node, device], optional
            Devices that are kept for others.
        """
        if not self.fleet.nodes:
            return None
        if barred is not None:
            block = _Block(self.fleet, need.device_count)
            row = block.add(need)
        else:
            block, row = self._row(need)
        if block.seen[row] != self.fleet.clock or block.version[row] != self.rule.version:
            self._renew(block, row, barred)
        best = block.best[row]
        node = int(best.argmax())
        score = int(best[node])
        return None if score == _NOWHERE else (score, Spot(node, tuple(block.devices[row, node].tolist())))

    def refresh(self) -> None:
        """Renew what changes have made stale: in idle time, so that `best` has only to look.

        All needs together, for the nodes that have changed. Where the rule has other weights nothing is renewed before it is asked for.
        """
        fleet, version = self.fleet, self.rule.version
        for block in self._blocks.values():
            current = [row for row, one in enumerate(block.version) if one == version]
            if not current:
                continue
            since = min(block.seen[row] for row in current)
            nodes = np.flatnonzero(fleet.changed > since)
            if not len(nodes):
                continue
            every = len(current) == len(block.singles)
            asked = block.together() if every else Asked(fleet, [block.singles[row].needs[0] for row in current])
            number = np.array(current, np.int64)
            block.best[number[:, None], nodes] = _NOWHERE
            self._score(block, number, fleet.fitting(asked, nodes))
            for row in current:
                block.seen[row] = fleet.clock

    def _row(self, need: Need) -> tuple[_Block, int]:
        found = self._rows.get(need)
        if found is None:
            if len(self._rows) >= MOST_NEEDS:
                self._rows.clear()
                self._blocks.clear()
            block = self._blocks.setdefault(need.device_count, _Block(self.fleet, need.device_count))
            found = self._rows[need] = block, block.add(need)
        return found

    def _renew(self, block: _Block, row: int, barred: Bools | None) -> None:
        fleet, version = self.fleet, self.rule.version
        nodes = np.flatnonzero(fleet.changed > (block.seen[row] if block.version[row] == version else -1))
        block.best[row, nodes] = _NOWHERE
        self._score(block, np.array([row], np.int64), fleet.fitting(block.singles[row], nodes, barred))
        block.seen[row], block.version[row] = fleet.clock, version

    def _score(self, block: _Block, number: Ints, places: Places) -> None:
        if len(places.nodes):
            block.note(number, places, self.rule.scores(places))
