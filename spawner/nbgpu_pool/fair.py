"""Who is served next among groups: the one with the lowest dominant share (Ghodsi et al., NSDI 2011). Pure.

A group's dominant share is the larger of two: of all GPU time and of all GPU memory what its members hold, over its weight. Who is in
no group with a quota stands alone, with weight 1. Within a group it goes by arrival.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from .books import Books, Entry
from .quotas import Account, Quotas, accounts
from .shapes import Amount

UNIT = 10**9
"""Shares are compared as integers, in parts of this."""


class Fair:
    """The order of a queue.

    Parameters
    ----------
    books : Books
        What is held, and the devices of which it is a share.
    """

    def __init__(self, books: Books, quotas: Quotas):
        self._books, self._quotas = books, quotas
        self._known: tuple[int, list[int], list[Entry]] = -1, [], []

    def __call__(self, waiting: list[Entry]) -> list[Entry]:
        """Return `waiting` (by arrival) in the order in which they are served."""
        changes, before, found = self._known
        numbers = [one.number for one in waiting]
        if changes != self._books.changes or before != numbers:
            found = self._arranged(waiting)
            self._known = self._books.changes, numbers, found
        # whom others were served before although it was their turn, often or long enough: they wait no longer for anybody
        return sorted(found, key=lambda one: not one.protected or bool(one.holder))

    def _arranged(self, waiting: list[Entry]) -> list[Entry]:
        """Play it out: as if each were granted what it asks for at least."""
        held = self._held()
        lines: dict[Account, deque[Entry]] = {}
        for entry in waiting:
            lines.setdefault(self._account(entry, held), deque()).append(entry)
        heap = [(self._share(held.get(account), account), line[0].number, account) for account, line in lines.items()]
        heapq.heapify(heap)
        found: list[Entry] = []
        while heap:
            _, _, account = heapq.heappop(heap)
            line = lines[account]
            entry = line.popleft()
            found.append(entry)
            held[account] = held.get(account, Amount()).plus(self._books.cost(entry.want) or Amount())
            if line:
                heapq.heappush(heap, (self._share(held[account], account), line[0].number, account))
        return found

    def _held(self) -> dict[Account, Amount]:
        held: dict[Account, Amount] = {}
        for one in self._books.holdings(frozenset(self._quotas.groups), granted_only=True):
            for account in self._of(accounts(one.owner, one.groups)):
                held[account] = held.get(account, Amount()).plus(one.amount)
        return held

    def _account(self, entry: Entry, held: dict[Account, Amount]) -> Account:
        """Return for whom a request counts: of several groups the one that has least."""
        mine = self._of(accounts(entry.request.owner, self._quotas.counted(entry.request.groups)))
        return min(mine, key=lambda account: (self._share(held.get(account), account), account))

    def _of(self, all_of: list[Account]) -> Iterable[Account]:
        return [account for account in all_of if account[0] == "group"] or all_of

    def _share(self, held: Amount | None, account: Account) -> int:
        if held is None:
            return 0
        weight = self._quotas.groups[account[1]].weight if account[0] == "group" else 1
        parts = zip((held.compute_milli, held.memory_bytes), self._books.whole(), strict=True)
        return max(part * UNIT // max(1, whole) for part, whole in parts) // weight
