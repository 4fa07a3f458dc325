"""The GPU-time policy beside slices that lie about their work, in virtual time: NVML, late and rough, against what they were let do."""

from __future__ import annotations

import ctypes as c
import random

import policy_sweep
import pytest
from gpu_sim import NEVER_BUSY, Gpu, Sim, Work, build

from nbgpu_agent.reconcile import Account

SECOND_NS = 1_000_000_000
SAMPLES = 6
"""Of NVML in a second."""
NOISE_POINTS = 2
"""Of one sample."""


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    return build(tmp_path_factory.mktemp("policy"))


class Watched:
    """A simulation with the agent's second beside it: NVML's samples of each slice, its account, what it was made to pay."""

    def __init__(self, sim: Sim, late_samples: int, pays: bool = True) -> None:
        self.sim, self.pays, self.late = sim, pays, late_samples
        self.random = random.Random(7)
        self.now_ns = 0
        self.busy = [sim.busy_ns(i) for i in range(len(sim.slices))]
        self.accounts = [Account(0, sim.held_ns(i)) for i in range(len(sim.slices))]
        self.samples: list[list[int]] = []
        self.owed = [0] * len(sim.slices)

    def sample(self) -> None:
        """A sixth of a second, and what NVML says of it: whole percents, roughly."""
        self.sim.run(1 / SAMPLES)
        row: list[int] = []
        for i, before in enumerate(self.busy):
            self.busy[i] = self.sim.busy_ns(i)
            percent = round((self.busy[i] - before) * SAMPLES * 100 / SECOND_NS + self.random.uniform(-NOISE_POINTS, NOISE_POINTS))
            row.append(min(100, max(0, percent)) * SECOND_NS // SAMPLES // 100 if self.busy[i] > before else 0)
        self.samples.append(row)

    def second(self) -> list[float]:
        """Advance by one; return the shares in percent."""
        before = list(self.busy)
        for _ in range(SAMPLES):
            self.sample()
        self.now_ns += SECOND_NS
        known = [self.samples.pop(0) for _ in range(max(0, len(self.samples) - self.late))]
        for i, account in enumerate(self.accounts):
            owed = account.look(sum(row[i] for row in known), self.sim.held_ns(i), self.now_ns)
            self.owed[i] += owed
            if owed and self.pays:
                self.sim.owe(i, owed)
        return [(now - was) * 100 / SECOND_NS for now, was in zip(self.busy, before, strict=True)]

    def shares(self, seconds: int) -> list[float]:
        """Return the mean over so many."""
        rows = [self.second() for _ in range(seconds)]
        return [sum(column) / seconds for column in zip(*rows, strict=True)]


LATE = [1, SAMPLES]
"""Samples that are not known yet when the agent asks: a sixth of a second, or one."""


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("kernel_ms", [1.0, 5.0, 15.0])
@pytest.mark.parametrize(("liar", "other"), [(500, 500), (300, 700), (100, 900)])
def test_who_says_that_nothing_of_it_runs_takes_nothing_of_its_neighbour(
    lib: c.CDLL, liar: int, other: int, kernel_ms: float, late: int
) -> None:
    works = [Work(liar, kernel_ms, liar=NEVER_BUSY), Work(other, kernel_ms)]
    with Sim(lib, Gpu(), works) as sim:
        watched = Watched(sim, late)
        watched.shares(10)
        assert watched.shares(20)[1] >= other / 10 - 3
    with Sim(lib, Gpu(), works) as sim:
        control = Watched(sim, late, pays=False)
        control.shares(5)
        assert control.shares(10)[1] < other / 10 - 3


@pytest.mark.parametrize("late", LATE)
def test_a_strict_liar_keeps_to_its_share(lib: c.CDLL, late: int) -> None:
    works = [Work(300, 5.0, strict=True, liar=NEVER_BUSY), Work(300, 5.0)]
    with Sim(lib, Gpu(), works) as sim:
        watched = Watched(sim, late)
        watched.shares(10)
        assert watched.shares(20)[0] <= 33
    with Sim(lib, Gpu(), works) as sim:
        control = Watched(sim, late, pays=False)
        control.shares(5)
        assert control.shares(10)[0] > 33


HONEST = {
    **{name: [Work(milli, 1.0) for milli in millis] for name, millis in policy_sweep.SHARES.items()},
    "70/30, 5 ms": [Work(700, 5.0), Work(300, 5.0)],
    "strict 30 alone": [Work(300, 1.0, strict=True)],
    "strict 30 beside a burst one": [Work(300, 5.0, strict=True), Work(300, 5.0)],
    "100 ms GPU kernels": [Work(300, 100.0), Work(700, 1.0)],
    "100 ms GPU kernels, strict": [Work(300, 100.0, strict=True)],
    "several processes": [Work(500, 2.0, processes=3), Work(500, 2.0)],
    "visits beside trainers": [Work(200, 1.0, work_ms=5, gap_ms=45), Work(400, 5.0), Work(400, 5.0)],
    "launches and waits": [Work(250, 1.0, work_ms=1, gap_ms=0.1), Work(750, 1.0)],
    "comes and goes": [Work(500, 5.0, work_ms=900, gap_ms=1100), Work(500, 5.0, work_ms=1700, gap_ms=700)],
    "alone": [Work(250, 1.0)],
}


@pytest.mark.parametrize("name", HONEST)
def test_who_says_what_it_does_owes_nothing(lib: c.CDLL, name: str) -> None:
    for gpu in (Gpu(), Gpu(0.5, 0.5, 0.5), Gpu(6, 0.05, 0.0, notice_ms=0.02)):
        for late in LATE:
            with Sim(lib, gpu, HONEST[name]) as sim:
                watched = Watched(sim, late)
                watched.shares(20)
                assert watched.owed == [0] * len(watched.owed)
