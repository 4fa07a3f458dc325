"""JSON that others wrote: what is of another kind than expected counts as empty."""

from __future__ import annotations

from typing import Any, cast

Json = dict[str, Any]


def as_dict(value: object) -> Json:
    """Return an object of JSON, empty for what is none."""
    return cast("Json", value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """Return a list of JSON, empty for what is none."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def as_dicts(value: object) -> list[Json]:
    """Return a list of objects of JSON, empty for what is none."""
    return [as_dict(one) for one in as_list(value)]
