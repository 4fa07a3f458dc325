"""Keeps a GPU busy without end: GPU kernels of a given length, memsets or copies. Run by bench/compute.py, with and without the limiter."""

from __future__ import annotations

import ctypes as c
import sys
import threading

PTX = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry work_arg_ns(.param .u64 ns)\n{\n ret;\n}\n\0"
MEMORY_BYTES = 3 << 30
LAUNCHES_PER_STEP = 50  # then it waits for the GPU, as a training step does


def ok(code: int) -> None:
    """Stop at the first error of the driver."""
    if code:
        sys.exit(f"CUDA error {code}")


def main() -> None:
    """Launch until stdin is closed. Arguments: the length of one GPU kernel in ns, then `memsets` or `copies` for those instead."""
    work = sys.argv[2] if len(sys.argv) > 2 else "kernels"
    kernel_ns = c.c_uint64(int(sys.argv[1]))
    cuda = c.CDLL("libcuda.so.1")
    context, module, function = c.c_void_p(), c.c_void_p(), c.c_void_p()
    ok(cuda.cuInit(0))
    ok(cuda.cuDevicePrimaryCtxRetain(c.byref(context), 0))
    ok(cuda.cuCtxSetCurrent(context))
    ok(cuda.cuModuleLoadData(c.byref(module), PTX))
    ok(cuda.cuModuleGetFunction(c.byref(function), module, b"work_arg_ns"))
    parameters = (c.c_void_p * 1)(c.addressof(kernel_ns))
    memory, size = c.c_uint64(), c.c_size_t(MEMORY_BYTES)
    if work != "kernels":
        ok(cuda.cuMemAlloc_v2(c.byref(memory), size))
    done = threading.Event()

    def step() -> None:
        if work == "kernels":
            ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, parameters, None))
        elif work == "memsets":
            ok(cuda.cuMemsetD8Async(memory, 0, size, None))
        else:
            half = c.c_size_t(MEMORY_BYTES // 2)
            ok(cuda.cuMemcpyDtoDAsync_v2(memory, c.c_uint64(memory.value + MEMORY_BYTES // 2), half, None))

    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    while not done.is_set():
        for _ in range(LAUNCHES_PER_STEP):
            step()
            if done.is_set():
                break
        ok(cuda.cuCtxSynchronize())


if __name__ == "__main__":
    main()
