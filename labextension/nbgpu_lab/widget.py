"""The monitor of a slice as a widget, for pages of a Jupyter server that do not have our extension: needs ``nbgpu[widget]``.

JupyterLab and Notebook 7 need nothing of it. docs/security.md says what widgets in strangers' notebooks may do where it is installed.
"""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from .cell import own_kernel_id

_HERE = Path(__file__).with_name("monitor")
if not (_HERE / "monitor.js").is_file():
    raise ImportError("the front end of this checkout is not built: make setup")


class SliceMonitor(anywidget.AnyWidget):
    """Memory and compute of this server's GPU slice, live in a cell; as ``nbgpu.SliceMonitor`` draws them."""

    _esm = _HERE / "monitor.js"
    _css = _HERE / "monitor.css"

    kernel_id = traitlets.Unicode(help="The kernel to mark as this one.").tag(sync=True)

    @traitlets.default("kernel_id")
    def _default_kernel_id(self) -> str:
        return own_kernel_id()
