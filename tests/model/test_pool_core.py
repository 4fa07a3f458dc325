"""The pool's core against every order of requests, crashes, lost nodes and late or lost messages that Hypothesis can think of.

The ledger here behaves as the agent does: idempotent PUT that never exceeds a device, DELETE that only asks, slices that end with
their last process. Messages to it can be late, lost, or answered to nobody; the pool can lose its memory at any moment.

10,000 histories: ``NBGPU_MODEL_EXAMPLES=10000 python -m pytest tests/model/test_pool_core.py -k agree``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from nbgpu.errors import NbgpuError
from nbgpu.models import Device, GrantState, Owner, Request, Slice
from nbgpu.quantities import GIB
from nbgpu_pool import queue
from nbgpu_pool.books import Entry
from nbgpu_pool.core import Core
from nbgpu_pool.placement import Policy
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas, Tally
from nbgpu_pool.shapes import Amount, Part
from nbgpu_pool.state import Seen, Settings, Snapshot

DEVICES = [
    Device(uuid=f"GPU-{node}-{index}", index=index, model=model, node=node, memory_bytes=gib * GIB, reserve_bytes=GIB)
    for node, index, model, gib in (("a", 0, "Big", 80), ("a", 1, "Big", 80), ("b", 0, "Small", 24))
]
USABLE = {device.uuid: device.usable_bytes for device in DEVICES}
TTL = 100.0
QUEUE_TTL = 500.0
USER_LIMITS_MILLI = [1500, 1500, 1000, 2500]
EXAMPLES = int(os.environ.get("NBGPU_MODEL_EXAMPLES", "200"))


def counted(uuid: str, part: Part) -> int:
    """Return what a part counts in quotas, in milli-GPU: the larger share."""
    return max(part.compute_milli, -(-part.memory_bytes * 1000 // USABLE[uuid]))


@pytest.fixture(autouse=True)
def _small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may be passed four times in all, so that short histories reach it."""
    monkeypatch.setattr(queue, "MOST_PER_DEVICE", 0)


@dataclass
class Truth:
    """The agent: what really exists."""

    slices: dict[str, tuple[Slice, str]] = field(default_factory=dict)

    def put(self, wanted: Slice) -> bool:
        if wanted.slice_id in self.slices:
            return self.slices[wanted.slice_id][0] == wanted
        for part in wanted.devices:
            milli, memory = self.used(part.uuid)
            if milli + part.compute_milli > 1000 or memory + part.memory_bytes > USABLE[part.uuid]:
                return False
        self.slices[wanted.slice_id] = wanted, "prepared"
        return True

    def used(self, uuid: str) -> tuple[int, int]:
        parts = [part for one, _ in self.slices.values() for part in one.devices if part.uuid == uuid]
        return sum(part.compute_milli for part in parts), sum(part.memory_bytes for part in parts)

    def delete(self, slice_id: str) -> bool:
        if slice_id not in self.slices:
            return True
        found, state = self.slices[slice_id]
        if state == "prepared":
            del self.slices[slice_id]
            return True
        self.slices[slice_id] = found, "releasing"
        return False


seldom = precondition(lambda self: self.number % 4 == 3)
"""Else a history is all mishaps, and the pool is empty in most of them."""


class PoolMachine(RuleBasedStateMachine):
    make_core: Callable[[Settings], Core] = Core

    def __init__(self) -> None:
        super().__init__()
        self.truth = Truth()
        self.now = 1000.0
        self.behind = 0.0
        """How far the clock has gone back in all."""
        self.devices = {device.uuid: device for device in DEVICES}
        """That the ledger shows."""
        self.always_there = True
        self.limit_milli = USER_LIMITS_MILLI[0]
        self.within: set[str] = set()
        """Requests whose grant was seen to be within the quota."""
        self.settings = Settings(
            quotas=Quotas(default=Limits(limit_milli=self.limit_milli)),
            fairness=Fairness(overtake_count=1, overtake_seconds=300),
            reservation_ttl_seconds=TTL,
            queue_ttl_seconds=QUEUE_TTL,
        )
        self.core = type(self).make_core(self.settings)
        self.number = 0
        self.requests: dict[str, Request] = {}
        self.puts: list[tuple[Entry, Slice]] = []
        self.late: list[Slice] = []
        self.asked: int | None = None
        self.certain: set[str] = set()
        """Slices that this core has put or seen: they must stay in its books while they exist."""

    @initialize()
    def first_snapshot(self) -> None:
        self.send_snapshot()
        self.answer_snapshot()

    # -- clients

    @rule(
        milli=st.sampled_from([125, 250, 333, 500, 1000]),
        count=st.sampled_from([1, 1, 1, 2]),
        user=st.sampled_from("abc"),
        model=st.sampled_from([None, None, "Big"]),
        memory_milli=st.sampled_from([None, None, None, None, 125, 1000]),
    )
    def request(self, milli: int, count: int, user: str, model: str | None, memory_milli: int | None = None) -> None:
        self.number += 1
        asked = Request(
            request_id=f"request-{self.number:04d}",
            owner=Owner(hub="h", user=user, server=str(self.number % 3)),
            groups=["staff"] if user == "a" else [],
            compute_milli=milli,
            device_count=count,
            model=model,
        )
        self.requests[asked.request_id] = asked
        self.post(asked)

    @rule(several=st.lists(st.tuples(st.sampled_from([250, 500, 1000]), st.sampled_from([1, 1, 2]), st.sampled_from("abc")), max_size=5))
    def several_at_once(self, several: list[tuple[int, int, str]]) -> None:
        for milli, count, user in several:
            self.request(milli, count, user, None)

    @precondition(lambda self: self.core.ready and self.core.books.waiting())
    @rule(milli=st.sampled_from([125, 250]))
    def small_ones_come_and_go(self, milli: int) -> None:
        for user in "abcabc":
            self.request(milli, 1, user, None)
            asked = self.core.books.entries.get(f"request-{self.number:04d}")
            if asked is not None and asked.state == GrantState.reserved and not asked.at_ledger:
                self.runs_and_ends(asked)

    def runs_and_ends(self, entry: Entry) -> None:
        """A server starts in its grant, so that whom it passed stays passed, and stops."""
        wanted = self.core.begin_prepare(entry)
        arrived = self.truth.put(wanted)
        self.core.end_prepare(entry, None if arrived else "no room", arrived, self.now)
        if not arrived or entry.state != GrantState.reserved:
            return
        self.core.begin_bind(entry)
        self.core.end_bind(entry, True, self.now)
        self.nobody_is_passed_for_ever()
        self.core.cancel(entry.slice_id, "h", self.now)
        self.truth.slices.pop(entry.slice_id, None)
        self.core.release_answered(entry.slice_id, True, self.now)

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 1000))
    def repeat(self, pick: int) -> None:
        asked = list(self.requests.values())[pick % len(self.requests)]
        known = self.core.entry(asked.request_id)
        before = (known.state, known.slice) if known else None
        self.post(asked)
        if before is not None:
            after = self.core.entry(asked.request_id)
            assert after is not None
            assert (after.state, after.slice) == before

    def post(self, asked: Request) -> None:
        try:
            self.core.request(asked, self.now)
        except NbgpuError as error:
            impossible = error.code == "impossible" and not self.always_there
            if error.code not in ("starting", "quota", "conflict", "queue-full") and not impossible:
                raise

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        self.core.cancel(list(self.requests)[pick % len(self.requests)], "h", self.now)

    @rule(ahead=st.integers(1, 2))
    def cancel_before_it_arrives(self, ahead: int) -> None:
        self.core.cancel(f"request-{self.number + ahead:04d}", "h", self.now)

    @rule(user=st.sampled_from("abc"), server=st.sampled_from("012"))
    def release_owner(self, user: str, server: str) -> None:
        if self.core.ready:
            self.core.release_owner(Owner(hub="h", user=user, server=server), None, self.now)

    def in_state(self, *states: GrantState) -> list[Entry]:
        return [entry for entry in self.core.books.entries.values() if entry.state in states and not entry.busy]

    @precondition(lambda self: self.core.ready and self.in_state(GrantState.reserved))
    @rule(pick=st.integers(0, 1000))
    def begin_put(self, pick: int) -> None:
        entries = self.in_state(GrantState.reserved)
        entry = entries[pick % len(entries)]
        self.puts.append((entry, self.core.begin_prepare(entry)))

    @precondition(lambda self: self.puts)
    @rule(fate=st.sampled_from(["done", "done", "done", "answer lost", "never arrives", "arrives late"]))
    def end_put(self, fate: str) -> None:
        entry, wanted = self.puts.pop(0)
        arrived = fate in ("done", "answer lost") and self.truth.put(wanted)
        if fate == "arrives late":
            self.late.append(wanted)
        if arrived and self.core.books.entries.get(entry.slice_id) is entry:
            self.certain.add(entry.slice_id)
        refused = "no room" if fate == "done" and not arrived else None
        self.core.end_prepare(entry, refused, fate == "done" and arrived, self.now)

    @precondition(lambda self: self.late)
    @rule()
    def late_put(self) -> None:
        wanted = self.late.pop(0)
        if wanted.slice_id not in self.truth.slices:  # made anew after its end, behind the core's back
            self.certain.discard(wanted.slice_id)
        self.truth.put(wanted)

    @precondition(lambda self: self.core.ready and self.in_state(GrantState.reserved))
    @rule(pick=st.integers(0, 1000), answered=st.booleans())
    def bind(self, pick: int, answered: bool) -> None:
        entries = self.in_state(GrantState.reserved)
        entry = entries[pick % len(entries)]
        known = self.truth.slices.get(entry.slice_id)
        self.core.begin_bind(entry)
        if known is not None and known[1] != "releasing":
            self.truth.slices[entry.slice_id] = known[0], "running"
        self.core.end_bind(entry, answered and known is not None and known[1] != "releasing", self.now)

    # -- the ledger and the world

    @precondition(lambda self: any(state != "prepared" for _, state in self.truth.slices.values()))
    @rule(pick=st.integers(0, 1000))
    def last_process_ends(self, pick: int) -> None:
        running = [key for key, (_, state) in self.truth.slices.items() if state != "prepared"]
        del self.truth.slices[running[pick % len(running)]]

    @rule()
    def there_is_time(self) -> None:
        self.core.books.refresh()

    @rule()
    def send_snapshot(self) -> None:
        self.asked = self.core.mark

    @precondition(lambda self: self.asked is not None)
    @rule()
    def answer_snapshot(self) -> None:
        assert self.asked is not None
        seen = [Seen(found, state) for found, state in self.truth.slices.values()]
        self.core.snapshot(Snapshot(self.asked, list(self.devices.values()), seen), self.now)
        self.certain |= set(self.truth.slices)
        self.asked = None

    @seldom
    @rule()
    def agent_away(self) -> None:
        self.core.away(self.now)
        self.asked = None

    @rule(fate=st.sampled_from(["done", "done", "answer lost", "never arrives"]))
    def ask_releases(self, fate: str) -> None:
        for slice_id in self.core.drain().releases:
            if fate == "never arrives":
                continue
            gone = self.truth.delete(slice_id)
            if fate == "done":
                self.core.release_answered(slice_id, gone, self.now)

    @rule(seconds=st.sampled_from([0.5, 30.0, TTL + 1, QUEUE_TTL + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)

    @seldom
    @rule(seconds=st.sampled_from([-50.0, -300.0, 7200.0]))
    def clock_jumps(self, seconds: float) -> None:
        seconds = max(seconds, self.behind - QUEUE_TTL)
        self.behind += max(0.0, -seconds)
        self.now += seconds
        self.core.tick(self.now)

    @seldom
    @rule(pick=st.integers(0, len(DEVICES) - 1), fate=st.sampled_from(["sick", "gone", "well", "well"]))
    def device_changes(self, pick: int, fate: str) -> None:
        """Its slices stay where they are, as the ledger's."""
        device = DEVICES[pick]
        self.devices.pop(device.uuid, None)
        if fate != "gone":
            self.devices[device.uuid] = device.model_copy(update={"healthy": fate == "well"})
        self.always_there &= fate == "well"

    @seldom
    @rule(limit=st.sampled_from(USER_LIMITS_MILLI))
    def quota_changes(self, limit: int) -> None:
        self.limit_milli = limit
        self.settings = replace(self.settings, quotas=Quotas(default=Limits(limit_milli=limit)))
        self.core.settings = replace(self.core.settings, quotas=self.settings.quotas)

    @seldom
    @rule()
    def pool_is_killed(self) -> None:
        self.core = type(self).make_core(self.settings)
        self.late += [wanted for _, wanted in self.puts]
        self.puts, self.asked, self.certain = [], None, set()

    # -- what must hold

    @invariant()
    def nothing_is_given_twice(self) -> None:
        for device in DEVICES:
            milli, memory = self.truth.used(device.uuid)
            assert milli <= 1000
            assert memory <= device.usable_bytes
            holders = [one for one in self.core.books.entries.values() if one.holds and any(at == device.uuid for at, _ in one.parts())]
            parts = [part for one in holders for at, part in one.parts() if at == device.uuid]
            room = self.core.books.rooms.get(device.uuid)
            if room is None:
                continue
            assert room.free_milli == 1000 - sum(part.compute_milli for part in parts)
            assert room.free_bytes == device.usable_bytes - sum(part.memory_bytes for part in parts)
            # Where a PUT whose outcome is unknown competes with one that came late, the ledger decides, not the books.
            if not any(one.at_ledger and one.confirmed is None for one in holders) and not any(one.busy for one in holders):
                assert room.free_milli >= 0
                assert room.free_bytes >= 0

    @invariant()
    def what_exists_stays_in_the_books(self) -> None:
        for slice_id in self.certain & set(self.truth.slices):
            entry = self.core.books.entries.get(slice_id)
            assert entry is not None, f"{slice_id} exists and is not in the books"
            assert entry.holds, f"{slice_id} exists and counts as {entry.state}"

    @invariant()
    def quotas_hold(self) -> None:
        """Whoever is granted something is within the quota of that moment; a lower one takes nothing back."""
        held = [one for one in self.core.books.entries.values() if one.state in (GrantState.reserved, GrantState.bound)]
        fresh = {one.request.owner.user for one in held if one.slice_id not in self.within and not one.adopted}
        self.within = {one.slice_id for one in held}
        for user in fresh:
            mine = [one for one in held if one.request.owner.user == user]
            milli = sum(counted(uuid, part) for one in mine for uuid, part in one.parts())
            assert milli <= self.limit_milli + 1000 * self.late_seen(), user

    @invariant()
    def what_is_counted_for_quotas_is_what_is_held(self) -> None:
        groups = frozenset({"staff"})
        plain = Tally.of(self.core.settings.quotas, self.core.books.holdings(groups, granted_only=True))
        held = {account: part for account, part in plain.held.items() if part != Amount()}
        assert self.core.books.granted_by(groups) == held

    @invariant()
    def nobody_is_passed_for_ever(self) -> None:
        if self.always_there:
            for one in self.core.books.waiting():
                assert one.overtaken <= self.settings.fairness.most(len(self.core.books.of_use(one.want))), one.slice_id

    def late_seen(self) -> bool:
        """After a crash or a late PUT the ledger may hold more of one user than was granted knowingly."""
        return any(entry.adopted for entry in self.core.books.entries.values())

    def teardown(self) -> None:
        self.devices = {device.uuid: device for device in DEVICES}
        self.settle()
        at_ledger = {key: entry for key, entry in self.core.books.entries.items() if entry.at_ledger}
        unknown = {key for key, entry in at_ledger.items() if entry.confirmed is None}
        # a PUT that nobody answered may still arrive: it counts until its time is up
        assert at_ledger.keys() - unknown <= set(self.truth.slices) <= at_ledger.keys(), "the books differ from the ledger"
        for key in [key for key, (_, state) in self.truth.slices.items() if state == "running"]:
            del self.truth.slices[key]
        self.settle()
        self.everybody_gets_in()
        for _ in range(4):
            self.now += max(TTL, QUEUE_TTL) + 1
            self.core.tick(self.now)
            self.settle()
        assert not self.core.books.entries, "something leaked"
        assert not self.truth.slices, "a slice leaked at the ledger"
        assert all(room.free_milli == 1000 and room.part_count == 0 for room in self.core.books.rooms.values())

    def everybody_gets_in(self) -> None:
        """Those who hold something give it back, again and again, until nobody waits: nobody starves."""
        for _ in range(len(self.core.books.entries)):
            for entry in [one for one in self.core.books.entries.values() if one.holds]:
                self.core.cancel(entry.slice_id, "h", self.now)
            self.settle()
        limit = Quotas(default=Limits(limit_milli=self.limit_milli))
        waits = [one for one in self.core.books.waiting() if not self.above(one, limit)]
        assert not waits, f"{[one.slice_id for one in waits]} wait in an empty pool"

    def above(self, entry: Entry, quotas: Quotas) -> bool:
        """Whether a request is by itself above a quota that was lowered after it had come."""
        cost = self.core.books.cost(entry.want)
        return cost is not None and cost.counted_milli > (quotas.default.limit_milli or 0)

    def settle(self) -> None:
        """Let all messages arrive."""
        while self.puts:
            self.end_put("done")
        while self.late:
            self.late_put()
        for _ in range(5):
            self.send_snapshot()
            self.answer_snapshot()
            self.ask_releases("done")
            for key in [key for key, (_, state) in self.truth.slices.items() if state == "releasing"]:
                del self.truth.slices[key]


class OvertakenForEver(Core):
    """Control: keeps nothing for those who wait."""

    def __init__(self, settings: Settings):
        super().__init__(replace(settings, fairness=Fairness(overtake_count=10**9, overtake_seconds=1e12)))


class IgnoresQuotas(Core):
    """Control: grants whatever the quotas."""

    def __init__(self, settings: Settings):
        super().__init__(replace(settings, quotas=Quotas()))


QUICK = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(max(120, EXAMPLES))
def test_books_and_ledger_agree_whatever_happens() -> None:
    run_state_machine_as_test(PoolMachine, settings=QUICK)


class ByValue(Core):
    """Places by value instead of best fit."""

    def __init__(self, settings: Settings):
        super().__init__(replace(settings, policy=Policy(by_value=True)))


@pytest.mark.slow
@pytest.mark.timeout(max(120, EXAMPLES))
def test_books_and_ledger_agree_whatever_the_rule() -> None:
    machine = type("ByValueMachine", (PoolMachine,), {"make_core": staticmethod(ByValue)})
    run_state_machine_as_test(machine, settings=settings(QUICK, max_examples=max(EXAMPLES // 5, 1)))


class FreesEarly(Core):
    """Control: believes a release at once instead of waiting for the ledger."""

    def _withdraw(self, entry: Entry, reason: str, now: float) -> None:
        if entry.state != GrantState.gone:
            self._end(entry, reason, now)


class NoRebuild(Core):
    """Control: grants before it knows what runs."""

    def _see(self, seen: Seen, now: float) -> None:
        if seen.slice.slice_id in self.books.entries:
            super()._see(seen, now)


class TrustsOldSnapshots(Core):
    """Control: takes absence from a snapshot that was begun before the slice was made for its end."""

    def snapshot(self, snapshot: Snapshot, now: float) -> None:
        super().snapshot(Snapshot(10**9, snapshot.devices, snapshot.slices), now)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("broken", [FreesEarly, NoRebuild, TrustsOldSnapshots, OvertakenForEver, IgnoresQuotas])
def test_control_a_broken_core_is_found(broken: type[Core]) -> None:
    once = settings(QUICK, max_examples=3000, print_blob=False, phases=[Phase.generate], report_multiple_bugs=False)
    machine = type("BrokenMachine", (PoolMachine,), {"make_core": staticmethod(broken)})
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=once)
