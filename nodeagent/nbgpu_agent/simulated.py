"""Which simulated machine an agent works with: a state file in shared memory, and the libraries that understand it.

A machine is replaced (another size asked for, libraries built anew) only where no slice has it mapped; until then the agent stays
with it and with the libraries that made it, as a real driver is not exchanged under running programs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .runtime import StartError

MADE_WITH = "made-with"
_LIBRARIES = "libraries="


@dataclass(frozen=True)
class Machine:
    """A simulated machine."""

    state: Path
    """For ``NBGPU_SIM_STATE``."""
    libraries: Path
    """Directory of ``libcuda.so.1``, ``libnvidia-ml.so.1`` and ``nvidia-smi``."""
    directory: Path | None = None
    """That of the state, where it was made for this machine alone."""


def find_machine(runtime: Path, libraries: Path, node: str | None = None) -> Machine:
    """Return the machine of a runtime directory, made or replaced where needed.

    Parameters
    ----------
    runtime : Path
        The runtime directory. Without ``$NBGPU_SIM_STATE`` its machine has a directory of its own in shared memory.
    libraries : Path
        The installed libraries, in a directory named by their contents.
    node : str, optional
        On Kubernetes: the machine then lies in the runtime directory, which containers can be given a part of, and the names of its GPUs
        are of that node.
    """
    ours = libraries / "sim"
    named = os.environ.get("NBGPU_SIM_STATE")
    if named:
        return Machine(Path(named).absolute(), ours)
    directory = _directory(runtime) if node is None else runtime / f"sim-{node}"
    if directory.exists() and directory.stat().st_uid != os.geteuid():
        raise StartError(f"{directory} belongs to another user: name another file with NBGPU_SIM_STATE.")
    asked = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NBGPU_SIM_"))
    wanted = "\n".join([_LIBRARIES + libraries.name, *asked])
    made = directory / MADE_WITH
    before = made.read_text() if made.exists() else ""
    if before != wanted:
        theirs = _libraries_of(before, libraries)
        if any((runtime / "slices").iterdir()) and theirs is not None:
            return Machine(directory / "state", theirs, directory)
        shutil.rmtree(directory, ignore_errors=True)  # who has it mapped still keeps it
    if not directory.exists():
        directory.mkdir(mode=0o755)
        made.write_text(wanted)
    return Machine(directory / "state", ours, directory)


def _directory(runtime: Path) -> Path:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        return runtime / "sim"
    return shared / f"nbgpu-sim-{hashlib.sha256(str(runtime).encode()).hexdigest()[:12]}"


def _libraries_of(made_with: str, installed: Path) -> Path | None:
    """Return the libraries that made a machine, when they are still installed."""
    first = made_with.partition("\n")[0]
    if not first.startswith(_LIBRARIES):
        return None
    found = installed.parent / first.removeprefix(_LIBRARIES) / "sim"
    return found if (found / "libnvidia-ml.so.1").is_file() else None
