"""``nbgpu.SliceMonitor()``: the slice, live, in a cell."""

from __future__ import annotations

import os
from pathlib import Path

import anywidget
import traitlets

_HERE = Path(__file__).with_name("monitor")


class SliceMonitor(anywidget.AnyWidget):
    """Memory and compute of this server's GPU slice, live in a cell.

    The page asks the Jupyter server, not the kernel: it goes on while a cell runs, and after the kernel has died.
    """

    _esm = _HERE / "monitor.js"
    _css = _HERE / "monitor.css"

    kernel_id = traitlets.Unicode(help="The kernel to mark as this one.").tag(sync=True)

    @traitlets.default("kernel_id")
    def _default_kernel_id(self) -> str:
        return os.environ.get("NBGPU_KERNEL_ID", "")
