"""A light notebook server that holds its slice to the last block and keeps testing its limit and the GPU; answers the hub.

Before it answers at all it takes every block that it gets. Then, five times a second, it gives one back, takes it again, is
refused one more, and runs a GPU kernel. Whatever goes otherwise is told at ``/probe``.
"""

import ctypes as c
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from spawn_server import serve

BLOCK = 256 * 1024**2
OUT_OF_MEMORY = 2
PTX = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry work_arg_ns(.param .u64 ns)\n{\n ret;\n}\n\0"
cuda = c.CDLL("libcuda.so.1")
state = {"pid": os.getpid(), "total": 0, "held": 0, "beats": 0, "surprises": []}
blocks: list[c.c_uint64] = []


def call(name: str, *arguments: object) -> None:
    status = getattr(cuda, name)(*arguments)
    if status:
        raise SystemExit(f"{name}: {status}")


def allocate() -> int:
    block = c.c_uint64()
    status = cuda.cuMemAlloc_v2(c.byref(block), c.c_size_t(BLOCK))
    if status == 0:
        blocks.append(block)
    state["held"] = len(blocks) * BLOCK
    return status


def surprise(what: str) -> None:
    if len(state["surprises"]) < 20:
        state["surprises"].append(f"{time.time():.3f} {what}")


def start() -> c.c_void_p:
    """Return a GPU kernel, once all memory is taken."""
    context, module, function = c.c_void_p(), c.c_void_p(), c.c_void_p()
    free, total = c.c_size_t(), c.c_size_t()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", c.byref(context), 0)
    call("cuCtxSetCurrent", context)
    call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
    call("cuModuleLoadData", c.byref(module), PTX)
    call("cuModuleGetFunction", c.byref(function), module, b"work_arg_ns")
    state["total"] = total.value
    while (status := allocate()) == 0:
        pass
    if status != OUT_OF_MEMORY:
        surprise(f"the first refusal was {status}")
    return function


def beat(function: c.c_void_p) -> None:
    context = c.c_void_p()
    call("cuDevicePrimaryCtxRetain", c.byref(context), 0)
    call("cuCtxSetCurrent", context)
    length = c.c_uint64(200_000)
    parameters = (c.c_void_p * 1)(c.addressof(length))
    while True:
        time.sleep(0.2)
        if status := cuda.cuMemFree_v2(blocks.pop()):
            surprise(f"free: {status}")
        if status := allocate():
            surprise(f"its own block back: {status}")
        if (status := allocate()) != OUT_OF_MEMORY:
            surprise(f"one block beyond the limit: {status}")
        if status := cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, parameters, None) or cuda.cuCtxSynchronize():
            surprise(f"launch: {status}")
        state["beats"] += 1


if __name__ == "__main__":
    threading.Thread(target=beat, args=(start(),), daemon=True).start()
    serve(lambda: state)
