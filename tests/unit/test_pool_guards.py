"""What one object, one hub or one refusal must not do to the pool of all."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("httpx")

from fake_kube import FakeKube

from nbgpu.claims import claim_for
from nbgpu.errors import Unavailable
from nbgpu.kube import Kube, NotAllowed, path
from nbgpu.kube_check import cluster_problem
from nbgpu.models import Device, Owner, Slice, SliceDevice
from nbgpu.quantities import GIB
from nbgpu_pool import kube_ledger as kube_ledger_module
from nbgpu_pool import service as service_module
from nbgpu_pool.config import Config
from nbgpu_pool.core import Core
from nbgpu_pool.kube_ledger import KubeLedger
from nbgpu_pool.kube_view import ClaimInfo, Published, View, keep_pod
from nbgpu_pool.ledger import LedgerRefused
from nbgpu_pool.service import Service
from nbgpu_pool.shapes import Part
from nbgpu_pool.state import Seen, Snapshot

DEVICE = Device(uuid="GPU-1", index=0, model="H100", node="n", memory_bytes=82 * GIB, reserve_bytes=2 * GIB)


def running(slice_id: str, hub: str, parts: int = 1) -> Seen:
    part = SliceDevice(uuid="GPU-1", index=0, model="H100", memory_bytes=2**20, compute_milli=1)
    owner = Owner(hub=hub, user="ada")
    return Seen(Slice.model_construct(slice_id=slice_id, owner=owner, node="n", mode="burst", groups=[], devices=[part] * parts,
                                      simulated=False, namespace="ns"), "running")  # fmt: skip


@pytest.mark.parametrize("parts", [1, 17, 32])
def test_somebodys_own_claim_of_many_parts_is_booked(parts: int) -> None:
    core = Core()
    core.snapshot(Snapshot(core.mark, [DEVICE], [running("claim-0123", "kubernetes", parts)]), 1.0)
    assert core.ready
    assert [entry.slice_id for entry in core.books.entries.values()] == ["claim-0123"]


@pytest.mark.parametrize(("by", "state"), [("a", "bound"), ("b", "releasing")])
def test_a_hub_takes_back_only_its_own_while_the_books_are_rebuilt(by: str, state: str) -> None:
    core = Core()
    core.cancel("0123456789abcdef", by, 0.0)
    core.snapshot(Snapshot(core.mark, [DEVICE], [running("0123456789abcdef", "b")]), 1.0)
    assert core.books.entries["0123456789abcdef"].state.value == state


async def kube_of(fake: FakeKube, folder) -> Kube:  # type: ignore[no-untyped-def]
    from kubernetes.client import Configuration

    configuration = Configuration()
    configuration.host = fake.url
    return Kube(configuration)


@pytest.mark.asyncio
async def test_one_claim_that_is_refused_keeps_nobody_from_the_others(tmp_path) -> None:  # type: ignore[no-untyped-def]
    async with FakeKube() as fake:
        ledger = KubeLedger(await kube_of(fake, tmp_path), b"k" * 16, ttl_seconds=0)
        done: list[str] = []

        async def refused(key, *more) -> None:  # type: ignore[no-untyped-def]
            if key[1] == "first":
                raise NotAllowed("forbidden")
            done.append(key[1])

        ledger._make_owner = refused  # type: ignore[method-assign]
        view = ledger.view
        view.unowned |= {("ns", "first"), ("ns", "second")}
        view.claims = {key: type("Info", (), {"uid": "u", "version": "1"})() for key in view.unowned}  # type: ignore[assignment]
        view.new_owner = lambda key: object()  # type: ignore[method-assign, assignment, return-value]
        view.age_seconds = lambda key: 1.0  # type: ignore[method-assign]
        await ledger._own()
        assert done == ["second"]
        await ledger.close()
        await ledger.kube.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(("age", "owned"), [(59.0, False), (60.0, True)])
async def test_a_pod_owns_its_claim_only_when_no_hub_makes_it_once_more(age: float, owned: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A hub that deletes a pod whose creation was answered late makes it again with the same claim, which an owner would take along."""
    async with FakeKube() as fake:
        ledger, made = KubeLedger(await kube_of(fake, tmp_path), b"k" * 16, ttl_seconds=60), list[str]()

        async def make(key, *more) -> None:  # type: ignore[no-untyped-def]
            made.append(key[1])

        ledger._make_owner = make  # type: ignore[method-assign]
        view = ledger.view
        view.unowned.add(("ns", "claim"))
        view.claims = {("ns", "claim"): object()}  # type: ignore[dict-item]
        view.new_owner = lambda key: object()  # type: ignore[method-assign, assignment, return-value]
        view.age_seconds = lambda key: age  # type: ignore[method-assign]
        await ledger._own()
        assert made == (["claim"] if owned else [])
        await ledger.close()
        await ledger.kube.close()


@pytest.mark.asyncio
async def test_an_owner_says_that_it_is_no_controller(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Who may write annotations makes a claim one for extended resources; kube-scheduler ends over an owner that does not say."""
    async with FakeKube() as fake:
        ledger = KubeLedger(await kube_of(fake, tmp_path), b"k" * 16, ttl_seconds=60)
        claims = path("resource.k8s.io/v1", "resourceclaims")
        there = fake.put(claims, {"metadata": {"name": "claim"}}, "ns")["metadata"]
        pod = keep_pod({"metadata": {"name": "p", "namespace": "ns", "uid": "u-1"}})
        await ledger._make_owner(("ns", "claim"), ClaimInfo(there["uid"], there["resourceVersion"], None), pod)
        [owner] = fake.objects[claims]["ns", "claim"]["metadata"]["ownerReferences"]
        assert owner == {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u-1", "controller": False}
        await ledger.close()
        await ledger.kube.close()


@pytest.mark.asyncio
async def test_who_waited_to_create_a_claim_looks_again_whether_this_pool_leads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    async with FakeKube() as fake:
        leads, begun, most = True, asyncio.Event(), kube_ledger_module.CREATIONS
        ledger = KubeLedger(await kube_of(fake, tmp_path), b"k" * 16, ttl_seconds=60, may_act=lambda: leads)
        fake.delay_seconds = 0.3
        create, at_once = ledger.kube.create, 0

        async def counted(*arguments):  # type: ignore[no-untyped-def]
            nonlocal at_once
            at_once += 1
            begun.set()
            return await create(*arguments)

        ledger.kube.create = counted  # type: ignore[method-assign]
        wanted = [running(f"request-{number}", "a").slice for number in range(most + 3)]
        work = [asyncio.create_task(ledger.prepare(one, None)) for one in wanted]
        await begun.wait()
        await asyncio.sleep(0)
        assert at_once == most
        leads = False
        found = await asyncio.gather(*work, return_exceptions=True)
        assert [isinstance(one, Unavailable) for one in found] == [False] * most + [True] * 3
        assert len(fake.objects["/apis/resource.k8s.io/v1/resourceclaims"]) == most
        await ledger.close()
        await ledger.kube.close()


@pytest.mark.asyncio
async def test_claims_of_an_earlier_key_are_freed_where_nobody_comes_for_them(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Only of the pool's hubs, in their namespaces, after the time since this pool first saw them without a pod, and as they were seen."""
    async with FakeKube() as fake:
        hubs = {"a": ["lab", "lab-*"], "b": ["other"]}
        ledger = KubeLedger(await kube_of(fake, tmp_path), b"k" * 16, ttl_seconds=100, hubs=hubs)
        view, there = ledger.view, {}
        for number, (hub, namespace) in enumerate([("a", "lab"), ("a", "lab-1"), ("a", "other"), ("c", "lab"), ("a", "lab")]):
            made = claim_for(running(f"request-{number}", hub).slice.model_copy(update={"namespace": namespace}), b"another key")
            thing = fake.put("/apis/resource.k8s.io/v1/resourceclaims", made)
            there[number] = namespace, made["metadata"]["name"]
            view.claim_changed(there[number], view.read(thing))
        deleted: list[tuple[tuple[str, str], str | None]] = []

        async def delete(key, uid, version=None) -> bool:  # type: ignore[no-untyped-def]
            deleted.append((key, version))
            view.claim_changed(key, None)
            return True

        ledger._delete = delete  # type: ignore[method-assign]

        async def at(seconds: float) -> list[int]:
            deleted.clear()
            monkeypatch.setattr(kube_ledger_module, "time", SimpleNamespace(monotonic=lambda: seconds))
            await ledger._delete_left_over()
            assert all(version for _, version in deleted)
            return sorted(number for number, key in there.items() if key in [one for one, _ in deleted])

        pod = keep_pod({
            "metadata": {"name": "p", "namespace": "lab", "uid": "u", "labels": {"nbgpu.io/slice": "request-4"}},
            "spec": {"resourceClaims": [{"name": "nbgpu", "resourceClaimName": "nbgpu-request-4"}]}, "status": {"phase": "Pending"},
        })  # fmt: skip
        assert await at(1000) == []
        view.pod_changed(("lab", "p"), None, pod)
        assert await at(1099) == []
        assert await at(1101) == [0, 1]
        view.pod_changed(("lab", "p"), pod, None)
        assert await at(1300) == [], "its time begins anew"
        assert await at(1401) == [4]
        assert await at(9000) == [], "of a hub, or in a namespace, that is not the pool's"
        await ledger.close()
        await ledger.kube.close()


@pytest.mark.asyncio
async def test_bodies_are_as_the_api_server_writes_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Else a claim of a user called "R&D <x>" could never be patched."""
    async with FakeKube() as fake:
        kube = await kube_of(fake, tmp_path)
        sent: list[bytes] = []
        inner = kube._http.stream

        def listen(*arguments, **more):  # type: ignore[no-untyped-def]
            sent.append(more["content"])
            return inner(*arguments, **more)

        kube._http.stream = listen  # type: ignore[method-assign]
        await kube.create(path("v1", "configmaps", "ns"), {"metadata": {"name": "x"}, "data": {"owner": "R&D <x>"}})
        await kube.close()
    assert sent == [b'{"data":{"owner":"R\\u0026D \\u003cx\\u003e"},"metadata":{"name":"x"}}']
    assert json.loads(sent[0])["data"]["owner"] == "R&D <x>"


class Api:
    """Takes claims in some namespaces."""

    def __init__(self, **refusals: Exception):
        self.refusals = refusals

    async def get(self, _: str) -> dict[str, str]:
        return {"major": "1", "minor": "36"}

    async def create(self, where: str, body: dict, dry_run: bool) -> dict:  # type: ignore[type-arg]
        namespace = where.split("/")[-2]
        if namespace in self.refusals:
            raise self.refusals[namespace]
        return body


@pytest.mark.parametrize(
    ("refusals", "says"),
    [
        ({}, None),
        ({"one": NotAllowed("no")}, None),
        ({"one": NotAllowed("no"), "two": NotAllowed("neither")}, "in namespace two: neither"),
        ({"one": NotAllowed("exceeded quota: full"), "two": NotAllowed("exceeded quota: full")}, None),
    ],
)
def test_one_hubs_namespace_stops_no_other_hub(refusals: dict[str, Exception], says: str | None) -> None:
    found = asyncio.run(cluster_problem(Api(**refusals), "one", "two"))  # type: ignore[arg-type]
    assert found == says if says is None else says in str(found)


class Guarded(Api):
    """With the chart's rule: claims for nbgpu's devices are made by the pool alone."""

    async def create(self, where: str, body: dict, dry_run: bool) -> dict:  # type: ignore[type-arg]
        if body["spec"]["devices"]["requests"][0]["exactly"]["deviceClassName"] == "gpu.nbgpu.io":
            raise NotAllowed("claims for gpu.nbgpu.io are made by nbgpu's pool alone on this cluster")
        return body


def test_the_question_to_the_cluster_is_no_claim_that_the_charts_rules_refuse() -> None:
    assert asyncio.run(cluster_problem(Guarded(), "default")) is None  # type: ignore[arg-type]


def test_no_hub_is_called_as_the_owner_of_claims_that_no_hub_made() -> None:
    with pytest.raises(ValueError, match="cannot be called kubernetes"):
        Config.model_validate({"tokens": [{"role": "hub", "hub": "kubernetes", "env": "X", "namespaces": ["x"]}]})


class Refuses:
    """A ledger that holds one slice and may not give it back."""

    who = "The ledger"

    def __init__(self, until: int):
        self.asked: list[float] = []
        self.enough = asyncio.Event()
        self._until = until

    async def watch(self, mark, fresh):  # type: ignore[no-untyped-def]
        yield Snapshot(mark(), [DEVICE], [running("0123456789abcdef", "hub")])
        await asyncio.Event().wait()

    async def release(self, slice_id: str) -> bool:
        self.asked.append(asyncio.get_running_loop().time())
        if len(self.asked) == self._until:
            self.enough.set()
        raise LedgerRefused("the pool has no right to delete claims there")

    async def close(self) -> None:
        pass


@pytest.mark.asyncio
async def test_what_is_refused_is_asked_again_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "RETRY_SECONDS", 0.01)
    ledger = Refuses(5)
    service = Service(ledger)  # type: ignore[arg-type]
    service.start()
    assert await service.changed(service.core.generation, 5)
    service.cancel("0123456789abcdef", "hub")
    await asyncio.wait_for(ledger.enough.wait(), 10)
    await service.stop()
    pauses = [later - earlier for earlier, later in itertools.pairwise(ledger.asked)]
    assert all(pause >= 0.009 * 2 ** (number + 1) for number, pause in enumerate(pauses)), pauses
    assert service.core.books.entries["0123456789abcdef"].state.value == "releasing"


def test_devices_of_nodes_that_went_are_forgotten_once_nobody_holds_them() -> None:
    view = View(b"k" * 16, lambda: 0.0)
    for number in range(3):
        node = f"n{number}"
        view.published_changed(node, Published(node, (DEVICE.model_copy(update={"node": node, "uuid": f"GPU-{node}"}),), (Part(1, 1),), {}))
    held = running("claim-0123", "kubernetes").slice.model_copy(update={"node": "n0"})
    held.devices[0] = held.devices[0].model_copy(update={"uuid": "GPU-n0"})
    view.claims["ns", "x"] = ClaimInfo("u", "1", None, slice=held)
    view.published_changed("n0", None)
    view.published_changed("n1", None)
    view.devices()
    assert view.by_name.keys() == {("n0", "gpu-n0"), ("n2", "gpu-n2")}
    del view.claims["ns", "x"]
    view.published_changed("n2", None)
    view.devices()
    assert not view.by_name
