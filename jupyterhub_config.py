"""nbgpu on one machine, to try it and to start from: ``jupyterhub -f jupyterhub_config.py`` (or ``make run``).

The hub starts the node agent and the pool itself. With no NVIDIA driver the GPUs are simulated, and the pages say so.
For real users of this machine: delete "the demo" below, choose an authenticator, and run the hub as root.
"""

import json
import os
import secrets
import sys
from pathlib import Path

from nbgpu.paths import made, runtime_dir
from nbgpu_spawner import setup

c = get_config()  # noqa: F821

c.JupyterHub.bind_url = f"http://127.0.0.1:{os.environ.get('NBGPU_PORT', '8000')}"
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.default_url = "/lab"

# -- the demo: any name logs in with one password, all servers run as this account and are not protected from each other
runtime = made(runtime_dir())
password = runtime / "login-password"
if not password.exists():
    with open(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(9) + "\n")

c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = password.read_text().strip()
c.Authenticator.allow_all = True
c.Authenticator.username_pattern = r"[a-z][a-z0-9_.-]{0,31}"  # a name becomes a folder

c.JupyterHub.spawner_class = "simple"
homes = Path("homes").resolve()
example = Path(__file__).resolve().parent / "examples" / "fractions.ipynb"
c.SimpleLocalProcessSpawner.home_dir_template = str(homes / "{username}")


def bring_example(spawner):
    """Give every user a copy of the example, which the server opens first."""
    home = homes / spawner.user.name
    home.mkdir(parents=True, exist_ok=True)
    quiet = home / ".jupyter/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    if not quiet.exists():  # JupyterLab's question whether one wants its news would lie over the panel
        quiet.parent.mkdir(parents=True, exist_ok=True)
        quiet.write_text('{"fetchNews": "false"}\n')
    if example.exists():
        if not (home / example.name).exists():
            from ipykernel.ipkernel import IPythonKernel

            notebook = json.loads(example.read_text())
            # as its kernel will say: else JupyterLab marks it as changed as soon as it is opened
            notebook["metadata"]["language_info"] = IPythonKernel.language_info
            (home / example.name).write_text(json.dumps(notebook, indent=1) + "\n")
        spawner.default_url = f"/lab/tree/{example.name}"


c.Spawner.pre_spawn_hook = bring_example
c.GPUSliceMixin.gpu_fraction = "1/4"  # what a new user's start page begins with; without it: CPU only
c.Spawner.args = ["--allow-root"] if os.geteuid() == 0 else []
# -- end of the demo

# What the start page offers, in the format of KubeSpawner's profile_list (without it: CPU only, 1/8, 1/4, 1/2, a whole GPU, custom):
# profiles = [
#     {"slug": "cpu", "display_name": "CPU only", "default": True},
#     {"slug": "quarter", "display_name": "A quarter of a GPU", "kubespawner_override": {"gpu_fraction": "1/4"}},
#     {"slug": "custom", "display_name": "Custom", "gpu_custom": True},
# ]
# Who may hold how much at once, in GPUs; a group's "limit" is of all its members together, "per_user" of each:
# quotas = {"default": {"limit": 1}, "groups": {"students": {"limit": 4, "per_user": "1/4"}}}
setup(c)  # setup(c, profiles=profiles, quotas=quotas)
