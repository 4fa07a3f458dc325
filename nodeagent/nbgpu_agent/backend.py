"""Who holds the memory of slices: the limiter alone, or beside it the driver, by cgroup (r615 and later).

The limiter refuses in both: it knows kernels, managed memory and processes that are in no cgroup of their slice. The driver refuses who
evades it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from nbgpu.errors import InvalidValue
from nbgpu.models import Backend, Device

from .cgroups import Cgroups
from .events import EventLog
from .live import LiveSlice
from .marks import mark
from .runtime import StartError

log = logging.getLogger("nbgpu.agent")
Wanted = Literal["auto", "limiter", "driver"]
WANTED: tuple[Wanted, ...] = ("auto", "limiter", "driver")
LOOK_AGAIN_SECONDS = 5.0
VARIABLE = "NBGPU_MEMORY_BACKEND"


@dataclass(frozen=True)
class Choice:
    """Who holds memory on this node, and why."""

    backend: Backend
    reason: str


class LimitsDriver(Protocol):
    """What is asked of NVML here."""

    driver_version: str

    def has_limits(self, uuid: str) -> bool:
        """Return whether a device can limit memory by cgroup."""
        ...

    def set_limit(self, uuid: str, cgroup: Path, limit_bytes: int | None) -> str | None:
        """Set a cgroup's limit on a device, None = none; return what went wrong."""
        ...


def missing(nvml: LimitsDriver, devices: Collection[Device], cgroups: Cgroups) -> str:
    """Return what the driver's limits lack here; "" where they can be used."""
    lacking = [device for device in devices if not nvml.has_limits(device.uuid)]
    if len(lacking) == len(devices):
        return f"this driver ({nvml.driver_version}) does not limit memory by cgroup, r615 and later do"
    if lacking:
        return f"GPU {lacking[0].index} ({lacking[0].model}) does not limit memory by cgroup"
    if os.geteuid() != 0:
        return "only root may set the driver's memory limits"
    return "" if cgroups.version_2 else "there is no cgroup v2 at /sys/fs/cgroup, which the driver's memory limits need"


def choose(wanted: Wanted, lacks: str) -> Choice:
    """Return who holds memory; StartError where `driver` was asked for and cannot be.

    Parameters
    ----------
    lacks : str
        What `missing` says.
    """
    if wanted not in WANTED:  # of the environment
        raise InvalidValue(VARIABLE, wanted, f"one of {', '.join(WANTED)}")
    if wanted == "limiter":
        return Choice("limiter", "as --memory-backend asks")
    if not lacks:
        return Choice("driver", "it limits memory by cgroup")
    if wanted == "driver":
        raise StartError(f"--memory-backend driver cannot be: {lacks}. With `auto` the limiter holds memory.")
    return Choice("limiter", lacks)


class DriverLimits:
    """Keeps the driver's limits as the slices are. What it sets is written in the slice's record first, so that no crash leaves one behind.

    Parameters
    ----------
    wanted : bool
        False: take away what an earlier agent has set, and set none.
    """

    def __init__(self, nvml: LimitsDriver, cgroups: Cgroups, wanted: bool, slices: Callable[[], Collection[LiveSlice]], events: EventLog):
        self._nvml = nvml
        self._cgroups = cgroups
        self._wanted = wanted
        self._slices = slices
        self._events = events
        self._set: dict[str, tuple[str, dict[str, int]]] = {}
        """By slice what this agent has set: the cgroup, bytes by device."""
        self._told: set[str] = set()
        self._failed: dict[str, str] = {}
        self._look_at: dict[str, float] = {}
        """When to look again whether a slice that has no cgroup has one, CLOCK_MONOTONIC seconds."""

    def hold(self, live: LiveSlice) -> None:
        """Bring the driver's limits of a slice in force, where it has a cgroup; where it has none, say so once."""
        if time.monotonic() < self._look_at.get(live.id, 0):
            return
        place, why = self._place(live) if self._wanted else (None, "")
        if place is None:
            self.release(live)
            if why and live.state != "prepared":
                self._look_at[live.id] = time.monotonic() + LOOK_AGAIN_SECONDS
                self._tell(live, why)
            return
        limits = {part.uuid: part.memory_bytes for part in live.limits.devices}
        if self._set.get(live.id) == (place, limits):
            return
        if live.record.limited not in (None, place):
            self.release(live)
        if live.record.limited is None:
            live.save(limited=place)
        mark("limit-noted")
        for uuid, limit_bytes in limits.items():
            error = self._nvml.set_limit(uuid, Path(place), limit_bytes)
            if error is not None:
                self.release(live)
                self._failed[live.id] = f"the driver did not take its limit ({error})"
                self._tell(live, self._failed[live.id])
                return
        mark("limit-set")
        self._set[live.id] = place, limits
        live.backend = "driver"

    def release(self, live: LiveSlice) -> None:
        """Take away a slice's limits, those of an earlier agent too; the limiter's stay."""
        live.backend = "limiter"
        self._set.pop(live.id, None)
        place = live.record.limited
        if place is None:
            return
        if Path(place).exists():
            for part in live.slice.devices:
                error = self._nvml.set_limit(part.uuid, Path(place), None)
                if error is not None:
                    log.warning("The driver keeps its memory limit of %s on %s: %s", place, part.uuid, error)
        mark("limit-cleared")
        live.save(limited=None)

    def end(self, live: LiveSlice) -> None:
        """Take away the limits of a slice that ends."""
        self.release(live)
        self._told.discard(live.id)
        self._failed.pop(live.id, None)
        self._look_at.pop(live.id, None)

    def _place(self, live: LiveSlice) -> tuple[str | None, str]:
        """Return the cgroup that stands for a slice, or why there is none."""
        if live.id in self._failed:
            return None, self._failed[live.id]
        claim = live.record.claim
        if claim is None:
            return live.record.cgroup, "it has no cgroup of its own"
        # Limits do not add up over cgroups, and the nearest one is what holds: one slice, one pod.
        if len(claim.pods) != 1:
            return None, "its claim is of several pods"
        if any(
            other is not live and other.record.claim is not None and claim.pods[0] in other.record.claim.pods for other in self._slices()
        ):
            return None, "its pod has more than one slice"
        found = self._cgroups.pod_directory(claim.pods[0])
        return (str(found), "") if found is not None else (None, "the cgroup of its pod is not to be seen from here")

    def _tell(self, live: LiveSlice, why: str) -> None:
        if live.id not in self._told:
            self._told.add(live.id)
            message = f"The limiter alone holds this server's GPU memory, not the driver: {why}. Programs that evade it are only detected."
            self._events.add("limiter-only", "info", message, live.id, owner=live.owner)
