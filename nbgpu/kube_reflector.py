"""A cache of all objects of one path of the Kubernetes API that follows what changes there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from .errors import NbgpuError, Unavailable
from .kube import Event, Expired, Json, Kube, newer, pause_seconds, version_of

T = TypeVar("T")
Key = tuple[str, str]
"""Namespace (empty for what has none) and name."""
TURN = 50
"""After so many objects of a list others have their turn."""
QUICK_SECONDS = 1.0
"""A watch that ends sooner than this is asked again only after a pause."""

LEFT_OUT: Any = object()
"""What `keep` returns for an object that is nobody's business here: nothing of it is held."""

log = logging.getLogger("nbgpu.kube")


class _Held(Generic[T]):
    """An object as it is kept."""

    __slots__ = ("uid", "value", "version")

    def __init__(self, uid: str, version: str, value: T):
        self.uid, self.version, self.value = uid, version, value


class Reflector(Generic[T]):
    """Lists a path, then watches it; after an interruption goes on where it was, and lists again where that is no longer possible.

    Parameters
    ----------
    path : str
        Of a list (`kube.path`).
    keep : callable
        What to keep of an object: the whole of 20,000 claims would be 150 MB. One for which it raises is left
        out, with a line in the log; so, without one, is one for which it returns `LEFT_OUT`.
    changed : callable, optional
        Called with key, old and new value (None: there was, or is, none) after each change.
    told : callable, optional
        Called when `ready` or `away` has changed.

    Attributes
    ----------
    items : dict
        What is there, by (namespace, name).
    ready : bool
        All of it was listed once; `items` is of some moment since then.
    away : Unavailable or NbgpuError, optional
        Why it cannot follow at the moment; `items` may be old.
    generation : int
        Rises at every change of `items`.
    """

    def __init__(
        self,
        kube: Kube,
        path: str,
        keep: Callable[[Json], T],
        *,
        labels: str = "",
        fields: str = "",
        changed: Callable[[Key, T | None, T | None], None] | None = None,
        told: Callable[[], None] | None = None,
    ):
        self.path = path
        self.items: dict[Key, T] = {}
        self.ready = False
        self.away: NbgpuError | None = None
        self.away_since = 0.0
        self.generation = 0
        self._kube = kube
        self._keep = keep
        self._labels, self._fields = labels, fields
        self._on_change = changed
        self._on_state = told
        self._held: dict[Key, _Held[T]] = {}
        self._gone: set[str] = set()
        self._version = ""
        self._task: asyncio.Task[None] | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to follow, on the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"reflector {self.path}")

    async def stop(self) -> None:
        """Stop to follow; `items` stay as they are."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def wait(self, since: int, timeout_seconds: float) -> bool:
        """Wait until the generation is another than `since`, or `ready` or `away` changes; False when the time is up first."""
        if self.generation != since:
            return True
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_seconds)
            return True
        except (TimeoutError, asyncio.TimeoutError):
            return False
        finally:
            self._waiters.discard(waiter)

    # -- what this process did itself ------------------------------------------------------------------------------------

    def note(self, thing: Json) -> None:
        """Take over an object that a call has just returned, so that `items` has it before the watch does.

        The watch delivers in the order of versions: where it is past this one, it has told of it, and of its end, already.
        """
        if self.ready and newer(version_of(thing), self._version):
            self._put(thing)

    def note_gone(self, key: Key, uid: str) -> None:
        """Take over that an object was deleted; what the watch still says of it, until its end, is not heard."""
        held = self._held.get(key)
        if held is not None and held.uid == uid:
            self._gone.add(uid)
            self._remove(key)

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        tries = 0
        while True:
            begun = time.monotonic()
            try:
                if not self._version:
                    await self._list()
                await self._follow()
                tries = 0 if time.monotonic() - begun > QUICK_SECONDS else tries + 1
            except Expired:
                log.info("%s: that version is gone, listing again", self.path)
                self._version = ""
                tries += 1
            except NbgpuError as error:
                if not isinstance(error, Unavailable):  # not allowed, not served: nothing says that the old version still counts
                    self._version = ""
                self._set_away(error)
                tries += 1
            except Exception as error:  # never the end of a pool or an agent
                log.exception("%s: following failed, starting over", self.path)
                self._version = ""
                self._set_away(Unavailable(f"What Kubernetes says of {self.path} cannot be followed: {error!r}; starting over."))
                tries += 1
            if tries > 1 or self.away is not None:
                await asyncio.sleep(pause_seconds(tries, 5.0 if self.away is None or isinstance(self.away, Unavailable) else 30.0))

    async def _list(self) -> None:
        found: set[Key] = set()
        version = ""
        async with aclosing(self._kube.pages(self.path, labels=self._labels, fields=self._fields)) as pages:
            async for page in pages:
                for number, thing in enumerate(page.items):
                    if number % TURN == 0:
                        await asyncio.sleep(0)
                    found.add(_key(thing))
                    self._put(thing)
                version = page.version
        for key in [key for key in self._held if key not in found]:
            if not newer(self._held[key].version, version):  # else noted while the list was read
                self._remove(key)
        self._gone.clear()
        self._version = version
        self._here()

    async def _follow(self) -> None:
        watch = self._kube.watch(self.path, self._version, labels=self._labels, fields=self._fields, opened=self._here)
        async with aclosing(watch) as events:
            async for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        if event.kind == "deleted":
            key = _key(event.object)
            uid = str(event.object["metadata"].get("uid", ""))
            self._gone.discard(uid)
            if key in self._held and self._held[key].uid == uid:
                self._remove(key)
        elif event.kind != "bookmark":
            self._put(event.object)
        self._version = event.version or self._version

    def _put(self, thing: Json) -> None:
        meta: Json = thing["metadata"]
        uid, version = str(meta.get("uid", "")), version_of(thing)
        key = _key(thing)
        held = self._held.get(key)
        if uid in self._gone or (held is not None and not newer(version, held.version)):
            return
        meta.pop("managedFields", None)
        try:
            value = self._keep(thing)
        except Exception:
            log.exception("%s: %s is left out, it cannot be read", self.path, "/".join(key))
            if held is not None:
                self._remove(key)
            return
        if value is LEFT_OUT:
            if held is not None:
                self._remove(key)
            return
        old = None if held is None else held.value
        self._held[key] = _Held(uid, version, value)
        self.items[key] = value
        self._count(key, old, value)

    def _remove(self, key: Key) -> None:
        held = self._held.pop(key)
        del self.items[key]
        self._count(key, held.value, None)

    def _count(self, key: Key, old: T | None, new: T | None) -> None:
        self.generation += 1
        if self._on_change is not None:
            self._on_change(key, old, new)
        self._wake()

    def _here(self) -> None:
        """The API server answers."""
        if self.away is not None:
            log.info("%s: followed again after %.0f s", self.path, time.monotonic() - self.away_since)
        if self.away is not None or not self.ready:
            self.away, self.ready = None, True
            self._state()

    def _set_away(self, error: NbgpuError) -> None:
        first = self.away is None
        if first or str(self.away) != str(error):
            log.warning("%s: %s", self.path, error.message)
        if first:
            self.away_since = time.monotonic()
        self.away = error
        if first:
            self._state()

    def _state(self) -> None:
        if self._on_state is not None:
            self._on_state()
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def _key(thing: Json) -> Key:
    meta: dict[str, Any] = thing["metadata"]
    return str(meta.get("namespace", "")), str(meta["name"])
