"""`bench/packing.py` on a made-up trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import packing  # noqa: E402
from packing_replay import arrivals, ordered, replay  # noqa: E402
from packing_traces import made_up_needs, made_up_nodes, read_needs, read_nodes, write_trace  # noqa: E402


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    nodes, needs = made_up_nodes(), made_up_needs(50, 3, models=True)
    node_path, need_path = write_trace(tmp_path, nodes, needs)
    assert read_nodes(node_path) == [type(node)([*node.gpus], node.cpu_milli, node.ram_bytes) for node in nodes]
    assert read_needs(need_path) == needs
    need_path.write_text(need_path.read_text().replace("pod-0007,", "pod-0007,many"))
    with pytest.raises(ValueError, match="line 9"):
        read_needs(need_path)


def test_arrivals_are_all_of_the_trace_first_and_the_seed_decides_the_order() -> None:
    needs = made_up_needs(40, 1)
    first = [one for one, _ in zip(arrivals(needs, 42), range(60), strict=False)]
    assert sorted(first[:40]) == sorted(needs)
    assert first == [one for one, _ in zip(arrivals(needs, 42), range(60), strict=False)]
    assert first != [one for one, _ in zip(arrivals(needs, 43), range(60), strict=False)]


def test_orders_of_nodes() -> None:
    nodes = made_up_nodes()
    assert ordered(nodes, "file", 1) == nodes
    assert [len(node.gpus) for node in ordered(nodes, "sorted", 1)] == sorted((len(node.gpus) for node in nodes), reverse=True)
    assert ordered(nodes, "shuffled", 1) == ordered(nodes, "shuffled", 1) != ordered(nodes, "shuffled", 2)


def test_one_replay_counts_by_hand() -> None:
    """Two devices and requests of 400: four fit, the fifth, which makes 100 % of what was asked for, does not."""
    nodes = [type(made_up_nodes()[0])([made_up_nodes()[0].gpus[0]] * 2, 10_000, None)]
    needs = [need._replace(device_count=1, compute_milli=400, cpu_milli=0, ram_bytes=0, models=None) for need in made_up_needs(9, 1)]
    found = replay(nodes, needs, "fgd", "file", 1)
    assert found.allocated_percent == pytest.approx(100 * 1600 / 2000)
    assert (found.arrived["shared"], found.refused["shared"]) == (5, 1)


@pytest.mark.parametrize("policy", ["ours", "fgd", "best-fit"])
def test_the_same_seed_gives_the_same_figure(policy: str) -> None:
    nodes, needs = made_up_nodes()[:14], made_up_needs(120, 5, models=True)
    one, two = (replay(nodes, needs, policy, "shuffled", 42) for _ in range(2))
    assert (one.allocated_percent, one.refused) == (two.allocated_percent, two.refused)
    assert 60 < one.allocated_percent <= 100
    assert one.arrived["shared"] > one.arrived["8"] >= 0


def test_command(tmp_path: Path) -> None:
    node_path, need_path = write_trace(tmp_path, made_up_nodes()[:10], made_up_needs(80, 5))
    out = tmp_path / "results.json"
    words = [str(need_path), "--nodes", str(node_path), "--shuffles", "1", "--json", "--out", str(out)]
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "packing.py"), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"allocated_percent", "allocated_percent_sorted", "fgd_percent", "fgd_percent_sorted", "refused_by_class"} <= set(found)
    assert found["refused_by_class"]["ours"].keys() == {"cpu", "shared", "1", "2-4", "8"}
    assert len(found["policies"]["ours"]["hash"]) == 12
    assert json.loads(out.read_text())["traces"]["requests"]["allocated_percent"] == found["allocated_percent"]


def test_what_misses_its_bar_is_said() -> None:
    found = {"trace": "openb_pod_list_default", "allocated_percent": 95.9, "allocated_percent_sorted": 95.7, "fgd_percent": 95.0}
    found["refused_by_class"] = {"ours": {"8": 3.0}, "fgd": {"8": 1.0}}
    assert [line.split()[0] for line in packing.judge(found)] == ["allocated_percent_sorted", "class"]
    assert packing.judge({**found, "fgd_percent": 94.0})[1].startswith("CONTROL")
    assert packing.judge({**found, "trace": "mine"}) == []


def test_a_file_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert packing.main([str(tmp_path / "none.csv")]) == 2
    assert "cannot be replayed" in capsys.readouterr().err
