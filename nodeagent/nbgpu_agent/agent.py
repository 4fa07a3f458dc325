"""The agent's state and what can be done with it. HTTP is in `admin_api` and `slice_api`, the clock in `monitor`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import AgentSlice, AgentSlices, Backend, Device, KernelLimit, Launch, Node, Slice
from nbgpu.quantities import MIB, format_memory, format_time

from . import adoption, procs, slicedir
from .away import Away
from .backend import DriverLimits
from .books import Conflict, check_fits, check_kernel_limit, check_slice, holding, resized
from .cgroups import Cgroups
from .checkpoint import Checkpoints
from .events import Changes, EventLog
from .happened import short
from .live import LiveSlice
from .marks import mark
from .native import Native, UseRow
from .parking import Parking
from .policy import Policy
from .probe import overhead_cap_bytes
from .runtime import SOCKET_PATH_MAX
from .simulated import Machine
from .slicedir import ClaimOf, Record, Suspended
from .suspension import GpuLock, Suspender
from .turns import Turns
from .watchdog import OVER_LIMIT_TOLERANCE_BYTES

log = logging.getLogger("nbgpu.agent")
GATHER_SECONDS = 0.03
"""Changes within so long after the first are one answer to those who wait for changes."""
ANSWERED_SECONDS = 0.3
"""The same for changes whose cause has had its answer: a start is two of them, and telling it anew would only slow it down."""

FREED_BYTES = 64 * MIB
"""What a slice frees of memory above its limits is let go in such pieces: each is written and told to all who follow the slices."""


class NoSuchSlice(NbgpuError):
    """No slice of this id is on this node."""

    code = "not-found"
    status = 404

    def __init__(self, slice_id: str):
        super().__init__(f"There is no slice {slice_id} on this node: it has ended, or never was here.")


@dataclass(frozen=True)
class Settings:
    """What does not change while the agent runs."""

    runtime: Path
    node: str
    simulated: bool
    driver_version: str
    libraries: Path
    """The versioned copy under the runtime directory."""
    machine: Machine | None
    """The simulated machine; None on a real one."""
    backend: Backend = "limiter"
    backend_reason: str = ""
    """Why it is that one."""
    policy: Policy = field(default_factory=Policy)
    """What the watchdog does about what it finds."""
    cuda: str = "libcuda.so.1"
    idle_host_bytes: int = 0
    """Host memory that parked slices may take; 0 = none is parked."""


class Agent:
    """All slices of a node.

    Parameters
    ----------
    context_bytes : dict
        What a bare context costs, bytes by device uuid; 0 or missing where that is not known.
    """

    def __init__(
        self, settings: Settings, devices: list[Device], native: Native, context_bytes: dict[str, int], suspender: Suspender | None = None
    ):
        self.settings = settings
        self.devices = {device.uuid: device for device in devices}
        self.native = native
        self.context_bytes = context_bytes
        self.overhead_caps = {device.uuid: overhead_cap_bytes(context_bytes.get(device.uuid, 0)) for device in devices}
        self.cgroups = Cgroups()
        self.turns = Turns(native, devices)
        self.suspender = suspender or Suspender(GpuLock("", ""))
        self.events = EventLog()
        self.slices: dict[str, LiveSlice] = {}
        self.checkpoints = Checkpoints(settings.cuda, settings.idle_host_bytes, self._moved_bytes, self._moving_bytes)
        self.parking = Parking(self, self.checkpoints)
        self.away = Away(self, self.checkpoints)
        self.driver_limits: DriverLimits | None = None
        """Where the driver can limit memory by cgroup: what sets its limits."""
        self.actions: dict[tuple[str, str], int] = {}
        """What the watchdog did, by the kind of finding and what was done."""
        self._old_cgroups: list[Path] = []
        self.changed = Changes()
        self.on_slice_added: Callable[[LiveSlice], None] = lambda _: None
        self.on_slice_ended: Callable[[LiveSlice], None] = lambda _: None
        self.seen_bytes: Callable[[LiveSlice], Mapping[str, int]] = lambda _: {}
        """What the driver showed of a slice at the last look, bytes by device uuid; missing: not asked since its limits changed."""
        self.look_again: Callable[[LiveSlice], Awaitable[None]] = _no_look
        """Asks the driver at once."""
        self.on_settled: Callable[[LiveSlice], None] = lambda _: None
        """A slice counts less than before: it has freed memory above its limits."""
        self.last_look: Callable[[LiveSlice], None] = lambda _: None
        """A last look at what processes that are gone have left."""

    # ---- life of a slice

    def load(self) -> None:
        """Take up the slices that the directories tell of; what an earlier agent left half made goes."""
        for directory in sorted((self.settings.runtime / "slices").iterdir()):
            try:
                record = slicedir.read_record(directory)
            except (OSError, ValueError) as error:
                log.error("The slice in %s cannot be read and is left alone: %s", directory, error)
                continue
            if record is None:
                slicedir.remove(directory)
                continue
            if record.boot_id != procs.boot_id():
                record = self._after_boot(directory, record)
            self._start(directory, record)
        for live in list(self.slices.values()):
            self.end_if_over(live)

    def _after_boot(self, directory: Path, record: Record) -> Record:
        """No process of an earlier boot lives: a running slice is over, a prepared one gets a fresh `use` file."""
        os.close(slicedir.create_use(directory, record.uid, record.claim is not None))
        changes: dict[str, object] = {
            "roots": (),
            "cgroup": None,
            "boot_id": procs.boot_id(),
            "suspended": (),
            "limited": None,
            "parked": None,
            "lowered": None,
            "slice": record.lowered or record.slice,
            "kernels_away": {},
            "use_since": 0,
        }
        if record.claim is not None:
            changes["state"] = "prepared"  # its pod's containers start again
        record = record.model_copy(update=changes)
        slicedir.write_record(directory, record)
        return record

    def _start(self, directory: Path, record: Record) -> LiveSlice:
        live = LiveSlice(directory, record, self.native, self.cgroups, self.slice_lost_process)
        live.on_gathered = lambda: self.hold(live)
        live.owner_resumes = self.settings.policy.owner_resumes
        live.may_suspend = self.parking.offered and record.claim is None
        self.slices[live.id] = live
        self.write_limits(live)
        self.turns.add(live)
        self.on_slice_added(live)
        return live

    def _moved_bytes(self) -> int:
        """Return the host memory that is taken by what was moved there, or will be."""
        parked = sum(live.record.parked.memory_bytes for live in self.slices.values() if live.record.parked is not None)
        return parked + sum(one.memory_bytes for live in self.slices.values() for one in live.record.kernels_away.values())

    def _moving_bytes(self) -> int:
        """Return the part of it that is on its way to the host: of several slices at the same time."""
        parked = (live.record.parked for live in self.slices.values() if live.record.parked is not None)
        away = (one for live in self.slices.values() for one in live.record.kernels_away.values())
        return sum(one.memory_bytes for of in (parked, away) for one in of if one.phase == "parking")

    def write_limits(self, live: LiveSlice) -> None:
        """Write the limits that are in force where the slice's processes read them, and tell the driver."""
        live.ctl.set_slice(live.full, self.context_bytes, self.overhead_caps, holds=live.limits == live.full)
        self.hold(live)

    def hold(self, live: LiveSlice) -> None:
        """Bring the driver's limits of a slice in force beside the limiter's, where that is possible."""
        before = live.backend
        if self.driver_limits is not None:
            self.driver_limits.hold(live)
        if live.backend != before:
            self.touch()

    def put_slice(self, wanted: Slice, uid: int | None, claim: ClaimOf | None = None) -> Launch:
        """Prepare a slice; the same slice again is answered the same. See ``PUT /v1/slices/{slice_id}``.

        Parameters
        ----------
        claim : ClaimOf, optional
            On Kubernetes: what the slice stands for.
        """
        existing = self.slices.get(wanted.slice_id)
        if existing is not None:
            if wanted not in (existing.slice, existing.full) or existing.record.uid != uid:
                raise Conflict(f"Slice {wanted.slice_id} exists and is another one: ask for it under another id.")
            if existing.state == "releasing":
                raise Conflict(f"Slice {wanted.slice_id} is being released: ask for a new one under another id.")
            return self.launch(existing)
        self.check(wanted)
        if uid is not None and uid != os.geteuid() and os.geteuid() != 0:
            raise InvalidValue("uid", uid, "null: this agent does not run as root and makes slices for its own user only")
        directory = self.settings.runtime / "slices" / wanted.slice_id
        if len(str(directory / "api.sock")) > SOCKET_PATH_MAX:
            raise InvalidValue("slice_id", wanted.slice_id, "shorter: the path of its socket would be too long")
        slicedir.create(directory)
        os.close(slicedir.create_use(directory, uid, claim is not None))
        record = Record(slice=wanted, uid=uid, state="prepared", created=time.time(), boot_id=procs.boot_id(), claim=claim)
        live = self._start(directory, record)
        slicedir.write_record(directory, live.record)
        self.touch(ANSWERED_SECONDS)
        parts = ", ".join(f"GPU {d.index}: {format_memory(d.memory_bytes)}, {d.compute_milli} milli-GPU" for d in wanted.devices)
        log.info("prepared slice=%s owner=%s: %s, %s", live.id, live.owner, parts, wanted.mode)
        return self.launch(live)

    def check(self, wanted: Slice) -> None:
        """Raise InvalidValue or Conflict unless a new slice can be here, and fits beside those that are."""
        check_slice(wanted, self.devices, self.settings.node)
        if wanted.simulated != self.settings.simulated:
            raise InvalidValue("slice.simulated", wanted.simulated, f"{self.settings.simulated}, as the GPUs of this node are")
        check_fits(wanted, (live.slice for live in self.slices.values()), self.devices)

    def find(self, slice_id: str) -> LiveSlice:
        """Return a slice by id; NoSuchSlice when there is none."""
        live = self.slices.get(slice_id)
        if live is None:
            raise NoSuchSlice(slice_id)
        return live

    def adopt(self, slice_id: str, pid: int) -> AgentSlice:
        """Take a running process and its descendants into a slice.

        Raises
        ------
        NbgpuError
            There is no such slice (NoSuchSlice) or process, or the process is not the slice's to have (Conflict).
        """
        live = self.find(slice_id)
        why = adoption.why_not(live, pid, self.slices.values())
        if why is not None:
            log.warning("not adopted slice=%s owner=%s: process %d %s", live.id, live.owner, pid, why)
            raise Conflict(f"Process {pid} is not adopted into slice {live.id}: it {why}.", field="pid")
        if live.adopt(pid):
            log.info("adopted slice=%s owner=%s: process %d", live.id, live.owner, pid)
            self.touch(ANSWERED_SECONDS)
            self.end_if_over(live)
        return live.as_model() if live.id in self.slices else self._ended_model(live)

    @staticmethod
    def _ended_model(live: LiveSlice) -> AgentSlice:
        return AgentSlice(slice=live.slice, state="releasing", process_count=0, created=live.record.created)

    def release(self, slice_id: str) -> bool:
        """Ask a slice to end; return whether it is gone already."""
        live = self.slices.get(slice_id)
        if live is None:
            return True
        if live.record.claim is not None:
            claim = live.record.claim
            raise Conflict(f"Slice {slice_id} is of ResourceClaim {claim.namespace}/{claim.name}: delete its pod, and it ends.")
        if live.state == "prepared" and not live.join_by_lock():
            self._end(live, "it was released before anything ran in it")
            return True
        if live.state != "releasing":
            live.save(state="releasing")
            log.info("releasing slice=%s owner=%s", live.id, live.owner)
            self.touch()
        return self.end_if_over(live)

    def end_claim(self, live: LiveSlice, why: str) -> None:
        """End the slice of a claim."""
        self._end(live, why)

    def slice_lost_process(self, live: LiveSlice) -> None:
        """A process of the slice has ended: free its slots, end the slice when it was the last."""
        if live.id in self.slices:
            self.last_look(live)
            self.reap(live)
            self.end_if_over(live)

    def reap(self, live: LiveSlice) -> list[UseRow]:
        """Free the slots of a slice's processes that are gone; return those in use after it."""
        return live.reap(lambda: self.last_look(live))

    def end_if_over(self, live: LiveSlice) -> bool:
        """End a slice whose last process is gone; return whether it ended."""
        if not live.over():
            return False
        self._end(live, "its last process is gone")
        return True

    def _end(self, live: LiveSlice, why: str) -> None:
        del self.slices[live.id]
        self.turns.remove(live)
        self.events.add("ended", "info", f"The slice of {live.owner} has ended: {why}.", live.id, owner=live.owner)
        self.on_slice_ended(live)
        if self.driver_limits is not None:
            self.driver_limits.end(live)
        self.events.forget(live.id)
        live.close()
        slicedir.remove(live.directory)
        if live.record.cgroup:
            self._old_cgroups.append(Path(live.record.cgroup))
            self.sweep()
        self.touch()

    def sweep(self) -> None:
        """Remove the cgroups of slices that ended, as soon as their last zombie is gone."""
        self._old_cgroups = [path for path in self._old_cgroups if not self.cgroups.remove(path)]

    def touch(self, within_seconds: float = GATHER_SECONDS) -> None:
        """Something about the slices has changed: those who wait for that hear of it within so long."""
        self.changed.note(within_seconds)

    # ---- limits

    async def patch(
        self, slice_id: str, memory_bytes: int | None, compute_milli: int | None, mode: str | None, *, only_unused: bool = False
    ) -> AgentSlice:
        """Give a slice new limits on each of its devices; the books are checked first. `only_unused`: none below what it uses."""
        live = self.find(slice_id)
        wanted = resized(live.limits, memory_bytes, compute_milli, mode)
        if live.record.claim is not None:
            claim = live.record.claim
            raise Conflict(f"Slice {slice_id} is of ResourceClaim {claim.namespace}/{claim.name}: its pool alone changes its limits.")
        if live.record.parked is not None and wanted != live.limits:
            raise Conflict(f"Slice {slice_id} is {live.record.parked.phase} because it is idle: its limits change when it is back.")
        before = live.limits
        if only_unused:
            _must_hold(live, before, wanted)
        self.change(live, wanted)
        if only_unused:
            try:
                _must_hold(live, before, wanted)  # from here on it gets no more: what it took meanwhile is its own
            except Conflict:
                self.change(live, before)
                raise
        if live.record.lowered is not None:
            await self.look_again(live)
            if live.id not in self.slices:
                return self._ended_model(live)
            self.settle(live)
        return live.as_model()

    def change(self, live: LiveSlice, wanted: Slice) -> None:
        """Bring the limits of `wanted` in force; the books are checked first where it counts more than before.

        Memory that the slice holds above them counts as its own until it is free (`settle`).
        """
        if wanted == live.limits:
            return
        counts = holding(wanted, [part.memory_bytes for part in live.slice.devices])
        check_slice(wanted, self.devices, self.settings.node)
        pairs = zip(counts.devices, live.slice.devices, strict=True)
        if any(new.memory_bytes > old.memory_bytes or new.compute_milli > old.compute_milli for new, old in pairs):
            check_fits(counts, (other.slice for other in self.slices.values() if other is not live), self.devices)
        live.save(slice=counts, lowered=wanted if counts != wanted else None)
        mark("limits-lowered")
        if live.record.kernel_limits:
            live.ctl.set_kernels(live.kernel_limits)
        self.write_limits(live)  # from here on it gets no more: what it uses now is the most that it can hold
        live.limits_at = time.monotonic()
        self.turns.change(live)
        self.turns.change_kernels(live)
        self.settle(live)
        self.touch()
        first = wanted.devices[0]
        what = f"{format_memory(first.memory_bytes)}, {format_time(first.compute_milli)}, {wanted.mode}"
        self.events.add("limit-changed", "info", f"This server's slice is now {what}.", live.id, owner=live.owner)
        for part, used_bytes in zip(wanted.devices, live.memory_by_device(), strict=True):
            if used_bytes > part.memory_bytes:
                self._tell_over(live, "This server", used_bytes, part.memory_bytes, None)
                break

    def settle(self, live: LiveSlice) -> None:
        """Let others have what a slice whose limits were lowered has freed since."""
        limits = live.record.lowered
        if limits is None:
            return
        seen, held = self.seen_bytes(live), list[int]()
        unused = live.state == "prepared" and not live.join_by_lock()
        for index, (part, used) in enumerate(zip(live.slice.devices, live.memory_by_device(), strict=True)):
            # What the driver shows counts where it is clearly more: what a slice tells may have been lost. Until it has told, all is held.
            shown = 0 if unused else part.memory_bytes
            if part.uuid in seen:
                shown = seen[part.uuid] - OVER_LIMIT_TOLERANCE_BYTES + live.coming_bytes(index)
            held.append(min(part.memory_bytes, max(used, shown)))
        counts = holding(limits, held)
        pairs = zip(live.slice.devices, counts.devices, strict=True)
        if counts == limits or any(old.memory_bytes - new.memory_bytes >= FREED_BYTES for old, new in pairs):
            live.save(slice=counts, lowered=limits if counts != limits else None)
            mark("limits-settled")
            self.touch()
            self.on_settled(live)

    def set_kernel_limit(self, live: LiveSlice, kernel_id: str, limit: KernelLimit) -> KernelLimit:
        """Limit a kernel inside its slice; both None removes its limit."""
        check_kernel_limit(limit, live.full)
        before = live.kernel_limits.get(kernel_id, KernelLimit())
        if before != limit or limit != live.record.kernel_limits.get(kernel_id, KernelLimit()):
            live.set_kernel_limit(kernel_id, limit)
        if before == limit:
            return limit
        self.turns.change_kernels(live)
        who = f"Notebook kernel {short(kernel_id)}"
        self.events.add("limit-changed", "info", f"{who} {limit_words(limit)}.", live.id, kernel_id, live.owner)
        used_bytes = max(live.memory_by_device(kernel_id))
        if limit.memory_bytes is not None and used_bytes > limit.memory_bytes:
            self._tell_over(live, who, used_bytes, limit.memory_bytes, kernel_id)
        return limit

    def _tell_over(self, live: LiveSlice, who: str, used_bytes: int, limit_bytes: int, kernel_id: str | None) -> None:
        """Say that a limit was set below what is held: nobody loses anything, and nobody gets more."""
        held = f"{who} holds {format_memory(used_bytes)}, its limit is now {format_memory(limit_bytes)}"
        remedy = "Until it frees some, it is refused more."  # short: JupyterLab cuts a notice after 140 characters
        what = {"used_bytes": used_bytes, "limit_bytes": limit_bytes, "limit": "slice" if kernel_id is None else "kernel"}
        self.events.add("over-limit", "warning", f"{held}. {remedy}", live.id, kernel_id, live.owner, **what)

    # ---- the watchdog's doings

    def count_action(self, kind: str, action: str) -> None:
        """Count for the metrics what the watchdog did."""
        self.actions[kind, action] = self.actions.get((kind, action), 0) + 1

    async def resume(self, slice_id: str, pid: int | None = None, by: str = "") -> list[Suspended]:
        """Let suspended processes of a slice go on: one, or (None) all; return what is left suspended or excused.

        Parameters
        ----------
        by : str
            Who wants it: they are left alone from now on, whatever they do, until they end. "": what they were suspended for is over.
        """
        live = self.find(slice_id)
        chosen = [one for one in live.record.suspended if pid in (None, one.pid) and not one.excused]
        if pid is not None and not chosen:
            raise Conflict(f"Process {pid} of slice {slice_id} is not suspended.", field="pid")
        for one in chosen:
            if self.slices.get(slice_id) is not live:
                break
            # Excused first: nobody suspends it again meanwhile. Forgotten last: an agent that dies over it finds it again.
            if by:
                excused = one.model_copy(update={"excused": True})
                live.save(suspended=tuple(excused if entry == one else entry for entry in live.record.suspended))
            if await self.suspender.resume(procs.Process(one.pid, one.start_time)):
                self.count_action(one.kind, "resume")
                message = f"Process {one.pid} goes on: {f'{by} has let it' if by else 'what it was suspended for is over'}."
                self.events.add("resumed", "info", message, live.id, one.kernel_id or None, live.owner, pid=one.pid, for_kind=one.kind)
            if not by and self.slices.get(live.id) is live:
                live.save(suspended=tuple(entry for entry in live.record.suspended if entry != one))
        self.touch()
        return list(live.record.suspended)

    # ---- answers

    def launch(self, live: LiveSlice) -> Launch:
        """Return how to start a process inside a slice."""
        socket = str(live.directory / "api.sock")
        env = {
            "LD_PRELOAD": str(self.settings.libraries / "libnbgpu.so"),
            "NBGPU_SLICE_DIR": str(live.directory),
            "NBGPU_SOCKET": socket,
        }
        if self.settings.machine is not None:
            sim = str(self.settings.machine.libraries)
            env["LD_LIBRARY_PATH"] = _in_front(sim, os.environ.get("LD_LIBRARY_PATH", ""))
            env["PATH"] = _in_front(sim, os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"))
            env["NBGPU_SIM_STATE"] = str(self.settings.machine.state)
        return Launch(env=env, slice_dir=str(live.directory), socket=socket)

    def node(self) -> Node:
        """Return what this agent serves."""
        settings = self.settings
        return Node(
            node=settings.node,
            simulated=settings.simulated,
            driver_version=settings.driver_version,
            backend=settings.backend,
            backend_reason=settings.backend_reason,
            devices=list(self.devices.values()),
        )

    async def list_slices(self, after: int, wait_seconds: float) -> AgentSlices:
        """Return all slices, once the generation is above `after`, at the latest after `wait_seconds`."""
        await self.changed.above(after, wait_seconds)
        slices = [live.as_model().model_copy(update={"idle": self.parking.model(live)}) for live in list(self.slices.values())]
        return AgentSlices(generation=self.changed.generation, slices=slices, devices=list(self.devices.values()))

    def set_healthy(self, uuid: str, healthy: bool) -> None:
        """Note whether a device answers."""
        device = self.devices[uuid]
        if device.healthy != healthy:
            self.devices[uuid] = device.model_copy(update={"healthy": healthy})
            log.warning("GPU %d (%s) %s", device.index, uuid, "answers again" if healthy else "does not answer")
            self.touch()

    def end_waits(self) -> None:
        """Answer everyone who waits for something to happen: the agent is about to end."""
        self.changed.close()
        self.events.close()

    def close(self) -> None:
        """Let go of everything; the slices go on without the agent."""
        self.turns.close()
        self.suspender.close()
        for live in self.slices.values():
            live.close()


def limit_words(limit: KernelLimit) -> str:
    """Return what holds for a kernel from now on."""
    amounts: list[str] = []
    if limit.memory_bytes is not None:
        amounts.append(format_memory(limit.memory_bytes))
    if limit.compute_milli is not None:
        amounts.append(format_time(limit.compute_milli))
    return f"is limited to {' and '.join(amounts)}" if amounts else "has no limit of its own any more"


async def _no_look(_: LiveSlice) -> None:
    pass


def _in_front(path: str, others: str) -> str:
    return os.pathsep.join([path, *(other for other in others.split(os.pathsep) if other and other != path)])


def _must_hold(live: LiveSlice, before: Slice, wanted: Slice) -> None:
    """Raise Conflict where a slice uses more memory than `wanted` would leave it; what it may not have anyway is not taken from it."""
    for part, now, used_bytes in zip(wanted.devices, before.devices, live.memory_by_device(), strict=True):
        if part.memory_bytes < now.memory_bytes and used_bytes > part.memory_bytes:
            used, left = format_memory(used_bytes), format_memory(part.memory_bytes)
            raise Conflict(f"Slice {live.id} uses {used} of GPU {part.index}: it cannot be left {left}.")
