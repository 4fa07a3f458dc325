"""One slice while it lives: its files, its processes, its kernels' limits."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

from nbgpu.models import AgentSlice, Backend, KernelLimit, Slice, Usage

from . import layout, procs, slicedir
from .books import Conflict, kernel_limit_in, share_milli
from .cgroups import Cgroups
from .history import History
from .native import Native, UseRow
from .procs import Process
from .reconcile import Account
from .slicedir import AwayKernel, CtlFile, Record, Root
from .tenant import Tenant
from .usage import Doubts, SlotUse, compute_by_device, memory_by_device, slice_usage
from .watch import Watch
from .watchdog import OVER_LIMIT_TOLERANCE_BYTES

log = logging.getLogger("nbgpu.agent")
State = Literal["prepared", "running", "releasing"]
CHECK_SECONDS = 0.05
CHECK_SECONDS_MOST = 0.3
"""How long after a look at who is left the next one waits, however many processes end meanwhile."""
CHECK_SHARE = 10
WATCHED = 8
"""So many of a slice's processes are watched once its adopted ones are gone: one that lives is enough for it not to be over."""
MOVE_PASSES = 50
CONTAINER_DIR = "/run/nbgpu/slice"
"""Where a container finds its slice's files; the limiter knows the same path."""
NAMESPACE_LOOKS = 100
"""So many processes of a pod are asked what they have mounted; a tenant may have thousands, each in a mount namespace of its own."""
NVML_DOUBT_MILLI = 100
"""How much more than a slice tells NVML must see of it to be believed instead."""


class LiveSlice:
    """A slice of this node.

    Parameters
    ----------
    directory : Path
        Its directory, with `record` written in it.
    on_exit : callable
        Called with the slice when one of its processes has ended.
    """

    def __init__(self, directory: Path, record: Record, native: Native, cgroups: Cgroups, on_exit: Callable[[LiveSlice], None]):
        self.directory = directory
        self.record = record
        self.id = record.slice.slice_id
        self._cgroups = cgroups
        self._on_exit = on_exit
        self.ctl = CtlFile(directory)
        fd = slicedir.open_use(directory)
        if fd is None:
            if record.state != "prepared":
                self.save(use_since=procs.start_time(os.getpid()) or 0)
            fd = slicedir.create_use(directory, record.uid, record.claim is not None)
        self.tenant = Tenant(fd, native, len(record.slice.devices), self._member_ended, self.has_member)
        self.history = History([part.uuid for part in record.slice.devices])
        self.backend: Backend = "limiter"
        """Who holds its memory: the limiter alone, or the driver too."""
        self.owner_resumes = False
        """Its owner may let suspended processes go on."""
        self.may_suspend = False
        """Its owner may move its kernels' memory to the host."""
        self.one_comes_back = asyncio.Lock()
        """Held while it is looked at whether there is room for a kernel to come back: two at once would refuse each other."""
        self.limits_at = 0.0
        """When other limits came in force, CLOCK_MONOTONIC seconds: what was seen before says nothing of what it holds now."""
        self.coming_back: set[str] = set()
        """Kernels on the host that count already, while it is looked at whether there is room for them."""
        self.on_gathered: Callable[[], None] = lambda: None
        """Called when its processes are in its cgroup, or cannot be brought there."""
        self.entries: list[int] = []
        """Of the GPU-time scheduler, one a device."""
        self.accounts: dict[int, Account] = {}
        """What the slice was let compute and what NVML saw of it, by its device's place."""
        self.memory_doubts = Doubts(OVER_LIMIT_TOLERANCE_BYTES)
        self.compute_doubts = Doubts(NVML_DOUBT_MILLI)
        self.busy_seconds: dict[str, float] = {}
        self.refusals = 0
        self._closed = False
        self._check: asyncio.TimerHandle | None = None
        self._next_check = 0.0
        self._watches: dict[int, Watch] = {}
        self._known: dict[int, Process] = {}
        self._granted = {slot for slot, size in enumerate(self.ctl.words.overhead) if size}
        self.ctl.set_kernels(self.kernel_limits)
        self.write_away()
        for root in record.roots:
            self._watch(Process(root.pid, root.start_time))
        if record.roots:
            self.gather()  # an agent that was killed may have left them on the way

    @cached_property
    def _mount(self) -> str:
        """Which file system its files are on, as lists of mounts tell it."""
        return procs.device_of_mount(self.ctl.fd)

    @property
    def slice(self) -> Slice:
        """What the slice counts on its devices: its limits or, while it still holds more memory than those, that."""
        return self.record.slice

    @property
    def limits(self) -> Slice:
        """The slice with the limits that are in force."""
        return self.record.lowered or self.record.slice

    @property
    def full(self) -> Slice:
        """The slice with its own limits, also while it is parked and has none of them."""
        parked = self.record.parked
        return self.limits if parked is None else parked.full

    @property
    def owner(self) -> str:
        """The owner, for logs and metrics: ``user/server@hub``."""
        owner = self.record.slice.owner
        return f"{owner.user}/{owner.server}@{owner.hub}"

    @property
    def user(self) -> str:
        """Whose it is, whichever of the user's servers it is for."""
        owner = self.record.slice.owner
        return f"{owner.hub}/{owner.user}"

    @property
    def state(self) -> State:
        """Where the slice is in its life."""
        return self.record.state

    def save(self, **changes: object) -> None:
        """Change the record and write it."""
        record = self.record.model_copy(update=changes)
        slicedir.write_record(self.directory, record)
        self.record = record

    # ---- processes

    def adopt(self, pid: int) -> bool:
        """Take a running process and its descendants into the slice; return whether it was new.

        Raises
        ------
        Conflict
            There is no such process.
        """
        process = procs.find(pid)
        if process is None:
            raise Conflict(f"There is no process {pid} to adopt into slice {self.id}: it has ended already.", field="pid")
        if any(root.pid == pid and root.start_time == process.start_time for root in self.record.roots):
            return False
        cgroup = Path(self.record.cgroup) if self.record.cgroup else self._cgroups.create(self.id, pid)
        roots = [root for root in self.record.roots if Process(root.pid, root.start_time).alive()]
        self.save(
            roots=(*roots, Root(pid=pid, start_time=process.start_time)),
            state="releasing" if self.state == "releasing" else "running",
            cgroup=str(cgroup) if cgroup else None,
        )
        self._watch(process)
        self.gather()
        return True

    def gather(self) -> None:
        """Bring the roots and their descendants into the cgroup.

        The kernel takes its time to move a process (some ms): a thread waits for it. Until it is done the roots alone are known.
        """
        self.learn_descendants()
        if self.record.cgroup:
            path = Path(self.record.cgroup)
            pids = [root.pid for root in self.record.roots if not self._cgroups.holds(self.record.cgroup, root.pid)]
            future = asyncio.get_running_loop().run_in_executor(None, _move, self._cgroups, path, pids)
            future.add_done_callback(lambda done: None if done.cancelled() else self._gathered(path, done.result()))
        else:
            asyncio.get_running_loop().call_soon(self._gathered, None, True)

    def _gathered(self, path: Path | None, moved: bool) -> None:
        if path is not None and not moved:
            self._without_cgroup(path)
        if not self._closed:
            self.on_gathered()

    def _without_cgroup(self, path: Path) -> None:
        """The agent may not move a process of the slice: ancestry tells from now on who belongs to it."""
        if self.record.cgroup and not self._closed and self.has_root():
            self._cgroups.remove(path)
            self.save(cgroup=None)
            self.learn_descendants()

    def _watch(self, process: Process) -> None:
        if process.pid not in self._watches:
            self._watches[process.pid] = Watch(process, self._watched_ended)

    def _watched_ended(self, process: Process) -> None:
        self._watches.pop(process.pid, None)
        self._known.pop(process.pid, None)
        self._member_ended()

    def _member_ended(self) -> None:
        """Look who is left, soon: at once when it was quiet, seldom when thousands come and go."""
        if self._check is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._check = loop.call_at(max(loop.time(), self._next_check), self._look_who_is_left)

    def _look_who_is_left(self) -> None:
        self._check = None
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._on_exit(self)
        took = loop.time() - began
        self._next_check = began + took + min(CHECK_SECONDS_MOST, max(CHECK_SECONDS, CHECK_SHARE * took))

    def has_root(self) -> bool:
        """Return whether an adopted process still runs."""
        return any(root.pid in self._watches and self._watches[root.pid].alive() for root in self.record.roots)

    def _candidates(self) -> set[int]:
        """Return the pids of all processes of the slice, zombies among them."""
        if self.record.claim is not None:
            return self.container_processes() | self.tenant.holders()
        pids = {root.pid for root in self.record.roots if Process(root.pid, root.start_time).alive()} | self.tenant.holders()
        if self.record.cgroup:
            return pids | self._cgroups.members(Path(self.record.cgroup))
        return pids | {process.pid for process in self._known.values() if process.alive()}

    def members(self) -> set[int]:
        """Return the pids of all processes of the slice that live."""
        return {pid for pid in self._candidates() if procs.start_time(pid) is not None}

    def has_member(self, pid: int) -> bool:
        """Return whether a process is known to belong to the slice by other signs than its `use` file."""
        if pid in self._watches or pid in self._known:
            return True
        if self.record.claim is not None:
            return self._cgroups.pod_of(pid) in self.record.claim.pods
        return self.record.cgroup is not None and self._cgroups.holds(self.record.cgroup, pid)

    def holds(self, process: Process) -> bool:
        """Return whether exactly this process is known to belong to the slice, by such signs."""
        return self.has_member(process.pid) and self._known.get(process.pid, process) == process

    def knows(self, process: Process) -> bool:
        """Return whether exactly this process was learnt to descend from the slice's, whatever has become of those."""
        return self._known.get(process.pid) == process

    def learn_descendants(self) -> None:
        """Without a cgroup: remember who descends from the members now, for when those in between are gone."""
        if self.record.cgroup is None and (self._known or self.record.roots):
            live = [process.pid for process in self._known.values() if process.alive()]
            for pid in procs.descendants([*live, *(root.pid for root in self.record.roots)]):
                if pid not in self._known and (process := procs.find(pid)) is not None:
                    self._known[pid] = process

    def join_by_lock(self) -> bool:
        """A process that nobody announced holds a slot, or is in a container: the prepared slice runs. Return whether that is so."""
        if self.state == "prepared" and (self.tenant.holders() or self.tenant.locked_elsewhere() or self._in_container()):
            self.save(state="running")
            return True
        return False

    def _in_container(self) -> bool:
        """Return whether a container that has the slice runs: the sandbox, and containers without the claim, do not have its files."""
        return bool(self.container_processes())

    def container_processes(self) -> set[int]:
        """Return the live processes of the containers that have this slice of a claim."""
        claim = self.record.claim
        pids = self._cgroups.pod_members(claim.pods) if claim is not None else set[int]()
        spaces: dict[int, str] = {pid: space for pid in pids if (space := procs.mount_namespace(pid)) is not None}
        seen: set[str] = set()  # a container's processes share a mount namespace: one that finds the slice speaks for all
        looks = NAMESPACE_LOOKS
        for pid, space in sorted(spaces.items()):
            if space not in seen and looks:
                looks -= 1
                seen |= {space} if self.is_seen_by(pid) else set()
        return {pid for pid, space in spaces.items() if space in seen and procs.start_time(pid) is not None}

    def is_seen_by(self, pid: int) -> bool:
        """Return whether a process has this slice mounted where a container's is.

        By the kernel's list of its mounts: a look at the path could end in a file system that the tenant serves, and never return.
        """
        wanted = self._mount, self.directory.name
        return any((mount.device, Path(mount.root).name) == wanted for mount in procs.mounts(pid, CONTAINER_DIR))

    def over(self) -> bool:
        """Return whether the slice's last process is gone; until then watch those that are left."""
        if self.state == "prepared" or self.record.claim is not None or self.has_root():
            return False
        if any(watch.alive() for watch in self._watches.values()):
            return False
        watched = 0
        for pid in self._candidates():
            process = procs.find(pid)
            if process is not None:
                self._watch(process)
                watched += 1
            if watched == WATCHED:
                break
        return not watched and not self.tenant.locked_elsewhere()

    def reap(self, before_freeing: Callable[[], None]) -> list[UseRow]:
        """Free the slots of processes that are gone, with the overhead that was granted to them; return those in use after it."""
        rows = self.tenant.reap(before_freeing)
        for slot in self._granted - self.tenant.states.keys():
            self.ctl.words.overhead[slot] = 0
        self._granted &= self.tenant.states.keys()
        return rows

    def grant_overhead(self, slot: int, overhead_bytes: int) -> int:
        """Count so many bytes beyond what is tracked for the process of a slot, as `SlotState.grant` has it; return what counts now."""
        state = self.tenant.states[slot]
        before, granted = state.overhead_bytes, state.grant(overhead_bytes)
        if granted != before or slot not in self._granted:
            self.ctl.words.overhead[slot] = granted
            self._granted.add(slot)
        return granted

    # ---- limits

    @property
    def kernel_limits(self) -> dict[str, KernelLimit]:
        """The limits of its kernels that are in force: as they were set, in a slice of today's size."""
        now, of = share_milli(self.full), self.record.kernel_of_milli
        return {name: kernel_limit_in(limit, of.get(name, now), self.full) for name, limit in self.record.kernel_limits.items()}

    def set_kernel_limit(self, kernel_id: str, limit: KernelLimit) -> None:
        """Set or (both None) remove a kernel's limit; when the table is full, a limit of a kernel that holds nothing goes."""
        limits = {name: value for name, value in self.record.kernel_limits.items() if name != kernel_id}
        if limit.memory_bytes is not None or limit.compute_milli is not None:
            busy = {row.kernel_id for row in self.tenant.read()}
            idle = [name for name in limits if name not in busy]
            while len(limits) >= layout.KERNELS and idle:
                del limits[idle.pop(0)]
            if len(limits) >= layout.KERNELS:
                raise Conflict(f"{layout.KERNELS} kernels of this server have limits of their own already: remove one first.")
            limits[kernel_id] = limit
        of_milli = {name: self.record.kernel_of_milli[name] for name in limits if name in self.record.kernel_of_milli}
        if kernel_id in limits:
            of_milli[kernel_id] = share_milli(self.full)
        self.save(kernel_limits=limits, kernel_of_milli=of_milli)
        self.ctl.set_kernels(self.kernel_limits)

    # ---- kernels whose memory is on the host

    def save_away(self, kernel_id: str, entry: AwayKernel | None, written: Callable[[], None] = lambda: None) -> None:
        """Change what is recorded of a kernel whose memory is away, then tell the slice's processes; None: it is not any more.

        Parameters
        ----------
        written : callable
            Called in between.
        """
        others = {name: other for name, other in self.record.kernels_away.items() if name != kernel_id}
        self.save(kernels_away=others if entry is None else others | {kernel_id: entry})
        written()
        self.write_away()

    def write_away(self) -> None:
        """Tell the slice's processes whose memory is on the host and does not count, and whose is on its way."""
        words: dict[int, int] = {}
        for kernel_id, entry in self.record.kernels_away.items():
            there = entry.phase == "parked" and kernel_id not in self.coming_back
            words |= {slot: owner if there else owner ^ (2**64 - 1) for slot, owner in entry.slots}
        self.ctl.set_away(words)

    def on_host(self, row: UseRow) -> bool:
        """Return whether the memory of a slot's process is on the host, and counts nothing."""
        words = self.ctl.words
        return bool(words.kernels_away) and words.away[row.slot] == row.owner

    def coming_bytes(self, index: int) -> int:
        """Return what may be on its `index`-th device again, of kernels whose memory is on its way to the host or back."""
        moving = (one for name, one in self.record.kernels_away.items() if one.phase != "parked" or name in self.coming_back)
        return sum(one.device_bytes[index] for one in moving)

    def away(self, row: UseRow) -> bool:
        """Return whether it is there, or on its way there or back."""
        words = self.ctl.words
        return bool(words.kernels_away) and words.away[row.slot] in (row.owner, row.owner ^ (2**64 - 1))

    def counted_bytes(self, row: UseRow) -> int:
        """Return what a slot counts by the limiter's rule, were it not away."""
        words = self.ctl.words
        return row.used + row.context + min(words.overhead[row.slot], words.device[row.device].overhead_cap)

    # ---- usage

    def slots(self, rows: list[UseRow], now_ns: int) -> list[SlotUse]:
        """Return what each slot uses, with what the agent knows of it."""
        found: list[SlotUse] = []
        parked = self.record.parked
        away = {root.pid for root in parked.processes} if parked is not None and parked.phase == "parked" else set[int]()
        for row in rows:
            state = self.tenant.states[row.slot]
            on_host = (state.process is not None and state.process.pid in away) or self.on_host(row)
            found.append(
                SlotUse(
                    device=row.device,
                    kernel_id=row.kernel_id,
                    pid=state.process.pid if state.process else None,
                    memory_bytes=0 if on_host else row.used + row.context + state.overhead_bytes,
                    peak_bytes=max(row.peak, row.used + row.context) + state.overhead_bytes,
                    compute_milli=self.tenant.compute_milli(row, now_ns),
                    refusals=row.refusals,
                    launches=row.launches,
                    last_launch_ns=min(row.last_launch_ns, now_ns),
                )
            )
        return found

    def usage(self) -> Usage:
        """Return what the slice uses now, read from its files."""
        now_ns = time.monotonic_ns()
        slots = self.slots(self.tenant.read(), now_ns)
        limits, suspended = self.kernel_limits, [one.as_model() for one in self.record.suspended if not one.excused]
        seen = self.memory_doubts.seen, self.compute_doubts.seen
        found = slice_usage(self.full, slots, limits, *seen, self.backend, time.time(), now_ns, suspended, self.owner_resumes)
        away = {kernel_id: entry.as_model(found.time) for kernel_id, entry in self.record.kernels_away.items()}
        other = {name: limit for name, limit in self.record.kernel_limits.items() if limit != limits[name]}
        kernels = found.kernels
        if away or other:
            kernels = [
                one.model_copy(update={"away": away.get(one.kernel_id or ""), "limit_set": other.get(one.kernel_id or "")})
                for one in kernels
            ]
        return found.model_copy(update={"kernels": kernels, "may_suspend": self.may_suspend})

    def memory_by_device(self, kernel_id: str | None = None) -> list[int]:
        """Return the memory that the slice, or one kernel of it, uses on each of its devices."""
        slots = self.slots(self.tenant.read(), time.monotonic_ns())
        if kernel_id is not None:
            return memory_by_device(self.slice, [slot for slot in slots if kernel_id == slot.kernel_id])
        return memory_by_device(self.slice, slots, self.memory_doubts.seen)

    def memory_used_bytes(self) -> int:
        """Return the memory that the slice uses on all its devices together."""
        return sum(self.memory_by_device())

    def tick(self, wall: float, rows: list[UseRow]) -> list[SlotUse]:
        """Once a second: add a point to the history of what was just read; return what each slot uses."""
        now_ns = time.monotonic_ns()
        slots = self.slots(rows, now_ns)
        compute = compute_by_device(self.slice, slots, self.compute_doubts.seen)
        self.history.add(wall, memory_by_device(self.slice, slots, self.memory_doubts.seen), compute)
        if any(compute):
            for part, milli in zip(self.slice.devices, compute, strict=True):
                self.busy_seconds[part.uuid] = self.busy_seconds.get(part.uuid, 0.0) + milli / 1000
        self.tenant.tick(rows, now_ns)
        return slots

    def as_model(self) -> AgentSlice:
        """Return the slice as the API shows it."""
        return AgentSlice(
            slice=self.slice,
            lowered=self.record.lowered,
            state=self.state,
            process_count=len(self.members()),
            created=self.record.created,
            memory_used_bytes=self.memory_used_bytes(),
            backend=self.backend,
        )

    def close(self) -> None:
        """Let go of the files and processes; the slice itself goes on."""
        self._closed = True
        if self._check is not None:
            self._check.cancel()
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        self.tenant.close()
        self.ctl.close()


def _move(cgroups: Cgroups, path: Path, pids: list[int]) -> bool:
    """Move processes and their descendants into a cgroup, until no new one turned up meanwhile; False when it may not be done."""
    for pid in pids:
        if not cgroups.add(path, pid):
            return procs.start_time(pid) is None  # one that just ended is no obstacle
    # Children of those that are inside are born inside: each pass finds fewer, however fast they fork.
    for _ in range(MOVE_PASSES):
        outside = [pid for pid in procs.descendants(pids) if not cgroups.holds(str(path), pid)]
        moved = [pid for pid in outside if cgroups.add(path, pid)]
        if not moved:
            break
    return True
