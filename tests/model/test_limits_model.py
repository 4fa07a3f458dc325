"""Limits in force never exceed a device, whatever pool, agents, scheduler and people do in whatever order, whoever dies between two steps.

The pool's view and core are the real ones, fed with claims as the API server has them; so are the functions of `nbgpu.claim_limits`. Played
here are the API server (one copy of each object), kube-scheduler, which may look at a ResourceSlice that is no longer the latest, and an
agent that does what `claim_limits` says, one write a step.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from nbgpu.claim_limits import (
    LIMITS_ANNOTATION,
    Limit,
    Limits,
    counted,
    fits,
    in_force,
    is_settled,
    limits_annotation,
    published,
    read_limits,
    report,
    shares,
    wanted_of,
)
from nbgpu.claims import claim_for, device_name, resource_slice
from nbgpu.errors import NbgpuError, Refused
from nbgpu.models import Device, GrantState, Owner, Request, Resize, Slice
from nbgpu.quantities import GIB
from nbgpu_pool.core import Core
from nbgpu_pool.kube_view import NodeInfo, PodInfo, View, keep_claim, keep_published
from nbgpu_pool.state import Settings, Snapshot

KEY = b"k" * 32
SPACE = "lab"
DEVICE = Device(uuid="GPU-a", index=0, model="Big", node="a", memory_bytes=17 * GIB, reserve_bytes=GIB)
USABLE = DEVICE.usable_bytes
NAMES = {("a", device_name(DEVICE.uuid)): DEVICE}
EXAMPLES = int(os.environ.get("NBGPU_MODEL_EXAMPLES", "60"))
Json = dict[str, Any]


class Agent:
    """One node's agent: what it has on disk, and what it is about to write."""

    looks_again = True

    def __init__(self) -> None:
        self.in_force: dict[str, Limit] = {}
        """By claim: what the slices' files say. Survives it."""
        self.booking: str | None = None
        """Claim whose growth is booked and not yet in force or refused. Lost with it."""


class LimitsMachine(RuleBasedStateMachine):
    agent_class: type[Agent] = Agent

    def __init__(self) -> None:
        super().__init__()
        self.claims: dict[str, Json] = {}
        self.version = 100
        self.slices: list[Json] = [resource_slice("a", [DEVICE], {}, 1)]
        """All that were ever published: the scheduler may be late by one."""
        self.agent = self.agent_class()
        self.number = 0
        self.now = 1000.0
        self.told: list[tuple[str, Slice]] = []
        """Resizes that the pool has booked and not yet written."""
        self.restart_pool()

    @initialize()
    def begin(self) -> None:
        self.look()

    # -- the pool

    def restart_pool(self) -> None:
        self.core, self.told = Core(Settings()), []
        self.view = View(KEY, lambda: 0.0)
        self.view.node_changed("a", NodeInfo(True))
        self.known: set[str] = set()
        self.whole = True
        self.look()

    def look(self) -> None:
        """Take over what there is."""
        self.view.published_changed("a", keep_published(copy.deepcopy(self.slices[-1])))
        for name in self.known - set(self.claims):
            self.view.claim_changed((SPACE, name), None)
            self.view.pod_changed((SPACE, f"pod-{name}"), self.pod(name), None)
        for name, claim in self.claims.items():
            self.view.claim_changed((SPACE, name), keep_claim(self.view)(copy.deepcopy(claim)))
            self.view.pod_changed((SPACE, f"pod-{name}"), self.pod(name) if name in self.known else None, self.pod(name))
        self.known = set(self.claims)
        view = self.view
        ids, whole, self.whole = frozenset(view.seen), self.whole, False
        self.core.snapshot(Snapshot(self.core.mark, view.devices(), view.touched(), view.less(), view.coming(), ids, whole), self.now)

    def pod(self, name: str) -> PodInfo:
        request = name.removeprefix("nbgpu-")
        return PodInfo(f"uid-{name}", f"pod-{name}", SPACE, request, (name,), "a", False, True, False, "")

    @rule()
    def pool_looks(self) -> None:
        self.look()

    @rule()
    def pool_is_killed(self) -> None:
        self.restart_pool()

    @rule(milli=st.sampled_from([250, 500, 1000]))
    def request(self, milli: int) -> None:
        self.number += 1
        owner = Owner(hub="h", user="u", server=str(self.number))
        asked = Request(request_id=f"request-{self.number:04d}", owner=owner, compute_milli=milli, namespace=SPACE)
        with contextlib.suppress(Refused):  # the queue is full
            self.core.request(asked, self.now)

    @precondition(lambda self: self.reserved())
    @rule()
    def make_claim(self) -> None:
        entry = self.reserved()[0]
        claim = claim_for(self.core.begin_prepare(entry), KEY)
        self.put(claim, uid=f"uid-of-{entry.slice_id}")
        self.core.end_prepare(entry, None, True, self.now)
        self.look()

    def reserved(self) -> list[Any]:
        return [one for one in self.core.books.entries.values() if one.state == GrantState.reserved and not one.at_ledger]

    @rule(pick=st.integers(0, 9), memory=st.sampled_from([100, 250, 500, 750, 1000]), milli=st.sampled_from([None, 100, 300, 900]))
    def resize(self, pick: int, memory: int, milli: int | None) -> None:
        bound = [one for one in self.core.books.entries.values() if one.state == GrantState.bound]
        if not bound:
            return
        entry = bound[pick % len(bound)]
        try:
            target = self.core.begin_resize(entry, Resize(memory_milli=memory, compute_milli=milli), self.now)
        except NbgpuError as error:
            if error.code not in ("no-room", "state"):
                raise
            return
        if target is not None:
            self.told.append((entry.slice_id, target))

    @precondition(lambda self: self.told)
    @rule(fate=st.sampled_from(["done", "done", "answer lost", "never arrives"]))
    def write_limits(self, fate: str) -> None:
        slice_id, target = self.told.pop(0)
        claim = self.claims.get(f"nbgpu-{slice_id}")
        if fate != "never arrives" and claim is not None:
            meta = claim["metadata"]
            limits = Limits(
                devices={one.uuid: Limit(memory_bytes=one.memory_bytes, compute_milli=one.compute_milli) for one in target.devices},
                mode=target.mode,
            )
            meta["annotations"][LIMITS_ANNOTATION] = limits_annotation(meta["uid"], SPACE, meta["name"], limits, KEY)
        entry = self.core.books.entries.get(slice_id)
        if entry is None:
            return
        self.look()
        self.core.end_resize(entry, "its claim is gone" if claim is None else None, fate == "done" and claim is not None, self.now)

    @rule()
    def retry(self) -> None:
        for slice_id in self.core.drain().resizes:
            entry = self.core.books.entries[slice_id]
            target = self.core.resize_again(entry)
            if target is not None:
                self.told.append((slice_id, target))

    @rule(seconds=st.sampled_from([1.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)

    # -- people and Kubernetes

    def put(self, claim: Json, uid: str) -> None:
        claim["metadata"] |= {"uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z", "namespace": SPACE}
        self.claims[claim["metadata"]["name"]] = claim

    @rule(memory=st.sampled_from([1, 4, 8, 16]), milli=st.sampled_from([50, 250, 1000]))
    def foreign_claim(self, memory: int, milli: int) -> None:
        """Somebody's own, that no pool has counted."""
        self.number += 1
        capacity = {"requests": {"memory": str(memory * GIB), "compute": str(milli)}}
        asked = {"name": "gpu-0", "exactly": {"deviceClassName": "gpu.nbgpu.io", "capacity": capacity}}
        claim: Json = {"metadata": {"name": f"own-{self.number}", "annotations": {}}, "spec": {"devices": {"requests": [asked]}}}
        self.put(claim, uid=f"uid-own-{self.number}")

    @rule(pick=st.integers(0, 9), late=st.booleans())
    def schedule(self, pick: int, late: bool) -> None:
        """The scheduler allocates a claim that fits what it believes to be published."""
        waiting = [one for one in self.claims.values() if "status" not in one]
        if not waiting:
            return
        claim = waiting[pick % len(waiting)]
        capacity = self.slices[-2 if late and len(self.slices) > 1 else -1]["spec"]["devices"][0]["capacity"]
        asked = claim["spec"]["devices"]["requests"][0]["exactly"]["capacity"]["requests"]
        for name in ("memory", "compute"):
            taken = sum(int(one["status"]["allocation"]["devices"]["results"][0]["consumedCapacity"][name]) for one in self.allocated())
            policy = capacity[name]["requestPolicy"]["validRange"]
            if int(asked[name]) > int(policy["max"]) or taken + int(asked[name]) > int(capacity[name]["value"]):
                return
        result = {"driver": "gpu.nbgpu.io", "pool": "a", "device": device_name(DEVICE.uuid), "shareID": claim["metadata"]["uid"]}
        claim["status"] = {"allocation": {"devices": {"results": [{**result, "consumedCapacity": dict(asked)}]}}}

    def allocated(self) -> list[Json]:
        return [one for one in self.claims.values() if "status" in one]

    @rule(pick=st.integers(0, 9))
    def pod_ends(self, pick: int) -> None:
        """One is given back: unprepared first, then the claim goes."""
        names = sorted(self.claims)
        if names:
            name = names[pick % len(names)]
            self.agent.in_force.pop(name, None)
            if self.agent.booking == name:
                self.agent.booking = None
            del self.claims[name]

    @rule(pick=st.integers(0, 9))
    def somebody_edits(self, pick: int) -> None:
        claims = [one for one in self.claims.values() if LIMITS_ANNOTATION in one["metadata"]["annotations"]]
        if claims:
            annotations = claims[pick % len(claims)]["metadata"]["annotations"]
            annotations[LIMITS_ANNOTATION] = annotations[LIMITS_ANNOTATION].replace('"memory_bytes":', '"memory_bytes":1')

    # -- the agent, one write a step

    def wanted(self, claim: Json) -> Any:
        try:
            return read_limits(claim, KEY) if claim["metadata"]["name"].startswith("nbgpu-") else None
        except NbgpuError:
            return False

    def held(self, name: str) -> list[Any]:
        return shares(self.claims[name], NAMES)

    def own(self, name: str) -> Limit:
        """What the agent knows to be in force; of a claim that it has not prepared: what it may become."""
        return self.agent.in_force.get(name, in_force(self.held(name))[DEVICE.uuid])

    @rule(pick=st.integers(0, 9))
    def prepare(self, pick: int) -> None:
        """The kubelet asks: refused where what is in force would exceed the device."""
        names = [one["metadata"]["name"] for one in self.allocated() if one["metadata"]["name"] not in self.agent.in_force]
        if names:
            name = names[pick % len(names)]
            limit = in_force(self.held(name))[DEVICE.uuid]
            if self._fits(limit):
                self.agent.in_force[name] = limit

    def _fits(self, limit: Limit) -> bool:
        return fits(USABLE, [*self.agent.in_force.values(), limit])

    @rule()
    def agent_publishes(self) -> None:
        parts: list[tuple[Limit, Limit]] = []
        for claim in self.allocated():
            name = claim["metadata"]["name"]
            held = self.held(name)
            counts = self.own(name)
            if name == self.agent.booking and (wanted := self.wanted(claim)):
                counts = counts.larger(wanted_of(held, wanted)[DEVICE.uuid])
            reported = in_force(held)[DEVICE.uuid]
            # what is not reported yet may not be published either: the pool and the scheduler would believe different things
            parts.append((wanted_of(held, None)[DEVICE.uuid], counts.larger(reported)))
        capacity = published(USABLE, parts)
        self.slices.append(
            resource_slice("a", [DEVICE], {DEVICE.uuid: (capacity.memory_bytes, capacity.compute_milli)}, len(self.slices) + 1)
        )
        self.booked = self.agent.booking

    booked: str | None = None
    """The growth that the latest ResourceSlice has in it."""

    @precondition(lambda self: self.agent.booking is None)
    @rule(pick=st.integers(0, 9))
    def agent_begins(self, pick: int) -> None:
        """It takes up one claim whose wanted limits are others: a shrink is in force at once."""
        open_: list[tuple[str, Any]] = []
        for claim in self.allocated():
            name, wanted = claim["metadata"]["name"], self.wanted(claim)
            if name in self.agent.in_force and wanted is not False and wanted is not None and not is_settled(self.held(name), wanted):
                open_.append((name, wanted))
        if not open_:
            return
        name, wanted = open_[pick % len(open_)]
        target = wanted_of(self.held(name), wanted)[DEVICE.uuid]
        now = self.agent.in_force[name]
        if now.larger(target) == now:
            self.agent.in_force[name] = target
        else:
            self.agent.booking = name

    @precondition(lambda self: self.agent.booking is not None and self.agent.booking == self.booked)
    @rule()
    def agent_decides(self) -> None:
        """What is published has the growth in it: look at all claims again, raise or refuse."""
        name = self.agent.booking
        assert name is not None
        self.agent.booking = None
        wanted = self.wanted(self.claims[name])
        if not wanted or name not in self.agent.in_force:
            return
        target = wanted_of(self.held(name), wanted)[DEVICE.uuid]
        names = {one["metadata"]["name"] for one in self.allocated()} if self.agent.looks_again else {name}
        if fits(USABLE, [target, *(self.own(one) for one in names | set(self.agent.in_force) if one != name and self.agent.looks_again)]):
            self.agent.in_force[name] = target
        else:
            self.answer(name, self.agent.in_force[name], wanted.seal)

    @rule(pick=st.integers(0, 9))
    def agent_reports(self, pick: int) -> None:
        names = [one for one in sorted(self.agent.in_force) if in_force(self.held(one))[DEVICE.uuid] != self.agent.in_force[one]]
        if names:
            name = names[pick % len(names)]
            wanted = self.wanted(self.claims[name])
            self.answer(name, self.agent.in_force[name], wanted.seal if wanted else "")

    def answer(self, name: str, limit: Limit, seal: str) -> None:
        self.claims[name]["status"]["devices"] = [report(self.held(name)[0], limit, seal)]

    @rule()
    def agent_is_killed(self) -> None:
        self.agent.booking = None

    # -- what must hold

    @invariant()
    def limits_in_force_never_exceed_the_device(self) -> None:
        assert fits(USABLE, self.agent.in_force.values()), self.agent.in_force

    @invariant()
    def the_pool_counts_what_is_in_force_and_what_is_wanted(self) -> None:
        for name, entry in ((f"nbgpu-{key}", one) for key, one in self.core.books.entries.items()):
            if name in self.claims and entry.holds and name in self.known and "status" in self.claims[name] and not self.told:
                reported = in_force(self.held(name))[DEVICE.uuid]
                part = dict(entry.parts()).get(DEVICE.uuid)
                seen = self.view.claims.get((SPACE, name))
                if part is not None and seen is not None and seen.slice is not None:
                    known = seen.slice.devices[0]
                    if (known.memory_bytes, known.compute_milli) == (reported.memory_bytes, reported.compute_milli):
                        assert part.memory_bytes >= reported.memory_bytes
                        assert part.compute_milli >= reported.compute_milli

    def teardown(self) -> None:
        """Whatever happened, it comes to rest: the pool's books say what is in force, and all that is free is published."""
        for _ in range(12):
            while self.told:
                self.write_limits("done")
            self.now += 70
            self.core.tick(self.now)
            self.retry()
            for number in range(len(self.claims)):
                self.agent_begins(number) if self.agent.booking is None else None
                self.agent_publishes()
                if self.agent.booking is not None:
                    self.agent_decides()
                self.agent_reports(0)
            for number in range(len(self.claims)):
                self.prepare(number)
            self.agent_publishes()
            self.look()
        held = [self.own(one["metadata"]["name"]) for one in self.allocated()]
        room = self.core.books.rooms[DEVICE.uuid]
        names = {one["metadata"]["name"] for one in self.allocated()}
        pools = [one for key, one in self.core.books.entries.items() if key.startswith("request-") and one.holds]
        unallocated = [one for one in pools if f"nbgpu-{one.slice_id}" not in names]
        loose = sum(part.memory_bytes for one in unallocated for _, part in one.parts())
        assert USABLE - room.free_bytes == sum(one.memory_bytes for one in held) + loose
        for entry in self.core.books.entries.values():
            assert entry.wanted is None, "a resize that never ends"


QUICK = settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_limits_in_force_never_exceed_the_device_whatever_happens() -> None:
    """Case 21."""
    run_state_machine_as_test(LimitsMachine, settings=QUICK)


class NeverLooksAgain(Agent):
    """Control: raises the limit without looking at what was allocated meanwhile."""

    looks_again = False


class NeverLooksAgainMachine(LimitsMachine):
    agent_class = NeverLooksAgain


class PreparesAll(LimitsMachine):
    """Control: prepares whatever was allocated, so that nothing holds back a claim that a late scheduler has let in."""

    def _fits(self, limit: Limit) -> bool:
        return True


def claim_first(machine: LimitsMachine) -> None:
    """Somebody's claim is allocated between the pool's booking of a growth and the agent's."""
    grown(machine)
    machine.foreign_claim(8, 250)
    machine.schedule(0, late=False)
    machine.prepare(0)
    raised(machine)
    machine.limits_in_force_never_exceed_the_device()


def late_scheduler(machine: LimitsMachine) -> None:
    """A scheduler that has not seen yet what is published allocates a claim when the growth is in force."""
    grown(machine)
    raised(machine)
    machine.foreign_claim(8, 250)
    machine.schedule(0, late=True)
    machine.prepare(0)
    machine.limits_in_force_never_exceed_the_device()


def grown(machine: LimitsMachine) -> None:
    machine.begin()
    machine.request(250)
    machine.make_claim()
    machine.schedule(0, late=False)
    machine.prepare(0)
    machine.look()
    machine.resize(0, 750, None)
    machine.write_limits("done")


def raised(machine: LimitsMachine) -> None:
    machine.agent_begins(0)
    assert machine.agent.booking is not None
    machine.agent_publishes()
    machine.agent_decides()


@pytest.mark.parametrize(("story", "broken"), [(claim_first, NeverLooksAgainMachine), (late_scheduler, PreparesAll)])
def test_control_a_broken_agent_is_found(story: Callable[[LimitsMachine], None], broken: type[LimitsMachine]) -> None:
    story(LimitsMachine())
    with pytest.raises(AssertionError):
        story(broken())


def test_counted_is_never_less_than_in_force() -> None:
    """The function that pool and agent share, once by hand."""
    claim = claim_for(Slice(slice_id="request-0001", owner=Owner(hub="h", user="u"), node="a", mode="burst", namespace=SPACE, devices=[
        {"uuid": DEVICE.uuid, "index": 0, "model": "Big", "memory_bytes": GIB, "compute_milli": 100}]), KEY)  # type: ignore[list-item] # fmt: skip
    claim["metadata"] |= {"uid": "u", "namespace": SPACE}
    result = {
        "driver": "gpu.nbgpu.io",
        "pool": "a",
        "device": device_name(DEVICE.uuid),
        "consumedCapacity": {"memory": "1Gi", "compute": "100"},
    }
    claim["status"] = {"allocation": {"devices": {"results": [result]}}}
    assert counted(shares(claim, NAMES)) == {DEVICE.uuid: Limit(memory_bytes=GIB, compute_milli=100)}
