"""The pool's core with all that groups share: lent guarantees that are taken back, order by shares, kept devices, quotas that change.

The machine is `test_pool_core`'s, and so are its invariants: nothing leaks, nothing is given twice, whatever the order of things.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from test_pool_core import DEVICES, EXAMPLES, QUICK, TTL, USER_LIMITS_MILLI, PoolMachine

from nbgpu.models import GrantState, Request
from nbgpu_pool.core import Core
from nbgpu_pool.giveback import GiveBack
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.state import Seen, Settings, Snapshot
from nbgpu_pool.windows import Window

GROUP_QUOTAS = [
    {"g": Limits(guarantee_milli=500, lend=True), "h": Limits(limit_milli=3000, weight=2)},
    {"g": Limits(guarantee_milli=1000, lend=True), "h": Limits(guarantee_milli=250)},
    {},
]
EVERY_DAY = frozenset(range(7))
WINDOWS = (
    Window("morning", "h", 4, 125, EVERY_DAY, 30, 60, ZoneInfo("UTC"), 1200, 300),
    Window("evening", "g", 12, 250, EVERY_DAY, 18 * 60, 20 * 60, ZoneInfo("UTC"), 7200, 600, model="Big"),
)
GROUPS = {"a": ["g"], "b": ["h"], "c": ["h", "other"]}
SHARED = Settings(windows=WINDOWS, give_back=GiveBack(end_idle_after_seconds=60, busy_notice_seconds=600))


class SharedCore(Core):
    def __init__(self, of: Settings):
        fairness = Fairness(of.fairness.overtake_count, of.fairness.overtake_seconds, fair=True)
        super().__init__(
            replace(
                of, quotas=replace(of.quotas, groups=GROUP_QUOTAS[0]), windows=SHARED.windows, give_back=SHARED.give_back, fairness=fairness
            )
        )


class SharedMachine(PoolMachine):
    make_core = SharedCore

    def __init__(self) -> None:
        super().__init__()
        self.shrunk = self.asked_count = self.number_of_quotas = 0

    def quotas(self) -> Quotas:
        return Quotas(default=Limits(limit_milli=self.limit_milli), groups=GROUP_QUOTAS[self.number_of_quotas])

    @rule(limit=st.sampled_from(USER_LIMITS_MILLI))
    def quota_changes(self, limit: int) -> None:
        self.limit_milli = limit
        self.settings = replace(self.settings, quotas=Quotas(default=Limits(limit_milli=limit)))
        self.core.configure(replace(self.core.settings, quotas=self.quotas()), self.now)

    def post(self, asked: Request) -> None:
        number = int(asked.request_id[-4:])
        length = None if number % 3 else 600.0
        super().post(asked.model_copy(update={"groups": GROUPS[asked.owner.user], "session_seconds": length}))

    @initialize(full=st.booleans())
    def first_snapshot(self, full: bool) -> None:
        """Half of the histories begin where something is lent: few would come there."""
        self.send_snapshot()
        self.answer_snapshot()
        for user in "bbbccc" if full else "":
            self.server_starts(user)

    def server_starts(self, user: str) -> None:
        self.request(500, 1, user, None)
        entry = self.core.books.entries[f"request-{self.number:04d}"]
        wanted = self.core.begin_prepare(entry)
        assert self.truth.put(wanted)
        self.core.end_prepare(entry, None, True, self.now)
        self.truth.slices[entry.slice_id] = wanted, "running"
        self.send_snapshot()
        self.answer_snapshot()

    @precondition(lambda self: self.asked is not None)
    @rule()
    def answer_snapshot(self) -> None:
        assert self.asked is not None
        seen = [
            Seen(found, state, used_bytes=0, idle_seconds=100.0 if state == "running" else None)
            for found, state in self.truth.slices.values()
        ]
        self.core.snapshot(Snapshot(self.asked, list(self.devices.values()), seen), self.now)
        self.certain |= set(self.truth.slices)
        self.asked = None

    @rule(fate=st.sampled_from(["done", "done", "answer lost", "never arrives", "refused"]))
    def ask_releases(self, fate: str) -> None:
        effects = self.core.drain()
        self.asked_count += len(effects.asked)
        for slice_id in effects.resizes:
            entry = self.core.books.entries[slice_id]
            wanted = self.core.resize_again(entry)
            if wanted is None:
                continue
            there = self.truth.slices.get(slice_id)
            if there is not None and fate in ("done", "answer lost"):
                self.truth.slices[slice_id] = wanted, there[1]
                self.shrunk += 1
            refused = "no" if fate == "refused" or (fate == "done" and there is None) else None
            self.core.end_resize(entry, refused, fate == "done" and there is not None, self.now)
        for slice_id in effects.releases:
            if fate == "never arrives":
                continue
            gone = self.truth.delete(slice_id)
            if fate == "done":
                self.core.release_answered(slice_id, gone, self.now)

    @rule(number=st.integers(0, 2), fair=st.booleans(), windows=st.booleans())
    def configuration_changes(self, number: int, fair: bool, windows: bool) -> None:
        self.number_of_quotas = number
        now = self.core.settings
        fairness = replace(now.fairness, fair=fair)
        changed = replace(now, quotas=self.quotas(), fairness=fairness, windows=WINDOWS if windows else ())
        self.core.configure(changed, self.now)

    @rule(hour=st.integers(0, 23))
    def clock_on_the_wall_jumps(self, hour: int) -> None:
        self.core.ahead = hour * 3600.0 - self.now % 86_400
        self.core.tick(self.now)

    @invariant()
    def who_is_asked_holds_something(self) -> None:
        if not (self.core.ready and self.core.connected):
            return
        for ask in self.core.asks.values():
            entry = self.core.books.entries.get(ask.slice_id)
            assert entry is None or entry.state != GrantState.queued

    @invariant()
    def nobody_who_could_have_a_place_is_forgotten_in_the_order(self) -> None:
        waiting = self.core.books.waiting()
        assert len({one.slice_id for one in waiting}) == len(waiting)
        assert {one.slice_id for one in waiting} == {key for key, one in self.core.books.entries.items() if one.state == GrantState.queued}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_books_and_ledger_agree_whatever_groups_share() -> None:
    met: Counter[str] = Counter()

    class Counted(SharedMachine):
        def teardown(self) -> None:
            met.update(shrunk=self.shrunk, asked=self.asked_count)
            self.devices = {device.uuid: device for device in DEVICES}
            self.settle()
            self.number_of_quotas = 2  # what is kept for others waits for nobody
            self.core.configure(replace(self.core.settings, quotas=self.quotas(), windows=()), self.now)
            self.now += TTL + 1  # a reservation whose PUT never arrived is known to the books until then
            self.core.tick(self.now)
            super().teardown()

    run_state_machine_as_test(Counted, settings=settings(QUICK, max_examples=EXAMPLES))
    assert min(met["shrunk"], met["asked"]) >= max(1, EXAMPLES // 100), (
        f"the histories did not come to where something is taken back: {met}"
    )
