"""What is done about offences, by the installation's policy: processes are suspended, killed, and let go on.

Only the process itself is ever touched, by a descriptor that cannot come to mean another, and only while it belongs to the slice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nbgpu.errors import NbgpuError
from nbgpu.models import EventKind, KernelId

from . import procs
from .agent import Agent, short
from .live import LiveSlice
from .marks import mark
from .offenders import Offence, Sure
from .procs import Process
from .slicedir import Suspended
from .watchdog import OVER_LIMIT_TOLERANCE_BYTES, deed

log = logging.getLogger("nbgpu.agent")
ACTIONS_MOST = 16
"""On one slice at one look; the others' turn comes at the next."""
SHARE_SEEN_SECONDS = 8.0
"""So long after a process was locked NVML may still tell of what it had done before."""
WENT_ON_MOST = 5
"""Who was stopped so often and goes on is ended: a debugger of its user's, that keeps the signal from it, can do so without end."""
GONE_SECONDS = 10.0
"""So long must be over what a process was suspended for, before it goes on."""
REPEATS = 3
REPEATS_SECONDS = 60.0
END_PASSES = 50
END_PAUSE_SECONDS = 0.02
_KERNEL_ID: TypeAdapter[str] = TypeAdapter(KernelId)


def reason(one: Offence) -> str:
    """Return what a process did, for people."""
    return f"it {deed(one.kind, 'the GPU', one.memory_bytes, one.allowed_bytes, one.compute_milli, by_server=False)}"


DONE = {"lock": "suspended", "stop": "stopped"}


def action_message(process: Process, kernel_id: str, done: str, why: str) -> str:
    """Return what was done to a process, why, and what its user can do."""
    who = f"Process {process.pid}" + (f" (Notebook kernel {short(kernel_id)})" if kernel_id else "")
    what = {"suspended": "Its GPU calls wait. Restart it, or ask your administrator.", "stopped": "Restart it, or ask your administrator."}
    return f"{who} was {done}: {why}. {what.get(done, 'Restart its kernel or program.')}"


class Responses:
    """Acts on what is sure.

    Parameters
    ----------
    slice_of : callable
        Returns the slice that a process belongs to at this moment; None for one of no slice.
    """

    def __init__(self, agent: Agent, slice_of: Callable[[Process], str | None]):
        self._agent = agent
        self._policy = agent.settings.policy
        self._slice_of = slice_of
        self._sure = Sure()
        self._acted: dict[str, deque[float]] = {}
        self._gone_since: dict[Process, float] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._busy: dict[Process, asyncio.Task[None]] = {}
        """Who is being suspended, looked at or let go on: the driver may take its time."""

    @property
    def needed(self) -> bool:
        """Whether offences are to be looked for at all."""
        return self._policy.acts or any(live.record.suspended for live in self._agent.slices.values())

    def waits(self) -> bool:
        """Return whether looks ahead of their time would make something sure."""
        return self._policy.acts and self._sure.waits()

    def look(self, offences: Sequence[Offence], each_second: bool) -> None:
        """Act on the offences of one look; `each_second` is False for a look between."""
        now = time.monotonic()
        wanted = [one for one in offences if self._policy.action(one.kind) != "event"]
        left: dict[str, int] = {}
        touched: set[Process] = set()
        for one in self._sure.pass_sure(wanted, now, each_second):
            live = self._agent.slices.get(one.slice_id)
            if live is None or one.process in touched or left.setdefault(live.id, ACTIONS_MOST) <= 0:
                continue
            if self._may_be_touched(live, one.process):
                left[live.id] -= self._act(live, one, now)
                touched.add(one.process)
        if each_second:
            self._look_after_suspended(offences, now)
            self._acted = {name: times for name, times in self._acted.items() if name in self._agent.slices}

    def _may_be_touched(self, live: LiveSlice, process: Process) -> bool:
        """Return whether a process is still this slice's own, runs, and was not excused."""
        if process.pid in (1, os.getpid()) or not process.alive() or procs.exiting(process.pid):
            return False
        owner = self._slice_of(process)
        # Without a cgroup one that has left its ancestors is still the slice's: it was seen there.
        if owner != live.id and not (owner is None and live.record.cgroup is None and live.record.claim is None):
            return False
        if process in self._busy:
            return False
        return not any(
            _same(one, process) and (one.excused or one.how == "lock" or procs.stopped(process.pid)) for one in live.record.suspended
        )

    # ---- actions

    def _act(self, live: LiveSlice, one: Offence, now: float) -> bool:
        """Do what the policy says; return whether anything was done."""
        if self._policy.action(one.kind) == "suspend":
            done = self._suspend(live, one)
        else:
            done = self._kill(live, one.process, one.kind, reason(one), one.memory_bytes)
        if done and self._policy.escalate:
            times = self._acted.setdefault(live.id, deque(maxlen=REPEATS))
            times.append(now)
            if len(times) == REPEATS and now - times[0] <= REPEATS_SECONDS and live.id not in self._ending:
                self._end_all(live)
        return done

    def _kill(self, live: LiveSlice, process: Process, kind: str, why: str, memory_bytes: int = 0) -> bool:
        kernel = self._kernel(live, process)
        if not procs.send(process, signal.SIGKILL):
            return self._failed(live, process, kind)
        self._agent.count_action(kind, "kill")
        self._tell("killed", live, process, kernel, "ended", why, kind, memory_bytes)
        return True

    def _suspend(self, live: LiveSlice, one: Offence) -> bool:
        """Suspend a process; one that was and goes on, by its user's doing, is stopped."""
        process = one.process
        known = next((entry for entry in live.record.suspended if _same(entry, process)), None)
        if known is None:  # written first: one that is suspended is never forgotten
            entry = Suspended(
                pid=process.pid, start_time=process.start_time, kind=one.kind, since=time.time(),
                kernel_id=self._kernel(live, process), reason=reason(one), memory_bytes=one.memory_bytes,
            )  # fmt: skip
            live.save(suspended=(*live.record.suspended, entry))
            mark("suspend-noted")
            self._begin(process, self._suspend_now(live, entry, process))
            return True
        return self._stop(live, known, process)

    async def _suspend_now(self, live: LiveSlice, entry: Suspended, process: Process) -> None:
        how = await self._agent.suspender.suspend(process)
        mark("suspend-held")
        if self._agent.slices.get(live.id) is not live:
            return
        if how is None:
            self._forget(live, process)
            self._failed(live, process, entry.kind)
        else:
            self._suspended(live, entry.model_copy(update={"how": how}), process)

    def _stop(self, live: LiveSlice, entry: Suspended, process: Process) -> bool:
        """Stop all of a process that is suspended and goes on; end it when that does not help."""
        if entry.how == "stop":
            entry = entry.model_copy(update={"went_on": entry.went_on + 1})
            if entry.went_on >= WENT_ON_MOST:
                why = f"it went on each of the {WENT_ON_MOST} times that it was stopped"
                return self._kill(live, process, entry.kind, why, entry.memory_bytes)
        if not self._agent.suspender.stop(process):
            self._forget(live, process)
            return self._failed(live, process, entry.kind)
        self._suspended(live, entry.model_copy(update={"how": "stop"}), process)
        return True

    def _suspended(self, live: LiveSlice, entry: Suspended, process: Process) -> None:
        live.save(suspended=tuple(entry if _same(one, process) else one for one in live.record.suspended))
        self._agent.count_action(entry.kind, "suspend")
        done = DONE[entry.how]
        self._tell("suspended", live, process, entry.kernel_id, done, entry.reason, entry.kind, entry.memory_bytes)
        self._agent.touch()

    def _forget(self, live: LiveSlice, process: Process) -> None:
        live.save(suspended=tuple(one for one in live.record.suspended if not _same(one, process)))

    def _begin(self, process: Process, work: Coroutine[Any, Any, None]) -> None:
        """Do what the driver is asked for about a process, one thing at a time."""
        task = self._busy[process] = asyncio.create_task(work)
        task.add_done_callback(lambda done: self._end(process, done))

    def _end(self, process: Process, done: asyncio.Task[None]) -> None:
        self._busy.pop(process, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("Process %d could not be looked after: %s", process.pid, error)

    def _failed(self, live: LiveSlice, process: Process, kind: str) -> bool:
        if process.alive():
            self._agent.count_action(kind, "failed")
            who = f"Process {process.pid} is to be stopped or ended by the agent's policy"
            message = f"{who}, and the agent, which runs as user {os.geteuid()}, may not. Run it as root."
            self._agent.events.add("not-permitted", "error", message, live.id, None, live.owner, pid=process.pid, for_kind=kind)
        return False

    def _tell(
        self, what: EventKind, live: LiveSlice, process: Process, kernel: str, done: str, why: str, kind: str, memory_bytes: int
    ) -> None:
        self._agent.events.add(
            what,
            "warning" if what == "suspended" else "error",
            action_message(process, kernel, done, why),
            live.id,
            kernel or None,
            live.owner,
            pid=process.pid,
            for_kind=kind,
            memory_bytes=memory_bytes,
        )

    @staticmethod
    def _kernel(live: LiveSlice, process: Process) -> str:
        """Return the notebook kernel that a process says it is of: by its slot, else by its environment; "" for none."""
        held = [row.kernel_id for row in live.tenant.read() if live.tenant.states[row.slot].process == process and row.kernel_id]
        with contextlib.suppress(ValidationError):
            return _KERNEL_ID.validate_python((held or [procs.environment(process.pid, "NBGPU_KERNEL_ID")])[0])
        return ""

    def _end_all(self, live: LiveSlice) -> None:
        """Kill all processes of a slice that offends again and again, however fast it makes new ones."""
        self._agent.count_action("repeated", "kill-slice")
        message = f"All programs of this server were ended: {REPEATS} of them got past nbgpu's limits within a minute. Start it anew."
        self._agent.events.add("killed", "error", message, live.id, None, live.owner)

        async def end() -> None:
            for _ in range(END_PASSES):
                pids = live.members() - {1, os.getpid()} if self._agent.slices.get(live.id) is live else set[int]()
                for process in filter(None, map(procs.find, pids)):
                    if self._slice_of(process) == live.id:
                        procs.send(process, signal.SIGKILL)
                if not pids:
                    break
                await asyncio.sleep(END_PAUSE_SECONDS)
            self._ending.pop(live.id, None)

        self._ending[live.id] = asyncio.create_task(end())

    # ---- the suspended

    def _look_after_suspended(self, offences: Sequence[Offence], now: float) -> None:
        offending = {one.process: one for one in offences}
        watched: set[Process] = set()
        for live in list(self._agent.slices.values()):
            for entry in live.record.suspended:
                process = Process(entry.pid, entry.start_time)
                if not process.alive():
                    self._forget(live, process)
                    continue
                watched.add(process)
                if entry.how == "stop" and not entry.excused and procs.told_to_end(process.pid):
                    # as when its kernel is restarted: it would end, and cannot while it stands still
                    log.info("slice=%s owner=%s: process %d, stopped by the watchdog, was told to end", live.id, live.owner, process.pid)
                    procs.send(process, signal.SIGKILL)
                    continue
                if not entry.excused and process not in self._busy:
                    self._look_after(live, entry, process, offending.get(process), now)
        self._gone_since = {process: since for process, since in self._gone_since.items() if process in watched}

    def _look_after(self, live: LiveSlice, entry: Suspended, process: Process, offence: Offence | None, now: float) -> None:
        grace = self._policy.grace_seconds
        if offence is not None:
            self._gone_since.pop(process, None)
            if grace is not None and time.time() - entry.since >= grace:
                self._kill(live, process, entry.kind, f"it was suspended {grace:.0f} s ago and nothing has changed since")
            elif entry.how == "lock":
                self._begin(process, self._look_at_lock(live, entry, process, offence))
            elif not procs.stopped(process.pid):  # its own user may let it go on
                self._agent.suspender.stop(process)
        elif self._policy.resume and now - self._gone_since.setdefault(process, now) >= GONE_SECONDS:
            self._begin(process, self._resume(live, process))

    async def _look_at_lock(self, live: LiveSlice, entry: Suspended, process: Process, offence: Offence) -> None:
        """Stop a process that the lock does not hold: who speaks to the driver by itself, or has let itself go on."""
        held = await self._agent.suspender.holds(process)
        known = any(_same(one, process) and not one.excused for one in live.record.suspended)
        if known and self._agent.slices.get(live.id) is live and not (held and kept(entry, offence, time.time())):
            self._stop(live, entry, process)

    async def _resume(self, live: LiveSlice, process: Process) -> None:
        with contextlib.suppress(NbgpuError):  # it has ended, or somebody was faster
            await self._agent.resume(live.id, process.pid)


def kept(entry: Suspended, offence: Offence, now: float) -> bool:
    """Return whether a locked process does nothing more: it takes no memory, and what it had begun is all that is seen (Unix time)."""
    if offence.kind == "over-share":
        return now - entry.since < SHARE_SEEN_SECONDS
    grown = offence.memory_bytes > entry.memory_bytes + OVER_LIMIT_TOLERANCE_BYTES
    return offence.kind != entry.kind or offence.kind == "over-limit" or not grown


def _same(entry: Suspended, process: Process) -> bool:
    return (entry.pid, entry.start_time) == (process.pid, process.start_time)
