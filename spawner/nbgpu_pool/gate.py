"""What a replica answers: all while it leads, else only how it is."""

from __future__ import annotations

import json
from collections.abc import Callable

from nbgpu.errors import NbgpuError, Unavailable
from nbgpu.http import App, Receive, Scope, Send, answer_error

from .core import Core
from .front import READS


class Gate:
    """ASGI app in front of the pool's.

    Attributes
    ----------
    app : App, optional
        The pool's, of this term.
    core : Core, optional
        Whose books decide whether it is ready.
    problem : NbgpuError, optional
        Why there can be no pool at the moment, whoever leads.
    """

    def __init__(self, leads: Callable[[], bool], holder: Callable[[], str]):
        self.app: App | None = None
        self.core: Core | None = None
        self.problem: NbgpuError | None = None
        self._leads = leads
        self._holder = holder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/healthz":
            await self._state(send, 200)
        elif scope["path"] == "/readyz":
            await self._state(send, 200 if self._ready() else 503)
        elif self.app is None or not (self._leads() or self._reads(scope)):
            # what only reads is answered from the cache, which says so, until it is known that another leads
            refusal = self._refusal()
            await answer_error(send, refusal.status, refusal.as_json(), {"retry-after": "2"})
        else:
            await self.app(scope, receive, send)

    @staticmethod
    def _reads(scope: Scope) -> bool:
        """Whether it only reads; what is asked back is acted upon."""
        return ((scope["method"], scope["path"]) in READS or scope["method"] == "GET") and scope["path"] != "/v1/asks"

    def _ready(self) -> bool:
        return self.app is not None and self._leads() and self.core is not None and self.core.ready

    def _refusal(self) -> NbgpuError:
        if self.problem is not None:
            return self.problem
        holder = self._holder()
        if holder and self.app is None:
            return Unavailable(f"This replica of the pool does not lead, {holder} does; ask again.", code="not-leader")
        words = "The pool cannot tell whether it leads: the Kubernetes API server does not answer it. It goes on when that does."
        return Unavailable(words, code="not-leader")

    async def _state(self, send: Send, status: int) -> None:
        told: dict[str, object] = {
            "status": "ok",
            "leads": self._leads(),
            "ready": self._ready(),
            "connected": self._leads() and self.core is not None and self.core.connected,
        }
        if self.problem is not None:
            told["problem"] = self.problem.message
        body = json.dumps(told).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
