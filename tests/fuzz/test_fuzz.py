"""Coverage-guided fuzzing (libFuzzer) of whatever reads words that a tenant writes; needs clang with its runtimes.

A few seconds each; ``-m soak`` ten minutes each. What was found before is in `corpus/` and is tried first.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "limiter"))

from test_sanitizers import NODE, compile_program  # noqa: E402

pytestmark = pytest.mark.slow
KIND = "fuzzer,address,undefined"
SOURCES = {
    "fuzz_use": [NODE / "agentlib" / "use_reader.c"],
    "fuzz_sched": sorted((NODE / "agentlib").glob("*.c")),
    "fuzz_limiter": sorted((NODE / "limiter").glob("*.c")),
}


def fuzz(name: str, seconds: int, folder: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    program = compile_program(KIND, "-".join((name, *definitions)), [HERE / f"{name}.c", *SOURCES[name]], *[f"-D{d}" for d in definitions])
    new, known = folder / "new", HERE / "corpus" / name
    new.mkdir()
    options = [f"-max_total_time={seconds}", "-max_len=600", "-timeout=10", "-rss_limit_mb=1024", f"-artifact_prefix={folder}/"]
    return subprocess.run([program, *options, new, known], capture_output=True, text=True, timeout=seconds + 120, cwd=folder)


@pytest.mark.parametrize("seconds", [3, pytest.param(600, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.timeout(900)
def test_nothing_that_a_tenant_writes_does_harm(name: str, seconds: int, tmp_path: Path) -> None:
    done = fuzz(name, seconds, tmp_path)
    assert done.returncode == 0, f"the input that did it is in {tmp_path}\n{done.stderr[-6000:]}"
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs, done.stderr[-2000:]
    print(f"{name}: {runs[1]} runs in {seconds} s")
    assert int(runs[1]) > 10 * seconds, "so few runs find nothing"


def test_control_a_reader_that_believes_the_file_is_found_out(tmp_path: Path) -> None:
    """The fuzzer comes to where harm would be done: without the check of an offset it finds an overflow."""
    done = fuzz("fuzz_use", 20, tmp_path, "NBGPU_CONTROL_BELIEVE")
    assert done.returncode != 0
    assert "use_reader.c" in done.stderr
    assert "Sanitizer" in done.stderr
