"""Kubernetes Events: what `kubectl describe` shows beside an object."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from datetime import datetime, timezone
from typing import Literal

from .errors import NbgpuError
from .kube import Json, Kube, path

REMEMBERED = 2000
AT_ONCE = 50
PER_SECOND = 2.0
CLOSE_SECONDS = 2.0

log = logging.getLogger("nbgpu.kube")


def reference(api: str, kind: str, metadata: Json) -> Json:
    """Return how an Event names an object; lists' items do not say of what kind they are."""
    named = {name: metadata.get(name) for name in ("name", "namespace", "uid", "resourceVersion")}
    return {"apiVersion": api, "kind": kind, **{name: value for name, value in named.items() if value}}


class Reporter:
    """Tells of each thing once, as a line in the log and as an Event; a flood of them is cut off in the API server, not in the log.

    Parameters
    ----------
    component : str
        Who says so: ``nbgpu-pool``, ``nbgpu-agent``.
    """

    def __init__(self, kube: Kube, component: str):
        self._kube = kube
        self._component = component
        self._told: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left, self._counted = float(AT_ONCE), time.monotonic()

    def say(self, about: Json, reason: str, message: str, level: Literal["Normal", "Warning"] = "Warning") -> bool:
        """Tell of something; False when the same was told of that object before.

        Parameters
        ----------
        about : Json
            From `reference`.
        reason : str
            In CamelCase, for programs.
        """
        key = hashlib.sha256(f"{about.get('uid') or about.get('name')} {reason} {message}".encode()).hexdigest()[:20]
        if key in self._told:
            return False
        self._told[key] = None
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        where = "/".join(str(about[part]) for part in ("namespace", "name") if part in about)
        log.log(logging.WARNING if level == "Warning" else logging.INFO, "%s %s %s: %s", about["kind"], where, reason, message)
        if self._may():
            task = asyncio.create_task(self._send(about, reason, message, level, key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return True

    def _may(self) -> bool:
        now = time.monotonic()
        self._left, self._counted = min(AT_ONCE, self._left + (now - self._counted) * PER_SECOND), now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    async def _send(self, about: Json, reason: str, message: str, level: str, key: str) -> None:
        namespace = str(about.get("namespace") or "default")
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        event: Json = {
            "metadata": {"name": f"{str(about['name'])[:200]}.{key}", "namespace": namespace},
            "involvedObject": about,
            "reason": reason,
            "message": message[:1000],
            "type": level,
            "source": {"component": self._component},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._kube.create(path("v1", "events", namespace), event)
        except NbgpuError as error:
            log.debug("no event: %s", error.message)

    async def close(self) -> None:
        """Let what is being sent be sent."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
