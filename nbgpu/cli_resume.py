"""``nbgpu resume``: what the watchdog has suspended, and letting it go on; memory that `nbgpu suspend` has moved comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .cli_common import SHORT_ID, console, print_json
from .cli_limit import Target, away_words, called, kernel_name, look, target
from .cli_suspend import away, bring_back
from .errors import NbgpuError
from .kernel_names import KernelName, read_names
from .models import Suspension, Usage

if TYPE_CHECKING:
    from rich.console import RenderableType

HOW = {"lock": "its GPU calls wait", "stop": "stopped"}
LONGEST_PID = 7
"""Linux has no pid of more digits; the start of a kernel's id may be digits alone."""
Names = Callable[[str], dict[str, KernelName]]


def list_suspended(slice_start: str | None, *, as_json: bool) -> None:
    """Print what is suspended in a slice, or in all."""
    seen = look(slice_start)
    if as_json:
        print_json(seen.as_json(suspended_json))
        return
    held = [(usage, name) for usage, name in zip(seen.usages, seen.names, strict=True) if usage.suspended]
    for usage, name in held:
        if seen.several:
            console().print(f"Slice {name}")
        console().print(suspended_table(usage.suspended, read_names(usage.slice_id)))
    for usage in seen.usages:
        for kernel in away(usage):
            name = kernel_name(kernel.kernel_id, read_names(usage.slice_id))
            assert kernel.away is not None
            console().print(f"{name}: {away_words(kernel.away)} (`nbgpu resume {name}`).", soft_wrap=True)
    if not held and not any(away(usage) for usage in seen.usages):
        of = f"Nothing of slice {seen.usages[0].slice_id[:SHORT_ID]}" if len(seen.usages) == 1 else "Nothing"
        console().print(f"{of} is suspended.")


def suspended_json(usage: Usage) -> dict[str, Any]:
    """Return what is suspended in a slice for programs."""
    return {"slice_id": usage.slice_id, "suspended": [one.model_dump(mode="json") for one in usage.suspended]}


def resume(which: str, slice_start: str | None, *, as_json: bool) -> None:
    """Let a process go on, or all of a kernel, wherever it is when no slice is named; or bring a kernel's memory back to the GPU."""
    if slice_start is None and bring_back(which, as_json=as_json):
        return
    seen = look(slice_start)
    usage, found = meant(seen.usages, which, read_names)
    _go_on(target(usage.slice_id if seen.several else slice_start), found, as_json=as_json)


def resume_all(slice_start: str | None, *, as_json: bool) -> None:
    """Let all of one slice go on."""
    chosen = target(slice_start)
    usage = chosen.usage()
    if not usage.suspended:
        raise NbgpuError(f"Nothing is suspended in slice {usage.slice_id[:SHORT_ID]}.", code="suspended")
    _go_on(chosen, usage.suspended, as_json=as_json)


def _go_on(chosen: Target, found: list[Suspension], *, as_json: bool) -> None:
    for one in found:
        chosen.resume(one.pid)
        if not as_json:
            print(f"Process {one.pid} goes on; the watchdog leaves it alone until it ends.")
    if as_json:
        print_json(suspended_json(chosen.usage()))


def meant(usages: list[Usage], which: str, names_of: Names = read_names) -> tuple[Usage, list[Suspension]]:
    """Return the suspended processes that are meant, and the slice that they are in.

    Parameters
    ----------
    usages : list of Usage
        The slices to look in.
    which : str
        A pid, the start of a kernel's id, or its notebook's name or path.
    names_of : callable
        Returns what the kernels of a slice are called.

    Raises
    ------
    NbgpuError
        Nothing suspended is called so, or more than one kernel or process is.
    """
    found = [(usage, [one]) for usage in usages for one in usage.suspended if which == str(one.pid)]
    what = f"process {which}"
    if not found and not (which.isdecimal() and len(which) <= LONGEST_PID):
        what = f"kernel {which}"
        found = _kernels(usages, which, names_of)
    if not found:
        where = f"Nothing of {what} is suspended" if what.startswith("kernel") else f"No {what} is suspended"
        slices = f" in slice {usages[0].slice_id[:SHORT_ID]}" if len(usages) == 1 else ""
        raise NbgpuError(f"{where}{slices}; `nbgpu resume` lists what is.", code="suspended")
    if len(found) > 1:
        these = ", ".join(
            f"{kernel_name(held[0].kernel_id, names_of(usage.slice_id))} ({held[0].kernel_id or held[0].pid}"
            f" in slice {usage.slice_id[:SHORT_ID]})"
            for usage, held in found[:5]
        )
        raise NbgpuError(f"More than one suspended {what}: {these}. Name one by its whole id, or its slice with --slice.", code="suspended")
    return found[0]


def _kernels(usages: list[Usage], which: str, names_of: Names) -> list[tuple[Usage, list[Suspension]]]:
    """Return the kernels with something suspended that are called so, by their names before their ids."""
    named: list[tuple[Usage, list[Suspension]]] = []
    begun: list[tuple[Usage, list[Suspension]]] = []
    for usage in usages:
        names = names_of(usage.slice_id) if usage.suspended else {}
        for kernel_id in dict.fromkeys(one.kernel_id for one in usage.suspended if one.kernel_id):
            held = [one for one in usage.suspended if one.kernel_id == kernel_id]
            if kernel_id in names and which in called(names[kernel_id]):
                named.append((usage, held))
            elif which.strip() and kernel_id.startswith(which):
                begun.append((usage, held))
    return named or begun


def suspended_table(suspended: list[Suspension], names: dict[str, KernelName]) -> RenderableType:
    """Return one row a suspended process."""
    from .cli_table import FittingTable

    table = FittingTable("suspended", "kernel", "how", "for", "because")
    for one in suspended:
        kernel = kernel_name(one.kernel_id, names) if one.kernel_id else ""
        table.add_row(f"process {one.pid}", kernel, HOW[one.how], f"{max(0.0, time.time() - one.since):.0f} s", one.reason)
    return table
