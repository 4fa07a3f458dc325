"""`LocalGPUSpawner` as root, with two Unix users of the machine and a real JupyterLab for each.

The users are made for the test and removed after it. They may not read root's home, where the Python of this machine may lie:
what the servers run is mounted where everybody can reach it.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_hub import ROOT, Hub, running_hub, shot
from browser_kit import wait_for
from lab_pages import ALLOCATE, SECOND, in_lab, kernel_row, log_in, no_news, run_cell, start, stop
from playwright.sync_api import Browser, expect

from nbgpu.client import AgentClient

pytestmark = [pytest.mark.browser, pytest.mark.root, pytest.mark.timeout(600)]
VENV = Path(sys.prefix)
CONFIG = """
import os
from pathlib import Path
from nbgpu_spawner import setup

c.JupyterHub.bind_url = "http://127.0.0.1:" + os.environ["NBGPU_PORT"]
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = (Path(os.environ["NBGPU_RUNTIME_DIR"]) / "login-password").read_text()
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "localprocess"
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.environment = {environment!r}
c.Spawner.default_url = "/lab/tree/work.ipynb"
setup(c)
"""
SPY = """
import json, os, socket
from pathlib import Path
def tried(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "could"
def connect(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path))
def spy(slice_dir):
    place = Path(slice_dir)
    return {
        "use": tried(lambda: (place / "use").read_bytes()),
        "api.sock": tried(lambda: connect(place / "api.sock")),
        "limits": tried(lambda: open(place / "ctl", "r+b")),
        "slices": tried(lambda: os.listdir(place.parent)),
        "agent": tried(lambda: connect(place.parent.parent / "agent.sock")),
        "pool": tried(lambda: connect(place.parent.parent / "pool.sock")),
    }
"""
SEEN = """
import pynvml, os
pynvml.nvmlInit()
device = pynvml.nvmlDeviceGetHandleByIndex(0)
memory = pynvml.nvmlDeviceGetMemoryInfo(device)
pids = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
print(json.dumps({"total": memory.total >> 20, "used": memory.used >> 20, "pids": pids, "me": os.getpid(), "uid": os.getuid()}))
"""


@pytest.fixture(scope="module")
def users() -> Iterator[list[str]]:
    """Make two users of this machine."""
    names = [f"{name}-t{os.getpid()}" for name in ("ada", "grace")]
    try:
        for name in names:
            done = subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", name], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"useradd cannot make users here: {done.stderr.strip()}")
            notebook = Path(pwd.getpwnam(name).pw_dir) / "work.ipynb"
            kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
            notebook.write_text(json.dumps({"cells": [], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
            os.chown(notebook, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
        yield names
    finally:
        for name in names:
            subprocess.run(["pkill", "-KILL", "-u", name], capture_output=True, check=False)  # nobody else is this user
            subprocess.run(["userdel", "--force", "--remove", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that everybody can reach, with this Python, its packages and this checkout mounted in it."""
    base = Path(tempfile.mkdtemp(prefix="nbgpu-browser-users-", dir="/tmp"))
    base.chmod(0o755)
    mounted: list[Path] = []
    try:
        for name, what in (("python", Path(sys.base_prefix)), ("venv", VENV), ("checkout", ROOT)):
            place = base / name
            place.mkdir()
            done = subprocess.run(["mount", "--bind", str(what), str(place)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
            mounted.append(place)
        yield base
    finally:
        for place in [*(base / "run" / "slices").glob("*/use"), *mounted]:
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def hub(users: list[str], public: Path) -> Iterator[Hub]:
    """A hub that starts servers as their users."""
    checkout, venv = public / "checkout", public / "venv"
    packages = venv / Path(os.__file__).parent.relative_to(sys.base_prefix) / "site-packages"
    (public / "labextensions").mkdir()
    (public / "labextensions" / "nbgpu-lab").symlink_to(checkout / "labextension" / "nbgpu_lab" / "labextension")
    (public / "config" / "jupyter_server_config.d").mkdir(parents=True)
    enabled = (checkout / "labextension" / "jupyter-config" / "nbgpu_lab.json").read_text()
    (public / "config" / "jupyter_server_config.d" / "nbgpu_lab.json").write_text(enabled)
    sources = [checkout, checkout / "spawner", checkout / "nodeagent", checkout / "labextension"]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, [*sources, packages])),
        "JUPYTER_PATH": os.pathsep.join([str(public), str(venv / "share" / "jupyter")]),
        "JUPYTER_CONFIG_PATH": os.pathsep.join([str(public / "config"), str(venv / "etc" / "jupyter")]),
        "JUPYTERLAB_DIR": str(venv / "share" / "jupyter" / "lab"),
    }
    python = public / "python" / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    config = public / "hub_config.py"
    config.write_text(CONFIG.format(python=str(python), environment=environment))
    libraries = os.pathsep.join(filter(None, [str(public / "python" / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]))
    with running_hub(config, public, LD_LIBRARY_PATH=libraries) as running:  # a Python's own library may lie in root's home, too
        yield running


def test_two_users_of_the_machine_side_by_side(chromium: Browser, hub: Hub, users: list[str]) -> None:
    """Ada uses all of her quarter and not more; Grace, beside her on the same device, sees and reaches nothing of it."""
    pages = {user: log_in(chromium, hub, user) for user in users}
    ada, grace = pages.values()
    start(ada, "quarter")
    start(grace, "eighth")
    for page in pages.values():
        in_lab(page)
        no_news(page)
        page.locator(".nbgpu-Status").click()
        page.wait_for_selector("#nbgpu-panel:visible")
    agent = AgentClient(hub.runtime / "agent.sock")
    slices = {known.slice.owner.user: known.slice for known in agent.slices().slices}
    assert {user: piece.devices[0].compute_milli for user, piece in slices.items()} == dict(zip(users, (250, 125), strict=True))
    assert len({piece.devices[0].uuid for piece in slices.values()}) == 1, "the same device"
    places = [hub.runtime / "slices" / slices[user].slice_id for user in users]

    assert "SUCCESS" in run_cell(ada, ALLOCATE + "print(gib(18))")
    assert "OUT_OF_MEMORY" in run_cell(ada, "print(gib(2))")
    expect(ada.locator(".nbgpu-Latest").filter(has_text="work.ipynb was refused 2 GiB")).to_be_visible(timeout=2 * SECOND)
    expect(kernel_row(ada, "work.ipynb")).to_contain_text("18.2 GiB")
    expect(kernel_row(ada, "work.ipynb")).to_contain_text("1 refusal")
    expect(ada.locator(".nbgpu-Status")).to_contain_text("18.2 of 19.5 GiB")
    shot(ada, "9-ada-a-user-of-the-machine")

    # beside her: nothing of hers can be read, and nothing of hers is counted
    said = run_cell(grace, ALLOCATE + SPY + f"gib(1)\nprint(json.dumps(spy({str(places[0])!r})))")
    assert set(json.loads(said).values()) == {"PermissionError"}, said
    seen = json.loads(run_cell(grace, SEEN))
    assert (seen["uid"], seen["pids"]) == (pwd.getpwnam(users[1]).pw_uid, [seen["me"]])
    assert (seen["total"], seen["used"]) == (78 * 1024 // 8, 1024 + 300)
    expect(grace.locator(".nbgpu-Status")).to_contain_text("1.2 of 9.7 GiB")
    assert grace.locator("#nbgpu-panel tbody").count() == 1
    shot(grace, "10-grace-beside-her")

    # control: the same questions about a slice of one's own
    own = json.loads(run_cell(ada, SPY + f"print(json.dumps(spy({str(places[0])!r})))"))
    assert {name for name, answer in own.items() if answer == "could"} == {"use", "api.sock"}
    answers = agent.slices().slices
    assert {known.slice.owner.user for known in answers} == set(users)
    for page in pages.values():
        stop(page, hub)
    wait_for("both slices are free", lambda: not agent.slices().slices, 30)
