"""NVML's answers that are lists, asked for with one call: nvidia-ml-py asks twice, and makes an object of every entry.

The agent asks these questions once a second for as long as a node lives. They go to the library that nvidia-ml-py has loaded.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

PROCESS = struct.Struct("@IQII")
"""nvmlProcessInfo_t (v2 and v3): pid, usedGpuMemory in bytes, gpuInstanceId, computeInstanceId."""
UTILIZATION = struct.Struct("@IQIIII")
"""nvmlProcessUtilizationSample_t: pid, timeStamp in us, smUtil in percent, memUtil, encUtil, decUtil."""
UNKNOWN_BYTES = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE."""
FIRST_ENTRIES = 32
TRIES = 8
"""So often a list may have outgrown the room for it."""


class Lists:
    """Asks for lists.

    Parameters
    ----------
    pynvml : module
        nvidia-ml-py, initialised.
    """

    def __init__(self, pynvml: Any):
        self._nvml = pynvml
        self._room: dict[int, Any] = {}
        """By the size of an entry: kept from question to question, and grown when it was too small."""

    def processes(self, handle: Any) -> dict[int, int]:
        """Return the bytes that each process with a context on a device holds there, by pid; 0 where the driver does not say."""
        ask = self._function("nvmlDeviceGetComputeRunningProcesses_v3")
        found = self._ask(PROCESS, lambda count, room: ask(handle, count, room))
        return {pid: used if used != UNKNOWN_BYTES else 0 for pid, used, _, _ in found}

    def utilization(self, handle: Any, seen_us: int) -> list[tuple[int, int, int]]:
        """Return (pid, percent, stamp in us) of the samples after `seen_us`; NVMLError NOT_FOUND where there is none."""
        ask, seen = self._function("nvmlDeviceGetProcessUtilization"), ctypes.c_ulonglong(seen_us)
        return [(pid, sm, stamp) for pid, stamp, sm, *_ in self._ask(UTILIZATION, lambda count, room: ask(handle, room, count, seen))]

    def _function(self, name: str) -> Callable[..., int]:
        try:
            return getattr(self._nvml.nvmlLib, name)
        except AttributeError:
            raise self._nvml.NVMLError(self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND) from None

    def _ask(self, entry: struct.Struct, ask: Callable[[Any, Any], int]) -> list[tuple[int, ...]]:
        result = self._nvml.NVML_ERROR_INSUFFICIENT_SIZE
        for _ in range(TRIES):
            if entry.size not in self._room:
                self._room[entry.size] = ctypes.create_string_buffer(FIRST_ENTRIES * entry.size)
            room = self._room[entry.size]
            count = ctypes.c_uint(len(room) // entry.size)
            result = ask(ctypes.byref(count), room)
            if not result:
                return list(entry.iter_unpack(room.raw[: count.value * entry.size]))
            if result != self._nvml.NVML_ERROR_INSUFFICIENT_SIZE:
                break
            # More may come until the next call.
            self._room[entry.size] = ctypes.create_string_buffer((2 * count.value + 5) * entry.size)
        raise self._nvml.NVMLError(result)
