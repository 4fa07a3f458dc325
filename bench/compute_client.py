"""A program that keeps a GPU busy: GPU kernels of a given length, without end. Run by bench/compute.py, with and without the limiter."""

from __future__ import annotations

import ctypes as c
import sys
import threading

PTX = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry work_arg_ns(.param .u64 ns)\n{\n ret;\n}\n\0"
LAUNCHES_PER_STEP = 50  # then it waits for the GPU, as a training step does


def ok(code: int) -> None:
    """Stop at the first error of the driver."""
    if code:
        sys.exit(f"CUDA error {code}")


def main() -> None:
    """Launch until stdin is closed. Argument: the length of one GPU kernel in ns."""
    kernel_ns = c.c_uint64(int(sys.argv[1]))
    cuda = c.CDLL("libcuda.so.1")
    context, module, function = c.c_void_p(), c.c_void_p(), c.c_void_p()
    ok(cuda.cuInit(0))
    ok(cuda.cuDevicePrimaryCtxRetain(c.byref(context), 0))
    ok(cuda.cuCtxSetCurrent(context))
    ok(cuda.cuModuleLoadData(c.byref(module), PTX))
    ok(cuda.cuModuleGetFunction(c.byref(function), module, b"work_arg_ns"))
    parameters = (c.c_void_p * 1)(c.addressof(kernel_ns))
    done = threading.Event()
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    while not done.is_set():
        for _ in range(LAUNCHES_PER_STEP):
            ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, parameters, None))
            if done.is_set():
                break
        ok(cuda.cuCtxSynchronize())


if __name__ == "__main__":
    main()
