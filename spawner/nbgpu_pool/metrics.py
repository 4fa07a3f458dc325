"""What Prometheus sees of the pool."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nbgpu.claims import FOREIGN_HUB
from nbgpu.models import GrantState

from .core import Core

_WAITS = (0.1, 1, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
_PLACEMENTS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1)


class Metrics:
    """Counters of one pool."""

    def __init__(self, core: Core):
        self.registry = CollectorRegistry()
        self._waits = Histogram("nbgpu_pool_wait_seconds", "Time from request to grant", buckets=_WAITS, registry=self.registry)
        self._placement = Histogram(
            "nbgpu_pool_placement_seconds", "Time to take a request or to serve the queue", buckets=_PLACEMENTS, registry=self.registry
        )
        self.registry.register(_State(core))

    def waited(self, seconds: float) -> None:
        """Note how long a granted request had waited."""
        self._waits.observe(seconds)

    @contextmanager
    def placement(self) -> Generator[None, None, None]:
        """Time what is done inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._placement.observe(time.perf_counter() - begun)

    def text(self) -> bytes:
        """Return the Prometheus text."""
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, core: Core):
        self._core = core

    def collect(self) -> Iterator[Metric]:
        core = self._core
        states = Counter(entry.state for entry in core.books.entries.values())
        requests = GaugeMetricFamily("nbgpu_pool_requests", "Requests by state", labels=["state"])
        for state in GrantState:
            if state != GrantState.gone:
                requests.add_metric([state.value], states[state])
        yield requests
        yield GaugeMetricFamily(
            "nbgpu_pool_ready", "1 when the books are rebuilt and the ledger answers", value=core.ready and core.connected
        )
        labels = ["node", "uuid", "model"]
        compute = GaugeMetricFamily("nbgpu_pool_device_compute_granted_milli", "Compute granted, 1000 = the whole device", labels=labels)
        memory = GaugeMetricFamily("nbgpu_pool_device_memory_granted_bytes", "Memory granted", labels=labels)
        usable = GaugeMetricFamily("nbgpu_pool_device_memory_usable_bytes", "Memory that slices may hold together", labels=labels)
        for uuid, room in core.books.rooms.items():
            if room.coming:
                continue
            names = [room.device.node, uuid, room.device.model]
            compute.add_metric(names, 1000 - room.free_milli)
            memory.add_metric(names, room.device.usable_bytes - room.free_bytes)
            usable.add_metric(names, room.device.usable_bytes)
        yield from (compute, memory, usable)
        yield from self._foreign()

    def _foreign(self) -> Iterator[Metric]:
        """What claims that the pool did not make hold, by namespace."""
        held: dict[str, list[int]] = {}
        for entry in self._core.books.entries.values():
            owner = entry.request.owner
            if owner.hub == FOREIGN_HUB and entry.adopted:
                sums = held.setdefault(owner.user, [0, 0])
                for _, part in entry.own_parts():
                    sums[0] += part.compute_milli
                    sums[1] += part.memory_bytes
        for number, (name, words) in enumerate((("compute_milli", "Compute"), ("memory_bytes", "Memory"))):
            told = f"{words} held by claims of a namespace's own, which the pool did not make"
            family = GaugeMetricFamily(f"nbgpu_pool_foreign_{name}", told, labels=["namespace"])
            for namespace, sums in held.items():
                family.add_metric([namespace], sums[number])
            yield family
