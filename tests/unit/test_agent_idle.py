"""Whether a slice is idle, and whether the host has the memory to park it. Pure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nbgpu.quantities import GIB, MIB
from nbgpu_agent.away import MOST_AWAY, Away
from nbgpu_agent.idle import REFUSED_SECONDS, REPORT_SECONDS, IdleWatch, host_refusal, parse_meminfo


def row(**more: object) -> Any:
    blank = dict.fromkeys(
        ("slot", "owner", "launches", "busy_ns", "busy_since", "allocs", "frees", "copied_bytes", "refusals", "want", "context"), 0
    )
    return SimpleNamespace(**{**blank, "used": MIB, "kernel_id": "a", **more})


def told(**kernels: bool) -> IdleWatch:
    watch = IdleWatch(0.0)
    watch.hear(kernels, ["a"], 100.0)
    return watch


def test_every_kind_of_work_counts_as_active_and_nothing_else() -> None:
    for name in ("launches", "busy_ns", "allocs", "frees", "copied_bytes", "refusals", "owner"):
        watch = IdleWatch(0.0)
        watch.look([row()], 10.0)
        watch.look([row()], 20.0)
        assert watch.active_at == 10.0, "nothing happened"
        watch.look([row(**{name: 1})], 30.0)
        assert watch.active_at == 30.0, name
    for name in ("busy_since", "want"):  # a launch that never ends is work at every look
        watch = IdleWatch(0.0)
        for now in (10.0, 20.0):
            watch.look([row(**{name: 5})], now)
        assert watch.active_at == 20.0, name


def test_reasons() -> None:
    def why(watch: IdleWatch, *rows: Any, protected: tuple[str, ...] = (), now: float = 100.0) -> str | None:
        return watch.why_not(rows, protected, now)

    assert why(told(a=False), row()) is None
    assert why(told(a=False)) == "it holds no GPU memory"
    assert "no notebook kernel" in str(why(told(a=False), row(), row(kernel_id="")))
    assert "busy" in str(why(told(a=True), row()))
    assert "busy, or not one" in str(why(told(a=False), row(), row(kernel_id="b")))
    assert "protected" in str(why(told(a=False), row(), protected=("a",)))
    assert why(told(a=False), row(), now=100.0 + REPORT_SECONDS) is None
    assert "has not told" in str(why(told(a=False), row(), now=101.0 + REPORT_SECONDS))
    watch = told(a=False)
    watch.refuse("it cannot", 100.0)
    assert why(watch, row()) == "it cannot"
    watch.hear({"a": False}, ["a"], 100.0 + REFUSED_SECONDS)
    assert why(watch, row(), now=100.0 + REFUSED_SECONDS) is None


def test_only_kernels_that_hold_gpu_memory_bring_a_slice_back() -> None:
    watch = IdleWatch(0.0)
    assert watch.hear({"a": True, "b": False}, ["a"], 1.0)
    assert not watch.hear({"a": False, "b": True}, ["a"], 2.0)
    assert watch.active_at == 1.0


def test_the_hosts_memory_is_bounded_by_the_option_and_by_what_is_there() -> None:
    assert host_refusal(20 * GIB, 0, 20 * GIB, 64 * GIB, 64 * GIB) is None
    assert "--idle-host-memory" in str(host_refusal(20 * GIB, 1, 20 * GIB, 64 * GIB, 64 * GIB))
    assert "available" in str(host_refusal(20 * GIB, 0, 64 * GIB, 23 * GIB, 64 * GIB))
    assert host_refusal(20 * GIB, 0, 64 * GIB, 24 * GIB, 64 * GIB) is None
    assert "available" in str(host_refusal(GIB, 0, GIB, 2 * GIB - 1, 4 * GIB)), "a GiB stays on a small machine"
    assert parse_meminfo("MemTotal:  4 kB\nMemFree: 1 kB\nMemAvailable:   2 kB\n") == (2048, 4096)
    assert parse_meminfo("") == (0, 0), "what is not known is not there"


def test_so_many_kernels_of_a_slice_are_on_the_host_at_most() -> None:
    """Four times a second the agent looks at each, and anybody may start hundreds."""

    def refused(there: int) -> str | None:
        entries = {f"k{number}": SimpleNamespace(memory_bytes=MIB) for number in range(there)}
        live: Any = SimpleNamespace(
            slice=SimpleNamespace(devices=[SimpleNamespace(memory_bytes=GIB)]), record=SimpleNamespace(kernels_away=entries)
        )
        agent, checkpoints = SimpleNamespace(), SimpleNamespace(host_refusal=lambda _: None)
        return Away(agent, checkpoints)._too_much(live, MIB)  # type: ignore[arg-type]

    assert refused(MOST_AWAY - 1) is None
    assert "32 notebooks" in str(refused(MOST_AWAY))


def test_unused_is_who_holds_nothing_too() -> None:
    """Nothing can be parked of it, but somebody else could have the room."""
    watch = IdleWatch(0.0)
    assert watch.unused_seconds((), 50.0) is None, "its server has not told"
    watch.hear({"a": False}, [], 100.0)
    assert watch.unused_seconds((), 110.0) == 110.0
    assert watch.unused_seconds(("a",), 110.0) is None, "kept by its user"
    assert watch.unused_seconds(("gone",), 110.0) == 110.0
    watch.look([row(launches=1)], 115.0)
    assert watch.unused_seconds((), 120.0) == 5.0
    watch.hear({"a": True}, [], 120.0)
    assert watch.unused_seconds((), 125.0) is None, "it is busy until the contrary is told"
    watch.hear({"a": False}, [], 121.0)
    assert watch.unused_seconds((), 130.0) == 10.0, "a cell that uses no GPU is work too"
    assert watch.unused_seconds((), 122.0 + REPORT_SECONDS) is None, "nor does it tell any more"


def test_who_is_used_again_is_told_of() -> None:
    """Who was told how long it had not been used counts on from there."""
    watch = IdleWatch(0.0)
    watch.hear({"a": False}, [], 100.0)
    assert [watch.used_again((), now) for now in (100.0, 101.0)] == [False, False]
    watch.look([row(launches=1)], 102.0)
    assert [watch.used_again((), now) for now in (102.0, 103.0)] == [True, False]
    watch.look([row(launches=2)], 104.0)
    assert not watch.used_again((), 105.0), "nobody has heard of two seconds"
    assert not watch.used_again((), 120.0)
    watch.hear({"a": True}, [], 121.0)
    assert [watch.used_again((), now) for now in (121.0, 122.0)] == [True, False]
