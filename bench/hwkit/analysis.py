"""What the measurements mean: functions of values, no I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

Interval = tuple[int, int]


def median(values: Sequence[float]) -> float | None:
    """Return the median; None of nothing."""
    return statistics.median(values) if values else None


def percentile(values: Sequence[float], part: float) -> float | None:
    """Return the value that `part` of all values do not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(part * len(ordered)) - 1))]


def done_at(steps: Sequence[tuple[int, float]], when: int) -> float:
    """Return how much work was done at a moment, between two finished steps in proportion.

    Parameters
    ----------
    steps : sequence of (ns, work)
        When each step was finished and how much was done by then, in order.
    when : int
        The moment, ns.
    """
    if not steps or when <= steps[0][0]:
        return steps[0][1] if steps else 0.0
    for (t0, w0), (t1, w1) in pairwise(steps):
        if when <= t1:
            return w0 + (w1 - w0) * (when - t0) / max(1, t1 - t0)
    return steps[-1][1]


def rates(steps: Sequence[tuple[int, float]], begin: int, end: int, window_ns: int) -> list[float]:
    """Return work per second in each whole window between two moments."""
    found: list[float] = []
    at = begin
    while at + window_ns <= end:
        found.append((done_at(steps, at + window_ns) - done_at(steps, at)) * 1e9 / window_ns)
        at += window_ns
    return found


def shares(columns: Sequence[Sequence[float]], alone: float, due: Sequence[float]) -> dict[str, object]:
    """Return shares of the device and their errors.

    Parameters
    ----------
    columns : one list for each slice
        Its rate in each window.
    alone : float
        The rate of one process that has the device for itself.
    due : one number for each slice
        Its share, percent.
    """
    windows = [[rate / alone * 100 for rate in column] for column in columns]
    errors = [abs(got - wanted) for column, wanted in zip(windows, due, strict=True) for got in column]
    means = [statistics.mean(column) if column else 0.0 for column in windows]
    total = sum(means)
    relative = [mean / total * 100 if total else 0.0 for mean in means]
    due_total = sum(due)
    return {
        "due_percent": list(due),
        "shares_percent": [round(mean, 2) for mean in means],
        "of_what_was_done_percent": [round(part, 2) for part in relative],
        "error_mean_points": round(statistics.mean(errors), 2) if errors else None,
        "error_worst_points": round(max(errors), 2) if errors else None,
        "ratio_error_points": round(max(abs(r - d * 100 / due_total) for r, d in zip(relative, due, strict=True)), 2) if total else None,
        "busy_percent": round(total, 2),
        "windows": [[round(value, 2) for value in column] for column in windows],
    }


def runs(first: int, last: int, gaps: Sequence[Interval]) -> list[Interval]:
    """Return when a GPU kernel ran, from when it did not."""
    edges = [first, *[edge for gap in gaps for edge in gap], last]
    return [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]


def time_slices(one: Sequence[Interval], other: Sequence[Interval]) -> dict[str, object]:
    """Return the driver's time slice and what a switch costs, from when the GPU kernels of two processes ran.

    Only what lies where both were there counts, and of each only whole runs.
    """
    if not one or not other or one[-1][1] <= one[0][0] or other[-1][1] <= other[0][0]:
        return {"switches": 0}  # nothing ran: the simulated driver executes no GPU kernel
    begin, end = max(one[0][0], other[0][0]), min(one[-1][1], other[-1][1])
    marked = sorted([(run, 0) for run in one] + [(run, 1) for run in other])
    inside = [(run, who) for run, who in marked if run[0] > begin and run[1] < end]
    lengths = [(run[1] - run[0]) / 1e3 for run, _ in inside]
    switches, overlaps = [], 0
    for (before, a), (after, b) in pairwise(marked):
        if a == b or before[1] < begin or after[0] > end:
            continue
        if after[0] < before[1]:
            overlaps += 1
        else:
            switches.append((after[0] - before[1]) / 1e3)
    lost = sum(switches) / max(1e-9, sum(switches) + sum(lengths)) * 100 if switches else None
    return {
        "switches": len(switches),
        "overlaps": overlaps,
        "slice_us_median": median(lengths),
        "slice_us_p90": percentile(lengths, 0.9),
        "switch_us_median": median(switches),
        "switch_us_p90": percentile(switches, 0.9),
        "lost_percent": None if lost is None else round(lost, 2),
    }
