"""Queue, quotas, guarantees and estimates, through the pure core."""

from __future__ import annotations

import pytest

from nbgpu.errors import NbgpuError
from nbgpu.models import AvailabilityQuery, Device, Grant, GrantState, Owner, Request, Shape
from nbgpu.quantities import GIB
from nbgpu_pool.core import Core
from nbgpu_pool.queue import Fairness
from nbgpu_pool.quotas import Limits, Quotas, format_gpus
from nbgpu_pool.state import Seen, Settings, Snapshot

from nbgpu_pool import availability  # isort: skip


class Pool:
    """A core with a ledger that does at once what it is asked."""

    def __init__(self, devices: int = 1, node_size: int = 8, **settings: object):
        self.core = Core(Settings(**settings))  # type: ignore[arg-type]
        self.devices = [
            Device(uuid=f"GPU-{n}", index=n % node_size, model="Big", node=f"n{n // node_size}", memory_bytes=81 * GIB, reserve_bytes=GIB)
            for n in range(devices)
        ]
        self.now = 0.0
        self.number = 0
        self.running: dict[str, Seen] = {}
        self.sync()

    def sync(self) -> None:
        self.core.mark += 1
        self.core.snapshot(Snapshot(self.core.mark, self.devices, list(self.running.values())), self.now)

    def ask(self, milli: int, user: str = "u", server: str = "", count: int = 1, groups: list[str] | None = None, **more: object) -> Grant:
        self.number += 1
        request = Request.model_validate(
            {
                "request_id": f"request-{self.number:05d}",
                "owner": {"hub": "h", "user": user, "server": server},
                "compute_milli": milli,
                "device_count": count,
                "groups": groups or [],
                **more,
            }
        )
        grant = self.core.request(request, self.now)
        self.core.books.refresh()  # as the service does after its answer
        return grant

    def run(self, grant: Grant) -> str:
        """The server of a grant starts."""
        key = grant.request.request_id
        entry = self.core.known(key)
        assert entry.slice is not None, grant
        self.core.begin_prepare(entry)
        self.running[key] = Seen(entry.slice, "running")
        self.core.end_prepare(entry, None, True, self.now)
        self.sync()
        assert self.state(key) == GrantState.bound
        return key

    def started(self, milli: int, **more: object) -> str:
        return self.run(self.ask(milli, **more))  # type: ignore[arg-type]

    def end(self, key: str) -> None:
        del self.running[key]
        self.sync()

    def state(self, key: str) -> GrantState:
        return self.core.known(key).state

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for entry in self.core.books.waiting():
            self.core.touch(entry, self.now)
        self.core.tick(self.now)

    def look(self, milli: int, user: str = "u", groups: list[str] | None = None) -> tuple[str, str]:
        query = AvailabilityQuery(owner=Owner(hub="h", user=user), groups=groups or [], shapes=[Shape(compute_milli=milli)])
        (found,) = availability.answer(self.core, query, self.now)
        return found.state, found.reason


def test_first_come_first_served_and_small_ones_pass_what_does_not_fit() -> None:
    pool = Pool()
    first = pool.started(750)
    large = pool.ask(1000, user="large")
    small = pool.ask(250, user="small")
    assert (large.state, large.position) == (GrantState.queued, 1)
    assert small.state == GrantState.reserved, "backfill"
    pool.end(first)
    assert pool.state(large.request.request_id) == GrantState.queued
    pool.end(pool.run(small))
    assert pool.state(large.request.request_id) == GrantState.reserved


def stream_of_small_ones(fairness: Fairness, rounds: int = 300) -> int | None:
    """Two eighths come whenever one ends; return after how many of them the whole-device request got in."""
    pool = Pool(fairness=fairness, queue_per_user=1000)
    running = [pool.started(125) for _ in range(8)]
    large = pool.ask(1000, user="large").request.request_id
    passed = 0
    for _ in range(rounds):
        for _ in range(2):
            pool.ask(125)
        if not running:
            running = list(pool.running)
        pool.now += 1
        pool.end(running.pop(0))
        for entry in [one for one in pool.core.books.entries.values() if one.state == GrantState.reserved]:
            if entry.slice_id == large:
                return passed
            passed += 1
            running.append(pool.run(pool.core.grant(entry, pool.now)))
        for entry in pool.core.books.waiting()[20:]:
            pool.core.cancel(entry.slice_id, "h", pool.now)
    return None


def test_nobody_starves_and_the_control_does() -> None:
    assert stream_of_small_ones(Fairness(overtake_count=10, overtake_seconds=1e9)) == 10
    assert stream_of_small_ones(Fairness(overtake_count=10**9, overtake_seconds=1e9)) is None, "control: no bound, never served"
    by_time = stream_of_small_ones(Fairness(overtake_count=10**9, overtake_seconds=25))
    assert by_time is not None
    assert by_time <= 25


def test_a_protected_request_keeps_only_its_own_device() -> None:
    pool = Pool(2, fairness=Fairness(overtake_count=0, overtake_seconds=0))
    for _ in range(2):
        pool.started(500, user="a")
    pool.started(750, user="b")
    large = pool.ask(1000, user="large")
    assert pool.core.known(large.request.request_id).earmark == ("GPU-1",)
    pool.sync()
    assert pool.look(250)[0] == "wait", "GPU-1 is kept"
    other = pool.ask(250, user="c")
    assert other.state == GrantState.queued
    pool.end("request-00001")
    assert pool.state(other.request.request_id) == GrantState.reserved, "GPU-0 serves on"


def test_leaving_the_queue_and_being_forgotten_in_it() -> None:
    pool = Pool(queue_ttl_seconds=60)
    pool.started(1000)
    first, second = pool.ask(500), pool.ask(500)
    pool.core.cancel(first.request.request_id, "h", pool.now)
    assert pool.core.grant(pool.core.known(second.request.request_id), pool.now).position == 1
    pool.wait(59)
    pool.wait(59)
    assert pool.state(second.request.request_id) == GrantState.queued, "asked for in time"
    pool.now += 61
    pool.core.tick(pool.now)
    grant = pool.core.grant(pool.core.known(second.request.request_id), pool.now)
    assert grant.state == GrantState.gone
    assert grant.reason is not None
    assert "nobody has asked" in grant.reason


def test_user_limit_counts_all_servers_and_waits_for_what_is_on_its_way_back() -> None:
    pool = Pool(2, quotas=Quotas(users={"u": Limits(limit_milli=1000)}))
    one = pool.started(500, server="one")
    pool.started(500, server="two")
    with pytest.raises(NbgpuError, match=r"Your quota is 1 GPU: you hold half a GPU on 'one', half a GPU on 'two' and asked for an eighth"):
        pool.ask(125, server="three")
    pool.core.cancel(one, "h", pool.now)
    assert pool.state(one) == GrantState.releasing
    again = pool.ask(500, server="one")
    assert again.state == GrantState.queued
    assert again.reason == "waits for your quota (1 GPU in all, 1 GPU held): what is held now must be given back first"
    pool.end(one)
    assert pool.state(again.request.request_id) == GrantState.reserved
    assert Pool(2).started(500), "control: no quota, no refusal"


def test_memory_limit() -> None:
    pool = Pool(2, quotas=Quotas(default=Limits(limit_bytes=20 * GIB)))
    assert pool.ask(125).state == GrantState.reserved
    with pytest.raises(
        NbgpuError, match=r"Your quota is 20 GiB of GPU memory: you hold 10 GiB on your default server and asked for 20 GiB"
    ):
        pool.ask(250)


def test_group_limit_makes_wait_and_refuses_what_can_never_be() -> None:
    pool = Pool(2, quotas=Quotas(groups={"class": Limits(limit_milli=500, per_user_milli=500)}))
    first = pool.started(500, user="a", groups=["class"])
    second = pool.ask(250, user="b", groups=["class"])
    assert second.state == GrantState.queued
    assert second.reason is not None
    assert "the quota of your group class" in second.reason
    assert pool.look(250, "b", ["class"])[0] == "wait"
    assert pool.ask(500, user="x").state == GrantState.reserved, "others pass: nothing is missing but the quota"
    with pytest.raises(NbgpuError, match="quota"):
        pool.ask(750, user="c", groups=["class"])
    pool.end(first)
    assert pool.state(second.request.request_id) == GrantState.reserved


def test_a_group_s_large_request_is_not_starved_by_its_small_ones() -> None:
    for fairness, served in ((Fairness(overtake_seconds=10), True), (Fairness(overtake_seconds=1e9), False)):
        pool = Pool(2, quotas=Quotas(groups={"g": Limits(limit_milli=1000)}), fairness=fairness, queue_per_user=1000)
        running = [pool.started(250, user="s", groups=["g"]) for _ in range(4)]
        large = pool.ask(1000, user="l", groups=["g"]).request.request_id
        for _ in range(30):
            pool.ask(250, user="s", groups=["g"])
            pool.wait(1)
            pool.end(running.pop(0)) if running else None
            for entry in [one for one in pool.core.books.entries.values() if one.state == GrantState.reserved and one.slice_id != large]:
                running.append(pool.run(pool.core.grant(entry, pool.now)))
        assert (pool.state(large) == GrantState.reserved) is served


def test_guarantee_is_kept_free_for_its_group() -> None:
    quotas = Quotas(groups={"lab": Limits(guarantee_milli=500)})
    for rules, state in ((quotas, GrantState.queued), (Quotas(), GrantState.reserved)):
        pool = Pool(quotas=rules)
        assert pool.ask(500, user="guest").state == GrantState.reserved
        assert pool.ask(250, user="guest").state == state, "control: without the guarantee it is granted"
    pool = Pool(quotas=quotas)
    pool.started(500, user="guest")
    assert pool.look(250, "guest")[0] == "wait"
    assert pool.ask(500, user="member", groups=["lab"]).state == GrantState.reserved


def test_groups_are_found_again_after_a_restart() -> None:
    quotas = Quotas(groups={"class": Limits(limit_milli=500)})
    pool = Pool(2, quotas=quotas)
    key = pool.started(500, user="a", groups=["class", "unimportant"])
    assert pool.running[key].slice.groups == ["class"]
    pool.core = Core(Settings(quotas=quotas))
    pool.sync()
    assert pool.ask(250, user="b", groups=["class"]).state == GrantState.queued


def test_an_estimate_is_called_a_guess_until_enough_servers_have_ended() -> None:
    pool = Pool()
    running = pool.started(1000)
    waiting = pool.ask(500, user="w").request.request_id

    def estimate() -> float | None:
        return pool.core.grant(pool.core.known(waiting), pool.now).wait_seconds

    def guessed() -> bool:
        return pool.core.grant(pool.core.known(waiting), pool.now).wait_guessed

    assert (estimate(), guessed()) == (pytest.approx(3600), True)
    pool.wait(6)
    assert (estimate(), guessed()) == (pytest.approx(3594), True)
    for length in (100, 200, 300, 400, 500):
        pool.core.sessions.ended("h", length)
    pool.wait(6)
    assert (estimate(), guessed()) == (pytest.approx(400 - 12), False)
    pool.wait(238)
    assert estimate() == pytest.approx(500 - 250), "of the three that lasted longer than 250 s, usually: all have ended then"
    pool.wait(300)
    assert (estimate(), guessed()) == (pytest.approx(550), True), "none has lasted so long: nobody knows"
    pool.end(running)
    assert pool.state(waiting) == GrantState.reserved


def test_programs_of_the_command_line_teach_nothing_about_notebooks() -> None:
    pool = Pool()
    pool.started(1000)
    waiting = pool.ask(500, user="w").request.request_id

    def wait() -> tuple[float | None, bool]:
        grant = pool.core.grant(pool.core.known(waiting), pool.now)
        return grant.wait_seconds, grant.wait_guessed

    for _ in range(20):
        pool.core.sessions.ended("command-line", 2)
    pool.wait(6)
    assert wait() == (pytest.approx(3594), True), "of servers nothing is known yet"
    for _ in range(5):
        pool.core.sessions.ended("h", 20)
    pool.wait(6)
    assert wait() == (pytest.approx(20 - 12), False), "the control: servers of this hub do teach it"


def test_queue_bounds() -> None:
    pool = Pool(queue_total=3, queue_per_user=2)
    pool.started(1000)
    pool.ask(100, user="a")
    pool.ask(100, user="a")
    with pytest.raises(NbgpuError, match="one user may have 2 there") as caught:
        pool.ask(100, user="a")
    assert caught.value.status == 403
    pool.ask(100, user="b")
    with pytest.raises(NbgpuError, match="queue is full") as caught:
        pool.ask(100, user="c")
    assert caught.value.status == 503


def test_amounts_in_words() -> None:
    shown = [format_gpus(milli) for milli in (125, 250, 333, 500, 375, 1000, 1500, 2000, 10250, 0)]
    assert shown == [
        "an eighth of a GPU",
        "a quarter of a GPU",
        "a third of a GPU",
        "half a GPU",
        "37.5 % of a GPU",
        "1 GPU",
        "1.5 GPUs",
        "2 GPUs",
        "10.25 GPUs",
        "no GPU",
    ]


def test_a_device_that_goes_sick_gets_nothing_new_and_keeps_what_runs() -> None:
    pool = Pool()
    key = pool.started(250)
    pool.devices = [pool.devices[0].model_copy(update={"healthy": False})]
    pool.sync()
    assert pool.state(key) == GrantState.bound
    assert pool.ask(250, user="b").state == GrantState.queued
    pool.devices = [pool.devices[0].model_copy(update={"healthy": True})]
    pool.sync()
    assert pool.state("request-00002") == GrantState.reserved


def most_passed(most: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """One asks for a whole device where long sessions hold a part of each; small ones come and go beside them, and pass it."""
    monkeypatch.setattr("nbgpu_pool.queue.MOST_PER_DEVICE", most)
    pool = Pool(4, fairness=Fairness(overtake_count=5, overtake_seconds=1e9), queue_per_user=10**4)
    for _ in range(4):  # two on each of two devices; each is opened by a half
        pool.started(500)
    for key in [key for key, seen in pool.running.items() if seen.slice.devices[0].uuid in ("GPU-0", "GPU-1")][::2]:
        pool.end(key)
    for _ in range(2):
        pool.started(1000)
    large = pool.ask(1000, user="large").request.request_id
    short: list[str] = []
    for _ in range(500):
        grant = pool.ask(125, user="small")
        if grant.state == GrantState.reserved:
            short.append(pool.run(grant))
        if len(short) > 2:
            pool.end(short.pop(0))
    entry = pool.core.known(large)
    assert entry.state == GrantState.queued
    for key in list(pool.running):
        pool.end(key)
    assert pool.state(large) == GrantState.reserved
    return entry.overtaken


def test_nobody_is_passed_more_often_than_the_policy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_passed(0, monkeypatch) == 20
    assert most_passed(10, monkeypatch) == 40
    assert most_passed(10**6, monkeypatch) > 100, "control: with no bound it is passed for as long as others come"


def test_who_can_be_placed_nowhere_now_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its devices are out of service: that it was passed often keeps nothing from the others, nor do they count as passing it."""
    monkeypatch.setattr("nbgpu_pool.queue.MOST_PER_DEVICE", 0)
    pool = Pool(1, fairness=Fairness(overtake_count=0, overtake_seconds=0))
    other = pool.devices[0].model_copy(update={"uuid": "GPU-x", "model": "Other", "node": "x"})
    pool.devices.append(other)
    pool.sync()
    pool.devices[1] = other.model_copy(update={"healthy": False})
    pool.sync()
    large = pool.ask(1000, model="Other").request.request_id
    for _ in range(3):
        assert pool.ask(250, user="v").state == GrantState.reserved
    assert pool.core.known(large).overtaken == 0


def asked_and_given_back(pool: Pool, user: str, rounds: int) -> None:
    for _ in range(rounds):
        grant = pool.ask(125, user=user)
        assert grant.state == GrantState.reserved
        pool.core.cancel(grant.request.request_id, "h", pool.now)


@pytest.mark.parametrize("user", ["large", "other"])
def test_who_asks_and_gives_back_again_and_again_makes_nobody_wait(user: str) -> None:
    """A whole pool would be kept for one whose own small requests, or an accomplice's, pass it often enough."""
    pool = Pool(4, fairness=Fairness(overtake_count=5, overtake_seconds=1e9))
    for _ in range(4):
        pool.started(750)
    large = pool.core.known(pool.ask(1000, user="large").request.request_id)
    asked_and_given_back(pool, user, 200)
    assert (large.overtaken, large.earmark) == (0, ())
    assert pool.ask(125, user="honest").state == GrantState.reserved


def test_one_s_own_servers_do_not_pass_one() -> None:
    pool = Pool(fairness=Fairness(overtake_count=5, overtake_seconds=1e9))
    pool.started(500)
    large = pool.core.known(pool.ask(1000, user="large").request.request_id)
    for _ in range(10):
        pool.end(pool.started(125, user="large", server="small"))
    assert large.overtaken == 0
    for number in range(1, 4):
        pool.end(pool.started(125, user="other"))
        assert large.overtaken == number, "the control: another's that ran counts"


def test_in_one_walk_too_nobody_is_passed_more_often_than_the_policy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the agent was away many came; they are all looked at at once when it is there again."""
    monkeypatch.setattr("nbgpu_pool.queue.MOST_PER_DEVICE", 0)
    pool = Pool(3, fairness=Fairness(overtake_count=1, overtake_seconds=1e9))
    for _ in range(3):
        pool.started(600, user="a")
    large = pool.core.known(pool.ask(1000, user="large").request.request_id)
    pool.core.away(pool.now)
    small = [pool.ask(125, user=f"small-{n}").request.request_id for n in range(15)]
    pool.sync()
    assert large.overtaken == 4
    assert sum(pool.state(one) == GrantState.reserved for one in small) == 4
    assert set(large.earmark) == {"GPU-0", "GPU-1", "GPU-2"}


def test_a_device_alone_is_of_no_use_to_who_wants_two() -> None:
    pool = Pool(3, node_size=2, fairness=Fairness(overtake_count=5, overtake_seconds=1e9))
    pool.started(1000, count=2)
    pair = pool.core.known(pool.ask(250, user="pair", count=2).request.request_id)
    other = pool.ask(250, user="other").slice
    assert other is not None
    assert other.devices[0].uuid == "GPU-2"
    assert pair.overtaken == 0
