"""Nodes that are not there and would be started where a pod asks for one: groups of nodes that an autoscaler scales from zero. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nbgpu.claims import COMING
from nbgpu.models import Device

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Coming:
    """A group of alike nodes."""

    name: str
    model: str
    device_count: int
    memory_bytes: int
    reserve_bytes: int = 0
    node_count: int = 1
    """Most nodes that it may have."""
    labels: Labels = field(default_factory=lambda: Labels())
    """By which its nodes are known; without any: by the model of their GPUs."""
    start_seconds: float = 300.0

    def has(self, labels: Labels, models: frozenset[str]) -> bool:
        """Return whether a node is of this group."""
        return self.labels <= labels if self.labels else self.model in models


def devices_to_come(groups: Sequence[Coming], nodes: Iterable[tuple[Labels, frozenset[str]]]) -> list[Device]:
    """Return the devices of the nodes that each group may still get.

    Parameters
    ----------
    nodes : iterable of (labels, models)
        Of those that are there. One whose agent has not published its GPUs yet is on its way: it counts as still to come.
    """
    there = [0] * len(groups)
    for labels, models in nodes:
        for number, group in enumerate(groups):
            if models and group.has(labels, models):
                there[number] += 1
                break
    return [
        Device(
            uuid=f"{COMING}{group.name}:{node}:{index}",
            index=index,
            model=group.model,
            node=f"{COMING}{group.name}:{node}",
            memory_bytes=group.memory_bytes,
            reserve_bytes=group.reserve_bytes,
        )
        for group, count in zip(groups, there, strict=True)
        for node in range(group.node_count - count)
        for index in range(group.device_count)
    ]
