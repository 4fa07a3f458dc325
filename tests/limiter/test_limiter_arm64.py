"""The arm64 build, run by qemu: the resolvers' assembly, the layout, the slots and the limit hold there too.

On the driver that does nothing: the simulated one reserves a terabyte of addresses, for which qemu keeps gigabytes of books.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from limiter_kit import BUILDS, ROOT
from limiter_slice import MIB, SliceFiles
from native_build import build_module

Make = Callable[..., SliceFiles]
SYSROOT = Path("/usr/aarch64-linux-gnu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere all other tests are of this machine's own"),
]


def emulator() -> list[str]:
    """Command that runs an arm64 program; skips where something is missing."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no ziglang (pip install ziglang)")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None or not (SYSROOT / "lib" / "libc.so.6").exists():
        pytest.skip("no arm64 emulation here (Debian: apt-get install qemu-user libc6-arm64-cross)")
    return [qemu, "-L", str(SYSROOT)]


def compile_arm64(source: str, output: Path, *flags: str) -> Path:
    """By zig, for the glibc that the released libraries are built for."""
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-std=gnu11", "-O1"]
    include = f"-I{ROOT / 'nodeagent' / 'include'}"
    subprocess.run([*compiler, include, "-o", str(output), str(ROOT / source), *flags, "-ldl"], check=True, timeout=280)
    return output


@pytest.mark.timeout(600)
def test_the_limit_holds_on_arm64(make_slice: Make) -> None:
    qemu = emulator()
    folder = BUILDS / "arm64"
    build_module().build(["limiter"], out=folder, release_machine="aarch64")
    driver = compile_arm64(
        "bench/null_driver.c", folder / "libcuda.so.1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"
    )
    linked = compile_arm64("tests/limiter/linked.c", folder / "linked", f"-L{folder}", "-Wl,--no-as-needed", f"-l:{driver.name}")
    resolvers = compile_arm64("tests/limiter/resolvers.c", folder / "resolvers")
    files = make_slice(mem_limit=MIB * 4)
    limited = {"LD_PRELOAD": str(folder / "libnbgpu.so"), "NBGPU_SLICE_DIR": str(files.directory)}

    def outcome(program: Path, **env: str) -> tuple[int, str]:
        settings = [word for name, value in {"LD_LIBRARY_PATH": str(folder), **env}.items() for word in ("-E", f"{name}={value}")]
        done = subprocess.run([*qemu, *settings, program], capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout.strip() or done.stderr

    assert outcome(linked, **limited) == (0, "0 2")
    assert outcome(linked) == (0, "0 0"), "the control: without the limiter both fit"
    (slot,) = [slot for slot in files.use.slot if slot.allocs]
    assert (slot.refusals, files.launches(slot)) == (1, 1)
    said = outcome(resolvers, **limited)
    assert said[0] == 0, said[1]
    assert outcome(resolvers)[0] != 0
