"""What a slice adds to the pod that KubeSpawner makes, and what a pod tells of its slice. Pure."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from kubernetes_asyncio.client.models import CoreV1ResourceClaim, V1EnvVar, V1Pod, V1PodResourceClaim, V1ResourceRequirements

from nbgpu.claims import OWNER_ANNOTATION, SLICE_LABEL, claim_name
from nbgpu.models import Grant

from .local import PROVISIONER

REQUEST_ANNOTATION = "nbgpu.io/request-id"
CLAIM_IN_POD = "nbgpu"
NOTEBOOK = "notebook"
_REQUEST_ID = re.compile(r"[a-z0-9][a-z0-9-]{6,46}[a-z0-9]")


def with_slice(pod: V1Pod, grant: Grant | None, *, provisioner: bool = False) -> V1Pod:
    """Return a copy of `pod` that carries `grant`.

    Parameters
    ----------
    pod : V1Pod
        As KubeSpawner makes it. Not changed.
    grant : Grant, optional
        None for a server without a GPU: its pod is only kept from seeing any.
    provisioner : bool
        The image has nbgpu's kernel provisioner.
    """
    pod = copy.deepcopy(pod)
    for container in [*(pod.spec.init_containers or []), *pod.spec.containers]:
        # CUDA images say "all", which an NVIDIA runtime obeys even for a pod that claims nothing; CDI devices do not need it
        _set_env(container, "NVIDIA_VISIBLE_DEVICES", "void")
    if grant is None:
        return pod
    notebook = next(container for container in pod.spec.containers if _name_of(container) == NOTEBOOK)
    if notebook.resources is None:
        notebook.resources = V1ResourceRequirements()
    notebook.resources.claims = [*(notebook.resources.claims or []), CoreV1ResourceClaim(name=CLAIM_IN_POD)]
    if provisioner:
        _set_env(notebook, "JUPYTER_DEFAULT_PROVISIONER_NAME", PROVISIONER)
    name_slice(pod, grant)
    return pod


def name_slice(pod: V1Pod, grant: Grant) -> None:
    """Let `pod` name the claim of `grant`, in place of another grant's where it did."""
    request = grant.request
    claim = V1PodResourceClaim(name=CLAIM_IN_POD, resource_claim_name=claim_name(request.request_id))
    pod.spec.resource_claims = [*(one for one in pod.spec.resource_claims or [] if _name_of(one) != CLAIM_IN_POD), claim]
    pod.metadata.labels = {**(pod.metadata.labels or {}), SLICE_LABEL: request.request_id}
    pod.metadata.annotations = {
        **(pod.metadata.annotations or {}),
        REQUEST_ANNOTATION: request.request_id,
        OWNER_ANNOTATION: json.dumps(request.owner.model_dump(mode="json"), sort_keys=True),
    }


def carried_by(pod: Mapping[str, Any] | None) -> str | None:
    """Return the request id of the slice that a pod, as the API server shows it, says it carries."""
    annotations = ((pod or {}).get("metadata") or {}).get("annotations") or {}
    told = annotations.get(REQUEST_ANNOTATION)
    return told if isinstance(told, str) and _REQUEST_ID.fullmatch(told) else None


def lives(pod: Mapping[str, Any] | None) -> bool:
    """Return whether a pod still starts or runs, and nobody has asked it to end."""
    if pod is None or (pod.get("metadata") or {}).get("deletionTimestamp"):
        return False
    status = pod.get("status") or {}
    notebook = next((one for one in status.get("containerStatuses") or [] if one["name"] == NOTEBOOK), {})
    return status.get("phase") in ("Pending", "Running", "Unknown") and "terminated" not in (notebook.get("state") or {})


_LACKS = (("Insufficient cpu", "CPU"), ("Insufficient memory", "memory"), ("Insufficient ephemeral-storage", "disk"))


def why_unscheduled(event: Mapping[str, Any] | None) -> str | None:
    """Return what one of Kubernetes' events says of a pod that found no node, in plain words; None for any other event."""
    if not event or event.get("reason") != "FailedScheduling":
        return None
    words = str(event.get("message") or "")
    if "resourceclaim" in words or "cannot allocate all claims" in words:
        return "Your slice of the GPU is being made ready; your server starts as soon as it is."
    lacks = [name for word, name in _LACKS if word in words]
    if lacks:
        return (
            f"The machine with room on its GPU has not enough {' and '.join(lacks)} left for your server. It waits until there is; "
            "a server with less of that may start sooner."
        )
    return "No machine with a GPU takes your server now; it waits for one. If that lasts, ask your admin: the event above says why."


_REFUSALS = (
    ("error looking up service account", "it is set up to run as a service account that is not there"),
    ("nbgpu.io on pods are written by the hub alone", "this hub runs under another service account than nbgpu's chart was told of"),
    ("only the hub's own pods use it", "this hub runs under another service account than nbgpu's chart was told of"),
    ("violates PodSecurity", "it is set up with something that Pod Security forbids here"),
    ("exceeded quota", "a quota of Kubernetes for servers here is used up"),
)


def why_refused(body: object) -> str:
    """Return what a user reads when the API server refuses their pod: its own words name service accounts, and are for the admin.

    Parameters
    ----------
    body : object
        Of the API server's answer.
    """
    told = str(body or "")
    why = next((f": {words}" for word, words in _REFUSALS if word in told), "")
    return f"Kubernetes does not take your server{why}. You cannot mend that: tell your admin. The hub's log has Kubernetes' words."


def plain_part(note: str) -> str:
    """Return what the pool says of a pod that finds no node, without kube-scheduler's own words, which are none for users."""
    words = note.partition("Kubernetes said:")[0].strip().rstrip(".")
    return "" if not words or words.startswith("Kubernetes finds no node") else f"{words[:1].upper()}{words[1:]}."


def _set_env(container: Any, name: str, value: str) -> None:
    """Set a variable of a container; what an admin wrote in plain dicts KubeSpawner leaves as dicts, in part or whole."""
    plain = isinstance(container, dict)
    env = (container.get("env") if plain else container.env) or []
    env = [*(variable for variable in env if _name_of(variable) != name), V1EnvVar(name=name, value=value)]
    if plain:
        container["env"] = env
    else:
        container.env = env


def _name_of(item: Any) -> str:
    return item["name"] if isinstance(item, dict) else item.name
