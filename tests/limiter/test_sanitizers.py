"""The limiter and the agent's library compiled with sanitizers: memory errors, undefined behaviour, races.

Each is one program with the library inside, since a sanitizer's runtime has to be there before anything that is preloaded. There the
limiter's dlsym goes by another name: the sanitizers' own start calls dlsym before their shadow memory exists.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limiter_kit import BUILDS, ROOT, environment, run, sim_driver
from limiter_slice import MIB, SliceFiles
from test_limiter_kills import Gate

from nbgpu_agent import layout

pytestmark = pytest.mark.slow
Make = Callable[..., SliceFiles]
NODE = ROOT / "nodeagent"
FLAGS = "-std=gnu11 -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Werror -Wno-unknown-attributes -pthread".split()
SUPPRESSED = (
    "leak:nbgpu_init_visible\nleak:libcuda.so.1\nleak:libnvidia-ml.so.1\n"  # an environment that others may still read; the driver's own
)


KINDS = ["address,undefined", "thread"]


def compiler_for(kind: str) -> list[str]:
    """clang, which brings the runtimes with it; zig compiles those of threads for minutes, and has none for addresses."""
    if shutil.which("clang") is None:
        pytest.skip("no clang on this machine (Debian: apt-get install clang)")
    command = ["clang", f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    main = "" if "fuzzer" in kind else "int main(void){return 0;}"
    main = main or "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n){return d && n > (1ul << 40);}"
    with tempfile.TemporaryDirectory() as folder:
        empty = subprocess.run([*command, "-x", "c", "-o", f"{folder}/empty", "-"], input=main, text=True, capture_output=True)
    if empty.returncode != 0:
        pytest.skip("clang has no sanitizer runtimes here (Debian: apt-get install libclang-rt-dev)")
    return command


def compile_program(kind: str, name: str, sources: list[Path], *flags: str) -> Path:
    """One program of a sanitizer."""
    compiler = compiler_for(kind)
    if shutil.which("objcopy") is None:
        pytest.skip("no objcopy on this machine (Debian: apt-get install binutils)")
    folder = BUILDS / f"sanitized-{kind.replace(',', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{NODE / part}" for part in ("include", "limiter", "agentlib")]
    objects: list[str] = []
    for source in sources:
        objects.append(str(folder / f"{name}-{source.stem}.o"))
        subprocess.run([*compiler, *FLAGS, *flags, *include, "-c", "-o", objects[-1], str(source)], check=True, timeout=300)
        if source.name == "resolve.c":
            renamed = ["--redefine-sym", "dlsym=nbgpu_dlsym", "--redefine-sym", "dlvsym=nbgpu_dlvsym"]
            subprocess.run(["objcopy", *renamed, objects[-1]], check=True, timeout=60)
    out = folder / name
    subprocess.run([*compiler, "-pthread", "-o", str(out), *objects, "-ldl", "-lrt", "-lm"], check=True, timeout=300)
    return out


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[dict[str, str]]:
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    state = base / f"nbgpu-test-sanitized-{os.getpid()}"
    yield {"NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1", "NBGPU_SIM_MEMORY_MIB": "8192"}
    state.unlink(missing_ok=True)


def sanitized(program: Path, arguments: list[str], env: dict[str, str], folder: Path) -> str:
    (folder / "leaks").write_text(SUPPRESSED)
    env = env | {
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
        "LSAN_OPTIONS": f"suppressions={folder / 'leaks'}:print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }
    command = (
        ["setarch", "-R", program, *arguments] if shutil.which("setarch") else [program, *arguments]
    )  # older runtimes want known addresses
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr[:8000]}"
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[:8000]
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("gated", [False, True], ids=["free", "in turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_limiter_under_threads(kind: str, gated: bool, sim: dict[str, str], make_slice: Make, tmp_path: Path) -> None:
    uuid = run(
        "ok(cuda.cuInit(0)); b = (c.c_ubyte * 16)(); ok(cuda.cuDeviceGetUuid_v2(b, 0)); h = bytes(b).hex()\n"
        'say(f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}")',
        environment(None, sim_driver(), **sim),
    )
    files = make_slice(mem_limit=48 * MIB, uuids=(uuid,), gate=layout.GATE_OPEN if gated else layout.GATE_NONE)
    program = compile_program(kind, "limiter", [ROOT / "tests/limiter/sanitized.c", *sorted((NODE / "limiter").glob("*.c"))])
    gate = Gate(files)
    if gated:
        gate.start()
    try:
        rounds = "400" if kind == "thread" else "1500"
        left, moved, refused = sanitized(program, ["4", rounds], environment(files, sim_driver(), **sim), tmp_path).split()
    finally:
        gate.stop.set()
    assert (left, moved) == ("0", "1")
    assert int(refused) > 0, "never came to the limit"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_the_agents_library_under_threads(kind: str, tmp_path: Path) -> None:
    program = compile_program(kind, "agent", [ROOT / "tests/limiter/sanitized_agent.c", *sorted((NODE / "agentlib").glob("*.c"))])
    turns = sanitized(program, [str(tmp_path), "300"], dict(os.environ), tmp_path)
    assert int(turns) > 100, "hardly anybody had a turn"
