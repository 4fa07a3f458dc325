"""How good a place is: best fit, FGD, and the value of what stays free to those who are likely to ask (docs/placement.md).

A rule gives each place an integer, the greater the better; ties go to the first node of the fixed order (`chooser`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from nbgpu.quantities import WHOLE_MILLI

from .best_fit import scarce
from .demand import Demand
from .fleet import Fleet, Ints, Need, Places
from .remainders import worth
from .values import BITS, ONE, Values, scarcity


class Rule(Protocol):
    """What the chooser asks."""

    name: str

    @property
    def version(self) -> int:
        """Another one: scores of any other are void."""
        ...

    def arrived(self, need: Need) -> None:
        """Learn that somebody asks, before a place is chosen."""
        ...

    def scores(self, places: Places) -> Ints:
        """Return the score of each place."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Return the parameters."""
        ...


def hash_of(rule: Rule) -> str:
    """Return a short hash of a rule's name and parameters."""
    return hashlib.sha256(json.dumps([rule.name, dict(rule.describe())], sort_keys=True).encode()).hexdigest()[:12]


class BestFit:
    """What leaves least on the devices that it takes; sizes that do not tile apart; the last idle devices kept.

    The same as `best_fit.place` for needs of one device: a test compares them.
    """

    name = "best fit"

    def __init__(self, fleet: Fleet, *, keep_thirds_apart: bool = True, keep_last_idle: bool = True):
        self.fleet = fleet
        self.keep_thirds_apart = keep_thirds_apart
        self.keep_last_idle = keep_last_idle

    @property
    def version(self) -> int:
        """Whether idle devices are the last ones: all scores change with it."""
        there = self.fleet.size_milli > 0
        idle = there & (self.fleet.held[..., 0] == 0) & (self.fleet.free_milli > 0)
        return int(self.keep_last_idle and scarce(int(idle.sum()), int(there.sum())))

    def arrived(self, need: Need) -> None:
        """Learn nothing."""

    def scores(self, places: Places) -> Ints:
        """Return the score of each place."""
        fleet, nodes, where = self.fleet, places.nodes, (places.nodes[:, None], places.devices)
        if not places.devices.shape[1]:
            return -places.cpu_after
        held, family = fleet.held[where], places.family[:, None]
        mixes = ((family == 3) & (held[..., 1] > 0)) | ((family == 1) & (held[..., 2] > 0))
        left = places.free_after + places.bytes_after * WHOLE_MILLI // np.maximum(fleet.size_bytes[where], 1)
        opens = (held[..., 0] == 0).any(axis=1)
        idle = ((fleet.held[nodes, :, 0] == 0) & (fleet.size_milli[nodes] > 0)).sum(axis=1)
        kept = ((held[..., 0] == 0) & (places.total_milli < places.devices.shape[1] * WHOLE_MILLI)[:, None]).sum(axis=1) * self.version
        return -((kept << 46) + (mixes.sum(axis=1) * self.keep_thirds_apart << 40) + (left.sum(axis=1) << 12) + np.where(opens, idle, 0))

    def describe(self) -> Mapping[str, object]:
        """Return the parameters."""
        return {"keep_thirds_apart": self.keep_thirds_apart, "keep_last_idle": self.keep_last_idle}


class Fgd:
    """Fragmentation gradient descent as published: least growth of what the expected requests cannot use, in steps of 40 milli-GPU.

    Source: Q. Weng et al., "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent", USENIX ATC
    2023, and the simulator published with it.

    Parameters
    ----------
    shares : mapping
        Of each shape, in units of `values.ONE`: known beforehand (`demand.typical`).
    """

    name = "fgd"
    version = 0

    def __init__(self, fleet: Fleet, shares: Mapping[Need, int], *, rounded_milli: int = 40):
        self.fleet = fleet
        self.rounded_milli = rounded_milli
        self.values = Values(fleet, list(shares), cpu_limits=False)
        self.values.weigh([shares[shape] for shape in self.values.shapes])

    def arrived(self, need: Need) -> None:
        """Learn nothing."""

    def scores(self, places: Places) -> Ints:
        """Return the score of each place."""
        self.values.follow()
        return (self.values.gain(places) + 2 * ONE * places.total_milli) // (2 * ONE * self.rounded_milli)

    def describe(self) -> Mapping[str, object]:
        """Return the parameters."""
        return {"rounded_milli": self.rounded_milli}


EDITION = 2
"""Of the rule `Ours`: another one scores otherwise with the same parameters."""


@dataclass(frozen=True)
class Parameters:
    """Of the rule `Ours`."""

    rounded_milli: int = 40
    remainder_weight: int = 3
    most_scarce: int = 50
    """Most that a shape counts for being hard to place."""
    reweigh_every: int = 400
    """Arrivals after which weights and the worth of remainders are renewed; in the beginning at each doubling."""
    memory_arrivals: int = 8192
    """After how many more arrivals one counts 1/e of what it did."""


class Ours:
    """Least loss of what stays free, weighted by who is likely to ask and how hard they are to place, and of remainders that fit exactly.

    ::

        score = floor((dV + request + 3 dH) / 40)
        w_m   = p_m * min(50, (free GPU of the pool / free GPU usable by m) ** 1.5) * c
        c     : such that the V of the pool is what it would be with w = p
        H     = sum over devices of the worth of what is left (`remainders.worth`)

    p_m is learnt from the arrivals so far (`demand`), V is in `values`. Without c all weights grow as the pool fills: dV outweighs H and
    the step.

    Parameters
    ----------
    offered : iterable of Need
        The profiles on offer: what is expected before anything has arrived. Without any a whole device of each model is: a model that
        nobody has asked for yet would be given away first, to those who can use every other one.
    learnt : Ours, optional
        Of the fleet before a change of its devices: what has arrived there is what is expected here.
    """

    name = "ours"

    def __init__(self, fleet: Fleet, offered: Iterable[Need] = (), parameters: Parameters | None = None, learnt: Ours | None = None):
        self.fleet = fleet
        self.parameters = parameters or Parameters()
        self.version = 0
        self.demand = learnt.demand if learnt is not None else Demand(self.parameters.memory_arrivals)
        self.demand.expect(list(offered) or _whole_devices(fleet))
        self._arrivals, self._next = (0, 1) if learnt is None else (learnt._arrivals, learnt._next)
        self.reweigh()

    def arrived(self, need: Need) -> None:
        """Count an arrival; renew the weights when it is time."""
        self.note(need)
        self.renew()

    def note(self, need: Need) -> None:
        """Count an arrival."""
        self.demand.arrived(need)
        self._arrivals += 1

    def renew(self) -> None:
        """Renew the weights when it is time."""
        if self._arrivals >= self._next:
            self._next = self._arrivals + min(self._arrivals, self.parameters.reweigh_every)
            self.reweigh()

    def reweigh(self) -> None:
        """Renew the weights and the worth of remainders: all earlier scores are void."""
        shares = self.demand.shares(ONE)
        shapes = [shape for shape in shares if shape.device_count]
        if not self.version or shapes != self.values.shapes:
            self.values = Values(self.fleet, shapes, cpu_limits=True)
        self.values.follow()
        free, usable = int(self.fleet.left.sum()), self.values.usable_by_shape()
        most = self.parameters.most_scarce
        weights = [shares[shape] * scarcity(free, one, most) >> BITS for shape, one in zip(shapes, usable, strict=True)]
        even = sum(shares[shape] * one for shape, one in zip(shapes, usable, strict=True))
        uneven = sum(weight * one for weight, one in zip(weights, usable, strict=True))
        self.values.weigh([weight * even // uneven if uneven else weight for weight in weights])
        sizes: dict[int, int] = {}
        for shape in shapes:
            sizes[shape.compute_milli] = sizes.get(shape.compute_milli, 0) + shape.device_count * shares[shape]
        self.remainder: Ints = worth(sizes)
        self.version += 1

    def scores(self, places: Places) -> Ints:
        """Return the score of each place."""
        self.values.follow()
        before = self.fleet.left[places.nodes[:, None], places.devices]
        remainder = (self.remainder[places.left_after] - self.remainder[before]).sum(axis=1)
        gain = self.values.gain(places) + 2 * ONE * (places.total_milli + self.parameters.remainder_weight * remainder)
        return gain // (2 * ONE * self.parameters.rounded_milli)

    def describe(self) -> Mapping[str, object]:
        """Return the parameters, and the edition of the rule."""
        return {**asdict(self.parameters), "edition": EDITION}


def _whole_devices(fleet: Fleet) -> list[Need]:
    """Return for each model a need of its largest device."""
    sizes = [int(fleet.size_milli[fleet.model == number].max()) for number in range(len(fleet.models))]
    return [Need(1, size, models=frozenset({model})) for model, size in zip(fleet.models, sizes, strict=True)]
