"""`nbgpu doctor --cluster` and `status --cluster`: what is said of a cluster, by its objects."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="nbgpu[kubernetes] is not installed")

from nbgpu.claims import claim_for, device_name, resource_slice
from nbgpu.cli_cluster import cluster_json, cluster_tables, show_pool
from nbgpu.cli_common import console
from nbgpu.cli_doctor_cluster import checks
from nbgpu.cluster_look import Cluster, Event, carried, take_in, unguarded
from nbgpu.errors import NbgpuError
from nbgpu.models import Device, Grant, GrantState, Owner, Request, Slice, SliceDevice

GIB = 1024**3
DEVICE = Device(uuid="GPU-a", index=0, model="Big", node="n0", memory_bytes=80 * GIB, reserve_bytes=2 * GIB)


def node(runtime: str = "containerd://2.1.0", ready: str = "True", **allocatable: str) -> dict[str, Any]:
    status = {"conditions": [{"type": "Ready", "status": ready}], "nodeInfo": {"containerRuntimeVersion": runtime}}
    return {"metadata": {"name": "n0"}, "status": {**status, "allocatable": allocatable}}


def claim(number: int, milli: int = 250, *, pod: bool = True, allocated: bool = True) -> dict[str, Any]:
    part = SliceDevice(uuid="GPU-a", index=0, model="Big", memory_bytes=20 * GIB, compute_milli=milli)
    owner = Owner(hub="hub", user="ada", server=str(number))
    made = claim_for(Slice(slice_id=f"request-{number}", owner=owner, node="n0", mode="burst", devices=[part], namespace="lab"), b"k" * 16)
    made["metadata"]["uid"] = f"0f7fc9a5-2a3b-4c5d-8e9f-00112233445{number}"
    consumed = {"memory": "20Gi", "compute": str(milli)}
    result = {"driver": "gpu.nbgpu.io", "pool": "n0", "device": device_name("GPU-a"), "consumedCapacity": consumed}
    if allocated:
        user = {"resource": "pods", "name": "p", "uid": "u"}
        made["status"] = {"allocation": {"devices": {"results": [result]}}, "reservedFor": [user] * pod}
    return made


def daemonset(ready: int = 1, wanted: int = 1, runtime: str | None = None) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "nbgpu", "name": "nbgpu-agent"},
        "spec": {"template": {"spec": {"runtimeClassName": runtime} if runtime else {}}},
        "status": {"desiredNumberScheduled": wanted, "numberReady": ready},
    }


def well(**changes: Any) -> Cluster:
    """Return a cluster where all is well but for `changes`."""
    found = Cluster(version="v1.36.3", has_class=True, agents=[daemonset()], runtime_classes={"nvidia"})
    found.pools = [{"metadata": {"namespace": "nbgpu", "name": "nbgpu-pool"}, "spec": {"replicas": 2}, "status": {"readyReplicas": 2}}]
    objects = {"nodes": [node()], "slices": [resource_slice("n0", [DEVICE], {}, 1)], "claims": [claim(1)]}
    objects |= {name: changes.pop(name) for name in list(changes) if name in objects}
    for name, value in changes.items():
        setattr(found, name, value)
    take_in(found, **objects)
    return found


def said(found: Cluster, *levels: str) -> list[str]:
    return [f"{one.name}: {one.found}" for one in checks(found) if one.level in levels]


def test_all_is_well() -> None:
    assert said(well(), "error", "warning") == []
    assert len(said(well(), "ok")) >= 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problem": "This cluster (Kubernetes 1.34) cannot share a device between claims; nbgpu needs 1.36: update it."}, "1.34"),
        ({"has_class": False}, "no DeviceClass gpu.nbgpu.io"),
        ({"slices": []}, "no agent publishes a GPU"),
        ({"agents": [daemonset(wanted=0, ready=0)]}, "runs on no node"),
        ({"agents": [daemonset(wanted=3)]}, "1 of 3 agents"),
        ({"agents": [daemonset(runtime="nvidia")], "runtime_classes": set()}, "RuntimeClass nvidia"),
        ({"events": [Event("Failed", "unresolvable CDI devices gpu.nbgpu.io/slice=x")]}, "refused its CDI devices"),
        ({"slices": [resource_slice("n0", [DEVICE.model_copy(update={"healthy": False})], {}, 1)]}, "is not healthy"),
        ({"slices": [{"metadata": {"name": "odd"}, "spec": {}}]}, "ResourceSlice odd"),
        ({"pools": [{"metadata": {"namespace": "a", "name": "b"}, "spec": {}}]}, "no replica of a/b is ready"),
        ({"claims": [claim(1, 750), claim(2, 750)]}, "150 % of its time exceed it"),
    ],
)
def test_what_is_wrong_and_what_to_do(changes: dict[str, Any], words: str) -> None:
    found = [one for one in checks(well(**changes)) if one.level == "error"]
    assert any(words in one.found for one in found), found
    assert all(one.remedy for one in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": [node("containerd://1.7.2")]}, "containerd 1 on n0"),
        ({"nodes": [node(ready="False")]}, "n0 is not ready"),
        ({"nodes": [node(**{"nvidia.com/gpu": "4"})]}, "hands out 4 of its GPUs"),
        ({"unread": ["events"]}, "may not read events"),
        ({"events": [Event("FailedPrepareDynamicResources", "no room")]}, "not prepared"),
    ],
)
def test_what_may_be_wrong(changes: dict[str, Any], words: str) -> None:
    assert any(words in one for one in said(well(**changes), "warning"))


def test_a_pod_that_waits_is_quoted() -> None:
    pod = {
        "metadata": {"labels": {"app.kubernetes.io/component": "agent"}},
        "status": {"conditions": [{"status": "False", "message": "no room"}]},
    }
    assert "0 of 1 agents of nbgpu/nbgpu-agent are ready: no room" in " ".join(said(well(agents=[daemonset(ready=0)], pods=[pod]), "error"))


def pool_pod(waiting: dict[str, str], last: str = "") -> dict[str, Any]:
    return {
        "metadata": {"namespace": "nbgpu", "name": "pool-1", "labels": {"app.kubernetes.io/component": "pool"}},
        "status": {"containerStatuses": [{"state": {"waiting": waiting}, "lastState": {"terminated": {"message": last}}}]},
    }


@pytest.mark.parametrize(
    ("pod", "words"),
    [
        (
            pool_pod({"reason": "CrashLoopBackOff"}, "pool: starting\nnbgpu pool: quotas.default.limit is 'lots'"),
            "quotas.default.limit is 'lots'",
        ),
        (pool_pod({"reason": "ContainerCreating"}), 'ContainerCreating: secret "nope" not found'),
    ],
)
def test_a_replica_that_does_not_come_up_beside_one_that_answers(pod: dict[str, Any], words: str) -> None:
    events = [Event("FailedMount", 'secret "nope" not found', "nbgpu/pool-1"), Event("FailedMount", "of another", "nbgpu/pool-2")]
    [found] = said(well(pods=[pod], events=events), "warning")
    assert found.startswith("pool replicas: a pod of nbgpu/nbgpu-pool does not run: ")
    assert words in found
    running = {**pod, "status": {"containerStatuses": [{"state": {"running": {}}}]}}
    assert said(well(pods=[running], events=events), "warning") == [], "control"


def test_a_new_agent_that_does_not_come_up_beside_one_that_serves() -> None:
    pod = pool_pod({"reason": "CrashLoopBackOff"}, "nbgpu agent: --reserve is 'lots'")
    pod["metadata"]["labels"]["app.kubernetes.io/component"] = "agent"
    [found] = said(well(pods=[pod]), "warning")
    assert found == "agents: a new pod of nbgpu/nbgpu-agent does not run: CrashLoopBackOff: nbgpu agent: --reserve is 'lots'"


def test_a_kubelet_that_asked_too_early_is_no_fault_of_the_agents() -> None:
    early = Event("FailedPrepareDynamicResources", "no relationship found between node 'n0' and this object")
    assert said(well(events=[early]), "warning", "error") == []
    assert any("a minute late" in one for one in said(well(events=[early]), "note"))
    assert len(said(well(events=[early, Event("FailedPrepareDynamicResources", "no room")]), "warning")) == 1


def test_a_claim_of_somebodys_own_that_waits_is_told_of() -> None:
    wanted = {"name": "gpu", "exactly": {"deviceClassName": "gpu.nbgpu.io", "capacity": {"requests": {"compute": "1250"}}}}
    own = {"metadata": {"namespace": "lab", "name": "big"}, "spec": {"devices": {"requests": [wanted]}}}
    other = {"metadata": {"namespace": "lab", "name": "nic"}, "spec": {"devices": {"requests": [{"exactly": {"deviceClassName": "nic"}}]}}}
    [found] = well(claims=[own, other]).holdings
    assert (found.owner, found.state, found.slice) == ("lab/big", "waiting", None)


@pytest.mark.parametrize("slices", [[resource_slice("n0", [DEVICE], {}, 1)], []], ids=["just now", "its ResourceSlices are gone too"])
def test_uninstalled_under_running_servers(slices: list[Any]) -> None:
    """Said once, with what to do, and not claim by claim."""
    ending = claim(2)
    ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    gone = well(agents=[], pools=[], slices=slices, claims=[claim(1), ending, claim(3, pod=False)])
    [agents] = [one for one in checks(gone) if one.name == "agents"]
    assert agents.level == "error"
    assert agents.found.startswith("2 servers hold slices and no agent of nbgpu's chart is here")
    assert "helm install nbgpu again" in agents.remedy
    assert not [one for one in checks(gone) if one.name == "claim"]
    [agents] = [one for one in checks(well(agents=[], pools=[], slices=slices, claims=[])) if one.name == "agents"]
    assert "helm install nbgpu deploy/chart" in agents.remedy


def test_a_pod_that_crashes_is_quoted_with_its_last_words() -> None:
    log = "starting\nThe pool's configuration /etc/nbgpu/pool.yaml is wrong at quotas.default.memory.\n"
    state = {
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
        "lastState": {"terminated": {"message": log}},
    }
    pod = {"metadata": {"labels": {"app.kubernetes.io/component": "pool"}}, "status": {"containerStatuses": [state]}}
    pool = {"metadata": {"namespace": "a", "name": "b"}, "spec": {}}
    assert "CrashLoopBackOff: The pool's configuration /etc/nbgpu/pool.yaml is wrong at quotas.default.memory" in " ".join(
        said(well(pools=[pool], pods=[pod]), "error")
    )


def test_a_node_whose_mounts_are_private_is_told_apart() -> None:
    message = 'failed to generate spec: path "/run/nbgpu" is mounted on "/" but it is not a shared mount'
    state = {"state": {"waiting": {"reason": "CreateContainerError", "message": message}}}
    pod = {"metadata": {"labels": {"app.kubernetes.io/component": "agent"}}, "status": {"containerStatuses": [state]}}
    template = {"spec": {"template": {"spec": {}}}}
    agent = {"metadata": {"namespace": "a", "name": "b"}, "status": {"desiredNumberScheduled": 1, "numberReady": 0}, **template}
    [one] = [one for one in checks(well(agents=[agent], pods=[pod])) if one.name == "agents"]
    assert "0 of 1 agents of a/b are ready: CreateContainerError" in one.found
    assert "mount --make-rshared" in one.remedy
    state["state"]["waiting"]["message"] = "no such image"
    [one] = [one for one in checks(well(agents=[agent], pods=[pod])) if one.name == "agents"]
    assert "mount" not in one.remedy


def test_a_device_class_without_an_installation() -> None:
    [one] = [one for one in checks(well(agents=[], pools=[], slices=[], claims=[])) if one.name == "device class"]
    assert one.level == "note"
    assert "createDeviceClass=false" in one.found
    assert [one.level for one in checks(well()) if one.name == "device class"] == ["ok"]


def test_namespaces_of_servers_without_pod_security() -> None:
    def space(name: str, level: str | None) -> dict[str, Any]:
        return {"metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": level} if level else {}}}

    def bound(role: str, where: str) -> dict[str, Any]:
        return {"metadata": {"namespace": where}, "roleRef": {"name": role}}

    spaces = [space("lab", None), space("strict", "restricted"), space("base", "baseline"), space("open", "privileged"), space("x", None)]
    bindings = [bound("nbgpu-pool-claims", one) for one in ("strict", "base", "open")] + [bound("nbgpu-pool-lease", "x")]
    assert unguarded(spaces, bindings, well().holdings) == ["lab", "open"]
    assert any("pod-security.kubernetes.io/enforce" in one for one in said(well(unguarded=["lab", "open"]), "note"))
    assert not any("Pod Security" in one for one in said(well(), "note"))


def test_who_holds_what() -> None:
    own = claim(4)
    own["metadata"] = {"name": "mine", "namespace": "lab", "uid": own["metadata"]["uid"]}
    found = well(claims=[claim(1), claim(2, pod=False), claim(3, allocated=False), own])
    told = cluster_json(found)
    assert [(one["name"], one["owner"], one["state"]) for one in told["claims"]] == [
        ("mine", "lab/mine", "running"),
        ("nbgpu-request-1", "ada/1 (hub)", "running"),
        ("nbgpu-request-2", "ada/2 (hub)", "idle"),
        ("nbgpu-request-3", "ada/3 (hub)", "waiting"),
    ]
    assert told["devices"][0]["compute_granted_milli"] == 750
    out = console()
    with out.capture() as shown:
        for part in cluster_tables(found):
            out.print(part)
    assert "60 GiB" in shown.get()
    assert "ada/1 (hub)" in shown.get()
    assert "used by no pod (lab/nbgpu-request-2)" in " ".join(said(found, "ok"))


@pytest.mark.parametrize(("phase", "state"), [("Pending", "waiting"), ("Failed", "idle"), (None, "idle")])
def test_a_claim_that_waits_has_a_pod_that_waits(phase: str | None, state: str) -> None:
    """Else it is only not in use: its server has ended, or is not there yet."""
    pod = {"metadata": {"namespace": "lab", "labels": {"nbgpu.io/slice": "request-3"}}, "status": {"phase": phase}}
    found = well(carried=carried([pod] if phase else []), claims=[claim(3, allocated=False)])
    assert [one.state for one in found.holdings] == [state]
    words = {"waiting": "1 waiting for a node", "idle": "0 waiting for a node, 1 used by no pod (lab/nbgpu-request-3)"}
    assert words[state] in " ".join(said(found, "ok"))


def test_a_pool_that_does_not_answer() -> None:
    with pytest.raises(NbgpuError, match="takes the pool's address"):
        show_pool("file:///etc/passwd", as_json=True)
    with pytest.raises(NbgpuError, match=r"The pool at http://127.0.0.1:1 does not answer: Connection refused\."):
        show_pool("http://127.0.0.1:1", as_json=True)


def test_a_claim_of_somebodys_own_is_called_the_same_by_cluster_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    own = claim(4)
    uid = own["metadata"]["uid"]
    own["metadata"] = {"name": "holder-gpu-jzkts", "namespace": "lab", "uid": uid}
    found = well(claims=[own, claim(1)])
    [foreign] = [one.slice for one in found.holdings if one.name == "holder-gpu-jzkts"]
    assert foreign is not None
    asked = Request(request_id="0123456789abcdef", owner=foreign.owner, compute_milli=250)
    grant = Grant(request=asked, state=GrantState.bound, slice=foreign)
    monkeypatch.setattr("nbgpu.cli_cluster._ask", lambda url, route, kind: [grant] if route == "/v1/requests" else [])
    out = console()
    with out.capture() as shown:
        for part in cluster_tables(found):
            out.print(part)
    by_cluster = shown.get()
    monkeypatch.setattr("nbgpu.cli_cluster.console", lambda: out)
    with out.capture() as shown:
        show_pool("http://pool", as_json=False)
    for told in (by_cluster, shown.get()):
        assert [line.split()[0] for line in told.splitlines() if "lab/holder-gpu-jzkts" in line] == ["holder-gpu-jzkts"], told
