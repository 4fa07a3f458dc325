"""The checks of ``nbgpu doctor --cluster``: whether a Kubernetes cluster can hold nbgpu and what is installed there works. Pure."""

from __future__ import annotations

import re

from .claims import DRIVER
from .cli_doctor import Check
from .cluster_look import COMPONENT, ENFORCE, Cluster, granted
from .kube import Json
from .loose import as_dict, as_dicts
from .quantities import WHOLE_MILLI, format_memory
from .words import counted

_CDI = re.compile(r"unresolvable CDI devices|CDI device injection failed|CDI.*(not enabled|disabled)", re.IGNORECASE)
_SHARED_MOUNT = "On that node: mount --make-rshared / before the container runtime starts (docs/kubernetes.md)."
_EARLY = "no relationship found between node"
"""What the API server's Node authorizer says of a pod that has just come to the node."""
_PREPARE = "FailedPrepareDynamicResources"


def checks(cluster: Cluster) -> list[Check]:
    """Return one line for each thing that was looked at."""
    found = [
        _kubernetes(cluster),
        _class(cluster),
        *_agents(cluster),
        *_devices(cluster),
        *_runtimes(cluster),
        *_pool(cluster),
        *_claims(cluster),
    ]
    if cluster.unguarded:
        what = f"servers run in {', '.join(cluster.unguarded[:5])}, without the label {ENFORCE}=baseline or restricted"
        found.append(Check("pod security", "note", f"{what}: who makes pods there can change every slice's limits (docs/security.md)"))
    if cluster.unread:
        what = f"these credentials may not read {', '.join(cluster.unread)}: what is said of them is incomplete"
        found.append(Check("credentials", "warning", what, "Run it as an administrator of the cluster."))
    return found


def _kubernetes(cluster: Cluster) -> Check:
    if cluster.problem is None:
        return Check("cluster", "ok", f"Kubernetes {cluster.version}, with capacities that claims share")
    first, _, remedy = cluster.problem.partition("; ")
    return Check("cluster", "error", first, remedy[:1].upper() + remedy[1:] if remedy else "")


def _class(cluster: Cluster) -> Check:
    if cluster.has_class and not (cluster.agents or cluster.pools or cluster.unread):
        what = "it is left of an earlier installation or somebody else's. Delete it, or install with createDeviceClass=false"
        return Check("device class", "note", f"DeviceClass {DRIVER} is there, and no installation of nbgpu's chart: {what}")
    if cluster.has_class:
        return Check("device class", "ok", f"DeviceClass {DRIVER} is there")
    return Check(
        "device class", "error", f"there is no DeviceClass {DRIVER}", "helm install nbgpu deploy/chart (with createDeviceClass: true)."
    )


def _agents(cluster: Cluster) -> list[Check]:
    found: list[Check] = []
    for one in cluster.agents:
        name = f"{one['metadata'].get('namespace')}/{one['metadata'].get('name')}"
        status = as_dict(one.get("status"))
        wanted, ready = int(status.get("desiredNumberScheduled") or 0), int(status.get("numberReady") or 0)
        runtime = one["spec"]["template"]["spec"].get("runtimeClassName")
        if runtime and "runtimeclasses" not in cluster.unread and runtime not in cluster.runtime_classes:
            remedy = "Install NVIDIA's runtime (GPU Operator), or set agent.driver.source: cdi; to simulate, agent.simulate.enabled: true."
            found.append(Check("runtime class", "error", f"agents want RuntimeClass {runtime}, which this cluster has not", remedy))
        if wanted == 0:
            remedy = "Label nodes with GPUs nvidia.com/gpu.present=true (the GPU Operator does), or set agent.nodeSelector."
            found.append(Check("agents", "error", f"DaemonSet {name} runs on no node", remedy))
        elif ready < wanted:
            why = _why(cluster, "agent")
            remedy = _SHARED_MOUNT if "not a shared" in why else f"kubectl -n {name.split('/')[0]} get pods"
            found.append(Check("agents", "error", f"{ready} of {wanted} agents of {name} are ready{why}", remedy))
        else:
            found.append(Check("agents", "ok", f"{ready} of {wanted} are ready"))
            if stuck := _stuck(cluster, "agent"):
                remedy = f"kubectl -n {name.split('/')[0]} describe pods; nothing is lost meanwhile."
                found.append(Check("agents", "warning", f"a new pod of {name} does not run{stuck}", remedy))
    if stranded := _stranded(cluster):
        what = f"{counted(stranded, 'server')} {'holds a slice' if stranded == 1 else 'hold slices'} and no agent of nbgpu's chart is here"
        remedy = "helm install nbgpu again, under its old name, until they have ended (docs/kubernetes.md, Uninstall)."
        found.append(Check("agents", "error", f"{what}: they go on, but their pods stay Terminating when they end", remedy))
    elif not cluster.agents and "daemonsets" not in cluster.unread:
        level = "note" if cluster.devices else "error"
        found.append(Check("agents", level, "no DaemonSet of nbgpu's chart is here", "helm install nbgpu deploy/chart"))
    return found


def _stranded(cluster: Cluster) -> int:
    """Return how many servers are left of an installation whose agents and pool are gone."""
    if cluster.agents or cluster.pools or {"daemonsets", "deployments"} & set(cluster.unread):
        return 0
    return sum(bool(one.pods) for one in cluster.holdings)


def _why(cluster: Cluster, component: str) -> str:
    """Return what the first pod of a part waits for."""
    return _stuck(cluster, component) or next(
        (
            f": {condition['message']}"
            for pod in _pods(cluster, component)
            for condition in as_dicts(as_dict(pod.get("status")).get("conditions"))
            if condition.get("status") == "False" and condition.get("message")
        ),
        "",
    )


def _stuck(cluster: Cluster, component: str) -> str:
    """Return why a container of a part does not run, of the first pod where that is so: what it said last, or what was said of it."""
    for pod in _pods(cluster, component):
        for state in as_dicts(as_dict(pod.get("status")).get("containerStatuses")):
            waiting = as_dict(as_dict(state.get("state")).get("waiting"))
            if waiting:
                last = str(as_dict(as_dict(state.get("lastState")).get("terminated")).get("message") or "").strip().splitlines()
                name = f"{pod['metadata'].get('namespace')}/{pod['metadata'].get('name')}"
                told = [event.message for event in cluster.events if event.pod == name]
                said = last[-1] if last else waiting.get("message") or (told[-1][:200] if told else "")
                return f": {waiting.get('reason')}: {said}".rstrip(": ")
    return ""


def _pods(cluster: Cluster, component: str) -> list[Json]:
    return [pod for pod in cluster.pods if as_dict(pod["metadata"].get("labels")).get(COMPONENT) == component]


def _devices(cluster: Cluster) -> list[Check]:
    found = [Check("ResourceSlice", "error", one, "Look at that node's agent: kubectl logs.") for one in cluster.malformed]
    if not cluster.devices:
        return [
            *found,
            Check(
                "devices", "error", "no agent publishes a GPU", "Look at the agents' logs; agent.devices names which GPUs may be sliced."
            ),
        ]
    nodes = {device.node for device in cluster.devices}
    kind = "simulated GPU" if all(device.simulated for device in cluster.devices) else "GPU"
    found.append(Check("devices", "ok", f"{counted(len(cluster.devices), kind)} on {counted(len(nodes), 'node')}"))
    for device in cluster.devices:
        if not device.healthy:
            remedy = "Look at `nvidia-smi -q` and the kernel log (Xid) there; nothing new is placed on it."
            found.append(Check("device", "error", f"GPU {device.index} of node {device.node} is not healthy, or is used by others", remedy))
    for node in sorted(nodes):
        if not cluster.ready.get(node, False):
            found.append(Check("node", "warning", f"node {node} is not ready: nothing new comes there", f"kubectl describe node {node}"))
    for node, count in sorted(cluster.also.items()):
        what = f"node {node}: a device plugin hands out {count} of its GPUs as nvidia.com/gpu, nbgpu slices GPUs there too"
        found.append(
            Check(
                "other plugins", "warning", what, "Name in agent.devices only those that the plugin leaves out, or keep it off that node."
            )
        )
    return found


def _runtimes(cluster: Cluster) -> list[Check]:
    found: list[Check] = []
    old = sorted(node for node, runtime in cluster.runtimes.items() if re.match(r"containerd://1\.", runtime))
    if old:
        remedy = "Update to containerd 2, or set enable_cdi = true and cdi_spec_dirs in /etc/containerd/config.toml and restart it."
        found.append(Check("CDI", "warning", f"containerd 1 on {', '.join(old[:5])}: it has CDI off by default", remedy))
    failed = [message for _, message, _ in cluster.events if _CDI.search(message)]
    if failed:
        remedy = "Turn CDI on in the container runtime (containerd: enable_cdi = true), and see that its cdi_spec_dirs has /var/run/cdi."
        found.append(Check("CDI", "error", f"a container was refused its CDI devices: {failed[-1][:200]}", remedy))
    elif cluster.runtimes and not old:
        found.append(Check("CDI", "ok", "no container was refused its devices"))
    refused = [message for reason, message, _ in cluster.events if reason == _PREPARE and not _CDI.search(message)]
    early = [message for message in refused if _EARLY in message]
    if early:
        found.append(Check("prepare", "note", "a pod started a minute late: Kubernetes refused the kubelet its claim, too early"))
    if refused := [message for message in refused if message not in early]:
        what = f"a pod's slice was not prepared in the last hour: {refused[-1][:300]}"
        found.append(Check("prepare", "warning", what, "See the agent's log of that node."))
    return found


def _pool(cluster: Cluster) -> list[Check]:
    found: list[Check] = []
    for one in cluster.pools:
        name = f"{one['metadata'].get('namespace')}/{one['metadata'].get('name')}"
        ready = int(as_dict(one.get("status")).get("readyReplicas") or 0)
        remedy = f"kubectl -n {name.split('/')[0]} logs deployment/{name.split('/')[1]}"
        if ready:
            found.append(Check("pool replicas", "ok", f"{name} answers ({ready} of {one['spec'].get('replicas', 1)} replicas: one leads)"))
            if stuck := _stuck(cluster, "pool"):
                found.append(Check("pool replicas", "warning", f"a pod of {name} does not run{stuck}", remedy))
        else:
            found.append(Check("pool replicas", "error", f"no replica of {name} is ready{_why(cluster, 'pool')}", remedy))
    if not cluster.pools and "deployments" not in cluster.unread:
        found.append(Check("pool replicas", "note", "no Deployment of nbgpu's chart is here"))
    return found


def _claims(cluster: Cluster) -> list[Check]:
    odd = [] if _stranded(cluster) else [one.problem for one in cluster.holdings if one.problem]
    found = [Check("claim", "error", problem, "Nothing is granted on its GPU until it is gone.") for problem in odd]
    sums = granted(cluster)
    for device in cluster.devices:
        memory, milli, _ = sums[device.uuid]
        if memory > device.usable_bytes or milli > WHOLE_MILLI:
            what = f"GPU {device.index} of {device.node}: slices of {format_memory(memory)} and {milli / 10:g} % of its time exceed it"
            found.append(Check("books", "error", what, "Report this; stop one of its servers until then."))
    waiting = sum(one.state == "waiting" for one in cluster.holdings)
    held = sum(one.state == "running" for one in cluster.holdings)
    idle = [f"{one.namespace}/{one.name}" for one in cluster.holdings if one.state == "idle"]
    words = f"{held} held by pods, {waiting} waiting for a node"
    found.append(Check("claims", "ok", words + (f", {len(idle)} used by no pod ({', '.join(idle[:3])})" if idle else "")))
    return found
