"""What the free GPU of a node is worth to those who are likely to ask. Integers; needs NumPy.

::

    V(node) = sum over shapes m of  w_m [m fits the node] * usable_m(node)
    usable_m(node) = what is free on those of its devices that have room for m's part

With `cpu_limits` GPU that the node's CPU cannot feed counts half: 1/2 (usable_m + min(usable_m, cpu_left / cpu_m * gpu_m)).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np

from nbgpu.quantities import WHOLE_MILLI

from .fleet import Fleet, Ints, Kind, Need, Places, kinds_of

BITS = 28
ONE = 1 << BITS
"""A share or weight of 1."""


def scarcity(free: int, usable: int, most: int) -> int:
    """Return ``min(most, (free / usable) ** 1.5)``, in units of `ONE`, without rounding errors that differ between machines."""
    if usable <= 0:
        return most * ONE
    return min(most * ONE, isqrt((free**3 << 2 * BITS) // usable**3))


class Values:
    """V of every node of a fleet, renewed for those that have changed.

    Parameters
    ----------
    fleet : Fleet
    shapes : sequence of Need
        Who may ask; weights come by `weigh`.
    cpu_limits : bool
        Whether GPU that CPU cannot feed counts half.

    Notes
    -----
    Shapes differ in far more than decides how much GPU they can use, which is the same for all of a kind (devices, part, models). So the
    weights are summed by kind, cumulated over the CPU that a shape takes: what of a kind fits is one look-up.
    """

    def __init__(self, fleet: Fleet, shapes: Sequence[Need], *, cpu_limits: bool):
        self.fleet = fleet
        self.shapes = [shape for shape in shapes if shape.device_count]
        self.cpu_limits = cpu_limits
        kinds = kinds_of(self.shapes)
        number = {kind: index for index, kind in enumerate(kinds)}
        self.kind: Ints = np.array([number[Kind(shape.device_count, shape.compute_milli, shape.models)] for shape in self.shapes], np.int64)
        self.cpu: Ints = np.array([shape.cpu_milli for shape in self.shapes], np.int64)
        self.device_count: Ints = np.array([kind.device_count for kind in kinds], np.int64)
        self.total: Ints = np.array([kind.device_count * kind.compute_milli for kind in kinds], np.int64)
        parts = np.array([kind.compute_milli for kind in kinds], np.int64)
        left = np.arange(WHOLE_MILLI + 1, dtype=np.int64)[:, None]
        self.room: Ints = (left >= parts).astype(np.int64)
        """[left of a device, kind]: whether it has room for one part."""
        self.worth: Ints = self.room * left
        self.accepts: Ints = np.zeros((len(fleet.models), len(kinds)), np.int64)
        """[model, kind]"""
        for column, kind in enumerate(kinds):
            self.accepts[:, column] = fleet.accepts(kind.models)
        self._every = np.arange(len(kinds))
        self._cpus = np.unique(self.cpu)
        most = int(self._cpus[-1]) if len(self._cpus) else 0
        self._rank: Ints = np.searchsorted(self._cpus, np.arange(most + 1), side="right").astype(np.int64)
        """[cpu]: how many of the different amounts of CPU are no more than it."""
        count = len(fleet.nodes)
        self.sums: Ints = np.zeros((count, len(kinds)), np.int64)
        self.rooms: Ints = np.zeros((count, len(kinds)), np.int64)
        self.value: Ints = np.zeros(count, np.int64)
        """Twice V, in units of `ONE`."""
        self._seen = -1
        self._valued = -1
        self.weigh([0] * len(self.shapes))

    def weigh(self, weights: Sequence[int]) -> None:
        """Set w of each of `shapes`, in units of `ONE`."""
        self.weights = list(weights)
        rows = np.searchsorted(self._cpus, self.cpu) + 1
        self._fit: Ints = np.zeros((len(self._cpus) + 1, len(self._every)), np.int64)
        self._fed: Ints = np.zeros_like(self._fit)
        amounts = np.array(self.weights, np.int64)
        np.add.at(self._fit, (rows, self.kind), amounts)
        np.add.at(self._fed, (rows, self.kind), np.where(self.cpu > 0, amounts * self.total[self.kind] // np.maximum(self.cpu, 1), 0))
        self._fit, self._fed = self._fit.cumsum(axis=0), self._fed.cumsum(axis=0)
        self._valued = -1

    def usable(self, sums: Ints, rooms: Ints) -> Ints:
        """Return what each kind can use of nodes, [place, kind]."""
        return np.where(rooms >= self.device_count, sums, 0)

    def of(self, usable: Ints, cpu: Ints) -> Ints:
        """Return twice V of nodes on which so much is usable, [place, kind], and so much CPU left, [place]."""
        cpu = np.maximum(cpu, 0)
        rank = self._rank[np.minimum(cpu, len(self._rank) - 1)]
        fit = self._fit[rank]
        if not self.cpu_limits:
            return 2 * (usable * fit).sum(axis=1)
        # A shape that takes no more CPU than this is fed on all that it can use; of one that takes more, CPU is the limit.
        enough = np.minimum(cpu[:, None] * self.total // np.maximum(usable, 1), cpu[:, None])
        fed = self._rank[np.minimum(enough, len(self._rank) - 1)]
        whole = self._fit[fed, self._every]
        limited = np.where(usable > 0, self._fed[rank] - self._fed[fed, self._every], 0)
        return (usable * (fit + whole)).sum(axis=1) + np.where(limited > 0, cpu[:, None] * limited, 0).sum(axis=1)

    def follow(self) -> None:
        """Take over what has changed in the fleet."""
        fleet = self.fleet
        rows = np.flatnonzero(fleet.changed > self._seen)
        if len(rows):
            left, accepts = fleet.left[rows], self.accepts[fleet.model[rows]]
            self.sums[rows] = (self.worth[left] * accepts).sum(axis=1)
            self.rooms[rows] = (self.room[left] * accepts).sum(axis=1)
            self._seen = fleet.clock
        if self._valued < 0:
            rows = np.arange(len(fleet.nodes))
        if len(rows):
            self.value[rows] = self.of(self.usable(self.sums[rows], self.rooms[rows]), fleet.cpu[rows])
            self._valued = fleet.clock

    def gain(self, places: Places) -> Ints:
        """Return by how much twice V grows (it shrinks) where a need comes to its place, [place]."""
        nodes, devices, after = places.nodes, places.devices, places.left_after
        fleet, sums, rooms = self.fleet, self.sums[nodes], self.rooms[nodes]
        if devices.shape[1]:
            before, accepts = fleet.left[nodes[:, None], devices], self.accepts[fleet.model[nodes, devices[:, 0]]]
            sums = sums + accepts * (self.worth[after] - self.worth[before]).sum(axis=1)
            rooms = rooms + accepts * (self.room[after] - self.room[before]).sum(axis=1)
        return self.of(self.usable(sums, rooms), places.cpu_after) - self.value[nodes]

    def usable_by_shape(self) -> list[int]:
        """Return how much of the fleet's free GPU each shape can use."""
        usable = self.usable(self.sums, self.rooms)
        fits = self.fleet.cpu[:, None] >= self.cpu
        return [int(one) for one in (usable[:, self.kind] * fits).sum(axis=0)]
