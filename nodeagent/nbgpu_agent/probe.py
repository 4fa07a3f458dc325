"""What a bare CUDA context costs on each device: a child process makes one on each, the agent asks NVML what it holds."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import sys
from pathlib import Path

from nbgpu.models import Device
from nbgpu.quantities import MIB

from .nvml import Nvml

log = logging.getLogger("nbgpu.agent")
PROBE_SECONDS = 20.0
UNKNOWN_CAP_BYTES = 512 * MIB
LEAST_CAP_BYTES = 256 * MIB
CACHE = "probe.json"


def overhead_cap_bytes(context_bytes: int) -> int:
    """Return how much beyond its allocations and context a process may hold unexplained: once more the context, at least 256 MiB."""
    return max(LEAST_CAP_BYTES, context_bytes) if context_bytes else UNKNOWN_CAP_BYTES


async def context_bytes(nvml: Nvml, devices: list[Device], runtime: Path, library: str) -> dict[str, int]:
    """Return the size of a bare context by device uuid, bytes; a device that cannot be probed is left out. Cached by driver version."""
    cache = runtime / CACHE
    key = f"{nvml.driver_version} {' '.join(device.uuid for device in devices)}"
    try:
        known = json.loads(cache.read_text())
        if known["key"] == key:
            return {str(uuid): int(size) for uuid, size in known["context_bytes"].items()}
    except (OSError, ValueError, KeyError):
        pass
    found = await _measure(nvml, devices, library)
    missing = [str(device.index) for device in devices if device.uuid not in found]
    if missing:
        log.warning("The cost of a CUDA context could not be measured on GPU %s: it counts as overhead there.", ", ".join(missing))
    else:
        cache.write_text(json.dumps({"key": key, "context_bytes": found}))
    return found


async def _measure(nvml: Nvml, devices: list[Device], library: str) -> dict[str, int]:
    env = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "CUDA_VISIBLE_DEVICES")}
    pipe = asyncio.subprocess.PIPE
    arguments = ["-m", "nbgpu_agent.probe", library, *(str(device.index) for device in devices)]
    child = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=env
    )
    assert child.stdout is not None
    assert child.stdin is not None
    found: dict[str, int] = {}
    try:
        line = await asyncio.wait_for(child.stdout.readline(), PROBE_SECONDS)
        if line.strip() == b"ready":
            for device in devices:
                size = nvml.sample(device.uuid).memory.get(child.pid, 0)
                if size:
                    found[device.uuid] = size
    except asyncio.TimeoutError:
        pass
    finally:
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), 5)
        except asyncio.TimeoutError:
            child.kill()
            await child.wait()
    return found


def main(library: str, indexes: list[int]) -> int:
    """Be the child: make a context on each device, say "ready", hold them until stdin closes."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML counts
    cuda = ctypes.CDLL(library)
    if cuda.cuInit(0) != 0:
        return 1
    for index in indexes:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuDeviceGet(ctypes.byref(device), index) != 0 or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
            return 1
    print("ready", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [int(word) for word in sys.argv[2:]]))
