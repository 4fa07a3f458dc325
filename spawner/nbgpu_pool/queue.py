"""Who is served next: in order of arrival, or of what their groups hold (`fair`), with backfill, and nobody overtaken for ever.

A request that does not fit lets later ones pass until it has waited `overtake_seconds` or was passed `overtake_count` times.
From then on it is *protected*: the devices on which least must be freed for it are earmarked, and nobody else is placed there.
Sessions on them end, nothing new begins, so it gets in; the rest of the pool goes on serving others. Where those sessions are long ones
that does not bound how often it is passed: when that was `Fairness.most` times, nobody who came later gets any device that it could use.

Neither keeps anything from one whose own guarantee covers what they ask for, unless the one that is protected has such a right too. And
nothing is kept for a request for more than the guarantees of others leave of the pool: it would never have it.

A request is passed when a later one of another user is granted a device that it could use; one that is given back before a server ran in
it has passed nobody. Who waits for a quota is passed by nobody. A running server that grows passes those who wait too, each of them once:
else two users, one of whom waits, could have that one protected by growing and shrinking again and again.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from nbgpu.quantities import WHOLE_MILLI

from .books import Books, Entry, free_of, takes_of_free
from .placement import DEFAULT_POLICY, Place, Policy, nearest, of_use, place
from .quotas import Quotas, Tally, format_gpus, words_of
from .shapes import Amount, Part, Want

MOST_PER_DEVICE = 10
"""`Fairness.most` is at least that for each device: to keep a whole pool for one who waits costs everybody, and in a large one a hundred
pass in a minute.
"""
MOST_PROTECTED = 20
"""So many at a time have devices of their own kept for them, the first of the queue: for thousands it would take the pool's time."""


@dataclass(frozen=True)
class Fairness:
    """How long a request that does not fit may be overtaken."""

    overtake_count: int = 200
    overtake_seconds: float = 7200.0
    fair: bool = False
    """Groups are served by what they hold (`fair`): it is no overtaking that another group's turn comes first, however long that takes."""

    def most(self, devices: int) -> int:
        """Return how often a request that could use so many devices may be passed in all."""
        return max(4 * self.overtake_count, MOST_PER_DEVICE * devices)

    def protects(self, entry: Entry, now: float) -> bool:
        """Whether nobody may take `entry`'s room any more."""
        # who waits for a quota is passed by nobody, and keeps from nobody but those whose quota it is
        since = entry.passed_from if self.fair and not entry.holder else entry.enqueued
        return entry.overtaken >= self.overtake_count or (since is not None and now - since >= self.overtake_seconds)


KEPT_FOR = "guarantees of others and those who have waited long"


class Pass:
    """One walk over the queue.

    Parameters
    ----------
    books : Books
        What is free; `grant` books into it.
    quotas : Quotas
        Limits and guarantees.
    avoid : set of (node, want)
        Nodes that had no room for a pod of that shape: the last choice for it.
    kept : set of str
        Devices where nobody new is placed: a parked slice comes back there first.
    """

    def __init__(
        self,
        books: Books,
        quotas: Quotas,
        fairness: Fairness,
        policy: Policy = DEFAULT_POLICY,
        avoid: Set[tuple[str, Want]] = frozenset(),
        kept: Set[str] = frozenset(),
    ):
        self.books = books
        self.quotas = quotas
        self.fairness = fairness
        self.policy = policy
        self.avoid = avoid
        self.kept = kept
        self.rooms, self.coming = books.ordered_rooms(), books.coming_rooms()
        self.barred: set[str] = set()
        self.firm: set[str] = set()
        """Those of them that are kept from guarantees too: for one who waits for theirs."""
        self.protected = 0
        self.kept_milli = 0
        self.waiting: list[Entry] = []
        self._whole_milli = 0
        self._closed: set[Want] = set()
        """Of those for whom all that they could use is kept."""
        self._misfits: set[tuple[Want, Part | None, int, frozenset[str], bool]] = set()
        self.tally = Tally(quotas, books.granted_by(frozenset(quotas.groups)) if quotas.any() else {})
        if quotas.lent:
            self.tally.call(books.asking())

    def serve(self, now: float) -> list[Entry]:
        """Grant all that can be granted now; return those entries."""
        granted: list[Entry] = []
        plain = not self.quotas.any() and self.books.windows is None
        for entry in self.books.waiting():
            found = None if plain and self._known_misfit(entry) else self.find(entry)
            if found is None:
                self._wait(entry, now)
                continue
            groups = self.quotas.counted(entry.request.groups)
            self.books.give(entry, found, groups)
            self.tally.take(entry.request.owner, groups, self._amount(found))
            entry.earmark, entry.holder, entry.reason = (), "", None
            self.passed(entry, found, now)
            granted.append(entry)
        return granted

    def _known_misfit(self, entry: Entry) -> bool:
        """Return what `find` has found for another of its kind; for a queue of thousands without quotas and windows."""
        key = entry.want, None, len(self.barred) + len(self.kept), frozenset[str](), False
        known = not entry.earmark and key in self._misfits
        if known:
            entry.kept = ""
        return known

    def find(self, entry: Entry) -> Place | None:
        """Return where `entry` can go now, or None; `entry.holder` then says whose limit holds it, if one does."""
        owner, groups = entry.request.owner, entry.request.groups
        cap, words = self.tally.cap(owner, groups, entry.want.device_count)
        entry.holder = entry.kept = ""
        if cap is not None and self._over(entry.want, cap):
            entry.holder = words
            return None
        closed = self.books.closed(entry)
        found = self._search(entry, cap, closed, self.barred)
        if found is None and len(self.firm) < len(self.barred) and self._covered(entry):
            found = self._search(entry, cap, closed, self.firm)
            if found is not None and not self.tally.covers(owner, groups, self._amount(found).counted_milli):
                found = None  # there it counts more
        if found is None:
            return None
        if found[0][0].coming:
            return found
        asked = self._amount(found)
        covered = self.tally.covers(owner, groups, asked.counted_milli)
        kept = 0 if covered else self.tally.kept_milli(owner, groups, asked.counted_milli) + self.kept_milli
        # what is closed to this one is free for others, and no use to it
        closed_milli = sum(free_of(self.books.rooms[uuid]) for uuid in closed if uuid in self.books.rooms)
        free_milli = self.books.free_milli - closed_milli
        if free_milli - takes_of_free(found) < kept:
            entry.kept = f"{format_gpus(max(0, free_milli))} is free in all, of which {format_gpus(kept)} is kept for {KEPT_FOR}"
            entry.kept += f"; {words_of(asked)}" if asked.by_memory else ""
            return None
        return found

    def _covered(self, entry: Entry) -> bool:
        """Return whether a guarantee of its owner's covers the least that a request takes."""
        cost = self.books.cost(entry.want) if self.quotas.guaranteed else None
        return cost is not None and self.tally.covers(entry.request.owner, entry.request.groups, cost.counted_milli)

    def _search(self, entry: Entry, cap: Part | None, closed: frozenset[str], keeps: set[str]) -> Place | None:
        """Return where there is room for `entry` beside what is kept for others: `barred`, or `firm`."""
        taken = self.kept | closed
        barred = (keeps - set(entry.earmark)) | taken if entry.earmark or taken else keeps
        key = entry.want, cap, len(keeps) + len(self.kept), closed, keeps is self.firm
        if not entry.earmark and key in self._misfits:
            return None
        found = None
        if self.books.may_fit(entry.want):
            found = self._preferred(entry, barred, cap) or self._place(entry.want, barred, cap)
        if found is None and not entry.earmark:
            self._misfits.add(key)
            if cap is None and self.books.may_fit(entry.want) and (not barred or self._place(entry.want, frozenset(), None) is None):
                self.books.misfits(entry.want)
        return found

    def _amount(self, found: Place) -> Amount:
        return self.books.amount((room.device.uuid, part) for room, part in found)

    def passed(self, by: Entry, found: Place, now: float) -> None:
        """Note that those who wait are passed by one who gets a place that they could use too; by their own servers they are not."""
        if found[0][0].coming:  # there is one more for everybody
            return
        uuids = {found[0][0].device.uuid}
        for entry in self.waiting:
            if _passes(by, entry, uuids, self.books):
                entry.pass_by(now)
                by.passed.append(entry)
                if entry.overtaken in (self.fairness.overtake_count, self.fairness.most(len(self.books.of_use(entry.want)))):
                    self._keep(entry, now)

    def _preferred(self, entry: Entry, barred: Set[str], cap: Part | None) -> Place | None:
        """Return a place on what is kept for `entry`, or else not on what is soon kept for others; None: anywhere."""
        windows = self.books.windows
        if windows is None or not windows.kept:
            return None
        own, last = windows.own(entry), windows.last(entry)
        found = self._here(entry.want, barred | (self.books.rooms.keys() - own), cap) if own else None
        return found or (self._here(entry.want, barred | last, cap) if last else None)

    def bar_for(self, entry: Entry) -> None:
        """Keep its devices from others, those of one who waits for their own also from those who do."""
        self.barred.update(entry.earmark)
        if entry.earmark and self._covered(entry):
            self.firm.update(entry.earmark)

    def would_fit(self, want: Want, uuids: Set[str]) -> bool:
        """Return whether there is room on these devices, whoever they are kept for."""
        barred = self.barred | self.kept | (self.books.rooms.keys() - uuids)
        return self.books.fitting(want, barred, None, self.policy) is not None

    def keep_for_waiting(self, now: float, but: Entry | None = None) -> None:
        """Keep what those who wait have a right to, all but one: `find` then answers for a newcomer."""
        for entry in self.books.waiting():
            if entry is not but:
                self._wait(entry, now)

    def _place(self, want: Want, barred: Set[str], cap: Part | None) -> Place | None:
        """Return a place; of nodes that had no room for such a pod only where there is no other, of nodes to be started as the last."""
        found = None
        bad = {node for node, shape in self.avoid if shape == want}
        if bad:
            shy = barred | {room.device.uuid for room in self.rooms if room.device.node in bad}
            found = self._here(want, shy, cap)
        return found or self._here(want, barred, cap) or self._to_come(want, cap)

    def _here(self, want: Want, barred: Set[str], cap: Part | None) -> Place | None:
        return self.books.decide(want, barred, cap, self.policy)

    def _healthy(self, uuids: Iterable[str]) -> bool:
        rooms = (self.books.rooms.get(uuid) for uuid in uuids)
        return all(room is not None and room.device.healthy and not room.coming for room in rooms)

    def _to_come(self, want: Want, cap: Part | None) -> Place | None:
        return place(self.coming, want, cap=cap, policy=self.policy) if self.coming else None

    def elsewhere(self, entry: Entry, want: Want, but: Set[str], *, coming: bool) -> Place | None:
        """Return a place for `entry` on none of the nodes `but`; with `coming` also on one that has to be started."""
        barred = {uuid for one in self.books.waiting() for uuid in one.earmark}
        barred |= {room.device.uuid for room in self.rooms if room.device.node in but} | self.kept | self.books.closed(entry)
        return self._here(want, barred, None) or (self._to_come(want, None) if coming else None)

    def _over(self, want: Want, cap: Part) -> bool:
        cost = self.books.cost(want._replace(device_count=1))
        return cost is not None and (cost.counted_milli > cap.compute_milli or cost.memory_bytes > cap.memory_bytes)

    def _wait(self, entry: Entry, now: float) -> None:
        """Leave `entry` in the queue."""
        self.waiting.append(entry)
        entry.protected = False
        self._keep(entry, now)

    def _keep(self, entry: Entry, now: float) -> None:
        """Keep the room of one that waits, when it is protected: again where it was passed once too often in this very walk."""
        if not self.fairness.protects(entry, now):
            return
        cost = self.books.cost(entry.want)
        if cost is not None and self._never(entry, cost):
            entry.earmark = ()
            return
        anew, entry.protected = not entry.protected, True
        if entry.holder:
            if cost is not None:
                self.tally.reserve(entry.request.owner, self.quotas.counted(entry.request.groups), cost)
            return
        closed = self.books.closed(entry)
        others = self.barred if anew else self.barred - set(entry.earmark)
        if entry.overtaken >= self.fairness.most(len(self.books.of_use(entry.want))):
            entry.earmark = () if entry.want in self._closed else tuple(sorted(of_use(self.rooms, entry.want, barred=closed) - others))
            self._closed.add(entry.want)
        elif anew and self.protected >= MOST_PROTECTED:
            entry.earmark = ()
            return
        elif not entry.earmark or not self._healthy(entry.earmark) or (others | closed).intersection(entry.earmark):
            cap, _ = self.tally.cap(entry.request.owner, entry.request.groups, entry.want.device_count)
            entry.earmark = nearest(self.rooms, entry.want, barred=others | closed, cap=cap)
        self.protected += anew
        self.bar_for(entry)
        if anew and cost is not None and self.books.may_fit(entry.want) and self._fits(entry, closed):
            # It fits, but for others' guarantees: what comes free adds up for it instead of going to smaller ones.
            self.kept_milli += min(cost.counted_milli, WHOLE_MILLI * len(self.rooms))

    def _never(self, entry: Entry, cost: Amount) -> bool:
        """Return whether a request is for more than the guarantees of others ever leave of the pool."""
        kept = self.quotas.never_free_milli(entry.request.owner, entry.request.groups)
        if not kept:
            return False
        self._whole_milli = self._whole_milli or self.books.whole()[0]
        return self._whole_milli - kept < cost.counted_milli and not self._covered(entry)

    def _fits(self, entry: Entry, closed: Set[str]) -> bool:
        return self.books.fitting(entry.want, (self.barred - set(entry.earmark)) | closed, None, self.policy) is not None


def outgrow(books: Books, by: Entry, uuids: Set[str], now: float) -> None:
    """Note that those who wait are passed by a running server that takes more of the devices `uuids`: each of them once by each server."""
    if not uuids:
        return
    before = by.outgrown
    for entry in books.waiting():
        by.outgrown = max(by.outgrown, entry.number)
        if entry.number > before and _passes(by, entry, uuids, books):
            entry.pass_by(now)


def _passes(by: Entry, entry: Entry, uuids: Set[str], books: Books) -> bool:
    """Return whether `by` passes one who waits when it takes something of `uuids`: of another user, who could use one of them."""
    one, other = by.request.owner, entry.request.owner
    if entry.holder or (one.hub, one.user) == (other.hub, other.user):
        return False
    return bool((uuids & books.of_use(entry.want)) - books.closed(entry))


def hopeless(books: Books, want: Want) -> bool:
    """Whether no device of the pool, even empty and healthy, could ever hold `want`."""
    return place(books.empty_of_each_kind(), want) is None
