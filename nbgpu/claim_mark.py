"""The pool's mark on the very object that it made: over a claim's uid, which nobody knows before the claim is there.

A claim's seal is over its name and its words: who keeps a copy could make it once more when the first is gone. The pool marks what it has
made, or has met under the name while it granted just that slice; an agent prepares nothing of the pool's without. Pure.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any, cast

MADE_ANNOTATION = "nbgpu.io/made"
Json = dict[str, Any]


def mark_patch(claim: Json, key: bytes) -> Json:
    """Return the patch that marks a claim as made by the pool.

    Parameters
    ----------
    claim : dict
        As the API server returned it: with its uid.
    key : bytes
        The installation's key.
    """
    return {"metadata": {"annotations": {MADE_ANNOTATION: _mark(claim, key)}}}


def is_marked(claim: Json, key: bytes | None) -> bool | None:
    """Return whether a claim's mark is of the pool, for that very object; None where it has none (yet)."""
    annotations = _dict(_dict(claim.get("metadata")).get("annotations"))
    told = annotations.get(MADE_ANNOTATION)
    if told is None:
        return None
    return key is not None and isinstance(told, str) and hmac.compare_digest(_mark(claim, key).encode(), told.encode("utf-8", "replace"))


def _mark(claim: Json, key: bytes) -> str:
    meta = _dict(claim.get("metadata"))
    told = {"made": [str(meta.get(name)) for name in ("uid", "namespace", "name")]}
    return hmac.new(key, json.dumps(told, separators=(",", ":")).encode(), hashlib.sha256).hexdigest()


def _dict(value: object) -> Json:
    return cast("Json", value) if isinstance(value, dict) else {}
