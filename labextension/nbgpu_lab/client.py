"""Asks the node agent about this server's slice, over the slice's own Unix socket (``$NBGPU_SOCKET``)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from nbgpu.errors import NbgpuError, Unavailable

_MAX_ANSWER_BYTES = 8 * 1024**2


class SliceClient:
    """A small HTTP client of one slice's API; one connection a request, so that an agent's restart needs no care.

    Parameters
    ----------
    socket_path : str
        Path of the slice's ``api.sock``.
    timeout_seconds : float
        How long an answer may take, beyond the time that a long poll asked for.
    """

    def __init__(self, socket_path: str, timeout_seconds: float = 2.0):
        self.socket_path = socket_path
        self.timeout_seconds = timeout_seconds

    async def get(self, path: str, *, wait_seconds: float = 0) -> Any:
        """Return the JSON answer of ``GET path``; see :meth:`request` for the errors."""
        return await self.request("GET", path, wait_seconds=wait_seconds)

    async def put(self, path: str, body: object) -> Any:
        """Return the JSON answer of ``PUT path``; see :meth:`request` for the errors."""
        return await self.request("PUT", path, body)

    async def post(self, path: str, body: object) -> Any:
        """Return the JSON answer of ``POST path``; see :meth:`request` for the errors."""
        return await self.request("POST", path, body)

    async def request(self, method: str, path: str, body: object = None, *, wait_seconds: float = 0) -> Any:
        """Send one request and return the decoded answer.

        Raises
        ------
        Unavailable
            The agent is away, too slow, or answered something that is not ours.
        NbgpuError
            The agent said no, in its own words and with its own status.
        """
        try:
            status, payload = await asyncio.wait_for(self._exchange(method, path, body), self.timeout_seconds + wait_seconds)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, RecursionError) as error:
            raise Unavailable(
                f"The GPU's node agent does not answer ({type(error).__name__}). Limits stay in force; try again in a moment."
            ) from error
        if 200 <= status < 300:
            return payload
        raise _refusal(status, payload)

    async def _exchange(self, method: str, path: str, body: object) -> tuple[int, Any]:
        reader, writer = await asyncio.open_unix_connection(self.socket_path)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            kind = "" if body is None else "Content-Type: application/json\r\n"
            head = f"{method} {path} HTTP/1.0\r\nHost: slice\r\nAccept: application/json\r\n{kind}Content-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode("latin-1") + data)
            await writer.drain()
            return await _read_answer(reader)
        finally:
            writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Read one answer; HTTP/1.0 was asked for, so the body has a length or ends with the connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, status, *_ = head[0].split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError("not an HTTP answer")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if headers.get("transfer-encoding", "identity").lower() != "identity":
        raise ValueError("chunked answer to HTTP/1.0")
    if "content-length" in headers:
        length = int(headers["content-length"])
        if not 0 <= length <= _MAX_ANSWER_BYTES:
            raise ValueError("answer too long")
        body = await reader.readexactly(length)
    else:
        body = await reader.read(_MAX_ANSWER_BYTES)
    return int(status), json.loads(body) if body else None


def _refusal(status: int, payload: Any) -> NbgpuError:
    error = payload.get("error") if isinstance(payload, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return Unavailable(f"The GPU's node agent answered with status {status}. Try again in a moment.")
    field = error.get("field")
    return NbgpuError(
        error["message"], code=str(error.get("code", "error")), status=status, field=field if isinstance(field, str) else None
    )
