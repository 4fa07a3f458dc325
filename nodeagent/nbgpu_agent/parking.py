"""Parks idle slices and brings them back: GPU memory to the host, limits to nothing, and the way back (docs/idle.md).

Each step is written in the slice's record before it is made: an agent that is killed anywhere is followed by one that goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from nbgpu.models import Idle, Lent, Usage
from nbgpu.quantities import format_memory

from .books import Conflict, check_fits, check_slice, emptied
from .checkpoint import TOO_MANY, USED, Checkpoints
from .idle import MOST_KERNELS, REPORT_SECONDS, IdleWatch, signature
from .live import LiveSlice
from .marks import mark
from .movers import Movers
from .native import UseRow
from .procs import Process
from .slicedir import Parked, Root

if TYPE_CHECKING:
    from .agent import Agent

log = logging.getLogger("nbgpu.agent")
TELL_SECONDS = 2.0
"""Those who follow the slices are told no oftener that one has become idle, or is used again."""
RESTARTED = "the agent was started anew"
PASSING = (USED, RESTARTED, TOO_MANY)
"""Reasons that say nothing of the next time."""


class Parking:
    """All parked slices of an agent, and those that could be.

    Parameters
    ----------
    checkpoints : Checkpoints
        What moves their memory.
    """

    def __init__(self, agent: Agent, checkpoints: Checkpoints):
        self._agent = agent
        self._checkpoints = checkpoints
        self._watches: dict[str, IdleWatch] = {}
        self._tasks: Movers[str] = Movers()
        self._told_at, self._to_tell = 0.0, False

    @property
    def offered(self) -> bool:
        """Whether slices are parked here at all."""
        return self._checkpoints.host_bytes > 0 and self._agent.settings.backend == "limiter"

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
        await self._tasks.close()

    def _spawn(self, live: LiveSlice, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.start(live.id, work, f"slice={live.id} owner={live.owner}: parking failed")

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
            again = watch.used_again(live.record.protected, now)
            self._to_tell = self._to_tell or again or (watch.could and not could)
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
        self._agent.away.hear(live, kernels)

    def busy(self, live: LiveSlice, kernel_id: str) -> bool:
        """Return whether the Jupyter server said lately that a kernel runs a cell."""
        watch = self._watch(live)
        return time.time() - watch.told_at <= REPORT_SECONDS and watch.kernels.get(kernel_id, False)

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
        why, watch, now = self.why_not(live), self._watch(live), time.time()
        unused = watch.unused_seconds(live.record.protected, now) if live.state == "running" else None
        return Idle(idle_seconds=None if why else max(0.0, now - watch.active_at), reason=why, unused_seconds=unused)

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
        if live.record.kernels_away:
            return "a kernel of it is in host memory by its user's wish"
        if live.record.claim is not None:
            return "it is of a ResourceClaim: on Kubernetes slices are not parked yet"
        if live.state != "running":
            return f"it is {live.state}"
        if live.record.lowered is not None:
            return "it holds more memory than its limit"
        if live.record.suspended:
            return "the watchdog has stopped a process of it"
        rows = live.tenant.read()
        if live.tenant.junk is not None or any(live.tenant.states[row.slot].process is None for row in rows):
            return "not all of its processes are known"
        why = self._watch(live).why_not(rows, live.record.protected, time.time())
        return why or self._checkpoints.host_refusal(live.memory_used_bytes())

    async def _held(self, live: LiveSlice, pids: Collection[int] | None = None, told: bool = True) -> tuple[int, ...]:
        """Return what a slice holds on each of its devices: what the driver says of the holders of slots, or of `pids`.

        Parameters
        ----------
        told : bool
            Or what the slice itself tells, as far as its limits go, where the driver says nothing.
        """
        pids = live.tenant.holders() if pids is None else pids
        return await self._checkpoints.held(live.full.devices, pids, live.memory_by_device() if told else ())

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
        why = self.why_not(live) or self._checkpoints.host_refusal(sum(held))
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
            now = live.record.parked
            rows = live.tenant.read()
            return self._here(live) and now is not None and now.wanted_since is None and signature(rows) == before

        return await self._checkpoints.put_away(live.user, parked, live.full.devices, go)

    async def _undo(self, live: LiveSlice, why: str) -> None:
        """Leave a slice as it was: its limits are still its own."""
        log.info("not parked slice=%s owner=%s: %s", live.id, live.owner, why)
        if why not in PASSING:
            self._watch(live).refuse(why, time.time())
        self._agent.write_limits(live)
        if why == TOO_MANY or await self._bring_back(live):  # nothing was locked: no helper process is needed
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

        def left() -> Parked | None:
            return live.record.parked if self._here(live) else None

        lost = await self._checkpoints.bring_back(live.user, f"slice={live.id} owner={live.owner}", live.full.devices, left)
        if lost is not None:
            self._tell_lost(live, lost)
        return lost is not None

    def _tell_lost(self, live: LiveSlice, pids: list[int]) -> None:
        for pid in pids:
            message = f"Process {pid} has lost its GPU memory: the driver could not restore it. Restart its kernel."
            self._agent.events.add("lost", "error", message, live.id, owner=live.owner, pid=pid)


def _uuids(parked: Parked) -> set[str]:
    return {part.uuid for part in parked.full.devices}
