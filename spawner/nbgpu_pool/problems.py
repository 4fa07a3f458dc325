"""Every error in the one format, with words for people; nothing of the inside shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from nbgpu.errors import InvalidValue, NbgpuError

log = logging.getLogger("nbgpu.pool")

_NAME_SHOWN = 60
_NAME = "text of 1 to 255 characters"
_ALLOWED = {
    "request_id": "8 to 48 lower-case letters, digits and dashes, with no dash at either end",
    "except_request_id": "8 to 48 lower-case letters, digits and dashes, with no dash at either end, or left out",
    "device_count": "1 to 16",
    "compute_milli": "1 to 1000 (thousandths of one GPU)",
    "memory_milli": "1 to 1000 (thousandths of one GPU's memory)",
    "memory_bytes": f"{1024**2} to {2**60} (1 MiB to 1 EiB)",
    "hub": _NAME,
    "user": _NAME,
    "server": "text of at most 255 characters",
    "model": _NAME,
    "groups": "a list of at most 1000 names of 1 to 255 characters",
    "shapes": "a list of at most 100 shapes",
    "mode": "strict or burst",
    "pid": "the id of a process, 1 to 4194304, or null",
    "uid": "the id of a user, 0 to 4294967294, or null",
    "state": "queued, reserved, bound, releasing or gone",
}


class _Problem(BaseModel):
    code: str
    message: str
    field: str | None = None


class ErrorBody(BaseModel):
    """How every error looks."""

    error: _Problem


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Invalid: field and allowed range."},
    401: {"model": ErrorBody, "description": "No token, or an unknown one."},
    403: {"model": ErrorBody, "description": "Quota, impossible, or not this role's."},
    404: {"model": ErrorBody, "description": "Unknown."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    409: {"model": ErrorBody, "description": "The id or its state does not allow it."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "The speaker has as many event streams as it may."},
    503: {"model": ErrorBody, "description": "Starting, or a part is away."},
}


def install_handlers(app: FastAPI) -> None:
    """Answer all errors of `app` in the one format."""
    app.add_exception_handler(NbgpuError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)


def without_422(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an OpenAPI schema without FastAPI's own validation answer: invalid input is 400 here."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
    return schema


def answer_of(error: NbgpuError) -> Response:
    """Return the answer that says what is wrong."""
    return JSONResponse(error.as_json(), error.status, headers={"Retry-After": "2"} if error.status == 503 else None)


async def _known(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, NbgpuError)
    return answer_of(error)


async def _invalid(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answer_of(words_for(error.errors()))


def words_for(errors: Sequence[Any]) -> NbgpuError:
    """Return the first validation error with its field and what is allowed there."""
    first = errors[0]
    path = [_shown(str(part)) for part in first["loc"][1:]]
    kind = first["type"]
    if kind == "json_invalid":
        return NbgpuError("The body is no JSON.", code="invalid", status=400, field="body")
    field = ".".join(path) or "body"
    leaf = next((part for part in reversed(path) if not part.isdigit()), "body")
    if kind == "missing":
        return NbgpuError(f"{field} is missing; it must be {_ALLOWED.get(leaf, 'given')}.", code="invalid", status=400, field=field)
    if kind == "extra_forbidden":
        return NbgpuError(f"{field} is not known here; leave it out.", code="invalid", status=400, field=field)
    if leaf in _ALLOWED:
        return InvalidValue(field, first.get("input"), _ALLOWED[leaf])
    return NbgpuError(f"{field}: {first['msg']}.", code="invalid", status=400, field=field)


def _shown(name: str) -> str:
    return name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..."


async def _http(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # FastAPI's word for a body that cannot be decoded
        return answer_of(NbgpuError("The body is no JSON.", code="invalid", status=400, field="body"))
    phrase = HTTPStatus(error.status_code).phrase
    code = {404: "unknown", 405: "method"}.get(error.status_code, "http")
    body = NbgpuError(f"{phrase}: see /openapi.json for what there is.", code=code, status=error.status_code).as_json()
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _unknown(http: HttpRequest, error: Exception) -> Response:
    log.error("%s %s failed", http.method, http.url.path, exc_info=error)
    return answer_of(NbgpuError("The pool failed at this request; its log says why.", code="internal", status=500))
