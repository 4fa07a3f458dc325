"""Who holds memory: the choice, and what is asked of the driver when. A driver that is played."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.errors import InvalidValue
from nbgpu.models import Device, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB
from nbgpu_agent.backend import DriverLimits, choose, missing
from nbgpu_agent.cgroups import Cgroups
from nbgpu_agent.events import EventLog
from nbgpu_agent.runtime import StartError
from nbgpu_agent.slicedir import ClaimOf, Record

POD = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
DEVICES = [Device(uuid=f"GPU-{i}", index=i, model="H", node="n", memory_bytes=80 * GIB) for i in range(2)]


class Driver:
    """Says no where it is told to, and notes what it is asked."""

    driver_version = "575.1"

    def __init__(self, limiting: tuple[str, ...] = ("GPU-0", "GPU-1"), refuses: str = ""):
        self.limiting = limiting
        self.refuses = refuses
        self.asked: list[tuple[str, str, int | None]] = []

    def has_limits(self, uuid: str) -> bool:
        return uuid in self.limiting

    def set_limit(self, uuid: str, cgroup: Path, limit_bytes: int | None) -> str | None:
        self.asked.append((uuid, str(cgroup), limit_bytes))
        return "Unknown Error" if uuid == self.refuses and limit_bytes is not None else None


class Live:
    """As much of a slice as is asked."""

    def __init__(self, cgroup: str | None = None, pods: tuple[str, ...] | None = None, devices: int = 1):
        parts = [SliceDevice(uuid=f"GPU-{i}", index=i, model="H", memory_bytes=10 * GIB, compute_milli=100) for i in range(devices)]
        piece = Slice(slice_id="slice-0001", owner=Owner(hub="h", user="ada"), node="n", mode="burst", devices=parts)
        claim = None if pods is None else ClaimOf(uid="u", namespace="n", name="c", pods=pods)
        self.record = Record(slice=piece, uid=None, state="running", created=0, boot_id="b", cgroup=cgroup, claim=claim)
        self.id, self.owner, self.state, self.backend = "slice-0001", "ada/@h", "running", "limiter"
        self.written: list[str | None] = []

    @property
    def slice(self) -> Slice:
        return self.record.slice

    limits = slice

    def save(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        if "limited" in changes:
            self.written.append(changes["limited"])


def limits(driver: Driver, *lives: Live, wanted: bool = True, pod: Path | None = None) -> tuple[DriverLimits, EventLog]:
    events, cgroups = EventLog(), SimpleNamespace(pod_directory=lambda uid: pod if uid == POD else None)
    return DriverLimits(driver, cgroups, wanted, lambda: lives, events), events  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("wanted", "lacks", "backend"),
    [("auto", "", "driver"), ("auto", "no", "limiter"), ("limiter", "", "limiter"), ("driver", "", "driver")],
)
def test_the_choice(wanted: Any, lacks: str, backend: str) -> None:
    assert choose(wanted, lacks).backend == backend
    assert choose(wanted, lacks).reason


def test_a_driver_that_was_asked_for_and_cannot_is_an_error() -> None:
    with pytest.raises(StartError, match="only root may"):
        choose("driver", "only root may set the driver's memory limits")


def test_what_is_no_backend_is_an_error() -> None:
    with pytest.raises(InvalidValue, match="NBGPU_MEMORY_BACKEND"):
        choose("drvier", "")  # type: ignore[arg-type]


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    version_2, version_1 = SimpleNamespace(version_2=True), SimpleNamespace(version_2=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert missing(Driver(), DEVICES, version_2) == ""  # type: ignore[arg-type]
    assert "this driver (575.1)" in missing(Driver(()), DEVICES, version_2)  # type: ignore[arg-type]
    assert missing(Driver(("GPU-0",)), DEVICES, version_2).startswith("GPU 1 (H)")  # type: ignore[arg-type]
    assert "no cgroup v2" in missing(Driver(), DEVICES, version_1)  # type: ignore[arg-type]
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "only root" in missing(Driver(), DEVICES, version_2)  # type: ignore[arg-type]


def test_a_limit_is_written_down_first_set_once_changed_and_taken_away(tmp_path: Path) -> None:
    driver, place = Driver(), str(tmp_path)
    live = Live(place, devices=2)
    keeper, _ = limits(driver, live)
    keeper.hold(live)  # type: ignore[arg-type]
    keeper.hold(live)  # type: ignore[arg-type]
    assert driver.asked == [("GPU-0", place, 10 * GIB), ("GPU-1", place, 10 * GIB)]
    assert (live.written, live.backend) == ([place], "driver")
    part = live.slice.devices[0].model_copy(update={"memory_bytes": 5 * GIB})
    live.record = live.record.model_copy(update={"slice": live.slice.model_copy(update={"devices": [part, live.slice.devices[1]]})})
    keeper.hold(live)  # type: ignore[arg-type]
    assert driver.asked[2] == ("GPU-0", place, 5 * GIB)
    keeper.end(live)  # type: ignore[arg-type]
    assert driver.asked[-2:] == [("GPU-0", place, None), ("GPU-1", place, None)]
    assert live.written == [place, None]


def test_a_limit_of_an_agent_that_died_is_taken_away_where_none_is_wanted(tmp_path: Path) -> None:
    driver, live = Driver(), Live(str(tmp_path))
    live.save(limited=str(tmp_path))
    keeper, events = limits(driver, live, wanted=False)
    keeper.hold(live)  # type: ignore[arg-type]
    assert (driver.asked, live.record.limited, events.counts) == ([("GPU-0", str(tmp_path), None)], None, {})


def test_a_driver_that_does_not_take_a_limit_leaves_none_and_is_told_once(tmp_path: Path) -> None:
    driver, live = Driver(refuses="GPU-1"), Live(str(tmp_path), devices=2)
    keeper, events = limits(driver, live)
    for _ in range(3):
        keeper.hold(live)  # type: ignore[arg-type]
    assert driver.asked[-2:] == [("GPU-0", str(tmp_path), None), ("GPU-1", str(tmp_path), None)]
    assert (live.record.limited, live.backend, events.counts) == (None, "limiter", {"limiter-only": 1})
    assert "did not take its limit (Unknown Error)" in events.after(-1)[0].message


@pytest.mark.parametrize(
    ("pods", "says"), [((), "several pods"), ((POD, "other"), "several pods"), (("other",), "not to be seen"), ((POD,), "")]
)
def test_the_slice_of_a_claim_is_held_by_its_pods_cgroup(tmp_path: Path, pods: tuple[str, ...], says: str) -> None:
    live = Live(pods=pods)
    keeper, events = limits(Driver(), live, pod=tmp_path)
    keeper.hold(live)  # type: ignore[arg-type]
    assert live.record.limited == (None if says else str(tmp_path))
    assert [says in event.message for event in events.after(-1)] == ([True] if says else [])


def test_a_pod_with_two_slices_is_held_by_the_limiter(tmp_path: Path) -> None:
    live, other = Live(pods=(POD,)), Live(pods=(POD,))
    keeper, events = limits(Driver(), live, other, pod=tmp_path)
    keeper.hold(live)  # type: ignore[arg-type]
    assert "more than one slice" in events.after(-1)[0].message


@pytest.mark.parametrize(
    "name",
    [
        f"kubepods/pod{POD}",
        f"kubepods/burstable/pod{POD}",
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD.replace('-', '_')}.slice",
        f"kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice",
    ],
)
def test_a_pods_cgroup_is_found_before_it_has_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cgroups = Cgroups()
    monkeypatch.setattr(cgroups, "_found", (tmp_path, ""))
    assert cgroups.pod_directory(POD) is None, "control: it is not there yet"
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "cgroup.procs").touch()
    assert cgroups.pod_directory(POD) == tmp_path / name
