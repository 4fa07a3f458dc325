"""GPU time by NVML against GPU time by turns: what samples stand for, and what is owed."""

from __future__ import annotations

from nbgpu_agent.nvml import UtilSample, busy_milli, computed_ns
from nbgpu_agent.reconcile import SAVED_MOST_NS, Account

SECOND_NS = 1_000_000_000
SIXTH_US = 166_667


def test_a_sample_stands_for_the_time_since_the_one_before() -> None:
    start = 5_000_000
    samples = [UtilSample(1, 60, start + SIXTH_US), UtilSample(1, 30, start + 2 * SIXTH_US), UtilSample(2, 10, start + 2 * SIXTH_US)]
    assert computed_ns(samples, start, {1: start, 2: start}) == {1: SIXTH_US * 900, 2: SIXTH_US * 100}
    assert busy_milli(samples) == {1: 450, 2: 100}


def test_a_process_that_was_idle_is_not_taken_to_have_computed_all_the_time() -> None:
    """Drivers leave out the samples of those who did nothing: its one sample is no mean of the whole second."""
    start = 5_000_000
    others = [UtilSample(2, 20, start + i * SIXTH_US) for i in range(1, 7)]
    assert computed_ns([*others, UtilSample(1, 100, start + 6 * SIXTH_US)], start, {1: start, 2: start})[1] == SIXTH_US * 1000


def test_the_first_sample_of_a_process_says_nothing_of_the_time_before_it() -> None:
    """A driver's one sample is the mean since the last question, of a new process that since it came: on an H200 that was taken for a
    second of work that nobody had let it do, and an honest slice paid for it."""
    start = 5_000_000
    assert computed_ns([UtilSample(1, 90, start + 1_900_000)], start, {}) == {}
    late = start + 1_900_000
    assert computed_ns([UtilSample(1, 90, late + SIXTH_US)], late, {1: late}) == {1: SIXTH_US * 900}
    assert computed_ns([UtilSample(1, 90, late + SIXTH_US)], late, {1: late - 3_000_000}) == {}, "it may have been idle, and left out"


def test_before_the_first_stamp_nothing_is_known() -> None:
    assert computed_ns([UtilSample(1, 100, 5_000_000)], 0, {}) == {}


def test_samples_that_cannot_be_are_left_out() -> None:
    assert computed_ns([UtilSample(1, 4_000_000, 6_000_000), UtilSample(0, 50, 6_000_000)], 5_000_000, {0: 5_000_000, 1: 5_000_000}) == {}
    assert computed_ns([UtilSample(1, 50, 4_000_000)], 5_000_000, {1: 3_900_000}) == {}
    assert computed_ns([UtilSample(1, 50, 3_600_000_000)], 5_000_000, {1: 5_000_000}) == {}


def test_who_computes_no_more_than_it_is_let_owes_nothing_however_late_that_is_known() -> None:
    account, held, owed = Account(0, 0), 0, 0
    computed = [0, 0, *[SECOND_NS // 2] * 20]
    for second in range(1, 21):
        held += SECOND_NS // 2
        owed += account.look(computed[second], held, second * SECOND_NS)
    assert owed == 0


def test_who_computes_more_owes_it_and_no_more_than_a_part_on_top() -> None:
    account, owed = Account(0, 0), 0
    for second in range(1, 11):
        owed += account.look(SECOND_NS // 2, second * SECOND_NS // 10, second * SECOND_NS)
    assert 3.5 * SECOND_NS < owed <= 4 * SECOND_NS * 5 / 4


def test_nobody_saves_up_more_than_the_doubt() -> None:
    account = Account(0, 0)
    for second in range(1, 101):
        assert account.look(0, second * SECOND_NS, second * SECOND_NS) == 0
    taken = owed = 0
    for second in range(101, 111):
        taken += SECOND_NS // 2
        owed += account.look(SECOND_NS // 2, 100 * SECOND_NS, second * SECOND_NS)
    assert owed >= taken - SAVED_MOST_NS - taken // 10
