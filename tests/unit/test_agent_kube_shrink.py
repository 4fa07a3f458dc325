"""On Kubernetes the agent reports what a slice holds above its new limit, publishes nothing of it, and says so when it is free."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("grpc")

from test_claim_limits import DEVICE, DEVICES, GIB, KEY, SLICE, UID, a_claim, wanted

from nbgpu.claim_limits import Limit, in_force, is_refused, is_settled, shares
from nbgpu.models import Slice
from nbgpu_agent.books import holding
from nbgpu_agent.kube.follow import Follower

Json = dict[str, Any]


class Node:
    """A follower with one claim: the API server and the agent's slice are the test's."""

    def __init__(self, claim: Json):
        self.claim = claim
        self.used_bytes = 0
        self.published: list[int] = []
        of = SimpleNamespace(uid=UID, namespace="jhub", name=claim["metadata"]["name"])
        self.live: Any = SimpleNamespace(record=SimpleNamespace(claim=of, lowered=None), slice=SLICE, limits=SLICE)
        agent: Any = SimpleNamespace(change=self.change, devices={DEVICE.uuid: DEVICE}, settings=SimpleNamespace(node="node-1"))
        claims: Any = SimpleNamespace(
            key=KEY, live=lambda uid: self.live if uid == UID else None, devices=lambda: DEVICES, lock=asyncio.Lock()
        )
        kube: Any = SimpleNamespace(patch=self.patch, pages=self.pages)
        reporter: Any = SimpleNamespace(say=lambda *_: None)
        self.follower = Follower(agent, kube, reporter, claims)
        self.agent = agent
        self.follower.items = SimpleNamespace(items={"k": claim}, note=self.note, ready=True)  # type: ignore[assignment]
        self.follower.publisher = SimpleNamespace(publish=self.publish)  # type: ignore[assignment]

    def change(self, live: Any, limits: Slice) -> None:
        """As `Agent.change` and `Agent.settle`."""
        had = [min(part.memory_bytes, self.used_bytes) for part in live.slice.devices]
        live.limits, live.slice = limits, holding(limits, had)
        live.record.lowered = limits if live.slice != limits else None

    async def patch(self, where: str, body: Json, **_: object) -> Json:
        self.claim = {**copy.deepcopy(self.claim), "status": {**self.claim["status"], **body["status"]}}
        return self.claim

    async def pages(self, where: str) -> AsyncGenerator[Any, None]:
        yield SimpleNamespace(items=[self.claim])

    def want(self, limit: Limit) -> None:
        """Have the pool want other limits."""
        self.claim = {**a_claim(wants=limit), "status": self.claim["status"]}
        self.note(self.claim)

    def note(self, claim: Json) -> None:
        self.follower.items.items["k"] = claim  # type: ignore[index]

    async def publish(self) -> None:
        self.published.append(self.follower.capacity()[DEVICE.uuid][0])

    def settle(self) -> None:
        asyncio.run(self.follower._settle(UID, self.claim))  # pyright: ignore[reportPrivateUsage]

    def says(self) -> Limit:
        return in_force(shares(self.claim, DEVICES))[DEVICE.uuid]


def test_a_claim_keeps_what_its_slice_still_holds() -> None:
    node = Node(a_claim(wants=Limit(memory_bytes=5 * GIB, compute_milli=100)))
    node.used_bytes = 17 * GIB
    node.settle()
    assert node.live.limits.devices[0].memory_bytes == 5 * GIB, "the limit is in force at once"
    assert node.says() == Limit(memory_bytes=17 * GIB, compute_milli=100)
    assert node.published[-1] == (78 + 20 - 17) * GIB, "others get what it has let go of, and no more"
    node.used_bytes = 1 * GIB
    node.change(node.live, node.live.limits)
    node.agent.on_settled(node.live)
    assert UID in node.follower._due, "its claim is looked at again"  # pyright: ignore[reportPrivateUsage]
    node.settle()
    assert node.says() == Limit(memory_bytes=5 * GIB, compute_milli=100)
    assert node.published[-1] == (78 + 20 - 5) * GIB
    assert is_settled(shares(node.claim, DEVICES), wanted(node.claim))


def test_control_what_is_not_held_is_free_at_once() -> None:
    node = Node(a_claim(wants=Limit(memory_bytes=5 * GIB, compute_milli=100)))
    node.settle()
    assert node.says().memory_bytes == 5 * GIB
    assert node.published[-1] == (78 + 20 - 5) * GIB


def test_a_growth_that_is_refused_raises_no_limit_into_what_is_still_held() -> None:
    node = Node(a_claim(wants=Limit(memory_bytes=10 * GIB, compute_milli=100)))
    node.used_bytes = 20 * GIB
    node.settle()
    lowered = node.live.limits
    assert lowered.devices[0].memory_bytes == 10 * GIB
    node.agent.devices = {DEVICE.uuid: DEVICE.model_copy(update={"reserve_bytes": DEVICE.memory_bytes - 25 * GIB})}
    more = Limit(memory_bytes=30 * GIB, compute_milli=100)
    node.want(more)
    node.settle()
    assert node.live.limits == lowered
    assert node.says().memory_bytes == 20 * GIB
    assert is_refused(shares(node.claim, DEVICES), wanted(node.claim)), "the pool hears of it"
    node.agent.devices = {DEVICE.uuid: DEVICE}
    node.want(more.model_copy(update={"memory_bytes": 31 * GIB}))
    node.settle()
    assert node.live.limits.devices[0].memory_bytes == 31 * GIB, "control: where there is room"
    assert is_settled(shares(node.claim, DEVICES), wanted(node.claim))


def test_it_grows_into_what_it_still_holds() -> None:
    node = Node(a_claim(wants=Limit(memory_bytes=5 * GIB, compute_milli=100)))
    node.used_bytes = 20 * GIB
    node.settle()
    node.want(Limit(memory_bytes=12 * GIB, compute_milli=100))
    node.settle()
    assert node.live.limits.devices[0].memory_bytes == 12 * GIB
    assert node.says().memory_bytes == 20 * GIB
    assert not is_refused(shares(node.claim, DEVICES), wanted(node.claim))
