"""The Kubernetes API as nbgpu uses it: raw JSON over paths, lists in pages, watches that resume, a cache that follows.

Credentials come from the official client (`kubernetes.config`: a service account's rotating token, or a kubeconfig with whatever it
holds), the requests go through httpx: the official client is synchronous, so every watch would hold a thread that nothing can cancel, and
its models take 10.7 s and 526 MB for 20,000 claims. Both imports together add 35 MB to a bare Python and 10 MB to an agent (CPython 3.11).

`import nbgpu` does not import this. Everything here belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import httpx
from kubernetes.client import Configuration  # pyright: ignore[reportMissingTypeStubs]
from kubernetes.config import (  # pyright: ignore[reportMissingTypeStubs]
    load_incluster_config,  # pyright: ignore[reportUnknownVariableType]
    load_kube_config,  # pyright: ignore[reportUnknownVariableType]
)

from .claims import as_body
from .errors import NbgpuError, Unavailable

Json = dict[str, Any]
Kind = Literal["added", "modified", "deleted", "bookmark"]

CALL_SECONDS = 20.0
CONNECT_SECONDS = 5.0
WATCH_SECONDS = 50
"""A watch is asked anew so often, so that one whose peer vanished is noticed within `WATCH_SECONDS` + `WATCH_GRACE_SECONDS`."""
WATCH_GRACE_SECONDS = 10.0
PAGE = 500
PAGE_BYTES = 8 * 1024**2
"""A page that has more is asked for anew with fewer objects: an object may have 1.5 MiB, and some hundred of those in one answer are more
than a pool or an agent may have of memory. Who makes objects anywhere would end them all, and again whenever they start.
"""
DEEPEST = 100
"""What is nested deeper in an answer is read as null; nothing that is read here is."""
TOKEN_SECONDS = 30.0
"""How old a token may be before it is read again."""
_PATCHES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}


class KubeError(NbgpuError):
    """The API server said no. `status` is its HTTP status, `reason` its word for it (``AlreadyExists``, ...)."""

    code = "kubernetes"
    status = 502
    reason = ""


class NotFound(KubeError):
    """404: no such object, or no such kind of object on this cluster."""

    code = "kubernetes-not-found"
    status = 404


class Conflict(KubeError):
    """409: it exists already (`reason` ``AlreadyExists``), or it is no longer what the call expected (``Conflict``)."""

    code = "kubernetes-conflict"
    status = 409


class Expired(KubeError):
    """410: that version of the list is gone; list again."""

    code = "kubernetes-expired"
    status = 410


class Rejected(KubeError):
    """400 or 422: the API server takes no such object; the message is its own."""

    code = "kubernetes-rejected"
    status = 422


class NotAllowed(KubeError):
    """401 or 403: these credentials may not do that, or an admission policy forbids it."""

    code = "kubernetes-forbidden"
    status = 403


class ApiServerAway(Unavailable):
    """No answer, or one that says "later" (429, 5xx): what was asked may or may not have happened."""

    code = "kubernetes-away"


class _TooLarge(Exception):
    """An answer has more bytes than it may."""


class NoCluster(NbgpuError):
    """There are no credentials for a cluster here."""

    code = "no-cluster"
    status = 503


class Listed(NamedTuple):
    """A list as of one version. Items carry no ``kind`` and ``apiVersion`` of their own, as the API server sends them."""

    items: list[Json]
    version: str


class Event(NamedTuple):
    """One line of a watch. A bookmark's object has only a version."""

    kind: Kind
    object: Json

    @property
    def version(self) -> str:
        """The list's version after this event."""
        return version_of(self.object)


def path(api: str, plural: str, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
    """Return the path of objects: ``path("resource.k8s.io/v1", "resourceclaims", "jhub", "x")``."""
    parts = ["/api/v1" if api == "v1" else f"/apis/{api}"]
    if namespace:
        parts.append(f"namespaces/{namespace}")
    parts += [part for part in (plural, name, sub) if part]
    return "/".join(parts)


def version_of(thing: Json) -> str:
    """Return an object's or a list's resource version."""
    return str(thing.get("metadata", {}).get("resourceVersion", ""))


def newer(version: str, than: str) -> bool:
    """Return whether a resource version of one kind of objects is later than another; they are numbers since Kubernetes 1.35."""
    try:
        return int(version) > int(than or 0)
    except ValueError:
        return version != than


def credentials(kubeconfig: Path | None = None) -> Any:
    """Return the official client's configuration, by `kubeconfig`, ``$KUBECONFIG``, the pod's service account or ``~/.kube/config``.

    Raises
    ------
    NoCluster
        None of them can be used.
    """
    found = Configuration()
    named = kubeconfig or os.environ.get("KUBECONFIG")
    try:
        if not named and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=found)
        else:
            load_kube_config(config_file=str(named) if named else None, client_configuration=found)
    except Exception as error:  # its own exceptions, YAML's, the file system's, an exec plugin's: all mean the same here
        where = f"kubeconfig {named}" if named else "a pod's service account or ~/.kube/config"
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise NoCluster(f"No way to a Kubernetes cluster by {where}: {told}. Set KUBECONFIG to a readable kubeconfig.") from None
    return found


def seal_key(file: Path) -> bytes:
    """Return the installation's key, which pool and agents share: the file's content, without white space around it."""
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise NbgpuError(f"The key that seals claims cannot be read from {file}: {error.strerror}.", code="config") from None
    if len(key) < 16:
        raise NbgpuError(f"The key that seals claims in {file} is shorter than 16 characters.", code="config")
    return key


class _Token(httpx.Auth):
    """The bearer token as it is now: a service account's is replaced every hour."""

    def __init__(self, configuration: Any):
        self._configuration = configuration
        self._read_at = -TOKEN_SECONDS
        self._header: str | None = None
        self._reading = asyncio.Lock()

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send with the token; once more with a fresh one after a 401."""
        async with self._reading:  # while one call reads the token, none goes without: an API server takes it for nobody's, and says 403
            if time.monotonic() - self._read_at > TOKEN_SECONDS:
                await self._refresh()
        response = yield self._with_token(request)
        if response.status_code == 401 and self._header:
            await self._refresh()
            yield self._with_token(request)

    def _with_token(self, request: httpx.Request) -> httpx.Request:
        if self._header:
            request.headers["Authorization"] = self._header
        return request

    async def _refresh(self) -> None:
        self._read_at = time.monotonic()
        if not self._configuration.api_key:
            return
        try:  # a file, or a program that a kubeconfig names
            told = await asyncio.to_thread(self._configuration.get_api_key_with_prefix, "BearerToken", "authorization")
        except Exception as error:
            if self._header is None:
                raise NoCluster(f"The token for the Kubernetes API server cannot be read ({error}).") from None
            return  # the one from before may still be good
        kind, _, secret = (told or "").partition(" ")
        self._header = f"{kind} {secret.strip()}" if secret else None


class Kube:
    """One cluster's API.

    Parameters
    ----------
    configuration : kubernetes.client.Configuration, optional
        From `credentials`, which also finds it when it is left out.
    """

    def __init__(self, configuration: Any = None):
        configuration = configuration or credentials()
        self.host = str(configuration.host).rstrip("/")
        self._extensions: Json = {"sni_hostname": configuration.tls_server_name} if configuration.tls_server_name else {}
        proxy = str(configuration.proxy) if configuration.proxy else None
        self._http = httpx.AsyncClient(
            base_url=self.host,
            verify=_tls(configuration) if self.host.startswith("https") else False,
            auth=_Token(configuration),
            timeout=httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=60.0),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "nbgpu"},
            proxy=proxy,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def get(self, path: str, **params: str) -> Json:
        """Return an object, or a sub-resource.

        Raises
        ------
        KubeError, ApiServerAway
            As the subclasses say; the message names the object.
        """
        return await self._call("GET", path, params=params)

    async def list(self, path: str, *, labels: str = "", fields: str = "", page: int = PAGE) -> Listed:
        """Return all objects of a path, read in pages; `Expired` when it took so long that the list's version went."""
        items: list[Json] = []
        async with aclosing(self.pages(path, labels=labels, fields=fields, page=page)) as pages:
            version = ""
            async for found in pages:
                items += found.items
                version = found.version
        return Listed(items, version)

    async def pages(self, path: str, *, labels: str = "", fields: str = "", page: int = PAGE) -> AsyncGenerator[Listed, None]:
        """Yield a list page by page, for those who keep only a part of each object."""
        chosen = {name: value for name, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}
        size = page

        async def read(more: str) -> Json:
            nonlocal size
            params = {**chosen, **({"continue": more} if more else {})}
            while True:
                try:
                    found = await self._call("GET", path, params={**params, "limit": str(size)}, most=PAGE_BYTES if size > 1 else None)
                except _TooLarge:
                    size = max(1, size // 4)
                else:
                    size = min(page, size * 2)
                    return found

        ahead = asyncio.ensure_future(read(""))
        try:
            while True:
                found = await ahead
                meta = found.get("metadata", {})
                more = meta.get("continue")
                if more:  # the server writes the next page while this one is looked at
                    ahead = asyncio.ensure_future(read(more))
                yield Listed(found.get("items") or [], str(meta.get("resourceVersion", "")))
                if not more:
                    return
        finally:
            ahead.cancel()

    async def create(self, path: str, body: Json, *, dry_run: bool = False) -> Json:
        """Create an object under the path of its kind; `Conflict` when its name is taken. A dry run keeps nothing of it."""
        return await self._call("POST", path, body, params={"dryRun": "All"} if dry_run else None)

    async def replace(self, path: str, body: Json) -> Json:
        """Replace an object; `Conflict` when it is no longer at the body's ``resourceVersion``."""
        return await self._call("PUT", path, body)

    async def patch(
        self,
        path: str,
        body: Any,
        *,
        kind: Literal["merge", "json", "apply"] = "merge",
        uid: str | None = None,
        version: str | None = None,
        manager: str = "nbgpu",
        force: bool = False,
    ) -> Json:
        """Change a part of an object.

        Parameters
        ----------
        uid, version : str, optional
            Only while it is that object (`Conflict` otherwise), and at that version; for ``merge``.
        manager : str
            Who owns the fields of an ``apply``; `force` takes them from others.
        """
        expected = {name: value for name, value in (("uid", uid), ("resourceVersion", version)) if value}
        if expected and kind == "merge":
            body = {**body, "metadata": {**body.get("metadata", {}), **expected}}
        params = {"fieldManager": manager, **({"force": "true"} if force and kind == "apply" else {})}
        try:
            return await self._call("PATCH", path, body, params=params, content_type=_PATCHES[kind])
        except Rejected as error:
            if uid and "metadata.uid" in error.message:  # that is how it says that it is another object
                raise Conflict(error.message) from None
            raise

    async def delete(self, path: str, *, uid: str | None = None, version: str | None = None, grace_seconds: int | None = None) -> Json:
        """Delete an object; return it where something still holds it (``deletionTimestamp`` set), else a status.

        Parameters
        ----------
        uid, version : str, optional
            Only that very object, at that version: `Conflict` otherwise.
        """
        expected = {name: value for name, value in (("uid", uid), ("resourceVersion", version)) if value}
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if expected:
            options["preconditions"] = expected
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._call("DELETE", path, options)

    async def watch(
        self, path: str, version: str, *, labels: str = "", fields: str = "", opened: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Event, None]:
        """Yield what changes after `version`, until the watch ends: after `WATCH_SECONDS`, or when its connection drops.

        Parameters
        ----------
        opened : callable
            Called once the server has answered: it is there.

        Raises
        ------
        Expired
            The version is too old: list again.
        ApiServerAway, KubeError
            It cannot be watched now.
        """
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        params = {name: value for name, value in params.items() if value}
        timeout = httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS, read=WATCH_SECONDS + WATCH_GRACE_SECONDS)
        there = False
        try:
            async with self._http.stream("GET", path, params=params, timeout=timeout, extensions=self._extensions) as response:
                if response.status_code >= 400:
                    raise _refusal("watch", path, response.status_code, await response.aread())
                there = True
                opened()
                rest = b""
                async for chunk in response.aiter_raw():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        if line.strip():
                            yield _event(path, line)
        except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
            if not there:  # dropped later, it has only ended: the next one tells whether the server is away
                raise _away(self.host, error) from error

    async def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        most: int | None = None,
    ) -> Json:
        content = None if body is None else as_body(body)
        headers = {} if content is None else {"Content-Type": content_type}
        request = {"params": dict(params or {}), "content": content, "headers": headers, "extensions": self._extensions}
        try:
            status, told = await asyncio.wait_for(self._send(method, path, request, most), CALL_SECONDS + CONNECT_SECONDS)
            if status >= 400:
                raise _refusal(method, path, status, told)
            try:
                return cast("Json", json.loads(told))
            except (RecursionError, UnicodeDecodeError):
                return await asyncio.to_thread(_loads, told)  # a large page takes seconds
        except (httpx.HTTPError, httpx.StreamError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
            raise _away(self.host, error) from error

    async def _send(self, method: str, path: str, request: Json, most: int | None) -> tuple[int, bytes]:
        """Return status and body of an answer; `_TooLarge` as soon as it has more than `most` bytes."""
        async with self._http.stream(method, path, **request) as response:
            parts: list[bytes] = []
            left = most
            async for part in response.aiter_bytes():
                parts.append(part)
                if left is not None and (left := left - len(part)) < 0:
                    raise _TooLarge
            return response.status_code, b"".join(parts)


def _tls(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if not configuration.verify_ssl:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    return context


def _away(host: str, error: Exception) -> ApiServerAway:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return ApiServerAway(f"The Kubernetes API server {host} does not answer ({why}); nbgpu goes on when it does.")


_VERBS = {"GET": "read", "POST": "create", "PUT": "replace", "PATCH": "change", "DELETE": "delete"}
_REFUSALS: dict[int, type[KubeError]] = {
    400: Rejected, 401: NotAllowed, 403: NotAllowed, 404: NotFound, 409: Conflict, 410: Expired, 422: Rejected,
}  # fmt: skip


def _refusal(verb: str, path: str, status: int, content: bytes) -> NbgpuError:
    """Return the error that an answer of the API server means."""
    try:
        told: Json = json.loads(content)
        words, reason = " ".join(str(told.get("message", "")).split())[:500], str(told.get("reason", ""))
    except (ValueError, AttributeError):
        words, reason = "", ""
    doing = f"{_VERBS.get(verb, verb)} {path}"
    if status == 429 or status >= 500:
        return ApiServerAway(f"The Kubernetes API server cannot {doing} now ({status}: {words or reason or 'no reason given'}); try again.")
    kind = _REFUSALS.get(status, KubeError)
    message = f"Kubernetes refuses to {doing}: {str(words or reason or status).rstrip('.')}."
    if kind is NotAllowed:
        message += " Look at the roles that nbgpu's chart gives, and at admission policies."
    error = kind(message, status=status)
    error.reason = reason
    return error


_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]+|[\]}]+', re.DOTALL)
"""A string of JSON, or where one or several things begin, or end."""
_QUOTE = ord('"')


def _loads(content: bytes) -> Json:
    """Return what an answer says.

    The API server tells opaque parameters of claims byte by byte as somebody wrote them, also nested 5,000 deep, or in bytes that are no
    text. What `json` cannot read of one object must not hide all the others.
    """
    try:
        return cast("Json", json.loads(content))
    except UnicodeDecodeError:
        return _loads(content.decode("utf-8", "replace").encode())
    except RecursionError:
        return cast("Json", json.loads(_flat(content)))


def _flat(content: bytes) -> bytes:
    """Return JSON with null in place of all that is nested deeper than `DEEPEST`."""
    kept: list[bytes] = []
    begin = depth = 0
    for token in _TOKEN.finditer(content):
        first = content[token.start()]
        if first == _QUOTE:
            continue
        count = token.end() - token.start()
        if first in b"[{":
            if depth <= DEEPEST < depth + count:
                kept.append(content[begin : token.start() + DEEPEST - depth])
            depth += count
        else:
            if depth - count <= DEEPEST < depth:
                kept.append(b"null")
                begin = token.start() + depth - DEEPEST
            depth -= count
    return b"".join([*kept, content[begin:]])


def _event(path: str, line: bytes) -> Event:
    told = _loads(line)
    kind, thing = str(told["type"]).lower(), cast("Json", told["object"])
    if kind == "error":
        raise _refusal("watch", path, int(thing.get("code", 500)), json.dumps(thing).encode())
    if kind not in ("added", "modified", "deleted", "bookmark"):
        raise ValueError(f"a watch of {path} says {kind!r}")
    return Event(kind, thing)


def pause_seconds(tries: int, most: float = 10.0) -> float:
    """Return how long to wait before the next try: 0.2 s, doubled each time up to `most`, within a half of it at random."""
    return min(most, 0.2 * 2 ** min(tries, 10)) * random.uniform(0.5, 1.0)
