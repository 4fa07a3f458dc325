"""``claims.json``: which claim is which slice, and what its containers get.

It is on the disk before the kubelet hears that a claim is prepared.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import Field

from nbgpu.models import Model

from .cdi import write_whole

FILE = "claims.json"
log = logging.getLogger("nbgpu.agent")


class Prepared(Model):
    """A device of a claim, as the kubelet is told of it."""

    request: str
    pool: str
    device: str
    share_id: str | None = None
    cdi: tuple[str, ...]


class Entry(Model):
    """A claim that is prepared, or being prepared."""

    namespace: str
    name: str
    slice_id: str
    sealed: bool
    parts: tuple[Prepared, ...]
    spec: dict[str, Any]
    """Its CDI specification."""


class _File(Model):
    version: int = 1
    claims: dict[str, Entry] = Field(default_factory=dict[str, Entry])


def claims_in(runtime: Path) -> dict[str, Entry]:
    """Return the claims that a runtime directory's file names, by uid; nothing is changed. OSError, ValueError: it can't be read."""
    try:
        return _File.model_validate_json((runtime / FILE).read_text()).claims
    except FileNotFoundError:
        return {}


class Checkpoint:
    """All claims of this node, by uid. `claims` changes only through `put` and `drop`."""

    def __init__(self, runtime: Path):
        self._path = runtime / FILE
        self.claims: dict[str, Entry] = {}
        try:
            self.claims = claims_in(runtime)
        except (OSError, ValueError) as error:
            # What it said is in the slices' own records too, but for what the kubelet asks for again.
            bad = self._path.with_name(f"{FILE}.bad")
            log.error("%s cannot be read (%s): it is kept as %s, and claims are taken from the slices.", self._path, error, bad.name)
            self._path.replace(bad)

    def put(self, uid: str, entry: Entry) -> None:
        """Note a claim."""
        if self.claims.get(uid) != entry:
            self._save({**self.claims, uid: entry})

    def drop(self, uid: str) -> None:
        """Forget a claim."""
        if uid in self.claims:
            self._save({name: entry for name, entry in self.claims.items() if name != uid})

    def _save(self, claims: dict[str, Entry]) -> None:
        write_whole(self._path, _File(claims=claims).model_dump_json(), 0o600)
        self.claims = claims
