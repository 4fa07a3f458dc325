"""Where the parts meet on one machine."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import NbgpuError

AGENT_SOCKET = "agent.sock"
POOL_SOCKET = "pool.sock"
SYSTEM_RUNTIME = Path("/run/nbgpu")
"""The runtime directory of root's agent and pool, who hand out the machine's GPUs to everybody."""


def runtime_path() -> Path:
    """Return the directory of sockets and slices, whoever made it.

    ``$NBGPU_RUNTIME_DIR``, else ``/run/nbgpu`` for root, else ``nbgpu`` in the user's own runtime directory, else one in ``/tmp``.
    """
    named = os.environ.get("NBGPU_RUNTIME_DIR")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return SYSTEM_RUNTIME
    own = os.environ.get("XDG_RUNTIME_DIR")
    return Path(own) / "nbgpu" if own else _in_tmp()


def runtime_dir() -> Path:
    """Return `runtime_path`, to be used: a pool that answers in it says with which environment programs are started.

    It is not created here, but in ``/tmp``, where from then on nobody else can.

    Raises
    ------
    NbgpuError
        In ``/tmp``, where anybody may make it, another user has, or it cannot be made.
    """
    found = runtime_path()
    return made(found) if found == _in_tmp() else found


def made(runtime: Path) -> Path:
    """Make a runtime directory where there is none, and return it.

    Raises
    ------
    NbgpuError
        As `runtime_dir`: somebody else may have been faster since.
    """
    try:
        runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
        own = runtime.lstat().st_uid == os.geteuid() and not runtime.is_symlink()
    except OSError as error:
        raise NbgpuError(
            f"{runtime} cannot be made: {error.strerror}. Set NBGPU_RUNTIME_DIR to a folder of your own.", code="runtime"
        ) from error
    if runtime == _in_tmp() and not own:
        raise NbgpuError(f"{runtime} belongs to another user: set NBGPU_RUNTIME_DIR to a folder of your own.", code="runtime")
    return runtime


def _in_tmp() -> Path:
    return Path(f"/tmp/nbgpu-{os.geteuid()}")
