"""On a real GPU: the hardware kit's short sections, and what must hold there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = "start,resolution,contexts,driver-time,view,races,shares,evasion"
MUST_HOLD = ("resolution-escapes", "slice-view", "refusals", "filled-slice", "no-overshoot")

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of one run."""
    out = tmp_path_factory.mktemp("hardware")
    command = [sys.executable, str(ROOT / "bench" / "hardware.py"), "--out", str(out), "--only", SECTIONS, "--budget", "420"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout + done.stderr
    print((out / "hardware.md").read_text())
    return dict(json.loads((out / "hardware.json").read_text()))


def test_nothing_failed(report: dict[str, Any]) -> None:
    assert not report["simulated"]
    assert {section["name"]: section["reason"] for section in report["sections"] if section["status"] == "failed"} == {}


@pytest.mark.parametrize("name", MUST_HOLD)
def test_limits_hold(report: dict[str, Any], name: str) -> None:
    [fact] = [fact for fact in report["facts"] if fact["name"] == name]
    assert fact["verdict"] == "holds", fact


def test_without_the_limiter_the_same_work_exceeds_the_limit(report: dict[str, Any]) -> None:
    [row] = [row for row in report["comparison"] if "race" in row["workload"]]
    assert row["driver alone"]["over_limit_mib"] > 0


def test_shares_are_nearer_than_the_drivers_own(report: dict[str, Any]) -> None:
    [row] = [row for row in report["comparison"] if row["workload"] == "shares 70/30, 1 ms"]
    assert row["nbgpu"]["error_mean_points"] < 5
    assert row["driver alone"]["error_mean_points"] > 10
