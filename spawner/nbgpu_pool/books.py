"""What the pool knows: requests and what each device has given."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Generator, Iterable, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nbgpu.models import Device, GrantState, Owner, Request, Slice, SliceDevice
from nbgpu.quantities import WHOLE_MILLI

from .granted import Granted
from .placement import Buckets, Place, Policy, Room, of_each_kind, of_use, order, place
from .quotas import Account, Holding
from .shapes import MAX_DEVICES, NOTHING, Amount, Part, Want, amount_of, resolve, want_of

if TYPE_CHECKING:
    from .placement.valued import Valued
    from .windows import Windows

HOLDING = frozenset({GrantState.reserved, GrantState.bound, GrantState.releasing})
"""States in which a slice counts on its devices."""


MOST_COSTS = 4096
"""Wants whose cost is remembered."""
MOST_MISFITS = 64
"""And those of which it is remembered that they fit nowhere."""


@dataclass
class Unplaced:
    """What kube-scheduler says of a pod that finds no node."""

    words: str
    since: float


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
    passed_from: float | None = None
    """Since when."""
    passed: list[Entry] = field(default_factory=lambda: list[Entry](), compare=False, repr=False)
    """Whom it has passed, until a server runs in it."""
    outgrown: int = 0
    """Those who waited when it last grew have numbers up to this."""
    protected: bool = False
    """It has been overtaken for long enough (`Fairness`)."""
    earmark: tuple[str, ...] = ()
    """Devices that nobody else is placed on until this one fits."""
    holder: str = ""
    """Whose quota it waits for, in words; empty when it waits for room."""
    kept: str = ""
    """For whom what is free is kept, in words; empty where that is not why it waits."""
    note: str | None = None
    """What its user should know while it is held."""
    wanted: Slice | None = None
    """The slice as a resize wants it, until the ledger says that it is so (`resize`)."""
    keeps: bool = False
    """`wanted` is in force, and it still holds more memory than that: it counts until it is free."""
    wanted_acked: bool = True
    """The ledger has taken note of `wanted`."""
    wanted_mark: int = 0
    """A snapshot begun at this mark or later tells what became of `wanted`."""
    wanted_until: float = 0.0
    """When a growth that is not in force by then is taken back."""
    full: Slice | None = None
    """What it comes back to while it is parked; `slice` then holds nothing."""
    idle_from: float | None = None
    """Since when it could be parked; None: it cannot be."""
    unused_from: float | None = None
    """Since when nobody uses it; None: somebody does, or nobody knows."""
    wants_from: float | None = None
    """Since when a parked slice wants to come back."""
    parking: bool = False
    """The ledger is parking it."""
    parking_until: float = 0.0
    """From then on nobody counts on it any more."""
    used_bytes: int | None = None
    """GPU memory that it uses in all; None: the ledger does not tell."""
    taken_back: bool = False
    """`wanted` takes back what was lent: what it uses stays its own (`giveback`)."""
    whole: Slice | None = None
    """What it was before it was made smaller for others, to grow back to; None: it was not, or its user has chosen since."""
    spared_until: float = 0.0
    """Until then nothing more is taken back from it: its node has refused."""
    park_mark: int | None = None
    """A snapshot begun at this mark or later tells whether it still is."""
    moving: Slice | None = None
    """Where it is being moved to; counted in addition to `slice` until it is known which of them holds (`moves`)."""
    unplaced: Unplaced | None = None
    """It waits for a node: Kubernetes has found none for its pod."""
    tried: dict[str, float] = field(default_factory=dict[str, float])
    """Nodes that had no room for its pod, and when that was found."""

    def pass_by(self, now: float) -> None:
        """Note that a later request was granted while this one did not fit."""
        if not self.holder:
            self.overtaken += 1
            self.passed_from = now if self.passed_from is None else self.passed_from

    @property
    def slice_id(self) -> str:
        """Id of the request and of its slice."""
        return self.request.request_id

    @property
    def holds(self) -> bool:
        """Whether its slice counts on its devices."""
        return self.state in HOLDING

    def own_parts(self) -> list[tuple[str, Part]]:
        """Return what it holds, by device: the larger of what is in force and what a resize wants."""
        parts = _parts(self.slice)
        if self.wanted is None:
            return parts
        asked = dict(_parts(self.wanted))
        return [(uuid, part.larger(asked.get(uuid, part))) for uuid, part in parts]

    def quota_parts(self) -> list[tuple[str, Part]]:
        """Return what counts in its owner's quota, by device: of a parked slice what it comes back to."""
        return self.own_parts() if self.full is None else _parts(self.full)

    def parts(self) -> list[tuple[str, Part]]:
        """Return what counts on each device: what it holds, and where it is being moved to."""
        return self.own_parts() if self.moving is None else [*self.own_parts(), *_parts(self.moving)]


def _parts(of: Slice | None) -> list[tuple[str, Part]]:
    return [(device.uuid, Part(device.memory_bytes, device.compute_milli)) for device in of.devices] if of is not None else []


def adopted(found: Slice, number: int, now: float) -> Entry:
    """Return an entry for a slice that only the ledger knew of."""
    first = found.devices[0]
    request = Request(
        request_id=found.slice_id,
        owner=found.owner,
        groups=found.groups,
        device_count=min(len(found.devices), MAX_DEVICES),  # somebody's own claim may have more parts
        compute_milli=first.compute_milli,
        memory_bytes=max(first.memory_bytes, 1024**2),
        mode=found.mode,
        namespace=found.namespace,
    )
    return Entry(request, want_of(request), number, now, slice=found, adopted=True, at_ledger=True)


def _number(entry: Entry) -> int:
    return entry.number


def free_of(room: Room, taken: Part = NOTHING) -> int:
    """Return what is free of a device when `taken` is taken, in milli-GPU: the smaller of what is left of time and of memory."""
    if not room.device.healthy or room.coming:
        return 0
    memory_milli = (room.free_bytes - taken.memory_bytes) * WHOLE_MILLI // max(1, room.device.usable_bytes)
    return max(0, min(room.free_milli - taken.compute_milli, memory_milli))


def takes_of_free(place: Place) -> int:
    """Return by how much less is free in all when `place` is taken, in milli-GPU."""
    return sum(free_of(room) - free_of(room, part) for room, part in place)


def slice_at(entry: Entry, place: Place, groups: list[str]) -> Slice:
    """Return the slice that `entry` has at `place`."""
    return Slice(
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


@dataclass
class Books:
    """Devices with their room, and the requests by id."""

    devices: dict[str, Device] = field(default_factory=dict[str, Device])
    rooms: dict[str, Room] = field(default_factory=dict[str, Room])
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    less: dict[str, Part] = field(default_factory=dict[str, Part])
    """By device, as in `Snapshot`."""
    unusable: Mapping[str, str] = field(default_factory=dict[str, str])
    """As in `Snapshot`."""
    buckets: Buckets = field(default_factory=lambda: Buckets({}))
    valued: Valued | None = None
    """Rooms by value, where that is the rule (`by_value`)."""
    kinds: list[Device] = field(default_factory=list[Device])
    """One device of each model and size."""
    free_milli: int = 0
    """Of all healthy devices that are there (`free_of`)."""
    all_healthy: bool = True
    changes: int = 0
    """Rises with all that is booked, and with the devices."""
    arrange: Callable[[list[Entry]], list[Entry]] | None = None
    """In which order those who wait are served; None: as they came (`fair`)."""
    windows: Windows | None = None
    """Devices that are kept for groups."""
    parked: set[str] = field(default_factory=set[str])
    """All that are parked are among these."""
    timed: set[str] = field(default_factory=set[str])
    """All whose longest session is known are among these."""
    granted: Granted = field(default_factory=Granted)
    _usable_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """Of all devices that are there, and of those that are away for a while with slices on them."""
    _empty: list[Room] = field(default_factory=list[Room])
    _here: list[Room] = field(default_factory=list[Room])
    _to_come: list[Room] = field(default_factory=list[Room])
    _queued: list[Entry] = field(default_factory=list[Entry])
    """All that wait are among these, in their order."""
    _misfits: dict[Want, set[str]] = field(default_factory=dict[Want, set[str]])
    """What fits nowhere, and the nodes where something came free since that was found."""
    _of_user: dict[tuple[str, str], set[str]] = field(default_factory=dict[tuple[str, str], set[str]])
    """And all of a user among these."""
    _use: dict[Want, frozenset[str]] = field(default_factory=dict[Want, frozenset[str]])
    _costs: dict[Want, Amount | None] = field(default_factory=dict[Want, "Amount | None"])

    def by_value(self) -> None:
        """From now on `valued` is kept, and learns from all requests."""
        from .placement.valued import Valued  # needs NumPy

        self.valued = Valued(self.rooms)

    def ordered_rooms(self) -> list[Room]:
        """Return the rooms in the fixed order of placement."""
        return self._here

    def coming_rooms(self) -> list[Room]:
        """Return the rooms of nodes that have to be started first."""
        return self._to_come

    def add(self, entry: Entry) -> None:
        """Note a request; its state may change later."""
        self.entries[entry.slice_id] = entry
        if entry.state == GrantState.queued:
            insort(self._queued, entry, key=_number)
        if entry.request.session_seconds is not None:
            self.timed.add(entry.slice_id)
        if self.valued is not None:
            self.valued.arrived(entry.want)
        owner = entry.request.owner
        self._of_user.setdefault((owner.hub, owner.user), set()).add(entry.slice_id)

    def of_user(self, owner: Owner) -> list[Entry]:
        """Return the requests of a user of a hub, in the order in which they came."""
        user = owner.hub, owner.user
        ids = self._of_user.get(user, set())
        there = [self.entries[one] for one in ids if one in self.entries]
        if len(there) < len(ids):
            self._of_user[user] = {one.slice_id for one in there}
            if not there:
                del self._of_user[user]
        return sorted(there, key=lambda one: one.number)

    def differ(self, devices: Iterable[Device], less: Mapping[str, Part]) -> bool:
        """Return whether the devices are others, or have other room, than those that are known."""
        known = {uuid: (device.healthy, device.usable_bytes) for uuid, device in self.devices.items()}
        return dict(less) != self.less or known != {device.uuid: (device.healthy, device.usable_bytes) for device in devices}

    def rebuild(self, devices: Iterable[Device], less: Mapping[str, Part] | None = None) -> None:
        """Take over `devices` and count all slices anew.

        Parameters
        ----------
        less : mapping, optional
            As in `Snapshot`.
        """
        self.changes += 1
        self.less = dict(less or {})
        self.devices = {device.uuid: device for device in sorted(devices, key=order)}
        self._costs.clear()
        self._use.clear()
        self.rooms = {uuid: Room.empty(device) for uuid, device in self.devices.items()}
        for uuid, part in self.less.items():
            self.rooms[uuid].free_bytes -= part.memory_bytes
            self.rooms[uuid].free_milli -= part.compute_milli
        self._here = [room for room in self.rooms.values() if not room.coming]
        self._to_come = [room for room in self.rooms.values() if room.coming]
        for entry in self.entries.values():
            if entry.holds:
                self._count(entry, 1)
        held = {uuid for entry in self.entries.values() if entry.holds for uuid, _ in entry.quota_parts()}
        sizes = {uuid: size for uuid, size in self._usable_bytes.items() if uuid in held}
        sizes |= {uuid: device.usable_bytes for uuid, device in self.devices.items()}
        if sizes != self._usable_bytes:
            self._usable_bytes, self.granted = sizes, Granted()  # what is held counts otherwise
        self.free_milli = sum(free_of(room) for room in self._here)
        self.all_healthy = all(room.device.healthy for room in self._here)
        self._sort()
        self.kinds = list({(device.model, device.usable_bytes): device for device in self.devices.values()}.values())
        kinds = of_each_kind(self.rooms.values())
        self._empty = [Room.empty(room.device.model_copy(update={"healthy": True})) for room in kinds]

    @contextmanager
    def many(self, count: int) -> Generator[None, None, None]:
        """Sort the rooms once after so many changes, not after each."""
        if count < len(self.rooms) // 4:
            yield
            return
        self.buckets = Buckets({})
        try:
            yield
        finally:
            self._sort()

    def _sort(self) -> None:
        self._misfits.clear()
        self.buckets = Buckets(self.rooms)
        if self.valued is not None:
            self.valued = type(self.valued)(self.rooms, self.valued)

    def decide(self, want: Want, barred: Set[str], cap: Part | None, policy: Policy) -> Place | None:
        """Return where `want` goes, of the devices that are there; None: nowhere."""
        if self.valued is not None:
            found = self.valued.place(want, barred, cap)
            if found is not None:
                return found
        return self.fitting(want, barred, cap, policy)

    def fitting(self, want: Want, barred: Set[str], cap: Part | None, policy: Policy) -> Place | None:
        """Return where `want` fits best."""
        if want.device_count == 1:
            return self.buckets.place(want, barred, cap, policy, coming=False)
        return place(self._here, want, barred=barred, cap=cap, policy=policy)

    def refresh(self) -> None:
        """Do what the next decision would have to do first: when there is time."""
        self.buckets.refresh()
        if self.valued is not None:
            self.valued.refresh()

    def empty_of_each_kind(self) -> list[Room]:
        """Return what one node of each kind would have if it were empty and healthy."""
        return self._empty

    def give(self, entry: Entry, place: Place, groups: list[str]) -> None:
        """Book `place` for `entry` and name its slice."""
        entry.slice = slice_at(entry, place, groups)
        entry.state = GrantState.reserved
        self._book(entry, 1)

    def change(self, entry: Entry, *, wanted: Slice | None, moving: Slice | None) -> None:
        """Count a resize that is under way, or a move; None: no longer."""
        if entry.holds:
            self._book(entry, -1)
        entry.wanted, entry.moving = wanted, moving
        if entry.holds:
            self._book(entry, 1)

    def take_back(self, entry: Entry, state: GrantState) -> None:
        """End a holding entry's hold: `state` is ``gone`` or, for a revoked reservation, ``queued``."""
        if entry.holds:
            self._book(entry, -1)
        for other in entry.passed:  # to ask and give back again and again must make nobody wait
            other.overtaken -= 1
            other.passed_from = other.passed_from if other.overtaken else None
        entry.passed = []
        if state == GrantState.queued:
            self.waiting()  # forgets that it was among them once
        entry.state, entry.wanted, entry.moving = state, None, None
        if state == GrantState.queued:
            insort(self._queued, entry, key=_number)

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
        self.changes += 1
        self.granted.touched(entry.slice_id)
        for node in self._count(entry, sign):
            self.buckets.changed(node)
            if self.valued is not None:
                self.valued.changed(node)

    def _count(self, entry: Entry, sign: int) -> set[str]:
        nodes: set[str] = set()
        for uuid, part in entry.parts():
            room = self.rooms.get(uuid)
            if room is None:
                continue
            before = free_of(room)
            room.take(part) if sign > 0 else room.give_back(part)
            self.free_milli += free_of(room) - before
            nodes.add(room.device.node)
        if sign < 0:
            for freed in self._misfits.values():
                freed |= nodes
        return nodes

    def of_use(self, want: Want) -> frozenset[str]:
        """Return the devices that are there which `want` could be placed on if they were empty."""
        if want not in self._use:
            if len(self._use) >= MOST_COSTS:
                self._use.clear()
            self._use[want] = of_use(self._here, want)
        return self._use[want]

    def may_fit(self, want: Want) -> bool:
        """Return False where it is known that `want` fits nowhere: it did not, and where something came free since it does not either."""
        freed = self._misfits.get(want)
        if freed is None:
            return True
        if freed and place(self.buckets.of(freed), want) is not None:
            del self._misfits[want]
            return True
        freed.clear()
        return False

    def misfits(self, want: Want) -> None:
        """Note that `want` fits nowhere now."""
        if len(self._misfits) >= MOST_MISFITS:
            self._misfits.clear()
        self._misfits[want] = set()

    def wanted_back(self) -> list[Entry]:
        """Return the parked slices that want to come back and have no room yet, who waits longest first."""
        if not self.parked:
            return []
        self.parked = {one for one in self.parked if one in self.entries and self.entries[one].full is not None}
        there = [self.entries[one] for one in self.parked]
        found = [one for one in there if one.wants_from is not None and one.wanted is None and one.state == GrantState.bound]
        return sorted(found, key=lambda one: (one.wants_from, one.number))

    def kept(self) -> set[str]:
        """Return the devices where what comes free is kept for slices that come back."""
        return {part.uuid for one in self.wanted_back() if one.full is not None for part in one.full.devices}

    def waiting_count(self) -> int:
        """Return how many wait."""
        return len(self._still_waiting())

    def closed(self, entry: Entry) -> frozenset[str]:
        """Return the devices that are kept for others than `entry`'s owner (`windows`)."""
        return frozenset() if self.windows is None else self.windows.closed(entry)

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
        """Return the queue in the order in which it is served."""
        found = self._still_waiting()
        return found if self.arrange is None else self.arrange(found)

    def _still_waiting(self) -> list[Entry]:
        """Return those who wait, first come first."""
        queued = GrantState.queued
        found = [one for one in self._queued if one.state is queued]
        if len(found) < len(self._queued):
            self._queued = list(found)
        return found

    def whole(self) -> tuple[int, int]:
        """Return milli-GPU and bytes of all healthy devices that are there."""
        there = [room.device for room in self._here if room.device.healthy]
        return len(there) * WHOLE_MILLI, sum(device.usable_bytes for device in there)

    def amount(self, parts: Iterable[tuple[str, Part]]) -> Amount:
        """Return parts, by device, as quotas count them."""
        found = Amount()
        for uuid, part in parts:
            found = found.plus(amount_of(part, self._usable_bytes.get(uuid, 0)))
        return found

    def cost(self, want: Want) -> Amount | None:
        """Return the least that `want` takes in all, on the models that could hold it; None when none could."""
        if want not in self._costs:
            if len(self._costs) >= MOST_COSTS:
                self._costs.clear()
            meant = ((device, resolve(want, device)) for device in self.kinds)
            amounts = [amount_of(part, device.usable_bytes) for device, part in meant if part is not None]
            least = (min(numbers) for numbers in zip(*amounts, strict=True))
            self._costs[want] = Amount().plus(Amount(*least), want.device_count) if amounts else None
        return self._costs[want]

    def asking(self) -> list[tuple[Owner, list[str], int]]:
        """Return who waits for room, with their groups and the milli-GPU that they wait for at least."""
        waiting = ((one, self.cost(one.want)) for one in self.waiting() if not one.holder)
        return [(one.request.owner, one.request.groups, cost.counted_milli) for one, cost in waiting if cost is not None]

    def holdings(
        self, counted: frozenset[str], *, of: Owner | None = None, granted_only: bool = False, but: Entry | None = None
    ) -> list[Holding]:
        """Return what each request that is not gone holds, or, while it waits, would hold at least.

        Parameters
        ----------
        counted : frozenset of str
            Groups that have a quota.
        of : Owner, optional
            Only those of this owner's user, all servers.
        but : Entry, optional
            Is left out.
        """
        entries = self.entries.values() if of is None else self.of_user(of)
        return [self.holding(entry, counted) for entry in entries if entry is not but and (entry.holds or not granted_only)]

    def granted_by(self, groups: frozenset[str]) -> dict[Account, Amount]:
        """Return what is granted, by whose quota it counts for; `groups` are those that have one."""
        return self.granted.by_account(self.entries, groups, self.holding)

    def holding(self, entry: Entry, counted: frozenset[str]) -> Holding:
        """Return what one request holds, or would hold at least."""
        amount = self.amount(entry.quota_parts()) if entry.holds else self.cost(entry.want) or Amount()
        groups = tuple(name for name in dict.fromkeys(entry.request.groups) if name in counted)
        releasing = entry.state == GrantState.releasing
        return Holding(entry.request.owner, groups, amount, entry.holds, releasing)
