"""``nbgpu resume``: what the watchdog has suspended, and letting it go on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .cli_common import SHORT_ID, console, print_json
from .cli_limit import find_kernel, kernel_name, target
from .errors import NbgpuError
from .kernel_names import KernelName, read_names
from .models import Suspension, Usage

if TYPE_CHECKING:
    from rich.console import RenderableType

HOW = {"lock": "its GPU calls wait", "stop": "stopped"}


def list_suspended(slice_start: str | None, *, as_json: bool) -> None:
    """Print what is suspended in a slice."""
    usage = target(slice_start).usage()
    if as_json:
        print_json({"slice_id": usage.slice_id, "suspended": [one.model_dump(mode="json") for one in usage.suspended]})
    elif usage.suspended:
        console().print(suspended_table(usage.suspended, read_names(usage.slice_id)))
    else:
        console().print(f"Nothing of slice {usage.slice_id[:SHORT_ID]} is suspended.")


def resume(which: str | None, slice_start: str | None, *, as_json: bool) -> None:
    """Let a process go on, or all of a kernel, or (None) all of the slice."""
    chosen = target(slice_start)
    usage = chosen.usage()
    names = read_names(usage.slice_id)
    for one in meant(usage, which, names):
        chosen.resume(one.pid)
        if not as_json:
            print(f"Process {one.pid} goes on; the watchdog leaves it alone until it ends.")
    if as_json:
        print_json({"slice_id": usage.slice_id, "suspended": [one.model_dump(mode="json") for one in chosen.usage().suspended]})


def meant(usage: Usage, which: str | None, names: dict[str, KernelName]) -> list[Suspension]:
    """Return the suspended processes that are meant: by pid, by their kernel, or (None) all."""
    found = usage.suspended
    if which is not None:
        found = [one for one in usage.suspended if which == str(one.pid)]
        if not found and not which.isdecimal():
            kernel_id = find_kernel([kernel for kernel in usage.kernels if kernel.kernel_id], which, names).kernel_id
            found = [one for one in usage.suspended if one.kernel_id == kernel_id]
    if not found:
        what = "Nothing" if which is None else f"No process {which}" if which.isdecimal() else f"Nothing of kernel {which}"
        raise NbgpuError(f"{what} is suspended in slice {usage.slice_id[:SHORT_ID]}; `nbgpu resume` lists what is.", code="suspended")
    return found


def suspended_table(suspended: list[Suspension], names: dict[str, KernelName]) -> RenderableType:
    """Return one row a suspended process."""
    from .cli_status import make_table

    table = make_table("suspended", "kernel", "how", "for", "because")
    for one in suspended:
        kernel = kernel_name(one.kernel_id, names) if one.kernel_id else ""
        table.add_row(f"process {one.pid}", kernel, HOW[one.how], f"{max(0.0, time.time() - one.since):.0f} s", one.reason)
    return table
