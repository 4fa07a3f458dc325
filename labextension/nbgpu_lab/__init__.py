"""The notebook side: Jupyter server extension, kernel provisioner, what a cell shows, and the prebuilt JupyterLab extension.

Nothing heavy is imported here: every Jupyter server that finds the extension enabled imports this module.
"""

from __future__ import annotations

from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    return [{"module": "nbgpu_lab"}]


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "nbgpu-lab"}]


def _load_jupyter_server_extension(serverapp: Any) -> None:
    from .extension import load

    load(serverapp)


def load_ipython_extension(ipython: Any) -> None:
    """Add the ``%gpu`` magic; the kernel provisioner asks for it (`nbgpu_lab.kernel_args`), elsewhere ``%load_ext nbgpu_lab`` does."""
    from .magic import register

    register(ipython)
