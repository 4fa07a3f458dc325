"""The hardware kit from its command line: on the simulated driver, and on a machine without any."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hwkit.facts import FACTS
from hwkit.kit import Kit
from hwkit.plan import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "bench" / "hardware.py"
LIMITER = ROOT / "nodeagent" / "nbgpu_agent" / "_lib" / "libnbgpu.so"
ENDED = {"done", "skipped", "cut"}
KEYS = {"report", "version", "simulated", "complete", "written", "command", "seconds", "budget_seconds", "nbgpu_by"}
KEYS |= {"machine", "sections", "facts", "comparison"}


def run(out: Path, *words: str, **env: str) -> tuple[dict[str, Any], str, str]:
    """Run the kit; return its report (data, text) and what it printed."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--out", str(out), *words], capture_output=True, text=True, timeout=120, env=os.environ | env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "hardware.json").read_text()), (out / "hardware.md").read_text(), done.stdout


def check_schema(report: dict[str, Any]) -> None:
    """What whoever reads the data may rely on."""
    assert set(report) == KEYS
    assert (report["report"], report["version"]) == ("nbgpu hardware", 1)
    for section in report["sections"]:
        assert set(section) == {"name", "title", "status", "reason", "results", "seconds"}
        assert section["status"] in {"done", "skipped", "cut", "failed"}
        assert bool(section["reason"]) == (section["status"] != "done"), section
        assert isinstance(section["results"], dict)
    for fact in report["facts"]:
        assert set(fact) == {"name", "source", "claim", "verdict", "measured", "detail"}
        assert fact["verdict"] in {"holds", "differs", "unknown", "skipped"}
        assert fact["measured"]
        assert fact["source"]
    assert [fact["name"] for fact in report["facts"]] == list(FACTS)
    for row in report["comparison"]:
        assert set(row) <= {"workload", "nbgpu", "driver alone", "HAMi-core"}


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {section["name"]: section for section in report["sections"]}


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {fact["name"]: fact["verdict"] for fact in report["facts"]}


@pytest.mark.slow
def test_every_section_runs_on_the_simulated_driver(tmp_path: Path) -> None:
    report, text, _ = run(tmp_path, "--simulated")
    check_schema(report)
    assert report["simulated"]
    assert report["complete"]
    assert [section["name"] for section in report["sections"]] == [section.name for section in SECTIONS]
    sections = by_name(report)
    assert {name: s["reason"] for name, s in sections.items() if s["status"] not in ENDED} == {}
    for name in ("machine", "start", "resolution", "contexts", "driver-time", "view", "races"):
        assert sections[name]["status"] == "done", sections[name]
    facts = verdicts(report)
    for name in (
        "nvml-pids",
        "proc-address",
        "resolution-escapes",
        "slice-view",
        "refusals",
        "filled-slice",
        "usage-agrees",
        "no-overshoot",
    ):
        assert facts[name] == "holds", [fact for fact in report["facts"] if fact["name"] == name]
    race = next(row for row in report["comparison"] if "race" in row["workload"])
    assert race["nbgpu"]["over_limit_mib"] <= by_name(report)["races"]["results"]["nbgpu"]["driver_s_own_mib"]
    assert race["driver alone"]["over_limit_mib"] > 0, "the control: without limits the same work must exceed the limit"
    assert "nbgpu run" in report["nbgpu_by"]
    assert "(*simulated*)" in text
    assert "| nbgpu | driver alone | HAMi-core |" in text


@pytest.mark.slow
def test_memory_that_is_moved_to_the_host_and_back(tmp_path: Path) -> None:
    report, _, _ = run(tmp_path, "--simulated", "--only", "parking")
    check_schema(report)
    found = by_name(report)["parking"]
    assert found["status"] == "done", found
    facts = verdicts(report)
    names = ("checkpoint-nvml", "checkpoint-same", "checkpoint-speed", "checkpoint-killed")
    assert [name for name in names if facts[name] != "holds"] == []
    assert facts["checkpoint-caller-killed"] in ("holds", "unknown"), "unknown: no kill came in time"
    for row in found["results"].values():
        assert row["held"] > row["held_away"] == 0
    # the control: a driver that cannot restore
    report, _, _ = run(tmp_path, "--simulated", "--only", "parking", NBGPU_SIM_CHECKPOINT_FAULT="restore")
    found = by_name(report)["parking"]
    assert (found["status"], "restore failed" in found["reason"]) == ("failed", True), found


@pytest.mark.slow
def test_plain_python_without_the_agents_packages_is_enough(tmp_path: Path) -> None:
    """``-S`` takes the packages away; a library that does nothing stands in for HAMi-core."""
    words = ["--simulated", "--only", "view,races,hami-core", "--hami-core", str(LIMITER), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-S", str(PROGRAM), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "hardware.json").read_text())
    check_schema(report)
    assert "without an agent" in report["nbgpu_by"]
    assert [section["status"] for section in report["sections"]] == ["done"] * 4
    assert verdicts(report)["no-overshoot"] == verdicts(report)["refusals"] == "holds"
    race = next(row for row in report["comparison"] if "race" in row["workload"])
    own = by_name(report)["races"]["results"]["nbgpu"]["driver_s_own_mib"]
    assert race["nbgpu"]["over_limit_mib"] <= own == 4 * 2, "code alone, 2 MiB in each of four processes"
    assert race["HAMi-core"]["over_limit_mib"] > 0
    hami = by_name(report)["hami-core"]["results"]
    assert {name: what["failed"] for name, what in hami.items() if "failed" in what} == {}
    assert any(row["workload"].startswith("shares 70/30") and row["HAMi-core"]["busy_percent"] > 50 for row in report["comparison"])


def test_without_a_driver_everything_is_skipped_and_said(tmp_path: Path) -> None:
    if any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia/version")):
        pytest.skip("this machine has an NVIDIA driver")
    report, text, printed = run(tmp_path)
    check_schema(report)
    assert {section["status"] for section in report["sections"]} == {"skipped"}
    assert all("no NVIDIA driver" in section["reason"] for section in report["sections"])
    assert {fact["verdict"] for fact in report["facts"]} == {"skipped"}
    assert "no NVIDIA driver" in text
    assert text.startswith("# nbgpu on a machine without a GPU to measure\n")
    assert "real hardware" not in text
    assert "no NVIDIA driver" in printed


def test_a_section_that_takes_too_long_is_cut_and_the_next_one_runs(tmp_path: Path) -> None:
    report, _, _ = run(tmp_path, "--simulated", "--only", "resolution,contexts,driver-time,shares,death,nvml", "--budget", "6")
    check_schema(report)
    sections = by_name(report)
    assert sections["machine"]["status"] == "done"
    assert report["complete"]
    assert report["seconds"] < 25
    assert {sections[name]["status"] for name in ("shares", "death", "nvml")} <= {"cut", "skipped"}


def test_names_that_are_no_sections_are_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--only", "shares,sharks"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "sharks" in done.stderr
    done = subprocess.run([sys.executable, str(PROGRAM), "--hami-core", "/nowhere/libvgpu.so"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "/nowhere/libvgpu.so is no file" in done.stderr


def test_held_memory_where_nvml_knows_other_pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container NVML may name processes by the host's pids: then what the device holds more than before counts."""

    class Nvml:
        def memory(self) -> tuple[int, int]:
            return 1000, 9000

        def processes(self) -> dict[int, int]:
            return {7: 400, 8: 300}

    monkeypatch.setattr(Kit, "nvml", Nvml())
    kit = Kit(tmp_path, 0, False, None, tmp_path, 1.0)
    try:
        kit.machine["pids_agree"] = True
        assert kit.held([7, 9], 250) == 400
        kit.machine["pids_agree"] = False
        assert kit.held([7, 9], 250) == 750
    finally:
        kit.close()


@pytest.mark.slow
def test_nothing_is_left_when_the_kit_is_killed(tmp_path: Path) -> None:
    """SIGKILL once its agent answers: agent, pool and workers end by themselves."""
    mark = f"kit-{os.getpid()}-{tmp_path.name}"
    command = [sys.executable, str(PROGRAM), "--simulated", "--out", str(tmp_path), "--budget", "90"]
    kit = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"NBGPU_TEST_MARK": mark})
    assert kit.stdout is not None
    try:
        for line in kit.stdout:
            if "driver-time" in line:
                break
        seen = marked(mark)
        assert len(seen) >= 3, "the control: kit, agent and pool must be seen"
    finally:
        kit.kill()
        kit.communicate(timeout=10)
    deadline = time.monotonic() + 20
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(mark) == {}
    for folder in set(re.findall(r"/tmp/nbgpu-hw-\w+", " ".join(seen.values()))):
        shutil.rmtree(folder)  # who is killed removes nothing


def marked(mark: str) -> dict[int, str]:
    """Return the processes that carry a mark in their environment, and that environment."""
    found: dict[int, str] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"NBGPU_TEST_MARK={mark}" in environment:
                    found[int(path.name)] = " ".join(environment)
            except OSError:
                continue
    return found
