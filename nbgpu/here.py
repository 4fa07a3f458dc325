"""``nbgpu.slice()``: the slice that a program runs in, as numbers; asked of the node agent over the slice's own socket."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .client import SliceClient
from .errors import NbgpuError
from .models import Usage

TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class KernelNumbers:
    """What this notebook kernel holds of one device, and its own limits there; None = the slice's."""

    memory_used_bytes: int
    memory_peak_bytes: int
    memory_limit_bytes: int | None
    compute_used_milli: int
    compute_limit_milli: int | None


@dataclass(frozen=True)
class DeviceNumbers:
    """The slice's part of one device, now. 1000 milli are all of the device's time."""

    uuid: str
    index: int
    model: str
    memory_limit_bytes: int
    memory_used_bytes: int
    memory_free_bytes: int
    """What this program could still allocate: below the slice's limit, and below its kernel's own where it has one."""
    compute_limit_milli: int
    compute_used_milli: int
    kernel: KernelNumbers | None
    """None where this is no notebook kernel, or one that has not used the device and has no limit."""


@dataclass(frozen=True)
class SliceNumbers:
    """A slice of a GPU, now."""

    slice_id: str
    mode: str
    """``strict``: never more than its share of time; ``burst``: more while others are idle."""
    simulated: bool
    time: float
    """Unix time, seconds."""
    devices: tuple[DeviceNumbers, ...]

    @property
    def memory_limit_bytes(self) -> int:
        """Of all its devices together."""
        return sum(device.memory_limit_bytes for device in self.devices)

    @property
    def memory_used_bytes(self) -> int:
        """Of all its devices together."""
        return sum(device.memory_used_bytes for device in self.devices)

    @property
    def memory_free_bytes(self) -> int:
        """Of all its devices together; one allocation lies on one device."""
        return sum(device.memory_free_bytes for device in self.devices)


def no_slice() -> NbgpuError:
    """Return what is said where a program runs in none."""
    if os.environ.get("JUPYTERHUB_USER"):
        words = (
            "This server has no GPU slice. Stop it (File > Hub Control Panel, Stop My Server), and choose a fraction of a GPU when you "
            "start it again; your files stay, what is in the memory of kernels does not."
        )
    else:
        words = "No GPU slice here: this process was not started inside one. Start the program by `nbgpu run --gpu 1/4 -- ...`."
    return NbgpuError(
        words,
        code="no-slice",
        status=404,
    )


def slice() -> SliceNumbers:
    """Return the slice that this program runs in, and what is used of it now.

    Raises
    ------
    NbgpuError
        It runs in none (code ``no-slice``), or the node agent does not answer (limits stay in force).
    """
    socket_path = os.environ.get("NBGPU_SOCKET")
    if not socket_path:
        raise no_slice()
    return numbers(SliceClient(socket_path, TIMEOUT_SECONDS).usage(), os.environ.get("NBGPU_KERNEL_ID"))


def numbers(usage: Usage, kernel_id: str | None) -> SliceNumbers:
    """Return what a slice uses as a program of one of its kernels sees it."""
    own = next((kernel for kernel in usage.kernels if kernel_id and kernel.kernel_id == kernel_id), None)
    devices: list[DeviceNumbers] = []
    for device in usage.devices:
        kernel, free = None, device.memory_limit_bytes - device.memory_used_bytes
        if own is not None:
            held = next((use for use in own.devices if use.uuid == device.uuid), None)
            kernel = KernelNumbers(
                memory_used_bytes=held.memory_used_bytes if held else 0,
                memory_peak_bytes=held.memory_peak_bytes if held else 0,
                memory_limit_bytes=own.limit.memory_bytes,
                compute_used_milli=held.compute_used_milli if held else 0,
                compute_limit_milli=own.limit.compute_milli,
            )
            if kernel.memory_limit_bytes is not None:
                free = min(free, kernel.memory_limit_bytes - kernel.memory_used_bytes)
        devices.append(
            DeviceNumbers(
                uuid=device.uuid,
                index=device.index,
                model=device.model,
                memory_limit_bytes=device.memory_limit_bytes,
                memory_used_bytes=device.memory_used_bytes,
                memory_free_bytes=max(0, free),
                compute_limit_milli=device.compute_limit_milli,
                compute_used_milli=device.compute_used_milli,
                kernel=kernel,
            )
        )
    return SliceNumbers(usage.slice_id, usage.mode, usage.simulated, usage.time, tuple(devices))
