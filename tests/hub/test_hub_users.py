"""`LocalGPUSpawner` as root with real users of the machine: each server runs as its user, and its slice is nobody else's.

Two Unix users are made for the test and removed after it.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hub_process import ROOT, Hub, until

from nbgpu.client import AgentClient, PoolClient

LIB = ROOT / "nodeagent" / "nbgpu_agent" / "_lib"
BUILT = all(path.exists() for path in (LIB / "libnbgpu.so", LIB / "libnbgpu_agent.so", LIB / "sim" / "libcuda.so.1"))
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not BUILT, reason="C libraries are not built (make setup)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root starts servers of other users"),
    pytest.mark.skipif(SYSTEM_PYTHON is None, reason="no Python that every user may run"),
    pytest.mark.skipif(shutil.which("useradd") is None, reason="no useradd on this machine"),
]
MORE = """
c.JupyterHub.spawner_class = "localprocess"
c.Spawner.cmd = [{python!r}, {server!r}]
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 30}}
setup(c, runtime={run!r})
"""
TENANT = """
import json, os, socket, sys
own, other, runtime = sys.argv[1:]
def refused(what):
    try:
        what()
    except (PermissionError, FileNotFoundError):
        return True
    except OSError as error:
        return str(error)
    return False
def connect(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
def put(path, body):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        head = b"PUT /v1/kernels/k HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
        s.sendall(head + body)
        return int(s.recv(65536).split()[1])
print(json.dumps({
    "uid": os.getuid(),
    "own use": refused(lambda: open(own + "/use", "r+b").close()),
    "own api": refused(lambda: connect(own + "/api.sock")),
    "own ctl read": refused(lambda: open(own + "/ctl", "rb").close()),
    "own ctl write": refused(lambda: open(own + "/ctl", "r+b").close()),
    "own ctl replaced": refused(lambda: os.rename(own + "/ctl", own + "/old")),
    "own record": refused(lambda: open(own + "/slice.json", "r+b").close()),
    "own use replaced": refused(lambda: os.unlink(own + "/use")),
    "other use read": refused(lambda: open(other + "/use", "rb").close()),
    "other use write": refused(lambda: open(other + "/use", "r+b").close()),
    "other api": refused(lambda: connect(other + "/api.sock")),
    "other ctl write": refused(lambda: open(other + "/ctl", "r+b").close()),
    "slices listed": refused(lambda: os.listdir(runtime + "/slices")),
    "agent": refused(lambda: connect(runtime + "/agent.sock")),
    "pool": refused(lambda: connect(runtime + "/pool.sock")),
    "kernel above the slice": put(own + "/api.sock", b'{"memory_bytes": %d}' % 2**40),
    "kernel within it": put(own + "/api.sock", b'{"memory_bytes": %d}' % 2**30),
}))
"""
ALLOWED = {"own use", "own api", "own ctl read"}


@pytest.fixture(scope="module")
def users() -> Iterator[list[str]]:
    names = [f"nbgpu-t{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            done = subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"useradd cannot make users here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["userdel", "--force", "--remove", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that every user can reach, with the server's program: a checkout may lie in somebody's home."""
    with tempfile.TemporaryDirectory(prefix="nbgpu-users-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copy(ROOT / "bench" / "spawn_server.py", place / "server.py")
        (place / "server.py").chmod(0o644)
        yield place
        for mounted in (place / "run" / "slices").glob("*/use"):
            subprocess.run(["umount", "-l", str(mounted)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], users: list[str], public: Path) -> Iterator[Hub]:
    run = public / "run"
    words = {"python": SYSTEM_PYTHON, "server": str(public / "server.py"), "run": str(run)}
    found = make_hub(MORE.format(**words), environment={"NBGPU_SIM_STATE": str(public / "sim"), "NBGPU_SIM_DEVICES": "1"})
    pool = PoolClient(run / "pool.sock", 5)
    until(pool.healthy, 60, "the pool answers\n" + found.log.read_text()[-3000:])
    found.add(*users)
    for user in users:
        answer = found.spawn(user, {"profile": "quarter"})
        assert answer.status_code in (201, 202), answer.text + found.log.read_text()[-3000:]
    for user in users:
        found.ready(user)
    yield found
    for user in users:
        if found.server(user):
            found.stop(user)
    until(lambda: not pool.grants(), 5, "all is free")
    assert list((run / "slices").iterdir()) == []


def slice_of(hub: Hub, public: Path, user: str) -> Path:
    return public / "run" / "slices" / hub.ready(user)["state"]["gpu_request_id"]


def test_each_server_runs_as_its_user_in_a_slice_of_its_own(hub: Hub, users: list[str], public: Path) -> None:
    for user in users:
        uid = pwd.getpwnam(user).pw_uid
        pid = hub.ready(user)["state"]["pid"]
        assert os.stat(f"/proc/{pid}").st_uid == uid
        directory = slice_of(hub, public, user)
        owners = {name: ((directory / name).stat().st_uid, (directory / name).stat().st_mode & 0o777) for name in os.listdir(directory)}
        assert owners == {"use": (uid, 0o600), "api.sock": (uid, 0o600), "ctl": (0, 0o644), "slice.json": (0, 0o644)}


def test_the_limit_holds_for_each(hub: Hub, users: list[str]) -> None:
    for user in users:
        said = httpx.get(f"http://127.0.0.1:{hub.port}/user/{user}/probe", timeout=60).json()
        assert said["status"] == 2, said
        assert said["total"] == int(78 * 1024**3 / 4)
        assert said["free"] - said["block"] < said["had"] <= said["free"]


def as_tenant(hub: Hub, public: Path, user: str, other: str, run_as: int) -> dict[str, object]:
    """Return what a program of the user's server can and cannot do: False = it could."""
    arguments = [str(slice_of(hub, public, user)), str(slice_of(hub, public, other)), str(public / "run")]
    done = subprocess.run(
        [str(SYSTEM_PYTHON), "-c", TENANT, *arguments], user=run_as, group=run_as, extra_groups=[], cwd="/", capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nobody_reaches_what_is_not_theirs(hub: Hub, users: list[str], public: Path) -> None:
    for user, other in (users, users[::-1]):
        uid = pwd.getpwnam(user).pw_uid
        said = as_tenant(hub, public, user, other, uid)
        assert said.pop("uid") == uid
        assert said.pop("kernel above the slice") == 400
        assert said.pop("kernel within it") == 200
        assert said == {what: what not in ALLOWED for what in said}


def test_control_only_the_account_makes_the_difference(hub: Hub, users: list[str], public: Path) -> None:
    """The same program as root may open everything: it asks for what is there."""
    slices = [slice_of(hub, public, user) for user in users]
    program = TENANT.partition("print(")[0] + (
        "print(json.dumps([refused(lambda: open(d + n, 'r+b').close()) for d in (own, other) for n in ('/use', '/ctl')]"
        " + [refused(lambda: connect(p)) for p in (other + '/api.sock', runtime + '/agent.sock', runtime + '/pool.sock')]))"
    )
    arguments = [str(slices[0]), str(slices[1]), str(public / "run")]
    done = subprocess.run([str(SYSTEM_PYTHON), "-c", program, *arguments], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == [False] * 7


def test_a_stopped_server_leaves_nothing(hub: Hub, users: list[str], public: Path) -> None:
    user = users[1]
    directory = slice_of(hub, public, user)
    hub.stop(user)
    until(lambda: not directory.exists(), 3, "the slice's directory is gone")
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert [one.slice.slice_id for one in AgentClient(public / "run" / "agent.sock").slices().slices] == [
        slice_of(hub, public, users[0]).name
    ]
