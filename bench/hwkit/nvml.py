"""NVML by ctypes: what the kit itself asks the driver, from outside every slice."""

from __future__ import annotations

import ctypes as c
import os
from dataclasses import dataclass
from typing import Any

NO_SUCH_FUNCTION, NOT_FOUND, NOT_SUPPORTED = -1, 6, 3


class NvmlError(Exception):
    """A call that did not succeed, or a function that this driver does not have."""

    def __init__(self, call: str, code: int) -> None:
        what = "this driver does not have it" if code == NO_SUCH_FUNCTION else f"error {code}"
        super().__init__(f"{call}: {what}")
        self.code = code


class _Memory(c.Structure):
    _fields_ = [("total", c.c_ulonglong), ("free", c.c_ulonglong), ("used", c.c_ulonglong)]


class _Process(c.Structure):
    _fields_ = [("pid", c.c_uint), ("used", c.c_ulonglong), ("gpu_instance", c.c_uint), ("compute_instance", c.c_uint)]


class _Sample(c.Structure):
    _fields_ = [
        ("pid", c.c_uint),
        ("us", c.c_ulonglong),
        ("sm", c.c_uint),
        ("memory", c.c_uint),
        ("encoder", c.c_uint),
        ("decoder", c.c_uint),
    ]


class _Limits(c.Structure):
    _fields_ = [("cgroup", c.c_char_p), ("soft", c.c_ulonglong), ("hard", c.c_ulonglong), ("used", c.c_ulonglong)]


class _Utilization(c.Structure):
    _fields_ = [("gpu", c.c_uint), ("memory", c.c_uint)]


@dataclass(frozen=True)
class Sample:
    """How busy a process kept the device, by NVML: percent, and when that was taken (microseconds of the clock on the wall)."""

    pid: int
    us: int
    percent: int


class Nvml:
    """The library and one device of it."""

    def __init__(self, index: int = 0, library: str = "libnvidia-ml.so.1") -> None:
        self._lib = c.CDLL(library)
        self._call("nvmlInit_v2")
        self._device = c.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", index, c.byref(self._device))

    def has(self, name: str) -> bool:
        """Return whether this driver exports a function."""
        return hasattr(self._lib, name)

    def limits_memory(self) -> bool | None:
        """Return whether the driver limits cgroups, by its answer about one that cannot have a limit; None: it does not know the call."""
        if not self.has("nvmlDeviceGetMemoryLimits_v1"):
            return None
        question = _Limits(b"/sys/fs/cgroup")
        return int(self._lib.nvmlDeviceGetMemoryLimits_v1(self._device, c.byref(question))) != NOT_SUPPORTED

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._lib, name, None)
        code = NO_SUCH_FUNCTION if function is None else int(function(*arguments))
        if code:
            raise NvmlError(name, code)

    def text(self, name: str, *, of_device: bool = True) -> str:
        """Return what a function that fills a text says."""
        buffer = c.create_string_buffer(128)
        self._call(name, *([self._device] if of_device else []), buffer, 128)
        return buffer.value.decode(errors="replace")

    def number(self, name: str, *arguments: Any) -> int | None:
        """Return what a function that fills a number says; None where the driver does not answer it."""
        value = c.c_uint()
        try:
            self._call(name, self._device, *arguments, c.byref(value))
        except NvmlError:
            return None
        return value.value

    def pair(self, name: str) -> tuple[int, int] | None:
        """Return what a function that fills two numbers says; None where the driver does not answer it."""
        one, two = c.c_uint(), c.c_uint()
        try:
            self._call(name, self._device, c.byref(one), c.byref(two))
        except NvmlError:
            return None
        return one.value, two.value

    def count(self) -> int:
        """Return how many devices there are."""
        value = c.c_uint()
        self._call("nvmlDeviceGetCount_v2", c.byref(value))
        return value.value

    def memory(self) -> tuple[int, int]:
        """Return used and total bytes of the device."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._device, c.byref(memory))
        return memory.used, memory.total

    def processes(self) -> dict[int, int]:
        """Return bytes by pid of the processes that hold the device."""
        count = c.c_uint(256)
        rows = (_Process * 256)()
        self._call("nvmlDeviceGetComputeRunningProcesses_v3", self._device, c.byref(count), rows)
        most = 2**63
        return {row.pid: row.used if row.used < most else 0 for row in rows[: count.value]}

    def samples(self, since_us: int) -> list[Sample]:
        """Return the utilisation samples of processes newer than a time."""
        count = c.c_uint(1024)
        rows = (_Sample * 1024)()
        try:
            self._call("nvmlDeviceGetProcessUtilization", self._device, rows, c.byref(count), c.c_ulonglong(since_us))
        except NvmlError as error:
            if error.code in (NOT_FOUND, NOT_SUPPORTED):
                return []
            raise
        return [Sample(row.pid, row.us, row.sm) for row in rows[: count.value] if row.pid and row.us]

    def busy_percent(self) -> int:
        """Return the device's utilisation."""
        value = _Utilization()
        self._call("nvmlDeviceGetUtilizationRates", self._device, c.byref(value))
        return value.gpu


def open_nvml(index: int) -> Nvml:
    """Return NVML; the simulated one where NBGPU_HW_NVML names it."""
    return Nvml(index, os.environ.get("NBGPU_HW_NVML") or "libnvidia-ml.so.1")
