"""The pod that carries a slice: whole JSON, and the class's order of calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("kubespawner")

from kubernetes_asyncio.client import ApiClient
from kubernetes_asyncio.client.exceptions import ApiException
from kubespawner import KubeSpawner
from kubespawner.objects import make_pod
from traitlets.config import Config

from nbgpu.claims import claim_name
from nbgpu.errors import Unavailable
from nbgpu.models import Grant, GrantState, Launch, LaunchGrant, Owner, Request, Slice, SliceDevice
from nbgpu_spawner.kube import KubeGPUSpawner
from nbgpu_spawner.options import wish_from
from nbgpu_spawner.pod import carried_by, lives, name_slice, plain_part, why_unscheduled, with_slice
from nbgpu_spawner.refusal import GPURefusal

REQUEST_ID = "0123456789abcdef0123456789abcdef"
OWNER = Owner(hub="h", user="Ada L.", server="two")


def granted(request: Request | None = None, state: GrantState = GrantState.bound) -> Grant:
    request = request or Request(request_id=REQUEST_ID, owner=OWNER, compute_milli=250)
    part = SliceDevice(uuid="GPU-1", index=0, model="H100", memory_bytes=2**30, compute_milli=250)
    found = Slice(slice_id=request.request_id, owner=request.owner, node="n", mode="burst", devices=[part])
    return Grant(request=request, state=state, slice=found)


def pod(**changes: Any) -> Any:
    plain: dict[str, Any] = {"name": "jupyter-ada", "image": "img", "image_pull_policy": "IfNotPresent", "cmd": ["start"], "port": 8888}
    return make_pod(**{**plain, **changes})


def as_json(made: Any) -> Any:
    async def convert() -> Any:
        async with ApiClient() as client:
            return client.sanitize_for_serialization(made)

    return asyncio.run(convert())


def test_a_pod_with_a_slice() -> None:
    plain = pod(env={"NVIDIA_VISIBLE_DEVICES": "all", "A": "1"}, labels={"l": "1"}, annotations={"a": "1"}, mem_limit=1000)
    before = as_json(plain)
    assert as_json(with_slice(plain, granted(), provisioner=True)) == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "jupyter-ada",
            "labels": {"l": "1", "nbgpu.io/slice": REQUEST_ID},
            "annotations": {
                "a": "1",
                "nbgpu.io/request-id": REQUEST_ID,
                "nbgpu.io/owner": '{"hub": "h", "server": "two", "user": "Ada L."}',
            },
        },
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "notebook",
                    "image": "img",
                    "imagePullPolicy": "IfNotPresent",
                    "args": ["start"],
                    "ports": [{"name": "notebook-port", "containerPort": 8888}],
                    "env": [
                        {"name": "A", "value": "1"},
                        {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"},
                        {"name": "JUPYTER_DEFAULT_PROVISIONER_NAME", "value": "nbgpu-provisioner"},
                    ],
                    "resources": {"limits": {"memory": 1000}, "requests": {}, "claims": [{"name": "nbgpu"}]},
                    "securityContext": {"allowPrivilegeEscalation": False},
                    "volumeMounts": [],
                }
            ],
            "resourceClaims": [{"name": "nbgpu", "resourceClaimName": f"nbgpu-{REQUEST_ID}"}],
            "restartPolicy": "OnFailure",
            "volumes": [],
        },
    }
    assert as_json(plain) == before, "the pod that KubeSpawner made is not changed"


def test_a_pod_without_a_gpu_sees_none() -> None:
    others = [{"name": "side", "image": "cuda", "env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}]
    plain = pod(extra_containers=others, init_containers=[{"name": "first", "image": "cuda"}])
    made, before = as_json(with_slice(plain, None)), as_json(plain)
    void = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}]
    spec = made["spec"]
    assert [container["env"] for container in [*spec["containers"], *spec["initContainers"]]] == [void, void, void]
    for document in (made, before):
        for container in [*document["spec"]["containers"], *document["spec"]["initContainers"]]:
            container.pop("env", None)
    assert made == before, "nothing else is different"


def test_claims_of_the_admin_stay() -> None:
    more = {"resourceClaims": [{"name": "nic", "resourceClaimName": "nic-1"}]}
    made = as_json(with_slice(pod(extra_pod_config=more), granted()))
    assert [claim["name"] for claim in made["spec"]["resourceClaims"]] == ["nic", "nbgpu"]


def test_a_claim_is_a_dns_label() -> None:
    assert len(claim_name(REQUEST_ID)) <= 63


def test_another_grant_takes_the_place_of_the_first() -> None:
    made = with_slice(pod(extra_pod_config={"resourceClaims": [{"name": "nic", "resourceClaimName": "nic-1"}]}), granted())
    other = granted(Request(request_id="f" * 32, owner=OWNER, compute_milli=250))
    expected = as_json(with_slice(pod(extra_pod_config={"resourceClaims": [{"name": "nic", "resourceClaimName": "nic-1"}]}), other))
    name_slice(made, other)
    assert as_json(made) == expected


@pytest.mark.parametrize("told", [None, 7, "", "../v1/release", "UPPER-CASE-1", "x" * 60])
def test_a_pod_tells_a_request_id_or_none(told: Any) -> None:
    assert carried_by({"metadata": {"annotations": {"nbgpu.io/request-id": told}}}) is None
    assert carried_by({"metadata": {"annotations": {"nbgpu.io/request-id": REQUEST_ID}}}) == REQUEST_ID
    assert carried_by({"metadata": {"annotations": None}}) is None


def test_which_pods_live() -> None:
    ended = [{"name": "notebook", "state": {"terminated": {"exitCode": 0}}}]
    assert lives({"metadata": {}, "status": {"phase": "Pending"}})
    assert lives({"metadata": {}, "status": {"phase": "Running", "containerStatuses": [{"name": "notebook", "state": {"running": {}}}]}})
    assert not lives({"metadata": {}, "status": {"phase": "Running", "containerStatuses": ended}})
    assert not lives({"metadata": {"deletionTimestamp": "now"}, "status": {"phase": "Running"}})
    assert not lives({"metadata": {}, "status": {"phase": "Failed", "reason": "Evicted"}})
    assert not lives(None)


def test_what_the_scheduler_says_in_plain_words() -> None:
    def event(message: str) -> dict[str, str]:
        return {"reason": "FailedScheduling", "message": message}

    assert why_unscheduled({"reason": "Pulled", "message": "Insufficient cpu"}) is None
    assert why_unscheduled(None) is None
    full = why_unscheduled(event("0/3 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 2 cannot allocate"))
    assert full is not None
    assert "not enough CPU and memory left" in full
    assert "made ready" in (why_unscheduled(event("waiting for resourceclaim to be deleted")) or "")
    assert plain_part("Kubernetes finds no node for the server yet: 0/3 nodes are available") == ""
    moved = "node a has no room for the server, b is tried. Kubernetes said: 0/3 nodes are available"
    assert plain_part(moved) == "Node a has no room for the server, b is tried."
    assert "ask your admin" in (why_unscheduled(event("0/3 nodes are available: 3 node(s) had untolerated taint")) or "")


class FakePool:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.becomes: Callable[[Request], GrantState] = lambda request: GrantState.reserved
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name in self.broken:
                raise Unavailable("It is away.", code="away")
            if name == "launch":
                self.asked.append(args[0].request_id)
                state = self.becomes(args[0])
                ready = Launch(env={}, slice_dir="", socket="") if state in (GrantState.reserved, GrantState.bound) else None
                return LaunchGrant(grant=granted(args[0], state), launch=ready)
            return granted() if name in ("grant", "bind") else []

        return call


def spawner(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, FakePool]:
    monkeypatch.setenv("POD_NAMESPACE", "default")
    monkeypatch.setattr("kubespawner.spawner.load_config", lambda **_: None)
    monkeypatch.setattr("kubespawner.spawner.shared_client", lambda _: None)
    fake = FakePool()
    monkeypatch.setattr(KubeGPUSpawner, "pool", fake)
    user = SimpleNamespace(name="ada", id=1, groups=[], settings={}, escaped_name="ada", url="/user/ada", server=None)
    listed = [{"display_name": "A quarter", "kubespawner_override": {"gpu_fraction": 0.25}}, {"display_name": "Own", "gpu_custom": True}]
    config = Config({"KubeSpawner": {"profile_list": listed, "start_timeout": 300}, "GPUSliceMixin": {"gpu_wait_timeout": 10}})
    made = KubeGPUSpawner(_mock=True, config=config)
    made.user = user
    made.hub = SimpleNamespace(public_host="", base_url="/hub/", api_url="http://h/api", url="http://h")
    made.orm_spawner = None
    monkeypatch.setattr(KubeGPUSpawner, "name", "")
    monkeypatch.setattr(made, "get_env", dict)
    monkeypatch.setattr(made, "get_args", list)
    return made, fake


def test_manifest_acquires_once_and_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        made.user_options = {"profile": "a-quarter"}
        await made.load_user_options()
        assert made.gpu_fraction == 0.25
        first = await made.get_pod_manifest()
        again = await made.get_pod_manifest()  # the create was answered with a conflict
        assert first.spec.resource_claims == again.spec.resource_claims
        assert first.metadata.annotations["nbgpu.io/request-id"] == fake.asked[0] == made.get_state()["gpu_request_id"]
        assert [call for call in fake.calls if call != "devices"] == ["release_owner", "launch", "bind"]
        await made.run_post_stop_hook()
        assert fake.calls[-1] == "release"
        await made.run_post_stop_hook()
        assert fake.calls.count("release") == 1

    asyncio.run(go())


def test_custom_choice_without_gpu_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        manifest = await made.get_pod_manifest()
        assert manifest.spec.resource_claims is None
        assert fake.calls == []
        made.user_options = {"profile": "own", "gpu_memory": "2 GiB"}
        await made.load_user_options()
        assert made.gpu_memory == "2 GiB"

    asyncio.run(go())


def test_bind_that_fails_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        fake.broken.add("bind")
        made.gpu_fraction = 0.25
        with pytest.raises(Exception, match="It is away"):
            await made.get_pod_manifest()
        assert fake.calls[-1] == "release"
        assert made.consecutive_failure_limit == 0

    asyncio.run(go())


def test_hub_killed_before_it_saved_finds_the_request_in_the_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        carried = {"metadata": {"annotations": {"nbgpu.io/request-id": REQUEST_ID}}, "status": {"phase": "Pending"}}
        reflector = SimpleNamespace(pods={f"{made.namespace}/{made.pod_name}": carried})
        monkeypatch.setattr(KubeGPUSpawner, "pod_reflector", reflector)

        async def nothing() -> None:
            pass

        monkeypatch.setattr(made, "_start_watching_pods", nothing)
        assert await made.poll() is None
        assert fake.calls == [], "poll never waits on the pool"
        assert made.get_state()["gpu_request_id"] == REQUEST_ID
        assert made.get_state()["gpu_id_from_pod"], "so that a hub that starts again does not believe it either"
        await made.run_post_stop_hook()
        assert fake.calls == ["release_owner"], "by whose it is: what a pod says somebody may have written"

    asyncio.run(go())


def creating(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """Let KubeSpawner's creation of a pod go so, one answer after the other."""
    left = list(answers)

    async def create(self: Any, pod: Any, timeout: float) -> bool:
        answer = left.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(KubeSpawner, "_make_create_pod_request", create)


def test_a_pod_that_is_made_twice_keeps_its_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        made.gpu_fraction = 0.25
        creating(monkeypatch, False, ApiException(status=500, reason="no"), TimeoutError(), True)
        pod = await made.get_pod_manifest()
        named = as_plain(pod)
        for expected in (False, False, False, True):
            assert await made._make_create_pod_request(pod, 3) is expected
        assert as_plain(pod) == named
        assert fake.asked == [fake.asked[0]] * 4, "asked for with one id: it is one slice"
        assert "release" not in fake.calls

    asyncio.run(go())


def test_a_slice_that_went_with_the_first_pod_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        made.gpu_fraction = 0.25
        creating(monkeypatch, False, True)
        pod = await made.get_pod_manifest()
        first = fake.asked[0]
        assert await made._make_create_pod_request(pod, 3) is False
        # it ran out while the next try was waited for
        fake.becomes = lambda request: GrantState.gone if request.request_id == first else GrantState.reserved
        assert await made._make_create_pod_request(pod, 3) is True
        assert fake.asked[-1] != first
        assert pod.spec.resource_claims[0].resource_claim_name == claim_name(fake.asked[-1])
        assert made.get_state()["gpu_request_id"] == fake.asked[-1]
        assert fake.calls.count("release") == 1

    asyncio.run(go())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            'pods "jupyter-ada" is forbidden: error looking up service account jhub/nope: serviceaccount "nope" not found',
            ": it is set up to run as a service account that is not there",
        ),
        (
            "ValidatingAdmissionPolicy 'nbgpu-pods' denied: annotations of nbgpu.io on pods are written by the hub alone",
            ": this hub runs under another service account than nbgpu's chart was told of",
        ),
        ('pods "jupyter-ada" is forbidden: exceeded quota: jhub', ": a quota of Kubernetes for servers here is used up"),
        ("something else in jhub", ""),
    ],
)
def test_what_the_api_server_refuses_for_good_is_said_in_plain_words_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, said: str, words: str
) -> None:
    async def go() -> None:
        made, _ = spawner(monkeypatch)
        made.gpu_fraction = 0.25
        refused = ApiException(status=403, reason="Forbidden")
        refused.body = json.dumps({"kind": "Status", "message": said})
        creating(monkeypatch, refused)
        logged = []
        monkeypatch.setattr(made.log, "error", lambda words, *more: logged.append(words % more))
        pod = await made.get_pod_manifest()
        with pytest.raises(GPURefusal) as caught:
            await made._make_create_pod_request(pod, 3)
        assert (caught.value.status_code, caught.value.reason) == (503, "gpu-pod-refused")
        assert caught.value.jupyterhub_message.startswith(f"Kubernetes does not take your server{words}. You cannot mend that: tell your")
        assert not any(part in caught.value.jupyterhub_message for part in ("403", "Forbidden", "jhub", "{"))
        assert len(logged) == 1
        assert said in logged[0]

    asyncio.run(go())


def test_what_is_left_of_the_last_life_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        made, fake = spawner(monkeypatch)
        old = {"metadata": {"annotations": {"nbgpu.io/request-id": REQUEST_ID}}, "status": {"phase": "Running"}}
        monkeypatch.setattr(KubeGPUSpawner, "pod_reflector", SimpleNamespace(pods={f"{made.namespace}/{made.pod_name}": old}))
        stopped: list[bool] = []

        async def stop(now: bool = False) -> None:
            assert "launch" not in fake.calls
            stopped.append(now)
            made.pod_reflector.pods.clear()

        monkeypatch.setattr(made, "stop", stop)
        await made.get_pod_manifest()
        assert stopped == [], "not before a start without a GPU: KubeSpawner does as it always did"
        made.gpu_fraction = 0.25
        await made.get_pod_manifest()
        assert stopped == [True]

        async def fails(now: bool = False) -> None:
            raise ApiException(status=500, reason="no")

        monkeypatch.setattr(made, "stop", fails)
        made._gpu_grant = None
        made.pod_reflector.pods[f"{made.namespace}/{made.pod_name}"] = old
        with pytest.raises(Exception, match="last server could not be removed yet"):
            await made.get_pod_manifest()

    asyncio.run(go())


def as_plain(pod: Any) -> Any:
    return pod.to_dict()


def test_cpu_only_is_cpu_only_whatever_is_configured_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        for slug, options, amounts in (
            ("cpu-only", {}, (None, None)),
            ("a-quarter", {}, (0.25, None)),
            ("own", {"gpu_memory": "9 GiB"}, (None, "9 GiB")),
        ):
            made, _ = spawner(monkeypatch)
            made.profile_list = [*made.profile_list, {"display_name": "CPU only"}]
            made.gpu_fraction = "1/2"
            made.user_options = {"profile": slug, **options}
            await made.load_user_options()
            assert (made.gpu_fraction, made.gpu_memory) == amounts

    asyncio.run(go())


def test_a_profile_of_a_group_is_no_choice_and_no_default_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in KubeSpawner's own form, nor by the REST API, nor where nothing is chosen."""
    big = {"gpu_fraction": 1, "mem_limit": "9G"}
    listed = [
        {"display_name": "Whole", "default": True, "allowed_groups": ["staff"], "kubespawner_override": big},
        {"display_name": "Small", "kubespawner_override": {"gpu_fraction": 0.125}},
    ]

    def of(groups: list[str], options: dict[str, Any]) -> Any:
        made, _ = spawner(monkeypatch)
        made.profile_list, made.user_options = listed, options
        made.user.groups = [SimpleNamespace(name=name) for name in groups]
        return made

    async def go() -> None:
        made = of(["chess"], {})
        await made.load_user_options()
        assert made.gpu_fraction == 0.125
        made = of(["staff"], {})
        await made.load_user_options()
        assert (made.gpu_fraction, made.mem_limit) == (1, 9 * 2**30), "the control"
        with pytest.raises(Exception, match="Profile is 'whole'; it must be one of small"):
            await of([], {"profile": "whole"}).load_user_options()

    asyncio.run(go())
    assert "Whole" not in of([], {})._options_form_default()
    assert "Whole" in of(["staff"], {})._options_form_default(), "the control"


def test_a_start_begins_with_what_was_granted_in_place_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with another request where the start asks for something else after all."""

    async def go(fraction: float) -> tuple[str, FakePool]:
        made, fake = spawner(monkeypatch)
        made.gpu_fraction = fraction
        wish = wish_from({"gpu_fraction": 0.25})
        assert wish is not None
        made.gpu_begin_with(made.gpu_request(wish, REQUEST_ID))
        await made.get_pod_manifest()
        return fake.asked[0], fake

    asked, fake = asyncio.run(go(0.25))
    assert asked == REQUEST_ID
    assert "release" not in fake.calls
    asked, fake = asyncio.run(go(0.5))
    assert asked != REQUEST_ID
    assert fake.calls[0] == "release", "what was granted goes back first"
