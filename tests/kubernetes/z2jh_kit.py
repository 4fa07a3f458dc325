"""A hub on the cluster as zero-to-jupyterhub deploys one: its objects as fixtures, its values from deploy/z2jh and from the test.

The chart itself is not at hand: service account, Role, labels, NetworkPolicies, Services, mounts and security contexts are its 4.x ones;
`z2jh/` stands in for its configuration file. The proxy is configurable-http-proxy on this machine, which must be a node of the cluster.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser_kit import answers
from chart_kit import ROOT, Api, Json, image, until
from ports import free_port

HERE = Path(__file__).parent / "z2jh"
SHIPPED = ROOT / "deploy" / "z2jh" / "values.yaml"
RELEASE = "jhub"
PROXY_TOKEN = "hub.config.ConfigurableHTTPProxy.auth_token"
MOUNT = "/usr/local/etc/jupyterhub"
HUB_LABELS = {"app": "jupyterhub", "release": RELEASE, "component": "hub"}
RESTRICTED: Json = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER: Json = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def merged(base: Any, over: Any) -> Any:
    """Return values with others put over them, as helm does."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    return {**base, **{name: merged(base.get(name), value) for name, value in over.items()}}


def values_of_a_hub(pool_url: str, hub_name: str, secret: str) -> Json:
    """Return the hub's values: what deploy/z2jh/values.yaml ships, on what an installation of its own says."""
    own = {
        "hub": {"config": {"JupyterHub": {"authenticator_class": "dummy"},
                           "Authenticator": {"allow_all": True}, "DummyAuthenticator": {"password": secrets.token_hex(8)}}},
        "singleuser": {
            "cmd": "jupyterhub-singleuser", "defaultUrl": "/lab", "uid": 1000, "fsGid": 100, "events": True,
            "memory": {"guarantee": "64M"}, "cpu": {"guarantee": 0.01},
        },
    }  # fmt: skip
    name, _, tag = image("user").rpartition(":")
    hub_image, _, hub_tag = image("hub").rpartition(":")
    of_this_installation = {
        "hub": {
            "image": {"name": hub_image, "tag": hub_tag},
            "extraEnv": {"NBGPU_POOL_TOKEN": {"valueFrom": {"secretKeyRef": {"name": secret}}}},
        },
        "custom": {"nbgpu": {"poolUrl": pool_url, "hubName": hub_name, "imageHasLab": True}},
        "singleuser": {"image": {"name": name, "tag": tag, "pullPolicy": "IfNotPresent"}},
    }
    return merged(merged(own, yaml.safe_load(SHIPPED.read_text())), of_this_installation)


def without_nbgpu(told: Json) -> Json:
    """Return the values after step 1 of an uninstall, as docs/kubernetes.md has it."""
    plain = copy.deepcopy(told)
    del plain["hub"]["extraConfig"]["nbgpu"], plain["hub"]["extraEnv"], plain["custom"]
    plain["singleuser"]["profileList"] = [one for one in plain["singleuser"]["profileList"] if one["slug"] == "cpu"]
    return plain


def rbac(namespace: str) -> list[Json]:
    """Return who the hub is and what it may do: that it cannot patch, nor see nodes or claims, is what nbgpu must live with."""
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "hub", "labels": HUB_LABELS}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "hub", "labels": HUB_LABELS},
            "rules": [
                {"apiGroups": [""], "resources": ["pods", "persistentvolumeclaims", "secrets", "services"],
                 "verbs": ["get", "watch", "list", "create", "delete"]},
                {"apiGroups": [""], "resources": ["events"], "verbs": ["get", "watch", "list"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "hub", "labels": HUB_LABELS},
            "subjects": [{"kind": "ServiceAccount", "name": "hub", "namespace": namespace}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "hub"},
        },
    ]  # fmt: skip


def network_policies() -> list[Json]:
    """Return z2jh's default policies for hub and servers, as it fills them in: a server reaches the hub, and no private address."""
    private = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]
    dns = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
    outside = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": [*private, "169.254.169.254/32"]}}]}

    def to(component: str, port: int) -> Json:
        labels = {"app": "jupyterhub", "release": RELEASE, "component": component}
        return {"to": [{"podSelector": {"matchLabels": labels}}], "ports": [{"protocol": "TCP", "port": port}]}

    def by(label: str, port: int | str) -> Json:
        selector = {"matchLabels": {f"hub.jupyter.org/network-access-{label}": "true"}}
        return {"from": [{"podSelector": selector}], "ports": [{"protocol": "TCP", "port": port}]}

    def policy(component: str, ingress: list[Json], egress: list[Json]) -> Json:
        labels = {"app": "jupyterhub", "release": RELEASE, "component": component}
        spec = {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress", "Egress"], "ingress": ingress, "egress": egress}
        name = "singleuser" if component == "singleuser-server" else component
        return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "labels": labels}, "spec": spec}

    privately = {"to": [{"ipBlock": {"cidr": cidr}} for cidr in private]}
    return [
        policy("hub", [by("hub", "http")], [to("proxy", 8001), to("singleuser-server", 8888), dns, outside, privately]),
        policy("singleuser-server", [by("singleuser", "notebook-port")], [to("hub", 8081), to("proxy", 8000), dns, outside]),
    ]


def deployment(told: Json) -> Json:
    """Return the hub's Deployment."""
    env: list[Json] = [
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        {"name": "HELM_RELEASE_NAME", "value": RELEASE},
        {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "CONFIGPROXY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": PROXY_TOKEN}}},
        *({"name": name, **value} for name, value in told["hub"].get("extraEnv", {}).items()),
    ]
    container = {
        "name": "hub", "image": f"{told['hub']['image']['name']}:{told['hub']['image']['tag']}", "imagePullPolicy": "IfNotPresent",
        "args": ["jupyterhub", "--config", f"{MOUNT}/jupyterhub_config.py", "--upgrade-db"],
        "env": env, "ports": [{"name": "http", "containerPort": 8081}], "workingDir": "/srv/jupyterhub",
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, **CONTAINER},
        "readinessProbe": {"httpGet": {"path": "/hub/health", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 2},
        "volumeMounts": [
            {"name": "config", "mountPath": f"{MOUNT}/jupyterhub_config.py", "subPath": "jupyterhub_config.py"},
            {"name": "config", "mountPath": f"{MOUNT}/z2jh.py", "subPath": "z2jh.py"},
            {"name": "secret", "mountPath": f"{MOUNT}/secret"},
            {"name": "pvc", "mountPath": "/srv/jupyterhub"},
        ],
    }  # fmt: skip
    spec = {
        "serviceAccountName": "hub", "securityContext": {"fsGroup": 1000, **RESTRICTED}, "terminationGracePeriodSeconds": 5,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": "hub"}},
            {"name": "secret", "secret": {"secretName": "hub"}},
            {"name": "pvc", "persistentVolumeClaim": {"claimName": "hub-db-dir"}},
        ],
    }  # fmt: skip
    access = {f"hub.jupyter.org/network-access-{to}": "true" for to in ("proxy-api", "proxy-http", "singleuser")}
    template = {"metadata": {"labels": {**HUB_LABELS, **access}, "annotations": {"checksum/values": _digest(told)}}, "spec": spec}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "hub", "labels": HUB_LABELS},
        "spec": {"replicas": 1, "selector": {"matchLabels": HUB_LABELS}, "strategy": {"type": "Recreate"}, "template": template},
    }  # fmt: skip


def _digest(told: Json) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def service(name: str, selector: Json | None, port: int) -> Json:
    """Return a Service; without a selector its endpoints are the test's own."""
    spec: Json = {"ports": [{"name": "http", "port": port, "targetPort": port if selector is None else "http"}]}
    if selector:
        spec["selector"] = selector
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


@dataclass
class Hub:
    """The hub and its proxy, while they run."""

    api: Api
    namespace: str
    values: Json
    address: str
    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    proxy: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where people find it."""
        return f"http://{self.address}:{self.ports['public']}"

    @property
    def password(self) -> str:
        """Everybody's."""
        return self.values["hub"]["config"]["DummyAuthenticator"]["password"]

    # -- objects

    def apply(self, *objects: Json) -> None:
        """Put objects into the hub's namespace, or change them there."""
        for one in objects:
            group, _, version = one["apiVersion"].rpartition("/")
            base = f"/apis/{group}/{version}" if group else f"/api/{version}"
            inside = "" if one["kind"] == "PersistentVolume" else f"/namespaces/{self.namespace}"
            plural = "networkpolicies" if one["kind"] == "NetworkPolicy" else one["kind"].lower() + "s"
            path = f"{base}{inside}/{plural}/{one['metadata']['name']}?fieldManager=z2jh&force=true"
            self.api.done("PATCH", path, one, content="application/apply-patch+yaml")

    def install(self) -> None:
        """Make everything, and wait for the start page."""
        token = secrets.token_hex(16)
        database = {
            "storageClassName": "", "accessModes": ["ReadWriteOnce"], "volumeName": f"{self.namespace}-db",
            "resources": {"requests": {"storage": "1Gi"}},
        }  # fmt: skip
        disk = {
            "storageClassName": "", "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
            "hostPath": {"path": str(self.folder)}, "claimRef": {"namespace": self.namespace, "name": "hub-db-dir"},
        }  # fmt: skip
        self.ports = {"public": free_port(self.address), "api": free_port(self.address)}
        endpoint = {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "proxy-api-1", "labels": {"kubernetes.io/service-name": "proxy-api"}},
            "ports": [{"name": "http", "port": self.ports["api"], "protocol": "TCP"}],
            "endpoints": [{"addresses": [self.address], "conditions": {"ready": True}}],
        }  # fmt: skip
        self.apply(
            *rbac(self.namespace), *network_policies(),
            service("hub", HUB_LABELS, 8081), service("proxy-api", None, self.ports["api"]), endpoint,
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{self.namespace}-db"}, "spec": disk},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "hub-db-dir"}, "spec": database},
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hub"},
             "data": {one.name: one.read_text() for one in HERE.glob("*.py")}},
        )  # fmt: skip
        self._start_proxy(token)
        self.upgrade(self.values, token=token)

    def upgrade(self, told: Json, *, token: str = "") -> None:
        """Give the hub other values, as `helm upgrade` does, and wait until it answers with them."""
        self.values = told
        data = {"values.yaml": yaml.safe_dump(told)}
        if token:
            data[PROXY_TOKEN] = token
        else:
            kept = self.api.done("GET", f"/api/v1/namespaces/{self.namespace}/secrets/hub")["data"]
            data[PROXY_TOKEN] = base64.b64decode(kept[PROXY_TOKEN]).decode()
        self.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": data}, deployment(told))
        self.rolled_out()

    def rolled_out(self, seconds: float = 90) -> None:
        """Wait until the hub's one pod is that of the newest Deployment, and its page is there."""
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments/hub"

        def ready() -> bool:
            found = self.api.done("GET", path)
            status = found.get("status", {})
            return status.get("observedGeneration") == found["metadata"]["generation"] and (
                status.get("replicas"), status.get("updatedReplicas"), status.get("readyReplicas")
            ) == (1, 1, 1)  # fmt: skip

        until("the hub to be there", ready, seconds, self.log)
        until("the proxy to know the hub", lambda: answers(self.url + "/hub/login"), 30, self.log)

    def pod(self) -> Json:
        """Return the hub's pod."""
        [found] = self.api.pods(self.namespace, HUB_LABELS)
        return found

    def log(self) -> str:
        """Return the end of what the hub has logged."""
        return "\n".join(self.api.log(self.namespace, one["metadata"]["name"]) for one in self.api.pods(self.namespace, HUB_LABELS))[-4000:]

    def servers(self, user: str) -> list[Json]:
        """Return the pods of somebody's servers that nobody has asked to end."""
        return self.api.pods(self.namespace, {"app": "jupyterhub", "component": "singleuser-server", "hub.jupyter.org/username": user})

    def server(self, user: str) -> Json:
        """Return the pod of somebody's one server."""
        [found] = self.servers(user)
        return found

    # -- the proxy

    def _start_proxy(self, token: str) -> None:
        program = shutil.which("configurable-http-proxy", path=f"{ROOT / 'node_modules' / '.bin'}:{os.environ['PATH']}")
        assert program, "no configurable-http-proxy: make setup"
        listens = [f"--ip={self.address}", f"--port={self.ports['public']}", f"--api-ip={self.address}", f"--api-port={self.ports['api']}"]
        with (self.folder / "proxy.log").open("wb") as log:
            self.proxy = subprocess.Popen([program, *listens], env={**os.environ, "CONFIGPROXY_AUTH_TOKEN": token}, stdout=log, stderr=log)

    def uninstall(self) -> None:
        """End the proxy and remove what is not in the namespace."""
        if self.proxy is not None:
            self.proxy.terminate()
            self.proxy.wait(10)
        self.api.call("DELETE", f"/api/v1/persistentvolumes/{self.namespace}-db")


def node_address(api: Api) -> str:
    """Return the address by which pods reach this machine; skip the test where it is none of the cluster's nodes."""
    for node in api.done("GET", "/api/v1/nodes")["items"]:
        for one in node.get("status", {}).get("addresses", []):
            if one["type"] == "InternalIP":
                with socket.socket() as probe:
                    try:
                        probe.bind((one["address"], 0))
                    except OSError:
                        continue
                return one["address"]
    pytest.skip("this machine is no node of the cluster: the hub's pod could not reach the proxy here")


@contextmanager
def hub(api: Api, namespace: str, told: Json) -> Iterator[Hub]:
    """Run a hub with these values in a namespace that is there."""
    folder = Path(tempfile.mkdtemp(prefix="nbgpu-hub-db-"))
    folder.chmod(0o777)
    made = Hub(api, namespace, told, node_address(api), folder)
    try:
        made.install()
        yield made
    finally:
        made.uninstall()
        shutil.rmtree(folder, ignore_errors=True)
