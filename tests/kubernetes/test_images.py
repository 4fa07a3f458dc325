"""The images of deploy/images, in pods: each has its part, and runs with as little as the chart or KubeSpawner gives it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from chart_kit import Api, Json, image, namespace, until

pytestmark = [pytest.mark.kubernetes]

RESTRICTED = {
    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
POOL = "import nbgpu_pool.main, kubernetes, os, sys; print('uid', os.getuid()); sys.exit(nbgpu_pool.main.main(['--listen', 'x:1']))"
HUB = """
import importlib.metadata as m, nbgpu_spawner.kube, os
print("uid", os.getuid(), "jupyterhub", m.version("jupyterhub"), "kubespawner", m.version("jupyterhub-kubespawner"))
"""
USER = r"""
import os, re, subprocess
import pynvml, cuda.bindings.driver
print("uid", os.getuid())
print("modules", pynvml.__name__, cuda.bindings.driver.__name__)
for which in ("labextension", "server extension"):
    done = subprocess.run(["jupyter", *which.split(), "list"], capture_output=True, text=True)
    print(re.sub("\x1b[[0-9;]*m", "", done.stdout + done.stderr))
"""
AGENT = """
import pathlib, re, subprocess, sys, nbgpu_agent
lib = pathlib.Path(nbgpu_agent.__file__).parent / "_lib" / "libnbgpu.so"
needed = {tuple(map(int, one.split(b"."))) for one in re.findall(rb"GLIBC_([0-9.]+)", lib.read_bytes())}
print("glibc", ".".join(map(str, max(needed))))
command = [sys.executable, "-m", "nbgpu_agent", "--simulate", "--runtime-dir", "/tmp/nbgpu"]
agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
for line in agent.stderr:
    print(line, end="")
    if "ready:" in line:
        agent.terminate()
print("ended", agent.wait(20))
"""


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Api, str]]:
    api = Api()
    with namespace(api, f"images-{uuid.uuid4().hex[:6]}", {"pod-security.kubernetes.io/enforce": "restricted"}) as name:
        yield api, name


def printed(place: tuple[Api, str], part: str, program: str, seconds: float = 90) -> str:
    """Run a Python program in a part's image, as an ordinary user without rights; return what it printed."""
    api, where = place
    name = f"{part}-{uuid.uuid4().hex[:6]}"
    # where the image names no user by number Kubernetes needs to be told one
    security = {**RESTRICTED, **({"runAsUser": 1000} if part == "agent" else {})}
    container: Json = {
        "name": "main", "image": image(part), "imagePullPolicy": "IfNotPresent", "command": ["python", "-c", program],
        "securityContext": security, "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}], "env": [{"name": "HOME", "value": "/tmp"}],
    }  # fmt: skip
    spec = {"restartPolicy": "Never", "containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}
    path = f"/api/v1/namespaces/{where}/pods"
    api.done("POST", path, {"metadata": {"name": name}, "spec": spec})
    phase = {}

    def ended() -> bool:
        phase.update(api.done("GET", f"{path}/{name}")["status"])
        waiting = [one["state"].get("waiting", {}).get("reason", "") for one in phase.get("containerStatuses", [])]
        if any(word in reason for reason in waiting for word in ("ErrImage", "ImagePull", "InvalidImageName")):
            pytest.skip(f"{image(part)} is not to be had on this cluster; build deploy/images, or name yours in NBGPU_IMAGES")
        return phase["phase"] in ("Succeeded", "Failed")

    until(f"{name} to end", ended, seconds)
    return api.log(where, name)


def test_the_pools(place: tuple[Api, str]) -> None:
    said = printed(place, "pool", POOL)
    assert "uid 65532" in said
    assert "--listen is 'x:1'" in said or "--listen needs tokens" in said  # it runs, and says what is wrong


def test_the_hubs(place: tuple[Api, str]) -> None:
    said = printed(place, "hub", HUB)
    assert "uid 1000 jupyterhub " in said


def test_the_users(place: tuple[Api, str]) -> None:
    said = printed(place, "user", USER)
    assert "uid 1000" in said
    assert "modules pynvml cuda.bindings.driver" in said
    lines = [line.split() for line in said.splitlines()]
    assert any("nbgpu" in line[0] and line[2:4] == ["enabled", "OK"] for line in lines if line), said
    assert ["nbgpu_lab", "enabled"] in lines, said


def test_the_agents(place: tuple[Api, str]) -> None:
    said = printed(place, "agent", AGENT)
    [needed] = [line.split()[1] for line in said.splitlines() if line.startswith("glibc ")]
    assert tuple(map(int, needed.split("."))) <= (2, 17)
    assert "ready: 2 simulated GPUs" in said
    assert "ended 0" in said
