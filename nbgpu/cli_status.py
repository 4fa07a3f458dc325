"""``nbgpu status``: devices, slices, owners and use, as tables or JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cli_common import (
    SHORT_ID,
    agent,
    backend_words,
    console,
    in_a_pod,
    limiter_only,
    own_slice,
    owner_name,
    percent,
    pool,
    print_json,
    short_ids,
)
from .client import SliceClient
from .errors import NbgpuError, Unavailable
from .kernel_names import read_names
from .logs import one_line
from .models import AgentSlice, DeviceBooks, Grant, GrantState, Node, Usage
from .quantities import format_memory

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

EVERY_SECONDS = 1.0
SLICES_DROP = ("processes", "mode", "time used", "GPU")
"""What a narrow terminal shows without, the least useful first."""


@dataclass(frozen=True)
class Machine:
    """All that is known of this machine, read at one moment."""

    node: Node
    slices: list[AgentSlice]
    usage: dict[str, Usage]
    books: list[DeviceBooks]
    queue: list[Grant]
    pool_error: str | None

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "node": self.node.model_dump(mode="json"),
            "slices": [self._slice_json(known) for known in self.slices],
            "devices": [books.model_dump(mode="json") for books in self.books],
            "queue": [grant.model_dump(mode="json") for grant in self.queue],
            "pool_error": self.pool_error,
        }

    def _slice_json(self, known: AgentSlice) -> dict[str, Any]:
        usage = self.usage.get(known.slice.slice_id)
        return known.model_dump(mode="json") | {"usage": usage.model_dump(mode="json") if usage else None}


def read_machine() -> Machine:
    """Ask the agent, and the pool where one runs."""
    node = agent().node()
    slices = agent().slices().slices
    usage = {one.slice_id: one for one in agent().all_usage()}
    try:
        books, grants, pool_error = pool().devices(), pool().grants(), None
    except NbgpuError as error:
        elsewhere = error.code == "away" and in_a_pod()
        books, grants, pool_error = [], [], "it is another pod: `nbgpu status --cluster` tells of it." if elsewhere else error.message
    queue = sorted((grant for grant in grants if grant.state is GrantState.queued), key=lambda grant: grant.position or 0)
    return Machine(node, slices, usage, books, queue, pool_error)


def show(*, as_json: bool, watch: bool, whole_node: bool) -> None:
    """Print the slice of this server, or the whole machine; with `watch` again every second."""
    own = None if whole_node else own_slice()
    if as_json:
        print_json(own.usage().model_dump(mode="json") if own else read_machine().as_json())
        return
    if not watch:
        console().print(picture(own))
        return
    from rich.live import Live

    with Live(picture(own), console=console(), auto_refresh=False) as live:
        while True:
            time.sleep(EVERY_SECONDS)
            try:
                live.update(picture(own), refresh=True)
            except Unavailable as error:  # a restart is no reason to leave
                live.update(error.message, refresh=True)


def picture(own: SliceClient | None) -> RenderableType:
    """Return what to print."""
    return slice_picture(own.usage()) if own else machine_picture(read_machine())


def machine_picture(machine: Machine) -> RenderableType:
    """Return tables of the devices, the slices and the queue."""
    from rich.console import Group
    from rich.text import Text

    node = machine.node
    kind = "simulated GPUs (no NVIDIA driver on this machine)" if node.simulated else f"driver {node.driver_version}"
    parts: list[RenderableType] = [f"{node.node}: {kind}; {backend_words(node)}", devices_table(machine)]
    parts.append(slices_table(machine) if machine.slices else "No slices.")
    if alone := limiter_only(node, machine.slices):
        parts.append(Text(one_line(alone), style="yellow"))
    if machine.queue:
        parts.append(queue_table(machine.queue))
    if machine.pool_error:
        parts.append(Text(one_line(f"Pool: {machine.pool_error}"), style="yellow"))
    return Group(*parts)


def devices_table(machine: Machine) -> RenderableType:
    """Return one row a device: what it has, what is granted, what is used."""
    from rich.text import Text

    from .cli_table import FittingTable

    table = FittingTable("GPU", "model", "memory", "granted", "used", "time granted", "time used", "slices", drop=("slices", "time used"))
    books = {book.device.uuid: book for book in machine.books}
    for device in machine.node.devices:
        uses = [use for usage in machine.usage.values() for use in usage.devices if use.uuid == device.uuid]
        held = [part for known in machine.slices for part in known.slice.devices if part.uuid == device.uuid]
        book = books.get(device.uuid)
        memory = book.memory_granted_bytes if book else sum(part.memory_bytes for part in held)
        compute = book.compute_granted_milli if book else sum(part.compute_milli for part in held)
        model = device.model if device.healthy else Text.assemble(one_line(device.model), (" (not healthy)", "red"))
        table.add_row(
            str(device.index), model, format_memory(device.usable_bytes),
            format_memory(memory), format_memory(sum(use.memory_used_bytes for use in uses)), percent(compute),
            percent(sum(use.compute_used_milli for use in uses)), str(len(book.slices) if book else len(held)),
        )  # fmt: skip
    return table


def slices_table(machine: Machine) -> RenderableType:
    """Return one row a slice and device."""
    from .cli_table import FittingTable

    table = FittingTable("slice", "owner", "GPU", "memory", "share", "time used", "mode", "state", "processes", drop=SLICES_DROP)
    short = short_ids(known.slice.slice_id for known in machine.slices)
    for known in sorted(machine.slices, key=lambda one: one.created):
        usage = machine.usage.get(known.slice.slice_id)
        uses = {use.uuid: use for use in usage.devices} if usage else {}
        for number, part in enumerate(known.slice.devices):
            use = uses.get(part.uuid)
            head = [short[known.slice.slice_id], owner_name(known.slice)] if number == 0 else ["", ""]
            held = f", {len(usage.suspended)} suspended" if usage and usage.suspended else ""
            state = known.state if known.idle is None or known.idle.state == "held" else known.idle.state
            state = "shrinking" if known.lowered is not None else state
            if state == "parked" and known.idle is not None and known.idle.full is not None:
                back = known.idle.full.devices[0]
                held += f", comes back to {format_memory(back.memory_bytes)}, {percent(back.compute_milli)}"
            tail = [known.slice.mode, state + held, str(known.process_count)] if number == 0 else ["", "", ""]
            limit, share = (use.memory_limit_bytes, use.compute_limit_milli) if use else (part.memory_bytes, part.compute_milli)
            if state == "parked":  # what it comes back to is not held: others may have it
                limit, share = part.memory_bytes, part.compute_milli
            table.add_row(
                *head, str(part.index), memory_text(use.memory_used_bytes if use else 0, limit), percent(share),
                percent(use.compute_used_milli) if use else "", *tail,
            )  # fmt: skip
    return table


def queue_table(queue: list[Grant]) -> RenderableType:
    """Return who waits, for what, and how long still."""
    from .cli_run import in_words, request_in_words
    from .cli_table import FittingTable

    table = FittingTable("queue", "user", "waits for", "about", "why")
    for grant in queue:
        wait = in_words(grant.wait_seconds) + ("?" if grant.wait_guessed else "") if grant.wait_seconds is not None else "unknown"
        table.add_row(str(grant.position or ""), grant.request.owner.user, request_in_words(grant.request), wait, grant.reason or "")
    return table


def slice_picture(usage: Usage) -> RenderableType:
    """Return the tables of one slice, seen from inside."""
    from rich.console import Group

    from .cli_table import FittingTable

    devices = FittingTable("GPU", "model", "memory", "share", "time used", "of the share")
    for use in usage.devices:
        devices.add_row(
            str(use.index), use.model, memory_text(use.memory_used_bytes, use.memory_limit_bytes), percent(use.compute_limit_milli),
            percent(use.compute_used_milli), f"{use.utilization_percent} %",
        )  # fmt: skip
    simulated = " on a simulated GPU" if usage.simulated else ""
    parts: list[RenderableType] = [f"Slice {usage.slice_id[:SHORT_ID]}{simulated}, {usage.mode}", devices]
    names = read_names(usage.slice_id)
    if usage.kernels or names:
        from .cli_limit import kernels_table

        parts.append(kernels_table(usage, names))
    if usage.suspended:
        from .cli_resume import suspended_table

        parts.append(suspended_table(usage.suspended, names))
    return Group(*parts)


def memory_text(used_bytes: int, limit_bytes: int) -> Text:
    """Return memory used of a limit; over it, it says so and stands out."""
    from rich.text import Text

    from .cli_limit import OVER, memory_of

    return Text(memory_of(used_bytes, limit_bytes), style=OVER if used_bytes > limit_bytes else "")
