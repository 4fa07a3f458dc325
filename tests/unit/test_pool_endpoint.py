"""The Service's one address: written by who leads, mended when somebody changes it, left alone by the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="nbgpu[kubernetes] is not installed")

from nbgpu.errors import Unavailable
from nbgpu_pool import endpoint
from nbgpu_pool.endpoint import Endpoint, endpoint_slice, own_endpoint

SERVICE = {"metadata": {"name": "nbgpu-pool", "namespace": "gpu", "uid": "u-1"}}


class Server:
    """What the API server is asked; fails as often as told."""

    def __init__(self, failures: int = 0):
        self.failures = failures
        self.written: list[tuple[str, Any]] = []

    async def get(self, path: str) -> Any:
        assert path == "/api/v1/namespaces/gpu/services/nbgpu-pool"
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        return SERVICE

    async def patch(self, path: str, body: Any, *, kind: str, manager: str, force: bool) -> Any:
        assert (kind, force) == ("apply", True)
        self.written.append((path, body))


def run(server: Server, leads: bool, seconds: float) -> None:
    async def work() -> None:
        task = asyncio.create_task(Endpoint(server, "gpu", "nbgpu-pool", "10.1.2.3", 8200, lambda: leads).run())  # type: ignore[arg-type]
        await asyncio.sleep(seconds)
        task.cancel()

    asyncio.run(work())


def test_it_is_the_services_and_goes_with_it() -> None:
    made = endpoint_slice(SERVICE, "10.1.2.3", 8200)
    assert made["metadata"]["labels"]["kubernetes.io/service-name"] == "nbgpu-pool"
    assert made["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Service", "name": "nbgpu-pool", "uid": "u-1"}]
    assert (made["addressType"], made["endpoints"]) == ("IPv4", [{"addresses": ["10.1.2.3"], "conditions": {"ready": True}}])
    assert made["ports"] == [{"name": "http", "port": 8200, "protocol": "TCP"}]
    assert endpoint_slice(SERVICE, "fd00::1", 8200)["addressType"] == "IPv6"


def test_who_leads_writes_it_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(endpoint, "RETRY_SECONDS", 0.01)
    server = Server(failures=3)
    run(server, leads=True, seconds=0.3)
    assert len(server.written) > 1
    assert {path for path, _ in server.written} == {"/apis/discovery.k8s.io/v1/namespaces/gpu/endpointslices/nbgpu-pool"}


def test_who_does_not_lead_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "AGAIN_SECONDS", 0.01)
    server = Server()
    run(server, leads=False, seconds=0.1)
    assert not server.written


def test_outside_of_the_chart_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NBGPU_SERVICE", raising=False)
    monkeypatch.setenv("NBGPU_POD_IP", "10.1.2.3")
    assert own_endpoint(Server(), "gpu", 8200, lambda: True) is None  # type: ignore[arg-type]
    monkeypatch.setenv("NBGPU_SERVICE", "nbgpu-pool")
    assert own_endpoint(Server(), "gpu", 8200, lambda: True) is not None  # type: ignore[arg-type]
