"""Tables of `nbgpu limit`, `status` and `resume` in narrow terminals: which columns are there, none cut, no word taken apart."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from test_cli_limit import NAMES, A, B, kernel, usage
from test_cli_options import known
from test_cli_resume import held

from nbgpu.cli_common import short_ids
from nbgpu.cli_limit import kernels_table
from nbgpu.cli_resume import suspended_table
from nbgpu.cli_status import Machine, machine_picture, slice_picture
from nbgpu.cli_table import FittingTable
from nbgpu.models import Device, Grant, GrantState, Idle, KernelLimit, Node, Owner, Request
from nbgpu.quantities import GIB, format_memory

WIDTHS = (80, 100, 120, 200)
LIMITED = kernel(A, int(1.25 * GIB)).model_copy(
    update={"pids": [3271555, 3271556, 3271557], "limit": KernelLimit(memory_bytes=5 * GIB, compute_milli=62), "refusals": 12}
)
KERNELS = usage(LIMITED, kernel(B, GIB), kernel(None, GIB), limit=int(19.5 * GIB))
MODEL = "NVIDIA H100 80GB HBM3 (simulated)"


def machine() -> Machine:
    device = Device(uuid="GPU-1", node="n", index=0, model=MODEL, memory_bytes=80 * GIB, reserve_bytes=2 * GIB, healthy=True)
    node = Node(node="n", simulated=True, driver_version="580.1", backend="limiter", devices=[device])
    slices = [known("aaaaaaaa1111", "ada"), known("bbbbbbbb2222", "grace.hopper.of.the.navy")]
    request = Request(request_id="request-0001", owner=Owner(hub="h", user="edsger"), compute_milli=500, memory_milli=500)
    reason = "all GPUs are in use; ada's slice is the one that is expected to end first, as her server has been idle for long"
    waiting = Grant(request=request, state=GrantState.queued, position=1, wait_seconds=240, reason=reason)
    use = KERNELS.model_copy(update={"slice_id": "aaaaaaaa1111", "suspended": [held(4711, A)]})
    return Machine(node, slices, {"aaaaaaaa1111": use}, [], [waiting], None)


def lines_at(width: int, *parts: RenderableType) -> list[str]:
    out = io.StringIO()
    for part in parts:
        Console(file=out, width=width, color_system=None).print(part)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def columns_of(lines: list[str], first: str) -> str:
    """Return the line of headings that begins with `first`."""
    return next(line for line in lines if line.split("  ")[0].strip() == first)


ALWAYS = ["kernel", "notebook", "memory", "memory limit", "time limit"]
FEW = [*ALWAYS, "time used"]
MOST = [*FEW, "GPU", "refused", "pids"]


@pytest.mark.parametrize(("width", "there", "missing"), [
    (80, ALWAYS, ["peak", "pids", "refused", "GPU", "time used"]),
    (100, [*FEW, "GPU", "refused"], ["peak", "pids"]),
    (110, [*FEW, "GPU", "refused"], ["peak", "pids"]),
    (120, [*MOST, "peak"], []),
    (200, [*MOST, "peak"], []),
])  # fmt: skip
def test_kernels(width: int, there: list[str], missing: list[str]) -> None:
    lines = lines_at(width, kernels_table(KERNELS, NAMES))
    headings = [one.strip() for one in columns_of(lines, "kernel").split("  ") if one.strip()]
    assert sorted(headings) == sorted(there)
    text = "\n".join(lines)
    for cell in ("1a2b3c4d", "1a2bffff", "(other)", "work/train.ipynb", "1.2 of 5 GiB", "1/4 (6.25 %)", "the slice's"):
        assert cell in text
    assert A not in text
    assert max(map(len, lines)) <= width
    said = f"Too narrow for: {', '.join(missing)}; --json has all."
    assert (said in lines) is bool(missing)
    assert ("Too narrow" in text) is bool(missing)


@pytest.mark.parametrize("width", WIDTHS)
def test_status(width: int) -> None:
    lines = lines_at(width, machine_picture(machine()), slice_picture(KERNELS))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    devices, slices, queue = (columns_of(lines, name) for name in ("GPU", "slice", "queue"))
    for headings, names in (
        (devices, ["GPU", "model", "memory", "granted", "used", "time granted"]),
        (slices, ["slice", "owner", "memory", "share", "state"]),
        (queue, ["queue", "user", "waits for", "about", "why"]),
    ):
        assert [name for name in names if name not in headings] == []
    if width >= 120:
        assert "processes" in slices
        assert "mode" in slices
    for word in [*MODEL.split(), "78 GiB", "aaaaaaaa", "bbbbbbbb", "1.2 of", "suspended", "edsger", "expected", "minutes", "simulated"]:
        assert word in text, f"{word} is whole"
    assert "Too narrow" not in "\n".join(lines_at(200, machine_picture(machine()))), "control: where there is room nothing is left out"


@pytest.mark.parametrize("width", WIDTHS)
def test_suspended(width: int) -> None:
    lines = lines_at(width, suspended_table([held(4194304, A), held(2, None)], NAMES))
    assert max(map(len, lines)) <= width
    for part in ("process 4194304", "work/train.ipynb", "stopped", "GPU"):
        assert part in "\n".join(lines)


def test_what_is_too_long_is_cut_at_the_side_that_says_least() -> None:
    table = FittingTable("notebook", "owner")
    table.add_row("a/very/long/path/that/goes/on/and/on/and/on/to/train.ipynb", "o" * 60)
    text = "\n".join(lines_at(60, table))
    assert "/train.ipynb" in text
    assert "oooo…" in text
    assert "a/very" not in text
    assert "a/very" in "\n".join(lines_at(200, table)), "control"


def test_no_column_is_cut_below_its_heading_however_narrow() -> None:
    table = FittingTable("kernel", "processes", "because", drop=("processes",))
    table.add_row("k", "1 2 3", "it did this and that")
    for width in range(24, 60):
        widths, _ = table.fit(width)
        assert all(at_least >= len(name) for name, at_least in widths.items())
        assert "because" in widths


def test_ids_are_short_and_unique() -> None:
    assert short_ids([A, B, "kernel-one"]) == {A: A[:8], B: B[:8], "kernel-one": "kernel-o"}
    twins = [f"{A[:12]}x{A[13:]}", A, f"{A[:12]}y{A[13:]}"]
    found = short_ids(twins)
    assert len(set(found.values())) == 3
    assert all(full.startswith(short) and sum(other.startswith(short) for other in twins) == 1 for full, short in found.items())
    assert short_ids(["kernel-on", "kernel-one"]) == {"kernel-on": "kernel-on", "kernel-one": "kernel-one"}
    assert short_ids([]) == {}


def test_a_parked_slice_holds_nothing_and_says_what_it_comes_back_to() -> None:
    seen = machine()
    full = seen.slices[0].slice
    empty = [part.model_copy(update={"memory_bytes": 0, "compute_milli": 0}) for part in full.devices]
    parked = seen.slices[0].model_copy(
        update={"slice": full.model_copy(update={"devices": empty}), "idle": Idle(state="parked", full=full)}
    )
    back = f"comes back to {format_memory(full.devices[0].memory_bytes)}"
    rows = [line for line in lines_at(300, machine_picture(replace(seen, slices=[parked]))) if "ada" in line and "parked" in line]
    assert len(rows) == 1
    assert back in rows[0]
    assert "0 B" in rows[0], "its row is what it holds, so rows add up to what is granted"
    assert "0 %" in rows[0]
    held = "\n".join(lines_at(300, machine_picture(seen)))
    assert "parked" not in held, "control"
    assert "comes back" not in held
