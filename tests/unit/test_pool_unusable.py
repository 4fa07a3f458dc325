"""A GPU that takes nobody though it has room: people read why, not that it is free, nor that it is in use."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx")

from fake_kube import FakeKube

from nbgpu.claims import resource_slice
from nbgpu.kube import Json, Kube, path
from nbgpu.models import Availability, AvailabilityQuery, Device, Owner, Request, Shape
from nbgpu.quantities import GIB
from nbgpu_pool import availability, kube_ledger
from nbgpu_pool.agents import AWAY_SECONDS, Agents, keep_agent
from nbgpu_pool.core import Core
from nbgpu_pool.kube_ledger import KubeLedger
from nbgpu_pool.kube_view import NodeInfo, View, keep_published
from nbgpu_pool.state import Snapshot

ADA = Owner(hub="h", user="ada")
NO_AGENT = "the agent of nbgpu on node {} does not run"


def device(index: int, node: str = "n", healthy: bool = True) -> Device:
    return Device(
        uuid=f"GPU-{node}-{index}", index=index, model="H100", node=node, memory_bytes=80 * GIB, reserve_bytes=2 * GIB, healthy=healthy
    )


def pool_of(*devices: Device, unusable: dict[str, str] | None = None) -> Core:
    core = Core()
    core.snapshot(Snapshot(core.mark, list(devices), [], unusable=unusable or {}), 0.0)
    return core


def look(core: Core, milli: int = 250, count: int = 1) -> Availability:
    shape = Shape(compute_milli=milli, device_count=count)
    return availability.answer(core, AvailabilityQuery(owner=ADA, groups=[], shapes=[shape]), 0.0)[0]


def ask(core: Core, number: int, milli: int = 250) -> Any:
    return core.request(Request(request_id=f"request-{number:04d}", owner=ADA, compute_milli=milli), 0.0)


# -- what the start page and the queue say


@pytest.mark.parametrize(
    ("unusable", "words"),
    [
        ({"GPU-n-0": NO_AGENT.format("n")}, "out of service: the agent of nbgpu on node n does not run"),
        ({}, "out of service: the GPU is not healthy, or its node is away"),
    ],
)
def test_a_gpu_out_of_service_is_neither_free_nor_in_use(unusable: dict[str, str], words: str) -> None:
    core = pool_of(device(0, healthy=False), unusable=unusable)
    found = look(core)
    assert (found.state, found.reason, found.wait_seconds) == ("wait", words, None)
    grant = ask(core, 1)
    assert (grant.state.value, grant.reason) == ("queued", words)


def test_where_another_gpu_has_room_that_one_is_free() -> None:
    core = pool_of(device(0, healthy=False), device(0, "m"))
    assert look(core).state == "free"
    assert ask(core, 1).slice.node == "m"


def test_what_is_in_use_is_said_to_be_in_use() -> None:
    """The control: a full GPU, and one out of service that could not hold it either."""
    core = pool_of(device(0))
    ask(core, 1, 1000)
    assert look(core).reason.startswith("in use")
    small = device(0, "m", healthy=False).model_copy(update={"memory_bytes": 4 * GIB})
    core = pool_of(device(0), small)
    ask(core, 2, 1000)
    shape = Shape(memory_bytes=20 * GIB)
    [found] = availability.answer(core, AvailabilityQuery(owner=ADA, groups=[], shapes=[shape]), 0.0)
    assert found.reason.startswith("in use")
    assert ask(core, 3, 1000).reason.startswith("out of service")


def test_all_gpus_of_a_node_are_needed() -> None:
    core = pool_of(device(0), device(1, healthy=False), unusable={"GPU-n-1": "GPU 1 of node n is not healthy"})
    assert look(core, 1000, 2).reason == "out of service: GPU 1 of node n is not healthy"


def test_no_gpu_at_all_is_not_for_ever() -> None:
    found = look(pool_of())
    assert found.state == "impossible"
    assert found.reason == "No node offers a GPU at the moment. If that lasts, tell the admin: nbgpu's agent has to run on nodes with GPUs."


# -- what the cluster's objects mean


def of_nodes(*names: str) -> View:
    view = View(b"k" * 16, lambda: 0.0)
    for name in names:
        view.node_changed(name, NodeInfo(ready=True))
        view.published_changed(name, keep_published(resource_slice(name, [device(0, name)], {}, 1)))
    return view


def test_why_a_device_takes_nobody() -> None:
    view = of_nodes("a", "b", "c", "d")
    view.agents_away(frozenset({"b"}))
    view.node_changed("c", NodeInfo(ready=False))
    view.node_changed("d", None)
    assert {one.node: one.healthy for one in view.devices()} == {"a": True, "b": False, "c": False, "d": False}
    assert view.unusable() == {
        "GPU-b-0": NO_AGENT.format("b"),
        "GPU-c-0": "node c is away or takes no new servers",
        "GPU-d-0": "node d is away or takes no new servers",
    }
    before = view.devices()
    view.agents_away(frozenset({"b"}))
    assert view.devices() is before, "nothing has changed"
    view.agents_away(frozenset())
    assert "GPU-b-0" not in view.unusable()


def pod(node: str, runs: bool) -> Json:
    state: Json = {"running": {}} if runs else {"waiting": {"reason": "CrashLoopBackOff"}}
    labels = {"app.kubernetes.io/name": "nbgpu", "app.kubernetes.io/component": "agent"}
    meta: Json = {"name": f"agent-{node}", "namespace": "gpu", "labels": labels}
    return {"metadata": meta, "spec": {"nodeName": node}, "status": {"containerStatuses": [{"state": state}]}}


def test_an_agent_is_away_when_it_has_not_run_for_some_seconds() -> None:
    agents = Agents()
    here, gone = keep_agent(pod("n", True)), keep_agent(pod("n", False))
    assert agents.away([], {"n"}, 0.0) == frozenset(), "agents that are no pods of the chart: nothing is known"
    assert agents.away([], {"n"}, 100.0) == frozenset()
    assert agents.away([here], {"n"}, 101.0) == frozenset()
    assert agents.away([gone], {"n"}, 102.0) == frozenset()
    assert agents.away([gone, here], {"n"}, 106.0) == frozenset(), "the new one of a rollout runs"
    assert agents.away([gone], {"n"}, 110.0) == frozenset()
    assert agents.away([gone], {"n"}, 110.0 + AWAY_SECONDS) == {"n"}
    assert agents.away([], {"n"}, 120.0) == {"n"}, "there were pods of agents, and this node has none"
    assert agents.away([], set(), 121.0) == frozenset(), "it offers nothing"
    assert agents.away([here], {"n"}, 122.0) == frozenset()


@pytest.mark.asyncio
async def test_the_pool_follows_the_agents_pods_of_its_own_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.client import Configuration

    monkeypatch.setattr(kube_ledger, "KEEPER_SECONDS", 0.05)
    async with FakeKube() as fake:
        configuration = Configuration()
        configuration.host = fake.url
        kube = Kube(configuration)
        ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
        fake.put(path("v1", "nodes"), {"metadata": {"name": "n"}, **ready})
        fake.put(path("resource.k8s.io/v1", "resourceslices"), resource_slice("n", [device(0)], {}, 1))
        agents = path("v1", "pods", "gpu")
        fake.put(path("v1", "pods"), pod("n", True), "gpu")
        ledger = KubeLedger(kube, b"k" * 16, ttl_seconds=60, agents_in="gpu")
        ledger.agents = Agents(away_seconds=0.0)
        assert ledger._agents.path == agents
        following = ledger.watch(lambda: 0, lambda: False)
        try:
            found = await anext(following)
            while not (isinstance(found, Snapshot) and found.devices):
                found = await anext(following)
            assert [one.healthy for one in found.devices] == [True]
            fake.put(path("v1", "pods"), pod("n", False), "gpu")
            found = await anext(following)
            while not (isinstance(found, Snapshot) and found.unusable):
                found = await anext(following)
            assert found.unusable == {"GPU-n-0": NO_AGENT.format("n")}
            assert [one.healthy for one in found.devices] == [False]
        finally:
            await following.aclose()
            await ledger.close()
            await kube.close()
