"""The HTTP client against servers that are away, slow, broken, foreign, or say no: always one sentence, never a stack trace."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbgpu.client import AgentClient, Client, PoolClient
from nbgpu.errors import NbgpuError, Unavailable

Serve = Callable[[bytes], Path]


@pytest.fixture
def serve(runtime: Path) -> Iterator[Serve]:
    """Return a function that starts a server which answers every request with the same bytes."""
    listeners: list[socket.socket] = []

    def start(answer: bytes) -> Path:
        path = runtime / f"{len(listeners)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)
        threading.Thread(target=answer_all, args=(listener, answer), daemon=True).start()
        return path

    yield start
    for listener in listeners:
        listener.close()


def answer_all(listener: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(answer)


def http(status: str, body: bytes, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize("there", [0, 7])
def test_an_answer_that_was_cut_off_is_none(serve: Serve, there: int) -> None:
    """Its server was killed between the head and the end of the body: that is no empty answer."""
    whole = http("200 OK", b'{"gone": true}')
    path = serve(whole[: whole.index(b"\r\n\r\n") + 4 + there])
    with pytest.raises(Unavailable, match="broke off"):
        AgentClient(path).release("a-slice")
    assert AgentClient(serve(whole)).release("a-slice"), "control"


def test_no_socket_says_that_it_is_not_running(runtime: Path) -> None:
    with pytest.raises(Unavailable, match=r"The agent is not running: there is no .*agent.sock") as caught:
        AgentClient(runtime / "agent.sock").node()
    assert caught.value.code == "away"


def test_a_socket_that_its_server_left_behind(runtime: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(runtime / "pool.sock"))
    with pytest.raises(Unavailable, match="nobody listens"):
        PoolClient(runtime / "pool.sock").devices()


def test_a_server_that_does_not_answer_in_time(runtime: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(runtime / "slow.sock"))
        silent.listen()
        with pytest.raises(Unavailable, match=r"does not answer within 0.2 s") as caught:
            Client(runtime / "slow.sock", "pool", timeout_seconds=0.2).call("GET", "/v1/devices")
    assert caught.value.code == "slow"


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH\r\n", http("200 OK", b"")[:20], b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"],
    ids=["eof", "ssh", "cut", "short"],
)
def test_something_that_is_not_http(serve: Serve, answer: bytes) -> None:
    with pytest.raises(Unavailable):
        AgentClient(serve(answer)).node()


def test_an_answer_of_another_version_is_said_to_be_that(serve: Serve) -> None:
    with pytest.raises(Unavailable, match="another version") as caught:
        AgentClient(serve(http("200 OK", b'{"from": "the future"}'))).node()
    assert caught.value.code == "version"


def test_a_refusal_comes_with_its_own_words(serve: Serve) -> None:
    body = json.dumps({"error": {"code": "quota", "message": "Your quota is half a GPU.", "field": "gpu_fraction"}}).encode()
    with pytest.raises(NbgpuError) as caught:
        PoolClient(serve(http("403 Forbidden", body))).devices()
    assert (caught.value.message, caught.value.code, caught.value.status, caught.value.field) == (
        "Your quota is half a GPU.", "quota", 403, "gpu_fraction",
    )  # fmt: skip


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"[]", b'{"error": "text"}', b'{"detail": "x"}', b"\xff\xfe"], ids=repr)
def test_a_failure_without_our_words_names_the_status(serve: Serve, body: bytes) -> None:
    with pytest.raises(NbgpuError, match="status 502"):
        PoolClient(serve(http("502 Bad Gateway", body))).devices()


def test_no_content_is_none(serve: Serve) -> None:
    assert PoolClient(serve(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")).cancel("a" * 32) is None


def test_server_sent_events(serve: Serve) -> None:
    body = b': hello\n\nevent: grant\ndata: {"n": 1}\n\nevent: grant\ndata: {"n":\ndata: 2}\n\ndata: 3\n\n'
    client = Client(serve(http("200 OK", body, "text/event-stream")), "pool")
    assert list(client.stream("/x")) == [("grant", {"n": 1}), ("grant", {"n": 2}), ("message", 3)]


@pytest.mark.parametrize("data", [b"{bad", b"[" * 100_000], ids=["bad", "nested too deep"])
def test_a_stream_that_breaks_off_is_unavailable(serve: Serve, data: bytes) -> None:
    client = Client(serve(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\ndata: " + data + b"\n\n"), "pool")
    with pytest.raises(Unavailable):
        list(client.stream("/x"))
