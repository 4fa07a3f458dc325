"""Where the parts meet on one machine."""

from __future__ import annotations

import os
from contextlib import suppress
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

    It is not created here: `made` does.

    Raises
    ------
    NbgpuError
        In ``/tmp``, where anybody may make it, another user has.
    """
    found = runtime_path()
    with suppress(FileNotFoundError):
        _must_be_own(found)
    return found


def made(runtime: Path) -> Path:
    """Make a runtime directory where there is none, and return it.

    Raises
    ------
    NbgpuError
        As `runtime_dir`: somebody else may have been faster since.
    """
    runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
    _must_be_own(runtime)
    return runtime


def _must_be_own(runtime: Path) -> None:
    if runtime == _in_tmp() and (runtime.lstat().st_uid != os.geteuid() or runtime.is_symlink()):
        raise NbgpuError(f"{runtime} belongs to another user: set NBGPU_RUNTIME_DIR to a folder of your own.", code="runtime")


def _in_tmp() -> Path:
    return Path(f"/tmp/nbgpu-{os.geteuid()}")
