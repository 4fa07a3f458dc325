"""One rank of data-parallel training: each step computes on its device and ends when its peer's has ended too. Run by test_two_ranks.py."""

from __future__ import annotations

import ctypes as c
import socket
import sys
import threading

from compute_client import PTX, ok

LAUNCHES_PER_STEP = 3


def main() -> None:
    """Compute until killed. Arguments: the device, the length of a GPU kernel in ns, the socket to the peer. A line in: the steps, out."""
    device, peer = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[3]))
    kernel_ns, steps = c.c_uint64(int(sys.argv[2])), 0
    cuda = c.CDLL("libcuda.so.1")
    context, module, function = c.c_void_p(), c.c_void_p(), c.c_void_p()
    ok(cuda.cuInit(0))
    ok(cuda.cuDevicePrimaryCtxRetain(c.byref(context), device))
    ok(cuda.cuCtxSetCurrent(context))
    ok(cuda.cuModuleLoadData(c.byref(module), PTX))
    ok(cuda.cuModuleGetFunction(c.byref(function), module, b"work_arg_ns"))
    parameters = (c.c_void_p * 1)(c.addressof(kernel_ns))
    print("ready", flush=True)
    sys.stdin.readline()

    def answer() -> None:
        for _ in sys.stdin:
            print(steps, flush=True)

    threading.Thread(target=answer, daemon=True).start()
    while True:
        for _ in range(LAUNCHES_PER_STEP):
            ok(cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, parameters, None))
        ok(cuda.cuCtxSynchronize())
        peer.send(b"x")
        if not peer.recv(1):
            return
        steps += 1


if __name__ == "__main__":
    main()
