"""What was lent beyond a guarantee is taken back when somebody it is kept for waits (docs/quotas.md). Pure.

In this order, each only as far as it lets somebody in: idle slices are parked (`idle`), burst slices are made smaller by what they
do not use, idle servers are asked back with notice, then busy ones with theirs. The pool ends no server: who would have to is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nbgpu.errors import NbgpuError
from nbgpu.models import GrantState, Owner, Slice
from nbgpu.quantities import MIB

from .books import Books, Entry
from .placement import Policy, Room, place
from .quotas import Quotas, Tally
from .resize import grows, must_fit
from .shapes import Part, resolve

STEPS = 4
"""In how many steps a slice is made smaller, down to `GiveBack.least_milli`: several give a little before one gives much."""
SPARE = 5 / 4
"""Times what it uses: so much memory is left to a slice."""
MOST_CLAIMANTS = 16
"""Of those who wait, looked at in one go."""


@dataclass(frozen=True)
class GiveBack:
    """How what was lent is taken back."""

    shrink: bool = True
    least_milli: int = 500
    """A burst slice keeps at least so much of what it was granted, in thousandths."""
    end_idle_after_seconds: float | None = None
    """Servers that have been idle for so long are asked back; None: none is."""
    notice_seconds: float = 300.0
    busy_notice_seconds: float | None = None
    """Busy servers are asked back with so much notice; None: none is."""


class Ask(NamedTuple):
    """A slice that is asked back."""

    slice_id: str
    owner: Owner
    kind: str
    """As in `nbgpu.models.AskBack`."""
    due: float
    """By when, of the core's clock."""
    why: str
    """In words, to go on from "because"."""
    idle: bool = False

    @property
    def needs(self) -> str:
        """What would have to be done, and by whom: nothing in the pool ends a server."""
        state = "idle" if self.idle else "running"
        server = f"server '{self.owner.server}'" if self.owner.server else "the default server"
        return f"{server} of {self.owner.user} ({state}) must be stopped by its user or by hub {self.owner.hub}, because {self.why}"


@dataclass
class Plan:
    """What gives room to those who have a right to it."""

    shrinks: list[tuple[Entry, Slice, str]] = field(default_factory=list[tuple[Entry, Slice, str]])
    """Who, to what, for whom in words."""
    asks: list[Ask] = field(default_factory=list[Ask])


class _Gain(NamedTuple):
    """What one slice could give."""

    entry: Entry
    parts: list[tuple[str, Part]]
    target: Slice | None
    """Its new limits; None: all of it goes."""


def plan(books: Books, quotas: Quotas, policy: GiveBack, asked: dict[str, Ask], placing: Policy, least_bytes: int, now: float) -> Plan:
    """Return what must be taken back for those who wait and have a right to what is lent.

    Parameters
    ----------
    asked : dict
        Asks that are open, by slice: kept where they are still needed, with the time they have.
    least_bytes : int
        Least memory of a slice.
    """
    found = Plan()
    lent = quotas.lent
    line = [one for one in books.waiting() if not one.holder] if lent else []
    if not line:
        return found
    tally = Tally.of(quotas, books.holdings(frozenset(quotas.groups), granted_only=True), books.free_milli)
    claimants = list(_claimants(line, lent, tally, books))[:MOST_CLAIMANTS]
    if not claimants:
        return found
    rooms = {room.device.uuid: replace(room) for room in books.ordered_rooms()}
    _give(rooms, _on_its_way_back(books))
    stages = [list(stage) for stage in _stages(books, quotas, policy, asked, tally, least_bytes, now)]
    # With all that could be given: who finds no room there is spared the search, and the pool with them.
    most = {uuid: replace(room) for uuid, room in rooms.items()}
    for gain in {gain.entry.slice_id: gain for stage in stages for gain in stage}.values():
        _give(most, gain.parts)
    for entry, whose in claimants:
        barred = {uuid for one in line if one is not entry for uuid in one.earmark} | books.kept() | books.closed(entry)

        def fits(want: Entry = entry, barred: set[str] = barred) -> bool:
            return place(list(rooms.values()), want.want, barred=barred, policy=placing) is not None

        if not fits() and place(list(most.values()), entry.want, barred=barred, policy=placing) is not None:
            gains = _needed(rooms, fits, stages)
            for gain in gains:
                if gain.target is not None:
                    found.shrinks.append((gain.entry, gain.target, whose))
                else:
                    found.asks.append(_ask(gain.entry, policy, asked, whose, now))
        spot = place(list(rooms.values()), entry.want, barred=barred, policy=placing)
        for room, part in spot or ():
            room.take(part)
            most[room.device.uuid].take(part)
    return found


def to_grow(books: Books, quotas: Quotas, shrunk: Iterable[Entry]) -> tuple[Entry, Slice] | None:
    """Return which of the slices that were made smaller can have back what they were, and that; none while anybody waits."""
    if books.waiting():
        return None
    for entry in shrunk:
        still = entry.state == GrantState.bound and entry.full is None and entry.wanted is None and entry.moving is None
        if entry.slice is None or entry.whole is None or entry.busy or entry.parking or not still:
            continue
        target = entry.slice.model_copy(update={"devices": entry.whole.devices})
        if not grows(entry.slice, target) or [part.uuid for part in entry.slice.devices] != [part.uuid for part in target.devices]:
            continue  # its node had refused to make it smaller, or it was moved
        try:
            must_fit(entry, target, books, quotas)
        except NbgpuError:
            continue
        return entry, target
    return None


def _claimants(line: Iterable[Entry], lent: Sequence[tuple[str, str]], tally: Tally, books: Books) -> Iterable[tuple[Entry, str]]:
    """Yield who waits for what a lent guarantee of theirs keeps, with whose it is in words."""
    unmet = {account: tally.unmet_milli(*account) for account in lent}
    for entry in line:
        cost = books.cost(entry.want)
        for kind, name in lent:
            mine = (name in entry.request.groups) if kind == "group" else (name == entry.request.owner.user)
            if cost is not None and mine and cost.compute_milli <= unmet[kind, name]:
                unmet[kind, name] -= cost.compute_milli
                yield entry, f"group {name}" if kind == "group" else f"user {name}"
                break


def _on_its_way_back(books: Books) -> list[tuple[str, Part]]:
    """Return what is coming back anyway: what is asked of the ledger, and shrinks and parkings under way."""
    parts: list[tuple[str, Part]] = []
    for entry in books.entries.values():
        if entry.state == GrantState.releasing or entry.parking:
            parts += entry.parts()
        elif entry.wanted is not None and entry.holds:
            wanted = {one.uuid: Part(one.memory_bytes, one.compute_milli) for one in entry.wanted.devices}
            less = [(uuid, _less(part, wanted[uuid])) for uuid, part in entry.own_parts() if uuid in wanted]
            # what its programs keep comes when they let go of it, if ever: nobody is left to wait for that
            parts += [(uuid, Part(0, part.compute_milli)) for uuid, part in less] if entry.keeps else less
    return parts


def _stages(
    books: Books, quotas: Quotas, policy: GiveBack, asked: dict[str, Ask], tally: Tally, least_bytes: int, now: float
) -> Iterable[list[_Gain]]:
    """Yield, mildest first, what can be taken from those who hold more than is theirs."""
    lent = [one for one in books.entries.values() if _borrows(one, quotas, tally)]
    calm = sorted(lent, key=lambda one: (one.idle_from is None, one.idle_from or 0.0, -one.number))
    if policy.shrink:
        for step in range(1, STEPS + 1):
            keep_milli = 1000 - (1000 - policy.least_milli) * step // STEPS
            yield [gain for one in calm if (gain := _smaller(one, books, keep_milli, least_bytes, now)) is not None]
    calm.sort(key=lambda one: one.slice_id not in asked)
    idle_after = policy.end_idle_after_seconds
    if idle_after is not None:
        yield [_Gain(one, one.parts(), None) for one in calm if _idle_for(one, now) >= idle_after]
    if policy.busy_notice_seconds is not None:
        yield [_Gain(one, one.parts(), None) for one in calm]


def _idle_for(entry: Entry, now: float) -> float:
    return -1.0 if entry.idle_from is None else now - entry.idle_from


def _borrows(entry: Entry, quotas: Quotas, tally: Tally) -> bool:
    """Return whether all that a slice holds is beyond the guarantees of its owner and their groups."""
    if entry.state != GrantState.bound or entry.slice is None or entry.full is not None or entry.moving is not None or entry.parking:
        return False
    milli = sum(part.compute_milli for _, part in entry.own_parts())
    owner, groups = entry.request.owner, {*entry.request.groups, *entry.slice.groups}
    mine = [("group", name) for name in groups if name in quotas.groups]
    mine += [("user", owner.user)] if owner.user in quotas.users else []
    guaranteed = [one for one in mine if (quotas.groups if one[0] == "group" else quotas.users)[one[1]].guarantee_milli]
    return all(tally.unmet_milli(*one) + milli <= 0 for one in guaranteed)


def _smaller(entry: Entry, books: Books, keep_milli: int, least_bytes: int, now: float) -> _Gain | None:
    """Return what a burst slice gives that keeps `keep_milli` of what it was granted, all that it uses, and what a program needs."""
    if entry.slice is None or entry.slice.mode != "burst" or entry.adopted or entry.busy or entry.wanted is not None:
        return None
    if now < entry.spared_until:
        return None
    devices = {part.uuid: books.devices.get(part.uuid) for part in entry.slice.devices}
    if any(device is None for device in devices.values()):
        return None
    parts, gained = list(entry.slice.devices), list[tuple[str, Part]]()
    for number, part in enumerate(parts):
        device = devices[part.uuid]
        granted = resolve(entry.want, device) if device is not None else None
        if granted is None:
            return None
        compute = min(part.compute_milli, max(1, granted.compute_milli * keep_milli // 1000))
        memory = part.memory_bytes
        if entry.used_bytes is not None:
            keep = max(granted.memory_bytes * keep_milli // 1000, int(entry.used_bytes * SPARE), least_bytes, MIB)
            memory = min(memory, keep // MIB * MIB)
        gained.append((part.uuid, Part(part.memory_bytes - memory, part.compute_milli - compute)))
        parts[number] = part.model_copy(update={"memory_bytes": memory, "compute_milli": compute})
    if all(part == Part(0, 0) for _, part in gained):
        return None
    return _Gain(entry, gained, entry.slice.model_copy(update={"devices": parts}))


def _needed(rooms: dict[str, Room], fits: Callable[[], bool], stages: Iterable[list[_Gain]]) -> list[_Gain]:
    """Return the mildest and fewest that make room, taken into account in `rooms`; nothing where even all would not."""
    chosen: dict[str, _Gain] = {}

    def choose(gain: _Gain) -> None:
        before = chosen.pop(gain.entry.slice_id, None)
        if before is not None:
            _give(rooms, before.parts, back=False)
        _give(rooms, gain.parts)
        chosen[gain.entry.slice_id] = gain

    for gains in stages:
        before_all = dict(chosen)
        for gain in gains:
            choose(gain)
        if not fits():
            continue  # not even all of them: they are not tried one by one
        for gain in chosen.values():
            _give(rooms, gain.parts, back=False)
        for gain in before_all.values():
            _give(rooms, gain.parts)
        chosen = before_all
        for gain in gains:
            choose(gain)
            if fits():
                for other in list(chosen.values())[:-1]:  # some may have been on other devices
                    _give(rooms, other.parts, back=False)
                    if fits():
                        del chosen[other.entry.slice_id]
                    else:
                        _give(rooms, other.parts)
                return list(chosen.values())
    for gain in chosen.values():
        _give(rooms, gain.parts, back=False)
    return []


def _give(rooms: dict[str, Room], parts: Iterable[tuple[str, Part]], *, back: bool = True) -> None:
    for uuid, part in parts:
        if uuid in rooms:
            rooms[uuid].give_back(part) if back else rooms[uuid].take(part)


def _ask(entry: Entry, policy: GiveBack, asked: dict[str, Ask], whose: str, now: float) -> Ask:
    idle = policy.end_idle_after_seconds is not None and _idle_for(entry, now) >= policy.end_idle_after_seconds
    notice = policy.notice_seconds if idle else policy.busy_notice_seconds or 0.0
    before = asked.get(entry.slice_id)
    due = now + notice
    if before is not None:  # one that is used again has the other notice; what was promised is never cut short
        due = before.due if before.idle == idle else max(due, before.due)
    why = f"it uses what is guaranteed to {whose} and was lent"
    return Ask(entry.slice_id, entry.request.owner, "guarantee", due, why, idle)


def _less(one: Part, other: Part) -> Part:
    return Part(max(0, one.memory_bytes - other.memory_bytes), max(0, one.compute_milli - other.compute_milli))
