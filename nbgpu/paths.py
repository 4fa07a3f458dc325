"""Where the parts meet on one machine."""

from __future__ import annotations

import os
from pathlib import Path

AGENT_SOCKET = "agent.sock"
POOL_SOCKET = "pool.sock"
SYSTEM_RUNTIME = Path("/run/nbgpu")
"""The runtime directory of root's agent and pool, who hand out the machine's GPUs to everybody."""


def runtime_dir() -> Path:
    """Return the directory of sockets and slices.

    ``$NBGPU_RUNTIME_DIR``, else ``/run/nbgpu`` for root, else ``nbgpu`` in the user's own runtime directory.
    It is not created here.
    """
    named = os.environ.get("NBGPU_RUNTIME_DIR")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return SYSTEM_RUNTIME
    own = os.environ.get("XDG_RUNTIME_DIR")
    return Path(own) / "nbgpu" if own else Path(f"/tmp/nbgpu-{os.geteuid()}")
