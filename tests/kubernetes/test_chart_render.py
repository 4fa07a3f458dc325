"""The chart as helm renders it: sound for every kind of installation, and plain words for bad values."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest
import yaml
from chart_kit import CHART, KUBE_VERSION, helm, options, pick, render

from nbgpu_agent.main import parse, policy_of
from nbgpu_agent.policy import KINDS, Policy
from nbgpu_pool import config as pool_config
from nbgpu_pool.config import (
    ComingConfig,
    Config,
    DefaultQuota,
    GiveBackConfig,
    GroupQuota,
    QueueConfig,
    QuotaConfig,
    ReservationConfig,
    UserQuota,
)

pytestmark = pytest.mark.kubernetes

INSTALLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "simulated": {"agent.simulate.enabled": True, "pool.replicas": 1},
    "own secrets": {
        "seal.existingSecret": "my-seal",
        "pool.readTokenSecret": "my-read",
        "hubs": [{"name": "h", "existingSecret": "my-hub"}],
    },
    "foreign claims": {"agent.foreignClaims": True},
    "GPU Operator": {"agent.driver.source": "runtimeClass", "agent.driver.runtimeClass": "nvidia"},
    "driver of the host": {"agent.driver.source": "cdi", "agent.nodeSelector": {"gpu": "yes"}},
    "two hubs": {
        "hubs": [
            {"name": "one", "namespace": "hub-one"},
            {"name": "two", "namespace": "hub-two", "serverNamespaces": ["*"], "serviceAccount": "h", "podSelector": {"a": "b"}},
        ]
    },
    "watched": {
        "pool.serviceMonitor": {"enabled": True, "namespaceSelector": {"name": "monitoring"}},
        "agent.metrics": {"enabled": True, "podMonitor": True, "namespaceSelector": {"name": "monitoring"}},
    },
}


@pytest.mark.parametrize("values", INSTALLATIONS.values(), ids=INSTALLATIONS)
def test_lint_and_render(values: dict[str, Any]) -> None:
    helm("lint", "--strict", str(CHART), "--kube-version", KUBE_VERSION, *options(values))
    objects = render(values)
    names = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"agent.forignClaims": True}, "forignClaims"),
        ({"agent.driver.source": "magic"}, "runtimeClass"),
        ({"agent.devices": "0; rm -rf /"}, "devices"),
        ({"agent.devices": "0-1"}, "devices"),
        ({"agent.reserve": "lots"}, "reserve"),
        ({"agent.simulate.devices": 0}, "devices"),
        ({"agent.simulate.devices": 17}, "devices"),
        ({"pool.config": {"quotas": {"default": {"limit": "lots"}}}}, "limit"),
        ({"pool.config": {"quotas": {"default": {"limit": "1/0"}}}}, "limit"),
        ({"pool.config": {"quotas": {"users": {"ada": {"memory": "much"}}}}}, "memory"),
        ({"pool.replicas": 0}, "replicas"),
        ({"pool.config": {"tokens": []}}, "tokens"),
        ({"pool.config.quotas.default.limt": 3}, "limt"),
        ({"pool.config.quotas.default.limit": True}, "/pool/config/quotas/default/limit"),
        ({"pool.config.quotas.groups": {"students": {"per_usr": 1}}}, "per_usr"),
        ({"pool.config.queue.total": -1}, "/pool/config/queue/total"),
        ({"pool.config.coming": [{"name": "a100", "model": "A100", "devices": 8, "memory": "80 GiB"}]}, "nodes"),
        ({"hubs": []}, "hubs"),
        ({"hubs": [{"namespace": "jhub"}]}, "'name'"),
        ({"hubs": [{"name": "My Hub"}]}, "/hubs/0/name"),
        ({"hubs": [{"name": "h"}, {"name": "h", "namespace": "other"}]}, "two are named h"),
        ({"hubs": [{"name": "h", "podSelector": {"app": 1}}]}, "podSelector/app"),
        ({"agent.metrics": {"podMonitor": True}}, "metrics"),
        ({"agent.maxSurge": "0%"}, "maxSurge"),
        ({"agent.watchdog.unlimited": "stop"}, "unlimited"),
        ({"agent.watchdog.foreign": "kill"}, "foreign"),
        ({"agent.memoryBackend": "gpu"}, "memoryBackend"),
        ({"admission.exemptGroups": ["a' || true || 'b"]}, "exemptGroups"),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    done = helm("template", "nbgpu", str(CHART), "--kube-version", KUBE_VERSION, *options(values), check=False)
    assert done.returncode != 0
    assert said in done.stderr


NOT_HERE = {"tokens", "idle"}
"""The chart makes the tokens; idle slices are parked on one machine only."""


def test_all_of_the_pools_configuration_can_be_given_and_nothing_else() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    config, named = schema["properties"]["pool"]["properties"]["config"]["properties"], schema["definitions"]
    assert set(config) == set(Config.model_fields) - NOT_HERE
    quotas = config["quotas"]["properties"]
    groups, users = (quotas[name]["additionalProperties"]["$ref"].rpartition("/")[2] for name in ("groups", "users"))
    for told, model in (
        (config["quotas"], QuotaConfig), (quotas["default"], DefaultQuota), (named[users], UserQuota), (named[groups], GroupQuota),
        (config["queue"], QueueConfig), (config["coming"]["items"], ComingConfig), (config["give_back"], GiveBackConfig),
        (config["reservations"]["items"], ReservationConfig),
    ):  # fmt: skip
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        assert set(told["properties"]) == set(fields)
        assert told["additionalProperties"] is False
        assert set(told.get("required", [])) == {name for name, field in fields.items() if field.is_required()}


def test_a_whole_configuration_of_the_pool_passes() -> None:
    """That of the configuration's own page, word for word, but for what is not the chart's user's to say."""
    example = yaml.safe_load(textwrap.dedent((pool_config.__doc__ or "").partition("::\n")[2]))
    for name in NOT_HERE:
        del example[name]
    told = pick(render({"pool.config": example}), "ConfigMap", "nbgpu-pool")["data"]["pool.yaml"]
    assert Config.model_validate(yaml.safe_load(told)).quotas == Config.model_validate(example).quotas


def test_an_older_cluster_is_refused_in_one_line() -> None:
    done = helm("template", "nbgpu", str(CHART), "--kube-version", "1.35.4", check=False)
    assert done.returncode != 0
    assert "requires kubeVersion: >=1.36.0-0 which is incompatible with Kubernetes v1.35.4" in done.stderr


def verbs(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, list[str]]:
    """Return who may do what to which resource, by one role."""
    return {resource: rule["verbs"] for rule in pick(objects, kind, name)["rules"] for resource in rule["resources"]}


def test_each_part_may_do_what_it_does_and_no_more() -> None:
    objects = render()
    assert verbs(objects, "ClusterRole", "nbgpu-pool") == {
        "resourceslices": ["get", "list", "watch"],
        "resourceclaims": ["get", "list", "watch"],
        "pods": ["get", "list", "watch"],
        "nodes": ["get", "list", "watch"],
        "events": ["create"],
    }
    assert verbs(objects, "ClusterRole", "nbgpu-pool-claims") == {"resourceclaims": ["create", "patch", "delete"]}
    assert verbs(objects, "ClusterRole", "nbgpu-agent") == {
        "resourceclaims": ["get", "list", "watch"],
        "resourceclaims/status": ["patch"],
        "resourceclaims/driver": ["associated-node:patch"],
        "resourceslices": ["get", "list", "watch", "create", "update"],
        "nodes": ["get"],
        "events": ["create"],
    }
    in_its_own = pick(objects, "Role", "nbgpu-pool-lease")["rules"]
    assert [(rule["resources"], rule.get("resourceNames"), rule["verbs"]) for rule in in_its_own] == [
        (["leases"], None, ["create"]),
        (["leases"], ["nbgpu-pool"], ["get", "update"]),
        (["endpointslices"], None, ["create"]),
        (["endpointslices"], ["nbgpu-pool"], ["get", "patch"]),
        (["services"], ["nbgpu-pool"], ["get"]),
    ]
    bound = [one for one in objects if one.get("roleRef", {}).get("name") == "nbgpu-pool-claims"]
    assert [(one["kind"], one["metadata"]["namespace"]) for one in bound] == [("RoleBinding", "gpu")]
    assert not [one for one in objects if "*" in str(one.get("rules"))]


def test_the_pool_needs_nothing_of_the_node_and_the_agent_names_what_it_needs() -> None:
    objects = render({"agent.simulate.enabled": True})
    pool = pick(objects, "Deployment", "nbgpu-pool")["spec"]["template"]["spec"]
    assert pool["securityContext"]["runAsNonRoot"]
    assert pool["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not [volume for volume in pool["volumes"] if "hostPath" in volume]
    agent = pick(objects, "DaemonSet", "nbgpu-agent")["spec"]["template"]["spec"]
    assert sorted(volume["hostPath"]["path"] for volume in agent["volumes"] if "hostPath" in volume) == [
        "/etc/cdi", "/run/nbgpu", "/var/lib/kubelet/plugins", "/var/lib/kubelet/plugins_registry", "/var/run/cdi",
    ]  # fmt: skip
    [shared] = [mount for mount in agent["containers"][0]["volumeMounts"] if "mountPropagation" in mount]
    assert (shared["mountPath"], shared["mountPropagation"]) == ("/run/nbgpu", "Bidirectional")
    assert "hostNetwork" not in agent
    [cdi] = [mount for mount in agent["containers"][0]["volumeMounts"] if mount["mountPath"] == "/etc/cdi"]
    assert cdi["readOnly"]


def test_what_a_part_said_before_it_ended_is_kept_for_doctor() -> None:
    objects = render()
    for kind, part in (("Deployment", "pool"), ("DaemonSet", "agent")):
        [container] = pick(objects, kind, f"nbgpu-{part}")["spec"]["template"]["spec"]["containers"]
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_where_the_agent_gets_the_driver_from() -> None:
    def agent(**values: Any) -> dict[str, Any]:
        return pick(render(values), "DaemonSet", "nbgpu-agent")["spec"]["template"]

    operator = agent()
    assert operator["spec"]["runtimeClassName"] == "nvidia"
    assert operator["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "--no-simulate" in operator["spec"]["containers"][0]["args"]
    assert "--foreign-claims" not in operator["spec"]["containers"][0]["args"]
    own = agent(**{"agent.driver.source": "cdi"})
    assert "runtimeClassName" not in own["spec"]
    assert own["spec"]["hostPID"], "it finds the node's libraries by that"
    simulated = agent(**{"agent.simulate.enabled": True})
    assert not {"runtimeClassName", "nodeSelector"} & set(simulated["spec"])
    assert "--simulate" in simulated["spec"]["containers"][0]["args"]


def test_who_holds_memory() -> None:
    for values, wanted in (({}, "auto"), ({"agent.memoryBackend": "driver"}, "driver")):
        [container] = pick(render(values), "DaemonSet", "nbgpu-agent")["spec"]["template"]["spec"]["containers"]
        assert [one for one in container["args"] if "backend" in one] == [f"--memory-backend={wanted}"]


def test_what_the_watchdog_does() -> None:
    def policy(**values: Any) -> Policy:
        template = pick(render(values), "DaemonSet", "nbgpu-agent")["spec"]["template"]
        arguments = [one for one in template["spec"]["containers"][0]["args"] if "watchdog" in one]
        return policy_of(parse(arguments), simulate=True)

    plain = policy()
    assert not plain.acts
    assert (plain.grace_seconds, plain.resume, plain.escalate, plain.owner_resumes) == (None, True, False, False)
    asked = {"unlimited": "kill", "overLimit": "suspend", "graceSeconds": 60, "resume": False, "escalate": True, "ownerResumes": True}
    strict = policy(**{f"agent.watchdog.{name}": value for name, value in asked.items()})
    assert [strict.action(kind) for kind in KINDS] == ["kill", "event", "suspend", "event"]
    assert (strict.grace_seconds, strict.resume, strict.escalate, strict.owner_resumes) == (60.0, False, True, True)


def test_only_hub_pods_reach_the_pool() -> None:
    policy = pick(render(INSTALLATIONS["two hubs"]), "NetworkPolicy", "nbgpu-pool")
    [rule] = policy["spec"]["ingress"]
    from_hubs = [(one["namespaceSelector"]["matchLabels"], one["podSelector"]["matchLabels"]) for one in rule["from"][1:]]
    assert from_hubs == [
        ({"kubernetes.io/metadata.name": "hub-one"}, {"app": "jupyterhub", "component": "hub"}),
        ({"kubernetes.io/metadata.name": "hub-two"}, {"a": "b"}),
    ]
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_metrics_of_agents_are_off_and_then_for_the_monitoring_alone() -> None:
    def agent(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        objects = render(values)
        container = pick(objects, "DaemonSet", "nbgpu-agent")["spec"]["template"]["spec"]["containers"][0]
        return container, pick(objects, "NetworkPolicy", "nbgpu-agent")["spec"]

    container, policy = agent({})
    assert "--health-only" in container["args"]
    assert policy == {"podSelector": policy["podSelector"], "policyTypes": ["Ingress"]}
    container, policy = agent(INSTALLATIONS["watched"])
    assert "--health-only" not in container["args"]
    [rule] = policy["ingress"]
    assert rule == {
        "ports": [{"port": 8201, "protocol": "TCP"}],
        "from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    }
    monitor = pick(render(INSTALLATIONS["watched"]), "PodMonitor", "nbgpu-agent")["spec"]
    assert monitor["podMetricsEndpoints"][0]["port"] == container["ports"][0]["name"]


def test_an_upgrade_leaves_no_node_without_an_agent() -> None:
    daemons = pick(render(), "DaemonSet", "nbgpu-agent")["spec"]
    assert daemons["updateStrategy"] == {"rollingUpdate": {"maxSurge": "10%", "maxUnavailable": 0}}
    budget = pick(render(), "PodDisruptionBudget", "nbgpu-pool")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "PodDisruptionBudget" not in {one["kind"] for one in render({"pool.replicas": 1})}


def test_secrets_are_made_unless_given() -> None:
    assert {one["metadata"]["name"] for one in render() if one["kind"] == "Secret"} == {
        "nbgpu-seal", "nbgpu-read-token", "nbgpu-hub-jupyterhub",
    }  # fmt: skip
    given = render(INSTALLATIONS["own secrets"])
    assert not [one for one in given if one["kind"] == "Secret"]
    volumes = pick(given, "Deployment", "nbgpu-pool")["spec"]["template"]["spec"]["volumes"]
    assert [one["secret"]["secretName"] for one in volumes if "secret" in one] == ["my-seal", "my-read", "my-hub"]
    apart = [one["metadata"] for one in render(INSTALLATIONS["two hubs"]) if one["kind"] == "Secret"]
    assert ("hub-one", "nbgpu-hub-one") in [(one.get("namespace"), one["name"]) for one in apart]


def test_nobody_who_keeps_a_port_busy_has_a_part_ended() -> None:
    """The kubelet ends what fails a liveness or startup probe: neither asks at a port that others reach."""
    for kind, name in (("Deployment", "nbgpu-pool"), ("DaemonSet", "nbgpu-agent")):
        container = pick(render(INSTALLATIONS["watched"]), kind, name)["spec"]["template"]["spec"]["containers"][0]
        assert "startupProbe" not in container
        command = container["livenessProbe"]["exec"]["command"][-1]
        (file,) = [arg.split("=")[1] for arg in container["args"] if arg.startswith("--alive-file=")]
        assert f"find {file} " in command
        assert any(file.startswith(f"{mount['mountPath']}/") and not mount.get("readOnly") for mount in container["volumeMounts"])


def test_an_uninstall_keeps_the_seal_alone() -> None:
    kept = {one["metadata"]["name"] for one in render() if one["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"}
    assert kept == {"nbgpu-seal"}
