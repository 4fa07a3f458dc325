"""The hub side: `setup(c)` gives any JupyterHub configuration GPU slices.

On one machine: `LocalGPUSpawner`, `SimpleLocalGPUSpawner`. On Kubernetes: `KubeGPUSpawner`, imported only when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hub import setup
from .local import LocalGPUMixin, LocalGPUSpawner, SimpleLocalGPUSpawner
from .mixin import GPUSliceMixin
from .profiles import default_profiles

if TYPE_CHECKING:
    from .kube import KubeGPUSpawner

__all__ = ["GPUSliceMixin", "KubeGPUSpawner", "LocalGPUMixin", "LocalGPUSpawner", "SimpleLocalGPUSpawner", "default_profiles", "setup"]


def __getattr__(name: str) -> Any:
    if name in ("KubeGPUSpawner", "KubeGPUMixin"):
        from . import kube

        return getattr(kube, name)
    raise AttributeError(f"module 'nbgpu_spawner' has no attribute {name!r}")
