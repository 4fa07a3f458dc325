"""The pool's API as `docs/interfaces.md` has it, with faults on demand: where a test needs a pool that is slow, broken or full."""

from __future__ import annotations

import json
import os
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

GIB = 1024**3
MODEL = "Simulated H100 80GB"


def device(index: int) -> dict[str, Any]:
    return {
        "uuid": f"GPU-{index}", "index": index, "model": MODEL, "node": "here", "memory_bytes": 80 * GIB, "reserve_bytes": 2 * GIB,
        "simulated": True, "healthy": True,
    }  # fmt: skip


class FakePool(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Grants everything, until told otherwise.

    Attributes
    ----------
    full : bool
        New requests are queued; `admit` lets them in.
    small_free : bool
        Though `full`, there is room for a sixth of a GPU.
    refuse : tuple of (status, message), optional
        What POST /v1/requests and /v1/launches answer.
    prepare_refused : str, optional
        The node's words when it refuses what the pool has granted.
    stall_seconds : float
        Every answer takes so long.
    asks : dict
        What is asked back: for each request id (due by the clock of `time.monotonic`, more of the ask).
    grants : dict
        What was asked for, by request id, with its state.
    calls : list
        Method and path of every call.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: Path):
        self.path = path
        self.full = False
        self.small_free = False
        self.refuse: tuple[int, str] | None = None
        self.fail_next: dict[str, int] = {}
        self.prepare_refused: str | None = None
        self.stall_seconds = 0.0
        self.asks: dict[str, tuple[float, dict[str, Any]]] = {}
        self.grants: dict[str, dict[str, Any]] = {}
        self.bound_pids: dict[str, int | None] = {}
        self.availability: list[dict[str, Any]] | None = None
        self.launch_env: dict[str, str] = {"NBGPU_SOCKET": "/nowhere/api.sock"}
        self.calls: list[str] = []
        self.lock = threading.Lock()
        super().__init__(str(path), _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        if self.path.exists():
            os.unlink(self.path)

    def states(self) -> dict[str, str]:
        """State of each owner's last request."""
        with self.lock:
            return {grant["request"]["owner"]["user"]: grant["state"] for grant in self.grants.values()}

    def held(self) -> list[str]:
        """Request ids that hold or wait for something."""
        with self.lock:
            return [name for name, grant in self.grants.items() if grant["state"] != "gone"]

    def admit(self) -> None:
        with self.lock:
            self.full = False
            for grant in self.grants.values():
                if grant["state"] == "queued":
                    self.reserve(grant)

    def reserve(self, grant: dict[str, Any]) -> None:
        request = grant["request"]
        part = {"uuid": "GPU-0", "index": 0, "model": MODEL, "memory_bytes": GIB, "compute_milli": request.get("compute_milli") or 100}
        grant["slice"] = {
            "slice_id": request["request_id"],
            "owner": request["owner"],
            "node": "here",
            "mode": request["mode"],
            "devices": [part],
            "simulated": True,
        }
        grant.update(state="reserved", position=None, wait_seconds=None, expires_seconds=120.0, reason=None)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        parts = path.split("/")[2:]
        if method == "POST" and parts == ["requests"]:
            return self._post(body)
        if method == "POST" and parts == ["launches"]:
            return self._launch(body["request"])
        if parts == ["devices"]:
            return 200, [{"device": device(i), "memory_granted_bytes": 0, "compute_granted_milli": 0, "slices": []} for i in range(2)]
        if parts == ["asks"]:
            return 200, [self._asked(request_id, due, more) for request_id, (due, more) in self.asks.items()]
        if parts == ["availability"]:
            fixed = self.availability or []
            return 200, fixed if len(fixed) == len(body["shapes"]) else [self._available(shape) for shape in body["shapes"]]
        if parts == ["release"]:
            mine = [grant for name, grant in self.grants.items() if name != body.get("except_request_id")]
            mine = [grant for grant in mine if grant["request"]["owner"] == body["owner"] and grant["state"] != "gone"]
            for grant in mine:
                grant["state"] = "gone"
            return 200, mine
        grant = self.grants.get(parts[1])
        if method == "DELETE":
            if grant is None:
                return 204, None
            grant["state"] = "gone"
            return 200, grant
        if grant is None:
            return 404, {"error": {"code": "unknown", "message": "No such request."}}
        if parts[2:] == ["replace"]:
            return self._replace(grant, body)
        if parts[2:] == ["prepare"]:
            return 200, self._prepared()
        if parts[2:] == ["bind"]:
            self.bound_pids[parts[1]] = body["pid"]
            grant["state"] = "bound"
        if parts[2:] == ["resize"]:
            return self._resize(grant, body)
        return 200, grant

    def _resize(self, grant: Any, body: Any) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse[0], {"error": {"code": "quota", "message": self.refuse[1]}}
        for part in grant["slice"]["devices"]:
            part["compute_milli"] = body["compute_milli"] or part["compute_milli"]
            part["memory_bytes"] = body["memory_bytes"] or 78 * GIB * (body["memory_milli"] or 0) // 1000 or part["memory_bytes"]
        return 200, grant

    def _post(self, request: Any) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse[0], {"error": {"code": "refused", "message": self.refuse[1]}}
        grant = self.grants.get(request["request_id"])
        if grant is None:
            grant = self.grants[request["request_id"]] = {"request": request, "state": "queued", "slice": None, "position": 1}
            waiting = sum(other["state"] == "queued" for other in self.grants.values())
            grant.update(position=waiting, wait_seconds=240.0, expires_seconds=None, reason=None)
            if not self.full:
                self.reserve(grant)
        return 200, grant

    def _launch(self, request: Any) -> tuple[int, Any]:
        status, grant = self._post(request)
        if status != 200 or grant["state"] == "queued":
            return status, grant if status != 200 else {"grant": grant, "launch": None}
        if self.prepare_refused:
            grant["state"] = "gone"
            return 503, {"error": {"code": "refused-by-node", "message": self.prepare_refused}}
        return 200, {"grant": grant, "launch": self._prepared()}

    def _replace(self, old: dict[str, Any], request: Any) -> tuple[int, Any]:
        if old["state"] != "queued" or not self.small_free:
            return 409, {"error": {"code": "no-room", "message": "That share is not free any more; you keep your place in the queue."}}
        old["state"] = "gone"
        grant = self.grants[request["request_id"]] = {"request": request, "state": "queued", "slice": None}
        self.reserve(grant)
        return 200, grant

    def _prepared(self) -> dict[str, Any]:
        return {"env": self.launch_env, "slice_dir": "/nowhere", "socket": "/nowhere/api.sock"}

    def _asked(self, request_id: str, due: float, more: dict[str, Any]) -> dict[str, Any]:
        owner = self.grants[request_id]["request"]["owner"] if request_id in self.grants else None
        why = "it uses what is guaranteed to group bio and was lent"
        ask = {"request_id": request_id, "owner": owner, "kind": "guarantee", "idle": True, "reason": why, "needs": "it must be stopped"}
        return {**ask, "due_seconds": due - time.monotonic(), **more}

    def _available(self, shape: Any) -> dict[str, Any]:
        milli = shape.get("memory_milli") or shape.get("compute_milli") or 100
        full = self.full and not (self.small_free and milli <= 167)
        return {
            "state": "wait" if full else "free", "reason": "in use: about 4 minutes" if full else "free now",
            "wait_seconds": None, "memory": {MODEL: 78 * GIB * milli // 1000}, "compute_milli": {MODEL: milli},
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: FakePool  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        pool = self.server
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        time.sleep(pool.stall_seconds)
        with pool.lock:
            pool.calls.append(f"{self.command} {self.path}")
            last = self.path.rsplit("/", 1)[-1]
            if pool.fail_next.get(last):
                pool.fail_next[last] -= 1
                status, answer = 503, {"error": {"code": "unavailable", "message": "The pool is starting."}}
            else:
                status, answer = pool.answer(self.command, self.path.split("?")[0], body)
        data = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _answer
