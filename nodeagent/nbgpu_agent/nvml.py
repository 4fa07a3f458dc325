"""NVML through nvidia-ml-py: the one gate to the driver, real or simulated."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbgpu.models import Device
from nbgpu.quantities import GIB, MIB

from .runtime import StartError

log = logging.getLogger("nbgpu.agent")
DEFAULT_RESERVE_BYTES = 2 * GIB


def driver_present() -> bool:
    """Return whether this machine has an NVIDIA driver (a kernel module, or WSL's)."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libnvidia-ml.so.1"))


def default_reserve_bytes(memory_bytes: int) -> int:
    """Return what a device keeps back when the admin says nothing: 2 GiB, on small devices 5 % of the memory."""
    return min(DEFAULT_RESERVE_BYTES, memory_bytes // 20 // MIB * MIB)


@dataclass(frozen=True)
class DeviceSample:
    """What NVML says of one device at one moment; memory in bytes, busy time in milli-GPU, both by host pid."""

    memory: dict[int, int] = field(default_factory=dict[int, int])
    compute: dict[int, int] = field(default_factory=dict[int, int])
    used_bytes: int = 0
    error: str | None = None


class Nvml:
    """The driver's library, loaded and initialised.

    Parameters
    ----------
    simulated_library : Path or None
        The simulated ``libnvidia-ml.so.1``; None = the machine's own.
    """

    def __init__(self, simulated_library: Path | None):
        if simulated_library is not None:
            # nvidia-ml-py opens "libnvidia-ml.so.1": the loader then finds this one, which has that name and is there already.
            try:
                ctypes.CDLL(str(simulated_library), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise StartError(f"The simulated driver cannot be loaded: {error}. Build it again with `make setup`.") from None
        import pynvml  # pyright: ignore[reportMissingTypeStubs]

        self._nvml: Any = pynvml
        self._seen: dict[str, int] = {}
        self._handles: dict[str, Any] = {}
        self.count = 0
        """GPUs that the driver shows, chosen or not."""
        try:
            pynvml.nvmlInit()
            version: Any = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError as error:
            if simulated_library is not None:
                state = os.environ.get("NBGPU_SIM_STATE", "")
                remedy = "Another version of nbgpu has made it: name another file, or remove it once nothing uses it."
                raise StartError(f"The simulated machine in {state} cannot be used ({error}). {remedy}") from None
            raise StartError(f"The NVIDIA driver does not answer: {error}. `nvidia-smi` should say the same.") from None
        self.driver_version = _text(version)

    def devices(self, node: str, simulated: bool, reserve_bytes: int | None, selector: str) -> list[Device]:
        """Return the devices that `selector` names ("all", or indexes and UUIDs with commas between)."""
        nvml = self._nvml
        found: list[Device] = []
        self.count = int(nvml.nvmlDeviceGetCount())
        lost: set[int] = set()
        for index in range(self.count):
            try:
                handle: Any = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
                model = _text(nvml.nvmlDeviceGetName(handle))
            except nvml.NVMLError as error:
                log.error("GPU %d does not answer (%s): it is left out until the agent starts anew", index, error)
                lost.add(index)
                continue
            reserve = default_reserve_bytes(memory_bytes) if reserve_bytes is None else reserve_bytes
            if reserve >= memory_bytes:
                raise StartError(f"GPU {index} has {memory_bytes // MIB} MiB; a reserve of {reserve // MIB} MiB leaves nothing.")
            self._handles[uuid] = handle
            found.append(
                Device(
                    uuid=uuid,
                    index=index,
                    model=model,
                    node=node,
                    memory_bytes=memory_bytes,
                    reserve_bytes=reserve,
                    simulated=simulated,
                )
            )
        return select(found, selector, lost)

    def sample(self, uuid: str) -> DeviceSample:
        """Return what runs on a device now; an error of the driver is in the answer, never raised."""
        nvml, handle = self._nvml, self._handles[uuid]
        try:
            processes: list[Any] = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
            memory = {int(process.pid): int(process.usedGpuMemory or 0) for process in processes}
            used_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
            return DeviceSample(memory, self._compute(uuid, handle), used_bytes)
        except nvml.NVMLError as error:
            return DeviceSample(error=str(error))

    def room(self, uuid: str, pids: Collection[int]) -> tuple[int, int] | None:
        """Return (free bytes of a device, bytes that some processes hold there); None when the driver does not answer."""
        nvml, handle = self._nvml, self._handles[uuid]
        try:
            processes: list[Any] = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
            free = int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
        except nvml.NVMLError:
            return None
        return free, sum(int(process.usedGpuMemory or 0) for process in processes if int(process.pid) in pids)

    def _compute(self, uuid: str, handle: Any) -> dict[int, int]:
        nvml = self._nvml
        try:
            samples: list[Any] = nvml.nvmlDeviceGetProcessUtilization(handle, self._seen.get(uuid, 0))
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_NOT_SUPPORTED):
                return {}
            if error.value == nvml.NVML_SUCCESS:  # nvidia-ml-py raises this when there is no sample
                return {}
            raise
        sums: dict[int, tuple[int, int]] = {}
        for sample in samples:
            pid, percent = int(sample.pid), int(sample.smUtil)
            if pid and percent <= 100:
                total, count = sums.get(pid, (0, 0))
                sums[pid] = (total + percent, count + 1)
            self._seen[uuid] = max(self._seen.get(uuid, 0), int(sample.timeStamp))
        return {pid: total * 10 // count for pid, (total, count) in sums.items()}


def select(devices: list[Device], selector: str, lost: Collection[int] = ()) -> list[Device]:
    """Return the devices that `selector` names; StartError for a name that is none of them, nor can be one of the `lost` indexes."""
    if selector.strip().lower() == "all":
        return devices
    chosen: list[Device] = []
    for name in filter(None, (word.strip() for word in selector.split(","))):
        found = [device for device in devices if name in (str(device.index), device.uuid)]
        if not found and lost and (not name.isdecimal() or int(name) in lost):
            log.warning("--devices names %s, which may be the GPU that does not answer", name)
            continue
        if not found:
            raise StartError(
                f"--devices names {name!r}; this machine has GPUs 0 to {len(devices) + len(lost) - 1}, or name one by its UUID."
            )
        chosen += [device for device in found if device not in chosen]
    if not chosen and not lost:
        raise StartError("--devices names no GPU: give indexes or UUIDs with commas between, or `all`.")
    return chosen


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
