"""A hub on a cluster, for tests: JupyterHub as a process whose rights are those of zero-to-jupyterhub's hub and no more, its way to the
API server in the test's hand, and pods that "run" on nodes that exist only as objects (`place_kit`).

A pod of a user in `HubPlace.pending` stays pending; one of a user in `HubPlace.deaf` runs and never answers.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from gateway_kit import Gateway
from place_kit import GIB, RESOURCE, Place, until
from pool_kit import TOKEN, Pool

from nbgpu.claims import SLICE_LABEL
from nbgpu.kube import Conflict, Json, Kube, NotFound, credentials, path
from nbgpu_spawner.pod import REQUEST_ANNOTATION

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hub"))

from hub_process import Hub

RBAC = "rbac.authorization.k8s.io/v1"
# zero-to-jupyterhub 4.x, jupyterhub/templates/hub/rbac.yaml: all that its hub may do in its own namespace, and nothing elsewhere
Z2JH_RULES: list[Json] = [
    {
        "apiGroups": [""],
        "resources": ["pods", "persistentvolumeclaims", "secrets", "services"],
        "verbs": ["get", "watch", "list", "create", "delete"],
    },
    {"apiGroups": [""], "resources": ["events"], "verbs": ["get", "watch", "list"]},
]
USER_ANNOTATION = "hub.jupyter.org/username"
PORT = 8888
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
"""Of a process that is started often: Kubernetes' models are 1,500 modules, which take 5 s of CPU each time that nobody keeps them."""


class HubPlace(Place):
    """`Place` whose kubelets also bring servers up: at one loopback address, where a stand-in answers the hub."""

    def __init__(self, nodes: int = 2, devices: int = 1) -> None:
        super().__init__(nodes, devices)
        number = int(self.run_id, 16)
        self.address = f"127.77.{number % 250 + 1}.{number // 250 % 250 + 1}"
        self.silence = f"127.78.{number % 250 + 1}.{number // 250 % 250 + 1}"
        self.pending: set[str] = set()
        self.deaf: set[str] = set()
        self._web: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Make everything, with the account that the hub acts as."""
        super().start()
        self._web = ThreadingHTTPServer((self.address, PORT), _Answers)
        threading.Thread(target=self._web.serve_forever, daemon=True).start()
        self.do(self._make_account())

    def stop(self) -> None:
        """Remove everything."""
        super().stop()
        if self._web is not None:
            self._web.shutdown()
            self._web.server_close()

    def wait_for_rules(self, seconds: float = 240) -> None:
        """Wait while an installation of the chart's tests on this cluster has its admission rules in force: they let its own hub alone."""
        there = path("admissionregistration.k8s.io/v1", "validatingadmissionpolicies")

        def ruled() -> bool:
            found = self.do(self.kube.list(there)).items
            return any(one["metadata"]["name"].startswith("nbgpu") and one["metadata"]["name"].endswith("-pods") for one in found)

        until(lambda: not ruled(), seconds, "for another installation's admission rules to go")

    async def _make_account(self) -> None:
        create, where = self.kube.create, self.namespace
        await create(path("v1", "serviceaccounts", where), {"metadata": {"name": "hub"}})
        await create(path(RBAC, "roles", where), {"metadata": {"name": "hub"}, "rules": Z2JH_RULES})
        subject = {"kind": "ServiceAccount", "name": "hub", "namespace": where}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "hub"}
        await create(path(RBAC, "rolebindings", where), {"metadata": {"name": "hub"}, "subjects": [subject], "roleRef": role})
        made = await create(path("v1", "serviceaccounts", where, "hub", "token"), {"spec": {"expirationSeconds": 7200}})
        self.hub_token: str = made["status"]["token"]

    async def as_hub(self) -> Kube:
        """Return a client with the rights of the hub."""
        known = credentials()
        known.cert_file = known.key_file = None
        known.refresh_api_key_hook = None
        known.api_key = {"authorization": f"Bearer {self.hub_token}"}
        known.api_key_prefix = {}
        return Kube(known)

    async def _tend(self, key: tuple[str, str], pod: Json) -> None:
        user = (pod["metadata"].get("annotations") or {}).get(USER_ANNOTATION)
        starts = "deletionTimestamp" not in pod["metadata"] and pod.get("status", {}).get("phase") == "Pending"
        if user is None or not starts:
            await super()._tend(key, pod)
        elif user not in self.pending:
            with contextlib.suppress(NotFound, Conflict):
                address = self.silence if user in self.deaf else self.address
                await self.kube.patch(path("v1", "pods", *key, "status"), {"status": running(pod, address)}, uid=pod["metadata"]["uid"])

    # -- a user's pod

    def pods(self, namespace: str = "") -> list[Json]:
        """Return the hub's pods."""
        return self.do(self.kube.list(path("v1", "pods", namespace or self.namespace), labels="component=singleuser-server")).items

    def pod_of(self, user: str) -> Json | None:
        """Return a user's pod."""
        return next((one for one in self.pods() if one["metadata"]["annotations"].get(USER_ANNOTATION) == user), None)

    def set_status(self, pod: Json, status: Json) -> None:
        """Let a pod's kubelet say something."""
        where = path("v1", "pods", pod["metadata"]["namespace"], pod["metadata"]["name"], "status")
        self.do(self.kube.patch(where, {"status": status}))

    def evict(self, user: str) -> None:
        """Let the kubelet say that it has evicted a user's pod."""
        pod = self.pod_of(user)
        assert pod is not None
        told = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory.", "containerStatuses": None}
        self.set_status(pod, told)

    def delete(self, user: str, seconds: float = 15) -> None:
        """Delete a user's pod by hand."""
        pod = self.pod_of(user)
        if pod is not None:
            with contextlib.suppress(NotFound):
                self.do(self.kube.delete(path("v1", "pods", self.namespace, pod["metadata"]["name"])))
            until(lambda: self.pod_of(user) is None, seconds)

    def carried(self) -> set[str]:
        """Return the slices of pods that live."""
        return {
            one["metadata"]["annotations"][REQUEST_ANNOTATION]
            for one in self.pods()
            if REQUEST_ANNOTATION in one["metadata"]["annotations"] and one["status"].get("phase") not in ("Failed", "Succeeded")
        }

    def claimed(self) -> set[str]:
        """Return the slices that there are claims of."""
        return {one["metadata"]["labels"][SLICE_LABEL] for one in self.claims() if SLICE_LABEL in one["metadata"].get("labels", {})}


def running(pod: Json, address: str) -> Json:
    """Return the status of a pod that runs."""
    state = {"running": {"startedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}}
    containers = [
        {"name": one["name"], "image": one["image"], "imageID": "x", "ready": True, "started": True, "restartCount": 0, "state": state}
        for one in pod["spec"]["containers"]
    ]
    return {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "containerStatuses": containers}


class _Answers(BaseHTTPRequestHandler):
    """What a hub asks of a server."""

    def do_GET(self) -> None:
        body = b'{"version": "0"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-JupyterHub-Version", "6.1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def gateway_of_hub(place: HubPlace) -> Gateway:
    """Return a way to the API server that has the hub's rights."""
    return Gateway(SimpleNamespace(do=place.do, kube=place.do(place.as_hub())))  # type: ignore[arg-type]


CONFIG = """
import json
told = json.loads({told!r})
c.JupyterHub.spawner_class = {spawner_class!r}
c.KubeSpawner.namespace = told["namespace"]
c.KubeSpawner.image = told["image"]
c.KubeSpawner.cmd = ["serve"]
c.KubeSpawner.delete_grace_period = 1
c.KubeSpawner.k8s_api_request_timeout = 2
c.KubeSpawner.node_selector = told["node_selector"]
c.KubeSpawner.tolerations = told["tolerations"]
c.KubeSpawner.start_timeout = 60
c.KubeSpawner.poll_interval = 2
c.KubeSpawner.http_timeout = 30
c.KubeSpawner.consecutive_failure_limit = 4
c.KubeSpawner.profile_list = told["profiles"]
c.JupyterHub.allow_named_servers = True
c.GPUSliceMixin.gpu_hub_name = "hub"
c.GPUSliceMixin.gpu_wait_timeout = 25
c.GPUSliceMixin.gpu_model = told["model"]
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 0.5}}
{extra}
setup(c, embedded=False, pool_url=told["pool"], pool_token=told["token"])
"""


def profiles() -> list[Json]:
    """Return what users of the tests can choose, in the form of `singleuser.profileList`."""
    quarter = {"gpu_fraction": "1/4"}
    return [
        {"slug": "cpu", "display_name": "CPU only", "default": True},
        {"slug": "quarter", "display_name": "A quarter of a GPU", "kubespawner_override": quarter},
        {"slug": "half", "display_name": "Half a GPU", "kubespawner_override": {"gpu_fraction": 0.5}},
        {"slug": "whole", "display_name": "A whole GPU", "kubespawner_override": {"gpu_fraction": 1}},
        {
            "slug": "hasty",
            "display_name": "Little patience",
            "kubespawner_override": {**quarter, "start_timeout": 5, "gpu_wait_timeout": 1},
        },
        {"slug": "curt", "display_name": "Little patience with servers", "kubespawner_override": {**quarter, "http_timeout": 2}},
        {"slug": "big", "display_name": "Much CPU", "kubespawner_override": {**quarter, "cpu_guarantee": 100}},
        {
            "slug": "sized",
            "display_name": "Sized",
            "profile_options": {
                "gpu": {
                    "display_name": "GPU",
                    "choices": {
                        "small": {"display_name": "Small", "kubespawner_override": {"gpu_fraction": "1/8"}},
                        "large": {"display_name": "Large", "kubespawner_override": {"gpu_fraction": "1/2"}},
                    },
                }
            },
        },
        {"slug": "custom", "display_name": "Custom", "gpu_custom": True},
    ]


class KubeHub(Hub):
    """A hub with KubeGPUSpawner, at a gateway to the cluster and a pool.

    Parameters
    ----------
    extra : str
        More configuration, before `setup(c)`.
    """

    def __init__(
        self, folder: Path, place: HubPlace, pool: Pool, gateway: Gateway, python: str = sys.executable, *, extra: str = "", **told: Any
    ):
        self.kube_place, self.pool, self.gateway = place, pool, gateway
        told = {
            "namespace": place.namespace, "image": "localhost/none:1", "node_selector": {"poolkube": place.run_id},
            "tolerations": [{"key": "poolkube", "operator": "Exists"}], "profiles": profiles(), "model": place.model,
            "pool": f"http://127.0.0.1:{pool.port}", "token": TOKEN, **told,
        }  # fmt: skip
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(json.dumps(kubeconfig_for(f"http://127.0.0.1:{gateway.port}")))
        more = CONFIG.format(told=json.dumps(told), spawner_class="kubespawner.KubeSpawner", extra=extra)
        super().__init__(folder, more, python, environment={"KUBECONFIG": str(kubeconfig), **COMPILED})

    def stop_aside(self, user: str) -> None:
        """Stop a user's server without waiting for the answer."""

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                self.api("DELETE", f"users/{user}/server")

        threading.Thread(target=ask, daemon=True).start()

    def story(self) -> str:
        """Return the end of its log, without the questions of the test."""
        return "\n".join([line for line in self.log.read_text().splitlines() if "200 GET /hub/api/users" not in line][-150:])

    def request_of(self, user: str, server: str = "") -> str:
        """Return the request id that the hub has saved for a user's server."""
        found = self.api("GET", f"users/{user}").json()["servers"].get(server)
        return ((found or {}).get("state") or {}).get("gpu_request_id", "")

    def holders(self) -> set[str]:
        """Return the request ids of all servers."""
        users = self.api("GET", "users").json()
        states = [server["state"] or {} for user in users for server in user["servers"].values()]
        return {state["gpu_request_id"] for state in states if "gpu_request_id" in state}


def kubeconfig_for(server: str) -> Json:
    """Return a kubeconfig for a server that asks for no credentials."""
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip


def differences(place: HubPlace, pool: Pool, hub: Hub | None = None) -> list[str]:
    """Return what does not agree: pods that live, claims, the pool's books, the hub's servers, the devices' room."""
    found: list[str] = []
    carried, claimed = place.carried(), place.claimed()
    if carried != claimed:
        found.append(f"pods carry {sorted(carried)}, claims are {sorted(claimed)}")
    held, books = place.held(), pool.books()
    if books != held:
        found.append(f"the pool's books say {books}, the cluster {held}")
    over = {uuid: one for uuid, one in held.items() if one[0] > 80 * GIB or one[1] > 1000}
    if over:
        found.append(f"more is given than there is: {over}")
    known = {one["request"]["request_id"] for one in pool.http.get("/v1/requests").json()}
    if known != claimed:
        found.append(f"the pool knows {sorted(known)}, claims are {sorted(claimed)}")
    if isinstance(hub, KubeHub) and (holders := hub.holders()) != carried:
        found.append(f"the hub's servers hold {sorted(holders)}, pods carry {sorted(carried)}")
    return found


def consistent(place: HubPlace, pool: Pool, hub: Hub | None = None, seconds: float = 30) -> set[str]:
    """Wait until everything agrees, and return the slices that there are. What is given must fit at every look, not only in the end."""
    deadline = time.monotonic() + seconds
    while True:
        for uuid, (memory, milli) in place.held().items():
            assert max(memory / (80 * GIB), milli / 1000) <= 1, f"{uuid}: {memory} bytes, {milli} milli-GPU"
        found = differences(place, pool, hub)
        if not found:
            return place.claimed()
        claims = [
            {"name": one["metadata"]["name"], **one["metadata"], "managedFields": 0, "status": one.get("status")} for one in place.claims()
        ]
        pods = [
            {**one["metadata"], "managedFields": 0, "spec": one["spec"].get("nodeName"), "status": one["status"]} for one in place.pods()
        ]
        assert time.monotonic() < deadline, (
            "; ".join(found) + f"\n{claims}\n{pods}\n" + pool.log()[-3000:] + (hub.story() if isinstance(hub, KubeHub) else "")
        )
        time.sleep(0.1)


class Fault:
    """Does something to calls on their way through a gateway, as long as it is entered.

    Parameters
    ----------
    verb, where : str
        Method and regular expression of the path.
    answer : int or "drop", optional
        Answered instead of what the API server says.
    after : bool
        When the API server has done it, not before it hears of it.
    hold : bool
        Keep the call until `go_on` is set.
    times : int
        So many calls, then no more.
    act : callable, optional
        Done as soon as a call came.
    """

    def __init__(
        self, gateway: Gateway, verb: str, where: str, answer: int | str | None = None, *, after: bool = False, hold: bool = False,
        times: int = 1, act: Callable[[], object] | None = None,
    ):  # fmt: skip
        self.met, self.go_on = threading.Event(), threading.Event()
        self.count, self.times = 0, times
        self._gateway, self._side = gateway, "after" if after else "before"
        self._verb, self._where, self._answer, self._hold, self._act = verb, re.compile(where), answer, hold, act

    def _look(self, method: str, there: str) -> int | str | None:
        if method != self._verb or not self._where.search(there) or self.count >= self.times:
            return None
        self.count += 1
        self.met.set()
        if self._act is not None:
            self._act()
        if self._hold:
            self.go_on.wait(60)
        return self._answer

    def __enter__(self) -> Fault:
        setattr(self._gateway, self._side, self._look)
        return self

    def __exit__(self, *args: object) -> None:
        self.go_on.set()
        setattr(self._gateway, self._side, lambda method, path: None)

    def wait(self, seconds: float = 20) -> None:
        """Wait until a call came."""
        assert self.met.wait(seconds), "the call did not come"


def clean(place: HubPlace) -> None:
    """Remove pods and claims of a test."""
    place.pending.clear()
    place.deaf.clear()
    for api, plural in (("v1", "pods"), (RESOURCE, "resourceclaims")):
        for one in place.do(place.kube.list(path(api, plural, place.namespace))).items:
            with contextlib.suppress(NotFound):
                place.do(place.kube.delete(path(api, plural, place.namespace, one["metadata"]["name"])))
    until(lambda: not place.claims(), 30, "for the claims to go")
