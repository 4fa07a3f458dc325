"""What deploy/ ships, as it is shipped: configurations load, the units' commands start, a real account's server gets its slice.

Only paths are replaced (``/opt``, ``/etc``, ``/var``, ``/run``), and no systemd runs: the units' commands are started by hand.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hub_process import ROOT, Hub, until

from nbgpu.client import AgentClient, PoolClient

DEPLOY = ROOT / "deploy"
LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin")
QUARTER_BYTES = 78 * 1024**3 // 4
OUT_OF_MEMORY = 2
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not (LIB / "libnbgpu.so").exists(), reason="C libraries are not built (make setup)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root starts servers of other users"),
    pytest.mark.skipif(SYSTEM_PYTHON is None or shutil.which("useradd") is None, reason="no Python for every user, or no useradd"),
]
TLJH = """
import pwd
from systemdspawner import SystemdSpawner
class UserCreatingSpawner(SystemdSpawner):
    def start(self):  # as TLJH's: the account's name is known from here on
        self.username_template = "jupyter-" + self.user.name
        pwd.getpwnam(self.username_template)
        return super().start()
c.JupyterHub.spawner_class = UserCreatingSpawner
c.SystemdSpawner.unit_name_template = "jupyter-{{USERNAME}}"
"""
STAND_IN = "#!{python}\nimport sys\nsys.path.insert(0, {folder!r})\nimport stand_in_systemd as s\nsys.exit(s.{function}(sys.argv[1:]))\n"
SHIPPED = """
get_config = lambda: c
exec(compile(open({config!r}).read(), {config!r}, "exec"))
c.Spawner.cmd = [{python!r}, {server!r}]
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 30}}
"""


def unit(path: Path) -> dict[str, list[str]]:
    """Return a systemd unit's settings."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def account() -> Iterator[str]:
    name = f"nbgpu-d{os.getpid()}"
    for full in (name, f"jupyter-{name}"):
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", full], capture_output=True, check=True)
    yield name
    for full in (name, f"jupyter-{name}"):
        subprocess.run(["userdel", "--force", "--remove", full], capture_output=True, check=False)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can reach: the machine's /etc, /var and /run of the test."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-deploy-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copy(ROOT / "bench" / "spawn_server.py", place / "server.py")
        (place / "server.py").chmod(0o644)
        yield place
        for mounted in (place / "run" / "slices").glob("*/use"):
            subprocess.run(["umount", "-l", str(mounted)], capture_output=True, check=False)


def install(shipped: Path, place: Path) -> str:
    """Copy a file that an admin installs, with this test's paths; return the copy's path."""
    text = shipped.read_text()
    for there in ("/var/lib/nbgpu", "/etc/nbgpu"):
        text = text.replace(there, str(place))
    (place / shipped.name).write_text(text)
    return str(place / shipped.name)


def environment(place: Path, **more: str) -> dict[str, str]:
    return {"NBGPU_SIM_STATE": str(place / "sim"), "NBGPU_SIM_DEVICES": "1", "NBGPU_RUNTIME_DIR": str(place / "run"), **more}


def check(hub: Hub, place: Path, user: str, account: str) -> None:
    """A quarter for a user: the limit holds in a process of that account, in a slice that goes with the server."""
    pool, agent = PoolClient(place / "run" / "pool.sock", 5), AgentClient(place / "run" / "agent.sock", 5)
    until(pool.healthy, 60, "the pool answers")
    hub.add(user)
    answer = hub.spawn(user, {"profile": "quarter"})
    assert answer.status_code in (201, 202), answer.text + hub.log.read_text()[-3000:]
    hub.ready(user, 120)
    said = httpx.get(f"http://127.0.0.1:{hub.port}/user/{user}/probe", timeout=60).json()
    assert (said["status"], said["total"]) == (OUT_OF_MEMORY, QUARTER_BYTES)
    assert said["had"] > QUARTER_BYTES - 1024**3
    (known,) = agent.slices().slices
    assert known.slice.owner.user == user
    assert known.process_count >= 1
    use = place / "run" / "slices" / known.slice.slice_id / "use"
    assert use.stat().st_uid == pwd.getpwnam(account).pw_uid
    grant = pool.grants()[0]
    assert grant.state == "bound"
    hub.stop(user)
    until(
        lambda: not agent.slices().slices and not any(one.state == "bound" for one in pool.grants()), 20, "the slice went with the server"
    )
    hub.end()  # before its files go: its agent and pool would be started again and again without them


def test_workstation(make_hub: Callable[..., Hub], public: Path, account: str) -> None:
    shipped = DEPLOY / "workstation"
    service = unit(shipped / "nbgpu-hub.service")
    assert service["ExecStart"] == ["/opt/nbgpu/bin/jupyterhub -f /etc/nbgpu/jupyterhub_config.py"], "as the README installs it"
    assert "NBGPU_RUNTIME_DIR=/run/nbgpu" in service["Environment"]
    assert service["KillMode"] == ["process"], "servers outlive the hub"
    hub = make_hub(
        'c.JupyterHub.pop("spawner_class")\naddress = c.JupyterHub.bind_url\n'
        + SHIPPED.format(config=install(shipped / "jupyterhub_config.py", public), python=SYSTEM_PYTHON, server=str(public / "server.py"))
        + "c.JupyterHub.bind_url = address\n",
        environment=environment(public),
    )
    assert (public / "jupyterhub.sqlite").exists(), "it lives where the configuration says"
    check(hub, public, account, account)


def test_tljh(make_hub: Callable[..., Hub], public: Path, account: str, place: Path) -> None:
    pytest.importorskip("systemdspawner")
    shipped = DEPLOY / "tljh"
    install(shipped / "pool.yaml", public)
    programs = public / "bin"
    programs.mkdir()
    (public / "units").mkdir()
    for name in ("systemctl", "systemd-run"):
        (programs / name).write_text(
            STAND_IN.format(python=sys.executable, folder=str(Path(__file__).parent), function=name.replace("-", "_"))
        )
        (programs / name).chmod(0o755)
    env = environment(public, PATH=f"{programs}:{os.environ['PATH']}", NBGPU_TEST_UNITS=str(public / "units"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name in ("nbgpu-agent.service", "nbgpu-pool.service"):
            (line,) = unit(Path(install(shipped / name, public)))["ExecStart"]
            program, *arguments = shlex.split(line)
            assert program == "/opt/tljh/hub/bin/nbgpu"
            started.append(subprocess.Popen([sys.executable, "-m", "nbgpu", *arguments], env={**os.environ, **env}))
        known = (place / "hub.log").stat().st_size if (place / "hub.log").exists() else 0  # the other hub of this module logs there too
        more = TLJH + SHIPPED.format(config=str(shipped / "nbgpu.py"), python=SYSTEM_PYTHON, server=str(public / "server.py"))
        hub = make_hub(more.replace("{{", "{").replace("}}", "}"), environment=env)
        assert "nbgpu-agent" not in hub.log.read_bytes()[known:].decode(), "agent and pool are not the hub's services"
        check(hub, public, account, f"jupyter-{account}")
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(15)
