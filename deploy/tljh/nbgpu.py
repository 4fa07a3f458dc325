"""Slices of GPUs for The Littlest JupyterHub: a file for /opt/tljh/config/jupyterhub_config.d/."""

from nbgpu_spawner import setup

c = get_config()  # noqa: F821

c.Spawner.default_url = "/lab"

setup(c, embedded=False)  # agent and pool are units of their own: TLJH's hub sees neither the GPUs' device files nor the host's mounts
