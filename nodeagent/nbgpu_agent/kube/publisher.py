"""The node's ResourceSlice: what may be allocated here, kept as it should be whoever changes or deletes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

from nbgpu.claims import API_VERSION, DRIVER, resource_slice
from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.kube import Conflict, Kube, NotFound, path
from nbgpu.kube_events import Reporter, reference
from nbgpu.kube_reflector import LEFT_OUT, Key, Reflector
from nbgpu.models import Device

from ..agent import Agent
from .others import claimed_by_others

Json = dict[str, Any]
NODE_SECONDS = 30.0
"""How often the Node is looked at: what device plugins advertise shows there."""
RETRY_SECONDS = 2.0
log = logging.getLogger("nbgpu.agent")


class Publisher:
    """Writes the ResourceSlice of this node.

    Parameters
    ----------
    capacity : callable
        Returns memory in bytes and compute in milli-GPU that may be allocated, by uuid, where it is not all of a device.
    all_devices : int
        GPUs that the driver shows, those that the admin's selector leaves out too.
    """

    def __init__(
        self, agent: Agent, kube: Kube, reporter: Reporter, capacity: Callable[[], Mapping[str, tuple[int, int]]], all_devices: int
    ):
        self._agent = agent
        self._kube = kube
        self._reporter = reporter
        self._capacity = capacity
        self._all_devices = all_devices
        self._node: Json = {}
        self._path = path(API_VERSION, "resourceslices")
        self._name = f"{agent.settings.node}-{DRIVER}"
        self.slices: Reflector[Json] = Reflector(
            kube,
            self._path,
            lambda thing: thing if thing["spec"].get("nodeName") == agent.settings.node else LEFT_OUT,
            fields=f"spec.nodeName={agent.settings.node}",
            changed=self._changed,
            told=self.wake,
        )
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self.may: Callable[[], bool] = lambda: True
        """Whether `capacity` knows all claims: before, nothing is written."""
        self._generation = 0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to publish."""
        self.slices.start()
        self._tasks = [
            asyncio.create_task(self._run()),
            asyncio.create_task(self._look_at_node()),
            asyncio.create_task(self._follow_health()),
        ]

    async def stop(self) -> None:
        """Leave the ResourceSlice as it is: the next agent, or the kubelet when none comes, looks after it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.slices.stop()

    def wake(self) -> None:
        """Look at what is published again, soon."""
        self._wake.set()

    def _changed(self, key: Key, old: Json | None, new: Json | None) -> None:
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                if self.slices.ready and self._node and self.may():
                    self._wake.clear()
                    await self.publish()
                await self._wake.wait()
                self._wake.clear()
            except NbgpuError as error:
                log.warning("the ResourceSlice of this node is not as it should be: %s", error.message)
                await asyncio.sleep(RETRY_SECONDS)
                self._wake.set()
            except Exception:
                log.exception("publishing this node's devices failed, trying again")
                await asyncio.sleep(RETRY_SECONDS)
                self._wake.set()

    async def _look_at_node(self) -> None:
        while True:
            with contextlib.suppress(NbgpuError):
                node = await self._kube.get(path("v1", "nodes", name=self._agent.settings.node))
                kept = {"uid": node["metadata"].get("uid"), "allocatable": node.get("status", {}).get("allocatable", {})}
                if kept != self._node:
                    self._node = kept
                    self._wake.set()
            await asyncio.sleep(NODE_SECONDS if self._node else RETRY_SECONDS)

    async def _follow_health(self) -> None:
        seen = list(self._agent.devices.values())
        while True:
            await self._agent.changed.wait(3600)
            now = list(self._agent.devices.values())
            if now != seen:
                seen = now
                self._wake.set()

    def wanted(self) -> Json:
        """Return the ResourceSlice as it should be, with the generation that was last used."""
        mine = [device for device in self._agent.devices.values() if device.uuid not in self._withheld()]
        return resource_slice(self._agent.settings.node, mine, self._capacity(), self._generation, self._node.get("uid"))

    def _withheld(self) -> set[str]:
        others = [thing for (_, name), thing in self.slices.items.items() if name != self._name]
        allocatable = cast("Mapping[str, object]", self._node.get("allocatable", {}))
        found = claimed_by_others(list(self._agent.devices.values()), self._all_devices, others, allocatable)
        about = {**reference("v1", "Node", {"name": self._agent.settings.node, "uid": self._node.get("uid")}), "namespace": ""}
        for uuid, why in found.items():
            self._reporter.say(about, "DeviceNotPublished", f"{_called(self._agent.devices[uuid])} is not for slices: {why}.")
        return set(found)

    async def publish(self) -> None:
        """Bring the ResourceSlice to what it should be, and return once the API server has it so.

        Raises
        ------
        NbgpuError
            It could not be written now, or what it depends on is not known yet.
        """
        if not (self._node and self.slices.ready and self.may()):
            raise Unavailable("What this node publishes is not known yet.")
        async with self._lock:
            for _ in range(5):
                there = self.slices.items.get(("", self._name))
                generation = int(there["spec"]["pool"].get("generation", 0)) if there is not None else 0
                self._generation = max(self._generation, generation)
                wanted = self.wanted()
                if there is not None and self._same(there, wanted):
                    return
                self._generation += 1
                wanted["spec"]["pool"]["generation"] = self._generation
                try:
                    await self._write(there, wanted)
                    return
                except Conflict:  # somebody else wrote it: look at what there is
                    with contextlib.suppress(NotFound):
                        self.slices.note(await self._kube.get(f"{self._path}/{self._name}"))
            raise NbgpuError("Somebody else changes the ResourceSlice of this node all the time.", code="kubernetes-conflict")

    async def _write(self, there: Json | None, wanted: Json) -> None:
        if there is None:
            self.slices.note(await self._kube.create(self._path, wanted))
            log.info("published %d devices", len(wanted["spec"]["devices"]))
            return
        meta = {**wanted["metadata"], "resourceVersion": there["metadata"]["resourceVersion"]}
        try:
            self.slices.note(await self._kube.replace(f"{self._path}/{self._name}", {**wanted, "metadata": meta}))
            log.info("published %d devices, generation %d", len(wanted["spec"]["devices"]), wanted["spec"]["pool"]["generation"])
        except NotFound:  # deleted, which the watch has not told yet
            self.slices.note_gone(("", self._name), str(there["metadata"].get("uid")))
            raise Conflict("deleted") from None

    @staticmethod
    def _same(there: Json, wanted: Json) -> bool:
        """Return whether what is there says what is wanted; the API server adds fields of its own."""
        labels = there["metadata"].get("labels", {})
        return (
            _covers(
                there["spec"], {**wanted["spec"], "pool": {**wanted["spec"]["pool"], "generation": there["spec"]["pool"]["generation"]}}
            )
            and all(labels.get(name) == value for name, value in wanted["metadata"]["labels"].items())
            and _covers(there["metadata"].get("ownerReferences", []), wanted["metadata"].get("ownerReferences", []))
            and _taints(there) == _taints(wanted)  # one too many is not the API server's
        )


def _taints(resource_slice: Json) -> list[int]:
    devices = cast("list[Json]", resource_slice["spec"].get("devices") or [])
    return [len(one.get("taints") or ()) for one in devices]


def _covers(there: Any, wanted: Any) -> bool:
    """Return whether `there` says all that `wanted` does; lists must be as long. A quantity is the same in another spelling."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(
            name in there and _covers(cast("Json", there)[name], value) for name, value in cast("Json", wanted).items()
        )
    if isinstance(wanted, list):
        left, right = cast("list[Any]", there), cast("list[Any]", wanted)
        return isinstance(there, list) and len(left) == len(right) and all(_covers(a, b) for a, b in zip(left, right, strict=True))
    return there == wanted or _same_quantity(there, wanted)


def _same_quantity(there: Any, wanted: Any) -> bool:
    from nbgpu.claims import parse_quantity

    try:
        return isinstance(wanted, str) and parse_quantity(there) == parse_quantity(wanted)
    except ValueError:
        return False


def _called(device: Device) -> str:
    return f"GPU {device.index} ({device.uuid})"
