"""One-move hints: whose move, or end, would let in somebody who waits, of servers that are idle. Pure; nothing is moved by it.

Idle is what the ledger calls so (`Entry.idle_from`), for as long as the policy of parking says. A parked server holds nothing: to move it
would help nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from nbgpu.models import GrantState, Hint, Hints

from .books import Books, Entry
from .core import Core
from .idle import IdlePolicy
from .placement import Policy, one_move, place
from .shapes import Part, Want

Held = Mapping[str, Sequence[tuple[str, Part]]]
IDLE_SECONDS = 900.0
"""How long a server must have been idle where parking is off and no policy says."""
MOST_WAITING = 20
"""Of the queue, the first so many are looked at; of equal requests once."""
MOST_ENDS = 100
"""For each of them so many idle servers, longest idle first, are looked at for what their end would give."""


def answer(core: Core, now: float) -> Hints:
    """Return the hints for those who wait, in the order of the queue."""
    idle = idle_ones(core.books, core.settings.idle, now)
    parked = sum(one.full is not None for one in core.books.entries.values())
    waiting = core.books.waiting()
    held = _held(idle)
    known: dict[tuple[Want, frozenset[str]], Hint | None] = {}
    found: list[Hint] = []
    for entry in waiting[:MOST_WAITING]:
        if entry.holder or entry.kept or not idle:  # who waits for a quota, or for what is kept for others, is not helped by room
            continue
        if entry.earmark:  # what is kept for it counts for it alone
            told = hint(core.books, waiting, entry, idle, held, core.settings.policy, now)
        else:
            kind = entry.want, core.books.closed(entry)
            if kind not in known:
                known[kind] = hint(core.books, waiting, entry, idle, held, core.settings.policy, now)
            told = known[kind]
        if told is not None:
            found.append(told.model_copy(update={"request_id": entry.slice_id, "owner": entry.request.owner}))
    return Hints(hints=found, idle_count=len(idle), parked_count=parked, waiting_count=len(waiting))


def idle_ones(books: Books, policy: IdlePolicy, now: float) -> list[Entry]:
    """Return the servers that could be moved, longest idle first; not of those whom the policy of parking protects."""
    after_seconds = IDLE_SECONDS if policy.after_seconds is None else policy.after_seconds
    there = (one for one in books.entries.values() if one.state is GrantState.bound and one.idle_from is not None)
    free = (one for one in there if one.full is None and not one.parking and one.wanted is None and one.moving is None and not one.busy)
    long = [one for one in free if not policy.protects(one) and now - (one.idle_from or 0.0) >= after_seconds]
    return sorted(long, key=lambda one: (one.idle_from or 0.0, one.number))


def _held(idle: Iterable[Entry]) -> Held:
    """Return what could be moved, by device: slices of one device."""
    found: dict[str, list[tuple[str, Part]]] = {}
    for one in idle:
        if len(parts := one.own_parts()) == 1:
            found.setdefault(parts[0][0], []).append((one.slice_id, parts[0][1]))
    return found


def hint(
    books: Books, waiting: Iterable[Entry], entry: Entry, idle: Sequence[Entry], held: Held, policy: Policy, now: float
) -> Hint | None:
    """Return how one of `idle` lets `entry` in: by its move if that will do, else by its end; None: one is not enough, or it fits."""
    barred = {uuid for one in waiting if one is not entry for uuid in one.earmark} | books.kept() | books.closed(entry)
    move = one_move(books.ordered_rooms(), books.buckets, held, entry.want, barred=barred, policy=policy)
    if move is not None:
        to = move.to[0][0].device
        devices = [room.device.uuid for room, _ in move.lets_in]
        return _hint("move", books.entries[move.slice_id], entry, [move.source], devices, now, to_device=to.uuid, to_node=to.node)
    if books.fitting(entry.want, barred, None, policy) is not None:
        return None
    for one in idle[:MOST_ENDS]:
        devices = _after_end(books, entry.want, one, barred, policy)
        if devices:
            return _hint("end", one, entry, [uuid for uuid, _ in one.own_parts()], devices, now)
    return None


def _after_end(books: Books, want: Want, gone: Entry, barred: Set[str], policy: Policy) -> list[str]:
    """Return where `want` goes when a slice has ended: on that slice's node, or nowhere."""
    if gone.slice is None:
        return []
    rooms = {room.device.uuid: room.copy() for room in books.buckets.of([gone.slice.node])}
    for uuid, part in gone.own_parts():
        if uuid in rooms:
            rooms[uuid].give_back(part)
    found = place(list(rooms.values()), want, barred=barred, policy=policy)
    return [room.device.uuid for room, _ in found or ()]


def _hint(kind: str, idle: Entry, entry: Entry, source: list[str], devices: list[str], now: float, **to: str) -> Hint:
    return Hint.model_validate(
        {
            "kind": kind,
            "request_id": entry.slice_id,
            "owner": entry.request.owner,
            "slice_id": idle.slice_id,
            "slice_owner": idle.request.owner,
            "idle_seconds": now - (idle.idle_from or now),
            "from_devices": source,
            "devices": devices,
            **to,
        }
    )
