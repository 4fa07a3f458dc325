"""What the scheduling policy must reach over a whole sweep of drivers and hosts, in virtual time: cells, bars, verdicts.

A cell is a driver (time slice, switch cost), hosts (jitter of their submissions) and loads. Slices stop by themselves at their turns' ends,
as the limiter has it, or (the policy alone) their gates close on time. Shares are those of device time in windows of a second; busy is the
GPU's, as a part of what one tenant alone, without limiter, keeps it busy in the same cell.
Run by ``python bench/compute.py --policy`` and, on fewer cells, by test_sched_sweep.py.
"""

from __future__ import annotations

import ctypes as c
import dataclasses
import itertools
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_sim import Gpu, Sim, Work

SLICES_MS = (0.5, 1, 2, 4, 6)
SWITCHES_MS = (0.05, 0.1, 0.2, 0.5)
JITTERS_MS = (0.0, 0.1, 0.25, 0.5)
LATE_MS, LATE_SWITCH_MS = 0.25, 0.2
"""How late slices may be with stopping and with their rings where a switch costs no more than this: the two lose time alike."""
KERNELS_MS = (1.0, 5.0)
SHARES = {"50/50": (500, 500), "70/30": (700, 300), "10/20/30/40": (100, 200, 300, 400), "8 x 12.5": (125,) * 8}
STRICT_BESIDE = {"50/50": "strict 50 beside 50", "70/30": "strict 30 beside 70"}
MEAN_POINTS, WORST_POINTS, BUSY_RATIO = 1.0, 2.0, 0.99
STRICT_POINTS, LATE_STRICT_POINTS = 0.5, 0.6
LONG_LEAST, LONG_MOST = 24.0, 30.0
LONG_BESIDE_MILLIS, LONG_BESIDE_KERNELS_MS = (300, 550), (20.0, 50.0, 100.0)
LONG_BESIDE_LEAST = 0.9
"""Of its share, for a strict slice beside GPU kernels so long (where its own are, the part that LONG_LEAST is of LONG_MOST); and of that
what the driver does not lose when it runs two in turn."""
GATE_P99_MS, VISIT_RATIO, VISIT_BUSY = 1.0, 0.6, 0.97


@dataclass(frozen=True)
class Figures:
    """What one play gave: errors in points over all windows and slices, the GPU's busy time in percent."""

    mean: float
    worst: float
    busy: float


def whole_sweep(seeds: Iterable[int] = (1, 2, 3)) -> Iterator[Gpu]:
    """Every driver and host of the sweep."""
    for slice_ms, switch_ms, jitter_ms, seed in itertools.product(SLICES_MS, SWITCHES_MS, JITTERS_MS, seeds):
        yield Gpu(slice_ms, switch_ms, jitter_ms, seed=seed)


def corners() -> list[Gpu]:
    """Its corners and its middle."""
    return [Gpu(*x) for x in itertools.product((0.5, 6), (0.05, 0.5), (0.0, 0.5))] + [Gpu(2, 0.1, 0.1)]


def stopping(gpus: Iterable[Gpu]) -> list[Gpu]:
    """Return the same with slices that stop by themselves: on time, and where that may be, late."""
    on_time = [dataclasses.replace(gpu, rings=True) for gpu in gpus]
    return on_time + [dataclasses.replace(gpu, late_ms=LATE_MS) for gpu in on_time if gpu.switch_ms <= LATE_SWITCH_MS]


def play_shares(lib: c.CDLL, gpu: Gpu, works: list[Work], windows: int, limited: bool = True, warm_up: float = 8.0) -> Figures:
    """Shares in windows of one second after the warm-up."""
    with Sim(lib, gpu, works, limited) as sim:
        sim.run(warm_up + random.Random(repr((gpu, works))).random())  # windows begin anywhere in a period
        shares = [sim.run(1) for _ in range(windows)]
    errors = [abs(got - work.milli / 10) for window in shares for got, work in zip(window, works, strict=True)]
    return Figures(statistics.mean(errors), max(errors), statistics.mean(sum(window) for window in shares))


def share_cell(lib: c.CDLL, gpu: Gpu, millis: tuple[int, ...], kernel_ms: float, windows: int, strict: bool = False) -> dict[str, Any]:
    """One scenario in one cell, with the driver alone beside it; `strict`: the last slice is."""
    works = [Work(milli, kernel_ms) for milli in millis]
    works[-1] = dataclasses.replace(works[-1], strict=strict)
    ours = play_shares(lib, gpu, works, windows)
    alone = play_shares(lib, gpu, [Work(1000, kernel_ms)], 2, limited=False, warm_up=0.2)
    # The driver is fair between processes by itself: in the control the first slice of equals has three.
    first = Work(millis[0], kernel_ms, processes=3 if len(set(millis)) == 1 else 1)
    control = play_shares(lib, gpu, [first, *works[1:]], 2, limited=False, warm_up=0.2)
    ratio = ours.busy / alone.busy
    return {
        "gpu": vars(gpu),
        "kernel_ms": kernel_ms,
        "mean": round(ours.mean, 3),
        "worst": round(ours.worst, 3),
        "busy_ratio": round(ratio, 4),
        "control_mean": round(control.mean, 2),
        "misses": [
            name
            for name, missed in (("mean", ours.mean > MEAN_POINTS), ("worst", ours.worst > WORST_POINTS), ("busy", ratio < BUSY_RATIO))
            if missed
        ],
        "control_blind": control.mean <= MEAN_POINTS,
    }


def strict_cell(lib: c.CDLL, gpu: Gpu, kernel_ms: float, windows: int) -> dict[str, Any]:
    """Strict 30 alone: never more, never less. Late it may begin one GPU kernel more in a turn."""
    ours = play_shares(lib, gpu, [Work(300, kernel_ms, strict=True)], windows)
    control = play_shares(lib, gpu, [Work(300, kernel_ms, strict=True)], 1, limited=False, warm_up=0.2)
    return {
        "gpu": vars(gpu),
        "kernel_ms": kernel_ms,
        "mean": round(ours.mean, 3),
        "worst": round(ours.worst, 3),
        "control_mean": round(control.mean, 2),
        "misses": ["share"] if ours.worst > (LATE_STRICT_POINTS if gpu.late_ms else STRICT_POINTS) else [],
        "control_blind": control.mean <= STRICT_POINTS,
    }


def long_cell(lib: c.CDLL, gpu: Gpu, strict: bool, seconds: int = 60) -> dict[str, Any]:
    """GPU kernels of 100 ms at 30 %: they cannot be stopped, only paid for. Strict and alone, or beside a trainer with 70 %."""
    works = [Work(300, 100, strict=strict)] + ([] if strict else [Work(700, 1)])
    with Sim(lib, gpu, works) as sim:
        sim.run(2)
        share = sim.run(seconds)[0]
    with Sim(lib, gpu, works, limited=False) as sim:
        control = sim.run(2)[0]
    return {
        "gpu": vars(gpu),
        "strict": strict,
        "share": round(share, 2),
        "control_share": round(control, 2),
        "misses": [] if LONG_LEAST <= share <= LONG_MOST + 10 / seconds else ["share"],  # one kernel may lie across the end
        "control_blind": LONG_LEAST <= control <= LONG_MOST + 10 / seconds,
    }


def long_beside_cell(
    lib: c.CDLL, gpu: Gpu, milli: int, kernel_ms: float, strict: bool, own_ms: float = 1.0, seconds: int = 20
) -> dict[str, Any]:
    """Play a strict slice beside one, burst or strict, whose GPU kernels of `kernel_ms` outlast its turns.

    Never far below its share, never above.
    """
    works = [Work(milli, own_ms, strict=True), Work(1000 - milli, kernel_ms, strict=strict)]
    with Sim(lib, gpu, works) as sim:
        sim.run(8)
        share = sim.run(seconds)[0]
    # The driver alone gives it half, which is nearly a share of 55 %: beside that its neighbour has three processes in the control.
    beside = dataclasses.replace(works[1], processes=3 if milli > 500 else 1)
    with Sim(lib, gpu, [works[0], beside], limited=False) as sim:
        control = sim.run(2)[0]
    due = milli / 10
    part = LONG_LEAST / LONG_MOST if own_ms > max(KERNELS_MS) else LONG_BESIDE_LEAST
    least = due * part * gpu.slice_ms / (gpu.slice_ms + gpu.switch_ms)
    most = due + STRICT_POINTS + own_ms / seconds / 10  # one kernel may lie across the end
    return {
        "gpu": vars(gpu),
        "kernel_ms": kernel_ms,
        "own_ms": own_ms,
        "strict": strict,
        "share": round(share, 2),
        "control_share": round(control, 2),
        "misses": [] if least <= share <= most else ["share"],
        "control_blind": least <= control <= most,
    }


def long_beside(lib: c.CDLL, gpus: Iterable[Gpu], milli: int, own_ms: float = 1.0) -> list[dict[str, Any]]:
    """Play it beside every length, burst and strict."""
    cells = itertools.product(gpus, LONG_BESIDE_KERNELS_MS, (False, True))
    return [long_beside_cell(lib, gpu, milli, kernel_ms, strict, own_ms) for gpu, kernel_ms, strict in cells]


def percentile(values: list[float], part: float) -> float:
    """Return the value below which `part` of them are."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def visit_cell(lib: c.CDLL, gpu: Gpu, kernel_ms: float = 1.0, seconds: int = 20, visit_ratio: float = VISIT_RATIO) -> dict[str, Any]:
    """An interactive tenant, 5 ms of work every 50 ms, beside two trainers.

    What a trainer submitted before the visit began can't be taken back, however soon its gate is closed (here at once): with kernels of
    5 ms that is up to 5 ms with one outstanding and 5 to 10 ms with two, which the driver runs in turn with the visitor's work. So at p99 a
    visit takes 5 + 5 = 10 ms under the best of policies, and 5 + 5 + 5 = 15 ms beside two trainers without one: no policy gets below 0.67.
    Beside those kernels a visit is to be no slower than without.
    """
    works = [Work(200, 1, work_ms=5, gap_ms=45), Work(400, kernel_ms), Work(400, kernel_ms)]
    found = []
    for limited in (True, False):
        with Sim(lib, gpu, works, limited) as sim:
            sim.run(1)
            sim.mark()
            busy = sum(sim.run(seconds))
            found.append((percentile(sim.waits_ms(0), 0.99), percentile(sim.visits_ms(0), 0.99), busy))
    (wait, visit, busy), (_, plain_visit, plain_busy) = found
    return {
        "gpu": vars(gpu),
        "kernel_ms": kernel_ms,
        "gate_p99_ms": round(wait, 3),
        "visit_p99_ms": round(visit, 2),
        "plain_visit_p99_ms": round(plain_visit, 2),
        "visit_ratio": round(visit / plain_visit, 3),
        "busy_ratio": round(busy / plain_busy, 4),
        "misses": [
            name
            for name, missed in (
                ("gate", wait > GATE_P99_MS),
                ("visit", visit > visit_ratio * plain_visit),
                ("busy", busy < VISIT_BUSY * plain_busy),
            )
            if missed
        ],
        "control_blind": False,
    }


def sweep(lib: c.CDLL, gpus: list[Gpu], windows: int) -> dict[str, list[dict[str, Any]]]:
    """Every scenario in every cell."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, millis in SHARES.items():
        out[name] = [share_cell(lib, gpu, millis, kernel_ms, windows) for gpu in gpus for kernel_ms in KERNELS_MS]
    for name, strict_too in STRICT_BESIDE.items():
        out[strict_too] = [share_cell(lib, gpu, SHARES[name], kernel_ms, windows, strict=True) for gpu in gpus for kernel_ms in KERNELS_MS]
    out["strict 30 alone"] = [strict_cell(lib, gpu, kernel_ms, windows) for gpu in gpus for kernel_ms in KERNELS_MS]
    out["100 ms kernels at 30"] = [long_cell(lib, gpu, strict) for gpu in gpus for strict in (True, False)]
    for milli in LONG_BESIDE_MILLIS:
        out[f"strict {milli / 10:g} beside 20 to 100 ms kernels"] = long_beside(lib, gpus, milli)
    out["5 ms every 50 ms"] = [visit_cell(lib, gpu) for gpu in gpus]
    out["5 ms every 50 ms, beside 5 ms kernels"] = [visit_cell(lib, gpu, 5.0, visit_ratio=1.0) for gpu in gpus]
    return out
