"""What a running server may ask for: the words, and who may."""

from __future__ import annotations

from typing import Any

import pytest

from nbgpu.errors import InvalidValue, NbgpuError
from nbgpu.models import Resize
from nbgpu.quantities import GIB
from nbgpu_spawner.profiles import default_profiles, initialise
from nbgpu_spawner.resize import limits, must_be_offered, wanted


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"gpu_fraction": "1/2"}, Resize(memory_milli=500, compute_milli=500)),
        ({"gpu_memory": "20 GiB"}, Resize(memory_bytes=20 * GIB)),
        ({"gpu_compute": "25%"}, Resize(compute_milli=250)),
        ({"gpu_fraction": "1/2", "gpu_memory": "20 GiB"}, Resize(memory_bytes=20 * GIB, compute_milli=500)),
    ],
)
def test_the_words_of_the_start_page(asked: Any, expected: Resize) -> None:
    assert limits(wanted(asked)) == expected


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "gpu_fraction"),
        ({"gpu_fraction": "2"}, "gpu_fraction"),
        ({"gpu_memory": "5 apples"}, "gpu_memory"),
        ({"gpu_fraction": "1/2", "gpu_count": 8}, "gpu_count"),
        ({"gpu_fraction": "1/2", "owner": "grace"}, "owner"),
        (None, "body"),
        ([], "body"),
    ],
)
def test_anything_else_is_refused(asked: Any, field: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        wanted(asked)
    assert refused.value.field == field


def test_sizes_that_the_start_page_does_not_offer_are_not_to_be_had_around_it() -> None:
    fixed = initialise([{"display_name": "A quarter", "kubespawner_override": {"gpu_fraction": 0.25}}])
    with pytest.raises(NbgpuError) as refused:
        must_be_offered(None, fixed)
    assert (refused.value.status, refused.value.code) == (403, "not-offered")
    with pytest.raises(NbgpuError):
        must_be_offered(False, initialise(default_profiles()))
    must_be_offered(None, initialise(default_profiles()))
    must_be_offered(None, [])
    must_be_offered(True, fixed)
