"""``nbgpu.SliceMonitor()``: the slice, live, in a cell."""

from __future__ import annotations

import os
from pathlib import Path

import anywidget
import traitlets

_HERE = Path(__file__).with_name("monitor")
if not (_HERE / "monitor.js").is_file():
    raise ImportError("the front end of this checkout is not built: make setup")


class SliceMonitor(anywidget.AnyWidget):
    """Memory and compute of this server's GPU slice, live in a cell.

    The page asks the Jupyter server, not the kernel: it goes on while a cell runs, and after the kernel has died.
    """

    _esm = _HERE / "monitor.js"
    _css = _HERE / "monitor.css"

    kernel_id = traitlets.Unicode(help="The kernel to mark as this one.").tag(sync=True)

    @traitlets.default("kernel_id")
    def _default_kernel_id(self) -> str:
        return os.environ.get("NBGPU_KERNEL_ID") or _id_in_connection_file()


def _id_in_connection_file() -> str:
    """Return the kernel's id as its server named its connection file, ``kernel-<id>.json``; empty where there is none."""
    try:
        from ipykernel.connect import get_connection_file

        return Path(get_connection_file()).stem.removeprefix("kernel-")
    except (ImportError, RuntimeError):
        return ""
