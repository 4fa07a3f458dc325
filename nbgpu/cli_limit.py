"""``nbgpu limit``: the kernels of a slice with their limits, and setting them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cli_common import SHORT_ID, agent, console, find_slice, own_slice, percent, print_json
from .client import AgentClient, SliceClient
from .errors import NbgpuError
from .models import KernelLimit, KernelUsage, Usage
from .quantities import format_memory, format_memory_of, parse_memory

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Target:
    """One slice, reached from inside through its own socket or, as admin, through the agent's."""

    api: SliceClient | AgentClient
    slice_id: str

    def usage(self) -> Usage:
        """Return its use."""
        return self.api.usage() if isinstance(self.api, SliceClient) else self.api.usage(self.slice_id)

    def set_kernel_limit(self, kernel_id: str, limit: KernelLimit) -> KernelLimit:
        """Set a kernel's limit."""
        if isinstance(self.api, SliceClient):
            return self.api.set_kernel_limit(kernel_id, limit)
        return self.api.set_kernel_limit(self.slice_id, kernel_id, limit)


def target(slice_start: str | None) -> Target:
    """Return the slice that is meant: this server's own, else the one whose id begins with `slice_start`."""
    own = own_slice()
    if own is not None and slice_start is None:
        return Target(own, own.slice().slice_id)
    known = find_slice(agent().slices().slices, slice_start)
    return Target(agent(), known.slice.slice_id)


def list_kernels(slice_start: str | None, *, as_json: bool) -> None:
    """Print the kernels of a slice."""
    usage = target(slice_start).usage()
    if as_json:
        print_json({"slice_id": usage.slice_id, "kernels": [kernel.model_dump(mode="json") for kernel in usage.kernels]})
    elif usage.kernels:
        console().print(kernels_table(usage))
    else:
        console().print(f"No process of slice {usage.slice_id[:SHORT_ID]} uses the GPU yet.")


def set_limit(start: str, slice_start: str | None, *, memory: str | None, clear: bool, as_json: bool) -> None:
    """Set or clear the limit of the kernel whose id begins with `start`."""
    if clear and memory:
        raise NbgpuError("--clear takes the limit away: give it without --memory.", code="invalid", status=400, field="--clear")
    if not (clear or memory):
        raise NbgpuError("Say what it may have: --memory 5GiB, or --clear.", code="invalid")
    chosen = target(slice_start)
    kernel = find_kernel(chosen.usage().kernels, start)
    assert kernel.kernel_id is not None
    limit = KernelLimit(memory_bytes=parse_memory(memory, "--memory")) if memory else KernelLimit()
    limit = chosen.set_kernel_limit(kernel.kernel_id, limit)
    if as_json:
        print_json({"slice_id": chosen.slice_id, "kernel_id": kernel.kernel_id, "limit": limit.model_dump(mode="json")})
    else:
        print(f"Kernel {kernel.kernel_id[:SHORT_ID]}: memory {memory_words(limit)}.")


def find_kernel(kernels: list[KernelUsage], start: str) -> KernelUsage:
    """Return the kernel whose id begins with `start`."""
    found = [kernel for kernel in kernels if kernel.kernel_id is not None and kernel.kernel_id.startswith(start)]
    if len(found) != 1:
        count = "More than one" if found else "No"
        raise NbgpuError(f"{count} kernel's id begins with {start!r}; `nbgpu limit` lists them.", code="kernel")
    return found[0]


def kernels_table(usage: Usage) -> RenderableType:
    """Return one row a kernel: what it holds, and its limits."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "processes", "GPU", "memory", "peak", "time used", "memory limit", "refused"):
        table.add_column(name, no_wrap=name in ("kernel", "memory", "peak"))
    index = {use.uuid: (use.index, use.memory_limit_bytes) for use in usage.devices}
    for kernel in usage.kernels:
        for number, use in enumerate(kernel.devices):
            device, slice_limit = index.get(use.uuid, (-1, 0))
            limit = kernel.limit.memory_bytes if kernel.limit.memory_bytes is not None else slice_limit
            head = [kernel.kernel_id or "(other)", " ".join(map(str, kernel.pids[:5]))] if number == 0 else ["", ""]
            tail = [memory_words(kernel.limit), str(kernel.refusals)] if number == 0 else ["", ""]
            held = [format_memory_of(use.memory_used_bytes, limit), format_memory(use.memory_peak_bytes), percent(use.compute_used_milli)]
            table.add_row(*head, str(device), *held, *tail)
    return table


def memory_words(limit: KernelLimit) -> str:
    """Return a kernel's memory limit for people."""
    return "the slice's" if limit.memory_bytes is None else format_memory(limit.memory_bytes)
