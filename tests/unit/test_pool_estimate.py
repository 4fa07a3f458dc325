"""What people are told of how long they wait is usually so, and not much longer than it is. Pure."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import pytest
from test_pool_held import Pool

from nbgpu.models import AvailabilityQuery, GrantState, Owner, Shape
from nbgpu_pool.availability import answer
from nbgpu_pool.estimate import queue_forecast
from nbgpu_pool.forecast import ENOUGH_WAITS, RENEW_SECONDS
from nbgpu_pool.sessions import Sessions

HOUR = 3600.0


def calibrated(devices: int, waiting: int, trials: int, seed: int) -> tuple[list[float], list[float]]:
    """Return what the last of `waiting` people is told, and how long it takes, on full GPUs that are all held for lognormal times."""
    luck, mu, sigma = random.Random(seed), 0.4, 1.2
    pool = Pool(devices=devices, queue_per_user=1000)
    for _ in range(500):
        pool.core.sessions.ended("h", luck.lognormvariate(mu, sigma) * HOUR)
    running = [pool.core.known(pool.running(1000)) for _ in range(devices)]
    keys = [pool.ask(1000).request.request_id for _ in range(waiting)]
    assert pool.grant(keys[-1]).state == GrantState.queued
    told: list[float] = []
    took: list[float] = []
    pool.now += 1e7
    for _ in range(trials):
        left: list[float] = []
        for entry in running:  # who looks at a moment of their own meets long sessions more often, anywhere between begin and end
            whole = luck.lognormvariate(mu + sigma**2, sigma) * HOUR
            age = luck.random() * whole
            entry.started = pool.now - age
            left.append(whole - age)
        told.append(queue_forecast(pool.core.books, pool.core.sessions, pool.now)[keys[-1]].seconds)
        for _ in range(waiting - 1):  # those before one run in what came free first, and may end before another does
            left.remove(first := min(left))
            left.append(first + luck.lognormvariate(mu, sigma) * HOUR)
        took.append(min(left))
    return told, took


@pytest.mark.parametrize(("devices", "waiting"), [(1, 1), (16, 1), (16, 8)])
def test_what_is_said_is_usually_so(devices: int, waiting: int) -> None:
    """Of many sessions, one ends long before each usually has: saying when that is promised waits ten times as long as they were."""
    told, took = calibrated(devices, waiting, 300, 7)
    kept = statistics.mean(one <= said for said, one in zip(told, took, strict=True))
    assert 0.6 <= kept <= 0.92, kept
    assert statistics.median(told) <= 4 * statistics.median(took), (statistics.median(told), statistics.median(took))


def test_an_estimate_is_steady() -> None:
    """It is looked at again each few seconds: what is told does not jump about while nothing happens."""
    pool = Pool(devices=8)
    for number in range(300):
        pool.core.sessions.ended("h", 60.0 * (number + 1))
    for _ in range(8):
        pool.running(1000)
        pool.now += 100
    key = pool.ask(1000).request.request_id
    told: list[float] = []
    for _ in range(20):
        pool.now += 5
        told.append(queue_forecast(pool.core.books, pool.core.sessions, pool.now)[key].seconds)
    for before, after in itertools.pairwise(told):
        assert abs(after - (before - 5)) <= 120, told


def test_remaining_time_of_a_session() -> None:
    sessions = Sessions(guess_seconds=1000)
    assert (sessions.remaining_seconds(0), sessions.remaining_seconds(900)) == (1000, 100), "nothing else is known"
    for length in (10, 20, 30, 40):
        sessions.ended(length)
    assert (sessions.guessing, sessions.remaining_seconds(0), sessions.remaining_seconds(100)) == (True, 40, 900), "four, and the guess"
    sessions.ended(50)
    assert (sessions.guessing, sessions.remaining_seconds(0)) == (False, 40), "four of five ended within 40 s"
    assert (sessions.remaining_seconds(0, 0.1), sessions.remaining_seconds(0, 0.5)) == (10, 30)
    assert sessions.remaining_seconds(35) == 15
    assert (sessions.remaining_seconds(100), sessions.guesses(100), sessions.guesses(49)) == (100, True, False)
    assert sessions.remaining_seconds(100, 0.5) == pytest.approx(41.4, abs=0.1)


def waits(pool: Pool, factor: float) -> tuple[float, float]:
    """Let one wait `factor` times as long as the sessions seen so far say; return what was told and how long it took."""
    holder = pool.running(1000)
    pool.now += RENEW_SECONDS
    key = pool.ask(1000).request.request_id
    told = pool.grant(key).wait_seconds
    assert told is not None
    begun = pool.now
    for _ in range(20):  # its hub goes on asking
        pool.sync(95 * factor / 20)
        pool.core.touch(pool.core.known(key), pool.now)
    del pool.seen[holder]
    pool.core.mark += 1
    pool.core.sessions.of("h")._lengths.clear()  # type: ignore[reportPrivateUsage]
    for _ in range(10):
        pool.core.sessions.ended("h", 100)
    pool.sync()
    took = pool.now - begun
    assert pool.grant(key).state == GrantState.reserved
    pool.core.cancel(key, None, pool.now)
    pool.sync()
    return told, took


@pytest.mark.parametrize(("factor", "stretch"), [(1.0, 1.0), (2.0, 2.1), (20.0, 4.0), (0.2, 0.5)])
def test_what_is_told_is_learnt_from_what_it_was(factor: float, stretch: float) -> None:
    """Whatever makes waits here longer or shorter than sessions tell, what is told follows; within bounds."""
    pool = Pool()
    for _ in range(10):
        pool.core.sessions.ended("h", 100)
    for number in range(ENOUGH_WAITS):
        assert pool.core.forecasts.stretch == 1, number
        told, took = waits(pool, factor)
        assert told == pytest.approx(95, abs=5)
    assert pool.core.forecasts.stretch == pytest.approx(stretch, rel=0.1)
    told, took = waits(pool, factor)
    assert told == pytest.approx(95 * stretch, rel=0.15), (told, took)


def test_shapes_of_a_start_page_are_estimated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks every few seconds for as many shapes as there are profiles."""
    pool = Pool()
    pool.running(1000)
    pool.ask(1000)
    made: list[int] = []
    real = queue_forecast

    def counting(*arguments: Any) -> dict[str, Any]:
        made.append(len(arguments[3]))
        return real(*arguments)

    monkeypatch.setattr("nbgpu_pool.forecast.queue_forecast", counting)
    query = AvailabilityQuery(owner=Owner(hub="h", user="w"), shapes=[Shape(compute_milli=milli) for milli in (125, 250, 500)])
    found = [one.wait_seconds for one in answer(pool.core, query, pool.now)]
    assert made == [1, 1, 1]
    made.clear()
    pool.now += RENEW_SECONDS
    again = [one.wait_seconds for one in answer(pool.core, query, pool.now)]
    assert made == [3]
    assert all(one is not None for one in found + again)
