"""The pool's one core: commands in, new state and effects out. No I/O, and no clock: every command is told the time.

What is true about slices is the ledger's (on one machine the agent's): `snapshot` takes it over, nothing is granted before
the first one or while the ledger is away, and a slice that the ledger may have is free only when the ledger says that it has gone.
"""

from __future__ import annotations

from collections import OrderedDict

from nbgpu.errors import InvalidValue, NbgpuError, Refused, Unavailable
from nbgpu.models import DeviceBooks, Grant, GrantState, Owner, Request, Shape, Slice
from nbgpu.words import counted

from . import quotas as quota_rules
from .books import Books, Entry, adopted
from .estimate import Estimate
from .forecast import Forecasts
from .held import Held
from .queue import hopeless
from .sessions import Kinds
from .shapes import Want, memory_field, too_small, want_of
from .state import Effects, Seen, Settings, Snapshot
from .unusable import impossible

STARTING = "The pool is starting: rebuilding the books from what runs. Try again in a few seconds."
ENDED_KEPT = 10_000
"""Ended requests and early cancels that are remembered."""
ENDED_SECONDS = 3600.0
RESERVE_SECONDS = 5.0
"""How often the queue is served although nothing has changed but the time: who has waited long enough becomes protected."""


class Core(Held):
    """Requests, grants, devices. Every method that changes something may be followed by `drain` for the effects."""

    def __init__(self, settings: Settings | None = None):
        super().__init__()
        self.settings = settings or Settings()
        self.books = Books()
        self._arrange()
        self.sessions = Kinds(self.settings.session_guess_seconds)
        self.ended: OrderedDict[str, Entry] = OrderedDict()
        self.cancelled_early: OrderedDict[str, tuple[str | None, float]] = OrderedDict()
        self.ready = False
        self.connected = False
        self.away_since = 0.0
        self.away_words = STARTING
        self.mark = 0
        self.generation = 1
        self._last: dict[str, Seen] = {}
        """What the ledger last said of each slice, where it tells only of changes."""
        self._early: set[str] = set()
        self._releasing: set[str] = set()
        """All that are being asked back are among these."""
        self._number = 0
        self._snapshot: Snapshot | None = None
        self._effects = Effects()
        self._served: tuple[int, float] = (0, 0.0)
        self._places: tuple[int, dict[str, int]] = (0, {})
        self.forecasts = Forecasts(self.books, self.sessions, lambda: self.generation)

    # -- requests --------------------------------------------------------------------------------------------------

    def request(self, request: Request, now: float) -> Grant:
        """Take a request: a grant, or a place in the queue. Idempotent by its id.

        Raises
        ------
        InvalidValue, Refused, Unavailable, NbgpuError
            400 makes no sense; 403 quota, or no device could ever hold it; 409 the id stands for another request; 503 starting.
        """
        want = want_of(request)
        self._need_ready()
        answered = self._answered(request, now)
        if answered is not None:
            return answered
        self._admit(request)
        self._number += 1
        entry = Entry(request, want, self._number, now, expires=now + self.settings.queue_ttl_seconds)
        self.books.add(entry)
        self._serve(now)
        self._changed()
        return self.grant(entry, now)

    def _answered(self, request: Request, now: float) -> Grant | None:
        """Return the answer to a request that came before, or that its hub has given up before it came; None: it is new."""
        known = self.entry(request.request_id)
        if known is not None:
            return self._again(known, request, now)
        early = self.cancelled_early.get(request.request_id)
        if early is None or early[0] not in (None, request.owner.hub):
            return None
        del self.cancelled_early[request.request_id]
        reason = "cancelled before it arrived"
        entry = Entry(request, want_of(request), 0, now, state=GrantState.gone, withdrawn=True, reason=reason, ended=now)
        self._remember(entry)
        return self.grant(entry, now)

    def _again(self, known: Entry, request: Request, now: float) -> Grant:
        if known.adopted and known.request.owner == request.owner and known.request.device_count == request.device_count:
            known.request, known.want, known.adopted = request, want_of(request), False
            self.books.granted.touched(known.slice_id)  # its groups may be others
        if known.request != request:
            raise NbgpuError(
                f"Request {request.request_id} exists already and asks for something else; use a new request_id.",
                code="conflict",
                status=409,
                field="request_id",
            )
        self.touch(known, now)
        return self.grant(known, now)

    def leaving(self, owner: Owner, request_id: str | None) -> Entry | None:
        """Return the waiting request that an owner would give up, where it is theirs."""
        entry = self.books.entries.get(request_id or "")
        return entry if entry is not None and entry.state == GrantState.queued and entry.request.owner == owner else None

    def replace(self, old: Entry, request: Request, now: float) -> Grant:
        """Give a waiting request up for another that can be granted at once; else nothing changes, its place included.

        Raises
        ------
        InvalidValue, Refused, Unavailable, NbgpuError
            As `request`; 409 ``state`` it does not wait any more, ``no-room`` the other cannot be granted now.
        """
        want = want_of(request)
        self._need_ready()
        answered = self._answered(request, now)
        if answered is not None:
            return answered
        if self.leaving(request.owner, old.slice_id) is None:
            raise _wrong_state(old, "given up for another")
        self._admit(request, old)
        self._number += 1
        entry = Entry(request, want, self._number, now, expires=now + self.settings.reservation_ttl_seconds)
        self._look_at_windows(now)
        walk = self.walk(now)
        walk.keep_for_waiting(now, but=old)
        found = walk.find(entry) if self.connected else None
        if found is None or found[0][0].coming:
            raise NbgpuError("That share is not free any more; you keep your place in the queue.", code="no-room", status=409)
        self.books.add(entry)
        self.books.give(entry, found, self.settings.quotas.counted(request.groups))
        walk.passed(entry, found, now)
        self._effects.granted.append(entry.slice_id)
        self._claim_replaced(old, entry)
        self._withdraw(old, "given up for a smaller share", now)
        return self.grant(entry, now)

    def _admit(self, request: Request, but: Entry | None = None) -> None:
        want = want_of(request)
        if not self.can_ever(want):
            raise Refused(impossible(self.books, want), code="impossible")
        allowed = self.too_small(want)
        if allowed is not None:
            field = memory_field(want)
            raise InvalidValue(field, getattr(want, field), allowed)
        cost = self.books.cost(want)
        holdings = self.books.holdings(frozenset(self.settings.quotas.groups), of=request.owner, but=but)
        if cost is not None:
            why = quota_rules.refusal(self.settings.quotas, holdings, request.owner, request.groups, cost)
            if why is not None:
                raise Refused(why, code="quota")
        # cheap first: a user who asks again and again costs the others nothing that grows with the queue
        mine = sum(one.state == GrantState.queued and one is not but for one in self.books.of_user(request.owner))
        if mine >= self.settings.queue_per_user:
            had, most = counted(mine, "request"), self.settings.queue_per_user
            raise Refused(f"You have {had} in the queue already, and one user may have {most} there.", code="queue-full")
        waiting, most = self.books.waiting_count() - (but is not None), self.settings.queue_total
        if waiting >= most:
            raise Unavailable(
                f"The queue is full: {counted(waiting, 'request')} in it, of {most} at most; try again later.", code="queue-full"
            )

    def can_ever(self, want: Want) -> bool:
        """Whether the pool, if it were empty, could hold `want`."""
        known = self._possible.get(want)
        if known is None:
            if len(self._possible) > 1000:
                self._possible.clear()
            known = self._possible[want] = not hopeless(self.books, want)
        return known

    def too_small(self, want: Want) -> str | None:
        """Return what `want` must be where a program could hardly start in it; None where it is enough."""
        return too_small(want, self.books.kinds, self.settings.smallest_bytes)

    def cancel(self, request_id: str, hub: str | None, now: float) -> Entry | None:
        """Give a request up, whatever its state; of an unknown id remember that it is not wanted.

        Parameters
        ----------
        hub : str, optional
            Who says so; None = one that speaks for every hub.
        """
        entry = self.entry(request_id)
        if entry is None:
            self.cancelled_early[request_id] = (hub, now)
            _trim(self.cancelled_early)
            return None
        self._withdraw(entry, "given back" if entry.holds else "cancelled", now)
        return entry

    def release_owner(self, owner: Owner, except_id: str | None, now: float) -> list[Entry]:
        """Give up all that `owner` holds or waits for, but one request."""
        self._need_ready()
        mine = [one for one in self.books.of_user(owner) if one.request.owner == owner and one.slice_id != except_id]
        for entry in mine:
            self._withdraw(entry, "given back" if entry.holds else "cancelled", now)
        return mine

    def renew(self, entry: Entry, now: float) -> None:
        """Start a reservation's time anew."""
        if entry.state not in (GrantState.reserved, GrantState.bound, GrantState.queued):
            raise _wrong_state(entry, "renewed")
        self.touch(entry, now)
        if entry.state == GrantState.reserved:
            entry.expires = now + self.settings.reservation_ttl_seconds
        self._changed()

    def touch(self, entry: Entry, now: float) -> None:
        """Note that somebody still waits for a queued request."""
        if entry.state == GrantState.queued:
            entry.expires = now + self.settings.queue_ttl_seconds

    # -- a slice and its ledger --------------------------------------------------------------------------------------

    def begin_prepare(self, entry: Entry) -> Slice:
        """Before the ledger is asked to make a slice; end with `end_prepare`."""
        self._need_ready()
        if entry.state not in (GrantState.reserved, GrantState.bound) or entry.slice is None:
            raise _wrong_state(entry, "prepared")
        entry.busy += 1
        entry.at_ledger = True
        return entry.slice

    def end_prepare(self, entry: Entry, refused: str | None, done: bool, now: float) -> None:
        """After the ledger was asked: `done`, or `refused` with its words, or neither, when nobody knows."""
        entry.busy -= 1
        if done:
            self.mark += 1
            entry.confirmed = self.mark
            if entry.state == GrantState.reserved:
                entry.expires = now + self.settings.reservation_ttl_seconds
        elif refused is not None:
            self._withdraw(entry, f"the node refused it: {refused}", now)
        self._reconcile(now)

    def begin_bind(self, entry: Entry) -> None:
        """Before the ledger is told which process carries a slice; end with `end_bind`."""
        self._need_ready()
        if entry.state == GrantState.bound:
            pass
        elif entry.state != GrantState.reserved:
            raise _wrong_state(entry, "bound")
        entry.busy += 1

    def end_bind(self, entry: Entry, done: bool, now: float) -> None:
        """After the ledger was told."""
        entry.busy -= 1
        if done and entry.state == GrantState.reserved:
            self._bound(entry, now)
        self._reconcile(now)

    def release_answered(self, slice_id: str, gone: bool, now: float) -> None:
        """The ledger has taken note that a slice is not wanted; `gone`: it has none of that id (any more)."""
        entry = self.books.entries.get(slice_id)
        if entry is None or entry.state != GrantState.releasing:
            return
        entry.release_acked = True
        if entry.confirmed is None:
            self.mark += 1
            entry.confirmed = self.mark
        if gone:
            self._end(entry, entry.reason or "given back", now)
            self._serve(now)
        self._changed()

    def snapshot(self, snapshot: Snapshot, now: float) -> None:
        """Take over what the ledger says."""
        before, self._snapshot = self._snapshot, snapshot
        same = before is not None and before.devices is snapshot.devices and before.less is snapshot.less
        devices = [*snapshot.devices, *snapshot.coming]
        rebuilt = not (same and before is not None and before.coming is snapshot.coming) and self.books.differ(devices, snapshot.less)
        if rebuilt:
            self._possible.clear()
            self.books.rebuild(devices, snapshot.less)
        if rebuilt or not self.ready or not self.connected:
            self._changed()
        self.ready = self.connected = True
        self.books.unusable = snapshot.unusable
        slices = snapshot.slices
        if snapshot.known is not None:
            kept = {} if snapshot.whole else self._last
            kept |= {seen.slice.slice_id: seen for seen in slices}
            self._last = {key: seen for key, seen in kept.items() if key in snapshot.ids} if len(kept) > len(snapshot.ids) else kept
            slices = [*slices, *(kept[one] for one in self._unsettled() if one in self._last)]
        with self.books.many(len(slices)):
            for seen in slices:
                self._see(seen, now)
        self._move_loose(now)
        self._revoke_overbooked(now)
        self._reconcile(now)

    def _unsettled(self) -> set[str]:
        """Return the slices whose last word from the ledger may have come too early, while it was being spoken to about them."""
        early, self._early = self._early, set()
        return early | self._resizing | self._loose

    def away(self, now: float, who: str = "The GPU node") -> None:
        """The ledger does not answer: nothing is granted or freed until it does."""
        if self.connected:
            self.connected = False
            self.away_since = now
            self.away_words = f"{who} does not answer at the moment; requests keep their place in the queue."
            self._changed()

    def tick(self, now: float) -> None:
        """Let what has expired expire, and serve the queue."""
        for entry in list(self.books.entries.values()):
            if entry.expires is None or now < entry.expires or entry.busy:
                continue
            if entry.state == GrantState.queued:
                self._withdraw(entry, "left the queue: nobody has asked for it any more", now)
            elif entry.state == GrantState.reserved and (self.connected or not entry.at_ledger):
                self._withdraw(entry, "the reservation expired before a server carried it", now)
        self._give_up_growing(now)
        self._grow_back(now)
        self._move_loose(now)
        self._forget(now)
        served, at = self._served
        if served != self.generation or now - at >= RESERVE_SECONDS:
            self._serve(now)

    # -- views -------------------------------------------------------------------------------------------------------

    def entry(self, request_id: str) -> Entry | None:
        """Return a request, also one that ended not long ago."""
        return self.books.entries.get(request_id) or self.ended.get(request_id)

    def known(self, request_id: str) -> Entry:
        """Return a request or raise 404; 503 while the books are being rebuilt."""
        entry = self.entry(request_id)
        if entry is None:
            self._need_ready()
            raise NbgpuError(f"No request {request_id} is known here.", code="unknown", status=404, field="request_id")
        return entry

    def grant(self, entry: Entry, now: float) -> Grant:
        """Return a request as the API shows it."""
        queued = entry.state == GrantState.queued
        position = self._position(entry) if queued else None
        wait = self.forecast(now).get(entry.slice_id) if queued else None
        return Grant(
            request=entry.request,
            state=entry.state,
            slice=None if queued else entry.slice,
            position=position,
            wait_seconds=wait.seconds if wait is not None else None,
            wait_guessed=wait is not None and wait.guessed,
            expires_seconds=max(0.0, entry.expires - now) if entry.state == GrantState.reserved and entry.expires is not None else None,
            reason=self.why(entry) if queued else entry.reason,
            note=self.note(entry, now),
            resizing=entry.wanted.devices if entry.wanted is not None and entry.wanted is not entry.slice else None,
        )

    def _position(self, entry: Entry) -> int | None:
        generation, places = self._places
        if generation != self.generation:
            places = {one.slice_id: place for place, one in enumerate(self.books.waiting(), 1)}
            self._places = self.generation, places
        return places.get(entry.slice_id)

    def ghost(self, owner: Owner, groups: list[str], shape: Shape) -> Request:
        """Return the request that `owner` would make for a shape."""
        return Request(request_id="availability", owner=owner, groups=groups, **shape.model_dump())

    def grants(self, now: float, state: GrantState | None = None) -> list[Grant]:
        """Return all requests, or those in one state; the ended ones only when asked for."""
        self._need_ready()
        found = self.ended.values() if state == GrantState.gone else self.books.entries.values()
        return [self.grant(entry, now) for entry in found if state is None or entry.state == state]

    def device_books(self) -> list[DeviceBooks]:
        """Return what each device has given."""
        self._need_ready()
        slices = self.books.by_device()
        return [
            DeviceBooks(
                device=room.device,
                memory_granted_bytes=max(0, room.device.usable_bytes - room.free_bytes),
                compute_granted_milli=min(1000, max(0, 1000 - room.free_milli)),
                slices=slices[uuid],
                least_bytes=self.settings.smallest_bytes,
            )
            for uuid, room in self.books.rooms.items()
            if not room.coming
        ]

    def forecast(self, now: float) -> dict[str, Estimate]:
        """Return, by request id, within how many seconds each queued request is usually granted; unknown ones are left out."""
        return self.forecasts.of_queue(now) if self.connected else {}

    def drain(self) -> Effects:
        """Return the effects since the last call; releases that the ledger has not answered come every time."""
        effects, self._effects = self._effects, Effects()
        held = self.books.entries
        self._releasing = {one for one in self._releasing if one in held and held[one].state == GrantState.releasing}
        effects.releases = [one for one in self._releasing if not held[one].release_acked and not held[one].busy]
        effects.resizes = [one for one in self._resizing if one in held and not held[one].wanted_acked and not held[one].busy]
        effects.moves = [one for one in self._loose if one in held and held[one].moving is not None and not held[one].busy]
        return effects

    # -- inside ------------------------------------------------------------------------------------------------------

    def _need_ready(self) -> None:
        if not self.ready:
            raise Unavailable(STARTING, code="starting")

    def _changed(self) -> None:
        self.generation += 1

    def _serve(self, now: float) -> None:
        if not self.connected:
            return
        self._look_at_windows(now)
        self._bring_back(now)
        self._give_back(now)
        for entry in self.walk(now).serve(now) if self.books.waiting() else ():
            entry.expires = now + self.settings.reservation_ttl_seconds
            self.forecasts.granted(entry, now)
            self._effects.granted.append(entry.slice_id)
            self._changed()
        self._park_for_others(now)
        self._take_back(now)
        self._served = self.generation, now

    def _bound(self, entry: Entry, started: float) -> None:
        entry.state, entry.expires, entry.started, entry.was_bound = GrantState.bound, None, started, True
        entry.passed = []
        self._planned = ()
        self._changed()

    def _withdraw(self, entry: Entry, reason: str, now: float) -> None:
        """End a wish: at once where nothing exists, else by asking the ledger."""
        if entry.state in (GrantState.gone, GrantState.releasing):
            return
        entry.withdrawn, entry.reason, entry.expires = True, reason, None
        if entry.at_ledger:
            entry.state, entry.release_acked = GrantState.releasing, False
            self._releasing.add(entry.slice_id)
        else:
            self._end(entry, reason, now)
            self._serve(now)
        self._changed()

    def _end(self, entry: Entry, reason: str, now: float) -> None:
        if entry.was_bound:
            self.sessions.ended(entry.request.owner.hub, now - entry.started)
        self.books.take_back(entry, GrantState.gone)
        self._claim_ended(entry, now)
        entry.reason, entry.ended, entry.expires = reason, now, None
        self.books.entries.pop(entry.slice_id, None)
        self._remember(entry)
        self._effects.ended.append(entry.slice_id)

    def _remember(self, entry: Entry) -> None:
        self.ended[entry.slice_id] = entry
        _trim(self.ended)

    def _forget(self, now: float) -> None:
        while self.ended and now - next(iter(self.ended.values())).ended > ENDED_SECONDS:
            self.ended.popitem(last=False)
        while self.cancelled_early and now - next(iter(self.cancelled_early.values()))[1] > ENDED_SECONDS:
            self.cancelled_early.popitem(last=False)

    def _see(self, seen: Seen, now: float) -> None:
        """Take over one slice of a snapshot."""
        entry = self.books.entries.get(seen.slice.slice_id)
        if entry is None or not entry.holds:
            entry = self._adopt(seen, now)
        else:
            if not entry.busy or entry.moving is None:
                self.books.replace(entry, seen.slice)
        assert self._snapshot is not None
        if entry.busy:
            self._early.add(entry.slice_id)
        entry.at_ledger = True
        entry.confirmed = max(entry.confirmed or 0, self._snapshot.begun)
        if seen.state == "running" and entry.state == GrantState.reserved:
            self._bound(entry, now - seen.age_seconds)
        elif seen.state == "releasing" and entry.state != GrantState.releasing:
            entry.state, entry.expires, entry.release_acked, entry.withdrawn = GrantState.releasing, None, True, True
            self._releasing.add(entry.slice_id)
            entry.reason = "given back"
            self._changed()
        self._see_idle(entry, seen, now)
        if seen.wanted is not None or entry.wanted is not None:
            self._see_limits(entry, seen, now)
        if not seen.placed or entry.slice_id in self._loose:
            self._see_place(entry, seen, now)

    def _adopt(self, seen: Seen, now: float) -> Entry:
        slice_id = seen.slice.slice_id
        past = self.ended.pop(slice_id, None)
        early = self.cancelled_early.pop(slice_id, None)
        by_its_hub = early is not None and early[0] in (None, seen.slice.owner.hub)
        unwanted = (past is not None and past.withdrawn) or by_its_hub
        queued = self.books.entries.pop(slice_id, None)
        self._number += 1
        entry = adopted(seen.full or seen.slice, queued.number if queued else self._number, now)
        entry.slice, entry.full = seen.slice, seen.full
        if queued is not None:
            entry.request, entry.want, entry.adopted = queued.request, queued.want, False
            queued.state = GrantState.gone  # it stands for another now
        entry.state, entry.expires = GrantState.reserved, now + self.settings.reservation_ttl_seconds
        if unwanted:
            entry.state, entry.expires, entry.withdrawn, entry.reason = GrantState.releasing, None, True, "given back"
            self._releasing.add(slice_id)
        self.books.add(entry)
        self.books.take_in(entry)
        self._changed()
        return entry

    def _revoke_overbooked(self, now: float) -> None:
        """Put reservations that nobody has used yet back into the queue where the ledger has given their room away."""
        for uuid in self.books.overbooked():
            loose = [
                one
                for one in self.books.entries.values()
                if one.state == GrantState.reserved and not one.at_ledger and any(at == uuid for at, _ in one.parts())
            ]
            for entry in sorted(loose, key=lambda one: -one.number):
                if uuid not in self.books.overbooked():
                    break
                self.books.take_back(entry, GrantState.queued)
                entry.slice, entry.expires = None, now + self.settings.queue_ttl_seconds
                self._changed()

    def _reconcile(self, now: float) -> None:
        """End what the last snapshot should show and does not, then serve the queue."""
        for entry in self._absent():
            if entry.confirmed is not None and self._snapshot is not None and entry.confirmed <= self._snapshot.begun:
                self._end(entry, entry.reason or ("its last process has ended" if entry.was_bound else "the node no longer has it"), now)
                self._changed()
        self._serve(now)

    def wants_fresh(self) -> bool:
        """Whether the last snapshot lacks a slice but was begun too early to tell: the ledger should be asked at once."""
        begun = self._snapshot.begun if self._snapshot is not None else 0
        held = self.books.entries
        late = (held[one] for one in self._resizing if one in held)
        return any(entry.confirmed is not None for entry in self._absent()) or any(
            one.wanted_acked and one.wanted_mark > begun for one in late
        )

    def _absent(self) -> list[Entry]:
        if self._snapshot is None:
            return []
        present = self._snapshot.ids
        return [one for slice_id, one in self.books.entries.items() if slice_id not in present and one.at_ledger and not one.busy]


def _wrong_state(entry: Entry, verb: str) -> NbgpuError:
    why = f": {entry.reason}" if entry.reason else ""
    return NbgpuError(f"Request {entry.slice_id} is {entry.state.value} and cannot be {verb}{why}.", code="state", status=409)


def _trim(known: OrderedDict[str, Entry] | OrderedDict[str, tuple[str | None, float]]) -> None:
    while len(known) > ENDED_KEPT:
        known.popitem(last=False)
