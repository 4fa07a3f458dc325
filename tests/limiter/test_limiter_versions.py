"""Programs built for CUDA 11.4 to 13.1 on drivers of 11.4 to 13.1: each gets the variant it was built for, and it is the limiter's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import run
from limiter_slice import SliceFiles
from test_limiter_requests import DRIVERS, OURS, PER_THREAD, Request, Variants, Walk, stood_in

Make = Callable[..., SliceFiles]
DRIVER_VERSIONS = (11040, 11080, 12000, 12040, 12080, 13000, 13010)
PROGRAM_VERSIONS = (11040, 11080, 12000, 12040, 12080, 12090, 13000, 13010)
NOT_FOUND, TOO_OLD = 500, 2


@pytest.fixture
def walk(request: pytest.FixtureRequest, make_slice: Make, tmp_path: Path) -> Iterator[Walk]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    state = base / f"nbgpu-test-versions-{os.getpid()}"
    yield Walk(state, make_slice, request.param)
    state.unlink(missing_ok=True)


def meant(variants: Variants, request: Request, driver: int) -> str | None:
    """The exported function that a driver of that version means, by the documented rule."""
    fitting = [row for row in variants.rows if row[0] == request.name and int(row[1]) <= min(request.version, driver)]
    return variants.meant_by(request._replace(version=min(request.version, driver))) if fitting else None


@pytest.mark.parametrize(("walk", "driver"), [(version, version) for version in DRIVER_VERSIONS], indirect=["walk"])
def test_every_program_gets_its_own_variants(walk: Walk, driver: int) -> None:
    variants, ours = Variants(), stood_in()
    names = sorted({row[0] for row in variants.rows})
    asked = [Request(name, version, flags) for name in names for version in PROGRAM_VERSIONS for flags in (0, PER_THREAD)]
    (bare, _), (limited, _) = walk.ask(asked, [])
    wrong, hooked, old = [], 0, set[str]()
    for request, alone, (*told, place) in zip(asked, bare, limited, strict=True):
        symbol = meant(variants, request, driver)
        assert alone[:4] == ([0, 0, 0, True] if symbol else [NOT_FOUND, NOT_FOUND, TOO_OLD, True]), request
        if told != alone[:4] or (place[:2] if place else None) != ([OURS, symbol] if symbol in ours else alone[4] and alone[4][:2]):
            wrong.append((request, symbol, told, place))
        if symbol in ours:
            hooked += 1
            old.add(str(symbol))
    assert not wrong, wrong[:5]
    assert hooked > 100 * len(PROGRAM_VERSIONS)
    assert {"cuIpcOpenMemHandle_v2", "cuCtxCreate_v3", "cuMemsetD8_v2", "cuMemAllocAsync_ptsz"} <= old
    newer = {"cuCtxCreate_v4": 12050, "cuMemcpyBatchAsync_v2": 13000, "cuMulticastCreate": 12010, "cuGreenCtxCreate": 12040}
    assert {name for name in newer if name in old} == {name for name, since in newer.items() if since <= driver}
    assert {place[0] for *_, place in bare if place} == {DRIVERS}, "the control: without the limiter all are the driver's"


# a program of that version asks the way its runtime does, and uses what it got
PROGRAM = """
version, flags = int(sys.argv[1]), 2 * int(sys.argv[2])
def get(name):
    p, status = c.c_void_p(), c.c_int()
    asked = (name.encode(), c.byref(p), version, c.c_uint64(flags))
    result = cuda.cuGetProcAddress(*asked) if version < 12000 else cuda.cuGetProcAddress_v2(*asked, c.byref(status))
    return c.CFUNCTYPE(c.c_int)(p.value) if result == 0 else None
ok(get("cuInit")(0)); context = c.c_void_p(); out = []
if version < 12050: ok(get("cuCtxCreate")(c.byref(context), None, 0, 0, 0))
else: ok(get("cuCtxCreate")(c.byref(context), None, 0, 0))
f, t = c.c_size_t(), c.c_size_t()
def left():
    ok(get("cuMemGetInfo")(c.byref(f), c.byref(t))); return f.value // MIB
def pointer(name, *arguments):
    p = c.c_uint64(); return get(name)(c.byref(p), *arguments), p
out.append(left())
for name, more in (("cuMemAlloc", ()), ("cuMemAllocManaged", (1,)), ("cuMemAllocAsync", (None,))):
    results = [pointer(name, c.c_size_t(64 * MIB), *more) for _ in range(2)]
    out += [[r for r, _ in results], left()]
    if name == "cuMemAllocAsync": ok(get("cuMemFreeAsync")(results[0][1], None)); ok(get("cuCtxSynchronize")() if version < 13000 else 0)
    else: ok(get("cuMemFree")(results[0][1]))
total = c.c_size_t(); ok(get("cuDeviceTotalMem")(c.byref(total), 0)); out.append(total.value // MIB)
say(out)
"""


@pytest.mark.parametrize("own", [0, 1], ids=["legacy", "per thread"])
@pytest.mark.parametrize(
    ("walk", "version"),
    [(11040, 11040), (13010, 11040), (12000, 12000), (13010, 12000), (12080, 12080), (13000, 13000), (13010, 12040)],
    indirect=["walk"],
)
def test_the_limit_holds_by_what_each_got(walk: Walk, version: int, own: int) -> None:
    held = [[0, 2], 36]
    assert run(PROGRAM, walk.limited, argv=(str(version), str(own))) == [100, *held, *held, *held, 100]
    assert run(PROGRAM, walk.bare, argv=(str(version), str(own)))[1] == [0, 0], "the control"
