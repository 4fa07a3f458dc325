"""What happens to slices while they are held: resizes, moves to other nodes, nodes that have to be started. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbgpu.errors import InvalidValue, NbgpuError, Refused, Unavailable
from nbgpu.models import AvailabilityQuery, Device, Grant, GrantState, Owner, Request, Resize, Shape, Slice
from nbgpu.quantities import GIB
from nbgpu_pool.availability import answer
from nbgpu_pool.coming import Coming, devices_to_come
from nbgpu_pool.core import Core
from nbgpu_pool.held import AVOID_SECONDS, MOVED_SECONDS, REFUSED_SECONDS
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.resize import RESIZE_SECONDS
from nbgpu_pool.shapes import Part
from nbgpu_pool.state import Seen, Settings, Snapshot

WORDS = "0/2 nodes are available: 1 Insufficient cpu."


class Pool:
    """A core with a ledger that the test plays."""

    def __init__(self, nodes: int = 1, devices: int = 1, **settings: object):
        self.core = Core(Settings(**settings))  # type: ignore[arg-type]
        self.devices = [
            Device(uuid=f"GPU-{node}-{n}", index=n, model="Big", node=f"n{node}", memory_bytes=81 * GIB, reserve_bytes=GIB)
            for node in range(nodes)
            for n in range(devices)
        ]
        self.coming: list[Device] = []
        self.now, self.number = 100.0, 0
        self.seen: dict[str, Seen] = {}
        self.sync()

    def sync(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.core.snapshot(Snapshot(self.core.mark, self.devices, list(self.seen.values()), coming=self.coming), self.now)
        self.core.tick(self.now)

    def ask(self, milli: int = 250, user: str = "u", **more: object) -> Grant:
        self.number += 1
        owner = {"hub": "h", "user": user, "server": str(self.number)}
        request = {"request_id": f"request-{self.number:04d}", "owner": owner, "compute_milli": milli, "namespace": "lab", **more}
        return self.core.request(Request.model_validate(request), self.now)

    def running(self, milli: int = 250, user: str = "u", **more: object) -> str:
        """Return the request of a server that runs."""
        grant = self.ask(milli, user, **more)
        key = grant.request.request_id
        entry = self.core.known(key)
        self.seen[key] = Seen(self.core.begin_prepare(entry), "running")
        self.core.end_prepare(entry, None, True, self.now)
        self.sync()
        assert self.grant(key).state == GrantState.bound
        return key

    def grant(self, key: str) -> Grant:
        return self.core.grant(self.core.known(key), self.now)

    def free(self, uuid: str = "GPU-0-0") -> tuple[int, int]:
        room = self.core.books.rooms[uuid]
        return room.free_bytes // GIB, room.free_milli

    def resize(self, key: str, **asked: object) -> Slice | None:
        """Ask and have the ledger take note."""
        entry = self.core.known(key)
        target = self.core.begin_resize(entry, Resize.model_validate(asked), self.now)
        if target is not None:
            self.seen[key] = replace(self.seen[key], wanted=target)
            self.core.end_resize(entry, None, True, self.now)
        return target

    def in_force(self, key: str) -> None:
        """The node does what is wanted."""
        wanted = self.seen[key].wanted
        assert wanted is not None
        self.seen[key] = replace(self.seen[key], slice=wanted, wanted=None, refused=False)
        self.sync()


# -- resize


def test_a_growth_takes_room_at_once() -> None:
    pool = Pool()
    key = pool.running()
    assert pool.free() == (60, 750)
    pool.resize(key, memory_bytes=50 * GIB, compute_milli=500)
    assert pool.free() == (30, 500)
    grant = pool.grant(key)
    assert grant.slice is not None
    assert grant.resizing is not None
    assert (grant.slice.devices[0].compute_milli, grant.resizing[0].compute_milli) == (250, 500)
    assert pool.ask(750).state == GrantState.queued, "nobody is granted it meanwhile"
    pool.in_force(key)
    assert pool.free() == (30, 500)
    assert pool.grant(key).resizing is None


def test_a_shrink_frees_room_only_when_it_is_in_force() -> None:
    pool = Pool()
    key = pool.running(1000)
    waiting = pool.ask(500).request.request_id
    pool.resize(key, memory_milli=500, compute_milli=500)
    pool.sync()
    assert pool.free() == (0, 0)
    assert pool.grant(waiting).state == GrantState.queued
    pool.in_force(key)
    assert pool.grant(waiting).state == GrantState.reserved
    assert pool.free() == (0, 0)


def test_what_a_smaller_slice_still_holds_is_given_to_nobody() -> None:
    """The limit is in force; its programs hold 25 GiB more: booked, and counted in the quota, until it is free; a new pool knows it."""
    pool = Pool(quotas=Quotas(default=Limits(limit_bytes=45 * GIB)))
    key = pool.running(500)
    assert pool.free() == (40, 500)
    target = pool.resize(key, memory_bytes=10 * GIB)
    assert target is not None
    entry = pool.core.known(key)
    assert entry.slice is not None
    held = target.model_copy(update={"devices": [target.devices[0].model_copy(update={"memory_bytes": 35 * GIB})]})
    pool.seen[key] = Seen(held, "running", wanted=target, keeps=True)
    pool.sync(2 * RESIZE_SECONDS)
    assert pool.free() == (45, 500), "the rest is free at once"
    grant = pool.grant(key)
    assert grant.note == (
        "The slice was made smaller: 10 GiB. Its programs still hold 35 GiB, which counts for it until they free it, and are given no more."
    )
    with pytest.raises(Refused):
        pool.ask(memory_bytes=11 * GIB)
    other = pool.ask(250, user="grace", memory_bytes=45 * GIB)
    assert other.state == GrantState.reserved
    waits = pool.ask(250, user="linus", memory_bytes=20 * GIB).request.request_id
    assert pool.grant(waits).state == GrantState.queued
    anew = Pool()
    anew.seen = dict(pool.seen)
    anew.sync(2 * RESIZE_SECONDS)
    assert anew.free() == (45, 500)
    assert anew.grant(key).resizing == target.devices
    assert anew.grant(key).note == grant.note
    assert anew.core.drain().resizes == [], "there is nothing to tell"
    pool.seen[key] = Seen(target, "running")
    pool.sync()
    assert pool.grant(waits).state == GrantState.reserved
    assert pool.grant(key).note is None


def test_the_same_again_is_nothing_new() -> None:
    pool = Pool()
    key = pool.running()
    assert pool.resize(key, compute_milli=500) is not None
    assert pool.resize(key, compute_milli=500) is None
    pool.in_force(key)
    assert pool.resize(key, compute_milli=500) is None
    assert pool.resize(key, mode="strict") is not None


def test_what_a_resize_may_not() -> None:
    pool = Pool(quotas=Quotas(default=Limits(limit_milli=500), groups={"g": Limits(limit_milli=600, per_user_milli=1000)}))
    key = pool.running()
    other = pool.running(250, "v")
    with pytest.raises(Refused, match="Your quota is half a GPU"):
        pool.resize(key, compute_milli=501)
    for wrong in ({}, {"memory_milli": 500, "memory_bytes": GIB}):
        with pytest.raises(InvalidValue):
            pool.resize(key, **wrong)
    with pytest.raises(NbgpuError, match=r"GPU 0 has 40(\.0)? GiB of memory free, and 50(\.0)? GiB more are asked for"):
        pool.resize(key, memory_bytes=70 * GIB)
    grown = pool.resize(key, compute_milli=500)
    assert grown is not None
    assert pool.free() == (40, 250)
    with pytest.raises(Refused):  # what is on its way counts
        pool.running(250, "u")
    assert pool.grant(other).note is None
    queued = pool.ask(400, "w").request.request_id
    with pytest.raises(NbgpuError, match="not running"):
        pool.resize(queued, compute_milli=100)
    pool.core.away(pool.now)
    with pytest.raises(Unavailable):
        pool.resize(key, compute_milli=300)


def test_a_group_at_its_limit_and_the_guarantee_of_others() -> None:
    quotas = Quotas(groups={"g": Limits(limit_milli=600)}, users={"boss": Limits(guarantee_milli=300)})
    pool = Pool(quotas=quotas)
    first, second = pool.running(250, "a", groups=["g"]), pool.running(250, "b", groups=["g"])
    with pytest.raises(Refused, match=r"The quota of your group g \(60 % of a GPU in all, a quarter of a GPU held\) is used up"):
        pool.resize(first, compute_milli=400)
    pool.resize(first, compute_milli=350)
    outsider = Pool(quotas=Quotas(users={"boss": Limits(guarantee_milli=300)}))
    key = outsider.running(500, "a")
    with pytest.raises(NbgpuError, match="guarantee"):
        outsider.resize(key, compute_milli=750)
    outsider.resize(key, compute_milli=700)
    assert pool.grant(second).state == GrantState.bound


def test_nothing_grows_into_what_is_kept_for_one_who_has_waited_long() -> None:
    pool = Pool(fairness=Fairness(overtake_count=0, overtake_seconds=0))
    key = pool.running()
    pool.ask(1000, "v")
    with pytest.raises(NbgpuError, match="kept for someone who has waited long"):
        pool.resize(key, compute_milli=500)
    pool.resize(key, compute_milli=100)


def test_a_growth_that_the_node_refuses_is_taken_back() -> None:
    pool = Pool()
    key = pool.running()
    pool.resize(key, compute_milli=500)
    pool.seen[key] = replace(pool.seen[key], refused=True)
    pool.sync()
    assert pool.core.drain().resizes == [key]
    assert pool.free() == (60, 750), "its room is free"
    assert "no room" in (pool.grant(key).note or "")
    entry = pool.core.known(key)
    back = pool.core.resize_again(entry)
    assert back is not None
    assert back.devices[0].compute_milli == 250
    pool.core.end_resize(entry, None, True, pool.now)
    pool.seen[key] = replace(pool.seen[key], wanted=None, refused=False)
    pool.sync()
    assert pool.core.drain().resizes == []
    assert "no room" in (pool.grant(key).note or ""), "it is said as long as nothing else has happened"


def test_a_growth_that_nobody_answers_is_taken_back_in_the_end() -> None:
    pool = Pool()
    key = pool.running()
    pool.resize(key, compute_milli=500)
    pool.sync(RESIZE_SECONDS - 1)
    assert pool.free() == (60, 500)
    pool.sync(2)
    assert pool.free() == (60, 750)
    assert pool.core.drain().resizes == [key]


def test_a_ledger_that_did_not_answer_is_told_again() -> None:
    pool = Pool()
    key = pool.running()
    entry = pool.core.known(key)
    target = pool.core.begin_resize(entry, Resize(compute_milli=500), pool.now)
    assert pool.core.drain().resizes == [], "it is being told"
    pool.core.end_resize(entry, None, False, pool.now)
    pool.sync()
    assert pool.free() == (60, 500), "it may have been told"
    assert pool.core.drain().resizes == [key]
    assert pool.core.resize_again(entry) == target
    pool.core.end_resize(entry, "it is gone", False, pool.now)
    assert pool.free() == (60, 750)
    assert "it is gone" in (pool.grant(key).note or "")


def test_a_pool_that_starts_takes_over_what_was_wanted() -> None:
    pool = Pool()
    key = pool.running()
    pool.resize(key, compute_milli=500)
    again = Pool()
    again.seen = pool.seen
    again.sync()
    assert again.free() == (60, 500)
    again.in_force(key)
    assert again.free() == (60, 500)
    assert again.grant(key).resizing is None


def test_a_snapshot_from_before_the_resize_says_nothing_about_it() -> None:
    """As the agent of one machine tells: of what is in force alone, in an answer that may be on its way already."""
    pool = Pool()
    key = pool.running()
    entry = pool.core.known(key)
    old = pool.core.mark
    pool.core.begin_resize(entry, Resize(compute_milli=500), pool.now)
    pool.core.end_resize(entry, None, True, pool.now)
    pool.core.snapshot(Snapshot(old, pool.devices, list(pool.seen.values())), pool.now)
    assert pool.free() == (60, 500)
    assert pool.core.wants_fresh()
    grown = pool.seen[key].slice.devices[0].model_copy(update={"compute_milli": 500})
    pool.seen[key] = replace(pool.seen[key], slice=pool.seen[key].slice.model_copy(update={"devices": [grown]}))
    pool.sync()
    assert not pool.core.wants_fresh()
    assert (pool.free(), pool.grant(key).resizing) == ((60, 500), None)


# -- moves


def unplaced(pool: Pool, milli: int = 250, **more: object) -> str:
    """Return the request of a pod that Kubernetes finds no node for."""
    key = pool.running(milli, **more)
    pool.seen[key] = replace(pool.seen[key], placed=False, refusal=WORDS)
    pool.sync()
    return key


def moved(pool: Pool, key: str) -> str:
    """Have the ledger move it; return the node."""
    entry = pool.core.known(key)
    way = pool.core.begin_move(entry)
    assert way is not None
    pool.seen[key] = replace(pool.seen[key], slice=way[1])
    pool.core.end_move(entry, True, pool.now)
    pool.sync()
    return way[1].node


def test_a_pod_without_a_node_is_tried_elsewhere() -> None:
    pool = Pool(nodes=3)
    key = unplaced(pool)
    assert pool.grant(key).note == f"Kubernetes finds no node for the server yet: {WORDS}"
    assert pool.core.drain().moves == [], "not at once: the scheduler may be about to look"
    pool.sync(REFUSED_SECONDS + 0.1)
    assert pool.core.drain().moves == [key]
    assert (pool.free("GPU-0-0"), pool.free("GPU-1-0")) == ((60, 750), (60, 750)), "both count until it is known"
    assert moved(pool, key) == "n1"
    assert (pool.free("GPU-0-0"), pool.free("GPU-1-0")) == ((80, 1000), (60, 750))
    assert "n1 is tried" in (pool.grant(key).note or "")
    assert WORDS in (pool.grant(key).note or "")
    pool.sync(MOVED_SECONDS - 1)
    assert pool.core.drain().moves == []
    pool.sync(1.1)
    assert moved(pool, key) == "n2"
    pool.sync(MOVED_SECONDS + 1)
    assert pool.core.drain().moves == [], "each node once"
    pool.seen[key] = replace(pool.seen[key], placed=True, refusal="")
    pool.sync()
    assert pool.grant(key).note is None


def test_where_there_is_no_other_place_the_grant_stays_and_says_why() -> None:
    pool = Pool(nodes=2)
    pool.running(1000)
    key = unplaced(pool)
    assert pool.grant(key).slice is not None
    pool.sync(REFUSED_SECONDS + 1)
    assert pool.core.drain().moves == []
    assert WORDS in (pool.grant(key).note or "")
    assert pool.grant(key).state == GrantState.bound
    pool.sync(AVOID_SECONDS + 1)
    assert pool.core.drain().moves == []


def test_several_devices_move_together_or_not_at_all() -> None:
    pool = Pool(nodes=2, devices=2)
    pool.running(1000)  # leaves one of the first node, the second node whole
    key = unplaced(pool, 500, device_count=2)
    assert {one.uuid for one in pool.seen[key].slice.devices} == {"GPU-1-0", "GPU-1-1"}
    pool.sync(REFUSED_SECONDS + 1)
    assert pool.core.drain().moves == []


def test_others_of_that_shape_avoid_a_node_without_room_while_there_are_better_ones() -> None:
    pool = Pool(nodes=2)
    key = unplaced(pool)
    pool.sync(REFUSED_SECONDS + 1)
    moved(pool, key)
    slice_ = pool.ask().slice
    assert slice_ is not None
    assert slice_.node == "n1", "by itself the first node would do as well"
    other = pool.ask(500).slice
    assert other is not None
    whole = pool.ask(250).slice
    assert whole is not None
    assert whole.node == "n0", "the last choice is a choice"
    pool.seen[key] = replace(pool.seen[key], placed=True, refusal="")
    pool.sync(AVOID_SECONDS + 1)
    assert pool.core.walk(pool.now).avoid == frozenset()


def test_a_move_that_was_not_done_and_one_whose_outcome_is_unknown() -> None:
    pool = Pool(nodes=2)
    key = unplaced(pool)
    pool.sync(REFUSED_SECONDS + 1)
    entry = pool.core.known(key)
    assert pool.core.begin_move(entry) is not None
    pool.core.end_move(entry, None, pool.now)
    assert pool.core.drain().moves == [key], "asked again"
    assert pool.free("GPU-1-0") == (60, 750)
    assert pool.core.begin_move(entry) is not None
    pool.core.end_move(entry, False, pool.now)
    assert pool.core.drain().moves == []
    assert (pool.free("GPU-0-0"), pool.free("GPU-1-0")) == ((60, 750), (80, 1000))


def test_a_grant_given_back_while_it_moves_ends() -> None:
    pool = Pool(nodes=2)
    key = unplaced(pool)
    pool.sync(REFUSED_SECONDS + 1)
    entry = pool.core.known(key)
    assert pool.core.begin_move(entry) is not None
    pool.core.cancel(key, "h", pool.now)
    pool.core.end_move(entry, True, pool.now)
    effects = pool.core.drain()
    assert (effects.releases, effects.moves) == ([key], [])
    pool.core.release_answered(key, True, pool.now)
    del pool.seen[key]
    pool.sync()
    assert (pool.free("GPU-0-0"), pool.free("GPU-1-0")) == ((80, 1000), (80, 1000))


# -- nodes that have to be started

GROUP = Coming("gpus", "New", 2, 41 * GIB, GIB, node_count=2, start_seconds=240)


def test_which_nodes_may_come() -> None:
    none = frozenset[str]()
    assert len(devices_to_come([GROUP], [])) == 4
    new = frozenset({"New"})
    assert {one.node for one in devices_to_come([GROUP], [(frozenset(), new)])} == {"coming:gpus:0"}
    assert len(devices_to_come([GROUP], [(frozenset(), none)])) == 4, "its agent has not published yet"
    labels = frozenset({("pool", "gpus")})
    by_label = replace(GROUP, labels=labels)
    assert len(devices_to_come([by_label], [(labels | {("x", "y")}, new), (frozenset(), new)])) == 2


def test_a_node_to_be_started_is_obtainable_after_all_that_is_there() -> None:
    pool = Pool(start_seconds={"gpus": 240.0})
    pool.coming = devices_to_come([GROUP], [])
    pool.sync()
    query = AvailabilityQuery(owner=Owner(hub="h", user="u"), shapes=[Shape(compute_milli=500), Shape(compute_milli=500, model="New")])
    here, new = answer(pool.core, query, pool.now)
    assert (here.state, here.reason) == ("free", "free now")
    assert (new.state, new.reason, new.wait_seconds) == ("wait", "a node has to be started first: usually within 4 minutes", 240.0)
    assert new.memory == {"New": 20 * GIB}
    first = pool.ask(1000).slice
    assert first is not None
    assert first.node == "n0"
    second = pool.ask(1000)
    assert second.slice is not None
    assert second.slice.node == "coming:gpus:0"
    assert all(not one.device.uuid.startswith("coming:") for one in pool.core.device_books())


def test_when_the_node_has_come_the_slice_moves_there() -> None:
    pool = Pool(nodes=0)
    pool.coming = devices_to_come([GROUP], [])
    pool.sync()
    key = pool.running(500, device_count=2)
    pool.seen[key] = replace(pool.seen[key], placed=False)
    pool.sync()
    assert "started first" in (pool.grant(key).note or "")
    assert pool.core.drain().moves == []
    waiting = pool.ask(1000, device_count=2)
    assert waiting.slice is not None
    assert waiting.slice.node == "coming:gpus:1"
    pool.devices = [
        Device(uuid=f"GPU-new-{n}", index=n, model="New", node="new", memory_bytes=41 * GIB, reserve_bytes=GIB) for n in range(2)
    ]
    pool.coming = devices_to_come([GROUP], [(frozenset(), frozenset({"New"}))])
    pool.sync()
    assert pool.core.drain().moves == [key]
    assert moved(pool, key) == "new"
    pool.seen[key] = replace(pool.seen[key], placed=True)
    pool.sync()
    assert pool.grant(key).note is None
    assert pool.core.books.rooms["GPU-new-0"].free_milli == 500


def test_less_is_offered_than_the_books_say() -> None:
    pool = Pool()
    less = {"GPU-0-0": Part(30 * GIB, 100)}
    pool.core.snapshot(Snapshot(0, pool.devices, [], less), pool.now)
    assert pool.free() == (50, 900)
