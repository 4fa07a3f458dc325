"""Who is to blame, as surely as a process may be ended for. Pure: samples in, offences out.

The watchdog tells what is not as it should be. Here is only what no process under the limiter can do, however unlucky the moment:
a number of the driver and the slots' words are read one after the other, limits are lowered under what is held, contexts cost more
than they did when they were counted, and the dying hold memory a while longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .policy import Kind
from .procs import Process
from .watchdog import COMPUTE_TOLERANCE_MILLI, OVER_LIMIT_TOLERANCE_BYTES

SETTLE_SECONDS = 5.0
"""So long after a limit was lowered what was asked for before may still arrive."""
GROWN_BYTES = OVER_LIMIT_TOLERANCE_BYTES
LIED_LOOKS = 5
"""After so many looks in a row with too much in the slice all who never told of theirs are to blame, not only one alone.
Who takes and gives back as fast as it can has told of what it holds at some of them."""
UNTOLD_MILLI = 200
"""So much more GPU time than a process tells of, NVML must see of it."""


class Held(NamedTuple):
    """A process of the slice on the device that is judged, as NVML sees it, and what its slots there say."""

    process: Process
    memory_bytes: int
    compute_milli: int
    told_bytes: int | None
    """What it tells that it holds, contexts included; None: it has no slot."""
    peak_bytes: int = 0
    """The most that it has ever told."""
    told_milli: int = 0


@dataclass(frozen=True)
class Offence:
    """What a process does that no process under the limiter can."""

    slice_id: str
    kind: Kind
    device: str
    process: Process
    memory_bytes: int
    allowed_bytes: int
    compute_milli: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """The same for the same case in the next sample."""
        return self.slice_id, self.kind, self.device, self.process


@dataclass
class Books:
    """What is remembered of a slice on a device."""

    limit_bytes: int
    allowed_bytes: int
    """The limit; after it was lowered, what is still held from before."""
    settled_at: float = 0.0
    good: dict[Process, int] = field(default_factory=dict[Process, int])
    """What each process held when all was as it should be."""
    told: dict[Process, int] = field(default_factory=dict[Process, int])
    """The most that each has told. Who shares a slice may wipe another's slot: what was once there is not forgotten for that."""

    lied: dict[Process, int] = field(default_factory=dict[Process, int])
    """In how many looks in a row each did not tell of what it had, while the slice had too much."""

    def remember(self, held: Sequence[Held]) -> list[Held]:
        """Return what each process has told by now, those whose slot is gone or empty among them."""
        known = [
            one._replace(told_bytes=one.told_bytes or 0, peak_bytes=max(one.peak_bytes, one.told_bytes or 0, self.told.get(one.process, 0)))
            if one.told_bytes is not None or one.process in self.told
            else one
            for one in held
        ]
        self.told = {one.process: one.peak_bytes for one in known if one.told_bytes is not None}
        return known

    def look(self, limit_bytes: int, total_bytes: int, now: float) -> None:
        """Take note of the limit and of all that is held, at CLOCK_MONOTONIC `now`.

        A limit of 0 is that of a parked slice: it was set when nothing was held any more, so that nothing of before is excused.
        """
        if limit_bytes == 0:
            self.limit_bytes = self.allowed_bytes = 0
            return
        if limit_bytes < self.limit_bytes:
            self.settled_at = now + SETTLE_SECONDS
        self.limit_bytes = limit_bytes
        held = total_bytes if now >= self.settled_at else self.allowed_bytes
        self.allowed_bytes = max(limit_bytes, min(self.allowed_bytes, held))


def judge(
    slice_id: str,
    device: str,
    held: Sequence[Held],
    books: Books,
    cap_bytes: int,
    strict_milli: int | None,
) -> list[Offence]:
    """Return the offences of a slice on one device, and keep in `books` what they are judged by.

    Parameters
    ----------
    cap_bytes : int
        What a process may hold beyond what it tells.
    strict_milli : int or None
        The slice's share when its mode is strict, else None.
    """
    found: list[Offence] = []
    allowed = books.allowed_bytes
    held = books.remember(held)
    for one in held:
        # What it has ever told, not what it tells now: it may have freed between the driver's number and its own.
        beyond = one.memory_bytes - min(one.peak_bytes, allowed)
        if one.told_bytes is None and one.memory_bytes:
            found.append(Offence(slice_id, "unlimited", device, one.process, one.memory_bytes, 0, one.compute_milli))
        elif one.told_bytes is not None and beyond > cap_bytes:
            found.append(Offence(slice_id, "overhead", device, one.process, beyond, cap_bytes))
    total = sum(one.memory_bytes for one in held)
    most = allowed + OVER_LIMIT_TOLERANCE_BYTES + cap_bytes * sum(one.told_bytes is not None for one in held)
    if total <= most:
        books.good = {one.process: one.memory_bytes for one in held}
        books.lied = {}
    else:
        blamed = _who_took_too_much(held, books, allowed, cap_bytes)
        found += [Offence(slice_id, "over-limit", device, process, total, books.limit_bytes) for process in blamed]
    busy = sum(one.compute_milli for one in held)
    if strict_milli is not None and busy > strict_milli + COMPUTE_TOLERANCE_MILLI:
        for one in held:
            if one.compute_milli > one.told_milli + UNTOLD_MILLI:
                found.append(Offence(slice_id, "over-share", device, one.process, one.memory_bytes, 0, one.compute_milli))
    return found


def _who_took_too_much(held: Sequence[Held], books: Books, allowed_bytes: int, cap_bytes: int) -> list[Process]:
    """Return who took a slice above its limit; nobody, where it could have been one or the other.

    An ordinary process grows only while what all tell fits. So it is one that has more than the slice alone, else one that does not
    tell what it has, else (all tell the truth, and one ignores the answer) the only one that has grown since all was well. Several that do
    not tell hide behind each other only for `LIED_LOOKS`.
    """
    alone = [one.process for one in held if one.memory_bytes > allowed_bytes + OVER_LIMIT_TOLERANCE_BYTES + cap_bytes]
    untold = [one.process for one in held if one.told_bytes is None and one.memory_bytes]
    lying = [one.process for one in held if one.memory_bytes - (one.told_bytes or 0) > cap_bytes]
    books.lied = {process: books.lied.get(process, 0) + 1 for process in lying}
    if alone or untold:
        return list(dict.fromkeys(alone + untold))
    grown = [one.process for one in held if one.memory_bytes > books.good.get(one.process, 0) + GROWN_BYTES]
    suspects = lying or grown
    return suspects if len(suspects) == 1 else [process for process in lying if books.lied[process] > LIED_LOOKS]


class Pending(NamedTuple):
    """An offence that has been seen, not yet often enough."""

    since: float
    looks: int
    seconds_looks: int
    """Those of the looks that come once a second."""


ACT_SECONDS = 0.5
ACT_LOOKS = 3
SHARE_LOOKS = 5


class Sure:
    """Lets through the offences that several looks in a row have shown, for half a second at least; GPU time for five seconds."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], Pending] = {}

    def pass_sure(self, offences: Sequence[Offence], now: float, each_second: bool) -> list[Offence]:
        """Return the offences of this look that are beyond doubt; an offence that a look did not show begins again.

        Parameters
        ----------
        each_second : bool
            False for a look between: GPU time is not sampled so often, and what is known of it stays.
        """
        seen: dict[tuple[object, ...], Pending] = {}
        sure: list[Offence] = []
        for one in offences:
            if one.kind == "over-share" and not each_second:
                continue
            before = self._seen.get(one.key, Pending(now, 0, 0))
            seen[one.key] = after = Pending(before.since, before.looks + 1, before.seconds_looks + each_second)
            if one.kind == "over-share":
                enough = after.seconds_looks >= SHARE_LOOKS
            else:
                enough = after.looks >= ACT_LOOKS and now - after.since >= ACT_SECONDS
            if enough:
                sure.append(one)
        if not each_second:
            seen |= {key: value for key, value in self._seen.items() if key[1] == "over-share"}
        self._seen = seen
        return sure

    def waits(self) -> bool:
        """Return whether looks ahead of their time would make something sure."""
        return any(key[1] != "over-share" and pending.looks < 2 * ACT_LOOKS for key, pending in self._seen.items())
