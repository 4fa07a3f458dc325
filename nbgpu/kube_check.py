"""Whether a cluster can hold nbgpu's claims: DRA with consumable capacity, on by default from Kubernetes 1.36."""

from __future__ import annotations

from .claims import Json
from .errors import NbgpuError, Unavailable
from .kube import Kube, NotAllowed, NotFound, Rejected, path

GATE = "DRAConsumableCapacity"
PROBE_CLASS = "probe.nbgpu.io"
"""A class that nobody makes. Claims for nbgpu's own the chart's rules leave to the pool alone, and ResourceQuotas count them."""


async def cluster_problem(kube: Kube, *namespaces: str) -> str | None:
    """Return in one line why this cluster cannot share devices, and what to enable; None when it can.

    Asks the API server to take a claim with a capacity without keeping it (a dry run): where the feature is off, it drops the capacity.

    Parameters
    ----------
    namespaces : str
        Where the caller may create ResourceClaims (default: "default"). One that refuses says nothing about the cluster: the next is asked.

    Raises
    ------
    Unavailable
        The API server does not answer, so nobody knows.
    """
    told = await kube.get("/version")
    version = f"{told.get('major', '?')}.{str(told.get('minor', '?')).rstrip('+')}"
    enable = f"update it, or turn the feature gate {GATE} on in API server, scheduler, controller manager and kubelets"
    wanted = f"nbgpu needs Kubernetes 1.36 or later with {GATE} (there on by default)"
    request = {"deviceClassName": PROBE_CLASS, "capacity": {"requests": {"memory": "1Mi"}}}
    probe: Json = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"generateName": "nbgpu-probe-"},
        "spec": {"devices": {"requests": [{"name": "gpu", "exactly": request}]}},
    }
    refused: str | None = None
    for namespace in namespaces or ("default",):
        try:
            made = await kube.create(path("resource.k8s.io/v1", "resourceclaims", namespace), probe, dry_run=True)
        except NotFound as error:
            if "namespaces" not in error.message:
                return f"This cluster (Kubernetes {version}) has no ResourceClaims of resource.k8s.io/v1; {wanted}: {enable}."
            refused = f"There is no namespace {namespace}, so no claims can be made there: create it."
            continue
        except (NotAllowed, Rejected) as error:
            if "exceeded quota" in error.message:  # a full namespace: what runs there is still to be looked after
                return None
            refused = f"No ResourceClaim can be made in namespace {namespace}: {error.message}"
            continue
        except Unavailable:
            raise
        except NbgpuError as error:
            return error.message
        if made["spec"]["devices"]["requests"][0].get("exactly", {}).get("capacity"):
            return None
        return f"This cluster (Kubernetes {version}) cannot share a device between claims; {wanted}: {enable}."
    return refused
