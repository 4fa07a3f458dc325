"""`bench/notebooks.py` on a small pool and a few days."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import notebooks  # noqa: E402
from notebooks_replay import DAY, HOUR, Workload, arrivals, no_fragments, with_queue, without_queue  # noqa: E402

from nbgpu_pool.placement import Policy  # noqa: E402
from nbgpu_pool.state import Settings  # noqa: E402

SMALL = Workload(devices=16, days=4)


def test_the_workload_is_as_documented() -> None:
    workload = Workload(days=15)
    found = list(arrivals(workload, 0.8, 1))
    assert found == list(arrivals(workload, 0.8, 1)) != list(arrivals(workload, 0.8, 2))
    used = sum(one.milli * one.length for one in found) / 1000 / (200 * 15 * DAY)
    assert used == pytest.approx(0.8, rel=0.1)
    assert sum(one.milli == 250 for one in found) / len(found) == pytest.approx(0.30, abs=0.01)
    assert sum(one.length for one in found) / len(found) == pytest.approx(3 * HOUR, rel=0.05)
    hours = [int(one.at % DAY / HOUR) for one in found]
    assert hours.count(15) / hours.count(3) == pytest.approx(1.6 / 0.4, rel=0.2)


def test_moves_refuse_fewer_and_no_rule_fewer_than_must_be() -> None:
    least = no_fragments(SMALL, 0.8, 1).refused_percent
    best_fit = without_queue(SMALL, 0.8, 1, notebooks.BEST_FIT).refused_percent
    default = without_queue(SMALL, 0.8, 1, Policy())
    moved = without_queue(SMALL, 0.8, 1, Policy(), moves=True)
    assert 0 < least < moved.refused_percent < default.refused_percent
    assert best_fit > least
    assert default.moves == 0 < moved.moves


def test_in_the_queue_all_get_in_and_moves_shorten_the_wait() -> None:
    plain, moved = (with_queue(SMALL, 0.8, 3, Settings(), moves=moves) for moves in (False, True))
    asked = sum(one.at >= SMALL.warm_days * DAY for one in arrivals(SMALL, 0.8, 3))
    assert len(plain.waited) == len(moved.waited) == asked
    assert min(plain.waited) == 0 < moved.wait_mean_min < plain.wait_mean_min
    assert plain.moves == 0 < moved.moves


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "--json",
        "--seeds",
        "2",
        "--queue-seeds",
        "1",
        "--days",
        "3",
        "--devices",
        "8",
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert notebooks.main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    needed = {"refused_percent", "refused_percent_moves", "moves_per_day", "wait_mean_min", "wait_mean_min_moves", "overtaking_most"}
    assert needed <= found["loads"]["0.7"].keys() == found["loads"]["0.8"].keys()


def test_what_misses_its_bar_is_said() -> None:
    found = {
        "refused_percent": 1.2,
        "refused_percent_moves": 0.8,
        "refused_percent_best_fit": 1.5,
        "refused_percent_best_fit_standard_error": 0.1,
    }
    assert [line.split()[0] for line in notebooks.judge(0.7, found)] == ["refused_percent", "CONTROL"]
    assert notebooks.judge(0.7, {**found, "refused_percent": 1.18, "refused_percent_best_fit": 1.36}) == []
    assert notebooks.judge(0.5, found) == []
