"""A slice with parts of two devices: a GPU kernel of a collective waits on its device until its peer runs on the other one."""

from __future__ import annotations

import ctypes as c

import pytest
from gpu_model import TICK_NS, Load, Model, Process, build_policy

COLLECTIVE = 0
"""The slice of the collective, on both devices."""


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    return build_policy(tmp_path_factory.mktemp("policy"))


class Rank(Process):
    """Takes its device's time whenever it runs; gets ahead only while its peer runs too."""

    ran = False

    def run(self, ns: int, now: int) -> None:
        self.busy_ns += ns
        self.ran = True


class Pair:
    """Two devices in step; `together`: turns of the collective's slice begin and end on both, as the scheduler's thread has it."""

    def __init__(self, lib: c.CDLL, others: list[list[Load]], together: bool, milli: tuple[int, int]) -> None:
        self.lib, self.together = lib, together
        self.models = [Model(lib, [Load(own, 5.0), *loads]) for own, loads in zip(milli, others, strict=True)]
        self.ranks: list[Rank] = []
        for model in self.models:
            rank = Rank(model.loads[COLLECTIVE])
            model.slices[COLLECTIVE] = [rank]
            self.ranks.append(rank)
        self.useful_ns = 0
        self.was_open = [False, False]

    def agree(self) -> None:
        """What began or ended on one device does so on the other."""
        for me, peer in ((0, 1), (1, 0)):
            is_open = self.models[me].is_open(COLLECTIVE)
            if is_open != self.was_open[me] and self.together:
                model = self.models[peer]
                call = self.lib.harness_pull if is_open else self.lib.harness_close
                if call(model.device, model.ids[COLLECTIVE], model.now):
                    model.wake_at = model.now
                    self.was_open[peer] = is_open
            self.was_open[me] = is_open

    def tick(self) -> None:
        for model in self.models:
            model.decide()
        self.agree()
        for model, rank in zip(self.models, self.ranks, strict=True):
            rank.ran = False
            model.submit()
            model.run_gpu()
            model.now += TICK_NS
        if all(rank.ran for rank in self.ranks):
            self.useful_ns += TICK_NS
            for rank in self.ranks:
                rank.queue[0] -= TICK_NS
                if not rank.queue[0]:
                    rank.queue.pop(0)

    def run(self, seconds: float) -> tuple[float, list[list[float]]]:
        """Advance; return the part of the collective's GPU time in which it got ahead, and the slices' shares on both devices."""
        before = [[sum(p.busy_ns for p in s) for s in m.slices] for m in self.models]
        useful, busy = self.useful_ns, sum(rank.busy_ns for rank in self.ranks)
        for _ in range(int(seconds * 1e9 / TICK_NS)):
            self.tick()
        shares = [
            [(sum(p.busy_ns for p in s) - b) / seconds / 1e7 for s, b in zip(m.slices, was, strict=True)]
            for m, was in zip(self.models, before, strict=True)
        ]
        return 2 * (self.useful_ns - useful) / (sum(rank.busy_ns for rank in self.ranks) - busy), shares


def play(lib: c.CDLL, others: list[list[Load]], together: bool, milli: tuple[int, int] = (500, 500)) -> tuple[float, list[list[float]]]:
    pair = Pair(lib, others, together, milli)
    try:
        pair.run(1)
        return pair.run(3)
    finally:
        for model in pair.models:
            model.close()


OTHERS = {
    "one neighbour each": [[Load(500)], [Load(500, 3.0)]],
    "one neighbour here, three there": [[Load(500)], [Load(200), Load(150), Load(150)]],
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_collective_has_its_turns_on_both_devices_together(policy: c.CDLL, name: str) -> None:
    useful, shares = play(policy, OTHERS[name], together=True)
    print(f"{name}: useful {useful:.2f}, shares {shares}")
    assert useful > 0.85
    for device in shares:
        assert device[COLLECTIVE] == pytest.approx(50, abs=6)
    without, shares = play(policy, OTHERS[name], together=False)
    print(f"{name}, apart: useful {without:.2f}, shares {shares}")
    assert without < 0.7, "gated apart the ranks must spin, or the test shows nothing"


def test_a_larger_part_elsewhere_takes_nothing_of_the_neighbours_here(policy: c.CDLL) -> None:
    _, shares = play(policy, [[Load(500)], [Load(800)]], together=True, milli=(500, 200))
    print(shares)
    assert shares[0][1] > 44
    assert shares[1][1] > 76


def strict_share(lib: c.CDLL, loads: list[Load], pulled: bool) -> float:
    """Return what the second slice gets of a device in percent, while the first begins a turn elsewhere every half millisecond."""
    model = Model(lib, loads)
    try:
        for tick in range(20_000):
            model.decide()
            if pulled and tick % 5 == 0 and lib.harness_pull(model.device, model.ids[0], model.now):
                model.wake_at = model.now
            model.submit()
            model.run_gpu()
            model.now += TICK_NS
        return sum(process.busy_ns for process in model.slices[1]) / (20_000 * TICK_NS) * 100
    finally:
        model.close()


@pytest.mark.parametrize("third", [[], [Load(1)], [Load(100)]], ids=["alone", "beside one far ahead", "beside another"])
def test_turns_that_begin_elsewhere_take_nothing_of_a_strict_neighbour(policy: c.CDLL, third: list[Load]) -> None:
    """A burst slice of the puller's own user that is far ahead must not speak for the strict one."""
    loads = [Load(400), Load(500, strict=True), *third]
    shares = [strict_share(policy, loads, pulled) for pulled in (False, True)]
    print(shares)
    assert shares[1] > 45
