"""Parks idle slices and brings them back: GPU memory to the host, limits to nothing, and the way back (docs/idle.md).

Each step is written in the slice's record before it is made: an agent that is killed anywhere is followed by one that goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nbgpu.models import Idle, Lent, Usage
from nbgpu.quantities import format_memory

from .books import Conflict, check_fits, check_slice, emptied
from .idle import MOST_KERNELS, IdleWatch, host_refusal, parse_meminfo, signature
from .live import LiveSlice
from .marks import mark
from .native import UseRow
from .procs import Process
from .slicedir import Parked, Root

if TYPE_CHECKING:
    from .agent import Agent

log = logging.getLogger("nbgpu.agent")
Go = Callable[[], Awaitable[bool]]
CHILD = Path(__file__).with_name("checkpoint_child.py")
CHILD_SECONDS = 60.0
BYTES_PER_SECOND = 1e8
"""Slower than this nothing is copied: who takes longer hangs."""
AGAIN_SECONDS = 0.5
TELL_SECONDS = 2.0
"""Those who follow the slices are told no oftener that one has become idle."""
USED, RESTARTED = "it is used again", "the agent was started anew"
PASSING = (USED, RESTARTED)
"""Reasons that say nothing of the next time."""
WORDS = {
    "-1": "this driver has no checkpoint calls; 570 and later have",
    "2": "the GPU had no room",
    "3": "a process of it has ended, or uses no CUDA any more",
    "600": "its work on the GPU did not end in time",
    "800": "the agent may not do that to its processes",
    "801": "it holds managed memory, or memory that it shares with other processes",
}


class Parking:
    """All parked slices of an agent, and those that could be.

    Parameters
    ----------
    cuda : str
        Path or name of the driver's library.
    host_bytes : int
        Host memory that all parked slices together may take; 0 = none is ever parked.
    """

    def __init__(self, agent: Agent, cuda: str, host_bytes: int):
        self._agent = agent
        self._cuda = cuda
        self._host_bytes = host_bytes
        self._watches: dict[str, IdleWatch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._told_at, self._to_tell = 0.0, False
        self.room: Callable[[str, Collection[int]], Awaitable[tuple[int, int] | None]] = _unknown
        """Returns (free bytes of a device, bytes that some processes hold there), as the driver tells."""

    @property
    def offered(self) -> bool:
        """Whether slices are parked here at all."""
        return self._host_bytes > 0 and self._agent.settings.backend == "limiter"

    def load(self) -> None:
        """Go on with what an earlier agent has begun."""
        for live in list(self._agent.slices.values()):
            parked = live.record.parked
            if parked is None:
                continue
            if parked.phase == "parking":
                self._spawn(live, self._undo(live, RESTARTED))
            elif parked.phase == "restoring":
                self._spawn(live, self._restore(live))

    async def close(self) -> None:
        """Leave everything as it is: the next agent goes on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _spawn(self, live: LiveSlice, work: object) -> None:
        assert asyncio.iscoroutine(work)
        task = self._tasks[live.id] = asyncio.create_task(work)

        def done(ended: asyncio.Task[None]) -> None:
            if self._tasks.get(live.id) is ended:
                del self._tasks[live.id]
            if not ended.cancelled() and ended.exception() is not None:
                log.error("slice=%s owner=%s: parking failed", live.id, live.owner, exc_info=ended.exception())

        task.add_done_callback(done)

    def _here(self, live: LiveSlice) -> bool:
        return self._agent.slices.get(live.id) is live

    def _watch(self, live: LiveSlice) -> IdleWatch:
        return self._watches.setdefault(live.id, IdleWatch(time.time()))

    # ---- what is seen

    def tick(self, live: LiveSlice, rows: list[UseRow]) -> None:
        """Once a second: note whether the slice's processes did something."""
        if self.offered:
            now, watch = time.time(), self._watch(live)
            watch.look(rows, now)
            could, watch.could = watch.could, watch.why_not(rows, live.record.protected, now) is None
            self._to_tell = self._to_tell or (watch.could and not could)
            if self._to_tell and now - self._told_at >= TELL_SECONDS:
                self._to_tell, self._told_at = False, now
                self._agent.touch()
            for gone in self._watches.keys() - self._agent.slices.keys():
                del self._watches[gone]

    def look(self) -> None:
        """Four times a second: somebody in a parked slice wants memory or the GPU."""
        for live in list(self._agent.slices.values()):
            parked = live.record.parked
            waits = parked is not None and parked.wanted_since is None and parked.phase != "restoring"
            if waits and any(row.want for row in live.tenant.read()):
                self.want(live)

    def protect(self, live: LiveSlice, kernel_id: str, protected: bool) -> None:
        """Never park a kernel, or let it be parked again; of too many the oldest are forgotten."""
        kept = tuple(one for one in live.record.protected if one != kernel_id)[-MOST_KERNELS + 1 :]
        wanted = (*kept, kernel_id) if protected else kept
        if wanted != live.record.protected:
            live.save(protected=wanted)

    def hear(self, live: LiveSlice, kernels: Mapping[str, bool]) -> None:
        """Take what the Jupyter server says of its kernels: by id, whether each is busy."""
        on_gpu = {row.kernel_id for row in live.tenant.read()}
        if self._watch(live).hear(kernels, on_gpu, time.time()):
            self.want(live)

    def want(self, live: LiveSlice) -> None:
        """A parked slice is wanted back."""
        parked = live.record.parked
        if parked is None or parked.wanted_since is not None or parked.phase == "restoring":
            return
        live.save(parked=parked.model_copy(update={"wanted_since": time.time()}))
        mark("idle.wanted-saved")
        self._agent.touch()
        if parked.phase == "parked":
            message = "This server waits for its GPU, which was lent to others while idle. It comes back before all new requests."
            self._agent.events.add("wanting", "warning", message, live.id, owner=live.owner)

    def model(self, live: LiveSlice) -> Idle | None:
        """Return what the API says of a slice; None where nothing is ever parked."""
        parked = live.record.parked
        if parked is not None:
            full = parked.full if parked.phase == "parked" else None
            wanted = None if parked.wanted_since is None else max(0.0, time.time() - parked.wanted_since)
            return Idle(state=parked.phase, full=full, wanted_seconds=wanted, position=self._position(parked))
        if not self.offered:
            return None
        why = self.why_not(live)
        return Idle(idle_seconds=None if why else max(0.0, time.time() - self._watch(live).active_at), reason=why)

    def usage(self, live: LiveSlice) -> Usage:
        """Return what a slice uses now, and whether others may use its GPU."""
        found, parked = live.usage(), live.record.parked
        if parked is None:
            return found
        wanted = None if parked.wanted_since is None else max(0.0, time.time() - parked.wanted_since)
        lent = Lent(phase=parked.phase, memory_bytes=parked.memory_bytes, wanted_seconds=wanted, position=self._position(parked))
        return found.model_copy(update={"lent": lent})

    def _position(self, parked: Parked) -> int | None:
        """Return whose turn it is among those who wait to come back to its GPUs."""
        since, devices = parked.wanted_since, _uuids(parked)
        if since is None:
            return None
        others = [one for live in self._agent.slices.values() if (one := live.record.parked) is not None and one.phase == "parked"]
        return 1 + sum(one.wanted_since is not None and one.wanted_since < since and bool(devices & _uuids(one)) for one in others)

    def why_not(self, live: LiveSlice) -> str | None:
        """Return why a slice cannot be parked now; None when it can."""
        if not self.offered:
            return "slices are not parked here: start the agent with --idle-host-memory"
        if live.record.parked is not None:
            return f"it is {live.record.parked.phase} already"
        if live.record.claim is not None:
            return "it is of a ResourceClaim: on Kubernetes slices are not parked yet"
        if live.state != "running":
            return f"it is {live.state}"
        if live.record.suspended:
            return "the watchdog has stopped a process of it"
        rows = live.tenant.read()
        if live.tenant.junk is not None or any(live.tenant.states[row.slot].process is None for row in rows):
            return "not all of its processes are known"
        why = self._watch(live).why_not(rows, live.record.protected, time.time())
        return why or host_refusal(live.memory_used_bytes(), self._parked_bytes(), self._host_bytes, *_host_memory())

    async def _held(self, live: LiveSlice, pids: Collection[int] | None = None, told: bool = True) -> tuple[int, ...]:
        """Return what a slice holds on each of its devices: what the driver says of the holders of slots, or of `pids`.

        Parameters
        ----------
        told : bool
            Or what the slice itself tells, as far as its limits go, where the driver says nothing.
        """
        pids = live.tenant.holders() if pids is None else pids
        found: list[int] = []
        for part, own in zip(live.full.devices, live.memory_by_device(), strict=True):
            room = await self.room(part.uuid, pids)
            seen = room[1] if room is not None else 0
            found.append(seen or (min(own, part.memory_bytes) if told else 0))
        return tuple(found)

    def _parked_bytes(self) -> int:
        return sum(live.record.parked.memory_bytes for live in self._agent.slices.values() if live.record.parked is not None)

    # ---- there

    async def park(self, live: LiveSlice, idle_seconds: float) -> None:
        """Begin to park a slice that has been idle for so long; `model` tells how far it is.

        Raises
        ------
        Conflict
            It cannot be parked, and why.
        """
        self._watch(live).look(live.tenant.read(), time.time())  # the last look is up to a second old
        held = await self._held(live)
        why = self.why_not(live) or host_refusal(sum(held), self._parked_bytes(), self._host_bytes, *_host_memory())
        if not self._here(live):
            why = "it has ended"
        if why is None and time.time() - self._watch(live).active_at < idle_seconds:
            why = "it has not been idle for so long"
        if why is not None:
            raise Conflict(f"Slice {live.id} is not parked: {why}.")
        found = tuple(Root(pid=one.pid, start_time=one.start_time) for one in live.tenant.holding().values())
        parked = Parked(phase="parking", full=live.slice, processes=found, device_bytes=held, since=time.time())
        live.save(parked=parked)
        mark("idle.parking-saved")
        self._agent.turns.suspend(live, True)
        self._agent.touch()
        self._spawn(live, self._park(live, parked))

    async def _park(self, live: LiveSlice, parked: Parked) -> None:
        why = await self._put_away(live, parked)
        if why is None and any(await self._held(live, live.members(), told=False)):
            why = "a process of it holds GPU memory that could not be moved"
        if not self._here(live):
            return
        if why is None:
            why = self._take_limits(live, parked)
        if why is not None:
            await self._undo(live, why)
            return
        held = format_memory(parked.memory_bytes)
        message = f"This server was idle: others may use its GPU, and its {held} of GPU memory are kept safe. Run a cell to get both back."
        self._agent.events.add("parked", "info", message, live.id, owner=live.owner, memory_bytes=parked.memory_bytes)
        self._agent.touch()

    def _take_limits(self, live: LiveSlice, parked: Parked) -> str | None:
        """Lower the limits of a slice whose processes are checkpointed; return why that may not be."""
        for device in live.ctl.words.device[: len(live.slice.devices)]:
            device.mem_limit = 0  # first: who comes from now on waits, who was before is seen below
        known = {Process(root.pid, root.start_time) for root in parked.processes}
        now = live.record.parked
        if any(live.tenant.states[row.slot].process not in known for row in self._agent.reap(live)):
            return USED
        if now is None or now.wanted_since is not None:
            return USED
        mark("idle.checkpointed")
        live.save(slice=emptied(parked.full), parked=now.model_copy(update={"phase": "parked"}))
        mark("idle.parked-saved")
        self._agent.write_limits(live)
        return None

    async def _put_away(self, live: LiveSlice, parked: Parked) -> str | None:
        """Lock and checkpoint a slice's processes; return why that could not be."""
        before = signature(live.tenant.read())

        async def go() -> bool:  # with all of them locked
            held = await self._held(live, [root.pid for root in parked.processes], told=False)
            if any(more > booked for more, booked in zip(held, parked.device_bytes, strict=True)):
                return False  # it took more behind the limiter's back: the host's memory was asked for less
            now = live.record.parked
            rows = live.tenant.read()
            return self._here(live) and now is not None and now.wanted_since is None and signature(rows) == before

        answer = await self._child("park", parked, go)
        failed = next((words for words in answer.values() if words != "checkpointed"), "" if answer else "died 0")
        return _words(failed) if failed else None

    async def _undo(self, live: LiveSlice, why: str) -> None:
        """Leave a slice as it was: its limits are still its own."""
        log.info("not parked slice=%s owner=%s: %s", live.id, live.owner, why)
        if why not in PASSING:
            self._watch(live).refuse(why, time.time())
        self._agent.write_limits(live)
        if await self._bring_back(live):
            self._goes_on(live)

    # ---- and back

    def restore(self, live: LiveSlice) -> None:
        """Begin to bring a parked slice back, in the room that is there for it; one that is not parked is left as it is.

        Raises
        ------
        Conflict
            There is no room, or it is being parked at this moment.
        """
        parked = live.record.parked
        if parked is None or parked.phase == "restoring":
            return
        if parked.phase == "parking":
            raise Conflict(f"Slice {live.id} is being parked at this moment.")
        check_slice(parked.full, self._agent.devices, self._agent.settings.node)
        check_fits(parked.full, (other.slice for other in self._agent.slices.values() if other is not live), self._agent.devices)
        since = parked.wanted_since or time.time()
        live.save(slice=parked.full, parked=parked.model_copy(update={"phase": "restoring", "wanted_since": since}))
        mark("idle.restoring-saved")
        self._agent.write_limits(live)
        self._agent.touch()
        self._spawn(live, self._restore(live))

    async def _restore(self, live: LiveSlice) -> None:
        began = time.monotonic()
        if not await self._bring_back(live):
            return
        mark("idle.restored")
        parked = live.record.parked
        self._goes_on(live)
        waited = time.time() - (parked.wanted_since or time.time()) if parked is not None else 0.0
        message = f"This server has its GPU back: its memory was restored in {max(1, round(time.monotonic() - began))} s, as it was."
        self._agent.events.add("restored", "info", message, live.id, owner=live.owner, waited_seconds=round(waited, 1))

    def _goes_on(self, live: LiveSlice) -> None:
        live.save(parked=None)
        self._watch(live).active_at = time.time()
        self._agent.turns.suspend(live, False)
        self._agent.touch()

    async def _bring_back(self, live: LiveSlice) -> bool:
        """Have all processes of a slice run again, however often it takes; False when the slice has ended meanwhile."""
        told = ""
        while self._here(live) and (parked := live.record.parked) is not None:
            if not await self._has_room(live, parked):
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            answer = await self._child("wake", parked, None)
            if not self._here(live):
                return False
            left = [words for words in answer.values() if words not in ("running", "gone", "lost")]
            if not left and (answer or not _alive(parked)):
                self._tell_lost(live, [pid for pid, words in answer.items() if words == "lost"])
                return True
            words = _words(left[0] if left else "died 0")
            if words != told:
                told = words
                log.warning("slice=%s owner=%s is not restored yet: %s", live.id, live.owner, words)
            await asyncio.sleep(AGAIN_SECONDS)
        return False

    async def _has_room(self, live: LiveSlice, parked: Parked) -> bool:
        """Return whether the device itself has the room that the books have: a process that has just died may not be gone from it.

        Some drivers never restore a process whose restore once found none.
        """
        pids = {root.pid for root in _alive(parked)}
        for part, needed in zip(parked.full.devices, parked.device_bytes, strict=True):
            found = await self.room(part.uuid, pids)
            if found is not None and found[0] + found[1] < needed:
                log.info("slice=%s owner=%s waits for room on GPU %d: %s free", live.id, live.owner, part.index, format_memory(found[0]))
                return False
        return True

    def _tell_lost(self, live: LiveSlice, pids: list[str]) -> None:
        for pid in pids:
            message = f"Process {pid} has lost its GPU memory: the driver could not restore it. Restart its kernel."
            self._agent.events.add("lost", "error", message, live.id, owner=live.owner, pid=int(pid))

    # ---- the driver

    async def _child(self, what: str, parked: Parked, go: Go | None) -> dict[str, str]:
        """Have a child make the calls; return what it says of each process by its pid, nothing when it died or hung."""
        roots = _alive(parked)
        if not roots:
            return {}
        pids = [str(root.pid) for root in roots]

        async def sure() -> bool:
            # Pids of processes that have ended meanwhile may be others' by now: those were locked instead.
            return all(Process(root.pid, root.start_time).alive() for root in roots) and go is not None and await go()

        arguments = [sys.executable, "-I", "-S", str(CHILD), self._cuda, what, str(os.getpid()), *pids]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe, env=environment)
        try:
            return await asyncio.wait_for(_speak(child, sure), CHILD_SECONDS + parked.memory_bytes / BYTES_PER_SECOND)
        except (asyncio.TimeoutError, OSError, ValueError):
            return {}
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def _uuids(parked: Parked) -> set[str]:
    return {part.uuid for part in parked.full.devices}


async def _unknown(_uuid: str, _pids: Collection[int]) -> tuple[int, int] | None:
    return None


async def _speak(child: asyncio.subprocess.Process, go: Go) -> dict[str, str]:
    assert child.stdin is not None
    assert child.stdout is not None
    line = await child.stdout.readline()
    if line.strip() == b"locked":
        mark("idle.locked")
        child.stdin.write(b"go\n" if await go() else b"stop\n")
        line = await child.stdout.readline()
    found = json.loads(line or b"{}")
    return {str(pid): str(words) for pid, words in found.items()} if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _alive(parked: Parked) -> list[Root]:
    return [root for root in parked.processes if Process(root.pid, root.start_time).alive()]


def _words(failed: str) -> str:
    step, _, code = failed.partition(" ")
    if step == "stopped":
        return USED
    if step == "died":
        return "who asked the driver for it has ended before its time"
    return WORDS.get(code, f"the driver's {step} failed ({code})")


def _host_memory() -> tuple[int, int]:
    return parse_meminfo(Path("/proc/meminfo").read_text())
