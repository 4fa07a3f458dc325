"""Who speaks: roles by socket or bearer token. Tokens are compared in constant time and never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from nbgpu.errors import InvalidValue, NbgpuError

Role = Literal["hub", "agent", "read"]


@dataclass(frozen=True)
class Principal:
    """Who speaks."""

    role: Role
    hub: str | None = None
    """The only hub it may speak for; None with role ``hub``: any (the Unix socket)."""
    namespaces: tuple[str, ...] | None = None
    """Patterns of the Kubernetes namespaces where its servers may run; None on one machine, where there are none."""

    def must_speak_for(self, hub: str) -> None:
        """Raise 403 unless it may act for servers of `hub`."""
        self.must_be_hub()
        if self.hub is not None and not hmac.compare_digest(self.hub.encode(), hub.encode()):
            raise NbgpuError(f"This token speaks for another hub than {hub!r}.", code="forbidden", status=403, field="owner.hub")

    def must_run_in(self, namespace: str | None) -> None:
        """Raise unless servers may run in `namespace`: 400 where none is named, 403 where it is not theirs."""
        if self.namespaces is None:
            return
        if namespace is None:
            raise InvalidValue("namespace", None, "the Kubernetes namespace of the server's pod")
        if not any(fnmatchcase(namespace, pattern) for pattern in self.namespaces):
            told = f"This token is not for servers in namespace {namespace!r}; the admin's hubs.serverNamespaces says which."
            raise NbgpuError(told, code="forbidden", status=403, field="namespace")

    def must_be_hub(self) -> None:
        """Raise 403 for roles that only read."""
        if self.role != "hub":
            raise NbgpuError(f"The role {self.role!r} may only read.", code="forbidden", status=403)

    def sees(self, hub: str) -> bool:
        """Whether it may see the requests of `hub`."""
        return self.hub is None or self.hub == hub


ANY_HUB = Principal("hub")
"""Who can open the Unix socket."""


@dataclass(frozen=True)
class Token:
    """A secret and whom it stands for."""

    secret: str = field(repr=False)
    principal: Principal


class Guard:
    """Tells who speaks by the ``Authorization`` header."""

    def __init__(self, tokens: Sequence[Token]):
        self._known = [(hashlib.sha256(token.secret.encode()).digest(), token.principal) for token in tokens]

    def principal(self, authorization: str | None) -> Principal:
        """Return who speaks.

        Raises
        ------
        NbgpuError
            401: no token, or none that is known here.
        """
        kind, _, secret = (authorization or "").partition(" ")
        given = hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).digest()
        found: Principal | None = None
        for digest, principal in self._known:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(digest, given):
                found = principal
        if found is None or kind.lower() not in ("bearer", "token"):
            raise NbgpuError("This address needs a bearer token that the pool knows.", code="unauthorized", status=401)
        return found
