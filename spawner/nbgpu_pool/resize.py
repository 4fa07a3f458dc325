"""New limits of a running slice: what they would be, and whether they may. Pure."""

from __future__ import annotations

from nbgpu.errors import InvalidValue, NbgpuError, Refused
from nbgpu.models import Resize, Slice, SliceDevice
from nbgpu.quantities import MIB, format_memory, least_allowed, memory_share_bytes

from . import quotas as quota_rules
from .books import Books, Entry, takes_of_free
from .quotas import Holding, Quotas, Tally, format_gpus, words_of
from .shapes import Amount, Part, memory_field

RESIZE_SECONDS = 60.0
"""A growth that the node has not brought in force by then is taken back, so that its room is not kept for nothing."""


def target_of(entry: Entry, asked: Resize, books: Books) -> Slice:
    """Return the slice as `asked` wants it.

    Raises
    ------
    InvalidValue
        Nothing is asked, memory is given twice, or it is less than a MiB.
    """
    if asked.memory_bytes is not None and asked.memory_milli is not None:
        raise InvalidValue("memory_bytes", asked.memory_bytes, "left out when memory_milli is given: they say the same thing")
    if asked == Resize():
        raise InvalidValue("compute_milli", None, "given, unless memory_bytes, memory_milli or mode is")
    assert entry.slice is not None
    base = entry.wanted or entry.slice
    parts = [_part(part, asked, books) for part in base.devices]
    return base.model_copy(update={"devices": parts, "mode": asked.mode or base.mode})


def _part(part: SliceDevice, asked: Resize, books: Books) -> SliceDevice:
    memory = part.memory_bytes
    if asked.memory_bytes is not None:
        memory = asked.memory_bytes // MIB * MIB
    elif asked.memory_milli is not None:
        device = books.devices.get(part.uuid)
        if device is None:
            raise NbgpuError(f"GPU {part.uuid} is not there at the moment; say how many bytes.", code="no-room", status=409)
        memory = memory_share_bytes(device.usable_bytes, asked.memory_milli)
    if memory < MIB:
        raise InvalidValue("memory_milli", asked.memory_milli, "at least 1 MiB of memory")
    return part.model_copy(update={"memory_bytes": memory, "compute_milli": asked.compute_milli or part.compute_milli})


def must_hold_a_program(asked: Resize, target: Slice, books: Books, least_bytes: int) -> None:
    """Raise InvalidValue where `asked` leaves less memory than a program needs to start."""
    if asked.memory_bytes is None and asked.memory_milli is None:
        return
    for part in target.devices:
        device = books.devices.get(part.uuid)
        allowed = least_allowed(part.memory_bytes, device.usable_bytes, least_bytes) if device is not None else None
        if allowed is not None:
            field = memory_field(asked)
            raise InvalidValue(field, getattr(asked, field), allowed)


def must_fit(entry: Entry, target: Slice, books: Books, quotas: Quotas) -> None:
    """Raise unless quotas and devices have room for `target`, beside all that is booked and kept for others.

    Raises
    ------
    Refused
        Above a quota (code ``quota``).
    NbgpuError
        No room (409, ``no-room``).
    """
    assert entry.slice is not None
    grows = growth(entry, target)
    if not grows:
        return
    barred = {uuid for one in books.waiting() for uuid in one.earmark} | books.kept() | books.closed(entry)
    for uuid, more in grows.items():
        room = books.rooms.get(uuid)
        if room is None or not room.device.healthy:
            raise _no_room(f"GPU {uuid} is not healthy, or its node is away: nothing grows there now.")
        if uuid in barred:
            whom = books.windows.of([uuid], entry) if books.windows is not None else None
            words = "someone who has waited long" if whom is None else f"{whom.window.name} from {whom.until} on"
            raise _no_room(f"What comes free on GPU {room.device.index} is kept for {words}.")
        if more.memory_bytes > room.free_bytes:
            free = format_memory(max(0, room.free_bytes))
            raise _no_room(f"GPU {room.device.index} has {free} of memory free, and {format_memory(more.memory_bytes)} more are asked for.")
        if more.compute_milli > room.free_milli:
            free = format_gpus(max(0, room.free_milli))
            raise _no_room(f"GPU {room.device.index} has {free} of its time free, and {format_gpus(more.compute_milli)} more is asked for.")
    why = above_quota(entry, target, books, quotas)
    if why is not None:
        raise Refused(why, code="quota")
    if not quotas.any():
        return
    asked = _amount(target, books)
    kept_milli = _tally(entry, books, quotas).kept_milli(entry.request.owner, entry.slice.groups, asked.counted_milli)
    if books.free_milli - takes_of_free([(books.rooms[uuid], more) for uuid, more in grows.items() if uuid in books.rooms]) < kept_milli:
        free, kept = format_gpus(max(0, books.free_milli)), format_gpus(kept_milli)
        words = f"{free[:1].upper()}{free[1:]} is free in all, of which {kept} is kept for users and groups with a guarantee"
        raise _no_room(f"{words}; {words_of(asked)}." if asked.by_memory else f"{words}.")


def growth(entry: Entry, target: Slice) -> dict[str, Part]:
    """Return what `target` takes beyond what is booked for `entry`, by device; devices where it takes no more are left out."""
    held = dict(entry.own_parts())
    counts = {one.uuid: Part(one.memory_bytes, one.compute_milli) for one in target.devices}
    more = {uuid: part.larger(held[uuid]).without(held[uuid]) for uuid, part in counts.items()}
    return {uuid: part for uuid, part in more.items() if part != Part(0, 0)}


def above_quota(entry: Entry, target: Slice, books: Books, quotas: Quotas) -> str | None:
    """Return why `entry` may not hold `target` beside what its owner and their groups hold, or None."""
    if not quotas.any():
        return None
    asked = _amount(target, books)
    owner, groups = entry.request.owner, entry.slice.groups if entry.slice is not None else []
    mine = books.holdings(frozenset(quotas.groups), of=owner)
    why = quota_rules.refusal(quotas, _others(mine, entry, books), owner, groups, asked)
    if why is not None:
        return why
    left, words = _tally(entry, books, quotas).left(owner, groups)
    if left is not None and (asked.memory_bytes > left.memory_bytes or asked.counted_milli > left.compute_milli):
        return f"{words[:1].upper()}{words[1:]} is used up: what others hold must be given back first."
    return None


def _amount(target: Slice, books: Books) -> Amount:
    return books.amount((one.uuid, Part(one.memory_bytes, one.compute_milli)) for one in target.devices)


def _others(held: list[Holding], entry: Entry, books: Books) -> list[Holding]:
    """Return `held` without what `entry` itself holds."""
    own = books.holding(entry, frozenset())
    rest = list(held)
    for number, one in enumerate(rest):
        if one.owner == own.owner and (one.amount, one.releasing) == (own.amount, own.releasing):
            del rest[number]
            break
    return rest


def _tally(entry: Entry, books: Books, quotas: Quotas) -> Tally:
    held = books.holdings(frozenset(quotas.groups), granted_only=True)
    tally = Tally.of(quotas, _others(held, entry, books))
    if quotas.lent:
        tally.call(books.asking())
    return tally


def grows(now: Slice, target: Slice) -> bool:
    """Return whether any limit of `target` is above what is in force."""
    held = {one.uuid: one for one in now.devices}
    return any(
        one.memory_bytes > held[one.uuid].memory_bytes or one.compute_milli > held[one.uuid].compute_milli
        for one in target.devices
        if one.uuid in held
    )


def keeps_note(entry: Entry) -> str | None:
    """Return what the user of a slice should know that still holds more memory than its new limits; None of any other."""
    if not entry.keeps or entry.wanted is None or entry.slice is None:
        return None
    held, limit = (max(part.memory_bytes for part in of.devices) for of in (entry.slice, entry.wanted))
    return (
        f"The slice was made smaller: {format_memory(limit)}. Its programs still hold {format_memory(held)}, "
        "which counts for it until they free it, and are given no more."
    )


def same_limits(one: Slice, other: Slice) -> bool:
    """Return whether two slices are alike in what a resize changes."""
    return one.mode == other.mode and one.devices == other.devices


def _no_room(words: str) -> NbgpuError:
    return NbgpuError(words, code="no-room", status=409)
