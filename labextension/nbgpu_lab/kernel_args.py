"""What a Python kernel of this server is started with: ``%gpu``, and cells that wait while the slice is parked (docs/idle.md).

Named on the command line as an IPython extension, beside those that the user has configured: no file of the user's is touched, and a
kernel of another language or another start program is started as ever.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .client import SliceClient
from .idle import waiting_argument

MAGIC = "nbgpu_lab"
OPTION = "--IPKernelApp.extra_extensions="


async def kernel_arguments(client: SliceClient, argv: list[str]) -> list[str]:
    """Return what is added to a kernel's command `argv` in a slice."""
    return [*magic_argument(argv), *await waiting_argument(client, argv)]


def magic_argument(argv: list[str]) -> list[str]:
    """Return what gives a Python kernel ``%gpu``; nothing where its environment is not known to have nbgpu: it would log an error."""
    ipykernel = any(word in ("ipykernel_launcher", "ipykernel") for word in argv)
    return [OPTION + MAGIC] if ipykernel and has_nbgpu(argv[0]) else []


def has_nbgpu(python: str) -> bool:
    """Return whether a kernel's Python finds nbgpu: it is this server's own, or its environment has nbgpu installed."""
    plain = ("python", f"python{sys.version_info[0]}", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    if python in (*plain, sys.executable):  # Jupyter starts those with this server's own
        return True
    path = Path(python)
    return path.is_absolute() and any(path.parent.parent.glob("lib/python3*/site-packages/nbgpu-*.dist-info"))
