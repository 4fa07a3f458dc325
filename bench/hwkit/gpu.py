"""libcuda by ctypes, for the kit's own programs: nothing but Python and the driver."""

from __future__ import annotations

import ctypes as c
import time
from typing import Any

from . import ptx

OUT_OF_MEMORY = 2
THREADS = 256


class CudaError(Exception):
    """A call that did not return CUDA_SUCCESS."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} returned {code}")
        self.code = code


class Gpu:
    """One device with its primary context; GPU kernels once `load` was called."""

    def __init__(self) -> None:
        self.lib = c.CDLL("libcuda.so.1")
        begun = time.monotonic()
        self.call("cuInit", 0)
        self.init_seconds = time.monotonic() - begun
        begun = time.monotonic()
        self.context = c.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", c.byref(self.context), 0)
        self.call("cuCtxSetCurrent", self.context)
        self.context_seconds = time.monotonic() - begun
        self.functions: dict[str, c.c_void_p] = {}
        self.target = ""

    def code(self, name: str, *arguments: Any) -> int:
        """Call by name; return the CUresult."""
        return int(getattr(self.lib, name)(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call by name; raise what is not CUDA_SUCCESS."""
        code = self.code(name, *arguments)
        if code:
            raise CudaError(name, code)

    def attribute(self, number: int) -> int:
        """Return a device attribute."""
        value = c.c_int()
        self.call("cuDeviceGetAttribute", c.byref(value), number, 0)
        return value.value

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        return self.attribute(16)

    def load(self) -> str:
        """Load the GPU kernels; return the target that the driver took."""
        last = 0
        for version, target in ptx.TARGETS:
            module = c.c_void_p()
            last = self.code("cuModuleLoadData", c.byref(module), ptx.text(version, target))
            if last:
                continue
            for name in ("work_arg_ns", "gaps_arg_ns", "nothing"):
                function = c.c_void_p()
                self.call("cuModuleGetFunction", c.byref(function), module, name.encode())
                self.functions[name] = function
            self.target = f"PTX {version}, {target}"
            return self.target
        raise CudaError("cuModuleLoadData", last)

    def launch(self, name: str, *values: int, blocks: int = 1, threads: int = THREADS) -> None:
        """Launch with unsigned 64-bit parameters, on the default stream."""
        boxes = [c.c_uint64(value) for value in values]
        parameters = (c.c_void_p * max(1, len(boxes)))(*[c.addressof(box) for box in boxes])
        self.call("cuLaunchKernel", self.functions[name], blocks, 1, 1, threads, 1, 1, 0, None, parameters, None)

    def wait(self) -> None:
        """Wait until the device has done everything."""
        self.call("cuCtxSynchronize")

    def event(self) -> c.c_void_p:
        """Return a new event."""
        event = c.c_void_p()
        self.call("cuEventCreate", c.byref(event), 0)
        return event

    def elapsed_ms(self, start: c.c_void_p, end: c.c_void_p) -> float:
        """Return the time between two events."""
        ms = c.c_float()
        self.call("cuEventElapsedTime", c.byref(ms), start, end)
        return ms.value

    def alloc(self, size: int) -> tuple[int, int]:
        """Return (CUresult, address)."""
        pointer = c.c_uint64()
        return self.code("cuMemAlloc_v2", c.byref(pointer), c.c_size_t(size)), pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", c.c_uint64(pointer))

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes, as cuMemGetInfo says."""
        free, total = c.c_size_t(), c.c_size_t()
        self.call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
        return free.value, total.value

    def read(self, pointer: int, size: int) -> bytes:
        """Copy from the device."""
        buffer = c.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", buffer, c.c_uint64(pointer), c.c_size_t(size))
        return buffer.raw

    def calibrate(self, blocks: int) -> float:
        """Return how many ns one round of `work_arg_ns` takes on this grid, nobody else computing: the median of 9 of about 4 ms."""
        start, end = self.event(), self.event()
        rounds, ns = 20_000, 0.0
        warm = time.monotonic() + 0.3  # clocks rise with work
        seen: list[float] = []
        while len(seen) < 9:
            self.call("cuEventRecord", start, None)
            self.launch("work_arg_ns", rounds, blocks=blocks)
            self.call("cuEventRecord", end, None)
            self.wait()
            ns = self.elapsed_ms(start, end) * 1e6 / rounds
            rounds = max(1000, min(int(4e6 / max(ns, 0.01)), 50_000_000))
            if time.monotonic() > warm:
                seen.append(ns)
        return sorted(seen)[len(seen) // 2]
