"""Judges what NVML says of processes against what their slices tell. Pure: samples in, verdicts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nbgpu.quantities import MIB, format_memory

CONFIRM_SAMPLES = 2
"""NVML and the ledger are read one after the other: only what both of two samples show is told."""
COMPUTE_CONFIRM_SAMPLES = 5
COMPUTE_TOLERANCE_MILLI = 50
OVER_LIMIT_TOLERANCE_BYTES = 64 * MIB
"""The driver takes memory in larger pieces than programs ask for."""


class SlotSeen(NamedTuple):
    """A slot of a slice on the device that is judged; bytes."""

    slot: int
    pid: int | None
    used: int
    context: int
    elsewhere: bool = False
    """Its owner has no pid here."""
    peak: int = 0
    """The most that it has told."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, on one device."""

    kind: Literal["unlimited", "overhead", "over-limit", "over-share", "foreign"]
    slice_id: str | None
    key: tuple[object, ...]
    """The same for the same case in the next sample."""
    pid: int | None
    memory_bytes: int
    allowed_bytes: int
    compute_milli: int = 0
    samples_needed: int = CONFIRM_SAMPLES

    @property
    def device(self) -> str:
        """The UUID of the device."""
        return str(self.key[2] if self.slice_id is not None else self.key[1])


def deed(kind: str, gpu: str, memory_bytes: int, allowed_bytes: int, compute_milli: int, *, by_server: bool) -> str:
    """Return what was done, to follow "This server", "Process 12" or "it"; short, because JupyterLab cuts a notice after 140 characters."""
    held, allowed = format_memory(memory_bytes), format_memory(allowed_bytes)
    if kind == "unlimited":
        return f"used {gpu} ({held}) without nbgpu's limiter"
    if kind == "overhead":
        return f"held {held} of {gpu} past nbgpu's limiter"
    if kind == "foreign":
        return f"used {gpu} ({held}) and belongs to no slice of this node"
    if kind == "over-share":
        return f"used {compute_milli / 10:.0f} % of the time of {gpu}, past its share"
    whose = f"of its {allowed}" if allowed_bytes else "without a part there"
    return f"holds {held} on {gpu}, {whose}" if by_server else f"took this server to {held} {whose}"


def describe(finding: Finding, gpu: str) -> str:
    """Return what happened and what to do, for the slice's owner and the log; `gpu` is how the device is called here."""
    who = f"Process {finding.pid}" if finding.pid is not None else "This server"
    remedy = {
        "unlimited": "Start it without changing LD_PRELOAD, or stop it.",
        "overhead": f"Up to {format_memory(finding.allowed_bytes)} are granted. Restart it to give the memory back.",
        "foreign": "Its memory is not counted by nbgpu.",
        "over-share": "Look for programs that were started without nbgpu's limiter.",
        "over-limit": "Free memory, or restart it." if finding.allowed_bytes else "End what runs there, or restart it.",
    }[finding.kind]
    what = deed(finding.kind, gpu, finding.memory_bytes, finding.allowed_bytes, finding.compute_milli, by_server=finding.pid is None)
    return f"{who} {what}. {remedy}"


def overheads(slots: Sequence[SlotSeen], nvml: Mapping[int, int], cap_bytes: int) -> dict[int, tuple[int, int]]:
    """Return for each slot that NVML knows (granted, measured) overhead in bytes: NVML - tracked - context, granted up to the cap.

    The slots of one process on the device share its overhead: the first one carries it.
    """
    tracked: dict[int, int] = {}
    first: dict[int, int] = {}
    for seen in slots:
        if seen.pid is not None and seen.pid in nvml:
            tracked[seen.pid] = tracked.get(seen.pid, 0) + seen.used + seen.context
            first.setdefault(seen.pid, seen.slot)
    found: dict[int, tuple[int, int]] = {}
    for pid, slot in first.items():
        measured = max(0, nvml[pid] - tracked[pid])
        found[slot] = (min(measured, cap_bytes), measured)
    return found


def judge_slice(
    slice_id: str,
    device: str,
    limit_bytes: int,
    cap_bytes: int,
    strict_milli: int | None,
    slots: Sequence[SlotSeen],
    memory: Mapping[int, int],
    compute: Mapping[int, int],
    measured_overheads: Mapping[int, tuple[int, int]],
) -> list[Finding]:
    """Judge one slice on one device.

    Parameters
    ----------
    strict_milli : int or None
        Its share when its mode is strict, else None.
    memory, compute : mapping of pid
        What NVML says of this slice's processes on the device: bytes, milli-GPU.
    measured_overheads : mapping of slot
        What `overheads` says of these slots and this memory.
    """
    found: list[Finding] = []
    told = {seen.pid for seen in slots if seen.pid is not None}
    # A slot whose owner has no pid here could be any of them. One that nobody holds is nobody's, whatever it says.
    if not any(seen.elsewhere for seen in slots):
        for pid in sorted((memory.keys() | compute.keys()) - told):
            held, busy = memory.get(pid, 0), compute.get(pid, 0)
            if held or busy:
                found.append(Finding("unlimited", slice_id, ("unlimited", slice_id, device, pid), pid, held, 0, busy))
    pid_of = {seen.slot: seen.pid for seen in slots}
    for slot in measured_overheads:
        pid = pid_of[slot]
        assert pid is not None
        beyond = memory[pid] - _told_bytes([seen for seen in slots if seen.pid == pid], limit_bytes)
        if beyond > cap_bytes:
            found.append(Finding("overhead", slice_id, ("overhead", slice_id, device, pid), pid, beyond, cap_bytes))
    total = sum(memory.values())
    if total > limit_bytes + OVER_LIMIT_TOLERANCE_BYTES:
        found.append(Finding("over-limit", slice_id, ("memory", slice_id, device), None, total, limit_bytes))
    busy = sum(compute.values())
    if strict_milli is not None and busy > strict_milli + COMPUTE_TOLERANCE_MILLI:
        key = ("compute", slice_id, device)
        found.append(Finding("over-share", slice_id, key, None, total, limit_bytes, busy, COMPUTE_CONFIRM_SAMPLES))
    return found


def _told_bytes(slots: Sequence[SlotSeen], limit_bytes: int) -> int:
    """Return what a process may have told when the driver was asked, a moment before: up to its peak, and no more than its slice."""
    now = sum(seen.used + seen.context for seen in slots)
    return max(now, min(sum(seen.peak for seen in slots), limit_bytes))


class Confirmed:
    """Lets a finding through once, when enough samples in a row showed it; again only after it was away."""

    def __init__(self) -> None:
        self._streaks: dict[tuple[object, ...], int] = {}

    def pass_new(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return the findings of this sample that have just been confirmed."""
        streaks = {finding.key: self._streaks.get(finding.key, 0) + 1 for finding in findings}
        self._streaks = streaks
        return [finding for finding in findings if streaks[finding.key] == finding.samples_needed]

    def waits(self) -> bool:
        """Return whether one sample more, ahead of its time, would confirm something."""
        return any(streak < CONFIRM_SAMPLES for streak in self._streaks.values())

    def pass_again(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return what a sample ahead of its time confirms; it ends no streak, and what needs several seconds is left as it is."""
        passed: list[Finding] = []
        for finding in findings:
            if finding.samples_needed == CONFIRM_SAMPLES and self._streaks.get(finding.key) == CONFIRM_SAMPLES - 1:
                self._streaks[finding.key] = CONFIRM_SAMPLES
                passed.append(finding)
        return passed
