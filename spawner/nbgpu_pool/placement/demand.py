"""Who is likely to ask: the share of each shape among what has arrived so far, older arrivals counting less. Integers; pure."""

from __future__ import annotations

from collections.abc import Iterable

from .fleet import Need

_FIRST = 1 << 20
_LARGE = 1 << 44


def shape_of(need: Need) -> Need:
    """Return `need` without what does not tell shapes apart: memory goes with compute nearly everywhere."""
    return Need(need.device_count, need.compute_milli, 0, need.cpu_milli, 0, need.models)


class Demand:
    """Shares of shapes.

    Parameters
    ----------
    memory : int
        After how many more arrivals one counts 1/e of what it did.
    offered : iterable of Need
        The profiles on offer, as in `expect`.
    """

    def __init__(self, memory: int, offered: Iterable[Need] = ()):
        self.memory = memory
        self.unit = _FIRST
        self.counts: dict[Need, int] = {}
        self.expect(offered)

    def expect(self, needs: Iterable[Need]) -> None:
        """Count one arrival of each shape of which nothing is known yet."""
        for need in needs:
            self.counts.setdefault(shape_of(need), self.unit)

    def arrived(self, need: Need) -> None:
        """Count an arrival, whether it finds a place or not."""
        shape = shape_of(need)
        self.counts[shape] = self.counts.get(shape, 0) + self.unit
        self.unit += self.unit // self.memory  # newer ones count more: the same as older ones counting less
        if self.unit > _LARGE:
            self.unit >>= 24
            self.counts = {one: count >> 24 for one, count in self.counts.items() if count >> 24}

    def shares(self, one: int) -> dict[Need, int]:
        """Return the share of each shape as integers, of which all together are about `one`."""
        total = sum(self.counts.values())
        return {shape: count * one // total for shape, count in self.counts.items()} if total else {}


def typical(needs: Iterable[Need], one: int, percent: int = 95) -> dict[Need, int]:
    """Return the shares of the most frequent shapes that make up `percent` of all: what FGD knows beforehand of its trace."""
    counts: dict[Need, int] = {}
    for need in needs:
        shape = shape_of(need)
        counts[shape] = counts.get(shape, 0) + 1
    found: dict[Need, int] = {}
    total, covered = sum(counts.values()), 0
    for shape, count in sorted(counts.items(), key=lambda item: -item[1]):
        if covered * 100 >= total * percent:
            break
        found[shape] = count
        covered += count
    return {shape: count * one // covered for shape, count in found.items()}
