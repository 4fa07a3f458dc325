"""NVML through nvidia-ml-py: the one gate to the driver, real or simulated."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nbgpu.models import Device
from nbgpu.quantities import GIB, MIB

from .nvml_lists import Lists
from .runtime import StartError

log = logging.getLogger("nbgpu.agent")
DEFAULT_RESERVE_BYTES = 2 * GIB
SAMPLE_MOST_US = 2_000_000
"""The agent asks once a second: who was not told of for longer had a pause."""


def driver_present() -> bool:
    """Return whether this machine has an NVIDIA driver (a kernel module, or WSL's)."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libnvidia-ml.so.1"))


def default_reserve_bytes(memory_bytes: int) -> int:
    """Return what a device keeps back when the admin says nothing: 2 GiB, on small devices 5 % of the memory."""
    return min(DEFAULT_RESERVE_BYTES, memory_bytes // 20 // MIB * MIB)


@dataclass(frozen=True)
class DeviceSample:
    """What NVML says of one device at one moment; memory in bytes, busy time in milli-GPU, both by host pid.

    `computed_ns` is the GPU time of each pid since the sample before.
    """

    memory: dict[int, int] = field(default_factory=dict[int, int])
    compute: dict[int, int] = field(default_factory=dict[int, int])
    used_bytes: int = 0
    computed_ns: dict[int, int] = field(default_factory=dict[int, int])
    error: str | None = None


class UtilSample(NamedTuple):
    """How busy one process kept the device, in percent, in the time until `stamp_us`."""

    pid: int
    percent: int
    stamp_us: int


def _plausible(samples: Iterable[UtilSample]) -> list[UtilSample]:
    return [sample for sample in samples if sample.pid and sample.percent <= 100]


def busy_milli(samples: Iterable[UtilSample]) -> dict[int, int]:
    """Return each process's mean over its samples, in milli-GPU."""
    sums: dict[int, tuple[int, int]] = {}
    for sample in _plausible(samples):
        total, count = sums.get(sample.pid, (0, 0))
        sums[sample.pid] = (total + sample.percent, count + 1)
    return {pid: total * 10 // count for pid, (total, count) in sums.items()}


def computed_ns(samples: Iterable[UtilSample], seen_us: int, known: Mapping[int, int]) -> dict[int, int]:
    """Return each process's GPU time since `seen_us`, the newest stamp before; nothing where there was none.

    A sample stands for the time since the next older stamp, whosever that was: too little rather than too much where the stamps of the
    processes differ. It is the mean since then, but of a process that NVML did not tell of then, of a part of that time that nobody knows:
    so the first sample of a process (`known` has the newest stamp of each before), or one after a pause of `SAMPLE_MOST_US`, counts for
    nothing.
    """
    samples = _plausible(samples)
    stamps = sorted({sample.stamp_us for sample in samples if sample.stamp_us > seen_us})
    since = dict(zip(stamps, [seen_us, *stamps], strict=False))
    found: dict[int, int] = {}
    for sample in samples:
        if seen_us and sample.stamp_us in since and sample.stamp_us - known.get(sample.pid, -SAMPLE_MOST_US) < SAMPLE_MOST_US:
            length_us = sample.stamp_us - since[sample.stamp_us]
            found[sample.pid] = found.get(sample.pid, 0) + length_us * sample.percent * 10
    return found


class Nvml:
    """The driver's library, loaded and initialised.

    Parameters
    ----------
    library : Path or None
        ``libnvidia-ml.so.1``; None = the one that the loader finds.
    simulated : bool
        It is the simulated driver's.
    """

    def __init__(self, library: Path | None, simulated: bool = True):
        if library is not None:
            # nvidia-ml-py opens "libnvidia-ml.so.1": the loader then finds this one, which has that name and is there already.
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                if not simulated:
                    raise StartError(f"The NVIDIA driver's {library} cannot be loaded: {error}.") from None
                raise StartError(f"The simulated driver cannot be loaded: {error}. Build it again with `make setup`.") from None
        import pynvml  # pyright: ignore[reportMissingTypeStubs]

        self._nvml: Any = pynvml
        self._lists = Lists(pynvml)
        self._seen: dict[str, int] = {}
        self._known: dict[str, dict[int, int]] = {}
        """By device: the newest stamp of each process that NVML told of, us."""
        self._handles: dict[str, Any] = {}
        self.count = 0
        """GPUs that the driver shows, chosen or not."""
        try:
            pynvml.nvmlInit()
            version: Any = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError as error:
            if library is not None and simulated:
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
            memory = self._lists.processes(handle)
            used_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
            compute, computed_ns = self._compute(uuid, handle)
            return DeviceSample(memory, compute, used_bytes, computed_ns)
        except nvml.NVMLError as error:
            return DeviceSample(error=str(error))

    def held(self, uuid: str) -> dict[int, int] | None:
        """Return what processes hold of a device, bytes by pid; None when the driver does not answer."""
        try:
            return dict(self._lists.processes(self._handles[uuid]))
        except self._nvml.NVMLError:
            return None

    def room(self, uuid: str, pids: Collection[int]) -> tuple[int, int] | None:
        """Return (free bytes of a device, bytes that some processes hold there); None when the driver does not answer."""
        nvml, handle = self._nvml, self._handles[uuid]
        try:
            held = self._lists.processes(handle)
            free = int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
        except nvml.NVMLError:
            return None
        return free, sum(size for pid, size in held.items() if pid in pids)

    def has_limits(self, uuid: str) -> bool:
        """Return whether a device can limit memory by cgroup: the question about one that cannot have a limit is answered otherwise."""
        nvml = self._nvml
        try:
            nvml.nvmlDeviceGetMemoryLimits_v1(self._handles[uuid], nvml.c_nvmlGetMemoryLimits_v1_t(b"/sys/fs/cgroup"))
        except nvml.NVMLError as error:
            return error.value not in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return True

    def set_limit(self, uuid: str, cgroup: Path, limit_bytes: int | None) -> str | None:
        """Set what the processes of a cgroup may hold of a device, None = no limit; return what went wrong."""
        nvml = self._nvml
        soft, hard = (0, nvml.NVML_DEVICE_MEMORY_LIMIT_MAX) if limit_bytes is None else (limit_bytes, limit_bytes)
        try:
            nvml.nvmlDeviceSetMemoryLimits_v1(self._handles[uuid], nvml.c_nvmlSetMemoryLimits_v1_t(os.fsencode(cgroup), soft, hard))
        except nvml.NVMLError as error:
            return str(error)
        return None

    def _compute(self, uuid: str, handle: Any) -> tuple[dict[int, int], dict[int, int]]:
        nvml, seen = self._nvml, self._seen.get(uuid, 0)
        try:
            told = [UtilSample(*sample) for sample in self._lists.utilization(handle, seen)]
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_NOT_SUPPORTED):
                return {}, {}
            raise
        known = self._known.get(uuid, {})
        computed = computed_ns(told, seen, known)
        self._seen[uuid] = seen = max([seen, *(sample.stamp_us for sample in told)])
        stamps = known | {sample.pid: sample.stamp_us for sample in sorted(told, key=lambda sample: sample.stamp_us)}
        self._known[uuid] = {pid: stamp for pid, stamp in stamps.items() if seen - stamp < SAMPLE_MOST_US}
        return busy_milli(told), computed


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
