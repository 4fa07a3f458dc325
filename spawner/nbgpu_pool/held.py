"""What happens to slices while they are held: they are resized, and those whose pod finds no node are moved. Part of the core: pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from nbgpu.claims import is_coming
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import GrantState, Resize, Slice
from nbgpu.words import rough_time

from .books import Books, Entry, Unplaced, slice_at
from .fair import Fair
from .giveback import Ask, Claim, Taken, given_back, plan, room_for, to_grow, what_matters
from .idle import has_room, note_of, to_park
from .left import Left
from .queue import Pass, outgrow
from .quotas import format_gpus, refusal
from .resize import RESIZE_SECONDS, above_quota, grows, growth, keeps_note, must_fit, must_hold_a_program, same_limits, target_of
from .shapes import Want
from .state import Effects, Seen, Settings, Snapshot
from .unusable import out_of_service
from .windows import Windows

COMING_NOTE = "A node with a GPU has to be started first; that takes some minutes."
REFUSED_SECONDS = 3.0
"""How long a pod may be without a node before its slice is moved: one that has just come waits for its turn, or for its claim."""
MOVED_SECONDS = 12.0
"""And how long after a move: kube-scheduler looks again within 10 seconds."""
SPARED_SECONDS = 600.0
"""For so long nothing more is taken back from a slice whose node has refused that."""
GROW_SECONDS, GROW_PAUSE_SECONDS = 600.0, 60.0
"""For so long nothing has been made smaller before a slice grows back; and the time from one that does to the next."""
COUNTED_ON_SECONDS = 120.0
"""So long others wait for a slice that is being parked: its user's processes may hold that up."""
PLAN_SECONDS = 5.0
"""How often it is planned what to take back although nothing has changed but the time."""
SESSION_NOTICE_SECONDS = 600.0
"""Before its end a session's user is told; of a short one a tenth before."""
AVOID_SECONDS = 300.0
"""For so long a node that had no room for a pod is the last choice for others of that shape, and no choice for this one."""
TAKEN = frozenset({GrantState.reserved, GrantState.bound})


class Held(ABC):
    """The part of the core that is about held slices."""

    settings: Settings
    books: Books
    connected: bool
    away_words: str
    mark: int
    _effects: Effects
    _snapshot: Snapshot | None

    def __init__(self) -> None:
        self.avoid: dict[tuple[str, Want], float] = {}
        """Nodes that had no room for a pod of that shape, and until when they are the last choice."""
        self._loose: set[str] = set()
        """Slices that wait for a node."""
        self._resizing: set[str] = set()
        self._parking: set[str] = set()
        """Slices that the ledger was asked to park."""
        self.parking_for = ""
        """For which request."""
        self._shrunk: dict[str, None] = {}
        """Slices that were made smaller for others, in that order."""
        self._grow_from = 0.0
        """None of them grows back before."""
        self._claims: dict[str, Claim] = {}
        """For whom something is taken or asked back, by request."""
        self._taken: dict[str, list[tuple[str, Taken]]] = {}
        """What was taken for a request, and from which slices."""
        self._owed: list[tuple[str, Taken]] = []
        """What is to be given back at once, as in `_taken`."""
        self._left = Left()
        self._planned: tuple[object, ...] = ()
        """What the last plan went by; empty: something else that matters has changed since."""
        self._planned_at = 0.0
        self.asks: dict[str, Ask] = {}
        """What is asked back, by slice; where for several reasons, for the first that is due."""
        self._asked: dict[str, dict[str, Ask]] = {}
        """By kind and slice."""
        self.ahead = 0.0
        """Of Unix time before the core's clock, seconds; the shell sets it, for windows."""
        self._possible: dict[Want, bool] = {}

    def configure(self, settings: Settings, now: float) -> None:
        """Go on with other settings, for all that comes: nobody loses what they hold or their place in the queue.

        But who waits for more than their quota is now in all would wait for ever, and is told so instead. How sessions are guessed stays as
        it was, and so does the rule by value once it is on: both have learnt.
        """
        self.settings = settings
        self._arrange()
        self._planned = ()
        self._possible.clear()
        for entry in self.books.waiting():
            cost = self.books.cost(entry.want)
            why = refusal(settings.quotas, (), entry.request.owner, entry.request.groups, cost) if cost is not None else None
            if why is not None:
                self._withdraw(entry, why, now)
        self._changed()
        self._serve(now)

    def _arrange(self) -> None:
        """Have the books follow the rules of placement and order."""
        if not self.settings.policy.by_value:
            self.books.valued = None
        elif self.books.valued is None:
            self.books.by_value()
        windows = self.settings.windows
        self.books.windows = Windows(windows, self.settings.reservation_ttl_seconds) if windows else None
        self.books.arrange = Fair(self.books, self.settings.quotas) if self.settings.fairness.fair else None

    @abstractmethod
    def _need_ready(self) -> None: ...

    @abstractmethod
    def _serve(self, now: float) -> None: ...

    @abstractmethod
    def _changed(self) -> None: ...

    @abstractmethod
    def _withdraw(self, entry: Entry, reason: str, now: float) -> None: ...

    # -- new limits --------------------------------------------------------------------------------------------------

    def begin_resize(self, entry: Entry, asked: Resize, now: float) -> Slice | None:
        """Book what a resize wants: what grows counts at once, what shrinks until the ledger says that it has.

        Returns what the ledger is to be told, None where there is nothing to tell; end with `end_resize`.

        Raises
        ------
        InvalidValue, Refused, Unavailable, NbgpuError
            400 makes no sense; 403 quota; 409 it is not running, or there is no room; 503 the ledger is away.
        """
        self._need_ready()
        if entry.state != GrantState.bound or entry.slice is None or entry.moving is not None or entry.slice_id in self._loose:
            raise NbgpuError(f"Request {entry.slice_id} is not running and cannot be resized.", code="state", status=409)
        if not self.connected:
            raise Unavailable("The limits cannot be changed while the GPU node does not answer; try again.")
        if entry.full is not None:
            why = f"Request {entry.slice_id} is parked, because its notebooks are idle: its limits can be changed when it is back."
            raise NbgpuError(why, code="state", status=409)
        target = target_of(entry, asked, self.books)
        if same_limits(target, entry.wanted or entry.slice) and (entry.wanted is None or entry.wanted_acked):
            return None
        must_hold_a_program(asked, target, self.books, self.settings.smallest_bytes)
        must_fit(entry, target, self.books, self.settings.quotas)
        outgrow(self.books, entry, growth(entry, target).keys(), now)
        entry.whole = None  # what its user chooses now is what it is
        return self._tell(entry, target, now, note=None)

    def resize_again(self, entry: Entry) -> Slice | None:
        """Return what the ledger has to be told once more; None when it need not. End with `end_resize`."""
        if entry.wanted is None or entry.wanted_acked or entry.state not in TAKEN or entry.busy:
            return None
        entry.busy += 1
        return entry.wanted

    def end_resize(self, entry: Entry, refused: str | None, done: bool, now: float, *, keeps: Slice | None = None) -> None:
        """After the ledger was told: `done`, or `refused` with its words, or neither, when nobody knows.

        Parameters
        ----------
        keeps : Slice, optional
            What it counts, where it holds more memory than it is left.
        """
        entry.busy -= 1
        if entry.wanted is None:
            return
        if done:
            entry.keeps = keeps is not None
            if keeps is not None:
                self.books.replace(entry, keeps)
                self._changed()
            self.mark += 1
            entry.wanted_acked, entry.wanted_mark = True, self.mark
        elif refused is not None and entry.taken_back:
            entry.spared_until = now + SPARED_SECONDS
            self._settle_limits(entry, None)
        elif refused is not None:
            self._settle_limits(entry, f"The limits stay as they are: {refused}")

    def _tell(self, entry: Entry, target: Slice, now: float, note: str | None, *, taken_back: bool = False) -> Slice:
        entry.taken_back = taken_back
        self.books.change(entry, wanted=target, moving=entry.moving)
        entry.wanted_acked, entry.wanted_until, entry.note = False, now + RESIZE_SECONDS, note
        entry.busy += 1
        self._resizing.add(entry.slice_id)
        self._changed()
        return target

    def _settle_limits(self, entry: Entry, note: str | None) -> None:
        self.books.change(entry, wanted=None, moving=entry.moving)
        entry.wanted_acked, entry.note = True, note
        self._resizing.discard(entry.slice_id)
        self._changed()

    def _take_growth_back(self, entry: Entry, why: str, now: float) -> None:
        """Want the limits that are in force: the ledger is told by an effect."""
        assert entry.slice is not None
        mode = entry.wanted.mode if entry.wanted is not None else entry.slice.mode
        self._tell(entry, entry.slice.model_copy(update={"mode": mode}), now, note=f"The slice could not grow: {why}.")
        entry.busy -= 1

    def _see_limits(self, entry: Entry, seen: Seen, now: float) -> None:
        """Take over what the ledger says of the limits: after `Books.replace`."""
        assert self._snapshot is not None
        if entry.busy or (entry.wanted is not None and not (entry.wanted_acked and entry.wanted_mark <= self._snapshot.begun)):
            return
        if seen.wanted is None:
            if entry.wanted is not None:
                self._settle_limits(entry, entry.note)
        elif entry.wanted is None or not same_limits(entry.wanted, seen.wanted):  # a pool before this one told the ledger
            self.books.change(entry, wanted=seen.wanted, moving=entry.moving)
            entry.wanted_acked, entry.wanted_until = True, now + RESIZE_SECONDS
            self._resizing.add(entry.slice_id)
            self._changed()
        if seen.refused and entry.wanted is not None:
            self._take_growth_back(entry, "its node found no room for that", now)

    def _give_up_growing(self, now: float) -> None:
        for slice_id in list(self._resizing):
            entry = self.books.entries.get(slice_id)
            if entry is None or entry.wanted is None or entry.slice is None:
                self._resizing.discard(slice_id)
            elif entry.full is not None:  # the ledger is told until it has answered: it alone can bring it back
                continue
            elif now >= entry.wanted_until and not entry.busy and grows(entry.slice, entry.wanted):
                self._take_growth_back(entry, "its node did not answer in time", now)

    # -- idle slices ---------------------------------------------------------------------------------------------------

    def _see_idle(self, entry: Entry, seen: Seen, now: float) -> None:
        """Take over whether a slice is idle or parked."""
        assert self._snapshot is not None
        wants_from = None if seen.wanted_seconds is None else now - seen.wanted_seconds
        if (entry.full, entry.wants_from is None) != (seen.full, wants_from is None):
            self._changed()
            self.books.granted.touched(entry.slice_id)
        known = entry.used_bytes, entry.idle_from is None, entry.unused_from is None
        if known != (seen.used_bytes, seen.idle_seconds is None, seen.unused_seconds is None):
            self._planned = ()
        entry.used_bytes = seen.used_bytes
        if entry.keeps != seen.keeps:
            entry.keeps = seen.keeps
            self._changed()
        entry.unused_from = None if seen.unused_seconds is None else now - seen.unused_seconds
        entry.full, entry.idle_from = seen.full, None if seen.idle_seconds is None else now - seen.idle_seconds
        entry.wants_from = wants_from if entry.wants_from is None or wants_from is None else entry.wants_from
        if seen.full is not None:
            self.books.parked.add(entry.slice_id)
        answered = entry.park_mark is not None and entry.park_mark <= self._snapshot.begun
        if seen.full is not None or (answered and not seen.parking):
            self._parked_or_not(entry)

    def _parked_or_not(self, entry: Entry) -> None:
        entry.parking, entry.park_mark = False, None
        self._parking.discard(entry.slice_id)

    def _bring_back(self, now: float) -> None:
        """Give parked slices that are wanted their room; on each device in the order in which they have been."""
        taken: set[str] = set()
        for entry in self.books.wanted_back():
            assert entry.full is not None
            devices = {part.uuid for part in entry.full.devices}
            if not entry.busy and not taken & devices and has_room(self.books, entry):
                self._tell(entry, entry.full, now, note=entry.note)
                entry.busy -= 1
            else:
                taken |= devices

    def _park_for_others(self, now: float) -> None:
        """Have idle slices parked for those who wait; one who waits at a time."""
        held = self.books.entries
        self._parking = {one for one in self._parking if one in held and now < held[one].parking_until}
        if not self._parking:
            self.parking_for = ""
        if self.settings.idle.after_seconds is None or self._parking:
            return
        found = to_park(self.books, self.settings.idle, self.settings.policy, now)
        if found is None:
            return
        self.parking_for = found[0].slice_id
        self._changed()
        for entry in found[1]:
            entry.parking, entry.parking_until = True, now + COUNTED_ON_SECONDS
            self._parking.add(entry.slice_id)
            self._effects.parks.append(entry.slice_id)

    def end_park(self, entry: Entry, refused: bool) -> None:
        """After the ledger was asked to park a slice; whether it is parked a snapshot tells."""
        if refused:
            entry.idle_from = None
            self._parked_or_not(entry)
        else:
            self.mark += 1
            entry.park_mark = self.mark

    # -- what is asked back -------------------------------------------------------------------------------------------

    def _take_back(self, now: float) -> None:
        """Take back what was lent beyond guarantees, for those who wait for theirs; parking comes first."""
        self._ask_back("reserved", self.books.windows.asks(self.books) if self.books.windows is not None else ())
        self._ask_back("session", self._overdue(now))
        if self._parking:
            return
        settings = self.settings
        spent = self._left.spent(now)
        goes_by = (spent, *what_matters(self.books, settings.quotas))
        if goes_by == self._planned and now - self._planned_at < PLAN_SECONDS:
            return
        self._planned, self._planned_at = goes_by, now
        asked = self._asked.get("guarantee", {})
        found = plan(self.books, settings.quotas, settings.give_back, asked, settings.policy, settings.smallest_bytes, now, spent)
        self._claims |= {claim.entry.slice_id: claim for claim in found.claims}
        for entry, target, taken, claim in found.shrinks:
            share = format_gpus(sum(one.compute_milli for one in target.devices))
            note = f"The slice was made smaller, {share} is left: it was lent, and {claim.whose} needs what is guaranteed to them."
            entry.whole = entry.whole or entry.wanted or entry.slice
            self._shrunk[entry.slice_id] = None
            self._taken.setdefault(claim.entry.slice_id, []).append((entry.slice_id, taken))
            self._grow_from = now + GROW_SECONDS
            self._tell(entry, target, now, note, taken_back=True)
            entry.busy -= 1
        self._ask_back("guarantee", found.asks)

    def taken_back_for(self, ghost: Entry, now: float) -> float | None:
        """Return in how many seconds what was lent would be taken back for one who asks now (`giveback.room_for`)."""
        settings = self.settings
        asked = self._asked.get("guarantee", {})
        return room_for(self.books, settings.quotas, settings.give_back, asked, settings.policy, settings.smallest_bytes, now, ghost)

    def _claim_ended(self, entry: Entry, now: float) -> None:
        """Note what is to be given back where a claimant left before its server ran."""
        claim, taken = self._claims.pop(entry.slice_id, None), self._taken.pop(entry.slice_id, [])
        if claim is not None and not entry.was_bound:
            self._left.note(claim, now)
            self._owed += taken

    def _claim_replaced(self, old: Entry, new: Entry) -> None:
        """Note that a claimant has something smaller instead: what is over is given back at once, and all of it where that one leaves."""
        if old.slice_id in self._claims:
            self._claims[new.slice_id] = self._claims.pop(old.slice_id)
            self._taken[new.slice_id] = taken = self._taken.pop(old.slice_id, [])
            self._owed += taken

    def _give_back(self, now: float) -> None:
        """Let slices have back what was taken from them for one who has left: before anybody else has it."""
        owed, self._owed = self._owed, []
        for slice_id, taken in owed:
            entry = self.books.entries.get(slice_id)
            if entry is None or entry.state != GrantState.bound or entry.full is not None or entry.moving is not None:
                continue
            if entry.busy or entry.parking:
                self._owed.append((slice_id, taken))
                continue
            target = given_back(entry, taken)
            if target is None or entry.whole is None:
                continue
            try:
                must_fit(entry, target, self.books, self.settings.quotas)
            except NbgpuError:  # who else has a right to it has it
                continue
            again = target.devices == entry.whole.devices
            entry.whole = None if again else entry.whole
            self._tell(entry, target, now, note=None if again else entry.note)
            entry.busy -= 1

    def _grow_back(self, now: float) -> None:
        """Let one slice that was made smaller have back what it was: once, after a while in which nobody needed room."""
        if not self._shrunk or not self.connected or now < self._grow_from:
            return
        entries = {one: self.books.entries.get(one) for one in self._shrunk}
        self._shrunk = {one: None for one, entry in entries.items() if entry is not None and entry.whole is not None}
        found = to_grow(self.books, self.settings.quotas, [entry for one in self._shrunk if (entry := entries[one]) is not None])
        if found is not None:
            entry, target = found
            entry.whole = None
            self._grow_from = now + GROW_PAUSE_SECONDS
            self._tell(entry, target, now, note=None)
            entry.busy -= 1

    def _overdue(self, now: float) -> Iterator[Ask]:
        """Yield whose longest session ends soon, or has ended."""
        self.books.timed &= self.books.entries.keys()
        for entry in (self.books.entries[one] for one in sorted(self.books.timed)):
            longest = entry.request.session_seconds
            if longest is None or entry.state != GrantState.bound:
                continue
            due = entry.started + longest
            if now >= due - min(SESSION_NOTICE_SECONDS, longest / 10):
                why = f"a session here lasts {rough_time(longest)} at most"
                yield Ask(entry.slice_id, entry.request.owner, "session", due, why)

    def _look_at_windows(self, now: float) -> None:
        """Choose the devices of windows that are near."""
        if self.books.windows is not None and self.books.windows.look(self.books, now, now + self.ahead):
            self._changed()

    def _ask_back(self, kind: str, asks: Iterable[Ask]) -> None:
        """These slices are asked back for this kind of reason, and no others."""
        fresh = {ask.slice_id: ask for ask in asks}
        if fresh == self._asked.get(kind, {}):
            return
        self._asked[kind] = fresh
        before, self.asks = self.asks, {}
        for ask in sorted((one for of in self._asked.values() for one in of.values()), key=lambda one: one.due):
            self.asks.setdefault(ask.slice_id, ask)
        self._effects.asked += [one for one in self.asks if one not in before]
        self._changed()

    def why(self, entry: Entry) -> str:
        """Return why a request waits."""
        if not self.connected:
            return self.away_words
        if entry.holder:
            return f"waits for {entry.holder}: what is held now must be given back first"
        if entry.slice_id == self.parking_for:
            return "an idle notebook is being moved off the GPU to make room for you; that takes some seconds"
        if entry.kept:
            return entry.kept
        windows = self.books.windows
        kept = windows.of(self.books.closed(entry), entry) if windows is not None and windows.kept else None
        also = f", or kept for {kept.window.name} from {kept.until} on" if kept is not None else ""
        return out_of_service(self.books, entry.want) or f"all GPUs that could hold it are in use{also}"

    def note(self, entry: Entry, now: float) -> str | None:
        """Return what the user of a slice should know."""
        ask = self.asks.get(entry.slice_id)
        if ask is None:
            windows = self.books.windows
            kept = windows.of((uuid for uuid, _ in entry.quota_parts()), entry) if windows is not None and windows.kept else None
            until = f"This GPU is kept for {kept.window.name} from {kept.until} on." if kept is not None else None
            return entry.note or keeps_note(entry) or note_of(entry) or until
        when = f"within {rough_time(ask.due - now)}" if ask.due > now else "now"
        return f"Please save your work and stop this server {when}: {ask.why}."

    # -- pods that find no node ----------------------------------------------------------------------------------------

    def _see_place(self, entry: Entry, seen: Seen, now: float) -> None:
        """Take over whether a slice has its devices."""
        if entry.moving is not None and not entry.busy and seen.slice.devices == entry.moving.devices:
            self.books.change(entry, wanted=entry.wanted, moving=None)
        if seen.placed or entry.state not in TAKEN:
            if entry.slice_id in self._loose:
                self._loose.discard(entry.slice_id)
                entry.unplaced, entry.note = None, None
                entry.tried.clear()
                self._changed()
            return
        waits = is_coming(seen.slice.node)
        if not seen.refusal and not waits:
            return
        self._loose.add(entry.slice_id)
        if waits and entry.note is None:
            entry.note = COMING_NOTE
            self._changed()
        if seen.refusal and (entry.unplaced is None or entry.unplaced.words != seen.refusal):
            entry.unplaced = Unplaced(seen.refusal, entry.unplaced.since if entry.unplaced is not None else now)
            if not waits:
                entry.note = f"Kubernetes finds no node for the server yet: {seen.refusal}"
            self._changed()

    def _move_loose(self, now: float) -> None:
        """Find other places for slices whose pods find no node."""
        for slice_id in list(self._loose):
            entry = self.books.entries.get(slice_id)
            if entry is None or entry.slice is None:
                self._loose.discard(slice_id)
            elif entry.state in TAKEN and not entry.busy and entry.moving is None and self.connected:
                self._move(entry, entry.slice, now)

    def _move(self, entry: Entry, at: Slice, now: float) -> None:
        coming = is_coming(at.node)
        if not coming:
            if entry.unplaced is None or now - entry.unplaced.since < REFUSED_SECONDS:
                return
            entry.tried[at.node] = now
            self.avoid[at.node, entry.want] = now + AVOID_SECONDS
        entry.tried = {node: when for node, when in entry.tried.items() if now - when < AVOID_SECONDS}
        walk = self.walk(now)
        want = entry.want._replace(model=at.devices[0].model) if entry.adopted else entry.want  # its own words are lost: the same model
        found = walk.elsewhere(entry, want, entry.tried.keys() | {at.node}, coming=not coming)
        if found is None:
            return
        target = slice_at(entry, found, at.groups)
        if above_quota(entry, target, self.books, self.settings.quotas) is not None:
            return
        self.books.change(entry, wanted=None, moving=target)
        if is_coming(target.node):
            entry.note = COMING_NOTE
        elif coming:
            entry.note = None
        else:
            words = entry.unplaced.words if entry.unplaced is not None else ""
            entry.note = f"Node {at.node} has no room for the server, {target.node} is tried. Kubernetes said: {words}"
        self._changed()

    def walk(self, now: float) -> Pass:
        """Return a walk over the queue that knows whose room is kept."""
        for key in [key for key, until in self.avoid.items() if until <= now]:
            del self.avoid[key]
        settings = self.settings
        return Pass(self.books, settings.quotas, settings.fairness, settings.policy, frozenset(self.avoid), frozenset(self.books.kept()))

    def begin_move(self, entry: Entry) -> tuple[Slice, Slice] | None:
        """Return from where and to where the ledger is to move a slice; None when it need not. End with `end_move`."""
        if entry.moving is None or entry.slice is None or entry.state not in TAKEN or entry.busy:
            return None
        entry.busy += 1
        return entry.slice, entry.moving

    def end_move(self, entry: Entry, moved: bool | None, now: float) -> None:
        """After the ledger was asked: `moved`, or not, or None when nobody knows."""
        entry.busy -= 1
        if entry.moving is None or moved is None:
            return
        target = entry.moving
        self.books.change(entry, wanted=None, moving=None)
        if moved:
            self.mark += 1
            entry.confirmed = self.mark
            self.books.replace(entry, target)
        if entry.unplaced is not None:
            entry.unplaced.since = now + MOVED_SECONDS - REFUSED_SECONDS
        self._changed()
