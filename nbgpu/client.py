"""The APIs of pool, agent and slice, called over their Unix sockets with the standard library alone.

For programs that may wait for an answer (the command line, tests, the pool calling the agent). `docs/interfaces.md` has the routes.
Each call is one connection, so that a restart of the other side needs no care.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from .errors import NbgpuError, Unavailable
from .models import (
    AgentSlice,
    AgentSlices,
    DeviceBooks,
    Event,
    Grant,
    KernelAway,
    KernelLimit,
    Launch,
    Node,
    Owner,
    Request,
    Resize,
    Slice,
    Usage,
    read_answer,
)
from .words import counted

TIMEOUT_SECONDS = 10.0
_MAX_ANSWER_BYTES = 64 * 1024**2
_T = TypeVar("_T")


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket."""

    def __init__(self, path: str, timeout_seconds: float):
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """One API behind one socket.

    Parameters
    ----------
    socket_path : Path or str
        Where the API listens.
    name : str
        What it is called in errors: ``agent``, ``pool``.
    timeout_seconds : float
        How long an answer may take, beyond a time that the call asks it to wait.
    """

    def __init__(self, socket_path: Path | str, name: str, timeout_seconds: float = TIMEOUT_SECONDS):
        self.socket_path = str(socket_path)
        self.name = name
        self.timeout_seconds = timeout_seconds

    def call(self, method: str, path: str, body: object = None, *, wait_seconds: float = 0) -> Any:
        """Send one request and return the decoded JSON answer, None when there is none.

        Raises
        ------
        Unavailable
            Nobody answers at the socket, or what answers is not this API.
        NbgpuError
            The API refused, in its own words, with its own code and status.
        """
        connection = _Connection(self.socket_path, self.timeout_seconds + wait_seconds)
        try:
            response = self._send(connection, method, path, body)
            data = response.read(_MAX_ANSWER_BYTES)
            if response.length:  # who answers was killed meanwhile; read(limit) does not tell
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from error
        finally:
            connection.close()
        return self._decode(response.status, data)

    def ask(self, kind: type[_T], method: str, path: str, body: object = None, *, wait_seconds: float = 0) -> _T:
        """Return the answer of :meth:`call` as a value of the model `kind`."""
        answer = self.call(method, path, body, wait_seconds=wait_seconds)
        try:
            return read_answer(TypeAdapter(kind), answer)
        except ValidationError as error:
            raise Unavailable(
                f"The {self.name} at {self.socket_path} answered something else than expected "
                f"({counted(error.error_count(), 'difference')}): it is of another version. Restart it.",
                code="version",
            ) from error

    def stream(self, path: str, *, silence_seconds: float = 60) -> Iterator[tuple[str, Any]]:
        """Yield server-sent events as (name, decoded data) until the other side ends the stream."""
        connection = _Connection(self.socket_path, silence_seconds)
        try:
            response = self._send(connection, "GET", path, None)
            if response.status >= 300:
                self._decode(response.status, response.read(_MAX_ANSWER_BYTES))
            event, data = "message", ""
            for raw in response:
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                if not line and data:
                    yield event, json.loads(data)
                    event, data = "message", ""
                elif line.startswith("event:"):
                    event = line[6:].strip()
                elif line.startswith("data:"):
                    data += line[5:].strip()
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise self._away(error) from error
        finally:
            connection.close()

    def healthy(self) -> bool:
        """Return whether it answers that it is well."""
        try:
            self.call("GET", "/healthz")
        except NbgpuError:
            return False
        return True

    def _send(self, connection: _Connection, method: str, path: str, body: object) -> http.client.HTTPResponse:
        data, headers = None, {"Accept": "application/json"}
        if body is not None:
            value = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
            data, headers["Content-Type"] = json.dumps(value).encode(), "application/json"
        connection.request(method, path, data, headers)
        return connection.getresponse()

    def _away(self, error: BaseException) -> Unavailable:
        remedy = "`nbgpu doctor` says more."
        if isinstance(error, FileNotFoundError):
            return Unavailable(f"The {self.name} is not running: there is no {self.socket_path}. {remedy}", code="away")
        if isinstance(error, PermissionError):
            return Unavailable(f"You may not speak to the {self.name}: {self.socket_path} belongs to another user.", code="forbidden")
        if isinstance(error, ConnectionRefusedError):
            return Unavailable(f"The {self.name} is not running: nobody listens at {self.socket_path}. {remedy}", code="away")
        if isinstance(error, TimeoutError):
            return Unavailable(f"The {self.name} does not answer within {self.timeout_seconds:g} s. {remedy}", code="slow")
        return Unavailable(f"The {self.name} at {self.socket_path} broke off ({error or type(error).__name__}). Try again.", code="away")

    def _decode(self, status: int, data: bytes) -> Any:
        try:
            answer = json.loads(data) if data.strip() else None
        except (ValueError, RecursionError):
            answer = None if status < 300 else data.decode("utf-8", "replace")
        if status < 300:
            return answer
        error = answer.get("error") if isinstance(answer, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(error, dict) and isinstance(error.get("message"), str):  # pyright: ignore[reportUnknownMemberType]
            known: dict[str, Any] = error  # pyright: ignore[reportUnknownVariableType]
            raise NbgpuError(known["message"], code=str(known.get("code", "error")), status=status, field=known.get("field"))
        raise NbgpuError(f"The {self.name} answered with status {status}.", status=status)


class AgentClient(Client):
    """The agent's admin API."""

    def __init__(self, socket_path: Path | str, timeout_seconds: float = TIMEOUT_SECONDS):
        super().__init__(socket_path, "agent", timeout_seconds)

    def node(self) -> Node:
        """Return what the agent serves."""
        return self.ask(Node, "GET", "/v1/node")

    def slices(self, after: int | None = None, wait_seconds: float = 0) -> AgentSlices:
        """Return all slices; with `after`, once the generation is above it or `wait_seconds` (at most 30) are over."""
        query = "" if after is None else f"?after={after}&wait_seconds={wait_seconds:g}"
        return self.ask(AgentSlices, "GET", f"/v1/slices{query}", wait_seconds=wait_seconds)

    def prepare(self, piece: Slice, uid: int | None) -> Launch:
        """Make a slice whose files `uid` may use (None: the agent's own user)."""
        return self.ask(Launch, "PUT", f"/v1/slices/{piece.slice_id}", {"slice": piece.model_dump(mode="json"), "uid": uid})

    def launch(self, slice_id: str) -> Launch:
        """Return how to start a process in a slice."""
        return self.ask(Launch, "GET", f"/v1/slices/{slice_id}/launch")

    def adopt(self, slice_id: str, pid: int) -> AgentSlice:
        """Put a running process and its descendants into a slice."""
        return self.ask(AgentSlice, "POST", f"/v1/slices/{slice_id}/processes", {"pid": pid})

    def release(self, slice_id: str) -> bool:
        """Ask for the end of a slice; return whether it is gone already."""
        answer = self.call("DELETE", f"/v1/slices/{slice_id}")
        return answer is None or bool(answer.get("gone", True))

    def set_limits(self, slice_id: str, **limits: int | str) -> AgentSlice:
        """Set `memory_bytes`, `compute_milli` or `mode` of a slice, on each of its devices."""
        return self.ask(AgentSlice, "PATCH", f"/v1/slices/{slice_id}", limits)

    def usage(self, slice_id: str) -> Usage:
        """Return the use of one slice."""
        return self.ask(Usage, "GET", f"/v1/slices/{slice_id}/usage")

    def all_usage(self) -> list[Usage]:
        """Return the use of all slices."""
        return self.ask(list[Usage], "GET", "/v1/usage")

    def set_kernel_limit(self, slice_id: str, kernel_id: str, limit: KernelLimit) -> KernelLimit:
        """Set a kernel's limit inside a slice; both None removes it."""
        return self.ask(KernelLimit, "PUT", f"/v1/slices/{slice_id}/kernels/{kernel_id}", limit)

    def resume(self, slice_id: str, pid: int | None = None) -> None:
        """Let a suspended process of a slice, or (None) all of them, go on."""
        self.call("POST", f"/v1/slices/{slice_id}/resume", {"pid": pid})

    def events(self, after: int = 0, wait_seconds: float = 0, slice_id: str | None = None) -> list[Event]:
        """Return the events after the one numbered `after`; those of one slice, which may have ended, without waiting for any."""
        query = f"after={after}&wait_seconds={wait_seconds:g}" if slice_id is None else f"after={after}&slice_id={slice_id}"
        return self.ask(list[Event], "GET", f"/v1/events?{query}", wait_seconds=wait_seconds)


class SliceClient(Client):
    """The API of the slice that this process lives in."""

    def __init__(self, socket_path: Path | str, timeout_seconds: float = TIMEOUT_SECONDS):
        super().__init__(socket_path, "agent", timeout_seconds)

    def slice(self) -> Slice:
        """Return what this server holds."""
        return self.ask(Slice, "GET", "/v1/slice")

    def usage(self) -> Usage:
        """Return the slice's use."""
        return self.ask(Usage, "GET", "/v1/usage")

    def kernel_limits(self) -> dict[str, KernelLimit]:
        """Return the limits of kernels that have one."""
        return self.ask(dict[str, KernelLimit], "GET", "/v1/kernels")

    def set_kernel_limit(self, kernel_id: str, limit: KernelLimit) -> KernelLimit:
        """Set a kernel's limit; both None removes it."""
        return self.ask(KernelLimit, "PUT", f"/v1/kernels/{kernel_id}", limit)

    def move_kernel(self, kernel_id: str, where: str) -> KernelAway | None:
        """Begin to move a kernel's GPU memory to the host's (``suspend``) or back (``resume``); return where it is; None: on the GPU."""
        answer = self.call("POST", f"/v1/kernels/{kernel_id}/{where}")
        return None if answer is None else read_answer(TypeAdapter(KernelAway), answer)

    def resume(self, pid: int | None = None) -> None:
        """Let a suspended process, or (None) all of them, go on; an error where only an administrator may."""
        self.call("POST", "/v1/resume", {"pid": pid})

    def events(self, after: int = 0, wait_seconds: float = 0) -> list[Event]:
        """Return this slice's events after the one numbered `after`."""
        return self.ask(list[Event], "GET", f"/v1/events?after={after}&wait_seconds={wait_seconds:g}", wait_seconds=wait_seconds)


class PoolClient(Client):
    """The pool's API, as who can open its socket: role *hub*."""

    def __init__(self, socket_path: Path | str, timeout_seconds: float = TIMEOUT_SECONDS):
        super().__init__(socket_path, "pool", timeout_seconds)

    def acquire(self, request: Request) -> Grant:
        """Ask for a slice; asking again with the same request id returns the same grant."""
        return self.ask(Grant, "POST", "/v1/requests", request)

    def grant(self, request_id: str) -> Grant:
        """Return what became of a request."""
        return self.ask(Grant, "GET", f"/v1/requests/{request_id}")

    def grant_events(self, request_id: str) -> Iterator[Grant]:
        """Yield the grant at each change until it is no longer queued."""
        for name, data in self.stream(f"/v1/requests/{request_id}/events"):
            if name == "grant":
                yield read_answer(TypeAdapter(Grant), data)

    def cancel(self, request_id: str) -> Grant | None:
        """Give a request back, whatever its state; None when the pool does not know it."""
        answer = self.call("DELETE", f"/v1/requests/{request_id}")
        return None if answer is None else read_answer(TypeAdapter(Grant), answer)

    def renew(self, request_id: str) -> Grant:
        """Start a reservation's time again."""
        return self.ask(Grant, "POST", f"/v1/requests/{request_id}/renew")

    def prepare(self, request_id: str, uid: int | None) -> Launch:
        """Make the slice on this machine."""
        return self.ask(Launch, "POST", f"/v1/requests/{request_id}/prepare", {"uid": uid})

    def bind(self, request_id: str, pid: int | None) -> Grant:
        """Say that a process carries the grant."""
        return self.ask(Grant, "POST", f"/v1/requests/{request_id}/bind", {"pid": pid})

    def resize(self, request_id: str, wanted: Resize) -> Grant:
        """Give a running slice other limits."""
        return self.ask(Grant, "POST", f"/v1/requests/{request_id}/resize", wanted.model_dump(mode="json"))

    def release(self, owner: Owner) -> list[Grant]:
        """Give back all that an owner holds or waits for."""
        return self.ask(list[Grant], "POST", "/v1/release", {"owner": owner.model_dump(mode="json")})

    def grants(self) -> list[Grant]:
        """Return all requests that the pool knows."""
        return self.ask(list[Grant], "GET", "/v1/requests")

    def devices(self) -> list[DeviceBooks]:
        """Return what the pool has given of each device."""
        return self.ask(list[DeviceBooks], "GET", "/v1/devices")
