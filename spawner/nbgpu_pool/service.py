"""The shell around the core: the clock, the ledger, and who waits for changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.models import (
    AskBack,
    Availability,
    AvailabilityQuery,
    Device,
    Grant,
    GrantState,
    Hints,
    Launch,
    LaunchGrant,
    LaunchRequest,
    Owner,
    Request,
    Reservation,
    Resize,
    Slice,
)

from . import hints
from .availability import answer
from .books import Entry
from .core import STARTING, Core
from .ledger import Ledger, LedgerRefused
from .metrics import Metrics
from .promises import beyond
from .state import Settings
from .windows import reservations

TICK_SECONDS = 0.5
RETRY_SECONDS = 0.5
WOKEN_AT_ONCE = 50
"""So many of those who wait for a change are woken at a time,"""
WAKING_SECONDS = 0.05
"""and after so long the next."""
HINTS_SECONDS = 1.0
REFUSED_SECONDS = 10.0
"""The longest pause before the ledger is asked again for what it refused."""

log = logging.getLogger("nbgpu.pool")


class Service:
    """One pool: `start` it, call it from request handlers of the same event loop, `stop` it."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self.core = Core(settings)
        self.ledger = ledger
        self.clock, self.wall = clock, wall
        self.core.ahead = wall() - clock()
        self._devices: tuple[Sequence[Device], Sequence[Device]] = (), ()
        """Those that there are, and those that could be started."""
        self._warned: set[str] = set()
        self.metrics = Metrics(self.core)
        self.closing = False
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._asking: set[str] = set()
        self._refused: dict[str, float] = {}
        """How long was waited after what the ledger refused of a slice last."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._hints: tuple[float, Hints] | None = None
        self._refreshes = False
        self._wake = asyncio.Event()
        self._waiters: set[asyncio.Future[bool]] = set()
        self._following: dict[str, set[asyncio.Future[bool]]] = {}
        """Those of them that follow one request, by its id."""
        self._due: list[asyncio.Future[bool]] = []
        """Who has to be woken still."""
        self._waking: asyncio.TimerHandle | None = None
        self._announced = 0

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch the ledger and the clock."""
        self._spawn(self._watch())
        self._spawn(self._ticker())

    def configure(self, settings: Settings) -> None:
        """Go on with other settings; nothing that is held or waits is lost."""
        self.core.configure(settings, self.clock())
        known, self._devices = self._devices, ((), ())
        self._warned.clear()
        self.promised(*known)
        self.settle()

    def promised(self, devices: Sequence[Device], coming: Sequence[Device]) -> None:
        """Say once of each promise of the configuration that the devices, with those to come, cannot keep it."""
        if devices is self._devices[0] and coming is self._devices[1]:
            return
        self._devices = devices, coming
        for words in beyond(self.core.settings, [*devices, *coming]):
            if words not in self._warned:
                log.warning("%s", words)
            self._warned.add(words)

    async def stop(self) -> None:
        """End everything; the state that matters is the ledger's."""
        self.closing = True
        self._announce(force=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ledger.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        was_away = False
        while True:
            try:
                async for found in self.ledger.watch(lambda: self.core.mark, self.core.wants_fresh):
                    if isinstance(found, Unavailable):
                        if not was_away:
                            log.warning("ledger away: %s", found.message)
                        was_away = True
                        self.core.away(self.clock(), self.ledger.who)
                    else:
                        if was_away or not self.core.ready:
                            log.info("ledger here: devices=%d slices=%d", len(found.devices), len(found.slices))
                        was_away = False
                        self.core.snapshot(found, self.clock())
                        self.promised(found.devices, found.coming)
                        if self.core.books.overbooked():
                            log.error("more is running than the devices have: %s", ", ".join(self.core.books.overbooked()))
                    self.settle()
            except Exception:
                log.exception("watching the ledger failed; starting over")
            self.core.away(self.clock(), self.ledger.who)
            await asyncio.sleep(1.0)

    async def _ticker(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_SECONDS)
            self._wake.clear()
            try:
                self.core.ahead = self.wall() - self.clock()
                with self.metrics.placement():
                    self.core.tick(self.clock())
                self.settle()
            except Exception:
                log.exception("tick failed")

    def settle(self) -> None:
        """Carry the core's effects out: log, ask slices back, wake those who wait."""
        effects = self.core.drain()
        for request_id in effects.granted:
            entry = self.core.books.entries.get(request_id)
            if entry is not None and entry.slice is not None:
                waited = self.clock() - entry.enqueued
                self.metrics.waited(waited)
                where = ",".join(f"{one.index}:{one.compute_milli}" for one in entry.slice.devices)
                who, asked = _who(entry.request.owner), _asked(entry.request)
                log.info("granted %s %s %s node=%s devices=%s waited=%.1fs", request_id, who, asked, entry.slice.node, where, waited)
        for request_id in effects.ended:
            entry = self.core.ended.get(request_id)
            if entry is not None:
                log.info("gone %s %s: %s", request_id, _who(entry.request.owner), entry.reason)
        for request_id in (*effects.granted, *effects.ended):
            self._wake_all(self._following.get(request_id, ()))
        for slice_id in effects.asked:
            if (ask := self.core.asks.get(slice_id)) is not None:
                log.warning("asked back %s %s: %s", slice_id, _who(ask.owner), ask.needs)
        for slice_id in effects.parks:
            self._spawn(self._park(slice_id))
        for what, slice_ids in ((self._release, effects.releases), (self._resize_again, effects.resizes), (self._move, effects.moves)):
            for slice_id in slice_ids:
                if slice_id not in self._asking:
                    self._asking.add(slice_id)
                    self._spawn(self._ask(what, slice_id))
        self._announce()
        if not self._refreshes:
            self._refreshes = True
            asyncio.get_running_loop().call_soon(self._refresh)  # the answer goes out first

    def _refresh(self) -> None:
        self._refreshes = False
        self.core.books.refresh()

    async def _ask(self, what: Callable[[str], Awaitable[None]], slice_id: str) -> None:
        """Ask the ledger for something that is asked again until it is answered."""
        name = what.__name__.strip("_").replace("_", " ")
        try:
            async with self._lock(slice_id):
                await what(slice_id)
            self._refused.pop(slice_id, None)
        except LedgerRefused as error:  # until somebody changes what refuses it: more and more seldom
            pause = min(REFUSED_SECONDS, 2 * self._refused.get(slice_id, RETRY_SECONDS))
            self._refused[slice_id] = pause
            log.warning("%s %s refused, will ask again in %.0f s: %s", name, slice_id, pause, error.message)
            await asyncio.sleep(pause)
        except NbgpuError as error:
            log.warning("%s %s not answered, will ask again: %s", name, slice_id, error.message)
            await asyncio.sleep(RETRY_SECONDS)
        except Exception:
            log.exception("%s %s failed, will ask again", name, slice_id)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            self._asking.discard(slice_id)
            if slice_id not in self.core.books.entries:
                self._refused.pop(slice_id, None)
        self.settle()

    async def _release(self, slice_id: str) -> None:
        gone = await self.ledger.release(slice_id)
        self.core.release_answered(slice_id, gone, self.clock())

    async def _resize_again(self, slice_id: str) -> None:
        entry = self.core.books.entries.get(slice_id)
        wanted = self.core.resize_again(entry) if entry is not None else None
        if entry is not None and wanted is not None:
            with contextlib.suppress(LedgerRefused):  # the grant's note tells
                await self._tell_limits(entry, wanted)

    async def _tell_limits(self, entry: Entry, wanted: Slice) -> None:
        refused: str | None = None
        done, keeps = False, None
        try:
            if entry.full is None:
                keeps = await self.ledger.resize(wanted, only_unused=entry.taken_back)
            else:
                await self.ledger.restore(entry.slice_id)
            done = True
        except LedgerRefused as error:
            refused = error.message
            raise
        finally:
            self.core.end_resize(entry, refused, done, self.clock(), keeps=keeps)
            self.settle()

    async def _park(self, slice_id: str) -> None:
        entry, seconds = self.core.books.entries.get(slice_id), self.core.settings.idle.after_seconds
        if entry is None or seconds is None:
            return
        refused = True
        try:
            async with self._lock(slice_id):
                await self.ledger.park(slice_id, seconds)
            refused = False
            log.info("parking %s %s: idle, and others wait", slice_id, _who(entry.request.owner))
        except NbgpuError as error:
            log.info("not parked %s: %s", slice_id, error.message)
        finally:
            self.core.end_park(entry, refused)

    async def _move(self, slice_id: str) -> None:
        entry = self.core.books.entries.get(slice_id)
        way = self.core.begin_move(entry) if entry is not None else None
        if entry is None or way is None:
            return
        moved: bool | None = None
        try:
            log.info("moving %s from node=%s to node=%s: %s", slice_id, way[0].node, way[1].node, entry.note)
            await self.ledger.move(*way)
            moved = True
        except LedgerRefused as error:
            log.info("not moved %s: %s", slice_id, error.message)
            moved = False
        finally:
            self.core.end_move(entry, moved, self.clock())

    @asynccontextmanager
    async def _lock(self, slice_id: str) -> AsyncGenerator[None, None]:
        """One call to the ledger at a time about one slice, so that a DELETE never passes a PUT."""
        lock, users = self._locks.get(slice_id, (asyncio.Lock(), 0))
        self._locks[slice_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[slice_id]
            if users == 1:
                del self._locks[slice_id]
            else:
                self._locks[slice_id] = lock, users - 1

    # -- waiting for changes -----------------------------------------------------------------------------------------

    def _announce(self, force: bool = False) -> None:
        """Wake those who wait for a change, some at a time: thousands of them must not keep the others' answers waiting."""
        if force:
            self._wake_all(list(self._waiters))
        elif self._waking is None and (self._due or self._announced != self.core.generation):
            if not self._due:
                self._announced, self._due = self.core.generation, list(self._waiters)
            now, self._due = self._due[:WOKEN_AT_ONCE], self._due[WOKEN_AT_ONCE:]
            if now:
                self._wake_all(now)
                self._waking = asyncio.get_running_loop().call_later(WAKING_SECONDS * len(now) / WOKEN_AT_ONCE, self._go_on_waking)

    def _go_on_waking(self) -> None:
        self._waking = None
        self._announce()

    @staticmethod
    def _wake_all(waiters: Iterable[asyncio.Future[bool]], changed: bool = True) -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(changed)

    async def changed(self, since: int, timeout_seconds: float, of: str | None = None) -> bool:
        """Wait until the core's generation is another than `since`; False when the time is up first.

        Parameters
        ----------
        of : str, optional
            Id of the request that is followed: who waits is woken at once when it is granted or ends.
        """
        if self.core.generation != since or self.closing:
            return True
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        late = loop.call_later(timeout_seconds, self._wake_all, (waiter,), False)
        self._waiters.add(waiter)
        if of is not None:
            self._following.setdefault(of, set()).add(waiter)
        try:
            return await waiter
        finally:
            late.cancel()
            self._waiters.discard(waiter)
            if of is not None:
                self._following[of].discard(waiter)
                if not self._following[of]:
                    del self._following[of]

    # -- commands ----------------------------------------------------------------------------------------------------

    def request(self, request: Request) -> Grant:
        """Take a request (see `Core.request`)."""
        now = self.clock()
        fresh = self.core.entry(request.request_id) is None
        with self.metrics.placement():
            grant = self.core.request(request, now)
        if fresh and grant.state != GrantState.reserved:  # else one line tells all of it: `settle`
            log.info("request %s %s %s -> %s", request.request_id, _who(request.owner), _asked(request), grant.state.value)
        self.settle()
        return grant

    def replace(self, request_id: str, request: Request) -> Grant:
        """Give a waiting request up for one that can be granted at once (see `Core.replace`)."""
        grant = self.core.replace(self.core.known(request_id), request, self.clock())
        log.info("request %s %s in place of %s -> %s", request.request_id, _who(request.owner), request_id, grant.state.value)
        self.settle()
        return grant

    async def launch(self, wanted: LaunchRequest) -> LaunchGrant:
        """Take a request and, where it is granted, prepare its slice: `request` and `prepare` in one call."""
        grant = self.request(wanted.request)
        if grant.state not in (GrantState.reserved, GrantState.bound):
            return LaunchGrant(grant=grant)
        request_id = wanted.request.request_id
        launch = await self.prepare(request_id, wanted.uid)
        return LaunchGrant(grant=self.core.grant(self.core.known(request_id), self.clock()), launch=launch)

    def cancel(self, request_id: str, hub: str | None) -> Grant | None:
        """Give a request up."""
        entry = self.core.cancel(request_id, hub, self.clock())
        if entry is None or entry.state != GrantState.gone:
            log.info("release %s -> %s", request_id, entry.state.value if entry else "unknown, remembered")
        self.settle()
        return self.core.grant(entry, self.clock()) if entry else None

    def release_owner(self, owner: Owner, except_id: str | None) -> list[Grant]:
        """Give up all of an owner but one."""
        entries = self.core.release_owner(owner, except_id, self.clock())
        log.info("release all of %s but %s: %d", _who(owner), except_id, len(entries))
        self.settle()
        return [self.core.grant(entry, self.clock()) for entry in entries]

    def renew(self, request_id: str) -> Grant:
        """Start a reservation's time anew."""
        entry = self.core.known(request_id)
        self.core.renew(entry, self.clock())
        self.settle()
        return self.core.grant(entry, self.clock())

    async def prepare(self, request_id: str, uid: int | None) -> Launch:
        """Have the ledger make the slice."""
        return await self._finish(self._prepare(request_id, uid))

    async def _prepare(self, request_id: str, uid: int | None) -> Launch:
        entry = self.core.known(request_id)
        async with self._lock(request_id):
            wanted = self.core.begin_prepare(entry)
            refused: str | None = None
            done = False
            try:
                launch = await self.ledger.prepare(wanted, uid)
                done = True
            except LedgerRefused as error:
                refused = error.message
                raise LedgerRefused(f"The GPU node refused the slice: {error.message} Please try again.") from error
            finally:
                self.core.end_prepare(entry, refused, done, self.clock())
                self.settle()
        log.info("prepared %s %s", request_id, _who(entry.request.owner))
        return launch

    async def resize(self, request_id: str, asked: Resize) -> Grant:
        """Give a running slice other limits."""
        return await self._finish(self._resize(request_id, asked))

    async def _resize(self, request_id: str, asked: Resize) -> Grant:
        entry = self.core.known(request_id)
        async with self._lock(request_id):
            wanted = self.core.begin_resize(entry, asked, self.clock())
            if wanted is not None:
                await self._tell_limits(entry, wanted)
        parts = ",".join(f"{one.index}:{one.compute_milli}:{one.memory_bytes}" for one in wanted.devices) if wanted else "as it is"
        log.info("resize %s %s -> %s", request_id, _who(entry.request.owner), parts)
        return self.core.grant(entry, self.clock())

    async def bind(self, request_id: str, pid: int | None) -> Grant:
        """Tell the ledger which process carries the slice."""
        return await self._finish(self._bind(request_id, pid))

    async def _bind(self, request_id: str, pid: int | None) -> Grant:
        entry = self.core.known(request_id)
        async with self._lock(request_id):
            self.core.begin_bind(entry)
            done = False
            try:
                await self.ledger.adopt(request_id, pid)
                done = True
            finally:
                self.core.end_bind(entry, done, self.clock())
                self.settle()
        log.info("bound %s %s pid=%s -> %s", request_id, _who(entry.request.owner), pid, entry.state.value)
        return self.core.grant(entry, self.clock())

    async def _finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Finish a call to the ledger even when the client has hung up: half a call would leave its outcome unknown."""
        return await asyncio.shield(asyncio.ensure_future(work))

    def reservations(self) -> list[Reservation]:
        """Return the windows in which devices are kept: of each the one that is on, else the next."""
        return reservations(self.core.books, self.core.settings.windows, self.wall())

    def asks(self) -> list[AskBack]:
        """Return what is asked back, first due first.

        Raises
        ------
        Unavailable
            What is known may not be so any more. Who acts on this ends servers, and one that was idle may be busy.
        """
        if not self.core.ready or not self.core.connected:
            raise Unavailable(self.core.away_words, code="agent-away" if self.core.ready else "starting")
        now = self.clock()
        return [
            AskBack(
                request_id=ask.slice_id,
                owner=ask.owner,
                kind=ask.kind,
                due_seconds=ask.due - now,
                idle=ask.idle,
                reason=ask.why,
                needs=ask.needs,
            )
            for ask in self.core.asks.values()
        ]

    def availability(self, query: AvailabilityQuery) -> list[Availability]:
        """Return what each shape of a query would meet."""
        return answer(self.core, query, self.clock())

    def hints(self) -> Hints:
        """Return whose move or end would let in somebody who waits; found anew once a second at most, as it looks at all devices."""
        if not self.core.ready:
            raise Unavailable(STARTING, code="starting")
        now = self.clock()
        if self._hints is None or now - self._hints[0] >= HINTS_SECONDS:
            self._hints = now, hints.answer(self.core, now)
        return self._hints[1]


def _asked(request: Request) -> str:
    return f"n={request.device_count} compute={request.compute_milli} memory={request.memory_milli or request.memory_bytes}"


def _who(owner: Owner) -> str:
    """Return an owner for the log: one word, whatever characters its names have."""
    return "/".join(name.encode("unicode_escape").decode().replace(" ", "\\x20") for name in (owner.hub, owner.user, owner.server))
