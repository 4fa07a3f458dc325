"""The agent's clock: once a second usage, NVML and the watchdog; four times a second a look for refusals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from nbgpu.models import SliceDevice
from nbgpu.quantities import MIB, format_memory
from nbgpu.words import times

from . import layout
from .agent import Agent
from .cgroups import within
from .happened import Happened, short
from .live import LiveSlice
from .native import UseRow
from .nvml import DeviceSample, Nvml
from .offenders import Books, Held, Offence, judge
from .procs import Process, exiting, find, inner_pid, parent
from .responses import Responses
from .usage import SlotUse
from .watchdog import OVER_LIMIT_TOLERANCE_BYTES, Confirmed, Finding, SlotSeen, describe, judge_slice, overheads

log = logging.getLogger("nbgpu.agent")
TICK_SECONDS = 1.0
REFUSALS_SECONDS = 0.25
CONFIRM_SECONDS = 0.25
"""What one sample shows for the first time is looked at again so soon: told within two seconds, and not by mistake."""
LOOK_AGAIN_SECONDS = 1.0
LOOKS_BETWEEN = 3
"""So many before the next second's."""
DESCENDANTS_TICKS = 2
SIZE_TICKS = 3
HOSTILE_SECONDS = 60.0
UNWRITTEN_SECONDS = 60.0
"""So often it is logged that a slice's record cannot be written, which is tried each second."""
OWED_TOLD_NS = 100_000_000
"""GPU time taken beyond the turns in one look: from this on somebody is told, and not only charged."""
BURST_SECONDS = 0.7
FULL_BYTES = MIB
"""With less left than that a limit is full, in words."""
REFUSALS_MOST = 1_000_000
"""Of one slot, between two looks: more is nothing that a program did."""
REMEDY = "Free some or get a larger slice."  # short: JupyterLab cuts a notice after 140 characters


@dataclass
class Burst:
    """Refusals of one kernel that no event has told of yet."""

    count: int = 0
    row: UseRow | None = None
    last_event: float = 0.0


class Look(NamedTuple):
    """All that a slice is judged by on one device."""

    part: SliceDevice
    strict_milli: int | None
    slots: list[SlotSeen]
    words: list[tuple[int, int]]
    """Of each slot: its owner's, and its busy time."""
    memory: dict[int, int]


@dataclass
class SliceMemory:
    """What the monitor remembers of a slice."""

    bursts: dict[str, Burst] = field(default_factory=dict[str, Burst])
    hostile_at: float = -HOSTILE_SECONDS
    unwritten_at: float = -UNWRITTEN_SECONDS
    books: dict[str, Books] = field(default_factory=dict[str, Books])
    """By device: what offences are judged by."""
    seen_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """By device: what NVML saw of its processes at the last look that it answered; missing until it has."""
    seen_at: dict[str, float] = field(default_factory=dict[str, float])
    """When that look began, CLOCK_MONOTONIC seconds."""
    calm: dict[str, Look] = field(default_factory=dict[str, Look])
    """By device: the last look, where it found nothing to do and nothing computes; the same look finds the same."""
    happened: Happened = field(default_factory=Happened)


class Monitor:
    """Looks after all slices of an agent."""

    def __init__(self, agent: Agent, nvml: Nvml):
        self._agent = agent
        self._nvml = nvml
        # One thread: NVML may take its time, the loop goes on meanwhile.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nvml")
        self._confirmed = Confirmed()
        self._responses = Responses(agent, self._find_slice)
        self._offences: list[Offence] = []
        """Of the last look."""
        self._sampled_at = 0.0
        """When it began, CLOCK_MONOTONIC seconds."""
        self._blames = False
        """Whether offences were to be looked for in it."""
        self._memory: dict[str, SliceMemory] = {}
        self._slice_of_pid: dict[Process, str | None] = {}
        self._untold: set[str] = set()
        """Slices with refusals that no event has told of yet."""
        self._ticks = 0
        self._inherited: set[str] = set()
        """Slices that were here before this agent."""
        self.samples: dict[str, DeviceSample] = {}
        agent.last_look = self._last_look
        agent.seen_bytes = self._seen_bytes
        agent.look_again = self._look_again
        agent.checkpoints.room = self._room

    async def run(self) -> None:
        """Work until cancelled."""
        for live in self._agent.slices.values():
            self._pass_over_refusals(live)
        try:
            await asyncio.gather(self._every(TICK_SECONDS, self._tick), self._every(REFUSALS_SECONDS, self._look_for_refusals))
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _every(self, seconds: float, work: object) -> None:
        assert callable(work)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            try:
                result = work()
                if asyncio.iscoroutine(result):
                    await result
            except Exception:
                log.exception("The agent's watch over the slices met an error and goes on")
            due = max(due + seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    # ---- once a second

    async def _tick(self) -> None:
        self._ticks += 1
        agent = self._agent
        if self._ticks == 1:
            self._inherited = set(agent.slices)
        await self._take_samples()
        wall = time.time()
        rows_of: dict[str, list[UseRow]] = {}
        for live in list(agent.slices.values()):
            rows_of[live.id] = self._look_after(live, wall)
        findings = self._judge(rows_of)
        for live in list(agent.slices.values()):
            with self._writing(live):
                agent.settle(live)
        for finding in self._confirmed.pass_new(findings):
            self._report(finding)
        self._responses.look(self._offences, each_second=True)
        looks = LOOKS_BETWEEN
        while looks and (self._confirmed.waits() or self._responses.waits()):
            looks -= 1
            await asyncio.sleep(CONFIRM_SECONDS)
            await self._take_samples()
            rows_of = {live.id: agent.reap(live) for live in list(agent.slices.values())}
            for finding in self._confirmed.pass_again(self._judge(rows_of)):
                self._report(finding)
            self._responses.look(self._offences, each_second=False)
            if not self._responses.waits():
                break
        agent.sweep()
        agent.turns.keep_alive(agent.slices.values())
        for gone in self._memory.keys() - agent.slices.keys():
            del self._memory[gone]

    async def _take_samples(self) -> None:
        began = time.monotonic()
        self.samples = await asyncio.get_running_loop().run_in_executor(self._pool, self._sample)
        self._sampled_at = began

    def _sample(self) -> dict[str, DeviceSample]:
        return {uuid: self._nvml.sample(uuid) for uuid in list(self._agent.devices)}

    def _seen_bytes(self, live: LiveSlice) -> dict[str, int]:
        remembered = self._memory.get(live.id, SliceMemory())
        return {uuid: size for uuid, size in remembered.seen_bytes.items() if remembered.seen_at[uuid] > live.limits_at}

    async def _look_again(self, live: LiveSlice) -> None:
        """Ask the driver at once what a slice holds: who made it smaller is told. Where it takes its time the next look will do."""
        with contextlib.suppress(asyncio.TimeoutError):
            for uuid in [part.uuid for part in live.limits.devices if part.uuid in self._agent.devices]:
                began = time.monotonic()
                asked = asyncio.get_running_loop().run_in_executor(self._pool, self._nvml.held, uuid)
                found = await asyncio.wait_for(asked, LOOK_AGAIN_SECONDS)
                if found is not None and self._agent.slices.get(live.id) is live:
                    own = live.tenant.holding()
                    mine = [size for pid, size in found.items() if pid in own or self._is_of(live, pid)]
                    self._saw(live, uuid, sum(mine), began)

    def _is_of(self, live: LiveSlice, pid: int) -> bool:
        process = find(pid)
        return process is not None and self._slice_of(process) == live.id

    def _saw(self, live: LiveSlice, uuid: str, seen_bytes: int, began: float) -> None:
        remembered = self._memory.setdefault(live.id, SliceMemory())
        if began >= remembered.seen_at.get(uuid, 0.0):
            remembered.seen_bytes[uuid], remembered.seen_at[uuid] = seen_bytes, began

    async def _room(self, uuid: str, pids: Collection[int]) -> tuple[int, int] | None:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._nvml.room, uuid, pids)

    @contextlib.contextmanager
    def _writing(self, live: LiveSlice) -> Generator[None, None, None]:
        """Have nothing else wait for what writes a slice's record where that fails: on a full disk the watchdog looks on."""
        try:
            yield
        except OSError as error:
            memory = self._memory.setdefault(live.id, SliceMemory())
            now = time.monotonic()
            if now - memory.unwritten_at >= UNWRITTEN_SECONDS:
                memory.unwritten_at = now
                log.error("slice=%s owner=%s: its record cannot be written: %s", live.id, live.owner, error)

    def _look_after(self, live: LiveSlice, wall: float) -> list[UseRow]:
        agent = self._agent
        with self._writing(live):
            if live.join_by_lock():
                agent.touch()
        if self._ticks % DESCENDANTS_TICKS == 0:
            live.learn_descendants()
        rows = agent.reap(live)
        agent.parking.tick(live, rows)
        with self._writing(live):
            agent.away.tick(live)
        if live.state != "prepared":
            self._tell_happened(live, live.tick(wall, rows))
        if self._ticks % SIZE_TICKS == 0:
            live.tenant.check_size()
        if live.tenant.junk is not None:
            self._hostile(live, live.tenant.junk)
        agent.hold(live)
        if not live.has_root():
            agent.end_if_over(live)
        return rows

    def _tell_happened(self, live: LiveSlice, slots: list[SlotUse]) -> None:
        memory = self._memory.get(live.id)
        if memory is None:
            memory = self._memory[live.id] = SliceMemory()
        for one in memory.happened.look(slots, live.kernel_limits, time.monotonic()):
            self._agent.events.add(one.kind, "info", one.message, live.id, one.kernel_id, live.owner, **one.data)

    def _hostile(self, live: LiveSlice, what: str) -> None:
        memory = self._memory.setdefault(live.id, SliceMemory())
        now = time.monotonic()
        if now - memory.hostile_at >= HOSTILE_SECONDS:
            memory.hostile_at = now
            message = f"The usage file of {live.owner} is not as the limiter writes it: {what}. What it says of this slice is not believed."
            self._agent.events.add("hostile", "warning", message, live.id, owner=live.owner)

    # ---- NVML against the ledger

    def _judge(self, rows_of: dict[str, list[UseRow]]) -> list[Finding]:
        agent = self._agent
        findings: list[Finding] = []
        unknown: set[Process] = set()
        self._offences, self._blames = [], self._responses.needed
        # Who holds a slot is watched already: no look at /proc for them.
        holding: dict[int, Process] = {}
        known: dict[int, str] = {}
        on_device: dict[str, list[tuple[LiveSlice, int]]] = {}
        for live in agent.slices.values():
            own = live.tenant.holding()
            holding |= own
            known |= dict.fromkeys(own, live.id)
            for index, part in enumerate(live.limits.devices):
                on_device.setdefault(part.uuid, []).append((live, index))
        for uuid, sample in self.samples.items():
            agent.set_healthy(uuid, sample.error is None)
            by_slice: dict[str | None, list[int]] = {}
            for pid in sample.memory.keys() | sample.compute.keys():
                owner = known.get(pid)
                if owner is None:
                    process = find(pid)
                    if process is None or exiting(pid):  # of a process that just ended the driver shows the rest
                        continue
                    unknown.add(process)
                    holding[pid] = process
                    owner = self._slice_of(process)
                by_slice.setdefault(owner, []).append(pid)
            for pid in by_slice.pop(None, []):
                held = sample.memory.get(pid, 0)
                findings.append(Finding("foreign", None, ("foreign", uuid, pid), pid, held, 0, sample.compute.get(pid, 0)))
            for live, index in on_device.get(uuid, []):
                if live.id in rows_of:
                    pids = by_slice.pop(live.id, [])
                    findings += self._judge_slice(live, index, rows_of[live.id], pids, sample)
                    if self._blames and sample.error is None:
                        self._blame(live, index, rows_of[live.id], [holding[pid] for pid in pids], sample)
            for slice_id, pids in by_slice.items():
                # Processes of a slice on a device that it has no part of: all that they hold there is unlimited.
                memory = {pid: sample.memory[pid] for pid in pids if pid in sample.memory}
                findings += judge_slice(slice_id or "", uuid, 0, 0, None, [], memory, {}, {})
                if slice_id is not None and self._blames:
                    held = [Held(holding[pid], size, 0, None) for pid, size in memory.items() if not exiting(pid)]
                    self._offences += judge(slice_id, uuid, held, Books(0, 0), 0, None)
        self._slice_of_pid = {process: owner for process, owner in self._slice_of_pid.items() if process in unknown}
        return findings

    def _judge_slice(self, live: LiveSlice, index: int, rows: list[UseRow], pids: list[int], sample: DeviceSample) -> list[Finding]:
        """Judge a slice on its `index`-th device, and write what its processes there read: overheads, compute used."""
        part = live.limits.devices[index]
        cap = self._agent.overhead_caps.get(part.uuid, 0)
        rows = [row for row in rows if row.device == index]
        owed_ns = self._agent.turns.reconcile(live, index, sum(sample.computed_ns.get(pid, 0) for pid in pids))
        if owed_ns >= OWED_TOLD_NS:
            self._hostile(live, f"it says that nothing of it runs while GPU {part.index} computes for it")
        memory = {pid: sample.memory[pid] for pid in pids if pid in sample.memory}
        compute = {pid: sample.compute[pid] for pid in pids if sample.compute.get(pid)}
        strict = part.compute_milli if live.limits.mode == "strict" else None
        slots = [self._seen(live, row) for row in rows]
        look = Look(part, strict, slots, [(row.owner, row.busy_ns) for row in rows], memory)
        remembered = self._memory.setdefault(live.id, SliceMemory())
        seen_bytes = sum(memory.values())
        if sample.error is None:
            self._saw(live, part.uuid, seen_bytes, self._sampled_at)
        if not compute and remembered.calm.get(part.uuid) == look and not any(row.busy_since for row in rows):
            return []
        found = overheads(slots, memory, cap)
        # Of memory that is away NVML sees nothing: what was granted for it comes back with it.
        here = [row.slot for row in rows if not live.away(row)]
        granted = {slot: live.grant_overhead(slot, found.get(slot, (0, 0))[0]) for slot in here}
        now_ns = time.monotonic_ns()
        told = sum(live.tenant.compute_milli(row, now_ns) for row in rows)
        doubted = live.memory_doubts.look(index, seen_bytes, sum(seen.used + seen.context for seen in slots) + sum(granted.values()))
        doubted |= live.compute_doubts.look(index, sum(compute.values()), told)
        live.ctl.words.device[index].compute_used_milli = min(1000, max(told, live.compute_doubts.seen.get(index, 0)))
        findings = judge_slice(live.id, part.uuid, part.memory_bytes, cap, strict, slots, memory, compute, found)
        steady = all(granted.get(slot) == grant for slot, (grant, _) in found.items())
        if steady and not (told or doubted or findings):
            remembered.calm[part.uuid] = look
        else:
            remembered.calm.pop(part.uuid, None)
        return findings

    def _blame(self, live: LiveSlice, index: int, rows: list[UseRow], processes: list[Process], sample: DeviceSample) -> None:
        """Note who of a slice does on its `index`-th device what no process under the limiter can."""
        part = live.limits.devices[index]
        now, now_ns = time.monotonic(), time.monotonic_ns()
        held: list[Held] = []
        elsewhere = any(live.tenant.states[row.slot].elsewhere for row in rows if row.device == index)
        for process in processes:
            if exiting(process.pid):
                continue
            # A slot that only names it counts too: its lock may have been lost.
            own = [row for row in rows if row.device == index and (self._holds(live, row, process) or _names(row, process))]
            if not own and (elsewhere or process.start_time <= live.record.use_since):
                continue  # one of the slots that nobody here holds may be its, or it had one in the file that is gone
            busy = sum(live.tenant.compute_milli(row, now_ns) for row in own)
            told = sum(row.used + row.context for row in own if not live.on_host(row)) if own else None
            compute = sample.compute.get(process.pid, 0)
            held.append(Held(process, sample.memory.get(process.pid, 0), compute, told, sum(row.peak for row in own), busy))
        total = sum(one.memory_bytes for one in held)
        memory = self._memory.setdefault(live.id, SliceMemory())
        if part.uuid not in memory.books:
            # What an agent finds when it starts may be from before a limit was lowered: nobody knows any more.
            held_before = total if live.id in self._inherited else 0
            memory.books[part.uuid] = Books(part.memory_bytes, max(part.memory_bytes, held_before))
        memory.books[part.uuid].look(part.memory_bytes, total, now)
        cap = self._agent.overhead_caps.get(part.uuid, 0)
        strict = part.compute_milli if live.limits.mode == "strict" else None
        self._offences += judge(live.id, part.uuid, held, memory.books[part.uuid], cap, strict)

    @staticmethod
    def _holds(live: LiveSlice, row: UseRow, process: Process) -> bool:
        return live.tenant.states[row.slot].process == process

    @staticmethod
    def _seen(live: LiveSlice, row: UseRow) -> SlotSeen:
        state = live.tenant.states[row.slot]
        pid = state.process.pid if state.process is not None else None
        used, context, peak = (0, 0, 0) if live.on_host(row) else (row.used, row.context, row.peak)
        return SlotSeen(row.slot, pid, used, context, state.elsewhere, peak)

    @staticmethod
    def _pid(live: LiveSlice, row: UseRow) -> int | None:
        process = live.tenant.states[row.slot].process
        return process.pid if process is not None else None

    def _slice_of(self, process: Process) -> str | None:
        """Return the slice that a process belongs to: by its cgroup, by the slot it holds, by its ancestors."""
        found = self._slice_of_pid.get(process)
        if found is None:  # one of no slice may be adopted yet
            self._slice_of_pid[process] = found = self._find_slice(process)
        return found

    def _find_slice(self, process: Process) -> str | None:
        slices = self._agent.slices
        path = self._agent.cgroups.full_path(process.pid)
        if path is not None:
            for live in slices.values():
                if live.record.cgroup is not None and within(path, live.record.cgroup):
                    return live.id
            pod = self._agent.cgroups.pod_of(process.pid)
            held = [live for live in slices.values() if live.record.claim is not None and pod in live.record.claim.pods]
            if held:  # in a pod with several claims each container has its own
                return next((live.id for live in held[1:] if live.is_seen_by(process.pid)), held[0].id)
        roots = {root.pid: live.id for live in slices.values() for root in live.record.roots}
        holders = {pid: live.id for live in slices.values() for pid in live.tenant.holders()}
        pid: int | None = process.pid
        while pid is not None and pid > 1:
            owner = holders.get(pid) or roots.get(pid)
            if owner is not None:
                return owner
            pid = parent(pid)
        # of slices in slices the inner one is the later one
        return next((live.id for live in reversed(list(slices.values())) if live.knows(process)), None)

    def _report(self, finding: Finding) -> None:
        agent = self._agent
        live = agent.slices.get(finding.slice_id or "")
        device = agent.devices.get(finding.device)
        message = describe(finding, f"GPU {device.index}" if device is not None else "a GPU")
        kernel = next((k for k in self._kernels(live) if k[0] == finding.pid), (None, None))[1] if live is not None else None
        agent.events.add(
            finding.kind,
            "warning" if finding.kind != "unlimited" else "error",
            message,
            finding.slice_id,
            kernel or None,
            live.owner if live is not None else "",
            pid=finding.pid,
            memory_bytes=finding.memory_bytes,
            allowed_bytes=finding.allowed_bytes,
            compute_milli=finding.compute_milli,
        )

    def _kernels(self, live: LiveSlice) -> list[tuple[int | None, str]]:
        return [(self._pid(live, row), row.kernel_id) for row in live.tenant.read()]

    # ---- refusals

    def _look_for_refusals(self) -> None:
        slices = list(self._agent.slices.values())
        for live, word in zip(slices, self._agent.native.use_events([live.tenant.fd for live in slices]), strict=True):
            if word != live.tenant.events_word or (self._untold and live.id in self._untold):
                self._look_at_refusals(live, word)
        self._agent.parking.look()
        self._agent.away.look()
        if self._untold:
            self._untold &= self._agent.slices.keys()

    def _last_look(self, live: LiveSlice) -> None:
        self._look_at_refusals(live, self._agent.native.use_events([live.tenant.fd])[0])

    def _pass_over_refusals(self, live: LiveSlice) -> None:
        """An earlier agent has told of these: when they were, and under which limits, nobody knows any more."""
        live.tenant.events_word = self._agent.native.use_events([live.tenant.fd])[0]
        for row in live.tenant.read():
            live.tenant.states[row.slot].refusals = row.refusals

    def _look_at_refusals(self, live: LiveSlice, word: int) -> None:
        """Tell of new refusals: once in `BURST_SECONDS` for each kernel, all of them when the process that the slice was for is gone."""
        if word != live.tenant.events_word:
            live.tenant.events_word = word
            self._collect(live, self._memory.setdefault(live.id, SliceMemory()))
            self._untold.add(live.id)
        if live.id not in self._untold:
            return
        now = time.monotonic()
        last = live.record.claim is None and live.state != "prepared" and not live.has_root()
        untold = [burst for burst in self._memory[live.id].bursts.values() if burst.count]
        due = [burst for burst in untold if last or now - burst.last_event >= BURST_SECONDS]
        slots = live.slots(live.tenant.read(), time.monotonic_ns()) if due else []  # once for all: a tenant may have many
        for burst in due:
            if burst.row is not None:
                self._tell_refusal(live, burst.row, burst.count, slots)
                burst.count, burst.last_event = 0, now
        if not untold:
            self._untold.discard(live.id)

    @staticmethod
    def _collect(live: LiveSlice, memory: SliceMemory) -> None:
        for row in live.tenant.read():
            state = live.tenant.states[row.slot]
            fresh = min(row.refusals - state.refusals, REFUSALS_MOST)
            state.refusals = row.refusals
            if fresh <= 0:
                continue
            live.refusals += fresh
            if row.kernel_id not in memory.bursts and len(memory.bursts) >= layout.KERNELS:
                memory.bursts = {name: burst for name, burst in memory.bursts.items() if burst.count}
            if row.kernel_id in memory.bursts or len(memory.bursts) < layout.KERNELS:
                burst = memory.bursts.setdefault(row.kernel_id, Burst())
                burst.count += fresh
                burst.row = row

    def _tell_refusal(self, live: LiveSlice, row: UseRow, count: int, slots: list[SlotUse]) -> None:
        part = live.limits.devices[row.device]
        slots = [slot for slot in slots if slot.device == row.device]
        limit = live.kernel_limits.get(row.kernel_id)
        slice_used = used = sum(slot.memory_bytes for slot in slots)
        allowed, which = part.memory_bytes, "slice"
        if row.refused_by == layout.REFUSED_DRIVER:
            which = "device"
            # The driver counts who tells nothing, too.
            seen = max(slice_used, self._memory[live.id].seen_bytes.get(part.uuid, 0))
            if live.backend == "driver" and seen + row.refused_bytes + OVER_LIMIT_TOLERANCE_BYTES > part.memory_bytes:
                which, used = "slice", seen
        elif limit is not None and limit.memory_bytes is not None:
            own = sum(slot.memory_bytes for slot in slots if slot.kernel_id == row.kernel_id)
            # The limiter looks at the slice first: where the kernel's own limit forbids it too, a larger slice would not help.
            if row.refused_by == layout.REFUSED_KERNEL or own + row.refused_bytes > limit.memory_bytes < part.memory_bytes:
                allowed, which, used = limit.memory_bytes, "kernel", own
        both = which == "kernel" and slice_used + row.refused_bytes > part.memory_bytes
        message = refusal_message(row.kernel_id, row.refused_bytes, count, which, allowed, used, both)
        self._agent.events.add(
            "refused",
            "warning",
            message,
            live.id,
            row.kernel_id or None,
            live.owner,
            count=count,
            refused_bytes=row.refused_bytes,
            limit_bytes=allowed,
            used_bytes=used,
            limit=which,
            device=part.uuid,
        )


def refusal_message(
    kernel_id: str, refused_bytes: int, count: int, which: str, allowed_bytes: int, used_bytes: int, both: bool = False
) -> str:
    """Return what a person should know of a refusal: who asked for what, whose limit refused, what to do.

    `both`: the kernel's own limit is in the way, and without it the slice would be.
    """
    who = f"Notebook kernel {short(kernel_id)}" if kernel_id else "A program of this server"
    often = f" ({times(count)})" if count > 1 else ""
    refused = f"{who} was refused {format_memory(refused_bytes)}{often}"
    if which == "device":
        return f"{refused}: the GPU itself had no room, though this server's slice has. Try again; if it stays so, tell your administrator."
    limit = "its own limit" if which == "kernel" else "this server's slice"
    remedy = REMEDY
    if which == "kernel":
        remedy = "Free memory: the slice has no room either." if both else "Free memory in it, or raise its limit."
    left = allowed_bytes - used_bytes
    if left >= refused_bytes:  # freed since, or its holder died
        return f"{refused}: {limit} of {format_memory(allowed_bytes)} was too full then ({format_memory(used_bytes)} in use now). {remedy}"
    state = f"is full ({format_memory(used_bytes)} in use)" if left < FULL_BYTES else f"has {format_memory(left)} left"
    return f"{refused}: {limit} of {format_memory(allowed_bytes)} {state}. {remedy}"


def _names(row: UseRow, process: Process) -> bool:
    """Return whether a slot names a process as its owner, by its pid here or where it lives."""
    return row.start_time == process.start_time and row.pid in (process.pid, inner_pid(process.pid))


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
