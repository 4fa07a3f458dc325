"""What the start page says of each shape: free now, a wait, forbidden or impossible, in plain words."""

from __future__ import annotations

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import Availability, AvailabilityQuery, GrantState, Shape
from nbgpu.words import rough_time, rough_time_down

from . import quotas as quota_rules
from .books import Entry
from .core import Core
from .estimate import Estimate
from .idle import makes_room
from .quotas import Holding
from .shapes import by_model, want_of
from .unusable import impossible, out_of_service


def answer(core: Core, query: AvailabilityQuery, now: float) -> list[Availability]:
    """Return one `Availability` for each shape of `query`, in order.

    Raises
    ------
    Unavailable
        The books are being rebuilt.
    """
    if not core.ready:
        raise Unavailable("The pool is starting: rebuilding the books from what runs. Try again in a few seconds.", code="starting")
    looker = _Looker(core, query, now)
    found = [looker.look(shape) for shape in query.shapes]
    return found if core.connected else [_stale(one, core, now) for one in found]


def _stale(found: Availability, core: Core, now: float) -> Availability:
    """Say that an answer is from the cache: nothing is granted before the ledger answers again."""
    if found.state not in ("free", "wait"):
        return found
    ago = rough_time(now - core.away_since, "seconds")
    return found.model_copy(update={"state": "wait", "wait_seconds": None, "reason": f"{found.reason}, as of {ago} ago. {core.away_words}"})


class _Looker:
    def __init__(self, core: Core, query: AvailabilityQuery, now: float):
        self.core, self.query, self.now = core, query, now
        quotas = core.settings.quotas
        leaves = core.leaving(query.owner, query.instead_of)
        self.holdings: list[Holding] = core.books.holdings(frozenset(quotas.groups), of=query.owner, but=leaves)
        self.waiting = len(core.books.waiting()) - (leaves is not None)
        self.walk = core.walk(now)
        for entry in core.books.waiting():
            if entry is not leaves:
                self.walk.bar_for(entry)

    def look(self, shape: Shape) -> Availability:
        try:
            want = want_of(shape)
        except NbgpuError as error:
            return Availability(state="impossible", reason=error.message)
        core = self.core
        parts = by_model(want, core.books.kinds)
        if not core.can_ever(want):
            return Availability(state="impossible", reason=impossible(core.books, want))
        allowed = core.too_small(want)
        if allowed is not None:
            return Availability(state="impossible", reason=f"too small; it must be {allowed}")
        memory = {model: part.memory_bytes for model, part in parts.items()}
        compute = {model: part.compute_milli for model, part in parts.items()}
        cost = core.books.cost(want)
        assert cost is not None
        why = quota_rules.refusal(core.settings.quotas, self.holdings, self.query.owner, self.query.groups, cost)
        if why is not None:
            return Availability(state="forbidden", reason=why, memory=memory, compute_milli=compute)
        ghost = Entry(core.ghost(self.query.owner, self.query.groups, shape), want, 0, self.now, state=GrantState.queued)
        found = self.walk.find(ghost)
        if found is not None and found[0][0].coming:
            starts = core.settings.start_seconds.get(found[0][0].device.node.split(":")[1])
            words = "a node has to be started first"
            words = words if starts is None else f"{words}: usually within {rough_time(starts)}"
            return Availability(state="wait", reason=words, wait_seconds=starts, memory=memory, compute_milli=compute)
        if found is not None:
            kept = core.books.windows.of((room.device.uuid for room, _ in found), ghost) if core.books.windows is not None else None
            words = "free now" if kept is None else f"free until {kept.until}, then kept for {kept.window.name}"
            return Availability(state="free", reason=words, memory=memory, compute_milli=compute)
        off = None if ghost.holder else out_of_service(core.books, want)
        if off is not None:
            return Availability(state="wait", reason=off, memory=memory, compute_milli=compute)
        settings = core.settings
        kept = None if ghost.holder else ghost.kept or self._kept(ghost)
        if kept is not None:
            return Availability(state="wait", reason=kept, memory=memory, compute_milli=compute)
        if not ghost.holder and not self.waiting and makes_room(core.books, settings.idle, settings.policy, ghost, self.now):
            words = "in use, but an idle notebook may make room for you within a minute"
            return Availability(state="wait", reason=words, memory=memory, compute_milli=compute)
        back = None if ghost.holder else core.taken_back_for(ghost, self.now)
        if back is not None:
            when = "others make room for you at once" if back == 0 else f"it is asked back, for within {rough_time(back)}"
            words = f"in use, but what is guaranteed to you was lent: {when}"
            return Availability(state="wait", reason=words, wait_seconds=back or None, memory=memory, compute_milli=compute)
        wait = None if ghost.holder else core.forecasts.of(want, self.now, core.books.closed(ghost))
        seconds = wait.seconds if wait is not None else None
        return Availability(
            state="wait", reason=self._words(ghost.holder, wait), wait_seconds=seconds, memory=memory, compute_milli=compute
        )

    def _kept(self, ghost: Entry) -> str | None:
        """Return for whom and until when the room is kept that there would be; None where there is none either."""
        books = self.core.books
        closed = books.closed(ghost)
        kept = books.windows.of(closed, ghost) if books.windows is not None else None
        if kept is None or not self.walk.would_fit(ghost.want, closed):
            return None
        if self.now >= kept.begin:
            return f"kept for {kept.window.name} for another {rough_time(kept.end - self.now)}"
        left = kept.begin - self.now - self.core.settings.reservation_ttl_seconds
        words = f"kept for {kept.window.name} from {kept.until} on"
        return f"{words}: a session of at most {rough_time_down(left)} could start now" if left >= 60 else words

    def _words(self, holder: str, wait: Estimate | None) -> str:
        if holder:
            return f"in use by your group: {holder} is used up until someone stops"
        words = ["in use"]
        if wait is not None:
            words.append(f"{'perhaps' if wait.guessed else 'usually'} free within {rough_time(wait.seconds)}")
        if self.waiting:
            words.append(f"{self.waiting} {'waits' if self.waiting == 1 else 'wait'} before you")
        head, *rest = words
        return f"{head}: {', '.join(rest)}" if rest else head
