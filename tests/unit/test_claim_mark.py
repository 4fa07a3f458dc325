"""A claim of the pool that somebody makes once more, word by word, is not prepared: the pool marks the very object that it made."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("grpc")
pytest.importorskip("httpx")

from fake_kube import FakeKube

from nbgpu.claim_mark import MADE_ANNOTATION, is_marked, mark_patch
from nbgpu.claims import DRIVER, claim_for, claim_name, device_name
from nbgpu.kube import Json, Kube, path
from nbgpu.models import Device, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB
from nbgpu_agent.kube.checkpoint import Checkpoint, Entry
from nbgpu_agent.kube.claims import NodeClaims, NotPrepared, Unmarked
from nbgpu_pool.kube_ledger import KubeLedger

KEY = b"k" * 32
ID = "a" * 32
CLAIMS = "/apis/resource.k8s.io/v1/resourceclaims"
DEVICE = Device(uuid="GPU-1", index=0, model="H100", node="n", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)
PART = SliceDevice(uuid="GPU-1", index=0, model="H100", memory_bytes=20 * GIB, compute_milli=250)
SLICE = Slice(slice_id=ID, owner=Owner(hub="h", user="ada"), node="n", mode="burst", devices=[PART], namespace="ns")


def made(uid: str, annotations: Json | None = None) -> Json:
    """Return the pool's claim as the API server shows it once it has its devices."""
    claim = copy.deepcopy(claim_for(SLICE, KEY))
    claim["metadata"] |= {"uid": uid, "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    claim["metadata"]["annotations"] |= annotations or {}
    result = {"request": "gpu-0", "driver": DRIVER, "pool": "n", "device": device_name("GPU-1"), "shareID": "s"}
    taken = {"memory": str(20 * GIB), "compute": "250"}
    claim["status"] = {"allocation": {"devices": {"results": [{**result, "consumedCapacity": taken}]}}}
    return claim


def mark_of(uid: str) -> Json:
    return mark_patch(made(uid), KEY)["metadata"]["annotations"]


def test_a_mark_is_for_one_object() -> None:
    assert is_marked(made("u-1", mark_of("u-1")), KEY) is True
    assert is_marked(made("u-2", mark_of("u-1")), KEY) is False, "a copy of the mark, too"
    assert is_marked(made("u-1"), KEY) is None
    for junk in ("", "0" * 64, 7, None, "\ud800"):
        assert not is_marked(made("u-1", {MADE_ANNOTATION: junk}), KEY)
    assert not is_marked(made("u-1", mark_of("u-1")), b"another key")
    assert not is_marked(made("u-1", mark_of("u-1")), None)
    assert is_marked({"metadata": 3}, KEY) is None


# -- the agent


def agent_of(place: Path, **claims: Entry) -> NodeClaims:
    checkpoint = Checkpoint(place)
    for uid, entry in claims.items():
        checkpoint.put(uid, entry)
    agent: Any = SimpleNamespace(devices={"GPU-1": DEVICE}, slices={})
    unused: Any = None
    return NodeClaims(agent, unused, unused, checkpoint, unused, place, KEY, foreign=True)


def test_the_agent_takes_the_very_object_that_the_pool_made(tmp_path: Path) -> None:
    agent = agent_of(tmp_path)
    assert agent._read(made("u1", mark_of("u1"))).sealed, "the control"
    with pytest.raises(NotPrepared, match="may be a copy") as caught:
        agent._read(made("u2", mark_of("u1")))
    assert not isinstance(caught.value, Unmarked), "nothing to wait for"
    with pytest.raises(Unmarked, match="may be a copy"):  # the pool may be about to mark it
        agent._read(made("u2"))


def test_what_is_prepared_stays_so_without_a_mark(tmp_path: Path) -> None:
    """Of a claim that an agent before this one prepared, the checkpoint knows the uid."""
    entry = Entry(namespace="ns", name=claim_name(ID), slice_id=ID, sealed=True, parts=(), spec={})
    agent = agent_of(tmp_path, u1=entry)
    assert agent._read(made("u1")).sealed
    with pytest.raises(Unmarked):
        agent._read(made("u2"))


# -- the pool


@asynccontextmanager
async def ledger() -> AsyncIterator[tuple[FakeKube, KubeLedger]]:
    from kubernetes.client import Configuration

    async with FakeKube() as fake:
        configuration = Configuration()
        configuration.host = fake.url
        found = KubeLedger(Kube(configuration), KEY, ttl_seconds=60)
        yield fake, found
        await found.close()
        await found.kube.close()


def there(fake: FakeKube) -> Json:
    return fake.objects[CLAIMS]["ns", claim_name(ID)]


@pytest.mark.asyncio
async def test_the_pool_marks_what_it_grants() -> None:
    async with ledger() as (fake, pool):
        await pool.prepare(SLICE, None)
        first = there(fake)
        assert is_marked(first, KEY)
        await pool.prepare(SLICE, None)
        assert there(fake)["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"], "once is enough"


@pytest.mark.asyncio
async def test_a_pool_that_died_before_it_marked_is_asked_again() -> None:
    """Its hub had no answer yet: the claim that lies there has the words of the grant, and is marked with it."""
    async with ledger() as (fake, pool):
        fake.put(CLAIMS, claim_for(SLICE, KEY), "ns")
        assert is_marked(there(fake), KEY) is None
        await pool.prepare(SLICE, None)
        assert is_marked(there(fake), KEY)


@pytest.mark.asyncio
async def test_a_move_that_another_pool_began_is_marked_when_it_is_finished() -> None:
    async with ledger() as (fake, pool):
        old = SLICE.model_copy(update={"node": "m"})
        await pool._make_moved(path("resource.k8s.io/v1", "resourceclaims", "ns"), SLICE)
        assert is_marked(there(fake), KEY)
        fake.remove(CLAIMS, claim_name(ID), "ns")
        fake.put(CLAIMS, claim_for(SLICE, KEY), "ns")
        await pool.move(old, SLICE)
        assert is_marked(there(fake), KEY)
