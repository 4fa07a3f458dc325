"""`nbgpu limit`: kernels by their notebooks' names, parts of the slice, what is over; and the file in which a server tells the names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nbgpu.cli_common import console
from nbgpu.cli_doctor_probe import limit_of
from nbgpu.cli_limit import all_kernels, compute_words, find_kernel, kernel_name, kernels_table, wanted
from nbgpu.cli_status import slice_picture
from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.kernel_names import KernelName, file_of, read_names, write_names
from nbgpu.models import KernelLimit, KernelUsage, Usage
from nbgpu.quantities import GIB

A, B = "1a2b3c4d-0000-4000-8000-000000000001", "1a2bffff-0000-4000-8000-000000000002"
NAMES = {A: KernelName("train.ipynb", "work/train.ipynb"), B: KernelName("other.ipynb", "other.ipynb")}


def kernel(kernel_id: str | None, used: int = 0, memory: int | None = None) -> KernelUsage:
    device = {"uuid": "GPU-0", "memory_used_bytes": used, "memory_peak_bytes": used, "compute_used_milli": 0}
    found = {"kernel_id": kernel_id, "pids": [7], "limit": {"memory_bytes": memory}, "devices": [device] if used else []}
    return KernelUsage.model_validate(found | {"refusals": 0, "launches": 1, "idle_seconds": None})


def usage(*kernels: KernelUsage, limit: int = 20 * GIB) -> Usage:
    used = sum(one.memory_used_bytes for known in kernels for one in known.devices)
    device = {
        "uuid": "GPU-0", "index": 0, "model": "H100", "memory_limit_bytes": limit, "memory_used_bytes": used,
        "compute_limit_milli": 250, "compute_used_milli": 0, "utilization_percent": 0,
    }  # fmt: skip
    head = {"slice_id": "slice-0001", "mode": "burst", "backend": "limiter", "simulated": True, "time": 1.0, "devices": [device]}
    return Usage.model_validate(head | {"kernels": [one.model_dump() for one in kernels]})


def shown(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=220, color_system=None).print(table)
    return out.getvalue()


@pytest.mark.parametrize("start", ["train.ipynb", "train", "work/train.ipynb", "work/train", "1a2b3", A])
def test_a_kernel_is_found_by_its_notebook_or_the_start_of_its_id(start: str) -> None:
    assert find_kernel(all_kernels(usage(kernel(B)), NAMES), start, NAMES).kernel_id == A


def test_a_start_that_two_have_names_both() -> None:
    with pytest.raises(NbgpuError, match=r"More than one kernel .*work/train\.ipynb.*other\.ipynb"):
        find_kernel(all_kernels(usage(), NAMES), "1a2b", NAMES)


def test_without_names_a_whole_id_is_taken_and_half_of_one_is_not() -> None:
    assert find_kernel([], A, {}).kernel_id == A
    with pytest.raises(NbgpuError, match="nbgpu limit"):
        find_kernel([], A[:20], {})


@pytest.mark.parametrize(
    ("kernel_id", "seen", "found"),
    [
        (A, 2 * GIB, (2 * GIB, True)),
        (A, 20 * GIB, (2 * GIB, True)),
        (B, 2 * GIB, (20 * GIB, False)),
        ("kernel-three", 2 * GIB, (20 * GIB, False)),
        (None, 2 * GIB, (2 * GIB, True)),
        (None, 20 * GIB, (20 * GIB, False)),
        (None, 3 * GIB, (20 * GIB, False)),
    ],
)
def test_what_doctor_expects_a_program_of_a_kernel_to_see(kernel_id: str | None, seen: int, found: tuple[int, bool]) -> None:
    seen_in = usage(kernel(A, GIB, memory=2 * GIB), kernel(B, GIB))
    assert limit_of(seen_in, kernel_id, seen) == found


def test_doctor_expects_no_more_than_a_slice_that_became_smaller() -> None:
    assert limit_of(usage(kernel(A, GIB, memory=2 * GIB), limit=GIB), A, GIB) == (GIB, False)


@pytest.mark.parametrize("start", ["", " "])
def test_nothing_is_no_kernels_name(start: str) -> None:
    with pytest.raises(NbgpuError, match="Which kernel"):
        find_kernel([kernel(A)], start, NAMES)


def test_kernels_without_gpu_use_are_listed_by_name() -> None:
    text = shown(kernels_table(usage(kernel(A, GIB), kernel(None, GIB)), NAMES))
    rows = [line for line in text.splitlines() if "ipynb" in line or "(other)" in line]
    assert [A[:8] in rows[0], B[:8] in rows[1], "(other)" in rows[2]] == [True, True, True]
    assert "work/train.ipynb" in rows[0]
    assert "other.ipynb" in rows[1]
    assert kernel_name("abcdefghij", {}) == "Kernel abcdefgh"


@pytest.mark.parametrize(
    ("memory", "compute", "limit"),
    [
        ("1/2", None, KernelLimit(memory_bytes=10 * GIB, compute_milli=100)),
        ("50%", None, KernelLimit(memory_bytes=10 * GIB, compute_milli=100)),
        ("512 MiB", None, KernelLimit(memory_bytes=GIB // 2, compute_milli=100)),
        (None, "1/2", KernelLimit(memory_bytes=GIB, compute_milli=125)),
        (None, "20%", KernelLimit(memory_bytes=GIB, compute_milli=50)),
    ],
)
def test_parts_are_of_the_slice_and_what_is_not_named_stays(memory: str | None, compute: str | None, limit: KernelLimit) -> None:
    assert wanted(KernelLimit(memory_bytes=GIB, compute_milli=100), memory, compute, usage()) == limit


@pytest.mark.parametrize(
    ("milli", "whole", "words"),
    [
        (125, 250, "1/2 of the slice's time (12.5 % of the GPU)"),
        (62, 250, "1/4 of the slice's time (6.25 % of the GPU)"),
        (83, 250, "1/3 of the slice's time (8.33 % of the GPU)"),
        (250, 250, "all of the slice's time (25 % of the GPU)"),
        (500, 1000, "1/2 of the slice's time (50 % of the GPU)"),
        (377, 1000, "37.7 % of the slice's time (37.7 % of the GPU)"),
        (7, 250, "2.8 % of the slice's time (0.7 % of the GPU)"),
        (None, 250, "time the slice's"),
    ],
)
def test_a_limit_of_time_is_said_of_the_slice_and_of_the_gpu(milli: int | None, whole: int, words: str) -> None:
    seen = usage()
    devices = [seen.devices[0].model_copy(update={"compute_limit_milli": whole})]
    assert compute_words(KernelLimit(compute_milli=milli), seen.model_copy(update={"devices": devices})) == words


def test_what_was_written_is_what_is_said() -> None:
    for above, below in ((1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (1, 5), (1, 8), (5, 8)):
        limit = wanted(KernelLimit(), None, f"{above}/{below}", usage())
        assert compute_words(limit, usage()).startswith(f"{above}/{below} of the slice's time")


@pytest.mark.parametrize(("memory", "compute", "option"), [("21GiB", None, "--memory"), ("x", None, "--memory"), (None, "2", "--compute")])
def test_junk_names_the_option(memory: str | None, compute: str | None, option: str) -> None:
    with pytest.raises(InvalidValue, match=f"^{option} is"):
        wanted(KernelLimit(), memory, compute, usage())


def test_what_is_over_says_so_in_the_list_and_in_status() -> None:
    over = usage(kernel(A, 6 * GIB, memory=5 * GIB), limit=4 * GIB)
    assert "6 of 4 GiB, over" in shown(kernels_table(over, {})), "the slice's limit is the lower one"
    assert shown(slice_picture(over)).count("6 of 4 GiB, over") == 2
    assert "over" not in shown(slice_picture(usage(kernel(A, 6 * GIB, memory=7 * GIB))))


# ---- the file of names


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime"


def test_names_come_through_the_users_own_file(runtime: Path) -> None:
    path = write_names(
        "slice-0001", {A: {"name": "train.ipynb", "path": "work/train.ipynb", "state": "busy"}, B: {"name": "py", "path": None}}
    )
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_names("slice-0001") == {A: NAMES[A], B: KernelName("py", None)}
    assert read_names("slice-0002") == {}
    assert [one.name for one in runtime.iterdir()] == [path.name]


def test_the_names_of_a_server_that_has_ended_are_forgotten(runtime: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_names("slice-0001", {A: {"name": "train.ipynb", "path": None}})
    path = runtime / "nbgpu-kernels-slice-0001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": gone.pid}))
    assert read_names("slice-0001") == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"pid": "x", "kernels": {}}',
        '{"pid": 1e400, "kernels": {}}',
        '{"pid": PID, "kernels": []}',
        '{"pid": PID, "kernels": {"k": 1, "../x": {"name": "n"}, "j": {"name": 1}, "l": {"name": "n", "path": 5}}}',
    ],
)
def test_junk_in_it_is_no_name(runtime: Path, content: str) -> None:
    runtime.mkdir()
    path = file_of("slice-0001")
    assert path is not None
    path.write_text(content.replace("PID", str(os.getpid())))
    assert read_names("slice-0001") == {}


def test_a_name_moves_no_cursor(runtime: Path) -> None:
    write_names("slice-0001", {A: {"name": "a\x1b[2J\nb", "path": None}})
    terminal = console()
    with terminal.capture() as capture:
        terminal.print(kernels_table(usage(), read_names("slice-0001")))
    assert "\x1b[2J" not in capture.get()
    assert "\\x1b[2J\\nb" in capture.get()
