"""``nbgpu limit``: the kernels of a slice with their limits, and setting them."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .cli_common import SHORT_ID, agent, console, find_slice, own_slice, percent, print_json, short_ids, slice_name
from .client import AgentClient, SliceClient
from .errors import NbgpuError
from .kernel_limits import kernel_limit, part_milli
from .kernel_names import KernelName, read_names
from .models import KernelAway, KernelLimit, KernelUsage, Usage
from .quantities import WHOLE_MILLI, format_memory, format_memory_of

if TYPE_CHECKING:
    from rich.console import RenderableType

LABELS = {"memory": "--memory", "compute": "--compute"}
OVER = "bold red"
DROP = ("peak", "pids", "refused", "GPU", "time used")
"""What a narrow terminal shows without, the least useful first."""
TIME_LEGEND = "A time limit is a part of the slice's time; in brackets, of the GPU's."
LARGEST_DENOMINATOR = 16


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

    def resume(self, pid: int) -> None:
        """Let a suspended process go on."""
        if isinstance(self.api, SliceClient):
            self.api.resume(pid)
        else:
            self.api.resume(self.slice_id, pid)


def target(slice_start: str | None) -> Target:
    """Return the slice that is meant: this server's own, else the one whose id begins with `slice_start`."""
    own = own_slice()
    if own is not None and slice_start is None:
        return Target(own, own.slice().slice_id)
    known = find_slice(agent().slices().slices, slice_start)
    return Target(agent(), known.slice.slice_id)


@dataclass(frozen=True)
class Seen:
    """The slices that a command without a kernel looks at."""

    usages: list[Usage]
    names: list[str]
    """What each is called: its id, and as admin its owner."""
    several: bool
    """All of the machine are meant: none was named, and this is no server's terminal."""

    def as_json(self, of_one: Callable[[Usage], dict[str, Any]]) -> dict[str, Any]:
        """Return them for programs: the one slice that was meant, else a list of all."""
        found = [of_one(usage) for usage in self.usages]
        return {"slices": found} if self.several else found[0]


def look(slice_start: str | None) -> Seen:
    """Return the slice that is meant; as admin, outside of a server and with none named, all."""
    if slice_start is not None or own_slice() is not None:
        usage = target(slice_start).usage()
        return Seen([usage], [usage.slice_id[:SHORT_ID]], several=False)
    usages = {usage.slice_id: usage for usage in agent().all_usage()}
    known = [one for one in sorted(agent().slices().slices, key=lambda one: one.created) if one.slice.slice_id in usages]
    return Seen([usages[one.slice.slice_id] for one in known], [slice_name(one) for one in known], several=True)


def list_kernels(slice_start: str | None, *, as_json: bool) -> None:
    """Print the kernels of a slice, or of all."""
    seen = look(slice_start)
    if as_json:
        print_json(seen.as_json(kernels_json))
        return
    for usage, name in zip(seen.usages, seen.names, strict=True):
        names = read_names(usage.slice_id)
        if not all_kernels(usage, names):
            console().print(f"No process of slice {name} uses the GPU yet, and no kernel of it is known.")
            continue
        if seen.several:
            console().print(f"Slice {name}")
        console().print(kernels_table(usage, names))
    if not seen.usages:
        console().print("No slices.")


def kernels_json(usage: Usage) -> dict[str, Any]:
    """Return the kernels of a slice for programs."""
    names = read_names(usage.slice_id)
    kernels = [kernel.model_dump(mode="json") | name_json(names, kernel.kernel_id) for kernel in all_kernels(usage, names)]
    return {"slice_id": usage.slice_id, "kernels": kernels}


def set_limit(start: str, slice_start: str | None, *, memory: str | None, compute: str | None, clear: bool, as_json: bool) -> None:
    """Set or clear the limits of one kernel; one that is not named stays."""
    if clear and (memory or compute):
        given = "--memory" if memory else "--compute"
        raise NbgpuError(f"--clear takes the limits away: give it without {given}.", code="invalid", status=400, field="--clear")
    if not (clear or memory or compute):
        raise NbgpuError("Say what it may have: --memory 5GiB, --compute 1/2, or --clear.", code="invalid")
    chosen = target(slice_start)
    usage = chosen.usage()
    names = read_names(usage.slice_id)
    kernel = find_kernel(all_kernels(usage, names), start, names)
    assert kernel.kernel_id is not None
    limit = KernelLimit() if clear else wanted(kernel.limit, memory, compute, usage)
    limit = chosen.set_kernel_limit(kernel.kernel_id, limit)
    if as_json:
        found = {"kernel_id": kernel.kernel_id, "limit": limit.model_dump(mode="json")} | name_json(names, kernel.kernel_id)
        print_json({"slice_id": chosen.slice_id} | found)
        return
    what = f"{kernel_name(kernel.kernel_id, names)}: memory {memory_words(limit)}, {compute_words(limit, usage)}."
    console().print(what, soft_wrap=True)
    held = max((use.memory_used_bytes for use in kernel.devices), default=0)
    if limit.memory_bytes is not None and held > limit.memory_bytes:
        print(f"It holds {format_memory(held)}, more than that: it keeps what it holds and is refused more until it frees some.")


def wanted(now: KernelLimit, memory: str | None, compute: str | None, usage: Usage) -> KernelLimit:
    """Return a kernel's limits as they shall be: what is not named stays as it is `now`."""
    asked: dict[str, Any] = {"memory": memory, "compute": compute}
    written = kernel_limit({name: text for name, text in asked.items() if text}, [use.model_dump() for use in usage.devices], LABELS)
    return now.model_copy(update={name: value for name, value in written.items() if value is not None})


def all_kernels(usage: Usage, names: dict[str, KernelName]) -> list[KernelUsage]:
    """Return the kernels that hold or are limited, then those that the server alone knows, then everything else in the slice."""
    seen = {kernel.kernel_id for kernel in usage.kernels}
    quiet = [
        KernelUsage(kernel_id=one, pids=[], limit=KernelLimit(), devices=[], refusals=0, launches=0, idle_seconds=None)
        for one in names
        if one not in seen
    ]
    return sorted([*usage.kernels, *quiet], key=lambda kernel: kernel.kernel_id is None)


def find_kernel(kernels: list[KernelUsage], start: str, names: dict[str, KernelName]) -> KernelUsage:
    """Return the kernel of a notebook (its name, with or without ``.ipynb``, or its path), or whose id begins with `start`."""
    if not start.strip():
        raise NbgpuError("Which kernel? Name it by its notebook or its id; `nbgpu limit` lists them.", code="kernel")
    if start.strip("()").lower() == "other":
        raise NbgpuError(
            "(other) are programs of no kernel: terminals, `nbgpu run`. They share what the slice has; as admin, its size is set with "
            "`nbgpu limit --slice ID --memory 20GiB --compute 1/2`.",
            code="kernel",
        )
    known = [kernel for kernel in kernels if kernel.kernel_id is not None]
    named = [kernel for kernel in known if kernel.kernel_id in names and start in called(names[kernel.kernel_id])]
    found = named or [kernel for kernel in known if kernel.kernel_id is not None and kernel.kernel_id.startswith(start)]
    if len(found) == 1:
        return found[0]
    if not found:
        try:  # the whole id of a kernel that has used no GPU yet, of a server that told us no names
            kernel_id = str(uuid.UUID(start))
        except ValueError:
            raise NbgpuError(
                f"No kernel is called {start!r} or has an id that begins so; `nbgpu limit` lists them.", code="kernel"
            ) from None
        return KernelUsage(kernel_id=kernel_id, pids=[], limit=KernelLimit(), devices=[], refusals=0, launches=0, idle_seconds=None)
    which = ", ".join(f"{kernel_name(kernel.kernel_id, names)} ({kernel.kernel_id})" for kernel in found[:5])
    raise NbgpuError(f"More than one kernel is called {start!r} or has an id that begins so: {which}.", code="kernel")


def called(name: KernelName) -> set[str]:
    """Return all that a person may call a kernel: its notebook's name or path, with or without ``.ipynb``."""
    return {word for full in (name.name, name.path) if full for word in (full, full.removesuffix(".ipynb"))}


def kernel_name(kernel_id: str | None, names: dict[str, KernelName]) -> str:
    """Return a kernel for people: its notebook's path, what its server calls it, its id."""
    if kernel_id is None:
        return "(other)"
    name = names.get(kernel_id)
    return f"Kernel {kernel_id[:SHORT_ID]}" if name is None else name.path or name.name


def name_json(names: dict[str, KernelName], kernel_id: str | None) -> dict[str, str | None]:
    """Return a kernel's name and path for programs."""
    name = names.get(kernel_id or "")
    return {"name": name.name if name else None, "path": name.path if name else None}


def kernels_table(usage: Usage, names: dict[str, KernelName]) -> RenderableType:
    """Return one row a kernel: what it holds, and its limits."""
    from rich.console import Group
    from rich.text import Text

    from .cli_table import FittingTable

    table = FittingTable(
        "kernel", "notebook", "pids", "GPU", "memory", "peak", "time used", "memory limit", "time limit", "refused", drop=DROP
    )
    index = {use.uuid: (use.index, use.memory_limit_bytes) for use in usage.devices}
    kernels = all_kernels(usage, names)
    short = short_ids(kernel.kernel_id for kernel in kernels if kernel.kernel_id)
    for kernel in kernels:
        named = names.get(kernel.kernel_id or "")
        notebook = (named.path or named.name) if named else ""
        head = [short.get(kernel.kernel_id or "", "(other)"), notebook, " ".join(map(str, kernel.pids[:5]))]
        tail = [memory_words(kernel.limit), time_cell(kernel.limit, usage), str(kernel.refusals)]
        if not kernel.devices:
            table.add_row(*head, "", "-", "", "", *tail)
        for number, use in enumerate(kernel.devices):
            device, slice_limit = index.get(use.uuid, (-1, 0))
            limit = slice_limit if kernel.limit.memory_bytes is None else min(kernel.limit.memory_bytes, slice_limit)
            held = memory_of(use.memory_used_bytes, limit) if kernel.away is None else away_words(kernel.away)
            cells = [format_memory(use.memory_peak_bytes), percent(use.compute_used_milli)]
            first = number == 0
            table.add_row(
                *(head if first else ["", "", ""]),
                str(device),
                Text(held, style=OVER if use.memory_used_bytes > limit else ""),
                *cells,
                *(tail if first else ["", "", ""]),
            )
    limited = any(kernel.limit.compute_milli is not None for kernel in kernels)
    return Group(table, Text(TIME_LEGEND, style="dim")) if limited else table


def memory_of(used_bytes: int, limit_bytes: int) -> str:
    """Return memory used of a limit for people, with the word when it is more."""
    return format_memory_of(used_bytes, limit_bytes) + (", over" if used_bytes > limit_bytes else "")


def away_words(away: KernelAway) -> str:
    """Return where a kernel's memory is that its user has moved, for people."""
    where = {"parking": "on its way to host memory", "parked": "in host memory", "restoring": "on its way back"}
    return f"{format_memory(away.memory_bytes)} {where[away.phase]}"


def memory_words(limit: KernelLimit) -> str:
    """Return a kernel's memory limit for people."""
    return "the slice's" if limit.memory_bytes is None else format_memory(limit.memory_bytes)


def compute_words(limit: KernelLimit, usage: Usage) -> str:
    """Return a kernel's limit of GPU time for people: ``1/2 of the slice's time (12.5 % of the GPU)``."""
    if limit.compute_milli is None:
        return "time the slice's"
    part, of_gpu = time_parts(limit.compute_milli, usage)
    return f"{part} of the slice's time ({of_gpu} of the GPU)"


def time_cell(limit: KernelLimit, usage: Usage) -> str:
    """Return it for a table: ``1/2 (12.5 %)``."""
    if limit.compute_milli is None:
        return "the slice's"
    part, of_gpu = time_parts(limit.compute_milli, usage)
    return f"{part} ({of_gpu})"


def time_parts(milli: int, usage: Usage) -> tuple[str, str]:
    """Return a limit in thousandths of the GPU's time as a part of the slice's time and as one of the GPU's.

    A fraction that a person may have written is shown as such, and what it is of the GPU as written too: the limit in force is that,
    rounded down to a thousandth.
    """
    whole = min((use.compute_limit_milli for use in usage.devices), default=WHOLE_MILLI)
    if milli >= whole:
        return "all", percent(milli)
    for below in range(2, LARGEST_DENOMINATOR + 1):
        for above in range(1, below):
            if part_milli(whole, WHOLE_MILLI * above // below) == milli:
                return f"{above}/{below}", f"{_hundredths(Fraction(whole * above, below * 10))} %"
    return f"{_hundredths(Fraction(100 * milli, whole))} %", percent(milli)


def _hundredths(value: Fraction) -> str:
    return f"{math.floor(value * 100) / 100:g}"
