"""What the chart's tests share: helm as a process, and the API server spoken to as somebody else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from nbgpu.claims import as_body

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "chart"
KUBE_VERSION = "1.36.0"
Json = dict[str, Any]


def helm(*arguments: str, check: bool = True, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    """Run helm; skip the test where there is none."""
    program = shutil.which("helm")
    if program is None:
        pytest.skip("no helm on this machine")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds)
    assert not check or done.returncode == 0, done.stderr
    return done


def options(values: Json | None = None) -> list[str]:
    """Return the options that give helm these values."""
    return [part for name, value in (values or {}).items() for part in ("--set-json", f"{name}={json.dumps(value)}")]


def render(values: Json | None = None, namespace: str = "gpu") -> list[Json]:
    """Return the chart's objects."""
    done = helm("template", "nbgpu", str(CHART), "--namespace", namespace, "--kube-version", KUBE_VERSION, *options(values))
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def pick(objects: Sequence[Json], kind: str, name: str) -> Json:
    """Return the one object of this kind and name."""
    [found] = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


class Api:
    """The API server as raw JSON, as whom one likes."""

    def __init__(self) -> None:
        kubernetes = pytest.importorskip("kubernetes")
        self._client = kubernetes.config.new_client_from_config(os.environ["KUBECONFIG"])

    def call(
        self, method: str, path: str, body: Any = None, *, user: str = "", groups: Sequence[str] = (), extra: Json | None = None,
        content: str = "application/json",
    ) -> tuple[int, Json]:  # fmt: skip
        """Return status and answer; `extra` are further facts about the user, as a token of a service account brings them."""
        import urllib3

        headers = urllib3.HTTPHeaderDict({"Accept": "application/json", "Content-Type": content})
        if user:
            headers["Impersonate-User"] = user
            for group in groups:
                headers.add("Impersonate-Group", group)
            for name, value in (extra or {}).items():
                headers[f"Impersonate-Extra-{name.replace('/', '%2f')}"] = value
        rest = self._client.rest_client.pool_manager
        url = self._client.configuration.host + path
        done = rest.request(method, url, body=None if body is None else as_body(body), headers=headers, timeout=20)
        return done.status, json.loads(done.data)

    def log(self, where: str, pod: str) -> str:
        """Return what a pod has printed."""
        rest = self._client.rest_client.pool_manager
        path = f"/api/v1/namespaces/{where}/pods/{pod}/log"
        return rest.request("GET", self._client.configuration.host + path, timeout=20).data.decode(errors="replace")

    def pods(self, where: str, labels: dict[str, str]) -> list[Json]:
        """Return a namespace's pods with these labels that nobody has asked to go."""
        selector = quote(",".join(f"{name}={value}" for name, value in labels.items()))
        found = self.done("GET", f"/api/v1/namespaces/{where}/pods?labelSelector={selector}")["items"]
        return [one for one in found if "deletionTimestamp" not in one["metadata"]]

    def done(self, method: str, path: str, body: Any = None, **more: Any) -> Json:
        """As `call`, for what must succeed."""
        status, answer = self.call(method, path, body, **more)
        assert status < 300, answer.get("message", answer)
        return answer


def image(part: str) -> str:
    """Return the image of one part; ``NBGPU_IMAGES`` says how they are called on this cluster's nodes."""
    return os.environ.get("NBGPU_IMAGES", "localhost/nbgpu-{}:test").format(part)


def until(what: str, probe: Callable[[], Any], seconds: float = 60, why: Callable[[], object] = str) -> Any:
    """Wait until `probe` returns something true, and return that; else fail, with what `why` finds."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what} {why()}"
        time.sleep(0.2)
    return found


def kill(pod: Json, container: str = "") -> int:
    """Kill every process of a container with SIGKILL, as the kernel does when memory is short; return how many.

    Only where this machine is the pod's node. Kubernetes starts the container again, in the same pod.
    """
    statuses = pod["status"]["containerStatuses"]
    [identity] = [one["containerID"].rpartition("/")[2] for one in statuses if one["name"] == (container or statuses[0]["name"])]
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if identity in (process / "cgroup").read_text():
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
    assert killed, f"no process of {pod['metadata']['name']} on this machine"
    return killed


@contextmanager
def namespace(api: Api, name: str, labels: dict[str, str] | None = None) -> Iterator[str]:
    """Make a namespace; delete it and all in it at the end."""
    labels = {"kubernetes.io/metadata.name": name, **(labels or {})}
    api.done("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    try:
        until("the default service account", lambda: api.call("GET", f"/api/v1/namespaces/{name}/serviceaccounts/default")[0] == 200)
        yield name
    finally:
        api.call("DELETE", f"/api/v1/namespaces/{name}")
        until(f"the end of namespace {name}", lambda: api.call("GET", f"/api/v1/namespaces/{name}")[0] == 404, 90)
