"""Where a request goes: best fit, sizes that do not tile kept apart, the last idle devices and whole nodes kept whole.

Integers in every comparison and one fixed order for ties (node, index, uuid): the same books give the same place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from nbgpu.claims import is_coming
from nbgpu.models import Device
from nbgpu.quantities import WHOLE_MILLI

from ..shapes import Part, Want, resolve, within

_EIGHTH_MILLI = 125
_THIRDS = frozenset({333, 334, 666, 667, 166, 167, 83, 84})


def family(compute_milli: int) -> int:
    """Return which sizes tile with this one: 1 = halves, quarters, eighths; 3 = thirds, sixths; 0 = neither."""
    if compute_milli in _THIRDS:
        return 3
    return 1 if compute_milli % _EIGHTH_MILLI == 0 else 0


@dataclass
class Room:
    """What is left of one device, and what kinds of parts are on it."""

    device: Device
    free_bytes: int
    free_milli: int
    binary_count: int = 0
    thirds_count: int = 0
    part_count: int = 0
    coming: bool = False
    """Of a node that has to be started first."""

    @classmethod
    def empty(cls, device: Device) -> Room:
        """Return the room of a device that holds nothing."""
        return cls(device, device.usable_bytes, WHOLE_MILLI, coming=is_coming(device.node))

    def copy(self) -> Room:
        """Return one that changes by itself (`dataclasses.replace` takes ten times as long)."""
        counts = self.binary_count, self.thirds_count, self.part_count
        return Room(self.device, self.free_bytes, self.free_milli, *counts, self.coming)

    def take(self, part: Part) -> None:
        """Book `part`."""
        self._change(part, 1)

    def give_back(self, part: Part) -> None:
        """Undo `take`."""
        self._change(part, -1)

    def _change(self, part: Part, sign: int) -> None:
        if part == (0, 0):  # of a parked slice
            return
        self.free_bytes -= sign * part.memory_bytes
        self.free_milli -= sign * part.compute_milli
        self.part_count += sign
        kind = family(part.compute_milli)
        self.binary_count += sign * (kind == 1)
        self.thirds_count += sign * (kind == 3)

    def fits(self, part: Part) -> bool:
        """Whether `part` fits now."""
        return part.memory_bytes <= self.free_bytes and part.compute_milli <= self.free_milli


@dataclass(frozen=True)
class Policy:
    """Knobs of the placement; the benchmark and the tests turn them off."""

    keep_thirds_apart: bool = True
    keep_last_idle: bool = True
    """Mix sizes that do not tile rather than open one of the last idle devices (`scarce`)."""
    by_value: bool = False
    """The rule `ours` (`valued`) instead of best fit."""


DEFAULT_POLICY = Policy()
LAST_IDLE = 20
"""Idle devices are the last ones where no more than one in so many is idle."""
Place = list[tuple[Room, Part]]
Order = tuple[str, int, str]


def order(device: Device) -> Order:
    """Return the fixed order in which devices are looked at."""
    return device.node, device.index, device.uuid


def place(
    rooms: Sequence[Room],
    want: Want,
    *,
    barred: Set[str] = frozenset(),
    cap: Part | None = None,
    policy: Policy = DEFAULT_POLICY,
) -> Place | None:
    """Return the best place for `want` now, all of its devices on one node, or None.

    Parameters
    ----------
    rooms : sequence of Room
        In the order of `order`, so that a node's devices follow each other.
    barred : set of str
        UUIDs that are kept for others.
    cap : Part, optional
        Most that a part may take of one device (a quota, `shapes.within`): where GiB are asked for, a larger GPU costs a smaller share.
    """
    best: tuple[tuple[int, ...], Place] | None = None
    here = [room for room in rooms if not room.coming]
    last = scarce(sum(room.part_count == 0 and room.free_milli > 0 and room.device.healthy for room in here), len(here))
    for _, group in groupby(rooms, key=lambda room: room.device.node):
        node = list(group)
        found = _on_node(node, want, barred, cap, policy, last)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return best[1] if best else None


def scarce(idle: int, devices: int) -> bool:
    """Return whether so few of the devices are idle that who asks for a whole one will soon find none."""
    return idle * LAST_IDLE <= devices


def _on_node(
    node: Sequence[Room], want: Want, barred: Set[str], cap: Part | None, policy: Policy, last_idle: bool
) -> tuple[tuple[int, ...], Place] | None:
    candidates: list[tuple[tuple[int, ...], int, Room, Part]] = []
    part: Part | None = None
    last: tuple[str, int] | None = None
    for number, room in enumerate(node):
        if room.free_milli <= 0:
            continue
        device = room.device
        if not device.healthy or device.uuid in barred:
            continue
        if last != (device.model, device.memory_bytes - device.reserve_bytes):  # a node's devices are mostly alike
            last, part = (device.model, device.usable_bytes), resolve(want, device)
        if part is None or not room.fits(part) or not within(part, device.usable_bytes, cap):
            continue
        candidates.append((score(room, part, policy, last_idle), number, room, part))
    if len(candidates) < want.device_count:
        return None
    if want.device_count == 1:
        chosen = [min(candidates)]
    else:
        # One model for all devices of a slice: programs that span devices expect equals.
        chosen = min(_of_one_model(candidates, want.device_count), default=None)
        if chosen is None:
            return None
    total = [sum(column) for column in zip(*(score for score, *_ in chosen), strict=True)]
    idle = sum(room.part_count == 0 for room in node)
    opened = sum(room.part_count == 0 for _, _, room, _ in chosen)
    # Opening an idle device costs most where whole nodes would be broken: take it from the node with fewest idle ones.
    return (*total, idle if opened else 0), [(room, part) for _, _, room, part in chosen]


def _of_one_model(
    candidates: Iterable[tuple[tuple[int, ...], int, Room, Part]], count: int
) -> Iterable[list[tuple[tuple[int, ...], int, Room, Part]]]:
    models: dict[str, list[tuple[tuple[int, ...], int, Room, Part]]] = {}
    for candidate in sorted(candidates, key=lambda item: item[:2]):
        models.setdefault(candidate[2].device.model, []).append(candidate)
    return [group[:count] for group in models.values() if len(group) >= count]


def score(room: Room, part: Part, policy: Policy, last_idle: bool = False) -> tuple[int, int, int]:
    """Return how well `part` fits a room, the less the better.

    Whether it opens one of the last idle devices, whether sizes mix that do not tile, and what would be left.
    """
    kind, less = family(part.compute_milli), part.compute_milli < WHOLE_MILLI
    opens = last_idle and policy.keep_last_idle and less and room.part_count == 0
    mixes = policy.keep_thirds_apart and ((kind == 3 and room.binary_count > 0) or (kind == 1 and room.thirds_count > 0 and less))
    left_milli = room.free_milli - part.compute_milli
    left_memory_milli = (room.free_bytes - part.memory_bytes) * WHOLE_MILLI // room.device.usable_bytes
    return int(opens), int(mixes), left_milli + left_memory_milli


def nearest(rooms: Sequence[Room], want: Want, *, barred: Set[str] = frozenset(), cap: Part | None = None) -> tuple[str, ...]:
    """Return the devices on which least must be freed before `want` fits; () when none could ever hold it. `cap`: as in `place`."""
    best: tuple[int, tuple[str, ...]] | None = None
    for _, group in groupby(sorted(rooms, key=_node_and_model), key=_node_and_model):
        missing: list[tuple[int, int, str]] = []
        for number, room in enumerate(group):
            part = resolve(want, room.device)
            if part is None or not room.device.healthy or room.device.uuid in barred or not within(part, room.device.usable_bytes, cap):
                continue
            milli = max(0, part.compute_milli - room.free_milli)
            memory = max(0, part.memory_bytes - room.free_bytes) * WHOLE_MILLI // room.device.usable_bytes
            missing.append((max(milli, memory), number, room.device.uuid))
        if len(missing) >= want.device_count:
            chosen = sorted(missing)[: want.device_count]
            cost = sum(amount for amount, _, _ in chosen)
            if best is None or cost < best[0]:
                best = cost, tuple(uuid for _, _, uuid in chosen)
    return best[1] if best else ()


def of_use(rooms: Iterable[Room], want: Want, *, barred: Set[str] = frozenset()) -> frozenset[str]:
    """Return the healthy devices that `want` could be placed on if they were empty: enough of one model on one node."""
    alike: dict[tuple[str, str], list[str]] = {}
    for room in rooms:
        if room.device.healthy and room.device.uuid not in barred and resolve(want, room.device) is not None:
            alike.setdefault(_node_and_model(room), []).append(room.device.uuid)
    return frozenset(uuid for uuids in alike.values() if len(uuids) >= want.device_count for uuid in uuids)


def _node_and_model(room: Room) -> tuple[str, str]:
    return room.device.node, room.device.model
