"""Prometheus metrics, made from the agent's state at each scrape."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from nbgpu import __version__

from .agent import Agent
from .http import Bounds, Door
from .monitor import Monitor

PAGE_BOUNDS = Bounds(connections=32, body_bytes=1024, requests_per_second=20)
DEVICE = ["uuid", "index", "model"]
SLICE = ["slice_id", "user", "server", "hub"]


class Metrics:
    """A registry of its own with one collector: the agent."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, agent: Agent, monitor: Monitor):
        self._agent = agent
        self._monitor = monitor
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # pyright: ignore[reportArgumentType]

    def text(self) -> str:
        """Return the page that Prometheus reads."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, as prometheus-client asks for them."""
        settings = self._agent.settings
        labels = {"version": __version__, "node": settings.node, "driver_version": settings.driver_version}
        labels |= {"backend": settings.backend, "simulated": str(settings.simulated).lower()}
        yield InfoMetricFamily("nbgpu_agent", "What this agent is", labels)
        yield from self._devices()
        yield from self._slices()
        events = CounterMetricFamily("nbgpu_events", "Events by kind", labels=["kind"])
        for kind, count in self._agent.events.counts.items():
            events.add_metric([kind], count)
        yield events
        actions = CounterMetricFamily("nbgpu_watchdog_actions", "What the watchdog did, by the kind of finding", labels=["kind", "action"])
        for (kind, action), count in self._agent.actions.items():
            actions.add_metric([kind, action], count)
        yield actions
        scheduler = CounterMetricFamily("nbgpu_scheduler_cpu_seconds", "CPU time of the GPU-time scheduler's thread")
        scheduler.add_metric([], self._agent.turns.cpu_seconds())
        yield scheduler

    def _devices(self) -> Iterator[Metric]:
        usable = GaugeMetricFamily("nbgpu_device_usable_bytes", "Memory that slices may hold: memory minus reserve", labels=DEVICE)
        used = GaugeMetricFamily("nbgpu_device_memory_used_bytes", "Memory in use on the device, by NVML", labels=DEVICE)
        granted = GaugeMetricFamily(
            "nbgpu_device_memory_granted_bytes",
            "Memory that slices count: their limits, and what they hold above lowered ones",
            labels=DEVICE,
        )
        compute = GaugeMetricFamily("nbgpu_device_compute_granted_milli", "Sum of the slices' compute shares", labels=DEVICE)
        healthy = GaugeMetricFamily("nbgpu_device_healthy", "1 when the device answers", labels=DEVICE)
        for device in self._agent.devices.values():
            names = [device.uuid, str(device.index), device.model]
            parts = [part for live in self._agent.slices.values() for part in live.slice.devices if part.uuid == device.uuid]
            sample = self._monitor.samples.get(device.uuid)
            usable.add_metric(names, device.usable_bytes)
            used.add_metric(names, sample.used_bytes if sample is not None else 0)
            granted.add_metric(names, sum(part.memory_bytes for part in parts))
            compute.add_metric(names, sum(part.compute_milli for part in parts))
            healthy.add_metric(names, int(device.healthy))
        yield from (usable, used, granted, compute, healthy)

    def _slices(self) -> Iterator[Metric]:
        labels = [*SLICE, "uuid"]
        limit = GaugeMetricFamily("nbgpu_slice_memory_limit_bytes", "Memory limit of a slice on a device", labels=labels)
        used = GaugeMetricFamily("nbgpu_slice_memory_used_bytes", "Memory that a slice uses on a device", labels=labels)
        share = GaugeMetricFamily("nbgpu_slice_compute_limit_milli", "Share of a device's time, 1000 = all", labels=labels)
        compute = GaugeMetricFamily("nbgpu_slice_compute_used_milli", "Share of a device's time used in the last second", labels=labels)
        busy = CounterMetricFamily("nbgpu_slice_busy_seconds", "GPU time that a slice used on a device", labels=labels)
        refusals = CounterMetricFamily("nbgpu_slice_refusals", "Allocations refused", labels=SLICE)
        processes = GaugeMetricFamily("nbgpu_slice_processes", "Processes of a slice", labels=SLICE)
        suspended = GaugeMetricFamily("nbgpu_slice_suspended_processes", "Processes that the watchdog has stopped", labels=SLICE)
        driver = GaugeMetricFamily("nbgpu_slice_driver_limited", "1 when the driver too holds a slice's memory", labels=SLICE)
        parked = GaugeMetricFamily("nbgpu_slice_parked_bytes", "GPU memory of an idle slice that was moved to the host", labels=SLICE)
        aside = GaugeMetricFamily(
            "nbgpu_slice_suspended_kernel_bytes", "GPU memory of kernels that their user moved to the host", labels=SLICE
        )
        for live in list(self._agent.slices.values()):
            owner = live.slice.owner
            names = [live.id, owner.user, owner.server, owner.hub]
            for device in live.usage().devices:
                on_device = [*names, device.uuid]
                limit.add_metric(on_device, device.memory_limit_bytes)
                used.add_metric(on_device, device.memory_used_bytes)
                share.add_metric(on_device, device.compute_limit_milli)
                compute.add_metric(on_device, device.compute_used_milli)
                busy.add_metric(on_device, live.busy_seconds.get(device.uuid, 0.0))
            refusals.add_metric(names, live.refusals)
            processes.add_metric(names, len(live.members()))
            suspended.add_metric(names, sum(not one.excused for one in live.record.suspended))
            driver.add_metric(names, int(live.backend == "driver"))
            away = live.record.parked
            parked.add_metric(names, away.memory_bytes if away is not None and away.phase == "parked" else 0)
            there = [one for one in live.record.kernels_away.values() if one.phase == "parked"]
            aside.add_metric(names, sum(one.memory_bytes for one in there))
        yield from (limit, used, share, compute, busy, refusals, processes, suspended, driver, parked, aside)


class MetricsPage:
    """``/metrics`` and ``/healthz`` by TCP, for scrapers and probes: nothing else of the agent is there.

    Parameters
    ----------
    health_only : bool
        Tell nobody who uses what: whoever reaches the port may ask.

    Attributes
    ----------
    metrics : Metrics, optional
        What to tell; nothing yet while the agent starts.
    ready : callable
        Whether this agent does its work, or could at once if the one before it ended.
    """

    def __init__(self, listener: socket.socket | None, health_only: bool = False):
        self._health_only = health_only
        self.metrics: Metrics | None = None
        self.ready: Callable[[], bool] = lambda: self.metrics is not None
        self._door = Door(listener, self._answer, {}, PAGE_BOUNDS) if listener is not None else None

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Be the ASGI app."""
        off = "Metrics are off here: the chart's agent.metrics.enabled turns them on, or leave out --health-only."
        hint = "Try /metrics." if not self._health_only else off if scope["path"] == "/metrics" else "Try /healthz."
        status, kind, text = 404, "application/json", json.dumps({"error": {"code": "not-found", "message": hint}})
        if scope["method"] not in ("GET", "HEAD"):
            status = 405
        elif scope["path"] == "/healthz":
            status, text = (200, '{"status": "ok"}') if self.ready() else (503, '{"status": "starting"}')
        elif scope["path"] == "/metrics" and not self._health_only:
            status, kind, text = (200, Metrics.content_type, self.metrics.text()) if self.metrics is not None else (503, "text/plain", "")
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(text.encode())).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def close(self) -> None:
        """Stop to listen."""
        if self._door is not None:
            self._door.close()
