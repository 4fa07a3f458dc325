"""A hub whose pods are real: containers on the cluster's one node with nbgpu's agent, for tests and benchmarks.

    with real_hub(folder) as there:
        there.hub.add("ada")
        there.hub.spawn("ada", {"profile": "quarter"})      # a light server: {"profile": "lab"} starts JupyterLab with nbgpu[lab]
        there.hub.ready("ada")
        httpx.get(there.server_url("ada") + "probe")        # what its slice says, and where it is refused

Holds the node's lock (`node_kit`) as long as it is open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import node_kit
from chart_kit import image
from gateway_kit import Gateway
from hub_kit import HubPlace, KubeHub, clean, gateway_of_hub
from pool_kit import Pool

ROOT = Path(__file__).resolve().parents[2]
LIGHT_SERVER = (ROOT / "bench" / "spawn_server.py").read_text()
LAB_SERVER = ["jupyterhub-singleuser"]


@dataclass
class RealHub:
    """What `real_hub` opens."""

    node: node_kit.Node
    place: HubPlace
    pool: Pool
    gateway: Gateway
    hub: KubeHub

    def server_url(self, user: str) -> str:
        """Return the address of a user's server behind the hub's proxy."""
        return f"http://127.0.0.1:{self.hub.port}/user/{user}/"


def address_of(node: node_kit.Node) -> str:
    """Return the node's address, at which pods reach what runs on this machine."""
    found = node.api.done("GET", f"/api/v1/nodes/{node.name}")["status"]["addresses"]
    return next(one["address"] for one in found if one["type"] == "InternalIP")


def told_for(node: node_kit.Node, profiles: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return what a `KubeHub` is told so that its pods run on the real node."""
    light = {"cmd": ["python3", "-c", LIGHT_SERVER]}
    lab = {"image": image("user"), "cmd": LAB_SERVER, "gpu_fraction": "1/4", "gpu_image_has_lab": True}
    listed = profiles or [
        {"slug": "cpu", "display_name": "CPU only", "default": True, "kubespawner_override": light},
        {"slug": "quarter", "display_name": "A quarter of a GPU", "kubespawner_override": {**light, "gpu_fraction": "1/4"}},
        {"slug": "half", "display_name": "Half a GPU", "kubespawner_override": {**light, "gpu_fraction": "1/2"}},
        {"slug": "lab", "display_name": "JupyterLab with a quarter of a GPU", "kubespawner_override": lab},
    ]
    return {
        "image": node_kit.PLAIN, "node_selector": {"kubernetes.io/hostname": node.name}, "tolerations": [],
        "model": node.devices()[0].model, "profiles": listed,
    }  # fmt: skip


def pool_for(node: node_kit.Node, place: HubPlace, folder: Path, **config: Any) -> Pool:
    """Return a pool that seals with the key of the node's agent."""
    (folder / "seal.key").write_bytes(node_kit.KEY)
    place.model = node.devices()[0].model
    place.devices = {node.name: node.devices()}
    return Pool(place, folder, **config).start()


@contextmanager
def real_hub(folder: Path, python: str = sys.executable, extra: str = "", devices: int = 2) -> Iterator[RealHub]:
    """Open node, pool and hub; end all of it."""
    with ExitStack() as stack:
        node = node_kit.Node(devices=devices)
        stack.callback(node.close)
        node.start()
        place = HubPlace(nodes=0)
        stack.callback(place.stop)
        place.start()
        pool = pool_for(node, place, folder)
        stack.callback(Pool.stop_all)
        gateway = gateway_of_hub(place)
        stack.callback(gateway.close)
        stack.callback(clean, place)
        address = address_of(node)
        extra = f"c.JupyterHub.hub_ip = {address!r}\nc.Spawner.http_timeout = 90\n{extra}"
        hub = KubeHub(folder, place, pool, gateway, python, extra=extra, **told_for(node))
        stack.callback(hub.end)
        hub.start()
        yield RealHub(node, place, pool, gateway, hub)
        if os.environ.get("NBGPU_KEEP_LOGS"):
            print(hub.log.read_text()[-20000:])
