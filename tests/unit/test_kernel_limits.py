"""Limits as people write them."""

from __future__ import annotations

import pytest

from nbgpu.errors import InvalidValue
from nbgpu.kernel_limits import kernel_limit

MIB, GIB = 1024**2, 1024**3
DEVICES = [{"memory_limit_bytes": 20 * GIB, "compute_limit_milli": 250}, {"memory_limit_bytes": 16 * GIB, "compute_limit_milli": 250}]


@pytest.mark.parametrize(
    ("asked", "memory_bytes", "compute_milli"),
    [
        ({"memory": "5 GiB"}, 5 * GIB, None),
        ({"memory": "512 MiB"}, 512 * MIB, None),
        ({"memory": 0.5}, 8 * GIB, None),
        ({"memory": "1/4"}, 4 * GIB, None),
        ({"memory": "25%"}, 4 * GIB, None),
        ({"memory": 5 * GIB}, 5 * GIB, None),
        ({"memory_bytes": 5 * GIB, "compute_milli": None}, 5 * GIB, None),
        ({"memory": "", "compute": None}, None, None),
        ({}, None, None),
        ({"compute": "1/2"}, None, 125),
        ({"compute": "25%", "memory": "1/2"}, 8 * GIB, 62),
        ({"compute": 1}, None, 250),
        ({"compute": "1/1000"}, None, 1),
        ({"compute_milli": 125}, None, 125),
    ],
)
def test_what_people_write(asked: object, memory_bytes: int | None, compute_milli: int | None) -> None:
    assert kernel_limit(asked, DEVICES) == {"memory_bytes": memory_bytes, "compute_milli": compute_milli}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ("5 GiB", "nbgpu"),
        (["5 GiB"], "nbgpu"),
        ({"memory": "5 GB"}, "memory"),
        ({"memory": "lots"}, "memory"),
        ({"memory": -1}, "memory"),
        ({"memory": 7}, "memory"),
        ({"memory": True}, "memory"),
        ({"memory": {}}, "memory"),
        ({"compute": "3/2"}, "compute"),
        ({"compute": "5 GiB"}, "compute"),
        ({"memory": "5 GiB", "compute": 0}, "compute"),
        ({"memory_bytes": float("nan")}, "memory_bytes"),
        ({"memory_bytes": 2**61}, "memory_bytes"),
        ({"compute_milli": 251}, "compute_milli"),
        ({"compute_milli": 0}, "compute_milli"),
        ({"compute_milli": 12.5}, "compute_milli"),
        ({"memroy": "5 GiB"}, "memroy"),
        ({"memory_bytes": 10**400}, "memory_bytes"),
        ({"compute_milli": float("inf")}, "compute_milli"),
        ({"sign in at\n\u202ehttps" + "x" * 10**6: 1}, "sign in at\\n\\u202ehttps" + "x" * 23),
        ({"memory": "17 GiB"}, "memory"),
        ({"memory_bytes": 17 * GIB}, "memory_bytes"),
    ],
)
def test_junk_names_its_field(asked: object, field: str) -> None:
    with pytest.raises(InvalidValue) as refusal:
        kernel_limit(asked, DEVICES)
    assert refusal.value.field == field
    assert refusal.value.status == 400


@pytest.mark.parametrize("asked", ["lots", "5 GB", "5 g b", "7/2", "17 GiB"])
def test_what_the_panel_says_offers_amounts_and_fractions(asked: str) -> None:
    with pytest.raises(InvalidValue, match=r"^Memory limit is .* must be .*GiB.* fraction of .* such as 0.5, 1/2 or 25%"):
        kernel_limit({"memory": asked}, DEVICES)


@pytest.mark.parametrize("asked", ["lots", "5 GiB", "7/2"])
def test_what_the_panel_says_of_compute_offers_fractions(asked: str) -> None:
    with pytest.raises(InvalidValue, match=r"^Compute limit is .* must be a fraction of the slice such as 0.5"):
        kernel_limit({"compute": asked}, DEVICES)
