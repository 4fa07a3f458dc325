"""Nodes and devices as integers in arrays, changed in place by what is taken and given back. Pure; needs NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nbgpu.quantities import WHOLE_MILLI

from .best_fit import family

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
PLENTY = 1 << 40
"""What a node has of what is not known of it."""


class Need(NamedTuple):
    """What a request takes: of its node, and of each of its devices, which are all on one node and of one model."""

    device_count: int
    compute_milli: int
    memory_bytes: int = 0
    cpu_milli: int = 0
    ram_bytes: int = 0
    models: frozenset[str] | None = None
    """Any of these; None: any at all."""
    labels: frozenset[tuple[str, str]] = frozenset()
    """That the node must have."""

    @property
    def total_milli(self) -> int:
        """Return the compute of all devices together."""
        return self.device_count * self.compute_milli


class Kind(NamedTuple):
    """What decides which devices can serve a need."""

    device_count: int
    compute_milli: int
    models: frozenset[str] | None


class Gpu(NamedTuple):
    """One device, empty."""

    model: str
    memory_bytes: int = 0
    """0: not known, and not looked at."""
    size_milli: int = WHOLE_MILLI
    """Of a fixed partition less than a whole device's."""
    fixed: bool = False
    """A partition: whoever gets a part of it gets all of it."""


@dataclass(frozen=True)
class Node:
    """One node, empty."""

    gpus: Sequence[Gpu]
    cpu_milli: int | None = None
    """None: not known, and not looked at."""
    ram_bytes: int | None = None
    labels: frozenset[tuple[str, str]] = frozenset()


class Spot(NamedTuple):
    """Where a need goes."""

    node: int
    devices: tuple[int, ...]


class Taken(NamedTuple):
    """What a need has at its spot: `Fleet.give_back` undoes it."""

    spot: Spot
    need: Need
    milli: tuple[int, ...]
    bytes: tuple[int, ...]


class Places(NamedTuple):
    """Where needs fit: one entry for each place, by need, then node, then (first) device."""

    which: Ints
    """[place]: which of the needs."""
    nodes: Ints
    devices: Ints
    """[place, device]"""
    total_milli: Ints
    """What the need takes in all."""
    cpu_after: Ints
    """What its node has left then."""
    free_after: Ints
    """[place, device]: milli-GPU that are free then."""
    bytes_after: Ints
    left_after: Ints
    """[place, device]: what can still be used of it then, as `Fleet.left`."""
    family: Ints
    """Of the need's part, as `best_fit.family`; of a whole device 0: it mixes with nothing."""


class Asked:
    """Needs for the same number of devices, as arrays, [need].

    Parameters
    ----------
    fleet : Fleet
    needs : sequence of Need
        At least one.
    """

    def __init__(self, fleet: Fleet, needs: Sequence[Need]):
        self.needs = list(needs)
        self.device_count = needs[0].device_count
        self.milli: Ints = np.array([need.compute_milli for need in needs], np.int64)
        self.memory: Ints = np.array([need.memory_bytes for need in needs], np.int64)
        self.cpu: Ints = np.array([need.cpu_milli for need in needs], np.int64)
        self.ram: Ints = np.array([need.ram_bytes for need in needs], np.int64)
        self.family: Ints = np.array([family(need.compute_milli) if need.compute_milli < WHOLE_MILLI else 0 for need in needs], np.int64)
        self.accepts: Bools = np.array([fleet.accepts(need.models) for need in needs], np.bool_)
        self.labelled: Bools | None = None
        if any(need.labels for need in needs):
            self.labelled = np.array([fleet.with_labels(need.labels) for need in needs], np.bool_)


class Fleet:
    """What is left of each node and device.

    Parameters
    ----------
    nodes : sequence of Node
        In the fixed order in which ties are broken.

    Attributes
    ----------
    free_milli, free_bytes : array of int, [node, device]
        -1 where a node has no such device.
    left : array of int, [node, device]
        What of a device can still be used, in milli-GPU: the scarcer of compute and memory.
    held : array of int, [node, device, 3]
        How many parts are on it; of those, of halves, quarters and eighths, and of thirds.
    cpu, ram : array of int, [node]
    changed : array of int, [node]
        `clock` at the node's last change.
    """

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = list(nodes)
        count, width = len(self.nodes), max((len(node.gpus) for node in self.nodes), default=0)
        self.models = sorted({gpu.model for node in self.nodes for gpu in node.gpus})
        number = {model: index for index, model in enumerate(self.models)}
        self.free_milli: Ints = np.full((count, width), -1, np.int64)
        self.free_bytes: Ints = np.full((count, width), -1, np.int64)
        self.size_milli: Ints = np.zeros((count, width), np.int64)
        self.size_bytes: Ints = np.zeros((count, width), np.int64)
        self.model: Ints = np.zeros((count, width), np.int64)
        self.fixed: Bools = np.zeros((count, width), np.bool_)
        self.held: Ints = np.zeros((count, width, 3), np.int64)
        self.cpu: Ints = np.array([PLENTY if node.cpu_milli is None else node.cpu_milli for node in self.nodes], np.int64)
        self.ram: Ints = np.array([PLENTY if node.ram_bytes is None else node.ram_bytes for node in self.nodes], np.int64)
        for row, node in enumerate(self.nodes):
            for column, gpu in enumerate(node.gpus):
                self.free_milli[row, column] = self.size_milli[row, column] = gpu.size_milli
                self.free_bytes[row, column] = self.size_bytes[row, column] = gpu.memory_bytes or PLENTY
                self.model[row, column] = number[gpu.model]
                self.fixed[row, column] = gpu.fixed
        self.mixed = any(len({gpu.model for gpu in node.gpus}) > 1 for node in self.nodes)
        self.left: Ints = np.zeros((count, width), np.int64)
        self.alike: Bools = np.zeros((count, width), np.bool_)
        """An earlier device of the node is the same and has the same left."""
        self.changed: Ints = np.zeros(count, np.int64)
        self.clock = 0
        self._accepts: dict[frozenset[str] | None, Bools] = {}
        self._labelled: dict[frozenset[tuple[str, str]], Bools] = {}
        for row in range(count):
            self._renew(row)

    @property
    def capacity_milli(self) -> int:
        """Return the compute of all devices, empty."""
        return int(self.size_milli.sum())

    def take(self, spot: Spot, need: Need) -> Taken:
        """Book `need` at `spot`.

        Raises
        ------
        ValueError
            It does not fit there.
        """
        if not self._fits(spot, need):
            raise ValueError(f"{need} does not fit on {spot}")
        row, columns = spot.node, list(spot.devices)
        milli = [int(self.free_milli[row, one]) if self.fixed[row, one] else need.compute_milli for one in columns]
        memory = [int(self.free_bytes[row, one]) if self.fixed[row, one] else need.memory_bytes for one in columns]
        taken = Taken(spot, need, tuple(milli), tuple(memory))
        self._book(taken, 1)
        return taken

    def give_back(self, taken: Taken) -> None:
        """Undo `take`."""
        self._book(taken, -1)

    def put(self, row: int, free_milli: Sequence[int], free_bytes: Sequence[int]) -> None:
        """Set what is free on a node's devices, as somebody else counts it; nothing goes on a device with less than 1 milli-GPU."""
        self.free_milli[row, : len(free_milli)] = free_milli
        self.free_bytes[row, : len(free_bytes)] = free_bytes
        self._renew(row)

    def _book(self, taken: Taken, sign: int) -> None:
        row, columns = taken.spot.node, list(taken.spot.devices)
        if columns:
            self.free_milli[row, columns] -= sign * np.array(taken.milli, np.int64)
            self.free_bytes[row, columns] -= sign * np.array(taken.bytes, np.int64)
            self.held[row, columns, 0] += sign
            self.held[row, columns, 1] += sign * (family(taken.need.compute_milli) == 1)
            self.held[row, columns, 2] += sign * (family(taken.need.compute_milli) == 3)
        self.cpu[row] -= sign * taken.need.cpu_milli
        self.ram[row] -= sign * taken.need.ram_bytes
        self._renew(row)

    def _renew(self, row: int) -> None:
        self.left[row] = self._left(row, self.free_milli[row], self.free_bytes[row])
        held = (self.held[row] > 0).astype(np.int64)
        size = self.size_milli[row], self.size_bytes[row]
        look = (self.free_milli[row], self.free_bytes[row], *size, self.model[row], self.fixed[row], *held.T)
        seen: set[tuple[int, ...]] = set()
        for column, key in enumerate(zip(*(array.tolist() for array in look), strict=True)):
            self.alike[row, column] = key in seen
            seen.add(key)
        self.clock += 1
        self.changed[row] = self.clock

    def _left(self, where: Any, free_milli: Ints, free_bytes: Ints) -> Ints:
        """Return what can still be used of devices that have so much left; `where` says which they are."""
        size_milli, size_bytes = self.size_milli[where], self.size_bytes[where]
        left = np.minimum(free_milli, free_bytes * size_milli // np.maximum(size_bytes, 1))
        return np.where(self.fixed[where] & (free_milli < size_milli), 0, np.maximum(left, 0))

    def accepts(self, models: frozenset[str] | None) -> Bools:
        """Return for each model whether it is one of `models`."""
        if models not in self._accepts:
            self._accepts[models] = np.array([models is None or model in models for model in self.models], np.bool_)
        return self._accepts[models]

    def with_labels(self, labels: frozenset[tuple[str, str]]) -> Bools:
        """Return for each node whether it has these labels."""
        if labels not in self._labelled:
            self._labelled[labels] = np.array([labels <= node.labels for node in self.nodes], np.bool_)
        return self._labelled[labels]

    def _fits(self, spot: Spot, need: Need) -> bool:
        row, columns = spot.node, list(spot.devices)
        if self.cpu[row] < need.cpu_milli or self.ram[row] < need.ram_bytes or not need.labels <= self.nodes[row].labels:
            return False
        if len(set(columns)) != need.device_count or not self.accepts(need.models)[self.model[row, columns]].all():
            return False
        free = self.free_milli[row, columns]
        whole = ~self.fixed[row, columns] | (free == self.size_milli[row, columns])
        return bool((whole & (free >= need.compute_milli) & (self.free_bytes[row, columns] >= need.memory_bytes)).all())

    def fitting(self, asked: Asked, rows: Ints, barred: Bools | None = None) -> Places:
        """Return where needs fit on the nodes `rows`, which rise.

        A node comes once for each device that differs from its others; for needs of several devices once for each model, with the devices
        that have least left, tightest first. Of two places on a node that comes first whose first device does.

        Parameters
        ----------
        barred : array of bool, [node, device], optional
            Devices kept for others.
        """
        there = (self.cpu[rows] >= asked.cpu[:, None]) & (self.ram[rows] >= asked.ram[:, None])
        if asked.labelled is not None:
            there &= asked.labelled[:, rows]
        which, place = np.nonzero(there)
        nodes = rows[place]
        if asked.device_count == 0:
            return self._places(asked, which, nodes, np.zeros((len(nodes), 0), np.int64))
        free = self.free_milli[nodes]
        ok = (free >= np.maximum(asked.milli, 1)[which, None]) & (self.free_bytes[nodes] >= asked.memory[which, None])
        ok &= asked.accepts[which[:, None], self.model[nodes]] & (~self.fixed[nodes] | (free == self.size_milli[nodes]))
        if barred is not None:
            ok &= ~barred[nodes]
        if asked.device_count == 1:
            place, column = np.nonzero(ok & ~self.alike[nodes] if barred is None else ok)
            return self._places(asked, which[place], nodes[place], column[:, None])
        if not self.mixed:
            return self._places(asked, *self._tightest(which, nodes, ok, asked.device_count))
        parts = [self._tightest(which, nodes, ok & (self.model[nodes] == model), asked.device_count) for model in range(len(self.models))]
        which, nodes = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        devices = np.concatenate([part[2] for part in parts])
        place = np.lexsort((devices[:, 0], nodes, which))
        return self._places(asked, which[place], nodes[place], devices[place])

    def _tightest(self, which: Ints, nodes: Ints, ok: Bools, count: int) -> tuple[Ints, Ints, Ints]:
        width = int(ok.shape[1])
        enough = np.flatnonzero(np.count_nonzero(ok, axis=1) >= count)
        which, nodes = which[enough], nodes[enough]
        fits: Bools = ok[enough]
        if not len(nodes):
            return which, nodes, np.zeros((0, count), np.int64)
        key = np.full(fits.shape, PLENTY, np.int64)
        number: Ints = np.arange(width, dtype=np.int64)
        np.copyto(key, self.left[nodes] * width + number, where=fits)
        return which, nodes, np.argsort(key, axis=1, kind="stable")[:, :count]

    def _places(self, asked: Asked, which: Ints, nodes: Ints, devices: Ints) -> Places:
        where = nodes[:, None], devices
        fixed = self.fixed[where]
        free = np.where(fixed, 0, self.free_milli[where] - asked.milli[which, None])
        memory = np.where(fixed, 0, self.free_bytes[where] - asked.memory[which, None])
        total, cpu = asked.device_count * asked.milli[which], self.cpu[nodes] - asked.cpu[which]
        return Places(which, nodes, devices, total, cpu, free, memory, self._left(where, free, memory), asked.family[which])


def kinds_of(needs: Iterable[Need]) -> list[Kind]:
    """Return the kinds of those needs that want a device, each once, in a fixed order."""
    kinds = {Kind(need.device_count, need.compute_milli, need.models) for need in needs if need.device_count}
    return sorted(kinds, key=lambda kind: (kind.device_count, kind.compute_milli, sorted(kind.models or ()), kind.models is None))


def evenly(nodes: Sequence[Node]) -> list[int]:
    """Return an order of nodes in which each kind is spread evenly over the whole, whatever order they are listed in.

    Ties go to the first nodes: where all of one kind come first, those that need just them find them full. Nodes of a kind are
    interchangeable, and stay in the order in which they are listed.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, node in enumerate(nodes):
        known = [-1 if amount is None else amount for amount in (node.cpu_milli, node.ram_bytes)]
        kinds.setdefault((len(node.gpus), tuple(node.gpus), *known, tuple(sorted(node.labels))), []).append(index)
    spread = [
        (Fraction(2 * rank + 1, 2 * len(kinds[kind])), number, index)
        for number, kind in enumerate(sorted(kinds))
        for rank, index in enumerate(kinds[kind])
    ]
    return [index for *_, index in sorted(spread)]
