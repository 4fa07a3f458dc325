"""``nbgpu status --cluster`` and ``--pool``: devices and who holds what, by a cluster's objects or by a pool's word."""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from .claims import FOREIGN_HUB
from .cli_common import SHORT_ID, console, owner_name, percent, print_json
from .errors import NbgpuError, Unavailable
from .models import DeviceBooks, Grant, GrantState, Slice
from .quantities import format_memory
from .words import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .cluster_look import Cluster

TOKEN_VARIABLE = "NBGPU_POOL_TOKEN"
ASK_SECONDS = 10.0
CLAIMS_DROP = ("mode", "share", "GPU", "pod")
"""What a narrow terminal shows without, the least useful first."""


def show_cluster(*, as_json: bool) -> None:
    """Print the GPUs of the cluster of KUBECONFIG and who holds them."""
    from .cluster_look import look, need_cluster

    need_cluster()
    found = look()
    if as_json:
        print_json(cluster_json(found))
        return
    for part in cluster_tables(found):
        console().print(part)


def cluster_json(found: Cluster) -> dict[str, Any]:
    """Return it for programs."""
    from .cluster_look import granted

    sums = granted(found)
    devices = [
        {**device.model_dump(mode="json"), "ready": found.ready.get(device.node, False),
         **dict(zip(("memory_granted_bytes", "compute_granted_milli", "slices"), sums[device.uuid], strict=True))}
        for device in found.devices
    ]  # fmt: skip
    claims = [asdict(one) | {"slice": one.slice.model_dump(mode="json") if one.slice else None} for one in found.holdings]
    return {"version": found.version, "problem": found.problem, "devices": devices, "claims": claims, "unread": found.unread}


def cluster_tables(found: Cluster) -> list[RenderableType]:
    """Return what to print."""
    from .cli_table import FittingTable
    from .cluster_look import granted

    nodes = {one.node for one in found.devices}
    head = f"Kubernetes {found.version}: {counted(len(found.devices), 'GPU')} on {counted(len(nodes), 'node')}"
    parts: list[RenderableType] = [found.problem or head]
    devices = FittingTable("node", "GPU", "model", "memory", "granted", "time granted", "slices", drop=("slices",))
    sums = granted(found)
    for device in found.devices:
        memory, milli, count = sums[device.uuid]
        good = device.healthy and found.ready.get(device.node, False)
        model = device.model if good else f"{device.model} (not healthy)" if not device.healthy else f"{device.model} (node away)"
        devices.add_row(
            device.node, str(device.index), model, format_memory(device.usable_bytes), format_memory(memory), percent(milli), str(count)
        )
    parts.append(devices if found.devices else "No agent publishes a GPU.")
    if not found.holdings:
        return [*parts, "No slices."]
    claims = FittingTable("claim", "owner", "namespace", "pod", "node", "GPU", "memory", "share", "mode", "state", drop=CLAIMS_DROP)
    for one in found.holdings:
        held = one.slice.devices if one.slice is not None else []
        name = one.name.removeprefix("nbgpu-")[:SHORT_ID] if one.name.startswith("nbgpu-") else one.name
        gpus, memory = ",".join(str(part.index) for part in held), sum(part.memory_bytes for part in held)
        claims.add_row(
            name, one.owner, one.namespace, ",".join(one.pods), one.slice.node if one.slice else "", gpus,
            format_memory(memory) if held else "", percent(sum(part.compute_milli for part in held)) if held else "",
            one.slice.mode if one.slice else "", one.problem or one.state,
        )  # fmt: skip
    return [*parts, claims]


def show_pool(url: str, *, as_json: bool) -> None:
    """Print what the pool at a URL says, asked with the token in the environment."""
    devices = _ask(url, "/v1/devices", list[DeviceBooks])
    grants = _ask(url, "/v1/requests", list[Grant])
    if as_json:
        print_json({
            "devices": [one.model_dump(mode="json") for one in devices], "requests": [one.model_dump(mode="json") for one in grants]
        })  # fmt: skip
        return
    from .cli_status import queue_table
    from .cli_table import FittingTable

    rows = FittingTable("node", "GPU", "model", "memory", "granted", "time granted", "slices", drop=("slices",))
    for one in devices:
        model = one.device.model if one.device.healthy else f"{one.device.model} (not healthy)"
        rows.add_row(
            one.device.node, str(one.device.index), model, format_memory(one.device.usable_bytes), format_memory(one.memory_granted_bytes),
            percent(one.compute_granted_milli), str(len(one.slices)),
        )  # fmt: skip
    console().print(rows)
    held = FittingTable("slice", "owner", "hub", "node", "GPU", "memory", "share", "state", "note", drop=("share", "GPU", "hub"))
    for grant in grants:
        if grant.slice is not None and grant.state is not GrantState.queued:
            parts = grant.slice.devices
            held.add_row(
                _slice_name(grant.slice), owner_name(grant.slice), grant.slice.owner.hub, grant.slice.node,
                ",".join(str(part.index) for part in parts), format_memory(sum(part.memory_bytes for part in parts)),
                percent(sum(part.compute_milli for part in parts)), grant.state.value, grant.note or "",
            )  # fmt: skip
    console().print(held if held.row_count else "No slices.")
    queue = sorted((grant for grant in grants if grant.state is GrantState.queued), key=lambda grant: grant.position or 0)
    if queue:
        console().print(queue_table(queue))


def _slice_name(piece: Slice) -> str:
    """Return how ``--cluster`` calls it too: a claim of somebody's own by its name, which is its owner's `server`."""
    return piece.owner.server if piece.owner.hub == FOREIGN_HUB else piece.slice_id[:SHORT_ID]


def _ask(url: str, route: str, kind: Any) -> Any:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise NbgpuError(f"--pool takes the pool's address, such as http://nbgpu-pool.nbgpu:8200; not {url!r}.", code="pool")
    token = os.environ.get(TOKEN_VARIABLE, "")
    request = urllib.request.Request(url.rstrip("/") + route, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
            return TypeAdapter(kind).validate_json(answer.read())
    except urllib.error.HTTPError as error:
        hint = f" Put a token of role `read` into {TOKEN_VARIABLE}." if error.code in (401, 403) else ""
        raise NbgpuError(f"The pool at {url} says: {_words(error)}{hint}", code="pool") from None
    except (ValidationError, ValueError):
        raise Unavailable(f"What is at {url} does not answer as a pool does. --pool takes the pool's own address.", code="pool") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"The pool at {url} does not answer: {_reason(error)}. Is the address right, and does it run?", code="away"
        ) from None


def _reason(error: Exception) -> str:
    """Return why nobody answered: ``Connection refused``."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return "no such host"
    if isinstance(cause, TimeoutError):
        return f"nothing within {ASK_SECONDS:g} s"
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}."
