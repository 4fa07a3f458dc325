"""One sampler per server: however many tabs ask, the agent is asked once a second."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nbgpu.errors import NbgpuError, Unavailable

from .client import SliceClient
from .kernels import STARTED, UNKNOWN, in_a_sentence
from .limits import NO_LIMIT, ORIGINS, Source
from .notices import Notices

Json = dict[str, Any]
NO_SLICE: Json = {"slice_id": None}
EVERY_SECONDS = 1.0
"""How often the agent is asked the same, however many pages ask here."""
EARLY_SECONDS = 0.1
"""A question may come so much too early: else a single page, whose seconds are not quite this server's, would now and then see its last
answer once more. Those that do make the next one later: on average it stays at `EVERY_SECONDS`."""
MOST_ANSWERS = 8
MOST_NAMES = 1000
EVENTS_PAUSE_SECONDS = 0.5
"""Before the next question for events where one brought none at once: an agent answers when there is news; another is asked so often."""
_LAST_TIME = 8.64e12
"""The last that a page's ``Date`` knows."""
_JUNK = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""What comes of an answer that is none of an agent's."""


class Sampler:
    """The slice's usage with notebook names, kept for a moment; and the agent's events as they come.

    Parameters
    ----------
    client : SliceClient
        The slice's API.
    sessions : callable
        Returns the server's kernels: ``{kernel_id: {"name", "path", "type", "state", ...}}``.
    notices : Notices
        Where the agent's events go.
    every_seconds : float
        How often the agent is asked the same; an answer is at most that old.
    tell_names : callable, optional
        Called with the slice's id and the server's kernels whenever those have changed (`nbgpu.kernel_names`).
    ends : callable, optional
        Returns whether the server is about to end, and its kernels with it: nobody needs to hear that of each.
    """

    def __init__(
        self,
        client: SliceClient,
        sessions: Callable[[], Awaitable[dict[str, Json]]],
        notices: Notices,
        *,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        tell_names: Callable[[str, dict[str, Json]], object] | None = None,
        ends: Callable[[], bool] = lambda: False,
    ):
        self.client = client
        self.notices = notices
        self.agent: Json = {"ok": True, "since": time.time()}
        self._ask_sessions = sessions
        self._every_seconds = every_seconds
        self._clock = clock
        self._tell_names = tell_names
        self._ends = ends
        self._told: dict[str, Json] | None = None
        self._names: dict[str, Json] = {}
        """What kernels were called when last seen: an event may come when its kernel has gone."""
        self._usage: Json = NO_SLICE
        self._kept: dict[str, Any] = {}
        self._due: dict[str, float] = {}
        """When each question may be asked again, by `clock`."""
        self._pending: dict[str, asyncio.Task[Any]] = {}

    async def usage(self) -> Json:
        """Return the slice's ``Usage``, its kernels with notebook names, and how the agent is.

        While the agent is away these are its last values, with ``agent: {"ok": false, "since": unix time}``.
        """
        return await self._shared("usage", self._sample)

    async def history(self, seconds: int) -> Json:
        """Return what the agent remembers of the last `seconds`. Raises `Unavailable` while it is away."""
        return await self._shared(f"history {seconds}", lambda: self.client.get(f"/v1/history?seconds={seconds}"))

    def forget(self) -> None:
        """Something has changed: whoever asks next is answered anew."""
        self._kept.clear()
        self._due.clear()

    async def set_limit(self, kernel_id: str, limit: Json, source: Source = "panel", asked: Json | None = None) -> Json:
        """Ask the agent to limit a kernel; the next usage shows it, as it was asked for and where it comes from.

        Raises what the agent says.
        """
        answer = await self.client.put(f"/v1/kernels/{kernel_id}", limit)
        ORIGINS.remember(kernel_id, answer, source, asked)
        self.forget()
        return answer

    async def move(self, kernel_id: str, where: str) -> Json | None:
        """Ask the agent to ``suspend`` or ``resume`` a kernel; the next usage shows it. Raises what the agent says."""
        try:
            return await self.client.post(f"/v1/kernels/{kernel_id}/{where}", {})
        except NbgpuError as error:
            name = self._names.get(kernel_id, {}).get("name")
            message = with_name(error.message, kernel_id, name)
            raise NbgpuError(message, code=error.code, status=error.status, field=error.field) from None
        finally:
            self.forget()

    async def resume(self, pid: int) -> Json:
        """Ask the agent to let a suspended process go on; the next usage shows it. Raises what the agent says."""
        answer = await self.client.post("/v1/resume", {"pid": pid})
        self.forget()
        return answer

    async def _shared(self, key: str, ask: Callable[[], Awaitable[Json]]) -> Json:
        """Return a recent answer, or join the question that is on its way, or ask."""
        now = self._clock()
        if key in self._kept and now < self._due[key] - EARLY_SECONDS:
            return self._kept[key]
        task = self._pending.get(key)
        if task is None:
            self._due[key] = max(self._due.get(key, now) + self._every_seconds, now + self._every_seconds - EARLY_SECONDS)
            task = self._pending[key] = asyncio.ensure_future(self._ask(key, ask))
        return await asyncio.shield(task)

    async def _ask(self, key: str, ask: Callable[[], Awaitable[Json]]) -> Json:
        try:
            answer = await ask()
            if len(self._kept) > MOST_ANSWERS:
                self.forget()
            if key in self._due:  # else something has changed since it was asked
                self._kept[key] = answer
            return answer
        finally:
            del self._pending[key]

    async def _sample(self) -> Json:
        try:
            usage = await self.client.get("/v1/usage")
            if not isinstance(usage, dict) or "kernels" not in usage or not usage.get("devices"):
                raise Unavailable("The GPU's node agent sent no usage.")
            sessions = await self._sessions()
            self._tell(str(usage.get("slice_id")), sessions)
            idle = sessions.keys() - {kernel["kernel_id"] for kernel in usage["kernels"]}
            limits = await self.client.get("/v1/kernels") if idle else {}
            self._usage = {**usage, "kernels": join(usage["kernels"], sessions, limits)}
            self._heard(True)
        except (NbgpuError, *_JUNK):
            self._heard(False)
        return {**self._usage, "agent": self.agent}

    async def _sessions(self) -> dict[str, Json]:
        """Return the server's kernels, and keep in mind what they are called."""
        sessions = await self._ask_sessions()
        for kernel_id, one in sessions.items():
            self._names.pop(kernel_id, None)
            self._names[kernel_id] = {"name": one.get("name"), "path": one.get("path")}
        while len(self._names) > MOST_NAMES:
            del self._names[next(iter(self._names))]
        return sessions

    def _tell(self, slice_id: str, sessions: dict[str, Json]) -> None:
        names = {kernel_id: {"name": one.get("name"), "path": one.get("path")} for kernel_id, one in sessions.items()}
        if self._tell_names is not None and names != self._told:
            self._told = names
            self._tell_names(slice_id, names)

    def _heard(self, ok: bool) -> None:
        if self.agent["ok"] != ok:
            self.agent = {"ok": ok, "since": time.time()}

    async def follow_events(self) -> None:
        """Pass on the agent's events as they happen, for ever; an agent that is away is asked again every second."""
        after = 0
        seen: deque[tuple[int, float]] = deque(maxlen=1000)
        while True:
            try:
                asked, fresh = self._clock(), False
                events = await self.client.get(f"/v1/events?after={after}&wait_seconds=25", wait_seconds=25)
                for event in events:
                    with suppress(*_JUNK):  # those behind it are told
                        mark = _mark(event)
                        after = max(after, mark[0])
                        if mark not in seen:
                            seen.append(mark)
                            if self._goes_without_saying(event):
                                continue
                            self.notices.add(await self._named(event))
                            fresh = True
                if not fresh and self._clock() - asked < EVENTS_PAUSE_SECONDS:
                    await asyncio.sleep(EVENTS_PAUSE_SECONDS)
            except NbgpuError:
                # the agent that comes back may be a new one that counts from one again
                after = 0
                await asyncio.sleep(1)
            except _JUNK:
                await asyncio.sleep(1)

    def _goes_without_saying(self, event: Json) -> bool:
        """Return whether an event is of what the end of a kernel, or of the server with all of them, brings anyway."""
        if event["kind"] == "kernel-ended":
            return self._ends()
        return event["kind"] == "limit-changed" and ORIGINS.has_ended(event.get("kernel_id"))

    async def _named(self, event: Json) -> Json:
        """Return an agent's event with the notebook's name where the agent, who knows ids only, says "Notebook kernel 1a2b3c4d…"."""
        kernel_id = event.get("kernel_id")
        if not kernel_id:
            return event
        await self._sessions()
        known = self._names.get(kernel_id, {})
        if known.get("path") is None:
            known = STARTED.get(kernel_id, known)
        name, message = known.get("name"), event["message"]
        return {**event, "message": with_name(message, kernel_id, name), "name": name, "path": known.get("path")}


def with_name(message: str, kernel_id: str, name: str | None) -> str:
    """Return an agent's message with the notebook's name where the agent, who knows ids only, says "Notebook kernel 1a2b3c4d…"."""
    return message.replace(f"Notebook kernel {kernel_id[:8]}…", in_a_sentence(name)) if name else message


def _mark(event: Json) -> tuple[int, float]:
    """Return what tells an agent's event from others, also of an agent before. Raises ValueError for a time that no page can show."""
    when = float(event["time"])
    if not 0 <= when <= _LAST_TIME:
        raise ValueError("no such time")
    return int(event["id"]), when


def join(kernels: list[Json], sessions: dict[str, Json], limits: dict[str, Json]) -> list[Json]:
    """Return the agent's kernels with their notebooks, then the server's kernels that the agent has not seen on a GPU.

    Notebook kernels come by path, everything else in the slice (``kernel_id`` None) comes last.
    """
    joined = [{**kernel, **sessions.get(kernel["kernel_id"], UNKNOWN)} for kernel in kernels]
    seen = {kernel["kernel_id"] for kernel in kernels}
    for kernel_id, session in sessions.items():
        if kernel_id not in seen:
            idle: Json = {"kernel_id": kernel_id, "pids": [], "limit": limits.get(kernel_id, NO_LIMIT), "devices": []}
            joined.append({**idle, "refusals": 0, "launches": 0, "idle_seconds": None, **UNKNOWN, **session})
    for kernel in joined:
        as_set = kernel.pop("limit_set", None) or kernel["limit"]  # another one where the slice has another size since
        kernel["limit_part_milli"] = ORIGINS.part_milli(kernel["kernel_id"], as_set)
        kernel["limit_source"] = ORIGINS.source(kernel["kernel_id"], as_set)
    return sorted(joined, key=lambda kernel: (kernel["kernel_id"] is None, kernel["path"] or "~", kernel["kernel_id"] or ""))
