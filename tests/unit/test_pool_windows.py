"""Devices are kept for a group at certain times, and drained before (docs/quotas.md). Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from test_pool_queue import Pool as Base

from nbgpu.errors import NbgpuError
from nbgpu.models import AvailabilityQuery, GrantState, Owner, Resize, Shape
from nbgpu_pool import availability, hints
from nbgpu_pool.config import ConfigError, load
from nbgpu_pool.quotas import Limits, Quotas
from nbgpu_pool.windows import Window, reservations

BERLIN = ZoneInfo("Europe/Berlin")
HOUR = 3600.0
CLASS = Window("class biology", "bio", 8, 125, frozenset({1}), 9 * 60, 11 * 60, BERLIN, drain_seconds=4 * HOUR, notice_seconds=HOUR / 2)


def at(text: str, zone: ZoneInfo = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


class Pool(Base):
    """Two devices, and a class that needs one of them."""

    def __init__(self, clock: str, devices: int = 2, window: Window = CLASS, **more: object):
        super().__init__(devices=devices, windows=(window,), queue_per_user=100, **more)
        self.jumps_to(clock)

    def jumps_to(self, clock: str) -> None:
        """The clock on the wall is set to this, on Tuesday the 1st of December 2026 unless it says another day."""
        self.core.ahead = at(clock if "-" in clock else f"2026-12-01 {clock}") - self.now
        self.wait(10)

    def is_now(self, clock: str) -> None:
        """It is this time of the same day."""
        self.wait(at(f"2026-12-01 {clock}") - self.now - self.core.ahead)

    def reason(self, milli: int, session: float | None = None, groups: tuple[str, ...] = ()) -> tuple[str, str]:
        shape = Shape(compute_milli=milli, session_seconds=session)
        (found,) = availability.answer(
            self.core, AvailabilityQuery(owner=Owner(hub="h", user="who"), groups=list(groups), shapes=[shape]), self.now
        )
        return found.state, found.reason

    def device(self, key: str) -> str:
        entry = self.core.known(key)
        assert entry.slice is not None
        return entry.slice.devices[0].uuid

    @property
    def kept(self) -> tuple[str, ...]:
        windows = self.core.books.windows
        assert windows is not None
        return windows.kept[0].devices if windows.kept else ()


@pytest.mark.parametrize(
    ("now", "begin", "end"),
    [
        ("2026-12-01 08:00", "2026-12-01 09:00", "2026-12-01 11:00"),
        ("2026-12-01 10:59", "2026-12-01 09:00", "2026-12-01 11:00"),
        ("2026-12-01 11:00", "2026-12-08 09:00", "2026-12-08 11:00"),
        ("2026-12-02 00:00", "2026-12-08 09:00", "2026-12-08 11:00"),
    ],
)
def test_the_window_that_is_on_or_the_next(now: str, begin: str, end: str) -> None:
    assert CLASS.next(at(now)) == (at(begin), at(end))


def test_the_clock_on_the_wall_counts_where_clocks_are_changed_and_in_other_zones() -> None:
    sundays = Window("s", "g", 1, 125, frozenset({6}), 60, 9 * 60, BERLIN)
    begin, end = sundays.next(at("2026-10-25 00:30"))  # in that night there are nine hours between 1:00 and 9:00
    assert (begin, end) == (at("2026-10-25 01:00"), at("2026-10-25 09:00"))
    assert end - begin == 9 * HOUR
    tokyo = Window("t", "g", 1, 125, frozenset({1}), 9 * 60, 11 * 60, ZoneInfo("Asia/Tokyo"))
    assert tokyo.next(at("2026-11-30 22:00", ZoneInfo("UTC")))[0] == at("2026-12-01 00:00", ZoneInfo("UTC")), "Tuesday there, Monday here"


def test_long_before_nothing_is_kept() -> None:
    pool = Pool("04:00")
    assert pool.kept == ()
    assert pool.reason(1000) == ("free", "free now")


def test_the_device_where_least_runs_is_chosen_and_stays_chosen() -> None:
    pool = Pool("04:00")
    busy = pool.started(500, user="x")
    pool.is_now("05:30")
    assert pool.kept == ("GPU-1",)
    pool.end(busy)
    pool.started(750, user="y")
    assert pool.device(pool.started(1000, user="z", session_seconds=HOUR)) == "GPU-1"
    pool.is_now("06:00")
    assert pool.kept == ("GPU-1",)


def test_a_session_that_runs_into_it_is_not_placed_there_one_that_does_not_is() -> None:
    pool = Pool("06:00")
    pool.started(1000, user="x", session_seconds=10 * HOUR)
    assert pool.kept == ("GPU-1",)
    long = pool.ask(500, user="a", session_seconds=3.1 * HOUR)
    assert long.state == GrantState.queued
    assert pool.ask(500, user="b", session_seconds=2.5 * HOUR).state == GrantState.reserved
    state, reason = pool.reason(500, 3.1 * HOUR)
    assert state == "wait"
    assert reason == "kept for class biology from 09:00 on: a session of at most 2 hours could start now"
    assert pool.reason(500, 2.5 * HOUR) == ("free", "free now")


def test_a_session_of_unknown_length_goes_there_last_and_is_told_until_when() -> None:
    pool = Pool("06:00")
    assert pool.reason(500) == ("free", "free now"), "there is another place"
    for user in ("a", "b"):
        assert pool.device(pool.started(500, user=user)) == "GPU-0"
    assert pool.reason(500) == ("free", "free until 09:00, then kept for class biology")
    last = pool.started(500, user="c")
    assert pool.device(last) == "GPU-1"
    grant = pool.core.grant(pool.core.known(last), pool.now)
    assert grant.note == "This GPU is kept for class biology from 09:00 on."
    assert not pool.core.asks


def test_from_the_notice_on_nobody_comes_who_stays_and_who_is_there_is_asked_back() -> None:
    pool = Pool("06:00")
    keys = [pool.started(500, user=user) for user in "abc"]
    short = pool.started(250, user="d", session_seconds=2.9 * HOUR)
    pool.is_now("08:31")
    assert set(pool.core.asks) == {keys[2]}, "who will have ended is not asked, nor who is elsewhere"
    ask = pool.core.asks[keys[2]]
    assert ask.kind == "reserved"
    assert "class biology (group bio) from 09:00 on" in ask.needs
    assert "stop this server within" in (pool.core.grant(pool.core.known(keys[2]), pool.now).note or "")
    assert pool.device(short) == "GPU-1"
    assert pool.ask(125, user="e").state == GrantState.queued
    assert pool.ask(125, user="f", session_seconds=600).state == GrantState.reserved
    assert pool.reason(125)[1] == "kept for class biology from 09:00 on: a session of at most 27 minutes could start now"


def test_the_class_finds_its_places_and_others_theirs_when_it_is_over() -> None:
    pool = Pool("09:05")
    pool.started(1000, user="x")
    assert pool.kept == ("GPU-1",)
    outsider = pool.ask(125, user="y")
    assert outsider.state == GrantState.queued
    assert pool.reason(125)[1].startswith("kept for class biology for another 2 hours")
    assert pool.reason(125, groups=("bio",)) == ("free", "free now")
    students = [pool.ask(125, user=f"s{n}", groups=["bio"]) for n in range(8)]
    assert {one.slice.devices[0].uuid for one in students if one.slice is not None} == {"GPU-1"}
    assert all(one.state == GrantState.reserved for one in students), "a class of eighths has its eight places"
    for one in students:
        pool.core.cancel(one.request.request_id, "h", pool.now)
    assert pool.state(outsider.request.request_id) == GrantState.queued
    pool.is_now("11:00")
    assert pool.state(outsider.request.request_id) == GrantState.reserved


def test_without_the_reservation_the_class_finds_nothing() -> None:
    """The control."""
    pool = Base(devices=2)
    for n in range(4):
        pool.started(500, user=f"x{n}")
    assert pool.ask(125, user="s", groups=["bio"]).state == GrantState.queued


def test_members_go_to_their_places_first() -> None:
    pool = Pool("09:05")
    pool.started(500, user="x")
    assert pool.device(pool.started(125, user="s", groups=["bio"])) == "GPU-1"
    for n in range(7):
        pool.started(125, user=f"s{n}", groups=["bio"])
    assert pool.device(pool.started(125, user="late", groups=["bio"])) == "GPU-0", "more than were asked for find what there is"


def test_what_is_kept_for_a_class_is_not_what_keeps_a_guarantee() -> None:
    pool = Pool("09:05", quotas=Quotas(groups={"staff": Limits(guarantee_milli=1000)}))
    assert pool.ask(125, user="x").state == GrantState.queued, "the only other device is what staff is promised"
    assert pool.ask(1000, user="y", groups=["staff"]).state == GrantState.reserved


def test_a_resize_does_not_grow_into_it() -> None:
    pool = Pool("06:00", devices=1)
    stays = pool.started(250, user="b")
    pool.is_now("08:40")
    with pytest.raises(NbgpuError, match="kept"):
        pool.core.begin_resize(pool.core.known(stays), Resize(compute_milli=375), pool.now)


def test_the_wait_that_is_told_knows_of_it() -> None:
    """Room that is kept is nobody's "within a minute"."""
    pool = Pool("09:05", devices=1)
    waiting = pool.ask(500, user="x")
    assert pool.core.grant(pool.core.known(waiting.request.request_id), pool.now).wait_seconds is None


def test_too_few_devices_and_one_that_fails() -> None:
    pool = Pool("08:00", window=Window("big", "bio", 20, 125, frozenset({1}), 540, 660, BERLIN))
    (found,) = reservations(pool.core.books, pool.core.settings.windows, at("2026-12-01 08:00"))
    assert (found.devices, found.short_count, found.ready_count) == (["GPU-1", "GPU-0"], 1, 16)
    pool.devices[0] = pool.devices[0].model_copy(update={"healthy": False})
    pool.sync()
    pool.wait(6)
    (found,) = reservations(pool.core.books, pool.core.settings.windows, at("2026-12-01 08:01"))
    assert (found.devices, found.short_count) == (["GPU-1"], 2)


def test_ready_places_are_those_that_nobody_else_holds() -> None:
    pool = Pool("06:00", devices=1)
    pool.started(250, user="x")
    pool.started(125, user="s", groups=["bio"])
    (found,) = reservations(pool.core.books, pool.core.settings.windows, at("2026-12-01 06:00"))
    assert (found.ready_count, found.place_count, found.begins_seconds) == (6, 8, 3 * HOUR)


def test_a_clock_that_jumps_moves_the_window_and_nothing_else() -> None:
    pool = Pool("09:05")
    outsider = pool.ask(500, user="y")
    stuck = [pool.ask(500, user=user) for user in "abc"]
    assert pool.state(stuck[-1].request.request_id) == GrantState.queued
    pool.jumps_to("2026-12-02 09:05")
    assert pool.state(stuck[-1].request.request_id) == GrantState.reserved
    pool.jumps_to("09:05")
    assert pool.kept
    assert pool.state(outsider.request.request_id) == GrantState.reserved, "nothing is taken from who holds"


def test_a_session_that_runs_longer_than_it_may_is_not_believed_to_end() -> None:
    pool = Pool("06:00", devices=1)
    late = pool.started(500, user="a", session_seconds=2 * HOUR)
    pool.is_now("08:40")
    assert (pool.core.asks[late].kind, pool.core.asks[late].due < pool.now) == ("session", True)
    pool.core._ask_back("session", ())  # pyright: ignore[reportPrivateUsage]
    assert pool.core.asks[late].kind == "reserved"


def test_a_session_that_is_over_is_asked_back_with_notice() -> None:
    pool = Pool("12:00")
    key = pool.started(500, user="a", session_seconds=2 * HOUR)
    endless = pool.started(500, user="b")
    pool.wait(2 * HOUR - 700)
    assert not pool.core.asks
    pool.wait(200)
    assert set(pool.core.asks) == {key}
    note = pool.core.grant(pool.core.known(key), pool.now).note or ""
    assert note == "Please save your work and stop this server within 9 minutes: a session here lasts 2 hours at most."
    assert pool.core.grant(pool.core.known(endless), pool.now).note is None


GOOD = "{name: b, group: bio, count: 40, share: 1/8, days: [tue, thu], from: 9:00, to: '11:30', time_zone: Europe/Berlin}"


def test_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(f"reservations:\n  - {GOOD}\n")
    (window,) = load(file).settings().windows
    assert (window.begin_minutes, window.end_minutes, window.milli, window.days) == (540, 690, 125, frozenset({1, 3}))
    assert window.zone.key == "Europe/Berlin"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("Europe/Berlin", "Berlin", "time_zone: it must be a time zone as the IANA names them"),
        ("Europe/Berlin", "../../etc/passwd", "time_zone: it must be a time zone"),
        ("9:00", "25:00", "from: it must be a time of the day"),
        ("9:00", "'9'", "from: it must be a time of the day"),
        ("9:00", "12:00", "`to` must be after `from`"),
        ("tue", "tues", "days.0"),
        ("1/8", "2", "share"),
        ("count: 40", "count: 0", "count"),
        ("time_zone", "timezone", "time_zone: it is missing"),
        ("group: bio", "group: bio, drain_seconds: 60", "drain_seconds must be at least notice_seconds"),
    ],
)
def test_mistakes_in_it_are_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(f"queue: {{}}\nreservations:\n  - {GOOD.replace(old, new, 1)}\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert says in caught.value.message
    assert "line 3" in caught.value.message


def test_a_class_that_takes_its_places_overtakes_nobody() -> None:
    """Else those who wait would in the end be kept the very devices that the class has."""
    pool = Pool("09:05")
    pool.started(1000, user="x")
    outsider = pool.ask(125, user="y")
    for n in range(8):
        pool.started(125, user=f"s{n}", groups=["bio"])
    assert pool.core.known(outsider.request.request_id).overtaken == 0


def test_no_hint_names_a_server_whose_place_is_kept_for_others() -> None:
    for clock, named in (("09:05", False), ("12:00", True)):
        pool = Pool(clock, devices=1)
        held = pool.started(1000, user="s", groups=["bio"])
        pool.running[held] = replace(pool.running[held], idle_seconds=5000.0)
        pool.sync()
        pool.ask(500, user="x")
        assert bool(hints.answer(pool.core, pool.now).hints) == named
