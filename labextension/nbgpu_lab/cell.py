"""``nbgpu.SliceMonitor()``: the slice, live, in a cell of JupyterLab and Notebook 7."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from .magic import summary

MIME = "application/vnd.nbgpu.monitor+json"
"""Drawn by our extension of JupyterLab, as data: a notebook's file has nothing of it that a page would execute."""


class SliceMonitor:
    """Memory and compute of this server's GPU slice, live in a cell; elsewhere, as text, what they were when the cell ran.

    The page asks the Jupyter server, not the kernel: it goes on while a cell runs, and after the kernel has died.
    """

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        then = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        return {MIME: {"kernel_id": own_kernel_id()}, "text/plain": f"GPU slice at {then}\n{summary().text}"}


def own_kernel_id() -> str:
    """Return this kernel's id: as its provisioner told it, else as its server named its connection file; empty where it is none."""
    return os.environ.get("NBGPU_KERNEL_ID") or _id_in_connection_file()


def _id_in_connection_file() -> str:
    """Return the id in ``kernel-<id>.json``."""
    try:
        from ipykernel.connect import get_connection_file

        return Path(get_connection_file()).stem.removeprefix("kernel-")
    except (ImportError, RuntimeError):
        return ""
