"""The workload of `bench/notebooks.py` and its replays, in virtual time, on the service's own placement and queue."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nbgpu.models import Device, GrantState, Owner, Request
from nbgpu.quantities import GIB, WHOLE_MILLI
from nbgpu_pool.books import Entry, slice_at
from nbgpu_pool.core import Core
from nbgpu_pool.placement import Buckets, Place, Policy, Room, one_move
from nbgpu_pool.shapes import Part, Want, want_of
from nbgpu_pool.state import Settings, Snapshot

HOUR = 3600.0
DAY = 24 * HOUR
NODE_SIZE = 8
USERS = 1000
ESTIMATED = 10
"""Of so many who have to wait, one is told how long, as the queue page tells it first: each estimate takes a while to make."""


@dataclass(frozen=True)
class Workload:
    """Who comes when, for how much and how long."""

    sizes_milli: tuple[int, ...] = (125, 250, 333, 500, 1000)
    shares: tuple[int, ...] = (25, 30, 15, 15, 15)
    """Of each size, in percent of the requests."""
    devices: int = 200
    swing: float = 0.6
    """By how much the arrival rate rises over its mean at the peak, and falls below it twelve hours later."""
    peak_hour: float = 15.0
    mean_hours: float = 3.0
    sigma: float = 1.2
    """Of the logarithm of a session's length: the greater, the heavier the tail."""
    days: int = 16
    warm_days: int = 2
    """Of them, not counted."""


class Arrival(NamedTuple):
    """One request; times in seconds."""

    at: float
    milli: int
    length: float


def arrivals(workload: Workload, load: float, seed: int) -> Iterator[Arrival]:
    """Yield requests: a Poisson process with a daily swing (made by thinning), lognormal sessions.

    Parameters
    ----------
    load : float
        Mean of what is asked for, were nobody refused, as a share of the devices.
    """
    luck = random.Random(seed)
    mean_gpus = sum(milli * share for milli, share in zip(workload.sizes_milli, workload.shares, strict=True)) / WHOLE_MILLI
    mean_gpus /= sum(workload.shares)
    per_hour = load * workload.devices / (mean_gpus * workload.mean_hours)
    top = per_hour * (1 + workload.swing)
    mu = math.log(workload.mean_hours) - workload.sigma**2 / 2
    hour = 0.0
    while True:
        hour += luck.expovariate(top)
        if hour >= 24 * workload.days:
            return
        if luck.random() * top < per_hour * (1 + workload.swing * math.cos(2 * math.pi * (hour - workload.peak_hour) / 24)):
            milli = luck.choices(workload.sizes_milli, workload.shares)[0]
            yield Arrival(hour * HOUR, milli, luck.lognormvariate(mu, workload.sigma) * HOUR)


def devices(count: int) -> list[Device]:
    """Return equal devices in nodes of `NODE_SIZE`."""
    return [
        Device(uuid=f"GPU-{n:05}", index=n % NODE_SIZE, model="A", node=f"node-{n // NODE_SIZE:04}", memory_bytes=80 * GIB, reserve_bytes=0)
        for n in range(count)
    ]


@dataclass
class Found:
    """What came of one replay, without its warm-up."""

    asked_milli: dict[int, int] = field(default_factory=dict[int, int])
    """Asked for in all, by size."""
    refused_milli: dict[int, int] = field(default_factory=dict[int, int])
    moves: int = 0
    waited: list[float] = field(default_factory=list[float])
    """Seconds of each request."""
    overtaking_most: int = 0
    estimates: list[tuple[float | None, float]] = field(default_factory=list[tuple[float | None, float]])
    """What some who waited were told when they came (None: unknown), and how long it took, in seconds."""

    def count(self, milli: int, refused: bool) -> None:
        """Count a request."""
        self.asked_milli[milli] = self.asked_milli.get(milli, 0) + milli
        self.refused_milli[milli] = self.refused_milli.get(milli, 0) + milli * refused

    @property
    def refused_percent(self) -> float:
        """Refusals in percent of the requests, each weighted with the GPU it asks for."""
        return 100 * sum(self.refused_milli.values()) / max(1, sum(self.asked_milli.values()))

    @property
    def wait_mean_min(self) -> float:
        """Mean over all requests, those who did not wait included."""
        return sum(self.waited) / max(1, len(self.waited)) / 60


class _Held:
    """Slices by device, for `one_move`."""

    def __init__(self) -> None:
        self.by_device: dict[str, list[tuple[str, Part]]] = {}
        self.places: dict[str, tuple[str, Part]] = {}

    def put(self, slice_id: str, uuid: str, part: Part) -> None:
        self.by_device.setdefault(uuid, []).append((slice_id, part))
        self.places[slice_id] = uuid, part

    def drop(self, slice_id: str) -> tuple[str, Part]:
        uuid, part = self.places.pop(slice_id)
        self.by_device[uuid].remove((slice_id, part))
        return uuid, part


def no_fragments(workload: Workload, load: float, seed: int) -> Found:
    """Replay on one device as large as all: what any placement must refuse."""
    found, free, ends = Found(), workload.devices * WHOLE_MILLI, list[tuple[float, int]]()
    for at, milli, length in arrivals(workload, load, seed):
        while ends and ends[0][0] <= at:
            free += heapq.heappop(ends)[1]
        if at >= workload.warm_days * DAY:
            found.count(milli, milli > free)
        if milli <= free:
            free -= milli
            heapq.heappush(ends, (at + length, milli))
    return found


def without_queue(workload: Workload, load: float, seed: int, policy: Policy, *, moves: bool = False) -> Found:
    """Replay where who does not fit is refused; with `moves` one slice is moved first, where that lets the request in."""
    rooms = {device.uuid: Room.empty(device) for device in devices(workload.devices)}
    ordered, buckets, held = list(rooms.values()), Buckets(rooms), _Held()
    found, ends, counts = Found(), list[tuple[float, str]](), False

    def put(slice_id: str, place: Place) -> None:
        room, part = place[0]
        room.take(part)
        buckets.changed(room.device.node)
        held.put(slice_id, room.device.uuid, part)

    def drop(slice_id: str) -> None:
        uuid, part = held.drop(slice_id)
        rooms[uuid].give_back(part)
        buckets.changed(rooms[uuid].device.node)

    for number, (at, milli, length) in enumerate(arrivals(workload, load, seed)):
        while ends and ends[0][0] <= at:
            drop(heapq.heappop(ends)[1])
        counts = at >= workload.warm_days * DAY
        want = Want(1, milli, None, None, None)
        place = buckets.place(want, frozenset(), None, policy, coming=False)
        hint = one_move(ordered, buckets, held.by_device, want, policy=policy) if place is None and moves else None
        if hint is not None:
            drop(hint.slice_id)
            put(hint.slice_id, hint.to)
            place = hint.lets_in
            found.moves += counts
        if counts:
            found.count(milli, place is None)
        if place is not None:
            put(str(number), place)
            heapq.heappush(ends, (at + length, str(number)))
    return found


class _Queue:
    """The core's books and queue under a clock that the replay sets; every slice can be moved at once."""

    def __init__(self, workload: Workload, settings: Settings, moves: bool):
        self.core = Core(settings)
        self.core.snapshot(Snapshot(1, devices(workload.devices), []), 0.0)
        self.books = self.core.books
        self.moves = moves
        self.moved = 0
        self.held = _Held()
        self.told: dict[str, float | None] = {}
        """By request: seconds it was told to wait."""
        self._number = 0
        self._waiting = 0

    def next_id(self) -> str:
        """Return the id of the request that comes next."""
        return f"request-{self._number:08}"

    def arrive(self, milli: int, now: float) -> list[Entry]:
        """Take a request; return who was granted."""
        owner = Owner(hub="hub", user=f"user-{self._number % USERS}")
        request = Request(request_id=self.next_id(), owner=owner, compute_milli=milli)
        self._number += 1
        entry = Entry(request, want_of(request), self._number, now)
        self.books.add(entry)
        granted = self._serve(now)
        if self.moves and entry.state == GrantState.queued and self._move_for(entry):
            granted += self._serve(now)
        if entry.state == GrantState.queued:
            self._waiting += 1
            if self._waiting % ESTIMATED == 0:
                told = self.core.forecast(now).get(entry.slice_id)
                self.told[entry.slice_id] = told.seconds if told is not None else None
        return granted

    def end(self, entry: Entry, now: float) -> list[Entry]:
        """End a session; return who was granted."""
        self.core.sessions.ended(entry.request.owner.hub, now - entry.started)
        self.held.drop(entry.slice_id)
        self.books.take_back(entry, GrantState.gone)
        del self.books.entries[entry.slice_id]
        granted = self._serve(now) if self.books.waiting() else []
        waiting = self.books.waiting()
        if self.moves and waiting and self._move_for(waiting[0]):
            granted += self._serve(now)
        return granted

    def _serve(self, now: float) -> list[Entry]:
        granted = self.core.walk(now).serve(now)
        for entry in granted:
            ((uuid, part),) = entry.parts()
            self.held.put(entry.slice_id, uuid, part)
            self.core.forecasts.granted(entry, now)
            # its server runs at once, so it has passed them
            entry.state, entry.started, entry.was_bound, entry.passed = GrantState.bound, now, True, []
        return granted

    def _move_for(self, entry: Entry) -> bool:
        kept = {uuid for one in self.books.waiting() if one is not entry for uuid in one.earmark}
        policy = self.core.settings.policy
        rooms = self.books.ordered_rooms()
        hint = one_move(rooms, self.books.buckets, self.held.by_device, entry.want, barred=kept, policy=policy)
        if hint is None:
            return False
        moved = self.books.entries[hint.slice_id]
        self.books.replace(moved, slice_at(moved, hint.to, []))
        _, part = self.held.drop(hint.slice_id)
        self.held.put(hint.slice_id, hint.to[0][0].device.uuid, part)
        self.moved += 1
        return True


def with_queue(workload: Workload, load: float, seed: int, settings: Settings, *, moves: bool = False) -> Found:
    """Replay where who does not fit waits, and nobody leaves the queue; a session's length counts from its grant."""
    queue, found = _Queue(workload, settings, moves), Found()
    lengths: dict[str, float] = {}
    ends: list[tuple[float, int, Entry]] = []
    warm = workload.warm_days * DAY
    moved_warm = 0

    def start(granted: list[Entry], now: float) -> None:
        for entry in granted:
            heapq.heappush(ends, (now + lengths.pop(entry.slice_id), entry.number, entry))
            if entry.enqueued >= warm:
                found.waited.append(now - entry.enqueued)
                found.overtaking_most = max(found.overtaking_most, entry.overtaken)
                if entry.slice_id in queue.told:
                    found.estimates.append((queue.told[entry.slice_id], now - entry.enqueued))

    for at, milli, length in arrivals(workload, load, seed):
        while ends and ends[0][0] <= at:
            now, _, entry = heapq.heappop(ends)
            start(queue.end(entry, now), now)
        if at < warm:
            moved_warm = queue.moved
        lengths[queue.next_id()] = length
        start(queue.arrive(milli, at), at)
    found.moves = queue.moved - moved_warm
    while lengths:
        now, _, entry = heapq.heappop(ends)
        start(queue.end(entry, now), now)
    return found
