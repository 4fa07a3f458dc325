"""The way to the replica that leads: behind the pool's Service stands one address, and who leads writes it.

The Service has no selector. Were it readiness that tells leader from standby, no Deployment of two replicas would ever be complete.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from nbgpu.claims import MANAGED_BY
from nbgpu.errors import NbgpuError
from nbgpu.kube import Json, Kube, path

API_VERSION = "discovery.k8s.io/v1"
AGAIN_SECONDS = 10.0
"""How long it may stay wrong when somebody else has changed it."""
RETRY_SECONDS = 1.0
PORT_NAME = "http"

log = logging.getLogger("nbgpu.pool")


def endpoint_slice(service: Json, address: str, port: int) -> Json:
    """Return the EndpointSlice that leads from a Service to one address; it goes with the Service.

    Parameters
    ----------
    service : dict
        As the API server has it.
    """
    meta = service["metadata"]
    owner = {"apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": API_VERSION,
        "kind": "EndpointSlice",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "labels": {"kubernetes.io/service-name": meta["name"], "endpointslice.kubernetes.io/managed-by": "nbgpu-pool", **MANAGED_BY},
            "ownerReferences": [owner],
        },
        "addressType": "IPv6" if ":" in address else "IPv4",
        "ports": [{"name": PORT_NAME, "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
    }


class Endpoint:
    """Keeps the Service's one address this replica's while it leads.

    Parameters
    ----------
    service : str
        Name of the Service in `namespace`.
    address : str
        This replica's.
    leads : callable
        Whether it may act now.
    """

    def __init__(self, kube: Kube, namespace: str, service: str, address: str, port: int, leads: Callable[[], bool]):
        self._kube = kube
        self._service = path("v1", "services", namespace, service)
        self._slice = path(API_VERSION, "endpointslices", namespace, service)
        self._address, self._port = address, port
        self._leads = leads

    async def run(self) -> None:
        """Write it, and again whenever it may have been changed, until cancelled."""
        said = ""
        while True:
            problem = ""
            try:
                service = await self._kube.get(self._service)
                if self._leads():
                    body = endpoint_slice(service, self._address, self._port)
                    await self._kube.patch(self._slice, body, kind="apply", manager="nbgpu-pool", force=True)
            except NbgpuError as error:
                problem = error.message
            if problem and problem != said:
                log.warning("the Service does not lead here yet: %s", problem)
            said = problem
            await asyncio.sleep(RETRY_SECONDS if problem else AGAIN_SECONDS)


def own_endpoint(kube: Kube, namespace: str, port: int, leads: Callable[[], bool]) -> Endpoint | None:
    """Return the endpoint of this pod, by what the chart says in its environment; None where there is no Service to lead here."""
    service, address = os.environ.get("NBGPU_SERVICE", ""), os.environ.get("NBGPU_POD_IP", "")
    return Endpoint(kube, namespace, service, address, port, leads) if service and address else None
