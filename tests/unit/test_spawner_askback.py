"""Whose server the hub ends when it is asked back: only one whose user was told, in time, and that is still asked back. Pure."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from nbgpu.models import AskBack, Owner
from nbgpu_spawner import askback
from nbgpu_spawner.askback import LEAST_SECONDS, AskedBack, Told, seconds_left, to_end
from nbgpu_spawner.client import NO_ANSWER, PoolUnavailable

ADA = Owner(hub="h", user="ada")
A = "a" * 8
NOW = 1000.0


def ask(due: float = -1.0, owner: Owner = ADA, kind: str = "guarantee", request_id: str = A) -> AskBack:
    return AskBack(request_id=request_id, owner=owner, kind=kind, due_seconds=due, idle=True, reason="r", needs="n")


def ended(asks: list[AskBack], told: dict[str, Told] | None = None, running: dict[str, Owner] | None = None) -> list[str]:
    told = {A: Told("guarantee", NOW - 1)} if told is None else told
    return [one.request_id for one in to_end(asks, told, {A: ADA} if running is None else running, NOW)]


def test_one_that_was_told_and_is_due_is_ended() -> None:
    assert ended([ask()]) == [A]


@pytest.mark.parametrize(
    ("asks", "told", "running"),
    [
        ([], None, None),
        ([ask(due=0.5)], None, None),
        ([ask()], {}, None),
        ([ask()], {A: Told("guarantee", NOW + 0.5)}, None),
        ([ask(kind="session")], None, None),
        ([ask(owner=Owner(hub="h", user="grace"))], None, None),
        ([ask(owner=Owner(hub="other", user="ada"))], None, None),
        ([ask(owner=Owner(hub="h", user="ada", server="named"))], None, None),
        ([ask()], None, {}),
        ([ask()], None, {"b" * 8: ADA}),
    ],
    ids=["withdrawn", "early", "untold", "promised", "other reason", "another's", "another hub's", "another server", "ended", "recreated"],
)
def test_nobody_else_is_ended(asks: list[AskBack], told: dict[str, Told] | None, running: dict[str, Owner] | None) -> None:
    assert ended(asks, told, running) == []


def test_who_is_told_late_has_time_yet_and_no_promise_is_cut_short() -> None:
    assert seconds_left(ask(due=-100), None, NOW) == LEAST_SECONDS
    assert seconds_left(ask(due=300), None, NOW) == 300
    assert seconds_left(ask(due=5), Told("guarantee", NOW + 40), NOW) == 40
    assert seconds_left(ask(due=5), Told("session", NOW + 400), NOW) == LEAST_SECONDS


class FakePool:
    """Asks back what it is told to, or is away."""

    def __init__(self) -> None:
        self.found: list[AskBack] | None = [ask(due=0)]
        self.count = 0

    async def asks(self, max_age_seconds: float) -> Any:
        self.count += 1
        if self.found is None:
            raise PoolUnavailable(NO_ANSWER)
        return askback.time.monotonic(), self.found


class Server:
    """A spawner, as far as it is asked."""

    gpu_end_asked_back = True
    _log_name = "ada:"

    def __init__(self) -> None:
        self.name, self.request_id = "", A
        self.user = SimpleNamespace(spawners={"": self})
        self.log = SimpleNamespace(info=lambda *_: None, exception=lambda *_: None)

    def gpu_owner(self) -> Owner:
        return ADA

    def gpu_running_request(self) -> str | None:
        return self.request_id


class Played:
    """One server, told and looked at by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pool, self.server, self.stopped, self.said = NOW, FakePool(), Server(), list[Any](), list[str]()
        self.book = AskedBack(self.pool)  # pyright: ignore[reportArgumentType]
        self.book.servers.add(self.server)  # pyright: ignore[reportArgumentType]
        self.fails = False

        async def stop(spawner: Any) -> None:
            self.stopped.append(spawner)
            if self.fails:
                raise RuntimeError("it does not stop")

        monkeypatch.setattr(askback, "stop", stop)
        monkeypatch.setattr(askback, "time", SimpleNamespace(monotonic=lambda: self.now))

    def tell(self, user_reads: bool = True) -> dict[str, Any]:
        return asyncio.run(self.book.tell(self.server, A, user_reads=user_reads))  # pyright: ignore[reportArgumentType]

    def look(self, later: float = 0.0) -> int:
        self.now += later
        asyncio.run(self.book.look(SimpleNamespace(warning=lambda words, *_: self.said.append(words))))
        return len(self.stopped)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def test_told_then_ended_once_the_notice_is_over(played: Played) -> None:
    assert played.look(10) == 0, "not told yet"
    told = played.tell()["asked"]
    assert (told["seconds"], told["ends"], told["reason"]) == (LEAST_SECONDS, True, "r")
    assert played.look(LEAST_SECONDS - 1) == 0
    assert played.tell()["asked"]["seconds"] == 1
    assert played.look(1) == 1


def test_what_somebody_else_reads_is_not_told(played: Played) -> None:
    played.tell(user_reads=False)
    assert played.look(10 * LEAST_SECONDS) == 0


def test_where_the_admin_has_not_said_so_nobody_is_ended_and_the_pool_is_not_asked(played: Played) -> None:
    played.server.gpu_end_asked_back = False
    told = played.tell()["asked"]
    assert (told["seconds"], told["ends"]) == (0, False)
    before = played.pool.count
    assert played.look(10 * LEAST_SECONDS) == 0
    assert played.pool.count == before


def test_a_withdrawn_ask_is_forgotten_and_comes_anew(played: Played) -> None:
    played.tell()
    played.pool.found = []
    assert played.look(LEAST_SECONDS) == 0
    assert played.tell()["asked"] is None
    played.pool.found = [ask(due=-5)]
    assert played.look() == 0
    assert played.tell()["asked"]["seconds"] == LEAST_SECONDS


def test_a_pool_that_is_away_ends_nobody_and_makes_nobody_be_told_again(played: Played) -> None:
    played.tell()
    played.pool.found = None
    with pytest.raises(PoolUnavailable):
        played.look(2 * LEAST_SECONDS)
    assert played.stopped == []
    played.pool.found = [ask(due=-5)]
    assert played.look() == 1


def test_a_server_that_went_while_the_pool_was_asked_is_left_alone(played: Played) -> None:
    played.tell()
    real = played.pool.asks

    async def slow(max_age_seconds: float) -> Any:
        played.server.user.spawners.clear()  # stopped; the name is free for another
        return await real(max_age_seconds)

    played.pool.asks = slow  # type: ignore[method-assign]
    assert played.look(LEAST_SECONDS) == 0


def test_one_whose_stop_fails_is_not_tried_at_each_look(played: Played) -> None:
    played.fails = True
    played.tell()
    assert played.look(LEAST_SECONDS) == 1
    assert played.look(LEAST_SECONDS / 2) == 1
    assert played.look(LEAST_SECONDS / 2) == 2


def test_one_that_could_not_be_told_goes_on_and_the_admin_reads_it_once(played: Played) -> None:
    played.pool.found = [ask(due=-LEAST_SECONDS - 1)]
    assert [played.look(10), played.look(10)] == [0, 0]
    assert len(played.said) == 1


def test_many_servers_ask_less_often_and_those_that_are_asked_back_more(played: Played) -> None:
    asked = played.tell()["again_seconds"]
    played.pool.found = []
    calm = played.tell()["again_seconds"]
    crowd = [Server() for _ in range(2000)]
    for one in crowd:
        played.book.servers.add(one)  # pyright: ignore[reportArgumentType]
    assert asked < calm < played.tell()["again_seconds"] == pytest.approx(200, abs=1)


def test_no_error_ends_the_task(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askback, "LOOK_SECONDS", 0.001)
    looks: list[int] = []

    async def look(log: Any) -> None:
        looks.append(1)
        if len(looks) > 5:
            raise asyncio.CancelledError
        raise [PoolUnavailable(NO_ANSWER), RuntimeError("x"), KeyError("y")][len(looks) % 3]

    played.book.look = look  # type: ignore[method-assign]
    log = SimpleNamespace(debug=lambda *_: None, exception=lambda *_: None)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(played.book.run(log))
    assert len(looks) == 6
