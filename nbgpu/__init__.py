"""nbgpu: a fraction of a GPU for every Jupyter notebook, that behaves like a small GPU of its own."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["SliceMonitor", "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]  # made on demand, below


def __getattr__(name: str) -> Any:
    if name == "SliceMonitor":
        from nbgpu_lab.cell import SliceMonitor  # pyright: ignore

        return SliceMonitor  # pyright: ignore
    if name == "slice":  # not in __all__: a star import shall not hide Python's own
        from .here import slice

        return slice
    raise AttributeError(f"module 'nbgpu' has no attribute {name!r}")
