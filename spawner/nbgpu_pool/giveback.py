"""What was lent beyond a guarantee is taken back when somebody it is kept for waits (docs/quotas.md). Pure.

In this order, each only as far as it lets somebody in: idle slices are parked (`idle`), burst slices are made smaller by what they
do not use, idle servers are asked back with notice, then busy ones with theirs. The pool ends no server: who would have to is said.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from nbgpu.errors import NbgpuError
from nbgpu.models import GrantState, Owner, Slice
from nbgpu.quantities import MIB

from .books import Books, Entry
from .placement import Place, Policy, Room, place
from .quotas import Quotas, Tally, concerns
from .resize import grows, must_fit
from .shapes import Part, Want, resolve

STEPS = 4
"""In how many steps a slice is made smaller, down to `GiveBack.least_milli`: several give a little before one gives much."""
SPARE = 5 / 4
"""Times what it uses: so much memory is left to a slice."""
LATE_SECONDS = 300.0
"""Who has not ended so long after they were to is not waited for: nobody may be there who ends them."""
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
    claimant: str = ""
    """Id of the request that waits for it."""
    used_again: bool = False
    """It has had the notice of a busy one: it has that once."""
    since: float = 0.0
    """When something was asked back first for the one who waits."""

    def late(self, now: float) -> bool:
        """Whether it is not counted on any more."""
        return now >= self.due + LATE_SECONDS

    @property
    def needs(self) -> str:
        """What would have to be done, and by whom: nothing in the pool ends a server."""
        state = "idle" if self.idle else "running"
        server = f"server '{self.owner.server}'" if self.owner.server else "the default server"
        return f"{server} of {self.owner.user} ({state}) must be stopped by its user or by hub {self.owner.hub}, because {self.why}"


class Claim(NamedTuple):
    """Who waits for what a lent guarantee keeps for them."""

    entry: Entry
    kind: str
    """Whose guarantee: ``group`` or ``user``."""
    name: str

    @property
    def whose(self) -> str:
        """Return whose guarantee, in words."""
        return f"{self.kind} {self.name}"

    @property
    def holder(self) -> tuple[str, ...]:
        """Return whose guarantee."""
        return self.kind, self.name

    @property
    def user(self) -> tuple[str, ...]:
        """Return who asks for a part of it."""
        return *self.holder, self.entry.request.owner.hub, self.entry.request.owner.user


Taken = list[tuple[str, Part]]
"""What is taken from a slice, by device, in the order of its devices."""


class Shrink(NamedTuple):
    """A slice that is made smaller."""

    entry: Entry
    target: Slice
    taken: Taken
    claim: Claim


@dataclass
class Plan:
    """What gives room to those who have a right to it."""

    shrinks: list[Shrink] = field(default_factory=list[Shrink])
    asks: list[Ask] = field(default_factory=list[Ask])
    claims: list[Claim] = field(default_factory=list[Claim])
    """For whom."""


class _Gain(NamedTuple):
    """What one slice could give."""

    slice_id: str
    entry: Entry
    parts: list[tuple[str, Part]]
    whole: bool
    """It would have to end; else it is made smaller by `parts`, in the order of its devices."""

    @property
    def target(self) -> Slice:
        """Return its new limits."""
        now = _limits(self.entry)
        assert now is not None
        devices = [
            part.model_copy(update=_less(Part(part.memory_bytes, part.compute_milli), less)._asdict())
            for part, (_, less) in zip(now.devices, self.parts, strict=True)
        ]
        return now.model_copy(update={"devices": devices})


def what_matters(books: Books, quotas: Quotas) -> tuple[object, ...]:
    """Return what a plan goes by, beside the time and what slices use: who claims something, what is booked, what is kept for others."""
    line = [one for one in books.waiting() if one.earmark or _holders(one, quotas.lent)] if quotas.lent else []
    who = [(one.slice_id, one.holder, one.earmark, books.closed(one)) for one in line]
    return books.changes, tuple(who), frozenset(books.kept()) if who else None


def plan(
    books: Books,
    quotas: Quotas,
    policy: GiveBack,
    asked: dict[str, Ask],
    placing: Policy,
    least_bytes: int,
    now: float,
    spent: Set[tuple[str, ...]] = frozenset(),
    also: Entry | None = None,
) -> Plan:
    """Return what must be taken back for those who wait and have a right to what is lent.

    Parameters
    ----------
    asked : dict
        Asks that are open, by slice: they are room on its way for the one they were made for, and kept where that one still needs
        them, with the time they have.
    least_bytes : int
        Least memory of a slice.
    spent : set
        Holders and users (`Claim`) for whom nothing more is taken at this time.
    also : Entry, optional
        Who would wait behind them.
    """
    found = Plan()
    lent = quotas.lent
    line = [one for one in (*books.waiting(), *([also] if also is not None else [])) if not one.holder] if lent else []
    if not line:
        return found
    tally = Tally(quotas, books.granted_by(frozenset(quotas.groups)))
    unmet = {account: tally.unmet_milli(*account) for account in lent}
    claims = _some(list(_claims(line, unmet, books)), {ask.claimant for ask in asked.values()})
    if not claims:
        return found
    rooms = {room.device.uuid: room.copy() for room in books.ordered_rooms()}
    _give(rooms, _on_its_way_back(books, now))
    stages = [list(stage) for stage in _stages(books, quotas, policy, asked, tally, least_bytes, now)]
    offered = _most(stages)
    milder = _most(stages[:-1]) if policy.busy_notice_seconds is not None else {}
    # With all that could be given: who finds no room there is spared the search, and the pool with them.
    most = {uuid: room.copy() for uuid, room in rooms.items()}
    for gain in offered.values():
        _give(most, gain.parts)
    waits = {claim.entry.slice_id for claim in claims}
    # Each slice gives once: to the one that it is asked back for, or to the first who takes something of it.
    given = {key: ask.claimant for key, ask in asked.items() if ask.claimant in waits and key in offered and offered[key].whole}
    for claim in claims:
        entry = claim.entry
        # what is kept for who has waited long is kept from those alone who claim nothing
        barred = {uuid for one in claims if one.entry is not entry for uuid in one.entry.earmark} | books.kept() | books.closed(entry)

        cap, _ = tally.cap(entry.request.owner, entry.request.groups, entry.want.device_count)

        def find(want: Want = entry.want, barred: set[str] = barred, cap: Part | None = cap, of: dict[str, Room] = rooms) -> Place | None:
            return place(list(of.values()), want, barred=barred, cap=cap, policy=placing)

        mine, gains = entry.slice_id, list[_Gain]()
        own = [offered[one] for one, whose in given.items() if whose == mine and not asked[one].late(now)]
        given = {one: whose for one, whose in given.items() if whose != mine}
        claim = next(_claims([entry], unmet, books), None)
        if claim is None:  # those before have what is left of it
            continue
        spot = find()
        if spot is None:
            may_take = not spent & {claim.holder, claim.user}
            instead = [gain for gain in milder.values() if gain.slice_id not in given] if may_take else []
            since = min((asked[one.slice_id].since for one in own), default=now)
            if now - since >= (policy.busy_notice_seconds or 0.0):
                instead = []  # two who take turns at being idle would have notice anew for ever
            gains = _still_needed(rooms, find, own, instead, policy, now)
            if not gains and may_take and find(of=most) is not None:
                gains = _needed(rooms, find, [[gain for gain in stage if gain.slice_id not in given] for stage in stages])
        given |= dict.fromkeys((one.slice_id for one in gains), mine)
        for gain in gains:
            _give(rooms, gain.parts)
            if gain.whole:
                found.asks.append(_ask(gain.entry, policy, asked, claim, now))
            else:
                found.shrinks.append(Shrink(gain.entry, gain.target, gain.parts, claim))
        if gains:
            found.claims.append(claim)
            spot = find()
        if spot is not None:  # who cannot be helped uses up nothing of what is guaranteed
            unmet[claim.kind, claim.name] -= _counted(entry, books)
        for room, part in spot or ():
            room.take(part)
            most[room.device.uuid].take(part)
    return found


def room_for(
    books: Books, quotas: Quotas, policy: GiveBack, asked: dict[str, Ask], placing: Policy, least_bytes: int, now: float, ghost: Entry
) -> float | None:
    """Return in how many seconds room would be made for one who asks now, 0 where slices are only made smaller; None: it would not be."""
    if not _holders(ghost, quotas.lent):
        return None
    found = plan(books, quotas, policy, asked, placing, least_bytes, now, also=ghost)
    asks = [ask.due - now for ask in found.asks if ask.claimant == ghost.slice_id]
    shrinks = any(one.claim.entry is ghost for one in found.shrinks)
    return max(asks) if asks else 0.0 if shrinks else None


def to_grow(books: Books, quotas: Quotas, shrunk: Iterable[Entry]) -> tuple[Entry, Slice] | None:
    """Return which of the slices that were made smaller can have back what they were, and that; none while anybody waits for room there."""
    wants = {one.want for one in books.waiting() if not one.holder}
    wanted = {uuid for want in wants for uuid in books.of_use(want)}
    for entry in shrunk:
        still = entry.state == GrantState.bound and entry.full is None and entry.wanted is None and entry.moving is None
        if entry.slice is None or entry.whole is None or entry.busy or entry.parking or not still:
            continue
        target = entry.slice.model_copy(update={"devices": entry.whole.devices})
        if any(part.uuid in wanted for part in target.devices):
            continue
        if not grows(entry.slice, target) or [part.uuid for part in entry.slice.devices] != [part.uuid for part in target.devices]:
            continue  # its node had refused to make it smaller, or it was moved
        try:
            must_fit(entry, target, books, quotas)
        except NbgpuError:
            continue
        return entry, target
    return None


def given_back(entry: Entry, taken: Taken) -> Slice | None:
    """Return a slice with what was taken from it, as far as it was so before; None: it has that, or is another by now."""
    now = entry.wanted or entry.slice
    if now is None or entry.whole is None:
        return None
    where = [uuid for uuid, _ in taken]
    if where != [part.uuid for part in now.devices] or where != [part.uuid for part in entry.whole.devices]:
        return None
    devices = [
        part.model_copy(
            update={
                "memory_bytes": max(part.memory_bytes, min(whole.memory_bytes, part.memory_bytes + more.memory_bytes)),
                "compute_milli": max(part.compute_milli, min(whole.compute_milli, part.compute_milli + more.compute_milli)),
            }
        )
        for part, whole, (_, more) in zip(now.devices, entry.whole.devices, taken, strict=True)
    ]
    target = now.model_copy(update={"devices": devices})
    return target if grows(now, target) else None


def _holders(entry: Entry, lent: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return whose of the lent guarantees a request may claim."""
    return [(kind, name) for kind, name in lent if concerns(kind, name, entry.request.owner, entry.request.groups)]


def _claims(line: Iterable[Entry], unmet: Mapping[tuple[str, str], int], books: Books) -> Iterator[Claim]:
    """Yield who waits for what a lent guarantee of theirs keeps, by what is left of each."""
    for entry in line:
        account = next((one for one in _holders(entry, list(unmet)) if _counted(entry, books) <= unmet[one]), None)
        if account is not None:
            yield Claim(entry, *account)


def _counted(entry: Entry, books: Books) -> int:
    """Return the least that a request counts, milli-GPU; more than any guarantee where nothing here could hold it."""
    cost = books.cost(entry.want)
    return 2**62 if cost is None else cost.counted_milli


def _some(claims: list[Claim], asking: Set[str]) -> list[Claim]:
    """Return those who are looked at, in their order: who has asks open, then all guarantees in turn, and of each its users in turn."""
    if len(claims) <= MOST_CLAIMANTS:
        return claims
    of_user, of_holder = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    by_user: list[tuple[int, int, Claim]] = []
    for number, claim in enumerate(claims):
        by_user.append((of_user[claim.user], number, claim))
        of_user[claim.user] += 1
    turns: list[tuple[bool, int, int, Claim]] = []
    for _, number, claim in sorted(by_user, key=lambda one: one[:2]):
        turns.append((claim.entry.slice_id not in asking, of_holder[claim.holder], number, claim))
        of_holder[claim.holder] += 1
    chosen = sorted(turns, key=lambda one: one[:3])[:MOST_CLAIMANTS]
    return [claim for _, _, _, claim in sorted(chosen, key=lambda one: one[2])]


def _on_its_way_back(books: Books, now: float) -> list[tuple[str, Part]]:
    """Return what is coming back anyway: what is asked of the ledger, and shrinks and parkings under way, unless they take long."""
    parts: list[tuple[str, Part]] = []
    for entry in books.entries.values():
        if entry.state == GrantState.releasing or (entry.parking and now < entry.parking_until):
            parts += entry.parts()
        elif entry.wanted is not None and entry.holds:
            for (uuid, part), (_, left) in zip(entry.own_parts(), _left(entry), strict=True):
                if entry.keeps:  # what is used comes when its programs let go of it, if ever: nobody is left to wait for that
                    used = part.memory_bytes if entry.used_bytes is None or now >= entry.wanted_until else entry.used_bytes
                    left = Part(max(left.memory_bytes, used), left.compute_milli)
                parts.append((uuid, _less(part, left)))
    return parts


def _left(entry: Entry) -> list[tuple[str, Part]]:
    """Return what a slice holds when the resize that is under way is done."""
    wanted = {one.uuid: Part(one.memory_bytes, one.compute_milli) for one in entry.wanted.devices} if entry.wanted is not None else {}
    return [(uuid, wanted.get(uuid, part)) for uuid, part in entry.own_parts()]


def _stages(
    books: Books, quotas: Quotas, policy: GiveBack, asked: dict[str, Ask], tally: Tally, least_bytes: int, now: float
) -> Iterable[list[_Gain]]:
    """Yield, mildest first, what can be taken from those who hold more than is theirs."""
    lent = [one for one in books.entries.values() if _borrows(one, books, quotas, tally, now)]
    calm = sorted(lent, key=lambda one: (one.unused_from is None, one.unused_from or 0.0, -one.number))
    if policy.shrink:
        for step in range(1, STEPS + 1):
            keep_milli = 1000 - (1000 - policy.least_milli) * step // STEPS
            yield [gain for one in calm if (gain := _smaller(one, books, keep_milli, least_bytes, now)) is not None]
    # who is asked already comes first, and last whom nobody ends
    calm.sort(key=lambda one: (one.slice_id in asked and asked[one.slice_id].late(now), one.slice_id not in asked))
    idle_after = policy.end_idle_after_seconds
    if idle_after is not None:
        yield [_Gain(one.slice_id, one, _left(one), whole=True) for one in calm if _idle_for(one, now) >= idle_after]
    if policy.busy_notice_seconds is not None:
        yield [_Gain(one.slice_id, one, _left(one), whole=True) for one in calm]


def _most(stages: Iterable[list[_Gain]]) -> dict[str, _Gain]:
    """Return the most that each slice could give: the later stage takes more."""
    return {gain.slice_id: gain for stage in stages for gain in stage}


def _idle_for(entry: Entry, now: float) -> float:
    return -1.0 if entry.unused_from is None else now - entry.unused_from


def _borrows(entry: Entry, books: Books, quotas: Quotas, tally: Tally, now: float) -> bool:
    """Return whether all that a slice holds is beyond the guarantees of its owner and their groups."""
    parking = entry.parking and now < entry.parking_until
    if entry.state != GrantState.bound or entry.slice is None or entry.full is not None or entry.moving is not None or parking:
        return False
    milli = books.amount(entry.own_parts()).counted_milli
    owner, groups = entry.request.owner, {*entry.request.groups, *entry.slice.groups}
    mine = [("group", name) for name in groups if name in quotas.groups]
    mine += [("user", owner.user)] if owner.user in quotas.users else []
    guaranteed = [one for one in mine if (quotas.groups if one[0] == "group" else quotas.users)[one[1]].guarantee_milli]
    return all(tally.unmet_milli(*one) + milli <= 0 for one in guaranteed)


def _limits(entry: Entry) -> Slice | None:
    """Return the limits that are in force; None: others are under way."""
    if entry.keeps and entry.wanted_acked:
        return entry.wanted
    return entry.slice if entry.wanted is None else None


def _smaller(entry: Entry, books: Books, keep_milli: int, least_bytes: int, now: float) -> _Gain | None:
    """Return what a burst slice gives that keeps `keep_milli` of what it was granted, all that it uses, and what a program needs."""
    limits = _limits(entry)
    if limits is None or limits.mode != "burst" or entry.adopted or entry.busy:
        return None
    if now < entry.spared_until:
        return None
    devices = {part.uuid: books.devices.get(part.uuid) for part in limits.devices}
    if any(device is None for device in devices.values()):
        return None
    gained = list[tuple[str, Part]]()
    for part in limits.devices:
        device = devices[part.uuid]
        granted = resolve(entry.want, device) if device is not None else None
        if granted is None:
            return None
        compute = min(part.compute_milli, max(1, granted.compute_milli * keep_milli // 1000))
        memory = part.memory_bytes
        if entry.used_bytes is not None and not entry.keeps:  # what it holds above its limit is its own until it is free
            keep = max(granted.memory_bytes * keep_milli // 1000, int(entry.used_bytes * SPARE), least_bytes, MIB)
            memory = min(memory, keep // MIB * MIB)
        gained.append((part.uuid, Part(part.memory_bytes - memory, part.compute_milli - compute)))
    if all(part == Part(0, 0) for _, part in gained):
        return None
    return _Gain(entry.slice_id, entry, gained, whole=False)


def _still_needed(
    rooms: dict[str, Room], find: Callable[[], Place | None], own: list[_Gain], milder: list[_Gain], policy: GiveBack, now: float
) -> list[_Gain]:
    """Return those of the slices asked back for one who waits that they still need; none where that is not enough, or milder means are."""
    spot = _with(rooms, own, find) if own else None
    if spot is None:
        return []
    busy = milder and not all(_is_idle(gain.entry, policy, now) for gain in own)
    if busy and _with(rooms, milder, find) is not None:
        return []
    return _fewest(rooms, find, own, spot)


def _needed(rooms: dict[str, Room], find: Callable[[], Place | None], stages: Iterable[list[_Gain]]) -> list[_Gain]:
    """Return the mildest and fewest that make room; nothing where even all would not."""
    chosen: dict[str, _Gain] = {}
    for gains in stages:

        def first(count: int, before: dict[str, _Gain] = chosen, gains: list[_Gain] = gains) -> dict[str, _Gain]:
            return before | {gain.slice_id: gain for gain in gains[:count]}

        def enough(count: int, first: Callable[[int], dict[str, _Gain]] = first) -> bool:
            return _with(rooms, first(count).values(), find) is not None

        if not enough(len(gains)):
            chosen = first(len(gains))
            continue
        count = bisect_left(range(len(gains)), True, key=enough)
        enough_of_them = list(first(count).values())
        return _fewest(rooms, find, enough_of_them, _with(rooms, enough_of_them, find) or [])
    return []


def _fewest(rooms: dict[str, Room], find: Callable[[], Place | None], enough: list[_Gain], spot: Place) -> list[_Gain]:
    """Return those of `enough`, with which `spot` was found, that are needed: some may be on other devices."""
    there = {room.device.uuid for room, _ in spot}
    chosen = [gain for gain in enough if any(uuid in there for uuid, _ in gain.parts)]
    for gain in list(chosen):
        rest = [one for one in chosen if one is not gain]
        if _with(rooms, rest, find) is not None:
            chosen = rest
    return chosen


def _with(rooms: dict[str, Room], gains: Iterable[_Gain], find: Callable[[], Place | None]) -> Place | None:
    """Return what is found while all of `gains` are free."""
    parts = [part for gain in gains for part in gain.parts]
    _give(rooms, parts)
    found = find()
    _give(rooms, parts, back=False)
    return found


def _give(rooms: dict[str, Room], parts: Iterable[tuple[str, Part]], *, back: bool = True) -> None:
    for uuid, part in parts:
        if uuid in rooms:
            rooms[uuid].give_back(part) if back else rooms[uuid].take(part)


def _is_idle(entry: Entry, policy: GiveBack, now: float) -> bool:
    return policy.end_idle_after_seconds is not None and _idle_for(entry, now) >= policy.end_idle_after_seconds


def _ask(entry: Entry, policy: GiveBack, asked: dict[str, Ask], claim: Claim, now: float) -> Ask:
    idle = _is_idle(entry, policy, now)
    notice = policy.notice_seconds if idle else policy.busy_notice_seconds or 0.0
    before = asked.get(entry.slice_id)
    due, used_again = now + notice, not idle
    if before is not None:  # what was promised is never cut short, and one that is used again has more time once
        used_again = before.used_again or not idle
        due = max(due, before.due) if used_again and not before.used_again else before.due
    why = f"it uses what is guaranteed to {claim.whose} and was lent"
    claimant = claim.entry.slice_id
    since = min((one.since for one in asked.values() if one.claimant == claimant), default=now)
    return Ask(entry.slice_id, entry.request.owner, "guarantee", due, why, idle, claimant, used_again, since)


def _less(one: Part, other: Part) -> Part:
    return Part(max(0, one.memory_bytes - other.memory_bytes), max(0, one.compute_milli - other.compute_milli))
