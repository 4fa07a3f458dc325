"""All that the CUDA runtime asks of a driver, asked under the limiter: what it must stand in for is its own, the rest the driver's.

Which functions those are is written in two lists, the limiter's ``functions.h`` and ``passed.txt``; a function that allocates, launches or
reports and is in neither fails here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from limiter_kit import ROOT, environment, limiter, null_driver, run, sim_driver
from limiter_slice import MIB, SliceFiles

DATA = ROOT / "tests" / "data"
Make = Callable[..., SliceFiles]
PER_THREAD = 2
OURS, DRIVERS = "libnbgpu.so", "libcuda.so.1"

# what a name says of a function that must be looked at
CONCERNS = re.compile(
    r"Alloc|Free|MemCreate|Array(3D)?Create|ArrayDestroy|Pool|CtxCreate|CtxDestroy|GreenCtx|Primary|CtxAttach|CtxDetach|Limit|Multicast"
    r"|Launch|GraphInstantiate|GraphAdd|GraphUpload|Capture|MemGetInfo|TotalMem|Import|IpcOpen|External|MapResources|ModuleLoad|LibraryLoad"
)
NVML_CONCERNS = re.compile(r"MemoryInfo|MemoryUsage|MemoryLimits|RunningProcess|Utili[sz]ation|Accounting|DeviceGetCount|DeviceGetHandleBy")


class Request(NamedTuple):
    """As asked of cuGetProcAddress."""

    name: str
    version: int
    flags: int


def requests_of(name: str) -> list[Request]:
    """What a runtime asks for, recorded."""
    rows = [line.split() for line in (DATA / name).read_text().splitlines()]
    return [Request(row[0], int(row[1][1:]), int(row[2][1:])) for row in rows if len(row) == 3]


class Variants:
    """The documented rule, from the simulated driver's list: of one name, the newest version that is not newer than what is asked."""

    def __init__(self) -> None:
        text = (ROOT / "nodeagent" / "simgpu" / "drv_entry_points.inc").read_text()
        self.rows = re.findall(r"^[EPR]\((\w+), (\d+), (\w+)(?:, (\w+))?\)", text, re.M)

    def requests(self) -> list[Request]:
        """Every name in every version, with and without a default stream per thread."""
        return [Request(name, int(version), flags) for name, version, *_ in self.rows for flags in (0, PER_THREAD)]

    def meant_by(self, request: Request) -> str:
        """The exported function."""
        fitting = [row for row in self.rows if row[0] == request.name and int(row[1]) <= request.version]
        *_, plain, own = max(fitting, key=lambda row: int(row[1]))
        return own if own and request.flags == PER_THREAD else plain


def exported(library: Path) -> set[str]:
    """Names of a library's functions."""
    listing = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True, timeout=60)
    return {row.split()[-1] for row in listing.stdout.splitlines()}


def stood_in() -> set[str]:
    """The limiter's hooks, as they are compiled."""
    return exported(limiter())


def passed() -> dict[str, str]:
    """Names in ``passed.txt``, with the reason of each."""
    reasons, reason = {}, ""
    for line in (ROOT / "nodeagent" / "limiter" / "passed.txt").read_text().splitlines():
        if line.startswith("= "):
            reason = line[2:]
        elif line and not line.startswith("#"):
            assert reason, f"{line}: no reason"
            assert line not in reasons, f"{line}: twice"
            reasons[line] = reason
    return reasons


def matches(symbol: str, name: str) -> bool:
    return symbol.startswith(name[:-1]) if name.endswith("*") else symbol == name or re.sub(r"(_v\d+)?(_pt[sd]s)?$", "", symbol) == name


def forgotten(symbols: set[str], listed: set[str]) -> list[str]:
    """Functions that somebody must have thought of and nobody has."""
    ours, known = stood_in(), passed()
    bases = {symbol: re.sub(r"(_v\d+)?(_pt[sd]s)?$", "", symbol) for symbol in symbols}
    concern = {s for s in symbols if (CONCERNS if s.startswith("cu") else NVML_CONCERNS).search(s) or s in listed or bases[s] in listed}
    return sorted(s for s in concern if s not in ours and not any(matches(s, name) for name in known))


# ---- the two lists


def listed_entry_points() -> set[str]:
    return {word for word in (DATA / "driver_entry_points.txt").read_text().split() if word.startswith("cu")}


def test_no_function_is_forgotten() -> None:
    folder = sim_driver()
    symbols = {s for s in exported(folder / DRIVERS) | exported(folder / "libnvidia-ml.so.1") if s.startswith(("cu", "nvml"))}
    listed = listed_entry_points()
    assert forgotten(symbols, listed) == []
    assert forgotten(
        symbols | {"cuMemAllocTomorrow", "cuLaunchKernelTomorrow_ptsz", "nvmlDeviceGetMemoryInfo_v9", "cuNothingMuch"}, listed
    ) == [
        "cuLaunchKernelTomorrow_ptsz",
        "cuMemAllocTomorrow",
        "nvmlDeviceGetMemoryInfo_v9",
    ]


def test_the_list_of_passed_functions_is_true() -> None:
    folder, ours = sim_driver(), stood_in()
    symbols = exported(folder / DRIVERS) | exported(folder / "libnvidia-ml.so.1")
    for name in passed():
        named = {symbol for symbol in symbols if matches(symbol, name)}
        assert named, f"{name} is no function of the driver"
        assert name not in ours, f"{name} is stood in for, and named as passed"


# ---- asked under the limiter

WALK = """
class Info(c.Structure):
    _fields_ = [("file", c.c_char_p), ("base", c.c_void_p), ("name", c.c_char_p), ("address", c.c_void_p)]
libc = c.CDLL(None)
libc.dlsym.restype = c.c_void_p
handle = c.c_void_p(cuda._handle)
executable = []
def map_code():
    executable.clear()
    for line in open("/proc/self/maps"):
        where, rights = line.split()[:2]
        if "x" in rights: executable.append([int(x, 16) for x in where.split("-")])
def home(address):
    info = Info()
    if not address or not libc.dladdr(c.c_void_p(address), c.byref(info)): return None
    if not any(a <= address < b for a, b in executable): return "not code"
    return [os.path.basename(info.file.decode()), info.name.decode() if info.address == address else None, address]
def by_driver(name, version, flags):
    new, old, status = c.c_void_p(), c.c_void_p(), c.c_int(-1)
    a = cuda.cuGetProcAddress_v2(name.encode(), c.byref(new), version, c.c_uint64(flags), c.byref(status))
    b = cuda.cuGetProcAddress(name.encode(), c.byref(old), version, c.c_uint64(flags))
    return [a, b, status.value, new.value == old.value, home(new.value)]
ok(cuda.cuInit(0)); map_code()
asked, symbols = json.loads(sys.stdin.readline())
say([[by_driver(*request) for request in asked], {s: (home(libc.dlsym(handle, s.encode())) or ["nothing"])[0] for s in symbols}])
"""


class Walk:
    """The same questions asked in a slice under the limiter, and without it."""

    def __init__(self, state: Path, make: Make, driver_version: int = 13010) -> None:
        more = {"NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1", "NBGPU_SIM_DRIVER_VERSION": str(driver_version)}
        bare = environment(None, sim_driver(), **more)
        script = "ok(cuda.cuInit(0)); b = (c.c_ubyte * 16)(); ok(cuda.cuDeviceGetUuid_v2(b, 0)); say(bytes(b).hex())"
        h = run(script, bare)
        uuid = f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
        files = make(mem_limit=100 * MIB, uuids=(uuid,))
        self.bare, self.limited = bare, environment(files, sim_driver(), preload=limiter(), **more)

    def ask(self, asked: list[Request], symbols: list[str]) -> list[Any]:
        """Answers without, and with."""
        line = json.dumps([asked, symbols]) + "\n"
        return [run(WALK, env, stdin=line) for env in (self.bare, self.limited)]


@pytest.fixture
def walk(make_slice: Make, tmp_path: Path) -> Iterator[Walk]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    state = base / f"nbgpu-test-requests-{os.getpid()}"
    yield Walk(state, make_slice)
    state.unlink(missing_ok=True)


LISTS = {
    "cudart12": lambda: requests_of("cudart12_requests.txt"),
    "cudart13": lambda: requests_of("cudart13_requests.txt"),
    "cudart13, a default stream per thread": lambda: [r._replace(flags=PER_THREAD) for r in requests_of("cudart13_requests.txt")],
    "all that the driver knows": lambda: Variants().requests(),
}


def wrong_answers(asked: list[Request], bare: list[Any], limited: list[Any]) -> list[tuple[Request, Any, Any]]:
    """Where the limiter's program got something else than it should."""
    ours, variants, wrong = stood_in(), Variants(), []
    for request, (*told, place), (*told_within, place_within) in zip(asked, bare, limited, strict=True):
        symbol = variants.meant_by(request)
        assert told == [0, 0, 0, True], f"{request}: the driver itself said {told}"
        assert place[0] == DRIVERS
        expected = [OURS, symbol] if symbol in ours else place[:2]
        if told_within != told or place_within[:2] != expected:
            wrong.append((request, expected, place_within))
    return wrong


@pytest.mark.parametrize("name", LISTS)
def test_each_request_gets_the_limiters_or_the_drivers(walk: Walk, name: str) -> None:
    """Status and variant are the driver's; the address is the limiter's exactly where it stands in for that variant."""
    asked = LISTS[name]()
    (bare, _), (limited, _) = walk.ask(asked, [])
    assert wrong_answers(asked, bare, limited) == []
    assert len(wrong_answers(asked, bare, bare)) > 60, "the control: without the limiter these would be the driver's"


def test_by_name_it_is_the_same(walk: Walk) -> None:
    """dlsym of every function that the driver exports."""
    symbols = sorted(s for s in exported(sim_driver() / DRIVERS) if s.startswith("cu"))
    ours = stood_in()
    (_, bare), (_, limited) = walk.ask([], symbols)
    assert set(bare.values()) == {DRIVERS}
    wrong = [(s, limited[s]) for s in symbols if limited[s] != (OURS if s in ours else DRIVERS)]
    assert not wrong
    assert len({symbol for symbol in symbols if symbol in ours}) > 80


VERSIONED = """
libc = c.CDLL(None); libc.dlsym.restype = libc.dlvsym.restype = c.c_void_p
handle = c.c_void_p(cuda._handle)
def same(name): return libc.dlvsym(handle, name, b"DRIVER_1") == libc.dlsym(handle, name) is not None
at = c.cast(cuda.cuMemAlloc_v2, c.c_void_p).value
start(); say([same(b"cuMemAlloc_v2"), same(b"cuDriverGetVersion"), libc.dlvsym(handle, b"cuMemAlloc_v2", b"DRIVER_2"), alloc(2 * MIB)[0]])
"""


def test_by_name_and_version_too(make_slice: Make) -> None:
    """dlvsym, of a driver that has versions."""
    env = environment(make_slice(mem_limit=MIB), null_driver("DRIVER_1 { global: cu*; local: *; };"), preload=limiter())
    assert run(VERSIONED, env) == [True, True, None, 2]
