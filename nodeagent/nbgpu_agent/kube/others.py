"""Which devices somebody else on the node hands out already: another DRA driver, or a device plugin. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from nbgpu.claims import DRIVER, parse_quantity
from nbgpu.models import Device

Json = dict[str, Any]
PLUGIN_RESOURCES = ("nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-")
"""What NVIDIA's device plugin, and those that stand in for it, call GPUs; the last is the begin of several names."""
UUID_ATTRIBUTES = ("uuid", "parentUUID")
"""By which a DRA driver tells which GPU a device is, or is a part of."""


def claimed_by_others(
    devices: Sequence[Device], all_devices: int, slices: Sequence[Json], allocatable: Mapping[str, object]
) -> dict[str, str]:
    """Return why a device is not nbgpu's to publish, by uuid.

    Parameters
    ----------
    devices : sequence of Device
        Those that the admin's selector names.
    all_devices : int
        How many GPUs the node has.
    slices : sequence
        ResourceSlices of the node.
    allocatable : mapping
        The Node's ``status.allocatable``.
    """
    found: dict[str, str] = {}
    ours = {device.uuid.lower(): device.uuid for device in devices}
    for thing in slices:
        driver = str(_dict(thing.get("spec")).get("driver", ""))
        if driver == DRIVER:
            continue
        for uuid in _uuids(thing):
            if uuid in ours:
                found.setdefault(ours[uuid], f"driver {driver} hands it out already")
    plugin = {name: count for name, value in allocatable.items() if name.startswith(PLUGIN_RESOURCES) and (count := _count(value))}
    # A plugin tells only how many it has. Where there is room for its and ours side by side, the admin has told them apart.
    if plugin and sum(plugin.values()) + len(devices) > all_devices:
        told = ", ".join(f"{count} {name}" for name, count in sorted(plugin.items()))
        why = f"a device plugin hands out {told} of this node's {all_devices} GPUs; leave those out with --devices, or keep the plugin off"
        for device in devices:
            found.setdefault(device.uuid, why)
    return found


def _uuids(thing: Json) -> set[str]:
    found: set[str] = set()
    devices = _dict(thing.get("spec")).get("devices")
    for device in cast("list[Any]", devices) if isinstance(devices, list) else []:
        for name, value in _dict(_dict(device).get("attributes")).items():
            text = _dict(value).get("string")
            if name.rpartition("/")[2] in UUID_ATTRIBUTES and isinstance(text, str):
                found.add(text.lower())
    return found


def _count(value: object) -> int:
    try:
        return parse_quantity(value)
    except ValueError:
        return 0


def _dict(value: object) -> Json:
    return cast("Json", value) if isinstance(value, dict) else {}
