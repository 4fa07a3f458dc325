"""What the start page and the queue page say: whose profiles, what is free instead, what a wait is worth. And what of it is logged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from jupyterhub.app import JupyterHub
from tornado.log import gen_log
from traitlets.config import Config

from nbgpu.errors import InvalidValue, NbgpuError, Refused, Unavailable
from nbgpu.models import Availability, AvailabilityQuery, Device, DeviceBooks, Grant, GrantState, Owner, Request
from nbgpu.quantities import GIB
from nbgpu_spawner import form, profiles, setup, sizes, waiting
from nbgpu_spawner.options import Wish, wish_from
from nbgpu_spawner.refusal import refusal

OWNER = Owner(hub="h", user="ada")
EVIL = "<script>alert(1)</script>\"'>"


def wish(**values: Any) -> Wish:
    found = wish_from(values)
    assert found is not None
    return found


def answer(milli: int, state: Any = "free") -> Availability:
    return Availability(state=state, reason="", memory={"H100": 78 * GIB * milli // 1000}, compute_milli={"H100": milli})


# -- groups

GROUPED: list[dict[str, Any]] = [
    {"display_name": "Whole", "slug": "whole", "default": True, "allowed_groups": ["staff"], "kubespawner_override": {"gpu_fraction": 1}},
    {"display_name": "Small", "slug": "small", "allowed_groups": ["students", "staff"], "kubespawner_override": {"gpu_fraction": 0.125}},
    {"display_name": "CPU", "slug": "cpu"},
]


@pytest.mark.parametrize(
    ("groups", "slugs", "default"),
    [
        (["staff"], ["whole", "small", "cpu"], "whole"),
        (["students", "chess"], ["small", "cpu"], "small"),
        ([], ["cpu"], "cpu"),
    ],
)
def test_a_profile_of_a_group_is_there_for_its_members(groups: list[str], slugs: list[str], default: str) -> None:
    mine = profiles.initialise(profiles.for_groups(GROUPED, groups))
    assert [one["slug"] for one in mine] == slugs
    assert profiles.selected(mine, {})["slug"] == default, "a default that is not theirs is none"  # pyright: ignore
    if "whole" not in slugs:
        with pytest.raises(InvalidValue) as caught:  # as by the REST API
            profiles.selected(mine, {"profile": "whole"})
        assert "whole" not in caught.value.allowed, "what is not theirs is not named"


def test_where_all_profiles_are_for_others_nothing_starts() -> None:
    """Not even with what is configured for everyone, as where there are no profiles at all."""
    with pytest.raises(Refused, match="for a group that you are not in"):
        profiles.for_groups(GROUPED[:2], ["chess"])
    assert profiles.for_groups([], []) == []
    assert len(profiles.for_groups({"1": {"display_name": "x", "allowed_groups": "staff"}}, ["staff"])) == 1


# -- what is free instead


def test_the_largest_free_share_of_a_custom_choice() -> None:
    listed = profiles.initialise(profiles.default_profiles())
    wanted = {"profile": "custom", "gpu_fraction": "1/2", "gpu_mode": "strict"}
    tried = sizes.choices(listed, {}, wanted)
    free = {166, 125, 83}
    answers = [answer(one.wish.shape.memory_milli or 0, "free" if one.wish.shape.memory_milli in free else "wait") for one in tried]
    found = sizes.largest_free(tried, answers, than=(wish(gpu_fraction="1/2"), answer(500, "wait")))
    assert found is not None
    assert dict(found.choice.options) == {"profile": "custom", "gpu_fraction": "1/6", "gpu_mode": "strict"}
    assert profiles.options_from_form({"profile": [found.choice.value]}) == dict(found.choice.options)
    assert sizes.largest_free(tried, [answer(125, "wait")] * len(tried)) is None
    assert sizes.any_smaller(tried, [answer(125, "wait")] * len(tried), (wish(gpu_fraction="1/2"), answer(500, "wait")))
    assert not sizes.any_smaller(tried, [answer(125, "wait")] * len(tried), (wish(gpu_fraction="1/8"), answer(125, "wait")))
    assert not sizes.any_smaller(tried, [answer(125, "impossible")] * len(tried), (wish(gpu_fraction="1/2"), answer(500, "wait")))


def test_what_exactly_fills_a_gpu_is_tried_too() -> None:
    def book(free_gib: int, free_milli: int, healthy: bool = True) -> DeviceBooks:
        device = Device(
            uuid=f"{free_gib}{healthy}", index=0, model="H100", node="n", memory_bytes=80 * GIB, reserve_bytes=2 * GIB, healthy=healthy
        )
        return DeviceBooks(device=device, memory_granted_bytes=(78 - free_gib) * GIB, compute_granted_milli=1000 - free_milli, slices=[])

    books = [book(13, 900), book(39, 375), book(78, 1000), book(0, 500), book(70, 900, healthy=False)]
    assert sizes.free_shares(books) == ["37.5%", "16.6%"]
    listed = profiles.initialise(profiles.default_profiles())
    tried = sizes.choices(listed, {}, books=books)
    found = sizes.largest_free(
        tried, [answer(one.wish.shape.memory_milli or 0, "free" if (one.wish.shape.memory_milli or 0) <= 375 else "wait") for one in tried]
    )
    assert found is not None
    assert dict(found.choice.options) == {"profile": "custom", "gpu_fraction": "37.5%"}
    only_sizes = [one for one in listed if not one.get("gpu_custom")]
    assert all("gpu_fraction" not in one.options for one in sizes.choices(only_sizes, {}, books=books)), (
        "only where a user may say how much"
    )


def test_only_what_is_smaller_takes_the_place_of_what_is_waited_for() -> None:
    tried = [
        sizes.Choice({"profile": "a"}, "A", wish(gpu_fraction=0.5)),
        sizes.Choice({"profile": "b"}, "B", wish(gpu_memory="10 GiB", gpu_fraction=1)),
    ]
    answers = [answer(500), Availability(state="free", reason="", memory={"H": 10 * GIB}, compute_milli={"H": 1000})]
    assert sizes.largest_free(tried, answers, than=(wish(gpu_fraction=0.5), answer(500, "wait"))) is None, "the same, or more of the time"
    found = sizes.largest_free(tried, answers, than=(wish(gpu_fraction=0.75), answer(750, "wait")))
    assert found is not None
    assert found.choice.profile == "A"
    two = (wish(gpu_fraction=0.5, gpu_count=2), answer(500, "wait"))
    assert sizes.largest_free(tried[:1], answers[:1], than=two) is not None, "one GPU is less than two"


def test_what_was_chosen_beside_the_amount_is_kept() -> None:
    sized = {
        "size": {"choices": {name: {"kubespawner_override": {"gpu_fraction": share}} for name, share in (("s", 0.1), ("l", 1))}},
        "image": {"choices": {"old": {}, "new": {}}},
    }
    listed = profiles.initialise(
        [{"display_name": "Other", "kubespawner_override": {"gpu_fraction": 0.1}}, {"display_name": "Mine", "profile_options": sized}]
    )
    tried = sizes.choices(listed, {}, {"profile": "mine", "size": "l", "image": "new"})
    assert tried[0].options == {"profile": "mine", "size": "l", "image": "new"}
    found = sizes.largest_free(
        tried, [answer(one.wish.shape.memory_milli or 0, "free" if one.wish.shape.memory_milli == 100 else "wait") for one in tried]
    )
    assert found is not None
    assert dict(found.choice.options) == {"profile": "mine", "size": "s", "image": "new"}, "rather than another profile of that size"


@pytest.mark.parametrize("value", ["{", "{}x", "[1]", "null", "{" * 100_000, "half"])
def test_an_offer_that_was_tampered_with_is_no_offer(value: str) -> None:
    assert profiles.options_of(value) is None
    assert profiles.options_from_form({"profile": [value]}) == {"profile": value}, "an unknown profile, which is refused as any"


def test_the_offer_on_the_page() -> None:
    listed = profiles.initialise(profiles.default_profiles())
    wishes = [None if one.get("gpu_custom") else profiles.wish_of(one, {}, {}) for one in listed]
    free = sizes.Free(sizes.Choice({"profile": "custom", "gpu_fraction": "1/6"}, "Custom", wish(gpu_fraction="1/6")), answer(166))
    for offer in (free, None):
        state = form.start_state(listed, wishes, [], [answer(500, "wait")] * 4, offer)
        page = " ".join(form.render(state, {}, "/x").split())
        shown = 'id="nbgpu-offer" data-state="free">' in page
        assert shown is (offer is not None)
        assert ("The largest share that is free now: 16.6 % of a GPU" in page) is shown
        assert (state.as_json()["offer"] is not None) is shown
    assert "&#34;gpu_fraction&#34;: &#34;1/6&#34;" in form.render(
        form.start_state(listed, wishes, [], [answer(500, "wait")] * 4, free), {}, "/x"
    )


# -- the queue


def waiting_grant(**changes: Any) -> Grant:
    request = Request(request_id="a" * 32, owner=OWNER, compute_milli=250)
    return Grant(request=request, state=GrantState.queued, **{"position": 3, "wait_seconds": 240.0, **changes})


@pytest.mark.parametrize("simulated", [True, False])
def test_simulated_gpus_are_said_to_be(simulated: bool) -> None:
    """On the page, and to a page that was loaded before the pool knew it."""
    state = form.StartState((), 1.0, simulated=simulated)
    page = form.render(state, {}, "/x")
    assert ('id="nbgpu-simulated">' in page, 'id="nbgpu-simulated" hidden>' in page) == (simulated, not simulated)
    assert state.as_json()["simulated"] is simulated


def test_the_words_of_the_queue() -> None:
    place = waiting.place_of(wish(gpu_fraction=0.25), waiting_grant(reason="2 people are before you."), patience_seconds=600)
    assert place.text == "Waiting for a quarter of a GPU: 3rd in line, usually within 4 minutes. 2 people are before you."
    assert "three of four" in place.known
    assert "for 10 minutes at most" in place.limit
    guess = waiting.place_of(wish(gpu_fraction=0.25), waiting_grant(wait_seconds=3600.0, wait_guessed=True), patience_seconds=600)
    assert "perhaps within 60 minutes" in guess.text
    assert guess.known.startswith("A guess: too few servers have ended here")
    assert guess.limit.endswith("may end in vain."), "it would wait longer than the hub lets it, and there is nothing smaller"
    long = waiting.place_of(wish(gpu_fraction=0.5), waiting_grant(wait_seconds=3600.0), any_smaller=True, patience_seconds=600)
    assert long.limit.endswith("may end in vain. A smaller share may come sooner.")
    unknown = waiting.place_of(wish(gpu_fraction=0.25), waiting_grant(wait_seconds=None, position=None))
    assert unknown.text == "Waiting for a quarter of a GPU: in line, nobody can say yet how long."
    assert (unknown.known, unknown.limit) == ("", "")
    away = waiting.place_of(wish(gpu_fraction=0.25), waiting_grant(), problem="The pool is away.", notice="Gone")
    assert away.text == "Waiting for a quarter of a GPU. The pool is away. Gone."
    assert away.line == "", "an old estimate is no estimate"
    assert [waiting.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112)] == "1st 2nd 3rd 4th 11th 12th 13th 21st 112th".split()


def test_everything_on_the_queue_page_is_escaped() -> None:
    free = sizes.Free(sizes.Choice({"profile": EVIL}, EVIL, wish(gpu_fraction=0.1, gpu_model=EVIL)), answer(100))
    place = waiting.place_of(wish(gpu_fraction=0.25, gpu_model=EVIL), waiting_grant(reason=EVIL), free, notice=EVIL)
    text, html = waiting.event(place, f"/leave?a={EVIL}", f"/smaller?a={EVIL}")
    page = waiting.page(place, f"/leave?a={EVIL}", f"/smaller?a={EVIL}", EVIL)
    for one in (html, page):
        assert "<script>alert" not in one
        assert one.count("&lt;script&gt;alert") >= 5
    assert EVIL in text, "the control: text is text"
    assert " hidden" in waiting.page(None, "/leave", "/smaller", "token").split("<h1")[0]


def test_an_event_carries_all_that_the_page_shows() -> None:
    free = sizes.Free(sizes.Choice({"profile": "eighth"}, "One eighth", wish(gpu_fraction=0.125)), answer(125))
    place = waiting.place_of(wish(gpu_fraction=0.25), waiting_grant(), free)
    _, html = waiting.event(place, "/leave", "/smaller")
    told = html.partition('data-place="')[2].partition('"')[0]
    assert json.loads(told.replace("&#34;", '"').replace("&#39;", "'"))["smaller_value"] == '{"profile": "eighth"}'
    assert html.count("<form") == 2
    assert waiting.event(waiting.place_of(wish(gpu_fraction=0.25), waiting_grant()), "/leave", "/smaller")[1].count("<form") == 1


# -- the log


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged() -> Any:
    lines = Lines()
    loggers = (logging.getLogger("JupyterHub"), logging.getLogger("asyncio"), gen_log)
    for one in loggers:
        one.addHandler(lines)
    yield lines.records
    for one in loggers:
        one.removeHandler(lines)


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (InvalidValue("gpu_fraction", "7/2", "less"), "INFO"),
        (Refused("Your quota is half."), "INFO"),
        (Unavailable("There was no room.", code="no-room"), "INFO"),
        (NbgpuError("The pool is away.", code="pool-unavailable", status=503), "ERROR"),
    ],
)
def test_a_refusal_is_one_line(logged: list[logging.LogRecord], error: NbgpuError, level: str) -> None:
    """Whatever JupyterHub 5 or 6 and tornado write of it: with the exception, with it as an argument, or its text alone."""
    log, refused = logging.getLogger("JupyterHub"), refusal(error, "ada")
    log.error(f"Error starting server ada: {refused}")
    try:
        raise refused
    except type(refused):
        log.error("Failed to spawn single-user server with form", exc_info=True)
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=refused)
    log.error("Previous spawn for %s failed: %s", "ada", refused)
    gen_log.warning("%d %s: %s", 400, "POST /hub/api", error.message)
    assert [(one.levelname, one.getMessage()) for one in logged] == [(level, f"Not starting ada's server: {refused}")]
    assert logged[0].exc_info is None
    silent = refusal(NbgpuError("", status=403), "grace")
    log.error("Failed to start the proxy: it is away.")  # the control: what is no refusal stays as it is
    assert logged[-1].levelname == "ERROR"
    assert not silent.logged, "a refusal without words is the end of every text"


# -- the hub's templates


@pytest.mark.parametrize("before", [True, False], ids=["set before setup", "added to after setup"])
def test_the_admins_own_templates_win(before: bool, tmp_path: Path) -> None:
    c = Config()
    if before:
        c.JupyterHub.template_paths = ["/etc/ours"]
    setup(c, embedded=False, runtime=tmp_path)
    if not before:
        c.JupyterHub.template_paths.extend(["/etc/ours"])
    paths = [*JupyterHub(config=c).template_paths]
    mine = next(path for path in paths if "nbgpu_spawner" in path)
    assert (Path(mine) / "spawn_pending.html").is_file()
    if before:
        assert paths == ["/etc/ours", mine], "the hub adds its own as the last"
    else:
        assert paths[0] == mine, "before the hub's own"
        assert "/etc/ours" in paths


class FakePool:
    """Two devices, and a quota: what is above it is forbidden, what is below the least of a slice impossible."""

    def __init__(self, free_milli: int, quota_milli: int):
        self.free_milli, self.quota_milli = free_milli, quota_milli

    async def devices(self, max_age_seconds: float = 0) -> list[DeviceBooks]:
        one = Device(uuid="a", index=0, model="H100", node="n", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)
        held = 1000 - self.free_milli
        return [DeviceBooks(device=one, memory_granted_bytes=78 * GIB * held // 1000, compute_granted_milli=held, slices=[])]

    async def availability(self, query: AvailabilityQuery) -> list[Availability]:
        return [answer(shape.memory_milli or 0, self.state(shape.memory_milli or 0)) for shape in query.shapes]

    def state(self, milli: int) -> str:
        if milli > self.quota_milli:
            return "forbidden"
        return "impossible" if milli < 10 else "free" if milli <= self.free_milli else "wait"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("free_milli", "quota_milli", "says"),
    [
        (625, 1000, "The most that you can have of one GPU now: 48.7 GiB and 62.5 % of its time"),
        (625, 500, "The most that you can have of one GPU now: 39 GiB and half of its time"),
        (2, 500, "No GPU has room for you now. You can start it and wait in line"),
        (625, 0, "Not for you: "),
    ],
)
@pytest.mark.parametrize("listed", [profiles.default_profiles(), [{"display_name": "Custom", "slug": "custom", "gpu_custom": True}]])
async def test_a_custom_choice_says_the_most_that_this_person_can_have(
    free_milli: int, quota_milli: int, says: str, listed: list[dict[str, Any]]
) -> None:
    pool, owner = FakePool(free_milli, quota_milli), Owner(hub="h", user="u", server="")
    found = await form.ask(pool, profiles.initialise(listed), {}, owner, [], isolates=True, patience_seconds=0)  # type: ignore[arg-type]
    assert found.rows[-1].status.startswith(says), found.rows[-1].status


def test_each_custom_choice_says_what_can_be_had_by_it() -> None:
    listed = [{"display_name": name, "slug": name, "gpu_custom": True} for name in ("large", "small")]
    answers = {"large": Availability(state="free", reason="", memory={"A": 40 * GIB}, compute_milli={"A": 500})}
    answers["small"] = Availability(state="free", reason="", memory={"A": 8 * GIB}, compute_milli={"A": 100})
    half = wish_from({"gpu_fraction": "1/2"})
    assert half is not None
    choices = [sizes.Choice({"profile": name}, name, half) for name in answers]
    rows = [form._row(one, None, [], True, sizes.Tried(choices, list(answers.values())), "") for one in listed]  # type: ignore[arg-type]
    assert ["40 GiB" in row.status for row in rows] == [True, False]
    assert ["8 GiB" in row.status for row in rows] == [False, True]
