"""NVML's lists, asked for with one call: what nvidia-ml-py says of the same library, and lists that grow meanwhile."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pynvml  # pyright: ignore[reportMissingTypeStubs]
import pytest

from nbgpu_agent.nvml_lists import PROCESS, UTILIZATION, Lists

NVML: Any = pynvml


class Driver:
    """A library that has `count` entries, and more at each call where it grows."""

    def __init__(self, count: int, growth: float = 1, result: int = 0):
        self.count, self.growth, self.result = count, growth, result
        self.calls = 0

    def _answer(self, kind: Any, count: Any, room: Any, fill: Any) -> int:
        self.calls += 1
        if self.result:
            return self.result
        had, count._obj.value = count._obj.value, self.count
        if had < self.count:
            self.count = int(self.count * self.growth)
            return NVML.NVML_ERROR_INSUFFICIENT_SIZE
        entries = (kind * self.count).from_buffer(room)
        for number, entry in enumerate(entries):
            fill(entry, number)
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, room: Any) -> int:
        def fill(entry: Any, number: int) -> None:
            entry.pid, entry.usedGpuMemory = 100 + number, 2**64 - 1 if number == 1 else number << 30
            entry.gpuInstanceId = entry.computeInstanceId = 2**32 - 1

        return self._answer(NVML.c_nvmlProcessInfo_v3_t, count, room, fill)

    def nvmlDeviceGetProcessUtilization(self, handle: Any, room: Any, count: Any, seen: Any) -> int:
        def fill(entry: Any, number: int) -> None:
            entry.pid, entry.timeStamp, entry.smUtil, entry.decUtil = 100 + number, seen.value + number, 7, 9

        return self._answer(NVML.c_nvmlProcessUtilizationSample_t, count, room, fill)


def lists(driver: object) -> Lists:
    """Return `Lists` that ask this library."""
    names = "NVMLError", "NVML_ERROR_INSUFFICIENT_SIZE", "NVML_ERROR_FUNCTION_NOT_FOUND"
    return Lists(SimpleNamespace(nvmlLib=driver, **{name: getattr(NVML, name) for name in names}))


def test_the_entries_are_as_large_as_the_librarys() -> None:
    assert PROCESS.size == ctypes.sizeof(NVML.c_nvmlProcessInfo_v3_t)
    assert UTILIZATION.size == ctypes.sizeof(NVML.c_nvmlProcessUtilizationSample_t)


@pytest.mark.parametrize("count", [0, 1, 3, 31, 32, 33, 500])
def test_every_entry_is_read(count: int) -> None:
    driver = Driver(count)
    asked = lists(driver)
    assert asked.processes(None) == {100 + n: 0 if n == 1 else n << 30 for n in range(count)}
    assert asked.utilization(None, 5) == [(100 + n, 7, 5 + n) for n in range(count)]
    calls = driver.calls
    assert asked.processes(None).keys() == dict.fromkeys(range(100, 100 + count)).keys()
    assert len(asked.utilization(None, 5)) == count
    assert driver.calls == calls + 2, "the room is kept: one call a question"


def test_a_list_that_grows_while_it_is_asked_for() -> None:
    driver = Driver(40, growth=1.8)
    asked = lists(driver)
    assert len(asked.processes(None)) == 72
    assert driver.calls == 2


def test_a_list_that_outgrows_every_room_is_an_error_and_no_endless_loop() -> None:
    driver = Driver(40, growth=5)
    with pytest.raises(NVML.NVMLError_InsufficientSize):
        lists(driver).processes(None)


def test_what_the_driver_refuses_is_its_error() -> None:
    for code, kind in ((NVML.NVML_ERROR_NOT_FOUND, NVML.NVMLError_NotFound), (NVML.NVML_ERROR_GPU_IS_LOST, NVML.NVMLError_GpuIsLost)):
        with pytest.raises(kind):
            lists(Driver(1, result=code)).utilization(None, 0)
    with pytest.raises(NVML.NVMLError_FunctionNotFound):
        lists(object()).processes(None)
