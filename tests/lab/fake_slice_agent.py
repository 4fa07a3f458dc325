"""A slice's API on a Unix socket, as a fake: for faults that a real agent does not show on demand.

``python fake_slice_agent.py SOCKET`` serves a lively slice by hand.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

GIB = 1024**3
UUID = "GPU-11111111-2222-3333-4444-555555555555"


class FakeAgent:
    """Answers GET usage, history, kernels, events and PUT kernels; counts what it was asked."""

    def __init__(self, socket_path: str, *, memory_limit_bytes: int = 20 * GIB, compute_milli: int = 250):
        self.socket_path = socket_path
        self.memory_limit_bytes = memory_limit_bytes
        self.compute_milli = compute_milli
        self.used_bytes = 3 * GIB
        self.used_milli = 100
        self.limits: dict[str, dict[str, int | None]] = {}
        self.kernels: dict[str | None, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.suspended: list[dict[str, Any]] = []
        self.may_resume = True
        self.away: dict[str, dict[str, Any]] = {}
        """Kernels whose memory is in the host's."""
        self.may_suspend = False
        self.delay_seconds = 0.0
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.socket_path)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()

    def count(self, path: str) -> int:
        return sum(asked.split(" ")[1].startswith(path) for asked in self.asked)

    def tell(self, kind: str, message: str, *, kernel_id: str | None = None, level: str = "warning") -> None:
        last = self.events[-1]["id"] if self.events else 0
        event = {"id": last + 1, "time": time.time(), "slice_id": "fakeslice", "kernel_id": kernel_id, "kind": kind}
        self.events.append({**event, "level": level, "message": message, "data": {}})
        self._news.set()

    def kernel(self, kernel_id: str | None, used_bytes: int, *, milli: int = 0, refusals: int = 0) -> None:
        """Let a kernel hold `used_bytes`."""
        peak = max(used_bytes, self.kernels.get(kernel_id, {}).get("peak", 0))
        self.kernels[kernel_id] = {"used": used_bytes, "peak": peak, "milli": milli, "refusals": refusals}

    def usage(self) -> dict[str, Any]:
        device = {
            "uuid": UUID, "index": 0, "model": "Simulated H100 80GB", "memory_limit_bytes": self.memory_limit_bytes,
            "memory_used_bytes": self.used_bytes, "compute_limit_milli": self.compute_milli, "compute_used_milli": self.used_milli,
            "utilization_percent": min(100, self.used_milli * 100 // self.compute_milli),
        }  # fmt: skip
        slice_ = {"version": 1, "slice_id": "fakeslice", "mode": "burst", "backend": "limiter", "simulated": True}
        slice_["may_suspend"] = self.may_suspend
        slice_ |= {"suspended": self.suspended, "may_resume": self.may_resume}
        return {**slice_, "time": time.time(), "devices": [device], "kernels": [self._kernel(kernel_id) for kernel_id in self.kernels]}

    def suspend(self, pid: int, kernel_id: str | None) -> None:
        """Let a process of a kernel be suspended."""
        reason = "it used the GPU (3 GiB) without nbgpu's limiter"
        what = {"pid": pid, "kernel_id": kernel_id, "kind": "unlimited", "how": "lock", "since": time.time(), "reason": reason}
        self.suspended.append(what)

    def _kernel(self, kernel_id: str | None) -> dict[str, Any]:
        held = self.kernels[kernel_id]
        limit = self.limits.get(kernel_id or "", {"memory_bytes": None, "compute_milli": None})
        device = {"uuid": UUID, "memory_used_bytes": held["used"], "memory_peak_bytes": held["peak"], "compute_used_milli": held["milli"]}
        counts = {"refusals": held["refusals"], "launches": 5, "idle_seconds": 1.5}
        away = self.away.get(kernel_id or "")
        if away is not None:
            device["memory_used_bytes"] = 0
        return {"kernel_id": kernel_id, "pids": [4711], "limit": limit, "devices": [device], **counts, "away": away}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *headers = head.split("\r\n")
            method, target, _ = line.split(" ")
            length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length")), 0)
            body = json.loads(await reader.readexactly(length)) if length else None
            self.asked.append(f"{method} {target}")
            await asyncio.sleep(self.delay_seconds)
            status, answer = await self._answer(method, target, body)
            data = json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if method == "PUT" and url.path.startswith("/v1/kernels/"):
            return self._limit(url.path.rsplit("/", 1)[1], body)
        if method == "POST" and url.path.startswith("/v1/kernels/"):
            return self._move(*url.path.split("/")[3:])
        if (method, url.path) == ("POST", "/v1/resume"):
            if not self.may_resume:
                return 403, {"error": {"code": "forbidden", "message": "Only an administrator may let a suspended process go on here."}}
            self.suspended = [one for one in self.suspended if one["pid"] != body["pid"]]
            return 200, {"suspended": self.suspended}
        if url.path == "/v1/usage":
            return 200, self.usage()
        if url.path == "/v1/history":
            return 200, self._history(int(query["seconds"]))
        if url.path == "/v1/kernels":
            return 200, self.limits
        if url.path == "/v1/events":
            return 200, await self._events(int(query["after"]), float(query["wait_seconds"]))
        return 404, {"error": {"code": "not-found", "message": "no such route"}}

    def _move(self, kernel_id: str, where: str) -> tuple[int, Any]:
        if where == "resume" and kernel_id not in self.away:
            return 404, {"error": {"code": "not-found", "message": f"Notebook kernel {kernel_id} is not suspended."}}
        if where == "resume":
            return 200, {**self.away.pop(kernel_id), "phase": "restoring"}
        held = {"phase": "parked", "memory_bytes": self.kernels[kernel_id]["used"], "since": time.time(), "wanted_seconds": None}
        self.away[kernel_id] = held
        return 200, held

    def _limit(self, kernel_id: str, body: dict[str, int | None]) -> tuple[int, Any]:
        if (body["memory_bytes"] or 0) > self.memory_limit_bytes:
            message = f"memory_bytes is {body['memory_bytes']}; it must be at most the slice's {self.memory_limit_bytes}."
            return 400, {"error": {"code": "invalid", "message": message, "field": "memory_bytes"}}
        self.limits[kernel_id] = body
        if body == {"memory_bytes": None, "compute_milli": None}:
            del self.limits[kernel_id]
        return 200, body

    async def _events(self, after: int, wait_seconds: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + wait_seconds
        while not (events := [event for event in self.events if event["id"] > after]):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return []
        return events

    def _history(self, seconds: int) -> dict[str, Any]:
        now = int(time.time())
        interval = 1 if seconds <= 600 else 10
        times = list(range(now - seconds, now, interval))
        memory = [int(self.used_bytes * (0.6 + 0.4 * math.sin(t / 40))) for t in times]
        compute = [int(self.used_milli * (0.6 + 0.4 * math.sin(t / 15))) for t in times]
        return {
            "interval_seconds": interval,
            "time": times,
            "devices": {UUID: {"memory_used_bytes": memory, "compute_used_milli": compute}},
        }


async def _by_hand(socket_path: str) -> None:
    agent = FakeAgent(socket_path)
    await agent.start()
    while True:
        agent.used_bytes = int((11 + 6 * math.sin(time.time() / 30)) * GIB)
        agent.used_milli = int(125 + 100 * math.sin(time.time() / 7))
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(_by_hand(sys.argv[1]))
