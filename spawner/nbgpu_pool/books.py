"""What the pool knows: requests and what each device has given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nbgpu.models import Device, GrantState, Owner, Request, Slice, SliceDevice

from .placement import Place, Room, order
from .quotas import Holding, total
from .shapes import Part, Want, by_model, want_of

HOLDING = frozenset({GrantState.reserved, GrantState.bound, GrantState.releasing})
"""States in which a slice counts on its devices."""


MOST_COSTS = 4096
"""Wants whose cost is remembered."""


@dataclass
class Entry:
    """A request and what became of it. Times are seconds of the caller's clock."""

    request: Request
    want: Want
    number: int
    """Order of arrival."""
    enqueued: float
    state: GrantState = GrantState.queued
    slice: Slice | None = None
    expires: float | None = None
    """End of a reservation; of a queued request: when nobody has asked for it any more."""
    started: float = 0.0
    """When a server began to carry it (`bound`)."""
    reason: str | None = None
    ended: float = 0.0
    withdrawn: bool = False
    """Its end was wanted (released, cancelled, expired): if the ledger still shows it, it is asked back."""
    busy: int = 0
    """Calls to the ledger about it that are under way."""
    at_ledger: bool = False
    """The ledger may have it."""
    confirmed: int | None = None
    """A snapshot begun at this mark or later and without it means that it has ended."""
    release_acked: bool = False
    was_bound: bool = False
    adopted: bool = False
    """Known from the ledger only: its first request by the same owner is taken for the original."""
    overtaken: int = 0
    """How often a later request was granted while this one did not fit."""
    earmark: tuple[str, ...] = ()
    """Devices that nobody else is placed on until this one fits."""
    holder: str = ""
    """Whose quota it waits for, in words; empty when it waits for room."""

    @property
    def slice_id(self) -> str:
        """Id of the request and of its slice."""
        return self.request.request_id

    @property
    def holds(self) -> bool:
        """Whether its slice counts on its devices."""
        return self.state in HOLDING

    def parts(self) -> list[tuple[str, Part]]:
        """Return what it holds, by device."""
        devices = self.slice.devices if self.slice else []
        return [(device.uuid, Part(device.memory_bytes, device.compute_milli)) for device in devices]


def adopted(found: Slice, number: int, now: float) -> Entry:
    """Return an entry for a slice that only the ledger knew of."""
    first = found.devices[0]
    request = Request(
        request_id=found.slice_id,
        owner=found.owner,
        groups=found.groups,
        device_count=len(found.devices),
        compute_milli=first.compute_milli,
        memory_bytes=max(first.memory_bytes, 1024**2),
        mode=found.mode,
        namespace=found.namespace,
    )
    return Entry(request, want_of(request), number, now, slice=found, adopted=True, at_ledger=True)


@dataclass
class Books:
    """Devices with their room, and the requests by id."""

    devices: dict[str, Device] = field(default_factory=dict[str, Device])
    rooms: dict[str, Room] = field(default_factory=dict[str, Room])
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    extra_bytes: dict[str, int] = field(default_factory=dict[str, int])
    _costs: dict[Want, Part | None] = field(default_factory=dict[Want, "Part | None"])

    def ordered_rooms(self) -> list[Room]:
        """Return the rooms in the fixed order of placement."""
        return list(self.rooms.values())

    def differ(self, devices: Iterable[Device], extra_bytes: Mapping[str, int]) -> bool:
        """Return whether the devices are others, or have other room, than those that are known."""
        known = {uuid: (device.healthy, device.usable_bytes) for uuid, device in self.devices.items()}
        return dict(extra_bytes) != self.extra_bytes or known != {device.uuid: (device.healthy, device.usable_bytes) for device in devices}

    def rebuild(self, devices: Iterable[Device], extra_bytes: Mapping[str, int] | None = None) -> None:
        """Take over `devices` and count all slices anew.

        Parameters
        ----------
        extra_bytes : mapping, optional
            As in `Snapshot`.
        """
        self.extra_bytes = dict(extra_bytes or {})
        self.devices = {device.uuid: device for device in sorted(devices, key=order)}
        self._costs.clear()
        self.rooms = {uuid: Room.empty(device) for uuid, device in self.devices.items()}
        for uuid, more in self.extra_bytes.items():
            self.rooms[uuid].free_bytes += more
        for entry in self.entries.values():
            if entry.holds:
                self._book(entry, 1)

    def give(self, entry: Entry, place: Place, groups: list[str]) -> None:
        """Book `place` for `entry` and name its slice."""
        entry.slice = Slice(
            slice_id=entry.slice_id,
            owner=entry.request.owner,
            node=place[0][0].device.node,
            mode=entry.request.mode,
            devices=[
                SliceDevice(
                    uuid=room.device.uuid,
                    index=room.device.index,
                    model=room.device.model,
                    memory_bytes=part.memory_bytes,
                    compute_milli=part.compute_milli,
                )
                for room, part in place
            ],
            simulated=any(room.device.simulated for room, _ in place),
            groups=groups,
            namespace=entry.request.namespace,
        )
        entry.state = GrantState.reserved
        self._book(entry, 1)

    def take_back(self, entry: Entry, state: GrantState) -> None:
        """End a holding entry's hold: `state` is ``gone`` or, for a revoked reservation, ``queued``."""
        if entry.holds:
            self._book(entry, -1)
        entry.state = state

    def take_in(self, entry: Entry) -> None:
        """Count an adopted entry's slice."""
        self._book(entry, 1)

    def replace(self, entry: Entry, found: Slice) -> None:
        """Take over the limits of a slice as the ledger has them."""
        if entry.slice is not found and entry.slice != found:
            self._book(entry, -1)
            entry.slice = found
            self._book(entry, 1)

    def _book(self, entry: Entry, sign: int) -> None:
        for uuid, part in entry.parts():
            room = self.rooms.get(uuid)
            if room is None:
                continue
            room.take(part) if sign > 0 else room.give_back(part)

    def overbooked(self) -> list[str]:
        """Return the devices that hold more than they have."""
        return [uuid for uuid, room in self.rooms.items() if room.free_milli < 0 or room.free_bytes < 0]

    def by_device(self) -> dict[str, list[str]]:
        """Return the ids of the slices that hold a part of each device."""
        found: dict[str, list[str]] = {uuid: [] for uuid in self.devices}
        for entry in self.entries.values():
            if entry.holds and entry.slice is not None:
                for uuid in dict.fromkeys(device.uuid for device in entry.slice.devices):
                    found.setdefault(uuid, []).append(entry.slice_id)
        return found

    def waiting(self) -> list[Entry]:
        """Return the queue, first come first."""
        return sorted((one for one in self.entries.values() if one.state == GrantState.queued), key=lambda one: one.number)

    def cost(self, want: Want) -> Part | None:
        """Return the least that `want` takes in all, on the models that could hold it; None when none could."""
        if want not in self._costs:
            if len(self._costs) >= MOST_COSTS:
                self._costs.clear()
            parts = by_model(want, self.devices.values()).values()
            least = Part(min(part.memory_bytes for part in parts), min(part.compute_milli for part in parts)) if parts else None
            self._costs[want] = total(least, want.device_count) if least else None
        return self._costs[want]

    def holdings(self, counted: frozenset[str], *, of: Owner | None = None, granted_only: bool = False) -> list[Holding]:
        """Return what each request that is not gone holds, or, while it waits, would hold at least.

        Parameters
        ----------
        counted : frozenset of str
            Groups that have a quota.
        of : Owner, optional
            Only those of this owner's user, all servers.
        """
        found: list[Holding] = []
        for entry in self.entries.values():
            owner = entry.request.owner
            if granted_only and not entry.holds:
                continue
            if of is not None and (owner.hub, owner.user) != (of.hub, of.user):
                continue
            if entry.holds:
                parts = [part for _, part in entry.parts()]
                amount = Part(sum(part.memory_bytes for part in parts), sum(part.compute_milli for part in parts))
            else:
                amount = self.cost(entry.want) or Part(0, 0)
            groups = tuple(name for name in dict.fromkeys(entry.request.groups) if name in counted)
            releasing = entry.state == GrantState.releasing
            found.append(Holding(owner, groups, amount.compute_milli, amount.memory_bytes, entry.holds, releasing))
        return found
