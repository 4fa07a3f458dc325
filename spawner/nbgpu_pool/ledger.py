"""The ledger: where slices really are. On one machine that is the agent, spoken to over its admin socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import httpcore
from pydantic import TypeAdapter

from nbgpu.errors import InvalidValue, NbgpuError, Unavailable
from nbgpu.models import AgentSlice, AgentSlices, Idle, Launch, Slice, read_answer

from .state import Seen, Snapshot

CALL_SECONDS = 10.0
POLL_SECONDS = 10
RETRY_SECONDS = 0.2
RETRY_MOST_SECONDS = 2.0
_SLICE, _SLICES = TypeAdapter(AgentSlice), TypeAdapter(AgentSlices)
_AWAY = httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError


class LedgerRefused(NbgpuError):
    """The ledger says no to a slice: its word is the last one."""

    code = "refused-by-node"
    status = 503


class Ledger(Protocol):
    """What the pool needs of the place where slices are real."""

    who: str
    """Who does not answer while it is away, at the beginning of a sentence."""

    async def prepare(self, wanted: Slice, uid: int | None) -> Launch:
        """Make a slice; idempotent.

        Raises
        ------
        LedgerRefused
            It may not exist.
        Unavailable
            Nobody knows whether it exists.
        """
        ...

    async def adopt(self, slice_id: str, pid: int | None) -> None:
        """Take note that a server carries the slice; idempotent."""
        ...

    async def release(self, slice_id: str) -> bool:
        """Ask a slice back; True when there is none of that id (any more).

        Raises
        ------
        LedgerRefused
            It may not be given back (yet).
        Unavailable
            Nobody knows; ask again.
        """
        ...

    async def resize(self, wanted: Slice, *, only_unused: bool = False) -> Slice | None:
        """Have a running slice's limits changed to those of `wanted`; idempotent. A snapshot tells when they are in force.

        Returns what the slice counts, where it is known by now that it holds more memory than that, which counts until it is free.

        Parameters
        ----------
        only_unused : bool
            Not where it uses more memory than `wanted` leaves it.

        Raises
        ------
        LedgerRefused
            They stay as they are.
        Unavailable
            Nobody knows.
        """
        ...

    async def park(self, slice_id: str, idle_seconds: float) -> None:
        """Have a slice parked that has been idle for so long (docs/idle.md); a snapshot tells when it is.

        Raises
        ------
        LedgerRefused
            It is not parked, and why.
        Unavailable
            Nobody knows.
        """
        ...

    async def restore(self, slice_id: str) -> None:
        """Have a parked slice brought back; idempotent.

        Raises
        ------
        LedgerRefused
            It stays parked for now.
        Unavailable
            Nobody knows; ask again.
        """
        ...

    async def move(self, old: Slice, new: Slice) -> None:
        """Put `new` in the place of `old`, which has no devices yet; idempotent.

        Raises
        ------
        LedgerRefused
            It stays where it is.
        Unavailable
            Nobody knows; ask again.
        """
        ...

    def watch(self, mark: Callable[[], int], fresh: Callable[[], bool]) -> AsyncIterator[Snapshot | Unavailable]:
        """Yield all that there is, at once and at each change; `Unavailable` while the ledger is away.

        `mark` is read before the ledger is asked, for `Snapshot.begun`; `fresh` after each snapshot was taken in: True asks at
        once for another.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class AgentLedger:
    """The agent of this machine.

    Parameters
    ----------
    socket : Path
        The agent's admin socket.
    """

    def __init__(self, socket: Path):
        self.who = "The GPU node"
        self._socket = socket
        # what httpx stands on, and all that a Unix socket needs: with httpx above it a call costs twice as much, and every start has two
        self._agent = httpcore.AsyncConnectionPool(max_connections=100, max_keepalive_connections=20, uds=str(socket))

    async def close(self) -> None:
        """Close the connections."""
        await self._agent.aclose()

    async def prepare(self, wanted: Slice, uid: int | None) -> Launch:
        """`PUT /v1/slices/{slice_id}`."""
        answer = await self._ask("PUT", f"/v1/slices/{wanted.slice_id}", {"slice": wanted.model_dump(mode="json"), "uid": uid})
        if answer.status >= 400:
            raise LedgerRefused(_words(answer), status=409 if answer.status == 409 else 503)
        return Launch.model_validate_json(answer.content)

    async def adopt(self, slice_id: str, pid: int | None) -> None:
        """`POST /v1/slices/{slice_id}/processes`."""
        if pid is None:
            raise InvalidValue("pid", None, "the id of the server's process: on one machine a slice is carried by a process")
        answer = await self._ask("POST", f"/v1/slices/{slice_id}/processes", {"pid": pid})
        if answer.status >= 400:
            raise NbgpuError(_words(answer), code="bind-failed", status=400 if answer.status < 404 else 409)

    async def release(self, slice_id: str) -> bool:
        """`DELETE /v1/slices/{slice_id}`."""
        answer = await self._ask("DELETE", f"/v1/slices/{slice_id}")
        if answer.status >= 400:
            raise Unavailable(_words(answer))
        return bool(json.loads(answer.content)["gone"])

    async def resize(self, wanted: Slice, *, only_unused: bool = False) -> Slice | None:
        """`PATCH /v1/slices/{slice_id}`."""
        first = wanted.devices[0]
        if any((one.memory_bytes, one.compute_milli) != (first.memory_bytes, first.compute_milli) for one in wanted.devices):
            raise LedgerRefused("The agent takes the same limits on each of a slice's GPUs, and these GPUs differ.", status=409)
        limits: dict[str, Any] = {"memory_bytes": first.memory_bytes, "compute_milli": first.compute_milli, "mode": wanted.mode}
        if only_unused:
            limits["only_unused"] = True
        answer = await self._ask("PATCH", f"/v1/slices/{wanted.slice_id}", limits)
        if answer.status >= 400:
            raise LedgerRefused(_words(answer), status=409 if answer.status in (404, 409) else 503)
        found = read_answer(_SLICE, json.loads(answer.content))
        return found.slice if found.lowered is not None else None

    async def park(self, slice_id: str, idle_seconds: float) -> None:
        """`POST /v1/slices/{slice_id}/park`."""
        answer = await self._ask("POST", f"/v1/slices/{slice_id}/park", {"idle_seconds": idle_seconds})
        if answer.status >= 400:
            raise LedgerRefused(_words(answer), status=409)

    async def restore(self, slice_id: str) -> None:
        """`POST /v1/slices/{slice_id}/restore`."""
        answer = await self._ask("POST", f"/v1/slices/{slice_id}/restore")
        if answer.status >= 400:
            raise LedgerRefused(_words(answer), status=409)

    async def move(self, old: Slice, new: Slice) -> None:
        """Nothing moves here: there is no other node."""
        raise LedgerRefused("There is one node only.", status=409)

    async def watch(self, mark: Callable[[], int], fresh: Callable[[], bool]) -> AsyncIterator[Snapshot | Unavailable]:
        """Long-poll `GET /v1/slices`."""
        after: int | None = None
        pause = RETRY_SECONDS
        while True:
            begun = mark()
            try:
                query = "" if after is None else f"?after={after}&wait_seconds={POLL_SECONDS}"
                answer = await self._request("GET", f"/v1/slices{query}", None, POLL_SECONDS + CALL_SECONDS)
                if answer.status >= 400:
                    raise Unavailable(_words(answer))
                found = read_answer(_SLICES, json.loads(answer.content))
            except (*_AWAY, ValueError, Unavailable) as error:
                yield Unavailable(f"The node agent does not answer: {str(error) or type(error).__name__}")
                after = None
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, RETRY_MOST_SECONDS)
                continue
            pause = RETRY_SECONDS
            after = found.generation
            now = time.time()
            seen = [_seen(one, now) for one in found.slices]
            yield Snapshot(begun, found.devices, seen)
            if fresh():
                after = None

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpcore.Response:
        try:
            return await self._request(method, path, body, CALL_SECONDS)
        except _AWAY as error:
            raise Unavailable("The GPU node does not answer at the moment; try again in a few seconds.", code="agent-away") from error

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> httpcore.Response:
        content = b"" if body is None else json.dumps(body).encode()
        headers: dict[bytes | str, bytes | str] = {"Host": "agent", "Content-Type": "application/json", "Content-Length": str(len(content))}
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        return await self._agent.request(method, f"http://agent{path}", headers=headers, content=content, extensions={"timeout": timeout})


def _seen(one: AgentSlice, now: float) -> Seen:
    idle = one.idle or Idle()
    return Seen(
        one.slice,
        one.state,
        max(0.0, now - one.created),
        wanted=one.lowered,
        keeps=one.lowered is not None,
        full=idle.full,
        idle_seconds=idle.idle_seconds,
        unused_seconds=idle.unused_seconds,
        wanted_seconds=idle.wanted_seconds,
        parking=idle.state == "parking",
        used_bytes=one.memory_used_bytes,
    )


def _words(answer: httpcore.Response) -> str:
    try:
        return str(json.loads(answer.content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the node agent answered {answer.status}"
