"""What a configuration promises and the pool's devices cannot keep: words for the log. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from nbgpu.models import Device
from nbgpu.quantities import WHOLE_MILLI

from .quotas import format_gpus
from .state import Settings


def beyond(settings: Settings, devices: Iterable[Device]) -> list[str]:
    """Return a sentence for the guarantees together, and for each reservation, that need more than `devices`; none are known: nothing."""
    quotas, models = settings.quotas, [device.model for device in devices]
    if not models:
        return []
    found: list[str] = []
    guaranteed = sum(limits.guarantee_milli for limits in (*quotas.users.values(), *quotas.groups.values()))
    if guaranteed > len(models) * WHOLE_MILLI:
        found.append(
            f"The guarantees of the configuration are {format_gpus(guaranteed)} together, and the pool has {_devices(len(models))}."
        )
    for window in settings.windows:
        there = len(models) if window.model is None else models.count(window.model)
        if window.device_count > there:
            places = there * (WHOLE_MILLI // window.milli)
            found.append(
                f"The reservation {window.name} keeps {window.count} places, which are {format_gpus(window.device_count * WHOLE_MILLI)};"
                f" the pool has {_devices(there, window.model)}, so at most {places} places."
            )
    return found


def _devices(count: int, model: str | None = None) -> str:
    kind = f" of model {model}" if model is not None else ""
    return f"{format_gpus(count * WHOLE_MILLI)}{kind}"
