"""Kernels whose GPU memory their user has moved to the host, so that it is free for the server's other notebooks (docs/idle.md).

Their limit, their slice and their turns stay; what they hold counts nothing while it is away (`layout.Ctl.away`). As for slices that are
parked, each step is written in the record before it is made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from nbgpu.errors import NbgpuError
from nbgpu.models import KernelAway
from nbgpu.quantities import format_memory

from .books import Conflict
from .checkpoint import TOO_MANY, USED, Checkpoints, alive
from .happened import title
from .idle import Signature, signature
from .live import LiveSlice
from .marks import mark
from .movers import Movers
from .native import UseRow
from .procs import Process
from .slicedir import AwayKernel, Root

if TYPE_CHECKING:
    from .agent import Agent

log = logging.getLogger("nbgpu.agent")
QUIET_SECONDS = 2.0
"""So long what it has begun on the GPU may take; nothing new begins meanwhile."""
LOOK_SECONDS = 0.02
SEEN_SECONDS = 0.005
"""After so long every process of the slice sees what was written for it."""
TRIES = 5
BETWEEN_SECONDS = 1.0
"""Between two suspensions in a slice: each costs the machine a process, and is asked for by anybody."""
MOST_AWAY = 32
"""Kernels of one slice: four times a second it is looked at each whether it wants its memory and has room."""
RESTARTED = "the agent was started anew"
BUSY = "it computes at this moment: interrupt it, or wait until it is done"


class NoSuchKernel(NbgpuError):
    """The slice has no such kernel with GPU memory."""

    code = "not-found"
    status = 404


class Away:
    """The kernels of all slices that are suspended by their users.

    Parameters
    ----------
    checkpoints : Checkpoints
        What moves their memory.
    """

    def __init__(self, agent: Agent, checkpoints: Checkpoints):
        self._agent = agent
        self._checkpoints = checkpoints
        self._tasks: Movers[tuple[str, str]] = Movers()
        self._not_before: dict[str, float] = {}

    def load(self) -> None:
        """Go on with what an earlier agent has begun."""
        for live in list(self._agent.slices.values()):
            for kernel_id, entry in live.record.kernels_away.items():
                if entry.phase == "parking":
                    self._spawn(live, kernel_id, self._undo(live, kernel_id, RESTARTED))
                elif entry.phase == "restoring":
                    self._spawn(live, kernel_id, self._restore(live, kernel_id))

    async def close(self) -> None:
        """Leave everything as it is: the next agent goes on."""
        await self._tasks.close()

    def _spawn(self, live: LiveSlice, kernel_id: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.start((live.id, kernel_id), work, f"slice={live.id} owner={live.owner} kernel={kernel_id}: suspending failed")

    def _entry(self, live: LiveSlice, kernel_id: str) -> AwayKernel | None:
        return live.record.kernels_away.get(kernel_id) if self._agent.slices.get(live.id) is live else None

    @staticmethod
    def _rows(live: LiveSlice, entry: AwayKernel, rows: list[UseRow] | None = None) -> list[UseRow]:
        return [row for row in (live.tenant.read() if rows is None else rows) if (row.slot, row.owner) in entry.slots]

    # ---- what is seen

    def tick(self, live: LiveSlice) -> None:
        """Once a second: a kernel that has ended is not suspended any more. Its memory on the host is the driver's to free."""
        for kernel_id, entry in live.record.kernels_away.items():
            if not alive(entry):
                log.info("slice=%s owner=%s kernel=%s: ended while it was suspended", live.id, live.owner, kernel_id)
                live.save_away(kernel_id, None)
                self._agent.touch()

    def look(self) -> None:
        """Four times a second: somebody waits for memory that is on the host, or there may be room for it by now."""
        for live in list(self._agent.slices.values()):
            if live.record.kernels_away:
                rows = live.tenant.read()
                for kernel_id, entry in live.record.kernels_away.items():
                    if entry.wanted_since is None and any(row.wants_back for row in self._rows(live, entry, rows)):
                        self.want(live, kernel_id)
                self._bring_back_wanted(live)

    def hear(self, live: LiveSlice, kernels: Mapping[str, bool]) -> None:
        """Take what the Jupyter server says of its kernels: one that runs a cell needs its memory."""
        for kernel_id in list(live.record.kernels_away):
            if kernels.get(kernel_id):
                self.want(live, kernel_id)

    def want(self, live: LiveSlice, kernel_id: str) -> None:
        """A suspended kernel is used: its memory comes back as soon as its slice has room."""
        entry = self._entry(live, kernel_id)
        if entry is not None and entry.wanted_since is None and entry.phase != "restoring":
            live.save_away(kernel_id, entry.model_copy(update={"wanted_since": time.time()}))
            self._agent.touch()

    def _bring_back_wanted(self, live: LiveSlice) -> None:
        waiting = [(entry.wanted_since, kernel_id) for kernel_id, entry in live.record.kernels_away.items() if entry.phase == "parked"]
        for _, kernel_id in sorted((since, kernel_id) for since, kernel_id in waiting if since is not None):
            entry = self._entry(live, kernel_id)
            if entry is None or (live.id, kernel_id) in self._tasks:
                continue
            why = self._no_room(live, kernel_id, entry)
            if why is None:
                self._spawn(live, kernel_id, self._try_again(live, kernel_id))
            elif not entry.told:
                self._tell_no_room(live, kernel_id, entry, why)

    async def _try_again(self, live: LiveSlice, kernel_id: str) -> None:
        await self._come_back(live, kernel_id)

    def _tell_no_room(self, live: LiveSlice, kernel_id: str, entry: AwayKernel, why: str) -> None:
        live.save_away(kernel_id, entry.model_copy(update={"told": True}))
        message = f"{title(kernel_id)} waits for its memory: it {why}."
        self._agent.events.add("wanting-memory", "warning", message, live.id, kernel_id, live.owner)

    # ---- there

    def _why_not(self, live: LiveSlice, rows: list[UseRow], kernel_id: str) -> str | None:
        """Return why a kernel cannot be suspended now; None when it can."""
        if live.record.parked is not None:
            return "its server's GPU is lent to others while idle"
        if live.state != "running":
            return f"its server is {live.state}"
        own = [row for row in rows if row.kernel_id == kernel_id]
        if not any(row.used + row.context for row in own):
            raise NoSuchKernel(f"{title(kernel_id)} holds no GPU memory here.")
        processes = {live.tenant.states[row.slot].process for row in own}
        if live.tenant.junk is not None or None in processes:
            return "not all of its processes are known"
        if any(Process(one.pid, one.start_time) in processes for one in live.record.suspended):
            return "the watchdog has stopped a process of it"
        # Its slots may say so by now. To undo the second one would bring back what the first one has there.
        if any(Process(root.pid, root.start_time) in processes for one in live.record.kernels_away.values() for root in one.processes):
            return "a process of it is in host memory already, with another kernel"
        if any(live.tenant.states[row.slot].process in processes for row in rows if row.kernel_id != kernel_id):
            return "a process of it says that it is of another kernel too"
        if any(row.busy_since or row.want for row in own) or self._agent.parking.busy(live, kernel_id):
            return BUSY
        return None

    def _too_much(self, live: LiveSlice, needed_bytes: int) -> str | None:
        """Return why so much of a slice may not be moved to the host's memory: nobody has more there than on the GPU."""
        if len(live.record.kernels_away) >= MOST_AWAY:
            return f"{MOST_AWAY} notebooks of this server are in host memory already"
        most = sum(part.memory_bytes for part in live.slice.devices)
        there = sum(entry.memory_bytes for entry in live.record.kernels_away.values())
        if there + needed_bytes > most:
            held = f"it holds {format_memory(needed_bytes)}, and {format_memory(there)} of this server are in host memory already"
            return f"{held}: it may have as much there as its slice has, {format_memory(most)}"
        return self._checkpoints.host_refusal(needed_bytes)

    async def suspend(self, live: LiveSlice, kernel_id: str) -> None:
        """Begin to move a kernel's GPU memory to the host; `model` tells how far it is. One that is there, or on the way, stays so.

        Raises
        ------
        NbgpuError
            It cannot be moved (Conflict), or holds none (NoSuchKernel), and why.
        """
        if not live.may_suspend:
            why = "its server is a pod" if live.record.claim is not None else "its agent was started without --idle-host-memory"
            raise NbgpuError(f"Kernels are not suspended on this node: {why}.", code="not-offered", status=404)
        if self._is_there(live, kernel_id):
            return
        rows = live.tenant.read()
        why = self._why_not(live, rows, kernel_id)
        own = [row for row in rows if row.kernel_id == kernel_id]
        found = {process for row in own if (process := live.tenant.states[row.slot].process) is not None}
        told = live.memory_by_device(kernel_id)
        if why is None:
            why = self._not_now(live)
        if why is None:  # from here on the driver is asked, by the one thread that the watchdog's looks go through
            self._not_before = {name: at for name, at in self._not_before.items() if name in self._agent.slices}
            self._not_before[live.id] = time.monotonic() + BETWEEN_SECONDS
        held = await self._checkpoints.held(live.slice.devices, [one.pid for one in found], told) if why is None else ()
        if self._agent.slices.get(live.id) is not live:
            why = "its server has ended"
        elif why is None and not self._is_there(live, kernel_id):
            why = self._why_not(live, live.tenant.read(), kernel_id) or self._too_much(live, sum(held))
        if why is None:
            why = self._under_way(live)
        if why is not None:
            raise Conflict(f"{title(kernel_id)} is not suspended: {why}.", field="kernel_id")
        if self._is_there(live, kernel_id):
            return
        entry = AwayKernel(
            phase="parking",
            processes=tuple(Root(pid=one.pid, start_time=one.start_time) for one in found),
            slots=tuple((row.slot, row.owner) for row in own),
            device_bytes=held,
            since=time.time(),
        )
        live.save_away(kernel_id, entry)
        mark("kernel.parking-saved")
        self._agent.touch()
        self._spawn(live, kernel_id, self._suspend(live, kernel_id, entry))

    def _under_way(self, live: LiveSlice) -> str | None:
        moving = any(key[0] == live.id for key in self._tasks)
        return "another notebook of this server is on its way to or from the host: try again in a moment" if moving else None

    def _not_now(self, live: LiveSlice) -> str | None:
        """Return why nothing of a slice may be suspended at this moment, whatever it is."""
        soon = time.monotonic() < self._not_before.get(live.id, 0.0)
        return self._under_way(live) or ("it was asked for within the last second already: try again in a moment" if soon else None)

    def _is_there(self, live: LiveSlice, kernel_id: str) -> bool:
        """Return whether a kernel is suspended, or will be; Conflict for one that comes back at this moment."""
        entry = live.record.kernels_away.get(kernel_id)
        if entry is not None and (entry.phase == "restoring" or kernel_id in live.coming_back):
            raise Conflict(f"{title(kernel_id)} comes back at this moment.", field="kernel_id")
        return entry is not None

    async def _suspend(self, live: LiveSlice, kernel_id: str, entry: AwayKernel) -> None:
        why = await self._put_away(live, kernel_id, entry)
        pids = [root.pid for root in alive(entry)]
        if why is None and any(await self._checkpoints.held(live.slice.devices, pids)):
            why = "a process of it holds GPU memory that could not be moved"
        now = self._entry(live, kernel_id)
        if now is None:
            return
        if why is not None or now.wanted_since is not None:
            await self._undo(live, kernel_id, why or USED)
            return
        mark("kernel.checkpointed")
        # First the record: what counts no more is on the host, whoever reads it next.
        live.save_away(kernel_id, now.model_copy(update={"phase": "parked"}), written=lambda: mark("kernel.parked-saved"))
        held = format_memory(entry.memory_bytes)
        message = f"{title(kernel_id)} is in host memory: its {held} of GPU memory are free here. Use it to bring them back."
        self._agent.events.add("suspended-by-user", "info", message, live.id, kernel_id, live.owner, memory_bytes=entry.memory_bytes)
        self._agent.touch()

    async def _put_away(self, live: LiveSlice, kernel_id: str, entry: AwayKernel) -> str | None:
        """Wait until nothing of it runs, lock and checkpoint it; return why that could not be.

        It is told first that it is on its way (`away`), and looked at second: what it begins after that it has not begun.
        """
        until = time.monotonic() + QUIET_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
        rows = self._rows(live, entry)
        while any(row.busy_since for row in rows):
            if time.monotonic() > until:
                return BUSY
            await asyncio.sleep(LOOK_SECONDS)
            rows = self._rows(live, entry)
        before = _seen(rows)

        async def go() -> bool:  # with all of its processes locked
            now, rows = self._entry(live, kernel_id), self._rows(live, entry)
            quiet = not any(row.busy_since or row.want or row.wants_back for row in rows)
            return now is not None and now.wanted_since is None and quiet and _seen(rows) == before

        return await self._checkpoints.put_away(live.user, entry, live.slice.devices, go)

    async def _undo(self, live: LiveSlice, kernel_id: str, why: str) -> None:
        """Leave a kernel as it was: its memory has counted all the time."""
        log.info("not suspended slice=%s owner=%s kernel=%s: %s", live.id, live.owner, kernel_id, why)
        if why == TOO_MANY:  # nothing was locked: no helper process is needed
            live.save_away(kernel_id, None)
            self._agent.touch()
        if (why == TOO_MANY or await self._wake(live, kernel_id)) and why != RESTARTED:
            message = f"{title(kernel_id)} keeps its GPU memory: {why}."
            self._agent.events.add("not-suspended", "warning", message, live.id, kernel_id, live.owner)

    # ---- and back

    async def resume(self, live: LiveSlice, kernel_id: str) -> None:
        """Begin to bring a kernel's memory back, in the room that its slice has; one that comes back already goes on doing so.

        Raises
        ------
        NbgpuError
            It is not suspended, or there is no room: how much it needs, and how much there is.
        """
        entry = self._entry(live, kernel_id)
        if entry is None:
            raise NoSuchKernel(f"{title(kernel_id)} is not suspended.")
        if entry.phase == "parking":
            self.want(live, kernel_id)
        elif entry.phase == "parked":
            why = await self._come_back(live, kernel_id)
            if why is not None:
                raise Conflict(f"{title(kernel_id)} {why}.", field="kernel_id")

    async def _come_back(self, live: LiveSlice, kernel_id: str) -> str | None:
        """Begin to bring back what there is room for; else return how much it needs.

        What it holds is counted first, for every process of the slice, and only then looked at beside what they hold: who takes memory
        meanwhile sees it and takes less, or is seen here.
        """
        async with live.one_comes_back:
            entry = self._entry(live, kernel_id)
            if entry is None or entry.phase != "parked":
                return None
            why = self._no_room(live, kernel_id, entry)
            if why is not None:
                return why
            live.coming_back.add(kernel_id)
            try:
                live.write_away()
                mark("kernel.counted")
                for _ in range(TRIES):  # what others are about to be refused is seen for a moment too
                    await asyncio.sleep(SEEN_SECONDS)
                    entry = self._entry(live, kernel_id)
                    if entry is None:
                        return None
                    why = self._no_room(live, kernel_id, entry)
                    if why is None:
                        live.save_away(kernel_id, entry.model_copy(update={"phase": "restoring"}))
                        break
            finally:
                live.coming_back.discard(kernel_id)
                if self._agent.slices.get(live.id) is live:
                    live.write_away()
        if why is None:
            mark("kernel.restoring-saved")
            self._agent.touch()
            self._spawn(live, kernel_id, self._restore(live, kernel_id))
        return why

    @staticmethod
    def _no_room(live: LiveSlice, kernel_id: str, entry: AwayKernel) -> str | None:
        """Return what a slice lacks for a kernel to come back, as a process that allocates would find; None when it lacks nothing."""
        limit = live.kernel_limits.get(kernel_id)
        rows = live.tenant.read()
        for index, part in enumerate(live.limits.devices):
            own = others = of_kernel = 0
            for row in rows:
                size = live.counted_bytes(row) if row.device == index else 0
                if (row.slot, row.owner) in entry.slots:
                    own += size
                elif not live.on_host(row):
                    others += size
                    of_kernel += size if row.kernel_id == kernel_id else 0
            # Anybody in the server may write its slots: what the driver saw go comes back, up to the overhead that nobody tells of.
            own = max(own, entry.device_bytes[index] - live.ctl.words.device[index].overhead_cap)
            if own > 0 and own + others > part.memory_bytes:
                free = format_memory(max(0, part.memory_bytes - others))
                return f"needs {format_memory(own)}, and {free} of this server are free: free some or suspend another notebook"
            most = limit.memory_bytes if limit is not None else None
            if own > 0 and most is not None and own + of_kernel > most:
                return f"needs {format_memory(own)}, and its own limit is {format_memory(most)}: raise it"
        return None

    async def _restore(self, live: LiveSlice, kernel_id: str) -> None:
        began, entry = time.monotonic(), self._entry(live, kernel_id)
        if entry is not None and await self._wake(live, kernel_id):
            seconds = max(1, round(time.monotonic() - began))
            message = f"{title(kernel_id)} has its {format_memory(entry.memory_bytes)} of GPU memory back, as it was, after {seconds} s."
            self._agent.events.add("restored-memory", "info", message, live.id, kernel_id, live.owner, seconds=seconds)

    async def _wake(self, live: LiveSlice, kernel_id: str) -> bool:
        """Have all processes of a kernel run again; False when it or its slice has ended meanwhile, or lost its memory."""
        whose = f"slice={live.id} owner={live.owner} kernel={kernel_id}"
        lost = await self._checkpoints.bring_back(live.user, whose, live.slice.devices, lambda: self._entry(live, kernel_id))
        if lost is None:
            return False
        mark("kernel.restored")
        live.save_away(kernel_id, None)
        self._agent.touch()
        for pid in lost:
            message = f"Process {pid} has lost its GPU memory: the driver could not restore it. Restart its kernel."
            self._agent.events.add("lost", "error", message, live.id, kernel_id, live.owner, pid=pid)
        return not lost

    # ---- answers

    def model(self, live: LiveSlice, kernel_id: str) -> KernelAway | None:
        """Return what the API says of a kernel; None of one that is not suspended."""
        entry = live.record.kernels_away.get(kernel_id)
        return None if entry is None else entry.as_model(time.time())


def _seen(rows: list[UseRow]) -> tuple[Signature, list[int]]:
    return signature(rows), [row.used + row.context for row in rows]
