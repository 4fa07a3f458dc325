"""A slice in which no program could start is refused: by the pool, with the field and the range, and on the start page at its field."""

from __future__ import annotations

from typing import Any

import pytest

from nbgpu.errors import InvalidValue
from nbgpu.models import AvailabilityQuery, Device, GrantState, Owner, Request, Resize, Shape
from nbgpu.quantities import GIB, MIB, least_allowed, memory_share_bytes, parse_fraction, parse_memory
from nbgpu_pool import availability
from nbgpu_pool.config import Config
from nbgpu_pool.core import Core
from nbgpu_pool.state import Seen, Settings, Snapshot
from nbgpu_spawner.options import check_against, wish_from

LEAST = 512 * MIB
LARGE, SMALL, TINY = 80 * GIB, 24 * GIB, 256 * MIB
WORDS = "at least 0.7 % of a GPU here, 512 MiB of its memory: a program's CUDA context alone takes hundreds of MiB"
OWNER = Owner(hub="h", user="u")


def device(model: str, memory_bytes: int) -> Device:
    return Device(uuid=f"GPU-{model}", index=0, model=model, node=f"node-{model}", memory_bytes=memory_bytes)


def pool(*devices: Device, least: int = LEAST) -> Core:
    core = Core(Settings(smallest_bytes=least))
    core.mark += 1
    core.snapshot(Snapshot(core.mark, devices, []), 0.0)
    return core


def request(**asked: Any) -> Request:
    return Request(request_id="request-0001", owner=OWNER, **asked)


TOO_SMALL: list[tuple[dict[str, Any], str]] = [
    ({"memory_milli": 6, "compute_milli": 6}, "memory_milli"),
    ({"compute_milli": 6}, "compute_milli"),
    ({"memory_bytes": 511 * MIB}, "memory_bytes"),
]


@pytest.mark.parametrize(("asked", "field"), TOO_SMALL)
def test_the_pool_refuses_with_field_and_range(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        pool(device("large", LARGE)).request(request(**asked), 0.0)
    error = caught.value
    assert (error.status, error.field, error.allowed) == (400, field, WORDS)
    assert pool(device("large", LARGE), least=MIB).request(request(**asked), 0.0).state is GrantState.reserved, "control"


def test_what_is_just_enough_is_granted() -> None:
    for asked in ({"memory_milli": 7}, {"compute_milli": 7}, {"memory_bytes": LEAST}):
        assert pool(device("large", LARGE)).request(request(**asked), 0.0).state is GrantState.reserved


def test_the_smallest_gpu_that_it_could_get_decides() -> None:
    """A slice goes wherever there is room: it must be of use there."""
    mixed = pool(device("large", LARGE), device("small", SMALL))
    with pytest.raises(InvalidValue, match=r"at least 2\.1 % of a GPU here"):
        mixed.request(request(memory_milli=20), 0.0)
    assert mixed.request(request(memory_milli=20, model="large"), 0.0).state is GrantState.reserved


def test_a_whole_gpu_is_never_too_small() -> None:
    assert pool(device("tiny", TINY)).request(request(memory_milli=1000), 0.0).state is GrantState.reserved
    assert least_allowed(TINY - MIB, TINY, LEAST) is not None


@pytest.mark.parametrize("least", [LEAST, 1587 * MIB, GIB, GIB + GIB // 2, GIB + MIB])
def test_what_the_message_names_is_enough(least: int) -> None:
    allowed = least_allowed(MIB, LARGE, least)
    assert allowed is not None
    share, amount = allowed.removeprefix("at least ").split(" of its memory")[0].split(" of a GPU here, ")
    assert parse_memory(amount) == least
    assert memory_share_bytes(LARGE, parse_fraction(share)) >= least


def test_the_start_page_says_so_of_a_profile() -> None:
    query = AvailabilityQuery(owner=OWNER, shapes=[Shape(memory_milli=6), Shape(memory_milli=7)])
    small, enough = availability.answer(pool(device("large", LARGE)), query, 0.0)
    assert (small.state, small.reason) == ("impossible", f"too small; it must be {WORDS}")
    assert enough.state == "free"


def test_a_running_slice_is_not_made_too_small() -> None:
    core = pool(device("large", LARGE))
    granted = core.request(request(memory_milli=500), 0.0)
    assert granted.slice is not None
    core.mark += 1
    core.snapshot(Snapshot(core.mark, [device("large", LARGE)], [Seen(granted.slice, "running")]), 0.0)
    entry = core.known("request-0001")
    for asked, field in ((Resize(memory_bytes=100 * MIB), "memory_bytes"), (Resize(memory_milli=2), "memory_milli")):
        with pytest.raises(InvalidValue) as caught:
            core.begin_resize(entry, asked, 0.0)
        assert (caught.value.field, caught.value.allowed) == (field, WORDS)
    assert core.begin_resize(entry, Resize(memory_bytes=LEAST), 0.0) is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu_fraction": "0.3%"}, "Share of a GPU is '0.3%'; it must be "),
        ({"gpu_memory": "200 MiB"}, "GPU memory is '200 MiB'; it must be "),
        ({"gpu_compute": "0.3%"}, "Share of the GPU's time is '0.3%'; it must be "),
        ({"gpu_fraction": "0.6%", "gpu_compute": "1/2"}, "Share of a GPU is '0.6%'; it must be "),
    ],
)
def test_the_form_refuses_at_its_field(values: dict[str, Any], message: str) -> None:
    wish = wish_from(values)
    assert wish is not None
    with pytest.raises(InvalidValue) as caught:
        check_against(wish, [device("large", LARGE)], LEAST)
    assert (caught.value.message, caught.value.field) == (f"{message}{WORDS}.", next(iter(values)))
    check_against(wish, [device("large", LARGE)], MIB)


def test_the_admin_sets_it() -> None:
    assert Config().settings().smallest_bytes == LEAST
    assert Config.model_validate({"smallest_memory": "2 GiB"}).settings().smallest_bytes == 2 * GIB
    core = pool(device("large", LARGE))
    assert core.device_books()[0].least_bytes == LEAST, "hubs are told"
