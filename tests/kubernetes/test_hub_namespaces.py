"""A hub that gives each user a namespace (`enable_user_namespaces`): slices are claimed where the pods are, and given back there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hub_kit import RBAC, RESOURCE, Z2JH_RULES, HubPlace, KubeHub, gateway_of_hub, until
from pool_kit import Pool

from nbgpu.kube import NotFound, path

pytestmark = [pytest.mark.kubernetes]
USERS = ("ada", "grace")
EXTRA = """
c.KubeSpawner.enable_user_namespaces = True
c.KubeSpawner.user_namespace_template = told["namespace"] + "-{username}"
"""
CLUSTER_RULES = [*Z2JH_RULES, {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "list", "create"]}]
"""What such a hub needs (KubeSpawner's documentation): its own rights in every namespace, and to make them."""


@pytest.fixture(scope="module")
def place() -> Iterator[HubPlace]:
    place = HubPlace()
    place.start()
    name = f"hub-{place.run_id}"
    subject = {"kind": "ServiceAccount", "name": "hub", "namespace": place.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    place.do(place.kube.create(path(RBAC, "clusterroles"), {"metadata": {"name": name}, "rules": CLUSTER_RULES}))
    binding = {"metadata": {"name": name}, "subjects": [subject], "roleRef": role}
    place.do(place.kube.create(path(RBAC, "clusterrolebindings"), binding))
    yield place
    for api, plural, each in (
        *((RBAC, plural, name) for plural in ("clusterrolebindings", "clusterroles")),
        *(("v1", "namespaces", namespace_of(place, user)) for user in USERS),
    ):
        with contextlib.suppress(NotFound):
            place.do(place.kube.delete(path(api, plural, None, each)))
    until(lambda: not [user for user in USERS if place.get("v1", "namespaces", None, namespace_of(place, user))], 60)
    place.stop()


def namespace_of(place: HubPlace, user: str) -> str:
    return f"{place.namespace}-{user}"


def held(place: HubPlace) -> dict[str, list[str]]:
    """Return the names of the claims in each user's namespace."""
    return {user: [one["metadata"]["name"] for one in place.claims(namespace_of(place, user))] for user in USERS}


def test_slices_live_in_their_users_namespaces(place: HubPlace, tmp_path_factory: pytest.TempPathFactory) -> None:
    pool = Pool(place, tmp_path_factory.mktemp("pool"), reservation_ttl_seconds=6).start()
    hub = KubeHub(tmp_path_factory.mktemp("hub"), place, pool, gateway_of_hub(place), extra=EXTRA)
    try:
        place.wait_for_rules()
        hub.start()
        hub.add(*USERS)
        for user, profile in zip(USERS, ("quarter", "half"), strict=True):
            assert hub.spawn(user, {"profile": profile}).status_code in (201, 202)
        for user in USERS:
            hub.ready(user)
        requests = {user: hub.request_of(user) for user in USERS}
        assert held(place) == {user: [f"nbgpu-{requests[user]}"] for user in USERS}
        assert place.claims() == [], "none in the hub's own namespace"
        until(lambda: pool.books() == place.held(), why=lambda: f"{pool.books()} {place.held()}")
        for user in USERS:
            (pod,) = place.pods(namespace_of(place, user))
            assert pod["spec"]["resourceClaims"] == [{"name": "nbgpu", "resourceClaimName": f"nbgpu-{requests[user]}"}]

        hub.kill()
        pool.kill()
        pool.start()
        hub.start()
        assert {user: hub.request_of(user) for user in USERS} == requests
        assert {user: pool.state(request) for user, request in requests.items()} == dict.fromkeys(USERS, "bound")

        hub.stop("ada")
        until(lambda: held(place) == {"ada": [], "grace": [f"nbgpu-{requests['grace']}"]}, why=lambda: str(held(place)))
        pod = place.pods(namespace_of(place, "grace"))[0]["metadata"]["name"]
        place.do(place.kube.delete(path("v1", "pods", namespace_of(place, "grace"), pod)))  # by hand
        until(lambda: held(place) == {"ada": [], "grace": []}, 30, lambda: f"{held(place)}\n{pool.log()}\n{hub.story()}")
        until(lambda: not any(milli for _, milli in pool.books().values()), why=pool.log)

        assert hub.spawn("ada", {"profile": "whole"}).status_code in (201, 202)
        hub.ready("ada")
        place.do(place.kube.delete(path("v1", "namespaces", None, namespace_of(place, "ada"))))
        until(lambda: place.get("v1", "namespaces", None, namespace_of(place, "ada")) is None, 60, "the namespace to go")
        until(lambda: not any(milli for _, milli in pool.books().values()), why=pool.log)
        assert place.do(place.kube.list(path(RESOURCE, "resourceclaims", namespace_of(place, "ada")))).items == []
    finally:
        hub.end()
        print(pool.log()[-5000:], hub.story(), sep="\n")
        Pool.stop_all()
