"""How long the pool takes to decide where a request goes, inside the process: the second half of `bench/pool.py`.

On the service's own books. Sessions of the notebook mix come and go on a fleet of which 85 % is in use; timed is where each request goes
(`decide`), and what its booking renews (`after`: in the service it comes after the answer, or with the next turn of its loop).
"""

from __future__ import annotations

import gc
import random
import statistics
import time

from pool_load import SIZES, WEIGHTS

from nbgpu.models import Device, Owner, Request
from nbgpu_pool.books import Books, Entry
from nbgpu_pool.placement import DEFAULT_POLICY
from nbgpu_pool.shapes import want_of

GIB = 1024**3
BUSY = 0.85
FLEETS = (6212, 25_000, 100_000)


def fleet(count: int) -> list[Device]:
    """Return so many devices of two models, in nodes of 8."""
    return [
        Device(uuid=f"GPU-{number:06}", index=number % 8, model=("H100", "A100")[number // 8 % 3 == 0], node=f"node-{number // 8:05}",
               memory_bytes=(82, 42)[number // 8 % 3 == 0] * GIB, reserve_bytes=2 * GIB, simulated=True)
        for number in range(count)
    ]  # fmt: skip


class Traffic:
    """Sessions that come and go, on books of one rule.

    Parameters
    ----------
    devices : list of Device
    by_value : bool
        The rule by value instead of best fit.
    """

    def __init__(self, devices: list[Device], *, by_value: bool):
        self.books = Books()
        if by_value:
            self.books.by_value()
        self.books.rebuild(devices)
        self.rng = random.Random(42)
        self.held: list[Entry] = []
        self.number = 0
        self.decide: list[float] = []
        self.after: list[float] = []

    def come(self, *, timed: bool = False, fill: bool = False) -> bool:
        """Let one come; False where there is no room for it. To `fill` a fleet best fit will do for both rules."""
        self.number += 1
        owner = Owner(hub="hub", user=f"user-{self.number % 5000}")
        request = Request(request_id=f"request-{self.number}", owner=owner, compute_milli=self.rng.choices(SIZES, WEIGHTS)[0])
        entry = Entry(request, want_of(request), self.number, 0.0)
        self.books.add(entry)
        begun = time.perf_counter()
        decide = self.books.fitting if fill else self.books.decide
        found = decide(entry.want, frozenset(), None, DEFAULT_POLICY)
        decided = time.perf_counter()
        if found is None:
            self.books.entries.pop(entry.slice_id)
            return False
        self.books.give(entry, found, [])
        if not fill:
            self.books.refresh()
        if timed:
            self.decide.append(decided - begun)
            self.after.append(time.perf_counter() - decided)
        self.held.append(entry)
        return True

    def go(self) -> None:
        """Let any of them end."""
        at = self.rng.randrange(len(self.held))
        self.held[at], self.held[-1] = self.held[-1], self.held[at]
        entry = self.held.pop()
        self.books.take_back(entry, entry.state)
        self.books.entries.pop(entry.slice_id)
        self.books.refresh()


def decide(devices: list[Device], *, by_value: bool, decisions: int) -> dict[str, float]:
    """Return the times of so many decisions, in us."""
    traffic = Traffic(devices, by_value=by_value)
    least = (1 - BUSY) * 1000 * len(devices)
    while traffic.books.free_milli > least:
        traffic.come(fill=True)
    for _ in range(300):  # a while of the same, until all that is kept is there
        traffic.go()
        traffic.come()
    gc.collect()
    gc.freeze()
    for _ in range(decisions):
        traffic.go()
        traffic.come(timed=True)
    gc.unfreeze()
    micro = sorted(1e6 * one for one in traffic.decide)
    return {
        "median_us": round(statistics.median(micro), 2),
        "p99_us": round(micro[int(0.99 * len(micro))], 1),
        "after_us": round(1e6 * statistics.median(traffic.after), 1),
        "after_p99_us": round(1e6 * sorted(traffic.after)[int(0.99 * len(traffic.after))], 1),
    }


def scaling(quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by number of devices and rule, the times of decisions."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for count in FLEETS[: 1 if quick else None]:
        devices = fleet(count)
        decisions = 2000 if quick or count > FLEETS[0] else 10_000
        found[str(count)] = {
            "decide": decide(devices, by_value=False, decisions=decisions),
            "value_decide": decide(devices, by_value=True, decisions=decisions),
        }
    return found
