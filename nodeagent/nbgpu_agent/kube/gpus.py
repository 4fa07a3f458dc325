"""What a container needs to use a GPU: of a real one NVIDIA's files and devices, of a simulated one nothing but what each claim brings.

Where the node has a CDI specification of NVIDIA's (``nvidia-ctk cdi generate``, the GPU Operator), its device is handed out beside ours,
and all of NVIDIA's business is left to it. Elsewhere the device files and the driver's libraries are named here.
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from nbgpu.errors import NbgpuError
from nbgpu.models import Device

from .cdi import bind, library_dirs

Json = dict[str, Any]
VENDOR_KIND = "nvidia.com/gpu"
SPEC_BYTES_MOST = 4 * 1024 * 1024
CONTROL_FILES = ("dev/nvidiactl", "dev/nvidia-uvm", "dev/nvidia-uvm-tools")
DRIVER_ROOTS = ("run/nvidia/driver", "home/kubernetes/bin/nvidia", "")
"""Where a driver may be on a node: the GPU Operator's, Google's, the node's own."""
LIBRARY_DIRS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "lib64", "usr/lib")
LIBRARIES = (
    "libcuda.so.", "libnvidia-ml.so.", "libnvidia-ptxjitcompiler.so.", "libnvidia-nvvm.so.", "libnvidia-gpucomp.so.", "libcudadebugger.so.",
)  # fmt: skip
"""What a program that computes needs; a name ends where the version begins."""
SONAMES = {"libnvidia-nvvm.so.": "libnvidia-nvvm.so.4", "libnvidia-gpucomp.so.": ""}
"""Others are called ``.so.1``; "" = by the version alone."""
PROGRAMS = ("usr/bin/nvidia-smi",)
log = logging.getLogger("nbgpu.agent")


HOST = Path("/proc/1/root")
"""The node's root file system, as an agent with the host's pids sees it."""
NVML, CUDA = "libnvidia-ml.so.1", "libcuda.so.1"


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


class NoDriverFiles(NbgpuError):
    """There is no way to give a container this GPU."""

    code = "no-driver-files"
    status = 503


class Gpus:
    """Knows how containers get at the GPUs of this node.

    Parameters
    ----------
    simulated : bool
        They need nothing.
    directories : sequence of Path
        Where CDI specifications of others may be.
    host : Path
        The node's root file system as the agent sees it.
    """

    def __init__(self, simulated: bool, directories: Sequence[Path] = (), host: Path = HOST):
        self._simulated = simulated
        self._directories = directories
        self._host = host

    def container_gets(self, device: Device) -> tuple[tuple[str, ...], Json]:
        """Return (other drivers' CDI devices, edits of our own) by which a container gets a device.

        Raises
        ------
        NoDriverFiles
            Neither is to be had.
        """
        if self._simulated:
            return (), {}
        theirs = vendor_device(device, self._directories)
        if theirs is not None:
            return (theirs,), {}
        return (), driver_edits(device, self._host)


def agents_libraries(host: Path = HOST, loads: Callable[[str], bool] = _loads) -> tuple[Path | None, str]:
    """Return (NVML's library, libcuda's name) for the agent itself: None and its own where NVIDIA's runtime has put them there.

    Elsewhere they are the node's own files, which an agent with the host's pids sees.
    """
    if loads(NVML):
        return None, CUDA
    nvml, cuda = (_on_host(host, name.removesuffix("1")) for name in (NVML, CUDA))
    return nvml, str(cuda) if cuda is not None else CUDA


def _on_host(host: Path, prefix: str) -> Path | None:
    return next((found for root in DRIVER_ROOTS if (found := _library(host / root, prefix)) is not None), None)


def vendor_device(device: Device, directories: Sequence[Path]) -> str | None:
    """Return the name of a GPU in NVIDIA's CDI specifications, by its UUID or else by its index; None when they do not have it."""
    names = {name for directory in directories for name in _named_in(directory)}
    for name in (device.uuid, str(device.index)):
        if name in names:
            return f"{VENDOR_KIND}={name}"
    return None


def _named_in(directory: Path) -> Iterator[str]:
    for path in sorted([*directory.glob("*.yaml"), *directory.glob("*.yml"), *directory.glob("*.json")]):
        if path.name.startswith("gpu.nbgpu.io-"):
            continue
        try:
            if path.stat().st_size > SPEC_BYTES_MOST:
                continue
            text = path.read_text()
            if VENDOR_KIND not in text:
                continue
            told: Any = (
                json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            )
            if told["kind"] == VENDOR_KIND:
                yield from (str(one["name"]) for one in cast("list[Json]", told["devices"]))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            log.warning("the CDI specification %s cannot be read (%s): its devices are not used", path, type(error).__name__)


def driver_edits(device: Device, host: Path) -> Json:
    """Return device files and the driver's libraries as they lie on the node, for a node with no CDI specification of NVIDIA's.

    The libraries go where any image's loader finds them, under their own names and under those that programs ask for.
    """
    minor = _minor(device, host)
    nodes = [f"dev/nvidia{minor}", *(name for name in CONTROL_FILES if (host / name).exists())]
    for root in DRIVER_ROOTS:
        mounts = list(_driver_mounts(host, root))
        if any(mount["containerPath"].endswith("/libcuda.so.1") for mount in mounts):
            return {"deviceNodes": [{"path": f"/{name}", "hostPath": f"/{name}"} for name in nodes], "mounts": mounts}
    raise NoDriverFiles(
        f"GPU {device.index} ({device.uuid}) cannot be given to a container: this node has no CDI specification of {VENDOR_KIND} "
        "(nvidia-ctk cdi generate), and no libcuda.so was found on it."
    )


def _minor(device: Device, host: Path) -> int:
    """Return the number of a GPU's device file; the driver counts them by itself, not as NVML does."""
    for information in (host / "proc/driver/nvidia/gpus").glob("*/information"):
        try:
            words = {
                name.strip(): value.strip() for name, _, value in (line.partition(":") for line in information.read_text().splitlines())
            }
        except OSError:
            continue
        if words.get("GPU UUID", "").lower() == device.uuid.lower() and words.get("Device Minor", "").isdigit():
            return int(words["Device Minor"])
    raise NoDriverFiles(f"GPU {device.index} ({device.uuid}) has no device file that /proc/driver/nvidia/gpus tells of.")


def _driver_mounts(host: Path, root: str) -> Iterator[Json]:
    for prefix in LIBRARIES:
        found = _library(host / root, prefix)
        if found is None:
            continue
        source = f"/{found.relative_to(host)}"
        for name in dict.fromkeys((found.name, SONAMES.get(prefix, f"{prefix}1"))):
            if name:
                yield from (bind(source, f"{directory}/{name}") for directory in library_dirs())
    for name in PROGRAMS:
        if (host / root / name).is_file():
            yield bind(f"/{Path(root) / name}", f"/{name}")


def _library(root: Path, prefix: str) -> Path | None:
    """Return a library of the driver under a root, from the first directory that has it."""
    return next((found for directory in LIBRARY_DIRS if (found := _versioned(root / directory, prefix)) is not None), None)


def _versioned(directory: Path, prefix: str) -> Path | None:
    """Return the library with the driver's version in its name: the file itself, not a link to it."""
    found = [path for path in directory.glob(f"{prefix}*") if path.name[len(prefix) :].count(".") >= 1 and not path.is_symlink()]
    return max(found, key=lambda path: path.name, default=None)
