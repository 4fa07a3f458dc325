"""Strangers and wrong roles at the pool's TCP address: a real pool over a real agent, tokens of each role, junk, bombs."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from agent_harness import AgentProcess, missing_libraries, own_agent
from pool_process import PoolProcess, until
from ports import free_port

from nbgpu_pool.api import create_app
from nbgpu_pool.ledger import AgentLedger
from nbgpu_pool.service import Service

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(missing_libraries() is not None, reason=str(missing_libraries()))]
TOKENS = {
    "hub": "Hub_secret_of_hub-a_0123456789",
    "other hub": "Hub_secret_of_hub-b_0123456789",
    "agent": "Agent_secret_0123456789",
    "read": "Read_secret_0123456789",
}
CONFIG = """
tokens:
  - {role: hub, hub: hub-a, env: TOKEN_HUB}
  - {role: hub, hub: hub-b, env: TOKEN_OTHER_HUB}
  - {role: agent, env: TOKEN_AGENT}
  - {role: read, env: TOKEN_READ}
queue: {per_user: 10000, total: 10000}
"""
EVERYBODY = {("get", "/healthz")}
READS = {
    ("get", "/v1/requests"), ("get", "/v1/requests/{request_id}"), ("get", "/v1/requests/{request_id}/events"),
    ("post", "/v1/availability"), ("get", "/v1/availability/events"), ("get", "/v1/devices"), ("get", "/metrics"),
    ("get", "/v1/asks"), ("get", "/v1/reservations"), ("get", "/v1/hints"), ("get", "/v1/hints/events"),
}  # fmt: skip
CHANGES = {
    ("post", "/v1/requests"), ("post", "/v1/launches"), ("delete", "/v1/requests/{request_id}"),
    ("post", "/v1/requests/{request_id}/renew"), ("post", "/v1/requests/{request_id}/resize"),
    ("post", "/v1/requests/{request_id}/replace"),
    ("post", "/v1/requests/{request_id}/prepare"), ("post", "/v1/requests/{request_id}/bind"), ("post", "/v1/release"),
}  # fmt: skip


@dataclass
class Place:
    """A pool that listens by TCP, and its log."""

    pool: PoolProcess
    agent: AgentProcess
    port: int

    def ask(
        self,
        method: str,
        path: str,
        token: str | None = None,
        body: object = None,
        *,
        unix: bool = False,
        headers: dict[str, str] | None = None,
        **more: object,
    ) -> tuple[int, str]:  # fmt: skip
        """Return status and text; of a stream, only its first bytes."""
        auth = {b"Authorization": f"Bearer {token}".encode()} if token is not None else {}
        transport = httpx.HTTPTransport(verify=False, uds=str(self.pool.directory / "pool.sock") if unix else None)
        client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=auth, timeout=10, transport=transport)
        with client, client.stream(method, path, headers=headers, **({} if body is None else {"json": body}), **more) as answer:
            text = next(answer.iter_text(), "") if path.endswith("events") else answer.read().decode()
            return answer.status_code, text

    def grants(self) -> list[str]:
        """Return what the books hold."""
        return sorted(grant.request.request_id + grant.state for grant in self.pool.client.grants())

    def said(self) -> str:
        """Return the pool's whole log."""
        return (self.pool.directory / "pool.log").read_text()

    def rss_mb(self) -> float:
        """Return the pool's memory."""
        assert self.pool.process is not None
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pool.process.pid}/status").read_text())
        assert found
        return int(found[1]) / 1024


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with own_agent() as agent:
        port = free_port()
        (agent.runtime / "pool.yaml").write_text(CONFIG)
        env = {f"TOKEN_{name.upper().replace(' ', '_')}": secret for name, secret in TOKENS.items()}
        arguments = ["--config", str(agent.runtime / "pool.yaml"), "--listen", f"127.0.0.1:{port}", "--log-level", "debug"]
        pool = PoolProcess(agent.runtime, *arguments, env=env)
        pool.start()
        yield Place(pool, agent, port)
        assert pool.process is not None
        assert pool.process.poll() is None, "it must still live\n" + (agent.runtime / "pool.log").read_text()[-3000:]
        pool.kill(signal.SIGTERM)


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    """Each test begins with empty books."""
    yield
    for grant in place.pool.client.grants():
        place.pool.client.cancel(grant.request.request_id)


def body_of(path: str, hub: str, request_id: str) -> object:
    """Return a body that the route takes."""
    owner = {"hub": hub, "user": "ada"}
    request = {"request_id": request_id, "owner": owner, "compute_milli": 10}
    return {
        "/v1/requests": request,
        "/v1/launches": {"request": request},
        "/v1/release": {"owner": owner},
        "/v1/availability": {"owner": owner, "shapes": [{"compute_milli": 100}]},
        "/v1/requests/{request_id}/replace": {**request, "request_id": uuid4().hex},
        "/v1/requests/{request_id}/prepare": {},
        "/v1/requests/{request_id}/bind": {"pid": 2**22},
        "/v1/requests/{request_id}/resize": {"compute_milli": 1000},
    }.get(path)


def operations(place: Place) -> set[tuple[str, str]]:
    paths = json.loads(place.ask("GET", "/openapi.json")[1])["paths"]
    return {(method, path) for path, methods in paths.items() for method in methods}


def test_no_route_is_forgotten(place: Place) -> None:
    """Whoever adds a route says here who may use it; and none is hidden from the schema."""
    assert operations(place) == EVERYBODY | READS | CHANGES
    app = create_app(Service(AgentLedger(place.agent.runtime / "agent.sock")))
    paths = set(app.openapi()["paths"])
    assert {getattr(route, "path", "") for route in app.routes} - paths <= {"/openapi.json", ""}


def test_each_route_refuses_the_wrong_role(place: Place) -> None:
    held = uuid4().hex
    assert place.ask("POST", "/v1/requests", TOKENS["hub"], body_of("/v1/requests", "hub-a", held))[0] == 200
    before = place.grants()
    wrong_tokens = [None, "x", TOKENS["hub"][:-1], TOKENS["hub"] + "x", "ü" * 20]
    for method, path in sorted(operations(place)):
        where = path.replace("{request_id}", held)
        ours = body_of(path, "hub-a", held if path != "/v1/launches" else uuid4().hex)
        for token in wrong_tokens:
            status, text = place.ask(method, where, token, ours)
            assert status == (200 if (method, path) in EVERYBODY else 401), (method, path, token, text)
            assert (method, path) in EVERYBODY or json.loads(text)["error"]["code"] == "unauthorized"
        for role in ("read", "agent"):
            status, text = place.ask(method, where, TOKENS[role], ours)
            assert status == (403 if (method, path) in CHANGES else 200), (method, path, role, text)
        status, text = place.ask(method, where, TOKENS["other hub"], ours)
        if (method, path) in CHANGES or "{request_id}" in path:
            # Another hub's is as unknown as one that never was; in its name it may do nothing.
            allowed = {403, 404} | ({204} if method == "delete" else set())
            assert status in allowed, (method, path, text)
        elif path == "/v1/requests":
            assert json.loads(text) == []
    assert place.grants() == before, "nobody changed anything"
    # Control: the same requests by who may.
    again = uuid4().hex
    for method, path in [*sorted(READS), *sorted(CHANGES - {("delete", "/v1/requests/{request_id}"), ("post", "/v1/release")})]:
        same = held if path == "/v1/requests" else again
        status, text = place.ask(method, path.replace("{request_id}", held), TOKENS["hub"], body_of(path, "hub-a", same))
        assert status not in (401, 403, 404), (method, path, text)
    for method, path in [("delete", "/v1/requests/{request_id}"), ("post", "/v1/release")]:
        assert place.ask(method, path.replace("{request_id}", held), TOKENS["hub"], body_of(path, "hub-a", ""))[0] == 200
    until(lambda: place.grants() == [])  # what was prepared is gone when the agent has said so


def test_control_the_unix_socket_asks_for_no_token(place: Place) -> None:
    """With the guard off the same requests pass: it is the guard that refuses above."""
    assert (place.pool.directory / "pool.sock").stat().st_mode & 0o777 == 0o600
    for method, path in sorted(READS):
        where = path.replace("{request_id}", "no-such-request")
        assert place.ask(method, where, None, body_of(path, "hub-a", ""), unix=True)[0] not in (401, 403)
    made = uuid4().hex
    assert place.ask("POST", "/v1/requests", None, body_of("/v1/requests", "any-hub", made), unix=True)[0] == 200
    assert place.ask("DELETE", f"/v1/requests/{made}", None, unix=True)[0] == 200


def test_a_stranger_is_refused_before_its_body_is_read(place: Place) -> None:
    with socket.create_connection(("127.0.0.1", place.port), timeout=5) as stranger:
        stranger.sendall(b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n{")
        assert stranger.recv(65536).startswith(b"HTTP/1.1 401 ")
        stranger.settimeout(2)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(65536):
                pass
    with socket.create_connection(("127.0.0.1", place.port), timeout=5) as reader:  # nor is who may only read
        head = f"POST /v1/requests HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKENS['read']}\r\nContent-Length: 1000000000\r\n\r\n"
        reader.sendall(head.encode())
        assert reader.recv(65536).startswith(b"HTTP/1.1 403 ")


def test_no_token_is_ever_shown(place: Place) -> None:
    """Tokens in headers, queries and bodies, right and wrong; then everything that the pool says."""
    stray = "Stray_secret_not_of_this_pool_42"
    answers: list[str] = []
    client = httpx.Client(base_url=f"http://127.0.0.1:{place.port}", verify=False)
    for token in (*TOKENS.values(), stray):
        for scheme in ("Bearer", "Basic", ""):
            for path in ("/v1/devices", "/metrics", "/v1/nothing", "/openapi.json", "/healthz", f"/v1/devices?access_token={token}"):
                answer = client.get(path, headers={"Authorization": f"{scheme} {token}".strip()})
                answers += [answer.text, str(answer.headers)]
        for body in (
            {"token": token},
            {"request_id": uuid4().hex, "owner": {"hub": "hub-a", "user": "ada", "token": token}, "compute_milli": 10},
            {"request_id": uuid4().hex, "owner": {"hub": "hub-a", "user": "ada"}, "compute_milli": token},
            [token],
        ):
            place.ask("POST", f"/v1/requests?token={token}", TOKENS["hub"], body)
        with socket.create_connection(("127.0.0.1", place.port), timeout=5) as broken:
            broken.sendall(f"GET /metrics HTTP/1.1\r\nAuthorization: Bearer {token}\r\nbroken\x00header\r\n\r\n".encode())
            answers.append(broken.recv(65536).decode())
    client.close()
    assert place.pool.process is not None
    command = Path(f"/proc/{place.pool.process.pid}/cmdline").read_text()
    everything = "\n".join([*answers, place.said(), command])
    assert "Bearer" in everything
    assert "granted " in place.said(), "control: requests are logged"
    for token in (*TOKENS.values(), stray):
        assert token not in everything


BOMBS: list[tuple[str, bytes, set[int]]] = [
    ("deep lists", b"[" * 100_000 + b"]" * 100_000, {400}),
    ("deep objects", b'{"owner":' * 50_000 + b"1" + b"}" * 50_000, {400}),
    ("deep, never closed", b"[" * 1_000_000, {400}),
    ("a million digits", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"compute_milli":' + b"9" * 1_000_000 + b"}", {400}),
    ("4,000 digits", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"compute_milli":' + b"9" * 4_000 + b"}", {400}),
    ("1e309", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"compute_milli":1e309}', {400}),
    ("NaN", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"compute_milli":NaN}', {400}),
    ("-Infinity", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"memory_bytes":-Infinity}', {400}),
    ("a huge string", b'{"request_id":"' + b"a" * 1_000_000 + b'"}', {400}),
    ("a huge key", b'{"' + b"k" * 1_000_000 + b'":1}', {400}),
    (
        "a huge key more",
        b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"compute_milli":10,"' + b"k" * 1_000_000 + b'":1}',
        {400},
    ),
    ("a huge user", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"' + b"u" * 1_000_000 + b'"},"compute_milli":10}', {400}),
    ("100,000 groups", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"u"},"groups":[' + b'"g",' * 100_000 + b'"g"]}', {400}),
    ("half a surrogate", b'{"request_id":"aaaaaaaa","owner":{"hub":"hub-a","user":"\\ud800"},"compute_milli":10}', {400}),
    ("no UTF-8", b'{"request_id":"\xff\xfe"}', {400}),
    ("UTF-16", '{"request_id":"aaaaaaaa"}'.encode("utf-16"), {400}),
    ("nothing", b"", {400}),
    ("null", b"null", {400}),
    ("zeros", b"\0" * 100_000, {400}),
    ("beyond the limit", b'"' + b"x" * (1024**2 + 1) + b'"', {413}),
    ("far beyond it", b'"' + b"x" * (4 * 1024**2) + b'"', {413}),
]


class Neighbour(threading.Thread):
    """Another client, who asks all the time and notes how long it takes."""

    def __init__(self, place: Place):
        super().__init__(daemon=True)
        self.place, self.stop, self.times = place, threading.Event(), []  # type: ignore[var-annotated]

    def run(self) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{self.place.port}", headers={"Authorization": f"Bearer {TOKENS['read']}"}) as client:
            while not self.stop.wait(0.01):
                began = time.monotonic()
                assert client.get("/v1/devices").status_code == 200
                self.times.append(time.monotonic() - began)


@pytest.fixture
def neighbour(place: Place) -> Iterator[Neighbour]:
    found = Neighbour(place)
    found.start()
    until(lambda: found.times)
    yield found
    count = len(found.times)
    until(lambda: len(found.times) > count + 5)
    found.stop.set()
    found.join(10)
    seen = sorted(found.times)
    print(f"a neighbour's {len(seen)} answers: median {seen[len(seen) // 2] * 1000:.0f} ms, slowest {seen[-1] * 1000:.0f} ms")
    assert seen[-1] < 2, "others are served meanwhile"


@pytest.mark.parametrize("path", ["/v1/requests", "/v1/availability"])
def test_bombs_are_refused_at_once(place: Place, neighbour: Neighbour, path: str) -> None:
    before = place.rss_mb()
    with httpx.Client(base_url=f"http://127.0.0.1:{place.port}", headers={"Authorization": f"Bearer {TOKENS['hub']}"}) as client:
        for name, bomb, statuses in BOMBS:
            began = time.monotonic()
            answer = client.post(path, content=bomb, headers={"Content-Type": "application/json"})
            took = time.monotonic() - began
            assert answer.status_code in statuses, (name, answer.text[:300])
            assert set(answer.json()) == {"error"}, name
            assert len(answer.content) < 2000, f"{name}: the answer repeats it: {len(answer.content)} bytes"
            assert took < 2, f"{name} took {took:.1f} s"
    assert place.rss_mb() < before + 64, "what was refused is forgotten"
    assert place.grants() == []


def test_no_answer_waits_for_an_acknowledgement(place: Place) -> None:
    """By TCP a second half that waits for the first one's receipt takes 40 ms more; half of the answers may be late for other reasons."""
    times = []
    with httpx.Client(base_url=f"http://127.0.0.1:{place.port}", headers={"Authorization": f"Bearer {TOKENS['read']}"}) as client:
        for _ in range(40):
            began = time.monotonic()
            assert client.get("/v1/devices").status_code == 200
            times.append(time.monotonic() - began)
    assert sorted(times)[20] < 0.03


def test_twice_the_same_key_is_one_word(place: Place) -> None:
    """The last one counts, for the check of the hub as for what is done: there is one reader only."""
    made = uuid4().hex
    text = f'{{"request_id":"{made}","owner":{{"hub":"hub-b","user":"u"}},"owner":{{"hub":"hub-a","user":"u"}},"compute_milli":10}}'
    said = {"Content-Type": "application/json"}
    turned = text.replace("hub-b", "hub-?").replace("hub-a", "hub-b").replace("hub-?", "hub-a")
    assert place.ask("POST", "/v1/requests", TOKENS["hub"], content=turned, headers=said)[0] == 403
    assert place.ask("POST", "/v1/requests", TOKENS["hub"], content=text, headers=said)[0] == 200
    assert place.ask("DELETE", f"/v1/requests/{made}", TOKENS["hub"])[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", "\xff"]
)
def test_wrong_content_types(place: Place, kind: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=5)
    headers = {"Authorization": f"Bearer {TOKENS['hub']}", "Content-Type": kind}
    connection.request("POST", "/v1/requests", json.dumps(body_of("/v1/requests", "hub-a", uuid4().hex)), headers)
    assert connection.getresponse().status == 400
    connection.close()
    assert place.grants() == []


def test_a_body_without_an_end(place: Place, neighbour: Neighbour) -> None:
    before = place.rss_mb()
    head = f"POST /v1/requests HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKENS['hub']}\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", place.port), timeout=10) as endless:
        endless.sendall(head.encode())
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 64 * 1024**2:
                endless.sendall(piece)
                sent += len(piece)
        print(f"cut off after {sent / 1024**2:.0f} MiB")
    assert sent < 32 * 1024**2, "it was read on and on"
    assert place.rss_mb() < before + 64


def test_requests_that_are_none(place: Place) -> None:
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /healthz HTTP/one\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"X-Much: more\r\n" * 400_000 + b"\r\n",
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", place.port), timeout=5) as one:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                one.sendall(junk)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                answer = one.recv(200)
            assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), answer
    assert place.ask("GET", "/healthz")[0] == 200
    assert "Traceback" not in place.said()
