"""CDI specifications: what a container gets that references a claim. Pure, but for writing and removing the files.

One specification a claim. What is the same for all its devices (the limiter, the slice's files, the simulated driver) is said once,
for the whole specification, so that a container with several requests of the claim gets it once.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbgpu.claims import DRIVER
from nbgpu.models import Device

from ..live import CONTAINER_DIR
from ..simulated import Machine

Json = dict[str, Any]
KIND = f"{DRIVER}/slice"
CDI_VERSION = "0.6.0"
LIBRARY = "/run/nbgpu/lib/libnbgpu.so"
"""Where a container finds the limiter."""
SIM_STATE = "/run/nbgpu/sim/state"
"""Where a container finds the simulated machine; the simulated driver knows the same path."""
PRELOAD = "ld.so.preload"
_READ = ["bind", "rprivate", "ro", "nosuid", "nodev"]
_DATA = ["bind", "rprivate", "nosuid", "nodev", "noexec"]


@dataclass(frozen=True)
class Part:
    """A device of a claim as its specification names it."""

    name: str
    device: Device
    edits: Json
    """What this device needs beyond what all of them do; empty where NVIDIA's own specification brings it."""


def device_id(claim_uid: str, number: int) -> str:
    """Return the name by which the kubelet hands the `number`-th device of a claim to the container runtime."""
    return f"{KIND}={claim_uid}-{number}"


def library_dirs(machine: str = platform.machine()) -> list[str]:
    """Return the directories that glibc's loader searches in any image, whatever ``LD_LIBRARY_PATH`` says: Debian's and Fedora's."""
    return [f"/usr/lib/{machine}-linux-gnu", "/usr/lib64"]


def bind(source: Path | str, target: str, options: Sequence[str] = _READ) -> Json:
    """Return a bind mount; read-only unless `options` say otherwise."""
    return {"hostPath": str(source), "containerPath": target, "options": list(options)}


def specification(claim_uid: str, slice_dir: Path, libraries: Path, machine: Machine | None, parts: Sequence[Part]) -> Json:
    """Return the CDI specification of a claim.

    Parameters
    ----------
    slice_dir : Path
        The slice's directory on the node.
    libraries : Path
        The versioned copy of the limiter: containers of this claim keep it over an upgrade of the agent.
    machine : Machine, optional
        The simulated one.
    """
    mounts = [
        bind(slice_dir, CONTAINER_DIR, [*_DATA, "ro"]),
        bind(slice_dir / "use", f"{CONTAINER_DIR}/use", [*_DATA, "rw"]),
        bind(libraries / "libnbgpu.so", LIBRARY),
        bind(libraries / PRELOAD, "/etc/ld.so.preload"),
    ]
    # CUDA images say "all", which NVIDIA's own runtime would obey.
    env = [f"NBGPU_SOCKET={CONTAINER_DIR}/api.sock", "NVIDIA_VISIBLE_DEVICES=void"]
    if machine is not None:
        for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            mounts += [bind(machine.libraries / name, f"{directory}/{name}") for directory in library_dirs()]
        mounts.append(bind(machine.libraries / "nvidia-smi", "/usr/bin/nvidia-smi"))
        mounts.append(bind(machine.state, SIM_STATE, [*_DATA, "rw"]))
        env.append(f"NBGPU_SIM_STATE={SIM_STATE}")
    return {
        "cdiVersion": CDI_VERSION,
        "kind": KIND,
        "containerEdits": {"env": env, "mounts": mounts},
        "devices": [
            # a device without edits of its own is refused by the runtimes
            {"name": part.name, "containerEdits": part.edits or {"env": [f"NBGPU_GPU_{part.device.index}={part.device.uuid}"]}}
            for part in parts
        ],
    }


def file_name(claim_uid: str) -> str:
    """Return the name of a claim's specification."""
    return f"{DRIVER}-{claim_uid}.json"


def claims_in(directory: Path) -> set[str]:
    """Return the uids of claims that have a specification."""
    head = f"{DRIVER}-"
    return {path.name[len(head) : -len(".json")] for path in directory.glob(f"{head}*.json")}


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all, and on the disk before it has its name."""
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "w") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write(directory: Path, claim_uid: str, spec: Json) -> None:
    """Write a claim's specification unless it is there already, just so."""
    path = directory / file_name(claim_uid)
    text = json.dumps(spec, indent=1)
    try:
        if path.read_text() == text:
            return
    except OSError:
        directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def remove(directory: Path, claim_uid: str) -> None:
    """Remove a claim's specification."""
    (directory / file_name(claim_uid)).unlink(missing_ok=True)
