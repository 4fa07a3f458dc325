"""`nbgpu run`, `status`, `limit`, `doctor` and `serve` with a real agent, pool, limiter and simulated driver, without a hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbgpu.cli_serve import is_served
from nbgpu.client import AgentClient, PoolClient
from nbgpu.quantities import GIB, MIB, memory_share_bytes

PROGRAM = Path(__file__).parent / "cli_program.py"
SIM = Path(__file__).parents[2] / "nodeagent" / "nbgpu_agent" / "_lib" / "sim"
OUT_OF_MEMORY = 2
SECONDS = 30.0


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Wait until `condition` is true; fail with `what` when it does not become so."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


class Place:
    """A runtime directory with a simulated machine of its own, and the command `nbgpu` in it."""

    def __init__(self, runtime: Path, state: Path):
        self.runtime = runtime
        names = ("NBGPU_SOCKET", "LD_PRELOAD", "NBGPU_SLICE_DIR")
        self.env = {name: value for name, value in os.environ.items() if name not in names} | {
            "NBGPU_RUNTIME_DIR": str(runtime), "NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1", "NBGPU_IDLE_SECONDS": "1",
        }  # fmt: skip
        self.agent, self.pool = AgentClient(runtime / "agent.sock"), PoolClient(runtime / "pool.sock")
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start `nbgpu` with pipes."""
        process = subprocess.Popen(
            [sys.executable, "-m", "nbgpu", *words], env=self.env | env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    def call(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `nbgpu` to its end."""
        return subprocess.run([sys.executable, "-m", "nbgpu", *words], env=self.env | env, text=True, capture_output=True, timeout=90)

    def program(self, *options: str, **env: str) -> subprocess.Popen[str]:
        """Start the obedient program in a slice."""
        process = self.start("run", *options, "--", sys.executable, str(PROGRAM), **env)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.stderr.read() if process.stderr else ""
        return process

    def end(self) -> None:
        """End what is left."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ask(process: subprocess.Popen[str], line: str) -> str:
    """Tell the program something; return its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def fresh() -> Iterator[Place]:
    """A place where nothing runs yet."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-cli-", dir="/tmp") as name:
        state = Path("/dev/shm") / Path(name).name
        place = Place(Path(name), state)
        yield place
        place.end()
        state.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def served(fresh: Place) -> Iterator[Place]:
    """The same, with `nbgpu serve` in the foreground."""
    server = subprocess.Popen([sys.executable, "-m", "nbgpu", "serve"], env=fresh.env, text=True, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert "simulated" in server.stdout.readline()
    yield fresh
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    assert not fresh.agent.healthy()
    assert not fresh.pool.healthy()


@pytest.fixture
def place(served: Place) -> Iterator[Place]:
    """The served place, empty again after each test."""
    yield served
    served.end()
    until(lambda: not served.agent.slices().slices and not open_grants(served), "all slices are gone")


def open_grants(place: Place) -> list[str]:
    return [grant.request.request_id for grant in place.pool.grants() if grant.state.value != "gone"]


def usable(place: Place) -> int:
    return place.agent.node().devices[0].usable_bytes


def test_the_program_sees_its_slice_and_its_exit_status_is_its_own(place: Place) -> None:
    program = place.program("--gpu", "1/4")
    assert int(ask(program, "total")) == memory_share_bytes(usable(place), 250)
    assert ask(program, f"alloc {memory_share_bytes(usable(place), 250) + MIB}") == str(OUT_OF_MEMORY)
    assert ask(program, f"alloc {10 * GIB}") == "0"
    ask_exit = time.monotonic()
    program.communicate("exit 7\n", timeout=SECONDS)
    assert program.returncode == 7
    until(lambda: not place.agent.slices().slices, "the slice is gone")
    assert time.monotonic() - ask_exit < 5
    until(lambda: place.pool.devices()[0].memory_granted_bytes == 0, "the pool's books are empty")


ASK_FOR = """
import ctypes, os, sys
cuda, context, block = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
assert not cuda.cuInit(0) and not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) and not cuda.cuCtxSetCurrent(context)
code = cuda.cuMemAlloc_v2(ctypes.byref(block), ctypes.c_size_t(int(sys.argv[1]) << 30))
sys.stdout.write(f"{code}\\n")
sys.stdout.flush()
eval(sys.argv[2])
"""


@pytest.mark.parametrize(("end", "status"), [("os._exit(7)", 7), ("sys.exit(0)", 0), ("os.kill(os.getpid(), 15)", -15)])
@pytest.mark.parametrize("through", [[], ["sh", "-c", '"$@" || exit $?', "sh"]])
def test_what_a_program_was_refused_is_said_when_it_has_ended(place: Place, through: list[str], end: str, status: int) -> None:
    """However short it lived; and only then."""
    program = [*through, sys.executable, "-c", ASK_FOR]
    done = place.call("run", "--gpu", "1/4", "--", *program, "30", end)
    assert done.stdout == f"{OUT_OF_MEMORY}\n"
    lines = [line for line in done.stderr.splitlines() if line.startswith("nbgpu: ")]
    assert lines[1:] == ["nbgpu: The program was refused 30 GiB: its slice of 19.5 GiB has 19.2 GiB left. Free some or get a larger slice."]
    expected = status if not through or status >= 0 else 128 - status
    assert done.returncode == expected
    fits = place.call("run", "--gpu", "1/4", "--", *program, "3", end)
    assert (fits.stdout, fits.returncode) == ("0\n", expected)
    assert "refused" not in fits.stderr, "control"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_program(place: Place, number: signal.Signals) -> None:
    catch = f"import signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(9)); print('ready', flush=True); signal.pause()"
    process = place.start("run", "--gpu", "1/4", "--", sys.executable, "-c", catch)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(SECONDS) == 9


def test_control_without_nbgpu_run_the_program_sees_the_whole_device(place: Place) -> None:
    env = place.env | {"LD_LIBRARY_PATH": str(SIM)}
    asked = f"total\nalloc {memory_share_bytes(usable(place), 250) + MIB}\nexit 0\n"
    done = subprocess.run([sys.executable, str(PROGRAM)], env=env, input=asked, text=True, capture_output=True, timeout=SECONDS)
    assert done.stdout.split()[1:] == [str(place.agent.node().devices[0].memory_bytes), "0"]


def test_the_slice_ends_with_a_killed_program(place: Place) -> None:
    program = place.program("--gpu", "1/2")
    assert ask(program, f"alloc {GIB}") == "0"
    program.kill()
    until(lambda: not place.agent.slices().slices and not open_grants(place), "a killed program's slice is gone")


def test_a_second_program_waits_says_so_and_gets_in(place: Place) -> None:
    first = place.program("--gpu", "1")
    second = place.start("run", "--gpu", "1/2", "--", "sh", "-c", "echo in")
    assert second.stderr is not None
    said = second.stderr.readline()
    assert "waiting for half of a GPU" in said
    assert "number 1 in the queue" in said
    assert second.poll() is None
    first.communicate("exit 0\n", timeout=SECONDS)
    out, _ = second.communicate(timeout=SECONDS)
    assert (out, second.returncode) == ("in\n", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_leaves_the_queue(place: Place, number: signal.Signals) -> None:
    place.program("--gpu", "1")
    second = place.start("run", "--gpu", "1/2", "--", "true")
    assert second.stderr is not None
    second.stderr.readline()
    assert len(open_grants(place)) == 2
    second.send_signal(number)
    assert second.wait(SECONDS) == 130
    until(lambda: len(open_grants(place)) == 1, "the queue is empty")


def test_no_wait_refuses(place: Place) -> None:
    place.program("--gpu", "1")
    done = place.call("run", "--gpu", "1/2", "--no-wait", "--", "true")
    assert done.returncode == 1
    assert "Nothing is free now" in done.stderr
    assert len(open_grants(place)) == 1


def test_more_than_there_is_is_refused_in_one_line(place: Place) -> None:
    done = place.call("run", "--gpu", "0.3%", "--", "true")
    assert (done.returncode, done.stderr.partition(", ")[0]) == (1, "nbgpu: --gpu: it must be at least 0.7 % of a GPU here")
    for options in (["--memory", "500GiB"], ["--gpu", "1/4", "--count", "9"], ["--gpu", "1/4", "--model", "None of these"]):
        done = place.call("run", *options, "--", "true")
        assert done.returncode == 1, options
        assert done.stderr.startswith("nbgpu: "), options
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_program_that_cannot_be_executed_gives_its_slice_back(place: Place, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    done = place.call("run", "--gpu", "1/4", "--", str(broken))
    assert done.returncode == 126
    assert "Exec format error" in done.stderr
    until(lambda: not open_grants(place), "its slice is free")


def test_a_slices_own_programs_are_found(place: Place) -> None:
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "nvidia-smi").exists())
    done = place.call("run", "--gpu", "1/4", "--", "nvidia-smi", PATH=path)
    assert done.returncode == 0, done.stderr
    assert f"/ {memory_share_bytes(usable(place), 250) // MIB}MiB" in " ".join(done.stdout.split())


def test_inside_a_slice_there_is_no_second_one(place: Place) -> None:
    done = place.call("run", "--gpu", "1/4", "--", sys.executable, "-m", "nbgpu", "run", "--gpu", "1/4", "--", "true")
    assert done.returncode == 1
    assert "inside a slice already" in done.stderr


def test_status_shows_the_slice_from_outside_and_inside(place: Place) -> None:
    program = place.program("--gpu", "1/4", "--mode", "strict")
    ask(program, f"alloc {5 * GIB}")
    shown = json.loads(place.call("status", "--json").stdout)
    (known,) = shown["slices"]
    assert known["slice"]["mode"] == "strict"
    assert known["usage"]["devices"][0]["memory_limit_bytes"] == memory_share_bytes(usable(place), 250)
    assert known["usage"]["devices"][0]["memory_used_bytes"] >= 5 * GIB
    assert shown["devices"][0]["compute_granted_milli"] == 250
    table = place.call("status").stdout
    assert "strict" in table
    assert "simulated" in table
    inside = json.loads(place.call("status", "--json", NBGPU_SOCKET=ask(program, "env NBGPU_SOCKET")).stdout)
    assert inside["slice_id"] == known["slice"]["slice_id"]


def test_limit_gives_a_whole_slice_another_size(place: Place) -> None:
    program = place.program("--gpu", "1/4")
    assert ask(program, f"alloc {GIB}") == "0"
    (known,) = place.agent.slices().slices
    start = known.slice.slice_id[:8]
    done = place.call("limit", "--slice", start, "--memory", "2GiB", "--compute", "1/2")
    assert f"Slice {start}" in done.stdout, done.stderr
    assert "GPU 0 2 GiB, 50 % of its time." in done.stdout

    def in_force() -> tuple[int, int]:
        (part,) = place.agent.slices().slices[0].slice.devices
        return part.memory_bytes, part.compute_milli

    until(lambda: in_force() == (2 * GIB, 500), "the agent has the new limits")
    assert ask(program, f"alloc {2 * GIB}") == str(OUT_OF_MEMORY)
    told = json.loads(place.call("limit", "--slice", start, "--memory", "1/2", "--json").stdout)
    assert told["devices"][0]["memory_bytes"] == memory_share_bytes(usable(place), 500)
    until(lambda: in_force()[0] > 2 * GIB, "more again")
    assert ask(program, f"alloc {2 * GIB}") == "0", "the control: in a larger slice it fits"
    too_much = place.call("limit", "--slice", start, "--memory", "7000GiB")
    assert too_much.returncode == 1
    assert "Traceback" not in too_much.stderr
    junk = place.call("limit", "--slice", start, "--memory", "lots")
    assert "--memory is 'lots'; it must be an amount such as 20 GiB, or a fraction of one GPU" in junk.stderr
    inside = place.call("limit", "--slice", start, "--memory", "1GiB", NBGPU_SOCKET="/nowhere/nbgpu.sock")
    assert "From inside a slice only its kernels can be limited." in inside.stderr
    other = place.call("limit", "(other)", "--memory", "1GiB")
    assert "nbgpu limit --slice" in other.stderr


def test_limit_caps_one_kernel_and_clears_it(place: Place) -> None:
    program = place.program("--gpu", "1/2", NBGPU_KERNEL_ID="kernel-one")
    assert ask(program, f"alloc {2 * GIB}") == "0"
    assert ask(program, "free") == "1"
    listed = json.loads(place.call("limit", "--json").stdout)
    assert [kernel["kernel_id"] for kernel in listed["slices"][0]["kernels"]] == ["kernel-one"]

    done = place.call("limit", "kernel", "--memory", "1GiB")
    assert (done.returncode, done.stdout) == (0, "Kernel kernel-o: memory 1 GiB, time the slice's.\n")
    assert ask(program, f"alloc {2 * GIB}") == str(OUT_OF_MEMORY)
    too_much = place.call("limit", "kernel", "--memory", "70GiB")
    assert too_much.returncode == 1
    assert len(too_much.stderr.strip().splitlines()) == 1

    assert (
        place.call("limit", "kernel", "--compute", "1/2").stdout
        == "Kernel kernel-o: memory 1 GiB, 1/2 of the slice's time (25 % of the GPU).\n"
    )

    socket = ask(program, "env NBGPU_SOCKET")
    assert place.call("limit", "kernel", "--clear", NBGPU_SOCKET=socket).returncode == 0
    assert ask(program, f"alloc {2 * GIB}") == "0", "the control: without the limit it fits"


def test_doctor_finds_a_served_place_well(place: Place) -> None:
    done = place.call("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    wrong = [check for check in checks.values() if check["level"] == "error"]
    assert wrong == [], wrong
    assert checks["limits"]["found"] == "the limiter is loaded in a program of a slice"
    assert checks["books"]["found"].startswith("pool and agent agree")
    assert checks["limiter version"]["level"] == "ok"


def test_doctor_finds_what_a_stranger_left(place: Place) -> None:
    stray = place.runtime / "slices" / "stray-slice-0000"
    stray.mkdir()
    try:
        done = place.call("doctor", "--no-probe")
    finally:
        stray.rmdir()
    assert "stray-slice-0000" in done.stdout


def test_serve_twice_is_one_line(place: Place) -> None:
    done = place.call("serve")
    assert done.returncode == 1
    assert "already serves" in done.stderr


def test_serve_starts_again_what_was_killed(place: Place) -> None:
    program = place.program("--gpu", "1/4")
    holder = int((place.runtime / "agent.lock").read_text().split()[0])
    os.kill(holder, signal.SIGKILL)
    until(place.agent.healthy, "the agent is back")
    assert [known.slice.devices[0].compute_milli for known in place.agent.slices().slices] == [250]
    assert ask(program, f"alloc {memory_share_bytes(usable(place), 250)}") == str(OUT_OF_MEMORY)


@pytest.fixture
def alone() -> Iterator[Place]:
    """A place of one test, where nothing runs yet and where only what a test ends ends."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-cli-", dir="/tmp") as name:
        state = Path("/dev/shm") / Path(name).name
        place = Place(Path(name) / "nbgpu", state)
        place.env["NBGPU_IDLE_SECONDS"] = "60"
        yield place
        if place.runtime.is_dir() and is_served(place.runtime):
            os.kill(server_of(place.runtime), signal.SIGTERM)
            until(lambda: not is_served(place.runtime), "it has ended")
        place.end()
        state.unlink(missing_ok=True)


def checks_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_doctor_changes_nothing(alone: Place) -> None:
    found = checks_of(alone.call("doctor", "--json"))
    assert (found["limits"]["level"], found["limiter version"]["level"]) == ("ok", "ok"), "a slice was tried"
    assert list(alone.runtime.parent.iterdir()) == [], "neither the runtime directory nor the one that was tried in is left"
    assert alone.call("run", "--gpu", "1/4", "--", "true").returncode == 0
    assert alone.call("doctor", "--json").returncode == 0
    assert (alone.agent.healthy(), alone.pool.healthy()) == (True, True), "control: what another has started goes on"
    assert list(alone.runtime.parent.iterdir()) == [alone.runtime]


def test_doctor_takes_no_slice_over_and_says_that_nobody_watches_it(alone: Place) -> None:
    program = alone.program("--gpu", "1/4")
    os.kill(server_of(alone.runtime), signal.SIGTERM)
    until(lambda: not is_served(alone.runtime), "agent and pool have ended")
    there = sorted(str(path) for path in alone.runtime.rglob("*"))
    done = alone.call("doctor", "--json")
    assert done.returncode == 1
    found = checks_of(done)
    assert found["agent"]["level"] == "error"
    assert "1 slice is held" in found["agent"]["found"]
    assert "nobody watches" in found["agent"]["found"]
    assert "as expected" not in found["agent"]["found"]
    assert json.loads(done.stdout)["not_running"] == []
    assert not alone.agent.healthy()
    assert not is_served(alone.runtime)
    assert sorted(str(path) for path in alone.runtime.rglob("*")) == there
    assert alone.call("run", "--gpu", "1/4", "--", "true").returncode == 0
    assert len(alone.agent.slices().slices) == 1, "control: who starts an agent takes it over"
    assert ask(program, f"alloc {usable(alone)}") == str(OUT_OF_MEMORY)


def test_doctor_in_a_kernel_compares_with_the_kernels_limit(place: Place) -> None:
    program = place.program("--gpu", "1/4", NBGPU_KERNEL_ID="kernel-one")
    inside = {name: ask(program, f"env {name}") for name in ("NBGPU_SOCKET", "LD_PRELOAD", "NBGPU_SLICE_DIR", "LD_LIBRARY_PATH")}
    assert place.call("limit", "kernel-one", "--memory", "2GiB", NBGPU_SOCKET=inside["NBGPU_SOCKET"]).returncode == 0
    kernel = checks_of(place.call("doctor", "--json", NBGPU_KERNEL_ID="kernel-one", **inside))["GPU in a slice"]
    assert (kernel["level"], kernel["found"]) == ("ok", "a program sees 1 GPU of 2 GiB, this kernel's limit")
    other = checks_of(place.call("doctor", "--json", NBGPU_KERNEL_ID="kernel-two", **inside))["GPU in a slice"]
    assert other["level"] == "ok"
    assert "2 GiB" not in other["found"], "control: another kernel has the slice"


def server_of(runtime: Path) -> int:
    """Return the parent of the agent: `nbgpu serve`."""
    agent = (runtime / "agent.lock").read_text().split()[0]
    return int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])


def test_on_demand_it_starts_alone_and_ends_when_idle() -> None:
    with tempfile.TemporaryDirectory(prefix="nbgpu-cli-", dir="/tmp") as name:
        state = Path("/dev/shm") / Path(name).name
        place = Place(Path(name), state)
        try:
            runs = [place.start("run", "--gpu", "1/4", "--", "sh", "-c", "exit 3") for _ in range(2)]
            assert [run.wait(90) for run in runs] == [3, 3], [run.stderr.read() for run in runs if run.stderr]
            until(lambda: not place.pool.healthy() and not place.agent.healthy(), "it ends by itself", 40)
            until(lambda: not (Path(name) / "agent.sock").exists(), "nothing is left to answer")
        finally:
            place.end()
            state.unlink(missing_ok=True)
