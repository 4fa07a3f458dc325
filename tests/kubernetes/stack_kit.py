"""nbgpu from its chart on a real node of the cluster: pool and agent as pods, on simulated GPUs."""

from __future__ import annotations

import base64
import fcntl
import json
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from chart_kit import CHART, Api, Json, helm, image, namespace, options, until
from z2jh_kit import Hub, hub, node_address, values_of_a_hub

from nbgpu.claims import DRIVER, parse_quantity

SHOTS = Path(__file__).parent / "shots"
LOCK = Path("/tmp/nbgpu-node.lock")
CLASS = f"/apis/resource.k8s.io/v1/deviceclasses/{DRIVER}"
CLAIMS = "/apis/resource.k8s.io/v1/resourceclaims"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
MODEL = "Simulated H100 80GB"
GIB = 1024**3
DEVICE_BYTES = 78 * GIB
"""Of a simulated GPU, what can be given: 80 GiB less its reserve of 2."""


@contextmanager
def node_lock() -> Iterator[None]:
    """Be the one who runs an agent on this machine's node: there is one driver name and one set of its sockets."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Stack:
    """The chart's release `nbgpu-<run>` in a namespace of its own, and the namespace of a hub beside it."""

    def __init__(self, api: Api):
        self.api = api
        self.run = run = uuid.uuid4().hex[:6]
        self.release = f"nbgpu-{run}"
        self.namespace = f"gpu-{run}"
        self.hub_namespace = f"jhub-{run}"
        self.hub_name = f"hub-{run}"
        self.marks = {"nbgpu-test/run": run}
        """Labels of the run's namespaces: the chart's rules hold there alone."""
        address = node_address(api)
        [self.node] = [
            one["metadata"]["name"]
            for one in api.done("GET", "/api/v1/nodes")["items"]
            if {"type": "InternalIP", "address": address} in one.get("status", {}).get("addresses", [])
        ]
        self.values: Json = {}
        self.runtime = Path(f"/run/nbgpu-{run}")

    # -- helm

    def install(self, devices: int = 1, **more: Any) -> None:
        """Install the chart, and wait until the pool leads and the node's GPUs are published."""
        agent: Json = {"simulate": {"enabled": True, "devices": devices}, "nodeSelector": {"kubernetes.io/hostname": self.node}}
        agent["runtimeDir"] = str(self.runtime)
        images = {part: dict(zip(("name", "tag"), image(part).rsplit(":", 1), strict=True)) for part in ("pool", "agent")}
        self.values = {
            "images": images,
            "hubs": [{"name": self.hub_name, "namespace": self.hub_namespace}],
            "createDeviceClass": self.api.call("GET", CLASS)[0] == 404,
            "agent": agent,
            "admission": {"namespaceSelector": self.marks},
            **more,
        }
        self.helm("install")

    def upgrade(self, change: Callable[[Json], Any]) -> None:
        """Upgrade the release with values that `change` has changed."""
        change(self.values)
        self.helm("upgrade")

    def helm(self, action: str) -> None:
        """Run helm; wait for what it started."""
        helm(action, self.release, str(CHART), "--namespace", self.namespace, *options(self.values))
        self.settled()

    def uninstall(self) -> None:
        """Remove the release, where it is."""
        helm("uninstall", self.release, "--namespace", self.namespace, "--ignore-not-found", "--wait", check=False)

    def settled(self, seconds: float = 120) -> None:
        """Wait until all pods are the newest and ready, one pool leads, and the GPUs are there."""
        until("the pods of the chart", self._rolled_out, seconds, self.log)
        until("a pool that leads", lambda: self.pool("/readyz").status_code == 200, 60, self.log)
        until("the node's GPUs", self.resource_slices, 60, self.log)

    def _rolled_out(self) -> bool:
        base = f"/apis/apps/v1/namespaces/{self.namespace}"
        pool = self.api.done("GET", f"{base}/deployments/{self.release}-pool")
        agent = self.api.done("GET", f"{base}/daemonsets/{self.release}-agent")
        told, wanted = pool.get("status", {}), pool["spec"]["replicas"]
        agents = agent.get("status", {})
        return (
            told.get("observedGeneration") == pool["metadata"]["generation"]
            and told.get("updatedReplicas") == told.get("readyReplicas") == told.get("replicas") == wanted
            and agents.get("observedGeneration") == agent["metadata"]["generation"]
            and agents.get("updatedNumberScheduled") == agents.get("numberReady") == agents.get("desiredNumberScheduled") == 1
        )

    def has_image(self, name: str) -> bool:
        """Return whether the node has an image of this name."""
        found = self.api.done("GET", f"/api/v1/nodes/{self.node}")["status"].get("images", [])
        return any(name in (one["names"] or ()) for one in found)

    def run_in(self, pod: Json, *command: str) -> str:
        """Return what a command prints in a pod."""
        where = ["-n", pod["metadata"]["namespace"], pod["metadata"]["name"]]
        done = subprocess.run(["kubectl", "exec", *where, "--", *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def resource_slices(self) -> list[Json]:
        """Return what the node's agent has published."""
        found = self.api.done("GET", SLICES)["items"]
        return [one for one in found if one["spec"]["driver"] == DRIVER and one["spec"].get("nodeName") == self.node]

    # -- its parts

    def pods(self, part: str) -> list[Json]:
        """Return the pods of `pool` or `agent`."""
        return self.api.pods(self.namespace, {"app.kubernetes.io/instance": self.release, "app.kubernetes.io/component": part})

    def leader(self) -> Json:
        """Return the pod of the pool's replica that leads."""
        lease = self.api.done("GET", f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/nbgpu-pool")
        holder = lease["spec"]["holderIdentity"]
        [found] = [one for one in self.pods("pool") if holder.startswith(one["metadata"]["name"])]
        return found

    def restarted(self, pod: Json) -> bool:
        """Return whether a pod's container has been started again since, and is ready."""
        found = self.api.call("GET", f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}")[1]
        now, before = found["status"]["containerStatuses"][0], pod["status"]["containerStatuses"][0]
        return now["restartCount"] > before["restartCount"] and now["ready"]

    def log(self) -> str:
        """Return the ends of all parts' logs."""
        ends = [
            (one, self.api.log(self.namespace, one["metadata"]["name"])[-1500:]) for part in ("pool", "agent") for one in self.pods(part)
        ]
        return "".join(f"\n--- {one['metadata']['name']} {_state(one)}\n{end}" for one, end in ends)

    def pool(self, path: str) -> httpx.Response:
        """Ask the pool by its Service, with the token for reading."""
        service = self.api.done("GET", f"/api/v1/namespaces/{self.namespace}/services/{self.release}-pool")["spec"]
        secret = self.api.done("GET", f"/api/v1/namespaces/{self.namespace}/secrets/{self.release}-read-token")["data"]
        headers = {"Authorization": f"Bearer {base64.b64decode(secret['token']).decode()}"}
        try:
            return httpx.get(f"http://{service['clusterIP']}:8200{path}", headers=headers, timeout=10, trust_env=False)
        except httpx.HTTPError as error:
            return httpx.Response(503, text=str(error))

    # -- what holds

    def books(self) -> tuple[int, int]:
        """Return bytes and milli-GPU that the pool has given of the node's GPUs."""
        found = [one for one in self.pool("/v1/devices").json() if one["device"]["node"] == self.node]
        return sum(one["memory_granted_bytes"] for one in found), sum(one["compute_granted_milli"] for one in found)

    def claims(self) -> list[Json]:
        """Return all claims that hold a part of the node's GPUs."""
        found = self.api.done("GET", CLAIMS)["items"]
        return [one for one in found if any(result["pool"] == self.node for result in results(one))]

    def held(self) -> tuple[int, int]:
        """Return bytes and milli-GPU that the scheduler has given away of the node's GPUs."""
        parts = [result["consumedCapacity"] for one in self.claims() for result in results(one) if result["pool"] == self.node]
        return sum(parse_quantity(one["memory"]) for one in parts), sum(parse_quantity(one["compute"]) for one in parts)

    def check(self, claims: int) -> None:
        """Assert what must hold whenever things have settled: so many claims, each used by pods that live, and the pool knows them."""
        until(f"{claims} claims", lambda: len(self.claims()) == claims, 60, lambda: f"{self.claims()}\n{self.log()}")
        until("the pool's books to be the cluster's", lambda: self.books() == self.held(), 30, lambda: f"{self.books()} {self.held()}")
        memory, milli = self.held()
        assert memory <= DEVICE_BYTES * self.values["agent"]["simulate"]["devices"]
        assert milli <= 1000 * self.values["agent"]["simulate"]["devices"]
        for one in self.claims():
            for user in one["status"].get("reservedFor", []):
                path = f"/api/v1/namespaces/{one['metadata']['namespace']}/pods/{user['name']}"
                assert self.api.done("GET", path)["metadata"]["uid"] == user["uid"]


def results(claim: Json) -> list[Json]:
    """Return what the scheduler gave a claim."""
    found = claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", [])
    return [one for one in found if one["driver"] == DRIVER]


def _state(pod: Json) -> str:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return json.dumps([one["state"] for one in statuses] or pod.get("status", {}).get("conditions", []))[:600]


@contextmanager
def shared_directory(path: Path) -> Iterator[None]:
    """Make a directory of this machine whose mounts containers share, also where its root file system is private."""
    path.mkdir()
    try:
        for options_ in (["--bind", str(path)], ["--make-rshared"]):
            subprocess.run(["mount", *options_, str(path)], check=True)
        yield
    finally:
        inside = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mounted in sorted((one for one in inside if Path(one).is_relative_to(path)), key=len, reverse=True):
            subprocess.run(["umount", "-l", mounted], check=False)
        shutil.rmtree(path, ignore_errors=True)


def _as_shipped(told: Json) -> None:
    del told


@contextmanager
def stack(api: Api, of_hub: Callable[[Json], None] = _as_shipped, **values: Any) -> Iterator[tuple[Stack, Hub]]:
    """Run pool, agent and a zero-to-jupyterhub hub with its proxy; nothing of them is left at the end.

    `values` are the chart's; `of_hub` changes the hub's.
    """
    with ExitStack() as at_end:
        at_end.enter_context(node_lock())
        made = Stack(api)
        at_end.enter_context(shared_directory(made.runtime))
        at_end.enter_context(namespace(api, made.namespace, {**made.marks, "pod-security.kubernetes.io/enforce": "privileged"}))
        at_end.callback(made.uninstall)
        at_end.enter_context(namespace(api, made.hub_namespace, {**made.marks, "pod-security.kubernetes.io/enforce": "restricted"}))
        made.install(**values)
        url = f"http://{made.release}-pool.{made.namespace}:8200"
        others = [one for one in api.done("GET", SLICES)["items"] if one["spec"].get("nodeName") != made.node]
        told = values_of_a_hub(url, made.hub_name, f"{made.release}-hub-{made.hub_name}")
        if others:  # of tests that run beside this one
            told["hub"]["config"]["GPUSliceMixin"] = {"gpu_model": MODEL}
        of_hub(told)
        yield made, at_end.enter_context(hub(api, made.hub_namespace, told))
