"""Limits as people write them."""

from __future__ import annotations

import pytest

from nbgpu.errors import InvalidValue
from nbgpu_lab.limits import kernel_limit

MIB, GIB = 1024**2, 1024**3
DEVICES = [{"memory_limit_bytes": 20 * GIB, "compute_limit_milli": 250}, {"memory_limit_bytes": 16 * GIB, "compute_limit_milli": 250}]


@pytest.mark.parametrize(
    ("asked", "memory_bytes", "compute_milli"),
    [
        ({"memory": "5 GiB"}, 5 * GIB, None),
        ({"memory": "512 MiB", "compute": "1/2"}, 512 * MIB, 125),
        ({"memory": 0.5}, 8 * GIB, None),
        ({"memory": "1/4"}, 4 * GIB, None),
        ({"memory": "25%"}, 4 * GIB, None),
        ({"memory": 5 * GIB}, 5 * GIB, None),
        ({"memory_bytes": 5 * GIB, "compute_milli": 100}, 5 * GIB, 100),
        ({"compute": 0.001}, None, 1),
        ({"memory": "", "compute": None}, None, None),
        ({}, None, None),
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
        ({"compute": "2"}, "compute"),
        ({"compute": "5 GiB"}, "compute"),
        ({"memory_bytes": float("nan")}, "memory_bytes"),
        ({"memory_bytes": 2**61}, "memory_bytes"),
        ({"compute_milli": 0}, "compute_milli"),
        ({"compute_milli": 1.5}, "compute_milli"),
        ({"memroy": "5 GiB"}, "memroy"),
    ],
)
def test_junk_names_its_field(asked: object, field: str) -> None:
    with pytest.raises(InvalidValue) as refusal:
        kernel_limit(asked, DEVICES)
    assert refusal.value.field == field
    assert refusal.value.status == 400
