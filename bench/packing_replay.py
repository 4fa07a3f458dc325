"""One replay of `bench/packing.py`: requests arrive until as much was asked for as there is, nobody leaves, who fits nowhere is refused."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nbgpu_pool.placement.chooser import Chooser
from nbgpu_pool.placement.demand import typical
from nbgpu_pool.placement.fleet import Fleet, Need, Node, evenly
from nbgpu_pool.placement.rules import BestFit, Fgd, Ours, Rule
from nbgpu_pool.placement.values import ONE

CLASSES = ("cpu", "shared", "1", "2-4", "8")
POLICIES = ("ours", "fgd", "best-fit")
ORDERS = ("file", "shuffled", "sorted")


def rule_of(policy: str, fleet: Fleet, needs: Sequence[Need]) -> Rule:
    """Return the rule; FGD, as published, knows the whole trace's demand beforehand, ours learns it."""
    if policy == "fgd":
        return Fgd(fleet, typical(needs, ONE))
    return Ours(fleet) if policy == "ours" else BestFit(fleet)


def class_of(need: Need) -> str:
    """Return which class of request this is."""
    if need.device_count == 0:
        return "cpu"
    if need.device_count == 1:
        return "1" if need.compute_milli >= 1000 else "shared"
    return "2-4" if need.device_count <= 4 else "8"


def ordered(nodes: Sequence[Node], order: str, seed: int) -> list[Node]:
    """Return the nodes in the file's order, shuffled, or the largest first."""
    found = list(nodes)
    if order == "shuffled":
        random.Random(seed).shuffle(found)
    elif order == "sorted":
        found.sort(key=lambda node: -len(node.gpus))
    return found


def arrivals(needs: Sequence[Need], seed: int) -> Iterator[Need]:
    """Yield all requests in random order, then drawn from them with replacement, without end."""
    luck = random.Random(seed)
    shuffled = list(needs)
    luck.shuffle(shuffled)
    yield from shuffled
    while True:
        yield luck.choice(shuffled)


@dataclass
class Replay:
    """What came of one."""

    allocated_percent: float
    """Of the fleet's compute, mean over the arrivals at which what was asked for so far rounds to 100 %."""
    arrived: dict[str, int] = field(default_factory=dict[str, int])
    """Until 100 % was asked for, by class."""
    refused: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0


def replay(nodes: Sequence[Node], needs: Sequence[Need], policy: str, order: str, seed: int) -> Replay:
    """Replay the trace once.

    Raises
    ------
    ValueError
        The trace asks for no GPU at all.
    """
    if not any(need.total_milli for need in needs):
        raise ValueError("no request of the trace asks for a GPU")
    begun = time.process_time()
    listed = ordered(nodes, order, seed)
    fleet = Fleet([listed[index] for index in evenly(listed)] if policy == "ours" else listed)
    chooser = Chooser(fleet, rule_of(policy, fleet, needs))
    capacity, asked, allocated = fleet.capacity_milli, 0, 0
    around: list[int] = []
    found = Replay(0.0, dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0))
    for need in arrivals(needs, seed):
        asked += need.total_milli
        if 200 * asked >= 201 * capacity:  # rounds to more than 100 %
            break
        chooser.rule.arrived(need)
        spot = chooser.choose(need)
        if spot is not None:
            fleet.take(spot, need)
            allocated += need.total_milli
        if asked <= capacity:
            found.arrived[class_of(need)] += 1
            found.refused[class_of(need)] += spot is None
        if 200 * asked >= 199 * capacity:
            around.append(allocated)
    around = around or [allocated]  # of a small fleet, where one request passes over it
    found.allocated_percent = 100 * sum(around) / len(around) / capacity
    found.seconds = time.process_time() - begun
    return found
