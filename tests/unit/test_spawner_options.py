"""What may be asked for, profiles, and the words around them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Config

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import Availability, Device, DeviceBooks, Owner
from nbgpu.quantities import GIB
from nbgpu_spawner import form, profiles, setup, sizes
from nbgpu_spawner.options import check_against, wish_from

OWNER = Owner(hub="h", user="ada")


def device(node: str = "a", model: str = "H100", memory_gib: int = 80, index: int = 0) -> Device:
    return Device(uuid=f"{node}{index}", index=index, model=model, node=node, memory_bytes=memory_gib * GIB, reserve_bytes=2 * GIB)


def test_no_amount_is_no_gpu() -> None:
    assert wish_from({}) is None
    assert wish_from({"gpu_fraction": None, "gpu_count": 2, "gpu_mode": "strict"}) is None


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({"gpu_fraction": "1/3"}, (333, 333, None, 1)),
        ({"gpu_memory": "20 GiB"}, (None, None, 20 * GIB, 1)),
        ({"gpu_fraction": 0.5, "gpu_memory": "20 GiB"}, (500, None, 20 * GIB, 1)),
        ({"gpu_fraction": 0.5, "gpu_compute": "25%"}, (250, 500, None, 1)),
        ({"gpu_compute": 0.1, "gpu_count": "2"}, (100, None, None, 2)),
    ],
)
def test_amounts(values: dict[str, Any], shape: tuple[int | None, int | None, int | None, int]) -> None:
    wish = wish_from(values)
    assert wish is not None
    assert (wish.shape.compute_milli, wish.shape.memory_milli, wish.shape.memory_bytes, wish.shape.device_count) == shape
    request = wish.request("a" * 32, OWNER, ["g"])
    assert (request.compute_milli, request.memory_milli, request.memory_bytes, request.device_count) == shape


def test_a_pool_of_different_nodes() -> None:
    pool = [device("a", index=0), device("a", index=1), device("b", "A100", 40)]

    def refused(values: dict[str, Any]) -> str:
        wish = wish_from(values)
        assert wish is not None
        with pytest.raises(InvalidValue) as caught:
            check_against(wish, pool)
        return caught.value.message

    assert refused({"gpu_memory": "79 GiB"}) == "GPU memory is '79 GiB'; it must be at most 78 GiB, what one GPU has."
    assert "at most 38 GiB" in refused({"gpu_memory": "50 GiB", "gpu_model": "A100"})
    assert "one of A100, H100" in refused({"gpu_fraction": 1, "gpu_model": "T4"})
    assert "from 1 to 2" in refused({"gpu_fraction": 1, "gpu_count": 3})
    assert (
        refused({"gpu_fraction": 1, "gpu_model": "A100", "gpu_count": 2}) == "Number of GPUs is 2; it must be 1, the GPUs of one machine."
    )
    fits = wish_from({"gpu_memory": "50 GiB", "gpu_count": 2})
    assert fits is not None
    check_against(fits, pool)
    check_against(fits, [])  # a pool that still rebuilds: nothing is known


def test_profiles_are_completed() -> None:
    plain = [{"display_name": "A  big one!"}, {"display_name": "B", "default": True}, {"display_name": "C", "default": True}]
    found = profiles.initialise(plain)
    assert [profile["slug"] for profile in found] == ["a-big-one", "b", "c"]
    assert [profile["default"] for profile in found] == [False, True, False]
    assert "slug" not in plain[0], "the admin's own list is not changed"
    assert profiles.initialise(None) == []
    assert [p["display_name"] for p in profiles.initialise({"2": {"display_name": "x"}, "1": {"display_name": "y"}})] == ["y", "x"]


OPTIONS: list[dict[str, Any]] = [
    {
        "display_name": "Pick",
        "kubespawner_override": {"gpu_fraction": 0.5, "mem_limit": "4G"},
        "profile_options": {
            "mode": {
                "display_name": "Mode",
                "choices": {
                    "b": {"display_name": "burst", "kubespawner_override": {"gpu_mode": "burst"}},
                    "s": {"display_name": "strict", "default": True, "kubespawner_override": {"gpu_mode": "strict"}},
                },
            },
            "image": {
                "choices": {"x": {"display_name": "x", "kubespawner_override": {"image": "x"}}},
                "unlisted_choice": {
                    "enabled": True,
                    "validation_regex": "^[a-z{}.]+$",
                    "kubespawner_override": {"image": "reg/{value}", "environment": {"I": ["{value}"]}},
                },
            },
        },
    }
]


def test_overrides_in_order_of_the_options() -> None:
    (profile,) = profiles.initialise(OPTIONS)
    assert profiles.overrides(profile, {}) == [{"gpu_fraction": 0.5, "mem_limit": "4G"}, {"gpu_mode": "strict"}, {"image": "x"}]
    chosen = profiles.overrides(profile, {"mode": "b", "image--unlisted-choice": "{user.name}"})
    assert chosen[1:] == [{"gpu_mode": "burst"}, {"image": "reg/{user.name}", "environment": {"I": ["{user.name}"]}}], (
        "text, not a template"
    )
    wish = profiles.wish_of(profile, {"mode": "b"}, {"gpu_fraction": None, "gpu_count": 2})
    assert wish is not None
    assert (wish.mode, wish.shape.device_count, wish.shape.memory_milli) == ("burst", 2, 500)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "turbo"}, "Mode is 'turbo'; it must be one of b, s."),
        ({"mode": ["b"]}, "Mode is ['b']; it must be one of b, s."),
        ({"image--unlisted-choice": "UP"}, "image is 'UP'; it must be text that matches ^[a-z{}.]+$."),
        ({"mode--unlisted-choice": "x"}, "Mode is 'x'; it must be one of b, s."),
    ],
)
def test_choices_that_do_not_exist(options: dict[str, Any], words: str) -> None:
    (profile,) = profiles.initialise(OPTIONS)
    profiles.check_keys(profile, options, others_allowed=False)
    with pytest.raises(InvalidValue) as caught:
        profiles.overrides(profile, options)
    assert caught.value.message == words


def test_keys_that_nobody_reads() -> None:
    found = profiles.initialise(profiles.default_profiles())
    half, custom = found[3], found[5]
    profiles.check_keys(custom, {"profile": "custom", "gpu_fraction": 1}, others_allowed=False)
    profiles.check_keys(half, {"profile": "half", "image": "x"}, others_allowed=True)
    for options in ({"image": "x"}, {"gpu_fraction": 1}):
        with pytest.raises(NbgpuError, match="which nothing reads here"):
            profiles.check_keys(half, options, others_allowed=False)
    with pytest.raises(NbgpuError):
        profiles.check_keys(half, {"gpu_fraction": 1}, others_allowed=True)


def test_fields_without_a_profile_are_the_custom_choice() -> None:
    found = profiles.initialise(profiles.default_profiles())
    assert profiles.selected(found, {"gpu_fraction": 1})["slug"] == "custom"  # pyright: ignore
    assert profiles.selected(found, {})["slug"] == "cpu"  # pyright: ignore
    with pytest.raises(InvalidValue):
        profiles.custom_fields(found[5], {"gpu_mode": "strict"})


@pytest.mark.parametrize(
    ("configured", "slug", "asked"),
    [
        ({}, "cpu", "None"),
        ({"gpu_fraction": None, "gpu_count": 1, "gpu_mode": "burst"}, "cpu", "None"),
        ({"gpu_fraction": "25%"}, "quarter", "a quarter of a GPU"),
        ({"gpu_fraction": 1}, "whole", "a whole GPU"),
        ({"gpu_fraction": 0.3}, "usual", "30 % of a GPU"),
        ({"gpu_memory": "20 GiB"}, "usual", "20 GiB of a GPU"),
        ({"gpu_fraction": "1/4", "gpu_compute": "1/2"}, "usual", "a quarter of a GPU"),
    ],
)
def test_what_the_admin_configured_is_chosen_at_the_first_visit(configured: dict[str, Any], slug: str, asked: str) -> None:
    found = profiles.initialise(profiles.for_groups(profiles.default_profiles(configured), []))
    first, custom = profiles.selected(found, {}), profiles.selected(found, {"gpu_memory": "10 GiB"})
    assert first is not None
    assert first["slug"] == slug
    assert str(profiles.wish_of(first, {}, configured)) == asked
    cpu = profiles.selected(found, {"profile": "cpu"})
    assert profiles.wish_of(cpu, {}, configured) is None, "CPU only is no GPU, whatever is configured"
    wish = profiles.wish_of(custom, {"gpu_memory": "10 GiB"}, configured)
    assert wish is not None
    assert (str(wish), wish.shape.compute_milli) == ("10 GiB of a GPU", None), "a custom choice is what was typed"


EXAMPLE: list[dict[str, Any]] = [
    {"slug": "cpu", "display_name": "CPU only", "default": True},
    {"slug": "quarter", "display_name": "A quarter of a GPU", "kubespawner_override": {"gpu_memory": "10 GiB"}},
    {"slug": "custom", "display_name": "Custom", "gpu_custom": True},
]


def test_an_admins_profiles_say_all_of_the_amount() -> None:
    configured = {"gpu_fraction": "1/4", "gpu_mode": "strict"}
    cpu, quarter, custom = profiles.initialise(profiles.for_groups(EXAMPLE, []))
    assert profiles.wish_of(cpu, {}, configured) is None, "CPU only is no GPU, whatever is configured"
    for profile, options in ((quarter, {}), (custom, {"gpu_memory": "10 GiB"}), (None, {"gpu_memory": "10 GiB"})):
        wish = profiles.wish_of(profile, options, configured)
        assert wish is not None
        assert (str(wish), wish.shape.compute_milli, wish.mode) == ("10 GiB of a GPU", None, "strict"), "time follows the memory"
    assert "kubespawner_override" not in EXAMPLE[0], "the admin's own list is not changed"


def test_what_is_configured_counts_where_no_profile_says_an_amount() -> None:
    images = [{"display_name": name, "kubespawner_override": {"image": name}} for name in ("torch", "jax")]
    for profile in profiles.initialise(profiles.for_groups(images, [])):
        assert str(profiles.wish_of(profile, {}, {"gpu_fraction": "1/4"})) == "a quarter of a GPU"
    mine = profiles.initialise(profiles.for_groups([*images, {**EXAMPLE[1], "allowed_groups": ["staff"]}], ["students"]))
    assert [profiles.wish_of(one, {}, {"gpu_fraction": "1/4"}) for one in mine] == [None, None], "the same for all groups"


def test_the_last_choice_is_chosen_at_later_visits() -> None:
    listed = profiles.default_profiles({"gpu_fraction": "1/4"})
    for last, slug in (({}, "quarter"), ({"profile": "cpu"}, "cpu"), ({"profile": "gone"}, "quarter"), ({"gpu_memory": "9 GiB"}, "custom")):
        page = " ".join(form.render(state(profile_list=listed), last, "/x").split())
        assert re.findall(r'value="(\w+)" required aria-describedby="[^"]*" checked', page) == [slug], last


def test_form_fields_become_options() -> None:
    fields = {"profile": ["custom"], "profile-option-custom--gpu_fraction": ["1/3"], "profile-option-custom--gpu_memory": [""], "x": ["y"]}
    assert profiles.options_from_form(fields) == {"profile": "custom", "gpu_fraction": "1/3"}
    assert profiles.options_from_form({"gpu_fraction": ["1/4"]}) == {"gpu_fraction": "1/4"}
    assert profiles.options_from_form({}) == {}


def state(**changes: Any) -> form.StartState:
    found = profiles.initialise(changes.pop("profile_list", profiles.default_profiles()))
    wishes = [None if p.get("gpu_custom") else profiles.wish_of(p, {}, {}) for p in found]
    books = [DeviceBooks(device=device(), memory_granted_bytes=39 * GIB, compute_granted_milli=500, slices=[])]
    answer = Availability(state="free", reason="free now", memory={"H100": 19 * GIB}, compute_milli={"H100": 250})
    answers = changes.pop("answers", [answer] * 4)
    tried = [one for one in sizes.choices(found, {}) if one.options["profile"] == "custom" and one.wish.shape.memory_milli == 250]
    changes.setdefault("custom", sizes.Tried(tried, [answer]) if answers else sizes.NOT_TRIED)
    return form.start_state(found, wishes, changes.pop("books", books), answers, **changes)


def test_rows_say_what_and_whether() -> None:
    rows = state().rows
    assert rows[0].status == "Always available"
    assert (rows[2].what, rows[2].status) == ("19 GiB, at least a quarter of the GPU's time", "Free now")
    assert rows[5].status == "The most that you can have of one GPU now: 19 GiB and a quarter of its time"
    away = state(answers=None, books=[], problem="away")
    assert {row.state for row in away.rows[1:5]} == {"unknown"}
    assert away.rows[2].what == "a quarter of a GPU's memory, at least a quarter of the GPU's time"
    assert not any(row.disabled for row in away.rows), "CPU only and a second try stay possible"


def test_several_models_are_told_apart() -> None:
    answer = Availability(state="free", reason="", memory={"H100": 39 * GIB, "A100": 19 * GIB}, compute_milli={"H100": 500, "A100": 500})
    wish = wish_from({"gpu_fraction": 0.5, "gpu_mode": "strict", "gpu_count": 2})
    assert wish is not None
    assert form.describe(wish, answer) == "19 GiB (A100) or 39 GiB (H100), exactly half of the GPU's time; on each of 2 GPUs"


def test_everything_on_the_page_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'>"
    listed = [
        {
            "display_name": evil,
            "slug": evil,
            "description": evil,
            "profile_options": {evil: {"display_name": evil, "choices": {evil: {"display_name": evil}}}},
        }
    ]
    page = form.render(state(profile_list=listed, answers=[], problem=evil), {"profile": evil, "gpu_fraction": evil}, evil)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 8
    custom = form.render(state(problem=evil), {"profile": "custom", "gpu_fraction": evil}, evil)
    assert "<script>alert" not in custom
    assert 'value="&lt;script&gt;' in custom


@pytest.mark.parametrize(("field", "once"), [("gpu_fraction", True), ("gpu_count", False), ("profile", False)])
def test_a_refusal_is_said_at_its_field_which_has_the_focus(field: str, once: bool) -> None:
    """The hub's own paragraph is all there is where no field of the page has the message (here one GPU: nobody is asked how many)."""
    page = form.render(state(), {}, "/x", form.Refused({"profile": "custom"}, "It is wrong.", field))
    assert [page.count(one) for one in ("It is wrong.", 'aria-invalid="true"', " autofocus")] == [int(once)] * 3


@pytest.mark.parametrize("other", [True, False])
def test_a_refused_option_of_a_profile_is_said_at_its_field(other: bool) -> None:
    option = {"display_name": "Image", "choices": {"a": {}}, "unlisted_choice": {"enabled": other}}
    listed = [{"display_name": "P", "slug": "p", "profile_options": {"image": option}}, {"display_name": "Q", "slug": "q"}]
    shown = state(profile_list=listed, answers=[])
    page = form.render(shown, {}, "/x", form.Refused({"profile": "p", "image": "z"}, "It is wrong.", "image"))
    assert [page.count(one) for one in ("It is wrong.", 'aria-invalid="true"', " autofocus", 'id="profile-option-p--image-error"')] == [
        1
    ] * 4
    (wrong,) = [line for line in page.splitlines() if "aria-invalid" in line and "is-invalid" in line]
    assert ("unlisted" in wrong) == other


def test_one_profile_is_always_checked() -> None:
    for typed in ({}, {"profile": "gone"}, {"profile": ["x"]}, {"gpu_fraction": "1"}, {"profile": "half"}):
        page = " ".join(form.render(state(), typed, "/x").split())  # pyright: ignore
        assert page.count("checked>") == 1, typed


@pytest.mark.parametrize("before", [True, False], ids=["set before setup", "set after setup"])
@pytest.mark.parametrize("own", [True, False], ids=["the admin's", "the default"])
def test_defaults_of_setup_give_way_to_the_admins(own: bool, before: bool, tmp_path: Path) -> None:
    def admin() -> None:
        if own:
            c.Spawner.http_timeout = 45
            c.LocalGPUMixin.gpu_login_terminals = True

    c = Config()
    c.JupyterHub.spawner_class = "simple"
    if before:
        admin()
    setup(c, embedded=False, runtime=tmp_path)
    if not before:
        admin()
    spawner = c.JupyterHub.spawner_class(config=c)
    assert spawner.http_timeout == (45 if own else 120)
    assert spawner.gpu_login_terminals is own


def test_options_of_an_agent_that_the_hub_starts(tmp_path: Path) -> None:
    from nbgpu_agent.main import parse

    c = Config()
    c.JupyterHub.services = []
    setup(c, embedded=True, runtime=tmp_path, agent_args=["--watchdog", "suspend", "--idle-host-memory", "4 GiB"])
    services = {one["name"]: one["command"] for one in c.JupyterHub.services}
    command = services["nbgpu-agent"]
    found = parse(command[command.index("nbgpu_agent") + 1 :])
    assert (found.watchdog, found.idle_host_memory, found.runtime_dir) == ("suspend", "4 GiB", tmp_path)
    assert "suspend" not in services["nbgpu-pool"]
    for pool_url in ("", "http://pool"):
        with pytest.raises(ValueError, match="agent_args"):
            setup(Config(), embedded=False, runtime=tmp_path, pool_url=pool_url, agent_args=["--watchdog", "suspend"])


def test_a_server_that_nobody_waited_for_has_ended() -> None:
    """Control: the operating system still takes a signal for it."""
    from nbgpu.procs import is_alive

    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        os.kill(child, 0)
        assert not is_alive(child)
        assert is_alive(os.getpid())
    finally:
        os.waitpid(child, 0)
    assert not is_alive(child)
