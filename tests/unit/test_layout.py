"""The C header of the shared layout is what its description generates, and C and Python agree on every offset."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nbgpu_agent import layout

NODEAGENT = Path(layout.__file__).parent.parent
HEADER = NODEAGENT / "limiter" / "nbgpu_layout.h"


def test_the_header_is_the_generated_one() -> None:
    done = subprocess.run([sys.executable, "-m", "nbgpu_agent.layout"], cwd=NODEAGENT, capture_output=True, text=True, check=True)
    assert HEADER.read_text() == done.stdout, "run: PYTHONPATH=nodeagent python -m nbgpu_agent.layout > nodeagent/limiter/nbgpu_layout.h"


def test_a_c_compiler_accepts_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    command = [compiler] if compiler else [sys.executable, "-m", "ziglang", "cc"]
    source = tmp_path / "layout.c"
    source.write_text('#include "nbgpu_layout.h"\nint main(void) { return 0; }\n')
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}", "-c", "-o", str(tmp_path / "layout.o")]
    done = subprocess.run([*command, *flags, str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_field_of_another_size_would_not_compile(tmp_path: Path) -> None:
    """The control: the header checks its own offsets, so that a field changed by hand is caught by the compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    text = HEADER.read_text()
    assert "uint64_t mem_limit;" in text
    (tmp_path / "nbgpu_layout.h").write_text(text.replace("uint64_t mem_limit;", "uint32_t mem_limit;", 1))
    (tmp_path / "layout.c").write_text('#include "nbgpu_layout.h"\nint main(void) { return 0; }\n')
    command = [compiler, "-std=gnu11", f"-I{tmp_path}", "-c", "-o", str(tmp_path / "o"), str(tmp_path / "layout.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "NbgpuCtlDevice" in done.stderr
