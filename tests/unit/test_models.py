"""The models of what crosses a boundary: closed, immutable, and what goes over the wire comes back the same."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from nbgpu import models
from nbgpu.errors import InvalidValue, NbgpuError, Refused, Unavailable
from nbgpu.models import Event, Model, read_answer
from nbgpu.quantities import MIB

OWNER = {"hub": "h", "user": "ada", "server": ""}
REQUEST = {"request_id": "a" * 32, "owner": OWNER, "memory_milli": 250}
ALL = [
    value for value in vars(models).values() if isinstance(value, type) and issubclass(value, models.Model) and value is not models.Model
]


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": "UPPER-CASE"}, {"request_id": "short"}, {"request_id": "a" * 49}, {"request_id": "../../../etc/passwd"},
        {"request_id": ""}, {"request_id": "-aaaaaaaaa"}, {"owner": {**OWNER, "user": ""}}, {"owner": {**OWNER, "user": "a" * 256}},
        {"owner": {**OWNER, "more": 1}},
        {"device_count": 0}, {"device_count": 65}, {"device_count": -1}, {"memory_milli": 0}, {"memory_milli": 1001}, {"compute_milli": -1},
        {"compute_milli": 2.5}, {"memory_bytes": MIB - 1}, {"memory_bytes": 2**60 + 1}, {"memory_bytes": float("nan")}, {"mode": "turbo"},
        {"unknown": 1}, {"groups": ["g"] * 1001},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_outside_its_ranges_is_refused(change: dict[str, object]) -> None:
    models.Request.model_validate(REQUEST)
    with pytest.raises(ValidationError):
        models.Request.model_validate({**REQUEST, **change})


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_every_model_is_closed_and_immutable(model: type[models.Model]) -> None:
    assert model.model_config.get("extra") == "forbid"
    assert model.model_config.get("frozen") is True


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_numbers_carry_their_units_in_their_names(model: type[models.Model]) -> None:
    """A number is a count, an index, a version, a generation, a time or a place; or its name ends with its unit."""
    units = ("_bytes", "_milli", "_seconds", "_percent", "_count")
    bare = {
        "index", "version", "generation", "time", "created", "position", "refusals", "launches", "id",
        "pids", "pid", "since", "data",
    }  # fmt: skip
    for name, field in model.model_fields.items():
        kinds = {field.annotation, *typing.get_args(field.annotation)}
        if kinds & {int, float}:
            assert name in bare or name.endswith(units), f"{model.__name__}.{name}"


names = st.text(min_size=1, max_size=255)
requests = st.builds(
    models.Request,
    request_id=st.from_regex(r"[a-z0-9][a-z0-9-]{6,46}[a-z0-9]", fullmatch=True),
    owner=st.builds(
        models.Owner, hub=st.text(min_size=1, max_size=255), user=st.text(min_size=1, max_size=255), server=st.text(max_size=255)
    ),
    groups=st.lists(st.text(min_size=1, max_size=20), max_size=5),
    device_count=st.integers(1, 64),
    compute_milli=st.none() | st.integers(1, 1000),
    memory_milli=st.none() | st.integers(1, 1000),
    memory_bytes=st.none() | st.integers(MIB, 2**60),
    model=st.none() | st.text(min_size=1, max_size=255),
    mode=st.sampled_from(["strict", "burst"]),
)


@given(requests)
def test_what_goes_over_the_wire_comes_back_the_same(request: models.Request) -> None:
    grant = models.Grant(request=request, state=models.GrantState.queued, position=1, wait_seconds=1.5, reason="others hold it")
    assert models.Grant.model_validate_json(grant.model_dump_json()) == grant


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_junk_is_a_validation_error_and_nothing_else(junk: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(models.Request).validate_python(junk)


def test_errors_carry_code_status_and_field_to_the_wire() -> None:
    assert Unavailable("The pool is away.").as_json() == {"error": {"code": "unavailable", "message": "The pool is away."}}
    assert Refused("No.").status == 403
    error = InvalidValue("gpu_fraction", "x" * 1000, "a fraction")
    assert error.as_json()["error"]["field"] == "gpu_fraction"  # type: ignore[index]
    assert len(error.message) < 120
    assert NbgpuError("m", code="c", status=418).status == 418


class _Inner(Model):
    value: int


class _Outer(Model):
    inner: list[_Inner]
    more: _Inner | None = None


def test_what_a_newer_version_adds_to_an_answer_is_left_out() -> None:
    told = {"inner": [{"value": 1}, {"value": 2, "new": {"a": 1}}], "more": {"value": 3, "new": 1, "newer": 2}, "novel": []}
    read = read_answer(TypeAdapter(_Outer), told)
    assert read == _Outer(inner=[_Inner(value=1), _Inner(value=2)], more=_Inner(value=3))
    assert "novel" in told, "what was told stays as it is"


def test_an_event_of_a_kind_that_a_newer_agent_has_is_read() -> None:
    told = {"id": 1, "time": 1.0, "slice_id": None, "kind": "of-tomorrow", "level": "info", "message": "Something.", "new": 1}
    (event,) = read_answer(TypeAdapter(list[Event]), [told])
    assert (event.kind, event.message) == ("of-tomorrow", "Something.")


@pytest.mark.parametrize("told", [{"inner": [{"valu": 1}]}, {"inner": 1, "new": 1}, [], None])
def test_another_answer_is_refused_all_the_same(told: object) -> None:
    with pytest.raises(ValidationError):
        read_answer(TypeAdapter(_Outer), told)


def test_requests_stay_closed() -> None:
    with pytest.raises(ValidationError):
        _Outer.model_validate({"inner": [], "novel": 1})
