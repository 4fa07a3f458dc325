"""The longest session of a profile: from the admin's word to the pool's request and the start page's words."""

from __future__ import annotations

from typing import Any

import pytest

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import Availability, AvailabilityQuery, Owner, Request
from nbgpu_spawner import client, form, profiles
from nbgpu_spawner.options import wish_from

OWNER = Owner(hub="h", user="ada")
LISTED: list[dict[str, Any]] = profiles.initialise(
    [
        {"display_name": "Lesson", "slug": "lesson", "kubespawner_override": {"gpu_fraction": "1/8", "gpu_session_seconds": 7200}},
        {"display_name": "Work", "slug": "work", "kubespawner_override": {"gpu_fraction": "1/8"}},
        {"display_name": "Custom", "slug": "custom", "gpu_custom": True, "kubespawner_override": {"gpu_session_seconds": 3600}},
    ]
)


def request_of(slug: str, options: dict[str, Any] | None = None, configured: dict[str, Any] | None = None) -> Request:
    (profile,) = [one for one in LISTED if one["slug"] == slug]
    wish = profiles.wish_of(profile, {"profile": slug, **(options or {})}, configured or {})
    assert wish is not None
    return wish.request("request-0001", OWNER, [])


def test_a_profile_says_how_long_and_what_is_configured_is_for_those_that_do_not() -> None:
    assert request_of("lesson").session_seconds == 7200
    assert request_of("work").session_seconds is None
    assert request_of("work", configured={"gpu_session_seconds": 600}).session_seconds == 600


def test_a_user_does_not_say_how_long() -> None:
    options = {"gpu_fraction": "1/8", "gpu_session_seconds": 10**6}
    assert request_of("custom", options).session_seconds == 3600
    with pytest.raises(NbgpuError, match="gpu_session_seconds"):
        profiles.check_keys(LISTED[2], options, others_allowed=True)


@pytest.mark.parametrize("value", [0, -5, 59, 1e9, "2h", True, float("nan")])
def test_what_is_no_length_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValue, match="a number of seconds from 60"):
        wish_from({"gpu_fraction": "1/8", "gpu_session_seconds": value})


def test_a_pool_that_is_older_is_told_nothing_new_where_there_is_nothing_to_tell() -> None:
    assert "session_seconds" not in client._body(request_of("work"))  # pyright: ignore[reportPrivateUsage]
    query = AvailabilityQuery(owner=OWNER, shapes=[{"compute_milli": 125}])  # type: ignore[list-item]
    assert client._body(query)["shapes"] == [{"device_count": 1, "compute_milli": 125}]  # pyright: ignore[reportPrivateUsage]
    assert client._body(request_of("lesson"))["session_seconds"] == 7200  # pyright: ignore[reportPrivateUsage]
    assert Request.model_validate(client._body(request_of("lesson"))) == request_of("lesson")  # pyright: ignore[reportPrivateUsage]


def test_the_start_page_says_how_long_and_until_when() -> None:
    wishes = [profiles.wish_of(one, {}, {}) for one in LISTED[:2]]
    answers = [
        Availability(state="free", reason="free now"),
        Availability(state="free", reason="free until 09:00, then kept for class biology"),
    ]
    state = form.start_state(LISTED[:2], wishes, [], answers)
    assert [row.status for row in state.rows] == ["Free now", "Free until 09:00, then kept for class biology"]
    assert state.rows[0].what.endswith("for 2 hours at most")
    assert "at most" not in state.rows[1].what
    page = form.render(state, {}, "/x")
    assert "Free until 09:00, then kept for class biology" in page
