"""The documented admin API of the agent over a Unix socket, with no GPU and no processes: for faults that a real one cannot be asked for.

Its truth lives in `AgentTruth`, outside the server, so that a test can stop the server (agent away) and start it again.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from nbgpu.models import AgentSlice, AgentSlices, Device, Node, Slice
from nbgpu.quantities import GIB


def device(index: int, node: str = "node-a", model: str = "Simulated H100 80GB", gib: int = 80) -> Device:
    return Device(
        uuid=f"GPU-{node}-{index}", index=index, model=model, node=node, memory_bytes=gib * GIB, reserve_bytes=GIB, simulated=True
    )


@dataclass
class AgentTruth:
    devices: list[Device]
    slices: dict[str, AgentSlice] = field(default_factory=dict)
    generation: int = 1
    delay_seconds: float = 0.0
    fail_next: list[int] = field(default_factory=list)
    """Status codes that the next calls about slices answer with, instead of doing anything."""

    closing: bool = False

    def put(self, wanted: Slice) -> str | None:
        known = self.slices.get(wanted.slice_id)
        if known is not None:
            return None if known.slice == wanted else "another slice of this id exists"
        for part in wanted.devices:
            used = [one for other in self.slices.values() for one in other.slice.devices if one.uuid == part.uuid]
            usable = next(one.usable_bytes for one in self.devices if one.uuid == part.uuid)
            if sum(one.compute_milli for one in used) + part.compute_milli > 1000:
                return "the device has no such share left"
            if sum(one.memory_bytes for one in used) + part.memory_bytes > usable:
                return "the device has no such memory left"
        self._set(AgentSlice(slice=wanted, state="prepared", process_count=0, created=time.time()))
        return None

    def adopt(self, slice_id: str) -> AgentSlice | None:
        known = self.slices.get(slice_id)
        if known is None or known.state == "releasing":
            return None
        self._set(known.model_copy(update={"state": "running", "process_count": 1}))
        return self.slices[slice_id]

    def patch(self, slice_id: str, limits: dict) -> str | None:
        """Other limits, where they fit."""
        known = self.slices.get(slice_id)
        if known is None:
            return "no such slice"
        parts = [part.model_copy(update={key: value for key, value in limits.items() if key != "mode"}) for part in known.slice.devices]
        others = [one for other in self.slices.values() if other is not known for one in other.slice.devices]
        if any(sum(one.compute_milli for one in [*others, part] if one.uuid == part.uuid) > 1000 for part in parts):
            return "the device has no such share left"
        changed = known.slice.model_copy(update={"devices": parts, "mode": limits.get("mode", known.slice.mode)})
        self._set(known.model_copy(update={"slice": changed}))
        return None

    def delete(self, slice_id: str) -> bool:
        known = self.slices.get(slice_id)
        if known is None:
            return True
        if known.state == "prepared":
            self.end(slice_id)
            return True
        self._set(known.model_copy(update={"state": "releasing"}))
        return False

    def end(self, slice_id: str) -> None:
        """The last process is gone."""
        if self.slices.pop(slice_id, None):
            self.generation += 1

    def _set(self, one: AgentSlice) -> None:
        self.slices[one.slice.slice_id] = one
        self.generation += 1


def agent_app(truth: AgentTruth) -> FastAPI:
    app = FastAPI()

    def error(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"code": "fake", "message": message}}, status)

    @app.middleware("http")
    async def faults(request: Request, call_next):
        if request.method in ("PUT", "DELETE", "POST", "PATCH") and truth.fail_next:
            return error(truth.fail_next.pop(0), "asked to fail")
        if request.method in ("PUT", "DELETE", "POST") and truth.delay_seconds:
            await asyncio.sleep(truth.delay_seconds)
        return await call_next(request)

    @app.get("/v1/node")
    async def node() -> Node:
        return Node(node=truth.devices[0].node, simulated=True, driver_version="0", backend="limiter", devices=truth.devices)

    @app.get("/v1/slices")
    async def slices(after: int | None = None, wait_seconds: float = 0) -> AgentSlices:
        deadline = time.monotonic() + wait_seconds
        while after is not None and truth.generation <= after and not truth.closing and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return AgentSlices(generation=truth.generation, slices=list(truth.slices.values()), devices=truth.devices)

    @app.put("/v1/slices/{slice_id}")
    async def put(slice_id: str, request: Request):
        wrong = truth.put(Slice.model_validate((await request.json())["slice"]))
        return error(409, wrong) if wrong else {"env": {"NBGPU_SLICE": slice_id}, "slice_dir": "/x", "socket": "/x/api.sock"}

    @app.post("/v1/slices/{slice_id}/processes")
    async def adopt(slice_id: str):
        return truth.adopt(slice_id) or error(404, "no such slice")

    @app.patch("/v1/slices/{slice_id}")
    async def patch(slice_id: str, request: Request):
        wrong = truth.patch(slice_id, await request.json())
        return error(409, wrong) if wrong else truth.slices[slice_id]

    @app.delete("/v1/slices/{slice_id}")
    async def delete(slice_id: str):
        return {"gone": truth.delete(slice_id)}

    return app


class FakeAgent:
    """Serves a truth at a Unix socket; `stop` and `start` as often as a test wants."""

    def __init__(self, socket: Path, truth: AgentTruth):
        self.socket, self.truth = socket, truth
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        self.truth.closing = False
        config = uvicorn.Config(agent_app(self.truth), uds=str(self.socket), lifespan="off", log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server._serve())
        while not self._server.started:
            assert not self._task.done(), self._task
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self.truth.closing = True
        if self._server and self._task:
            self._server.should_exit = True
            await self._task
        self.socket.unlink(missing_ok=True)
        self._server = self._task = None
