"""Quotas: how much a user or a group may hold (limit), and how much is kept for them (guarantee).

In GPUs a slice counts, of each device, the larger of its shares of time and of memory (`shapes.counted_milli`), everywhere the same.

A user is a hub's user with all of its servers. A group's limit and guarantee are shared by its members, of all hubs.
Going over one's own limit is refused; a group at its limit waits, since what the others hold comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nbgpu.models import Owner
from nbgpu.quantities import WHOLE_MILLI, format_memory, format_share

from .shapes import Amount, Part


@dataclass(frozen=True)
class Limits:
    """What a user or a group may hold; None = no limit."""

    limit_milli: int | None = None
    limit_bytes: int | None = None
    guarantee_milli: int = 0
    whose: str = ""
    """Of a user, in words: through which group these are theirs."""
    lend: bool = False
    """Others may use what the guarantee keeps while nobody it is kept for waits for it (`giveback`)."""
    weight: int = 1
    """Of a group: its share counts as so much less where the queue goes by shares (`fair`)."""
    per_user_milli: int | None = None
    """Of a group: what each of its members may hold."""
    per_user_bytes: int | None = None


@dataclass(frozen=True)
class Quotas:
    """All quotas of a pool."""

    default: Limits = Limits()
    users: Mapping[str, Limits] = field(default_factory=dict[str, Limits])
    groups: Mapping[str, Limits] = field(default_factory=dict[str, Limits])

    def any(self) -> bool:
        """Whether there is any quota at all."""
        return bool(self.users or self.groups or self.default != Limits())

    @cached_property
    def lent(self) -> list[tuple[str, str]]:
        """Return the guarantees that others may use: kind (``group`` or ``user``) and name."""
        return [(kind, name) for kind, name, limits in self.guaranteed if limits.lend]

    @cached_property
    def guaranteed(self) -> list[tuple[str, str, Limits]]:
        """Return all guarantees: kind (``group`` or ``user``), name and limits."""
        kinds = (("group", self.groups), ("user", self.users))
        return [(kind, name, limits) for kind, of in kinds for name, limits in of.items() if limits.guarantee_milli]

    def never_free_milli(self, owner: Owner, groups: Sequence[str]) -> int:
        """Return how much of a pool is always held by others whom it is guaranteed to, or kept for them."""
        others = (one for kind, name, one in self.guaranteed if not one.lend and not concerns(kind, name, owner, groups))
        return sum(limits.guarantee_milli for limits in others)

    def counted(self, groups: Sequence[str]) -> list[str]:
        """Return those of `groups` that have a quota."""
        return [name for name in groups if name in self.groups]

    def of_user(self, user: str, groups: Sequence[str]) -> Limits:
        """Return a user's own limits: named ones, else the most generous of the groups', else the default."""
        named = self.users.get(user)
        if named is not None:
            return named
        milli = [(value, name) for name in groups if name in self.groups and (value := self.groups[name].per_user_milli) is not None]
        memory = [value for name in groups if name in self.groups and (value := self.groups[name].per_user_bytes) is not None]
        return Limits(
            limit_milli=max(milli)[0] if milli else self.default.limit_milli,
            limit_bytes=max(memory, default=self.default.limit_bytes),
            guarantee_milli=self.default.guarantee_milli,
            whose=f" (as of each in group {max(milli)[1]})" if milli else "",
        )


@dataclass(frozen=True)
class Holding:
    """What one request holds, or would hold at least."""

    owner: Owner
    groups: tuple[str, ...]
    amount: Amount
    granted: bool
    releasing: bool

    @property
    def user(self) -> tuple[str, str]:
        """The user, of one hub."""
        return self.owner.hub, self.owner.user


def refusal(quotas: Quotas, holdings: Iterable[Holding], owner: Owner, groups: Sequence[str], asked: Amount) -> str | None:
    """Return why `owner` may not ask for `asked` in all, or None.

    What is on its way back does not count: a server that restarts is not refused for its own past, it waits for it.
    """
    limits = quotas.of_user(owner.user, groups)
    mine = [one for one in holdings if one.user == (owner.hub, owner.user) and not one.releasing]
    if limits.limit_milli is not None and sum(one.amount.counted_milli for one in mine) + asked.counted_milli > limits.limit_milli:
        held = [(one.owner.server, words_of(one.amount)) for one in mine]
        return f"Your quota is {format_gpus(limits.limit_milli)}{limits.whose}: {_said(held, words_of(asked))}"
    if limits.limit_bytes is not None and sum(one.amount.memory_bytes for one in mine) + asked.memory_bytes > limits.limit_bytes:
        held = [(one.owner.server, format_memory(one.amount.memory_bytes)) for one in mine]
        return f"Your quota is {format_memory(limits.limit_bytes)} of GPU memory: {_said(held, format_memory(asked.memory_bytes))}"
    for name in groups:
        group = quotas.groups.get(name, Limits())
        if group.limit_milli is not None and asked.counted_milli > group.limit_milli:
            return f"The quota of your group {name} is {format_gpus(group.limit_milli)} in all: {_said([], words_of(asked))}"
        if group.limit_bytes is not None and asked.memory_bytes > group.limit_bytes:
            memory = format_memory(group.limit_bytes)
            return f"The quota of your group {name} is {memory} of GPU memory in all: {_said([], format_memory(asked.memory_bytes))}"
    return None


def format_gpus(milli: int) -> str:
    """Return an amount of GPU for people: ``a quarter of a GPU``, ``half a GPU``, ``1.5 GPUs``."""
    if milli == 0:
        return "no GPU"
    if milli == WHOLE_MILLI // 2:
        return "half a GPU"
    if milli < WHOLE_MILLI:
        return f"{format_share(milli)} of a GPU"
    whole, rest = divmod(milli, WHOLE_MILLI)
    return "1 GPU" if milli == WHOLE_MILLI else f"{whole}{f'.{rest:03d}'.rstrip('0') if rest else ''} GPUs"


def concerns(kind: str, name: str, owner: Owner, groups: Sequence[str]) -> bool:
    """Return whether the guarantee of a group or a user (`kind`) is also that of `owner`."""
    return name in groups if kind == "group" else name == owner.user


def words_of(amount: Amount) -> str:
    """Return for people what an amount counts in GPUs, and where it is the memory that counts, of how much."""
    gpus = format_gpus(amount.counted_milli)
    return f"{format_memory(amount.memory_bytes)} of GPU memory, which counts as {gpus}" if amount.by_memory else gpus


def _said(held: Sequence[tuple[str, str]], asked: str) -> str:
    parts = [f"{amount} on {_server(server)}" for server, amount in held]
    if not parts:
        return f"you asked for {asked}."
    return f"you hold {', '.join(parts)} and asked for {asked}."


def _used(limit: Limits, held: Amount) -> str:
    parts: list[str] = []
    if limit.limit_milli is not None:
        counting = ", counting memory" if held.by_memory else ""
        parts.append(f"{format_gpus(limit.limit_milli)} in all, {format_gpus(held.counted_milli)} held{counting}")
    if limit.limit_bytes is not None:
        memory = format_memory(held.memory_bytes) if held.memory_bytes else "no GPU memory"
        parts.append(f"{format_memory(limit.limit_bytes)} in all, {memory} held")
    return "; ".join(parts)


def _server(name: str) -> str:
    return f"'{name}'" if name else "your default server"


Account = tuple[str, ...]


def accounts(owner: Owner, groups: Sequence[str]) -> list[Account]:
    """Return whose quotas a slice of `owner` counts for."""
    return [("user", owner.hub, owner.user), *(("group", name) for name in groups)]


@dataclass
class Tally:
    """What is granted, by account: what limits and guarantees are held against while granting."""

    quotas: Quotas
    held: dict[Account, Amount]
    called: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """Of guarantees that are lent: what those who wait have a right to."""

    @classmethod
    def of(cls, quotas: Quotas, holdings: Iterable[Holding]) -> Tally:
        """Return the tally of all granted `holdings`, with what is on its way back."""
        tally = cls(quotas, {})
        for one in holdings:
            if one.granted:
                tally._book(accounts(one.owner, one.groups), one.amount)
        return tally

    def take(self, owner: Owner, groups: Sequence[str], amount: Amount) -> None:
        """Count `amount` as held by `owner` from now on."""
        self._book(accounts(owner, groups), amount)
        for kind, name in self.called:
            if concerns(kind, name, owner, groups):
                self.called[kind, name] = max(0, self.called[kind, name] - amount.counted_milli)

    def call(self, waiting: Iterable[tuple[Owner, Sequence[str], int]]) -> None:
        """Keep of the guarantees that are lent what those who wait have a right to.

        Parameters
        ----------
        waiting : iterable of (owner, groups, milli-GPU)
            In the order in which they are served.
        """
        lent = self.quotas.lent
        self.called = dict.fromkeys(lent, 0)
        unmet = {account: self.unmet_milli(*account) for account in lent}
        for owner, groups, milli in waiting if lent else ():
            for kind, name in lent:
                mine = concerns(kind, name, owner, groups)
                if mine and self.called[kind, name] + milli <= unmet[kind, name]:
                    self.called[kind, name] += milli

    def unmet_milli(self, kind: str, name: str) -> int:
        """Return how much of a guarantee is not held; below 0: how much is held beyond it."""
        limits = (self.quotas.groups if kind == "group" else self.quotas.users).get(name, Limits())
        return limits.guarantee_milli - self._held_milli(kind, name)

    def reserve(self, owner: Owner, groups: Sequence[str], amount: Amount) -> None:
        """Keep `amount` of the quotas of `owner` for a request of theirs that waits."""
        self._book(accounts(owner, groups), amount)

    def _book(self, of: Iterable[Account], amount: Amount) -> None:
        for account in of:
            self.held[account] = self.held.get(account, Amount()).plus(amount)

    def left(self, owner: Owner, groups: Sequence[str]) -> tuple[Part | None, str]:
        """Return what `owner` may still take in all, milli-GPU as they are counted (None = no limit), and in words, by whose limit."""
        if not self.quotas.any():
            return None, ""
        left_milli, left_bytes, why = 2**62, 2**62, ""
        user = self.quotas.of_user(owner.user, groups)
        limits = [(user, "your quota")]
        limits += [(self.quotas.groups[name], f"the quota of your group {name}") for name in groups if name in self.quotas.groups]
        for (limit, words), account in zip(limits, accounts(owner, self.quotas.counted(groups)), strict=True):
            held = self.held.get(account, Amount())
            milli = 2**62 if limit.limit_milli is None else limit.limit_milli - held.counted_milli
            memory = 2**62 if limit.limit_bytes is None else limit.limit_bytes - held.memory_bytes
            if milli < left_milli or memory < left_bytes:
                left_milli, left_bytes, why = min(milli, left_milli), min(memory, left_bytes), f"{words} ({_used(limit, held)})"
        return (None, "") if not why else (Part(left_bytes, left_milli), why)

    def cap(self, owner: Owner, groups: Sequence[str], device_count: int) -> tuple[Part | None, str]:
        """Return what `owner` may still take of each of so many devices, and whose limit it is, as in `left`."""
        left, words = self.left(owner, groups)
        return None if left is None else Part(left.memory_bytes // device_count, left.compute_milli // device_count), words

    def covers(self, owner: Owner, groups: Sequence[str], asked_milli: int) -> bool:
        """Return whether what is left of a guarantee of theirs covers so much."""
        mine = ((kind, name) for kind, name, _ in self.quotas.guaranteed if concerns(kind, name, owner, groups))
        return any(self.unmet_milli(*one) >= asked_milli for one in mine)

    def kept_milli(self, owner: Owner, groups: Sequence[str], asked_milli: int) -> int:
        """Return how much of what is free is kept from `owner` for the guarantees of others.

        Nothing is kept from one whose own guarantee covers the request.
        """
        if self.covers(owner, groups, asked_milli):
            return 0
        kept = 0
        for kind, name, limits in self.quotas.guaranteed:
            unmet = 0 if concerns(kind, name, owner, groups) else max(0, self.unmet_milli(kind, name))
            kept += min(unmet, self.called.get((kind, name), 0)) if limits.lend else unmet
        return kept

    def _held_milli(self, kind: str, name: str) -> int:
        return sum(held.counted_milli for account, held in self.held.items() if account[0] == kind and account[-1] == name)
