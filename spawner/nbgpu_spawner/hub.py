"""`setup(c)`: everything that a JupyterHub configuration needs for GPU slices."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyterhub.spawner import LocalProcessSpawner, SimpleLocalProcessSpawner
from traitlets import import_item

from nbgpu.paths import POOL_SOCKET, made, runtime_dir, runtime_path

from . import resize, z2jh
from .handlers import HANDLERS
from .local import LocalGPUMixin, LocalGPUSpawner, SimpleLocalGPUSpawner
from .mixin import GPUSliceMixin

_BY_NAME = {
    "localprocess": LocalProcessSpawner,
    "jupyterhub.spawner.LocalProcessSpawner": LocalProcessSpawner,
    "simple": SimpleLocalProcessSpawner,
    "simplespawner": SimpleLocalProcessSpawner,
    "jupyterhub.spawner.SimpleLocalProcessSpawner": SimpleLocalProcessSpawner,
}
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_RUNTIME_DIR")


def setup(
    c: Any,
    *,
    embedded: bool | None = None,
    profiles: Any = None,
    quotas: Mapping[str, Any] | None = None,
    pool_config: Mapping[str, Any] | None = None,
    runtime: str | os.PathLike[str] | None = None,
    pool_url: str = "",
    pool_token: str = "",
    agent_args: Sequence[str] = (),
) -> None:
    """Give the servers of a JupyterHub slices of GPUs. Call it after `c.JupyterHub.spawner_class` is set.

    Parameters
    ----------
    c : Config
        The hub's configuration.
    embedded : bool, optional
        Start the node agent and the pool as services of this hub. By default: yes, unless `pool_url` is given.
    profiles : list, dict or callable, optional
        What the start page offers, in the format of KubeSpawner's `profile_list`. By default CPU only, 1/8, 1/4, 1/2, 1, custom;
        a new user begins with CPU only, or with ``c.GPUSliceMixin.gpu_fraction``.
    quotas : mapping, optional
        The pool's quotas, as in its configuration: ``{"default": {"limit": 1}, "groups": {"students": {"per_user": "1/4"}}}``.
        Only where the pool is embedded.
    pool_config : mapping, optional
        What else the pool's configuration has, such as ``{"smallest_memory": "1 GiB"}``. Only where the pool is embedded.
    runtime : path, optional
        Directory of sockets and slices, where it is not the usual one.
    pool_url, pool_token : str
        A pool that runs elsewhere. A hub of zero-to-jupyterhub needs neither: `custom.nbgpu` has them (deploy/z2jh).
    agent_args : sequence of str
        More options of the node agent, as ``nbgpu agent --help`` tells them: ``["--watchdog", "suspend"]`` (docs/security.md),
        ``["--idle-host-memory", "64 GiB"]`` (docs/idle.md). Only where the agent is embedded.
    """
    if not pool_url and embedded is None and (found := z2jh.settings()):
        pool_url, pool_token = found.pool_url, found.pool_token
        c.GPUSliceMixin.gpu_hub_name = found.hub_name
        c.KubeGPUMixin.gpu_image_has_lab = found.image_has_lab
    embedded = not pool_url if embedded is None else embedded
    directory = Path(runtime) if runtime else runtime_path() if pool_url else runtime_dir()
    c.JupyterHub.spawner_class = gpu_spawner_class(c.JupyterHub.get("spawner_class"))
    if profiles is not None:
        # named for both: KubeSpawner has a trait of this name of its own
        c.LocalGPUMixin.profile_list = profiles
        if not issubclass(c.JupyterHub.spawner_class, LocalGPUMixin):
            c.Spawner.profile_list = profiles
    if pool_url:
        c.GPUSliceMixin.pool_url = pool_url
        c.GPUSliceMixin.pool_token = pool_token
    else:
        c.GPUSliceMixin.pool_socket = str(directory / POOL_SOCKET)
    _extend(c.JupyterHub, "extra_handlers", [*HANDLERS, *resize.HANDLERS])
    _before_the_hubs(c.JupyterHub, str(Path(__file__).parent / "templates" / "hub"))
    if embedded:
        _extend(c.JupyterHub, "services", services(directory, quotas, pool_config, agent_args))
    elif agent_args:
        raise ValueError("nbgpu: agent_args are the node agent's: set them where that is started, or start it here with embedded=True")
    elif quotas is not None or pool_config is not None:
        raise ValueError(
            "nbgpu: quotas and pool_config are the pool's: set them where it is configured, or start it here with embedded=True"
        )


def gpu_spawner_class(configured: Any) -> type:
    """Return the spawner class that adds slices to the `configured` one (a class, a name, or None for the local default)."""
    if configured is None or type(configured).__name__ == "LazyConfigValue":
        return LocalGPUSpawner
    base = _named_class(configured) if isinstance(configured, str) else configured
    if issubclass(base, GPUSliceMixin):
        return base
    if base is LocalProcessSpawner:
        return LocalGPUSpawner
    if base is SimpleLocalProcessSpawner:
        return SimpleLocalGPUSpawner
    if any(parent.__name__ == "KubeSpawner" for parent in base.__mro__):
        from .kube import KubeGPUMixin, KubeGPUSpawner

        return KubeGPUSpawner if base.__name__ == "KubeSpawner" else type(f"GPU{base.__name__}", (KubeGPUMixin, base), {})
    if any(parent.__name__ == "SystemdSpawner" for parent in base.__mro__):
        from .systemd import SystemdGPUSpawner

        return SystemdGPUSpawner if base.__name__ == "SystemdSpawner" else type(f"GPU{base.__name__}", (base, SystemdGPUSpawner), {})
    if issubclass(base, SimpleLocalProcessSpawner):
        return type(f"GPU{base.__name__}", (SimpleLocalGPUSpawner, base), {})
    return type(f"GPU{base.__name__}", (LocalGPUMixin, base), {})


def _named_class(name: str) -> type:
    if name in _BY_NAME:
        return _BY_NAME[name]
    if "." in name:
        return import_item(name)
    from importlib.metadata import entry_points

    found = list(entry_points(group="jupyterhub.spawners", name=name))
    if not found:
        raise ValueError(f"nbgpu: no spawner is called {name!r}")
    return found[0].load()


def services(
    directory: Path,
    quotas: Mapping[str, Any] | None = None,
    pool_config: Mapping[str, Any] | None = None,
    agent_args: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the hub's services for one machine: the node agent, and the pool that speaks to it. Writes the pool's configuration."""
    made(directory)
    # a hub that was killed leaves its services running: the new hub's take their place
    common = ["--runtime-dir", str(directory), "--takeover"]
    kept = [sys.executable, "-m", "nbgpu.keep", sys.executable, "-m"]
    agent = [*kept, "nbgpu_agent", *common, *agent_args]
    pool = [*kept, "nbgpu_pool", *common]
    if quotas is not None or pool_config is not None:
        settings = directory / "pool.json"
        settings.write_text(json.dumps({**(pool_config or {}), **({"quotas": quotas} if quotas is not None else {})}, indent=2))
        pool += ["--config", str(settings)]
    environment = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith("NBGPU_")}
    environment["NBGPU_RUNTIME_DIR"] = str(directory)
    return [
        {"name": "nbgpu-agent", "command": agent, "environment": environment},
        {"name": "nbgpu-pool", "command": pool, "environment": environment},
    ]


def _extend(section: Any, name: str, items: list[Any]) -> None:
    """Add to a list of the configuration, whether it was set before, extended before, or never named."""
    if isinstance(section.get(name), list):
        section[name] = [*section[name], *items]
    else:
        getattr(section, name).extend(items)


def _before_the_hubs(section: Any, templates: str) -> None:
    """Let the templates of a directory take the place of the hub's own, but not that of the admin's."""
    paths = section.get("template_paths")
    if isinstance(paths, list):
        section["template_paths"] = [*paths, templates]  # the hub puts its own last
    else:
        section.template_paths.prepend([templates])
