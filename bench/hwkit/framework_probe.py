"""One framework on the GPU: ``framework_probe.py NAME LIMIT_BYTES SECONDS``; prints one JSON object.

``framework_probe.py training LIMIT_BYTES SECONDS START_NS``: PyTorch multiplies large matrices from that moment (CLOCK_MONOTONIC) on.

What it is told of the device's memory, whether a product is right, what it says when it asks for more than the limit, whether it works
afterwards, how long a step takes. `refused` is "out of memory" where the framework raised its own error for that.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

SIZE = 512
MIB = 1024**2


def probe_torch(limit: int) -> tuple[int, Callable[[], bool], Callable[[], Any], type[BaseException], Callable[[], None]]:
    """PyTorch."""
    import torch

    one = torch.full((SIZE, SIZE), 1.0, device="cuda")
    total = torch.cuda.mem_get_info()[1]

    def step() -> None:
        (one @ one).sum()
        torch.cuda.synchronize()

    return (
        total,
        lambda: float((one @ one)[0, 0]) == SIZE,
        lambda: torch.empty(limit + MIB, dtype=torch.uint8, device="cuda"),
        torch.OutOfMemoryError,
        step,
    )


def probe_cupy(limit: int) -> tuple[int, Callable[[], bool], Callable[[], Any], type[BaseException], Callable[[], None]]:
    """CuPy."""
    import cupy

    one = cupy.ones((SIZE, SIZE), dtype=cupy.float32)
    total = cupy.cuda.runtime.memGetInfo()[1]

    def step() -> None:
        (one @ one).sum()
        cupy.cuda.Device().synchronize()

    return (
        total,
        lambda: float((one @ one)[0, 0]) == SIZE,
        lambda: cupy.empty(limit + MIB, dtype=cupy.uint8),
        cupy.cuda.memory.OutOfMemoryError,
        step,
    )


def probe_jax(limit: int) -> tuple[int | None, Callable[[], bool], Callable[[], Any], type[BaseException], Callable[[], None]]:
    """JAX; it takes three quarters of what it sees at once, so a slice's size shows in that."""
    import jax
    import jax.numpy as numpy

    one = numpy.ones((SIZE, SIZE), dtype=numpy.float32)

    def step() -> None:
        (one @ one).sum().block_until_ready()

    def beyond() -> Any:
        return numpy.zeros(limit + MIB, dtype=numpy.uint8).block_until_ready()

    return None, lambda: float((one @ one)[0, 0]) == SIZE, beyond, jax.errors.JaxRuntimeError, step


def probe_numba(limit: int) -> tuple[int, Callable[[], bool], Callable[[], Any], type[BaseException], Callable[[], None]]:
    """Numba; only copies where it can't compile: on the simulated driver, which executes nothing, and beside a NumPy too new for it."""
    import numpy
    from numba import cuda
    from numba.cuda.cudadrv.driver import CudaAPIError

    simulated = "NBGPU_SIM_STATE" in os.environ

    def add_one(values):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        if i < values.size:
            values[i] += 1

    data = cuda.to_device(numpy.zeros(4096, dtype=numpy.float32))
    total = cuda.current_context().get_memory_info()[1]
    compiled = None if simulated else cuda.jit(add_one)
    try:
        if compiled is not None:
            compiled[16, 256](data)
    except AttributeError:  # of NumPy's, in an older Numba
        compiled = None

    def step() -> None:
        if compiled is not None:
            compiled[16, 256](data)
        cuda.synchronize()

    def right() -> bool:
        before = data.copy_to_host()[0]
        step()
        return float(data.copy_to_host()[0]) == before + (compiled is not None)

    return int(total), right, lambda: cuda.device_array(limit + MIB, dtype=numpy.uint8), CudaAPIError, step


def training(seconds: float, start_ns: int) -> dict[str, Any]:
    """Multiply matrices as a training does, from a moment on; return steps by second. 20 products in flight, then a wait."""
    import torch

    one = torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        one @ one
    torch.cuda.synchronize()
    late = (time.monotonic_ns() - start_ns) / 1e9
    while time.monotonic_ns() < start_ns:
        time.sleep(0.01)
    begun, steps = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        for _ in range(20):
            one @ one
        torch.cuda.synchronize()
        steps += 20
    return {"steps_per_second": steps / (time.monotonic() - begun), "late_seconds": max(0.0, late)}


def main(name: str, limit: int, seconds: float) -> None:
    """Probe, print."""
    begun = time.monotonic()
    found: dict[str, Any] = {}
    try:
        total, right, beyond, error, step = globals()[f"probe_{name}"](limit)
        found["start_seconds"] = round(time.monotonic() - begun, 2)
        found["total_mib"] = None if total is None else total // MIB
        found["result"] = "right" if right() else "wrong"
        try:
            held = beyond()
            found["refused"] = "not refused"
            del held
        except error as refused:
            text = str(refused).lower()
            found["refused"] = "out of memory" if "memory" in text else str(refused)[:200]
        found["after"] = "right" if right() else "wrong"
        for _ in range(3):
            step()
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            at = time.perf_counter()
            step()
            times.append((time.perf_counter() - at) * 1e3)
        found["step_ms"], found["steps"] = round(sorted(times)[len(times) // 2], 4), len(times)
    except Exception as failure:
        found["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "training":
        print(json.dumps(training(float(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
