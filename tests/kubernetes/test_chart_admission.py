"""Who may write what: the chart's admission rules and roles on a real cluster, as different people; the control switches the rules off.

Nothing of nbgpu runs here: the chart's pods find no node. Requests are dry runs unless something must exist.
"""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart_kit import CHART, ROOT, Api, Json, helm, namespace, options, until

from nbgpu.kube import Kube
from nbgpu.kube_check import cluster_problem

pytestmark = [pytest.mark.kubernetes]

REQUEST = "0123456789abcdef0123456789abcdef"
CLASS = "/apis/resource.k8s.io/v1/deviceclasses/gpu.nbgpu.io"
EDITOR = "ada@example.org"
CONTROLLER = {"user": "system:serviceaccount:kube-system:resource-claim-controller", "groups": ["system:serviceaccounts:kube-system"]}
GROUP = "resource.k8s.io"
NOWHERE = {"nbgpu-test/nowhere": "true"}


class Place:
    """A namespace with the chart in it, and the people there."""

    def __init__(self, api: Api, name: str):
        self.api = api
        self.name = name
        self.values: Json = {
            "pool.nodeSelector": NOWHERE,
            "agent.nodeSelector": NOWHERE,
            "agent.simulate.enabled": True,
            "createDeviceClass": api.call("GET", CLASS)[0] == 404,
            "admission.namespaceSelector": {"kubernetes.io/metadata.name": name},
        }
        self.people: dict[str, Json] = {
            "editor": {"user": EDITOR, "groups": ["system:authenticated"]},
            "hub": self.account("hub"),
            "pool": self.account("nbgpu-pool"),
            "agent": self.account("nbgpu-agent"),
        }

    def account(self, name: str) -> Json:
        """Return a service account of the namespace, as whom to speak."""
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{self.name}", "system:authenticated"]
        return {"user": f"system:serviceaccount:{self.name}:{name}", "groups": groups}

    def chart(self, action: str, **changes: Any) -> None:
        """Install or upgrade the chart."""
        helm(action, "nbgpu", str(CHART), "--namespace", self.name, *options({**self.values, **changes}))

    def claims(self, name: str = "") -> str:
        """Return the path of claims, or of one."""
        return f"/apis/resource.k8s.io/v1/namespaces/{self.name}/resourceclaims{'/' if name else ''}{name}"

    def make(self, who: str | Json, kind: str, thing: Json, *, really: bool = False) -> tuple[int, str]:
        """Create something as somebody; return status and message."""
        paths = {
            "claim": self.claims(),
            "template": self.claims().replace("resourceclaims", "resourceclaimtemplates"),
            "pod": f"/api/v1/namespaces/{self.name}/pods",
        }
        person = self.people[who] if isinstance(who, str) else who
        status, answer = self.api.call("POST", paths[kind] + ("" if really else "?dryRun=All"), thing, **person)
        return status, answer.get("message", "")

    def patch(self, who: str | Json, path: str, change: Json) -> tuple[int, str]:
        """Change something as somebody."""
        person = self.people[who] if isinstance(who, str) else who
        status, answer = self.api.call("PATCH", path, change, content="application/merge-patch+json", **person)
        return status, answer.get("message", "")

    def owner(self) -> Json:
        """Return something that exists, as a claim's owner: without it the claim would be collected."""
        found = self.api.done("GET", f"/api/v1/namespaces/{self.name}/configmaps/kube-root-ca.crt")["metadata"]
        return {"apiVersion": "v1", "kind": "ConfigMap", "name": found["name"], "uid": found["uid"]}

    def rules_hold(self, hold: bool) -> None:
        """Wait until the API server's rules are those just installed: it takes note of a change within seconds."""
        until(f"the rules to be {'on' if hold else 'off'}", lambda: (self.make("editor", "claim", marked(claim()))[0] != 201) == hold)


def claim(mode: str = "", **parameters: Any) -> Json:
    """Return a claim for a part of a GPU, as a user would write it."""
    spec: Json = {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "gpu.nbgpu.io"}}]}}
    if mode or parameters:
        told = {"apiVersion": "gpu.nbgpu.io/v1", "kind": "Slice", **({"mode": mode} if mode else {}), **parameters}
        spec["devices"]["config"] = [{"opaque": {"driver": "gpu.nbgpu.io", "parameters": told}}]
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": f"c-{uuid.uuid4().hex[:8]}"}, "spec": spec}


def by_list() -> Json:
    """Return a claim that names the class among several."""
    found = claim()
    found["spec"]["devices"]["requests"] = [{"name": "gpu", "firstAvailable": [{"name": "a", "deviceClassName": "gpu.nbgpu.io"}]}]
    return found


def with_share(found: Json, compute: str | int) -> Json:
    """Return the claim, for so much of a GPU's time."""
    [request] = found["spec"]["devices"]["requests"]
    for asked in [request["exactly"]] if "exactly" in request else request["firstAvailable"]:
        asked["capacity"] = {"requests": {"compute": compute}}
    return found


def other_class(found: Json) -> Json:
    """Return the claim, for the class of somebody else's devices."""
    found["spec"]["devices"]["requests"][0]["exactly"]["deviceClassName"] = "gpu.example.com"
    return found


def marked(found: Json, where: str = "labels", key: str = "nbgpu.io/slice", value: str = REQUEST) -> Json:
    """Return the object with one of nbgpu's words."""
    return {**found, "metadata": {**found["metadata"], where: {key: value}}}


def named(name: str, found: Json) -> Json:
    """Return the object under that name."""
    return {**found, "metadata": {**found["metadata"], "name": name}}


def ends_the_scheduler(found: Json) -> Json:
    """Return the claim as one for extended resources whose owner does not say whether it is its controller."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": REQUEST}
    more = {"annotations": {"resource.kubernetes.io/extended-resource-claim": "true"}, "ownerReferences": [owner]}
    return {**found, "metadata": {**found["metadata"], **more}}


def of_the_pool() -> Json:
    """Return a claim as the pool writes it."""
    found = marked(claim("burst", slice={"slice_id": REQUEST}, seal="0" * 64))
    found["metadata"]["name"] = f"nbgpu-{REQUEST}"
    found["metadata"]["annotations"] = {"nbgpu.io/owner": json.dumps({"hub": "h", "user": "u", "server": ""})}
    return found


def template(inner: Json | None = None, of: Json | None = None) -> Json:
    """Return a template of claims."""
    spec = {"metadata": inner or {}, "spec": (of or claim())["spec"]}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": f"t-{uuid.uuid4().hex[:8]}"},
        "spec": spec,
    }


def pod(**metadata: Any) -> Json:
    """Return a pod as strict as Pod Security knows it."""
    container = {
        "name": "main",
        "image": "localhost/busybox:1",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": security, "nodeSelector": NOWHERE}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p-{uuid.uuid4().hex[:8]}", **metadata}, "spec": spec}


def extended(place: str = "containers") -> Json:
    """Return a pod that asks for a GPU as one asks for CPU."""
    found = pod()
    resources = {"limits": {"deviceclass.resource.kubernetes.io/gpu.nbgpu.io": "1"}}
    found["spec"][place] = [{**found["spec"]["containers"][0], "name": "other", "resources": resources}]
    return found


def using(name: str) -> Json:
    """Return a pod that uses a claim."""
    found = pod()
    found["spec"]["resourceClaims"] = [{"name": "nbgpu", "resourceClaimName": name}]
    return found


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    api = Api()
    with namespace(api, f"chart-{uuid.uuid4().hex[:6]}", {"pod-security.kubernetes.io/enforce": "privileged"}) as name:
        found = Place(api, name)
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{name}/rolebindings"
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"}
        who = [{"kind": "User", "name": EDITOR, "apiGroup": "rbac.authorization.k8s.io"}, {"kind": "ServiceAccount", "name": "hub"}]
        api.done("POST", rbac, {"metadata": {"name": "editors"}, "roleRef": role, "subjects": who})
        try:
            found.chart("install")
            yield found
        finally:
            helm("uninstall", "nbgpu", "--namespace", name, check=False)


class TestOnlyThePool:
    """No claims of one's own: the default."""

    @pytest.fixture(scope="class")
    @classmethod
    def strict(cls, place: Place) -> Place:
        place.chart("upgrade")
        place.rules_hold(True)
        return place

    REFUSED = (
        ("claim", claim()), ("claim", by_list()), ("claim", other_class(claim("strict"))), ("claim", of_the_pool()),
        ("claim", marked(other_class(claim()))), ("claim", marked(other_class(claim()), "annotations", "nbgpu.io/owner")),
        ("template", template()), ("template", template({"labels": {"nbgpu.io/slice": REQUEST}}, other_class(claim()))),
        ("pod", pod(labels={"nbgpu.io/slice": REQUEST})), ("pod", pod(annotations={"nbgpu.io/request-id": REQUEST})),
        ("pod", using(f"nbgpu-{REQUEST}")), ("pod", marked(pod(), value="")), ("claim", marked(other_class(claim()), value="")),
        ("claim", named(f"nbgpu-{REQUEST}", other_class(claim()))), ("claim", named(f"nbgpu-{REQUEST}-move", other_class(claim()))),
        ("claim", ends_the_scheduler(other_class(claim()))), ("pod", extended()), ("pod", extended("initContainers")),
        ("pod", pod(annotations={"cdi.k8s.io/mine": f"gpu.nbgpu.io/slice={REQUEST}-0"})),
    )  # fmt: skip

    @pytest.mark.parametrize(("kind", "thing"), REFUSED)
    def test_an_editor_is_refused(self, strict: Place, kind: str, thing: Json) -> None:
        status, message = strict.make("editor", kind, thing)
        assert status == 403, message
        assert "nbgpu" in message

    def test_an_administrators_look_at_the_cluster_asks_for_nothing_that_is_refused(self, strict: Place) -> None:
        async def asked() -> str | None:
            kube = Kube()
            try:
                return await cluster_problem(kube, strict.name)
            finally:
                await kube.close()

        assert strict.make({}, "claim", claim())[0] == 403
        assert asyncio.run(asked()) is None

    @pytest.mark.parametrize(
        ("kind", "thing"), [("claim", other_class(claim())), ("template", template(of=other_class(claim()))), ("pod", pod())]
    )
    def test_what_is_not_nbgpus_is_left_alone(self, strict: Place, kind: str, thing: Json) -> None:
        assert strict.make("editor", kind, thing) == (201, "")

    def test_the_pool_makes_claims_and_nobody_else_not_even_a_controller(self, strict: Place) -> None:
        assert strict.make("pool", "claim", of_the_pool())[0] == 201
        for who in ("hub", "agent", CONTROLLER):
            assert strict.make(who, "claim", claim())[0] == 403

    def test_the_hub_makes_pods_that_carry_slices(self, strict: Place) -> None:
        carrying = using(f"nbgpu-{REQUEST}")
        assert strict.make("hub", "pod", marked(carrying)) == (201, "")
        assert strict.make("editor", "pod", marked(carrying))[0] == 403

    def test_an_older_version_of_a_claim_is_looked_at_as_this_one(self, strict: Place) -> None:
        served = [one["version"] for one in strict.api.done("GET", "/apis/resource.k8s.io")["versions"]]
        kinds = {one: strict.api.done("GET", f"/apis/resource.k8s.io/{one}")["resources"] for one in served if one != "v1"}
        older = [version for version, found in kinds.items() if any(one["name"] == "resourceclaims" for one in found)]
        policies = strict.api.done("GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies")["items"]
        looked_at = [one["spec"]["matchConstraints"] for one in policies if GROUP in json.dumps(one["spec"]["matchConstraints"])]
        assert looked_at
        for one in looked_at:  # with that policy an object of an older version is converted and looked at
            assert one["matchPolicy"] == "Equivalent"
            assert all(rule["apiVersions"] == ["v1"] for rule in one["resourceRules"] if GROUP in rule["apiGroups"])
        flat = {"name": "gpu", "deviceClassName": "gpu.nbgpu.io"}
        for version in older:
            asked = flat if version == "v1beta1" else claim()["spec"]["devices"]["requests"][0]
            made = {**claim(), "apiVersion": f"resource.k8s.io/{version}", "spec": {"devices": {"requests": [asked]}}}
            path = strict.claims().replace("/v1/", f"/{version}/") + "?dryRun=All"
            assert strict.api.call("POST", path, made, **strict.people["editor"])[0] == 403, version

    def test_a_controller_makes_no_pod_that_carries_a_slice(self, strict: Place) -> None:
        replicas = {"user": "system:serviceaccount:kube-system:replicaset-controller", "groups": ["system:serviceaccounts:kube-system"]}
        assert strict.make(replicas, "pod", pod(labels={"nbgpu.io/slice": REQUEST}))[0] == 403
        assert strict.make(replicas, "pod", pod())[0] == 201

    def test_a_pools_claim_stays_as_it_is(self, strict: Place) -> None:
        made = {**of_the_pool()}
        made["metadata"] = {**made["metadata"], "finalizers": ["example.com/held"]}
        assert strict.make("pool", "claim", made, really=True)[0] == 201
        path = strict.claims(f"nbgpu-{REQUEST}")
        try:
            for change in (
                {"labels": {"nbgpu.io/slice": "f" * 32}}, {"labels": {"nbgpu.io/slice": None}}, {"labels": {"nbgpu.io/more": "1"}},
                {"annotations": {"nbgpu.io/limits": ""}},
                {"annotations": {"nbgpu.io/owner": "{}"}}, {"finalizers": []},
                {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": str(uuid.uuid4())}]},
            ):  # fmt: skip
                status, message = strict.patch("editor", path, {"metadata": change})
                assert status == 403, (change, message)
                assert "leave them as they are" in message
            assert strict.patch("editor", path, {"metadata": {"labels": {"mine": "1"}}})[0] == 200
            assert strict.patch("pool", path, {"metadata": {"ownerReferences": [strict.owner()]}})[0] == 200
            assert strict.patch(CONTROLLER, path, {"metadata": {"finalizers": ["example.com/held", "example.com/more"]}})[0] == 200
            assert strict.patch(CONTROLLER, path, {"metadata": {"labels": {"nbgpu.io/slice": None}}})[0] == 403
        finally:
            status, message = strict.patch({}, path, {"metadata": {"finalizers": [], "ownerReferences": []}})
            assert status == 200, f"an admin repairs: {message}"
            strict.api.done("DELETE", path)

    def test_a_claim_can_be_patched_whatever_its_owner_is_called(self, strict: Place) -> None:
        made = of_the_pool()
        made["metadata"]["name"] = f"nbgpu-{uuid.uuid4().hex}"
        made["spec"]["devices"]["config"][0]["opaque"]["parameters"]["slice"]["owner"] = "Ada <&> Grace \u00e4\u2028"
        assert strict.make("pool", "claim", made, really=True)[0] == 201
        path = strict.claims(made["metadata"]["name"])
        assert strict.patch("pool", path, {"metadata": {"labels": {"mine": "1"}}}) == (200, "")
        strict.api.done("DELETE", path)

    def test_a_pods_words_stay_as_they_are(self, strict: Place) -> None:
        made = marked(pod())
        assert strict.make("hub", "pod", made, really=True)[0] == 201
        path = f"/api/v1/namespaces/{strict.name}/pods/{made['metadata']['name']}"
        for change in ({"nbgpu.io/slice": None}, {"nbgpu.io/slice": "f" * 32}, {"nbgpu.io/hub": "h"}):
            assert strict.patch("editor", path, {"metadata": {"labels": change}})[0] == 403
        assert strict.patch("editor", path, {"metadata": {"labels": {"mine": "1"}}})[0] == 200
        strict.api.done("DELETE", path + "?gracePeriodSeconds=0")

    def test_no_rule_failed_to_compile(self, strict: Place) -> None:
        found = strict.api.done("GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies")["items"]
        mine = [one for one in found if one["metadata"]["name"].startswith("nbgpu-")]
        assert len(mine) == 3
        for one in mine:
            assert not one.get("status", {}).get("typeChecking", {}).get("expressionWarnings"), one["status"]


class TestForeignClaims:
    """Claims of one's own allowed: without nbgpu's words, and with no parameter but the mode."""

    @pytest.fixture(scope="class")
    @classmethod
    def open(cls, place: Place) -> Place:
        place.chart("upgrade", **{"agent.foreignClaims": True})
        until("claims of one's own to be allowed", lambda: place.make("editor", "claim", claim())[0] == 201)
        place.rules_hold(True)
        return place

    @pytest.mark.parametrize(
        ("kind", "thing"),
        [
            ("claim", claim()), ("claim", by_list()), ("claim", claim("strict")), ("template", template()), ("pod", using("mine")),
            ("claim", with_share(claim(), "250")), ("claim", with_share(claim(), "1k")), ("claim", with_share(by_list(), "2")),
            ("claim", with_share(other_class(claim()), "0.25")), ("pod", extended()),
        ],
    )  # fmt: skip
    def test_allowed(self, open: Place, kind: str, thing: Json) -> None:
        assert open.make("editor", kind, thing) == (201, "")

    @pytest.mark.parametrize(
        ("kind", "thing"),
        [
            ("claim", marked(claim())), ("claim", marked(claim(), "annotations", "nbgpu.io/owner")), ("claim", of_the_pool()),
            ("claim", claim("strict", seal="00")), ("claim", claim(slice={"compute_milli": 1000})),
            ("template", template({"annotations": {"nbgpu.io/owner": "{}"}})), ("template", template(of=claim(slice={}))),
            ("pod", using(f"nbgpu-{REQUEST}")), ("pod", pod(labels={"nbgpu.io/slice": REQUEST})),
        ],
    )  # fmt: skip
    def test_refused(self, open: Place, kind: str, thing: Json) -> None:
        status, message = open.make("editor", kind, thing)
        assert status == 403, message
        assert "nbgpu" in message

    @pytest.mark.parametrize("compute", ["0.25", "250m", "1", "250.5", 1])
    def test_a_fraction_is_not_taken_for_a_thousandth(self, open: Place, compute: str | int) -> None:
        asked = with_share(claim(), compute)
        for kind, thing in (("claim", asked), ("claim", with_share(by_list(), compute)), ("template", template(of=asked))):
            status, message = open.make("editor", kind, thing)
            assert status == 403, message
            assert '"250" is a quarter (0.25, 25 %)' in message

    def test_the_example_that_is_shipped(self, open: Place) -> None:
        for thing in yaml.safe_load_all((ROOT / "deploy" / "examples" / "pod-with-a-claim.yaml").read_text()):
            if thing["kind"] == "Job":
                path = f"/apis/batch/v1/namespaces/{open.name}/jobs?dryRun=All"
                assert open.api.call("POST", path, thing, **open.people["editor"])[0] == 201
            else:
                assert open.make("editor", "template", thing) == (201, "")

    def test_admin_access_is_not_to_be_had(self, open: Place) -> None:
        found = copy.deepcopy(claim())
        found["spec"]["devices"]["requests"][0]["exactly"]["adminAccess"] = True
        assert open.make("editor", "claim", found)[0] in (403, 422)  # Kubernetes itself refuses outside namespaces labelled for it

    def test_kubernetes_makes_claims_from_templates(self, open: Place) -> None:
        wanted = template()
        assert open.make("editor", "template", wanted, really=True)[0] == 201
        wanting = pod()
        wanting["spec"]["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": wanted["metadata"]["name"]}]
        wanting["spec"]["containers"][0]["resources"] = {"claims": [{"name": "gpu"}]}
        assert open.make("editor", "pod", wanting, really=True)[0] == 201

        def made() -> list[Json]:
            items = open.api.done("GET", open.claims())["items"]
            return [one for one in items if one["metadata"]["name"].startswith(wanting["metadata"]["name"])]

        until("the controller to make the pod's claim", made)
        open.api.done("DELETE", f"/api/v1/namespaces/{open.name}/pods/{wanting['metadata']['name']}?gracePeriodSeconds=0")
        until("the claim to go with its pod", lambda: not made())


class TestSwitchedOff:
    """The control: without the rules all of it passes, so it is they that refuse."""

    @pytest.fixture(scope="class")
    @classmethod
    def bare(cls, place: Place) -> Iterator[Place]:
        place.chart("upgrade", **{"admission.enabled": False})
        place.rules_hold(False)
        yield place
        place.chart("upgrade")

    @pytest.mark.parametrize(("kind", "thing"), TestOnlyThePool.REFUSED)
    def test_an_editor_does_what_the_rules_refuse(self, bare: Place, kind: str, thing: Json) -> None:
        assert bare.make("editor", kind, thing) == (201, "")


def device_slice(node: str, driver: str = "gpu.nbgpu.io") -> Json:
    """Return a ResourceSlice of a node."""
    spec = {"driver": driver, "nodeName": node, "pool": {"name": node, "generation": 1, "resourceSliceCount": 1}, "devices": []}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": f"{node}-{driver}"}, "spec": spec}


@pytest.mark.parametrize(
    ("token_of", "node", "driver", "status"),
    [
        ("n1", "n1", "gpu.nbgpu.io", 201),
        ("n1", "n2", "gpu.nbgpu.io", 403),
        ("", "n1", "gpu.nbgpu.io", 403),
        ("n1", "n1", "gpu.other.io", 403),
    ],
)
def test_an_agent_publishes_its_own_node_only(place: Place, token_of: str, node: str, driver: str, status: int) -> None:
    person = {**place.people["agent"], "extra": {"authentication.kubernetes.io/node-name": token_of} if token_of else {}}
    path = "/apis/resource.k8s.io/v1/resourceslices?dryRun=All"

    def refused_elsewhere() -> bool:
        return place.api.call("POST", path, device_slice("elsewhere"), **person)[0] == 403

    if not refused_elsewhere():  # the control before has switched the rules off
        place.chart("upgrade")
    until("the rule", refused_elsewhere)
    assert place.api.call("POST", path, device_slice(node, driver), **person)[0] == status


@pytest.fixture(scope="module")
def allocated(place: Place) -> str:
    """The path of the status of a claim that has its part of a GPU of node n1."""
    made = place.api.done("POST", place.claims(), of_the_pool(), **place.people["pool"])["metadata"]
    path = f"{place.claims(made['name'])}/status"
    node = {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]}
    part = {
        "request": "gpu",
        "driver": "gpu.nbgpu.io",
        "pool": "n1",
        "device": "gpu-1",
        "shareID": SHARE,
        "consumedCapacity": {"compute": "1"},
    }
    status = {"allocation": {"devices": {"results": [part]}, "nodeSelector": node}}
    place.api.done("PATCH", path, {"status": status}, content="application/merge-patch+json")
    return path


SHARE = "b7c8d8f0-5b1e-4a0c-9c58-3f3f1b5b8f10"
IN_FORCE = {"driver": "gpu.nbgpu.io", "pool": "n1", "device": "gpu-1", "shareID": SHARE, "data": {"compute_milli": 1}}


@pytest.mark.parametrize(
    ("who", "token_of", "status", "answer"),
    [
        ("agent", "n1", {"devices": [IN_FORCE]}, 200),
        ("agent", "n2", {"devices": [IN_FORCE]}, 422),
        ("agent", "", {"devices": [IN_FORCE]}, 422),
        ("agent", "n1", {"reservedFor": [{"resource": "pods", "name": "p", "uid": "u"}]}, 422),
        ("agent", "n1", {"allocation": None}, 422),
        ("editor", "n1", {"devices": [IN_FORCE]}, 403),
        ("hub", "n1", {"devices": [IN_FORCE]}, 403),
    ],
)
def test_an_agent_says_what_is_in_force_on_its_own_node_and_no_more(
    place: Place, allocated: str, who: str, token_of: str, status: Json, answer: int
) -> None:
    person = {**place.people[who], "extra": {"authentication.kubernetes.io/node-name": token_of} if token_of else {}}
    change = {"status": status}
    told, said = place.api.call("PATCH", f"{allocated}?dryRun=All", change, content="application/merge-patch+json", **person)
    assert told == answer, said
    # control: it is the rights that decide, not the change
    assert place.api.call("PATCH", f"{allocated}?dryRun=All", change, content="application/merge-patch+json")[0] == 200


def allowed(place: Place, who: str, verb: str, group: str, resource: str, where: str, sub: str = "") -> bool:
    """Ask the API server whether somebody may do something."""
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": sub, "namespace": where}
    person = place.people[who]
    spec = {"user": person["user"], "groups": person["groups"], "resourceAttributes": asked}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    return place.api.done("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)["status"]["allowed"]


DRA = "resource.k8s.io"


@pytest.mark.parametrize(
    ("who", "verb", "group", "resource", "where", "may"),
    [
        ("pool", "watch", DRA, "resourceclaims", "default", True), ("pool", "list", "", "pods", "default", True),
        ("pool", "create", DRA, "resourceclaims", "HERE", True), ("pool", "create", DRA, "resourceclaims", "default", False),
        ("pool", "update", DRA, "resourceclaims", "HERE", False), ("pool", "create", "", "pods", "HERE", False),
        ("pool", "delete", "", "pods", "HERE", False), ("pool", "get", "", "secrets", "HERE", False),
        ("pool", "create", DRA, "resourceslices", "", False), ("pool", "create", "coordination.k8s.io", "leases", "HERE", True),
        ("pool", "create", "coordination.k8s.io", "leases", "default", False),
        ("agent", "list", DRA, "resourceclaims", "default", True), ("agent", "delete", DRA, "resourceclaims", "HERE", False),
        ("agent", "create", DRA, "resourceslices", "", True), ("agent", "list", "", "pods", "HERE", False),
        ("agent", "get", "", "secrets", "HERE", False), ("agent", "get", "", "nodes", "", True), ("agent", "patch", "", "nodes", "", False),
    ],
)  # fmt: skip
def test_what_each_part_may_do(place: Place, who: str, verb: str, group: str, resource: str, where: str, may: bool) -> None:
    assert allowed(place, who, verb, group, resource, place.name if where == "HERE" else where) is may


def test_secrets_live_through_upgrades_and_uninstalling_leaves_the_seal_alone(place: Place) -> None:
    def secrets() -> dict[str, Json]:
        items = place.api.done("GET", f"/api/v1/namespaces/{place.name}/secrets?labelSelector=app.kubernetes.io/name=nbgpu")["items"]
        return {one["metadata"]["name"]: one["data"] for one in items}

    before = secrets()
    assert set(before) == {"nbgpu-seal", "nbgpu-read-token", "nbgpu-hub-jupyterhub"}
    place.chart("upgrade", **{"pool.logLevel": "debug"})
    assert secrets() == before
    helm("uninstall", "nbgpu", "--namespace", place.name, "--wait")
    left: list[str] = []
    for path in (
        "/apis/rbac.authorization.k8s.io/v1/clusterroles", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies", "/apis/resource.k8s.io/v1/deviceclasses",
        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings", f"/api/v1/namespaces/{place.name}/secrets",
        f"/apis/apps/v1/namespaces/{place.name}/daemonsets", f"/apis/apps/v1/namespaces/{place.name}/deployments",
        f"/api/v1/namespaces/{place.name}/services", f"/apis/networking.k8s.io/v1/namespaces/{place.name}/networkpolicies",
    ):  # fmt: skip
        left += [one["metadata"]["name"] for one in place.api.done("GET", path)["items"] if "nbgpu" in one["metadata"]["name"]]
    if not place.values["createDeviceClass"]:
        left.remove("gpu.nbgpu.io")  # it was there before, and stays
    assert left == ["nbgpu-seal"]
    place.chart("install")
    again = secrets()
    assert again["nbgpu-seal"] == before["nbgpu-seal"]  # servers that are still there stay the pool's own
    assert again["nbgpu-read-token"] != before["nbgpu-read-token"]
    helm("uninstall", "nbgpu", "--namespace", place.name, "--wait")


def test_a_users_pod_passes_pod_security_restricted() -> None:
    pytest.importorskip("kubespawner")
    from kubernetes_asyncio.client import ApiClient
    from kubespawner.objects import make_pod

    from nbgpu.models import Grant, GrantState, Owner, Request, Slice, SliceDevice
    from nbgpu_spawner.kube import with_slice

    owner_ = Owner(hub="h", user="ada", server="")
    part = SliceDevice(uuid="GPU-1", index=0, model="H100", memory_bytes=2**30, compute_milli=250)
    slice_ = Slice(slice_id=REQUEST, owner=owner_, node="n", mode="burst", devices=[part])
    grant = Grant(request=Request(request_id=REQUEST, owner=owner_, compute_milli=250), state=GrantState.bound, slice=slice_)
    plain = make_pod(
        name="jupyter-ada", image="localhost/busybox:1", image_pull_policy="Never", cmd=["sleep"], port=8888,
        pod_security_context={"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        container_security_context={"capabilities": {"drop": ["ALL"]}, "allowPrivilegeEscalation": False},
    )  # fmt: skip

    async def as_json() -> Json:
        async with ApiClient() as client:
            return client.sanitize_for_serialization(with_slice(plain, grant))

    made = asyncio.run(as_json())
    api = Api()
    with namespace(api, f"chart-{uuid.uuid4().hex[:6]}", {"pod-security.kubernetes.io/enforce": "restricted"}) as name:
        path = f"/api/v1/namespaces/{name}/pods?dryRun=All"
        status, answer = api.call("POST", path, made)
        assert status == 201, answer.get("message")
        # the control: the same pod with what an agent needs is refused there
        made["spec"]["hostPID"] = True
        status, answer = api.call("POST", path, made)
        assert status == 403, answer
        assert "restricted" in answer["message"]


def test_the_slices_files_are_out_of_reach_under_baseline() -> None:
    made = pod()
    made["spec"]["volumes"] = [{"name": "slices", "hostPath": {"path": "/run/nbgpu"}}]
    api = Api()
    with namespace(api, f"chart-{uuid.uuid4().hex[:6]}", {"pod-security.kubernetes.io/enforce": "baseline"}) as name:
        path = f"/api/v1/namespaces/{name}/pods?dryRun=All"
        status, answer = api.call("POST", path, made)
        assert status == 403, answer
        assert "hostPath" in answer["message"]
        # the control, which docs/security.md warns of: without the label nothing refuses it
        change = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": None}}}
        api.done("PATCH", f"/api/v1/namespaces/{name}", change, content="application/merge-patch+json")
        until("the label to count no more", lambda: api.call("POST", path, made)[0] == 201)
