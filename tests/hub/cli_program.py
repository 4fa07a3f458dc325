"""A program for `nbgpu run`: does what its lines of standard input say, through the CUDA driver alone, and answers each with one line.

``total``, ``alloc BYTES``, ``free`` (all), ``info``, ``env NAME``, ``exit CODE``.
"""

from __future__ import annotations

import ctypes
import os
import sys


class Gpu:
    """The first device, through libcuda.so.1."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.context = ctypes.c_void_p()
        self.blocks: list[ctypes.c_uint64] = []
        for code in (
            self.cuda.cuInit(0),
            self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), 0),
            self.cuda.cuCtxSetCurrent(self.context),
        ):
            if code:
                raise SystemExit(f"CUDA error {code}")

    def total(self) -> int:
        """Return the device's memory in bytes."""
        size = ctypes.c_size_t()
        self.cuda.cuDeviceTotalMem_v2(ctypes.byref(size), 0)
        return size.value

    def alloc(self, size: int) -> int:
        """Allocate; return the driver's error code."""
        block = ctypes.c_uint64()
        code = self.cuda.cuMemAlloc_v2(ctypes.byref(block), ctypes.c_size_t(size))
        if code == 0:
            self.blocks.append(block)
        return code

    def free(self) -> int:
        """Free every block; return how many there were."""
        count = len(self.blocks)
        for block in self.blocks:
            self.cuda.cuMemFree_v2(block)
        self.blocks.clear()
        return count


def main() -> None:
    """Obey."""
    gpu = Gpu()
    print("ready", flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "exit":
            sys.exit(int(rest))
        answers = {
            "total": gpu.total,
            "alloc": lambda rest=rest: gpu.alloc(int(rest)),
            "free": gpu.free,
            "env": lambda rest=rest: os.environ.get(rest, ""),
        }
        print(answers[word](), flush=True)


if __name__ == "__main__":
    main()
