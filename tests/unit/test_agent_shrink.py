"""What a slice counts that holds more than its limits, and what its kernels' limits are in a slice of another size. Pure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.cli_doctor import Facts
from nbgpu.cli_doctor_checks import books
from nbgpu.models import AgentSlice, Device, KernelLimit, Node, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB, MIB
from nbgpu_agent.agent import Agent
from nbgpu_agent.books import Conflict, holding, kernel_limit_in
from nbgpu_agent.live import LiveSlice
from nbgpu_lab import limits, sampler


def a_slice(*parts: tuple[int, int]) -> Slice:
    devices = [
        SliceDevice(uuid=f"GPU-{number}", index=number, model="m", memory_bytes=memory * GIB, compute_milli=milli)
        for number, (memory, milli) in enumerate(parts)
    ]
    return Slice(slice_id="a" * 32, owner=Owner(hub="h", user="ada"), node="n", mode="burst", devices=devices)


def test_what_is_held_above_the_limits_counts_on_each_device() -> None:
    limits = a_slice((8, 100), (8, 100))
    assert holding(limits, [4 * GIB, 17 * GIB]) == a_slice((8, 100), (17, 100))
    assert holding(limits, [8 * GIB, 0]) == limits


class Shrunk:
    """A slice whose limit was lowered to 5 GiB while it held 17 GiB, as much of it as an agent settles by."""

    def __init__(self, told: int, seen: dict[str, int], state: str = "running", runs: bool = True) -> None:
        self.state, self.runs = state, runs
        self.slice, lowered = a_slice((17, 100)), a_slice((5, 100))
        self.record = SimpleNamespace(lowered=lowered)
        self.told, self.coming_gib, self.saves = told, 0, 0
        self.agent: Any = SimpleNamespace(seen_bytes=lambda _: seen, touch=lambda: None, on_settled=lambda _: None)

    def join_by_lock(self) -> bool:
        """Return whether something of it runs."""
        return self.runs

    def coming_bytes(self, index: int) -> int:
        """Return what is on its way to the host or back."""
        return self.coming_gib * GIB

    def memory_by_device(self) -> list[int]:
        """Return what its `use` file says, which its user may write."""
        return [self.told * GIB]

    def save(self, **changes: Any) -> None:
        """Note what it counts."""
        self.saves += 1
        self.slice, self.record.lowered = changes["slice"], changes["lowered"]

    def counts(self) -> int:
        """Return what it counts after a look, GiB."""
        live: Any = self
        Agent.settle(self.agent, live)
        return self.slice.devices[0].memory_bytes // GIB


def test_what_nobody_has_looked_at_is_held_whatever_the_slice_tells() -> None:
    seen: dict[str, int] = {}
    shrunk = Shrunk(0, seen)
    assert shrunk.counts() == 17, "the agent has just started, or the driver says nothing"
    seen["GPU-0"] = 12 * GIB
    assert shrunk.counts() == 11, "what the driver shows, up to what it shows of one who holds nothing more"
    seen["GPU-0"] = 0
    assert shrunk.counts() == 5
    assert shrunk.record.lowered is None
    assert Shrunk(0, {"GPU-0": 0}).counts() == 5, "control: a look that finds nothing"
    restored = Shrunk(0, {"GPU-0": 2 * GIB})
    restored.coming_gib = 10
    assert restored.counts() == 11, "a kernel's memory is on its way back, and its slot says nothing of it any more"
    assert Shrunk(9, {"GPU-0": 0}).counts() == 9
    assert Shrunk(0, {}, "prepared", runs=False).counts() == 5, "nothing has ever run in it"
    assert Shrunk(0, {}, "prepared").counts() == 17, "something has just begun"


def test_freeing_a_little_again_and_again_is_written_and_told_seldom() -> None:
    """Each time is a write of the record here, and on a cluster one to the API server and to all who follow claims."""
    seen = {"GPU-0": 15 * GIB}
    shrunk = Shrunk(0, seen)
    shrunk.counts()
    before = shrunk.saves
    for _ in range(1000):
        seen["GPU-0"] -= MIB
        shrunk.counts()
    assert shrunk.slice.devices[0].memory_bytes < 14 * GIB + 128 * MIB, "the control: others have it"
    assert shrunk.saves - before <= 20
    seen["GPU-0"] = 5 * GIB - MIB
    assert shrunk.counts() == 5
    assert shrunk.record.lowered is None


class Crowded(Shrunk):
    """One of two slices of 20 GiB and 300 milli-GPU of a GPU that has 30 GiB and its whole time to give since its agent started anew."""

    def __init__(self) -> None:
        super().__init__(20, {"GPU-0": 20 * GIB})
        self.id, self.owner = "s", "ada"
        self.slice, self.record = a_slice((20, 300)), SimpleNamespace(lowered=None, kernel_limits={})
        other = SimpleNamespace(slice=a_slice((20, 300)))
        device = Device(uuid="GPU-0", index=0, model="m", node="n", memory_bytes=80 * GIB, reserve_bytes=50 * GIB)
        nothing: Any = lambda *_, **__: None  # noqa: E731
        self.agent = SimpleNamespace(
            devices={"GPU-0": device}, settings=SimpleNamespace(node="n"), slices={"s": self, "o": other}, write_limits=nothing,
            turns=SimpleNamespace(change=nothing, change_kernels=nothing), events=SimpleNamespace(add=nothing), touch=nothing,
            settle=nothing, _tell_over=nothing,
        )  # fmt: skip

    @property
    def limits(self) -> Slice:
        """Those in force."""
        return self.record.lowered or self.slice

    def save(self, **changes: Any) -> None:
        """Note what it counts and its limits."""
        self.slice, self.record.lowered = changes["slice"], changes["lowered"]

    def change(self, memory: int, milli: int) -> None:
        """Give it other limits."""
        live: Any = self
        Agent.change(self.agent, live, a_slice((memory, milli)))


def test_in_books_that_give_too_much_a_slice_may_still_become_smaller() -> None:
    crowded = Crowded()
    crowded.change(15, 300)
    assert (crowded.slice, crowded.limits) == (a_slice((20, 300)), a_slice((15, 300)))
    crowded.change(18, 200)
    assert crowded.limits == a_slice((18, 200)), "into what it counts anyway"
    for memory, milli in ((21, 200), (5, 201), (5, 800)):
        with pytest.raises(Conflict):
            crowded.change(memory, milli)  # the control: nothing more is given
    assert crowded.limits == a_slice((18, 200))


@pytest.mark.parametrize(
    ("set_milli", "of_milli", "now_milli", "expected"),
    [(166, 333, 100, 50), (166, 333, 333, 166), (250, 500, 1000, 500), (12, 125, 30, 3), (1, 500, 10, 1), (500, 500, 7, 7)],
)
def test_a_part_of_the_time_stays_that_part(set_milli: int, of_milli: int, now_milli: int, expected: int) -> None:
    found = kernel_limit_in(KernelLimit(compute_milli=set_milli), of_milli, a_slice((8, now_milli)))
    assert found == KernelLimit(compute_milli=expected)


def test_memory_is_never_more_than_the_slices() -> None:
    limit = KernelLimit(memory_bytes=10 * GIB)
    assert kernel_limit_in(limit, 100, a_slice((8, 100), (20, 100))).memory_bytes == 8 * GIB
    assert kernel_limit_in(limit, 100, a_slice((12, 100))) == limit
    assert kernel_limit_in(KernelLimit(), 500, a_slice((8, 100))) == KernelLimit()


def test_doctor_names_who_holds_more_than_the_limit() -> None:
    device = Device(uuid="GPU-0", index=0, model="m", node="n", memory_bytes=80 * GIB)
    node = Node(node="n", simulated=True, driver_version="1", backend="limiter", devices=[device])
    slices = [
        AgentSlice(slice=a_slice((17, 100)), lowered=lowered, state="running", process_count=1, created=0)
        for lowered in (a_slice((8, 100)), None)
    ]
    (found,) = [one for one in books(Facts(node=node, slices=slices)) if one.name == "limits"]
    assert found.level == "note"
    slices[0] = slices[1].model_copy(update={"memory_used_bytes": 20 * GIB})
    (past,) = [one for one in books(Facts(node=node, slices=slices)) if one.name == "limits"]
    assert (past.level, past.found) == ("warning", "slice aaaaaaaa uses 20 GiB, its limit is 17 GiB")
    assert found.found == "slice aaaaaaaa holds 17 GiB of GPU 0, its limit was lowered to 8 GiB"


def test_the_panel_knows_a_limit_again_in_a_slice_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ORIGINS", origins := limits.Origins())
    as_set = {"memory_bytes": 10 * GIB, "compute_milli": 166}
    origins.remember("k", as_set, "notebook", {"compute": "50 %"})
    now = {"memory_bytes": 8 * GIB, "compute_milli": 50}

    def shown(limit_set: object) -> tuple[object, object, object]:
        (kernel,) = sampler.join([{"kernel_id": "k", "limit": now, "limit_set": limit_set, "devices": []}], {}, {})
        assert "limit_set" not in kernel
        return kernel["limit"], kernel["limit_part_milli"], kernel["limit_source"]

    assert shown(as_set) == (now, 500, "notebook")
    assert shown(None) == (now, None, "command"), "control: somebody has set that"


@pytest.mark.parametrize(
    ("phase", "coming_back", "gib"), [("parked", False, 0), ("parked", True, 9), ("restoring", False, 9), ("parking", False, 9)]
)
def test_what_comes_back_from_the_host_is_known_by_what_the_driver_saw_go(phase: str, coming_back: bool, gib: int) -> None:
    away = {"k": SimpleNamespace(phase=phase, device_bytes=(9 * GIB,))}
    live: Any = SimpleNamespace(record=SimpleNamespace(kernels_away=away), coming_back={"k"} if coming_back else set())
    assert LiveSlice.coming_bytes(live, 0) == gib * GIB
