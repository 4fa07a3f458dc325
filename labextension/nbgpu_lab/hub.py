"""What this server asks of the JupyterHub that started it, with its own token: another size of its slice, whether it is asked back."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlencode

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.simple_httpclient import HTTPStreamClosedError, HTTPTimeoutError

from nbgpu.errors import NbgpuError, Unavailable

NEEDED = ("JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_USER")
ANSWER_SECONDS = 20.0
_NO_ANSWER = "JupyterHub does not answer, so the slice stays as it is. Try again in a minute."
_NO_ANSWER_YET = "JupyterHub has not answered in time. The slice may change yet: look at its size before you ask again."


def offered() -> bool:
    """Return whether there is a hub to ask; it has the last word on who may."""
    return all(os.environ.get(name) for name in NEEDED)


async def resize(asked: dict[str, Any]) -> Any:
    """Ask for a larger or smaller slice, in the words of the start page; return what the hub answers. Raises as :func:`room` does."""
    return await _ask("POST", "resize", json.dumps(asked))


async def room() -> Any:
    """Return what the hub says is free beside the slice (docs/interfaces.md).

    Raises
    ------
    Unavailable
        The hub is away.
    NbgpuError
        The hub or the pool said no, in its own words.
    """
    return await _ask("GET", "resize")


async def asked() -> Any:
    """Return whether the hub says that this server is asked back (docs/interfaces.md). Raises as :func:`room` does."""
    return await _ask("GET", "asked")


async def _ask(method: str, what: str, body: str | None = None) -> Any:
    if not offered():
        raise NbgpuError("No JupyterHub has started this server: its slice keeps its size.", code="not-offered", status=403)
    env = os.environ
    query = urlencode({"user": env["JUPYTERHUB_USER"], "server": env.get("JUPYTERHUB_SERVER_NAME", "")})
    request = HTTPRequest(
        f"{env['JUPYTERHUB_API_URL'].rstrip('/')}/nbgpu/{what}?{query}",
        method=method,
        headers={"Authorization": f"token {env['JUPYTERHUB_API_TOKEN']}", "Content-Type": "application/json"},
        body=body,
        request_timeout=ANSWER_SECONDS,
        # set by hubs with internal_ssl
        client_key=env.get("JUPYTERHUB_SSL_KEYFILE") or None,
        client_cert=env.get("JUPYTERHUB_SSL_CERTFILE") or None,
        ca_certs=env.get("JUPYTERHUB_SSL_CLIENT_CA") or None,
    )
    try:
        return json.loads((await AsyncHTTPClient().fetch(request)).body)
    except (HTTPTimeoutError, HTTPStreamClosedError) as error:  # it was asked
        raise Unavailable(_NO_ANSWER_YET) from error
    except HTTPClientError as error:
        raise _refusal(error) from None
    except (OSError, ValueError) as error:
        raise Unavailable(_NO_ANSWER) from error


def _refusal(error: HTTPClientError) -> NbgpuError:
    """Return the words of the hub or the pool, where they are ours."""
    try:
        told = json.loads(error.response.body)["error"] if error.response else {}
        message, code, field = str(told["message"]), str(told.get("code", "error")), told.get("field")
    except (ValueError, KeyError, TypeError):
        if error.code in (403, 404):
            return NbgpuError("This JupyterHub does not let a running server change its slice.", code="not-offered", status=403)
        return Unavailable(_NO_ANSWER)
    return NbgpuError(message, code=code, status=error.code, field=field if isinstance(field, str) else None)
