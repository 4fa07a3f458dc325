"""Builds of the limiter and its drivers for tests, and programs run under them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limiter_slice import SliceFiles
from native_build import build_module

ROOT = Path(__file__).resolve().parents[2]
COMPUTE_SCALE = 4
"""Time scale of tests with processes that compute: device time goes so many times slower than the clock."""
BUILDS = Path(tempfile.gettempdir()) / f"nbgpu-test-limiter-{os.geteuid()}"
TIMEOUT = 60


@functools.cache
def limiter(*definitions: str) -> Path:
    """The limiter, compiled with preprocessor definitions."""
    import dataclasses

    build = build_module()
    target = dataclasses.replace(build.TARGETS["limiter"], cflags=tuple(f"-D{d}" for d in definitions))
    out = BUILDS / ("-".join(definitions) or "plain")
    compiler = build.find_compiler(None)
    if compiler is None:
        pytest.skip("no C compiler")
    build.build_target("limiter", target, compiler, out)
    return out / target.output


def _compile(name: str, sources: list[str], output: str, *flags: str) -> Path:
    build = build_module()
    out = BUILDS / name
    out.mkdir(parents=True, exist_ok=True)
    target = out / output
    paths = [ROOT / source for source in sources]
    if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in paths):
        partial = target.with_name(f".{output}.{os.getpid()}")
        command = [
            *build.find_compiler(None),
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'nodeagent' / 'include'}",
            *flags,
        ]
        subprocess.run([*command, "-o", str(partial), *map(str, paths), "-ldl", "-pthread"], check=True, timeout=TIMEOUT)
        os.replace(partial, target)
    return target


@functools.cache
def null_driver(versions: str = "") -> Path:
    """Folder with a libcuda.so.1 that does nothing, at once; its symbols have versions where a version script is given."""
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    name = "null-versioned" if versions else "null"
    if versions:
        script = BUILDS / name / "versions.map"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(versions)
        flags.append(f"-Wl,--version-script={script}")
    return _compile(name, ["bench/null_driver.c"], "libcuda.so.1", *flags).parent


@functools.cache
def program(name: str, *flags: str) -> Path:
    """A C program of tests/limiter or bench."""
    folder = "tests/limiter" if (ROOT / "tests" / "limiter" / f"{name}.c").exists() else "bench"
    return _compile("programs" + "".join(flags), [f"{folder}/{name}.c"], name, *flags)


@functools.cache
def sim_driver(*definitions: str) -> Path:
    """Folder with the simulated driver, compiled with preprocessor definitions."""
    import dataclasses

    build = build_module()
    compiler = build.find_compiler(None)
    if compiler is None:
        pytest.skip("no C compiler")
    out = BUILDS / "-".join(("drivers", *definitions))
    for name in ("libcuda", "libnvml", "nvidia-smi"):
        target = build.TARGETS[name]
        more = tuple(f"-D{definition}" for definition in definitions)
        if build.build_target(name, dataclasses.replace(target, cflags=target.cflags + more), compiler, out) == "no sources":
            pytest.skip("the simulated driver is not in this checkout")
    return out / "sim"


def environment(slice_files: SliceFiles | None, driver: Path, *, preload: Path | None = None, **more: str) -> dict[str, str]:
    """Environment of a process in a slice; with no `preload`, the same without the limiter."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NBGPU_") and k not in ("LD_PRELOAD", "CUDA_VISIBLE_DEVICES")}
    env["LD_LIBRARY_PATH"] = str(driver)
    if slice_files is not None:
        env["NBGPU_SLICE_DIR"] = str(slice_files.directory)
    if preload is not None:
        env["LD_PRELOAD"] = str(preload)
    return env | more


def needs_numba() -> None:
    """Skip where numba-cuda or the CUDA runtime that it looks for is missing."""
    for module in ("cuda.bindings", "numba", "numpy"):
        pytest.importorskip(module)
    try:
        found = importlib.util.find_spec("numba_cuda") and importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        found = None
    if not found:
        pytest.skip("no numba-cuda with its CUDA runtime (pip install 'numba-cuda[cu13]')")


PRELUDE = """
import ctypes as c, json, os, sys
cuda = c.CDLL("libcuda.so.1")
def ok(result):
    assert result == 0, result
def start(device=0):
    ok(cuda.cuInit(0))
    context = c.c_void_p()
    ok(cuda.cuDevicePrimaryCtxRetain(c.byref(context), device))
    ok(cuda.cuCtxSetCurrent(context))
def alloc(size):
    pointer = c.c_uint64()
    result = cuda.cuMemAlloc_v2(c.byref(pointer), c.c_size_t(size))
    return result, pointer.value
def free(pointer):
    return cuda.cuMemFree_v2(c.c_uint64(pointer))
def info():
    free_bytes, total = c.c_size_t(), c.c_size_t()
    ok(cuda.cuMemGetInfo_v2(c.byref(free_bytes), c.byref(total)))
    return [free_bytes.value, total.value]
MIB = 1 << 20
def say(value):
    print(json.dumps(value), flush=True)
"""


def spawn(script: str, env: dict[str, str], *, argv: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A Python process that runs PRELUDE and `script`; it speaks JSON lines, and reads lines."""
    command = [sys.executable, "-c", PRELUDE + script, *argv]
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(script: str, env: dict[str, str], *, argv: tuple[str, ...] = (), stdin: str | None = None, timeout: float = TIMEOUT) -> Any:
    """Run to the end; return the one value it said."""
    child = spawn(script, env, argv=argv)
    try:
        out, err = child.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}{err}") from None
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def going_on(work: Callable[[], None], seconds: float) -> Iterator[None]:
    """Do something again and again in a thread of its own, with pauses."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
