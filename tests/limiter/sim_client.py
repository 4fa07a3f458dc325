"""A thin ctypes view of libcuda for programs that tests start: no packages needed, errors become exceptions."""

from __future__ import annotations

import ctypes as c
from typing import Any

OUT_OF_MEMORY, NOT_READY, OPERATING_SYSTEM, NOT_SUPPORTED = 2, 600, 304, 801


class Memory(c.Structure):
    """NVML's nvmlMemory_t."""

    _fields_ = [("total", c.c_ulonglong), ("free", c.c_ulonglong), ("used", c.c_ulonglong)]


class CudaError(Exception):
    """A call that did not return CUDA_SUCCESS."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} returned {code}")
        self.code = code


class Cuda:
    """The calls of libcuda, with a primary context made current."""

    def __init__(self, ordinal: int = 0) -> None:
        self.lib = c.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        self.context = c.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", c.byref(self.context), ordinal)
        self.call("cuCtxSetCurrent", self.context)
        self.module = c.c_void_p()
        self.call("cuModuleLoadData", c.byref(self.module), b"simulated")

    def call(self, name: str, *arguments: Any) -> None:
        """Call by name; raise what is not CUDA_SUCCESS."""
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise CudaError(name, code)

    def make(self, name: str, *arguments: Any) -> c.c_void_p:
        """Call something that writes a handle through its first parameter."""
        handle = c.c_void_p()
        self.call(name, c.byref(handle), *arguments)
        return handle

    def alloc(self, size: int) -> c.c_uint64:
        """Device memory of so many bytes."""
        pointer = c.c_uint64()
        self.call("cuMemAlloc_v2", c.byref(pointer), c.c_size_t(size))
        return pointer

    def free(self, pointer: c.c_uint64) -> None:
        """Give it back."""
        self.call("cuMemFree_v2", pointer)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = c.c_size_t(), c.c_size_t()
        self.call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
        return free.value, total.value

    def function(self, name: str) -> c.c_void_p:
        """A GPU kernel by name."""
        return self.make("cuModuleGetFunction", self.module, name.encode())

    def launch(self, function: c.c_void_p, stream: c.c_void_p | None = None, *, first: int | None = None) -> None:
        """One block; `first` is the first parameter."""
        value = c.c_uint64(first or 0)
        params = (c.c_void_p * 1)(c.cast(c.byref(value), c.c_void_p))
        self.call("cuLaunchKernel", function, 1, 1, 1, 32, 1, 1, 0, stream, params, None)

    def event(self) -> c.c_void_p:
        """A new event."""
        return self.make("cuEventCreate", 0)

    def elapsed_ms(self, start: c.c_void_p, end: c.c_void_p) -> float:
        """Device time between two events."""
        ms = c.c_float()
        self.call("cuEventElapsedTime", c.byref(ms), start, end)
        return ms.value

    def write(self, pointer: c.c_uint64, data: bytes) -> None:
        """Copy to the device."""
        self.call("cuMemcpyHtoD_v2", pointer, data, c.c_size_t(len(data)))

    def read(self, pointer: c.c_uint64, size: int) -> bytes:
        """Copy from the device."""
        buffer = c.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", buffer, pointer, c.c_size_t(size))
        return buffer.raw
