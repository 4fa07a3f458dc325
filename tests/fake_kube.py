"""A small Kubernetes API server for tests and benchmarks of the client's side: lists in pages, watches with history, preconditions, and
faults on request. It stores what it is sent: no schema, no controllers, no scheduler; whoever tests those needs a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, Any]


class FakeKube:
    """`async with FakeKube() as fake`: serves at `fake.url`.

    Attributes
    ----------
    fault : callable
        Asked with method and path before each call; what it returns (a status) is answered.
    delay_seconds : float
        Before each answer.
    spoil : callable
        What becomes of each list and each line of a watch.
    expire_watches_quietly : bool
        Tell of a too old version inside the watch, as a busy API server does, instead of by the status.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[tuple[str, str], Json]] = {}
        self.history: list[tuple[int, str, str, Json]] = []
        self.compacted = 0
        self._texts: dict[str, dict[str, list[str]]] = {}
        self.version = 100
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.delay_seconds = 0.0
        self.spoil: Callable[[bytes], bytes] = lambda told: told
        self.expire_watches_quietly = False
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.open_watches = 0
        self._drops = 0
        self._changed = asyncio.Event()
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> FakeKube:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Serve, on the port of before if there was one."""
        listening = socket.create_server(("127.0.0.1", self._port))
        self._port = listening.getsockname()[1]
        app = Starlette(routes=[Route("/{path:path}", self._serve, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=0))
        self._server.config.load()
        self._task = asyncio.create_task(self._server.serve([listening]))
        while not self._server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Answer nobody any more; what is stored stays."""
        assert self._server is not None
        assert self._task is not None
        self.drop_watches()
        self._server.should_exit = self._server.force_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    # -- what tests do -------------------------------------------------------------------------------------------------

    def put(self, collection: str, thing: Json, namespace: str = "") -> Json:
        """Create or replace an object of a collection ("/api/v1/configmaps")."""
        thing = copy.deepcopy(thing)
        meta = thing.setdefault("metadata", {})
        if namespace:
            meta["namespace"] = namespace
        key = meta.get("namespace", ""), meta["name"]
        there = self.objects.setdefault(collection, {})
        meta.setdefault("uid", there[key]["metadata"]["uid"] if key in there else str(uuid.uuid4()))
        self._tell("MODIFIED" if key in there else "ADDED", collection, thing)
        there[key] = thing
        return thing

    def remove(self, collection: str, name: str, namespace: str = "") -> None:
        """Delete an object."""
        self._tell("DELETED", collection, copy.deepcopy(self.objects[collection].pop((namespace, name))))

    def compact(self) -> None:
        """Forget the history: watches from before are answered 410."""
        self.compacted = self.version
        self.history.clear()

    def drop_watches(self) -> None:
        """Cut the connection of every open watch."""
        self._drops += 1
        self._wake()

    def _tell(self, kind: str, collection: str, thing: Json) -> None:
        self.version += 1
        self._texts.pop(collection, None)
        thing["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, kind, collection, thing))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    async def _serve(self, http: Request) -> Response:
        self.requests.append((http.method, http.url.path))
        self.tokens.append(http.headers.get("authorization", ""))
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        status = self.fault(http.method, http.url.path)
        if status is not None:
            return _status(status, "the test wants it so")
        if http.url.path == "/version":
            return JSONResponse({"major": "1", "minor": "36"})
        collection, namespace, name = _split(http.url.path)
        if http.method == "GET" and not name:
            if http.query_params.get("watch"):
                return self._watch(http, collection, namespace)
            return self._list(http, collection, namespace)
        if http.query_params.get("dryRun"):
            return JSONResponse(json.loads(await http.body()))
        return self._one(http.method, collection, namespace, name, await http.body())

    def _list(self, http: Request, collection: str, namespace: str) -> Response:
        begin, _, version = http.query_params.get("continue", f"0/{self.version}").partition("/")
        if int(version) < self.compacted:
            return _status(410, "the continue token is too old")
        all_of = self.texts(collection, namespace)
        end = int(begin) + int(http.query_params.get("limit", len(all_of) or 1))
        meta = {"resourceVersion": version, **({"continue": f"{end}/{version}"} if end < len(all_of) else {})}
        body = f'{{"kind": "List", "metadata": {json.dumps(meta)}, "items": [{",".join(all_of[int(begin) : end])}]}}'
        return Response(self.spoil(body.encode()), media_type="application/json")

    def texts(self, collection: str, namespace: str = "") -> list[str]:
        """Return the objects of a collection as JSON; remembered while nothing changes, as pages of a long list come one by one."""
        known = self._texts.setdefault(collection, {})
        if namespace not in known:
            there = sorted(self.objects.get(collection, {}).items())
            known[namespace] = [json.dumps(one) for (space, _), one in there if not namespace or space == namespace]
        return known[namespace]

    def _watch(self, http: Request, collection: str, namespace: str) -> Response:
        version = int(http.query_params["resourceVersion"])
        if version < self.compacted and not self.expire_watches_quietly:
            return _status(410, "too old resource version")
        return StreamingResponse(self._events(version, collection, namespace), media_type="application/json")

    async def _events(self, version: int, collection: str, namespace: str) -> AsyncIterator[bytes | str]:
        drops = self._drops
        self.open_watches += 1
        try:
            while True:
                if version < self.compacted:
                    yield _line("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
                    return
                for at, kind, of, thing in self.history:
                    if at > version and of == collection and (not namespace or thing["metadata"].get("namespace") == namespace):
                        yield self.spoil(_line(kind, thing).encode())
                if self.version > version:
                    version = self.version
                    yield _line("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})
                changed = self._changed
                await changed.wait()
                if self._drops != drops:
                    yield '{"type": "ADDED", "object": {"meta'
                    raise ConnectionError("dropped")
        finally:
            self.open_watches -= 1

    def _one(self, method: str, collection: str, namespace: str, name: str, content: bytes) -> Response:
        there = self.objects.setdefault(collection, {})
        body: Json = json.loads(content) if content else {}
        name = name or body.get("metadata", {}).get("name", "")
        found = there.get((namespace, name))
        if method == "POST":
            if found is not None:
                return _status(409, f"{name} already exists", "AlreadyExists")
            return JSONResponse(self.put(collection, body, namespace), 201)
        if found is None:
            return _status(404, f"{name} not found", "NotFound")
        if method == "GET":
            return JSONResponse(found)
        expected = body.get("preconditions", {}) if method == "DELETE" else body.get("metadata", {})
        if any(expected.get(each) not in (None, found["metadata"][each]) for each in ("uid", "resourceVersion")):
            return _status(409, "not what was expected", "Conflict")
        if method == "DELETE":
            self.remove(collection, name, namespace)
            return _status(200, "deleted", "")
        changed = body if method == "PUT" else _merged(found, body)
        changed["metadata"]["uid"] = found["metadata"]["uid"]
        return JSONResponse(self.put(collection, changed, namespace))


def _split(path: str) -> tuple[str, str, str]:
    """Return collection, namespace and name of a path."""
    parts = path.strip("/").split("/")
    head, rest = (parts[:2], parts[2:]) if parts[0] == "api" else (parts[:3], parts[3:])
    namespace = ""
    if len(rest) >= 3 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    return "/" + "/".join([*head, *rest[:1]]), namespace, rest[1] if len(rest) > 1 else ""


def _merged(old: Json, patch: Json) -> Json:
    new = dict(old)
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        elif isinstance(value, dict) and isinstance(new.get(name), dict):
            new[name] = _merged(new[name], value)
        else:
            new[name] = value
    return new


def _line(kind: str, thing: Json) -> str:
    return json.dumps({"type": kind, "object": thing}) + "\n"


def _status(code: int, message: str, reason: str = "") -> Response:
    return JSONResponse({"kind": "Status", "code": code, "message": message, "reason": reason}, code)
