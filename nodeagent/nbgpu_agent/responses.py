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
from collections.abc import Callable, Sequence

from pydantic import TypeAdapter, ValidationError

from nbgpu.models import KernelId
from nbgpu.quantities import format_memory

from . import procs
from .agent import Agent, short
from .live import LiveSlice
from .offenders import Offence, Sure
from .procs import Process
from .slicedir import Suspended

log = logging.getLogger("nbgpu.agent")
ACTIONS_MOST = 16
"""On one slice at one look; the others' turn comes at the next."""
GONE_SECONDS = 10.0
"""So long must be over what a process was suspended for, before it goes on."""
REPEATS = 3
REPEATS_SECONDS = 60.0
END_PASSES = 50
END_PAUSE_SECONDS = 0.02
_KERNEL_ID: TypeAdapter[str] = TypeAdapter(KernelId)


def reason(one: Offence) -> str:
    """Return what a process did, for people; short, because JupyterLab cuts a notice after 140 characters."""
    held, allowed = format_memory(one.memory_bytes), format_memory(one.allowed_bytes)
    if one.kind == "unlimited":
        return f"it used the GPU ({held}) without nbgpu's limiter"
    if one.kind == "overhead":
        return f"it held {held} of the GPU past nbgpu's limiter"
    if one.kind == "over-limit":
        return f"it took the server to {held} of its {allowed}"
    return f"it used {one.compute_milli / 10:.0f} % of the GPU's time past nbgpu's limiter"


def action_message(process: Process, kernel_id: str, done: str, why: str) -> str:
    """Return what was done to a process, why, and what its user can do."""
    who = f"Process {process.pid}" + (f" (Notebook kernel {short(kernel_id)})" if kernel_id else "")
    what = "Restart it, or ask your administrator." if done == "stopped" else "Restart its kernel or program."
    return f"{who} was {done}: {why}. {what}"


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
        return not any(_same(one, process) and (one.excused or procs.stopped(process.pid)) for one in live.record.suspended)

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
        process = one.process
        known = next((entry for entry in live.record.suspended if _same(entry, process)), None)
        if known is None:  # written first: one that is stopped is never forgotten
            entry = Suspended(pid=process.pid, start_time=process.start_time, kind=one.kind, since=time.time())
            live.save(suspended=(*live.record.suspended, entry))
        if not procs.send(process, signal.SIGSTOP):
            live.save(suspended=tuple(entry for entry in live.record.suspended if not _same(entry, process)))
            return self._failed(live, process, one.kind)
        self._agent.count_action(one.kind, "suspend")
        self._tell("suspended", live, process, self._kernel(live, process), "stopped", reason(one), one.kind, one.memory_bytes)
        return True

    def _failed(self, live: LiveSlice, process: Process, kind: str) -> bool:
        if process.alive():
            self._agent.count_action(kind, "failed")
            who = f"Process {process.pid} is to be stopped or ended by the agent's policy"
            message = f"{who}, and the agent, which runs as user {os.geteuid()}, may not. Run it as root."
            self._agent.events.add("not-permitted", "error", message, live.id, None, live.owner, pid=process.pid, for_kind=kind)
        return False

    def _tell(self, what: str, live: LiveSlice, process: Process, kernel: str, done: str, why: str, kind: str, memory_bytes: int) -> None:
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
        offending = {one.process for one in offences}
        watched: set[Process] = set()
        for live in list(self._agent.slices.values()):
            for entry in live.record.suspended:
                process = Process(entry.pid, entry.start_time)
                if not process.alive():
                    live.save(suspended=tuple(one for one in live.record.suspended if one != entry))
                    continue
                watched.add(process)
                if not entry.excused:
                    self._look_after(live, entry, process, process in offending, now)
        self._gone_since = {process: since for process, since in self._gone_since.items() if process in watched}

    def _look_after(self, live: LiveSlice, entry: Suspended, process: Process, offends: bool, now: float) -> None:
        grace = self._policy.grace_seconds
        if offends:
            self._gone_since.pop(process, None)
            if grace is not None and time.time() - entry.since >= grace:
                self._kill(live, process, entry.kind, f"it was stopped {grace:.0f} s ago and nothing has changed since")
            elif not procs.stopped(process.pid):  # its own user may let it go on
                procs.send(process, signal.SIGSTOP)
        elif self._policy.resume and now - self._gone_since.setdefault(process, now) >= GONE_SECONDS:
            self._agent.resume(live.id, process.pid, excuse=False)


def _same(entry: Suspended, process: Process) -> bool:
    return (entry.pid, entry.start_time) == (process.pid, process.start_time)
