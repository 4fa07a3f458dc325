"""The GPU-time policy in virtual time: shares, limits, nobody starves, the dead and the dishonest cost only themselves."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gpu_model import Load, Model, build_policy
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    return build_policy(tmp_path_factory.mktemp("policy"))


@contextmanager
def model(lib: c.CDLL | None, *loads: Load) -> Iterator[Model]:
    m = Model(lib, list(loads))
    try:
        yield m
    finally:
        m.close()


def errors_of(lib: c.CDLL | None, loads: list[Load], windows: int = 3) -> tuple[float, float, float]:
    """Return the mean and the largest error in points over 1-s windows, after a warm-up, and the mean busy percentage."""
    with model(lib, *loads) as m:
        m.run(0.3)
        errors, busy = [], []
        for _ in range(windows):
            shares = m.run(1)
            errors += [abs(share - load.milli / 10) for share, load in zip(shares, loads, strict=True)]
            busy.append(m.busy_percent)
        return sum(errors) / len(errors), max(errors), sum(busy) / len(busy)


# Equal shares come out right without a scheduler when everybody has one process: the first slice has three.
SCENARIOS = {
    "50/50": [Load(500, processes=3), Load(500)],
    "75/25": [Load(750), Load(250)],
    "8 x 12.5": [Load(125, processes=3), *[Load(125)] * 7],
    "10/20/30/40": [Load(100), Load(200), Load(300), Load(400)],
}


@pytest.mark.parametrize("kernel_ms", [1, 5])
@pytest.mark.parametrize("name", SCENARIOS)
def test_shares_in_one_second_windows(policy: c.CDLL, name: str, kernel_ms: float) -> None:
    loads = [Load(x.milli, kernel_ms, x.strict, x.processes) for x in SCENARIOS[name]]
    mean, worst, busy = errors_of(policy, loads)
    assert mean <= 2.0
    assert worst <= 4.0
    assert busy >= 96
    control, _, _ = errors_of(None, loads, windows=1)
    assert control > 2.0, "the driver alone must miss these shares, or the test shows nothing"


@pytest.mark.parametrize("kernel_ms", [1, 5])
def test_strict_alone_stays_at_its_share(policy: c.CDLL, kernel_ms: float) -> None:
    _, worst, _ = errors_of(policy, [Load(300, kernel_ms, strict=True)])
    assert worst <= 1.0
    control, _, _ = errors_of(None, [Load(300, kernel_ms, strict=True)], windows=1)
    assert control > 50


def test_burst_alone_takes_all_and_is_left_alone(policy: c.CDLL) -> None:
    with model(policy, Load(250), Load(250)) as m:
        for process in m.slices[1]:
            process.alive = False
        m.run(0.1)
        assert m.run(0.5)[0] > 99
        assert m.lib is not None
        assert m.lib.harness_turn_end(m.device, m.ids[0]) == 0
        assert m.wake_at > m.now + 10**9, "nothing to wake up for"


def test_strict_and_burst_share(policy: c.CDLL) -> None:
    with model(policy, Load(300, strict=True), Load(200)) as m:
        m.run(0.3)
        strict, burst = m.run(2)
        assert strict == pytest.approx(30, abs=1.5)
        assert burst > 65, "burst takes what strict may not"


def test_newcomer_does_not_wait_and_does_not_take_over(policy: c.CDLL) -> None:
    with model(policy, Load(500), Load(250, gap_ms=400)) as m:
        m.run(2)
        m.slices[1][0].load = Load(250)
        waited = 0
        while not m.slices[1][0].queue:
            m.tick()
            waited += 1
            assert waited < 600, "a waking slice is let in within 60 ms"
        for _ in range(3):
            shares = m.run(1)
            assert shares[0] == pytest.approx(66.7, abs=4)
            assert shares[1] == pytest.approx(33.3, abs=4)


@pytest.mark.parametrize("trainers", [1, 2])
@pytest.mark.parametrize(("kernel_ms", "pause_ms"), [(0.2, 3), (0.2, 20), (1, 10), (3, 20)])
def test_small_work_beside_a_trainer_that_was_alone_is_let_in_at_once(
    policy: c.CDLL, trainers: int, kernel_ms: float, pause_ms: float
) -> None:
    """A GPU kernel and a pause, in a slice of 30 % that is not used up by that."""
    with model(policy, Load(300, kernel_ms, gap_ms=pause_ms), *[Load(700 // trainers)] * trainers) as m:
        m.run(0.3)
        [small], waits, waited = m.slices[0], [], 0
        for _ in range(20_000):
            m.tick()
            if small.want(m.now):
                waited += 1
            elif waited:
                waits.append(waited)
                waited = 0
        assert len(waits) > 50
        assert max(waits) <= 4, f"ticks of 0.1 ms at the gate: {sorted(waits)}"


def test_sync_heavy_slice_gets_its_share(policy: c.CDLL) -> None:
    with model(policy, Load(750), Load(250, kernel_ms=1, gap_ms=0.1)) as m:
        m.run(0.5)
        shares = m.run(2)
        assert shares[1] > 19, "launch and synchronize must not lose the share"
    with model(None, Load(750), Load(250, kernel_ms=1, gap_ms=0.1)) as m:
        m.run(0.5)
        assert m.run(1)[1] > 30


def test_dead_process_frees_the_device_at_once(policy: c.CDLL) -> None:
    with model(policy, Load(500), Load(500)) as m:
        m.run(0.5)
        victim = m.slices[0][0]
        victim.alive = False
        victim.queue.clear()
        assert m.run(0.2)[1] > 95


def test_who_never_says_idle_blocks_nobody(policy: c.CDLL) -> None:
    """A slice that keeps saying busy loses the device two periods after its turn, and pays for it."""
    with model(policy, Load(500, reports=False), Load(500)) as m:
        m.run(1)
        shares = m.run(2)
        assert shares[1] > 45
        assert m.lib is not None
        assert m.lib.harness_overruns(m.device, m.ids[0]) > 0


def test_suspended_slice_gets_nothing_until_resumed(policy: c.CDLL) -> None:
    with model(policy, Load(500), Load(500)) as m:
        m.run(0.2)
        assert m.lib is not None
        m.lib.harness_suspend(m.device, m.ids[0], 1, m.now)
        m.wake_at = m.now
        m.run(0.1)
        assert m.run(0.5)[0] == 0
        m.lib.harness_suspend(m.device, m.ids[0], 0, m.now)
        m.wake_at = m.now
        m.run(0.3)
        assert m.run(1)[0] == pytest.approx(50, abs=3)


def test_new_share_holds_from_the_next_turn_on(policy: c.CDLL) -> None:
    with model(policy, Load(500), Load(500)) as m:
        m.run(0.5)
        assert m.lib is not None
        m.lib.harness_set(m.device, m.ids[0], 250, 0, m.now)
        m.run(0.2)
        assert m.run(1)[0] == pytest.approx(33.3, abs=2)


loads_strategy = st.lists(
    st.builds(
        Load,
        milli=st.sampled_from([50, 100, 125, 200, 250]),
        kernel_ms=st.sampled_from([0.2, 1.0, 3.0, 7.0]),
        strict=st.booleans(),
        processes=st.integers(1, 2),
        gap_ms=st.sampled_from([None, None, 0.1, 5.0]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(loads=loads_strategy)
def test_nobody_starves_and_strict_holds(policy: c.CDLL, loads: list[Load]) -> None:
    """Whatever is mixed: who always has work gets its share or more, a strict slice never more than its own."""
    with model(policy, *loads) as m:
        m.run(0.4)
        shares = m.run(1.5)
        for share, load in zip(shares, loads, strict=True):
            if load.strict:
                assert share <= load.milli / 10 + 3
            if load.gap_ms is None:
                assert share >= load.milli / 10 - 3


def test_gpu_kernels_longer_than_a_turn_are_paid_for(policy: c.CDLL) -> None:
    """They cannot be stopped: who has them gets about its share, over seconds."""
    with model(policy, Load(300, kernel_ms=100), Load(700)) as m:
        m.run(1)
        long, short = m.run(4)
        assert 20 < long < 36
        assert short > 62
        assert m.lib is not None
        assert m.lib.harness_overruns(m.device, m.ids[0]) > 0
    with model(None, Load(300, kernel_ms=100), Load(700)) as m:
        assert m.run(1)[0] > 45
