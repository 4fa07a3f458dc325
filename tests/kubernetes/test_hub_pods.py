"""A hub whose pods are real, on the cluster's node with nbgpu's agent: the slice is seen inside, and refused beyond.

Other users of the node wait meanwhile (`node_kit`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hub_kit import consistent, until
from hub_process import TOKEN
from real_kit import RealHub, real_hub

pytestmark = [pytest.mark.kubernetes]
GIB = 1024**3


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealHub]:
    folder = tmp_path_factory.mktemp("real")
    with real_hub(folder) as there:
        there.hub.add("ada", "grace")
        yield there


def probe(there: RealHub, user: str) -> dict[str, Any]:
    """Return what a light server finds when it takes memory until it is refused."""
    return httpx.get(there.server_url(user) + "probe", timeout=60).json()


def test_a_real_server_sees_its_slice_and_is_refused_beyond(there: RealHub) -> None:
    """Case 1 with real pods: hub, pool, scheduler, kubelet, agent and limiter in one line; and again after a restart of the hub."""
    assert there.hub.spawn("ada", {"profile": "quarter"}).status_code in (201, 202)
    assert there.hub.spawn("grace", {"profile": "half"}).status_code in (201, 202)
    there.hub.ready("ada", 200)
    there.hub.ready("grace", 200)
    both = {there.hub.request_of("ada"), there.hub.request_of("grace")}
    assert consistent(there.place, there.pool, there.hub) == both
    assert set(there.node.slices()) == both
    for user, share in (("ada", 4), ("grace", 2)):
        said = probe(there, user)
        whole = there.node.devices()[0].usable_bytes
        assert said["total"] == whole // share // 1024**2 * 1024**2, said
        assert said["status"] == 2, "out of memory, and nothing else"
        assert said["free"] - said["block"] < said["had"] <= said["free"] <= said["total"]
    there.hub.kill()
    there.hub.start()
    assert {there.hub.request_of("ada"), there.hub.request_of("grace")} == both
    there.hub.stop("ada")
    there.hub.stop("grace")
    assert consistent(there.place, there.pool, there.hub) == set()
    until(lambda: there.node.slices() == {}, 20, "the agent's slices to end")


def test_a_server_without_a_gpu_sees_none(there: RealHub) -> None:
    """The control: the same server without a claim finds no driver."""
    there.hub.spawn("ada", {"profile": "cpu"})
    there.hub.ready("ada", 200)
    with pytest.raises(httpx.HTTPError):
        httpx.get(there.server_url("ada") + "probe", timeout=60).raise_for_status()
    there.hub.stop("ada")


def test_a_real_lab_shows_its_slice(there: RealHub) -> None:
    """JupyterLab with nbgpu[lab] in a pod: the panel's API answers with the slice, through the hub's proxy and with the user's rights."""
    there.hub.spawn("ada", {"profile": "lab"})
    there.hub.ready("ada", 200)
    http = httpx.Client(base_url=there.server_url("ada"), headers={"Authorization": f"token {TOKEN}"}, timeout=60)
    usage = until(lambda: (found := http.get("nbgpu/api/usage").json()).get("slice_id") and found, 30, "the slice is shown")
    assert usage["slice_id"] == there.hub.request_of("ada")
    assert usage["simulated"] is True
    (device,) = usage["devices"]
    assert device["memory_limit_bytes"] == there.node.devices()[0].usable_bytes // 4 // 1024**2 * 1024**2
    assert http.get("nbgpu/api/usage", headers={"Authorization": "token wrong"}).status_code == 403
    kernel = http.post("api/kernels", json={}).json()
    assert kernel["name"]
    there.hub.stop("ada")
    assert consistent(there.place, there.pool, there.hub) == set()
