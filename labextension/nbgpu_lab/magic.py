"""``%gpu``: the slice in a few lines, as text and as a table."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import Any

from nbgpu.errors import NbgpuError
from nbgpu.here import no_slice
from nbgpu.quantities import format_memory, format_memory_of, format_share

from .client import SliceClient

USE = (
    "%gpu shows what this server's GPU slice holds; %gpu keep: this notebook keeps its GPU while it is idle; %gpu keep off: no more. "
    "For programs: nbgpu.slice(). Live: nbgpu.SliceMonitor()."
)


class Said:
    """What ``%gpu`` answers: text everywhere, a table where a notebook can show one."""

    def __init__(self, text: str, html: str | None = None):
        self.text = text
        self.html = html

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str | None:
        return self.html


def register(ipython: Any) -> None:
    """Add the magic to an IPython shell; one of that name that the user has is left alone."""
    if ipython.find_line_magic("gpu") is None:
        ipython.register_magic_function(show, "line", "gpu")


def show(line: str) -> None:
    """Show the answer below the cell, wherever in the cell it was asked."""
    from IPython.display import display

    display(answer(line))


def answer(line: str) -> Said:
    """Return what ``%gpu`` shows: the slice's use; with ``keep`` or ``keep off`` whether this notebook keeps its GPU while it is idle."""
    words = line.split()
    if not words:
        return summary()
    if words not in (["keep"], ["keep", "off"]):
        return Said(USE)
    return Said(keep(len(words) == 1))


def keep(protected: bool) -> str:
    """Have the agent never park this kernel, or let it be parked again (docs/idle.md)."""
    kernel_id = os.environ.get("NBGPU_KERNEL_ID")
    if not kernel_id:
        return "No notebook kernel in a GPU slice: there is nothing to keep."
    said = _ask("PUT", f"/v1/idle/kernels/{kernel_id}", {"protected": protected})
    if isinstance(said, NbgpuError):
        return "Idle notebooks keep their GPU here anyway." if said.code == "not-offered" else said.message
    return "This notebook keeps its GPU while it is idle." if protected else "This notebook's GPU may be given to others while it is idle."


def summary() -> Said:
    """Return the slice's use now; also works in a kernel whose own loop runs."""
    usage = _ask("GET", "/v1/usage")
    if isinstance(usage, NbgpuError):
        return Said(usage.message)
    kernel_id = os.environ.get("NBGPU_KERNEL_ID")
    return Said("\n".join(describe(usage, kernel_id)), table(usage, kernel_id))


def _ask(method: str, path: str, body: object = None) -> Any:
    """Return the agent's answer, or the error that it is."""
    socket_path = os.environ.get("NBGPU_SOCKET")
    if not socket_path:
        return no_slice()
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, SliceClient(socket_path).request(method, path, body)).result()
        except NbgpuError as error:
            return error


def describe(usage: dict[str, Any], kernel_id: str | None) -> list[str]:
    """Return one line per device of a ``Usage``, and one for the kernel that asks."""
    lines = []
    for device in usage["devices"]:
        memory = format_memory_of(device["memory_used_bytes"], device["memory_limit_bytes"])
        share = format_share(device["compute_limit_milli"])
        lines.append(f"GPU {device['index']} ({device['model']}): {memory} used, compute {device['utilization_percent']} % of {share}")
    own = _own(usage, kernel_id)
    return [*lines, f"This kernel: {own[2]}"] if own else lines


def table(usage: dict[str, Any], kernel_id: str | None) -> str:
    """Return the same as an HTML table; all that comes from elsewhere is escaped."""
    rows = []
    for device in usage["devices"]:
        used, limit = device["memory_used_bytes"], device["memory_limit_bytes"]
        busy, share = device["utilization_percent"], format_share(device["compute_limit_milli"])
        memory, compute = _bar("Memory", used, limit), _bar("Compute", busy, 100)
        cells = (f"{memory} {format_memory_of(used, limit)}", f"{compute} {busy} % of {share}")
        rows.append(_row(f"GPU {device['index']} ({device['model']})", *cells))
    own = _own(usage, kernel_id)
    if own:
        used, limit, words = own
        rows.append(_row("This notebook", f"{_bar('Memory of this notebook', used, limit) if limit else ''} {escape(words)}", ""))
    head = "".join(f'<th scope="col" style="text-align: left">{name}</th>' for name in ("GPU slice", "Memory", "Compute"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _own(usage: dict[str, Any], kernel_id: str | None) -> tuple[int, int | None, str] | None:
    """Return what the kernel that asks holds, its own limit, and both in words."""
    for kernel in usage["kernels"]:
        if kernel_id and kernel["kernel_id"] == kernel_id:
            used = sum(device["memory_used_bytes"] for device in kernel["devices"])
            limit = kernel["limit"]["memory_bytes"]
            return used, limit, format_memory(used) + (f" of its own limit of {format_memory(limit)}" if limit is not None else "")
    return None


def _row(name: str, memory: str, compute: str) -> str:
    head, cell = 'style="text-align: left"', 'style="text-align: left; white-space: nowrap"'  # a bar stays beside its words
    return f'<tr><th scope="row" {head}>{escape(name)}</th><td {cell}>{memory}</td><td {cell}>{compute}</td></tr>'


def _bar(name: str, value: int, most: int) -> str:
    return f'<progress aria-label="{escape(name)}" value="{int(value)}" max="{max(1, int(most))}" style="width: 8em"></progress>'
