"""Whether a slice is idle and may be parked (docs/idle.md). Pure: what was seen and what the time is are told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from nbgpu.quantities import GIB, format_memory

from .native import UseRow

REPORT_SECONDS = 30.0
"""So long what the Jupyter server said of its kernels holds."""
REFUSED_SECONDS = 600.0
"""So long a slice that could not be parked is not tried again."""
KEPT_BACK = 20
"""A twentieth of the host's memory stays available whatever is parked, and at least a GiB."""
HEARD_SECONDS = 10.0
"""As often those who follow the slices ask by themselves (`nbgpu_pool.ledger`)."""
MOST_KERNELS = 256

Signature = tuple[tuple[int, ...], ...]


def signature(rows: Iterable[UseRow]) -> Signature:
    """Return what changes whenever a slice's processes do something on a GPU."""
    return tuple(
        (row.slot, row.owner, row.launches, row.busy_ns, row.busy_since, row.allocs, row.frees, row.copied_bytes, row.refusals, row.want)
        for row in rows
    )


@dataclass
class IdleWatch:
    """What is known of one slice. Times are Unix seconds."""

    active_at: float
    """When it did something last, or a kernel of it was busy."""
    seen: Signature = ()
    kernels: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """By kernel: whether it is busy, in the words of the Jupyter server."""
    told_at: float = 0.0
    busy_at: float = 0.0
    """When any kernel was busy last, also one that has nothing on a GPU."""
    unused: float = 0.0
    """For how long it had not been used at the last look, seconds."""
    could: bool = False
    """It could be parked at the last look."""
    refused_until: float = 0.0
    refused_why: str = ""

    def look(self, rows: Iterable[UseRow], now: float) -> None:
        """Note what the slice's processes have done since the last look."""
        found = signature(rows)
        if found != self.seen or any(row.busy_since or row.want for row in rows):
            self.seen, self.active_at = found, now

    def hear(self, kernels: Mapping[str, bool], on_gpu: Collection[str], now: float) -> bool:
        """Note what the Jupyter server says; return whether one of the kernels `on_gpu` is busy."""
        self.kernels, self.told_at = dict(kernels), now
        if any(kernels.values()):
            self.busy_at = now
        busy = any(kernels.get(kernel_id) for kernel_id in on_gpu)
        if busy:
            self.active_at = now
        return busy

    def unused_seconds(self, protected: Collection[str], now: float) -> float | None:
        """Return how long nothing has used the slice's GPUs and no kernel has been busy, whatever it holds.

        None: one is now, its Jupyter server does not tell (a program of `nbgpu run` has none), or one of its kernels is protected.
        """
        told = now - self.told_at <= REPORT_SECONDS
        if not told or any(self.kernels.values()) or any(kernel_id in self.kernels for kernel_id in protected):
            return None
        return max(0.0, now - max(self.active_at, self.busy_at))

    def used_again(self, protected: Collection[str], now: float) -> bool:
        """Note for how long it has not been used; return whether it is again, after so long that others may have heard of it."""
        before, self.unused = self.unused, self.unused_seconds(protected, now) or 0.0
        return self.unused < before >= HEARD_SECONDS

    def refuse(self, why: str, now: float) -> None:
        """Leave it alone for a while."""
        self.refused_why, self.refused_until = why, now + REFUSED_SECONDS

    def why_not(self, rows: Collection[UseRow], protected: Collection[str], now: float) -> str | None:
        """Return why the slice cannot be parked now, in words; None when it can."""
        if now < self.refused_until:
            return self.refused_why
        if not any(row.used + row.context for row in rows):
            return "it holds no GPU memory"
        if any(not row.kernel_id for row in rows):
            return "a program that is no notebook kernel holds GPU memory in it"
        if now - self.told_at > REPORT_SECONDS:
            return "its Jupyter server has not told which kernels are busy"
        for row in rows:
            if row.kernel_id in protected:
                return "one of its kernels is protected"
            if self.kernels.get(row.kernel_id, True):
                return "one of its kernels is busy, or not one of its Jupyter server"
        return None


def host_refusal(needed_bytes: int, parked_bytes: int, most_bytes: int, available_bytes: int, total_bytes: int) -> str | None:
    """Return why the host's memory is too small for one more parked slice; None when it is not.

    Parameters
    ----------
    needed_bytes : int
        What the slice holds on its GPUs.
    parked_bytes, most_bytes : int
        What is parked already, and what may be in all.
    available_bytes, total_bytes : int
        Of the host's memory.
    """
    if parked_bytes + needed_bytes > most_bytes:
        left = format_memory(max(0, most_bytes - parked_bytes))
        return f"it holds {format_memory(needed_bytes)}, and {left} of host memory is left for parked slices (--idle-host-memory)"
    if available_bytes - needed_bytes < max(GIB, total_bytes // KEPT_BACK):
        return f"it holds {format_memory(needed_bytes)}, and the host has {format_memory(available_bytes)} of memory available"
    return None


def parse_meminfo(text: str) -> tuple[int, int]:
    """Return (available, total) bytes of the host's memory as /proc/meminfo tells; 0 for what it does not."""
    found = {line.partition(":")[0]: line.split() for line in text.splitlines()}
    available, total = found.get("MemAvailable", ()), found.get("MemTotal", ())
    return (int(available[1]) * 1024 if len(available) > 1 else 0, int(total[1]) * 1024 if len(total) > 1 else 0)
