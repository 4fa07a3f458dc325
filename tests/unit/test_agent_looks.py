"""The monitor's looks at a slice: what was freed between two readings, and slices that nothing happens in."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.models import Owner, Slice, SliceDevice, Suspension
from nbgpu.quantities import GIB, MIB
from nbgpu_agent import monitor
from nbgpu_agent.monitor import UNWRITTEN_SECONDS, Monitor
from nbgpu_agent.native import UseRow
from nbgpu_agent.nvml import DeviceSample
from nbgpu_agent.procs import Process
from nbgpu_agent.slice_api import with_pids
from nbgpu_agent.tenant import SlotState
from nbgpu_agent.usage import Doubts, SlotUse, slice_usage

CAP = 512 * MIB
BLANK: dict[str, Any] = dict.fromkeys(UseRow._fields, 0)
WORDS: dict[str, Any] = BLANK | {"pid": 7, "owner": 1, "kernel_id": "k", "used": GIB, "context": 300 * MIB, "peak": GIB}
ROW = UseRow(**WORDS)


def test_what_a_program_frees_between_two_readings_is_no_overhead() -> None:
    state = SlotState(owner=1)
    assert state.grant(20 * MIB) == 20 * MIB, "what is found first counts at once"
    assert state.grant(300 * MIB) == 20 * MIB, "freed since NVML looked"
    assert state.grant(20 * MIB) == 20 * MIB
    assert [state.grant(300 * MIB), state.grant(300 * MIB)] == [20 * MIB, 300 * MIB], "control: it stays so"
    assert state.grant(0) == 0, "less counts at once"


class Judged:
    """As much of a slice as the monitor judges by."""

    def __init__(self) -> None:
        self.id, self.owner = "s", "ada"
        self.limits_at = -1.0
        part = SliceDevice(uuid="GPU-0", index=0, model="m", memory_bytes=4 * GIB, compute_milli=250)
        self.limits = SimpleNamespace(devices=[part], mode="strict")
        self.state = SlotState(owner=1, process=Process(7, 100))
        self.tenant = SimpleNamespace(states={0: self.state}, compute_milli=self.compute_milli, holding=dict)
        self.memory_doubts, self.compute_doubts = Doubts(64 * MIB), Doubts(100)
        self.ctl = SimpleNamespace(words=SimpleNamespace(device=[SimpleNamespace(compute_used_milli=0)]))
        self.milli = 0
        self.granted: list[int] = []
        self.is_away = False

    def compute_milli(self, row: UseRow, now_ns: int) -> int:
        """Return its rate."""
        return self.milli

    def on_host(self, row: UseRow) -> bool:
        """Return whether its memory is away."""
        return self.is_away

    away = on_host

    def grant_overhead(self, slot: int, overhead_bytes: int) -> int:
        """Note what is granted."""
        self.granted.append(self.state.grant(overhead_bytes))
        return self.granted[-1]


class Look:
    """Looks at one slice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live = Judged()
        self.judged = 0
        turns = SimpleNamespace(reconcile=lambda *_: 0)
        policy, parking = SimpleNamespace(policy=None), SimpleNamespace()
        agent: Any = SimpleNamespace(overhead_caps={"GPU-0": CAP}, turns=turns, settings=policy, checkpoints=parking)
        nvml: Any = None
        monkeypatch.setattr(monitor, "Responses", lambda *_: None)
        self.monitor = Monitor(agent, nvml)
        judge = monitor.judge_slice

        def counted(*args: Any) -> object:
            self.judged += 1
            return judge(*args)

        monkeypatch.setattr(monitor, "judge_slice", counted)

    def __call__(
        self, memory: dict[int, int], rows: Sequence[UseRow] = (ROW,), compute: dict[int, int] | None = None, error: str | None = None
    ) -> list[str]:
        live: Any = self.live
        sample = DeviceSample(memory, compute or {}, error=error)
        found = self.monitor._judge_slice(live, 0, list(rows), list(memory), sample)  # pyright: ignore[reportPrivateUsage]
        return [finding.kind for finding in found]


TOLD = {7: GIB + 300 * MIB}


def test_a_slice_that_nothing_happens_in_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(monkeypatch)
    assert [look(TOLD) for _ in range(5)] == [[]] * 5
    assert look.judged == 1
    again = ROW._replace(allocs=5, frees=5, launches=9)
    assert look(TOLD, [again]) == []
    assert look.judged == 1, "counters are nothing to judge by"


@pytest.mark.parametrize("what", ["memory", "stranger", "words", "computes", "told-compute", "shrinks", "busy", "owner"])
def test_whatever_happens_in_it_is_judged_at_once(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    look = Look(monkeypatch)
    assert [look(TOLD), look(TOLD)] == [[], []]
    assert look.judged == 1
    part = look.live.limits.devices[0]
    if what == "memory":
        assert look({7: 6 * GIB}) == ["overhead", "over-limit"]
    elif what == "stranger":
        assert look(TOLD | {8: GIB}) == ["unlimited"]
    elif what == "words":
        look(TOLD, [ROW._replace(used=2 * GIB)])
    elif what == "computes":
        assert look(TOLD, compute={7: 900}) == ["over-share"]
    elif what == "told-compute":
        look(TOLD, [ROW._replace(busy_ns=5)])
    elif what == "busy":
        look(TOLD, [ROW._replace(busy_since=5)])
    elif what == "owner":
        look.live.state.process = None
        look(TOLD)
    else:
        look.live.limits.devices = [part.model_copy(update={"memory_bytes": GIB})]
        assert look(TOLD) == ["over-limit"]
    assert look.judged == 2


def test_a_slice_is_calm_only_when_what_it_was_granted_and_told_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(monkeypatch)
    look(TOLD)
    more = {7: TOLD[7] + 100 * MIB}
    assert [look(more) for _ in range(3)] == [[]] * 3
    assert look.live.granted == [0, 0, 100 * MIB], "the second look settles it, the third is not needed"
    look.live.milli = 40
    busy = [ROW._replace(busy_ns=9)]
    look(more, busy)
    words = look.live.ctl.words.device[0]
    assert words.compute_used_milli == 40
    look.live.milli = 0
    look(more, busy)
    assert words.compute_used_milli == 0, "the rate of the last seconds goes on without any new word"


def test_a_finding_is_found_again_as_long_as_it_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(monkeypatch)
    assert [look(TOLD | {8: GIB}) for _ in range(4)] == [["unlimited"]] * 4, "two samples confirm it"
    assert look(TOLD) == []


def test_what_the_driver_does_not_say_is_not_seen_to_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(monkeypatch)
    live: Any = look.live

    def seen() -> dict[str, int]:
        return look.monitor._seen_bytes(live)  # pyright: ignore[reportPrivateUsage]

    assert look({}, error="GPU is lost") == []
    assert seen() == {}, "nobody knows"
    look({}, rows=[])
    assert seen() == {"GPU-0": 0}, "control: a look that finds nothing"
    look(TOLD)
    for _ in range(3):
        look({}, error="GPU is lost")
        assert seen() == {"GPU-0": TOLD[7]}, "as it was when it was looked at last"
    live.limits_at = 5.0
    assert seen() == {}, "before its limits changed"
    look.monitor._sampled_at = 4.0  # pyright: ignore[reportPrivateUsage]
    look(TOLD)
    assert seen() == {}, "this look had begun before"
    look.monitor._sampled_at = 6.0  # pyright: ignore[reportPrivateUsage]
    look(TOLD)
    assert seen() == {"GPU-0": TOLD[7]}


def test_what_is_seen_of_a_slice_that_was_calm_without_the_driver_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(monkeypatch)
    look({}, rows=[], error="GPU is lost")
    look({}, rows=[])
    assert look.monitor._seen_bytes(look.live) == {"GPU-0": 0}  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_record_that_cannot_be_written_keeps_the_watchdog_from_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor: Any = Look(monkeypatch).monitor
    reported: list[str] = []
    looked: list[str] = []
    settled: list[str] = []
    full = {"s"}

    def write(live: Any) -> None:
        if live.id in full:
            raise OSError(28, "No space left on device")

    def settle(live: Any) -> None:
        write(live)
        settled.append(live.id)

    def slice_of(name: str) -> Any:
        live = SimpleNamespace(id=name, owner="ada", state="prepared", has_root=lambda: True, tenant=SimpleNamespace(junk=None))
        live.join_by_lock = lambda: write(live)
        return live

    nothing: Any = lambda *_: None  # noqa: E731
    agent = monitor._agent
    agent.slices = {name: slice_of(name) for name in ("s", "t")}
    agent.settle, agent.reap, agent.hold, agent.sweep = settle, lambda _: [ROW], nothing, nothing
    agent.turns = SimpleNamespace(keep_alive=nothing)
    agent.parking, agent.away = SimpleNamespace(tick=nothing), SimpleNamespace(tick=write)
    monitor._sample, monitor._report = dict, reported.append
    monitor._judge = lambda rows: [f"judged {name}" for name in rows]
    monitor._confirmed = SimpleNamespace(pass_new=lambda findings: findings, waits=lambda: False)
    monitor._responses = SimpleNamespace(look=lambda *_, **__: looked.append("looked"), waits=lambda: False)
    monkeypatch.setattr("nbgpu_agent.monitor.DESCENDANTS_TICKS", 100)
    monkeypatch.setattr("nbgpu_agent.monitor.SIZE_TICKS", 100)
    for _ in range(2):
        await monitor._tick()
    assert reported == ["judged s", "judged t"] * 2
    assert looked == ["looked"] * 2
    assert settled == ["t"] * 2
    assert len([one for one in caplog.records if "No space left" in one.getMessage()]) == 1, "it is said once"
    full.clear()
    await monitor._tick()
    assert settled[-2:] == ["s", "t"]
    full.add("s")
    monitor._memory["s"].unwritten_at -= UNWRITTEN_SECONDS
    await monitor._tick()
    assert len([one for one in caplog.records if "No space left" in one.getMessage()]) == 2, "and again after a minute"


def test_in_a_pod_processes_have_the_pids_that_its_programs_know() -> None:
    part = SliceDevice(uuid="GPU-0", index=0, model="m", memory_bytes=4 * GIB, compute_milli=250)
    wanted = Slice(slice_id="slice-00", owner=Owner(hub="h", user="ada"), node="n", mode="burst", devices=[part], simulated=True)
    slots = [SlotUse(0, "k", 32209, GIB, GIB, 0), SlotUse(0, "k", 32001, GIB, GIB, 0)]
    seen = Suspension(pid=32001, kind="unlimited", since=1.0, how="stop", kernel_id=None, reason="")
    usage = slice_usage(wanted, slots, {}, {}, {}, "limiter", 1.0, 1, [seen])
    inside = with_pids(usage, {32209: 23, 32001: 77}.__getitem__)
    assert [kernel.pids for kernel in inside.kernels] == [[23, 77]]
    assert [one.pid for one in inside.suspended] == [77]
    assert [kernel.pids for kernel in usage.kernels] == [[32001, 32209]], "the agent's own is as it was"


def test_memory_that_is_away_is_neither_missed_nor_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was granted beyond the words stays granted; who brings it back by itself is seen to hold what it does not tell of."""
    look = Look(monkeypatch)
    more = {7: TOLD[7] + 100 * MIB}
    assert [look(more), look(more)] == [[], []]
    look.live.is_away = True
    before = list(look.live.granted)
    assert [look({}), look({})] == [[], []]
    assert look.live.granted == before
    assert look(more) == ["overhead"]
