"""The real node of the cluster in KUBECONFIG with nbgpu's agent on it, and pods that use a slice.

    def test_x(node: Node, place: Place):                  # fixtures: see conftest.py
        claim = place.claim("1/4")                          # sealed with the node's key, as the pool would make it
        pod = place.pod(claim)                              # a container `main` of a plain image that sleeps, and has the slice
        place.wait_running(pod)
        assert "MiB" in place.exec(pod, "nvidia-smi")

A `Node` is the agent as a process of this machine, as root, with simulated GPUs, for the cluster's one real node. It holds an exclusive
lock on ``/tmp/nbgpu-node.lock`` from `start` to `close`: whoever else wants the node waits. The kubelet is the cluster's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from nbgpu.claims import DRIVER, as_body, claim_for, device_name
from nbgpu.models import Device, Owner, Slice, SliceDevice

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path("/tmp/nbgpu-node.lock")
LOCK_SECONDS = 900
KEY = b"the-key-of-the-node-kit-0123456789"
PLAIN = os.environ.get("NBGPU_IMAGES", "localhost/nbgpu-{}:test").format("plain")
"""A Debian with Python, on the node (plain.Dockerfile)."""
Json = dict[str, Any]
T = TypeVar("T")


def until(what: str, probe: Callable[[], T], seconds: float = 30) -> T:
    """Wait until `probe` returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
    return found


class Api:
    """The API server as raw JSON, and exec in pods."""

    def __init__(self) -> None:
        kubernetes = pytest.importorskip("kubernetes")
        self._client = kubernetes.config.new_client_from_config(os.environ["KUBECONFIG"])

    def call(self, method: str, path: str, body: Any = None, content: str = "application/json") -> tuple[int, Json]:
        """Return status and answer."""
        rest = self._client.rest_client.pool_manager
        headers = {"Accept": "application/json", "Content-Type": content}
        url = self._client.configuration.host + path
        done = rest.request(method, url, body=None if body is None else as_body(body), headers=headers, timeout=20)
        return done.status, json.loads(done.data)

    def done(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Json:
        """As `call`, for what must succeed."""
        status, answer = self.call(method, path, body, content)
        assert status < 300, answer.get("message", answer)
        return answer

    def text(self, path: str) -> str:
        """Return what a path answers: a log."""
        rest = self._client.rest_client.pool_manager
        return rest.request("GET", self._client.configuration.host + path, timeout=20).data.decode(errors="replace")

    def exec(self, namespace: str, pod: str, container: str, command: Sequence[str], seconds: float) -> tuple[int, str]:
        """Run a command in a container; return its exit status and all that it printed."""
        import kubernetes
        from kubernetes.stream import stream

        # `stream` changes the client that it is given: one of its own each time
        client = kubernetes.config.new_client_from_config(os.environ["KUBECONFIG"])
        call = kubernetes.client.CoreV1Api(client).connect_get_namespaced_pod_exec
        running = stream(
            call, pod, namespace, container=container, command=list(command), stdin=False, stdout=True, stderr=True, tty=False,
            _preload_content=False,
        )  # fmt: skip
        text = ""
        deadline = time.monotonic() + seconds
        while running.is_open():
            running.update(timeout=1)
            text += running.read_stdout() if running.peek_stdout() else ""
            text += running.read_stderr() if running.peek_stderr() else ""
            assert time.monotonic() < deadline, f"{command} in {pod} took more than {seconds} s: {text[-2000:]}"
        text += (running.read_stdout() or "") + (running.read_stderr() or "")
        try:
            code = running.returncode
        except ValueError as error:  # it could not even be started: that is how this client says so
            code, text = 127, f"{text}{error}"
        running.close()
        return code if code is not None else -1, text


class Node:
    """The agent on the cluster's real node.

    Parameters
    ----------
    arguments : sequence of str
        Further options of the agent (``--foreign-claims``).
    devices : int
        Simulated GPUs, 80 GiB each.

    Attributes
    ----------
    name : str
        The Node.
    runtime : Path
        The agent's runtime directory.
    """

    def __init__(self, arguments: Sequence[str] = (), devices: int = 2, env: dict[str, str] | None = None):
        self.api = Api()
        self.arguments = list(arguments)
        self.count = devices
        self.env = dict(env or {})
        self.name = _real_node(self.api)
        self.process: subprocess.Popen[bytes] | None = None
        self._others: list[subprocess.Popen[bytes]] = []
        self._lock: int | None = None
        self.uuids: dict[int, str] = {}
        """Of the GPUs, by index."""
        self.runtime = Path()
        self.key_file = Path()
        self.kubelet_dir = Path(os.environ.get("NBGPU_KUBELET_DIR", "/var/lib/kubelet"))
        self.cdi_dir = Path(os.environ.get("NBGPU_CDI_DIR", "/var/run/cdi"))

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> Node:
        """Take the lock, start the agent, wait until its devices are published and the kubelet knows it."""
        if self._lock is None:
            self._take_lock()
            self.runtime = Path(tempfile.mkdtemp(prefix="nbgpu-", dir="/run"))
            self.key_file = self.runtime / "test-key"
            self.key_file.write_bytes(KEY)
            self._device_class()
        self.launch()
        self.wait_ready()
        return self

    def _take_lock(self) -> None:
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            assert time.monotonic() < deadline, f"somebody else has the node ({LOCK})"
            time.sleep(0.3)
        self._lock = fd

    def _device_class(self) -> None:
        body = {"metadata": {"name": DRIVER}, "spec": {"selectors": [{"cel": {"expression": f'device.driver == "{DRIVER}"'}}]}}
        status, answer = self.api.call("POST", "/apis/resource.k8s.io/v1/deviceclasses", body)
        assert status in (201, 409), answer

    def launch(self, *more: str, env: dict[str, str] | None = None, program: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start the agent's process, without waiting for anything; the one that was started last is `process`."""
        command = [
            *(program or (sys.executable, "-m", "nbgpu_agent")),
            "--kubernetes",
            f"--node={self.name}",
            f"--seal-key={self.key_file}",
            f"--cdi-dir={self.cdi_dir}",
            f"--kubelet-dir={self.kubelet_dir}",
            f"--runtime-dir={self.runtime}",
            "--devices=all",
            "--simulate",
            f"--sim-devices={self.count}",
            "--log-level=info",
            *self.arguments,
            *more,
        ]
        around = {**os.environ, **self.env, **(env or {})}
        around["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "nodeagent"), around.get("PYTHONPATH", "")])
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=around)
        self._others.append(self.process)
        return self.process

    @property
    def log_file(self) -> Path:
        """What the agents of this node have said."""
        return self.runtime.with_suffix(".log")

    def log(self) -> str:
        """Return what the agents of this node have said."""
        return self.log_file.read_text(errors="replace")

    def wait_ready(self, seconds: float = 60, or_killed: bool = False) -> None:
        """Wait until the agent that was started last serves, or has been killed where that may happen."""
        process = self.process
        assert process is not None

        def ready() -> bool:
            if or_killed and process.poll() == -signal.SIGKILL:
                return True
            assert process.poll() is None, f"the agent ended: {self.log()[-3000:]}"
            note = self.runtime / "kubelet.endpoint"
            mine = note.exists() and self.log().count("registered with the kubelet") > self._registered
            return bool(mine and self.resource_slice() and self.admin_up())

        try:
            until("the agent to serve", ready, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.log()[-3000:]}") from None
        self._registered = self.log().count("registered with the kubelet")
        if not self.uuids:
            self.uuids = {one.index: one.uuid for one in self.devices()}

    def wait_registered(self) -> None:
        """Note the registrations so far, for `wait_ready` of the next agent."""
        until("the admin API", self.admin_up)
        self._registered = self.log().count("registered with the kubelet")

    _registered = 0

    def kill(self) -> None:
        """End the agent with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the agent as a pod's end would; slices stay."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the agent does not end: {self.log()[-3000:]}") from None

    def restart(self) -> None:
        """Start the agent again, whether it was killed or stopped."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        self.launch()
        self.wait_ready()

    def ensure(self) -> None:
        """Start the agent again if it does not run."""
        if self.process is None or self.process.poll() is not None:
            self.launch()
            self.wait_ready()

    def close(self) -> None:
        """End the agent, remove what it left, give the lock back."""
        for process in self._others:
            if process.poll() is None:
                process.terminate()
        for process in self._others:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._lock is None:
            return
        self.api.call("DELETE", f"/apis/resource.k8s.io/v1/resourceslices/{self.name}-{DRIVER}")
        for spec in self.cdi_dir.glob(f"{DRIVER}-*.json"):
            spec.unlink()
        for socket in (*(self.kubelet_dir / "plugins_registry").glob(f"{DRIVER}*"), *(self.kubelet_dir / "plugins" / DRIVER).glob("*")):
            socket.unlink()
        for use in self.runtime.glob("slices/*/use"):
            subprocess.run(["umount", "-l", str(use)], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.runtime, ignore_errors=True)
        if os.environ.get("NBGPU_KEEP_LOGS"):
            print(self.log())
        self.log_file.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    # -- what there is -----------------------------------------------------------------------------------------------------

    def admin(self, path: str = "/v1/node", method: str = "GET", **more: Any) -> Any:
        """Ask the agent's admin API."""
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.runtime / "agent.sock")), base_url="http://agent", timeout=10
        ) as client:
            return client.request(method, path, **more).raise_for_status().json()

    def admin_up(self) -> bool:
        """Return whether the admin API answers."""
        with contextlib.suppress(httpx.HTTPError):
            return bool(self.admin())
        return False

    def devices(self) -> list[Device]:
        """Return the GPUs."""
        return [Device.model_validate(one) for one in self.admin()["devices"]]

    def slices(self) -> dict[str, Json]:
        """Return the agent's slices by id."""
        return {one["slice"]["slice_id"]: one for one in self.admin("/v1/slices")["slices"]}

    def events(self, slice_id: str | None = None) -> list[Json]:
        """Return the agent's events."""
        return [one for one in self.admin("/v1/events") if slice_id is None or one["slice_id"] == slice_id]

    def resource_slice(self) -> Json | None:
        """Return this node's ResourceSlice."""
        status, found = self.api.call("GET", f"/apis/resource.k8s.io/v1/resourceslices/{self.name}-{DRIVER}")
        return found if status == 200 else None

    def cdi_specs(self) -> set[str]:
        """Return the uids of claims that have a CDI specification."""
        return {path.name[len(DRIVER) + 1 : -len(".json")] for path in self.cdi_dir.glob(f"{DRIVER}-*.json")}


def _real_node(api: Api) -> str:
    """Return the Node of this machine: the one whose kubelet runs here."""
    named = os.environ.get("NBGPU_NODE")
    if named:
        return named
    for node in api.done("GET", "/api/v1/nodes")["items"]:
        if node["status"].get("nodeInfo", {}).get("bootID", "") == Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            return node["metadata"]["name"]
    pytest.skip("no node of the cluster in KUBECONFIG is this machine")


class Place:
    """A namespace of this run for pods and claims.

    Parameters
    ----------
    labels : dict
        Of the namespace: Pod Security.
    """

    def __init__(self, node: Node, labels: dict[str, str] | None = None):
        self.node = node
        self.api = node.api
        self.namespace = f"agentkube-{uuid.uuid4().hex[:6]}"
        self.labels = labels or {}

    def start(self) -> Place:
        """Make the namespace."""
        self.api.done("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace, "labels": self.labels}})
        account = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default"
        until("the default service account", lambda: self.api.call("GET", account)[0] == 200)
        return self

    def empty(self) -> None:
        """Remove all pods and claims, and wait until the node has let go of them."""
        for pod in self.api.done("GET", self._path("pods"))["items"]:
            self.delete(pod["metadata"]["name"], wait=False)
        for claim in self.api.done("GET", self._path("resourceclaims"))["items"]:
            self.delete_claim(claim["metadata"]["name"])
        self.node.ensure()
        until("the node to be empty", lambda: not self.node.slices() and not self.node.cdi_specs(), 100)

    def close(self) -> None:
        """Remove the namespace with all in it."""
        for pod in self.api.done("GET", self._path("pods"))["items"]:
            self.delete(pod["metadata"]["name"], wait=False)
        self.api.call("DELETE", f"/api/v1/namespaces/{self.namespace}")
        until("the end of the namespace", lambda: self.api.call("GET", f"/api/v1/namespaces/{self.namespace}")[0] == 404, 90)

    def _path(self, plural: str, name: str = "", sub: str = "") -> str:
        head = "/api/v1" if plural == "pods" or plural == "events" else "/apis/resource.k8s.io/v1"
        return "/".join(part for part in (head, "namespaces", self.namespace, plural, name, sub) if part)

    # -- claims ----------------------------------------------------------------------------------------------------------

    def claim(
        self,
        compute_milli: int = 250,
        memory_bytes: int | None = None,
        device: int | Sequence[int] = 0,
        mode: str = "burst",
        user: str = "ada",
        key: bytes = KEY,
    ) -> str:
        """Make a claim as the pool would, and return its name.

        Parameters
        ----------
        memory_bytes : int, optional
            None: as large a share of each device's memory as of its time.
        device : int or several
            Indexes of GPUs of the node.
        """
        body = claim_for(self.slice(compute_milli, memory_bytes, device, mode, user), key)
        return self.api.done("POST", self._path("resourceclaims"), body)["metadata"]["name"]

    def slice(
        self, compute_milli: int, memory_bytes: int | None = None, device: int | Sequence[int] = 0, mode: str = "burst", user: str = "ada"
    ) -> Slice:
        """Return a slice that the pool could grant here."""
        devices = {one.index: one for one in self.node.devices()}
        parts = [
            SliceDevice(
                uuid=one.uuid,
                index=one.index,
                model=one.model,
                memory_bytes=memory_bytes if memory_bytes is not None else one.usable_bytes * compute_milli // 1000 // 1024**2 * 1024**2,
                compute_milli=compute_milli,
            )
            for one in (devices[index] for index in ([device] if isinstance(device, int) else device))
        ]
        return Slice(
            slice_id=uuid.uuid4().hex, owner=Owner(hub="hub", user=user), node=self.node.name, mode=mode, devices=parts,  # type: ignore[arg-type]
            simulated=True, namespace=self.namespace,
        )  # fmt: skip

    def foreign_claim(self, memory: str = "8Gi", compute: str = "100", device: int = 0, name: str | None = None) -> str:
        """Make a claim that the pool knows nothing of, and return its name."""
        chosen = {one.index: one for one in self.node.devices()}[device]
        cel = f'device.attributes["{DRIVER}"].uuid == "{chosen.uuid}"'
        exactly = {
            "deviceClassName": DRIVER,
            "selectors": [{"cel": {"expression": cel}}],
            "capacity": {"requests": {"memory": memory, "compute": compute}},
        }
        body = {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceClaim",
            "metadata": {"name": name or f"own-{uuid.uuid4().hex[:6]}"},
            "spec": {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}},
        }
        return self.api.done("POST", self._path("resourceclaims"), body)["metadata"]["name"]

    def get_claim(self, name: str) -> Json | None:
        """Return a claim; None when it is gone."""
        status, found = self.api.call("GET", self._path("resourceclaims", name))
        return found if status == 200 else None

    def claim_uid(self, name: str) -> str:
        """Return a claim's UID."""
        found = self.get_claim(name)
        assert found is not None
        return found["metadata"]["uid"]

    def slice_id(self, claim: str) -> str:
        """Return the id of the slice of a pool's claim."""
        return claim.removeprefix("nbgpu-")

    def delete_claim(self, name: str) -> None:
        """Ask for a claim's end."""
        self.api.call("DELETE", self._path("resourceclaims", name))

    # -- pods ------------------------------------------------------------------------------------------------------------

    def pod(self, claim: str | None, command: Sequence[str] = ("sleep", "inf"), name: str | None = None, **changes: Any) -> str:
        """Make a pod whose container `main` has the claim, and return its name.

        Parameters
        ----------
        changes
            ``container`` and ``spec``: dictionaries laid over the container and the pod's spec; ``containers``: further containers.
        """
        name = name or f"pod-{uuid.uuid4().hex[:6]}"
        container: Json = {
            "name": "main",
            "image": PLAIN,
            "imagePullPolicy": "Never",
            "command": list(command),
            **({"resources": {"claims": [{"name": "gpu"}]}} if claim else {}),
            **changes.get("container", {}),
        }
        spec: Json = {
            "nodeName": None,
            "nodeSelector": {"kubernetes.io/hostname": self.node.name},
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [container, *changes.get("containers", [])],
            **({"resourceClaims": [{"name": "gpu", "resourceClaimName": claim}]} if claim else {}),
            **changes.get("spec", {}),
        }
        body = {"metadata": {"name": name}, "spec": {key: value for key, value in spec.items() if value is not None}}
        self.api.done("POST", self._path("pods"), body)
        return name

    def get_pod(self, name: str) -> Json | None:
        """Return a pod; None when it is gone."""
        status, found = self.api.call("GET", self._path("pods", name))
        return found if status == 200 else None

    def phase(self, name: str) -> str:
        """Return a pod's phase."""
        pod = self.get_pod(name)
        return "gone" if pod is None else pod["status"].get("phase", "")

    def wait_running(self, name: str, seconds: float = 45) -> Json:
        """Wait until all containers of a pod are ready."""

        nudge_at = time.monotonic() + 8

        def running() -> Json | None:
            nonlocal nudge_at
            if time.monotonic() > nudge_at:
                nudge_at += 8
                self.nudge(name)
            pod = self.get_pod(name)
            assert pod is not None, f"pod {name} is gone"
            states = pod["status"].get("containerStatuses", [])
            reasons = {one.get("state", {}).get("waiting", {}).get("reason") for one in states}
            assert "ErrImageNeverPull" not in reasons, f"the node has no image {[one['image'] for one in states]}"
            return pod if states and all(one["ready"] for one in states) else None

        try:
            return until(f"pod {name}", running, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.events(name)} {self.node.log()[-2000:]}") from None

    def nudge(self, name: str) -> None:
        """Let the kubelet look at a pod now: after a failed prepare, or where it may not read the claim yet, it would in 60 to 90 s."""
        body = {"metadata": {"annotations": {"test/nudge": str(time.time())}}}
        self.api.call("PATCH", self._path("pods", name), body, "application/merge-patch+json")

    def delete(self, name: str, *, wait: bool = True, force: bool = False) -> None:
        """Delete a pod."""
        self.api.call("DELETE", self._path("pods", name), {"gracePeriodSeconds": 0} if force else None)
        if wait:
            until(f"the end of pod {name}", lambda: self.get_pod(name) is None, 60)

    def exec(self, pod: str, *command: str, container: str = "main", seconds: float = 30, check: bool = True) -> str:
        """Run a command in a container and return all that it printed; an error unless it ended with 0."""
        code, text = self.api.exec(self.namespace, pod, container, command, seconds)
        assert not check or code == 0, f"{command} ended with {code}: {text[-3000:]}"
        return text

    def python(self, pod: str, program: str, *, container: str = "main", seconds: float = 30, check: bool = True) -> str:
        """Run a Python program in a container."""
        return self.exec(pod, "python3", "-c", program, container=container, seconds=seconds, check=check)

    def events(self, name: str) -> list[str]:
        """Return the messages of the Events about an object of this namespace."""
        found = self.api.done("GET", self._path("events"))["items"]
        return [one["message"] for one in found if one["involvedObject"].get("name") == name]


@contextlib.contextmanager
def node_with_place(arguments: Sequence[str] = (), **more: Any) -> Iterator[tuple[Node, Place]]:
    """Start an agent and make a namespace; end both."""
    node = Node(arguments, **more)
    try:
        place = Place(node.start()).start()
        try:
            yield node, place
        finally:
            place.close()
    finally:
        node.close()


__all__ = ["KEY", "Api", "Node", "Place", "device_name", "node_with_place", "until"]
