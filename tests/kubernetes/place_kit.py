"""Nodes, GPUs and a namespace on a cluster that exist only as objects, with a stand-in for the nodes' kubelets.

The scheduler, the controllers and the API server are the cluster's own. Everything has names of this run; nodes are tainted so that
nobody else's pods come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from nbgpu.claim_limits import in_force, shares
from nbgpu.claims import DRIVER, SLICE_LABEL, claim_name, device_name, parse_quantity, resource_slice
from nbgpu.kube import Conflict, Json, Kube, NotFound, path
from nbgpu.kube_reflector import Reflector
from nbgpu.models import Device

RESOURCE = "resource.k8s.io/v1"
GIB = 1024**3
T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 30, why: str | Callable[[], str] = "") -> T:
    """Return what `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain {why if isinstance(why, str) else why()}")
        time.sleep(0.03)


class Background:
    """An event loop of its own in a thread, so that tests read from top to bottom."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        """Return what `work` returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)


class Place:
    """Nodes, GPUs and a namespace of this run on the cluster of KUBECONFIG."""

    def __init__(self, nodes: int = 2, devices: int = 2) -> None:
        self.run_id = uuid.uuid4().hex[:6]
        self.model = f"Test {self.run_id}"
        self.namespace = f"poolkube-{self.run_id}"
        self.back = Background()
        self.kube = self.do(self._connect())
        self.nodes = [f"poolkube-{self.run_id}-{number}" for number in range(nodes)]
        self.devices = {
            node: [
                Device(
                    uuid=f"GPU-{node}-{index}", index=index, model=self.model, node=node, memory_bytes=82 * GIB, reserve_bytes=2 * GIB,
                    simulated=True,
                )
                for index in range(devices)
            ]
            for node in self.nodes
        }  # fmt: skip
        self.generation = 0
        self.silent: set[str] = set()
        """Nodes whose kubelet does not answer."""
        self.kubelet: Reflector[Json] | None = None

    async def _connect(self) -> Kube:
        return Kube()

    def do(self, work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        """Run `work` to its end."""
        return self.back.run(work, seconds)

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make everything."""
        with contextlib.suppress(Conflict):
            selector = {"cel": {"expression": f'device.driver == "{DRIVER}"'}}
            body: Json = {"metadata": {"name": DRIVER}, "spec": {"selectors": [selector]}}
            self.do(self.kube.create(path(RESOURCE, "deviceclasses"), body))
        self.make_namespace(self.namespace)
        for node in self.nodes:
            self.make_node(node)
            self.publish(node)
        self.do(self._start_kubelets())

    def stop(self) -> None:
        """Remove everything."""
        assert self.kubelet is not None
        with contextlib.suppress(NotFound):
            self.do(self.kube.delete(path("v1", "namespaces", name=self.namespace)))
        until(lambda: self.get("v1", "namespaces", None, self.namespace) is None, 60)
        self.do(self.kubelet.stop())
        for node in self.nodes:
            self._delete_node(node)
        self.do(self.kube.close())

    def make_namespace(self, name: str) -> None:
        self.do(self.kube.create(path("v1", "namespaces"), {"metadata": {"name": name}}))

    def make_node(self, name: str, cpu: str = "8", labels: dict[str, str] | None = None) -> None:
        """Make a Ready node that only this run's pods tolerate."""
        size = {"cpu": cpu, "memory": "64Gi", "pods": "100"}
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "ready"}
        node = {
            "metadata": {"name": name, "labels": {"poolkube": self.run_id, "kubernetes.io/hostname": name, **(labels or {})}},
            "spec": {"taints": [{"key": "poolkube", "value": self.run_id, "effect": "NoSchedule"}]},
            "status": {"allocatable": size, "capacity": size, "conditions": [ready]},
        }
        self.do(self.kube.create(path("v1", "nodes"), node))

    def publish(self, node: str, published: dict[str, tuple[int, int]] | None = None) -> None:
        """Write a node's ResourceSlice, as its agent would."""
        self.do(self.publish_soon(node, published))

    async def publish_soon(self, node: str, published: dict[str, tuple[int, int]] | None = None) -> None:
        """Write a node's ResourceSlice, on the loop of `back`."""
        self.generation += 1
        body = resource_slice(node, self.devices[node], published or {}, self.generation)
        await self.kube.patch(path(RESOURCE, "resourceslices", name=body["metadata"]["name"]), body, kind="apply", force=True)

    # -- the kubelets' part ----------------------------------------------------------------------------------------------

    async def _start_kubelets(self) -> None:
        self.kubelet = Reflector(self.kube, path("v1", "pods"), lambda pod: pod, changed=self._pod_changed)
        self.kubelet.start()
        self._beat = asyncio.create_task(self._heartbeat())
        self._moves: set[asyncio.Task[None]] = set()

    def _pod_changed(self, key: tuple[str, str], old: Json | None, new: Json | None) -> None:
        if new is not None and new["spec"].get("nodeName") in self.nodes and new["spec"]["nodeName"] not in self.silent:
            task = asyncio.get_running_loop().create_task(self._tend(key, new))
            self._moves.add(task)
            task.add_done_callback(self._moves.discard)

    def wake(self) -> None:
        """Let all kubelets answer, first about what came while they did not."""
        self.silent.clear()
        there = list(self.kubelet.items.items()) if self.kubelet is not None else []
        self.back.loop.call_soon_threadsafe(lambda: [self._pod_changed(key, None, pod) for key, pod in there])

    async def _tend(self, key: tuple[str, str], pod: Json) -> None:
        """Start a pod that came; finish one that shall go."""
        with contextlib.suppress(NotFound, Conflict):
            if "deletionTimestamp" in pod["metadata"]:
                await self.kube.delete(path("v1", "pods", *key), uid=pod["metadata"]["uid"], grace_seconds=0)
            elif pod.get("status", {}).get("phase") == "Pending":
                await self.kube.patch(path("v1", "pods", *key, "status"), {"status": {"phase": "Running"}}, uid=pod["metadata"]["uid"])

    async def _heartbeat(self) -> None:
        while True:
            for node in self.nodes:
                if node not in self.silent:
                    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
                    body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node},
                            "spec": {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": stamp}}  # fmt: skip
                    with contextlib.suppress(Exception):
                        await self.kube.patch(
                            path("coordination.k8s.io/v1", "leases", "kube-node-lease", node), body, kind="apply", force=True
                        )
            await asyncio.sleep(5)

    def set_ready(self, node: str, ready: bool) -> None:
        """Let a node say that it is (not) ready."""
        condition = {"type": "Ready", "status": str(ready), "reason": "Test", "message": "of the test"}
        self.do(self.kube.patch(path("v1", "nodes", None, node, "status"), {"status": {"conditions": [condition]}}))

    # -- objects -----------------------------------------------------------------------------------------------------------

    def get(self, api: str, plural: str, namespace: str | None, name: str) -> Json | None:
        """Return an object; None when there is none."""
        with contextlib.suppress(NotFound):
            return self.do(self.kube.get(path(api, plural, namespace, name)))
        return None

    def claim(self, request_id: str, namespace: str | None = None) -> Json | None:
        """Return the pool's claim of a request."""
        return self.get(RESOURCE, "resourceclaims", namespace or self.namespace, claim_name(request_id))

    def claims(self, namespace: str | None = None) -> list[Json]:
        """Return all claims of the namespace."""
        return self.do(self.kube.list(path(RESOURCE, "resourceclaims", namespace or self.namespace))).items

    def pod(self, request_id: str, *, cpu: str = "10m", claim: str = "", labels: bool = True, namespace: str | None = None) -> Json:
        """Make a pod that carries a request's slice, as the spawner does."""
        return self.do(self.kube.create(path("v1", "pods", namespace or self.namespace), self._pod(request_id, cpu, claim, labels)))

    def _pod(self, request_id: str, cpu: str, claim: str, labels: bool) -> Json:
        container = {
            "name": "notebook", "image": "localhost/none:1",
            "resources": {"requests": {"cpu": cpu}, "claims": [{"name": "nbgpu"}]},
        }  # fmt: skip
        return {
            "metadata": {"name": f"pod-{request_id}", "labels": {SLICE_LABEL: request_id} if labels else {}},
            "spec": {
                "tolerations": [{"key": "poolkube", "operator": "Exists"}],
                "nodeSelector": {"poolkube": self.run_id},
                "resourceClaims": [{"name": "nbgpu", "resourceClaimName": claim or claim_name(request_id)}],
                "containers": [container],
                "terminationGracePeriodSeconds": 1,
            },
        }

    def foreign(self, name: str, memory: int, milli: int, device: str) -> None:
        """Make somebody's own claim for a device, and a pod with it."""
        claim = {
            "metadata": {"name": name},
            "spec": {"devices": {"requests": [{"name": "gpu", "exactly": {
                "deviceClassName": DRIVER,
                "selectors": [{"cel": {"expression": f'device.attributes["{DRIVER}"].uuid == "{device}"'}}],
                "capacity": {"requests": {"memory": str(memory), "compute": str(milli)}},
            }}]}},
        }  # fmt: skip
        self.do(self.kube.create(path(RESOURCE, "resourceclaims", self.namespace), claim))
        self.pod(name, claim=name, labels=False)
        until(lambda: self.phase(name) == "Running", why="for the foreign pod")

    def delete_pod(self, request_id: str) -> None:
        """Delete a pod and wait for its end."""
        there = path("v1", "pods", self.namespace, f"pod-{request_id}")
        with contextlib.suppress(NotFound):
            self.do(self.kube.delete(there))
        until(lambda: self.get("v1", "pods", self.namespace, f"pod-{request_id}") is None)

    def phase(self, request_id: str) -> str:
        """Return a pod's phase."""
        pod = self.get("v1", "pods", self.namespace, f"pod-{request_id}")
        return "gone" if pod is None else pod["status"].get("phase", "")

    def allocated(self, request_id: str) -> bool:
        """Return whether the scheduler has given a claim its devices."""
        claim = self.claim(request_id)
        return claim is not None and bool(claim.get("status", {}).get("allocation"))

    def events(self, reason: str, namespace: str = "") -> list[str]:
        """Return the messages of Events with a reason."""
        found = self.do(self.kube.list(path("v1", "events", namespace or self.namespace), fields=f"reason={reason}"))
        return [one["message"] for one in found.items]

    def held(self) -> dict[str, tuple[int, int]]:
        """Return bytes and milli-GPU that claims in the whole cluster hold of each of this run's devices: the limits in force."""
        names = {(one.node, device_name(one.uuid)): one for devices in self.devices.values() for one in devices}
        sums = {one.uuid: (0, 0) for one in names.values()}
        for claim in self.do(self.kube.list(path(RESOURCE, "resourceclaims"))).items:
            results = claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", [])
            if any((one["pool"], one["device"]) in names for one in results):
                for uuid_, limit in in_force(shares(claim, names)).items():
                    memory, milli = sums[uuid_]
                    sums[uuid_] = memory + limit.memory_bytes, milli + limit.compute_milli
        return sums

    def clean(self) -> None:
        """Remove what a test left; all of it must be removable."""
        for api, plural in (("v1", "pods"), (RESOURCE, "resourceclaims")):
            for one in self.do(self.kube.list(path(api, plural, self.namespace))).items:
                with contextlib.suppress(NotFound):
                    self.do(self.kube.delete(path(api, plural, self.namespace, one["metadata"]["name"])))
        until(lambda: not self.claims(), 30, "for the claims to go")
        until(lambda: not self.do(self.kube.list(path("v1", "pods", self.namespace))).items, 30, "for the pods to go")

    def consumed(self, request_id: str) -> tuple[int, int]:
        """Return what kube-scheduler counts of a claim's first device."""
        claim = self.claim(request_id)
        assert claim is not None
        found = claim["status"]["allocation"]["devices"]["results"][0]["consumedCapacity"]
        return parse_quantity(found["memory"]), parse_quantity(found["compute"])

    def fill(self, node: str, cpu: str) -> str:
        """Take a node's CPU away with a pod without a GPU; return its name."""
        name = f"filler-{node}"
        pod = self._pod(name, cpu, "", labels=False)
        del pod["spec"]["resourceClaims"], pod["spec"]["containers"][0]["resources"]["claims"]
        pod["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
        self.do(self.kube.create(path("v1", "pods", self.namespace), pod))
        until(lambda: self.phase(name) == "Running", why="for the filler")
        return name

    def add_node(self, name: str, model: str, devices: int, labels: dict[str, str] | None = None) -> None:
        """Have a node come late."""
        self.nodes.append(name)
        self.devices[name] = [
            Device(uuid=f"GPU-{name}-{n}", index=n, model=model, node=name, memory_bytes=82 * GIB, reserve_bytes=2 * GIB, simulated=True)
            for n in range(devices)
        ]
        self.make_node(name, labels=labels)
        self.publish(name)

    def remove_node(self, name: str) -> None:
        """Have a node go, with all that is its."""
        self.nodes.remove(name)
        del self.devices[name]
        self._delete_node(name)

    def _delete_node(self, node: str) -> None:
        for api, plural, namespace, name in (
            ("v1", "nodes", None, node),
            (RESOURCE, "resourceslices", None, f"{node}-{DRIVER}"),
            ("coordination.k8s.io/v1", "leases", "kube-node-lease", node),
        ):
            with contextlib.suppress(NotFound):
                self.do(self.kube.delete(path(api, plural, namespace, name)))
