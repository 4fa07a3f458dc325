"""The agent's pure parts: books, usage, watchdog, history."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import Device, KernelLimit, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB, MIB
from nbgpu_agent import layout
from nbgpu_agent import live as live_module
from nbgpu_agent.books import Conflict, check_fits, check_kernel_limit, check_slice, resized
from nbgpu_agent.history import COARSE_SECONDS, HOUR, LENGTH, History
from nbgpu_agent.nvml import default_reserve_bytes, select
from nbgpu_agent.runtime import StartError
from nbgpu_agent.usage import Doubts, SlotUse, compute_by_device, memory_by_device, slice_usage
from nbgpu_agent.watchdog import Confirmed, Finding, SlotSeen, describe, judge_slice, overheads

DEVICES = {
    f"GPU-{index}": Device(uuid=f"GPU-{index}", index=index, model="H100", node="n", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)
    for index in range(2)
}


def make(name: str, *parts: tuple[int, int, int]) -> Slice:
    """Return a slice of (device index, memory MiB, milli-GPU) parts."""
    devices = [SliceDevice(uuid=f"GPU-{i}", index=i, model="H100", memory_bytes=mib * MIB, compute_milli=milli) for i, mib, milli in parts]
    return Slice(slice_id=name, owner=Owner(hub="h", user="ada"), node="n", mode="strict", devices=devices)


# ---- books


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 80 * 1024), st.integers(1, 1000)), max_size=30))
def test_whatever_is_asked_the_books_never_exceed_a_device(asked: list[tuple[int, int, int]]) -> None:
    given_out: list[Slice] = []
    for number, part in enumerate(asked):
        wanted = make(f"slice-{number:04d}", part)
        try:
            check_fits(wanted, given_out, DEVICES)
        except Conflict:
            continue
        given_out.append(wanted)
    for uuid, device in DEVICES.items():
        parts = [part for one in given_out for part in one.devices if part.uuid == uuid]
        assert sum(part.memory_bytes for part in parts) <= device.usable_bytes
        assert sum(part.compute_milli for part in parts) <= 1000


def test_a_device_can_be_given_to_the_last_byte() -> None:
    quarters = [make(f"quarter-{i}", (0, 19 * 1024 + 512, 250)) for i in range(4)]
    for number, quarter in enumerate(quarters):
        check_fits(quarter, quarters[:number], DEVICES)
    with pytest.raises(NbgpuError, match="0 B left"):
        check_fits(make("one-more", (0, 1, 1)), quarters, DEVICES)


def test_a_device_that_does_not_answer_takes_no_slice() -> None:
    with pytest.raises(NbgpuError, match="does not answer"):
        check_fits(make("slice-00", (0, 1, 1)), [], {"GPU-0": DEVICES["GPU-0"].model_copy(update={"healthy": False})})


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (make("slice-00", (0, 1, 1)).model_copy(update={"node": "m"}), "slice.node"),
        (make("slice-00", (0, 1, 1), (0, 1, 1)), "slice.devices.uuid"),
        (make("slice-00", (3, 1, 1)), "slice.devices.uuid"),
        (make("slice-00", (0, 0, 1)), "slice.devices.memory_bytes"),
    ],
)
def test_slices_that_cannot_be(wanted: Slice, field: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        check_slice(wanted, DEVICES, "n")
    assert refused.value.field == field


@pytest.mark.parametrize("extra", [0, 1])
def test_as_many_devices_as_the_layout_has_words_for(extra: int) -> None:
    many = {f"GPU-{i}": DEVICES["GPU-0"].model_copy(update={"uuid": f"GPU-{i}", "index": i}) for i in range(layout.DEVICES + 1)}
    wanted = make("slice-00", *[(i, 1024, 100) for i in range(layout.DEVICES + extra)])
    if not extra:
        check_slice(wanted, many, "n")
        return
    with pytest.raises(InvalidValue, match="at most 16 devices"):
        check_slice(wanted, many, "n")


@pytest.mark.parametrize("spaces", [live_module.NAMESPACE_LOOKS, live_module.NAMESPACE_LOOKS + 50])
def test_a_pod_with_many_mount_namespaces_costs_so_many_looks(spaces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant makes namespaces as it likes: each look reads a process's whole list of mounts."""
    looked: list[int] = []
    monkeypatch.setattr(live_module.procs, "mount_namespace", lambda pid: f"mnt:[{pid}]")
    monkeypatch.setattr(live_module.procs, "start_time", lambda _: 1)
    live = SimpleNamespace(
        record=SimpleNamespace(claim=SimpleNamespace(pods=["p"])),
        _cgroups=SimpleNamespace(pod_members=lambda _: range(1, spaces + 1)),
        is_seen_by=lambda pid: looked.append(pid) or pid == 1,
    )
    assert live_module.LiveSlice.container_processes(live) == {1}  # type: ignore[arg-type]
    assert len(looked) == live_module.NAMESPACE_LOOKS


def test_a_kernels_limit_is_within_every_device_of_the_slice() -> None:
    within = make("slice-00", (0, 1024, 250), (1, 2048, 500))
    check_kernel_limit(KernelLimit(memory_bytes=GIB, compute_milli=250), within)
    for limit in (KernelLimit(memory_bytes=GIB + 1), KernelLimit(compute_milli=251), KernelLimit(memory_bytes=0)):
        with pytest.raises(InvalidValue):
            check_kernel_limit(limit, within)


def test_resize_changes_what_is_named() -> None:
    before = make("slice-00", (0, 1024, 250), (1, 1024, 250))
    after = resized(before, 2 * GIB, None, "burst")
    assert [(part.memory_bytes, part.compute_milli) for part in after.devices] == [(2 * GIB, 250)] * 2
    assert after.mode == "burst"
    assert resized(before, None, None, None) == before


# ---- usage


def test_usage_sums_slots_by_kernel_and_device() -> None:
    part_of = make("slice-00", (0, 4096, 250), (1, 4096, 250))
    slots = [
        SlotUse(device=0, kernel_id="a", pid=10, memory_bytes=GIB, peak_bytes=2 * GIB, compute_milli=100, launches=3, last_launch_ns=10**9),
        SlotUse(device=1, kernel_id="a", pid=10, memory_bytes=GIB, peak_bytes=GIB, compute_milli=300),
        SlotUse(device=0, kernel_id="", pid=None, memory_bytes=MIB, peak_bytes=MIB, compute_milli=50, refusals=2),
    ]
    limits = {"a": KernelLimit(memory_bytes=3 * GIB), "b": KernelLimit(memory_bytes=GIB)}
    usage = slice_usage(part_of, slots, limits, {}, {}, "limiter", 0.0, 3 * 10**9)
    assert [(d.memory_used_bytes, d.compute_used_milli, d.utilization_percent) for d in usage.devices] == [
        (GIB + MIB, 150, 60),
        (GIB, 300, 100),
    ]
    first, second, rest = usage.kernels
    assert (first.kernel_id, first.pids, first.limit.memory_bytes, first.launches, first.idle_seconds) == ("a", [10], 3 * GIB, 3, 2.0)
    assert [device.memory_peak_bytes for device in first.devices] == [2 * GIB, GIB]
    assert (second.kernel_id, second.devices, second.idle_seconds) == ("b", [], None)
    assert (rest.kernel_id, rest.pids, rest.refusals) == (None, [], 2)


def test_what_nvml_sees_beyond_the_slices_words_counts() -> None:
    part_of = make("slice-00", (0, 4096, 250))
    slot = SlotUse(device=0, kernel_id="", pid=1, memory_bytes=0, peak_bytes=0, compute_milli=10)
    assert compute_by_device(part_of, [slot], {}) == [10]
    assert compute_by_device(part_of, [slot], {0: 700}) == [700]
    assert compute_by_device(part_of, [slot] * 200, {}) == [1000]
    assert memory_by_device(part_of, [slot]) == [0]
    assert memory_by_device(part_of, [slot], {0: GIB}) == [GIB]


def test_nvml_is_believed_after_three_looks_and_no_longer_than_it_sees_more() -> None:
    doubts = Doubts(100)
    for number, (seen, told, believed) in enumerate(
        [(500, 0, None), (500, 0, None), (500, 0, 500), (600, 10, 600), (110, 10, None), (500, 0, None), (500, 0, None), (700, 0, 700)]
    ):
        doubts.look(0, seen, told)
        assert doubts.seen.get(0) == believed, number
    doubts.look(1, 500, 0)
    assert doubts.seen == {0: 700}


# ---- watchdog


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (20 * GIB, "This server holds 30 GiB on GPU 3, of its 20 GiB. Free memory, or restart it."),
        (0, "This server holds 30 GiB on GPU 3, without a part there. End what runs there, or restart it."),
    ],
)
def test_who_holds_too_much_is_told_on_which_gpu(limit: int, said: str) -> None:
    [found] = judge_slice("s", "GPU-1", limit, 0, None, [SlotSeen(0, 7, 30 * GIB, 0)], {7: 30 * GIB}, {}, {})
    assert found.device == "GPU-1"
    assert describe(found, "GPU 3") == said


CAP = 256 * MIB
QUIET = [SlotSeen(slot=0, pid=7, used=GIB, context=300 * MIB)]


def judge(slots: list[SlotSeen], memory: dict[int, int], compute: dict[int, int] | None = None, strict: int | None = None) -> list[Finding]:
    """Judge a slice of 4 GiB."""
    return judge_slice("slice-00", "GPU-0", 4 * GIB, CAP, strict, slots, memory, compute or {}, overheads(slots, memory, CAP))


def test_an_ordinary_process_is_no_case() -> None:
    assert judge(QUIET, {7: GIB + 400 * MIB}, {7: 900}) == []
    assert overheads(QUIET, {7: GIB + 400 * MIB}, CAP) == {0: (100 * MIB, 100 * MIB)}


def test_a_process_with_no_slot_is_unlimited() -> None:
    found = judge(QUIET, {7: GIB, 8: 2 * GIB})
    assert [(case.kind, case.pid, case.memory_bytes) for case in found] == [("unlimited", 8, 2 * GIB)]
    assert [case.kind for case in judge(QUIET, {}, {9: 500})] == ["unlimited"], "GPU time alone is enough"


def test_a_slot_without_a_known_pid_could_be_anybodys() -> None:
    assert judge([SlotSeen(slot=0, pid=None, used=GIB, context=0, elsewhere=True)], {8: 2 * GIB}) == []


def test_overhead_is_granted_up_to_the_cap_and_a_case_above_it() -> None:
    memory = {7: GIB + 300 * MIB + CAP + 2 * MIB}
    assert overheads(QUIET, memory, CAP) == {0: (CAP, CAP + 2 * MIB)}
    assert [(case.kind, case.pid) for case in judge(QUIET, memory)] == [("overhead", 7)]


def test_what_was_freed_while_the_driver_was_asked_is_no_case() -> None:
    seen = SlotSeen(slot=0, pid=7, used=0, context=300 * MIB, peak=3 * GIB)
    assert judge([seen], {7: 3 * GIB}) == []
    assert [case.kind for case in judge([seen._replace(peak=GIB)], {7: 3 * GIB})] == ["overhead"]
    assert [case.kind for case in judge([seen._replace(peak=80 * GIB)], {7: 5 * GIB})] == ["overhead", "over-limit"], (
        "a peak above the slice"
    )


def test_two_slots_of_a_process_share_its_overhead() -> None:
    slots = [SlotSeen(slot=3, pid=7, used=GIB, context=0), SlotSeen(slot=4, pid=7, used=GIB, context=0)]
    assert overheads(slots, {7: 2 * GIB + 10 * MIB}, CAP) == {3: (10 * MIB, 10 * MIB)}


def test_more_than_the_limit_in_all_is_a_case() -> None:
    slots = [SlotSeen(slot=0, pid=7, used=2 * GIB, context=0), SlotSeen(slot=1, pid=8, used=2 * GIB, context=0)]
    assert judge(slots, {7: 2 * GIB + 20 * MIB, 8: 2 * GIB + 20 * MIB}) == [], "the driver's rounding"
    assert [case.kind for case in judge(slots, {7: 2 * GIB + 40 * MIB, 8: 2 * GIB + 40 * MIB})] == ["over-limit"]


def test_a_strict_share_is_held_for_five_samples() -> None:
    confirmed = Confirmed()
    told = [len(confirmed.pass_new(judge(QUIET, {7: GIB}, {7: 400}, strict=300))) for _ in range(8)]
    assert told == [0, 0, 0, 0, 1, 0, 0, 0]
    assert judge(QUIET, {7: GIB}, {7: 340}, strict=300) == []
    assert judge(QUIET, {7: GIB}, {7: 1000}, strict=None) == []


def test_a_case_is_told_once_it_is_confirmed_and_again_after_it_was_away() -> None:
    confirmed = Confirmed()
    case = judge(QUIET, {7: GIB, 8: 2 * GIB})
    told = [len(confirmed.pass_new(findings)) for findings in (case, [], case, case, case, [], case, case)]
    assert told == [0, 0, 0, 1, 0, 0, 0, 1]


# ---- history, devices


def test_history_keeps_the_last_ten_minutes_in_order() -> None:
    history = History(["GPU-0", "GPU-1"])
    assert history.as_json(600)["time"] == []
    for second in range(LENGTH + 50):
        history.add(float(second), [second, 2**50 + second], [second % 1000, 0])
    answer = history.as_json(600)
    assert answer["time"] == [float(second) for second in range(50, LENGTH + 50)]
    devices = answer["devices"]
    assert isinstance(devices, dict)
    assert devices["GPU-1"]["memory_used_bytes"][-1] == 2**50 + LENGTH + 49
    assert history.as_json(3)["time"] == [647.0, 648.0, 649.0]


def test_history_keeps_an_hour_in_fewer_points_and_loses_no_peak() -> None:
    history = History(["GPU-0"])
    for second in range(2 * HOUR + 5):
        history.add(float(second), [GIB if second == 5000 else second], [100 * (second % COARSE_SECONDS)])
    answer = history.as_json(HOUR)
    times, device = answer["time"], answer["devices"]["GPU-0"]  # pyright: ignore[reportIndexIssue, reportUnknownVariableType]
    assert answer["interval_seconds"] == COARSE_SECONDS
    assert times == [float(second) for second in range(HOUR + 9, 2 * HOUR, COARSE_SECONDS)] + [2 * HOUR + 4]
    assert [second for second, most in zip(times, device["memory_used_bytes"], strict=True) if most == GIB] == [5009.0]
    assert set(device["compute_used_milli"][:-1]) == {450}
    assert device["compute_used_milli"][-1] == 200, "of the seconds that there are"
    assert history.as_json(LENGTH)["interval_seconds"] == 1


@given(st.lists(st.floats(0, 1e9), max_size=200))
def test_history_is_bounded_whatever_the_clock_does(times: list[float]) -> None:
    history = History(["GPU-0"])
    for time in times * 4:
        history.add(time, [1], [1])
    assert len(history.as_json(LENGTH)["time"]) <= LENGTH  # pyright: ignore[reportArgumentType]
    assert len(history.as_json(HOUR)["time"]) <= HOUR // COARSE_SECONDS + 1  # pyright: ignore[reportArgumentType]
    assert len(history._now) <= COARSE_SECONDS  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(("memory_gib", "reserve_mib"), [(80, 2048), (40, 2048), (24, 1228), (8, 409)])
def test_the_default_reserve(memory_gib: int, reserve_mib: int) -> None:
    assert default_reserve_bytes(memory_gib * GIB) == reserve_mib * MIB


def test_devices_are_selected_by_index_and_uuid() -> None:
    devices = list(DEVICES.values())
    assert select(devices, "all") == devices
    assert select(devices, "1, GPU-0") == devices[::-1]
    for wrong in ("2", "", "GPU"):
        with pytest.raises(StartError, match="--devices"):
            select(devices, wrong)
