"""What the hardware kit makes of its measurements: values in, figures out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hwkit.analysis import done_at, percentile, rates, runs, shares, time_slices
from hwkit.hub import alive, end_of
from hwkit.ptx import TARGETS, text
from hwkit.resolution_probe import hooks

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000


def test_work_between_two_steps_counts_in_proportion() -> None:
    steps = [(0, 0.0), (100, 10.0), (200, 10.0), (300, 40.0)]
    assert [done_at(steps, when) for when in (-5, 0, 50, 100, 150, 250, 900)] == [0, 0, 5, 10, 10, 25, 40]
    assert done_at([], 5) == 0


def test_rates_are_of_whole_windows() -> None:
    steps = [(0, 0.0), (10**9, 100.0), (2 * 10**9, 300.0), (int(2.5e9), 900.0)]
    assert rates(steps, 0, int(2.5e9), 10**9) == [100, 200]


def test_shares_and_their_errors() -> None:
    figures = shares([[35.0, 15.0], [75.0, 75.0]], 100.0, [30.0, 70.0])
    assert figures["shares_percent"] == [25, 75]
    assert figures["error_mean_points"] == pytest.approx((5 + 15 + 5 + 5) / 4)
    assert figures["error_worst_points"] == 15
    assert figures["busy_percent"] == 100
    assert figures["ratio_error_points"] == 5


def test_percentile_of_few_values() -> None:
    assert percentile([], 0.99) is None
    assert percentile([3.0], 0.5) == 3
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99


def test_the_drivers_slices_are_read_from_two_processes_gaps() -> None:
    """Two processes in turns of 2 ms with 0.1 ms between: each sees the other's turns as gaps."""
    period, turn, switch = 4_200_000, 2 * MS, 100_000
    one = [(n * period, n * period + turn) for n in range(20)]
    other = [(begin + turn + switch, begin + 2 * turn + switch) for begin, _ in one]
    gaps = [(a[1], b[0]) for a, b in pairwise(one)]
    assert runs(one[0][0], one[-1][1], gaps) == one
    figures = time_slices(one, other)
    assert figures["slice_us_median"] == 2000
    assert figures["switch_us_median"] == 100
    assert figures["overlaps"] == 0
    assert figures["lost_percent"] == pytest.approx(4.8, abs=0.5)


def test_processes_that_run_at_once_have_no_slices() -> None:
    together = [(0, 10 * MS)]
    assert time_slices(together, together)["switches"] == 0
    assert time_slices([(0, 0)], [(0, 0)]) == {"switches": 0}  # nothing was executed


def test_every_hook_of_the_limiter_is_asked_for() -> None:
    text = (ROOT / "nodeagent/limiter/functions.h").read_text()
    found = hooks(text)
    names = {name for name, *_ in found}
    pairs = text.count("STREAM_PAIR(cu")
    assert len(found) == len(names) == text.count("HOOK(CUDA, CUresult, cu") + 2 * pairs
    assert ("cuLaunchKernel_ptsz", "cuLaunchKernel", 7000, 1) in found
    assert ("cuMemAlloc_v2", "cuMemAlloc", 3020, 0) in found


def test_the_gpu_kernels_are_text_that_ends() -> None:
    for version, target in TARGETS:
        module = text(version, target)
        assert module.endswith(b"}\n\0")
        assert module.count(b".entry") == 3
        assert f".target {target}".encode() in module


def test_who_does_not_exist_is_not_alive() -> None:
    assert alive(1)
    assert not alive(2**22 + 5)


def test_of_a_crash_its_beginning_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert end_of(log) == ""
    log.write_text("one\ntwo\nthree\nfour\n")
    assert end_of(log) == "two / three / four"
    log.write_text("noise\nFatal Python error: Segmentation fault\n\nCurrent thread:\n  File x, line 1 in call\n" + "deep\n" * 20)
    assert end_of(log).startswith("Fatal Python error: Segmentation fault / ")
    assert "File x, line 1 in call" in end_of(log)
