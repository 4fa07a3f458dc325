"""What a user can have now where what they want is not free: the largest that is. Pure; `form.ask` and the queue page ask the pool."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbgpu.errors import NbgpuError
from nbgpu.models import Availability, DeviceBooks
from nbgpu.quantities import WHOLE_MILLI

from .options import Wish
from .profiles import Profile, wish_of

SHARES = ("1", "7/8", "3/4", "2/3", "5/8", "1/2", "3/8", "1/3", "1/4", "1/6", "1/8", "1/12", "1/16")
"""Of one GPU, that a custom choice is tried with."""
MOST_EXACT = 3
MOST_CHOICES = 60
"""The pool answers 100 shapes at a time."""
_KEPT = ("gpu_mode", "gpu_model")


@dataclass(frozen=True)
class Choice:
    """One thing that could be started."""

    options: Mapping[str, Any]
    """``user_options`` that stand for it."""
    profile: str
    """Name of its profile, for people."""
    wish: Wish

    @property
    def value(self) -> str:
        """The options as a form sends them, in a field of one value (`profiles.options_of` reads it)."""
        return json.dumps(self.options, sort_keys=True, ensure_ascii=False)


class Tried(NamedTuple):
    """Choices, and what the pool says of each."""

    choices: Sequence[Choice]
    answers: Sequence[Availability]

    def of(self, slugs: Iterable[str]) -> Tried:
        """Return those of some profiles."""
        wanted = set(slugs)
        pairs = [pair for pair in zip(self.choices, self.answers, strict=True) if pair[0].options.get("profile") in wanted]
        return Tried([choice for choice, _ in pairs], [answer for _, answer in pairs])


NOT_TRIED = Tried((), ())


@dataclass(frozen=True)
class Free:
    """A choice that is free now, as the pool has just said."""

    choice: Choice
    answer: Availability


def free_shares(books: Iterable[DeviceBooks]) -> list[str]:
    """Return the shares that exactly fill what is free of a GPU, the largest first."""
    found: set[int] = set()
    for book in books:
        usable = book.device.usable_bytes
        if book.device.healthy and usable > 0:
            found.add(min(WHOLE_MILLI - book.compute_granted_milli, (usable - book.memory_granted_bytes) * WHOLE_MILLI // usable))
    return [f"{milli / 10:g}%" for milli in sorted(found, reverse=True) if 0 < milli < WHOLE_MILLI][:MOST_EXACT]


def choices(
    profiles: Iterable[Profile],
    configured: Mapping[str, Any],
    wanted: Mapping[str, Any] | None = None,
    books: Iterable[DeviceBooks] = (),
) -> list[Choice]:
    """Return what could be asked for: each profile, each choice of its options in turn, and shares where a user may say how much.

    Parameters
    ----------
    books : iterable of DeviceBooks
        The pool's devices: such shares are also what is free of one.
    wanted : mapping, optional
        ``user_options`` of what somebody waits for: what they chose beside the amount is kept where it can be, and comes first.
    """
    wanted = wanted or {}
    profiles, shares = list(profiles), [*free_shares(books), *SHARES]
    mine = [one for one in profiles if one["slug"] == wanted.get("profile")]
    found: dict[str, Choice] = {}
    for profile in [*mine, *(one for one in profiles if one not in mine)]:
        for options in _variants(profile, wanted, shares):
            try:
                wish = wish_of(profile, options, configured)
            except NbgpuError:
                continue
            if wish is not None:
                choice = Choice(options, profile["display_name"], wish)
                found.setdefault(choice.value, choice)
    return list(found.values())[:MOST_CHOICES]


def largest_free(asked: Sequence[Choice], answers: Sequence[Availability], than: tuple[Wish, Availability] | None = None) -> Free | None:
    """Return the largest of `asked` that is free now, the first of several; with `than` only what is smaller than that."""
    limit = _size(*than) if than is not None else None
    best: Free | None = None
    for choice, answer in zip(asked, answers, strict=True):
        size = _size(choice.wish, answer)
        if answer.state != "free" or (limit is not None and not _smaller(size, limit)):
            continue
        if best is None or size > _size(best.choice.wish, best.answer):
            best = Free(choice, answer)
    return best


def any_smaller(asked: Sequence[Choice], answers: Sequence[Availability], than: tuple[Wish, Availability]) -> bool:
    """Return whether some of `asked`, free or not, is smaller than that and may be had one day."""
    limit = _size(*than)
    return any(
        answer.state in ("free", "wait") and _smaller(_size(choice.wish, answer), limit)
        for choice, answer in zip(asked, answers, strict=True)
    )


def _variants(profile: Profile, wanted: Mapping[str, Any], shares: Iterable[str]) -> Iterable[dict[str, Any]]:
    base = {"profile": profile["slug"]}
    if profile.get("gpu_custom"):
        kept = {name: wanted[name] for name in _KEPT if wanted.get(name)}
        for share in shares:
            yield {**base, **kept, "gpu_fraction": share}
        return
    options: Mapping[str, Any] = profile.get("profile_options") or {}
    if profile["slug"] == wanted.get("profile"):
        base.update({key: value for key, value in wanted.items() if key.partition("--")[0] in options})
    yield base
    for name, option in options.items():
        for choice in option.get("choices") or {}:
            rest = {key: value for key, value in base.items() if key.partition("--")[0] != name}
            yield {**rest, name: choice}


def _size(wish: Wish, answer: Availability) -> tuple[int, int]:
    """Return GPU time and memory in all, the least of any model: what one gets for sure."""
    devices = wish.shape.device_count
    return min(answer.compute_milli.values(), default=0) * devices, min(answer.memory.values(), default=0) * devices


def _smaller(one: tuple[int, int], than: tuple[int, int]) -> bool:
    return one != than and one[0] <= than[0] and one[1] <= than[1]
