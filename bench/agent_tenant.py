"""A process for bench/agent.py: allocates on one GPU through libcuda by ctypes, and says when.

Reads commands from stdin: ``alloc BYTES`` -> "CUresult MONOTONIC_NS" at its return, ``free`` -> "0 MONOTONIC_NS". Between commands it
allocates and frees 16 MiB once a second.
"""

from __future__ import annotations

import ctypes
import select
import sys
import time

STEP_BYTES = 16 * 1024**2
cuda = ctypes.CDLL("libcuda.so.1")


def check(result: int, call: str) -> None:
    """End with a plain line unless `call` succeeded."""
    if result:
        raise SystemExit(f"{call} returned {result}")


def allocate(size: int) -> tuple[int, int]:
    """Return (CUresult, address)."""
    address = ctypes.c_uint64()
    return cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)), address.value


def free(address: int) -> None:
    """Free a block."""
    check(cuda.cuMemFree_v2(ctypes.c_uint64(address)), "cuMemFree")


def main(index: int) -> None:
    """Obey stdin until it closes."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(cuda.cuInit(0), "cuInit")
    check(cuda.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    held = 0
    print("ready", flush=True)
    while True:
        if not select.select([sys.stdin], [], [], 1.0)[0]:
            result, address = allocate(STEP_BYTES)
            if result == 0:
                free(address)
            continue
        words = sys.stdin.readline().split()
        if not words:
            return
        result = 0
        if words[0] == "alloc":
            result, address = allocate(int(words[1]))
            held = address if result == 0 else held
        elif held:
            free(held)
            held = 0
        print(result, time.monotonic_ns(), flush=True)


main(int(sys.argv[1]))
