"""The arm64 build, run by qemu on the simulated driver: the resolvers' assembly, the layout and the limit hold there too."""

from __future__ import annotations

import importlib.util
import os
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


def arm64(source: str, folder: Path) -> Path:
    """A program of tests/limiter, linked against the simulated driver."""
    out = folder / Path(source).stem
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-std=gnu11", "-O1"]
    include = f"-I{ROOT / 'nodeagent' / 'include'}"
    libraries = [f"-L{folder / 'sim'}", "-Wl,--no-as-needed", "-l:libcuda.so.1", "-ldl"]
    subprocess.run([*compiler, include, "-o", str(out), str(ROOT / "tests/limiter" / source), *libraries], check=True, timeout=280)
    return out


@pytest.mark.timeout(600)
def test_the_limit_holds_on_arm64(make_slice: Make) -> None:
    qemu = emulator()
    folder = BUILDS / "arm64"
    build_module().build(["limiter", "libcuda", "libnvml"], out=folder, release_machine="aarch64")
    linked, resolvers, uuids = (arm64(name, folder) for name in ("linked.c", "resolvers.c", "uuid.c"))
    state = Path("/dev/shm" if Path("/dev/shm").is_dir() else folder) / f"nbgpu-test-arm64-{os.getpid()}"
    plain = {"LD_LIBRARY_PATH": str(folder / "sim"), "NBGPU_SIM_STATE": str(state), "NBGPU_SIM_DEVICES": "1"}

    def outcome(program: Path, **env: str) -> tuple[int, str]:
        settings = [word for name, value in (plain | env).items() for word in ("-E", f"{name}={value}")]
        done = subprocess.run([*qemu, *settings, program], capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout.strip() or done.stderr

    try:
        _, uuid = outcome(uuids)
        files = make_slice(mem_limit=MIB * 4, uuids=(uuid,))
        limited = {"LD_PRELOAD": str(folder / "libnbgpu.so"), "NBGPU_SLICE_DIR": str(files.directory)}
        assert outcome(linked, **limited) == (0, "0 2")
        assert outcome(linked) == (0, "0 0"), "the control: without the limiter both fit"
        (slot,) = [slot for slot in files.use.slot if slot.allocs]
        assert (slot.refusals, files.launches(slot)) == (1, 1)
        assert outcome(resolvers, **limited)[0] == 0, outcome(resolvers, **limited)[1]
    finally:
        state.unlink(missing_ok=True)
